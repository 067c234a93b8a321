"""Several processes that train one model together: torchrun starts them, `torch.distributed` connects them.

    torchrun --nproc-per-node 2 run.py

Each has the whole model and computes the gradients of its share of every batch. Before an update they take the mean of
their gradients, so that all make the same update, and stay alike. With --shard each keeps only a part of the weights,
gradients and moments, and gets the rest of a block from the others when that block is computed.

What is computed in the loop is exchanged on its device, and queued there. What the processes settle among themselves
(is it time to stop? is everybody there?) goes by a second group, on the CPU, for which no GPU has to wait.
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

ROLL_CALL = 5.0  # seconds for which those that miss somebody wait for each other


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them. One by itself, the usual case, exchanges nothing.

    Attributes:
        rank: the number of this process, from 0. The first one speaks and writes for all.
        size: how many there are.
        local_rank: the number of this process on its machine, from 0.
        has_begun: torchrun has started them anew, and before that the run had begun.
        control: the group in which things are settled.
        store: a few keys that all can read and set, kept by torchrun, or by the first process.
        attempt: how often torchrun has started them anew.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    has_begun: bool = False
    control: Any = None
    store: Any = None
    attempt: int = 0

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that logs, writes metrics and saves."""
        return self.rank == 0

    # What is computed.

    def own(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th of some items, from the place of this process on: shares differ by one item at most."""
        return list(items[self.rank :: self.size])

    def share(self, examples: Sequence[Example]) -> list[Example]:
        """This process's own examples of a batch.

        Where there are fewer examples than processes, some get one without targets, which adds nothing to loss or
        gradient: they must do the same exchanges as the others.
        """
        return self.own(examples) or [Example(examples[0].input_ids, [IGNORED] * len(examples[0].target_ids))]

    def exchange(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """A context for a forward and backward pass, after which gradients are exchanged if it is a window's `last`."""
        if self.size == 1:
            return nullcontext()
        if hasattr(model, "set_requires_gradient_sync"):  # it is sharded
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last else model.no_sync()  # type: ignore[operator]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place. On a GPU it is queued; the host does not wait for it."""
        if self.size > 1:
            group = self.control if tensor.device.type == "cpu" else None
            torch.distributed.all_reduce(tensor, group=group)
        return tensor

    def parallel(self, model: GPT2, device: torch.device, *, shard: bool, bf16_gradients: bool) -> nn.Module:
        """The model to train with: `model` on its device, whose gradients the processes exchange in the backward pass.

        DistributedDataParallel sends the gradients of a layer while those of the layers before it are computed (Li et
        al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020). Sharding is that of Zhao
        et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023), in its second form.

        Args:
            model: with weights, on the CPU; with `shard` its parameters are replaced by ones that hold a part each.
            device: where it is to lie; a sharded one never lies there as a whole.
            shard: keep only a part of each parameter here.
            bf16_gradients: send gradients as bf16, half the bytes with 8 bits of mantissa.
        """
        if self.size > 1 and shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            mesh = init_device_mesh(device.type, (self.size,))
            policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if bf16_gradients else None)
            for block in model.h:  # which moves it to the device, and leaves a part of it there
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
        # By default DistributedDataParallel averages gradients.
        parallel.register_comm_hook(torch.bfloat16 if bf16_gradients else None, _sum_gradients)
        return parallel

    # What is settled, by small tensors on the CPU. All processes must come to each of these calls.

    def all_reduce_max(self, number: int) -> int:
        """The highest of the processes' numbers."""
        if self.size == 1:
            return number
        agreed = torch.tensor(number, dtype=torch.int64)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self.control)
        return int(agreed)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor on the CPU of each process, of the same shape in all, by rank."""
        if self.size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(gathered, tensor, group=self.control)
        return gathered

    def _gather_text(self, text: str) -> list[str]:
        """A text of each process, none of them empty, by rank."""
        encoded = text.encode()
        longest = self.all_reduce_max(len(encoded))
        padded = torch.frombuffer(bytearray(encoded.ljust(longest, b"\0")), dtype=torch.uint8)
        return [bytes(each.tolist()).rstrip(b"\0").decode() for each in self.gather(padded)]

    @contextmanager
    def rank_zero_first(self) -> Iterator[bool]:
        """Run the body everywhere, in the first process (to which this says True) before the others.

        Raises:
            FtError: here, if it has failed there.
        """
        with self._before_others(self.is_rank_zero):
            yield self.is_rank_zero

    @contextmanager
    def local_rank_zero_first(self) -> Iterator[None]:
        """Run the body in one process of each machine before the others, which find there what that one has fetched.

        Raises:
            FtError: here, if it has failed there.
        """
        with self._before_others(self.local_rank == 0):
            yield

    @contextmanager
    def _before_others(self, goes_first: bool) -> Iterator[None]:
        if not goes_first:
            self._refuse_failure()
        try:
            yield
        except BaseException:
            if goes_first:
                self.all_reduce_max(1)
            raise
        if goes_first:
            self._refuse_failure()

    def _refuse_failure(self) -> None:
        if self.all_reduce_max(0):
            raise FtError("another process of this run has failed, for the reason that it tells")

    def require_same(self, what: dict[str, str]) -> None:
        """Refuse to begin where the processes do not mean the same run.

        Args:
            what: texts that must be the same everywhere, by what they are called in a message.

        Raises:
            UsageError: a sentence for each that is not.
        """
        if self.size == 1:
            return
        first, *others = (json.loads(text) for text in self._gather_text(json.dumps(what)))
        differ = {name: rank for rank, other in enumerate(others) for name in what if other[name] != first[name]}
        problems = [
            f"{name} is {first[name]} in process 0 and {others[rank][name]} in process {rank + 1}: give all processes "
            "the same flags and data"
            for name, rank in differ.items()
        ]
        if problems:
            raise UsageError(*problems)

    # Who speaks, and what is said if somebody is missing.

    @contextmanager
    def rank_zero_prints(self) -> Iterator[None]:
        """A context in which only the first process prints."""
        with open(os.devnull, "w") as nowhere, nullcontext() if self.is_rank_zero else redirect_stdout(nowhere):
            yield

    def note_beginning(self) -> None:
        """From here on, being started anew means to go on."""
        if self.store is not None:
            self.store.set("begun", "")

    @contextmanager
    def missing_told(self) -> Iterator[None]:
        """Turn the many errors of a connection into one that names who has not answered.

        Raises:
            FtError: an exchange inside came to nothing.
        """
        try:
            yield
        except RuntimeError as error:
            lost = re.search("gloo|nccl|timed? ?out|connection|store|process group", str(error), re.IGNORECASE)
            if self.size == 1 or not lost:
                raise
            detail = str(error).partition("\n")[0][:200]
            raise FtError(f"{self._who_is_missing()} The newest checkpoint is whole. ({detail})") from error

    def _who_is_missing(self) -> str:
        """Call the roll: each process that misses others says so, and those that do not are the ones missed."""
        try:
            self.store.set(self._key("waits", self.rank), "")
            missing = self._without("waits", range(self.size), at_most=1)
            self.store.set(self._key("knows", self.rank), "")
            if self.is_rank_zero:  # which keeps the store, if torchrun does not: the others read in it
                self._without("knows", set(range(self.size)) - set(missing), at_most=0)
        except RuntimeError:  # the store is gone with the process that kept it
            return "process 0, or the machine that it ran on, does not answer any more."
        if not missing:
            return "the connection between the processes broke, though all of them still run."
        # Of a process that has died all know only when those that it left waiting have ended too.
        several = f"at least one of the processes {', '.join(map(str, missing))}"
        named = f"process {missing[0]}" if len(missing) == 1 else several
        return f"{named} of {self.size} (counted from 0) ended, or did not answer within --process-timeout."

    def _without(self, what: str, ranks: Iterable[int], *, at_most: int) -> list[int]:
        """Those that have not set a key, as soon as they are so few, or when the time for it is over."""
        deadline = time.monotonic() + ROLL_CALL
        while True:
            missing = [rank for rank in ranks if not self.store.check([self._key(what, rank)])]
            if len(missing) <= at_most or time.monotonic() > deadline:
                return missing
            time.sleep(0.1)

    def _key(self, what: str, rank: int) -> str:
        return f"attempt {self.attempt}: process {rank} {what}"


def _sum_gradients(dtype: torch.dtype | None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """All-reduce a bucket of gradients, sent as `dtype`, or as they are: a DDP communication hook."""
    gradients = bucket.buffer()
    sent = gradients if dtype is None else gradients.to(dtype)
    reduction = torch.distributed.all_reduce(sent, async_op=True)
    return reduction.get_future().then(lambda reduced: gradients.copy_(reduced.value()[0]))


ALONE = Ranks()
