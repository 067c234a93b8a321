"""What a checkpoint costs the training, and how much memory it takes.

    python -m benchmarks.checkpoint --tokenizer DIR

Every way of saving runs in its own process, on a model with random weights and its optimizer state: once with all cores
training, and once with a single thread, so that a core is free, as it is beside a GPU. The ways take turns, one save of
each per round: a change in the speed of the machine affects all.

The cost of a save is the time of the call, plus the extra time of the steps that run until the checkpoint is on the
disk. The baseline is the steps before and after. `torch.save` and the Trainer leave their files in the page cache; the
kernel writes them up to half a minute later, on the processors that train. Here a thread calls `os.sync` after their
call, so that this happens while the steps are timed. The file systems are at rest when a save begins, and the first
save of a process, for which the system still has to find memory, does not count.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
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
from benchmarks.step import GIB, build, random_examples, review_like_lengths, timed_steps
from ft.checkpoint.async_writer import AsyncWriter
from ft.checkpoint.snapshot import take_snapshot
from ft.checkpoint.store import ModelSource, State, write_checkpoint
from ft.device import Precision, disable_malloc_trim, use_device
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


@dataclass(frozen=True)
class Save:
    """The figures of one save, in seconds.

    Attributes:
        call: of the call, for which training waits.
        cost: of the call, and the extra time of the steps until the checkpoint is on the disk.
        written: until it is on the disk.
        steps: those before and after.
    """

    call: float
    cost: float
    written: float
    steps: list[float]


@dataclass(frozen=True)
class Training:
    """A training with one way of saving.

    Attributes:
        step: makes a step; returns its seconds.
        save: saves after a step, given its number.
        is_writing: whether the checkpoint is not yet on the disk.
        clean_up: deletes what `step` and `save` do not need.
    """

    step: Callable[[], float]
    save: Callable[[int], None]
    is_writing: Callable[[], bool]
    clean_up: Callable[[], None] = lambda: None


def main() -> None:
    """Measure every way in every case and write the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with GPT-2's tokenizer.json")
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--saves", type=int, default=5, help="of each way, after one that does not count")
    parser.add_argument("--steps", type=int, default=4, help="before and after each save")
    add_device_flags(parser)
    options = parser.parse_args()
    precision = precision_of(options)
    require_one_gpu(parser, precision.device)
    cases = GPU_CASES if is_gpu(precision.device) else CASES
    figures = {case: measure(threads, options, precision) for case, threads in cases.items()}
    header = ["way of saving"]
    for case in cases:
        header += [f"{case}: the call (s)", "cost (s)", "cost / Trainer", "on the disk after (s)"]
    header += ["peak memory of the process (GiB)"]
    text = markdown_table(header, [row(way, figures) for way in WAYS]) + (
        f"\n\n{options.size}, batches of {BATCH_SIZE}, {precision.name}, weights and AdamW's moments. Medians of "
        f"{options.saves} saves, in turns, and the range of the costs; a first save of each does not count. Ratios are "
        f"those of the medians. {describe_steps(figures)} The Trainer's memory is that of a process which has its own "
        "libraries loaded."
    )
    write_result(options.output, "checkpoint", {"size": options.size, "cases": figures}, text, precision=precision)
    draw(figures, picture_path(options.output, "checkpoint", precision.device))


def row(way: str, figures: dict[str, dict[str, Any]]) -> list[str]:
    """The table's line of one way."""
    cells = [WAYS[way]]
    for ways in figures.values():
        costs, cost, trainer = ways[way]["costs"], ways[way]["cost"], ways["trainer"]["cost"]
        cells += [
            f"{ways[way]['call']:.2f}",
            f"{cost:.2f} ({min(costs):.2f} to {max(costs):.2f})",
            f"{cost / trainer:.2f}",
            f"{ways[way]['written']:.1f}",
        ]
    return [*cells, f"{max(ways[way]['peak_bytes'] for ways in figures.values()) / GIB:.2f}"]


def describe_steps(figures: dict[str, dict[str, Any]]) -> str:
    """The time of a step, in a sentence for each case."""
    return " ".join(
        f"Where {case}, a step takes {ways['ft']['step']:.2f} s, one of the Trainer {ways['trainer']['step']:.2f} s."
        for case, ways in figures.items()
    )


def measure(threads: int, options: argparse.Namespace, precision: Precision) -> dict[str, dict[str, Any]]:
    """The figures of every way; the ways take turns, each in a process of its own."""
    with ExitStack() as stack:
        workers, saves = {}, {}
        for way in WAYS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            workers[way] = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            workers[way].submit(prepare, way, threads, folder, options, precision).result()
            saves[way] = list[Save]()
        for number in range(1, options.saves + 2):
            for way in WAYS if number % 2 else reversed(WAYS):
                save = workers[way].submit(measure_save, number, options.steps, precision).result()
                saves[way] += [save] if number > 1 else []
        return {
            way: {
                "step": statistics.median(step for save in of_way for step in save.steps),
                "call": statistics.median(save.call for save in of_way),
                "cost": statistics.median(save.cost for save in of_way),
                "written": statistics.median(save.written for save in of_way),
                "costs": [save.cost for save in of_way],
                "peak_bytes": workers[way].submit(peak_memory).result(),
            }
            for way, of_way in saves.items()
        }


training: Training  # of this process


