"""A GPT-2 with its tokenizer, loaded from a run, a checkpoint, a directory or the Hub, that generates text."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ft.checkpoint.model_description import model_directory, read_description
from ft.device import use_device
from ft.errors import FtError
from ft.inference.generation import Generation
from ft.inference.sampling import Sampling
from ft.io.model_layout import model_files
from ft.io.paths import expand_home
from ft.model.gpt2 import GPT2
from ft.model.pretrained import load_weights


@dataclass(frozen=True)
class LanguageModel:
    """A GPT-2 and its tokenizer, ready to generate text.

    Attributes:
        source: the directory or Hub id that it was loaded from.
        published: the content of its config.json.
        model: on its device, in evaluation mode.
        tokenizer: that of the model.
    """

    source: str
    published: dict[str, Any]
    model: GPT2
    tokenizer: Tokenizer

    def stream(self, prompt: str, *, max_new_tokens: int = 100, sampling: Sampling | None = None) -> Generation:
        """Continue `prompt`, one piece of text at a time.

        Generation ends at end-of-text, after `max_new_tokens`, or at the last position of the model.

        Args:
            prompt: the text to continue.
            max_new_tokens: the most tokens to generate.
            sampling: how tokens are chosen. Default: greedy decoding.

        Raises:
            UsageError: `max_new_tokens` is less than 1.
            FtError: the prompt is not valid UTF-8, or has more tokens than the model has positions.
        """
        sampling = sampling or Sampling()
        return Generation(self.model, self.tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling)

    def generate(self, prompt: str, *, max_new_tokens: int = 100, **sampling: Any) -> str:  # noqa: ANN401
        """Continue `prompt` and return all generated text: `stream`, with the attributes of `Sampling` as keywords."""
        return "".join(self.stream(prompt, max_new_tokens=max_new_tokens, sampling=Sampling(**sampling)))


def load_language_model(source: str | Path, *, device: str | None = None, revision: str | None = None) -> LanguageModel:
    """Load a GPT-2, fine-tuned or not.

    Args:
        source: a run directory, of which `final/` or else the newest checkpoint is loaded; a checkpoint; or any
            directory or Hub id with config.json, tokenizer.json and model.safetensors of a GPT-2.
        device: as for `--device`. Default: the best that is available. A CUDA device becomes the current one.
        revision: branch, tag or commit on the Hub.

    Raises:
        FtError: there is no such model, it is damaged, or its tokenizer does not fit it.
    """
    chosen_device = use_device(device)
    source = expand_home(str(source))
    while True:
        directory = model_directory(Path(source))
        before = _device_and_inode(directory)
        try:
            return _load(directory, source, chosen_device, revision)
        except (FtError, OSError):
            # A run in progress may have deleted or replaced the checkpoint while it was read, and has a newer one then.
            if directory is None or (before is not None and _device_and_inode(directory) == before):
                raise


def _device_and_inode(directory: Path | None) -> tuple[int, int] | None:
    """Numbers that identify a directory whatever its name; None if it does not exist."""
    try:
        status = os.stat(directory or "")
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _load(directory: Path | None, source: str | Path, device: torch.device, revision: str | None) -> LanguageModel:
    files = model_files(directory or str(source), revision, named_by="the name of the model")
    described = read_description(files)
    try:
        model = GPT2(described.config)
    except RuntimeError as error:
        raise FtError(f"{files.config}: so large a model does not fit into memory: {error}") from error
    load_weights(model, files.weights)
    model.to(device).eval()
    return LanguageModel(str(directory or source), described.published, model, described.tokenizer.tokenizer)
