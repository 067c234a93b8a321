"""The time of a step compared with its lower bound on this machine (roofline).

    python -m benchmarks.roofline [--dataset DIR --tokenizer DIR]

Least time = matrix products that the loss needs / their measured rate, shape by shape, + bytes that AdamW must move /
measured memory bandwidth (after Williams et al., "Roofline: An Insightful Visual Performance Model", 2009). The step
is that of `ft.train.train`, timed part by part. Without the two folders the reviews are random tokens, as long as the
real ones.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    add_device_flags,
    benchmark_parser,
    markdown_table,
    median_seconds_of,
    picture_path,
    precision_of,
    write_result,
)
from benchmarks.step import (
    FP32,
    PARTS,
    build,
    median_seconds,
    parameter_count,
    performed_flops,
    random_examples,
    read_reviews,
    review_like_lengths,
    timed_steps,
    warm_up,
)
from ft.data.batches import epoch_order
from ft.data.examples import Example, encode, label_tokens, read_tokenizer
from ft.device import Precision, disable_malloc_trim
from ft.model import matmul
from ft.model.gpt2 import FP32_HEAD_ROWS, GPT2Config
from tests.reference.synthetic import SIZES

PASSES = ("forward", "input gradient", "weight gradient")
ADAMW_BYTES = 28  # per parameter: read weight, gradient and two moments, write all but the gradient
BEYOND_CACHES = 2**28  # bytes of weights that a rate is measured over: more than a cache holds
BANDWIDTH_NUMBERS = 2**27  # per array, 512 MiB

Product = Callable[[Tensor, Tensor, Tensor], Any]  # of a and b into the array given


@dataclass(frozen=True)
class Layer:
    """A linear layer as a step computes it: `rows` vectors of `n_in` numbers become as many of `n_out`.

    Attributes:
        name: for the table.
        rows: N, a batch's input tokens, or S, its selected rows; a mean, not always whole.
        n_in: length of an input vector.
        n_out: length of an output vector.
        count: how often the step computes a layer of this shape.
        is_head: the weight is the token embedding, kept as (out, in).
    """

    name: str
    rows: float
    n_in: int
    n_out: int
    count: int
    is_head: bool = False

    @property
    def flops(self) -> float:
        """Operations per step of one of the three products (all three have equally many): 2 rows n_in n_out each."""
        return 2 * self.rows * self.n_in * self.n_out * self.count


def main() -> None:
    """Measure the step, the products and the bandwidth, and write table and picture."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--dataset", type=Path, help="directory with the reviews as parquet")
    parser.add_argument("--tokenizer", type=Path, help="directory with GPT-2's tokenizer.json")
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="timed steps, after a warm-up")
    parser.add_argument("--repetitions", type=int, default=15, help="of each matrix product and each copy")
    add_device_flags(parser)
    options = parser.parse_args()
    precision = precision_of(options)
    device = precision.device
    if (options.dataset is None) != (options.tokenizer is None):
        parser.error("--dataset and --tokenizer belong together")

    disable_malloc_trim()
    model, optimizer, config = build(options.size, precision=precision)
    count = options.batch_size * (options.steps + warm_up(device))
    if options.dataset is None:
        examples = random_examples(review_like_lengths(count), config.vocab_size)
    else:
        examples = real_examples(options.dataset, options.tokenizer, count)
    steps = timed_steps(model, optimizer, examples, options.batch_size, precision=precision)
    parts = {part: statistics.median(step[part] for step in steps[warm_up(device) :]) for part in PARTS}
    counted = examples[: 2 * options.batch_size]
    performed = performed_flops(model, optimizer, counted, options.batch_size, precision=precision)
    surplus = performed / sum(needed_flops(config, counted).values())
    parameters = parameter_count(model)
    del model, optimizer

    mean_rows = sum(len(example.input_ids) for example in examples) / len(steps)
    layers = linear_layers(config, mean_rows, options.batch_size)
    rates = {layer.name: product_rates(layer, options.repetitions, precision) for layer in layers}
    bandwidth = bandwidths(options.repetitions, device)
    attention = needed_flops(config, examples)["attention"] / len(steps)
    bounds = lower_bounds(layers, rates, attention, ADAMW_BYTES * parameters / max(bandwidth.values()))
    figures: dict[str, Any] = {
        "size": options.size,
        "dtype": precision.name,
        "batch_size": options.batch_size,
        "reviews": "random tokens" if options.dataset is None else "rotten_tomatoes",
        "timed_steps": options.steps,
        "rows_per_step": mean_rows,
        "step_seconds": median_seconds(steps, device),
        "step_seconds_by_part": parts,
        "bound_seconds": sum(bounds.values()),
        "bound_seconds_by_part": bounds,
        "step_to_bound": median_seconds(steps, device) / sum(bounds.values()),
        "needed_flops_per_step": sum(needed_flops(config, examples).values()) / len(steps),
        "performed_to_needed_flops": surplus,
        "products": {layer.name: {"flops": layer.flops, "flops_per_second": rates[layer.name]} for layer in layers},
        "bytes_per_second": bandwidth,
    }
    draw(figures, picture_path(options.output, "roofline", device))
    write_result(options.output, "roofline", figures, table(figures, layers), precision=precision)


