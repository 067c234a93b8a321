"""Every setting of a run, its default and its explanation, once.

The command line is generated from this class: `batch_size` is the flag `--batch-size`, and the string under a field is
its help. Of a string of several lines the first is the help, and the rest tells what the setting does, its formula, and
what is seen when it is too large or too small; the README has pictures of that. The defaults are the recipe of the
tutorial that this program rebuilds.
"""

import functools
import json
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ft.errors import UsageError
from ft.io.atomic import atomic_write_text


@dataclass(frozen=True)
class Config:
    """What one run does. Frozen: nothing that runs changes its own settings."""

    # Where things come from and go to

    model: str = "openai-community/gpt2"
    """Hub id or local folder of the GPT-2 to fine-tune: config.json, tokenizer.json, model.safetensors"""
    model_revision: str | None = None
    """branch, tag or commit of the model on the Hub"""
    init: Literal["pretrained", "random"] = "pretrained"
    """start from the published weights, or train from scratch with GPT-2's initialisation"""
    dataset: str = "cornell-movie-review-data/rotten_tomatoes"
    """Hub id, folder with train, validation and test as .parquet, .csv, .tsv or .jsonl (also .gz), or one such file"""
    dataset_config: str | None = None
    """the folder of one of several data sets that lie side by side in --dataset"""
    dataset_revision: str | None = None
    """branch, tag or commit of the data set on the Hub"""
    save_dataset: str | None = None
    """also keep a copy of the data in this folder, which --dataset reads back"""
    text_column: str = "text"
    """column of what the model reads"""
    label_column: str = "label"
    """column of the label: numbers from 0, or words"""
    label_names: str | None = None
    """words for the labels 0, 1, ..., separated by commas; left out: those that the data set tells"""
    prompt_column: str = "prompt"
    """with --completion-column: column of what the model reads"""
    completion_column: str | None = None
    """train on completions instead of labels: column of what the model should say; the loss is on its tokens alone"""
    train_fraction: float = 1.0
    """share of the training rows to take, for a quick try; drawn by --seed, each label in proportion"""
    max_train_samples: int | None = None
    """take at most this many training rows, drawn likewise"""
    output_dir: str = "runs/rotten_tomatoes"
    """folder for metrics.jsonl, the checkpoints and final/"""
    overwrite: bool = False
    """delete what an earlier run left in --output-dir"""
    resume: str | None = None
    """continue an interrupted run: from the newest checkpoint in --output-dir, or from the run or checkpoint PATH"""
    demo: bool = False
    """run on reviews composed on the spot and a small GPT-2: no network needed, about half a minute"""

    # How long, and in what portions

    epochs: float = 1.0
    """passes over the training reviews

    Steps of a run: epochs x reviews / (batch_size x gradient_accumulation_steps), rounded up. The learning rate falls
    over all of them, so that one epoch is not the first third of three. Too few: the loss still falls at the end. Too
    many: the training loss falls on while that of validation rises, as reviews are learnt by heart.
    """
    max_steps: int | None = None
    """stop after this many optimiser steps, whatever --epochs says"""
    early_stopping_patience: int | None = None
    """end after this many evaluations in a row without a better one, by accuracy, then loss; left out: never"""
    batch_size: int = 8
    """reviews per forward and backward pass; with several processes, in each of them

    A step's gradient is the mean over these reviews. Small: many steps an epoch, each in a noisy direction. Large: few,
    in a good direction, each review computed faster until the device is full, and more memory. Too large at the same
    learning rate: too few steps are left to get anywhere; too small: the noise is as large as what is to be learnt.
    """
    gradient_accumulation_steps: int = 1
    """batches whose gradients are added up for one optimiser step

    The same gradient as a batch_size so many times larger has, in the memory of one batch: losses are divided by the
    targets of all of them. Too large is what too large a batch is; it saves no time.
    """
    processes: int = 1
    """how many processes there are, each with batch_size reviews; noted by the run, as torchrun tells it"""
    eval_batch_size: int = 64
    """reviews per batch in evaluation; changes speed and memory, not the result"""
    max_length: int = 32
    """tokens per review, end-of-text and label included; of a longer review the end is kept

    Time grows with the tokens, in attention with their square. Too small: what decides a review is cut off; `python
    run.py data` counts the reviews that are cut. Too large costs what the long reviews take and no more, as nothing is
    padded to it; the model's n_positions is the limit.
    """
    seed: int = 42
    """decides the order of the reviews, dropout and --init random

    Epoch e reads in the order of torch.randperm seeded with seed + e. No value is better than another: runs that differ
    in nothing else show how much of a difference between two settings is chance.
    """

    # The optimiser

    learning_rate: float = 2e-5
    """AdamW's step size at its highest

    A step moves each weight by about this much or less, whatever the size of its gradient:
    w <- w - lr m' / (sqrt(v') + eps) (`AdamW`, ft/train/optim.py). Too large: the loss jumps, stays at guessing or is
    no number any more, and what the model had learnt before is lost. Too small: the loss falls evenly, and the run ends
    long before it is low.
    """
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """how the learning rate falls: to 0 on a line, to 0 on half a cosine, not at all

    With p from 0 to 1 after the warm-up: lr (1 - p), lr (1 + cos(pi p)) / 2, or lr (ft/train/schedule.py).
    A rate that stays high ends with weights that the last few batches have pushed about; one that falls lets the steps
    average out. The cosine stays high for longer and falls faster in the middle.
    """
    warmup_steps: int = 0
    """optimiser steps over which the learning rate first rises from 0

    Step s of the warm-up (from 0) has lr s / warmup_steps. AdamW's first steps are full ones in whatever direction the
    first batches point. Too few, with a high rate or random weights: the loss jumps at the start. Too many: a part of
    the run is spent on steps that are too small.
    """
    weight_decay: float = 0.0
    """share of each weight taken off per step, times the learning rate (not off biases, norms and embeddings)

    w <- w - lr weight_decay w in each step, apart from the gradient. Too large: weights shrink faster than they learn,
    and what the pretrained ones knew fades. 0, as here, trusts a short run to stay close to where it began.
    """
    max_grad_norm: float = 1.0
    """gradients are scaled down to this global norm if theirs is larger; 0 turns that off

    g <- g min(1, max_grad_norm / |g|), with |g| over all parameters together (ft/train/optim.py): a
    single odd batch cannot fill AdamW's moments. Too small: every step is clipped, and AdamW, which divides by the size
    of past gradients, hardly notices. Too large, or 0: nothing is clipped. The log shows the norm before clipping.
    """
    dropout: float | None = None
    """probability of each of GPT-2's three dropouts; left out: the model's own (0.1 as published)

    In training a number x becomes 0 with probability p, else x / (1 - p): after the embeddings, in attention's
    probabilities, and in what attention and MLP add to the residual stream. Too small: long runs learn their reviews by
    heart. Too large: so much is missing that little is learnt. Evaluation drops nothing.
    """

    # Which parameters are trained

    train_only: tuple[str, ...] = ()
    """only those whose names match: wte.weight, h.11.*, *.bias, or last:N, the last N blocks and the final norm

    The others stay as they are, without gradient or moments (ft/model/freeze.py). Too few: the model cannot
    become what the labels ask for. All, as here: the most time and memory, and the most that a long run can overwrite.
    """
    freeze: tuple[str, ...] = ()
    """not those whose names match; taken away from what --train-only names"""

    # The machine

    device: str | None = None
    """cpu, cuda, cuda:1, mps; left out: the best present"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """number format of matrix products; auto: bf16 or fp16 where the device computes it faster, else fp32"""
    tf32: bool = False
    """let NVIDIA GPUs round the inputs of fp32 matrix products to 10 bits of mantissa: faster, slightly other losses"""
    compile: Literal["none", "default", "reduce-overhead"] = "none"
    """compile the blocks with torch.compile, which takes minutes at the start; reduce-overhead: as CUDA graphs"""
    static_shapes: bool = False
    """pad every training batch to the same shape, --batch-size reviews of --max-length tokens; --compile implies it"""
    release_memory: bool = False
    """hand freed memory back to the system in every step: a smaller process on Linux CPUs, and a slower one"""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """recompute activations in the backward pass: less memory, more time, the same gradients"""

    # Several processes, as torchrun starts them: torchrun --nproc-per-node 2 run.py ...

    shard: bool = False
    """keep a part of weights, gradients and moments in each process, for models that do not fit one device"""
    bf16_gradients: bool = False
    """send gradients between processes as bf16: half the bytes, and slightly other losses"""
    process_timeout: float = 600.0
    """seconds after which a process that does not answer is given up, and the run ends"""

    # What is told and kept, and how often (in optimiser steps)

    logging_steps: int = 100
    """write loss, learning rate, gradient norm and speed to metrics.jsonl"""
    eval_steps: int = 100
    """evaluate the whole validation split"""
    forgetting: str | None = None
    """also measure perplexity on general text, before, meanwhile and after: a UTF-8 file, a data set, or builtin"""
    save_steps: int = 100
    """save a checkpoint, from which --resume continues

    On a GPU many steps are made while a checkpoint is written. One that comes due meanwhile is saved as soon as the
    writer is free, after a later step. Those of the last step, of a stop and, with keep_best, of the best evaluation
    are not put off, and with save_blocking none is.
    """
    keep_checkpoints: int = 2
    """how many of the newest checkpoints to keep"""
    keep_best: bool = False
    """also keep the checkpoint of the best evaluation, by accuracy, then loss, and save at each that is better"""
    tensorboard: bool = False
    """also write the figures as event files for TensorBoard, to tensorboard/ in --output-dir"""
    save_blocking: bool = False
    """write checkpoints while the training waits: slower, but without a second copy of weights and moments in memory"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """at a loss or gradient that is infinite or no number: stop before the update, or leave it out and go on"""
    max_skipped_steps: int = 10
    """with --on-nonfinite skip: stop after leaving out more updates than this"""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            UsageError: with one sentence for each that is wrong.
        """
        problems = _problems(self)
        if problems:
            raise UsageError(*problems)

    @property
    def rows_per_batch(self) -> int:
        """Reviews of a batch of all processes together."""
        return self.batch_size * self.processes

    @property
    def rows_per_step(self) -> int:
        """Reviews that an optimiser step sees: the global batch."""
        return self.rows_per_batch * self.gradient_accumulation_steps

    def save(self, path: Path) -> None:
        """Write all settings as JSON, in the order of this class; the file is the old one until it is the new one."""
        atomic_write_text(path, json.dumps(asdict(self), indent=2) + "\n")


