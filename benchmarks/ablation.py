"""Ablation: `ft`'s training step with all optimizations, with each one left out, and with none.

    python -m benchmarks.ablation --dataset DIR --tokenizer DIR [--precision bf16]

The program has no switches for these: the step is implemented here again, with switches. A first pass verifies that
its losses are those of `ft.train.loop.train` for every variant, and measures the peak memory. A second pass times all
variants in rounds of one step each, on the same examples, in another order every round.

What decides is the difference within a round: `step of the variant / step with all optimizations`. A machine that slows
down for a minute slows both. The table has the median of these ratios with its 95 % confidence interval, which assumes
no distribution (https://en.wikipedia.org/wiki/Order_statistic). An optimization pays if the interval, or the peak
memory, is at least 2 % above that of the program; it does not if the interval is below that and the memory too.
"""

import math
import random
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    is_gpu,
    markdown_table,
    peak_memory,
    picture_path,
    precision_of,
    wall_clock,
    write_result,
)
from benchmarks.trainer import Inputs, parser_of_inputs, prepared_inputs
from ft.config import Config
from ft.data.batches import Batch, collate, epoch_order
from ft.data.examples import Example, encode, label_tokens, read_tokenizer
from ft.data.tables import read_split
from ft.device import Precision, disable_malloc_trim
from ft.io.plain_files import read_json
from ft.model import dropout, matmul
from ft.model.gpt2 import GPT2, GPT2Config, TiedEmbedding
from ft.model.packing import Packing
from ft.model.pretrained import load_weights
from ft.train.loop import Components, StepRecorder, train
from ft.train.optim import build_optimizer, clip_in_optimizer
from ft.train.state import State

LOSS_STEPS = 5
WARM_UP = 2  # rounds that are not counted
PAYS = 1.02  # the ratio of time or memory from which on an optimization is worth its code
BATCH_SIZE, MAX_LENGTH, SEED, LEARNING_RATE, MAX_GRAD_NORM = 8, 32, 42, 2e-5, 1.0


@dataclass(frozen=True)
class Variant:
    """A training step; the defaults are the program's.

    Attributes:
        label_is_input: the label is an input too, though its logits are not used.
        padded: every sequence has the length of the batch's longest.
        selected_before: the part from which on only the supervised rows are computed.
        dense_lookup: the gradient of the token embedding's look-up is a second (V, C) tensor.
        adamw: which of PyTorch's three implementations; the program calls the fused kernel itself.
        clips_in_optimizer: AdamW scales the gradients as it reads them; only the fused one can.
        keeps_memory: the process keeps freed memory (malloc_trim is disabled).
        dropout_by_element: PyTorch's own dropout outside attention, which draws a random number for each element.
        attention_by_pytorch: attention with dropout by PyTorch, which draws a random number for each weight.
        mkl_only: no matrix product uses oneDNN.
        every_shape: no spare rows leave few numbers of rows.
        casts_at_use: autocast casts each weight where it is used, in half precision.
    """

    name: str
    label_is_input: bool = False
    padded: bool = False
    selected_before: Literal["last block", "head", "loss"] = "last block"
    dense_lookup: bool = False
    adamw: Literal["fused", "foreach", "for-loop"] = "fused"
    clips_in_optimizer: bool = True
    keeps_memory: bool = True
    dropout_by_element: bool = False
    attention_by_pytorch: bool = False
    mkl_only: bool = False
    every_shape: bool = False
    casts_at_use: bool = False

    def changes_something(self, precision: Precision) -> bool:
        """Whether it differs from the program's step on this device and in this precision."""
        if self in (VARIANTS[0], VARIANTS[-1]):
            return True
        if self.casts_at_use:
            return precision.name != "fp32"
        slow_parts = self.dropout_by_element or self.attention_by_pytorch or self.mkl_only or self.every_shape
        only_on_cpus = not self.keeps_memory or slow_parts
        return not (only_on_cpus and is_gpu(precision.device))


ALL_ON = Variant("all optimizations")
VARIANTS = (
    ALL_ON,
    Variant("label fed as input", label_is_input=True),
    Variant("padded batches", padded=True),
    Variant("last block on all rows", selected_before="head"),
    Variant("last block and head on all rows", selected_before="loss"),
    Variant("dense gradient of the look-up", dense_lookup=True),
    Variant("AdamW foreach, clipping as its own pass", adamw="foreach", clips_in_optimizer=False),
    Variant("AdamW for-loop, clipping as its own pass", adamw="for-loop", clips_in_optimizer=False),
    Variant("clipping as its own pass", clips_in_optimizer=False),
    Variant("freed memory returned to the system", keeps_memory=False),
    Variant("PyTorch's own dropout", dropout_by_element=True),
    Variant("PyTorch's own attention", attention_by_pytorch=True),
    Variant("matrix products by MKL alone", mkl_only=True),
    Variant("every number of rows", every_shape=True),
    Variant("weights cast at each use", casts_at_use=True),
    Variant("no optimization", True, True, "loss", True, "for-loop", False, False, True, True, True, True, True),
)


