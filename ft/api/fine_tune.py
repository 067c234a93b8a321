"""`ft.fine_tune`: the run of the command line, for rows in memory, without changing the process that calls it."""

import inspect
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ft import finetune
from ft.api.process_state import download_bars, process_state_restored
from ft.api.rows import Rows, digest_of, read_rows, require_two_labels, to_scalar, write_rows
from ft.api.run import Run, columns_of_rows
from ft.checkpoint import store
from ft.checks import field_types, flag
from ft.cli.parsers import describe_unknown_flag
from ft.config import NEWEST, NO_FLAGS, Config
from ft.distributed.launch import world_size
from ft.errors import FtError, Stopped, UsageError, printable, quoted, remedy_of, shown
from ft.settings import base_settings, build_config, find_unused_settings

COMPLETION_COLUMN = "completion"  # of the rows, if there is no such setting


def fine_tune(
    texts: object = None,
    labels: object = None,
    *,
    completions: object = None,
    validation: object = None,
    test: object = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    resume: bool | str | Path | None = None,
    **settings: Any,  # noqa: ANN401
) -> Run:
    """Fine-tune a GPT-2 as `python run.py` does: the same recipe, losses and run directory.

    The rows are written to `inputs/` in the run directory, from which the command line and `resume=True` read them.
    Without rows the run reads `dataset`, a setting like all others.

    Args:
        texts: the training texts: a list, tuple, array or column of strings; or a table of `datasets`, pandas, polars
            or pyarrow that also has the labels; or a mapping from train, validation and test to such tables.
        labels: the label of each text: whole numbers, words, or true and false.
        completions: a text to be generated after each of `texts`, instead of labels.
        validation: a pair of texts and labels, or a table. Default: a tenth of the rows, drawn by `seed`.
        test: likewise. Default: none.
        output_dir: the run directory. Default: a new one in `runs/`, named after the time, for rows; else as for
            `--output-dir`.
        overwrite: delete what an earlier run left in `output_dir`.
        resume: True continues the run in `output_dir` from its newest checkpoint; a path continues that run or
            checkpoint. The rows may be left out.
        settings: the fields of `ft.config.Config`, which are the flags of `python run.py --help`: `epochs=3` is
            `--epochs 3`.

    Returns:
        The finished run.

    Raises:
        UsageError: the rows or settings are wrong; `problems` has one sentence for each.
        FtError: the run failed, and the message has the reason and the remedy.
        KeyboardInterrupt: after an interrupt, SIGTERM or SIGUSR1. During training the current step is finished and
            saved first, and the message says how the run continues. A second interrupt does not wait for the step.
    """
    with _errors_for_python():
        given: dict[str, Any] = {"output_dir": output_dir, "overwrite": overwrite, "resume": resume, **settings}
        has_rows = texts is not None
        chosen, problems = _to_settings(given, has_rows=has_rows, has_completions=completions is not None)
        if not has_rows and not all(rows is None for rows in (labels, completions, validation, test)):
            problems.append("texts are missing: pass them, or a table as the first argument")
        if labels is not None and completions is not None:
            problems.append("labels and completions are both given: leave one out")
        preview = build_config(chosen, problems)
        write: Callable[[Path], None] | None = None
        if has_rows:
            columns, is_completion = columns_of_rows(preview), preview.completion_column is not None
            answers = completions if is_completion and labels is None else labels
            rows = read_rows(texts, answers, validation, test, **columns, is_completion=is_completion)
            if not is_completion and preview.label_names is None:
                require_two_labels(rows)
            chosen["dataset"] = _dataset_of(rows, preview)
            write = partial(write_rows, rows, columns)
        config = build_config(chosen, ())
        try:
            with process_state_restored(release_memory=config.release_memory), download_bars(hidden=config.quiet):
                finetune.fine_tune(config, write, exits_on_second_interrupt=False)
        except Stopped:
            raise KeyboardInterrupt(_how_to_continue(config)) from None
    return Run(config.output_dir, device=config.device)


