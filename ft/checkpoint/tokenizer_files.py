"""Read a tokenizer from its files, and describe it in saved models so that `AutoTokenizer` gives the same tokens.

`tokenizer.json` contains the full pipeline. Models from before 2021 have `vocab.json` and `merges.txt` instead, from
which GPT-2's pipeline is built. `tokenizer_config.json` and the files beside it name the special tokens and the chat
template; they are copied to every saved model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from ft.data.examples import END_OF_TEXT, read_tokenizer, require_utf8
from ft.errors import FtError
from ft.io.model_layout import ABOUT_TOKENIZER, MERGES, TOKENIZER, TOKENIZER_CONFIG, VOCABULARY
from ft.io.plain_files import read_json

SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
# Where `transformers` loaded a tokenizer from, and `auto_map`, which names remote code.
NOT_COPIED = ("auto_map", "name_or_path", "tokenizer_file", "special_tokens_map_file", "is_local", "local_files_only")
# `transformers` loads the second from tokenizer.json as it is, and the first from its vocabulary alone.
GPT2_CLASS, GENERAL_CLASS = "GPT2Tokenizer", "PreTrainedTokenizerFast"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer with its files.

    Attributes:
        tokenizer: the pipeline.
        serialized: the pipeline as the content of a tokenizer.json.
        about: the content of the other files to save, by name.
        notes: what the user should know about how the files were read, one sentence each.
    """

    tokenizer: Tokenizer
    serialized: bytes
    about: dict[str, bytes]
    notes: list[str]


def open_tokenizer(files: Mapping[str, Path], n_positions: int) -> TokenizerSource:
    """Read a tokenizer and its configuration.

    Args:
        files: `ModelFiles.tokenizer`.
        n_positions: of the model, for the `model_max_length` of a missing `tokenizer_config.json`.

    Raises:
        FtError: a file cannot be read, or two files contradict each other.
    """
    paths = {name: path for name, path in files.items() if name in ABOUT_TOKENIZER}
    described = {name: read_json(path) for name, path in paths.items() if path.suffix == ".json"}
    for name, content in described.items():
        require_utf8(json.dumps(content, ensure_ascii=False), str(files[name]))
    config = described.get(TOKENIZER_CONFIG)
    if TOKENIZER in files:
        tokenizer, serialized = read_tokenizer(files[TOKENIZER]), files[TOKENIZER].read_bytes()
        if _apply_prefix_space(tokenizer, config or {}):
            serialized = tokenizer.to_str().encode()
    else:
        tokenizer = _from_vocabulary(files, described)
        serialized = tokenizer.to_str().encode()
    if config is None:
        config = {"model_max_length": n_positions, "clean_up_tokenization_spaces": False}
    saved = _saved_config(config, tokenizer, described.get(SPECIAL_TOKENS, {}))
    notes = []
    if TOKENIZER_CONFIG in files and saved.get("tokenizer_class") != config.get("tokenizer_class", GPT2_CLASS):
        notes.append(
            f"{files[TOKENIZER_CONFIG]} names {config.get('tokenizer_class', GPT2_CLASS)}, which does not give the "
            f"pipeline of {TOKENIZER}: {TOKENIZER} takes precedence, here and in saved models"
        )
    about = {name: path.read_bytes() for name, path in paths.items()}
    about[TOKENIZER_CONFIG] = (json.dumps(saved, indent=2, ensure_ascii=False) + "\n").encode()
    return TokenizerSource(tokenizer, serialized, about, notes)


def _saved_config(config: Mapping[str, Any], tokenizer: Tokenizer, special: Mapping[str, Any]) -> dict[str, Any]:
    """The `tokenizer_config.json` of a saved model: that of the source, with a class that gives this pipeline."""
    saved = {name: value for name, value in config.items() if name not in NOT_COPIED}
    is_remote = "auto_map" in config
    if not _is_gpt2_class(saved.get("tokenizer_class")) and not is_remote:
        return saved
    saved = {**{name: END_OF_TEXT for name in SPECIAL_NAMES[:3] if name not in special}, **saved}
    if is_remote or not is_gpt2_pipeline(tokenizer):
        return {**saved, "tokenizer_class": GENERAL_CLASS}
    return {"tokenizer_class": GPT2_CLASS, **saved, "add_prefix_space": tokenizer.pre_tokenizer.add_prefix_space}


