"""The argument parser that all commands share: its help, its errors, and what it suggests for flags of other tools."""

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

from ft.checks import TOO_LONG
from ft.errors import IN_REPOSITORY, UsageError, program, shown
from ft.io.paths import expand_home, is_too_long

DESTRUCTIVE = ("--overwrite",)

IDS_OR_PATHS = ("base", "dataset", "model")  # arguments that are text until it is known which

# Our flags, with what other tools call them (transformers, TRL, axolotl, litgpt, torchtune, Lightning, nanoGPT), with
# dashes for underscores, in alphabetical order. Of several flags the first counts that the command has. Under the empty
# name, at the end, is what has no counterpart here: for it no flag is suggested, though one of ours may be similar.
_OTHER_NAMES = {
    "activation-checkpointing": "activation-checkpointing-kwargs gradient-checkpointing-kwargs",
    "activation-checkpointing full": "enable-activation-checkpointing gradient-checkpointing",
    "adapter": "adapter-dir adapter-name-or-path adapter-path lora-path lora-weights peft-model peft-path",
    "base": "base-model",
    "batch-size": (
        "auto-find-batch-size batch-size-per-gpu bs global-batch-size micro-batch-size per-device-batch-size "
        "per-device-train-batch-size per-gpu-train-batch-size train-batch-size train-micro-batch-size"
    ),
    "best-metric": "greater-is-better metric-for-best-model",
    "class-weights": "class-weight",
    "compile default": "compile-model torch-compile",
    "compile reduce-overhead": "torch-compile-mode",
    "completion-column": "completion response-column",
    "config": "config-file",
    "dataset": (
        "data data-dir data-path dataset-dir dataset-name dataset-path datasets input input-file test-data test-file "
        "train train-data train-file val-file valid-data valid-file validation-file"
    ),
    "dataset-config": "dataset-config-name subset",
    "device": "accelerator device-map devices gpu-ids gpus",
    "device cpu": "cpu no-cuda use-cpu",
    "device cuda": "cuda gpu use-cuda use-gpu",
    "device mps": "mps use-mps-device",
    "dropout": "dropout-rate",
    "early-stopping-patience": "early-stopping patience",
    "epochs": "epoch max-epoch max-epochs n-epochs nepochs num-epochs num-train-epochs",
    "eval-batch-size": "per-device-eval-batch-size test-batch-size val-batch-size",
    "eval-steps": (
        "eval-every eval-freq eval-frequency eval-interval eval-strategy eval.interval evals-per-epoch "
        "evaluation-strategy val-check-interval"
    ),
    "file": "input input-file",
    "freeze": "freeze-layers frozen",
    "gradient-accumulation-steps": (
        "accumulate-grad-batches accumulation accumulation-steps grad-accum grad-accum-steps grad-accumulation-steps "
        "gradient-accumulation update-freq"
    ),
    "init": "init-from",
    "keep-best": "load-best-model-at-end",
    "keep-checkpoints": "save-total-limit",
    "label-column": "label label-column-name label-key target-column",
    "label-names": "labels",
    "learning-rate": "init-lr lr",
    "logging-steps": "log-every log-every-n-steps log-freq log-interval log-steps logging-first-step logging-strategy",
    "logging-steps 1": "v verbose verbosity",
    "lora-rank": "lora-r r rank",
    "lora-rank 8": "lora peft use-lora use-peft",
    "lora-targets": "lora-modules lora-target lora-target-modules target-modules",
    "lr-schedule": "decay-lr lr-scheduler lr-scheduler-kwargs lr-scheduler-type scheduler",
    "max-grad-norm": "clip grad-clip gradient-clip-val gradient-clipping max-norm",
    "max-length": (
        "block-size context-length cutoff-len length max-len max-seq-len max-seq-length max-source-length "
        "max-target-length max-token-length model-max-length seq-len seq-length sequence-len sequence-length"
    ),
    "max-new-tokens": "length max-len max-length max-tokens",
    "max-steps": "dry-run fast-dev-run max-iters max-train-steps num-steps num-train-steps steps",
    "max-train-samples": "max-samples",
    "model": (
        "base-model checkpoint-dir config-name m model-id model-name model-name-or-path model-path "
        "pretrained-model-name-or-path tokenizer tokenizer-name"
    ),
    "output": "o out output-path",
    "output-dir": (
        "default-root-dir exp-name experiment-name logging-dir logs name o out out-dir output output-path root-dir "
        "run-name save-dir save-path"
    ),
    "precision": "dtype mixed-precision torch-dtype",
    "precision bf16": "bf16",
    "precision fp16": "fp16",
    "precision fp32": "fp32",
    "process-timeout": "ddp-timeout",
    "prompt-column": "instruction-column prompt",
    "quiet": "disable-tqdm log-level no-progress no-progress-bar q silent",
    "resume": "checkpoint ckpt ckpt-path restore resume-from-checkpoint",
    "save-steps": "save-every save-interval save-strategy saves-per-epoch",
    "seed": "data-seed random-seed",
    "shard": "deepspeed fsdp strategy",
    "static-shapes": "pad-to-max-length pad-to-sequence-len padding",
    "temperature": "temp",
    "tensorboard": "logger logger-name report-to wandb-log wandb-project",
    "text-column": "dataset-text-field input-column text text-column-name text-field text-key",
    "train-fraction": "limit-train-batches",
    "train-only": "finetuning-type",
    "train-only '*.bias'": "lora-bias",
    "warmup-steps": "lr-warmup-steps num-warmup-steps warmup warmup-iters warmup-ratio",
    "weight-decay": "wd",
    "": (
        "adam-beta1 adam-beta2 adam-epsilon beta1 beta2 cache-dir chat-template dataloader-num-workers ddp debug "
        "do-eval do-predict do-train enable-jit-checkpoint eval-accumulation-steps eval-iters eval.max-iters "
        "eval.max-new-tokens flash-attention force fsdp-config full-determinism group-by-length hub-model-id "
        "hub-revision label-smoothing label-smoothing-factor load-in-4bit load-in-8bit local-rank lr-decay-iters "
        "max-eval-samples min-lr n-layer nproc-per-node num-proc num-processes num-workers optim optimizer "
        "optimizer-name overwrite-output-dir packing processes push-to-hub sample-packing save-model streaming token "
        "train-on-inputs trust-remote-code val-set-size val-split validation-split validation-split-percentage wandb "
        "workers world-size yes"
    ),
}

