"""What the commands share: `python run.py predict`, `evaluate` and the others that `ft/cli/main.py` lists."""

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Never

from ft.errors import UsageError


class CommandParser(argparse.ArgumentParser):
    """A command's parser; its mistakes are told and counted like those of the job."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"python run.py {command}",
            description=f"{description}\n\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """The values of a command line.

        Raises:
            UsageError: something is missing, wrong or unknown; for an unknown flag with the nearest known one.
        """
        options, rest = self.parse_known_args(arguments)
        if rest:
            known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            raise UsageError(
                *[
                    unknown_flag(word, known) if word.startswith("-") else f"{word!r} belongs to no flag"
                    for word in rest
                ]
            )
        return options

    def error(self, message: str) -> Never:
        """Raise what argparse would print; of a number that is none, what the job says of one."""
        if found := re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message, re.DOTALL):
            message = f"{found[1]} is {found[3]}, it must be {'a whole number' if found[2] == 'int' else 'a number'}"
        raise UsageError(message)


def unknown_flag(word: str, known: Sequence[str]) -> str:
    """What to say of a flag that nobody knows, with the nearest of those that are known, if one is near."""
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no flag {name}" + (f", is it {near[0]}?" if near else "; --help lists all flags")
