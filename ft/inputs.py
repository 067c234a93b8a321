"""What a run reads: the model's configuration, and its data set as examples."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ft import hub
from ft.config import Config
from ft.data import Example, Split, encode, label_tokens, read_split
from ft.errors import FtError
from ft.gpt2 import GPT2Config


@dataclass(frozen=True)
class Data:
    """The splits as read, the same as examples, and what the labels are called and encoded as."""

    splits: dict[str, Split]
    examples: dict[str, list[Example]]
    label_names: tuple[str, ...]
    label_ids: list[int]
    tokenizer: Tokenizer


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


def read_data(config: Config, tokenizer: Tokenizer, model_config: GPT2Config) -> Data:
    """Fetch and read the data set, and make the examples.

    Raises:
        FtError: the data cannot be read or do not fit the labels or the model.
    """
    files = hub.dataset_files(config.dataset, config.dataset_revision)
    if "validation" not in files:
        raise FtError(f"{config.dataset} has no validation split (validation.parquet), which evaluation needs")
    if config.save_dataset is not None:
        hub.save_dataset(files, Path(config.save_dataset))
    splits = {name: read_split(name, paths) for name, paths in files.items()}
    names = splits["train"].label_names
    if config.label_names is not None:
        names = tuple(name.strip() for name in config.label_names.split(","))
    if names is None:
        raise FtError(f"{config.dataset} does not say what its labels are called; say it by --label-names neg,pos")
    if tokenizer.get_vocab_size() > model_config.vocab_size:
        raise FtError(
            f"the tokenizer of {config.model} has {tokenizer.get_vocab_size()} tokens, the model embeds only "
            f"{model_config.vocab_size}: they do not belong together"
        )
    label_ids = label_tokens(names, tokenizer)
    for name, token in zip(names, label_ids, strict=True):
        if tokenizer.decode([token]) != name:
            print(
                f"Note: the label {name!r} is several tokens; its first, {tokenizer.decode([token])!r}, stands for it."
            )
    examples = {name: encode(split, tokenizer, label_ids, config.max_length) for name, split in splits.items()}
    return Data(splits, examples, names, label_ids, tokenizer)
