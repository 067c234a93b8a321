"""The configuration and tokenizer of a model: read for all commands, and copied to saved models."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ft.checkpoint.store import ModelSource
from ft.checkpoint.tokenizer_files import TokenizerSource, open_tokenizer
from ft.data.examples import END_OF_TEXT, require_utf8
from ft.errors import FtError
from ft.io.model_layout import ModelFiles
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

    def source(self, label_names: Sequence[str]) -> ModelSource:
        """What every saved model gets from its source. Texts end with `<|endoftext|>`, as in training."""
        tokenizer = self.tokenizer.tokenizer
        published, end = dict(self.published), tokenizer.token_to_id(END_OF_TEXT)
        ends = published.get("eos_token_id")
        if end != ends and not (isinstance(ends, list) and end in ends):
            published["eos_token_id"] = end
        published.setdefault("bos_token_id", end)
        return ModelSource(published, self.tokenizer.serialized, label_names, self.tokenizer.about)


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
