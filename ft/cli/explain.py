"""Follow one training example through one optimizer step, in the order of the eight steps in `ft/finetune.py`.

All figures come from the functions that training calls, and the step itself from `train`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import fill, shorten

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ft.checkpoint.error_hints import explain_out_of_memory_in_training
from ft.checkpoint.model_description import read_description
from ft.checks import flag
from ft.config import Config
from ft.data.batches import IGNORED, Batch, collate
from ft.data.examples import Example
from ft.data.load import Data, read_data, with_demo_inputs
from ft.device import Precision, choose_precision, use_device
from ft.errors import FtError, UsageError, printable, shown
from ft.model import pretrained
from ft.model.gpt2 import GPT2
from ft.model.pretrained import model_config_of
from ft.setup import build_model
from ft.train.loop import Components, StepRecorder, train
from ft.train.nonfinite import NonFiniteError
from ft.train.optim import build_optimizer
from ft.train.schedule import total_steps, windows
from ft.train.state import State

WIDTH = 100  # columns
SHOWN_TOKENS = 32  # of a longer example the middle is left out
SHOWN_LABELS = 8  # of more labels the most probable and the target are printed

HYPERPARAMETERS = (
    "learning_rate",
    "lr_schedule",
    "warmup_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "epochs",
    "max_length",
    "weight_decay",
    "max_grad_norm",
    "seed",
)


def explain(config: Config, row: int | None) -> None:
    """Print how one row of the training split passes through a training step. Writes nothing but the Hub's cache.

    Args:
        config: the settings of the run that would train on it.
        row: of the training split, from 0; None for the first that is read at the full learning rate.

    Raises:
        UsageError: there is no such row, or no such device.
        FtError: the inputs cannot be read, or the run would end before it reads that row.
    """
    with TemporaryDirectory() as directory, explain_out_of_memory_in_training(config):
        if config.demo:
            config = with_demo_inputs(config, Path(directory))
        _walk(replace(config, save_dataset=None, logging_steps=1), row)


def _walk(config: Config, row: int | None) -> None:
    device = use_device(config.device)
    precision = choose_precision(config.precision, device)
    files = pretrained.model_files(config.model, config.model_revision, with_weights=config.init == "pretrained")
    described = read_description(files)
    tokenizer, model_config = described.tokenizer.tokenizer, model_config_of(described.config, config)
    data = read_data(config, tokenizer)
    examples = data.examples["train"]
    step, window, row = _find_step(examples, config, row)
    model = build_model(config, files, model_config).to(device)

    split, target_ids = data.splits["train"], examples[row].target_ids
    print(f"Row {row:,} of the {len(examples):,} training examples, in one training step.")

    _stage(1, "Data", "ft/data/dataset_files.py dataset_files, ft/data/tables.py read_split")
    _show("text", repr(split.texts[row]))
    if split.completions is None:
        _show("label", f"{split.labels[row]}, with the name {shown(data.label_names[split.labels[row]])}")
    else:
        _show("completion", repr(split.completions[row]))

    _stage(2, "Model", "ft/model/gpt2.py GPT2")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _show("weights", f"{config.model}" + (", randomly initialized" if config.init == "random" else ""))
    _show(
        "size",
        f"{parameters:,} parameters in {model_config.n_layer} blocks and the embeddings; a hidden state has "
        f"{model_config.n_embd} values",
    )

    _stage(3, "Tokenizer", "ft/checkpoint/tokenizer_files.py open_tokenizer")
    ids = tokenizer.encode(split.texts[row], add_special_tokens=False).ids
    _show("tokens", f"{len(ids)}: {_tokens(ids, tokenizer)}")
    _show("ids", " ".join(map(str, ids)))

    _stage(4, "Example", "ft/data/examples.py encode")
    completion = "" if split.completions is None else split.completions[row]
    following = tokenizer.encode(completion, add_special_tokens=False).ids or target_ids
    _show_example(examples[row], [*ids, *following], config, tokenizer)

    _stage(5, "Collate", "ft/data/batches.py collate, ft/model/packing.py Packing")
    rows = next(rows for rows in window if row in rows)
    batch = collate([examples[number] for number in rows])
    _show(
        "order",
        f"torch.randperm with seed {config.seed} (epoch_order); step {step + 1:,} of "
        f"{total_steps(len(examples), config):,} reads this row",
    )
    _show("batch", shorten(f"rows {' '.join(map(str, rows))}", 3 * WIDTH, placeholder=" ..."))
    _show_position(batch, [len(examples[number].input_ids) for number in rows], rows.index(row))

    _stage(6, "Hyperparameters", "ft/config.py Config")
    _show("flags", " ".join(f"{flag(field)} {getattr(config, field)}" for field in HYPERPARAMETERS))

    _stage(7, "Loop", "ft/train/loop.py train, ft/model/gpt2.py GPT2.forward, ft/train/optim.py AdamW")
    _show_step(model, data, config, precision, step=step, window=window, row=row)

    _stage(8, "Training", "ft/finetune.py fine_tune")
    _show(
        "steps",
        f"{total_steps(len(examples), config):,} such steps, each from the weights of the one before; this was one "
        "step from the initial weights, and nothing is saved",
    )


def _show_step(
    model: GPT2,
    data: Data,
    config: Config,
    precision: Precision,
    *,
    step: int,
    window: Sequence[Sequence[int]],
    row: int,
) -> None:
    """Train one step, and show logits, losses and gradient norm before and after it."""
    examples = data.examples["train"]
    target_ids = examples[row].target_ids
    target = target_ids[-1]  # the label, or the end-of-text after a completion
    read = [number for numbers in window for number in numbers]
    first = sum(len(examples[number].target_ids) for number in read[: read.index(row)])
    own = slice(first, first + len(target_ids))  # this example's targets among those of the step
    batches = [collate([examples[number] for number in numbers]) for numbers in window]
    embedding = model.wte.weight[target].detach().clone()
    before = _logits(model, batches, precision)
    figures = _one_step(model, examples, config, step, precision)
    after = _logits(model, batches, precision)
    targets = torch.cat([batch.target_ids for batch in batches])
    _show_logits(before[own], after[own], target_ids, data)
    _show_losses(before[own], after[own], targets[own], "of this example")
    _show_losses(before, after, targets, f"of the {len(read)} examples of the step")
    if any((model.config.embd_pdrop, model.config.attn_pdrop, model.config.resid_pdrop)):
        _show("dropout", f"the loss of the step itself is {figures['loss']:.4f}; those above are without dropout")
    _show_gradient(figures["grad_norm"], config.max_grad_norm)
    _show("rate", f"the learning rate of this step is {figures['learning_rate']:.3g}")
    change = (model.wte.weight[target].detach() - embedding).abs().mean().item()
    _show(
        "update",
        f"AdamW changes each value of the embedding of {_tokens([target], data.tokenizer)} by {change:.2e} on average",
    )


def _find_step(examples: Sequence[Example], config: Config, row: int | None) -> tuple[int, list[Sequence[int]], int]:
    """The first step (from 0) that reads a row, the batches of that step, and the row.

    Raises:
        UsageError: there is no such row.
        FtError: the run ends before it reads the row.
    """
    last_step = total_steps(len(examples), config)
    if row is None:
        step = min(config.warmup_steps, last_step - 1)
        window = next(windows(len(examples), config, step))
        return step, window, window[0][0]
    if row >= len(examples):
        raise UsageError(f"--row is {row}, the training split has the rows 0 to {len(examples) - 1}")
    for step, window in enumerate(windows(len(examples), config, 0)):
        if any(row in rows for rows in window):
            return step, window, row
    raise FtError(f"--row is {row}, which the run's {last_step} steps do not read: use another row, or more --epochs")


def _one_step(
    model: GPT2, examples: Sequence[Example], config: Config, step: int, precision: Precision
) -> dict[str, float]:
    """Train `model` in place for step number `step` (from 0); returns its loss, learning rate and gradient norm.

    Raises:
        FtError: a loss or gradient is NaN or inf.
    """
    torch.manual_seed(config.seed)
    hooks = StepRecorder(stop=True)
    optimizer = build_optimizer(model, config.learning_rate, config.weight_decay)
    try:
        train(
            Components(model, optimizer, precision.grad_scaler(), precision),
            examples,
            collate,
            replace(config, cuda_graphs=False),  # recording a graph does not pay for one step
            State(step=step),
            hooks,
        )
    except NonFiniteError as error:
        raise FtError(f"{error}: the step cannot be shown; a lower --learning-rate or fp32 may help") from error
    return hooks.logged[0]


@torch.inference_mode()
def _logits(model: GPT2, batches: Sequence[Batch], precision: Precision) -> Tensor:
    """The (S, V) logits of the positions with a target, without dropout, on the CPU."""
    model.eval()
    moved = (batch.to(precision.device) for batch in batches)
    with precision.autocast():
        return torch.cat([model(batch.input_ids, batch.packing, batch.selection).float().cpu() for batch in moved])


# --- output -----------------------------------------------------------------------------------------------------------


def _stage(number: int, name: str, where: str) -> None:
    print(f"\n{number}. {name} ({where})")


def _show(name: str, what: str) -> None:
    """Print a text after a name, wrapped at `WIDTH` columns."""
    indent = f"   {name:<11}"
    print(
        fill(printable(what), WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False)
    )


def _tokens(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The tokens between bars, with their leading spaces; unprintable characters are escaped."""
    return "|" + "|".join(repr(tokenizer.decode([token], skip_special_tokens=False))[1:-1] for token in ids) + "|"


