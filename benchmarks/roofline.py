"""The time of a step compared with its lower bound on this machine (roofline).

    python -m benchmarks.roofline [--dataset DIR --tokenizer DIR]

Least time = matrix products that the loss needs / their measured rate, shape by shape, + bytes that AdamW must move /
measured memory bandwidth (after Williams et al., "Roofline: An Insightful Visual Performance Model", 2009). The step
is that of `ft.train.train`, timed part by part. On a CPU without --precision, steps in fp32 and bf16 take turns.
Without the two folders the reviews are random tokens, as long as the real ones.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    add_device_flags,
    benchmark_parser,
    is_gpu,
    markdown_table,
    median_seconds_of,
    moment,
    picture_path,
    precision_of,
    seconds_between,
    write_result,
)
from benchmarks.step import (
    PARTS,
    build,
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
from ft.model.gpt2 import FP32_HEAD_ROWS, GPT2, GPT2Config
from ft.train.optim import AdamW, clip_in_optimizer
from tests.reference.synthetic import SIZES, model_config

PASSES = ("forward", "input gradient", "weight gradient")
ADAMW_BYTES = 28  # per parameter: read weight, gradient and two moments, write all but the gradient
BEYOND_CACHES = 2**28  # bytes of weights that a rate is measured over: more than a cache holds
BANDWIDTH_NUMBERS = 2**27  # per array, 512 MiB
TURN = 16  # steps of one precision until the other's turn

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
    chosen = precision_of(options)
    if (options.dataset is None) != (options.tokenizer is None):
        parser.error("--dataset and --tokenizer belong together")
    disable_malloc_trim()
    both = options.precision is None and not is_gpu(chosen.device)
    precisions = [chosen, replace(chosen, name="bf16")] if both else [chosen]
    figures, layers = measure(options, precisions)
    write_result(options.output, "roofline", figures, table(figures, layers), precision=chosen)
    draw(figures, picture_path(options.output, "roofline", chosen.device))


def measure(options: argparse.Namespace, precisions: Sequence[Precision]) -> tuple[dict[str, Any], list[Layer]]:
    """The figures of `main`, and the layers that they are of."""
    device, names = precisions[0].device, [precision.name for precision in precisions]
    config = GPT2Config.from_dict(model_config(options.size))
    turns = math.ceil(options.steps / TURN)
    count = options.batch_size * (warm_up(device) + TURN)
    if options.dataset is None:
        examples = random_examples(review_like_lengths(count), config.vocab_size)
    else:
        examples = real_examples(options.dataset, options.tokenizer, count)
    builds = {precision.name: build(options.size, precision=precision)[:2] for precision in precisions}
    model, optimizer = builds[names[0]]
    counted = examples[: 2 * options.batch_size]
    needed = sum(needed_flops(config, counted).values())
    surplus = {
        precision.name: performed_flops(*builds[precision.name], counted, options.batch_size, precision=precision)
        / needed
        for precision in precisions
    }
    batches = len(examples) / options.batch_size
    mean_rows = sum(len(example.input_ids) for example in examples) / batches
    layers = linear_layers(config, mean_rows, options.batch_size)
    attention = needed_flops(config, examples)["attention"] / batches
    parameters = parameter_count(model)
    # The speed of a machine that others share changes within minutes: AdamW alone takes turns with the steps, and the
    # products are measured before and after them. All turns have the same batches, and the first one is not counted:
    # oneDNN generates code for each new number of rows, which most steps of a run have met before.
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    adamw = []
    repetitions = math.ceil(options.repetitions / 2)
    before = measured_products(layers, repetitions, precisions)
    for turn in range(1 + turns):
        for precision in precisions if turn % 2 == 0 else precisions[::-1]:
            timed = timed_steps(*builds[precision.name], examples, options.batch_size, precision=precision)
            steps[precision.name] += timed[warm_up(device) :] if turn > 0 else []
            adamw.append(adamw_seconds(model, optimizer, 2, device))
    after = measured_products(layers, repetitions, precisions)
    bandwidth = bandwidths(options.repetitions, device)
    bandwidth["AdamW"] = ADAMW_BYTES * parameters / statistics.median(adamw)
    del model, optimizer, builds

    figures: dict[str, Any] = {
        "size": options.size,
        "batch_size": options.batch_size,
        "reviews": "random tokens" if options.dataset is None else "rotten_tomatoes",
        "timed_steps": turns * TURN,
        "rows_per_step": mean_rows,
        "needed_flops_per_step": sum(needed_flops(config, examples).values()) / batches,
        "bytes_per_second": bandwidth,
        "precisions": {},
    }
    for precision in precisions:
        taken = steps[precision.name]
        rates = {
            layer.name: {
                of: (before[precision.name, layer.name][of] + after[precision.name, layer.name][of]) / 2
                for of in PASSES
            }
            for layer in layers
        }
        bounds = lower_bounds(layers, rates, attention, ADAMW_BYTES * parameters / max(bandwidth.values()))
        seconds = statistics.median(sum(step.values()) for step in taken)
        figures["precisions"][precision.name] = {
            "step_seconds": seconds,
            "step_seconds_by_part": {part: statistics.median(step[part] for step in taken) for part in PARTS},
            "bound_seconds": sum(bounds.values()),
            "bound_seconds_by_part": bounds,
            "step_to_bound": seconds / sum(bounds.values()),
            "performed_to_needed_flops": surplus[precision.name],
            "products": {layer.name: {"flops": layer.flops, "flops_per_second": rates[layer.name]} for layer in layers},
        }
    return figures, layers


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


def measured_products(
    layers: Sequence[Layer], repetitions: int, precisions: Sequence[Precision]
) -> dict[tuple[str, str], dict[str, float]]:
    """The rates of each layer's products, by the names of precision and layer."""
    return {
        (precision.name, layer.name): product_rates(layer, repetitions, precision)
        for precision in precisions
        for layer in layers
    }


