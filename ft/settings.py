"""Read settings from a command line, from a file, and from the run that is resumed."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ft.checks import field_types, flag
from ft.config import NEWEST, Config
from ft.errors import UsageError, shown
from ft.io.paths import expand_home, is_too_long
from ft.io.plain_files import read_regular

# How a run was started: not part of the configuration that a file sets.
NOT_RECORDED = ("resume", "overwrite", "save_dataset", "profile", "quiet")

# The settings that determine which rows a run reads.
DATA_SETTINGS = (
    "dataset",
    "dataset_revision",
    "dataset_config",
    "text_column",
    "label_column",
    "delimiter",
    "encoding",
    "prompt_column",
    "completion_column",
    "skip_empty",
    "train_fraction",
    "max_train_samples",
    "seed",
)

# What may change when a run is resumed. The device and sharding may change rounding; early stopping and the handling
# of non-finite losses decide where a run ends and which steps it skips.
FREE_ON_RESUME = (
    *NOT_RECORDED,
    "output_dir",
    "device",
    "eval_batch_size",
    "early_stopping_patience",  # changes where the run ends, and no step before
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

# What may change if the product stays the same: another world size with the same global batch size.
SHARED_ON_RESUME = ("batch_size", "processes")

# What may only increase when a run is resumed.
LONGER_ON_RESUME = ("epochs", "max_steps")


# Settings that differ from the defaults, by field of `Config`. The defaults suit a pretrained model; random weights
# need a larger learning rate, with warmup, and more epochs.
DEMO_SETTINGS: dict[str, object] = {
    "output_dir": "runs/demo",
    "epochs": 10.0,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 100,
    "eval_steps": 200,
    "save_steps": 200,
    "forgetting": "builtin",
}

# What --demo generates or sets itself.
DEMO_INPUTS = (
    *("model", "model_revision", "dataset", "dataset_config", "dataset_revision"),
    *("text_column", "label_column", "prompt_column", "completion_column", "delimiter", "encoding", "skip_empty"),
)


def field_help() -> dict[str, str]:
    """The help text of each field of `Config`, by field name."""
    return {field.name: field.metadata["help"] for field in fields(Config)}


def field_groups() -> dict[str, str]:
    """The heading of each field of `Config` in the help, by field name."""
    return {field.name: field.metadata["group"] for field in fields(Config)}


def parse_value(name: str, text: str | list[str]) -> Any:  # noqa: ANN401
    """Convert the text of a command line, or a list of texts for a field with several values, to a field's type.

    Raises:
        UsageError: the text is not a number, and the field is one.
    """
    kind, _ = field_types(Config)[name]
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise UsageError(f"{flag(name)} is {shown(text)}, it must be {wanted}") from None


def read_config_file(path: Path, *, may_be_pipe: bool = False) -> dict[str, Any]:
    """Read the settings of a `config.json` written by `Config.save`, or by hand with some of the settings.

    Args:
        path: the file.
        may_be_pipe: also read a FIFO, as in `--config <(command)`.

    Raises:
        UsageError: the file is missing, not a JSON object, or has an unknown setting.
    """
    try:
        settings = json.loads(
            (path.read_bytes() if may_be_pipe else read_regular(path)).decode("utf-8-sig")
        )  # editors on Windows write a byte order mark
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
        if name not in NOT_RECORDED
    }


def build_config(settings: Mapping[str, Any], problems: Sequence[str]) -> Config:
    """Build a configuration from settings.

    Raises:
        UsageError: has the `problems` that were found before, and those of the settings.
    """
    try:
        config = Config(**settings)
    except UsageError as error:
        raise UsageError(*problems, *error.problems) from None
    if problems:
        raise UsageError(*problems)
    return config


def base_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that --resume and --demo put in place of the defaults.

    Raises:
        UsageError: the configuration of the run that is resumed is not valid.
    """
    settings = {name: expand_home(value) for name, value in settings.items()}
    resume = settings.get("resume")
    places = [settings.get("output_dir", ""), "" if resume is None else resume]
    if not all(isinstance(place, str) and not is_too_long(place) for place in places):
        return {}  # `Config` raises for it
    if resume is not None and resume != NEWEST:
        run = run_directory_of(Path(resume))
        base: dict[str, Any] = {"output_dir": str(run)}
    else:
        run = Path(settings.get("output_dir", Config.output_dir))
        base = {}
    if settings.get("demo"):
        base = {**DEMO_SETTINGS, **base}
        run = Path(settings.get("output_dir", base["output_dir"]))
    if resume is not None and (run / "config.json").is_file():
        recorded = read_config_file(run / "config.json")
        rows = rows_of_run(recorded.get("dataset"))
        if rows is not None and (run / rows).is_dir():  # the run directory may have been moved
            recorded["dataset"] = str(run / rows)
        return {**base, **recorded, "output_dir": str(run)}
    return base