def _is_gpt2_class(name: object) -> bool:
    """Whether `transformers` uses a GPT-2 tokenizer for this `tokenizer_class`, as it does for a missing one."""
    return name in (None, GPT2_CLASS, f"{GPT2_CLASS}Fast")


def is_gpt2_pipeline(tokenizer: Tokenizer) -> bool:
    """Whether a pipeline is the one that `GPT2Tokenizer` builds: byte-level BPE and nothing else."""
    model, pre_tokenizer = tokenizer.model, tokenizer.pre_tokenizer
    return (
        tokenizer.normalizer is None
        and type(pre_tokenizer) is ByteLevel
        and pre_tokenizer.use_regex
        and type(model) is BPE
        and not any((model.dropout, model.unk_token, model.fuse_unk, model.byte_fallback, model.ignore_merges))
        and not (model.continuing_subword_prefix or model.end_of_word_suffix)
    )


def _apply_prefix_space(tokenizer: Tokenizer, config: Mapping[str, Any]) -> bool:
    """Apply `add_prefix_space` of tokenizer_config.json, which `transformers` prefers for a GPT-2 tokenizer.

    Returns:
        Whether it differs from tokenizer.json.
    """
    prefix = config.get("add_prefix_space")
    if type(prefix) is not bool or not _is_gpt2_class(config.get("tokenizer_class")):
        return False
    if not is_gpt2_pipeline(tokenizer) or tokenizer.pre_tokenizer.add_prefix_space == prefix:
        return False
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=prefix)
    return True


def _from_vocabulary(files: Mapping[str, Path], described: Mapping[str, dict[str, Any]]) -> Tokenizer:
    """GPT-2's pipeline over `vocab.json` and `merges.txt`, with the tokens that were added later.

    Raises:
        FtError: a file is damaged, or the id of an added token is not the next one of the vocabulary.
    """
    config = described.get(TOKENIZER_CONFIG, {})
    try:
        tokenizer = Tokenizer(BPE.from_file(str(files[VOCABULARY]), str(files[MERGES])))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and when it panics no Exception
        raise FtError(f"cannot read {files[VOCABULARY]} and {files[MERGES]} as a tokenizer: {error}") from error
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=config.get("add_prefix_space") is True)
    tokenizer.decoder = ByteLevelDecoder()
    try:
        numbered, special = _added_tokens(config, described.get(SPECIAL_TOKENS, {}), described.get(ADDED_TOKENS, {}))
    except (AttributeError, TypeError, ValueError) as error:
        beside = ", ".join(str(files[name]) for name in described)
        raise FtError(f"{beside} does not describe added tokens as transformers does: {error}") from error
    for i, token in sorted(numbered.items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != i:
            raise FtError(
                f"the added token {token.content!r} has the id {i} in the files beside {files[VOCABULARY]}, where it "
                f"would have {tokenizer.token_to_id(token.content)}: save the tokenizer again with transformers"
            )
    tokenizer.add_special_tokens(special)
    return tokenizer


def _added_tokens(
    config: Mapping[str, Any], special_tokens: Mapping[str, Any], added: Mapping[str, Any]
) -> tuple[dict[int, AddedToken], list[AddedToken]]:
    """The added tokens by id, and the special tokens in the order of `transformers`."""
    values = {**dict.fromkeys(SPECIAL_NAMES[:3], END_OF_TEXT), **config, **special_tokens}
    special = [_added(values[name], True) for name in SPECIAL_NAMES if values.get(name)]
    special += [_added(token, True) for token in values.get("additional_special_tokens") or []]
    by_content = {token.content: token for token in special}
    numbered = {int(i): _added(token, False) for i, token in (config.get("added_tokens_decoder") or {}).items()}
    numbered |= {int(i): by_content.get(name) or _added(name, False) for name, i in added.items()}
    return numbered, list(by_content.values())


def _added(token: object, special: bool) -> AddedToken:
    """An added token from its name, or from the object that `transformers` writes for one."""
    if isinstance(token, str):
        return AddedToken(token, special=special, normalized=not special)
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise TypeError(f"{token!r} is not an added token, which is a string, or an object with `content`")
    flags = {name: token[name] is True for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
    return AddedToken(token["content"], special=special or token.get("special") is True, **flags)
