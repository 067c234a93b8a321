"""The command that judges a finished model by a whole split of a data set: `python run.py evaluate RUN`."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.cli.predict import ModelParser, load_named, one_line, problems_of, settings_of_run
from ft.config import Config, flag
from ft.data.tables import listed
from ft.errors import FtError
from ft.evaluation.classification import MOST_COLUMNS, most_confused
from ft.settings import checked

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
CONFUSIONS = 15  # pairs of labels that are shown where there are too many for a matrix


def evaluate(arguments: Sequence[str]) -> None:
    """Read the command line, have the model answer for a split of a data set, and print how good that was.

    Raises:
        UsageError: the command line is wrong, or it is not known which data set is meant.
        FtError: the model or the data cannot be read, or do not belong together.
    """
    parser = ModelParser("evaluate", "How good a fine-tuned model is on a whole split of a data set.", EXAMPLES)
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="(default test)")
    parser.add_argument("--dataset", metavar="TEXT", help="Hub id, folder or file; left out: that of the run")
    parser.add_argument("--dataset-config", metavar="TEXT", help="the folder of one of several data sets in it")
    parser.add_argument("--text-column", metavar="TEXT", help="column of the texts; left out: that of the run")
    parser.add_argument("--label-column", metavar="TEXT", help="column of the labels; left out: that of the run")
    parser.add_argument("--prompt-column", metavar="TEXT", help="column of the prompts; left out: that of the run")
    parser.add_argument(
        "--completion-column", metavar="TEXT", help="judge completions: their column; left out: that of the run"
    )
    parser.add_argument("--mistakes", metavar="N", type=int, default=5, help="show the N worst mistakes (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args(arguments)
    config = _config_of(options)

    from ft.data.load import read_splits  # here, since --help and a mistake need not wait for PyTorch

    classifier = load_named(options)
    splits, notes = read_splits(config, None if config.completion_column else classifier.label_names)
    for note in notes:
        print(f"Note: {note}.", file=sys.stderr)
    if options.split not in splits:
        raise FtError(f"{config.dataset} has no {options.split} split; it has {', '.join(splits)}: name one by --split")
    if config.completion_column is None:
        _judge_labels(classifier, splits[options.split], options)
    else:
        _judge_completions(classifier, splits[options.split], options)


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
    given = ("dataset", "dataset_config", *COLUMNS)
    settings |= {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    if "dataset" not in settings:
        here = "" if Path(options.model).is_dir() else ", which is no folder here,"
        problems.append(f"{options.model}{here} does not say what it was trained on: name a --dataset")
    if settings.get("completion_column") is not None:
        problems += [
            f"{flag(name)} is of labels, and completions are judged here ({settings['completion_column']!r}): leave it "
            "out"
            for name in OF_LABELS
            if getattr(options, name) is not None
        ]
    elif options.prompt_column is not None:
        problems.append(
            f"--prompt-column is {options.prompt_column!r} without --completion-column: give both or neither"
        )
    return checked(settings, problems)


# --- labels -----------------------------------------------------------------------------------------------------------


def _judge_labels(classifier: "Classifier", split: "Split", options: argparse.Namespace) -> None:
    """Print how good the model's labels are."""
    import torch

    from ft.evaluation.classification import mistake_records, scores

    names = classifier.label_names
    _refuse_other_labels(split, names, given=options.label_names is not None)
    started = time.perf_counter()
    predictions = classifier.predict(split.texts, options.batch_size)
    seconds = time.perf_counter() - started
    probabilities = torch.tensor([list(each.probabilities.values()) for each in predictions], dtype=torch.float64)
    result = scores(probabilities, torch.tensor(split.labels))
    mistakes = mistake_records(probabilities, split, names, options.mistakes)
    if options.json:
        print(json.dumps({"split": split.name, "labels": names, **asdict(result), "mistakes": mistakes}, indent=2))
        return
    print(
        f"{split.name}: {len(predictions):,} texts, accuracy {result.accuracy:.2%}, macro F1 {result.macro_f1:.4f}, "
        f"calibration error {result.calibration_error:.2%} ({len(predictions) / seconds:,.1f} texts/s, by "
        f"{classifier.source})\n"
    )
    print(_tables(result, names))
    if mistakes:
        print("\nthe surest mistakes:")
    for each in mistakes:
        text = one_line(str(each["text"]), 90)
        print(f"  {each['label']} ({each['probability']:.1%}, it is {each['true']}): {text}")


def _refuse_other_labels(split: "Split", names: Sequence[str], *, given: bool) -> None:
    """See that a number means the same class to the data as to the model, as far as both have names for it.

    Raises:
        FtError: a label is out of range, or the data have the model's names in another order.
    """
    for row, label in enumerate(split.labels):
        if not 0 <= label < len(names):
            raise FtError(
                f"the label in row {row} of the {split.name} split is {label}, the model knows 0 to {len(names) - 1} "
                f"({listed(names)})"
            )
    told = split.label_names or names
    if not given and list(told) != list(names) and set(told) == set(names):
        raise FtError(
            f"the {split.name} split numbers its labels in the order {listed(told)}, the model in the order "
            f"{listed(names)}: --label-names {','.join(told)} takes that of the data"
        )


def _tables(result: "Scores", names: Sequence[str]) -> str:
    """The scores of each label, which label was taken for which, and whether probabilities mean what they say."""
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
        for pair in most_confused(result.confusion, CONFUSIONS):
            lines.append("  ".join([names[pair.true].ljust(width), names[pair.said].ljust(width), f"{pair.texts:9,}"]))
    lines.append("\nstated probability  accuracy      texts")
    lines += [f"{stated:18.2%}  {true:8.2%}  {count:9,}" for stated, true, count in result.bins]
    return "\n".join(lines)


# --- completions ------------------------------------------------------------------------------------------------------


def _judge_completions(classifier: "Classifier", split: "Split", options: argparse.Namespace) -> None:
    """Print how good the model's completions are."""
    from ft.data.examples import encode
    from ft.evaluation.completions import score_completions, told_failures

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
    failures = told_failures(model, tokenizer, split, examples, judged, options.mistakes)
    if options.json:
        print(json.dumps({"split": split.name, **asdict(result), "mistakes": failures}, indent=2))
        return
    print(f"{_in_words(split.name, result)} ({len(examples) / seconds:,.1f} texts/s, by {classifier.source})")
    if failures:
        print("\nthe worst, by loss per token:")
    for each in failures:
        prompt, right, written = (one_line(str(each[name]), 60) for name in ("prompt", "completion", "written"))
        print(f"  {each['loss']:.2f} ({each['right_tokens']} of {each['tokens']} tokens right): {prompt}")
        print(f"       right:   {right}\n       written: {written}")


def _in_words(split: str, result: "CompletionScores") -> str:
    return (
        f"{split}: {result.completions:,} completions of {result.tokens:,} tokens, loss {result.loss:.4f} nats per "
        f"token, perplexity {result.perplexity:.2f}, {result.accuracy:.2%} of tokens right, {result.exact_match:.2%} "
        "of completions wholly right"
    )
