"""The command `evaluate`: scores of a fine-tuned model on a split of a data set: `python run.py evaluate RUN`."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.checkpoint.saved_task import read_task
from ft.checks import flag
from ft.cli.parsers import to_path
from ft.cli.predict import (
    ModelParser,
    find_flag_problems,
    inference_memory_advice,
    load_classifier,
    model_paths,
    read_run_settings,
)
from ft.config import Config
from ft.data.dataset_files import SPLITS, dataset_files
from ft.data.table import listed
from ft.errors import FtError, counted, one_line, printable, shown
from ft.io.paths import expand_home, find_output_problems
from ft.io.progress import progress_bar
from ft.settings import build_config

if TYPE_CHECKING:
    from ft.data.splits import Split
    from ft.evaluation.completions import CompletionScores
    from ft.inference.classifier import Classifier


EXAMPLES = """\
examples:
  python run.py evaluate runs/rotten_tomatoes --split test
  python run.py evaluate ./my-gpt2 --dataset ./my-reviews --json
  python run.py evaluate runs/faq --mistakes 20        a run on completions: perplexity and the worst completions
"""

LABEL_SETTINGS = ("text_column", "label_column", "label_names")
COLUMNS = ("text_column", "label_column", "prompt_column", "completion_column")
FORMAT_SETTINGS = ("delimiter", "encoding")


def evaluate(arguments: Sequence[str]) -> None:
    """Parse the command line, predict a split of a data set, and print the scores.

    Raises:
        UsageError: the command line is wrong, or no data set is given.
        FtError: the model or the data cannot be read, or do not fit each other.
    """
    parser = ModelParser("evaluate", "Evaluate a fine-tuned model on a split of a data set.", EXAMPLES)
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test", "all"),
        help="which rows (default: test, else validation, else train; of a single file all rows)",
    )
    parser.add_argument("--dataset", metavar="ID|PATH", help="Hub id, directory or file (default: that of the run)")
    parser.add_argument("--dataset-config", metavar="TEXT", help="name of one of several configurations of a data set")
    parser.add_argument("--text-column", metavar="TEXT", help="column of the input text (default: that of the run)")
    parser.add_argument("--label-column", metavar="TEXT", help="column of the labels (default: that of the run)")
    parser.add_argument("--prompt-column", metavar="TEXT", help="column of the prompts (default: that of the run)")
    parser.add_argument(
        "--completion-column", metavar="TEXT", help="score completions in this column (default: that of the run)"
    )
    parser.add_argument("--delimiter", metavar="TEXT", help="column delimiter of .csv and .tsv files")
    parser.add_argument("--encoding", metavar="TEXT", help="encoding of text files (default: UTF-8)")
    parser.add_argument(
        "--skip-empty", action="store_true", help="leave out rows without a text, label or completion, or a blank one"
    )
    parser.add_argument(
        "--mistakes", metavar="N", type=int, default=5, help="print the N most confident errors (default: 5)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=to_path,
        help="also write each text with its label, prediction and probabilities to a .csv, .tsv, .json, .jsonl or "
        ".parquet",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(arguments)
    config = _build_config(options, parser.problems)

    with inference_memory_advice(options):
        _evaluate(config, options)


def _evaluate(config: Config, options: argparse.Namespace) -> None:
    """Load the model, read the data, and print the scores of each split."""
    from ft.cli.output_table import open_output
    from ft.data.evaluation_splits import read_evaluation_splits

    classifier = load_classifier(options)
    names = None if config.completion_column else classifier.label_names
    splits, notes = read_evaluation_splits(config, options.split, names, of_run=options.dataset is None)
    for note in () if options.quiet else notes:
        print(f"Note: {printable(note)}.", file=sys.stderr)
    evaluate_split = _evaluate_labels if config.completion_column is None else _evaluate_completions
    results = {}
    rows: list[dict[str, Any]] = []
    for number, split in enumerate(splits.values()):
        if number and not options.json:
            print()
        results[split.name], of_split = evaluate_split(classifier, split, options)
        rows += of_split
    if options.output is not None:
        with open_output(options.output, list(rows[0])) as writer:
            writer.write([list(row.values()) for row in rows])
        if not options.quiet:
            print(f"{len(rows):,} rows are written to {printable(str(options.output))}.", file=sys.stderr)
    if options.json:
        print(json.dumps(results if options.split == "all" else results[split.name], indent=2))


def _build_config(options: argparse.Namespace, parsing_problems: Sequence[str]) -> Config:
    """The data settings: those of the run, overridden by the command line.

    Raises:
        UsageError: with one sentence for each problem.
    """
    problems = [*parsing_problems, *find_flag_problems(options)]
    if options.mistakes < 0:
        problems.append(f"--mistakes is {options.mistakes}, it must be at least 0")
    settings: dict[str, Any] = read_run_settings(Path(options.model))
    if options.dataset is not None:  # the run's revision and configuration are those of its own data set
        settings = {name: value for name, value in settings.items() if name in COLUMNS}
    flags = ("dataset", "dataset_config", *COLUMNS, *FORMAT_SETTINGS)
    settings |= {name: getattr(options, name) for name in flags if getattr(options, name) is not None}
    if options.skip_empty:
        settings["skip_empty"] = True
    if options.output is not None:
        problems += find_output_problems(options.output, [*model_paths(options), *_local_files(settings)])
    if "dataset" not in settings:
        problems.append(
            f"{options.model} does not record its training data: pass a --dataset"
            if Path(options.model).is_dir()
            else f"{options.model} is not a directory here, and a model on the Hub does not record its training data: "
            "correct the name, or pass a --dataset"
        )
    if settings.get("completion_column") is not None:
        problems += [
            f"{flag(name)} is for labels, but the completions of {shown(settings['completion_column'])} are evaluated: "
            "leave it out"
            for name in LABEL_SETTINGS
            if getattr(options, name) is not None
        ]
    elif options.prompt_column is not None:
        problems.append(
            f"--prompt-column is {shown(options.prompt_column)} without --completion-column: pass both or neither"
        )
    return build_config(settings, problems)


def _local_files(settings: Mapping[str, Any]) -> list[Path]:
    """All files of the data set that the settings name, if it is not on the Hub."""
    path = Path(expand_home(settings.get("dataset", "")))
    found = [path] if path.is_file() else []
    for split in sorted(set(SPLITS.values())) if path.is_dir() else ():
        with suppress(FtError):  # which reading the data raises again
            for files in dataset_files(str(path), part=settings.get("dataset_config"), first_of=(split,)).values():
                found += files
    return found


# --- labels -----------------------------------------------------------------------------------------------------------


def _evaluate_labels(
    classifier: "Classifier", split: "Split", options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The scores of the predicted labels, printed as tables unless --json; and a row of --output for each example."""
    import torch

    from ft.cli.output_table import evaluation_rows
    from ft.evaluation.classification import majority_label, read_majority_label, score_record, score_tables, scores

    names = classifier.label_names
    split = _renumber_labels(classifier, split, were_given=options.label_names is not None, quiet=options.quiet)
    started = time.perf_counter()
    with progress_bar(len(split.texts), "example", quiet=options.quiet) as bar:
        predictions = classifier.predict(split.texts, options.batch_size, bar.update)
    seconds = time.perf_counter() - started
    for note in () if options.quiet else classifier.describe_cut(classifier.count_tokens(split.texts)):
        print(f"Note: {note}.", file=sys.stderr)
    rows = [list(prediction.probabilities.values()) for prediction in predictions]
    probabilities = torch.tensor(rows, dtype=torch.float64)
    result = scores(probabilities, torch.tensor(split.labels))
    majority = read_majority_label(Path(classifier.source).parent, names)
    if majority is None:
        if not options.quiet:
            print(
                "Note: the most frequent training label is not known; the majority baseline is that of the most "
                f"frequent label of the {split.name} split.",
                file=sys.stderr,
            )
        majority = majority_label(split.labels)
    record = score_record(probabilities, split, names, [majority], options.mistakes)
    output = evaluation_rows(split, names, predictions)
    if options.json:
        return record, output
    mistakes, baseline = record["mistakes"], record["majority_baseline"]
    print(
        f"{split.name}: {counted(len(predictions), 'example')}, accuracy {result.accuracy:.2%}, macro F1 "
        f"{result.macro_f1:.4f}, calibration error {result.calibration_error:.2%}"
        f"{_speed(len(predictions) / seconds, classifier.source, quiet=options.quiet)}\n"
        f"Majority baseline, always {one_line(names[majority])}: accuracy {baseline:.2%}"
        + ("\n" if result.accuracy > baseline else ", which the model does not beat\n")
    )
    print(score_tables(result, names))
    if mistakes:
        print("\nmost confident errors:")
    for mistake in mistakes:
        label, true = (one_line(str(mistake[name])) for name in ("predicted", "true"))
        place = _place(mistake, several_files=len(split.files) > 1)
        text = one_line(str(mistake["text"]), 90)
        print(f"  {label} ({mistake['probability']:.1%}, true label {true}, {place}): {text}")
    return record, output


