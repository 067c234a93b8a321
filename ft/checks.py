"""What a setting is, and what makes settings wrong: types, limits, and combinations that cannot work.

`Config` is made of these settings and calls `find_problems` on itself, so this module does not import it.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any, Literal

from ft.errors import is_utf8, shown

_NO_CLASSES = "--class-weights are of labels, and with --completion-column there are none: leave it out"
BALANCED = "balanced"  # the value of --class-weights for weights by inverse frequency
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-9, 1e9  # of a class: losses and their sums are fp32
LARGEST_ALPHA = 1e9  # of LoRA, in flags and in adapter_config.json
_OF_LORA = ("lora_alpha", "lora_dropout", "lora_targets")

# Settings that other libraries write or open as UTF-8: tokenizers, PyArrow and the profiler.
_UTF8 = ("label_names", "output_dir", "text_column", "label_column", "prompt_column", "completion_column", "profile")

# The headings of `--help` and of the model card.
FILES = "Input and output"
LENGTH = "Training length and batch size"
OPTIMIZER = "Optimizer"
PARAMETERS = "Trained parameters"
MACHINE = "Device and precision"
PROCESSES = "Several processes, started by torchrun"
LOGGING = "Logging and checkpoints, in optimizer steps"


def setting(default: Any, group: str, help_text: str, *, minimum: float | None = None) -> Any:  # noqa: ANN401
    """A field of `Config`: its default, its heading in the help, its help text, and its minimum."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help_text, "minimum": minimum})


