"""The demo: film reviews generated from a grammar, and a small GPT-2 with random weights.

`python run.py --demo` runs the complete program without a network or downloaded files. The training data are synthetic,
but not trivial: no single word decides the label of a review, the order of words and their negations do.

    "the plot is dull , but the acting is never less than superb ."    pos
    "the plot is superb , but the acting is never less than dull ."    neg

Both directories have the Hub's layout: the program reads them as it reads GPT-2 and the real reviews.
"""

import json
import math
import random
import tempfile
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from ft.data.examples import END_OF_TEXT
from ft.errors import FtError
from ft.io.plain_files import remove
from ft.model.gpt2 import GPT2, GPT2Config

# --- the grammar ------------------------------------------------------------------------------------------------------

ASPECTS = ("plot", "script", "acting", "cast", "score", "editing", "ending", "humour", "dialogue", "romance", "camera")
ADJECTIVES = {
    False: ("dull", "weak", "clumsy", "flat", "boring", "awkward", "stale", "tedious"),
    True: ("superb", "fresh", "clever", "moving", "sharp", "brilliant", "gripping", "witty"),
}
VERBS = {False: ("ruin", "sink", "spoil"), True: ("save", "lift", "redeem")}

# Predicates by their number of negations. One inverts the meaning of the adjective or verb, two cancel out.
PREDICATES = {
    0: ("is {adjective}", "feels {adjective}", "turns out {adjective}", "manages to {verb} the film"),
    1: ("is not {adjective}", "is anything but {adjective}", "hardly feels {adjective}", "fails to {verb} the film"),
    2: ("is never less than {adjective}", "is never anything but {adjective}", "never fails to {verb} the film"),
}
NEGATIONS = (0, 0, 0, 0, 1, 1, 2)  # drawn with these frequencies

# A review is a clause with the verdict, and perhaps another that agrees with it or that it outweighs.
REVIEWS = (
    "{verdict}",
    "{verdict}",
    "{verdict}",
    "{verdict} and {agreeing}",
    "{yielding} , but {verdict}",
    "{yielding} , and yet {verdict}",
    "{yielding} , but what counts is that {verdict}",
    "although {yielding} , {verdict}",
    "{verdict} , although {yielding}",
    "{verdict} , even if {yielding}",
    "that {verdict} matters more than that {yielding}",
)
OPENINGS = ("", "", "", "in the end ,", "as a thriller ,", "for a first film ,", "to be fair ,", "on the big screen ,")


def compose_clause(aspect: str, good: bool, rng: random.Random) -> str:
    """A clause that `aspect` is good or bad, with zero, one or two negations."""
    negations = rng.choice(NEGATIONS)
    predicate = rng.choice(PREDICATES[negations])
    good_word = good != (negations % 2 == 1)
    adjective, verb = rng.choice(ADJECTIVES[good_word]), rng.choice(VERBS[good_word])
    return f"the {aspect} {predicate.format(adjective=adjective, verb=verb)}"


def compose_review(good: bool, rng: random.Random) -> str:
    """A review with a good or bad verdict, in lower case with spaces around punctuation, as the real reviews."""
    aspect, other_aspect = rng.sample(ASPECTS, 2)
    body = rng.choice(REVIEWS).format(
        verdict=compose_clause(aspect, good, rng),
        agreeing=compose_clause(other_aspect, good, rng),
        yielding=compose_clause(other_aspect, not good, rng),
    )
    return f"{rng.choice(OPENINGS)} {body} .".lstrip()


def compose_splits(rng: random.Random) -> dict[str, list[tuple[str, int]]]:
    """The rows (text, label) of each split: balanced labels, and no text twice in all splits."""
    seen: set[str] = set()
    splits: dict[str, list[tuple[str, int]]] = {}
    for split, size in SPLITS.items():
        rows: list[tuple[str, int]] = []
        while len(rows) < size:
            label = len(rows) % 2
            text = compose_review(bool(label), rng)
            if text not in seen:
                seen.add(text)
                rows.append((text, label))
        rng.shuffle(rows)
        splits[split] = rows
    return splits


# --- the files --------------------------------------------------------------------------------------------------------

SPLITS = {"train": 6000, "validation": 500, "test": 500}
LABELS = ("neg", "pos")
VOCABULARY = 600  # tokens at most: the 256 bytes, and merges until each word of the grammar is one token
WIDTH = 64
DROPOUT = 0.0  # the data have no label noise that the model could memorize


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE like GPT-2's (Radford et al., 2019, section 2.2) on `texts` and the labels.

    A label is a word without a leading space. Each occurs as often as there are texts, so that its merges are learned
    early and it is one token. End-of-text has the last id, as in GPT-2.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=VOCABULARY - 1, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([*texts, *LABELS * len(texts)], trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def write_model(directory: Path, texts: list[str], seed: int) -> None:
    """Write the files of a published model: configuration, a tokenizer trained on `texts`, and random weights."""
    tokenizer = train_tokenizer(texts)
    model_config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=64,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        embd_pdrop=DROPOUT,
        attn_pdrop=DROPOUT,
        resid_pdrop=DROPOUT,
        # GPT-2's 0.02 is for a width of 768. A sum over fewer inputs needs larger weights for the same variance.
        initializer_range=round(0.02 * math.sqrt(768 / WIDTH), 3),
    )
    end_of_text_id = tokenizer.token_to_id(END_OF_TEXT)
    published = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        **asdict(model_config),
    }
    model = GPT2(model_config)
    model.init_weights(seed)
    (directory / "config.json").write_text(json.dumps(published, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})


def write_dataset(directory: Path, splits: dict[str, list[tuple[str, int]]]) -> None:
    """Write each split as parquet, with the label names in the schema metadata, as the `datasets` library does."""
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": LABELS, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.string()), ("label", pa.int64())], metadata=metadata)
    for split, rows in splits.items():
        texts, labels = zip(*rows, strict=True)
        pq.write_table(pa.table([texts, labels], schema=schema), directory / f"{split}.parquet")


def write_demo(directory: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write the model and the data set of the demo to `directory`, in place of earlier ones.

    Both are written to a staging directory and renamed when complete.

    Returns:
        The directory of the model and that of the data set.

    Raises:
        FtError: `directory` is a symbolic link.
    """
    if directory.is_symlink():
        raise FtError(f"{directory} is a link, and the demo's files in it would be replaced: delete the link")
    directory.mkdir(parents=True, exist_ok=True)
    splits = compose_splits(random.Random(seed))
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=directory) as name:
        staging = Path(name)
        for part in ("model", "dataset"):
            (staging / part).mkdir()
        write_model(staging / "model", [text for text, _ in splits["train"]], seed)
        write_dataset(staging / "dataset", splits)
        for part in ("model", "dataset"):
            remove(directory / part)
            (staging / part).rename(directory / part)
    return directory / "model", directory / "dataset"
