"""Reading and checking settings: from a command line, from a file, and from the run that is resumed."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ft.checks import field_types, flag
from ft.config import Config
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


def parse_value(name: str, text: str | list[str]) -> Any:  # noqa: ANN401
    """A field's value from the text that a command line gave, or from the texts for a field that takes several.

    Raises:
        UsageError: the text is no number where one is needed.
    """
    kind, _ = field_types(Config)[name]
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
    unknown = [name for name in settings if name not in field_types(Config)]
    if unknown:
        raise UsageError(f"the configuration {path} has unknown settings: {', '.join(map(str, unknown))}")
    return {
        name: tuple(value) if field_types(Config)[name][0] is tuple and isinstance(value, list) else value
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
