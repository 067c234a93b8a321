"""The command that judges a finished model by a whole split of a data set: `python run.py evaluate RUN`."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.checks import flag
from ft.cli.predict import ModelParser, asking_memory_advice, load_named, problems_of, settings_of_run
from ft.config import Config
from ft.data.tables import listed
from ft.errors import FtError, one_line, printable, shown
from ft.evaluation.classification import MOST_COLUMNS, most_confused
from ft.settings import build_config

if TYPE_CHECKING:
    from ft.data.splits import Split
    from ft.evaluation.classification import Scores
    from ft.evaluation.completions import CompletionScores
    from ft.inference.classifier import Classifier


EXAMPLES = """\
examples:
  python run.py evaluate runs/rotten_tomatoes --split test
  python run.py evaluate ./my-gpt2 --dataset ./my-reviews --json
  python run.py evaluate runs/faq --mistakes 20        a run on completions: perplexity, and where it is wrong
"""

OF_LABELS = ("text_column", "label_column", "label_names")
OF_COMPLETIONS = ("prompt_column", "completion_column")
COLUMNS = ("text_column", "label_column", *OF_COMPLETIONS)
OF_TEXT_FILES = ("delimiter", "encoding")
CONFUSIONS = 15  # pairs of labels that are shown where there are too many for a matrix


def evaluate(arguments: Sequence[str]) -> None:
    """Read the command line, have the model answer for a split of a data set, and print how good that was.

    Raises:
        UsageError: the command line is wrong, or it is not known which data set is meant.
        FtError: the model or the data cannot be read, or do not belong together.
    """
    parser = ModelParser("evaluate", "How good a fine-tuned model is on a whole split of a data set.", EXAMPLES)
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test", "all"),
        help="left out: test, else validation, else train; a file of your own is judged whole",
    )
    parser.add_argument("--dataset", metavar="TEXT", help="Hub id, folder or file; left out: that of the run")
    parser.add_argument("--dataset-config", metavar="TEXT", help="the folder of one of several data sets in it")
    parser.add_argument("--text-column", metavar="TEXT", help="column of the texts; left out: that of the run")
    parser.add_argument("--label-column", metavar="TEXT", help="column of the labels; left out: that of the run")
    parser.add_argument("--prompt-column", metavar="TEXT", help="column of the prompts; left out: that of the run")
    parser.add_argument(
        "--completion-column", metavar="TEXT", help="judge completions: their column; left out: that of the run"
    )
    parser.add_argument("--delimiter", metavar="TEXT", help="what separates the columns of .csv and .tsv files")
    parser.add_argument("--encoding", metavar="TEXT", help="encoding of text files (default: UTF-8)")
    parser.add_argument("--mistakes", metavar="N", type=int, default=5, help="show the N worst mistakes (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args(arguments)
    config = _config_of(options)

    with asking_memory_advice(options):
        _evaluate(config, options)


def _evaluate(config: Config, options: argparse.Namespace) -> None:
    """Load the model, read the data, and print how good the answers are."""
    from ft.data.evaluation_splits import (
        read_evaluation_splits,
    )  # here, since --help and a mistake need not wait for PyTorch

    classifier = load_named(options)
    names = None if config.completion_column else classifier.label_names
    splits, notes = read_evaluation_splits(config, options.split, names, of_run=options.dataset is None)
    for note in notes:
        print(f"Note: {printable(note)}.", file=sys.stderr)
    judge = _judge_labels if config.completion_column is None else _judge_completions
    results = {}
    for number, split in enumerate(splits.values()):
        if number and not options.json:
            print()
        results[split.name] = judge(classifier, split, options)
    if options.json:
        print(json.dumps(results if options.split == "all" else results[split.name], indent=2))


def _config_of(options: argparse.Namespace) -> Config:
    """The settings that say which data are read: those of the run, and in their place what the command line says.

    Raises:
        UsageError: with one sentence for each thing that is wrong.
    """
    problems = problems_of(options)
    if options.mistakes < 0:
        problems.append(f"--mistakes is {options.mistakes}, it must be at least 0")
    settings: dict[str, Any] = settings_of_run(Path(options.model))
    if options.dataset is not None:  # whose revision, parts and fractions are others
        settings = {name: value for name, value in settings.items() if name in COLUMNS}
    given = ("dataset", "dataset_config", *COLUMNS, *OF_TEXT_FILES)
    settings |= {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    if "dataset" not in settings:
        here = "" if Path(options.model).is_dir() else ", which is no folder here,"
        problems.append(f"{options.model}{here} does not say what it was trained on: name a --dataset")
    if settings.get("completion_column") is not None:
        problems += [
            f"{flag(name)} is of labels, and completions are judged here ({shown(settings['completion_column'])}): "
            "leave it out"
            for name in OF_LABELS
            if getattr(options, name) is not None
        ]
    elif options.prompt_column is not None:
        problems.append(
            f"--prompt-column is {shown(options.prompt_column)} without --completion-column: give both or neither"
        )
    return build_config(settings, problems)


# --- labels -----------------------------------------------------------------------------------------------------------


def _judge_labels(classifier: "Classifier", split: "Split", options: argparse.Namespace) -> dict[str, Any]:
    """How good the model's labels are; printed as tables where no JSON is asked for."""
    import torch

    from ft.evaluation.classification import mistake_records, scores

    names = classifier.label_names
    split = _in_the_models_order(split, names, were_given=options.label_names is not None)
    started = time.perf_counter()
    predictions = classifier.predict(split.texts, options.batch_size)
    seconds = time.perf_counter() - started
    probabilities = torch.tensor([list(each.probabilities.values()) for each in predictions], dtype=torch.float64)
    result = scores(probabilities, torch.tensor(split.labels))
    mistakes = mistake_records(probabilities, split, names, options.mistakes)
    told = {"split": split.name, "labels": names, **asdict(result), "mistakes": mistakes}
    if options.json:
        return told
    print(
        f"{split.name}: {len(predictions):,} texts, accuracy {result.accuracy:.2%}, macro F1 {result.macro_f1:.4f}, "
        f"calibration error {result.calibration_error:.2%} ({len(predictions) / seconds:,.1f} texts/s, by "
        f"{printable(classifier.source)})\n"
    )
    print(_tables(result, names))
    if mistakes:
        print("\nthe surest mistakes:")
    for each in mistakes:
        said, true = (one_line(str(each[name])) for name in ("label", "true"))
        print(f"  {said} ({each['probability']:.1%}, it is {true}): {one_line(str(each['text']), 90)}")
    return told


