"""Adapter directories: the files that PEFT reads and writes for LoRA on GPT-2, and the base that an adapter is for.

    adapter_config.json         rank, alpha, dropout, layers; and where the base is: a directory or Hub id
    adapter_model.safetensors   A and B of each layer, and biases if they are trained, under PEFT's names
    ft.json                     of `ft` alone: the SHA-256 of the base's weights, label names, length of examples

PEFT (https://github.com/huggingface/peft) wraps the `transformers` model, and names `h.0.attn.c_attn.lora_A` of this
program `base_model.model.transformer.h.0.attn.c_attn.lora_A.weight`. The layouts are the same.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ft.checks import LARGEST_ALPHA
from ft.errors import FtError, shown
from ft.io.atomic import StagedDirectory
from ft.io.model_layout import INDEX, WEIGHTS
from ft.io.plain_files import read_json
from ft.io.safetensors_file import safetensors_chunks
from ft.model.gpt2 import GPT2
from ft.model.lora import (
    LORA_A,
    LoRASettings,
    add_lora,
    is_lora,
    linear_layers,
    lora_settings,
    recorded_biases,
    weights_sha256,
)
from ft.model.pretrained import copy_tensor, first_problems, read_tensors

ADAPTER_CONFIG, ADAPTER_WEIGHTS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "ft.json"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ABOUT)
_PREFIX = "base_model.model.transformer."

# The fields of adapter_config.json that this module reads or writes, and those that change no result: how the adapter
# was initialized, which versions wrote it, and which of the layers in adapter_model.safetensors were asked for. A value
# other than null, false or empty in any other field is of a method that this program does not compute.
_READ = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "fan_in_fan_out"}
_READ |= {"base_model_name_or_path", "revision", "init_lora_weights"}
_WITHOUT_EFFECT = {"auto_mapping", "inference_mode", "peft_version", "megatron_core", "qalora_group_size", "eva_config"}
_WITHOUT_EFFECT |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_NAME = "a string without NUL characters and lone surrogates"
# Initializations of PEFT that leave the base as it is; the others, such as pissa, also change the weights of the base.
_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Base:
    """What an adapter directory records of its base and its use.

    Attributes:
        model: a directory or Hub id.
        revision: branch, tag or commit on the Hub.
        task: the label names and the length of the examples: see `task_fields`.
    """

    model: str
    revision: str | None
    task: Mapping[str, Any]


# --- writing


def write_adapter(
    staged: StagedDirectory, settings: LoRASettings, tensors: Mapping[str, Tensor], n_layer: int, base: Base
) -> None:
    """Write an adapter as `PeftModel.save_pretrained` does, for `PeftModel.from_pretrained`.

    Args:
        staged: the directory.
        settings: of the adapter.
        tensors: see `adapter_parameters`, by the names of this program.
        n_layer: the number of blocks of the model.
        base: of the adapter.
    """
    biases = [name for name in tensors if not is_lora(name)]
    beside = [name for name in biases if name.rpartition(".")[0] not in settings.targets]
    staged.write_json(
        ADAPTER_CONFIG,
        {
            "alpha_pattern": {},
            "auto_mapping": None,
            "base_model_name_or_path": base.model,
            "bias": "all" if beside else "lora_only" if biases else "none",
            "fan_in_fan_out": True,  # the weights of GPT-2 are (in, out)
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
            "lora_dropout": settings.dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": settings.rank,
            "rank_pattern": {},
            "revision": base.revision,
            "target_modules": _shortest(settings.targets, n_layer),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": settings.rslora,
        },
    )
    named = {_peft_name(name, settings.targets): tensor for name, tensor in tensors.items()}
    staged.write(
        ADAPTER_WEIGHTS, safetensors_chunks({name: named[name] for name in sorted(named)}, metadata={"format": "pt"})
    )
    staged.write_json(ABOUT, {"base_sha256": settings.base_sha256, **base.task})


def _shortest(targets: Collection[str], n_layer: int) -> list[str]:
    """The shortest ends of names that select the targets among all layers, as PEFT compares them: `c_attn`."""
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    layers = [f"h.{layer}.{kind}" for layer in range(n_layer) for kind in kinds]
    chosen: list[str] = []
    for parts in (1, 2, 4):  # c_proj, attn.c_proj, h.0.attn.c_proj
        for target in targets:
            end = ".".join(target.split(".")[-parts:])
            selected = {layer for layer in layers if f".{layer}".endswith(f".{end}")}
            is_new = not any(f".{target}".endswith(f".{each}") for each in chosen)
            if is_new and selected <= set(targets):
                chosen.append(end)
    return chosen


def _peft_name(name: str, targets: Collection[str]) -> str:
    """The name of a tensor in PEFT's files. The bias of an adapted layer is that of the layer which PEFT wraps."""
    if is_lora(name):
        return f"{_PREFIX}{name}.weight"
    module, _, own_name = name.rpartition(".")
    return f"{_PREFIX}{module}.base_layer.{own_name}" if module in targets else f"{_PREFIX}{name}"


