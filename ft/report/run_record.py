"""Read the files of a run directory for the report, whether the run is unfinished, finished or damaged."""

import json
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ft.checks import field_types, flag
from ft.config import Config
from ft.errors import UsageError, program, shown
from ft.io.plain_files import read_regular
from ft.settings import DEMO_SETTINGS, NOT_RECORDED, rows_of_run
from ft.train.state import evaluation_rank

Events = list[dict[str, Any]]
IGNORED_SETTINGS = (*NOT_RECORDED, "output_dir")  # by which runs are not compared
MOST_SHOWN = 1e9  # above which a figure is shown by its exponent
METRICS = ("accuracy", "macro_f1", "loss")  # of --best-metric
# The settings that name the validation rows of a run whose events do not (`eval_rows_sha256`).
ROWS_SETTINGS = (
    "dataset",
    "dataset_revision",
    "dataset_config",
    "text_column",
    "label_column",
    "prompt_column",
    "completion_column",
    "skip_empty",
)
PARTS = ("data", "forward", "backward", "update", "training", "evaluating", "saving")  # in the order of a step


@dataclass(frozen=True)
class Recorded:
    """The content of a run directory.

    Attributes:
        directory: the directory.
        name: how a report names it.
        config: the settings in config.json; empty if it cannot be read.
        events: the valid lines of metrics.jsonl.
        scores: scores.json (ft/evaluation/classification.py `write_scores`); None if it is missing or invalid.
        finished: see `is_finished`.
    """

    directory: Path
    name: str
    config: dict[str, Any]
    events: Events
    scores: dict[str, Any] | None
    finished: bool

    def curve(self, name: str, axis: str = "step") -> tuple[list[float], list[float]]:
        """A metric over steps or epochs, as x and y values; non-finite values are left out."""
        points = [
            (event[axis], event[name])
            for event in self.events
            if is_number(event.get(axis)) and is_number(event.get(name))
        ]
        return [x for x, _ in points], [y for _, y in points]

    def last(self, name: str) -> float | None:
        """The newest value of a metric; None if there is none."""
        values = self.curve(name)[1]
        return values[-1] if values else None

    @property
    def best_metric(self) -> str:
        """The run's `--best-metric`; the default if it is not a valid one."""
        metric = self.config.get("best_metric")
        return str(metric) if metric in METRICS else Config.best_metric

    def best_evaluation(self) -> dict[str, Any] | None:
        """The event of the best validation by the run's `--best-metric`, then loss; None without a valid one."""
        return max(
            filter(_is_evaluation, self.events), key=lambda event: rank_of(event, self.best_metric), default=None
        )

    def rows_sha256(self) -> str | None:
        """The SHA-256 of the rows of the validation split; None if the run has not recorded it."""
        found = (event.get("eval_rows_sha256") for event in reversed(self.events))
        return next((digest for digest in found if isinstance(digest, str)), None)

    def seconds_by_part(self) -> dict[str, float]:
        """Seconds of the run by part (ft/train/timing.py), in the order of a step; empty if not recorded."""
        total: dict[str, float] = {}
        for event in self.events:
            parts = event.get("seconds_by_part")
            for part, seconds in parts.items() if isinstance(parts, dict) else ():
                if is_number(seconds) and seconds >= 0:
                    total[part] = total.get(part, 0.0) + seconds
        return {part: total[part] for part in dict.fromkeys((*PARTS, *total)) if part in total}


def _is_evaluation(event: dict[str, Any]) -> bool:
    return is_number(event.get("eval_loss")) and is_number(event.get("eval_accuracy"))


def rank_of(evaluation: dict[str, Any], metric: str) -> tuple[float, float]:
    """What a better evaluation, an event of metrics.jsonl, has more of."""
    macro_f1 = evaluation.get("eval_macro_f1")
    return evaluation_rank(
        metric, evaluation["eval_loss"], evaluation["eval_accuracy"], macro_f1 if is_number(macro_f1) else None
    )


def common_metric(metrics: Iterable[str]) -> str:
    """The `--best-metric` by which runs are compared: theirs if it is the same for all, else accuracy."""
    different = set(metrics)
    return different.pop() if len(different) == 1 else Config.best_metric


def number_data_sets(runs: Sequence[Recorded]) -> list[int | None]:
    """Number the validation rows of runs, from 1: only evaluations of the same rows can be compared.

    Rows are the same if their SHA-256 is. A run of an earlier version has not recorded it: its rows are those that its
    settings name.

    Returns:
        The number of each run; None for a run without an evaluation.
    """
    digests = [run.rows_sha256() for run in runs]
    names = [_name_of_rows(run.config) for run in runs]
    known: dict[object, set[str]] = {}
    for name, digest in zip(names, digests, strict=True):
        known.setdefault(name, set()).update({digest} if digest else ())
    keys: list[object] = []
    for name, digest in zip(names, digests, strict=True):
        keys.append(digest or (next(iter(known[name])) if len(known[name]) == 1 else name))
    numbers: dict[object, int] = {}
    return [
        None if run.best_evaluation() is None else numbers.setdefault(key, len(numbers) + 1)
        for run, key in zip(runs, keys, strict=True)
    ]


