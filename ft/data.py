"""From rows of a table to batches: make an example of each review, collate examples into a packed batch."""

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
MOST_TARGETS = 2048  # of a batch whose logits over the whole vocabulary are computed: 400 MB with GPT-2's
IGNORED = -100  # the target that PyTorch's cross-entropy leaves out


@dataclass(frozen=True)
class Split:
    """The rows of one split, in file order.

    Attributes:
        name: train, validation or test.
        texts: what the model reads.
        labels: the number of each text's class; 0 where there are completions instead.
        label_names: what the classes are called, where the files say so.
        completions: what should follow each text, where that is no class.
        rows: the number that each row has in the files, from 0; left out where all of them are here.
        in_words: whether the files tell the labels as words, which `labels` has numbered.
    """

    name: str
    texts: list[str]
    labels: list[int]
    label_names: tuple[str, ...] | None = None
    completions: list[str] | None = None
    rows: tuple[int, ...] | None = None
    in_words: bool = False

    def only(self, rows: Sequence[int], name: str | None = None) -> "Split":
        """Some of the rows, as a split of this or another name."""
        numbers = self.rows or range(len(self.texts))
        return Split(
            name or self.name,
            [self.texts[row] for row in rows],
            [self.labels[row] for row in rows],
            self.label_names,
            None if self.completions is None else [self.completions[row] for row in rows],
            tuple(numbers[row] for row in rows),
            self.in_words,
        )


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


def stratified(groups: Sequence[int], count: int, seed: int) -> list[int]:
    """The row numbers, ascending, of a random sample of `count` rows that holds each group in proportion.

    Every group gets its share rounded down, and what is then missing goes to the largest fractions, so that no group
    is off by one row or more. A pure function of its arguments.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    shares = {group: count * len(rows) / len(groups) for group, rows in members.items()}
    sizes = {group: int(share) for group, share in shares.items()}
    for group in sorted(shares, key=lambda group: sizes[group] - shares[group])[: count - sum(sizes.values())]:
        sizes[group] += 1
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for group, rows in sorted(members.items()):
        order = torch.randperm(len(rows), generator=generator)[: sizes[group]]
        chosen += [rows[i] for i in order.tolist()]
    return sorted(chosen)


def require_utf8(text: str, what: str) -> None:
    """Refuse a text that cannot be written as UTF-8, which is what a tokenizer reads.

    Bytes of a command line that are not UTF-8 arrive as lone surrogates, and JSON can spell them.

    Raises:
        FtError: it holds a surrogate that is alone.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FtError(f"{what} is not UTF-8: it holds {text[error.start]!r} at character {error.start}") from error


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


def label_tokens(names: Sequence[str], tokenizer: Tokenizer, *, or_numbers: bool = False) -> list[int]:
    """The token that stands for each label: the first of its word's.

    With `or_numbers`, labels whose words are different but begin alike are told apart by their numbers: the token of
    `0` stands for the first label, and so on.

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
            numbers = [str(number) for number in range(len(names))]
            if or_numbers and len(set(names)) == len(names) and list(names) != numbers:
                return label_tokens(numbers, tokenizer)
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
    `max_length` tokens, end-of-text and label counted, keeps its end. Where the split has completions, see
    `_encode_completions`.

    Raises:
        FtError: a label is out of range, or the tokenizer knows no end-of-text.
    """
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    if end_of_text is None:
        raise FtError(f"the tokenizer has no token {END_OF_TEXT}; it is not a GPT-2 tokenizer")
    if split.completions is not None:
        return _encode_completions(split.texts, split.completions, tokenizer, end_of_text, max_length)
    for row, label in enumerate(split.labels):
        if not 0 <= label < len(label_ids):
            limit = len(label_ids) - 1
            raise FtError(
                f"the label in row {split.rows[row] if split.rows else row} of the {split.name} split is {label}, it "
                f"must be from 0 to {limit}; correct the data or name more labels by --label-names"
            )
    encodings = tokenizer.encode_batch_fast(split.texts, add_special_tokens=False)
    return [
        Example(input_ids=[*encoding.ids, end_of_text][-(max_length - 1) :], target_ids=[label_ids[label]])
        for encoding, label in zip(encodings, split.labels, strict=True)
    ]


def _encode_completions(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: Tokenizer, end_of_text: int, max_length: int
) -> list[Example]:
    """Make an example of each prompt and completion: targets are the completion's tokens and a closing end-of-text.

    Both are tokenised by themselves, so that a prompt has the same tokens when the model is asked later. Of more than
    `max_length` tokens the end is kept. An empty prompt is replaced by end-of-text, after which GPT-2 was trained to
    begin a text.
    """
    before, after = (tokenizer.encode_batch_fast(texts, add_special_tokens=False) for texts in (prompts, completions))
    examples = []
    for prompt, completion in zip(before, after, strict=True):
        targets = [*completion.ids, end_of_text]
        tokens = [*(prompt.ids or [end_of_text]), *targets][-max_length:]
        examples.append(Example(input_ids=tokens[:-1], target_ids=targets[-(len(tokens) - 1) :]))
    return examples


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


def batches_by_length(examples: Sequence[Example], batch_size: int, processes: int = 1) -> Iterator[list[int]]:
    """The examples' numbers in batches of similar lengths.

    Each of the processes that share a batch by turns gets at most `batch_size` examples and, unless a single example
    has more, `MOST_TARGETS` targets: so the logits of completions, however long, take a bounded amount of memory.
    """
    numbers: list[int] = []
    targets = [0] * processes  # of each process
    for number in by_length(examples):
        count, process = len(examples[number].target_ids), len(numbers) % processes
        if len(numbers) == batch_size * processes or (numbers and targets[process] + count > MOST_TARGETS):
            yield numbers
            numbers, targets, process = [], [0] * processes, 0
        numbers.append(number)
        targets[process] += count
    if numbers:
        yield numbers


def in_batches(examples: Sequence[Example], order: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Batches of `batch_size` examples in the given order; the last may be smaller."""
    for start in range(0, len(order), batch_size):
        yield collate([examples[i] for i in order[start : start + batch_size]])