def build_batch(examples: Sequence[Example], variant: Variant) -> Batch:
    """Collate examples, with the label and with padding if the variant says so."""
    batch = with_label_as_input(examples) if variant.label_is_input else collate(examples)
    return padded(batch) if variant.padded else batch


def with_label_as_input(examples: Sequence[Example]) -> Batch:
    """A batch that has the label as last row of each sequence; selected is still the row before it, end-of-text."""
    batch = collate([Example([*example.input_ids, *example.target_ids], example.target_ids) for example in examples])
    selection = batch.selection
    mask = F.pad(selection.mask[..., 1:], (0, 1))  # one key less than the row of the label may attend to
    return replace(batch, selection=replace(selection, rows=selection.rows - 1, mask=mask))


def padded(batch: Batch) -> Batch:
    """The same batch with all sequences as long as the longest, by end-of-text put behind."""
    batch_size, max_length = batch.packing.shape
    end_of_text = batch.input_ids[batch.selection.rows[0]]  # the token after which the label is predicted
    return replace(
        batch,
        input_ids=end_of_text.repeat(batch_size * max_length).index_copy(0, batch.packing.slots, batch.input_ids),
        packing=Packing.of([max_length] * batch_size),
        selection=replace(batch.selection, rows=batch.packing.slots[batch.selection.rows]),
    )


def logits_of(model: GPT2, batch: Batch, variant: Variant) -> Tensor:
    """`GPT2.forward` with switches: the (S, V) logits of the selected rows."""
    rows, packing = batch.selection.rows, batch.packing
    if matmul.compiles_shapes(batch.input_ids) and not variant.every_shape:
        packing = packing.with_spare_rows()
    input_ids = F.pad(batch.input_ids, (0, packing.spare))
    if variant.dense_lookup:
        tokens, table = F.embedding(input_ids, model.wte.weight), model.wte.weight
    else:
        tokens, table = TiedEmbedding.apply(model.wte.weight, input_ids)
    hidden_states = model.drop(tokens + model.wpe(packing.positions))
    call = model._block_runner()
    for block in model.h[:-1]:
        hidden_states = call(block, hidden_states, packing)
    if variant.selected_before == "last block":
        hidden_states = call(model.h[-1], hidden_states, packing, batch.selection)
    else:
        hidden_states = call(model.h[-1], hidden_states, packing)
    if variant.selected_before == "head":
        hidden_states = hidden_states.index_select(0, rows)
    logits = model.logits(hidden_states, table)
    return logits.index_select(0, rows) if variant.selected_before == "loss" else logits


def update(model: GPT2, optimizer: torch.optim.AdamW, variant: Variant) -> None:
    """Clip the gradients and update the weights."""
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = variant.adamw == "fused", variant.adamw == "foreach"
    if variant.clips_in_optimizer:
        clip_in_optimizer(optimizer, MAX_GRAD_NORM)
    else:
        optimizer.grad_scale = None  # set by another variant
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def step(
    model: GPT2, optimizer: torch.optim.AdamW, examples: Sequence[Example], variant: Variant, precision: Precision
) -> float:
    """One optimizer step, `train_step` in `ft/train/loop.py` for one batch; returns the loss."""
    batch = build_batch(examples, variant).to(precision.device)
    half_weights, model.half_weights = model.half_weights, None if variant.casts_at_use else model.half_weights
    with ExitStack() as patches:
        if variant.dropout_by_element:
            patches.enter_context(patch.object(dropout, "dropout_by_16_bits", F.dropout))
        if variant.attention_by_pytorch:
            patches.enter_context(patch.object(matmul, "attention_with_dropout", F.scaled_dot_product_attention))
        if variant.mkl_only:
            patches.enter_context(patch.object(matmul, "onednn_is_faster", lambda: False))
        if variant.casts_at_use:
            patches.enter_context(patch.object(matmul, "rounds_inputs", lambda *_: False))
        with precision.autocast():
            logits = logits_of(model, batch, variant)
        loss = F.cross_entropy(logits.float(), batch.target_ids)
        loss.backward()
    update(model, optimizer, variant)
    if model.half_weights is not None:
        model.half_weights.refresh()
    model.half_weights = half_weights
    return loss.item()


@cache
def read_examples(inputs: Inputs) -> list[Example]:
    """The training examples."""
    split = read_split("train", [inputs.dataset / "train.parquet"])
    tokenizer = read_tokenizer(inputs.model / "tokenizer.json")
    return encode(split, tokenizer, label_tokens(split.label_names or ("neg", "pos"), tokenizer), MAX_LENGTH)


