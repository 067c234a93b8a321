"""From rows of a table to batches: read reviews, make an example of each, collate examples into a packed batch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ft.errors import FtError
from ft.packing import Packing, Selection, send

END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # the target that PyTorch's cross-entropy leaves out


@dataclass(frozen=True)
class Split:
    """The rows of one split, in file order; `label_names` are those of the file's metadata, where it has any."""

    name: str
    texts: list[str]
    labels: list[int]
    label_names: tuple[str, ...] | None = None


class Example(NamedTuple):
    """One review as the model sees it: `target_ids` are what should follow the last rows of `input_ids`."""

    input_ids: list[int]
    target_ids: list[int]


@dataclass(frozen=True)
class Batch:
    """Several examples, end to end.

    Attributes:
        input_ids: (N,) int64, the examples' tokens without padding.
        target_ids: (S,) int64, the token that should follow each selected row.
        packing: which row belongs to which example.
        selection: the S rows whose logits are compared with the targets.
    """

    input_ids: Tensor
    target_ids: Tensor
    packing: Packing
    selection: Selection

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(
            input_ids=send(self.input_ids, device),
            target_ids=send(self.target_ids, device),
            packing=self.packing.to(device),
            selection=self.selection.to(device),
        )


def read_split(name: str, paths: Sequence[Path]) -> Split:
    """Read the columns `text` and `label` of a split's parquet files.

    Raises:
        FtError: a file cannot be read, a column is missing or has another type, a text or label is null.
    """
    import pyarrow as pa  # here, since a tenth of a second of start-up is spent only where parquet is read
    import pyarrow.parquet as pq

    texts: list[str] = []
    labels: list[int] = []
    label_names: tuple[str, ...] | None = None
    for path in paths:
        try:
            file = pq.ParquetFile(path)  # not read_table(), which imports pandas where there is one
            schema = file.schema_arrow
            absent = [column for column in ("text", "label") if column not in schema.names]
            if absent:
                raise FtError(f"{path} has no column {absent[0]!r}; its columns are {', '.join(schema.names)}")
            table = file.read(columns=["text", "label"])
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise FtError(f"cannot read {path} as parquet: {str(error).splitlines()[0]}") from error
        for column, fits, wanted in (
            ("text", lambda t: pa.types.is_string(t) or pa.types.is_large_string(t), "text"),
            ("label", pa.types.is_integer, "whole numbers"),
        ):
            if not fits(table.schema.field(column).type):
                kind = table.schema.field(column).type
                raise FtError(f"the column {column!r} of {path} holds {kind}, it must hold {wanted}")
            if table[column].null_count:
                row = table[column].is_null().to_pylist().index(True)
                raise FtError(f"the {column} in row {row} of {path} is null; fill it or leave the row out")
        for row, text in enumerate(table["text"].cast(pa.large_binary()).to_pylist()):
            try:
                texts.append(text.decode())
            except UnicodeDecodeError as error:
                raise FtError(f"the text in row {row} of {path} is not UTF-8: {error.reason}") from error
        labels += table["label"].to_pylist()
        label_names = label_names or _label_names(schema.metadata)
    if not texts:
        raise FtError(f"the {name} split has no rows ({', '.join(map(str, paths))})")
    return Split(name, texts, labels, label_names)


def _label_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """The names of the classes of `label`, which the `datasets` library keeps as JSON in a parquet file's metadata."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, without the padding or truncation that some files ask for.

    Raises:
        FtError: the file is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise FtError(f"cannot read {path} as a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def label_tokens(names: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The token that stands for each label: the first of its word's.

    Raises:
        FtError: there are fewer than two labels, a word is empty, or two words begin with the same token, so that the
            answer would not tell them apart.
    """
    if len(names) < 2:
        raise FtError(f"there must be at least two labels, not {list(names)}; name them by --label-names neg,pos")
    tokens: list[int] = []
    for label, name in enumerate(names):
        ids = tokenizer.encode(name, add_special_tokens=False).ids
        if not ids:
            raise FtError(f"the name of label {label} is empty; name all labels by --label-names")
        if ids[0] in tokens:
            other = names[tokens.index(ids[0])]
            raise FtError(
                f"the labels {other!r} and {name!r} begin with the same token {tokenizer.id_to_token(ids[0])!r}; "
                "give them names that differ from the start by --label-names"
            )
        tokens.append(ids[0])
    return tokens


def encode(split: Split, tokenizer: Tokenizer, label_ids: Sequence[int], max_length: int) -> list[Example]:
    """Make an example of each review: its tokens, end-of-text, and as target the token of its label.

    The label is what the model should say, never what it reads, so that it is no input. A review of more than
    `max_length` tokens, end-of-text and label counted, keeps its end.

    Raises:
        FtError: a label is out of range, or the tokenizer knows no end-of-text.
    """
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    if end_of_text is None:
        raise FtError(f"the tokenizer has no token {END_OF_TEXT}; it is not a GPT-2 tokenizer")
    for row, label in enumerate(split.labels):
        if not 0 <= label < len(label_ids):
            limit = len(label_ids) - 1
            raise FtError(
                f"the label in row {row} of the {split.name} split is {label}, it must be from 0 to {limit}; "
                "correct the data or name more labels by --label-names"
            )
    encodings = tokenizer.encode_batch_fast(split.texts, add_special_tokens=False)
    return [
        Example(input_ids=[*encoding.ids, end_of_text][-(max_length - 1) :], target_ids=[label_ids[label]])
        for encoding, label in zip(encodings, split.labels, strict=True)
    ]


def collate(examples: Sequence[Example]) -> Batch:
    """The custom collate function: lay examples end to end, and note which rows are to predict the targets."""
    lengths = [len(example.input_ids) for example in examples]
    counts = [len(example.target_ids) for example in examples]
    return Batch(
        input_ids=torch.tensor([token for example in examples for token in example.input_ids]),
        target_ids=torch.tensor([token for example in examples for token in example.target_ids]),
        packing=Packing.of(lengths),
        selection=Selection.last(lengths, counts),
    )


def collate_padded(examples: Sequence[Example], batch_size: int, max_length: int) -> Batch:
    """The same batch in arrays whose shapes never change, for kernels compiled or recorded for one shape.

    Every sequence is padded to `max_length - 1` input tokens, and the batch to `batch_size` examples of one token
    without a target. What is added changes no loss: padding stands behind all that reads it, and `IGNORED` is no
    target. Each example must have one target.
    """
    length = max_length - 1
    filled = [*examples, *[Example([0], [IGNORED])] * (batch_size - len(examples))]
    return Batch(
        input_ids=torch.tensor([token for e in filled for token in [*e.input_ids, *[0] * (length - len(e.input_ids))]]),
        target_ids=torch.tensor([token for e in filled for token in e.target_ids]),
        packing=Packing.of([length] * batch_size),
        selection=Selection.last([len(e.input_ids) for e in filled], [1] * batch_size, pad_to=length),
    )


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch reads the examples: a pure function of the seed and the epoch.

    It is the order of the Hugging Face Trainer, and a resumed run finds its place in it without reading anything.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    order: list[int] = torch.randperm(num_examples, generator=generator).tolist()
    return order


def by_length(examples: Sequence[Example]) -> list[int]:
    """The examples' numbers from the shortest to the longest.

    In this order the sequences of a batch are about equally long, and attention computes little padding.
    """
    return sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))


def in_batches(examples: Sequence[Example], order: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Batches of `batch_size` examples in the given order; the last may be smaller."""
    for start in range(0, len(order), batch_size):
        yield collate([examples[i] for i in order[start : start + batch_size]])
