"""Export a model to GGUF, the format of llama.cpp and of the programs that are built on it.

One file holds hyperparameters, tokenizer and weights. Integers are little-endian, strings have their length before them
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    "GGUF", version, number of tensors, number of metadata entries
    for each metadata entry: key, type, value
    for each tensor: name, shape with the contiguous dimension first, dtype, offset of its values
    the values of each tensor, at a multiple of 32 bytes

Names and keys are those that llama.cpp reads for the architecture `gpt2` (its `conversion/gpt2.py`).
"""

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ft.checkpoint.tokenizer_files import is_gpt2_pipeline
from ft.data.examples import END_OF_TEXT
from ft.errors import FtError, shown
from ft.export.weights import exported_weights
from ft.inference.classifier import Classifier
from ft.inference.language_model import LanguageModel
from ft.io.atomic import StagedDirectory
from ft.io.model_layout import GGUF
from ft.io.safetensors_file import tensor_bytes
from ft.model.gpt2 import GPT2, GPT2Config

GGUF_METADATA = {"library_name": "gguf", "pipeline_tag": "text-generation"}
_COMPLETE = """\
```python
from llama_cpp import Llama  # pip install llama-cpp-python

model = Llama("{file}", n_ctx=0, verbose=False)
print(model("an input like the training data", max_tokens=20, temperature=0)["choices"][0]["text"])
```
"""
# llama.cpp has no classification by tokens: the label is the next token after end-of-text.
_CLASSIFY = """\
```python
import numpy
from llama_cpp import Llama  # pip install llama-cpp-python

model = Llama("{file}", n_ctx=0, logits_all=True, verbose=False)
labels = {labels}
label_ids = {label_ids}  # the token that stands for each

text = "an input like the training data"
ids = [*model.tokenize(text.encode(), add_bos=False, special=True), model.token_eos()][-{length}:]
model.reset()
model.eval(ids)
odds = numpy.exp(model.scores[len(ids) - 1, label_ids] - model.scores[len(ids) - 1, label_ids].max())
print(dict(zip(labels, (odds / odds.sum()).tolist())))
```
"""

VERSION, ALIGNMENT = 3, 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # types of metadata
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
# By name: `general.file_type`, and the dtype of a tensor. Both use the same numbers for these two.
DTYPES = {"f32": (0, torch.float32), "f16": (1, torch.float16)}

_NAMES = {
    "wte": "token_embd",  # also the head: llama.cpp ties it if there is no `output.weight`
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(staged: StagedDirectory, loaded: LanguageModel, dtype: str) -> None:
    """Write a model with its tokenizer as `model-<dtype>.gguf`.

    Args:
        staged: the directory.
        loaded: the model, on the CPU.
        dtype: a name in `DTYPES`, for the matrices; biases, norms and position embeddings are fp32.

    Raises:
        FtError: llama.cpp has no such tokenizer, or a weight is too large for fp16.
        OSError: the disk is full, or the system refuses.
    """
    metadata = _metadata(loaded.model.config, loaded.tokenizer, dtype)
    tensors = {name: _converted(name, tensor, dtype) for name, tensor in _tensors(loaded.model)}
    staged.write(f"model-{dtype}{GGUF}", _chunks(metadata, tensors))


def gguf_usage(model: Classifier, dtype: str) -> str:
    """How to use the file, for a model card."""
    usage = _COMPLETE if model.named_labels is None else _CLASSIFY
    return usage.format(
        file=f"model-{dtype}{GGUF}",
        labels=list(model.named_labels or ()),
        label_ids=model.label_ids,
        length=model.max_length - 1,
    )


def _tensors(model: GPT2) -> Iterator[tuple[str, Tensor]]:
    """The weights by llama.cpp's names; matrices of linear layers are (out, in), the transpose of ours."""
    for name, tensor in exported_weights(model).items():
        layer, _, kind = name.rpartition(".")
        block = ""
        if layer.startswith("h."):
            _, number, layer = layer.split(".", 2)
            block = f"blk.{number}."
        is_linear = layer.partition(".")[2].startswith("c_") and kind == "weight"
        yield f"{block}{_NAMES[layer]}.{kind}", tensor.T if is_linear else tensor


def _converted(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A tensor in the dtype in which it is written.

    Raises:
        FtError: a value is too large for it.
    """
    if tensor.dim() == 1 or name == "position_embd.weight":
        return tensor
    converted = tensor.to(DTYPES[dtype][1])
    if not torch.isfinite(converted).all():
        most = torch.finfo(converted.dtype).max
        raise FtError(f"{name} has values above {most:,.0f}, the largest number of --dtype {dtype}: use --dtype f32")
    return converted


def _metadata(config: GPT2Config, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The entries by key.

    Raises:
        FtError: llama.cpp has no such tokenizer.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None or not is_gpt2_pipeline(tokenizer) or tokenizer.pre_tokenizer.add_prefix_space:
        raise FtError(
            "the tokenizer is not GPT-2's byte-level BPE, which llama.cpp implements: the model cannot be exported to "
            "GGUF"
        )
    tokens, types = _tokens(tokenizer, config.vocab_size)
    return {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.file_type": DTYPES[dtype][0],
        "gpt2.block_count": config.n_layer,
        "gpt2.context_length": config.n_positions,
        "gpt2.embedding_length": config.n_embd,
        "gpt2.feed_forward_length": config.n_inner or 4 * config.n_embd,
        "gpt2.attention.head_count": config.n_head,
        "gpt2.attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": _merges(tokenizer),
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """The token and the type of each row of the embedding; rows without a token are marked as unused."""
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
        tokens[i], types[i] = token, NORMAL
    for i, added in tokenizer.get_added_tokens_decoder().items():
        types[i] = CONTROL if added.special else USER_DEFINED
    return tokens, types


def _merges(tokenizer: Tokenizer) -> list[str]:
    """The merges of BPE, in the order of their priority.

    Raises:
        FtError: a token has a space, which separates the two of a merge.
    """
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or any(" " in token for token in pair):
            raise FtError(f"the tokenizer has the merge {shown(pair)} with a space, which GGUF cannot represent")
    return [" ".join(pair) for pair in pairs]


def _chunks(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    header = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    header += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        number = next(number for number, dtype in DTYPES.values() if dtype == tensor.dtype)
        header.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset))
        offset += _aligned(tensor.numel() * tensor.element_size())
    encoded = b"".join(header)
    yield encoded.ljust(_aligned(len(encoded)), b"\0")
    for tensor in tensors.values():
        values = tensor_bytes(tensor)
        yield values
        if padding := _aligned(len(values)) - len(values):
            yield bytes(padding)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: bool | int | float | str | Sequence[str] | Sequence[int]) -> bytes:
    """The type and the value of a metadata entry."""
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + _string(value)
    if value and isinstance(value[0], int):
        return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, map(str, value)))
