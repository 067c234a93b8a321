"""What a saved model was fine-tuned for: its label names and the length of its examples.

Both are in config.json under `task_specific_params`, where `transformers` keeps them and ignores them:

    "task_specific_params": {"ft": {"label_names": ["neg", "pos"], "max_length": 32}}
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

FIELD, KEY = "task_specific_params", "ft"


class SavedTask(NamedTuple):
    """The task of a saved model.

    Attributes:
        label_names: the label names in the order of their numbers; None if unknown, or for completions.
        max_length: tokens of an example in training, end-of-text and label included; None if unknown.
    """

    label_names: tuple[str, ...] | None
    max_length: int | None


def task_fields(label_names: Sequence[str], max_length: int | None) -> dict[str, Any]:
    """The fields of config.json from which `read_task` reads the task; `label_names` is empty for completions."""
    task: dict[str, Any] = {"label_names": list(label_names)} if label_names else {}
    if max_length is not None:
        task["max_length"] = max_length
    return {FIELD: {KEY: task}} if task else {}


def read_task(published: Mapping[str, Any]) -> SavedTask:
    """Read the task from the content of a config.json.

    Without label names of this program, those in `id2label` are taken, as other programs and earlier versions write
    them, unless they are the placeholders LABEL_0, LABEL_1, ... of `transformers`. Values of other types are ignored.
    """
    params = published.get(FIELD)
    task = params.get(KEY) if isinstance(params, dict) else None
    task = task if isinstance(task, dict) else {}
    names, length = task.get("label_names"), task.get("max_length")
    is_list_of_names = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return SavedTask(
        tuple(names) if is_list_of_names else _names_in_id2label(published.get("id2label")),
        length if type(length) is int and length >= 2 else None,
    )


def _names_in_id2label(entries: object) -> tuple[str, ...] | None:
    if not isinstance(entries, dict):
        return None
    names = [entries.get(str(label)) for label in range(len(entries))]
    if not all(isinstance(name, str) for name in names) or names == [f"LABEL_{i}" for i in range(len(names))]:
        return None
    return tuple(map(str, names))
