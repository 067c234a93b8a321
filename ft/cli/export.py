"""The command `export`: write a model in the files of another program: `python run.py export RUN --to FORMAT`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ft.cli.parsers import CommandParser, to_path
from ft.cli.predict import add_model, find_flag_problems, load_classifier, read_run_settings
from ft.errors import FtError, UsageError, one_line, printable, shown
from ft.export.card import export_card
from ft.io.atomic import atomic_directory
from ft.io.model_layout import CARD, CLASSIFIER, CONFIG, EXPORTED_FILES, GGUF, WEIGHTS
from ft.io.plain_files import read_json
from ft.io.standard_streams import LOADING, waiting_line

EXAMPLES = """\
examples:
  python run.py export runs/rotten_tomatoes --to classifier     writes runs/rotten_tomatoes/classifier
  python run.py export runs/rotten_tomatoes --to gguf --dtype f16
  python run.py export ./my-gpt2 --to classifier --label-names neg,pos --max-length 64 --output ./my-classifier
"""


def export(arguments: Sequence[str]) -> None:
    """Parse the command line, load the model, and write it in another format.

    Raises:
        UsageError: the command line is wrong, or the output exists.
        FtError: the model cannot be read, or the format cannot represent it.
    """
    parser = CommandParser("export", "Write a trained model in the files of another program.", EXAMPLES)
    add_model(parser)
    parser.add_argument(
        "--to",
        choices=tuple(EXPORTED_FILES),
        help="classifier: GPT2ForSequenceClassification, for pipelines of transformers; gguf: one file for llama.cpp",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=to_path,
        help="default: a directory in the run, with the name of the format; must be given for a checkpoint or another "
        "model",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--dtype", choices=("f32", "f16"), help="of the matrices in gguf (default: f32)")
    parser.add_argument(
        "--label-names",
        metavar="TEXT",
        help="of a classifier, comma-separated (default: those saved with the model)",
    )
    parser.add_argument(
        "--max-length", metavar="N", type=int, help="of a classifier: tokens per example (default: that of the run)"
    )
    parser.add_argument("--quiet", action="store_true", help="print the result alone: no line while it is written")
    parser.set_defaults(device="cpu")
    options = parser.parse_args(arguments)
    if options.to is None:
        is_known = any(problem.startswith("--to is ") for problem in parser.problems)  # a wrong one
        missing = [] if is_known else [f"--to is missing, it must be {' or '.join(EXPORTED_FILES)}"]
        raise UsageError(*parser.problems, *missing, *find_flag_problems(options))
    output = options.output or _default_output(Path(options.model), options.to)
    problems = [*parser.problems, *find_flag_problems(options), *_find_format_problems(options)]
    if output is None:
        problems.append(f"{shown(options.model)} is not a run directory: name a directory to write by --output")
    else:
        problems += _find_output_problems(output, options.to, options.overwrite)
    if output is None or problems:
        raise UsageError(*problems)

    with waiting_line(LOADING, quiet=options.quiet):  # only here: --help and usage errors do not wait for torch
        from ft.checkpoint.error_hints import explain_out_of_memory
        from ft.export.classifier import CLASSIFIER_METADATA, CLASSIFIER_USAGE, write_classifier
        from ft.export.gguf import GGUF_METADATA, gguf_usage, write_gguf

    with explain_out_of_memory(f"--to {options.to}", "a smaller model"):
        model = load_classifier(options)
        with (
            waiting_line(f"Writing {one_line(str(output))} ...", quiet=options.quiet),
            atomic_directory(Path(os.path.abspath(output))) as staged,  # a name such as `.` has no directory beside it
        ):
            if options.to == "classifier":
                write_classifier(staged, model)
                card = export_card(Path(model.source), CLASSIFIER_USAGE, CLASSIFIER_METADATA)
            else:
                dtype = options.dtype or "f32"
                write_gguf(staged, model, dtype)
                card = export_card(Path(model.source), gguf_usage(model, dtype), GGUF_METADATA)
            staged.write(CARD, [card.encode()])
    size = sum(path.stat().st_size for path in output.iterdir())
    use = f"its {CARD} shows how to use it"
    print(printable(f"{output}: {options.to}, {size / 1e6:,.1f} MB, from {model.source}; {use}"))


def _default_output(source: Path, format_name: str) -> Path | None:
    """The directory of an export in the run that `source` is, or whose `final/` it is; None for any other model."""
    run = source.parent if source.name == "final" else source
    return run / format_name if (run / "metrics.jsonl").exists() or (run / "final").is_dir() else None


def _find_format_problems(options: argparse.Namespace) -> list[str]:
    """A message for each flag that does not fit --to, and for a classifier of a model without labels."""
    unfit = ("dtype",) if options.to == "classifier" else ("label_names", "max_length")
    problems = [
        f"--{name.replace('_', '-')} does not apply to --to {options.to}: leave it out"
        for name in unfit
        if getattr(options, name) is not None
    ]
    is_of_completions = read_run_settings(Path(options.model)).get("completion_column") is not None
    if options.to == "classifier" and options.label_names is None and is_of_completions:
        problems.append(
            f"{options.model} was trained on completions and has no labels: a classifier needs them, --to gguf does not"
        )
    return problems


def _find_output_problems(output: Path, format_name: str, overwrite: bool) -> list[str]:
    """What prevents writing the directory `output`: at most one message."""
    if not os.path.lexists(output):
        return []
    if output.is_symlink() or not output.is_dir():
        return [f"the output {shown(str(output))} is not a directory: delete it, or name another by --output"]
    if not any(output.iterdir()):
        return []
    if not _is_export(output, format_name):
        return [f"the output {shown(str(output))} has other files than an export: name another by --output"]
    if not overwrite:
        return [f"the output {shown(str(output))} exists: --overwrite replaces it, another --output keeps it"]
    return []


def _is_export(directory: Path, format_name: str) -> bool:
    """Whether a directory holds an export and nothing else, so that it may be replaced."""
    names = {path.name for path in directory.iterdir()}
    if not names <= EXPORTED_FILES[format_name] or not any(name.endswith((WEIGHTS, GGUF)) for name in names):
        return False
    if format_name == "gguf":
        return True
    try:  # of another model the files may have the same names
        return read_json(directory / CONFIG).get("architectures") == [CLASSIFIER]
    except FtError:
        return False