@cache
def build(inputs: Inputs, precision: Precision, keeps_memory: bool, dropout: float) -> tuple[GPT2, torch.optim.AdamW]:
    """Model and optimizer of this process, which all variants in it share: their speed does not depend on values."""
    if keeps_memory:
        disable_malloc_trim()
    config = GPT2Config.from_dict(read_json(inputs.model / "config.json"))
    model = GPT2(replace(config, embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)).train()
    load_weights(model, [inputs.model / "model.safetensors"])
    model.to(precision.device)
    if precision.name != "fp32":
        model.keep_half_weights(precision.dtype)
    return model, torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True)


def batches(inputs: Inputs, first_step: int, steps: int) -> list[list[Example]]:
    """The examples of some steps, in the order of the program."""
    examples = read_examples(inputs)
    order = epoch_order(len(examples), SEED, epoch=0)
    # After an epoch the order starts again.
    starts = [step * BATCH_SIZE % (len(order) - BATCH_SIZE) for step in range(first_step, first_step + steps)]
    return [[examples[row] for row in order[start : start + BATCH_SIZE]] for start in starts]


def time_step(inputs: Inputs, precision: Precision, variant: Variant, number: int) -> float:
    """The seconds of a step on the examples of step `number`, at dropout 0.1."""
    model, optimizer = build(inputs, precision, variant.keeps_memory, 0.1)
    (examples,) = batches(inputs, number, 1)
    started = wall_clock(precision.device)
    step(model, optimizer, examples, variant, precision)
    return wall_clock(precision.device) - started


def first_losses(inputs: Inputs, precision: Precision, variant: Variant) -> tuple[list[float], int]:
    """The losses of the first steps at dropout 0, and the peak memory in bytes; for a process of its own."""
    model, optimizer = build(inputs, precision, variant.keeps_memory, 0.0)
    losses = [step(model, optimizer, examples, variant, precision) for examples in batches(inputs, 0, LOSS_STEPS)]
    return losses, peak_memory(precision.device)


def first_losses_of_the_program(inputs: Inputs, precision: Precision) -> list[float]:
    """The same losses from `ft.train.train`, the reference for those of the variants."""
    model, _ = build(inputs, precision, keeps_memory=True, dropout=0.0)
    config = Config(
        batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH,
        seed=SEED,
        learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_GRAD_NORM,
        lr_schedule="constant",
        max_steps=LOSS_STEPS,
        logging_steps=1,
    )
    hooks = StepRecorder()
    optimizer = build_optimizer(model, LEARNING_RATE, weight_decay=0.0)
    components = Components(model, optimizer, precision.grad_scaler(), precision)
    train(components, read_examples(inputs), collate, config, State(), hooks)
    return [figures["loss"] for figures in hooks.logged]


def variants_of(precision: Precision, wanted: Sequence[str] = ()) -> list[Variant]:
    """The program, and the variants that change something on this device and in this precision.

    Args:
        precision: of the matrix products.
        wanted: only variants whose name contains one of these; empty for all.
    """
    named = [variant for variant in VARIANTS[1:] if not wanted or any(part in variant.name for part in wanted)]
    return [ALL_ON, *(variant for variant in named if variant.changes_something(precision))]


def process() -> ProcessPoolExecutor:
    """A pool of one new process, which is idle between submissions."""
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))


