"""How long a checkpoint stalls training, and how much memory it takes.

    python -m benchmarks.checkpoint --tokenizer DIR

Every way of saving runs twice, each time in its own process, on a model with random weights and its optimizer state:
once with all cores training, and once with a single thread, so that a core is free, as it is beside a GPU.

The stall of a save is the time of the call, plus the extra time of the steps that run while the background thread
writes. The baseline is the steps before and after; for `ft`, whose thread writes for longer, the steps in between for
which the thread is paused. The time until it has paused counts as stall too.
"""

import argparse
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    add_device_flags,
    benchmark_parser,
    is_gpu,
    markdown_table,
    peak_memory,
    picture_path,
    precision_of,
    require_one_gpu,
    wall_clock,
    write_result,
)
from benchmarks.step import GIB, build, in_own_process, random_examples, review_like_lengths, timed_steps
from ft.checkpoint.async_writer import Saver
from ft.checkpoint.snapshot import Snapshot, take_snapshot
from ft.checkpoint.store import ModelSource, State, write_checkpoint
from ft.device import Precision, disable_malloc_trim
from ft.io.atomic import Executor
from tests.reference.synthetic import SIZES, model_config, write_model

BATCH_SIZE = 8
# How many threads train; 0 stands for as many as PyTorch takes.
CASES = {"all cores train": 0, "one core trains": 1}
GPU_CASES = {"the GPU trains": 0}
WAYS = {
    "ft": "ft, in the background",
    "ft blocking": "ft, --save-blocking",
    "torch.save": "torch.save, without fsync",
    "async_save": "torch.distributed.checkpoint.async_save",
    "trainer": "Trainer, without fsync",
}


def main() -> None:
    """Measure every way in every case and write the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with GPT-2's tokenizer.json")
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--saves", type=int, default=3, help="of each way, after one that does not count")
    parser.add_argument("--steps", type=int, default=6, help="before and after each save")
    add_device_flags(parser)
    options = parser.parse_args()
    precision = precision_of(options)
    require_one_gpu(parser, precision.device)
    cases = GPU_CASES if is_gpu(precision.device) else CASES
    figures: dict[str, dict[str, Any]] = {case: {} for case in cases}
    with tempfile.TemporaryDirectory() as work:
        for case, threads in cases.items():
            for way in WAYS:
                folder = Path(work) / "run"
                folder.mkdir()
                inputs = (way, threads, folder, options, precision)
                figures[case][way] = in_own_process(measure, *inputs, device=precision.device)
                shutil.rmtree(folder)
    header = ["way of saving"]
    for case in cases:
        header += [f"{case}: the call (s)", "stall (s)", "stall / ft, --save-blocking"]
    header += ["peak memory of the process (GiB)"]
    text = markdown_table(header, [row(way, figures) for way in WAYS]) + (
        f"\n\n{options.size}, batches of {BATCH_SIZE}, {precision.name}, weights and AdamW's moments. "
        f"Medians of {options.saves} saves after a first that does not count. "
        f"{describe_times('ft', figures)} The Trainer's stall is its call, and "
        "its memory that of a process which has its own libraries loaded."
    )
    write_result(options.output, "checkpoint", {"size": options.size, "cases": figures}, text, precision=precision)
    draw(figures, picture_path(options.output, "checkpoint", precision.device))


def row(way: str, figures: dict[str, dict[str, Any]]) -> list[str]:
    """The table's line of one way."""
    cells = [WAYS[way]]
    for ways in figures.values():
        call, stall = ways[way]["call_seconds"], ways[way]["stall_seconds"]
        cells += [f"{call:.2f}", f"{stall:.2f}", f"{stall / ways['ft blocking']['stall_seconds']:.2f}"]
    return [*cells, f"{max(ways[way]['peak_bytes'] for ways in figures.values()) / GIB:.2f}"]


def describe_times(way: str, figures: dict[str, dict[str, Any]]) -> str:
    """The time of a step and of a write in the background, in a sentence for each case."""
    return " ".join(
        f"Where {case}, a step takes {ways[way]['step_seconds']:.2f} s, and what ft writes in the background is on the "
        f"disk after {ways[way]['written_seconds']:.0f} s."
        for case, ways in figures.items()
    )


def measure(
    way: str, threads: int, folder: Path, options: argparse.Namespace, precision: Precision
) -> dict[str, float]:
    """The figures of one way; for a process of its own."""
    if threads:
        torch.set_num_threads(threads)
    disable_malloc_trim()
    if way == "trainer":
        return measure_trainer(options.size, options.tokenizer, folder, options.saves, precision)
    model, optimizer, config = build(options.size, precision=precision)
    count = BATCH_SIZE * options.steps
    examples = random_examples(review_like_lengths(count), config.vocab_size)

    def steps() -> list[float]:
        return [sum(step.values()) for step in timed_steps(model, optimizer, examples, BATCH_SIZE, precision=precision)]

    def one_step() -> float:
        examples[:] = [*examples[BATCH_SIZE:], *examples[:BATCH_SIZE]]
        (step,) = timed_steps(model, optimizer, examples[:BATCH_SIZE], BATCH_SIZE, precision=precision)
        return sum(step.values())

    steps()
    save, is_writing, gate = SAVERS[way](model, optimizer, options.tokenizer, folder)
    usual, calls, stalls, written = [], [], [], []
    for number in range(1, options.saves + 2):
        around, meanwhile, held, waited = steps(), [], [], 0.0
        started = wall_clock(precision.device)
        save(number)
        calls.append(time.perf_counter() - started)
        while is_writing():
            meanwhile.append(one_step())
            if gate:  # in a fixed order: were steps repeated until it holds, long ones would come before those held
                gate.close()
                meanwhile.append(one_step())
                closed = time.perf_counter()
                while is_writing() and not gate.holds:
                    time.sleep(0.001)
                waited += time.perf_counter() - closed
                if gate.holds:
                    held.append(one_step())
                gate.open()
        written.append(time.perf_counter() - started)
        around = held or [*around, *steps()]
        usual += around
        stalls.append(calls[-1] + waited + sum(meanwhile) - len(meanwhile) * statistics.mean(around))
    return {
        "step_seconds": statistics.median(usual),
        "call_seconds": statistics.median(calls[1:]),
        "stall_seconds": statistics.median(stalls[1:]),
        "written_seconds": statistics.median(written[1:]),
        "peak_bytes": peak_memory(),
    }