def _name_of_rows(config: dict[str, Any]) -> str:
    """The settings that name the validation rows; those of --demo and of `ft.fine_tune` wherever their run is."""
    if not config:
        return ""
    settings = {name: config.get(name, getattr(Config, name)) for name in ROWS_SETTINGS}
    settings["dataset"] = (
        "demo" if config.get("demo") is True else rows_of_run(config.get("dataset")) or settings["dataset"]
    )
    return repr(settings)


def best_runs(runs: Sequence[Recorded], data_sets: Sequence[int | None]) -> list[Recorded]:
    """The run with the best evaluation on each set of validation rows, by the `--best-metric` that its runs share.

    Args:
        runs: the runs.
        data_sets: of each the number by `number_data_sets`.
    """
    evaluated: dict[int, list[tuple[Recorded, dict[str, Any]]]] = {}
    for run, number in zip(runs, data_sets, strict=True):
        if number is not None and (best := run.best_evaluation()) is not None:
            evaluated.setdefault(number, []).append((run, best))
    found = []
    for pairs in evaluated.values():
        metric = common_metric(run.best_metric for run, _ in pairs)
        found.append(max(pairs, key=lambda pair: rank_of(pair[1], metric))[0])
    return found


def formatted(value: float, form: str) -> str:
    """A figure by its format; of an extreme one, which would be hundreds of digits wide, three digits."""
    return form.format(value) if abs(value) < MOST_SHOWN else f"{value:.3g}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value from a file is a number that can be plotted: an int or float that is finite and not huge."""
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]


def read_run(directory: Path) -> Recorded:
    """Read a run directory.

    Raises:
        UsageError: it is not a directory, or has no metrics.jsonl.
    """
    config = _json(directory / "config.json", lambda value: isinstance(value, dict))
    metrics = directory / "metrics.jsonl"
    if directory.is_file():
        raise UsageError(
            f"RUN is {shown(str(directory))}, which is a file: it must be a run directory (runs/*/ matches directories "
            "only)"
        )
    if not directory.is_dir():
        raise UsageError(f"RUN is {shown(str(directory))}, there is no such directory")
    if not metrics.is_file():
        raise UsageError(f"RUN is {shown(str(directory))}, which has no metrics.jsonl: it must be a run directory")
    return Recorded(
        directory,
        str(directory),
        config or {},
        read_events(metrics),
        _json(directory / "scores.json", _are_scores),
        is_finished(directory),
    )


def is_finished(directory: Path) -> bool:
    """Whether a run has written its final model and, after it, summary.json, which a resumed run deletes first."""
    return all((directory / name).is_file() for name in ("final/model.safetensors", "summary.json"))


def read_events(metrics: Path) -> Events:
    """The valid lines of a metrics.jsonl.

    Raises:
        OSError: it cannot be read.
    """
    events: Events = []
    for line in read_regular(metrics).splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # the last line may be half written
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _json(path: Path, fits: Callable[[Any], bool]) -> dict[str, Any] | None:
    """A JSON value from a file; None if it cannot be read or has another form."""
    try:
        value = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None
    return value if fits(value) else None


def _are_scores(value: Any) -> bool:  # noqa: ANN401
    """Whether a value has the form that `write_scores` writes, as far as the report needs it."""
    try:
        k = len(value["labels"])
        per_class = (value["precision"], value["recall"], value["f1"], *value["confusion"])
        numbers = [value["accuracy"], value["macro_f1"], value["calibration_error"], value["step"]]
        numbers += [number for row in (*per_class, *value["bins"]) for number in row]
        numbers += [mistake["probability"] for mistake in value["mistakes"]]
        return (
            all(map(is_number, numbers))
            and all(math.isfinite(number) and number >= 0 for number in numbers)
            and len(value["confusion"]) == k > 0
            and all(len(row) == k for row in per_class)
            and all(len(row) == 3 for row in value["bins"])
            and all({"row", "true", "text"} <= set(mistake) for mistake in value["mistakes"])
            and all(predicted_label(mistake) is not None for mistake in value["mistakes"])
            and is_number(value.get("majority_baseline", 0.0))
        )
    except (AttributeError, KeyError, TypeError):
        return False


def predicted_label(mistake: dict[str, Any]) -> Any:  # noqa: ANN401
    """The predicted label of a mistake in scores.json, whose key was `label` in earlier versions."""
    return mistake.get("predicted", mistake.get("label"))


def settings_given(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that differ from the defaults, or for a --demo from the demo's."""
    defaults = json.loads(json.dumps(asdict(Config())))  # as in a file, with lists for tuples
    left_out = set(NOT_RECORDED)
    if config.get("demo") is True:
        defaults.update(DEMO_SETTINGS)
        left_out |= {"model", "dataset"}  # generated by the demo
    return {
        name: value
        for name, value in config.items()
        if name in field_types(Config) and name not in left_out and value != defaults[name]
    }


def command_of(config: dict[str, Any]) -> str:
    """The command line of a run with these settings, quoted for a POSIX shell."""
    settings = settings_given(config)
    processes = settings.pop("processes", 1)
    words = program().split() if processes == 1 else ["torchrun", "--nproc-per-node", str(processes), "run.py"]
    for name, value in settings.items():
        if isinstance(value, bool):
            words += [flag(name)] if value else []
        elif isinstance(value, list):
            words += [flag(name), *map(str, value)]
        else:
            text = str(value)
            words += [f"{flag(name)}={text}"] if text.startswith("-") else [flag(name), text]
    return shlex.join(words)