def _to_settings(
    given: Mapping[str, Any], *, has_rows: bool, has_completions: bool
) -> tuple[dict[str, Any], list[str]]:
    """The settings for `Config`, from the values that Python has for them, and those of a run that is resumed.

    Returns:
        The settings, and what is wrong with them before `Config` has checked them, one sentence each.
    """
    known = [field.name for field in fields(Config) if field.name not in NO_FLAGS]
    unknown = [(name, describe_unknown_flag(flag(name), list(map(flag, known)))) for name in given if name not in known]
    problems = [
        text.replace(f"there is no flag {flag(name)}", f"there is no setting {name}").replace(
            "--help lists all flags", "help(ft.fine_tune) lists all settings"
        )
        for name, text in unknown
    ]
    chosen: dict[str, Any] = {}
    for name in [name for name in given if name in known]:
        try:
            value = _to_value(name, given[name])
        except UsageError as error:
            problems += error.problems
        else:
            chosen |= {} if value is None else {name: value}
    for name in ("dataset", "dataset_revision", "dataset_config", "demo"):
        if has_rows and chosen.get(name) not in (None, False):
            problems.append(f"{name} is {shown(chosen[name])}, and rows are given too: leave one out")
    if chosen.get("resume") == NEWEST and "output_dir" not in chosen and has_rows:
        problems.append("resume is True, without the --output-dir of the run to resume: name it")
    if has_completions:
        chosen.setdefault("completion_column", COMPLETION_COLUMN)
    if has_rows and "output_dir" not in chosen and "resume" not in chosen:
        if world_size() > 1:
            problems.append("there are several processes, which must have the same --output-dir: name it")
        chosen["output_dir"] = _new_directory()
    try:
        keywords, chosen = chosen, {**base_settings(chosen), **chosen}
        problems += find_unused_settings(keywords, {}, chosen)
    except UsageError as error:
        problems += error.problems
    return chosen, problems


def _to_value(name: str, value: object) -> object:
    """A value as `Config` has it: paths as strings, lists as tuples, scalars of numpy as numbers.

    Raises:
        UsageError: a label name contains a comma, which separates them.
    """
    if name == "resume" and isinstance(value, bool):
        return NEWEST if value else None
    if name == "label_names" and isinstance(value, list | tuple):
        names = list(map(str, value))
        if any("," in label for label in names):
            raise UsageError(f"label_names is {shown(names)}, a name must not contain a comma")
        return ",".join(names)
    if isinstance(value, Path):
        return str(value)
    if field_types(Config)[name][0] is tuple and not isinstance(value, tuple):
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    return to_scalar(value)


def _new_directory() -> str:
    """A directory in `runs/` that does not exist, named after the time."""
    stem = f"runs/{time.strftime('%Y-%m-%d-%H%M%S')}"
    number = 1
    while Path(name := stem if number == 1 else f"{stem}-{number}").exists():
        number += 1
    return name


def _dataset_of(rows: Mapping[str, Rows], config: Config) -> str:
    """Where the rows are written: a directory of the run, named after their content.

    Raises:
        UsageError: the run that is resumed has read other rows.
    """
    name = f"rows-{digest_of(rows)}"
    begun = config.resume is not None and (Path(config.output_dir) / "config.json").is_file()
    if begun and Path(config.dataset).name != name:
        raise UsageError(
            f"the rows are not those of the run in {config.output_dir}, which reads {config.dataset}: leave the rows "
            "out to continue it, or start another run"
        )
    return str(Path(config.output_dir) / "inputs" / name)


def _how_to_continue(config: Config) -> str:
    """The message of the interrupt that ends a run in training."""
    path = config.output_dir
    saved = store.checkpoints(Path(path))
    saved_until = f"after step {store.step_of(saved[-1]):,}, and saved" if saved else ""
    return printable(
        f"stopped {saved_until or 'before the first step, with nothing to save'}. To continue: "
        f"ft.fine_tune(output_dir={path!r}, resume=True), or on a command line --resume {quoted(path)}"
    )


@contextmanager
def _errors_for_python() -> Iterator[None]:
    """A context that names settings in errors as Python does, `batch_size` for `--batch-size`.

    Raises:
        FtError: also for an error of the system, and for one of the device for which there is a remedy.
    """
    try:
        yield
    except UsageError as error:
        error.problems = tuple(map(_in_python, error.problems))
        error.args = ("\n".join(error.problems),)
        raise
    except FtError as error:
        error.args = (_in_python(str(error)),)
        raise
    except OSError as error:  # full disks and missing permissions; reading input files raises FtError
        raise FtError(f"{error.strerror or error}: {error.filename or 'while reading or writing'}") from error
    except RuntimeError as error:
        if (remedy := remedy_of(error)) is None:
            raise
        raise FtError(_in_python(remedy)) from error


def _in_python(message: str) -> str:
    """A message with the names of settings instead of flags; commands in backticks and other flags stay as they are."""
    names = {flag(field.name): field.name for field in fields(Config)}
    return re.sub(r"`[^`]*`|(?<![\w-])--[a-z][a-z0-9-]*", lambda match: names.get(match[0], match[0]), message)


def _signature() -> inspect.Signature:
    """The signature with a keyword for each setting, which notebooks complete and `help` prints."""
    declared = inspect.signature(fine_tune)
    *own, _ = declared.parameters.values()
    names = {parameter.name for parameter in own} | set(NO_FLAGS)
    keyword = inspect.Parameter.KEYWORD_ONLY
    others = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)
        for field in fields(Config)
        if field.name not in names
    ]
    return declared.replace(parameters=[*own, *others])


setattr(fine_tune, "__signature__", _signature())  # noqa: B010, for mypy a function has no such attribute
