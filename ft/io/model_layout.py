"""Which files a model consists of, given the names that lie in its folder or repository."""

import json
import re
from collections.abc import Collection
from pathlib import Path

from ft.errors import FtError, shown

CONFIG, TOKENIZER, VOCABULARY, MERGES = "config.json", "tokenizer.json", "vocab.json", "merges.txt"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a model may say of its tokenizer beside the tokenizer itself.
ABOUT_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def files_of_a_model(names: Collection[str], model: str, *, with_weights: bool) -> list[str]:
    """The files that are needed of a model, of those that have these `names`; of shards the index only.

    Raises:
        FtError: one is missing, or it is no model but an adapter to one.
    """
    if "adapter_config.json" in names and CONFIG not in names:
        raise FtError(
            f"{model} is an adapter of PEFT, not a whole model: merge it into its base model by `merge_and_unload()`, "
            "save that and its tokenizer by `save_pretrained`, and name the folder"
        )
    has_parts = TOKENIZER not in names and {VOCABULARY, MERGES} <= set(names)
    tokenizer = [VOCABULARY, MERGES] if has_parts else [TOKENIZER]
    weights = INDEX if INDEX in names and WEIGHTS not in names else WEIGHTS
    about = [name for name in ABOUT_TOKENIZER if name in names]
    return all_of([CONFIG, *tokenizer] + [weights] * with_weights, names, model) + about


def all_of(needed: list[str], names: Collection[str], model: str) -> list[str]:
    """The files that are `needed`, all of which must be among `names`.

    Raises:
        FtError: one is missing.
    """
    if missing := [name for name in needed if name not in names]:
        pickled = " Pickled weights (pytorch_model.bin) are not read, for they may run any program: convert them."
        hint = pickled if missing[-1].endswith(".safetensors") else ""
        raise FtError(f"{model} has no {', '.join(missing)}: name another --model or --model-revision.{hint}")
    return needed


def shard_names(index: Path) -> list[str]:
    """Read which files hold the weights. Only plain names will do: an index must not reach for files elsewhere."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FtError(f"{index} is no index of weights: it has no `weight_map` from tensors to files.") from error
    for name in names or [""]:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(name), re.ASCII):
            raise FtError(f"{index} names {shown(name)} as a file of weights: that is no .safetensors file beside it.")
    return names