def _speed(rate: float, source: str, *, quiet: bool) -> str:
    """The end of the line with the scores: the examples per second, which are not part of the result."""
    return "" if quiet else f" ({rate:,.1f} examples/s, by {printable(source)})"


def _place(record: Mapping[str, object], *, several_files: bool) -> str:
    """The place of a row in a few words: its line, else its row, and its file if there are several."""
    line = record.get("line")
    place = f"row {record['row']}" if line is None else f"line {line}"
    return f"{place} of {one_line(str(record['file']))}" if several_files else place


def _number_by(split: "Split", places: dict[int, int]) -> "Split":
    """Replace the labels of a split by their `places` among the labels of the model.

    Raises:
        FtError: the model does not have a label of the split.
    """
    for row, label in enumerate(split.labels):
        if label not in places:
            known = listed(list(map(str, places)))
            raise FtError(f"the label in {split.where(row)} is {label}, the model has {known}: correct the data")
    return replace(split, labels=[places[label] for label in split.labels])


def _renumber_labels(classifier: "Classifier", split: "Split", *, were_given: bool, quiet: bool) -> "Split":
    """Number the labels of a split as the model does, by their names if both have names.

    Raises:
        FtError: the model does not have a label of the split.
    """
    from ft.data.load import renumber
    from ft.data.tables import WHOLE_NUMBER

    names, data_names = classifier.label_names, split.label_names
    numbers = read_task(classifier.published).label_numbers
    if numbers is not None and data_names is None and not were_given:
        return _number_by(split, {number: place for place, number in enumerate(numbers)})
    split = renumber(split, names)
    if data_names is not None and not set(data_names) & set(names) and not quiet:
        print(
            f"Note: the labels of the data are {listed(data_names)}, those of the model {listed(names)}: they are "
            "matched by number.",
            file=sys.stderr,
        )
    # If the model's label names are numbers, such as stars from 1 to 5, a number is a name and not an index.
    are_names = data_names is None and not were_given and all(map(WHOLE_NUMBER.fullmatch, names))
    if are_names:
        return _number_by(split, {int(name): place for place, name in enumerate(names)})
    for row, label in enumerate(split.labels):
        if not 0 <= label < len(names):
            known = f"0 to {len(names) - 1} ({listed(names)})"
            raise FtError(f"the label in {split.where(row)} is {label}, the model has {known}")
    return split


