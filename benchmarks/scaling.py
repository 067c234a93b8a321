"""How time and memory scale with batch size, length, model size and data.

    python -m benchmarks.scaling --dataset DIR --tokenizer DIR

A step is that of `ft.train.train`, on reviews of random tokens that are all of the full length; the data series
tokenizes and encodes real reviews. Each point has a process to itself, so that its peak memory is its
own. Exponents are slopes of a least-squares line through the logarithms: 1 is linear growth, 0 none.
"""

import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import (
    add_device_flags,
    benchmark_parser,
    current_memory,
    markdown_table,
    peak_memory,
    picture_path,
    precision_of,
    write_result,
)
from benchmarks.step import (
    GIB,
    build,
    in_own_process,
    median_seconds,
    parameter_count,
    random_examples,
    read_reviews,
    timed_steps,
    warm_up,
)
from ft.data.examples import encode, label_tokens, read_tokenizer
from ft.data.splits import Split
from ft.device import Precision, disable_malloc_trim
from tests.reference.synthetic import SIZES

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
MODELS = ("distilgpt2", "gpt2", "gpt2-medium", "gpt2-large")
REVIEWS = (1_000, 8_530, 85_300)
AXES = {
    "batch": "reviews per batch, of 32 tokens",
    "length": "tokens per review, 2 reviews",
    "model": "parameters, 8 reviews of 32 tokens",
    "data": "reviews made into examples",
}


@dataclass(frozen=True)
class Point:
    """A measurement: at `x` of its series, the seconds and the peak bytes it took."""

    series: str
    label: str
    x: float
    seconds: float
    bytes: float


def main() -> None:
    """Measure every point, fit the exponents, and write table and picture."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--dataset", type=Path, required=True, help="directory with the reviews as parquet")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with GPT-2's tokenizer.json")
    parser.add_argument("--size", choices=SIZES, default="gpt2", help="model of the batch and length series")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=SIZES,
        help=f"models of the model series (default: {' '.join(MODELS)}; with --size tiny that alone)",
    )
    add_device_flags(parser)
    options = parser.parse_args()
    precision = precision_of(options)
    models = options.models or (MODELS if options.size in MODELS else [options.size])

    lengths = [length for length in LENGTHS if length <= SIZES[options.size]["n_positions"]]
    plan = [("batch", options.size, batch, 32) for batch in BATCHES]
    plan += [("length", options.size, 2, length) for length in lengths]
    plan += [("model", size, 8, 32) for size in models]
    points, skipped = [], []
    for series, size, batch_size, length in plan:
        label = {"batch": str(batch_size), "length": str(length), "model": size}[series]
        measured = in_own_process(measure_step, size, batch_size, length, precision, device=precision.device)
        if measured is None:
            skipped.append(f"{series} {label}")
            continue
        x = {"batch": batch_size, "length": length, "model": measured["parameters"]}[series]
        points.append(Point(series, label, x, measured["seconds"], measured["bytes"]))
        print(points[-1], flush=True)
    for count in REVIEWS:
        measured = in_own_process(measure_encoding, options.dataset, options.tokenizer, count)
        if measured is None:
            skipped.append(f"data {count}")
            continue
        points.append(Point("data", f"{count:,}", count, measured["seconds"], measured["bytes"]))
        print(points[-1], flush=True)

    draw(points, picture_path(options.output, "scaling", precision.device))
    fits = {name: fit([point for point in points if point.series == name]) for name in AXES}
    figures = {"size": options.size, "points": [asdict(point) for point in points], "exponents": fits}
    text = table(points, fits, skipped, options.size)
    write_result(options.output, "scaling", {**figures, "out_of_memory": skipped}, text, precision=precision)


def measure_step(size: str, batch_size: int, length: int, precision: Precision) -> dict[str, float]:
    """Median seconds of a step and the process's peak memory, for reviews of `length` tokens with their label."""
    disable_malloc_trim()
    model, optimizer, config = build(size, precision=precision)
    parameters = parameter_count(model)
    dear = parameters * batch_size * length > 100e9  # then a step takes seconds, and three give a median
    steps = warm_up(precision.device) + (3 if dear else 7)
    examples = random_examples([length - 1] * batch_size * steps, config.vocab_size)  # the label is no input
    timed = timed_steps(model, optimizer, examples, batch_size, precision=precision)
    seconds = median_seconds(timed, precision.device)
    return {"seconds": seconds, "bytes": peak_memory(precision.device), "parameters": parameters}


