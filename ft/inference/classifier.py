"""A fine-tuned model as a classifier of texts.

import ft

classifier = ft.load("runs/rotten_tomatoes")
print(classifier.predict(["a gorgeous , witty film", "two hours that i want back"]))
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ft.checkpoint.saved_task import read_task
from ft.config import Config
from ft.data.batches import by_length, in_batches
from ft.data.examples import UNLIMITED, Example, describe_cut, encode, keep_end, label_tokens, require_utf8
from ft.data.splits import Split
from ft.errors import UsageError, printable, shown
from ft.inference.language_model import LanguageModel, load_language_model
from ft.io.hub import is_path
from ft.io.plain_files import read_regular
from ft.io.progress import Count, no_progress
from ft.model.gpt2 import GPT2


class Prediction(NamedTuple):
    """The most likely label of a text, and the probability of each label; they sum to 1."""

    label: str
    probabilities: dict[str, float]


def to_prediction(probabilities: Sequence[float], names: Sequence[str]) -> Prediction:
    """The prediction with these probabilities of the labels `names`."""
    named = dict(zip(names, probabilities, strict=True))
    return Prediction(max(named, key=named.__getitem__), named)


@dataclass(frozen=True)
class Classifier(LanguageModel):
    """A GPT-2 that predicts a label for each text.

    Attributes:
        named_labels: the label names in the order of their numbers; None if neither the model nor the caller has them.
        label_ids: the token of each label; empty without label names.
        max_length: tokens of an example, end-of-text and label included; of a longer text the end is kept.
    """

    named_labels: tuple[str, ...] | None
    label_ids: list[int]
    max_length: int

    @property
    def label_names(self) -> tuple[str, ...]:
        """The label names in the order of their numbers.

        Raises:
            UsageError: the label names are unknown.
        """
        if self.named_labels is None:
            raise UsageError(f"{self.source} does not name its labels: name them by --label-names neg,pos")
        return self.named_labels

    def encode(self, texts: Sequence[str]) -> list[Example]:
        """Tokenize texts for `predict_examples`, each complete.

        Raises:
            UsageError: `texts` is one string, or holds something else than strings.
            FtError: a text is not valid UTF-8.
        """
        if isinstance(texts, str):  # whose characters would be the texts
            raise UsageError(f"texts is {shown(texts)}, it must be a list: pass [{shown(texts)}]")
        return encode_texts(texts, self.tokenizer, UNLIMITED)

    def predict_examples(
        self, examples: Sequence[Example], batch_size: int = 64, progress: Count = no_progress
    ) -> list[Prediction]:
        """Predict the label of each text that `encode` has tokenized: see `predict`."""
        names = self.label_names
        cut = [keep_end(example, self.max_length) for example in examples]
        rows = predict_examples(self.model, cut, self.label_ids, batch_size=batch_size, progress=progress)
        return [to_prediction(row, names) for row in rows.tolist()]

    def describe_cut(self, lengths: Sequence[int]) -> list[str]:
        """A note on the examples of these lengths (see `length_of`) that lose their beginning; none if none does."""
        return describe_cut(lengths, self.max_length, self.model.config.n_positions)

    def predict(self, texts: Sequence[str], batch_size: int = 64, progress: Count = no_progress) -> list[Prediction]:
        """Predict the label of each text, in order. `progress` is called with the number of texts of each batch.

        Raises:
            UsageError: `texts` is one string, or holds something else than strings.
            FtError: the label names are unknown, or a text is not valid UTF-8.
        """
        return self.predict_examples(self.encode(texts), batch_size, progress)


def load(
    source: str | Path,
    *,
    device: str | None = None,
    label_names: Sequence[str] | None = None,
    max_length: int | None = None,
    revision: str | None = None,
    base: str | Path | None = None,
) -> Classifier:
    """Load a fine-tuned model.

    Args:
        source: a run directory, of which `final/` or else the newest checkpoint is loaded; a checkpoint; any directory
            or Hub id with config.json, tokenizer.json and model.safetensors of a GPT-2; or a directory with an adapter.
        device: as for `--device`. Default: the best that is available. A CUDA device becomes the current one.
        label_names: the names of the labels. Default: those in the model's config.json.
        max_length: tokens per example. Default: that saved with the model, else that of the run it is in, else 32.
        revision: branch, tag or commit on the Hub.
        base: of an adapter: a directory or Hub id. Default: where the adapter's adapter_config.json says it is.

    Raises:
        UsageError: the model has fewer positions than `max_length`.
        FtError: there is no such model, it is damaged, or two labels begin with the same token.
    """
    loaded = load_language_model(source, device=device, revision=revision, base=base)
    n_positions = loaded.model.config.n_positions
    if max_length is not None and max_length > n_positions:
        name = printable(loaded.source)
        raise UsageError(f"--max-length is {max_length}, but {name} has {n_positions} positions; lower it")
    saved = read_task(loaded.published)
    names = tuple(label_names) if label_names is not None else saved.label_names
    length = max_length or saved.max_length or _max_length_of_run(Path(loaded.source))
    return Classifier(
        **vars(loaded),
        named_labels=names,
        label_ids=[] if names is None else label_tokens(names, loaded.tokenizer, or_numbers=names == saved.label_names),
        max_length=min(length, n_positions),
    )


def _max_length_of_run(directory: Path) -> int:
    """--max-length of the run that a model of an earlier version is in; the default if it is not in a run."""
    if not (directory.is_dir() or is_path(str(directory))):  # a Hub id
        return Config.max_length
    try:
        length = json.loads(read_regular(directory.parent / "config.json"))["max_length"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        length = None
    return length if type(length) is int and length >= 2 else Config.max_length


def predict(
    model: GPT2,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    label_ids: Sequence[int],
    *,
    max_length: int,
    batch_size: int = 64,
    progress: Count = no_progress,
) -> Tensor:
    """Compute the probability of each label for each text: a softmax over the logits of the label tokens only.

    Args:
        model: in training or evaluation mode, which is restored afterwards.
        tokenizer: that of the model.
        texts: the texts to classify.
        label_ids: the token of each label.
        max_length: tokens of an example, end-of-text and label included; of a longer text the end is kept.
        batch_size: texts per forward pass.
        progress: called with the number of texts of each batch.

    Returns:
        (len(texts), len(label_ids)) probabilities in fp32 on the CPU.

    Raises:
        UsageError: a text is not a string.
        FtError: a text is not valid UTF-8.
    """
    examples = encode_texts(texts, tokenizer, max_length)
    return predict_examples(model, examples, label_ids, batch_size=batch_size, progress=progress)


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Tokenize texts without labels.

    Raises:
        UsageError: a text is not a string.
        FtError: a text is not valid UTF-8.
    """
    texts = list(texts)  # an array or a column of a frame has no truth value
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UsageError(f"text {number:,} is {shown(text)}, it must be a string")
        require_utf8(text, f"text {number:,}")
    # The label of an example is only its target and never an input: any token will do.
    return encode(Split("given", texts, [0] * len(texts)), tokenizer, [0], max_length)


@torch.inference_mode()
def predict_examples(
    model: GPT2,
    examples: Sequence[Example],
    label_ids: Sequence[int],
    *,
    batch_size: int,
    progress: Count = no_progress,
) -> Tensor:
    """`predict` for texts that are tokenized."""
    if not examples:
        return torch.empty(0, len(label_ids))
    device = model.wte.weight.device
    candidates = torch.tensor(label_ids, device=device)
    order = by_length(examples)
    was_training = model.training
    model.eval()
    logits = []
    for batch in (batch.to(device) for batch in in_batches(examples, order, batch_size)):
        logits.append(model(batch.input_ids, batch.packing, batch.selection, candidates))
        progress(len(logits[-1]))
    model.train(was_training)
    probabilities = torch.empty(len(examples), len(label_ids))
    probabilities[order] = torch.cat(logits).float().softmax(dim=-1).cpu()
    return probabilities