# --- completions ------------------------------------------------------------------------------------------------------


def _evaluate_completions(
    classifier: "Classifier", split: "Split", options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The scores of the completions, printed unless --json; and a row of --output for each example."""
    from ft.data.examples import encode
    from ft.evaluation.completions import failure_records, score_completions

    model, tokenizer = classifier.model, classifier.tokenizer
    examples = encode(split, tokenizer, [], classifier.max_length)
    encodings = tokenizer.encode_batch_fast(split.completions or [], add_special_tokens=False)
    cut = sum(
        len(encoding.ids) >= len(example.target_ids) for encoding, example in zip(encodings, examples, strict=True)
    )
    if cut and not options.quiet:
        print(
            f"Note: {cut:,} completions are longer than --max-length {classifier.max_length}: only their ends are "
            "scored.",
            file=sys.stderr,
        )
    started = time.perf_counter()
    with progress_bar(len(examples), "completion", quiet=options.quiet) as bar:
        completion_scores = score_completions(model, examples, options.batch_size, bar.update)
    seconds = time.perf_counter() - started
    result = completion_scores.scores()
    failures = failure_records(model, tokenizer, split, examples, completion_scores, options.mistakes)
    record = {"split": split.name, **asdict(result), "mistakes": failures}
    output = [
        {
            "split": split.name,
            **split.place_record(row),
            "prompt": split.texts[row],
            "completion": completion,
            "loss": (completion_scores.losses[row] / completion_scores.counts[row]).item(),
            "right_tokens": int(completion_scores.hits[row]),
            "tokens": int(completion_scores.counts[row]),
        }
        for row, completion in enumerate(split.completions or [])
    ]
    if options.json:
        return record, output
    print(_summary(split.name, result) + _speed(len(examples) / seconds, classifier.source, quiet=options.quiet))
    if failures:
        print("\nhighest loss per token:")
    for failure in failures:
        prompt, expected, written = (one_line(str(failure[name])) for name in ("prompt", "completion", "written"))
        place = _place(failure, several_files=len(split.files) > 1)
        right = f"{failure['right_tokens']} of {failure['tokens']} tokens correct"
        print(f"  {failure['loss']:.2f} ({right}, {place}): {prompt}")
        print(f"       expected:  {expected}\n       generated: {written}")
    return record, output


def _summary(split: str, result: "CompletionScores") -> str:
    return (
        f"{split}: {counted(result.completions, 'completion')} of {counted(result.tokens, 'token')}, loss "
        f"{result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, token accuracy {result.accuracy:.2%}, "
        f"exact match {result.exact_match:.2%}"
    )