# --- reading


def is_adapter(directory: Path) -> bool:
    """Whether a directory has an adapter, and not a full model."""
    return (directory / ADAPTER_CONFIG).is_file() and not any((directory / name).is_file() for name in (WEIGHTS, INDEX))


def read_base(directory: Path) -> tuple[str | None, str | None]:
    """The directory or Hub id of the base of an adapter, and its revision, where they are recorded.

    Raises:
        FtError: adapter_config.json cannot be read, or a value is not possible.
    """
    config = _read_config(directory / ADAPTER_CONFIG)
    return config["base_model_name_or_path"], config["revision"]


def add_saved_adapter(model: GPT2, directory: Path) -> None:
    """Add a saved adapter to a model with the weights of its base.

    Raises:
        FtError: the adapter cannot be read, is of another base, or of a kind that is not computed here.
    """
    settings = read_adapter_settings(directory, model)
    add_lora(model, settings, seed=0)
    load_adapter(model, directory)


def read_adapter_settings(directory: Path, model: GPT2) -> LoRASettings:
    """Read the settings of an adapter, and check that it is for this model.

    Args:
        directory: with the adapter.
        model: with the weights of the base, without an adapter.

    Raises:
        FtError: a file is missing or not valid, the adapter is of another base, or of a kind that is not computed here.
    """
    path = directory / ADAPTER_CONFIG
    config = _read_config(path)
    if problems := _find_unsupported(config):
        raise FtError(f"{path}: " + "; ".join(problems))
    shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors([directory / ADAPTER_WEIGHTS])}
    layers = linear_layers(model)
    named = [name for name in layers if f"{_PREFIX}{name}.{LORA_A}.weight" in shapes]
    if not named:
        raise FtError(
            f"{directory / ADAPTER_WEIGHTS} has no {LORA_A} of a linear layer of this GPT-2, such as "
            f"{_PREFIX}{next(iter(layers))}.{LORA_A}.weight: it is not a LoRA adapter of it"
        )
    first = shapes[f"{_PREFIX}{named[0]}.{LORA_A}.weight"]
    if first[:1] != (config["r"],):
        raise FtError(f"{path}: r is {config['r']}, and {LORA_A} of {named[0]} in {ADAPTER_WEIGHTS} has shape {first}")
    selected = _selected_layers(config, list(layers))
    if missing := sorted(selected - set(named)):
        raise FtError(
            f"{path} selects {missing[0]}, for which {ADAPTER_WEIGHTS} has no {LORA_A}: it is for another base, "
            f"which was {shown(config['base_model_name_or_path'])}"
        )
    sha256 = weights_sha256(model)
    if (recorded := read_about(directory).get("base_sha256", sha256)) != sha256:
        raise FtError(
            f"{directory} was trained on another base: the SHA-256 of the base's weights was {recorded[:12]}..., that "
            f"of the model given is {sha256[:12]}...; the base was {shown(config['base_model_name_or_path'])}"
        )
    return LoRASettings(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config["lora_dropout"]),
        targets=tuple(named),
        base_sha256=sha256,
        bias=config["bias"],
        rslora=config["use_rslora"],
    )


