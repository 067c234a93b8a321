"""Which files a model consists of, given the names in its directory or repository."""

import json
import re
from collections.abc import Collection
from pathlib import Path

from ft.errors import FtError, shown

CONFIG, TOKENIZER, VOCABULARY, MERGES = "config.json", "tokenizer.json", "vocab.json", "merges.txt"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Optional files that describe the tokenizer.
ABOUT_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def choose_model_files(names: Collection[str], model: str, *, with_weights: bool) -> list[str]:
    """Choose the files of a model among `names`; for sharded weights the index only.

    Raises:
        FtError: one is missing, or the files are those of a PEFT adapter.
    """
    if "adapter_config.json" in names and CONFIG not in names:
        raise FtError(
            f"{model} is an adapter, not a full model: pass it as --adapter to continue its training, with the model "
            "that it was trained on as --model; predict, evaluate and generate take it as it is"
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
