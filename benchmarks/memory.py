"""Memory and time of activation checkpointing, in `ft` and in the Hugging Face Trainer.

    python -m benchmarks.memory --tokenizer DIR

Batches of 8: short examples, as long as the real reviews, and long ones of exactly 512 tokens. Each case runs in its
own process. Reported are its peak memory, and the activations: the peak less the process without a model, and less the
16 bytes per parameter of weights, gradients and AdamW's moments. They can be near 0, since the peak of a small batch
is in the optimizer step, when activations are freed.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    add_device_flags,
    benchmark_parser,
    current_memory,
    is_gpu,
    markdown_table,
    peak_memory,
    picture_path,
    precision_of,
    require_one_gpu,
    write_result,
)
from benchmarks.step import (
    BYTES_PER_PARAMETER,
    GIB,
    build,
    in_own_process,
    median_seconds,
    parameter_count,
    random_examples,
    review_like_lengths,
    timed_steps,
    warm_up,
)
from ft.data.examples import encode, label_tokens, read_tokenizer
from ft.data.splits import Split
from ft.device import Precision, disable_malloc_trim
from tests.reference.synthetic import SIZES, write_model

SHORT = 32  # the job's --max-length
OURS = ("none", "selective", "full")
THEIRS = {"none": False, "full": True}
LABELS = ("neg", "pos")


@dataclass(frozen=True)
class Case:
    """A measurement; bytes of the process without a model, of its 16 per parameter, and of all at the peak."""

    program: str
    checkpointing: str
    max_length: int
    seconds: float
    process_bytes: float
    parameter_bytes: float
    peak_bytes: float

    @property
    def activation_bytes(self) -> float:
        """What activations and work space add."""
        return self.peak_bytes - self.process_bytes - self.parameter_bytes


def main() -> None:
    """Measure every case, and write table and picture."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with GPT-2's tokenizer.json")
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--long", type=int, default=512, help="tokens of a long example, label included")
    parser.add_argument("--short-steps", type=int, default=6, help="timed steps at 32 tokens, after a warm-up")
    parser.add_argument("--long-steps", type=int, default=2, help="timed steps with long examples, after a warm-up")
    add_device_flags(parser)
    options = parser.parse_args()
    precision = precision_of(options)
    device = precision.device
    require_one_gpu(parser, device)

    cases, skipped = [], []
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_model(Path(folder) / "model", options.size, tokenizer_from=options.tokenizer)
        plan = [("ft", mode, measure_ours, (precision, options.size, mode)) for mode in OURS]
        plan += [("Trainer", mode, measure_trainer, (precision, flag)) for mode, flag in THEIRS.items()]
        for max_length, steps in ((SHORT, options.short_steps), (options.long, options.long_steps)):
            rows = reviews(max_length, options.batch_size * (warm_up(device) + steps))
            for program, mode, measure, arguments in plan:
                inputs = (model_dir, rows, max_length, options.batch_size, *arguments)
                measured = in_own_process(measure, *inputs, device=device)
                if measured is None:
                    skipped.append(f"{program}, checkpointing {mode}, {max_length} tokens")
                    continue
                cases.append(Case(program, mode, max_length, **measured))
                print(cases[-1], flush=True)

    draw(cases, picture_path(options.output, "memory", device))
    figures = {
        "size": options.size,
        "batch_size": options.batch_size,
        "cases": [{**asdict(case), "activation_bytes": case.activation_bytes} for case in cases],
        "out_of_memory": skipped,
    }
    text = table(cases, skipped, options.size, options.batch_size, precision.name)
    write_result(options.output, "memory", figures, text, precision=precision)


def reviews(max_length: int, count: int) -> list[dict[str, Any]]:
    """Rows of `text` and `label`: as long as real reviews at 32 tokens, else of exactly `max_length`.

    ` good` is one token. A review's tokens are those of its text, the end-of-text and the label, which is no input.
    """
    inputs = review_like_lengths(count) if max_length == SHORT else [max_length - 1] * count
    return [{"text": " good" * (length - 1), "label": row % 2} for row, length in enumerate(inputs)]


def rehearse(precision: Precision) -> None:
    """A step of a minute model, so that the code which PyTorch loads at first use counts as process."""
    model, optimizer, config = build("tiny", precision=precision, n_embd=8, n_head=1)
    timed_steps(model, optimizer, random_examples([8], config.vocab_size), batch_size=1, precision=precision)


