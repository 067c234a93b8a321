"""Forgetting: the loss on general text before, during and after fine-tuning.

Fine-tuning on one task can make a model worse at others. A text unrelated to the training data shows how much: by the
mean cross-entropy per token, in nats, and its exponential, the perplexity (Jelinek et al., "Perplexity - a measure of
the difficulty of speech recognition tasks", 1977). A perplexity of k is the uncertainty of k equally likely tokens.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ft.data.dataset_files import SeveralDataSetsError, dataset_files
from ft.data.examples import Example
from ft.data.tables import read_texts
from ft.errors import FtError, UsageError, counted, shown
from ft.evaluation.general_text import GENERAL_TEXT
from ft.io.formats import suffix_of

BUILTIN = "builtin"
TEXT_FILES = (".txt", ".md", ".text")  # suffixes that no data set on the Hub has
WINDOW = 256  # tokens of context at most
MOST_TOKENS = 20_000  # evaluated each time
MOST_CHARACTERS = 16 * MOST_TOKENS  # English has four or five per token
WINDOWS_AT_ONCE = 4  # the logits of four windows take 200 MB with GPT-2's vocabulary


@dataclass(frozen=True)
class GeneralText:
    """A text split into windows.

    Attributes:
        source: the value of `--forgetting`.
        windows: the tokens, each the target of the one before it.
        complete: whether the windows hold the full text.
    """

    source: str
    windows: list[Example]
    complete: bool

    def __str__(self) -> str:
        tokens = sum(len(window.target_ids) for window in self.windows)
        return f"{self.source}, {'' if self.complete else 'the first '}{counted(tokens, 'token')}"


def read_general_text(source: str, tokenizer: Tokenizer, n_positions: int) -> GeneralText:
    """Read the text that `--forgetting` names: a UTF-8 text file, the column `text` of a data set, or the builtin text.

    Each window begins with the last token of the one before, so that every token but the first is predicted once.
    Windows do not begin with end-of-text: fine-tuning teaches the model to predict a label after it.

    Args:
        source: a file, a data set, or "builtin".
        tokenizer: that of the model.
        n_positions: positions of the model, which limit the windows.

    Raises:
        FtError: there is no such text, it cannot be read, or it is too short.
    """
    if source == BUILTIN:
        text = GENERAL_TEXT
    elif Path(source).is_file() and suffix_of(source) is None:
        text = _read_file(Path(source))
    elif not Path(source).exists() and Path(source).suffix.lower() in TEXT_FILES:
        raise UsageError(f"--forgetting is {shown(source)}, there is no such file")
    else:
        text = _read_dataset(source)
    ids = tokenizer.encode(text[:MOST_CHARACTERS], add_special_tokens=False).ids
    if len(ids) < 2:
        raise UsageError(
            f"--forgetting is {shown(source)}, which holds {counted(len(ids), 'token')}: name a text of at least 2, "
            "better 1,000"
        )
    complete = len(text) <= MOST_CHARACTERS and len(ids) <= MOST_TOKENS
    ids = ids[:MOST_TOKENS]
    length = min(WINDOW, n_positions) - 1
    starts = range(0, len(ids) - 1, length)
    windows = [Example(ids[i : i + length + 1][:-1], ids[i + 1 : i + length + 1]) for i in starts]
    return GeneralText(source, windows, complete)


def _read_file(path: Path) -> str:
    """The beginning of a text file, with one character more than is used."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(MOST_CHARACTERS + 1)
    except OSError as error:
        raise FtError(f"--forgetting is {shown(str(path))}, which cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FtError(
            f"--forgetting is {shown(str(path))}, which is not UTF-8 ({error.reason}): convert it, or name another text"
        ) from error


def _read_dataset(name: str) -> str:
    """The first texts of the test, else validation, else training split of a data set, separated by empty lines.

    Only that split is downloaded. `owner/name/part` names one of several data sets in a repository on the Hub.
    """
    dataset, part = name, ""
    owner, _, rest = name.partition("/")
    if rest.count("/") == 1 and not os.path.exists(os.path.expanduser(owner)):  # not a path in a local directory
        dataset, _, part = name.rpartition("/")
    try:
        (paths,) = dataset_files(dataset, part=part or None, first_of=("test", "validation", "train")).values()
        text = ""
        for path in paths:
            text += "".join(f"{row}\n\n" for row in read_texts(path, "text")[0])
            if len(text) > MOST_CHARACTERS:
                break
        return text
    except SeveralDataSetsError as error:
        raise UsageError(
            f"--forgetting is {shown(name)}, which holds several data sets, {', '.join(error.directories)}: name one "
            f"of them, as {name}/{error.directories[0]}"
        ) from error
    except FtError as error:
        kind = UsageError if isinstance(error, UsageError) else FtError
        raise kind(f"--forgetting is {shown(name)}, which is not a text file, and as a data set: {error}") from error


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats; inf if it overflows or the loss is NaN."""
    return math.exp(loss) if loss < 700 else math.inf
