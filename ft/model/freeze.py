"""Which parameters are trained: those that patterns of names choose, the others stay as they are.

A frozen parameter has no gradient and none of AdamW's moments, in memory or in a checkpoint; only its weight is saved.
Below the lowest trained layer nothing asks for a gradient, so that autograd keeps no activations there and the backward
pass ends above it. The forward pass stays whole: dropout acts in frozen layers too, as it does when all are trained.

Two choices that others have tried: the last layers only (Lee et al., "What Would Elsa Do? Freezing Layers During
Transformer Fine-Tuning", 2019), and the biases only (Ben Zaken et al., "BitFit", 2022).
"""

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ft.errors import UsageError
from ft.model.gpt2 import GPT2

LAST = "last:"


def freeze(model: GPT2, train_only: Sequence[str], frozen: Sequence[str]) -> None:
    """Have `model` train the parameters that `train_only` names (none named: all) and `frozen` does not.

    Patterns are those of a shell, `*` for any characters, dots included. `last:N` stands for the last N blocks and the
    final norm. The tied embedding `wte.weight` is both the look-up and the head: both are trained or neither is.

    Raises:
        UsageError: a pattern matches no parameter, or nothing is left to train; a sentence for each.
    """
    names = [name for name, _ in model.named_parameters()]
    problems, chosen = [], {}
    for flag, patterns in (("--train-only", train_only), ("--freeze", frozen)):
        matched = [_matching(pattern, names, model.config.n_layer) for pattern in patterns]
        problems += [
            f"{flag} is {pattern!r}, {_nothing(pattern, names, model.config.n_layer)}"
            for pattern, found in zip(patterns, matched, strict=True)
            if not found
        ]
        chosen[flag] = set().union(*matched)
    trained = (chosen["--train-only"] or set(names)) - chosen["--freeze"]
    if not trained and not problems:
        given = f"--train-only {' '.join(train_only)} and " if train_only else ""
        problems.append(f"with {given}--freeze {' '.join(frozen)} nothing is left to train: freeze less")
    if problems:
        raise UsageError(*problems)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def num_trainable_parameters(model: nn.Module) -> int:
    """How many numbers of a model are trained; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _matching(pattern: str, names: Sequence[str], n_layer: int) -> set[str]:
    """The names that a pattern means."""
    if not pattern.startswith(LAST):
        return {name for name in names if fnmatchcase(name, pattern)}
    count = pattern.removeprefix(LAST)
    if not re.fullmatch("[0-9]{1,9}", count) or not 1 <= int(count) <= n_layer:
        return set()
    prefixes = ("ln_f.", *(f"h.{layer}." for layer in range(n_layer - int(count), n_layer)))
    return {name for name in names if name.startswith(prefixes)}


def _nothing(pattern: str, names: Sequence[str], n_layer: int) -> str:
    """Why a pattern matches nothing, with patterns nearby that match something."""
    if pattern.startswith(LAST):
        return f"it must be {LAST}1 to {LAST}{n_layer}, as the model has {n_layer} blocks"
    parts = [name.split(".") for name in names]
    beginnings = (".".join([*each[:end], "*"]) for each in parts for end in range(1, len(each)))
    endings = (".".join(["*", *each[start:]]) for each in parts for start in range(1, len(each)))
    known = dict.fromkeys([*names, *beginnings, *endings])  # each once
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or [names[0], "*.bias", f"{LAST}1"]
    return f"which matches no parameter of this model; there are {', '.join(near)}, for instance"
