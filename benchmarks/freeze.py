"""Speed, memory and accuracy of training only some parameters.

    python -m benchmarks.freeze

Speed, memory and checkpoints are those of the 124M model with random weights, on batches of 8 reviews as long as the
real ones; each case has a process of its own, and all take turns. Accuracy is that of the embedded demo, a model of two
layers whose training is real: once from random weights, and once as fine-tuning, where the trained model learns in one
epoch to say the opposite, `pos` for bad and `neg` for good.
"""

import json
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout
from functools import cache
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import benchmark_parser, markdown_table, peak_memory, write_result
from benchmarks.step import GIB, PARTS, random_examples, review_like_lengths, timed_steps
from ft.checkpoint.model_builder import add_adapter
from ft.checkpoint.snapshot import take_snapshot
from ft.checkpoint.store import ModelSource, write_checkpoint
from ft.cli.arguments import read_arguments
from ft.device import disable_malloc_trim
from ft.finetune import fine_tune
from ft.model.freeze import freeze, num_trainable_parameters
from ft.model.gpt2 import GPT2, GPT2Config
from ft.train.optim import AdamW, build_optimizer
from ft.train.state import State
from tests.reference.synthetic import SIZES, model_config

BATCH_SIZE = 8
TURN = 4  # steps of a case until the next one's turn; the first of each turn is not counted
CASES: dict[str, tuple[str, ...]] = {  # what is trained, by its flags
    "all": (),
    "last four blocks": ("--train-only", "last:4"),
    "last block": ("--train-only", "last:1"),
    "final norm": ("--train-only", "ln_f.*"),
    "biases": ("--train-only", "*.bias"),
    "head (the tied embedding)": ("--train-only", "wte.weight"),
    "LoRA": ("--lora-rank", "8"),
    "LoRA of c_attn": ("--lora-rank", "8", "--lora-targets", "c_attn"),
    "LoRA and biases": ("--lora-rank", "8", "--train-only", "*.bias"),
}
DEMO_CASES = {name: flags for name, flags in CASES.items() if name != "last four blocks"}  # it has two


