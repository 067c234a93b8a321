"""Connect the processes that torchrun has started. This module reads the environment variables of torchrun.

They are documented at https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch

from ft.distributed.ranks import SINGLE_PROCESS, Ranks
from ft.errors import FtError, UsageError, shown

DEFAULT_GROUP_TIMEOUT = 2.0  # times --process-timeout, so that the control group, which names the rank, times out first


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[Ranks]:
    """A context in which the processes that torchrun has started are connected; without torchrun just this process.

    Args:
        device: of this process.
        timeout: seconds after which a process that does not answer counts as lost.

    Raises:
        FtError: the other processes cannot be reached, or the port of rank 0 is taken.
        UsageError: the environment variables of torchrun are incomplete.
    """
    if world_size() == 1:
        yield SINGLE_PROCESS
        return
    import torch.distributed as dist

    host, port, rank, size, local_rank = _read_rendezvous()
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    limit = timedelta(seconds=timeout)
    has_ended_well = False
    try:
        try:
            store = dist.TCPStore(host, port, is_master=rank == 0 and not kept_by_torchrun, timeout=limit)  # type: ignore[attr-defined]
            # The store of torchrun outlives the processes: a restart must not read the keys of the attempt before.
            own_keys = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=own_keys, rank=rank, world_size=size, timeout=DEFAULT_GROUP_TIMEOUT * limit
            )
            control = dist.new_group(backend="gloo", timeout=limit)
        except RuntimeError as error:
            detail = str(error).partition("\n")[0]
            if "EADDRINUSE" in str(error):
                raise FtError(
                    f"port {port} of {host} is in use by another program, perhaps by another run on this machine: "
                    "choose a free one by torchrun --master-port (or MASTER_PORT), or have torchrun --standalone "
                    "choose one"
                ) from error
            raise FtError(
                f"process {rank} of {size} did not find all others at {host}:{port} within --process-timeout "
                f"{timeout:g} s: {detail}"
            ) from error
        begun = attempt > 0 and bool(store.check(["begun"]))
        ranks = Ranks(rank, size, local_rank, begun, control, store, attempt)
        with ranks.name_missing_ranks():
            yield ranks
        has_ended_well = True
    finally:
        if dist.is_initialized():
            with suppress(RuntimeError):  # the connection is broken already; the error above has the reason
                if has_ended_well:
                    dist.destroy_process_group()
                else:  # NCCL would wait for queued operations that may never finish
                    # Private, without a public equivalent: a PyTorch that lacks it only ends more slowly.
                    getattr(dist.distributed_c10d, "_abort_process_group", dist.destroy_process_group)()


def world_size() -> int:
    """The number of processes of the run: 1 without torchrun."""
    return _read_number("WORLD_SIZE", if_absent=1)


def rank() -> int:
    """The rank of this process in the run, from 0."""
    return _read_number("RANK", if_absent=0)


def local_rank() -> int:
    """The rank of this process on its machine, from 0."""
    return _read_number("LOCAL_RANK", if_absent=0)


def _read_rendezvous() -> tuple[str, int, int, int, int]:
    names = ("MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    absent = [name for name in ("MASTER_ADDR", *names) if not os.environ.get(name)]
    if absent:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(absent)} are not set: start several processes "
            "by torchrun, or unset WORLD_SIZE"
        )
    port, rank, size, local = map(_read_number, names)
    return os.environ["MASTER_ADDR"], port, rank, size, local


def _read_number(name: str, if_absent: int | None = None) -> int:
    text = os.environ.get(name) or str(if_absent)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(
            f"the environment variable {name} is {shown(text)}, it must be a number: start by torchrun, or unset it"
        )
    return int(text)