# The value of `resume` that stands for the newest checkpoint in the output directory.
NEWEST = "newest"

# What is noted of a run and cannot be asked for.
NO_FLAGS = ("processes",)

_MINIMUM: dict[str, float] = {
    "max_train_samples": 1,
    "max_steps": 1,
    "early_stopping_patience": 1,
    "batch_size": 1,
    "processes": 1,
    "gradient_accumulation_steps": 1,
    "eval_batch_size": 1,
    "max_length": 2,
    "seed": 0,
    "learning_rate": 0.0,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "dropout": 0.0,
    "logging_steps": 1,
    "eval_steps": 1,
    "save_steps": 1,
    "keep_checkpoints": 1,
    "max_skipped_steps": 0,
}


def flag(name: str) -> str:
    """The command-line flag of a field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


@functools.cache
def field_types() -> dict[str, tuple[type, tuple[str, ...]]]:
    """Each field's plain type (`int | None` counts as int, `tuple[str, ...]` as tuple) and a Literal's choices."""
    found: dict[str, tuple[type, tuple[str, ...]]] = {}
    for name, hint in typing.get_type_hints(Config).items():
        if typing.get_origin(hint) is Literal:
            found[name] = (str, typing.get_args(hint))
        elif isinstance(hint, types.UnionType):
            found[name] = (typing.get_args(hint)[0], ())
        else:
            found[name] = (typing.get_origin(hint) or hint, ())
    return found


def _shortened(value: float) -> str:
    """A number in a message: of hundreds of digits the first ones."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} digits)"


