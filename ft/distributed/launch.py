"""The processes that torchrun has started, connected to each other: what it tells them is read here alone.

It does so by environment variables, of https://docs.pytorch.org/docs/stable/elastic/run.html.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch

from ft.distributed.ranks import ALONE, Ranks
from ft.errors import FtError, UsageError, shown

PATIENCE = 2.0  # times --process-timeout until an exchange of gradients gives up, so that the other group does so first


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[Ranks]:
    """The processes that torchrun has started, connected; without torchrun just this one.

    Args:
        device: where this process computes.
        timeout: seconds after which a process that does not answer is given up.

    Raises:
        FtError: the others cannot be reached.
        UsageError: what torchrun tells is incomplete.
    """
    if world_size() == 1:
        yield ALONE
        return
    import torch.distributed as dist

    host, port, rank, size, local_rank = _places()
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    limit = timedelta(seconds=timeout)
    has_ended_well = False
    try:
        try:
            store = dist.TCPStore(host, port, is_master=rank == 0 and not kept_by_torchrun, timeout=limit)  # type: ignore[attr-defined]
            # The store outlives the processes, and so would the keys by which an earlier attempt found together.
            own_keys = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=own_keys, rank=rank, world_size=size, timeout=PATIENCE * limit)
            control = dist.new_group(backend="gloo", timeout=limit)
        except RuntimeError as error:
            detail = str(error).partition("\n")[0]
            raise FtError(
                f"process {rank} of {size} found not all others at {host}:{port} within --process-timeout {timeout:g} "
                f"s: {detail}"
            ) from error
        begun = attempt > 0 and bool(store.check(["begun"]))
        ranks = Ranks(rank, size, local_rank, begun, control, store, attempt)
        with ranks.missing_told():
            yield ranks
        has_ended_well = True
    finally:
        if dist.is_initialized():
            with suppress(RuntimeError):  # of a connection that is broken already; the error above says more
                if has_ended_well:
                    dist.destroy_process_group()
                else:  # what is queued may never be answered: NCCL would wait for it
                    # Private, and without a public equivalent: a PyTorch that lacks it only ends more slowly.
                    getattr(dist.distributed_c10d, "_abort_process_group", dist.destroy_process_group)()


def world_size() -> int:
    """How many processes torchrun, if it is torchrun that started this one, has started for the run."""
    return _number("WORLD_SIZE", if_absent=1)


def local_rank() -> int:
    """The number of this process among those on its machine, from 0."""
    return _number("LOCAL_RANK", if_absent=0)


def _places() -> tuple[str, int, int, int, int]:
    names = ("MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    absent = [name for name in ("MASTER_ADDR", *names) if not os.environ.get(name)]
    if absent:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(absent)} are not set: start several processes "
            "by torchrun, or unset WORLD_SIZE"
        )
    port, rank, size, local = map(_number, names)
    return os.environ["MASTER_ADDR"], port, rank, size, local


def _number(name: str, if_absent: int | None = None) -> int:
    text = os.environ.get(name) or str(if_absent)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(
            f"the environment says {name}={shown(text)}, it must be a number: start by torchrun, or unset it"
        )
    return int(text)
