"""What the commands share: `python run.py predict`, `evaluate` and the others that `ft/cli/main.py` lists."""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Never

from ft.errors import UsageError, shown
from ft.io.paths import expand_home

DESTRUCTIVE = ("--overwrite",)

# What other tools call our flags, with dashes for underscores; of several meanings the first that the command has.
# Nothing is proposed where there is none, though another flag may have a similar name.
HABITS = {
    "accumulation-steps": "gradient-accumulation-steps",
    "base-model": "model",
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
    "lora-dropout": "lora-dropout",
    "lora-r": "lora-rank",
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
    "per-device-eval-batch-size": "eval-batch-size",
    "per-device-train-batch-size": "batch-size",
    "report-to": "tensorboard",
    "resume-from-checkpoint": "resume",
    "save-dir": "output-dir",
    "save-total-limit": "keep-checkpoints",
    "scheduler": "lr-schedule",
    "seq-len": "max-length",
    "seq-length": "max-length",
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
    "val-split": "",
    "validation-file": "dataset",
    "warmup-ratio": "warmup-steps",
    "wd": "weight-decay",
}


class CommandParser(argparse.ArgumentParser):
    """A command's parser; its mistakes are told and counted like those of the job."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"python run.py {command}",
            description=f"{description}\n\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """The values of a command line.

        Raises:
            UsageError: something is missing, wrong or unknown; for an unknown flag with the nearest known one.
        """
        options, rest = self.parse_known_intermixed_args(arguments)  # positionals may follow flags
        if rest:
            known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            raise UsageError(
                *[
                    unknown_flag(word, known) if word.startswith("-") else f"{shown(word)} belongs to no flag"
                    for word in rest
                ]
            )
        return options

    def error(self, message: str) -> Never:
        """Raise what argparse would print; of a number that is none, what the job says of one."""
        if found := re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message, re.DOTALL):
            message = f"{found[1]} is {found[3]}, it must be {'a whole number' if found[2] == 'int' else 'a number'}"
        raise UsageError(message)


def a_path(text: str) -> Path:
    """The path that a word of a command line means."""
    return Path(expand_home(text))


def unknown_flag(word: str, known: Sequence[str]) -> str:
    """What to say of a flag that nobody knows, with the one that is meant, if that can be told from its name.

    A flag that deletes is never named: whoever tries what is proposed must not lose a run.
    """
    name = word.partition("=")[0]
    bare = name.lstrip("-").replace("_", "-").lower()
    by_name = {flag.removeprefix("--"): flag for flag in known if flag not in DESTRUCTIVE}
    meant = [meaning for meaning in HABITS.get(bare, "").split("|") if meaning.split(" ")[0] in by_name]
    if bare not in HABITS:
        meant = difflib.get_close_matches(bare, by_name, n=1, cutoff=0.65)
    return f"there is no flag {name}" + (f", is it --{meant[0]}?" if meant else "; --help lists all flags")
