"""The argument parser that all commands share."""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

from ft.errors import UsageError, shown
from ft.io.paths import expand_home

DESTRUCTIVE = ("--overwrite",)

# Names of flags in other tools, with dashes for underscores, and our flag; of several the first that the command has.
# For an empty one nothing is suggested, though one of our flags may have a similar name.
FOREIGN_FLAGS = {
    "accumulation-steps": "gradient-accumulation-steps",
    "adapter-dir": "adapter",
    "adapter-name-or-path": "adapter",
    "adapter-path": "adapter",
    "base-model": "base|model",
    "bf16": "precision bf16",
    "block-size": "max-length",
    "bs": "batch-size",
    "checkpoint": "resume",
    "clip": "max-grad-norm",
    "context-length": "max-length",
    "cpu": "device cpu",
    "cuda": "device cuda",
    "data": "dataset",
    "data-dir": "dataset",
    "data-path": "dataset",
    "dataset-name": "dataset",
    "deepspeed": "shard",
    "device-map": "device",
    "dropout-rate": "dropout",
    "early-stopping": "early-stopping-patience",
    "eval-strategy": "eval-steps",
    "evaluation-strategy": "eval-steps",
    "fp16": "precision fp16",
    "fp32": "precision fp32",
    "fsdp": "shard",
    "gpu": "device cuda",
    "grad-accum": "gradient-accumulation-steps",
    "grad-clip": "max-grad-norm",
    "gradient-checkpointing": "activation-checkpointing full",
    "input": "file|dataset",
    "input-file": "file|dataset",
    "label": "label-column",
    "labels": "label-names",
    "length": "max-new-tokens|max-length",
    "load-best-model-at-end": "keep-best",
    "log-interval": "logging-steps",
    "logging-dir": "output-dir",
    "lora": "lora-rank 8",
    "lora-bias": "train-only '*.bias'",
    "lora-modules": "lora-targets",
    "lora-path": "adapter",
    "lora-r": "lora-rank",
    "lora-target": "lora-targets",
    "lora-target-modules": "lora-targets",
    "lora-weights": "adapter",
    "lr": "learning-rate",
    "lr-scheduler": "lr-schedule",
    "lr-scheduler-type": "lr-schedule",
    "m": "model",
    "max-iters": "max-steps",
    "max-len": "max-length|max-new-tokens",
    "max-length": "max-new-tokens",
    "max-seq-len": "max-length",
    "max-seq-length": "max-length",
    "max-tokens": "max-new-tokens",
    "max-train-steps": "max-steps",
    "mixed-precision": "precision",
    "model-name": "model",
    "model-name-or-path": "model",
    "no-cuda": "device cpu",
    "num-epochs": "epochs",
    "num-train-epochs": "epochs",
    "o": "output-dir|output",
    "out": "output-dir|output",
    "out-dir": "output-dir",
    "output": "output-dir",
    "output-path": "output-dir|output",
    "overwrite-output-dir": "",
    "patience": "early-stopping-patience",
    "peft": "lora-rank 8",
    "peft-model": "adapter",
    "peft-path": "adapter",
    "per-device-eval-batch-size": "eval-batch-size",
    "per-device-train-batch-size": "batch-size",
    "r": "lora-rank",
    "rank": "lora-rank",
    "report-to": "tensorboard",
    "resume-from-checkpoint": "resume",
    "save-dir": "output-dir",
    "save-total-limit": "keep-checkpoints",
    "scheduler": "lr-schedule",
    "seq-len": "max-length",
    "seq-length": "max-length",
    "target-modules": "lora-targets",
    "temp": "temperature",
    "test-file": "dataset",
    "text": "text-column",
    "torch-compile": "compile default",
    "torch-dtype": "precision",
    "train": "dataset",
    "train-batch-size": "batch-size",
    "train-data": "dataset",
    "train-file": "dataset",
    "use-cpu": "device cpu",
    "use-lora": "lora-rank 8",
    "use-peft": "lora-rank 8",
    "val-split": "",
    "validation-file": "dataset",
    "warmup-ratio": "warmup-steps",
    "wd": "weight-decay",
}


class CommandParser(argparse.ArgumentParser):
    """A parser that raises `UsageError`, and suggests a known flag for an unknown one."""

    def __init__(self, command: str, description: str, examples: str, **options: Any) -> None:  # noqa: ANN401
        super().__init__(
            prog=f"python run.py {command}".rstrip(),
            description=f"{description}\n\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """Parse a command line.

        Raises:
            UsageError: an argument is missing, wrong or unknown.
        """
        options, rest = self.parse_known_intermixed_args(arguments)  # positionals may follow flags
        if rest:
            known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            raise UsageError(
                *[
                    describe_unknown_flag(word, known) if word.startswith("-") else f"unexpected argument {shown(word)}"
                    for word in without_values(rest)
                ]
            )
        return options

    def error(self, message: str) -> Never:
        """Raise the message that argparse would print; for an invalid number that of `ft.settings.parse_value`."""
        if found := re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message, re.DOTALL):
            message = f"{found[1]} is {found[3]}, it must be {'a whole number' if found[2] == 'int' else 'a number'}"
        raise UsageError(message)


def to_path(text: str) -> Path:
    """The path that an argument names, with `~` expanded."""
    return Path(expand_home(text))


def without_values(unknown: Sequence[str]) -> list[str]:
    """Unknown arguments without the words after unknown flags, which are probably their values."""
    return [
        word
        for before, word in zip(["", *unknown], unknown, strict=False)
        if word.startswith("-") or not before.startswith("-") or "=" in before
    ]


def describe_unknown_flag(word: str, known: Sequence[str]) -> str:
    """The message for an unknown flag, with the known one that its name probably means.

    A destructive flag is never suggested: following a suggestion must not delete a run.
    """
    name = word.partition("=")[0]
    bare = name.lstrip("-").replace("_", "-").lower()
    by_name = {flag.removeprefix("--"): flag for flag in known if flag not in DESTRUCTIVE}
    meant = [meaning for meaning in FOREIGN_FLAGS.get(bare, "").split("|") if meaning.split(" ")[0] in by_name]
    if bare not in FOREIGN_FLAGS:
        meant = difflib.get_close_matches(bare, by_name, n=1, cutoff=0.65)
    return f"there is no flag {name}" + (f", is it --{meant[0]}?" if meant else "; --help lists all flags")
