"""The command `predict`: labels and probabilities from a fine-tuned model: `python run.py predict RUN [TEXT ...]`.

The flags that select and load a model are here too; the command `evaluate` shares them.
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

from ft.cli.parsers import CommandParser, to_path
from ft.data.text_files import TextFormat, decoded, plain_lines
from ft.errors import FtError, UsageError, is_utf8, one_line, printable, shown
from ft.io.atomic import atomic_write_text
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

BASE_HELP = "directory or Hub id of an adapter's base (default: the one that the adapter names)"
MOST_COLUMNS = 8  # up to this many labels each has a column for its probability
LIKELIEST = 3  # of more labels this many are printed


class ModelParser(CommandParser):
    """A parser with the flags that select a model and its device, batch size and length."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(command, description, examples)
        self.add_argument(
            "model",
            metavar="RUN",
            type=expand_home,
            help="a run, a checkpoint, a LoRA adapter, or a directory or Hub id of a GPT-2",
        )
        self.add_argument("--base", metavar="TEXT", type=expand_home, help=BASE_HELP)
        self.add_argument(
            "--label-names", metavar="TEXT", help="label names, comma-separated (default: those saved with the model)"
        )
        self.add_argument("--max-length", metavar="N", type=int, help="tokens per example (default: that of the run)")
        self.add_argument("--batch-size", metavar="N", type=int, default=64, help="examples per batch (default 64)")
        self.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: the best available)")


def predict(arguments: Sequence[str]) -> None:
    """Parse the command line, read the examples, and print a label and probabilities for each.

    Raises:
        UsageError: the command line is wrong, or there are no examples.
        FtError: the model or the file cannot be read.
    """
    parser = ModelParser("predict", "Predict labels with a fine-tuned model.", EXAMPLES)
    parser.add_argument(
        "texts", metavar="TEXT", nargs="*", default=[], help="examples (default: those of --file or standard input)"
    )
    parser.add_argument(
        "--file",
        metavar="FILE",
        type=to_path,
        help="one example per line, or a table: .parquet, .arrow, .csv, .tsv, .json or .jsonl",
    )
    parser.add_argument("--text-column", metavar="TEXT", help="column of a table (default: that of the run, or text)")
    parser.add_argument("--delimiter", metavar="TEXT", help="column delimiter of .csv and .tsv files")
    parser.add_argument("--encoding", metavar="TEXT", help="encoding of the file (default: UTF-8)")
    parser.add_argument("--output", metavar="FILE", type=to_path, help="write one row per example to a .csv or .jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    options = parser.parse_args(arguments)
    problems = find_flag_problems(options)
    if options.texts and options.file:
        problems.append("pass examples or --file, not both")
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
        problems.append("there are no examples: pass them as arguments, with --file FILE, or through a pipe")
    if options.label_names is None and read_run_settings(Path(options.model)).get("completion_column") is not None:
        problems.append(
            f"{options.model} was trained on completions and has no labels: use python run.py generate {options.model} "
            '"a prompt"'
        )
    if problems:
        raise UsageError(*problems)

    with inference_memory_advice(options):
        texts = options.texts or _read_examples(options)
        classifier = load_classifier(options)
        started = time.perf_counter()
        predictions = classifier.predict(texts, options.batch_size)
    seconds = time.perf_counter() - started
    if options.output:
        serialize = _to_csv if options.output.suffix.lower() == ".csv" else _to_json_lines
        atomic_write_text(options.output, serialize(texts, predictions, classifier.label_names))
    elif options.json:
        print(_to_json_lines(texts, predictions, classifier.label_names), end="")
    else:
        print(_table(texts, predictions, classifier.label_names))
    print(
        f"{len(texts):,} examples, {len(texts) / seconds:,.1f} examples/s, by {printable(classifier.source)}",
        file=sys.stderr,
    )


def _to_json_lines(texts: Sequence[str], predictions: Sequence["Prediction"], _: Sequence[str]) -> str:
    """An object for each example, with its row in the input from 0."""
    rows = (
        {"row": row, "text": text, "label": prediction.label, "probabilities": prediction.probabilities}
        for row, (text, prediction) in enumerate(zip(texts, predictions, strict=True))
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _to_csv(texts: Sequence[str], predictions: Sequence["Prediction"], names: Sequence[str]) -> str:
    """A line for each example, with its row in the input from 0, and a column for the probability of each label."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "text", "label", *(f"probability_{name}" for name in names)])
    for row, (text, (label, probabilities)) in enumerate(zip(texts, predictions, strict=True)):
        writer.writerow([row, text, label, *probabilities.values()])
    return file.getvalue()


def _table(texts: Sequence[str], predictions: Sequence["Prediction"], names: Sequence[str]) -> str:
    """A line for each example: its label, and the probability of each label, or of the most probable of many."""
    few = len(names) <= MOST_COLUMNS
    rows = [["label", *([one_line(name) for name in names] if few else ["most probable"])]]
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


def find_flag_problems(options: argparse.Namespace) -> list[str]:
    """A message for each invalid flag of `ModelParser`."""
    problems = [
        f"--{name.replace('_', '-')} is {getattr(options, name)}, it must be at least {least}"
        for name, least in (("batch_size", 1), ("max_length", 2))
        if getattr(options, name) is not None and getattr(options, name) < least
    ]
    if options.label_names is not None and not is_utf8(options.label_names):
        problems.append(f"--label-names is {shown(options.label_names)}, it must be valid UTF-8")
    return problems


def load_classifier(options: argparse.Namespace) -> "Classifier":
    """Load the model that the flags of `ModelParser` select."""
    from ft.inference.classifier import load  # here, so that --help and usage errors do not wait for torch

    names = None
    if options.label_names is not None:
        names = [name.strip() for name in options.label_names.split(",")]
    return load(
        options.model, device=options.device, label_names=names, max_length=options.max_length, base=options.base
    )


def inference_memory_advice(options: argparse.Namespace) -> AbstractContextManager[None]:
    """`explain_out_of_memory` for inference with the flags of `ModelParser`."""
    from ft.checkpoint.error_hints import explain_out_of_memory  # here for the same reason

    remedy = "a smaller --batch-size or --max-length, a smaller model or another --device"
    return explain_out_of_memory(f"--batch-size {options.batch_size}", remedy)


def read_run_settings(source: Path) -> dict[str, Any]:
    """The data settings of the run that `source` is, or is a checkpoint of; empty if it is neither."""
    for directory in (source, source.parent):
        with suppress(UsageError):  # not the config.json of a run
            settings = read_config_file(directory / "config.json")
            return {name: settings[name] for name in DATA_SETTINGS if name in settings}
    return {}


def _read_examples(options: argparse.Namespace) -> list[str]:
    """Read the examples of --file, a table or one per line, or of standard input, one per line.

    Raises:
        FtError: the input cannot be read, or is empty.
    """
    from ft.data.tables import read_texts  # here, since it imports torch

    path, form = options.file, TextFormat(options.delimiter, options.encoding)
    try:
        if path is not None and suffix_of(path.name):
            column = options.text_column or read_run_settings(Path(options.model)).get("text_column", "text")
            texts, notes = read_texts(path, column, form)
            for note in notes:
                print(f"Note: {note}.", file=sys.stderr)
        else:
            content = path.read_bytes() if path else sys.stdin.buffer.read()
            texts = plain_lines(decoded(content, str(path or "standard input"), form.encoding))
    except OSError as error:
        raise FtError(f"cannot read {path or 'standard input'}: {error.strerror}") from error
    if not texts:
        raise FtError(f"{path or 'standard input'} has no lines: there is nothing to predict")
    return texts
