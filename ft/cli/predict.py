"""The command that asks a finished model about texts: `python run.py predict RUN [TEXT ...]`.

What it shares with the command `evaluate` is here too: the flags that say which model is asked, and its loading.
"""

import argparse
import csv
import io
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.cli.parsers import CommandParser, a_path
from ft.data.text_files import TextFormat, decoded, plain_lines
from ft.errors import FtError, UsageError, is_utf8, one_line, printable, shown
from ft.io.formats import suffix_of
from ft.io.paths import expand_home
from ft.settings import DATA_SETTINGS, read_config_file

if TYPE_CHECKING:
    from ft.inference.classifier import Classifier, Prediction


EXAMPLES = """\
examples:
  python run.py predict runs/rotten_tomatoes "a gorgeous , witty film"
  python run.py predict runs/rotten_tomatoes --file reviews.txt --json > answers.jsonl
  python run.py predict runs/rotten_tomatoes --file reviews.csv --text-column body --output answers.csv
  cat reviews.txt | python run.py predict runs/rotten_tomatoes
"""

MOST_COLUMNS = 8  # labels up to which each has a column for its probability
LIKELIEST = 3  # labels that are shown where there are more


class ModelParser(CommandParser):
    """A parser with the flags that say which model is asked, and how."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(command, description, examples)
        self.add_argument(
            "model", metavar="RUN", type=expand_home, help="a run, a checkpoint, or a folder or Hub id of a GPT-2"
        )
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
    parser.add_argument(
        "--file", metavar="FILE", type=a_path, help="a text per line, or a table: .parquet, .csv, .tsv, .json or .jsonl"
    )
    parser.add_argument("--text-column", metavar="TEXT", help="column of a table; left out: that of the run, or text")
    parser.add_argument("--delimiter", metavar="TEXT", help="what separates the columns of .csv and .tsv files")
    parser.add_argument("--encoding", metavar="TEXT", help="encoding of the file (default: UTF-8)")
    parser.add_argument("--output", metavar="FILE", type=a_path, help="write a row per text there, as .csv or .jsonl")
    parser.add_argument("--json", action="store_true", help="a JSON object per line instead of a table")
    options = parser.parse_args(arguments)
    problems = problems_of(options)
    if options.texts and options.file:
        problems.append("give texts or --file, not both")
    if options.output and options.output.suffix.lower() not in (".csv", ".jsonl"):
        problems.append(f"--output is {str(options.output)!r}, it must end in .csv or .jsonl")
    elif options.output and (options.output.is_dir() or not options.output.parent.is_dir()):
        where = f"it must be the name of a file in a directory that exists, {str(options.output.parent)!r} does not"
        where = "which is a directory: name a file in it" if options.output.is_dir() else where
        problems.append(f"--output is {str(options.output)!r}, {where}")
    if options.file and not suffix_of(options.file.name):
        problems += [
            f"{flag} is of tables, and {str(options.file)!r} is read as lines of text: leave the flag out, or let the "
            "name of a table end in .csv or .tsv"
            for flag, value in (("--text-column", options.text_column), ("--delimiter", options.delimiter))
            if value is not None
        ]
    if not options.texts and not options.file and (sys.stdin is None or sys.stdin.isatty()):
        problems.append("there are no texts: give them as arguments, by --file FILE, or through a pipe")
    if options.label_names is None and settings_of_run(Path(options.model)).get("completion_column") is not None:
        problems.append(
            f"{options.model} was trained on completions and has no labels: python run.py generate {options.model} "
            '"a text" has it write'
        )
    if problems:
        raise UsageError(*problems)

    with asking_memory_advice(options):
        texts = options.texts or _texts_of(options)
        classifier = load_named(options)
        started = time.perf_counter()
        predictions = classifier.predict(texts, options.batch_size)
    seconds = time.perf_counter() - started
    if options.output:
        from ft.io.atomic import atomic_write_text

        write = _as_csv if options.output.suffix.lower() == ".csv" else _as_json_lines
        atomic_write_text(options.output, write(texts, predictions, classifier.label_names))
    elif options.json:
        print(_as_json_lines(texts, predictions, classifier.label_names), end="")
    else:
        print(_table(texts, predictions, classifier.label_names))
    print(
        f"{len(texts):,} texts, {len(texts) / seconds:,.1f} texts/s, by {printable(classifier.source)}", file=sys.stderr
    )


def _as_json_lines(texts: Sequence[str], predictions: Sequence["Prediction"], _: Sequence[str]) -> str:
    """An object for each text, with its row in the input from 0."""
    rows = (
        {"row": row, "text": text, "label": prediction.label, "probabilities": prediction.probabilities}
        for row, (text, prediction) in enumerate(zip(texts, predictions, strict=True))
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _as_csv(texts: Sequence[str], predictions: Sequence["Prediction"], names: Sequence[str]) -> str:
    """A row for each text, with its row in the input from 0, and a column for the probability of each label."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "text", "label", *(f"probability_{name}" for name in names)])
    for row, (text, (label, probabilities)) in enumerate(zip(texts, predictions, strict=True)):
        writer.writerow([row, text, label, *probabilities.values()])
    return file.getvalue()


