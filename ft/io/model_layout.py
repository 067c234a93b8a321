"""The files of a model: which they are, given the names in its directory or repository, and where they are."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ft.errors import FtError, shown
from ft.io.hub import Source, find_files

CONFIG, TOKENIZER, VOCABULARY, MERGES = "config.json", "tokenizer.json", "vocab.json", "merges.txt"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CARD, GGUF = "README.md", ".gguf"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Optional files that describe the tokenizer.
ABOUT_TOKENIZER = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
CLASSIFIER = "GPT2ForSequenceClassification"  # the class of `transformers`
# The files of an export by its format, which is also the name of its directory in a run.
EXPORTED_FILES = {
    "classifier": {CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG, CARD},
    "gguf": {f"model-f32{GGUF}", f"model-f16{GGUF}", CARD},
}


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model.

    Attributes:
        source: the name that the user gave, for messages.
        config: config.json.
        tokenizer: by name: tokenizer.json, else vocab.json and merges.txt, and other files of the tokenizer.
        weights: the safetensors file, or its shards in the order of their names; empty if not requested.
    """

    source: str
    config: Path
    tokenizer: dict[str, Path]
    weights: tuple[Path, ...]


def model_files(
    model: str | Path, revision: str | None = None, *, with_weights: bool = True, named_by: str = ""
) -> ModelFiles:
    """Find the files of a model in a directory, in the Hub's cache or on the Hub.

    Weights are `model.safetensors`, else the shards that `model.safetensors.index.json` names.

    Args:
        model: a directory or a Hub id; a `Path` is always a directory.
        revision: branch, tag or commit on the Hub.
        with_weights: whether to find (and on the Hub, download) the weights too.
        named_by: the argument that names the model, for messages; empty for --model.

    Raises:
        FtError: no such directory, repository, revision or file; no connection; a malformed file.
    """
    is_directory, model = isinstance(model, Path), str(model)
    source = Source("model", model, revision, is_directory, named_by)

    def needed(names: Collection[str]) -> list[str]:
        return choose_model_files(names, model, with_weights=with_weights)

    files = find_files(source, needed)
    weights = [files[WEIGHTS]] if WEIGHTS in files else []
    if INDEX in files:
        shards = shard_names(files[INDEX])
        weights = list(find_files(source, lambda names: require_files(shards, names, model)).values())
    tokenizer = {name: path for name, path in files.items() if name not in (CONFIG, WEIGHTS, INDEX)}
    return ModelFiles(model, files[CONFIG], tokenizer, tuple(weights))


def choose_model_files(names: Collection[str], model: str, *, with_weights: bool) -> list[str]:
    """Choose the files of a model among `names`; for sharded weights the index only.

    Raises:
        FtError: one is missing, or the files are those of a PEFT adapter.
    """
    if "adapter_config.json" in names and CONFIG not in names:
        raise FtError(
            f"{model} is an adapter, not a full model: pass it as --adapter to continue its training, with the model "
            "that it was trained on as --model; predict, evaluate, generate and export take it as it is"
        )
    has_parts = TOKENIZER not in names and {VOCABULARY, MERGES} <= set(names)
    tokenizer = [VOCABULARY, MERGES] if has_parts else [TOKENIZER]
    weights = INDEX if INDEX in names and WEIGHTS not in names else WEIGHTS
    about = [name for name in ABOUT_TOKENIZER if name in names]
    return require_files([CONFIG, *tokenizer] + [weights] * with_weights, names, model) + about


def require_files(needed: list[str], names: Collection[str], model: str) -> list[str]:
    """Return `needed` if all are among `names`.

    Raises:
        FtError: one is missing.
    """
    if missing := [name for name in needed if name not in names]:
        pickled = " Pickled weights (pytorch_model.bin) are not read, since unpickling can run any code: convert them."
        hint = pickled if missing[-1].endswith(".safetensors") else ""
        raise FtError(f"{model} has no {', '.join(missing)}: use another --model or --model-revision.{hint}")
    return needed


def shard_names(index: Path) -> list[str]:
    """Read the names of the shards from an index of weights.

    Raises:
        FtError: it is not such an index, or a name is not that of a .safetensors file beside it.
    """
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FtError(f"{index} is not an index of weights: it has no `weight_map` from tensors to files.") from error
    for name in names or [""]:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(name), re.ASCII):
            raise FtError(f"{index} lists {shown(name)}, which is not the name of a .safetensors file beside it.")
    return names
