"""The command that asks a finished model about texts: `python run.py predict RUN [TEXT ...]`.

What it shares with the command `evaluate` is here too: the flags that say which model is asked, and its loading.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ft.cli.parsers import CommandParser
from ft.errors import FtError, UsageError
from ft.settings import OF_THE_DATA, read_config_file

if TYPE_CHECKING:
    from ft.inference.classifier import Classifier, Prediction


EXAMPLES = """\
examples:
  python run.py predict runs/rotten_tomatoes "a gorgeous , witty film"
  python run.py predict runs/rotten_tomatoes --file reviews.txt --json > answers.jsonl
  cat reviews.txt | python run.py predict runs/rotten_tomatoes
"""

MOST_COLUMNS = 8  # labels up to which each has a column for its probability
LIKELIEST = 3  # labels that are shown where there are more


class ModelParser(CommandParser):
    """A parser with the flags that say which model is asked, and how."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(command, description, examples)
        self.add_argument("model", metavar="RUN", help="a run, a checkpoint, or a folder or Hub id of a GPT-2")
        self.add_argument("--label-names", metavar="TEXT", help="words for the labels, where the model does not tell")
        self.add_argument("--max-length", metavar="N", type=int, help="tokens per text (default: those of the run)")
        self.add_argument("--batch-size", metavar="N", type=int, default=64, help="texts at once (default 64)")
        self.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; left out: the best present")


def predict(arguments: Sequence[str]) -> None:
    """Read the command line and the texts, and print a label and probabilities for each.

    Raises:
        UsageError: the command line is wrong, or there are no texts.
        FtError: the model or the file cannot be read.
    """
    parser = ModelParser("predict", "What a fine-tuned model says of texts.", EXAMPLES)
    parser.add_argument(
        "texts", metavar="TEXT", nargs="*", default=[], help="left out: the lines of --file, or of the input"
    )
    parser.add_argument("--file", metavar="FILE", type=Path, help="a text per line, in UTF-8")
    parser.add_argument("--json", action="store_true", help="a JSON object per line instead of a table")
    options = parser.parse_args(arguments)
    problems = problems_of(options)
    if options.texts and options.file:
        problems.append("give texts or --file, not both")
    if not options.texts and not options.file and (sys.stdin is None or sys.stdin.isatty()):
        problems.append("there are no texts: give them as arguments, by --file FILE, or through a pipe")
    if options.label_names is None and settings_of_run(Path(options.model)).get("completion_column") is not None:
        problems.append(
            f"{options.model} was trained on completions and has no labels: python run.py generate {options.model} "
            '"a text" has it write'
        )
    if problems:
        raise UsageError(*problems)

    texts = options.texts or _lines(options.file)
    classifier = load_named(options)
    started = time.perf_counter()
    predictions = classifier.predict(texts, options.batch_size)
    seconds = time.perf_counter() - started
    if options.json:
        for text, prediction in zip(texts, predictions, strict=True):
            line = {"text": text, "label": prediction.label, "probabilities": prediction.probabilities}
            print(json.dumps(line, ensure_ascii=False))
    else:
        print(_table(texts, predictions, classifier.label_names))
    print(f"{len(texts):,} texts, {len(texts) / seconds:,.1f} texts/s, by {classifier.source}", file=sys.stderr)


def _table(texts: Sequence[str], predictions: Sequence["Prediction"], names: Sequence[str]) -> str:
    """A line for each text: its label, and the probability of each label, of very many that of the likeliest."""
    few = len(names) <= MOST_COLUMNS
    rows = [["label", *(names if few else ["the likeliest"])]]
    for label, probabilities in predictions:
        if few:
            cells = [f"{value:.2%}" for value in probabilities.values()]
        else:
            ranked = sorted(probabilities.items(), key=lambda pair: -pair[1])[:LIKELIEST]
            cells = [", ".join(f"{name} {value:.2%}" for name, value in ranked)]
        rows.append([label, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for (label, *cells), text in zip(rows, ["text", *texts], strict=True):
        aligned = [f"{cell:{'>' if few else '<'}{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *aligned, one_line(text, 80)]))
    return "\n".join(lines)


def one_line(text: str, width: int) -> str:
    """A text on one line of a terminal, of a long one the beginning; what cannot be printed is shown in codes."""
    shown = shorten(text, width, placeholder=" ...")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def problems_of(options: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of `ModelParser`."""
    return [
        f"--{name.replace('_', '-')} is {getattr(options, name)}, it must be at least {least}"
        for name, least in (("batch_size", 1), ("max_length", 2))
        if getattr(options, name) is not None and getattr(options, name) < least
    ]


def load_named(options: argparse.Namespace) -> "Classifier":
    """The model that the command line names."""
    from ft.inference.classifier import load  # here, since --help and a mistake need not wait for PyTorch

    named = options.label_names
    names = None if named is None else [name.strip() for name in named.split(",")]
    return load(options.model, device=options.device, label_names=names, max_length=options.max_length)


def settings_of_run(source: Path) -> dict[str, Any]:
    """What the run that `source` is or lies in says of its data; nothing where it is or lies in none."""
    for folder in (source, source.parent):
        with suppress(UsageError):  # it is no configuration of a run
            settings = read_config_file(folder / "config.json")
            return {name: settings[name] for name in OF_THE_DATA if name in settings}
    return {}


def _lines(path: Path | None) -> list[str]:
    """The lines of a file, or of the standard input.

    Raises:
        FtError: it cannot be read, is no UTF-8, or has no lines.
    """
    name = str(path or "the input")
    try:
        content = path.read_bytes() if path else sys.stdin.buffer.read()
        lines = content.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise FtError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FtError(f"{name} is not UTF-8: {error.reason} in byte {error.start}") from error
    if not lines:
        raise FtError(f"{name} has no lines, so that there is nothing to predict")
    return lines
