"""Freezing: train only the parameters that name patterns select.

A frozen parameter has no gradient and no AdamW moments, in memory or in a checkpoint; only its weight is saved. Below
the lowest trained layer nothing requires a gradient, so that autograd stores no activations there and the backward pass
stops above it. The forward pass does not change: dropout is active in frozen layers too.

Published choices: only the last layers (Lee et al., "What Would Elsa Do? Freezing Layers During Transformer
Fine-Tuning", 2019), and only the biases (Ben Zaken et al., "BitFit", 2022).
"""

import difflib
import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ft.errors import UsageError, shown
from ft.model.gpt2 import GPT2

LAST = "last:"


def freeze(
    model: GPT2, train_only: Sequence[str], frozen: Sequence[str], adapter: Collection[str] = frozenset()
) -> None:
    """Set `requires_grad` of the parameters: those in `train_only` and not in `frozen` are trained.

    A model with an adapter trains the adapter; `train_only` adds biases to it, which PEFT's files can hold too.

    The tied embedding `wte.weight` is both the look-up and the head: both are trained or neither is.

    Args:
        model: the model, changed in place.
        train_only: shell patterns of parameter names, where `*` matches any characters, dots included; `last:N` selects
            the last N blocks and the final layer norm. Empty: all parameters.
        frozen: patterns of the parameters to freeze.
        adapter: the names of the parameters of an adapter.

    Raises:
        UsageError: a pattern matches no parameter, one of `train_only` matches weights beside an adapter, or nothing is
            left to train; lists all problems.
    """
    names = [name for name, _ in model.named_parameters()]
    problems, chosen = [], {}
    for flag, patterns in (("--train-only", train_only), ("--freeze", frozen)):
        matched = [matching(pattern, names, model.config.n_layer) for pattern in patterns]
        problems += [
            f"{flag} is {shown(pattern)}, {explain_no_match(pattern, names, model.config.n_layer)}"
            for pattern, found in zip(patterns, matched, strict=True)
            if not found
        ]
        chosen[flag] = set().union(*matched)
    added = [name for name in names if name in chosen["--train-only"] - set(adapter) and not name.endswith(".bias")]
    if adapter and added:
        problems.append(
            f"--train-only selects {added[0]}, and beside an adapter only biases are trained: --train-only '*.bias' "
            "adds them, and --lora-targets selects the layers that are adapted"
        )
    trained = (chosen["--train-only"] | set(adapter) or set(names)) - chosen["--freeze"]
    if not trained and not problems:
        given = f"--train-only {' '.join(train_only)} and " if train_only else ""
        problems.append(f"with {given}--freeze {' '.join(frozen)} nothing is left to train: freeze less")
    if problems:
        raise UsageError(*problems)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def num_trainable_parameters(model: nn.Module) -> int:
    """The number of trainable parameters of a model; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def matching(pattern: str, names: Sequence[str], n_layer: int) -> set[str]:
    """The names that a shell pattern, or `last:N`, matches."""
    if not pattern.startswith(LAST):
        return {name for name in names if fnmatchcase(name, pattern)}
    count = pattern.removeprefix(LAST)
    if not re.fullmatch("[0-9]{1,9}", count) or not 1 <= int(count) <= n_layer:
        return set()
    prefixes = ("ln_f.", *(f"h.{layer}." for layer in range(n_layer - int(count), n_layer)))
    return {name for name in names if name.startswith(prefixes)}


def explain_no_match(pattern: str, names: Sequence[str], n_layer: int, kind: str = "parameter") -> str:
    """Why a pattern matches nothing of this `kind`, with similar patterns that match."""
    if pattern.startswith(LAST):
        return f"it must be {LAST}1 to {LAST}{n_layer}, as the model has {n_layer} blocks"
    parts = [name.split(".") for name in names]
    by_prefix = (".".join([*name[:end], "*"]) for name in parts for end in range(1, len(name)))
    by_suffix = (".".join(["*", *name[start:]]) for name in parts for start in range(1, len(name)))
    patterns = dict.fromkeys([*names, *by_prefix, *by_suffix])  # without duplicates
    similar = difflib.get_close_matches(pattern, patterns, n=3, cutoff=0.4) or [
        names[0],
        f"*.{parts[-1][-1]}",
        f"{LAST}1",
    ]
    return f"which matches no {kind} of this model; there are {', '.join(similar)}, for instance"
