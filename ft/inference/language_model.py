"""A GPT-2 with its tokenizer, loaded from a run, a checkpoint, a directory or the Hub, that generates text."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ft.checkpoint.adapter import ADAPTER_CONFIG, add_saved_adapter, is_adapter, read_about, read_base
from ft.checkpoint.model_description import model_directory, read_description
from ft.checkpoint.saved_task import FIELD
from ft.device import use_device
from ft.errors import FtError, UsageError, shown
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


def load_language_model(
    source: str | Path, *, device: str | None = None, revision: str | None = None, base: str | Path | None = None
) -> LanguageModel:
    """Load a GPT-2, fine-tuned or not.

    Args:
        source: a run directory, of which `final/` or else the newest checkpoint is loaded; a checkpoint; any directory
            or Hub id with config.json, tokenizer.json and model.safetensors of a GPT-2; or a directory with an adapter.
        device: as for `--device`. Default: the best that is available. A CUDA device becomes the current one.
        revision: branch, tag or commit on the Hub.
        base: of an adapter: a directory or Hub id. Default: where the adapter's adapter_config.json says it is.

    Raises:
        FtError: there is no such model, it is damaged, or its tokenizer does not fit it.
        UsageError: there is a base, and the model is not an adapter.
    """
    chosen_device = use_device(device)
    source = expand_home(str(source))
    while True:
        directory = model_directory(Path(source))
        before = _device_and_inode(directory)
        try:
            if directory is not None and is_adapter(directory):
                return _load_adapter(directory, base, chosen_device, revision)
            if base is not None:
                raise UsageError(f"the base is {shown(str(base))}, but {source} is not an adapter: leave the base out")
            return _load(directory or source, chosen_device, revision)
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


def _load_adapter(
    directory: Path, base: str | Path | None, device: torch.device, revision: str | None
) -> LanguageModel:
    """Load the base of an adapter, and the adapter into it."""
    recorded, recorded_revision = read_base(directory)
    if base is None and recorded is None:
        raise FtError(f"{directory} is an adapter, and does not name its base: name it by --base, in Python by base=")
    named = expand_home(str(base or recorded))
    try:
        place = model_directory(Path(named)) or named
        if isinstance(place, Path) and base is None and revision is None and recorded_revision is not None:
            raise FtError(
                f"its revision is {shown(recorded_revision)}, and {place} is a local directory, which has none: remove "
                "the field revision"
            )
        loaded = _load(place, torch.device("cpu"), revision or (None if base else recorded_revision))
    except FtError as error:
        where = (
            "" if base else f", which {directory / ADAPTER_CONFIG} names; --base, in Python base=, names another place"
        )
        raise FtError(f"cannot load the base of the adapter {directory}{where}: {error}") from error
    add_saved_adapter(loaded.model, directory)
    loaded.model.to(device).eval()
    task = {name: value for name, value in read_about(directory).items() if name == FIELD}
    return replace(loaded, source=str(directory), published=loaded.published | task)


def _load(source: str | Path, device: torch.device, revision: str | None) -> LanguageModel:
    """Load a full model from a directory or the Hub."""
    files = model_files(source, revision, named_by="the name of the model")
    described = read_description(files)
    try:
        model = GPT2(described.config)
    except RuntimeError as error:
        raise FtError(f"{files.config}: so large a model does not fit into memory: {error}") from error
    load_weights(model, files.weights)
    model.to(device).eval()
    return LanguageModel(str(source), described.published, model, described.tokenizer.tokenizer)