def product_rates(layer: Layer, repetitions: int, precision: Precision) -> dict[str, float]:
    """Operations per second of a layer's three products by the fastest of `ways`, at its shapes and memory layouts.

    As in a step, each product meets another layer's weights, which no cache holds any more.
    """
    rows, shape = max(1, round(layer.rows)), (layer.n_in, layer.n_out)
    in_fp32 = layer.is_head and rows <= FP32_HEAD_ROWS
    best = dict.fromkeys(PASSES, 0.0)
    for dtype, product in ways(precision, in_fp32=in_fp32):
        like: dict[str, Any] = {"device": precision.device, "dtype": dtype}
        copies = min(128, max(2, BEYOND_CACHES // (dtype.itemsize * layer.n_in * layer.n_out)))
        weights, weight_gradients = (
            [
                torch.full(shape[::-1], 0.01, **like).t() if layer.is_head else torch.full(shape, 0.01, **like)
                for _ in range(copies)
            ]
            for _ in range(2)
        )
        inputs, output_gradients = torch.randn(rows, layer.n_in, **like), torch.randn(rows, layer.n_out, **like)
        outputs, input_gradients = torch.empty_like(output_gradients), torch.empty_like(inputs)
        operands = {
            "forward": [(inputs, weight, outputs) for weight in weights],
            "input gradient": [(output_gradients, weight.t(), input_gradients) for weight in weights],
            "weight gradient": [(inputs.t(), output_gradients, gradient) for gradient in weight_gradients],
        }
        flops = 2 * rows * layer.n_in * layer.n_out * copies
        for name, each in operands.items():
            seconds = median_seconds_of(partial(run_products, product, each), repetitions, precision.device)
            best[name] = max(best[name], flops / seconds)
    return best


def run_products(product: Product, operands: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Compute several products."""
    for a, b, out in operands:
        product(a, b, out)


def ways(precision: Precision, *, in_fp32: bool) -> list[tuple[torch.dtype, Product]]:
    """The ways to a matrix product a b that PyTorch has here, each with the dtype of a, b and the result."""
    dtype = torch.float32 if in_fp32 else precision.dtype

    def plain(a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.mm(a, b, out=out)

    def onednn(a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")  # makes its result's array itself

    def rounding(a: Tensor, b: Tensor, out: Tensor) -> None:
        with matmul.rounded_inputs():
            torch.mm(a, b, out=out)

    found: list[tuple[torch.dtype, Product]] = [(dtype, plain)]
    if precision.device.type == "cpu" and dtype == torch.float32 and matmul.onednn_is_faster():
        found.append((torch.float32, onednn))
    if matmul.rounds_inputs(precision.device.type, precision.dtype):
        found.append((torch.float32, rounding))
    return found


def bandwidths(repetitions: int, device: torch.device) -> dict[str, float]:
    """Bytes per second of two ways through large arrays."""
    a, b, c = (torch.full((BANDWIDTH_NUMBERS,), 0.5, device=device) for _ in range(3))
    seconds = {
        "copy": (8, median_seconds_of(lambda: a.copy_(b), repetitions, device)),
        "triad": (12, median_seconds_of(lambda: torch.add(b, c, alpha=0.5, out=a), repetitions, device)),
    }
    return {name: bytes_each * BANDWIDTH_NUMBERS / taken for name, (bytes_each, taken) in seconds.items()}


def adamw_seconds(model: GPT2, optimizer: AdamW, repetitions: int, device: torch.device) -> float:
    """The median seconds of AdamW's kernel alone, on the model's own arrays: 4 are read and 3 of them written.

    As in a step, the norm of the gradients was computed just before. A copy takes longer per byte counted: what it
    overwrites is read into the cache first, and AdamW reads that in any case.
    """
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3, requires_grad=False)
    half_weights, optimizer.half_weights = optimizer.half_weights, None
    seconds = []
    for _ in range(repetitions + 1):
        clip_in_optimizer(optimizer, 1.0)
        start = moment(device)
        optimizer.step()
        seconds.append(seconds_between(start, moment(device)))
    optimizer.half_weights = half_weights
    optimizer.zero_grad()
    return statistics.median(seconds[1:])


def table(figures: dict[str, Any], layers: Sequence[Layer]) -> str:
    """The tables and what they amount to."""
    of_precision = figures["precisions"]
    header = ["part"] + [f"{name}, {what} (ms)" for name in of_precision for what in ("step", "least")]
    rows = [
        [part]
        + [
            f"{1e3 * seconds.get(part, 0.0):.1f}"
            for each in of_precision.values()
            for seconds in (each["step_seconds_by_part"], each["bound_seconds_by_part"])
        ]
        for part in PARTS
    ]
    totals = [(each["step_seconds"], each["bound_seconds"]) for each in of_precision.values()]
    rows.append(["full step"] + [f"{1e3 * seconds:.1f}" for both in totals for seconds in both])
    rows.append(["step / least time"] + [cell for step, bound in totals for cell in (f"{step / bound:.2f} x", "1")])
    if len(totals) == 2:
        rows.append(["fp32 step / bf16 step", "", "", f"{totals[0][0] / totals[1][0]:.2f} x", ""])
    bandwidth = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in figures["bytes_per_second"].items())
    surplus = ", ".join(f"{each['performed_to_needed_flops']:.3f} ({name})" for name, each in of_precision.items())
    text = markdown_table(header, rows) + (
        f"\n\n{figures['size']}, batches of {figures['batch_size']} reviews ({figures['reviews']}), "
        f"{figures['rows_per_step']:.1f} input tokens; medians of {figures['timed_steps']} steps. The loss needs "
        f"{figures['needed_flops_per_step'] / 1e9:.1f} GFLOP a step; the step performs so many times that: {surplus}."
        f"\n\nMemory bandwidth in GB/s: {bandwidth}; the bound of AdamW takes the highest."
    )
    for name, each in of_precision.items():
        products = [
            [
                layer.name,
                f"{layer.rows:.0f} × {layer.n_in} × {layer.n_out}",
                str(layer.count),
                f"{3 * layer.flops / 1e9:.2f}",
                *(f"{each['products'][layer.name]['flops_per_second'][of] / 1e9:.0f}" for of in PASSES),
            ]
            for layer in layers
        ]
        text += f"\n\nMatrix products at the step's shapes, in GFLOP/s ({name}):\n\n"
        text += markdown_table(["layer", "rows × in × out", "per step", "GFLOP", *PASSES], products)
    return text


def draw(figures: dict[str, Any], path: Path) -> None:
    """Step and bound of each precision as bars made of their parts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.6 + len(figures["precisions"])), layout="constrained")
    bars = {
        f"{precision}, {what}": each[f"{key}_seconds_by_part"]
        for precision, each in figures["precisions"].items()
        for what, key in (("least", "bound"), ("step", "step"))
    }
    lefts = [0.0] * len(bars)
    for part in PARTS:
        widths = [1e3 * seconds.get(part, 0.0) for seconds in bars.values()]
        axes.barh(list(bars), widths, left=lefts, label=part)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    factors = ", ".join(f"{each['step_to_bound']:.2f} ({p})" for p, each in figures["precisions"].items())
    axes.set(xlabel="ms per step", title=f"{figures['size']}: step / least time = {factors}")
    axes.legend(ncols=len(PARTS), loc="upper center", bbox_to_anchor=(0.5, -0.28), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
