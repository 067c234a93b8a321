"""From a command line to a `Config`: one flag for each field, all problems reported at once."""

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Never

from ft.checks import field_types, flag
from ft.cli.parsers import unknown_flag
from ft.config import NEWEST, NO_FLAGS, Config
from ft.errors import UsageError, shown
from ft.io.paths import expand_home
from ft.settings import build_config, field_groups, field_help, parse_value, read_config_file, run_directory_of

EXAMPLES = """\
examples:
  python run.py                          the published recipe, on the best device present
  python run.py --demo                   the same program without the Hub, in half a minute
  python run.py --resume                 continue where the last run broke off
  python run.py --model ./my-gpt2 --dataset ./my-reviews --output-dir runs/mine
  python run.py data --dataset ./my-reviews.csv        what a run would read
  python run.py predict runs/rotten_tomatoes "a gorgeous , witty film"
  python run.py evaluate runs/rotten_tomatoes --split test
  python run.py explain --demo           one review on its way through one step
  python run.py generate runs/rotten_tomatoes "the film"
  python run.py report runs/rotten_tomatoes     curves, mistakes and settings as one HTML file
"""

# What the program can do besides the job, and the function that does it; imported only when asked for.
COMMANDS = {
    "predict": ("ft.cli.predict", "predict"),
    "evaluate": ("ft.cli.evaluate", "evaluate"),
    "explain": ("ft.cli.main", "explain"),
    "generate": ("ft.cli.generate", "generate"),
    "report": ("ft.cli.report", "report"),
}

# What takes the flags of the job, and does something else with its configuration.
WITH_THE_JOBS_FLAGS = {
    "data": ("ft.cli.describe_data", "describe"),
}

# Stands for a flag that was given without its value, so that this too is told together with everything else.
_NO_VALUE = "\0no value"


class _Parser(argparse.ArgumentParser):
    """An argument parser that collects problems instead of stopping at the first.

    A flag without its value is let through, as `_NO_VALUE` or as an empty list; the help shows the value as required
    all the same.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self._takes_value: list[argparse.Action] = []
        self._groups: dict[str, argparse._ArgumentGroup] = {}

    def add_value(self, heading: str, name: str, *, if_absent: str = _NO_VALUE, **options: Any) -> None:  # noqa: ANN401
        """Add a flag that takes one value, under a heading of the help."""
        action = self.under(heading).add_argument(name, nargs="?", const=if_absent, **options)
        if if_absent == _NO_VALUE:
            self._takes_value.append(action)

    def add_values(self, heading: str, name: str, **options: Any) -> None:  # noqa: ANN401
        """Add a flag that takes one value or several."""
        self._takes_value.append(self.under(heading).add_argument(name, nargs="*", **options))

    def under(self, heading: str) -> "argparse._ArgumentGroup":
        """The flags under a heading of the help."""
        if heading not in self._groups:
            self._groups[heading] = self.add_argument_group(heading)
        return self._groups[heading]

    def format_help(self) -> str:
        for action in self._takes_value:
            action.nargs = None
        return super().format_help()

    def error(self, message: str) -> Never:
        raise UsageError(message)


def read_arguments(arguments: Sequence[str]) -> Config:
    """The configuration that a command line describes.

    A flag given wins over --config FILE, that over what the resumed run or the demo sets, and that over the defaults.

    Raises:
        UsageError: with one sentence for every problem there is.
    """
    words = _with_negative_numbers_joined(arguments)
    switches = {flag(name) for name, (kind, _) in field_types(Config).items() if kind is bool}
    valued = [word for word in words if word.partition("=")[0] in switches and "=" in word]
    problems = [
        f"{word.partition('=')[0]} takes no value, leave {shown(word.partition('=')[2])} out" for word in valued
    ]
    parsed, rest = _parser().parse_known_args([word for word in words if word not in valued])
    # What follows an unknown flag is taken for its value, which is no problem of its own.
    problems += [
        _unknown(argument)
        for before, argument in zip(["", *rest], rest, strict=False)
        if argument.startswith("-") or not before.startswith("-") or "=" in before
    ]
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
        settings = {**_starting_point(settings), **settings}
    except UsageError as error:
        problems += error.problems
    return build_config(settings, problems)


def _with_negative_numbers_joined(arguments: Sequence[str]) -> list[str]:
    """`--flag -1e-3` as `--flag=-1e-3`, since argparse takes most forms of a negative number for a flag."""
    words: list[str] = []
    for word in arguments:
        if words and re.fullmatch(r"--[^=]+", words[-1]) and re.fullmatch(r"-([0-9.]|inf|nan).*", word, re.IGNORECASE):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _starting_point(settings: dict[str, Any]) -> dict[str, Any]:
    """What --resume and --demo put in place of the defaults: the settings of the run that goes on, or the demo's."""
    settings = {name: expand_home(value) for name, value in settings.items()}
    resume = settings.get("resume")
    if not isinstance(settings.get("output_dir", ""), str):
        return {}  # which `Config` refuses
    if resume is not None and resume != NEWEST:
        run = run_directory_of(Path(resume))
        base: dict[str, Any] = {"output_dir": str(run)}
    else:
        run = Path(settings.get("output_dir", Config.output_dir))
        base = {}
    if settings.get("demo"):
        from ft.data.demo import SETTINGS

        base = {**SETTINGS, **base}
        run = Path(settings.get("output_dir", base["output_dir"]))
    if resume is not None and (run / "config.json").is_file():
        return {**base, **read_config_file(run / "config.json"), "output_dir": str(run)}
    return base


def _parser() -> _Parser:
    """One flag for each field of `Config`; values stay text, to be read by `parse_value` one by one."""
    parser = _Parser(
        usage="python run.py [FLAG ...]",
        description=f"Fine-tune GPT-2 to say whether a film review is positive, in plain PyTorch.\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_value(
        next(iter(field_groups().values())),
        "--config",
        metavar="FILE",
        help="take settings from a config.json, such as that of another run",
    )
    for field in fields(Config):
        if field.name in NO_FLAGS:
            continue
        kind, choices = field_types(Config)[field.name]
        text = field_help()[field.name]
        heading = field_groups()[field.name]
        if kind is bool:
            parser.under(heading).add_argument(flag(field.name), action="store_true", help=text)
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


def _unknown(argument: str) -> str:
    """What to say of an argument that nobody knows, with the nearest flag or command if one is near."""
    if not argument.startswith("-"):
        near = difflib.get_close_matches(argument, [*COMMANDS, *WITH_THE_JOBS_FLAGS], n=1)
        return f"{shown(argument)} belongs to no flag" + (f"; the command is {near[0]}" if near else "")
    flags = [flag(field.name) for field in fields(Config) if field.name not in NO_FLAGS]
    return unknown_flag(argument, ["--config", *flags])
