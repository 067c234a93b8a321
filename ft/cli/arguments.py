"""Parse a command line into a `Config`: one flag for each field, all problems reported at once."""

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from ft.checks import FILES, field_types, flag
from ft.cli.parsers import CommandParser, describe_unknown_flag, find_meant_flag, without_values
from ft.config import NEWEST, NO_FLAGS, Config
from ft.errors import UsageError, quoted, shown
from ft.io.paths import SETTINGS, expand_home
from ft.settings import (
    base_settings,
    build_config,
    field_groups,
    field_help,
    find_unused_settings,
    parse_value,
    read_config_file,
)

EXAMPLES = """\
examples:
  python run.py --demo     no network: generated reviews, a small model
  python run.py            the published recipe, on the best device
  python run.py --resume   continue the run in runs/rotten_tomatoes
  python run.py --dataset ./my-reviews.csv --output-dir runs/mine
  python run.py predict runs/rotten_tomatoes "a gorgeous , witty film"
"""

DATA_EXAMPLES = """\
examples:
  python run.py data --demo
  python run.py data --dataset ./my-reviews.csv --max-length 64
"""

# The settings that most runs change, in the order of the help; the others are below them, as advanced ones.
MOST_USED = (
    *("demo", "model", "dataset", "text_column", "label_column", "output_dir", "resume"),
    *("epochs", "batch_size", "learning_rate", "max_length", "device"),
)

# The settings of FILES that change nothing in `data`.
_OF_RUNS_ONLY = ("init", "output_dir", "overwrite", "resume")

# Settings that are a path or a Hub id.
_ID_OR_PATH = ("model", "dataset", "forgetting")

# The commands beside training, each with its module and function, which are imported only when needed.
COMMANDS = {
    "predict": ("ft.cli.predict", "predict"),
    "evaluate": ("ft.cli.evaluate", "evaluate"),
    "explain": ("ft.cli.explain", "explain"),
    "generate": ("ft.cli.generate", "generate"),
    "export": ("ft.cli.export", "export"),
    "report": ("ft.cli.report", "report"),
    "runs": ("ft.cli.runs", "runs"),
}

# The commands that take the flags of a training run; their function gets its `Config`.
RUN_FLAG_COMMANDS = {
    "data": ("ft.cli.describe_data", "describe"),
}

# What the help says of each command.
SUMMARIES = {
    "data": "counts, lengths and duplicates of a data set",
    "predict": "labels of texts, by a fine-tuned model",
    "evaluate": "scores of a model on a split of a data set",
    "explain": "one example on its way through one training step",
    "generate": "the continuation of a prompt",
    "report": "curves, mistakes, settings as one HTML file",
    "runs": "a table of the runs in a directory",
    "export": "a model in another format",
    "help": "the help of a command",
}


@dataclass(frozen=True)
class HelpPage:
    """What --help prints of a command with the flags of a run.

    Attributes:
        command: its name; empty for training.
        description: the first paragraphs.
        examples: as for `CommandParser`.
        settings: the fields of `Config` that are listed; None for all, in their groups.
    """

    command: str
    description: tuple[str, ...]
    examples: str
    settings: tuple[str, ...] | None = None


TRAINING_PAGE = HelpPage(
    "", ("Fine-tune GPT-2 in plain PyTorch; by default to classify film reviews as positive or negative.",), EXAMPLES
)
HELP_PAGES = {
    "data": HelpPage(
        "data",
        (
            "Print class counts, token lengths and duplicates of a data set, before training on it.",
            "The other flags of a run are accepted too, and change nothing here.",
        ),
        DATA_EXAMPLES,
        (
            *(field.name for field in fields(Config) if field.metadata["group"] == FILES),
            *("max_length", "seed"),
        ),
    ),
}

# The value of a flag that was given without one, so that this problem is reported together with all others.
_NO_VALUE = "\0no value"


class _RunParser(CommandParser):
    """A parser that collects problems instead of stopping at the first.

    A flag without its value gets `_NO_VALUE` or an empty list; the help still shows the value as required.
    """

    def __init__(self, page: HelpPage, **options: Any) -> None:  # noqa: ANN401
        super().__init__(page.command, page.description[0], page.examples, add_help=False, **options)
        self._paragraphs += page.description[1:]
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

    def add_paragraph(self, text: str) -> None:
        """Add a paragraph to the description, above the examples."""
        self._paragraphs.append(text)

    def group(self, heading: str) -> "argparse._ArgumentGroup":
        """The group of flags under a heading of the help, added at first use."""
        if heading not in self._groups:
            self._groups[heading] = self.add_argument_group(heading)
        return self._groups[heading]

    def format_help(self) -> str:
        for action in self._takes_value:
            action.nargs = None
        return super().format_help()