def prepare(way: str, threads: int, folder: Path, options: argparse.Namespace, precision: Precision) -> None:
    """Start the training of this process."""
    global training
    if threads:
        torch.set_num_threads(threads)
    if is_gpu(precision.device):
        use_device(str(precision.device))
    disable_malloc_trim()
    start = start_trainer if way == "trainer" else partial(start_ft, way)
    training = start(folder, options, precision)
    for _ in range(options.steps):
        training.step()


def measure_save(number: int, steps: int, precision: Precision) -> Save:
    """Save a checkpoint between steps, and time all of it."""
    os.sync()
    around = [training.step() for _ in range(steps)]
    started = wall_clock(precision.device)
    training.save(number)
    call = time.perf_counter() - started
    meanwhile = []
    while training.is_writing():
        meanwhile.append(training.step())
    written = time.perf_counter() - started if meanwhile else call
    around += [training.step() for _ in range(steps)]
    training.clean_up()
    return Save(call, call + sum(meanwhile) - len(meanwhile) * statistics.median(around), written, around)


def then_sync(save: Callable[[int], None]) -> tuple[Callable[[int], None], Callable[[], bool]]:
    """`save`, after which a thread writes the page cache to the disk; and whether it still does."""
    threads: list[threading.Thread] = []

    def save_and_sync(number: int) -> None:
        save(number)
        threads[:] = [threading.Thread(target=os.sync)]
        threads[0].start()

    return save_and_sync, lambda: threads[0].is_alive()


def start_ft(way: str, folder: Path, options: argparse.Namespace, precision: Precision) -> Training:
    """The steps of `ft`, with its writer or another one."""
    model, optimizer, config = build(options.size, precision=precision)
    examples = random_examples(review_like_lengths(BATCH_SIZE * 2 * options.steps), config.vocab_size)

    def step() -> float:
        examples[:] = [*examples[BATCH_SIZE:], *examples[:BATCH_SIZE]]
        (parts,) = timed_steps(model, optimizer, examples[:BATCH_SIZE], BATCH_SIZE, precision=precision)
        return sum(parts.values())

    step()  # which makes the moments
    return Training(step, *SAVERS[way](model, optimizer, options.tokenizer, folder))


# Saves after a step; returns whether it is still being written.
Way = tuple[Callable[[int], None], Callable[[], bool]]


def our_writer(blocking: bool, model: Any, optimizer: Any, tokenizer: Path, folder: Path) -> Way:
    """The writer of `ft`."""
    source = ModelSource(model_config("gpt2"), (tokenizer / "tokenizer.json").read_bytes(), ("neg", "pos"), {})
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    writer = AsyncWriter(
        lambda snapshot: write_checkpoint(folder, snapshot, source, keep=2, keep_best=False), print, blocking=blocking
    )

    def save(step: int) -> None:
        writer.wait()
        writer.save(take_snapshot(model, optimizer, scaler, State(step=step), copy=not blocking))

    return save, lambda: writer.is_writing


def torch_writer(model: Any, optimizer: Any, tokenizer: Path, folder: Path) -> Way:
    """`torch.save` of both state dicts, as in most scripts."""

    def save(step: int) -> None:
        moments = dict(enumerate(optimizer.state.values()))
        torch.save({"model": model.state_dict(), "optimizer": moments}, folder / f"{step % 2}.pt")

    return then_sync(save)


def async_writer(model: Any, optimizer: Any, tokenizer: Path, folder: Path) -> Way:
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

    return save, lambda: not pending[-1].done()


SAVERS = {
    "ft": partial(our_writer, False),
    "ft blocking": partial(our_writer, True),
    "torch.save": torch_writer,
    "async_save": async_writer,
}


def start_trainer(folder: Path, options: argparse.Namespace, precision: Precision) -> Training:
    """The Trainer, whose loop runs in a thread and takes a step when it is told to; its save blocks training."""
    from transformers import TrainerCallback

    from tests.reference.trainer import build_trainer

    may_begin, has_ended = threading.Semaphore(0), threading.Semaphore(0)

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            may_begin.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            has_ended.release()

    torch.backends.cuda.enable_cudnn_sdp(True)  # as by default, which ft changes
    model_dir = write_model(folder / "model", options.size, tokenizer_from=options.tokenizer)
    rows = [{"text": "a film " * 12, "label": row % 2} for row in range(BATCH_SIZE)]
    trainer, _ = build_trainer(
        model_dir,
        rows,
        folder / "out",
        gradient_checkpointing=False,
        use_cpu=not is_gpu(precision.device),
        max_steps=10**6,
    )
    trainer.add_callback(TakeTurns)
    threading.Thread(target=trainer.train, daemon=True).start()

    def step() -> float:
        started = wall_clock(precision.device)
        may_begin.release()
        has_ended.acquire()
        return wall_clock(precision.device) - started

    save, is_writing = then_sync(lambda _: trainer._save_checkpoint(trainer.model, None))
    return Training(step, save, is_writing, lambda: shutil.rmtree(folder / "out"))


def draw(figures: dict[str, dict[str, Any]], path: Path) -> None:
    """Two bars per way, as `results/STEM.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    height = 0.8 / len(figures)
    for number, (case, ways) in enumerate(figures.items()):
        places = [place + (number - (len(figures) - 1) / 2) * height for place in range(len(WAYS))]
        bars = axes.barh(places, [ways[way]["cost"] for way in WAYS], height, label=case)
        axes.bar_label(bars, fmt=" %.2f s", fontsize=9)
    axes.set_yticks(range(len(WAYS)), list(WAYS.values()))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.set(xlabel="seconds that a checkpoint costs the training (median)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