def _show_example(example: Example, ids: Sequence[int], config: Config, tokenizer: Tokenizer) -> None:
    """Print the input tokens with their targets, and which of `ids`, text and completion, were truncated."""
    cut_off = ids[: max(0, len(ids) + 1 - config.max_length)]  # 1 is the end-of-text
    _show("truncated", f"the first {len(cut_off)} tokens: {_tokens(cut_off, tokenizer)}" if cut_off else "nothing")
    _show("limit", f"--max-length {config.max_length} tokens, end-of-text and targets included")
    ignored = [IGNORED] * (len(example.input_ids) - len(example.target_ids))
    print("   position      id  token                 target")
    for position, (token, target) in enumerate(zip(example.input_ids, [*ignored, *example.target_ids], strict=True)):
        if len(example.input_ids) > SHOWN_TOKENS and position == SHOWN_TOKENS // 2:
            print("        ...")
        if SHOWN_TOKENS // 2 <= position < len(example.input_ids) - SHOWN_TOKENS // 2:
            continue
        wanted = "ignored" if target == IGNORED else _tokens([target], tokenizer)
        print(f"   {position:8}  {token:6}  {_tokens([token], tokenizer)[:40]:20}  {target:6} {wanted}")


def _show_position(batch: Batch, lengths: Sequence[int], number: int) -> None:
    """Print where example `number` (from 0) of a batch is in the packed rows and in attention's grid."""
    count, longest = batch.packing.shape
    start = sum(lengths[:number])
    own = slice(start, start + lengths[number])
    positions, slots = batch.packing.positions[own].tolist(), batch.packing.slots[own].tolist()
    _show(
        "packed",
        f"{count} examples, concatenated, are {len(batch.input_ids):,} rows; padded to {longest} tokens each, as in "
        f"attention only, they would be {count * longest:,}",
    )
    _show("rows", f"{own.start} to {own.stop - 1} are this example's, number {number + 1} of the batch")
    _show("positions", f"{positions[0]} to {positions[-1]}, from 0 in each example")
    _show("slots", f"{slots[0]} to {slots[-1]} of attention's grid of {count} x {longest}")
    selected = [(n, row) for n, row in enumerate(batch.selection.rows.tolist()) if own.start <= row < own.stop]
    for index, selected_row in selected:
        _show(
            "selected",
            f"row {selected_row} is number {index + 1} of the {len(batch.selection.rows)} whose logits are computed; "
            f"its target is {int(batch.target_ids[index])}",
        )


def _show_logits(before: Tensor, after: Tensor, target_ids: Sequence[int], data: Data) -> None:
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
        print(f"   {_tokens([token], data.tokenizer)[:15]:15}{'   '.join(cells)}{mark}")


def _show_losses(before: Tensor, after: Tensor, targets: Tensor, of_what: str) -> None:
    """Print the mean loss of (S, V) logits against their targets, before and after the step."""
    losses = [F.cross_entropy(logits, targets).item() for logits in (before, after)]
    _show("loss", f"{losses[0]:.4f} before the step, {losses[1]:.4f} after it, {of_what}")


def _show_gradient(norm: float, limit: float) -> None:
    """Print the gradient norm and the effect of clipping."""
    if not math.isfinite(norm):
        _show("gradient", "it overflowed in fp16: this step is skipped, and the loss scale is halved for the next")
    elif norm > limit > 0:
        _show("gradient", f"its norm is {norm:.4f}, above {limit:g}: it is multiplied by {limit / norm:.3f}")
    else:
        _show("gradient", f"its norm is {norm:.4f}: it is not clipped")
