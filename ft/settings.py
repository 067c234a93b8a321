"""Reading and checking settings: from a command line, from a file, and from the run that is resumed."""

import functools
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any, Literal

from ft.config import Config, flag
from ft.errors import UsageError, shown
from ft.io.plain_files import read_regular

# What one run of a folder may have and another not, without being another run.
NOT_OF_THE_RUN = ("resume", "overwrite", "save_dataset")

# What decides which rows a run reads.
OF_THE_DATA = (
    "dataset",
    "dataset_revision",
    "dataset_config",
    "text_column",
    "label_column",
    "delimiter",
    "encoding",
    "prompt_column",
    "completion_column",
    "train_fraction",
    "max_train_samples",
    "seed",
)

# What may change when a run is resumed: none of it changes the weights that come out.
FREE_ON_RESUME = (
    *NOT_OF_THE_RUN,
    "output_dir",
    "device",
    "eval_batch_size",
    "early_stopping_patience",  # which moves the end, and changes no step on the way there
    "release_memory",
    "shard",
    "process_timeout",
    "activation_checkpointing",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "keep_checkpoints",
    "keep_best",
    "tensorboard",
    "save_blocking",
    "on_nonfinite",
    "max_skipped_steps",
)

# What may change as long as their product does not: more or fewer processes may share the reviews of a batch.
SHARED_ON_RESUME = ("batch_size", "processes")

# What a resumed run may have more of; less of it would end before its checkpoint's schedule does.
LONGER_ON_RESUME = ("epochs", "max_steps")


def field_help() -> dict[str, str]:
    """The help text of each field of `Config`, by field name."""
    return {field.name: field.metadata["help"] for field in fields(Config)}


def field_groups() -> dict[str, str]:
    """The heading of each field of `Config` in the help, by field name."""
    return {field.name: field.metadata["group"] for field in fields(Config)}


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


def _values(config: Config) -> Iterator[tuple[Field[Any], type, Any]]:
    """Each field with its type and value; of several texts each one by itself, as a text."""
    for each in fields(config):
        kind, value = field_types()[each.name][0], getattr(config, each.name)
        if kind is tuple and type(value) is tuple:
            yield from ((each, str, text) for text in value)
        else:
            yield each, kind, value


def find_problems(config: Config) -> list[str]:
    """Everything that is wrong with a configuration, one sentence each."""
    problems = []
    for field, kind, value in _values(config):
        name, (_, choices) = field.name, field_types()[field.name]
        if value is None and field.default is None:
            continue
        fits = (type(value) in (int, float)) if kind is float else (type(value) is kind)
        if not fits:
            numbers = {int: "a whole number", float: "a number"}
            wanted = {**numbers, str: "a text", bool: "true or false", tuple: "a list of texts"}[kind]
            problems.append(f"{flag(name)} is {shown(value)}, it must be {wanted}")
        elif choices and value not in choices:
            problems.append(f"{flag(name)} is {shown(value)}, it must be one of {', '.join(choices)}")
        elif kind is float and not abs(value) <= sys.float_info.max:
            problems.append(f"{flag(name)} is {shown(value)}, it must be finite")
        elif kind is int and value >= 2**63:
            problems.append(f"{flag(name)} is {shown(value)}, it must be below 2**63")
        elif (minimum := field.metadata["minimum"]) is not None and value < minimum:
            problems.append(f"{flag(name)} is {shown(value)}, it must be at least {minimum}")
        elif name == "dropout" and value >= 1:
            problems.append(f"--dropout is {shown(value)}, it must be below 1")
        elif name in ("epochs", "process_timeout") and not 0 < value <= 1e6:
            problems.append(f"{flag(name)} is {shown(value)}, it must be above 0 and at most 1000000")
        elif name == "train_fraction" and not 0 < value <= 1:
            problems.append(f"--train-fraction is {shown(value)}, it must be above 0 and at most 1")
        elif kind is str and not value:
            problems.append(f"{flag(name)} is empty")
        elif kind is str and "\0" in value:
            problems.append(f"{flag(name)} is {shown(value)}, it must not hold a NUL character")
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
    return problems


def parse_value(name: str, text: str | list[str]) -> Any:  # noqa: ANN401
    """A field's value from the text that a command line gave, or from the texts for a field that takes several.

    Raises:
        UsageError: the text is no number where one is needed.
    """
    kind, _ = field_types()[name]
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise UsageError(f"{flag(name)} is {shown(text)}, it must be {wanted}") from None


def read_config_file(path: Path, *, may_be_pipe: bool = False) -> dict[str, Any]:
    """The settings in a `config.json` that `Config.save` wrote, or in one written by hand with fewer of them.

    Args:
        path: the file.
        may_be_pipe: wait for what a FIFO gives, as the user has named it: `--config <(command)`.

    Raises:
        UsageError: the file is absent, no JSON object, or has a setting that does not exist.
    """
    try:
        settings = json.loads(
            (path.read_bytes() if may_be_pipe else read_regular(path)).decode("utf-8-sig")
        )  # a BOM, as editors on Windows write it
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the configuration {path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"the configuration {path} must be a JSON object of settings")
    unknown = [name for name in settings if name not in field_types()]
    if unknown:
        raise UsageError(f"the configuration {path} has unknown settings: {', '.join(map(str, unknown))}")
    return {
        name: tuple(value) if field_types()[name][0] is tuple and isinstance(value, list) else value
        for name, value in settings.items()
        if name not in NOT_OF_THE_RUN
    }


def checked(settings: Mapping[str, Any], problems: Sequence[str]) -> Config:
    """The configuration with these settings.

    Raises:
        UsageError: with the `problems` found before, and a sentence for each that the settings have.
    """
    try:
        config = Config(**settings)
    except UsageError as error:
        raise UsageError(*problems, *error.problems) from None
    if problems:
        raise UsageError(*problems)
    return config


def run_of(path: Path) -> Path:
    """The folder of the run that a value of --resume means: itself, or the one that a checkpoint lies in."""
    return path.parent if re.fullmatch(r"checkpoint-[0-9]+", path.name) else path


def changed_on_resume(old: Mapping[str, Any], new: Config) -> list[str]:
    """One line for each setting that would make a resumed run another run than the one it continues: a table."""
    may_change = (*FREE_ON_RESUME, *LONGER_ON_RESUME, *SHARED_ON_RESUME)
    changed = [
        (flag(name), shown(old[name]), shown(value))
        for name, value in asdict(new).items()
        if name in old and name not in may_change and old[name] != value
    ]
    batch = (old.get("batch_size", new.batch_size), old.get("processes", Config.processes))
    if math.prod(batch) != new.rows_per_batch:
        changed.append((flag("batch_size"), _shared(*batch), _shared(new.batch_size, new.processes)))
    widths = [max(map(len, column)) for column in zip(*changed, strict=True)]
    return [f"{name:{widths[0]}} was {before:{widths[1]}} and would be {after}" for name, before, after in changed]


def _shared(batch_size: int, processes: int) -> str:
    """The reviews of a batch, in words that tell how many each of several processes has."""
    return str(batch_size) if processes == 1 else f"{batch_size} x {processes} processes"