def real_examples(dataset: Path, tokenizer_folder: Path, count: int) -> list[Example]:
    """The first `count` examples that a run with seed 42 reads, over again if there are fewer."""
    split = read_reviews(dataset)
    tokenizer = read_tokenizer(tokenizer_folder / "tokenizer.json")
    examples = encode(split, tokenizer, label_tokens(split.label_names or ("neg", "pos"), tokenizer), max_length=32)
    order = epoch_order(len(examples), seed=42, epoch=0)
    return [examples[order[i % len(order)]] for i in range(count)]


def linear_layers(config: GPT2Config, rows: float, selected: float) -> list[Layer]:
    """The linear layers of a step for `rows` packed input tokens, of which `selected` have a target.

    All blocks but the last compute every row. The last needs keys and values of every row, the rest of the selected
    ones only, as does the head.
    """
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    blocks = config.n_layer - 1
    return [
        Layer("c_attn", rows, width, 3 * width, blocks),
        Layer("attention c_proj", rows, width, width, blocks),
        Layer("c_fc", rows, width, inner, blocks),
        Layer("MLP c_proj", rows, inner, width, blocks),
        Layer("last block: keys, values", rows, width, 2 * width, 1),
        Layer("last block: queries, c_proj", selected, width, width, 2),
        Layer("last block: c_fc", selected, width, inner, 1),
        Layer("last block: MLP c_proj", selected, inner, width, 1),
        Layer("head", selected, width, config.vocab_size, 1, is_head=True),
    ]


def needed_flops(config: GPT2Config, examples: Sequence[Example]) -> dict[str, float]:
    """Operations of the matrix products that loss and gradients of `examples` need, each of one target.

    With N input tokens in all, S targets, sequences of t tokens, L layers, width C and MLP width F:

        linear, forward   2 (L - 1) N (4 C^2 + 2 C F)  +  2 N 2 C^2  +  2 S (2 C^2 + 2 C F)  +  2 S C V
                          all blocks but the last         last: keys     last: queries,         head
                                                          and values     c_proj, MLP
        attention         4 C per pair of a row and one it sees: q k' and p v; t (t + 1) / 2 pairs in all blocks but
                          the last, t in the last
        backward          twice the forward: one product for each input's gradient, one for each weight's (in attention
                          one for each of the two factors). Nothing is to be subtracted: the embeddings below the first
                          block are trained, so that every input's gradient is needed.
    """
    lengths = [len(example.input_ids) for example in examples]
    linear = sum(layer.flops for layer in linear_layers(config, sum(lengths), len(examples)))
    pairs = sum((config.n_layer - 1) * length * (length + 1) / 2 + length for length in lengths)
    return {"linear": 3 * linear, "attention": 3 * 4 * config.n_embd * pairs}


def lower_bounds(
    layers: Sequence[Layer], rates: dict[str, dict[str, float]], attention_flops: float, adamw_seconds: float
) -> dict[str, float]:
    """The least seconds of each part of the step. Attention's few products count at the layers' mean rate."""
    by_pass = {name: sum(layer.flops / rates[layer.name][name] for layer in layers) for name in PASSES}
    mean_rate = 3 * sum(layer.flops for layer in layers) / sum(by_pass.values())
    attention = attention_flops / mean_rate
    return {
        "forward": by_pass["forward"] + attention / 3,
        "backward": by_pass["input gradient"] + by_pass["weight gradient"] + attention * 2 / 3,
        "AdamW": adamw_seconds,
    }