def measure_encoding(dataset: Path, tokenizer_folder: Path, count: int) -> dict[str, float]:
    """Seconds to make examples of `count` reviews, drawn with repetition, and the memory that adds at its peak."""
    reviews = read_reviews(dataset)
    tokenizer = read_tokenizer(tokenizer_folder / "tokenizer.json")
    rows = random.Random(0).choices(range(len(reviews.texts)), k=count)
    split = Split("train", [reviews.texts[row] for row in rows], [reviews.labels[row] for row in rows])
    label_ids = label_tokens(reviews.label_names or ("neg", "pos"), tokenizer)
    before = current_memory()
    started = time.perf_counter()
    examples = encode(split, tokenizer, label_ids, max_length=32)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": peak_memory() - before, "examples": len(examples)}


def fit(points: Sequence[Point]) -> dict[str, Any]:
    """Exponents over the whole range, and over its upper half, where fixed costs weigh less.

    A range of a single point has none.
    """
    ranges = {"whole": points, "upper half": points[len(points) // 2 :]}
    return {
        name: {"from": part[0].label, "to": part[-1].label, **exponents(part)}
        for name, part in ranges.items()
        if len(part) > 1
    }


def exponents(points: Sequence[Point]) -> dict[str, float]:
    """The slopes of log(seconds) and log(bytes) over log(x)."""
    xs = [math.log(point.x) for point in points]
    return {
        "seconds": statistics.linear_regression(xs, [math.log(point.seconds) for point in points]).slope,
        "bytes": statistics.linear_regression(xs, [math.log(point.bytes) for point in points]).slope,
    }


def table(points: Sequence[Point], fits: dict[str, Any], skipped: Sequence[str], size: str) -> str:
    """The points, the exponents, and what did not fit into memory."""
    rows = [[AXES[point.series], point.label, f"{point.seconds:.3f}", f"{point.bytes / GIB:.2f}"] for point in points]
    slopes = [
        [
            AXES[name],
            f"{part['from']} to {part['to']}",
            f"{part['seconds']:.2f}",
            f"{part['bytes']:.2f}",
        ]
        for name, ranges in fits.items()
        for part in ranges.values()
    ]
    missing = f"\n\nNeeded more memory than was free: {', '.join(skipped)}." if skipped else ""
    return (
        markdown_table(["grows", "to", "seconds", "peak GiB"], rows)
        + "\n\nFitted exponents:\n\n"
        + markdown_table(["grows", "range", "of time", "of memory"], slopes)
        + f"\n\nModel of the first two series: {size}. Seconds per step and the process's peak memory; for the data, "
        "seconds in all and the memory that the examples add at their peak. A step's fixed cost, AdamW over all "
        "weights, is why few tokens take more than their share." + missing
    )


def draw(points: Sequence[Point], path: Path) -> None:
    """A column of two panels for each series, seconds above and memory below, as `results/STEM.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(AXES), figsize=(3.2 * len(AXES), 5.2), sharex="col", layout="constrained")
    for (above, below), (name, axis) in zip(grid.T, AXES.items(), strict=True):
        series = [point for point in points if point.series == name]
        xs = [point.x for point in series]
        above.loglog(xs, [point.seconds for point in series], "o-")
        below.loglog(xs, [point.bytes / GIB for point in series], "s-", color="C1")
        above.set(title=name, ylabel="seconds" if name == "data" else "seconds per step")
        below.set(xlabel=axis, ylabel="added GiB" if name == "data" else "peak GiB")
        for axes in (above, below):
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
            low, high = axes.get_ylim()  # widened to powers of two, so that each panel has at least two ticks
            axes.set_ylim(2 ** math.floor(math.log2(low)), 2 ** math.ceil(math.log2(high)))
            axes.set_xticks(xs, [point.label for point in series], rotation=40)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
