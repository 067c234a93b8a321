"""Follow one training example through one optimizer step, in the order of the eight steps in `ft/README.md`.

All figures come from the functions that training calls, and the step itself from `train`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten

import torch
from torch import Tensor

from ft.checkpoint.error_hints import explain_out_of_memory_in_training
from ft.checkpoint.model_builder import build_model
from ft.checkpoint.model_description import find_model, read_description
from ft.checks import flag
from ft.config import Config
from ft.data.batches import Batch, collate
from ft.data.examples import Example
from ft.data.load import Data, read_data, with_demo_inputs
from ft.device import Precision, choose_precision, precision_for_size, use_device
from ft.errors import FtError, UsageError, counted, shown
from ft.explain.text import (
    WIDTH,
    explain_lower_probability,
    format_tokens,
    print_stage,
    show,
    show_example,
    show_gradient,
    show_logits,
    show_losses,
    show_position,
)
from ft.model.gpt2 import GPT2
from ft.model.pretrained import model_config_of
from ft.train.class_weights import TargetWeights, class_weights, describe_weights
from ft.train.loop import Components, StepRecorder, train
from ft.train.nonfinite import NonFiniteError
from ft.train.optim import build_optimizer
from ft.train.schedule import total_steps, windows
from ft.train.state import State

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
    files = find_model(config.model, config.model_revision, with_weights=config.init == "pretrained")
    described = read_description(files)
    tokenizer, model_config = described.tokenizer.tokenizer, model_config_of(described.config, config)
    data = read_data(config, tokenizer)
    examples = data.examples["train"]
    step, window, row = _find_step(examples, config, row)
    model = build_model(config, files, model_config).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    precision = precision_for_size(precision, config.precision, parameters)

    split, target_ids = data.splits["train"], examples[row].target_ids
    print(f"Row {row:,} of the {len(examples):,} training examples, in one training step.")

    print_stage(1, "Data", "ft/data/dataset_files.py dataset_files, ft/data/tables.py read_split")
    show("text", repr(split.texts[row]))
    if split.completions is None:
        show("label", f"{split.labels[row]}, with the name {shown(data.label_names[split.labels[row]])}")
    else:
        show("completion", repr(split.completions[row]))

    print_stage(2, "Model", "ft/model/gpt2.py GPT2")
    show("weights", f"{config.model}" + (", randomly initialized" if config.init == "random" else ""))
    show(
        "size",
        f"{parameters:,} parameters in {model_config.n_layer} blocks and the embeddings; a hidden state has "
        f"{model_config.n_embd} values",
    )

    print_stage(3, "Tokenizer", "ft/checkpoint/tokenizer_files.py open_tokenizer")
    ids = tokenizer.encode(split.texts[row], add_special_tokens=False).ids
    show("tokens", f"{len(ids)}: {format_tokens(ids, tokenizer)}")
    show("ids", " ".join(map(str, ids)))

    print_stage(4, "Examples", "ft/data/examples.py encode")
    completion = "" if split.completions is None else split.completions[row]
    following = tokenizer.encode(completion, add_special_tokens=False).ids or target_ids
    show_example(examples[row], [*ids, *following], config, tokenizer)

    print_stage(5, "Collate function", "ft/data/batches.py collate, ft/model/packing.py Packing")
    rows = next(rows for rows in window if row in rows)
    batch = collate([examples[number] for number in rows])
    show(
        "order",
        f"torch.randperm with seed {config.seed} (epoch_order); step {step + 1:,} of "
        f"{total_steps(len(examples), config):,} reads this row",
    )
    show("batch", shorten(f"rows {' '.join(map(str, rows))}", 3 * WIDTH, placeholder=" ..."))
    show_position(batch, [len(examples[number].input_ids) for number in rows], rows.index(row))

    print_stage(6, "Hyperparameters", "ft/config.py Config")
    show("flags", " ".join(f"{flag(field)} {getattr(config, field)}" for field in HYPERPARAMETERS))

    print_stage(7, "Training step", "ft/train/loop.py train, ft/model/gpt2.py GPT2.forward, ft/train/optim.py AdamW")
    _show_step(model, data, config, precision, step=step, window=window, row=row)

    print_stage(8, "Training", "ft/finetune.py fine_tune")
    show(
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
    before, values = _logits(model, batches, precision), _watched_values(model, target)
    weights = class_weights(config, data)
    figures = _one_step(model, data, config, step, precision, weights)
    after = _logits(model, batches, precision)
    targets = torch.cat([batch.target_ids for batch in batches])
    show_logits(before[own], after[own], target_ids, data)
    show_losses(before[own], after[own], targets[own], "of this example")
    show_losses(before, after, targets, f"of the {counted(len(read), 'example')} of the step")
    if weights is not None:
        show("weights", f"{describe_weights(weights, data.label_names)} Nor are those above.")
    if note := explain_lower_probability(before, after, targets, own, data.label_ids):
        show("note", note)
    if any((model.config.embd_pdrop, model.config.attn_pdrop, model.config.resid_pdrop)):
        show("dropout", f"the loss of the step itself is {figures['loss']:.4f}; those above are without dropout")
    show_gradient(figures["grad_norm"], config.max_grad_norm)
    show("rate", f"the learning rate of this step is {figures['learning_rate']:.3g}")
    change = (_watched_values(model, target) - values).abs().mean().item()
    what = f"AdamW changes each value of the embedding of {format_tokens([target], data.tokenizer)}"
    if not model.wte.weight.requires_grad:
        what = f"the embedding is frozen; AdamW changes each of the {counted(len(values), 'trained parameter')}"
    show("update", f"{what} by {change:.2e} on average")


def _watched_values(model: GPT2, token: int) -> Tensor:
    """A copy of the (C,) embedding of a token; if the embedding is frozen, of all trained parameters."""
    if model.wte.weight.requires_grad:
        return model.wte.weight[token].detach().clone()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


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
    model: GPT2, data: Data, config: Config, step: int, precision: Precision, by_label: Sequence[float] | None
) -> dict[str, float]:
    """Train `model` in place for step number `step` (from 0); returns its loss, learning rate and gradient norm.

    Raises:
        FtError: a loss or gradient is NaN or inf.
    """
    torch.manual_seed(config.seed)
    hooks = StepRecorder(stop=True)
    weights = None
    if by_label is not None:
        weights = TargetWeights.of(by_label, data.label_ids, model.config.vocab_size, precision.device)
    optimizer = build_optimizer(model, config.learning_rate, config.weight_decay)
    try:
        train(
            Components(model, optimizer, precision.grad_scaler(), precision, target_weights=weights),
            data.examples["train"],
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
