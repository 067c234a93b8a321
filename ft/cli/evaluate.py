"""The command `evaluate`: scores of a fine-tuned model on a split of a data set: `python run.py evaluate RUN`."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft.checkpoint.saved_task import read_task
from ft.checks import flag
from ft.cli.output_table import new_names, open_output
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
from ft.errors import FtError, counted, printable, shown
from ft.io.paths import expand_home, find_output_problems
from ft.io.progress import progress_bar
from ft.io.standard_streams import print_notes
from ft.settings import build_config

if TYPE_CHECKING:
    from ft.data.evaluation_splits import OtherColumns
    from ft.data.splits import Split
    from ft.evaluation.split_scores import ScoredSplit
    from ft.inference.classifier import Classifier


EXAMPLES = """\
examples:
  python run.py evaluate runs/rotten_tomatoes --split test
  python run.py evaluate ./my-gpt2 --dataset ./my-reviews --json
  python run.py evaluate runs/faq --mistakes 20        a run on completions: perplexity and the worst completions
"""

ALL = "all"  # of --split, and the name of all rows together
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
        choices=("train", "validation", "test", ALL),
        help="which rows; all: each split, and all rows together (default: test, else validation, else train; of a "
        "single file all rows)",
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
        help="also write each text with its label, prediction and probabilities, and the other columns of the data, to "
        "a .csv, .tsv, .json, .jsonl or .parquet",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(arguments)
    config = _build_config(options, parser.problems)

    with inference_memory_advice(options):
        _evaluate(config, options)


def _evaluate(config: Config, options: argparse.Namespace) -> None:
    """Load the model, read the data, evaluate each split, and print or write the results."""
    from ft.data.evaluation_splits import OtherColumns, read_evaluation_splits

    classifier = load_classifier(options)
    names = None if config.completion_column else classifier.label_names
    found, notes = read_evaluation_splits(config, options.split, names, of_run=options.dataset is None)
    print_notes(notes, quiet=options.quiet)
    splits = list(found.values())
    others = None if options.output is None else OtherColumns(splits, config)
    evaluate_splits = _evaluate_labels if config.completion_column is None else _evaluate_completions
    parts = evaluate_splits(classifier, splits, options)
    records = [part.record(options.mistakes) for part in parts]
    if options.json:
        of_splits = {record["split"]: record for record in records}
        print(json.dumps(of_splits if options.split == ALL else records[0], indent=2))
    else:
        reports = []
        for part, record in zip(parts, records, strict=True):
            speed = f" ({len(part.split.texts) / part.seconds:,.1f} examples/s, by {printable(classifier.source)})"
            reports.append(part.text(record, "" if options.quiet else speed))
        print("\n\n".join(reports if len(splits) > 1 else reports[:1]))
    if others is not None:
        _write_rows(parts[: len(splits)], others, options)


def _write_rows(parts: "Sequence[ScoredSplit]", others: "OtherColumns", options: argparse.Namespace) -> None:
    """Write --output: a row for each example of the splits, and after its columns the others of the input."""
    rows = [row for part in parts for row in part.rows()]
    beside = [others.values(part.split, row) for part in parts for row in range(len(part.split.texts))]
    columns = new_names(others.names, list(rows[0]), "the data set", quiet=options.quiet)
    with open_output(options.output, [*columns, *others.names]) as writer:
        writer.write([[*row.values(), *values] for row, values in zip(rows, beside, strict=True)])
    if not options.quiet:
        are = "is" if len(rows) == 1 else "are"
        print(f"{counted(len(rows), 'row')} {are} written to {printable(str(options.output))}.", file=sys.stderr)


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
    if not isinstance(settings.get("dataset"), str):  # of a config.json, which `Config` refuses
        return []
    path = Path(expand_home(settings["dataset"]))
    found = [path] if path.is_file() else []
    for split in sorted(set(SPLITS.values())) if path.is_dir() else ():
        with suppress(FtError):  # which reading the data raises again
            for files in dataset_files(str(path), part=settings.get("dataset_config"), first_of=(split,)).values():
                found += files
    return found


# --- splits -----------------------------------------------------------------------------------------------------------


def _evaluate_labels(
    classifier: "Classifier", splits: "Sequence[Split]", options: argparse.Namespace
) -> "Sequence[ScoredSplit]":
    """The scores of the predicted labels of each split, and with --split all those of all rows together."""
    from ft.data.evaluation_splits import number_as_model
    from ft.data.examples import UNLIMITED, encode, keep_end, length_of
    from ft.evaluation.classification import read_majority_label
    from ft.evaluation.split_scores import ScoredLabels, evaluate_in_fp32

    names, numbers = classifier.label_names, read_task(classifier.published).label_numbers
    majority = read_majority_label(Path(classifier.source).parent, names)
    parts: list[ScoredLabels] = []
    lengths: list[int] = []
    for split in splits:
        numbered, notes = number_as_model(split, names, numbers, are_given=options.label_names is not None)
        print_notes(notes, quiet=options.quiet)
        started = time.perf_counter()
        with progress_bar(len(split.texts), "example", quiet=options.quiet) as bar:
            examples = encode(numbered, classifier.tokenizer, classifier.label_ids, UNLIMITED)
            cut = [keep_end(example, classifier.max_length) for example in examples]
            result = evaluate_in_fp32(classifier, cut, classifier.label_ids, options.batch_size, bar.update)
        assert result.probabilities is not None, "there are labels"
        seconds = time.perf_counter() - started
        parts.append(ScoredLabels(numbered, seconds, names, result.probabilities.double(), result.loss, majority))
        lengths += map(length_of, examples)
    print_notes(classifier.describe_cut(lengths), quiet=options.quiet)
    if majority is None:
        of_split = f"the {splits[0].name} split" if len(splits) == 1 else "each split"
        note = "the most frequent training label is not known; the majority baseline is that of the most frequent label"
        print_notes([f"{note} of {of_split}"], quiet=options.quiet)
    return [*parts, ScoredLabels.join(parts, ALL)] if options.split == ALL else parts


def _evaluate_completions(
    classifier: "Classifier", splits: "Sequence[Split]", options: argparse.Namespace
) -> "Sequence[ScoredSplit]":
    """The scores of the completions of each split, and with --split all those of all rows together."""
    from ft.data.examples import UNLIMITED, encode, keep_end, length_of
    from ft.evaluation.completions import failure_records, score_completions
    from ft.evaluation.split_scores import ScoredCompletions

    model, tokenizer = classifier.model, classifier.tokenizer
    parts: list[ScoredCompletions] = []
    lengths: list[int] = []
    shortened = 0
    for split in splits:
        started = time.perf_counter()
        with progress_bar(len(split.texts), "completion", quiet=options.quiet) as bar:
            examples = encode(split, tokenizer, [], UNLIMITED)
            cut = [keep_end(example, classifier.max_length) for example in examples]
            scored = score_completions(model, cut, options.batch_size, bar.update)
        seconds = time.perf_counter() - started
        failures = failure_records(model, tokenizer, split, cut, scored, options.mistakes)
        parts.append(ScoredCompletions(split, seconds, scored, failures))
        lengths += map(length_of, examples)
        shortened += sum(len(a.target_ids) < len(b.target_ids) for a, b in zip(cut, examples, strict=True))
    print_notes(classifier.describe_cut(lengths), quiet=options.quiet)
    if shortened:
        longer = "is longer" if shortened == 1 else "are longer"
        limit, ends = classifier.max_length, "its end is" if shortened == 1 else "their ends are"
        note = f"{counted(shortened, 'completion')} {longer} than --max-length {limit}: only {ends} scored"
        print_notes([note], quiet=options.quiet)
    return [*parts, ScoredCompletions.join(parts, ALL)] if options.split == ALL else parts