def compare_losses(inputs: Inputs, precision: Precision, variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    """Each variant's losses, their largest relative difference from the program's, and its peak memory."""
    with process() as worker:
        expected = worker.submit(first_losses_of_the_program, inputs, precision).result()
    figures = {}
    for variant in variants:
        with process() as worker:
            losses, peak = worker.submit(first_losses, inputs, precision, variant).result()
        difference = max(abs(loss - right) / abs(right) for loss, right in zip(losses, expected, strict=True))
        figures[variant.name] = {"losses": losses, "loss_difference": difference, "peak_bytes": peak}
    return figures


def time_in_rounds(
    inputs: Inputs, precision: Precision, variants: Sequence[Variant], rounds: int
) -> dict[str, list[float]]:
    """The seconds of one step of each variant in each round; a round has the same examples for all.

    The allocator is set per process, so there are two processes, of which one works at a time. A step also pays for
    what the step before it left in the caches, and therefore the order is drawn anew in every round.
    """
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    order, shuffled = random.Random(SEED), list(variants)
    with process() as keeping, process() as returning:
        for number in range(WARM_UP + rounds):
            order.shuffle(shuffled)
            for variant in shuffled:
                worker = keeping if variant.keeps_memory else returning
                timed = worker.submit(time_step, inputs, precision, variant, number).result()
                if number >= WARM_UP:
                    seconds[variant.name].append(timed)
            if number % 10 == 0:
                print(f"round {number} of {WARM_UP + rounds}", flush=True)
    return seconds


def paired_ratio(seconds: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """The median of the ratios within each round, and its 95 % confidence interval.

    The number of ratios below the true median is binomial with probability 1/2, whatever their distribution: the
    interval is between two of the sorted ratios, 0.98 sqrt(n) places from the middle.
    """
    ratios = sorted(own / other for own, other in zip(seconds, reference, strict=True))
    count = len(ratios)
    distance = 1.96 * count**0.5 / 2
    low, high = max(0, int(count / 2 - distance) - 1), min(count - 1, math.ceil(count / 2 + distance))
    return statistics.median(ratios), ratios[low], ratios[high]


def verdict(low: float, high: float, memory: float) -> str:
    """Whether an optimization pays, from the interval of the ratio of times and from that of the peak memory."""
    reasons = [name for name, is_above in (("time", low >= PAYS), ("memory", memory >= PAYS)) if is_above]
    if reasons:
        return f"pays: {' and '.join(reasons)}"
    return "does not pay" if high < PAYS else "not decided"


def draw(figures: dict[str, dict[str, Any]], path: Path) -> None:
    """The ratio of each variant with its interval, as horizontal bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    others = {name: each["ratio"] for name, each in figures.items() if name != ALL_ON.name}
    medians = [median for median, _, _ in others.values()]
    spread = [
        [median - low for median, low, _ in others.values()],
        [high - median for median, _, high in others.values()],
    ]
    excess = [median - 1 for median in medians]  # a bar begins at the program's time
    bars = axes.barh(list(others), excess, left=1, xerr=spread, color="C0", ecolor="black", capsize=3)
    axes.bar_label(bars, [f"{median:.2f}" for median in medians], padding=8)
    axes.axvline(1, color="grey", linestyle=":")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="step time, relative to the program's (95 % interval)")
    axes.set_title("One optimizer step without one of the optimizations, and without any")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Compare the losses, time the variants, then write the table and the picture."""
    parser = parser_of_inputs(__doc__)
    parser.set_defaults(steps=200)
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of matrix products (default: fp32)")
    parser.add_argument("--variants", nargs="+", default=[], metavar="TEXT", help="only those with TEXT in their name")
    options = parser.parse_args()
    precision = precision_of(options)
    name = "ablation-bf16" if precision.name == "bf16" and not is_gpu(precision.device) else "ablation"
    variants = variants_of(precision, options.variants)
    with prepared_inputs(options) as inputs:
        figures = compare_losses(inputs, precision, variants)
        seconds = time_in_rounds(inputs, precision, variants, options.steps)
    reference = figures[ALL_ON.name]
    for variant, figure in figures.items():
        median, low, high = paired_ratio(seconds[variant], seconds[ALL_ON.name])
        memory = figure["peak_bytes"] / reference["peak_bytes"]
        figure |= {"ratio": (median, low, high), "memory_ratio": memory, "step_seconds": seconds[variant]}
        figure["verdict"] = "the program" if variant == ALL_ON.name else verdict(low, high, memory)
    write_result(
        options.output,
        name,
        {"size": options.size, "variants": figures},
        table(figures, precision),
        precision=precision,
    )
    draw(figures, picture_path(options.output, name, precision.device))


def table(figures: dict[str, dict[str, Any]], precision: Precision) -> str:
    """A row for each variant, and how it was measured."""
    rows = [
        [
            name,
            f"{statistics.median(figure['step_seconds']):.3f}",
            "{:.3f} ({:.3f} to {:.3f})".format(*figure["ratio"]),
            f"{figure['peak_bytes'] / 2**30:.2f}",
            f"{figure['memory_ratio']:.2f}",
            f"{figure['loss_difference']:.1e}",
            figure["verdict"],
        ]
        for name, figure in figures.items()
    ]
    header = ["instead of the optimization", "step (s)", "ratio of steps (95 %)"]
    header += ["peak memory (GiB)", "ratio of memory", "loss difference", "the optimization"]
    largest = max(figure["loss_difference"] for figure in figures.values())
    count = len(figures[ALL_ON.name]["step_seconds"])
    return markdown_table(header, rows) + (
        f"\n\nBatch {BATCH_SIZE} of at most {MAX_LENGTH} tokens, {precision.name}. {count} rounds at dropout 0.1 of "
        "one step of each variant, on the same reviews and in random order. The ratio is the median over rounds of "
        "variant / program, with its 95 % confidence interval. Memory and losses: "
        f"{LOSS_STEPS} steps at dropout 0 from the same weights, each variant in a process of its own. The loss "
        "difference is the largest from the losses of `ft.train.train`, relative: none is above "
        f"{largest:.1e}. AdamW can take over the clipping only when it is fused, so that the other two lack both."
    )


if __name__ == "__main__":
    main()