def _values(config: Config) -> Iterator[tuple[Field[Any], type, Any]]:
    """Each field with its type and value; of several texts each one by itself, as a text."""
    for field in fields(config):
        kind, value = field_types()[field.name][0], getattr(config, field.name)
        if kind is tuple and type(value) is tuple:
            yield from ((field, str, text) for text in value)
        else:
            yield field, kind, value


def _problems(config: Config) -> list[str]:
    """Everything that is wrong with a configuration, one sentence each."""
    problems = []
    for field, kind, value in _values(config):
        name = field.name
        _, choices = field_types()[name]
        if value is None and field.default is None:
            continue
        fits = (type(value) in (int, float)) if kind is float else (type(value) is kind)
        if not fits:
            numbers = {int: "a whole number", float: "a number"}
            wanted = {**numbers, str: "a text", bool: "true or false", tuple: "a list of texts"}[kind]
            problems.append(f"{flag(name)} is {value!r}, it must be {wanted}")
        elif choices and value not in choices:
            problems.append(f"{flag(name)} is {value!r}, it must be one of {', '.join(choices)}")
        elif kind is float and not abs(value) <= sys.float_info.max:
            problems.append(f"{flag(name)} is {_shortened(value)}, it must be finite")
        elif kind is int and value >= 2**63:
            problems.append(f"{flag(name)} is {_shortened(value)}, it must be below 2**63")
        elif name in _MINIMUM and value < _MINIMUM[name]:
            problems.append(f"{flag(name)} is {value}, it must be at least {_MINIMUM[name]}")
        elif name == "dropout" and value >= 1:
            problems.append(f"--dropout is {value}, it must be below 1")
        elif name in ("epochs", "process_timeout") and value <= 0:
            problems.append(f"{flag(name)} is {value}, it must be above 0")
        elif name in ("epochs", "process_timeout") and value > 1e6:
            problems.append(f"{flag(name)} is {_shortened(value)}, it must be at most 1000000")
        elif name == "train_fraction" and not 0 < value <= 1:
            problems.append(f"--train-fraction is {value}, it must be above 0 and at most 1")
        elif kind is str and not value:
            problems.append(f"{flag(name)} is empty")
        elif kind is str and "\0" in value:
            problems.append(f"{flag(name)} is {value!r}, it must not hold a NUL character")
    if config.resume and config.overwrite:
        problems.append("--resume continues a run and --overwrite deletes it: give one of them")
    if config.shard and (config.compile != "none" or config.precision == "fp16"):
        problems.append("--shard works neither with --compile nor with --precision fp16: leave that out, or take bf16")
    if config.compile == "reduce-overhead" and config.gradient_accumulation_steps != 1:
        problems.append(  # the graph writes each batch's gradients over those of the one before: pytorch#96693, #169545
            f"--compile reduce-overhead cannot add up gradients, and --gradient-accumulation-steps is "
            f"{config.gradient_accumulation_steps}: use --compile default, or a larger --batch-size alone"
        )
    if config.completion_column is not None and config.label_names is not None:
        problems.append("--label-names are words for labels, and with --completion-column there are none: leave it out")
    if config.completion_column is not None and (config.static_shapes or config.compile != "none"):
        problems.append(
            "--compile and --static-shapes need one target per row, which completions have not: leave them out, or "
            "train on labels"
        )
    return problems
