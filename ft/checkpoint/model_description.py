"""The configuration and tokenizer of a model: read for all commands, and copied to saved models."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft.checkpoint.snapshot import STATE
from ft.checkpoint.store import ModelSource, checkpoints, is_checkpoint, verify_checkpoint
from ft.checkpoint.tokenizer_files import TokenizerSource, open_tokenizer
from ft.data.examples import END_OF_TEXT, require_utf8
from ft.data.table import listed
from ft.errors import FtError, UsageError
from ft.io.manifest import MANIFEST
from ft.io.model_layout import ModelFiles, model_files
from ft.io.plain_files import read_json
from ft.model.gpt2 import GPT2Config


@dataclass(frozen=True)
class ModelDescription:
    """A model without its weights.

    Attributes:
        published: the content of config.json.
        config: the fields of it that define GPT-2.
        tokenizer: the tokenizer and its files.
    """

    published: dict[str, Any]
    config: GPT2Config
    tokenizer: TokenizerSource

    def source(
        self, label_names: Sequence[str], max_length: int | None = None, label_numbers: Sequence[int] | None = None
    ) -> ModelSource:
        """What every saved model gets from its source and its task. Texts end with `<|endoftext|>`, as in training."""
        tokenizer = self.tokenizer.tokenizer
        published, end = dict(self.published), tokenizer.token_to_id(END_OF_TEXT)
        ends = published.get("eos_token_id")
        if end != ends and not (isinstance(ends, list) and end in ends):
            published["eos_token_id"] = end
        published.setdefault("bos_token_id", end)
        return ModelSource(
            published, self.tokenizer.serialized, label_names, self.tokenizer.about, max_length, label_numbers
        )


def read_description(files: ModelFiles) -> ModelDescription:
    """Read the configuration and tokenizer of a model, and check that they fit each other.

    Raises:
        FtError: a file cannot be read, the model is not a GPT-2, or the tokenizer has ids that it does not embed.
    """
    published = read_json(files.config)
    require_utf8(json.dumps(published, ensure_ascii=False), str(files.config))
    try:
        config = GPT2Config.from_dict(published)
    except FtError as error:
        raise FtError(f"{files.config}: {error}") from error
    tokenizer = open_tokenizer(files.tokenizer, config.n_positions)
    token, highest = max(tokenizer.tokenizer.get_vocab().items(), key=lambda pair: pair[1], default=("", -1))
    if highest >= config.vocab_size:
        raise FtError(
            f"the tokenizer of {files.source} has the token {token!r} with the id {highest}, the model embeds the ids "
            f"below {config.vocab_size}: they do not belong together. If the token was added later, "
            f"`model.resize_token_embeddings({highest + 1})` in transformers adds rows for it"
        )
    return ModelDescription(published, config, tokenizer)


def find_model(model: str, revision: str | None = None, *, with_weights: bool = True) -> ModelFiles:
    """The files of --model: those of `model_directory`, else on the Hub.

    Raises:
        FtError: as for `model_directory` and `model_files`.
    """
    return model_files(model_directory(Path(model)) or model, revision, with_weights=with_weights)


def model_directory(source: Path) -> Path | None:
    """The directory of the model that `source` names: itself, or that of a run; None if it is perhaps a Hub id.

    Raises:
        UsageError: `source` is a file, or an unknown name beside other runs.
        FtError: a run without a complete model, a damaged checkpoint, or a directory that cannot be read.
    """
    if source.is_dir() and not os.access(source, os.R_OK | os.X_OK):
        raise FtError(f"cannot read {source}: Permission denied")
    if source.is_file():
        raise UsageError(f"{source} is a file: a run, a checkpoint or a model is a directory")
    if not source.is_dir():
        siblings = () if source.parent == Path() else source.parent.glob("*/metrics.jsonl")
        runs = sorted(file.parent.name for file in siblings)
        if runs:  # most likely a misspelled run, not a Hub id
            raise UsageError(f"there is no run {source}; in {source.parent} are {listed(runs)}")
        return None
    if is_checkpoint(source) and ((source / MANIFEST).exists() or (source / STATE).exists()):  # not another program's
        if damage := verify_checkpoint(source):
            raise FtError(f"{source} is damaged: {damage}")
        return source
    if (source / "final").is_dir():
        return source / "final"
    if not (source / "metrics.jsonl").exists():
        return source
    damaged: set[Path] = set()
    # Listed anew each time, as a run in progress deletes and adds checkpoints.
    while candidates := [checkpoint for checkpoint in checkpoints(source) if checkpoint not in damaged]:
        if verify_checkpoint(candidates[-1]) is None:
            return candidates[-1]
        damaged.add(candidates[-1])
    raise FtError(f"the run {source} has no finished model and no complete checkpoint yet")
