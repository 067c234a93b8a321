"""A run on disk, for Python: predictions, evaluation and history."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ft.api.rows import read_rows
from ft.checkpoint import store
from ft.checkpoint.saved_task import read_task
from ft.config import Config
from ft.data.evaluation_splits import number_as_model
from ft.data.examples import encode
from ft.data.splits import Split
from ft.data.tables import number_labels
from ft.errors import FtError, shown
from ft.evaluation.split_scores import evaluate_in_fp32
from ft.inference.classifier import Classifier, Prediction, load
from ft.io.plain_files import read_regular
from ft.report.run_record import is_finished
from ft.settings import read_config_file

BATCH_SIZE = 64  # of predictions and evaluation


class Run:
    """A run directory. `ft.fine_tune` returns one, and `ft.Run("runs/mine")` opens that of an earlier run.

    Attributes:
        path: the directory.
        final: the directory of the final model, which `transformers` loads too.
    """

    def __init__(self, path: str | Path, *, device: str | None = None) -> None:
        """`device` is that of predictions and evaluation; by default the best that is available."""
        self.path = Path(path).expanduser()
        self.final = self.path / "final"
        self._device = device

    @property
    def config(self) -> Config:
        """All settings of the run.

        Raises:
            UsageError: the run has no valid config.json.
        """
        return Config(**read_config_file(self.path / "config.json"))

    @property
    def checkpoints(self) -> list[Path]:
        """The directories of the checkpoints, the newest last."""
        return store.checkpoints(self.path)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The events of metrics.jsonl: training losses by `loss`, evaluations by `eval_loss`, all by `step`.

        Raises:
            FtError: the run has no metrics.jsonl, or it is not valid.
        """
        path = self.path / "metrics.jsonl"
        try:
            events = [json.loads(line) for line in read_regular(path).splitlines()]
        except OSError as error:
            raise FtError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise FtError(f"cannot read {path} as JSON lines: {error}") from error
        for number, event in enumerate(events, start=1):
            if not isinstance(event, dict) or type(event.get("step")) is not int:
                raise FtError(f"line {number:,} of {path} is {shown(event)}, it must be an object with a step")
        return events

    @cached_property
    def model(self) -> Classifier:
        """The model in final/, or without one that of the newest checkpoint; loaded at first use.

        While a finished run is being continued, final/ is still the earlier model.

        Raises:
            FtError: there is none yet.
        """
        return load(self.path, device=self._device)

    def predict(self, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> list[Prediction]:
        """Predict the label of each text, in order.

        Raises:
            UsageError: `texts` is one string, or holds something else than strings.
            FtError: the run is on completions, or a text is not valid UTF-8.
        """
        return self.model.predict(texts, batch_size)

    def evaluate(self, texts: object, labels: object = None, batch_size: int = BATCH_SIZE) -> dict[str, float]:
        """Compute loss, accuracy and macro F1 on labeled texts; on prompts and completions loss and accuracy.

        Args:
            texts: the texts, or a table that also has the labels, as for `ft.fine_tune`.
            labels: the label of each text.
            batch_size: texts per forward pass.

        Returns:
            `loss`, in nats per target; `accuracy`, the fraction of targets that are predicted correctly; and with
            labels `macro_f1`.

        Raises:
            UsageError: the rows are not valid.
            FtError: the model does not have one of the labels.
        """
        config, model = self.config, self.model
        is_completion = config.completion_column is not None
        columns = columns_of_rows(config)
        rows = read_rows(texts, labels, None, None, **columns, is_completion=is_completion)["train"]
        split = Split("given", rows.texts, [0] * len(rows.texts))
        if is_completion:
            split = replace(split, completions=list(map(str, rows.answers)))
        else:
            names = model.label_names
            answers = [str(label).strip() if isinstance(label, str | bool) else label for label in rows.answers]
            split = number_labels(split, answers, names, rows.label_names, "label", "use the labels of the model")
            split, _ = number_as_model(split, names, read_task(model.published).label_numbers)
        label_ids = [] if is_completion else model.label_ids
        examples = encode(split, model.tokenizer, label_ids, model.max_length)
        result = evaluate_in_fp32(model, examples, label_ids, batch_size)
        found = {"loss": result.loss, "accuracy": result.accuracy}
        if result.macro_f1 is not None:
            found["macro_f1"] = result.macro_f1
        return found

    def __repr__(self) -> str:
        if not (self.path / "metrics.jsonl").is_file():
            return f"Run({str(self.path)!r}), which has not begun"
        events = self.history
        lines = [f"Run({str(self.path)!r}), {events[-1]['step'] if events else 0:,} steps"]
        for key, name in (("loss", "training"), ("eval_loss", "validation"), ("test_loss", "test")):
            if (last := next((event for event in reversed(events) if event.get(key) is not None), None)) is not None:
                accuracy = last.get(key.replace("loss", "accuracy")) if key != "loss" else None
                lines.append(
                    f"  {name:<10} loss {last[key]:.4f}" + ("" if accuracy is None else f", accuracy {accuracy:.2%}")
                )
        where = self.final if is_finished(self.path) else "not finished; ft.fine_tune(..., resume=True) continues"
        return "\n".join([*lines, f"  {'model':<10} {where}"])


def columns_of_rows(config: Config) -> dict[str, str]:
    """The columns of the texts and of the answers, as arguments of `read_rows`."""
    if config.completion_column is not None:
        return {"text_column": config.prompt_column, "answer_column": config.completion_column}
    return {"text_column": config.text_column, "answer_column": config.label_column}
