"""Parse a command line into a `Config`: one flag for each field, all problems reported at once."""

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ft.checks import field_types, flag
from ft.cli.parsers import CommandParser, describe_unknown_flag, without_values
from ft.config import NEWEST, NO_FLAGS, Config
from ft.errors import UsageError, shown
from ft.io.paths import expand_home
from ft.settings import (
    DEMO_SETTINGS,
    build_config,
    field_groups,
    field_help,
    parse_value,
    read_config_file,
    run_directory_of,
)

EXAMPLES = """\
examples:
  python run.py                          the published recipe, on the best available device
  python run.py --demo                   generated reviews and a small model: no network, half a minute
  python run.py --resume                 continue the last run from its newest checkpoint
  python run.py --model ./my-gpt2 --dataset ./my-reviews --output-dir runs/mine
  python run.py data --dataset ./my-reviews.csv        class counts, token lengths and duplicates of a data set
  python run.py predict runs/rotten_tomatoes "a gorgeous , witty film"
  python run.py evaluate runs/rotten_tomatoes --split test
  python run.py explain --demo           follow one example through one training step
  python run.py generate runs/rotten_tomatoes "the film"
  python run.py report runs/rotten_tomatoes     curves, mistakes and settings as one HTML file
  python run.py runs                     a table of all runs below runs/: settings, figures, time
"""

# The commands beside training, each with its module and function, which are imported only when needed.
COMMANDS = {
    "predict": ("ft.cli.predict", "predict"),
    "evaluate": ("ft.cli.evaluate", "evaluate"),
    "explain": ("ft.cli.main", "explain"),
    "generate": ("ft.cli.generate", "generate"),
    "report": ("ft.cli.report", "report"),
    "runs": ("ft.cli.runs", "runs"),
}

# The commands that take the flags of a training run; their function gets its `Config`.
RUN_FLAG_COMMANDS = {
    "data": ("ft.cli.describe_data", "describe"),
}

# The value of a flag that was given without one, so that this problem is reported together with all others.
_NO_VALUE = "\0no value"


class _RunParser(CommandParser):
    """A parser that collects problems instead of stopping at the first.

    A flag without its value gets `_NO_VALUE` or an empty list; the help still shows the value as required.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__("", **options)
        self._takes_value: list[argparse.Action] = []
        self._groups: dict[str, argparse._ArgumentGroup] = {}

    def add_value(self, heading: str, name: str, *, if_absent: str = _NO_VALUE, **options: Any) -> None:  # noqa: ANN401
        """Add a flag that takes one value, in a group of the help."""
        action = self.group(heading).add_argument(name, nargs="?", const=if_absent, **options)
        if if_absent == _NO_VALUE:
            self._takes_value.append(action)

    def add_values(self, heading: str, name: str, **options: Any) -> None:  # noqa: ANN401
        """Add a flag that takes one or more values."""
        self._takes_value.append(self.group(heading).add_argument(name, nargs="*", **options))

    def group(self, heading: str) -> "argparse._ArgumentGroup":
        """The group of flags under a heading of the help, added at first use."""
        if heading not in self._groups:
            self._groups[heading] = self.add_argument_group(heading)
        return self._groups[heading]

    def format_help(self) -> str:
        for action in self._takes_value:
            action.nargs = None
        return super().format_help()


def read_arguments(arguments: Sequence[str]) -> Config:
    """Parse the command line of a training run.

    A flag takes precedence over --config FILE, that over the settings of the resumed run or the demo, and those over
    the defaults.

    Raises:
        UsageError: with one sentence for each problem.
    """
    words = _join_negative_numbers(arguments)
    switches = {flag(name) for name, (kind, _) in field_types(Config).items() if kind is bool}
    valued = [word for word in words if word.partition("=")[0] in switches and "=" in word]
    problems = [
        f"{word.partition('=')[0]} takes no value, leave {shown(word.partition('=')[2])} out" for word in valued
    ]
    parsed, rest = _parser().parse_known_args([word for word in words if word not in valued])
    problems += map(_describe_unknown, without_values(rest))
    config_file = vars(parsed).pop("config", None)
    settings: dict[str, Any] = {}
    for name, value in vars(parsed).items():
        if value in (_NO_VALUE, []):
            problems.append(f"{flag(name)} needs a value")
            continue
        try:
            settings[name] = parse_value(name, value) if isinstance(value, str | list) else value
        except UsageError as error:
            problems += error.problems
    try:
        if config_file == _NO_VALUE:
            problems.append("--config needs a value")
        elif config_file is not None:
            settings = {**read_config_file(Path(expand_home(config_file)), may_be_pipe=True), **settings}
        settings = {**_base_settings(settings), **settings}
    except UsageError as error:
        problems += error.problems
    return build_config(settings, problems)


def _join_negative_numbers(arguments: Sequence[str]) -> list[str]:
    """Turn `--flag -1e-3` into `--flag=-1e-3`: argparse takes most forms of a negative number for a flag."""
    words: list[str] = []
    for word in arguments:
        if words and re.fullmatch(r"--[^=]+", words[-1]) and re.fullmatch(r"-([0-9.]|inf|nan).*", word, re.IGNORECASE):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _base_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that --resume and --demo put in place of the defaults."""
    settings = {name: expand_home(value) for name, value in settings.items()}
    resume = settings.get("resume")
    if not isinstance(settings.get("output_dir", ""), str):
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
        return {**base, **read_config_file(run / "config.json"), "output_dir": str(run)}
    return base


def _parser() -> _RunParser:
    """One flag for each field of `Config`; values stay strings, which `parse_value` parses one by one."""
    parser = _RunParser(
        description="Fine-tune GPT-2 in plain PyTorch; by default to classify film reviews as positive or negative.",
        examples=EXAMPLES,
        usage="python run.py [FLAG ...]",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_value(
        next(iter(field_groups().values())),
        "--config",
        metavar="FILE",
        help="read settings from a config.json, such as that of another run",
    )
    for field in fields(Config):
        if field.name in NO_FLAGS:
            continue
        kind, choices = field_types(Config)[field.name]
        text = field_help()[field.name]
        heading = field_groups()[field.name]
        if kind is bool:
            parser.group(heading).add_argument(flag(field.name), action="store_true", help=text)
            continue
        if kind is tuple:
            parser.add_values(heading, flag(field.name), metavar="PATTERN ...", help=text.replace("%", "%%"))
            continue
        if field.default is not None:
            text += f" (default {field.default})"
        parser.add_value(
            heading,
            flag(field.name),
            if_absent=NEWEST if field.name == "resume" else _NO_VALUE,
            metavar="|".join(choices) or {int: "N", float: "X", str: "TEXT"}[kind],
            help=text.replace("%", "%%"),
        )
    return parser


def _describe_unknown(argument: str) -> str:
    """The message for an unknown argument, with the nearest flag or command if there is one."""
    if not argument.startswith("-"):
        near = difflib.get_close_matches(argument, [*COMMANDS, *RUN_FLAG_COMMANDS], n=1)
        return f"unexpected argument {shown(argument)}" + (f"; is it the command {near[0]}?" if near else "")
    flags = [flag(field.name) for field in fields(Config) if field.name not in NO_FLAGS]
    return describe_unknown_flag(argument, ["--config", *flags])