def _in_the_models_order(split: "Split", names: Sequence[str], *, were_given: bool) -> "Split":
    """The split with its labels numbered as the model's, by their names where both have some.

    Raises:
        FtError: a label is not among those of the model.
    """
    from ft.data.load import renumber
    from ft.data.tables import WHOLE_NUMBER

    told = split.label_names
    split = renumber(split, names)
    if told is not None and not set(told) & set(names):
        print(
            f"Note: the data call their labels {listed(told)}, the model {listed(names)}: they are matched by number.",
            file=sys.stderr,
        )
    # Of a model whose labels are numbers, such as stars from 1 to 5, a number is a name and no place in their order.
    are_names = told is None and not were_given and all(map(WHOLE_NUMBER.fullmatch, names))
    for row, label in enumerate(split.labels):
        if are_names or not 0 <= label < len(names):
            known = listed(names) if are_names else f"0 to {len(names) - 1} ({listed(names)})"
            raise FtError(f"the label in row {row} of the {split.name} split is {label}, the model knows {known}")
    return split


def _tables(result: "Scores", names: Sequence[str]) -> str:
    """The scores of each label, which label was taken for which, and whether probabilities mean what they say."""
    names = [one_line(name) for name in names]
    width = max(9, *map(len, names))
    lines = ["  ".join(["label".ljust(width), "precision", "   recall", "       F1", "    texts"])]
    for i, name in enumerate(names):
        figures = (result.precision[i], result.recall[i])
        count = sum(result.confusion[i])
        cells = (*(f"{x:9.2%}" for x in figures), f"{result.f1[i]:9.4f}", f"{count:9,}")
        lines.append("  ".join([name.ljust(width), *cells]))
    lines.append("")
    if len(names) <= MOST_COLUMNS:
        lines.append("  ".join(["true, said".ljust(width + 1), *(name.rjust(width) for name in names)]))
        for name, counts in zip(names, result.confusion, strict=True):
            lines.append("  ".join([name.ljust(width + 1), *(f"{count:{width},}" for count in counts)]))
    else:
        lines.append("  ".join(["true".ljust(width), "said".ljust(width), "    texts"]))
        for true, predicted, examples in most_confused(result.confusion, CONFUSIONS):
            lines.append("  ".join([names[true].ljust(width), names[predicted].ljust(width), f"{examples:9,}"]))
    lines.append("\nstated probability  accuracy      texts")
    lines += [f"{stated:18.2%}  {true:8.2%}  {count:9,}" for stated, true, count in result.bins]
    return "\n".join(lines)


# --- completions ------------------------------------------------------------------------------------------------------


def _judge_completions(classifier: "Classifier", split: "Split", options: argparse.Namespace) -> dict[str, Any]:
    """How good the model's completions are; printed where no JSON is asked for."""
    from ft.data.examples import encode
    from ft.evaluation.completions import failure_records, score_completions

    model, tokenizer = classifier.model, classifier.tokenizer
    examples = encode(split, tokenizer, [], classifier.max_length)
    whole = tokenizer.encode_batch_fast(split.completions or [], add_special_tokens=False)
    cut = sum(len(each.ids) >= len(example.target_ids) for each, example in zip(whole, examples, strict=True))
    if cut:
        print(
            f"Note: {cut:,} completions are longer than --max-length {classifier.max_length} and judged by their ends.",
            file=sys.stderr,
        )
    started = time.perf_counter()
    judged = score_completions(model, examples, options.batch_size)
    seconds = time.perf_counter() - started
    result = judged.scores()
    failures = failure_records(model, tokenizer, split, examples, judged, options.mistakes)
    told = {"split": split.name, **asdict(result), "mistakes": failures}
    if options.json:
        return told
    print(
        f"{_in_words(split.name, result)} ({len(examples) / seconds:,.1f} texts/s, by {printable(classifier.source)})"
    )
    if failures:
        print("\nthe worst, by loss per token:")
    for each in failures:
        prompt, right, written = (one_line(str(each[name])) for name in ("prompt", "completion", "written"))
        print(f"  {each['loss']:.2f} ({each['right_tokens']} of {each['tokens']} tokens right): {prompt}")
        print(f"       right:   {right}\n       written: {written}")
    return told


def _in_words(split: str, result: "CompletionScores") -> str:
    return (
        f"{split}: {result.completions:,} completions of {result.tokens:,} tokens, loss {result.loss:.4f} nats per "
        f"token, perplexity {result.perplexity:.2f}, {result.accuracy:.2%} of tokens right, {result.exact_match:.2%} "
        "of completions wholly right"
    )
