"""The command `predict`: labels and probabilities from a fine-tuned model: `python run.py predict RUN [TEXT ...]`.

The flags that select and load a model are here too; `evaluate`, `generate` and `export` share them.
"""

import argparse
import codecs
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.checks import is_encoding
from ft.cli.output_table import MOST_COLUMNS, ConsoleTable, new_names, open_output
from ft.cli.parsers import CommandParser, to_path
from ft.data.text_files import TextFormat, decoded, plain_lines
from ft.errors import FtError, UsageError, counted, is_utf8, printable, program, quoted, shown
from ft.io.formats import suffix_of
from ft.io.paths import expand_home, find_output_problems
from ft.io.progress import progress_bar
from ft.io.standard_streams import LOADING, print_notes, waiting_line
from ft.settings import DATA_SETTINGS, read_config_file

if TYPE_CHECKING:
    from ft.data.table import Table
    from ft.inference.classifier import Classifier, Prediction


EXAMPLES = """\
examples:
  python run.py predict runs/rotten_tomatoes "a gorgeous , witty film"
  python run.py predict runs/rotten_tomatoes --file reviews.txt --json > answers.jsonl
  python run.py predict runs/rotten_tomatoes --file reviews.csv --text-column body --output answers.csv
  cat reviews.txt | python run.py predict runs/rotten_tomatoes
"""

BASE_HELP = "directory or Hub id of an adapter's base (default: the one that the adapter names)"
CHUNK_OF_BATCHES = 16  # batches of a table that are predicted, sorted by length, before they are written
BLOCK = 2**16  # bytes of lines that are predicted together, at most


def add_model(parser: CommandParser) -> None:
    """Add the argument that names a model, and that for the base of an adapter."""
    parser.add_argument(
        "model",
        metavar="RUN",
        type=expand_home,
        help="a run, a checkpoint, a LoRA adapter, or a directory or Hub id of a GPT-2",
    )
    parser.add_argument("--base", metavar="TEXT", type=expand_home, help=BASE_HELP)


