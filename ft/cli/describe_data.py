"""The command `data`: class counts, token lengths and duplicates of a data set, before training on it.

python run.py data --dataset ./my-reviews --max-length 64
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ft.checkpoint.error_hints import explain_out_of_memory
from ft.checkpoint.model_description import read_description
from ft.config import Config
from ft.data.load import read_data, with_demo_inputs
from ft.data.splits import Split
from ft.errors import one_line, printable, shown
from ft.io.model_layout import model_files
from ft.model.pretrained import model_config_of

BARS = 12  # maximum number of lines of the histogram
WIDTH = 40  # characters of its longest bar
UNLIMITED = 2**62  # a --max-length that truncates nothing


def describe(config: Config) -> None:
    """Print the examples per class and split, a histogram of their lengths, and the truncated and repeated ones.

    Args:
        config: the settings of the run that would read the data.

    Raises:
        FtError: the data or the tokenizer cannot be read, or do not fit each other.
    """
    with (
        tempfile.TemporaryDirectory() as directory,
        explain_out_of_memory(f"--dataset {shown(config.dataset)}", "fewer or shorter rows in its files"),
    ):
        source = "the demo" if config.demo else config.dataset
        if config.demo:
            config = with_demo_inputs(config, Path(directory))
        files = model_files(config.model, config.model_revision, with_weights=False)
        described = read_description(files)
        model_config_of(described.config, config)  # raises if --max-length exceeds the model's n_positions
        tokenizer = described.tokenizer.tokenizer
        data = read_data(replace(config, max_length=UNLIMITED), tokenizer)
    splits = data.splits
    lengths = {
        name: [len(example.input_ids) + len(example.target_ids) for example in examples]
        for name, examples in data.examples.items()
    }

    sizes = ", ".join(f"{len(split.texts):,} {name}" for name, split in splits.items())
    print(f"{printable(source)}: {sizes} examples")
    for note in (*described.tokenizer.notes, *data.notes):
        print(f"Note: {printable(note)}.")
    if data.label_names:
        words = [tokenizer.decode([token]) for token in data.label_ids]
        print("\n" + _class_table(splits, data.label_names, words))
    print("\n" + _histogram(lengths["train"], config.max_length))
    for name, counts in lengths.items():
        cut = sum(length > config.max_length for length in counts)
        print(
            f"{name}: {sum(counts):,} tokens; {cut:,} of {len(counts):,} examples ({cut / len(counts):.1%}) are longer "
            f"than --max-length {config.max_length} and lose their beginning"
        )
    print(_duplicates(splits))


def _class_table(splits: dict[str, Split], names: Sequence[str], words: Sequence[str]) -> str:
    """Examples per class and split, and the label token of each class."""
    counts = {name: Counter(split.labels) for name, split in splits.items()}
    names = [one_line(name) for name in names]
    width = max(5, *map(len, names))
    lines = ["  ".join(["label".ljust(width), "token".ljust(10), *(name.rjust(16) for name in splits)])]
    for label, (name, word) in enumerate(zip(names, words, strict=True)):
        cells = [
            f"{counts[split][label]:,} ({counts[split][label] / len(splits[split].labels):.1%})".rjust(16)
            for split in splits
        ]
        lines.append("  ".join([name.ljust(width), repr(word).ljust(10), *cells]))
    absent = [name for label, name in enumerate(names) if counts["train"][label] == 0]
    if absent:
        lines.append(f"WARNING: no training example has the label {', '.join(absent)}: it cannot be learned.")
    return "\n".join(lines)


def _histogram(lengths: Sequence[int], max_length: int) -> str:
    """A histogram of the tokens per training example, which marks --max-length."""
    ranked = sorted(lengths)
    step = max(1, -(-ranked[-1] // BARS))
    bins = Counter((length - 1) // step for length in lengths)
    top = max(bins.values())
    lines = ["tokens per training example, end-of-text and targets included"]
    for i in range(min(bins), max(bins) + 1):
        first, last = i * step + 1, (i + 1) * step
        mark = "  <- --max-length" if first <= max_length <= last else ""
        bar = "#" * -(-bins[i] * WIDTH // top)
        lines.append(f"{first:>6,} to {last:<6,} {bins[i]:>8,} {bar}{mark}")
    half, most = (ranked[(len(ranked) * share - 1) // 100] for share in (50, 95))
    lines.append(f"median {half:,}, 95th percentile {most:,}, maximum {ranked[-1]:,}")
    return "\n".join(lines)


def _duplicates(splits: dict[str, Split]) -> str:
    """The number of texts that are repeated in train, and of those of other splits that are also in train."""
    train = Counter(splits["train"].texts)
    lines = [f"texts that are repeated in train: {sum(count > 1 for count in train.values()):,}"]
    for name, split in splits.items():
        if name != "train":
            both = sum(text in train for text in split.texts)
            lines.append(
                f"examples of {name} whose text is also in train: {both:,}"
                + ("" if both == 0 else "; they inflate its accuracy")
            )
    return "\n".join(lines)
