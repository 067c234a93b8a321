"""From rows of a table to batches: make an example of each review, collate examples into a packed batch."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from ft.data.splits import Split
from ft.errors import FtError, shown

END_OF_TEXT = "<|endoftext|>"


class Example(NamedTuple):
    """One review as the model sees it: `target_ids` are what should follow the last rows of `input_ids`."""

    input_ids: list[int]
    target_ids: list[int]


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
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and when it panics no Exception
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
        raise FtError(
            f"there must be at least two labels, not {shown(list(names))}; name them by --label-names neg,pos"
        )
    tokens: list[int] = []
    for label, name in enumerate(names):
        require_utf8(name, f"the name of label {label}")
        ids = tokenizer.encode(name, add_special_tokens=False).ids
        if not ids:
            raise FtError(f"the name of label {label} is empty; name all labels by --label-names")
        if ids[0] in tokens:
            numbers = [str(number) for number in range(len(names))]
            if or_numbers and len(set(names)) == len(names) and list(names) != numbers:
                with suppress(FtError):  # of the numbers, which the user has not written
                    return label_tokens(numbers, tokenizer)
            other = names[tokens.index(ids[0])]
            raise FtError(
                f"the labels {shown(other)} and {shown(name)} begin with the same token "
                f"{shown(tokenizer.id_to_token(ids[0]))}; give them names that differ from the start by --label-names"
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