class ModelParser(CommandParser):
    """A parser with the flags that select a model and its device, batch size and length."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(command, description, examples)
        add_model(self)
        self.add_argument(
            "--label-names", metavar="TEXT", help="label names, comma-separated (default: those saved with the model)"
        )
        self.add_argument("--max-length", metavar="N", type=int, help="tokens per example (default: that of the run)")
        self.add_argument("--batch-size", metavar="N", type=int, default=64, help="examples per batch (default: 64)")
        self.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: the best present)")
        self.add_argument("--quiet", action="store_true", help="print the results alone: no bar, notes or speed")


def predict(arguments: Sequence[str]) -> None:
    """Parse the command line, read the examples, and print or write a label and probabilities for each.

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
        "--input",
        metavar="FILE",
        type=to_path,
        help="one example per line, or a table: .parquet, .arrow, .csv, .tsv, .json or .jsonl",
    )
    parser.add_argument("--text-column", metavar="TEXT", help="column of a table (default: that of the run, or text)")
    parser.add_argument("--delimiter", metavar="TEXT", help="column delimiter of .csv and .tsv files")
    parser.add_argument("--encoding", metavar="TEXT", help="encoding of the file (default: UTF-8)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=to_path,
        help="write the table with the predictions as added columns, or a row per line, to a .csv, .tsv, .json, .jsonl "
        "or .parquet",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    options = parser.parse_args(arguments)
    _check_flags(options, parser.problems)
    with inference_memory_advice(options):
        table, total, chunks = _read_chunks(options)
        first = next(chunks, None)  # read before the model is loaded, which takes longer
        if first is None:
            raise FtError(f"{options.file or 'standard input'} has no lines: there is nothing to predict")
        classifier = load_classifier(options)
        count, seconds = _predict_all(classifier, chain([first], chunks), table, total, options)
    if not options.quiet:
        print(
            f"{counted(count, 'example')}, {count / seconds:,.1f} examples/s, by {printable(classifier.source)}",
            file=sys.stderr,
        )


def _check_flags(options: argparse.Namespace, parsing_problems: Sequence[str]) -> None:
    """Check the flags against each other.

    Raises:
        UsageError: with one sentence for each problem.
    """
    problems = [*parsing_problems, *find_flag_problems(options)]
    problems += [
        f"text {number} is not UTF-8: it holds {match[0]!r} at character {match.start()}"
        for number, text in enumerate(options.texts, start=1)
        if (match := re.search("[\ud800-\udfff]", text))
    ]
    if options.file and not options.texts and not options.file.exists():
        problems.append(f"cannot read {options.file}: No such file")
    is_table = options.file is not None and suffix_of(options.file.name)
    if options.texts and options.file:
        problems.append("pass examples or --file, not both")
    if options.output:
        problems += find_output_problems(options.output, [*model_paths(options), *filter(None, [options.file])])
        if options.json:
            problems.append("--json prints the predictions that --output writes: leave one out")
    if not is_table:
        read = f"{str(options.file)!r} is read as lines of text" if options.file else "there is no --file"
        problems += [
            f"{flag} is of tables, and {read}: leave the flag out, or let the name of a table end in .csv or .tsv"
            for flag, value in (("--text-column", options.text_column), ("--delimiter", options.delimiter))
            if value is not None
        ]
    if options.texts and options.encoding is not None:
        problems.append("--encoding is of files, and the examples are arguments: leave it out")
    elif options.encoding is not None and not is_encoding(options.encoding):
        problems.append(f"--encoding is {shown(options.encoding)}, it must be an encoding of text, such as cp1252")
    if not options.texts and not options.file and (sys.stdin is None or sys.stdin.isatty()):
        problems.append("there are no examples: pass them as arguments, with --file FILE, or through a pipe")
    if options.label_names is None and read_run_settings(Path(options.model)).get("completion_column") is not None:
        problems.append(
            f"{options.model} was trained on completions and has no labels: use {program()} generate "
            f'{quoted(options.model)} "a prompt"'
        )
    if problems:
        raise UsageError(*problems)


Chunk = list[str | None]


def _predict_all(
    classifier: "Classifier",
    chunks: Iterator[Chunk],
    table: "Table | None",
    total: int | None,
    options: argparse.Namespace,
) -> tuple[int, float]:
    """Predict chunk by chunk, and print or write each; returns the number of examples and the seconds of predicting."""
    from ft.data.examples import length_of

    names = classifier.label_names
    prints_to_terminal = not options.output and sys.stdout.isatty()  # where the predictions show the progress
    count, seconds = 0, 0.0
    missing: list[int] = []
    blank: list[int] = []
    lengths: list[int] = []
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(total, "example", quiet=options.quiet or prints_to_terminal))
        write = stack.enter_context(_open_answers(options, table, names))
        for texts in chunks:
            present = [text for text in texts if text is not None]
            started = time.perf_counter()
            examples = classifier.encode(present)
            predictions = iter(classifier.predict_examples(examples, options.batch_size))
            seconds += time.perf_counter() - started
            lengths += map(length_of, examples)
            write(count, texts, [None if text is None else next(predictions) for text in texts])
            missing += [row for row, text in enumerate(texts, start=count) if text is None]
            blank += [row for row, text in enumerate(texts, start=count) if text is not None and not text.strip()]
            count += len(texts)
            bar.update(len(texts))
    print_notes(classifier.describe_cut(lengths), quiet=options.quiet)
    for rows, what in ((missing, "missing: no prediction"), (blank, "blank: the label there is that of no text")):
        if rows and table is not None:
            print_notes([f"the text in {table.where(rows)} is {what}"], quiet=options.quiet)
    return count, seconds


@contextmanager
def _open_answers(
    options: argparse.Namespace, table: "Table | None", names: Sequence[str]
) -> Iterator[Callable[[int, Chunk, "Sequence[Prediction | None]"], None]]:
    """A function that prints or writes the predictions of a chunk, whose first row has the number that it gets."""
    if options.output is None:
        printed = ConsoleTable(names)
        yield _print_json_lines if options.json else lambda _, texts, predictions: printed.print(texts, predictions)
        return
    if table is None:
        is_json = options.output.suffix.lower() in (".json", ".jsonl")
        columns = ["row", "text", "label", *(["probabilities"] if is_json else _probability_names(names))]
    else:
        wanted = ["predicted", "probability", *(_probability_names(names) if len(names) <= MOST_COLUMNS else [])]
        columns = new_names(table.names, wanted, str(table.path), quiet=options.quiet)
    with open_output(options.output, columns, table) as writer:

        def write(first: int, texts: Chunk, predictions: "Sequence[Prediction | None]") -> None:
            rows: list[list[Any]] = []
            for row, (text, prediction) in enumerate(zip(texts, predictions, strict=True), start=first):
                if prediction is None:
                    rows.append([None] * len(columns))
                    continue
                label, probabilities = prediction
                if table is not None:
                    rows.append([label, probabilities[label], *probabilities.values()][: len(columns)])
                else:
                    values = [probabilities] if columns[-1] == "probabilities" else probabilities.values()
                    rows.append([row, text, label, *values])
            writer.write(rows)

        yield write


