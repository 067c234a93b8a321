"""Several processes that train one model together: torchrun starts them, `torch.distributed` connects them.

    torchrun --nproc-per-node 2 run.py

Each rank has a full replica of the model and computes the gradients of its part of every batch. The gradients are
summed over all ranks during the backward pass, so that all ranks make the same update and stay identical. With --shard
each rank keeps a shard of the weights, gradients and moments, and gathers the parameters of a block to compute it.

There are two process groups. The default group all-reduces tensors on the device; on a GPU this is queued. The control
group uses gloo on the CPU for decisions such as when to stop, so that no GPU waits for them.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ft.data.batches import IGNORED
from ft.data.examples import Example
from ft.errors import FtError, UsageError
from ft.model.gpt2 import GPT2

T = TypeVar("T")

ROLL_CALL_SECONDS = 5.0  # for which the ranks that miss another one wait for each other


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and its collective operations. In a single process these do nothing.

    Attributes:
        rank: the rank of this process, from 0. Rank 0 prints, writes metrics and saves.
        size: the world size.
        local_rank: the rank of this process on its machine, from 0.
        is_restarted: torchrun has restarted the processes after the run had started.
        control: the process group on the CPU, for decisions.
        store: the key-value store of torchrun, or of rank 0.
        attempt: the number of restarts by torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    is_restarted: bool = False
    control: Any = None
    store: Any = None
    attempt: int = 0

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that logs, writes metrics and saves."""
        return self.rank == 0

    # --- tensors of the training step, on its device

    def local_items(self, items: Sequence[T]) -> list[T]:
        """The items of this rank: every `size`-th, from its rank on. Ranks differ by at most one item."""
        return list(items[self.rank :: self.size])

    def local_examples(self, examples: Sequence[Example]) -> list[Example]:
        """The examples of this rank in a batch.

        If there are fewer examples than ranks, the others get one without targets, which adds nothing to the loss or
        the gradients: every rank must take part in the same collective operations.
        """
        return self.local_items(examples) or [Example(examples[0].input_ids, [IGNORED] * len(examples[0].target_ids))]

    def gradient_sync(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """A context for a forward and backward pass that all-reduces gradients only for the `last` batch of a step."""
        if self.size == 1:
            return nullcontext()
        if hasattr(model, "set_requires_gradient_sync"):  # sharded by FSDP2
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last else model.no_sync()  # type: ignore[operator]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place. On a GPU it is queued; the host does not wait for it."""
        if self.size > 1:
            group = self.control if tensor.device.type == "cpu" else None
            torch.distributed.all_reduce(tensor, group=group)
        return tensor

    def parallelize(self, model: GPT2, device: torch.device, *, shard: bool, bf16_gradients: bool) -> nn.Module:
        """Move a model to its device, and wrap or shard it so that the backward pass sums gradients over all ranks.

        DistributedDataParallel sends the gradients of a layer while it computes those of the layers before it (Li et
        al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020). FSDP2 shards parameters
        (Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", 2023).

        Args:
            model: with weights, on the CPU. With `shard` its parameters become DTensors.
            device: of the training. The full parameters of a sharded model are never on it at one time.
            shard: keep only a shard of each parameter on this rank.
            bf16_gradients: send gradients as bf16: half the bytes, 8 bits of mantissa.

        Returns:
            The module to call in training: `model`, or a wrapper around it.
        """
        if self.size > 1 and shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            mesh = init_device_mesh(device.type, (self.size,))
            policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if bf16_gradients else None)
            for block in model.h:  # moves the block to the device, and keeps a shard of it there
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            for module in (*model.h, model):  # by default FSDP2 averages gradients
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
            return model
        model.to(device)
        if self.size == 1:
            return model
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        # By default DistributedDataParallel averages gradients. A lambda, as the hook must be annotated with classes of
        # `torch.distributed` or not at all, and some builds of PyTorch lack them.
        dtype = torch.bfloat16 if bf16_gradients else None
        parallel.register_comm_hook(dtype, lambda dtype, bucket: _sum_gradients(dtype, bucket))
        return parallel

    # --- decisions, by small tensors on the CPU. All ranks must make each of these calls.

    def all_reduce_max(self, number: int) -> int:
        """The largest of the numbers of all ranks."""
        if self.size == 1:
            return number
        agreed = torch.tensor(number, dtype=torch.int64)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self.control)
        return int(agreed)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, by rank; on the CPU, with the same shape on all ranks."""
        if self.size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(gathered, tensor, group=self.control)
        return gathered

    def _gather_text(self, text: str) -> list[str]:
        """The strings of all ranks, by rank; none may be empty."""
        encoded = text.encode()
        longest = self.all_reduce_max(len(encoded))
        padded = torch.frombuffer(bytearray(encoded.ljust(longest, b"\0")), dtype=torch.uint8)
        return [bytes(each.tolist()).rstrip(b"\0").decode() for each in self.gather(padded)]

    @contextmanager
    def rank_zero_first(self) -> Iterator[bool]:
        """A context that rank 0 enters first, and the other ranks after it has left. Yields whether this is rank 0.

        Raises:
            FtError: on the other ranks, if rank 0 has failed.
        """
        with self._before_others(self.is_rank_zero):
            yield self.is_rank_zero

    @contextmanager
    def local_rank_zero_first(self) -> Iterator[None]:
        """A context that one rank of each machine enters first: the others then read what it has downloaded.

        Raises:
            FtError: on the other ranks, if that rank has failed.
        """
        with self._before_others(self.local_rank == 0):
            yield

    @contextmanager
    def _before_others(self, goes_first: bool) -> Iterator[None]:
        if not goes_first:
            self._raise_if_first_failed()
        try:
            yield
        except BaseException:
            if goes_first:
                self.all_reduce_max(1)
            raise
        if goes_first:
            self._raise_if_first_failed()

    def _raise_if_first_failed(self) -> None:
        if self.all_reduce_max(0):
            raise FtError("another process of this run has failed; its own message has the reason")

    def require_same(self, what: dict[str, str], remedy: str = "give all processes the same flags and data") -> None:
        """Check that all ranks have the same settings or data.

        Args:
            what: strings that must be the same on all ranks, by the name that a message gives them.
            remedy: the end of that message.

        Raises:
            UsageError: one sentence for each that differs.
        """
        if self.size == 1:
            return
        first, *others = (json.loads(text) for text in self._gather_text(json.dumps(what)))
        differ = {name: rank for rank, other in enumerate(others) for name in what if other[name] != first[name]}
        problems = [
            f"{name} is {first[name]} in process 0 and {others[rank][name]} in process {rank + 1}: {remedy}"
            for name, rank in differ.items()
        ]
        if problems:
            raise UsageError(*problems)

    # --- output, restarts, and ranks that do not answer

    @contextmanager
    def rank_zero_prints(self) -> Iterator[None]:
        """A context in which only rank 0 prints."""
        with open(os.devnull, "w") as null, nullcontext() if self.is_rank_zero else redirect_stdout(null):
            yield

    def mark_started(self) -> None:
        """Have processes that torchrun restarts from now on resume the run."""
        if self.store is not None:
            self.store.set("begun", "")

    @contextmanager
    def name_missing_ranks(self) -> Iterator[None]:
        """A context that turns the errors of a broken connection into one that names the rank that did not answer.

        Raises:
            FtError: a collective operation inside failed.
        """
        try:
            yield
        except RuntimeError as error:
            lost = re.search("gloo|nccl|timed? ?out|connection|store|process group", str(error), re.IGNORECASE)
            if self.size == 1 or not lost:
                raise
            detail = str(error).partition("\n")[0][:200]
            raise FtError(f"{self._describe_missing_ranks()} The newest checkpoint is complete. ({detail})") from error

    def _describe_missing_ranks(self) -> str:
        """Which ranks do not answer: those that do set a key in the store, the missing ones do not."""
        try:
            self.store.set(self._key("waits", self.rank), "")
            missing = self._ranks_without_key("waits", range(self.size), at_most=1)
            self.store.set(self._key("knows", self.rank), "")
            if self.is_rank_zero:  # which may hold the store that the others read
                self._ranks_without_key("knows", set(range(self.size)) - set(missing), at_most=0)
        except RuntimeError:  # the store has ended with its process
            return "process 0, or its machine, no longer answers."
        if not missing:
            return "the connection between the processes broke, but all of them still run."
        # After one process has died, others that waited for it may have ended too.
        several = f"at least one of the processes {', '.join(map(str, missing))}"
        named = f"process {missing[0]}" if len(missing) == 1 else several
        return f"{named} of {self.size} (counted from 0) ended, or did not answer within --process-timeout."

    def _ranks_without_key(self, what: str, ranks: Iterable[int], *, at_most: int) -> list[int]:
        """The ranks that have not set a key: returns once at most `at_most` are left, or after `ROLL_CALL_SECONDS`."""
        deadline = time.monotonic() + ROLL_CALL_SECONDS
        while True:
            missing = [rank for rank in ranks if not self.store.check([self._key(what, rank)])]
            if len(missing) <= at_most or time.monotonic() > deadline:
                return missing
            time.sleep(0.1)

    def _key(self, what: str, rank: int) -> str:
        return f"attempt {self.attempt}: process {rank} {what}"


def _sum_gradients(dtype: torch.dtype | None, bucket: Any) -> Any:  # noqa: ANN401
    """All-reduce a bucket of gradients, sent as `dtype`, or as they are: a DDP communication hook."""
    gradients = bucket.buffer()
    sent = gradients if dtype is None else gradients.to(dtype)
    reduction = torch.distributed.all_reduce(sent, async_op=True)
    return reduction.get_future().then(lambda reduced: gradients.copy_(reduced.value()[0]))


SINGLE_PROCESS = Ranks()