def _table(texts: Sequence[str], predictions: Sequence["Prediction"], names: Sequence[str]) -> str:
    """A line for each text: its label, and the probability of each label, of very many that of the likeliest."""
    few = len(names) <= MOST_COLUMNS
    rows = [["label", *([one_line(name) for name in names] if few else ["the likeliest"])]]
    for label, probabilities in predictions:
        if few:
            cells = [f"{value:.2%}" for value in probabilities.values()]
        else:
            ranked = sorted(probabilities.items(), key=lambda pair: -pair[1])[:LIKELIEST]
            cells = [", ".join(f"{one_line(name)} {value:.2%}" for name, value in ranked)]
        rows.append([one_line(label), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for (label, *cells), text in zip(rows, ["text", *texts], strict=True):
        aligned = [f"{cell:{'>' if few else '<'}{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *aligned, one_line(text, 80)]))
    return "\n".join(lines)


def problems_of(options: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of `ModelParser`."""
    problems = [
        f"--{name.replace('_', '-')} is {getattr(options, name)}, it must be at least {least}"
        for name, least in (("batch_size", 1), ("max_length", 2))
        if getattr(options, name) is not None and getattr(options, name) < least
    ]
    if options.label_names is not None and not is_utf8(options.label_names):
        problems.append(f"--label-names is {shown(options.label_names)}, it must be valid UTF-8")
    return problems


def load_named(options: argparse.Namespace) -> "Classifier":
    """The model that the command line names."""
    from ft.inference.classifier import load  # here, since --help and a mistake need not wait for PyTorch

    named = options.label_names
    names = None if named is None else [name.strip() for name in named.split(",")]
    return load(options.model, device=options.device, label_names=names, max_length=options.max_length)


def asking_memory_advice(options: argparse.Namespace) -> AbstractContextManager[None]:
    """`ft.advice.explain_out_of_memory` for a model that is asked with the flags of `ModelParser`."""
    from ft.checkpoint.error_hints import explain_out_of_memory  # here for the same reason

    remedy = "a smaller --batch-size or --max-length, a smaller model or another --device"
    return explain_out_of_memory(f"--batch-size {options.batch_size}", remedy)


def settings_of_run(source: Path) -> dict[str, Any]:
    """What the run that `source` is or lies in says of its data; nothing where it is or lies in none."""
    for folder in (source, source.parent):
        with suppress(UsageError):  # it is no configuration of a run
            settings = read_config_file(folder / "config.json")
            return {name: settings[name] for name in DATA_SETTINGS if name in settings}
    return {}


def _texts_of(options: argparse.Namespace) -> list[str]:
    """The texts of --file, which is a table or has one in each line, or of the standard input.

    Raises:
        FtError: it cannot be read, or holds no texts.
    """
    from ft.data.tables import read_texts  # here, as PyTorch is imported there

    path, form = options.file, TextFormat(options.delimiter, options.encoding)
    try:
        if path is not None and suffix_of(path.name):
            column = options.text_column or settings_of_run(Path(options.model)).get("text_column", "text")
            texts, notes = read_texts(path, column, form)
            for note in notes:
                print(f"Note: {note}.", file=sys.stderr)
        else:
            content = path.read_bytes() if path else sys.stdin.buffer.read()
            texts = plain_lines(decoded(content, str(path or "the input"), form.encoding))
    except OSError as error:
        raise FtError(f"cannot read {path or 'the input'}: {error.strerror}") from error
    if not texts:
        raise FtError(f"{path or 'the input'} has no lines, so that there is nothing to predict")
    return texts