FOREIGN_FLAGS: dict[str, list[str]] = {}
for _flag, _names in _OTHER_NAMES.items():
    for _name in _names.split():
        FOREIGN_FLAGS.setdefault(_name, []).append(_flag)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Does not break words at hyphens: a default that is broken cannot be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class CommandParser(argparse.ArgumentParser):
    """A parser that raises `UsageError`, and suggests a known flag for an unknown one.

    Attributes:
        problems: what `parse_args` found wrong, for the command to report with all else that is wrong.
    """

    def __init__(self, command: str, description: str, examples: str, **options: Any) -> None:  # noqa: ANN401
        """`examples` has a command line per line, which three spaces separate from an explanation, if any."""
        super().__init__(
            prog=f"{program()} {command}".rstrip(),
            formatter_class=_Formatter,
            allow_abbrev=False,
            **options,
        )
        self._paragraphs, self._examples = [description], examples
        self.problems: list[str] = []

    def format_help(self) -> str:
        """The help, at most as wide as the terminal, with the name under which the program was started."""
        width = max(20, shutil.get_terminal_size().columns - 2)  # as argparse
        paragraphs = [*self._paragraphs, _format_examples(self._examples, width)]
        self.description = "\n\n".join(
            text if "\n" in text else textwrap.fill(text, width, break_on_hyphens=False) for text in paragraphs
        )
        return super().format_help().replace(IN_REPOSITORY, program())

    def print_help(self, file: Any = None) -> None:  # noqa: ANN401
        """Print the help. That of argparse ignores an error, such as a full disk."""
        print(self.format_help(), end="", file=file)

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """Parse a command line. Unknown flags and values of a wrong type are added to `problems`.

        Raises:
            UsageError: an argument or the value of a flag is missing, or a path is too long; has all problems that were
                found before.
        """
        positionals = [action for action in self._actions if not action.option_strings]
        self.usage = " ".join([self.prog, *map(_usage_of, positionals), "[FLAG ...]"])
        options, rest = self.parse_known_intermixed_args(arguments)  # positionals may follow flags
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        self.problems += [
            describe_unknown_flag(word, known) if word.startswith("-") else f"unexpected argument {shown(word)}"
            for word in without_values(rest)
        ]
        if too_long := [each for action in self._actions for each in _find_long_paths(action, options)]:
            raise UsageError(*self.problems, *too_long)  # at once, as looking for such a path raises an error
        return options

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:  # noqa: ANN401
        """The values of an argument; a wrong one is a problem, and the default takes its place."""
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            message = str(error)
        # The words of `ft.settings.parse_value` and `ft.checks.find_problems`, not those of argparse.
        if found := re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message, re.DOTALL):
            message = f"{found[1]} is {found[3]}, it must be {'a whole number' if found[2] == 'int' else 'a number'}"
        if found := re.fullmatch(r"argument (\S+): invalid choice: (.*) \(choose from .*\)", message, re.DOTALL):
            message = f"{found[1]} is {found[2]}, it must be one of {', '.join(action.choices or ())}"
        if message not in self.problems:  # positional arguments are parsed twice
            self.problems.append(message)
        return action.default

    def error(self, message: str) -> Never:
        """Raise the message that argparse would print, after the problems that were found before."""
        raise UsageError(*self.problems, message)


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
    meant = find_meant_flag(name, known)
    return f"there is no flag {name}" + (f", is it --{meant}?" if meant else "; --help lists all flags")


