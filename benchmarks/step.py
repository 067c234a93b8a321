"""Time of the parts of a training step, shared by the benchmarks of time and memory.

    python -m benchmarks.step [--device cuda] [--cuda-graphs] [--profile trace.json]

As a command it reports the time of each part, the peak memory, and on a GPU the number of launches per step.
"""

import argparse
import random
import resource
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    CPU,
    Moment,
    add_device_flags,
    available_memory,
    benchmark_parser,
    is_gpu,
    launches,
    markdown_table,
    matmul_rate,
    moment,
    peak_memory,
    precision_of,
    seconds_between,
    write_result,
)
from ft.config import Config
from ft.data import dataset_files
from ft.data.batches import collate, collate_padded
from ft.data.examples import Example
from ft.data.splits import Split
from ft.data.tables import read_split
from ft.device import Precision, disable_malloc_trim, use_device
from ft.distributed.ranks import SINGLE_PROCESS, Ranks
from ft.model import matmul
from ft.model.gpt2 import GPT2, ActivationCheckpointing, GPT2Config
from ft.train.loop import Components, StepRecorder, train
from ft.train.optim import AdamW, build_optimizer
from ft.train.state import State
from tests.reference.synthetic import SIZES, model_config

PARTS = ("data", "forward", "backward", "clip", "AdamW", "other")
WARM_UP = 1  # the first step is left out: it takes memory from the system
GPU_WARM_UP = 10  # there libraries choose kernels, and a graph is recorded
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, 4 bytes each
FP32 = Precision("fp32", "the format of these benchmarks", CPU)
LABEL_IDS = (12480, 1930)  # `neg` and `pos` in GPT-2's vocabulary
GIB = 2**30

# Input tokens per review of rotten_tomatoes at --max-length 32: each twentieth of the 8530 reviews ends at one of
# these lengths. Their mean is 23.5.
REVIEW_LENGTHS = (3, 9, 12, 14, 16, 18, 19, 21, 22, 24, 25, 27, 28, 30, 31, 31, 31, 31, 31, 31, 31)
_NEVER = 10**9

# What PyTorch's counter does not know of: oneDNN's linear layer, (N, in) and (out, in) -> (N, out).
ONEDNN_FLOPS = (
    {torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * prod(x) * weight[0]}
    if matmul.has_onednn()
    else {}
)


