"""What a setting is, the settings of files, and what makes settings wrong: types, limits, impossible combinations.

`Config` (ft/config.py) adds the settings of training to those of files, and calls `find_problems` on itself, so this
module does not import it.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, Literal

from ft.errors import is_utf8, shown
from ft.io import paths

_NO_CLASSES = "--class-weights are of labels, and with --completion-column there are none: leave it out"
BALANCED = "balanced"  # the value of --class-weights for weights by inverse frequency
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-9, 1e9  # of a class: losses and their sums are fp32
LARGEST_ALPHA = 1e9  # of LoRA, in flags and in adapter_config.json
_OF_LORA = ("lora_alpha", "lora_dropout", "lora_targets")

TOO_LONG = "which is too long a path for this system: name a shorter one"

# Settings that other libraries write or open as UTF-8: tokenizers, PyArrow and the profiler.
_UTF8 = ("label_names", "output_dir", "text_column", "label_column", "prompt_column", "completion_column", "profile")

# The headings of `--help`; the model card lists the settings of some of them.
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


@dataclass(frozen=True)
class FileSettings:
    """The settings of input and output: which model, which data, how they are read, and where the run is written."""

    model: str = setting(
        "openai-community/gpt2",
        FILES,
        "Hub id or local directory of the GPT-2 to fine-tune: config.json, tokenizer.json, model.safetensors",
    )
    model_revision: str | None = setting(None, FILES, "branch, tag or commit of the model on the Hub (default: main)")
    init: Literal["pretrained", "random"] = setting(
        "pretrained", FILES, "start from the pretrained weights, or train from scratch with GPT-2's initialization"
    )
    dataset: str = setting(
        "cornell-movie-review-data/rotten_tomatoes",
        FILES,
        "Hub id, directory with train, validation and test as .parquet, .csv, .tsv, .json or .jsonl, or one such file",
    )
    dataset_config: str | None = setting(
        None, FILES, "the subdirectory of one of several data sets that are side by side in --dataset"
    )
    dataset_revision: str | None = setting(
        None, FILES, "branch, tag or commit of the data set on the Hub (default: main, or its conversion to parquet)"
    )
    save_dataset: str | None = setting(
        None, FILES, "also write a copy of the data to this directory, which --dataset can read"
    )
    text_column: str = setting("text", FILES, "column of the text that the model reads")
    label_column: str = setting("label", FILES, "column of the label: whole numbers, or words")
    label_names: str | None = setting(
        None,
        FILES,
        "words for the labels 0, 1, ... (or for other numbers, in ascending order), separated by commas (default: "
        "those of the data set, or the numbers)",
    )
    skip_empty: bool = setting(
        False, FILES, "leave out rows without a text, label or completion, or in which it is blank, and count them"
    )
    delimiter: str | None = setting(
        None,
        FILES,
        "separator of the columns of .csv and .tsv files: a character, or tab (default: found in the first line)",
    )
    encoding: str | None = setting(
        None, FILES, "encoding of text files, such as cp1252 (default: that of the byte order mark, else UTF-8)"
    )
    prompt_column: str = setting("prompt", FILES, "with --completion-column: column of the text that the model reads")
    completion_column: str | None = setting(
        None,
        FILES,
        "train on completions instead of labels: column of the text to be generated; the loss is on its tokens alone",
    )
    train_fraction: float = setting(
        1.0, FILES, "fraction of the training rows to use, for a quick try; drawn by --seed, each label in proportion"
    )
    max_train_samples: int | None = setting(
        None, FILES, "use at most this many training rows, drawn in the same way (default: all)", minimum=1
    )
    output_dir: str = setting("runs/rotten_tomatoes", FILES, "directory for metrics.jsonl, the checkpoints and final/")
    overwrite: bool = setting(False, FILES, "delete what an earlier run left in --output-dir")
    resume: str | None = setting(
        None,
        FILES,
        "resume an interrupted run: from the newest checkpoint in --output-dir, or from the run or checkpoint PATH",
    )
    demo: bool = setting(
        False, FILES, "run on generated reviews and a small GPT-2: no network needed, about half a minute"
    )


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
        elif name in paths.SETTINGS and paths.is_too_long(value):
            problems.append(f"{flag(name)} is {shown(value)}, {TOO_LONG}")
        elif name == "encoding" and not is_encoding(value):
            problems.append(f"--encoding is {shown(value)}, it must be an encoding of text, such as cp1252")
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
    problems += _lora_problems(config, problems)
    return problems


def is_encoding(name: str) -> bool:
    """Whether Python has an encoding of text of this name."""
    try:
        b"text".decode(name, errors="ignore")
    except (LookupError, ValueError):  # unknown, not of text, or not a possible name
        return False
    return True


def _lora_problems(config: Any, found: Sequence[str]) -> list[str]:  # noqa: ANN401
    """What contradicts LoRA, or has no effect without it; of settings whose value is not wrong by itself (`found`)."""
    if config.lora_rank is None and config.adapter is None:
        given = [name for name in _OF_LORA if getattr(config, name) not in (None, ())]
        right = [name for name in given if not any(problem.startswith(f"{flag(name)} is ") for problem in found)]
        return [f"{flag(name)} is for LoRA, which --lora-rank 8 or --adapter turns on" for name in right]
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
