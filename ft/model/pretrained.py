"""Pretrained weights: which files a model has, its configuration, and loading the tensors."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ft.errors import FtError
from ft.model.gpt2 import GPT2, GPT2Config

if TYPE_CHECKING:
    pass

from ft.config import Config
from ft.io.hub import CONFIG, TOKENIZER, Source, find_files


def read_tensors(paths: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of safetensors files, one after the other, each mapped from the file and not yet copied.

    Raises:
        FtError: a file is no safetensors file, is cut off, or cannot be read.
    """
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, as the file is no mapping
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise FtError(f"cannot read the weights in {path}: {error}") from error


def load_weights(model: GPT2, paths: Sequence[Path]) -> None:
    """Fill the model from published weights.

    Raises:
        FtError: a file is unreadable, or a tensor is missing, superfluous, of another shape, or holds what is no
            number; names the file.
    """
    try:
        model.load_published(read_tensors(paths))
    except FtError as error:
        raise FtError(f"{', '.join(map(str, paths))}: {error}") from error


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are. `source` is what the user named, for messages."""

    source: str
    config: Path
    tokenizer: Path
    weights: tuple[Path, ...]
    """The safetensors file, or its shards in the order of their names; empty where not asked for."""


def model_files(model: str | Path, revision: str | None = None, *, with_weights: bool = True) -> ModelFiles:
    """Find a model's files: in the folder `model`, else, if it is no `Path`, in the cache or on the Hub under that id.

    Weights are `model.safetensors`, else the shards that `model.safetensors.index.json` names.

    Raises:
        FtError: no such folder, repository, revision or file; no connection; a file that is not what it should be.
    """
    is_folder, model = isinstance(model, Path), str(model)
    source = Source("model", model, revision, is_folder)

    def needed(names: Collection[str]) -> list[str]:
        weights = INDEX if INDEX in names and WEIGHTS not in names else WEIGHTS
        return _all_of([CONFIG, TOKENIZER] + [weights] * with_weights, names, model)

    files = find_files(source, needed)
    weights = [files[WEIGHTS]] if WEIGHTS in files else []
    if INDEX in files:
        shards = _shard_names(files[INDEX])
        weights = list(find_files(source, lambda names: _all_of(shards, names, model)).values())
    return ModelFiles(model, files[CONFIG], files[TOKENIZER], tuple(weights))


def _all_of(needed: list[str], names: Collection[str], model: str) -> list[str]:
    if missing := [name for name in needed if name not in names]:
        pickled = " Pickled weights (pytorch_model.bin) are not read, for they may run any program: convert them."
        hint = pickled if missing[-1].endswith(".safetensors") else ""
        raise FtError(f"{model} has no {', '.join(missing)}: name another --model or --model-revision.{hint}")
    return needed


def _shard_names(index: Path) -> list[str]:
    """Read which files hold the weights. Only plain names will do: an index must not reach for files elsewhere."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FtError(f"{index} is no index of weights: it has no `weight_map` from tensors to files.") from error
    for name in names or [""]:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(name), re.ASCII):
            raise FtError(f"{index} names {name!r} as a file of weights: that is no .safetensors file beside it.")
    return names


def model_config_of(published: dict[str, Any], path: Path, config: Config) -> GPT2Config:
    """The model's configuration with the run's dropout.

    Raises:
        FtError: it is no GPT-2, or has fewer positions than --max-length asks for.
    """
    try:
        model_config = GPT2Config.from_dict(published)
    except FtError as error:
        raise FtError(f"{path}: {error}") from error
    if config.max_length > model_config.n_positions:
        raise FtError(
            f"--max-length is {config.max_length}, but {config.model} has {model_config.n_positions} positions; "
            "lower it or take another --model"
        )
    if config.dropout is None:
        return model_config
    p = config.dropout
    return replace(model_config, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p)
