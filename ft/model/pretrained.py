"""Pretrained weights: loading their tensors, and the configuration of a model in a run."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ft.config import Config
from ft.errors import FtError, UsageError
from ft.io.formats import check_first_bytes
from ft.model.gpt2 import GPT2, GPT2Config

# Prefixes that DistributedDataParallel, `torch.compile` and `transformers` add to tensor names.
_PREFIXES = re.compile(r"^((module|_orig_mod|transformer)\.)+")
# Heads that `transformers` puts on a GPT-2 in place of the language modeling head, and the classes that have them.
_OTHER_HEADS = {
    "score": "GPT2ForSequenceClassification",
    "classifier": "GPT2ForTokenClassification",
    "qa_outputs": "GPT2ForQuestionAnswering",
    "multiple_choice_head": "GPT2DoubleHeadsModel",
}
_MOST_PROBLEMS = 5  # listed in one error


def read_tensors(paths: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of safetensors files one at a time, memory-mapped, not copied.

    Raises:
        FtError: a file is not a safetensors file, is truncated, or cannot be read.
    """
    for path in paths:
        try:
            check_first_bytes(path)
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, as `file` is not a mapping
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise FtError(f"cannot read the weights in {path}: {error}") from error


def load_weights(model: GPT2, paths: Sequence[Path]) -> None:
    """Load published weights into the model.

    Raises:
        FtError: a file is unreadable, or a tensor is missing, unexpected, of the wrong shape, or holds NaN or inf;
            names the file.
    """
    try:
        load_published(model, read_tensors(paths))
    except FtError as error:
        raise FtError(f"{', '.join(map(str, paths))}: {error}") from error


@torch.no_grad()
def load_published(model: GPT2, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy published tensors into the parameters, one at a time, converted to the dtype of the parameters.

    Published files differ. Some prefix all names (`_PREFIXES`). Some hold the causal masks that the first GPT-2 code
    kept as buffers (`h.0.attn.bias`, `h.0.attn.masked_bias`). Some hold the head, which must equal the embedding.

    Raises:
        FtError: a tensor is missing, unexpected, not of the configured shape, or holds NaN or inf.
    """
    missing, problems = dict(model.named_parameters()), []
    head: Tensor | None = None
    for published_name, tensor in tensors:
        name = _PREFIXES.sub("", published_name)
        other_model = _OTHER_HEADS.get(name.partition(".")[0])
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if name == "lm_head.weight":
            head = tensor
        elif other_model is not None:
            problems.append(
                f"{published_name} is the head of a {other_model}, where this program needs the language model's: load "
                "the directory by AutoModelForCausalLM in transformers, which leaves it out, and save_pretrained"
            )
        elif name not in missing:
            problems.append(f"{published_name} is not a tensor of a GPT-2 with {model.config.n_layer} layers")
        else:
            problems += copy_tensor(missing.pop(name), tensor, published_name)
    if head is not None and "wte.weight" in missing:  # safetensors' save_model keeps one name of a shared tensor
        problems += copy_tensor(missing.pop("wte.weight"), head, "lm_head.weight")
    problems += [f"{name} is missing" for name in missing]
    if head is not None and not problems and not torch.equal(head.to(model.wte.weight), model.wte.weight):
        problems.append(
            "lm_head.weight differs from wte.weight: the head is not tied to the embeddings, as it is in GPT-2; take a "
            "model that has one matrix for both, such as openai-community/gpt2 or distilbert/distilgpt2"
        )
    if problems:
        raise FtError("the weights do not fit the configuration: " + first_problems(problems))


def first_problems(problems: Sequence[str]) -> str:
    """The first problems in one clause, and the number of the others."""
    more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
    return "; ".join(problems[:_MOST_PROBLEMS]) + more


def copy_tensor(parameter: Tensor, tensor: Tensor, published_name: str) -> list[str]:
    """Copy a published tensor into a parameter; returns at most one problem."""
    if tensor.shape != parameter.shape:
        shapes = tuple(tensor.shape), tuple(parameter.shape)
        return [f"{published_name} has shape {shapes[0]}, the configuration says {shapes[1]}"]
    if not tensor.is_floating_point():
        return [f"{published_name} holds {tensor.dtype}, not floating-point numbers"]
    if not torch.isfinite(parameter.copy_(tensor).sum()):  # a sum is finite only if all its terms are
        return [f"{published_name} holds NaN or inf"]
    return []


def model_config_of(model_config: GPT2Config, config: Config) -> GPT2Config:
    """The configuration of the model with the dropout of the run.

    Raises:
        UsageError: the model has fewer positions than `config.max_length`.
    """
    if config.max_length > model_config.n_positions:
        raise UsageError(
            f"--max-length is {config.max_length}, but {config.model} has {model_config.n_positions} positions; "
            "lower it or take another --model"
        )
    if config.dropout is None:
        return model_config
    p = config.dropout
    return replace(model_config, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p)