def _read_config(path: Path) -> dict[str, Any]:
    """The content of adapter_config.json, with PEFT's defaults for what is missing, and valid types and limits.

    Raises:
        FtError: it cannot be read, or a value is not possible.
    """
    defaults = {"lora_dropout": 0.0, "bias": "none", "use_rslora": False, "init_lora_weights": True, "task_type": None}
    config: dict[str, Any] = {**defaults, "base_model_name_or_path": None, "revision": None, **read_json(path)}
    rank, alpha, dropout = (config.get(name, "") for name in ("r", "lora_alpha", "lora_dropout"))
    valid = {
        "peft_type": ("LORA", config.get("peft_type") == "LORA"),
        "r": ("a whole number from 1", type(rank) is int and 1 <= rank <= 2**16),
        "lora_alpha": (
            f"a number above 0 and at most {LARGEST_ALPHA:g}",
            type(alpha) in (int, float) and 0 < alpha <= LARGEST_ALPHA,
        ),
        "lora_dropout": ("a number from 0 to below 1", type(dropout) in (int, float) and 0 <= dropout < 1),
        "use_rslora": ("true or false", type(config["use_rslora"]) is bool),
        "bias": ("none, all or lora_only", config["bias"] in ("none", "all", "lora_only")),
        "base_model_name_or_path": (_NAME, _is_name(config["base_model_name_or_path"])),
        "revision": (_NAME, _is_name(config["revision"])),
    }
    problems = [
        f"{name} is {shown(config[name])}, it must be {wanted}" if name in config else f"{name} is missing"
        for name, (wanted, is_valid) in valid.items()
        if not is_valid
    ]
    if problems:
        raise FtError(f"{path}: " + "; ".join(problems))
    return config


def _is_name(value: object) -> bool:
    """Whether a value can be the name of a file or of something on the Hub, or is None."""
    if type(value) is not str:
        return value is None
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _selected_layers(config: Mapping[str, Any], layers: Sequence[str]) -> set[str]:
    """The layers that `target_modules` selects; none if other fields restrict the selection, or it has another form."""
    targets = config.get("target_modules")
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return set()
    if isinstance(targets, list):
        return {layer for layer in layers for target in targets if f".{layer}".endswith(f".{target}")}
    return set(layers) if targets == "all-linear" else set()


def _find_unsupported(config: Mapping[str, Any]) -> list[str]:
    """One clause for each field whose value is of a method that this program does not compute."""
    problems = [
        f"{name} is {shown(value)}, which this program does not compute: merge the adapter into its base with "
        "`merge_and_unload()` in peft, and pass the result as --model"
        for name, value in config.items()
        if name not in _READ | _WITHOUT_EFFECT and value not in (None, False) and value != {} and value != []
    ]
    if config["task_type"] not in (None, "CAUSAL_LM"):
        problems.append(f"task_type is {shown(config['task_type'])}, this program trains CAUSAL_LM")
    if config.get("init_lora_weights") not in _INITIALIZATIONS:
        problems.append(
            f"init_lora_weights is {shown(config['init_lora_weights'])}, which also changed the weights of the base: "
            "save the adapter with path_initial_model_for_weight_conversion in peft"
        )
    return problems


def read_about(directory: Path) -> dict[str, Any]:
    """The content of ft.json; empty if another program wrote the adapter.

    Raises:
        FtError: the file is not valid.
    """
    path = directory / ABOUT
    if not path.exists():
        return {}
    about = read_json(path)
    if type(about.get("base_sha256")) is not str:
        raise FtError(f"{path} has no base_sha256")
    return about


def load_adapter(model: GPT2, directory: Path) -> None:
    """Copy an adapter into a model to which `add_lora` has added one of the same settings.

    Raises:
        FtError: a tensor is missing, unexpected, of another shape, or holds NaN or inf. `bias` in
            adapter_config.json says which biases must be there.
    """
    path = directory / ADAPTER_WEIGHTS
    parameters = dict(model.named_parameters())
    settings = lora_settings(model)
    assert settings is not None, "add_lora was called"
    biases = recorded_biases(parameters, settings)
    by_bias = f"and bias in {ADAPTER_CONFIG} is {shown(settings.bias)}"
    by_name = {
        _peft_name(name, settings.targets): name for name in parameters if is_lora(name) or name.endswith(".bias")
    }
    # PEFT loads without `strict`: a bias that is missing goes unnoticed, and so does one too many.
    missing = {peft_name for peft_name, name in by_name.items() if is_lora(name) or name in biases}
    problems = []
    with torch.no_grad():
        for name, tensor in read_tensors([path]):
            own_name = by_name.get(name)
            if own_name is None:
                problems.append(f"{name} is not a tensor of a LoRA adapter of this GPT-2")
            elif name not in missing:
                problems.append(f"{name} is in the file, {by_bias}")
            else:
                missing.remove(name)
                problems += copy_tensor(parameters[own_name], tensor, name)
    problems += [f"{name} is missing" + ("" if is_lora(by_name[name]) else f", {by_bias}") for name in sorted(missing)]
    if problems:
        raise FtError(f"{path}: the adapter does not fit the model: " + first_problems(problems))
