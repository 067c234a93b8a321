"""The commands that ask a finished model: `predict` about texts, `evaluate` about a whole split.

python run.py predict RUN [TEXT ...]
python run.py evaluate RUN --split test
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ft.command import CommandParser
from ft.config import Config
from ft.errors import FtError, UsageError
from ft.settings import OF_THE_DATA, read_config_file

if TYPE_CHECKING:
    from ft.classifier import Classifier

PREDICT_EXAMPLES = """\
examples:
  python run.py predict runs/rotten_tomatoes "a gorgeous , witty film"
  python run.py predict runs/rotten_tomatoes --file reviews.txt --json > answers.jsonl
  cat reviews.txt | python run.py predict runs/rotten_tomatoes
"""


EVALUATE_EXAMPLES = """\
examples:
  python run.py evaluate runs/rotten_tomatoes --split test
  python run.py evaluate ./my-gpt2 --dataset ./my-reviews --json
"""


class _Parser(CommandParser):
    """A parser with the flags that both commands have."""

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
    parser = _Parser("predict", "What a fine-tuned model says of texts.", PREDICT_EXAMPLES)
    parser.add_argument(
        "texts", metavar="TEXT", nargs="*", default=[], help="left out: the lines of --file, or of the input"
    )
    parser.add_argument("--file", metavar="FILE", type=Path, help="a text per line, in UTF-8")
    parser.add_argument("--json", action="store_true", help="a JSON object per line instead of a table")
    options = parser.parse_args(arguments)
    problems = _problems(options)
    if options.texts and options.file:
        problems.append("give texts or --file, not both")
    if not options.texts and not options.file and sys.stdin.isatty():
        problems.append("there are no texts: give them as arguments, by --file FILE, or through a pipe")
    if problems:
        raise UsageError(*problems)

    texts = options.texts or _lines(options.file)
    classifier = _load(options)
    started = time.perf_counter()
    predictions = classifier.predict(texts, options.batch_size)
    seconds = time.perf_counter() - started
    if not options.json:
        print("  ".join(["label".ljust(10), *(name.rjust(8) for name in classifier.label_names), "text"]))
    for text, prediction in zip(texts, predictions, strict=True):
        if options.json:
            line = {"text": text, "label": prediction.label, "probabilities": prediction.probabilities}
            print(json.dumps(line, ensure_ascii=False))
        else:
            shown = [format(value, ".2%").rjust(max(8, len(name))) for name, value in prediction.probabilities.items()]
            print("  ".join([prediction.label.ljust(10), *shown, shorten(text, 80, placeholder=" ...")]))
    print(f"{len(texts):,} texts, {len(texts) / seconds:,.1f} texts/s, by {classifier.source}", file=sys.stderr)


def evaluate(arguments: Sequence[str]) -> None:
    """Read the command line, predict a split of a data set, and print how good that was.

    Raises:
        UsageError: the command line is wrong, or it is not known which data set is meant.
        FtError: the model or the data cannot be read, or do not belong together.
    """
    parser = _Parser("evaluate", "How good a fine-tuned model is on a whole split of a data set.", EVALUATE_EXAMPLES)
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="(default test)")
    parser.add_argument("--dataset", metavar="TEXT", help="Hub id or folder; left out: that of the run")
    parser.add_argument("--dataset-config", metavar="TEXT", help="the folder of one of several data sets in it")
    parser.add_argument("--text-column", metavar="TEXT", help="column of the texts; left out: that of the run")
    parser.add_argument("--label-column", metavar="TEXT", help="column of the labels; left out: that of the run")
    parser.add_argument("--mistakes", metavar="N", type=int, default=5, help="show the N surest mistakes (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args(arguments)
    problems = _problems(options)
    if options.mistakes < 0:
        problems.append(f"--mistakes is {options.mistakes}, it must be at least 0")
    settings = _settings_of(Path(options.model))
    if options.dataset is not None:  # whose revisions and parts are others
        settings = {
            name: value for name, value in settings.items() if name not in ("dataset_revision", "dataset_config")
        }
    given = ("dataset", "dataset_config", "text_column", "label_column")
    settings |= {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    if "dataset" not in settings:
        problems.append(f"{options.model} does not say what it was trained on: name a --dataset")
    if settings.get("completion_column") is not None:
        problems.append(
            f"{options.model} was trained on completions, of which evaluate has no scores: see its metrics.jsonl"
        )
    if problems:
        raise UsageError(*problems)

    import torch  # here, as in `_load`

    from ft.inputs import read_splits
    from ft.scores import scores, told_mistakes

    classifier = _load(options)
    names = classifier.label_names
    splits, notes = read_splits(Config(**settings), names)
    for note in notes:
        print(f"Note: {note}.", file=sys.stderr)
    if options.split not in splits:
        raise FtError(f"{settings['dataset']} has no {options.split} split; it has {', '.join(splits)}")
    split = splits[options.split]
    for row, label in enumerate(split.labels):
        if not 0 <= label < len(names):
            raise FtError(
                f"the label in row {row} of the {split.name} split is {label}, the model knows 0 to {len(names) - 1} "
                f"({', '.join(names)})"
            )
    started = time.perf_counter()
    predictions = classifier.predict(split.texts, options.batch_size)
    seconds = time.perf_counter() - started
    probabilities = torch.tensor([list(each.probabilities.values()) for each in predictions], dtype=torch.float64)
    result = scores(probabilities, torch.tensor(split.labels))
    mistakes = told_mistakes(probabilities, split, names, options.mistakes)
    if options.json:
        print(json.dumps({"split": split.name, "labels": names, **asdict(result), "mistakes": mistakes}, indent=2))
        return
    print(
        f"{split.name}: {len(predictions):,} texts, accuracy {result.accuracy:.2%}, macro F1 {result.macro_f1:.4f}, "
        f"calibration error {result.calibration_error:.2%} ({len(predictions) / seconds:,.1f} texts/s, by "
        f"{classifier.source})\n"
    )
    width = max(9, *map(len, names))
    print("  ".join(["label".ljust(width), "precision", "   recall", "       F1", "    texts"]))
    for i, name in enumerate(names):
        figures = (result.precision[i], result.recall[i])
        count = sum(result.confusion[i])
        print("  ".join([name.ljust(width), *(f"{x:9.2%}" for x in figures), f"{result.f1[i]:9.4f}", f"{count:9,}"]))
    print("\n" + "  ".join(["true, said".ljust(width + 1), *(name.rjust(width) for name in names)]))
    for name, counts in zip(names, result.confusion, strict=True):
        print("  ".join([name.ljust(width + 1), *(f"{count:{width},}" for count in counts)]))
    print("\nstated probability  accuracy      texts")
    for stated, true, count in result.bins:
        print(f"{stated:18.2%}  {true:8.2%}  {count:9,}")
    if mistakes:
        print("\nthe surest mistakes:")
    for each in mistakes:
        text = shorten(str(each["text"]), 90, placeholder=" ...")
        print(f"  {each['label']} ({each['probability']:.1%}, it is {each['true']}): {text}")


def _problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the flags that both commands have."""
    return [
        f"--{name.replace('_', '-')} is {getattr(options, name)}, it must be at least {least}"
        for name, least in (("batch_size", 1), ("max_length", 2))
        if getattr(options, name) is not None and getattr(options, name) < least
    ]


def _load(options: argparse.Namespace) -> "Classifier":
    """The model that the command line names."""
    from ft.classifier import load  # here, since --help and a mistake need not wait for PyTorch

    names = [name.strip() for name in options.label_names.split(",")] if options.label_names else None
    return load(options.model, device=options.device, label_names=names, max_length=options.max_length)


def _settings_of(source: Path) -> dict[str, Any]:
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