def _probability_names(names: Sequence[str]) -> list[str]:
    return [f"probability_{name}" for name in names]


def _print_json_lines(first: int, texts: Chunk, predictions: "Sequence[Prediction | None]") -> None:
    """Print an object for each example, with its row in the input from 0."""
    for row, (text, prediction) in enumerate(zip(texts, predictions, strict=True), start=first):
        label, probabilities = prediction or (None, None)
        record = {"row": row, "text": text, "label": label, "probabilities": probabilities}
        print(json.dumps(record, ensure_ascii=False))
    sys.stdout.flush()


def model_paths(options: argparse.Namespace) -> list[Path]:
    """The directories that the flags of `ModelParser` read, if they are directories and not on the Hub."""
    return [Path(name) for name in (options.model, options.base) if name is not None]


def find_flag_problems(options: argparse.Namespace) -> list[str]:
    """A message for each invalid flag of `ModelParser`."""
    problems = [
        f"--{name.replace('_', '-')} is {getattr(options, name)}, it must be at least {least}"
        for name, least in (("batch_size", 1), ("max_length", 2))
        if getattr(options, name, None) is not None and getattr(options, name) < least
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
    with waiting_line(LOADING, quiet=options.quiet):
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


def _read_chunks(options: argparse.Namespace) -> tuple["Table | None", int | None, Iterator[Chunk]]:
    """The table of --file, if it is one; the number of texts, if it is known; and the texts in chunks.

    Raises:
        FtError: the input cannot be read, also while the chunks are.
    """
    from ft.data.tables import read_table  # here, since it imports torch

    path, form = options.file, TextFormat(options.delimiter, options.encoding)
    if options.texts:
        return None, len(options.texts), iter([options.texts])
    if path is None or not suffix_of(path.name):
        return None, None, _read_lines(path, form.encoding)
    try:
        column = options.text_column or read_run_settings(Path(options.model)).get("text_column", "text")
        table, texts = read_table(path, column, form)
    except OSError as error:
        raise FtError(f"cannot read {path}: {error.strerror}") from error
    except UsageError as error:
        if options.text_column is not None or Path(options.model).is_dir():
            raise
        unknown = f"{options.model} is not a directory here, so its text column is unknown: check RUN, or --text-column"
        raise UsageError(*error.problems, unknown) from error
    print_notes(table.notes, quiet=options.quiet)
    step = CHUNK_OF_BATCHES * options.batch_size
    return table, len(texts), (texts[first : first + step] for first in range(0, len(texts), step))


def _read_lines(path: Path | None, encoding: str | None) -> Iterator[Chunk]:
    """The lines of a file or of standard input, as they come.

    Raises:
        FtError: the input cannot be read, or is not text.
    """
    name = str(path or "standard input")
    try:
        with path.open("rb") if path else nullcontext(sys.stdin.buffer) as file:
            pending, before, is_first = b"", 0, True
            while block := file.read1(BLOCK):  # type: ignore[union-attr]  # what is there, without waiting for more
                pending += block
                if is_first and (encoding is not None or pending[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    pending += file.read()  # a line break may be other bytes
                    break
                complete, newline, pending = pending.rpartition(b"\n")
                if newline:
                    yield list(plain_lines(decoded(complete + newline, name, encoding, lines_before=before)))
                    before, is_first = before + complete.count(b"\n") + 1, False
            if pending:
                yield list(plain_lines(decoded(pending, name, encoding, lines_before=before)))
    except OSError as error:
        raise FtError(f"cannot read {name}: {error.strerror}") from error
