"""Pretrained weights: which files a model has, its configuration, and loading the tensors."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ft.config import Config
from ft.errors import FtError
from ft.io.hub import Source, find_files
from ft.io.model_layout import CONFIG, INDEX, WEIGHTS, choose_model_files, require_files, shard_names
from ft.model.gpt2 import GPT2, GPT2Config


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


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are. `source` is what the user named, for messages."""

    source: str
    config: Path
    tokenizer: dict[str, Path]
    """By name: tokenizer.json, else vocab.json and merges.txt, and what else is said of the tokenizer."""
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
        return choose_model_files(names, model, with_weights=with_weights)

    files = find_files(source, needed)
    weights = [files[WEIGHTS]] if WEIGHTS in files else []
    if INDEX in files:
        shards = shard_names(files[INDEX])
        weights = list(find_files(source, lambda names: require_files(shards, names, model)).values())
    tokenizer = {name: path for name, path in files.items() if name not in (CONFIG, WEIGHTS, INDEX)}
    return ModelFiles(model, files[CONFIG], tokenizer, tuple(weights))


def model_config_of(model_config: GPT2Config, config: Config) -> GPT2Config:
    """The model's configuration with the run's dropout.

    Raises:
        FtError: it has fewer positions than --max-length asks for.
    """
    if config.max_length > model_config.n_positions:
        raise FtError(
            f"--max-length is {config.max_length}, but {config.model} has {model_config.n_positions} positions; "
            "lower it or take another --model"
        )
    if config.dropout is None:
        return model_config
    p = config.dropout
    return replace(model_config, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p)
