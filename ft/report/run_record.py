"""Read the files of a run directory for the report, whether the run is unfinished, finished or damaged."""

import json
import math
import shlex
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ft.checks import field_types, flag
from ft.config import Config
from ft.errors import UsageError, program, shown
from ft.io.plain_files import read_regular
from ft.settings import DEMO_SETTINGS, NOT_RECORDED
from ft.train.state import evaluation_rank

Events = list[dict[str, Any]]
IGNORED_SETTINGS = (*NOT_RECORDED, "output_dir")  # by which runs are not compared
METRICS = ("accuracy", "macro_f1", "loss")  # of --best-metric
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