class Gate:
    """Holds the writing thread while it is closed, before the next piece of its work."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.close = self._open.clear
        self.open()

    def open(self) -> None:
        """Let the thread continue; it counts as running at once, even if it wakes up later."""
        self.holds = False
        self._open.set()

    def before(self, executor: Executor) -> Executor:
        """An executor that waits for the gate to be open, then runs the work by `executor`."""

        def wait_and_run(work: Callable[[], None]) -> None:
            self.holds = not self._open.is_set()
            self._open.wait()
            self.holds = False
            executor(work)

        return wait_and_run


# Saves after a step; returns whether it is still being written; pauses the writing.
Way = tuple[Callable[[int], None], Callable[[], bool], Gate | None]


def our_saver(blocking: bool, model: Any, optimizer: Any, tokenizer: Path, folder: Path) -> Way:
    """The saver of `ft`."""
    source = ModelSource(model_config("gpt2"), (tokenizer / "tokenizer.json").read_bytes(), ("neg", "pos"), {})
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    gate = Gate()

    def write(snapshot: Snapshot, executor: Executor) -> None:
        write_checkpoint(folder, snapshot, source, keep=2, keep_best=False, executor=gate.before(executor))

    saver = Saver(write, print, blocking=blocking)

    def save(step: int) -> None:
        saver.wait()
        saver.save(take_snapshot(model, optimizer, scaler, State(step=step), copy=not blocking))

    return save, lambda: saver.is_writing, gate


def torch_saver(model: Any, optimizer: Any, tokenizer: Path, folder: Path) -> Way:
    """`torch.save` of both state dicts, as in most scripts."""

    def save(step: int) -> None:
        moments = dict(enumerate(optimizer.state.values()))
        torch.save({"model": model.state_dict(), "optimizer": moments}, folder / f"{step % 2}.pt")

    return save, lambda: False, None


def async_saver(model: Any, optimizer: Any, tokenizer: Path, folder: Path) -> Way:
    """PyTorch's own asynchronous checkpoints, in a group of one process."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    pending: list[Any] = []

    def save(step: int) -> None:
        if pending:
            pending.pop().result()
        state = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        for i, moments in enumerate(optimizer.state.values()):
            state |= {f"{i}.{name}": value for name, value in moments.items()}
        target = folder / str(step % 2)
        shutil.rmtree(target, ignore_errors=True)
        pending.append(dcp.async_save(state, checkpoint_id=str(target)))

    return save, lambda: not pending[-1].done(), None


SAVERS = {
    "ft": partial(our_saver, False),
    "ft blocking": partial(our_saver, True),
    "torch.save": torch_saver,
    "async_save": async_saver,
}


def measure_trainer(size: str, tokenizer: Path, folder: Path, saves: int, precision: Precision) -> dict[str, float]:
    """The Trainer's save, which blocks training."""
    from tests.reference.trainer import build_trainer

    torch.backends.cuda.enable_cudnn_sdp(True)  # as by default, which ft changes
    model_dir = write_model(folder / "model", size, tokenizer_from=tokenizer)
    rows = [{"text": "a film", "label": row % 2} for row in range(3 * BATCH_SIZE)]
    trainer, steps = build_trainer(
        model_dir, rows, folder / "out", gradient_checkpointing=False, use_cpu=not is_gpu(precision.device)
    )
    trainer.train()
    seconds = []
    for _ in range(saves + 1):
        started = wall_clock(precision.device)
        trainer._save_checkpoint(trainer.model, None)
        seconds.append(time.perf_counter() - started)
        shutil.rmtree(folder / "out")
    call = statistics.median(seconds[1:])
    return {
        "step_seconds": statistics.median(step.seconds for step in steps),
        "call_seconds": call,
        "stall_seconds": call,
        "written_seconds": call,
        "peak_bytes": peak_memory(),
    }


def draw(figures: dict[str, dict[str, Any]], path: Path) -> None:
    """Two bars per way, as `results/STEM.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    height = 0.8 / len(figures)
    for number, (case, ways) in enumerate(figures.items()):
        places = [place + (number - (len(figures) - 1) / 2) * height for place in range(len(WAYS))]
        bars = axes.barh(places, [ways[way]["stall_seconds"] for way in WAYS], height, label=case)
        axes.bar_label(bars, fmt=" %.2f s", fontsize=9)
    axes.set_yticks(range(len(WAYS)), list(WAYS.values()))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.legend(loc="lower right", frameon=False)
    axes.set(xlabel="seconds that a checkpoint stalls training (median)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
