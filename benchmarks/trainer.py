"""Speed and memory compared with the Hugging Face Trainer: the tutorial's script and `ft`, in turns on one machine.

    python -m benchmarks.trainer --dataset DIR --tokenizer DIR

Each runs in its own process, with the same weights, examples and order. The two take turns of a few steps: while one
works, the other waits for a message and uses no processor time. So a change in the speed of the machine affects both.

The time of a step is that from one log of the loss (at every step) to the next, in the training loop of each.
"""

import argparse
import math
import multiprocessing
import shutil
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

# Imported here is only what both sides import anyway: start-up is measured too.
from benchmarks.common import (
    CPU,
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
from tests.reference.synthetic import SIZES, write_model

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

BLOCK = 5  # steps until the other's turn
WARM_UP = 2  # steps at the start that no figure counts
GPU_WARM_UP = 10  # there, as libraries choose kernels and a graph is recorded
NEVER = 10**9  # a step that does not come

# The whole job on rotten_tomatoes. Both evaluate and save every 100 steps and at the end; `ft` evaluates the test
# split, too, of the same size, and leaves the finished model, which is counted as one more checkpoint.
STEPS, VALIDATION_REVIEWS = 1067, 1066
EVALUATIONS = SAVES = {"trainer": 11, "ft": 12}


@dataclass(frozen=True)
class Row:
    """One comparison. The Trainer's evaluation batch is 8 unless set, `ft`'s is 64.

    `bf16` is for both; with `auto` ft chooses its precision itself.
    """

    name: str
    title: str
    dropout: float
    checkpointing: dict[str, bool]
    bf16: bool = False
    auto: bool = False
    trainer_eval_batch_size: int = 64
    cuda_graphs: bool = False


ROWS = (
    Row("a", "default settings, fp32", 0.1, {"trainer": True, "ft": False}, trainer_eval_batch_size=8),
    Row("b", "activation checkpointing in both", 0.1, {"trainer": True, "ft": True}),
    Row("c", "no checkpointing, no dropout", 0.0, {"trainer": False, "ft": False}),
    Row("d", "as (c), with bf16 autocast", 0.0, {"trainer": False, "ft": False}, bf16=True),
    Row("e", "as (a), in bf16", 0.1, {"trainer": True, "ft": False}, bf16=True, trainer_eval_batch_size=8),
    Row("f", "as (d), ft with --cuda-graphs", 0.0, {"trainer": False, "ft": False}, bf16=True, cuda_graphs=True),
    Row("g", "default settings", 0.1, {"trainer": True, "ft": False}, auto=True, trainer_eval_batch_size=8),
)
CPU_ROWS, GPU_ROWS = "abcdg", "abcdef"


@dataclass(frozen=True)
class Inputs:
    """Where the processes read, write and compute; `model` holds the tokenizer too."""

    model: Path
    dataset: Path
    output: Path
    device: torch.device = CPU


@dataclass(frozen=True)
class Step:
    """One optimizer step; `tokens` are those of the reviews and end-of-text, without label or padding."""

    seconds: float
    loss: float
    tokens: int


@dataclass(frozen=True)
class Block:
    """The steps of one turn, when the process began its very first one, and the most memory it has ever held."""

    steps: list[Step]
    first_began: float
    peak_bytes: int


class Finished(Exception):  # noqa: N818, as nothing is wrong
    """Ends a training loop from within."""


class Turns:
    """The worker's end of the pipe: its training loop runs only the steps that the driver requests.

    The first step needs no permission, so that start-up is measured up to its end.
    """

    def __init__(self, connection: Connection, output: Path, device: torch.device) -> None:
        self.connection, self.output, self.device = connection, output, device
        self.actions: dict[str, Callable[[], Any]] = {}
        self.steps: list[Step] = []
        self.left = 1
        self.started = time.perf_counter()
        self.first_began: float | None = None

    def step_begins(self) -> None:
        """Note when the first step begins: imports, weights and tokenization are done. The clock is the machine's."""
        if self.first_began is None:
            self.first_began = time.perf_counter()

    def step_done(self, loss: float, tokens: int = 0) -> None:
        """Note a step, and wait if it was the last of this turn."""
        self.steps.append(Step(time.perf_counter() - self.started, loss, tokens))
        self.left -= 1
        if self.left == 0:
            self.connection.send(Block(self.steps, self.first_began, peak_memory(self.device)))
            self.steps = []
            self.left = self._wait()
        self.started = time.perf_counter()

    def _wait(self) -> int:
        """Do what the driver asks for until it grants steps, and return how many.

        Raises:
            Finished: there will be no more.
        """
        while True:
            command, steps = self.connection.recv()
            if command == "steps":
                return steps
            if command == "finish":
                raise Finished
            started = wall_clock(self.device)
            self.actions[command]()
            self.connection.send(wall_clock(self.device) - started)
            for folder in self.output.glob("checkpoint-*"):
                shutil.rmtree(folder)  # before the kernel spends the other's turn writing what is left of it


def steps_of_warm_up(device: torch.device) -> int:
    """How many steps at the start no figure counts."""
    return GPU_WARM_UP if is_gpu(device) else WARM_UP


def run_trainer(turns: Turns, row: Row, inputs: Inputs) -> None:
    """The tutorial's script on the Trainer, with a callback that takes turns."""
    from transformers import TrainerCallback

    from tests.reference.trainer import build_trainer

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.step_begins()

        def on_log(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            logs: dict[str, float],
            **_: Any,
        ) -> None:
            if "loss" in logs:  # the log of an evaluation has none
                turns.step_done(logs["loss"])

    trainer, _ = build_trainer(
        inputs.model,
        inputs.dataset,
        turns.output,
        eval_dataset=inputs.dataset,
        dropout=row.dropout,
        gradient_checkpointing=row.checkpointing["trainer"],
        bf16=row.bf16,
        use_cpu=not is_gpu(turns.device),
        per_device_eval_batch_size=row.trainer_eval_batch_size,
    )
    trainer.add_callback(TakeTurns)
    turns.actions = {"evaluate": trainer.evaluate, "save": lambda: trainer._save_checkpoint(trainer.model, None)}
    trainer.train()


def run_ft(turns: Turns, row: Row, inputs: Inputs) -> None:
    """`fine_tune` and its training loop, with hooks that take turns."""
    from ft import finetune
    from ft.config import Config
    from ft.session import Session
    from ft.train.loop import Components, StepRecorder, train
    from ft.train.state import State

    class TakeTurns(StepRecorder):
        def step_done(self, num_examples: int, num_tokens: int) -> None:
            self.tokens = num_tokens

        def log(self, step: int, epoch: float, **figures: float) -> None:
            turns.step_done(figures["loss"], self.tokens)

    def train_in_turns(
        components: Components, examples: Any, collate: Any, config: Config, state: State, session: Session
    ) -> None:
        turns.actions = {"evaluate": lambda: session.evaluate(state), "save": lambda: session.save(state)}
        turns.step_begins()
        train(components, examples, collate, config, state, TakeTurns())

    finetune.train = train_in_turns
    config = Config(
        model=str(inputs.model),
        dataset=str(inputs.dataset),
        output_dir=str(turns.output),
        overwrite=True,
        device=str(turns.device),
        precision="auto" if row.auto else "bf16" if row.bf16 else "fp32",
        dropout=row.dropout,
        cuda_graphs=row.cuda_graphs,
        activation_checkpointing="full" if row.checkpointing["ft"] else "none",
        logging_steps=1,
        eval_steps=NEVER,  # both are done when the driver asks for them
        save_steps=NEVER,
        save_blocking=True,  # as the Trainer does
    )
    finetune.fine_tune(config)


RUN = {"trainer": run_trainer, "ft": run_ft}


def work(connection: Connection, name: str, row: Row, inputs: Inputs) -> None:
    """Body of a worker process."""
    with suppress(Finished):
        RUN[name](Turns(connection, inputs.output / name, inputs.device), row, inputs)


class Worker:
    """The driver's end of the pipe. Made, it has done its first step."""

    def __init__(self, name: str, row: Row, inputs: Inputs) -> None:
        # A fresh interpreter for each, with nothing imported and its own allocator.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        started = time.perf_counter()
        self.process = context.Process(target=work, args=(theirs, name, row, inputs), daemon=True)
        self.process.start()
        theirs.close()  # so that a worker that dies is noticed
        self.blocks: list[Block] = [self.connection.recv()]
        self.first_step_done = time.perf_counter() - started
        self.start_up = self.blocks[0].first_began - started
        self.seconds: dict[str, list[float]] = {"evaluate": [], "save": []}

    def train(self, steps: int) -> None:
        """Run `steps` steps, and wait for them."""
        self.connection.send(("steps", steps))
        self.blocks.append(self.connection.recv())

    def time(self, action: str) -> None:
        """Evaluate or save a checkpoint, and wait for it."""
        self.connection.send((action, 0))
        self.seconds[action].append(self.connection.recv())

    def finish(self) -> None:
        """End its process."""
        self.connection.send(("finish", 0))
        self.process.join()

    @property
    def steps(self) -> list[Step]:
        """All steps so far, the warm-up among them."""
        return [step for block in self.blocks for step in block.steps]


def measure(row: Row, inputs: Inputs, steps: int, rounds: int) -> dict[str, Any]:
    """Run one comparison and return its figures: seconds, bytes, and what follows from them."""
    # One after the other, as each is made only when the one before has done its first step and waits.
    workers = {name: Worker(name, row, inputs) for name in RUN}
    # The order turns round every time, so that neither always runs on what the other left in the caches.
    order = list(workers.values())
    warm_up = steps_of_warm_up(inputs.device)
    for block in [warm_up - 1, *[BLOCK] * math.ceil(steps / BLOCK)]:
        for worker in order:
            worker.train(block)
        order.reverse()
    peaks = {name: worker.blocks[-1].peak_bytes for name, worker in workers.items()}
    for worker in order:  # a first save, for which the system still has to find memory, does not count
        worker.time("save")
        worker.seconds["save"].clear()
    for _ in range(rounds):
        for action in ("evaluate", "save"):
            for worker in order:
                worker.time(action)
        order.reverse()
    for worker in workers.values():
        worker.finish()

    figures: dict[str, Any] = {"row": asdict(row)}
    tokens = statistics.mean(step.tokens for step in workers["ft"].steps[warm_up:])  # the same reviews for both
    for name, worker in workers.items():
        step_seconds = [step.seconds for step in worker.steps[warm_up:]]
        step = statistics.median(step_seconds)
        evaluation, save = (statistics.median(worker.seconds[action]) for action in ("evaluate", "save"))
        figures[name] = {
            "step": step,
            "steps_per_second": 1 / step,
            "tokens_per_second": tokens / step,
            "evaluation_samples_per_second": VALIDATION_REVIEWS / evaluation,
            "start_up": worker.start_up,
            "first_step_done": worker.first_step_done,
            "save": save,
            "whole_job": worker.first_step_done
            + (STEPS - 1) * step
            + EVALUATIONS[name] * evaluation
            + SAVES[name] * save,
            "peak_bytes": peaks[name],
            "step_seconds": step_seconds,
            "losses": [step.loss for step in worker.steps],
        }
    if row.dropout == 0:
        pairs = zip(figures["ft"]["losses"], figures["trainer"]["losses"], strict=True)
        figures["loss_difference"] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    return figures


# What the tables show: figure, heading, factor, format, and whether less is better.
SHOWN = (
    ("step", "step (s)", 1, ".3f", True),
    ("steps_per_second", "steps/s", 1, ".3f", False),
    ("tokens_per_second", "tokens/s", 1, ".0f", False),
    ("evaluation_samples_per_second", "evaluation (examples/s)", 1, ".1f", False),
    ("start_up", "process start to the first step (s)", 1, ".1f", True),
    ("first_step_done", "process start to the end of the first step (s)", 1, ".1f", True),
    ("save", "the call that saves a checkpoint (s)", 1, ".2f", True),
    ("whole_job", "full run (min)", 1 / 60, ".1f", True),
    ("peak_bytes", "peak memory (GiB)", 2**-30, ".2f", True),
)


def advantage(figures: dict[str, Any], key: str) -> float:
    """How many times better `ft` is in a figure of `SHOWN`."""
    less_is_better = next(less for shown, *_, less in SHOWN if shown == key)
    ratio = figures["trainer"][key] / figures["ft"][key]
    return ratio if less_is_better else 1 / ratio


def row_table(figures: dict[str, Any]) -> str:
    """All figures of one comparison."""
    lines = [
        [title, *(f"{figures[name][key] * factor:{form}}" for name in RUN), f"{advantage(figures, key):.2f} x"]
        for key, title, factor, form, _ in SHOWN
    ]
    row = figures["row"]
    table = markdown_table([f"({row['name']}) {row['title']}", "Trainer", "ft", "ft is better"], lines)
    if "loss_difference" in figures:
        number = len(figures["ft"]["losses"])
        table += f"\n\nLargest relative difference of the losses of {number} steps: {figures['loss_difference']:.1e}."
    return table


def goals_table(results: dict[str, dict[str, Any]]) -> str:
    """The goals of the project and the measured ratios."""
    goals = [
        ("step time, with default settings", "g", "step", 5.0),
        ("step time, with default settings, fp32", "a", "step", 4.0),
        ("step time, checkpointing in both", "b", "step", 2.8),
        ("step time, no checkpointing and no dropout", "c", "step", 2.7),
        ("step time, bf16 in both, no checkpointing and no dropout", "d", "step", 2.8),
        ("evaluation, with default settings, fp32", "a", "evaluation_samples_per_second", 2.5),
        ("full run, with default settings, fp32", "a", "whole_job", 3.5),
        ("start-up, with default settings, fp32", "a", "start_up", 2.0),
        ("peak memory, with default settings, fp32", "a", "peak_bytes", 1.0),
    ]
    lines = [
        [what, f"{goal:.1f} x", f"{advantage(results[row], key):.2f} x"]
        for what, row, key, goal in goals
        if row in results
    ]
    if "c" in results:
        what = f"largest relative loss difference of {len(results['c']['ft']['losses'])} steps"
        lines.append([what, "1e-4", f"{results['c']['loss_difference']:.1e}"])
    return markdown_table(["ft against the Trainer", "goal", "measured"], lines)


def notes(results: dict[str, dict[str, Any]], steps: int, rounds: int, device: torch.device) -> str:
    """How the figures came about."""
    titles = "; ".join(f"({name}) {figures['row']['title']}" for name, figures in results.items())
    return (
        f"Rows: {titles}. With default settings both have dropout 0.1; the Trainer checkpoints activations as the "
        f"tutorial does and evaluates in batches of 8, `ft` does neither and evaluates in batches of 64; in other rows "
        f"both evaluate in batches of 64.\n\n"
        f"Batch 8 of at most 32 tokens, fp32 unless said otherwise. Medians of at least {steps} steps, "
        f"{steps_of_warm_up(device)} before them not counted, in turns of {BLOCK}; of {rounds} evaluations of the "
        f"{VALIDATION_REVIEWS} validation reviews and as many saves, after one that does not count. Tokens are those "
        f"of the reviews, without padding. Peak memory is that of the "
        f"{'device' if is_gpu(device) else 'process'} up to the last training step. A save of `ft` includes fsync, one "
        f"of the Trainer does not; slower steps after it count for neither. Start-up is with all files in the page "
        f"cache; the first step is the slowest, as it takes its memory from the system.\n\n"
        f"The time of the full run is calculated from these figures: the first step's end, {STEPS - 1} more steps, "
        f"{EVALUATIONS['trainer']} evaluations and {SAVES['trainer']} checkpoints; for `ft` one more of each, the test "
        f"split and the finished model."
    )


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """The step times side by side, as `results/STEM.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
    for offset, (name, label) in zip((-0.2, 0.2), (("trainer", "Trainer"), ("ft", "ft")), strict=True):
        seconds = [figures[name]["step"] for figures in results.values()]
        axes.bar([place + offset for place in range(len(results))], seconds, width=0.38, label=label)
    for place, figures in enumerate(results.values()):
        height = figures["ft"]["step"]
        axes.text(place + 0.2, height, f"{advantage(figures, 'step'):.1f} x", ha="center", va="bottom")
    titles = [textwrap.fill(f"({name}) {figures['row']['title']}", 22) for name, figures in results.items()]
    axes.set_xticks(range(len(results)), titles)
    axes.tick_params(axis="x", labelsize=8)
    axes.set(ylabel="seconds per step (median)", title="One optimizer step of the tutorial's job")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(ncols=2, loc="upper center")
    axes.margins(y=0.2)
    figure.savefig(path, dpi=120)


def parser_of_inputs(description: str | None) -> argparse.ArgumentParser:
    """The flags that say what to run on."""
    parser = benchmark_parser(description)
    parser.add_argument("--dataset", type=Path, required=True, help="directory with the reviews as parquet")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with GPT-2's tokenizer.json")
    parser.add_argument("--work", type=Path, help="folder for weights and runs, kept; left out: a temporary one")
    parser.add_argument("--size", choices=SIZES, default="gpt2", help="of the model, whose weights are random")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    parser.set_defaults(precision="fp32")  # where a row does not say otherwise
    return parser


@contextmanager
def prepared_inputs(options: argparse.Namespace) -> Iterator[Inputs]:
    """A working folder with a model in it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        model = folder / f"model-{options.size}"
        if not (model / "config.json").exists():
            write_model(model, options.size, tokenizer_from=options.tokenizer)
        yield Inputs(model, options.dataset, folder, precision_of(options).device)


def main() -> None:
    """Measure every row, then write the tables and the picture."""
    parser = parser_of_inputs(__doc__)
    parser.add_argument("--loss-steps", type=int, default=100, help="steps of row c at least, to compare losses")
    parser.add_argument("--rounds", type=int, default=2, help="evaluations and saves of each")
    parser.add_argument("--rows", help=f"the comparisons to make, such as ac (default {CPU_ROWS}, on a GPU {GPU_ROWS})")
    options = parser.parse_args()

    precision = precision_of(options)
    require_one_gpu(parser, precision.device)
    chosen = options.rows or (GPU_ROWS if is_gpu(precision.device) else CPU_ROWS)
    rows = [row for row in ROWS if row.name in chosen]
    results: dict[str, dict[str, Any]] = {}
    with prepared_inputs(options) as inputs:
        for name in RUN:  # brings every file into the page cache, so that the first row starts like the others
            Worker(name, rows[0], inputs).finish()
        for row in rows:
            steps = (
                max(options.steps, options.loss_steps - steps_of_warm_up(inputs.device))
                if row.name == "c"
                else options.steps
            )
            results[row.name] = measure(row, inputs, steps, options.rounds)
            print(row_table(results[row.name]), flush=True)

    tables = [
        goals_table(results),
        *map(row_table, results.values()),
        notes(results, options.steps, options.rounds, precision.device),
    ]
    write_result(
        options.output, "trainer", {"size": options.size, "rows": results}, "\n\n".join(tables), precision=precision
    )
    draw(results, picture_path(options.output, "trainer", precision.device))


if __name__ == "__main__":
    main()
