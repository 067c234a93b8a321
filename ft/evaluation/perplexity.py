"""What fine-tuning makes a model forget: its loss on general text, before the first step, on the way, and at the end.

Fine-tuning improves a special case at the expense of the general one. How much is seen on a text that has nothing to do
with the training data: by the mean cross-entropy per token, in nats, and its exponential, the perplexity (Jelinek et
al., "Perplexity - a measure of the difficulty of speech recognition tasks", 1977), which is the number of equally
likely tokens that would leave a reader as uncertain.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ft.data.dataset_files import dataset_files
from ft.data.examples import Example
from ft.data.split_files import SeveralDataSetsError
from ft.data.tables import read_texts
from ft.errors import FtError
from ft.io.formats import suffix_of

BUILTIN = "builtin"
WINDOW = 256  # tokens that are read at once, so that most are predicted from many
MOST_TOKENS = 20_000  # that are read in all, at every evaluation
MOST_CHARACTERS = 16 * MOST_TOKENS  # English has four or five to a token
WINDOWS_AT_ONCE = 4  # the logits of four windows take 200 MB with GPT-2's vocabulary


@dataclass(frozen=True)
class GeneralText:
    """A text cut into windows.

    Attributes:
        source: where it comes from, as the user said it.
        windows: the tokens, each the target of the one before it.
        complete: whether this is all of it.
    """

    source: str
    windows: list[Example]
    complete: bool

    def __str__(self) -> str:
        tokens = sum(len(window.target_ids) for window in self.windows)
        return f"{self.source}, {'' if self.complete else 'the first '}{tokens:,} tokens"


def read_general_text(source: str, tokenizer: Tokenizer, n_positions: int) -> GeneralText:
    """Read the text that `--forgetting` names: a UTF-8 text file, the column `text` of a data set, or our own pages.

    Each window begins with the last token of the one before, so that every token but the first is predicted once. No
    end-of-text stands before them: after that token the model learns to name a label, which would count against it.

    Raises:
        FtError: there is no such text, it cannot be read, or it is too short.
    """
    if source == BUILTIN:
        from ft.evaluation.general_text import GENERAL_TEXT

        text = GENERAL_TEXT
    elif Path(source).is_file() and suffix_of(source) is None:
        text = _read_file(Path(source))
    else:
        text = _read_dataset(source)
    ids = tokenizer.encode(text[:MOST_CHARACTERS], add_special_tokens=False).ids
    if len(ids) < 2:
        raise FtError(
            f"--forgetting is {source!r}, which holds {len(ids)} tokens: name a text of at least 2, better 1,000"
        )
    complete = len(text) <= MOST_CHARACTERS and len(ids) <= MOST_TOKENS
    ids = ids[:MOST_TOKENS]
    length = min(WINDOW, n_positions) - 1
    starts = range(0, len(ids) - 1, length)
    windows = [Example(ids[i : i + length + 1][:-1], ids[i + 1 : i + length + 1]) for i in starts]
    return GeneralText(source, windows, complete)


def _read_file(path: Path) -> str:
    """The beginning of a text file, one character more than will be used."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(MOST_CHARACTERS + 1)
    except OSError as error:
        raise FtError(f"--forgetting is {str(path)!r}, which cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FtError(
            f"--forgetting is {str(path)!r}, which is not UTF-8 ({error.reason}): convert it, or name another text"
        ) from error


def _read_dataset(name: str) -> str:
    """The first texts of a data set's test, else validation, else training split, with empty lines between them.

    Only that split is downloaded. Of several data sets in one repository of the Hub, `owner/name/part` names one.
    """
    folder, part = name, ""
    owner, _, rest = name.partition("/")
    if rest.count("/") == 1 and not os.path.exists(os.path.expanduser(owner)):  # no path into a folder that is there
        folder, _, part = name.rpartition("/")
    try:
        (paths,) = dataset_files(folder, part=part or None, first_of=("test", "validation", "train")).values()
        text = ""
        for path in paths:
            text += "".join(f"{row}\n\n" for row in read_texts(path, "text"))
            if len(text) > MOST_CHARACTERS:
                break
        return text
    except SeveralDataSetsError as error:
        there = ", ".join(error.folders)
        raise FtError(
            f"--forgetting is {name!r}, which holds several data sets, {there}: name one of them, as "
            f"{name}/{error.folders[0]}"
        ) from error
    except FtError as error:
        raise FtError(f"--forgetting is {name!r}, which is no text file, and as a data set: {error}") from error


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats; infinite where that is beyond all numbers, or the loss is none."""
    return math.exp(loss) if loss < 700 else math.inf