def product_rates(layer: Layer, repetitions: int, precision: Precision) -> dict[str, float]:
    """Operations per second of a layer's three products by the faster library, at its shapes and memory layouts.

    As in a step, each product meets another layer's weights, which no cache holds any more.
    """
    rows, shape = max(1, round(layer.rows)), (layer.n_in, layer.n_out)
    in_fp32 = layer.is_head and rows <= FP32_HEAD_ROWS
    like = {"device": precision.device, "dtype": torch.float32 if in_fp32 else precision.dtype}

    def weight_like() -> Tensor:
        return torch.full(shape[::-1], 0.01, **like).t() if layer.is_head else torch.full(shape, 0.01, **like)

    copies = min(128, max(2, BEYOND_CACHES // (like["dtype"].itemsize * layer.n_in * layer.n_out)))
    weights, weight_gradients = ([weight_like() for _ in range(copies)] for _ in range(2))
    inputs, output_gradients = torch.randn(rows, layer.n_in, **like), torch.randn(rows, layer.n_out, **like)
    outputs, input_gradients = torch.empty_like(output_gradients), torch.empty_like(inputs)

    def forward(product: Product) -> None:
        for weight in weights:
            product(inputs, weight, outputs)

    def input_gradient(product: Product) -> None:
        for weight in weights:
            product(output_gradients, weight.t(), input_gradients)

    def weight_gradient(product: Product) -> None:
        for gradient in weight_gradients:
            product(inputs.t(), output_gradients, gradient)

    flops = 2 * rows * layer.n_in * layer.n_out * copies
    functions = zip(PASSES, (forward, input_gradient, weight_gradient), strict=True)
    return {
        name: max(
            flops / median_seconds_of(partial(function, product), repetitions, precision.device)
            for product in products(precision)
        )
        for name, function in functions
    }


def products(precision: Precision) -> list[Product]:
    """The ways to a matrix product a b that PyTorch has here: its default, MKL on x86, and oneDNN."""

    def onednn(a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")  # makes its result's array itself

    default: Product = lambda a, b, out: torch.mm(a, b, out=out)  # noqa: E731
    has_onednn = precision.device == FP32.device and precision.name == FP32.name and matmul.onednn_is_faster()
    return [default, onednn] if has_onednn else [default]


def bandwidths(repetitions: int, device: torch.device) -> dict[str, float]:
    """Bytes per second of three ways through large arrays. AdamW's is what the fused kernel reaches."""
    a, b, c = (torch.full((BANDWIDTH_NUMBERS,), 0.5, device=device) for _ in range(3))
    seconds = {
        "copy": (8, median_seconds_of(lambda: a.copy_(b), repetitions, device)),
        "triad": (12, median_seconds_of(lambda: torch.add(b, c, alpha=0.5, out=a), repetitions, device)),
    }
    parameter = torch.nn.Parameter(a)
    parameter.grad = b
    step = torch.optim.AdamW([parameter], lr=1e-6, fused=True).step
    seconds["AdamW"] = (ADAMW_BYTES, median_seconds_of(step, repetitions, device))
    return {name: bytes_each * BANDWIDTH_NUMBERS / taken for name, (bytes_each, taken) in seconds.items()}


def table(figures: dict[str, Any], layers: Sequence[Layer]) -> str:
    """Both tables and what they amount to."""
    taken, bounds = figures["step_seconds_by_part"], figures["bound_seconds_by_part"]
    rows = [[part, f"{1e3 * taken[part]:.1f}", f"{1e3 * bounds.get(part, 0.0):.1f}"] for part in PARTS]
    rows.append(["full step", f"{1e3 * figures['step_seconds']:.1f}", f"{1e3 * figures['bound_seconds']:.1f}"])
    products = [
        [
            layer.name,
            f"{layer.rows:.0f} × {layer.n_in} × {layer.n_out}",
            str(layer.count),
            f"{3 * layer.flops / 1e9:.2f}",
            *(f"{figures['products'][layer.name]['flops_per_second'][name] / 1e9:.0f}" for name in PASSES),
        ]
        for layer in layers
    ]
    bandwidth = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in figures["bytes_per_second"].items())
    return (
        markdown_table(["part", "step (ms)", "least (ms)"], rows)
        + f"\n\n**Step / least time: {figures['step_to_bound']:.2f}.** {figures['size']}, batches of "
        f"{figures['batch_size']} reviews ({figures['reviews']}), {figures['rows_per_step']:.1f} input tokens; medians "
        f"of {figures['timed_steps']} steps. The loss needs {figures['needed_flops_per_step'] / 1e9:.1f} GFLOP a step, "
        f"the step performs {figures['performed_to_needed_flops']:.3f} times as many.\n\n"
        f"Matrix products at the step's shapes, in GFLOP/s ({figures['dtype']}):\n\n"
        + markdown_table(["layer", "rows × in × out", "per step", "GFLOP", *PASSES], products)
        + f"\n\nMemory bandwidth in GB/s: {bandwidth}; the bound takes the highest."
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    """Step and bound as two bars made of their parts, as `results/NAME.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    bars = {"least": figures["bound_seconds_by_part"], "step": figures["step_seconds_by_part"]}
    lefts = [0.0, 0.0]
    for part in PARTS:
        widths = [1e3 * seconds.get(part, 0.0) for seconds in bars.values()]
        axes.barh(list(bars), widths, left=lefts, label=part)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.set(xlabel="ms per step", title=f"{figures['size']}: step / least time = {figures['step_to_bound']:.2f}")
    axes.legend(ncols=len(PARTS), loc="upper center", bbox_to_anchor=(0.5, -0.28), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
