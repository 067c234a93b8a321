"""A fine-tuned model ready for use: found, loaded, asked.

import ft

classifier = ft.load("runs/rotten_tomatoes")
print(classifier.predict(["a gorgeous , witty film", "two hours that i want back"]))
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from ft import hub
from ft.checkpoint import checkpoints, damage_of_checkpoint, is_checkpoint, load_weights
from ft.config import Config
from ft.data import label_tokens, read_tokenizer
from ft.errors import FtError
from ft.files import read_json
from ft.gpt2 import GPT2, GPT2Config
from ft.machine import choose_device
from ft.predict import predict


class Prediction(NamedTuple):
    """The likeliest label of a text, and the probability of each label; they add up to 1."""

    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Classifier:
    """A model with what is needed to ask it about texts.

    Attributes:
        source: where it was loaded from.
        model: on its device, in evaluation mode.
        tokenizer: that of the model.
        label_names: the labels in the order of their numbers.
        label_ids: the token that stands for each.
        max_length: tokens of a text that are read, end-of-text and label included; of a longer one the end is kept.
    """

    source: str
    model: GPT2
    tokenizer: Tokenizer
    label_names: tuple[str, ...]
    label_ids: list[int]
    max_length: int

    def predict(self, texts: Sequence[str], batch_size: int = 64) -> list[Prediction]:
        """What the model says of each text, in their order."""
        rows = predict(
            self.model, self.tokenizer, texts, self.label_ids, max_length=self.max_length, batch_size=batch_size
        )
        predictions = []
        for row in rows.tolist():
            probabilities = dict(zip(self.label_names, row, strict=True))
            predictions.append(Prediction(max(probabilities, key=probabilities.__getitem__), probabilities))
        return predictions


def load(
    source: str | Path,
    *,
    device: str | None = None,
    label_names: Sequence[str] | None = None,
    max_length: int | None = None,
    revision: str | None = None,
) -> Classifier:
    """Load a fine-tuned model.

    Args:
        source: a run, whose finished model or else newest checkpoint is taken; a checkpoint; any folder or Hub id with
            config.json, tokenizer.json and model.safetensors of a GPT-2.
        device: as for `--device`; the best present when left out.
        label_names: the words of the labels, where the model's config.json does not tell.
        max_length: tokens per text; that of the run when left out, and where there is no run the recipe's 32.
        revision: branch, tag or commit on the Hub.

    Raises:
        FtError: there is no such model, it is damaged, or its labels are not known.
    """
    folder = _model_folder(Path(source))
    files = hub.model_files(str(folder or source), revision)
    published = read_json(files.config)
    try:
        config = GPT2Config.from_dict(published)
    except FtError as error:
        raise FtError(f"{files.config}: {error}") from error
    names = tuple(label_names) if label_names is not None else _label_names(published)
    if names is None:
        raise FtError(f"{source} does not say what its labels are called; say it by --label-names neg,pos")
    model = GPT2(config)
    load_weights(model, files.weights)
    model.to(choose_device(device)).eval()
    tokenizer = read_tokenizer(files.tokenizer)
    label_ids = label_tokens(names, tokenizer, or_numbers=label_names is None)
    length = min(max_length or _max_length_of_run(folder), config.n_positions)
    return Classifier(str(folder or source), model, tokenizer, names, label_ids, length)


def _model_folder(source: Path) -> Path | None:
    """The folder of the model that `source` means; None where it is no folder, but perhaps a Hub id.

    Raises:
        FtError: a run without a whole model in it, or a damaged checkpoint.
    """
    if not source.is_dir():
        return None
    if is_checkpoint(source):
        if damage := damage_of_checkpoint(source):
            raise FtError(f"{source} is damaged: {damage}")
        return source
    if (source / "final").is_dir():
        return source / "final"
    if not (source / "metrics.jsonl").exists():
        return source
    for folder in reversed(checkpoints(source)):
        if damage_of_checkpoint(folder) is None:
            return folder
    raise FtError(f"the run {source} has no finished model and no whole checkpoint yet")


def _label_names(published: dict[str, object]) -> tuple[str, ...] | None:
    """The labels in `id2label`, but for the LABEL_0 that transformers writes where nobody named them."""
    entries = published.get("id2label")
    if not isinstance(entries, dict):
        return None
    names = [entries.get(str(label)) for label in range(len(entries))]
    if not all(isinstance(name, str) for name in names) or names == [f"LABEL_{i}" for i in range(len(names))]:
        return None
    return tuple(map(str, names))


def _max_length_of_run(folder: Path | None) -> int:
    """--max-length of the run that a finished model or a checkpoint lies in; the recipe's where it lies in none."""
    recorded = folder.parent / "config.json" if folder is not None else None
    try:
        length = json.loads(recorded.read_text(encoding="utf-8"))["max_length"] if recorded else None
    except (OSError, ValueError, KeyError, TypeError):
        length = None
    return length if type(length) is int and length >= 2 else Config.max_length