class _PrintVersion(argparse.Action):
    """The flag --version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print the versions that a bug report needs, and exit."""
        print(", ".join([f"{name} {_version_of(name)}" for name in ("ft", "torch")] + [f"Python {python_version()}"]))
        parser.exit()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # `ft` runs from a copy of the repository too
        return "(not installed)"


def read_arguments(arguments: Sequence[str], page: HelpPage = TRAINING_PAGE) -> Config:
    """Parse the command line of a training run, or of another command with the same flags and its own help.

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
    parsed, rest = _parser(page).parse_known_args([word for word in words if word not in valued])
    problems += map(_describe_unknown, without_values(rest))
    config_file = vars(parsed).pop("config", None)
    settings: dict[str, Any] = {}
    recorded: dict[str, Any] = {}
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
            recorded = read_config_file(Path(expand_home(config_file)), may_be_pipe=True)
        given, settings = settings, {**recorded, **settings}
        settings = {**base_settings(settings), **settings}
        problems += find_unused_settings(given, recorded, settings)
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


def _parser(page: HelpPage) -> _RunParser:
    """One flag for each field of `Config`; values stay strings, which `parse_value` parses one by one."""
    parser = _RunParser(
        page,
        usage=f"python run.py {page.command or '[COMMAND]'} [FLAG ...]",
        argument_default=argparse.SUPPRESS,
    )
    if page is TRAINING_PAGE:
        parser.add_paragraph(_list_of_commands())
    headings = _headings(page)
    for name in headings:
        if name != "config":
            _add_flag(parser, headings[name], name)
            continue
        text = "read settings from a config.json, such as that of another run"
        parser.add_value(headings[name], "--config", metavar="FILE", help=text)
    others = parser.group("Help")
    others.add_argument("-h", "--help", action="help", help="print this help")
    others.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version, and those of PyTorch")
    return parser


def _headings(page: HelpPage) -> dict[str, str]:
    """The heading of each flag, by the name of its setting, in the order of the help; empty for a hidden one."""
    groups = {name: group for name, group in field_groups().items() if name not in NO_FLAGS}
    if page.settings is not None:
        listed = [name for name in page.settings if name not in _OF_RUNS_ONLY]
        return dict.fromkeys([*listed, "config"], "flags") | {name: "" for name in groups if name not in listed}
    most_used = dict.fromkeys(MOST_USED, "Most used flags")
    advanced = {name: f"Advanced: {group[0].lower()}{group[1:]}" for name, group in groups.items()}
    return most_used | {"config": advanced["model"]} | {n: h for n, h in advanced.items() if n not in most_used}


def _add_flag(parser: _RunParser, heading: str, name: str) -> None:
    """Add the flag of a field of `Config`."""
    kind, choices = field_types(Config)[name]
    default = getattr(Config, name)
    text = field_help()[name]
    if default is not None and kind not in (bool, tuple):
        text += f" (default: {default:g})" if kind is float else f" (default: {default})"
    options: dict[str, Any] = {"help": text.replace("%", "%%") if heading else argparse.SUPPRESS}
    if kind is bool:
        parser.group(heading).add_argument(flag(name), action="store_true", **options)
    elif kind is tuple:
        parser.add_values(heading, flag(name), metavar="PATTERN ...", **options)
    else:
        path = "ID|PATH" if name in _ID_OR_PATH else "FILE" if name == "profile" else "PATH"
        value = path if name in SETTINGS else {int: "N", float: "X", str: "TEXT"}[kind]
        if_absent = NEWEST if name == "resume" else _NO_VALUE
        parser.add_value(heading, flag(name), if_absent=if_absent, metavar="|".join(choices) or value, **options)


def _list_of_commands() -> str:
    """The commands beside training, a line each."""
    names = [name for name in SUMMARIES if name in COMMANDS or name in RUN_FLAG_COMMANDS or name == "help"]
    return "\n".join(["commands:", *(f"  {name:8}  {SUMMARIES[name]}" for name in names)])


def _describe_unknown(argument: str) -> str:
    """The message for an unknown argument, with the nearest flag or command if there is one."""
    flags = [flag(field.name) for field in fields(Config) if field.name not in NO_FLAGS]
    known = ["--config", "--help", "--version", *flags]
    if argument.startswith("-"):
        return describe_unknown_flag(argument, known)
    near = difflib.get_close_matches(argument, [*COMMANDS, *RUN_FLAG_COMMANDS, "help"], n=1)
    answer = f"; is it the command {near[0]}?" if near else ""
    if os.path.isdir(argument):
        answer = f", a directory: --resume {quoted(argument)} continues the run in it, predict uses its model"
    name, equals, value = argument.partition("=")
    if equals and (meant := find_meant_flag(name, known)):  # torchtune's form
        answer = f"; is it --{meant} {shown(value)[1:-1]}?" if " " not in meant else f"; is it --{meant}?"
    return f"unexpected argument {shown(argument)}{answer}"
