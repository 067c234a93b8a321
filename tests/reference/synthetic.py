"""GPT-2 checkpoints with random weights, laid out as the published ones: for runs that must not need a download."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SIZES = {
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64},
    "distilgpt2": {"n_layer": 6, "n_embd": 768, "n_head": 12, "n_positions": 1024},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024},
    "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16, "n_positions": 1024},
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20, "n_positions": 1024},
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25, "n_positions": 1024},
}


def write_model(
    directory: Path,
    size: str = "gpt2",
    seed: int = 0,
    prefix: str = "",
    mask_buffers: bool = True,
    lm_head: bool = False,
    tokenizer_from: Path | None = None,
    **config_overrides: Any,
) -> Path:
    """Write `model.safetensors` and `config.json` of an untrained GPT-2 into `directory`, and return `directory`.

    The same `size`, `seed` and overrides give the same weights, whatever the layout:

    - `prefix`: put before every name but `lm_head.weight`; "" as in `openai-community/gpt2`, "transformer." as in
      checkpoints that `transformers` saved from the model with its language-modeling head.
    - `mask_buffers`: include each layer's causal mask, which the published files carry though nothing learns it.
    - `lm_head`: include the output projection, a second copy of the tied token embedding.
    - `tokenizer_from`: a folder whose `tokenizer.json` is copied.
    - `config_overrides`: keys of `config.json`, such as `vocab_size=300`. `n_ctx` follows `n_positions`, and the ids of
      the begin and end token are the last ones of the vocabulary, unless they are given too.
    """
    config = model_config(size, **config_overrides)
    weights = random_weights(config, seed)
    if mask_buffers:
        weights |= causal_masks(config)
    weights = {prefix + name: tensor for name, tensor in weights.items()}
    if lm_head:
        # A copy, because the format stores no two names for one piece of memory.
        weights["lm_head.weight"] = weights[prefix + "wte.weight"].clone()

    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if tokenizer_from is not None:
        shutil.copyfile(tokenizer_from / "tokenizer.json", directory / "tokenizer.json")
    return directory


def model_config(size: str, **overrides: Any) -> dict[str, Any]:
    """Return the content of the published `config.json`, at another size and with some keys replaced."""
    shape = {"vocab_size": 50257} | SIZES[size] | overrides
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": shape["vocab_size"] - 1,
        "embd_pdrop": 0.1,
        "eos_token_id": shape["vocab_size"] - 1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "model_type": "gpt2",
        "n_ctx": shape["n_positions"],
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    } | shape


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Draw GPT-2's initial parameters, one after another from one generator, under the published names.

    The two projections back into the residual stream start smaller by sqrt(2 n_layer), so that the sum of all
    2 n_layer of them has the variance of one (section 2.3 of the GPT-2 paper, "Language Models are Unsupervised
    Multitask Learners"). Projections are (in, out), the transpose of `torch.nn.Linear`.
    """
    generator = torch.Generator().manual_seed(seed)
    std = config["initializer_range"]
    residual_std = std / math.sqrt(2 * config["n_layer"])
    width = config["n_embd"]

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(0.0, std, generator=generator)

    def projection(name: str, n_in: int, n_out: int, std: float) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": normal(n_in, n_out, std), f"{name}.bias": torch.zeros(n_out)}

    def layer_norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}

    weights = {
        "wte.weight": normal(config["vocab_size"], width, std),
        "wpe.weight": normal(config["n_positions"], width, std),
    }
    for layer in range(config["n_layer"]):
        weights |= layer_norm(f"h.{layer}.ln_1")
        weights |= projection(f"h.{layer}.attn.c_attn", width, 3 * width, std)
        weights |= projection(f"h.{layer}.attn.c_proj", width, width, residual_std)
        weights |= layer_norm(f"h.{layer}.ln_2")
        weights |= projection(f"h.{layer}.mlp.c_fc", width, 4 * width, std)
        weights |= projection(f"h.{layer}.mlp.c_proj", 4 * width, width, residual_std)
    return weights | layer_norm("ln_f")


def causal_masks(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return each layer's buffer `attn.bias`, (1, 1, n_positions, n_positions): 1 where a position may look, else 0."""
    n = config["n_positions"]
    return {f"h.{layer}.attn.bias": torch.ones(n, n).tril().view(1, 1, n, n) for layer in range(config["n_layer"])}