class Clock(StepRecorder):
    """Records the seconds of each part of each step."""

    def __init__(self, device: torch.device = CPU, after_step: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._device, self._after_step = device, after_step
        self._marks: list[list[tuple[str, Moment]]] = [[]]
        self._start = moment(device)

    def mark(self, part: str) -> None:
        """Attribute the time since the last mark to `part`."""
        self._marks[-1].append((part, moment(self._device)))

    def step_done(self, num_examples: int, num_tokens: int) -> None:
        """A step ends here."""
        self.mark("other")
        self._marks.append([])
        self._after_step()

    def seconds(self) -> list[dict[str, float]]:
        """The seconds of each part of each complete step; on a GPU this waits for all of them."""
        steps, before = [], self._start
        for marks in self._marks[:-1]:
            steps.append(dict.fromkeys(PARTS, 0.0))
            for part, now in marks:
                steps[-1][part] += seconds_between(before, now)
                before = now
        return steps


class ClockedScaler(torch.amp.GradScaler):
    """The loss scaler of a precision. The loop calls it after the forward pass, the backward pass and clipping."""

    def __init__(self, clock: Clock, precision: Precision = FP32) -> None:
        super().__init__(precision.device.type, enabled=precision.name == "fp16")
        self._clock = clock

    def scale(self, outputs: Tensor) -> Tensor:
        """Called with the loss, before its backward pass."""
        self._clock.mark("forward")
        return super().scale(outputs)

    def unscale_(self, optimizer: AdamW) -> None:
        """Called when the gradients are complete."""
        self._clock.mark("backward")
        super().unscale_(optimizer)  # type: ignore[arg-type]

    def step(self, optimizer: AdamW) -> None:
        """The update, which begins when the gradients' norm is known."""
        self._clock.mark("clip")
        super().step(optimizer)
        self._clock.mark("AdamW")


def build(
    size: str,
    activation_checkpointing: ActivationCheckpointing = "none",
    precision: Precision = FP32,
    **config_overrides: Any,
) -> tuple[GPT2, AdamW, GPT2Config]:
    """A model of random weights and its optimizer, made as the job makes them (after `disable_malloc_trim`)."""
    config = GPT2Config.from_dict(model_config(size, **config_overrides))
    model = GPT2(config)
    model.init_weights(seed=42)
    model.activation_checkpointing = activation_checkpointing
    model.to(precision.device)
    if precision.name != "fp32":
        model.keep_half_weights(precision.dtype)
    torch.manual_seed(42)
    return model, build_optimizer(model, learning_rate=2e-5, weight_decay=0.0), config


def timed_steps(
    model: torch.nn.Module,
    optimizer: AdamW,
    examples: Sequence[Example],
    batch_size: int,
    ranks: Ranks = SINGLE_PROCESS,
    *,
    precision: Precision = FP32,
    pad_to: int | None = None,
    cuda_graphs: bool = False,
    after_step: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Train on all examples once, by `ft.train.train` as it is, and return the seconds of each part of each step.

    The marks come from the loop's own arguments and from a hook: `forward` includes the loss, `backward` all up to the
    learning rate, `other` is the clearing of gradients. With several processes, which share the examples, `backward`
    also has the exchange of gradients as far as it is waited for, and the waiting for the slowest process.

    Args:
        model: on its device, as `build` makes it.
        optimizer: of the model.
        examples: to train on.
        batch_size: examples per step.
        ranks: the processes that share the examples.
        precision: with the device.
        pad_to: pad batches to that many tokens and one shape.
        cuda_graphs: as the flag of the program; needs `pad_to`. All of a step is `other` then.
        after_step: called when the work of a step is queued.
    """
    clock = Clock(precision.device, after_step)
    hooks = []
    if not cuda_graphs:  # in which the parts of a step are no calls
        # Before other hooks: that of a sharded model fetches weights, which belongs to the forward pass.
        hooks.append(model.register_forward_pre_hook(lambda *_: clock.mark("data"), prepend=True))
    scaler = precision.grad_scaler() if cuda_graphs else ClockedScaler(clock, precision)
    collate_batch = partial(collate_padded, batch_size=batch_size, max_length=pad_to) if pad_to else collate
    config = Config(
        batch_size=batch_size,
        processes=ranks.size,
        cuda_graphs=cuda_graphs,
        logging_steps=_NEVER,
        eval_steps=_NEVER,
        save_steps=_NEVER,
    )
    train(Components(model, optimizer, scaler, precision, ranks), examples, collate_batch, config, State(), clock)
    for hook in hooks:
        hook.remove()
    return clock.seconds()


def warm_up(device: torch.device) -> int:
    """The number of warm-up steps, which are not counted."""
    return GPU_WARM_UP if is_gpu(device) else WARM_UP


def median_seconds(steps: Sequence[dict[str, float]], device: torch.device = CPU) -> float:
    """The median time of a step, without the warm-up."""
    return statistics.median(sum(step.values()) for step in steps[warm_up(device) :])


def performed_flops(model: GPT2, optimizer: AdamW, examples: Sequence[Example], batch_size: int, **how: Any) -> int:
    """Operations of all matrix products that `timed_steps` performs."""
    with FlopCounterMode(display=False, custom_mapping=ONEDNN_FLOPS) as counter:
        timed_steps(model, optimizer, examples, batch_size, **how)
    return counter.get_total_flops()


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
    """The number of parameters; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def in_own_process(
    function: Callable[..., dict[str, float]], *arguments: Any, device: torch.device = CPU
) -> dict[str, float] | None:
    """`function(*arguments)` in a new process, with its own peak memory; None if it runs out of memory.

    On a CPU the process may not take more than 95 % of the memory available at its start: a measurement that does not
    fit must fail by itself, not have the kernel end some other program. A GPU's driver refuses by itself.
    """
    limit = None if is_gpu(device) else int(0.95 * available_memory())
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(within_memory, device, limit, function, *arguments).result()


def within_memory(
    device: torch.device, limit: int | None, function: Callable[..., dict[str, float]], *arguments: Any
) -> dict[str, float] | None:
    """`function(*arguments)`, or None if it needs more than `limit` bytes or than there are."""
    if is_gpu(device):
        use_device(str(device))
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        return function(*arguments)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return None


def main() -> None:
    """Measure the step, and write the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="timed steps, after a warm-up")
    parser.add_argument("--static-shapes", action="store_true", help="as the flag of the program")
    parser.add_argument("--cuda-graphs", action="store_true", help="as the flag of the program")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a trace of the last steps for Perfetto")
    add_device_flags(parser)
    options = parser.parse_args()
    precision = precision_of(options)
    if options.cuda_graphs and not is_gpu(precision.device):
        parser.error("--cuda-graphs needs --device cuda")
    figures = measure(options, precision)
    write_result(
        options.output, "step-graphs" if options.cuda_graphs else "step", figures, table(figures), precision=precision
    )


def measure(options: argparse.Namespace, precision: Precision) -> dict[str, Any]:
    """The figures of `main`. Time is that of steps which are not profiled."""
    disable_malloc_trim()
    device, profiled = precision.device, 3
    model, optimizer, config = build(options.size, precision=precision)
    pad_to = 32 if options.static_shapes or options.cuda_graphs else None
    count = options.batch_size * (warm_up(device) + options.steps)
    examples = random_examples(review_like_lengths(count), config.vocab_size)
    how: dict[str, Any] = {"precision": precision, "pad_to": pad_to}
    flops = performed_flops(model, optimizer, examples[: 2 * options.batch_size], options.batch_size, **how) / 2
    how["cuda_graphs"] = options.cuda_graphs
    steps = timed_steps(model, optimizer, examples, options.batch_size, **how)
    seconds, counted = median_seconds(steps, device), steps[warm_up(device) :]
    peak = peak_memory(device)

    def finish(profiler: torch.profiler.profile) -> None:
        figures["launches_per_step"] = launches(profiler) / profiled if is_gpu(device) else None
        if options.profile is not None:
            profiler.export_chrome_trace(str(options.profile))

    figures: dict[str, Any] = {}
    schedule = torch.profiler.schedule(wait=warm_up(device), warmup=1, active=profiled, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=finish) as profiler:
        rows = examples[: options.batch_size] * (warm_up(device) + 2 + profiled)
        timed_steps(model, optimizer, rows, options.batch_size, **how, after_step=profiler.step)
    rate = matmul_rate(precision)
    return figures | {
        "size": options.size,
        "batch_size": options.batch_size,
        "static_shapes": pad_to is not None,
        "cuda_graphs": options.cuda_graphs,
        "timed_steps": options.steps,
        "step_seconds": seconds,
        "step_seconds_by_part": {part: statistics.median(step[part] for step in counted) for part in PARTS},
        "flops_per_step": flops,
        "flops_per_second": flops / seconds,
        "matmul_flops_per_second": rate,
        "share_of_matmul_rate": flops / seconds / rate,
        "peak_bytes": peak,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures of `measure`."""
    started = figures["launches_per_step"]
    rows = [
        ["step (ms)", f"{1e3 * figures['step_seconds']:.2f}"],
        *([f"{part} (ms)", f"{1e3 * value:.2f}"] for part, value in figures["step_seconds_by_part"].items() if value),
        ["steps/s", f"{1 / figures['step_seconds']:.1f}"],
        ["TFLOP/s", f"{figures['flops_per_second'] / 1e12:.3f}"],
        ["of a large matrix product's rate", f"{figures['share_of_matmul_rate']:.1%}"],
        ["peak memory (GiB)", f"{figures['peak_bytes'] / GIB:.2f}"],
        *([["launches per step", f"{started:.0f}"]] if started is not None else []),
    ]
    shapes = "padded to one shape" if figures["static_shapes"] else "packed"
    graphs = ", one CUDA graph" if figures["cuda_graphs"] else ""
    return markdown_table(
        [f"{figures['size']}, batches of {figures['batch_size']} reviews, {shapes}{graphs}", ""], rows
    )


if __name__ == "__main__":
    main()
