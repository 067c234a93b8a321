"""The product's own training step under a clock: what the benchmarks of its time and memory share.

Everything is in fp32, which the job takes by itself on a processor without AMX.
"""

import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ft.config import Config
from ft.data import dataset_files
from ft.data.batches import collate
from ft.data.examples import Example
from ft.data.splits import Split
from ft.data.tables import read_split
from ft.device import Precision
from ft.distributed.ranks import ALONE, Ranks
from ft.model.gpt2 import GPT2, ActivationCheckpointing, GPT2Config
from ft.train.loop import Components, StepRecorder, train
from ft.train.optim import AdamW, build_optimizer
from ft.train.state import State
from tests.reference.synthetic import model_config

PARTS = ("data", "forward", "backward", "clip", "AdamW", "other")
WARM_UP = 1  # the first step is left out: it allocates AdamW's moments
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, 4 bytes each
FP32 = Precision("fp32", "the format of these benchmarks", torch.device("cpu"))
LABEL_IDS = (12480, 1930)  # `neg` and `pos` in GPT-2's vocabulary
GIB = 2**30

# Input tokens per review of rotten_tomatoes at --max-length 32: each twentieth of the 8530 reviews ends at one of
# these lengths. Their mean is 23.5.
REVIEW_LENGTHS = (3, 9, 12, 14, 16, 18, 19, 21, 22, 24, 25, 27, 28, 30, 31, 31, 31, 31, 31, 31, 31)
_NEVER = 10**9


class Clock(StepRecorder):
    """The seconds of each part of each step; the loop calls it after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []
        self._current = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        """The time since the last mark was spent on `part`."""
        now = time.perf_counter()
        self._current[part] += now - self._last
        self._last = now

    def step_done(self, num_examples: int, num_tokens: int) -> None:
        """A step ends here."""
        self.mark("other")
        self.steps.append(self._current)
        self._current = dict.fromkeys(PARTS, 0.0)


class ClockedScaler(torch.amp.GradScaler):
    """A loss scaler that scales nothing. The loop calls it at the end of the forward and of the backward pass."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("cpu", enabled=False)
        self._clock = clock

    def scale(self, outputs: Tensor) -> Tensor:
        """The same tensor: the loss, before its backward pass, or the constant 1, when the gradients are complete."""
        self._clock.mark("forward" if outputs.requires_grad else "backward")
        return outputs

    def step(self, optimizer: AdamW) -> None:
        """The update, which begins when the gradients' norm is known."""
        self._clock.mark("clip")
        optimizer.step()
        self._clock.mark("AdamW")


def build(
    size: str, activation_checkpointing: ActivationCheckpointing = "none", **config_overrides: Any
) -> tuple[GPT2, AdamW, GPT2Config]:
    """A model of random weights and its optimiser, made as the job makes them (after `disable_malloc_trim`)."""
    config = GPT2Config.from_dict(model_config(size, **config_overrides))
    model = GPT2(config)
    model.init_weights(seed=42)
    model.activation_checkpointing = activation_checkpointing
    torch.manual_seed(42)
    return model, build_optimizer(model, learning_rate=2e-5, weight_decay=0.0), config


def timed_steps(
    model: torch.nn.Module, optimizer: AdamW, examples: Sequence[Example], batch_size: int, ranks: Ranks = ALONE
) -> list[dict[str, float]]:
    """Train on all examples once, by `ft.train.train` as it is, and return the seconds of each part of each step.

    The marks come from the loop's own arguments and from a hook: `forward` includes the loss, `backward` all up to the
    learning rate, `other` is the clearing of gradients. With several processes, which share the examples, `backward`
    also has the exchange of gradients as far as it is waited for, and the waiting for the slowest process.
    """
    clock = Clock()
    # Before other hooks: that of a sharded model fetches weights, which belongs to the forward pass.
    hook = model.register_forward_pre_hook(lambda *_: clock.mark("data"), prepend=True)
    config = Config(
        batch_size=batch_size,
        processes=ranks.size,
        logging_steps=_NEVER,
        eval_steps=_NEVER,
        save_steps=_NEVER,
    )
    train(Components(model, optimizer, ClockedScaler(clock), FP32, ranks), examples, collate, config, State(), clock)
    hook.remove()
    return clock.steps


def median_seconds(steps: Sequence[dict[str, float]]) -> float:
    """The median time of a whole step, the warm-up left out."""
    return statistics.median(sum(step.values()) for step in steps[WARM_UP:])


def review_like_lengths(count: int) -> list[int]:
    """Numbers of input tokens, distributed as those of the real reviews are; the same at every call."""
    generator = random.Random(0)
    lengths = []
    for _ in range(count):
        twentieth, fraction = divmod(generator.uniform(0, len(REVIEW_LENGTHS) - 1), 1)
        below, above = REVIEW_LENGTHS[int(twentieth)], REVIEW_LENGTHS[min(int(twentieth) + 1, len(REVIEW_LENGTHS) - 1)]
        lengths.append(round(below + fraction * (above - below)))
    return lengths


def random_examples(lengths: Sequence[int], vocab_size: int) -> list[Example]:
    """Examples of that many input tokens each, drawn at random, with the real labels."""
    generator = random.Random(0)
    return [
        Example([generator.randrange(vocab_size) for _ in range(length)], [generator.choice(LABEL_IDS)])
        for length in lengths
    ]


def read_reviews(dataset: Path) -> Split:
    """The training split in a folder of parquet files."""
    return read_split("train", dataset_files.dataset_files(str(dataset))["train"])


def parameter_count(model: torch.nn.Module) -> int:
    """How many numbers are trained; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def resident_memory() -> int:
    """Bytes that this process holds now (Linux only)."""
    return _kibibytes("/proc/self/status", "VmRSS") * 1024


def peak_memory() -> int:
    """The most bytes that this process ever held. `ru_maxrss` will not do: it begins with the parent's (Linux only)."""
    return _kibibytes("/proc/self/status", "VmHWM") * 1024


def available_memory() -> int:
    """Bytes that the machine can give without swapping (Linux only)."""
    return _kibibytes("/proc/meminfo", "MemAvailable") * 1024


def in_own_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float] | None:
    """`function(*arguments)` in a fresh process, whose peak memory is its own; None if it needs more than there is.

    The process may not take more than 95 % of the memory available at its start: a measurement that does not fit must
    fail by itself, not have the kernel end some other program.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_within_available_memory, function, *arguments).result()


def _within_available_memory(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float] | None:
    limit = int(0.95 * available_memory())
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        return function(*arguments)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return None


def _kibibytes(path: str, key: str) -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])