def find_unused_settings(
    given: Mapping[str, Any], recorded: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[str]:
    """A sentence for each setting that another one leaves without effect.

    Args:
        given: the settings of the command line, or the keywords of `ft.fine_tune`.
        recorded: those of the --config file, if there is one.
        settings: all of them, with those of the resumed run or the demo.
    """
    problems = []
    if settings.get("demo") is True:
        defaults = {field.name: field.default for field in fields(Config)}
        own = {} if recorded.get("demo") is True else recorded
        ignored = [flag(name) for name in DEMO_INPUTS if name in given]
        ignored += [
            f"{name} of the --config"
            for name in DEMO_INPUTS
            if name not in given and own.get(name, defaults[name]) != defaults[name]
        ]
        if ignored:
            problems.append(f"--demo has its own model and data: leave out --demo, or {', '.join(ignored)}")
    if "prompt_column" in given and settings.get("completion_column") is None:
        problems.append(
            f"--prompt-column is {shown(given['prompt_column'])} without --completion-column: give both or neither"
        )
    columns = [flag(name) for name in ("text_column", "label_column") if name in given]
    if settings.get("completion_column") is not None and columns:
        problems.append(f"--completion-column trains on completions, without labels: leave out {' and '.join(columns)}")
    if "max_skipped_steps" in given and settings.get("on_nonfinite", Config.on_nonfinite) != "skip":
        problems.append("--max-skipped-steps limits what --on-nonfinite skip leaves out: give both or neither")
    return problems


def rows_of_run(dataset: object) -> str | None:
    """Where in the run directory the rows are that were passed to `ft.fine_tune`; None for another data set."""
    match = re.search(r"(?:^|[/\\])(inputs)[/\\](rows-[0-9a-f]{16})$", dataset) if isinstance(dataset, str) else None
    return None if match is None else f"{match[1]}/{match[2]}"


def run_directory_of(path: Path) -> Path:
    """The run directory for a value of --resume: itself, or the parent directory of a checkpoint."""
    return path.parent if re.fullmatch(r"checkpoint-[0-9]+", path.name) else path


def find_changed_settings(old: Mapping[str, Any], new: Config) -> list[str]:
    """The settings that must not change on resume and did, one aligned line each."""
    may_change = {*FREE_ON_RESUME, *LONGER_ON_RESUME, *SHARED_ON_RESUME}
    if old.get("demo") is True and new.demo:  # its inputs are in the run directory, which may have been moved
        may_change |= {"model", "dataset"}
    if rows_of_run(old.get("dataset")) == rows_of_run(new.dataset) is not None:  # so are these
        may_change.add("dataset")
    if new.uses_lora:  # checkpoints have the hash of the base, wherever it is now
        may_change |= {"model", "model_revision"}
    changed = [
        (flag(name), shown(old[name]), shown(value))
        for name, value in asdict(new).items()
        if name in old and name not in may_change and old[name] != value
    ]
    batch = (old.get("batch_size", new.batch_size), old.get("processes", Config.processes))
    if math.prod(batch) != new.rows_per_batch:
        changed.append((flag("batch_size"), _format_batch(*batch), _format_batch(new.batch_size, new.processes)))
    widths = [max(map(len, column)) for column in zip(*changed, strict=True)]
    return [f"{name:{widths[0]}} was {before:{widths[1]}} and would be {after}" for name, before, after in changed]


def _format_batch(batch_size: int, processes: int) -> str:
    """A batch size as messages show it, with the number of processes if there are several."""
    return str(batch_size) if processes == 1 else f"{batch_size} x {processes} processes"
