"""From rows of a split to examples: the tokens that the model reads, and the targets that it should predict."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from ft.data.splits import Split
from ft.errors import FtError, UsageError, counted, shown

END_OF_TEXT = "<|endoftext|>"
UNLIMITED = 2**62  # a maximum length that cuts nothing


class Example(NamedTuple):
    """Tokens of one example; the last `len(target_ids)` positions of `input_ids` predict `target_ids`.

    For classification `input_ids` is [tokens of the text, end-of-text] and `target_ids` is [token of the label].
    """

    input_ids: list[int]
    target_ids: list[int]


def require_utf8(text: str, what: str) -> None:
    """Check that a text can be encoded as UTF-8, which the tokenizer needs.

    Lone surrogates cannot. They come from JSON escapes and from bytes of a command line that are not UTF-8.

    Args:
        text: the text.
        what: its name in the message.

    Raises:
        FtError: the text holds a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FtError(f"{what} is not UTF-8: it holds {text[error.start]!r} at character {error.start}") from error


def read_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`, without the padding and truncation that some files enable.

    Raises:
        FtError: the file is not a tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and a panic is not an Exception
        raise FtError(f"cannot read {path} as a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def label_tokens(names: Sequence[str], tokenizer: Tokenizer, *, or_numbers: bool = False) -> list[int]:
    """The token that represents each label: the first token of its name.

    Args:
        names: the label names.
        tokenizer: that of the model.
        or_numbers: if two different names begin with the same token, represent labels by their numbers instead: by the
            token of `0`, `1`, and so on.

    Raises:
        UsageError: there are fewer than two labels, a name is empty, or two labels begin with the same token.
    """
    if len(names) < 2:
        raise UsageError(
            f"there must be at least two labels, not {shown(list(names))}; name them by --label-names neg,pos"
        )
    tokens: list[int] = []
    for label, name in enumerate(names):
        require_utf8(name, f"the name of label {label}")
        ids = tokenizer.encode(name, add_special_tokens=False).ids
        if not ids:
            raise UsageError(f"the name of label {label} is empty; name all labels by --label-names")
        if ids[0] in tokens:
            numbers = [str(number) for number in range(len(names))]
            if or_numbers and len(set(names)) == len(names) and list(names) != numbers:
                with suppress(FtError):  # of the numbers: the user knows only the names
                    return label_tokens(numbers, tokenizer)
            other = names[tokens.index(ids[0])]
            remedy = "give them names that differ from the start by --label-names"
            if or_numbers:  # they may be words of the data, which --label-names cannot rename
                remedy = (
                    f"as {len(names):,} labels, they cannot be numbered by single tokens of this tokenizer either: "
                    "rename words in the data, name numbers by --label-names, or check --label-column"
                )
            raise UsageError(
                f"the labels {shown(other)} and {shown(name)} begin with the same token "
                f"{shown(tokenizer.id_to_token(ids[0]))}; {remedy}"
            )
        tokens.append(ids[0])
    return tokens


def length_of(example: Example) -> int:
    """The tokens of an example, all targets included, as --max-length counts them."""
    return len(example.input_ids) + 1  # all targets but the last are inputs too


def keep_end(example: Example, max_length: int) -> Example:
    """The last `max_length` tokens of an example."""
    if length_of(example) <= max_length:
        return example
    input_ids = example.input_ids[-(max_length - 1) :]
    return Example(input_ids, example.target_ids[-len(input_ids) :])


def describe_cut(lengths: Sequence[int], max_length: int, limit: int) -> list[str]:
    """A note on the examples that are longer than `max_length`, and the lengths that keep more; none if none is.

    Args:
        lengths: the tokens of each example, as `length_of` counts them.
        max_length: the tokens that are kept.
        limit: the most that the model can read.
    """
    ranked = sorted(lengths)
    cut = sum(length > max_length for length in ranked)
    if not cut:
        return []
    wanted = {ranked[(len(ranked) * 95 - 1) // 100]: "95%"} | {ranked[-1]: "all"}  # one, if both are the same length
    better = [f"{length:,} {share}" for length, share in wanted.items() if max_length < length <= limit]
    advice = f"the model reads at most {limit:,}"
    if better:
        advice = f"--max-length {better[0].replace(' ', ' keeps ')} of them complete" + "".join(
            f", {each}" for each in better[1:]
        )
    is_one = cut == 1
    longer = f"{'is' if is_one else 'are'} longer than --max-length {max_length:,}"
    kept = f"{'keeps its' if is_one else 'keep their'} end"
    return [f"{cut:,} of {counted(len(ranked), 'example')} {longer} and {kept}; {advice}"]


def encode(split: Split, tokenizer: Tokenizer, label_ids: Sequence[int], max_length: int) -> list[Example]:
    """Tokenize the rows of a split: the input is [tokens of the text, end-of-text], the target the token of the label.

    The label is only a target, never an input. Of an example of more than `max_length` tokens the end is kept. For
    completions see `_encode_completions`.

    Args:
        split: the rows.
        tokenizer: that of the model.
        label_ids: the token of each label.
        max_length: tokens of an example, end-of-text and label included.

    Raises:
        FtError: a label is out of range, or the tokenizer has no end-of-text.
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
                f"the label in {split.where(row)} is {label}, it must be from 0 to {limit}; correct the data, or name "
                "all labels by --label-names"
            )
    encodings = tokenizer.encode_batch_fast(split.texts, add_special_tokens=False)
    return [
        keep_end(Example(input_ids=[*encoding.ids, end_of_text], target_ids=[label_ids[label]]), max_length)
        for encoding, label in zip(encodings, split.labels, strict=True)
    ]


def _encode_completions(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: Tokenizer, end_of_text: int, max_length: int
) -> list[Example]:
    """Tokenize prompts and completions: the targets are the tokens of the completion and a final end-of-text.

    Prompt and completion are tokenized separately, so that a prompt has the same tokens in generation. Of an example of
    more than `max_length` tokens the end is kept. An empty prompt is replaced by end-of-text, after which GPT-2 was
    trained to begin a text.
    """
    encoded_prompts = tokenizer.encode_batch_fast(prompts, add_special_tokens=False)
    encoded_completions = tokenizer.encode_batch_fast(completions, add_special_tokens=False)
    examples = []
    for prompt, completion in zip(encoded_prompts, encoded_completions, strict=True):
        targets = [*completion.ids, end_of_text]
        tokens = [*(prompt.ids or [end_of_text]), *targets]
        examples.append(keep_end(Example(tokens[:-1], targets), max_length))
    return examples