def flag(name: str) -> str:
    """The command-line flag of a field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def field_types(settings: type) -> dict[str, tuple[type, tuple[str, ...]]]:
    """The type of each field (int for `int | None`, tuple for `tuple[str, ...]`), and the choices of a Literal."""
    found: dict[str, tuple[type, tuple[str, ...]]] = {}
    for name, hint in typing.get_type_hints(settings).items():
        if typing.get_origin(hint) is Literal:
            found[name] = (str, typing.get_args(hint))
        elif isinstance(hint, types.UnionType):
            found[name] = (typing.get_args(hint)[0], ())
        else:
            found[name] = (typing.get_origin(hint) or hint, ())
    return found


def _values(config: Any) -> Iterator[tuple[Field[Any], type, tuple[str, ...], Any]]:  # noqa: ANN401
    """Each field with its type, choices and value; a tuple of strings gives each of its strings."""
    types_by_name = field_types(type(config))
    for field in fields(config):
        (kind, choices), value = types_by_name[field.name], getattr(config, field.name)
        if kind is tuple and type(value) is tuple:
            yield from ((field, str, choices, element) for element in value)
        else:
            yield field, kind, choices, value


def find_problems(config: Any) -> list[str]:  # noqa: ANN401
    """Everything that is wrong with a `Config`, one sentence each."""
    problems = []
    for field, kind, choices, value in _values(config):
        name = field.name
        if value is None and field.default is None:
            continue
        fits = (type(value) in (int, float)) if kind is float else (type(value) is kind)
        if not fits:
            numbers = {int: "a whole number", float: "a number"}
            wanted = {**numbers, str: "a string", bool: "true or false", tuple: "a list of strings"}[kind]
            problems.append(f"{flag(name)} is {shown(value)}, it must be {wanted}")
        elif choices and value not in choices:
            problems.append(f"{flag(name)} is {shown(value)}, it must be one of {', '.join(choices)}")
        elif kind is float and not abs(value) <= sys.float_info.max:
            problems.append(f"{flag(name)} is {shown(value)}, it must be finite")
        elif kind is int and value >= 2**63:
            problems.append(f"{flag(name)} is {shown(value)}, it must be below 2**63")
        elif (minimum := field.metadata["minimum"]) is not None and value < minimum:
            problems.append(f"{flag(name)} is {shown(value)}, it must be at least {minimum}")
        elif name in ("dropout", "lora_dropout") and value >= 1:
            problems.append(f"{flag(name)} is {shown(value)}, it must be below 1")
        elif name == "lora_alpha" and not 0 < value <= LARGEST_ALPHA:
            problems.append(f"--lora-alpha is {shown(value)}, it must be above 0 and at most {LARGEST_ALPHA:g}")
        elif name in ("epochs", "process_timeout") and not 0 < value <= 1e6:
            problems.append(f"{flag(name)} is {shown(value)}, it must be above 0 and at most 1000000")
        elif name == "train_fraction" and not 0 < value <= 1:
            problems.append(f"--train-fraction is {shown(value)}, it must be above 0 and at most 1")
        elif kind is str and not value:
            problems.append(f"{flag(name)} is empty")
        elif kind is str and "\0" in value:
            problems.append(f"{flag(name)} is {shown(value)}, it must not hold a NUL character")
        elif name in _UTF8 and not is_utf8(value):
            problems.append(f"{flag(name)} is {shown(value)}, it must be valid UTF-8")
    if config.resume and config.overwrite:
        problems.append("--resume continues a run and --overwrite deletes it: give one of them")
    if config.shard and (config.compile != "none" or config.precision == "fp16"):
        problems.append("--shard works neither with --compile nor with --precision fp16: leave that out, or take bf16")
    if config.compile == "reduce-overhead" and config.gradient_accumulation_steps != 1:
        problems.append(  # the graph writes each batch's gradients over those of the one before: pytorch#96693, #169545
            f"--compile reduce-overhead cannot add up gradients, and --gradient-accumulation-steps is "
            f"{config.gradient_accumulation_steps}: use --compile default, or a larger --batch-size alone"
        )
    for text, answer in (("text_column", "label_column"), ("prompt_column", "completion_column")):
        if getattr(config, text) == getattr(config, answer):
            same = shown(getattr(config, text))
            problems.append(f"{flag(text)} and {flag(answer)} are both {same}: the model would read its answer")
    if config.completion_column is not None and config.label_names is not None:
        problems.append("--label-names are words for labels, and with --completion-column there are none: leave it out")
    if config.completion_column is not None and config.best_metric == "macro_f1":
        problems.append(
            "--best-metric is 'macro_f1', which is of labels, and with --completion-column there are none: it must be "
            "accuracy or loss"
        )
    problems += _class_weight_problems(config.class_weights, config.completion_column)
    excluded = {
        "--compile": config.compile != "none",
        "--shard": config.shard,
        "--activation-checkpointing": config.activation_checkpointing != "none",
        f"{config.processes} processes": config.processes != 1,
    }
    if config.cuda_graphs and any(excluded.values()):
        given = " and ".join(name for name, is_given in excluded.items() if is_given)
        problems.append(f"--cuda-graphs does not work with {given}: leave one out")
    has_static_shapes = config.static_shapes or config.cuda_graphs or config.compile != "none"
    if config.completion_column is not None and has_static_shapes:
        problems.append(
            "--compile, --cuda-graphs and --static-shapes need one target per row, which completions have not: leave "
            "them out, or train on labels"
        )
    problems += _lora_problems(config)
    return problems


def _lora_problems(config: Any) -> list[str]:  # noqa: ANN401
    """What contradicts LoRA, or has no effect without it."""
    if config.lora_rank is None and config.adapter is None:
        given = [name for name in _OF_LORA if getattr(config, name) not in (None, ())]
        return [f"{flag(name)} is for LoRA, which --lora-rank 8 or --adapter turns on" for name in given]
    if config.init == "random":
        return ["--init random trains all weights anew, and LoRA changes pretrained ones: leave one out"]
    return []


def weights_given(class_weights: str) -> list[float]:
    """The numbers of --class-weights.

    Raises:
        ValueError: one is not a number.
    """
    return [float(word) for word in class_weights.split(",")]


def _class_weight_problems(class_weights: object, completion_column: object) -> list[str]:
    """What is wrong with --class-weights; whether there is one for each label is known only with the data."""
    if type(class_weights) is not str or class_weights in ("", BALANCED):  # an empty text is reported as one
        return [] if completion_column is None or class_weights is None else [_NO_CLASSES]
    problems = [] if completion_column is None else [_NO_CLASSES]
    try:
        fit = all(SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT for weight in weights_given(class_weights))
    except ValueError:
        fit = False
    if not fit:
        problems.append(
            f"--class-weights is {shown(class_weights)}, it must be balanced, or one number from {SMALLEST_WEIGHT:g} "
            f"to {LARGEST_WEIGHT:g} for each label, such as 1,5"
        )
    return problems