def measure_ours(
    model_dir: Path,
    rows: Sequence[dict[str, Any]],
    max_length: int,
    batch_size: int,
    precision: Precision,
    size: str,
    mode: str,
) -> dict[str, float]:
    """Seconds per step and memory of the product's loop. The process is measured just before the model is made."""
    disable_malloc_trim()
    rehearse(precision)
    tokenizer = read_tokenizer(model_dir / "tokenizer.json")
    split = Split("train", [row["text"] for row in rows], [row["label"] for row in rows])
    examples = encode(split, tokenizer, label_tokens(LABELS, tokenizer), max_length)
    process_bytes = current_memory(precision.device)
    model, optimizer, _ = build(size, mode, precision)
    steps = timed_steps(model, optimizer, examples, batch_size, precision=precision)
    seconds = median_seconds(steps, precision.device)
    return {
        "seconds": seconds,
        "process_bytes": process_bytes,
        "parameter_bytes": BYTES_PER_PARAMETER * parameter_count(model),
        "peak_bytes": peak_memory(precision.device),
    }


def measure_trainer(
    model_dir: Path,
    rows: Sequence[dict[str, Any]],
    max_length: int,
    batch_size: int,
    precision: Precision,
    gradient_checkpointing: bool,
) -> dict[str, float]:
    """Seconds per step and memory of the Trainer.

    It imports much while it reads the model, so that its process is measured afterwards and the weights subtracted.
    """
    torch.backends.cuda.enable_cudnn_sdp(True)  # as by default, which ft changes
    rehearse(precision)
    # Here, as our own process must not hold what only the Trainer needs.
    from tests.reference.trainer import build_trainer

    with tempfile.TemporaryDirectory() as output_dir:
        trainer, steps = build_trainer(
            model_dir,
            rows,
            Path(output_dir),
            label_names=LABELS,
            max_length=max_length,
            gradient_checkpointing=gradient_checkpointing,
            batch_size=batch_size,
            use_cpu=not is_gpu(precision.device),
            bf16=precision.name == "bf16",
            fp16=precision.name == "fp16",
        )
        for parameter in trainer.model.parameters():
            parameter.sum()  # weights are mapped from their file, and in memory only when somebody has read them
        parameters = parameter_count(trainer.model)
        process_bytes = current_memory(precision.device) - 4 * parameters
        trainer.train()
    return {
        "seconds": statistics.median(step.seconds for step in steps[warm_up(precision.device) :]),
        "process_bytes": process_bytes,
        "parameter_bytes": BYTES_PER_PARAMETER * parameters,
        "peak_bytes": peak_memory(precision.device),
    }


def table(cases: Sequence[Case], skipped: Sequence[str], size: str, batch_size: int, dtype: str) -> str:
    """The cases, and what did not fit into memory."""
    rows = [
        [
            case.program,
            str(case.max_length),
            case.checkpointing,
            f"{case.seconds:.2f}",
            f"{case.peak_bytes / GIB:.2f}",
            f"{case.activation_bytes / GIB:.2f}",
        ]
        for case in cases
    ]
    missing = f"\n\nNeeded more memory than was free: {', '.join(skipped)}." if skipped else ""
    return (
        markdown_table(
            ["program", "length", "checkpointing", "s per step", "peak memory (GiB)", "activations (GiB)"], rows
        )
        + f"\n\n{size}, batches of {batch_size}, {dtype}; at length {SHORT} reviews are as long as the real ones, else "
        "all of full length. Activations: the peak less the process without a model and less weights, gradients and "
        "AdamW's moments." + missing
    )


def draw(cases: Sequence[Case], path: Path) -> None:
    """A panel per length, a bar per case, as `results/STEM.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({case.max_length for case in cases})
    figure, grid = plt.subplots(1, len(lengths), figsize=(5.2 * len(lengths), 3.2), layout="constrained", squeeze=False)
    for axes, length in zip(grid[0], lengths, strict=True):
        shown = [case for case in cases if case.max_length == length]
        names = [f"{case.program}, {case.checkpointing}" for case in shown]
        lefts = [0.0] * len(shown)
        for label, attribute in (
            ("process", "process_bytes"),
            ("weights, gradients, moments", "parameter_bytes"),
            ("activations", "activation_bytes"),
        ):
            widths = [max(0.0, getattr(case, attribute)) / GIB for case in shown]
            axes.barh(names, widths, left=lefts, label=label)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        for name, end, case in zip(names, lefts, shown, strict=True):
            axes.text(end, name, f" {case.seconds:.2f} s", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set(xlabel="peak GiB (and seconds per step)", title=f"{length} tokens")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
