"""What `explain` prints of tokens, batches, logits and losses."""

import math
from collections.abc import Sequence
from textwrap import fill

import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ft.config import Config
from ft.data.batches import IGNORED, Batch
from ft.data.examples import Example
from ft.data.load import Data
from ft.errors import printable

WIDTH = 100  # columns
SHOWN_TOKENS = 32  # of a longer example the middle is left out
SHOWN_LABELS = 8  # of more labels the most probable and the target are printed


def print_stage(number: int, name: str, where: str) -> None:
    """Print the heading of one of the eight steps, with the files and functions that do it."""
    print(f"\n{number}. {name} ({where})")


def show(name: str, what: str) -> None:
    """Print a text after a name, wrapped at `WIDTH` columns."""
    indent = f"   {name:<11}"
    print(
        fill(printable(what), WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False)
    )


def format_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The tokens between bars, with their leading spaces; unprintable characters are escaped."""
    return "|" + "|".join(repr(tokenizer.decode([token], skip_special_tokens=False))[1:-1] for token in ids) + "|"


def show_example(example: Example, ids: Sequence[int], config: Config, tokenizer: Tokenizer) -> None:
    """Print the input tokens with their targets, and which of `ids`, text and completion, were truncated."""
    cut_off = ids[: max(0, len(ids) + 1 - config.max_length)]  # 1 is the end-of-text
    show("truncated", f"the first {len(cut_off)} tokens: {format_tokens(cut_off, tokenizer)}" if cut_off else "nothing")
    show("limit", f"--max-length {config.max_length} tokens, end-of-text and targets included")
    ignored = [IGNORED] * (len(example.input_ids) - len(example.target_ids))
    print("   position      id  token                 target")
    for position, (token, target) in enumerate(zip(example.input_ids, [*ignored, *example.target_ids], strict=True)):
        if len(example.input_ids) > SHOWN_TOKENS and position == SHOWN_TOKENS // 2:
            print("        ...")
        if SHOWN_TOKENS // 2 <= position < len(example.input_ids) - SHOWN_TOKENS // 2:
            continue
        wanted = "ignored" if target == IGNORED else format_tokens([target], tokenizer)
        print(f"   {position:8}  {token:6}  {format_tokens([token], tokenizer)[:40]:20}  {target:6} {wanted}")


def show_position(batch: Batch, lengths: Sequence[int], number: int) -> None:
    """Print where example `number` (from 0) of a batch is in the packed rows and in attention's grid."""
    count, longest = batch.packing.shape
    start = sum(lengths[:number])
    own = slice(start, start + lengths[number])
    positions, slots = batch.packing.positions[own].tolist(), batch.packing.slots[own].tolist()
    show(
        "packed",
        f"{count} examples, concatenated, are {len(batch.input_ids):,} rows; padded to {longest} tokens each, as in "
        f"attention only, they would be {count * longest:,}",
    )
    show("rows", f"{own.start} to {own.stop - 1} are this example's, number {number + 1} of the batch")
    show("positions", f"{positions[0]} to {positions[-1]}, from 0 in each example")
    show("slots", f"{slots[0]} to {slots[-1]} of attention's grid of {count} x {longest}")
    selected = [(n, row) for n, row in enumerate(batch.selection.rows.tolist()) if own.start <= row < own.stop]
    for index, selected_row in selected:
        show(
            "selected",
            f"row {selected_row} is number {index + 1} of the {len(batch.selection.rows)} whose logits are computed; "
            f"its target is {int(batch.target_ids[index])}",
        )


def show_logits(before: Tensor, after: Tensor, target_ids: Sequence[int], data: Data) -> None:
    """Print logits and probabilities before and after the step, of the label tokens or of a completion's tokens.

    Args:
        before: (targets, V).
        after: (targets, V).
        target_ids: the example's targets.
        data: with the label tokens.
    """
    has_labels = bool(data.label_ids)
    columns = f"{'logit':>10}{'of all':>11}" + (f"{'of labels':>11}" if has_labels else "")
    print(f"{'before the step':>{18 + len(columns)}}{'after it':>{3 + len(columns)}}")
    print(f"   {'token':15}{columns}   {columns}")
    if has_labels:
        probable = before[0, data.label_ids].argsort(descending=True)[:SHOWN_LABELS].tolist()
        pairs = [(0, token) for label, token in enumerate(data.label_ids) if label in probable or token in target_ids]
    else:
        pairs = list(enumerate(target_ids))[:SHOWN_TOKENS]
    for number, token in pairs:
        cells = []
        for logits in (before[number], after[number]):
            cells.append(f"{logits[token]:10.4f}{logits.softmax(-1)[token]:11.3%}")
            if has_labels:
                cells[-1] += f"{(logits[token] - logits[data.label_ids].logsumexp(-1)).exp():11.3%}"
        mark = "  <- target" if has_labels and token in target_ids else ""
        print(f"   {format_tokens([token], data.tokenizer)[:15]:15}{'   '.join(cells)}{mark}")


def show_losses(before: Tensor, after: Tensor, targets: Tensor, of_what: str) -> None:
    """Print the mean loss of (S, V) logits against their targets, before and after the step."""
    losses = [F.cross_entropy(logits, targets).item() for logits in (before, after)]
    show("loss", f"{losses[0]:.4f} before the step, {losses[1]:.4f} after it, {of_what}")


def explain_lower_probability(
    before: Tensor, after: Tensor, targets: Tensor, own: slice, label_ids: Sequence[int]
) -> str:
    """Why the step has made the target of an example less likely, of all tokens or of the labels; empty if it has not.

    Args:
        before: (S, V) logits of all targets of the step.
        after: (S, V).
        targets: (S,) token ids.
        own: the targets of the example among them.
        label_ids: the tokens of the labels; empty for completions.
    """
    rise = F.cross_entropy(after, targets, reduction="none") - F.cross_entropy(
        before, targets, reduction="none"
    )  # (S,)
    if rise[own].mean() > 0:
        if rise.mean() > 0:
            return (
                "the step is too large for its examples: their loss rises. A lower --learning-rate makes smaller steps"
            )
        same = f", {int((targets == targets[own][0]).sum())} of them with this label" if label_ids else ""
        return (
            f"the loss of this example rises: the step follows the mean gradient of {len(targets)} targets{same}, not "
            "that of this example alone"
        )
    if not label_ids:
        return ""
    first, labels = own.start, list(label_ids)
    shares = [logits[first].softmax(-1)[[*labels, int(targets[first])]] for logits in (before, after)]
    together = [float(share[:-1].sum()) for share in shares]
    if shares[1][-1] / together[1] >= shares[0][-1] / together[0]:
        return ""
    return (
        f"the target has become more likely of all tokens, and less likely of the labels, which rise together from "
        f"{together[0]:.2%} to {together[1]:.2%}: the first steps learn that a label comes next, later ones which"
    )


def show_gradient(norm: float, limit: float) -> None:
    """Print the gradient norm and the effect of clipping."""
    if not math.isfinite(norm):
        show("gradient", "it overflowed in fp16: this step is skipped, and the loss scale is halved for the next")
    elif norm > limit > 0:
        show("gradient", f"its norm is {norm:.4f}, above {limit:g}: it is multiplied by {limit / norm:.3f}")
    else:
        show("gradient", f"its norm is {norm:.4f}: it is not clipped")