def find_meant_flag(name: str, known: Sequence[str]) -> str | None:
    """The known flag, without dashes, that another tool's name or a misspelt one means; None if there is none.

    litgpt and torchtune put a section before a name, such as `--train.micro_batch_size`, which may be left out here.
    """
    bare = name.lstrip("-").replace("_", "-").lower()
    if bare not in FOREIGN_FLAGS:
        bare = bare.rpartition(".")[2]
    by_name = [flag.removeprefix("--") for flag in known if flag not in DESTRUCTIVE]
    if bare in by_name:
        return bare
    if bare in FOREIGN_FLAGS:
        return next((meaning for meaning in FOREIGN_FLAGS[bare] if meaning.split(" ")[0] in by_name), None)
    return next(iter(difflib.get_close_matches(bare, by_name, n=1, cutoff=0.65)), None)


def _find_long_paths(action: argparse.Action, options: argparse.Namespace) -> list[str]:
    """A message for each path of an argument that is too long."""
    value = getattr(options, action.dest, None)
    values = value if isinstance(value, list) else [value]
    name = action.option_strings[0] if action.option_strings else action.metavar
    return [
        f"{name} is {shown(str(each))}, {TOO_LONG}"
        for each in values
        if (isinstance(each, Path) or action.dest in IDS_OR_PATHS) and each is not None and is_too_long(str(each))
    ]


def _usage_of(action: argparse.Action) -> str:
    """A positional argument in the usage line."""
    name = str(action.metavar)
    return {"*": f"[{name} ...]", "?": f"[{name}]", "+": f"{name} [{name} ...]"}.get(str(action.nargs), name)


def _format_examples(examples: str, width: int) -> str:
    """Examples in two columns if they fit, else each with its explanation below it; long commands are continued."""
    heading, *lines = examples.splitlines()
    rows = [(*re.split(r"\s{3,}", line.strip(), maxsplit=1), "")[:2] for line in lines]
    longest = max((len(command) for command, comment in rows if comment), default=0)
    fits = all(5 + longest + len(comment) <= width for _, comment in rows)
    formatted = [heading]
    for command, comment in rows:
        if fits and comment:
            formatted.append(f"  {command:{longest}}   {comment}")
            continue
        current = "  "
        for word in re.findall(r'"[^"]*"|\S+', command):
            if len(current) + len(word) + 3 > width and current.strip():
                formatted.append(current + "\\")
                current = "      "
            current += word + " "
        formatted.append(current.rstrip())
        if comment:
            formatted.append(
                textwrap.fill(f"# {comment}", width, initial_indent="      ", subsequent_indent="      # ")
            )
    return "\n".join(formatted)
