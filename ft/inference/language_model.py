"""A model with its tokenizer, wherever it lies: found, loaded, and asked to continue a text."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ft.checkpoint.model_description import read_description
from ft.checkpoint.store import checkpoints, is_checkpoint, verify_checkpoint
from ft.data.tables import listed
from ft.device import use_device
from ft.errors import FtError
from ft.inference.generation import Generation
from ft.inference.sampling import Sampling
from ft.io.paths import expand_home
from ft.model import pretrained
from ft.model.gpt2 import GPT2
from ft.model.pretrained import load_weights


@dataclass(frozen=True)
class LanguageModel:
    """A GPT-2 with what is needed to have it write.

    Attributes:
        source: where it was loaded from.
        published: its config.json.
        model: on its device, in evaluation mode.
        tokenizer: that of the model.
    """

    source: str
    published: dict[str, Any]
    model: GPT2
    tokenizer: Tokenizer

    def stream(self, prompt: str, *, max_new_tokens: int = 100, sampling: Sampling | None = None) -> Generation:
        """What follows `prompt`, to be iterated over as it is written; the likeliest tokens if no `sampling` is given.

        It ends at end-of-text, at `max_new_tokens`, or when all positions of the model are filled.

        Raises:
            UsageError: `max_new_tokens` is less than 1.
            FtError: the prompt is no UTF-8, or has more tokens than the model has positions.
        """
        sampling = sampling or Sampling()
        return Generation(self.model, self.tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling)

    def generate(self, prompt: str, *, max_new_tokens: int = 100, **sampling: Any) -> str:  # noqa: ANN401
        """What follows `prompt`, as a whole: `stream`, with the attributes of `Sampling` as keywords."""
        return "".join(self.stream(prompt, max_new_tokens=max_new_tokens, sampling=Sampling(**sampling)))


def load_language_model(source: str | Path, *, device: str | None = None, revision: str | None = None) -> LanguageModel:
    """Load a GPT-2, fine-tuned or not.

    Args:
        source: a run, whose finished model or else newest checkpoint is taken; a checkpoint; any folder or Hub id with
            config.json, tokenizer.json and model.safetensors of a GPT-2.
        device: as for `--device`; the best present when left out. A CUDA device becomes the current one.
        revision: branch, tag or commit on the Hub.

    Raises:
        FtError: there is no such model, it is damaged, or its tokenizer is that of another.
    """
    chosen_device = use_device(device)
    source = expand_home(str(source))
    while True:
        folder = _model_folder(Path(source))
        before = _identity(folder)
        try:
            return _load(folder, source, chosen_device, revision)
        except (FtError, OSError):
            if folder is None or (before is not None and _identity(folder) == before):
                raise  # and otherwise the run has deleted or replaced it meanwhile, and has another


def _identity(folder: Path | None) -> tuple[int, int] | None:
    """What tells a folder from another of the same name; None if there is none."""
    try:
        status = os.stat(folder or "")
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _load(folder: Path | None, source: str | Path, device: torch.device, revision: str | None) -> LanguageModel:
    files = pretrained.model_files(folder or str(source), revision)
    described = read_description(files)
    try:
        model = GPT2(described.config)
    except RuntimeError as error:
        raise FtError(f"{files.config}: so large a model does not fit into memory: {error}") from error
    load_weights(model, files.weights)
    model.to(device).eval()
    return LanguageModel(str(folder or source), described.published, model, described.tokenizer.tokenizer)


def _model_folder(source: Path) -> Path | None:
    """The folder of the model that `source` means; None where it is no folder, but perhaps a Hub id.

    Raises:
        FtError: a file, a name beside runs that is none of theirs, a run without a whole model in it, a damaged
            checkpoint.
    """
    if source.is_file():
        raise FtError(f"{source} is a file: a run, a checkpoint or a model is a folder")
    if not source.is_dir():
        beside = () if source.parent == Path() else source.parent.glob("*/metrics.jsonl")
        runs = sorted(file.parent.name for file in beside)
        if runs:  # a slip of the hand, for which the Hub need not be asked
            raise FtError(f"there is no run {source}; in {source.parent} are {listed(runs)}")
        return None
    if is_checkpoint(source):
        if damage := verify_checkpoint(source):
            raise FtError(f"{source} is damaged: {damage}")
        return source
    if (source / "final").is_dir():
        return source / "final"
    if not (source / "metrics.jsonl").exists():
        return source
    judged: set[Path] = set()
    while newer := [folder for folder in checkpoints(source) if folder not in judged]:  # a run may delete and add some
        if verify_checkpoint(newer[-1]) is None:
            return newer[-1]
        judged.add(newer[-1])
    raise FtError(f"the run {source} has no finished model and no whole checkpoint yet")