def main() -> None:
    """Measure every case, and write the tables."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--turns", type=int, default=5, help="turns of each case, after one to warm up")
    options = parser.parse_args()

    cases = measure_in_turns(options.size, options.turns)
    with tempfile.TemporaryDirectory() as folder:
        demo = measure_demo(Path(folder))
    counted = options.turns * (TURN - 1)
    table = (
        f"{step_table(cases)}\n\n{options.size}, random weights, batches of {BATCH_SIZE} reviews as long as the real "
        f"ones, fp32, dropout 0.1. Medians of {counted} steps, all cases in turns of {TURN} steps; the peak is that of "
        "a process which trains and does not save. A checkpoint is without its tokenizer.\n\n"
        f"{demo_table(demo)}\n\nThe embedded demo, whose training is real but whose model is small: two layers of 64, "
        "500 composed reviews to validate, one seed. From random weights for the demo's 10 epochs; and the trained "
        "model (the first column of `all`) for one epoch on the same reviews with the labels exchanged."
    )
    write_result(
        options.output, "freeze", {"size": options.size, "batch_size": BATCH_SIZE, "cases": cases, "demo": demo}, table
    )


def measure_in_turns(size: str, turns: int) -> dict[str, dict[str, Any]]:
    """Seconds of each part of a step, peak memory and checkpoint of each case; every round begins with another one."""
    names = [name for name in CASES if SIZES[size]["n_layer"] >= 4 or name != "last four blocks"]
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn"))) for name in names}
        for turn in range(1 + turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                timed = workers[name].submit(one_turn, size, CASES[name]).result()
                if turn > 0:
                    steps[name] += timed[1:]
            print(f"turn {turn} of {turns}", flush=True)
        return {
            name: {
                **workers[name].submit(footprint, size, CASES[name]).result(),
                "seconds": statistics.median(sum(step.values()) for step in steps[name]),
                "parts": {part: statistics.median(step[part] for step in steps[name]) for part in PARTS},
                "step_seconds": [sum(step.values()) for step in steps[name]],
            }
            for name in names
        }


@cache
def built(size: str, flags: tuple[str, ...]) -> tuple[GPT2, AdamW]:
    """Model and optimizer of this process, which never holds the moments of what is frozen."""
    disable_malloc_trim()
    model = GPT2(GPT2Config.from_dict(model_config(size)))
    model.init_weights(seed=42)
    torch.manual_seed(42)
    config = read_arguments(flags)
    if config.uses_lora:
        add_adapter(model, config, checkpoint=None)
    else:
        freeze(model, config.train_only, config.freeze)
    return model, build_optimizer(model, learning_rate=2e-5, weight_decay=0.0)


def one_turn(size: str, flags: tuple[str, ...]) -> list[dict[str, float]]:
    """The seconds of each part of each step of a turn."""
    model, optimizer = built(size, flags)
    examples = random_examples(review_like_lengths(TURN * BATCH_SIZE), model.config.vocab_size)
    return timed_steps(model, optimizer, examples, BATCH_SIZE)


def footprint(size: str, flags: tuple[str, ...]) -> dict[str, int]:
    """Trained parameters, the peak memory of the training so far, and the bytes of a checkpoint."""
    model, optimizer = built(size, flags)
    peak = peak_memory()
    snapshot = take_snapshot(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), State(), copy=False)
    with tempfile.TemporaryDirectory() as folder:
        source = ModelSource(model_config(size), tokenizer=b"", label_names=("neg", "pos"), about_tokenizer={})
        write_checkpoint(Path(folder), snapshot, source, keep=1, keep_best=False)
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"trained_parameters": num_trainable_parameters(model), "peak_bytes": peak, "checkpoint_bytes": written}


def measure_demo(folder: Path) -> dict[str, dict[str, float]]:
    """Validation accuracy of each case from random weights, and of the trained model after learning the opposite."""
    opposite = ["--model", f"{folder}/all/final", "--dataset", f"{folder}/all/inputs/dataset", "--label-names"]
    opposite += ["pos,neg", "--batch-size", "32", "--learning-rate", "1e-3"]
    accuracy = {}
    for name, flags in DEMO_CASES.items():
        accuracy[name] = {
            "from_random_weights": accuracy_of(folder / name, ["--demo", *flags]),
            "opposite_from_trained_model": accuracy_of(folder / f"{name}, opposite", [*opposite, *flags]),
        }
        print(name, accuracy[name], flush=True)
    return accuracy


def accuracy_of(folder: Path, arguments: list[str]) -> float:
    """The last validation accuracy of a run with this command line, on the CPU in fp32."""
    with redirect_stdout(StringIO()):
        fine_tune(read_arguments([*arguments, "--device", "cpu", "--precision", "fp32", "--output-dir", str(folder)]))
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return float([event["eval_accuracy"] for event in events if "eval_accuracy" in event][-1])


def step_table(cases: dict[str, dict[str, Any]]) -> str:
    """Time, memory and checkpoint of each case."""
    rows = [
        [
            name,
            f"`{' '.join(CASES[name])}`" if CASES[name] else "",
            f"{case['trained_parameters']:,}",
            f"{case['seconds']:.3f}",
            f"{cases['all']['seconds'] / case['seconds']:.2f} x",
            *(f"{case['parts'][part]:.3f}" for part in ("forward", "backward")),
            f"{case['parts']['clip'] + case['parts']['AdamW']:.3f}",
            f"{case['peak_bytes'] / GIB:.2f}",
            f"{case['checkpoint_bytes'] / 1e6:,.0f}",
        ]
        for name, case in cases.items()
    ]
    parts = ["forward (s)", "backward (s)", "clip and AdamW (s)"]
    header = ["trained", "flags", "parameters", "step (s)", "faster than all", *parts]
    return markdown_table([*header, "peak memory (GiB)", "checkpoint (MB)"], rows)


def demo_table(demo: dict[str, dict[str, float]]) -> str:
    """Accuracy of each case."""
    rows = [
        [name, f"{figures['from_random_weights']:.1%}", f"{figures['opposite_from_trained_model']:.1%}"]
        for name, figures in demo.items()
    ]
    return markdown_table(["trained", "accuracy from random weights", "the opposite, from the trained model"], rows)


if __name__ == "__main__":
    main()
