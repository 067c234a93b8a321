"""LoRA: train a low-rank change of each linear layer instead of its weight.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1. The weight W (in, out) is frozen,
and the layer computes

    y = x W + b + (alpha / r) x A^T B^T              A is (r, in), B is (out, r), with a rank r far below in and out

A^T B^T has the shape of W and at most rank r. B starts at 0, so that training starts from the pretrained model. For
GPT-2's 124M parameters and r = 8, all A and B together have 1.2 million. Frozen weights need no gradients and no
moments, and a checkpoint holds A and B only.

`add_lora` replaces linear layers by `LoRALinear`, and `merge_lora` adds each change to its weight: the result is a
plain GPT-2 of the same size and speed. A and B are stored as in the files of PEFT, where they are the weights of two
layers of `torch.nn.Linear`.
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ft.errors import UsageError, shown
from ft.io.safetensors_file import safetensors_chunks
from ft.model.dropout import Dropout
from ft.model.freeze import explain_no_match, matching
from ft.model.gpt2 import GPT2, Linear
from ft.model.matmul import affine, rounds_inputs_of

LORA_A, LORA_B = "lora_A", "lora_B"


@dataclass(frozen=True)
class LoRASettings:
    """What defines the adapter of a model, besides A and B.

    Attributes:
        rank: r.
        alpha: the scale of the change is alpha / r, so that another rank needs no other learning rate.
        dropout: of the input of A, in training.
        targets: the names of the adapted layers, in the order of the model.
        base_sha256: of the weights that the adapter was made for: see `weights_sha256`.
        bias: which biases belong to the adapter, in PEFT's words: none, those of the targets (lora_only), or all.
        rslora: the scale is alpha / sqrt(r) instead (Kalajdzievski, "A Rank Stabilization Scaling Factor for
            Fine-Tuning with LoRA", 2023).
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    base_sha256: str
    bias: str = "none"
    rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor of x A^T B^T."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def bias_patterns(self) -> tuple[str, ...]:
        """Patterns that select the biases of the adapter, for `freeze`."""
        of_targets = tuple(f"{target}.bias" for target in self.targets)
        return {"none": (), "lora_only": of_targets, "all": ("*.bias",)}[self.bias]


class LoRALinear(Linear):
    """A linear layer with a trained low-rank change. It takes over the weight and bias of the layer that it replaces.

    The change is not added to W in training: x A^T has r columns, so that two narrow products take less than one
    update of W would.
    """

    def __init__(self, layer: Linear, settings: LoRASettings, generator: torch.Generator) -> None:
        """A is drawn from Kaiming's uniform distribution with a = sqrt(5), as in PEFT: within 1 / sqrt(in) of 0."""
        nn.Module.__init__(self)
        self.weight, self.bias, self.half_copies = layer.weight, layer.bias, None
        self.settings, self.dropout = settings, Dropout(settings.dropout)
        n_in, n_out = layer.weight.shape
        self.lora_A = nn.Parameter(layer.weight.new_empty(settings.rank, n_in))
        self.lora_B = nn.Parameter(layer.weight.new_zeros(n_out, settings.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)

    def a_and_b(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), in the dtype of the matrix product."""
        return (self.lora_A, self.lora_B) if self.half_copies is None else self.half_copies[2:]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        a, b = self.a_and_b()
        return self._add_change(super().forward(x), affine(self.dropout(x), a.T), b)

    def forward_in_parts(self, x: Tensor, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """(N, in) -> (S, n), the first n columns for the selected rows, and (N, out - n), the others for all rows."""
        a, b = self.a_and_b()
        low = affine(self.dropout(x), a.T)  # (N, r), with the same elements dropped for both parts
        first, others = super().forward_in_parts(x, rows, n)
        b_first, b_others = b.split((n, len(b) - n))
        return self._add_change(first, low.index_select(0, rows), b_first), self._add_change(others, low, b_others)

    def _add_change(self, y: Tensor, low: Tensor, b: Tensor) -> Tensor:
        """Compute y (N, out) + scale * low (N, r) B^T in one operation."""
        if rounds_inputs_of(low):  # where activations are fp32, which autocast would round here
            with torch.autocast("cpu", enabled=False):
                return torch.addmm(y, low, b.T, alpha=self.settings.scale)
        return torch.addmm(y, low, b.T, alpha=self.settings.scale)


def linear_layers(model: GPT2) -> dict[str, Linear]:
    """The linear layers of all blocks, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def find_targets(model: GPT2, patterns: Sequence[str]) -> tuple[str, ...]:
    """The names of the linear layers that patterns select, in the order of the model.

    Args:
        model: the model.
        patterns: as for `freeze`, of the names of layers, such as `h.11.*` or `last:2`; the end of a name is enough, as
            in PEFT: `c_attn`. Empty: all four linear layers of each block.

    Raises:
        UsageError: a pattern matches no linear layer; lists all.
    """
    names = list(linear_layers(model))
    modules = [name for name, _ in model.named_modules() if name]
    matched = [_match_layers(pattern, names, model.config.n_layer) for pattern in patterns]
    problems = []
    for pattern, found in zip(patterns, matched, strict=True):
        if found:
            continue
        others = sorted(_match_layers(pattern, modules, model.config.n_layer))
        reason = (
            f"which matches {others[0]}, not a linear layer of a block; there are c_attn, c_proj, c_fc, h.0.*"
            if others
            else explain_no_match(pattern, names, model.config.n_layer, "linear layer")
        )
        problems.append(f"--lora-targets is {shown(pattern)}, {reason}")
    if problems:
        raise UsageError(*problems)
    chosen = set().union(*matched) if patterns else set(names)
    return tuple(name for name in names if name in chosen)


def _match_layers(pattern: str, names: Sequence[str], n_layer: int) -> set[str]:
    return matching(pattern, names, n_layer) | matching(f"*.{pattern}", names, n_layer)


def add_lora(model: GPT2, settings: LoRASettings, seed: int) -> list[str]:
    """Replace the target layers of a model with weights by `LoRALinear`, with B = 0: the model computes the same.

    Args:
        model: changed in place.
        settings: of the adapter.
        seed: determines the initial A.

    Returns:
        The names of each A and B, for `freeze`.

    Raises:
        UsageError: the rank is above the width of a layer, beyond which it adds nothing.
    """
    layers = linear_layers(model)
    widths = {name: min(layers[name].weight.shape) for name in settings.targets}
    narrowest = min(widths, key=widths.__getitem__)
    if settings.rank > widths[narrowest]:
        raise UsageError(
            f"--lora-rank is {settings.rank}, it must be at most {widths[narrowest]}, the width of {narrowest}; 8 is "
            "a common choice"
        )
    generator = torch.Generator().manual_seed(seed)
    for name in settings.targets:
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, LoRALinear(layers[name], settings, generator))
    return [name for name, _ in model.named_parameters() if is_lora(name)]


def lora_settings(model: nn.Module) -> LoRASettings | None:
    """The settings of the adapter of a model; None if it has none."""
    return next((module.settings for module in model.modules() if isinstance(module, LoRALinear)), None)


def is_lora(name: str) -> bool:
    """Whether this is the name of an A or a B."""
    return name.endswith((f".{LORA_A}", f".{LORA_B}"))


def recorded_biases(names: Collection[str], settings: LoRASettings) -> set[str]:
    """The biases, among the names of a model's parameters, that an adapter with these settings must have."""
    of_targets = {f"{target}.bias" for target in settings.targets}
    return {
        name
        for name in names
        if name.endswith(".bias") and (settings.bias == "all" or (settings.bias == "lora_only" and name in of_targets))
    }


def adapter_parameters(model: nn.Module, settings: LoRASettings) -> dict[str, nn.Parameter]:
    """The parameters that the adapter of a model consists of: each A and B, and biases if any of them is trained.

    As in PEFT these are the biases of the adapted layers, or all if another one is trained too.
    """
    parameters = dict(model.named_parameters())
    biases = {name for name in parameters if name.endswith(".bias")}
    of_targets = {f"{target}.bias" for target in settings.targets}
    changed = recorded_biases(parameters, settings) | {name for name in biases if parameters[name].requires_grad}
    kept = biases if changed - of_targets else of_targets if changed else set()
    return {name: parameter for name, parameter in parameters.items() if is_lora(name) or name in kept}


@torch.no_grad()
def merge_lora(weights: Mapping[str, Tensor], settings: LoRASettings) -> dict[str, Tensor]:
    """The weights of the plain GPT-2 that computes the same: W + scale A^T B^T for each adapted layer.

    Args:
        weights: of the model with its adapter, by name; not changed.
        settings: of the adapter.
    """
    merged = {name: weight for name, weight in weights.items() if not is_lora(name)}
    for target in settings.targets:
        a, b = weights[f"{target}.{LORA_A}"], weights[f"{target}.{LORA_B}"]
        weight = torch.addmm(merged[f"{target}.weight"], a.T, b.T, alpha=settings.scale)
        merged[f"{target}.weight"] = weight.cpu()  # one at a time: a GPU need not hold them all twice
    return merged


def weights_sha256(model: GPT2) -> str:
    """The SHA-256 of the weights of a model without an adapter: that of its `model.safetensors` as saved by `ft`.

    It does not depend on the names and the format of the files that the weights were read from.
    """
    digest = hashlib.sha256()
    for chunk in safetensors_chunks(dict(model.named_parameters()), metadata={"format": "pt"}):
        digest.update(chunk)
    return digest.hexdigest()
