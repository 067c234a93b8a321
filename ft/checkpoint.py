"""What a run leaves on disk: checkpoints to continue from, and the finished model in the Hub's layout.

Every folder written here is a complete model folder; a checkpoint adds what training needs besides the weights:

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json
    optimizer.safetensors    AdamW's moments and step counts, by parameter name
    rng.safetensors          the random states that dropout draws from
    state.json               step, sums, best figures, loss scale: see `State`

Tensors are in safetensors and the rest in JSON, so that reading a checkpoint never runs code.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ft.data import END_OF_TEXT
from ft.errors import FtError
from ft.gpt2 import GPT2, GPT2Config
from ft.optim import AdamW


@dataclass
class State:
    """Where a run stands besides its tensors. The place in the data follows from `step` alone.

    Attributes:
        step: optimiser steps done.
        loss_sum: sum of the training losses since the last logged line.
        loss_steps: how many losses that sum holds.
        train_loss_sum: sum of the training losses of all steps up to the last logged line.
        best_step, best_accuracy, best_loss: the best evaluation so far, by accuracy, then loss.
        last_accuracy: that of the newest evaluation.
        metrics_bytes: the length of metrics.jsonl at this point; what a broken run wrote after it is cut off.
        seconds: time spent in the run, all its parts together.
    """

    step: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    train_loss_sum: float = 0.0
    best_step: int | None = None
    best_accuracy: float = 0.0
    best_loss: float = float("inf")
    last_accuracy: float = 0.0
    metrics_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ModelSource:
    """What is copied into every saved model folder unchanged, or nearly so.

    Attributes:
        config: the published config.json.
        tokenizer: path of tokenizer.json.
        label_names: the words of the labels, kept in config.json as `id2label`.
    """

    config: dict[str, Any]
    tokenizer: Path
    label_names: Sequence[str]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FtError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FtError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FtError(f"{path} must hold a JSON object")
    return value


def read_tensors(paths: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of safetensors files, one after the other, each mapped from the file and not yet copied.

    Raises:
        FtError: a file is no safetensors file, is cut off, or cannot be read.
    """
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, as the file is no mapping
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise FtError(f"cannot read the weights in {path}: {error}") from error


def load_weights(model: GPT2, paths: Sequence[Path]) -> None:
    """Fill the model from published weights.

    Raises:
        FtError: a file is unreadable, or a tensor is missing, superfluous or of another shape; names the file.
    """
    try:
        model.load_published(read_tensors(paths))
    except FtError as error:
        raise FtError(f"{', '.join(map(str, paths))}: {error}") from error


def save_model(folder: Path, model: GPT2, source: ModelSource) -> None:
    """Write a model folder that `transformers` loads as it is: AutoModelForCausalLM and AutoTokenizer."""
    own = {field.name: getattr(model.config, field.name) for field in fields(GPT2Config)}
    labels = {
        "id2label": {str(label): name for label, name in enumerate(source.label_names)},
        "label2id": {name: label for label, name in enumerate(source.label_names)},
    }
    config = {**source.config, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **own, **labels}
    end_of_text_id = source.config.get("eos_token_id", model.config.vocab_size - 1)
    generation = {"bos_token_id": source.config.get("bos_token_id", end_of_text_id), "eos_token_id": end_of_text_id}
    tokenizer = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model.config.n_positions,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_prefix_space": False,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "tokenizer_config.json", tokenizer)
    shutil.copyfile(source.tokenizer, folder / "tokenizer.json")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets the name `folder` only when it is complete and on the disk.

    A run that breaks off meanwhile leaves a folder of another name, which the next one replaces.
    """
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    for path in [*unfinished.iterdir(), unfinished]:
        _fsync(path)
    if folder.exists():  # a run that was resumed from an older checkpoint has come here again
        shutil.rmtree(folder)
    unfinished.rename(folder)
    _fsync(folder.parent)


def save_checkpoint(
    run: Path,
    model: GPT2,
    source: ModelSource,
    optimizer: AdamW,
    scaler: torch.amp.GradScaler,
    state: State,
    keep: int,
) -> None:
    """Write `checkpoint-<step>` below `run`, then delete all but the newest `keep` checkpoints.

    Checkpoints of later steps, left by a run that was resumed from an earlier one, are not counted and not touched.
    """
    folder = run / f"checkpoint-{state.step}"
    with complete_or_absent(folder) as unfinished:
        save_model(unfinished, model, source)
        save_file(_optimizer_tensors(model, optimizer), unfinished / "optimizer.safetensors")
        save_file(_random_states(), unfinished / "rng.safetensors")
        _write_json(unfinished / "state.json", {**asdict(state), "grad_scaler": scaler.state_dict()})
    for old in [path for path in checkpoints(run) if step_of(path) <= state.step][:-keep]:
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first by step."""
    return sorted((path for path in run.glob("checkpoint-*") if is_checkpoint(path)), key=step_of)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a finished checkpoint."""
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None and folder.is_dir()


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(folder.name.removeprefix("checkpoint-"))


def load_checkpoint(folder: Path, model: GPT2, optimizer: AdamW, scaler: torch.amp.GradScaler) -> State:
    """Put model, optimiser, loss scale and random states back to where `save_checkpoint` found them.

    Raises:
        FtError: a file is missing, unreadable or does not fit the model.
    """
    load_weights(model, [folder / "model.safetensors"])
    _restore_optimizer(model, optimizer, dict(read_tensors([folder / "optimizer.safetensors"])))
    _restore_random_states(dict(read_tensors([folder / "rng.safetensors"])))
    saved = read_json(folder / "state.json")
    try:
        loss_scale = saved.pop("grad_scaler")
        if loss_scale:  # empty where the run was not in fp16, which another device may have chosen now
            scaler.load_state_dict(loss_scale)
        return State(**saved)
    except (KeyError, TypeError) as error:
        raise FtError(f"{folder / 'state.json'} is not a state of this program: {error}") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fsync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _optimizer_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """AdamW's state as `<key>.<parameter name>`: exp_avg, exp_avg_sq and step."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


@torch.no_grad()
def _restore_optimizer(model: nn.Module, optimizer: AdamW, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if f"{key}.{name}" not in tensors:
                raise FtError(f"the checkpoint's optimizer.safetensors has no {key}.{name}")
            saved = tensors[f"{key}.{name}"]
            if saved.shape != value.shape:
                raise FtError(
                    f"{key}.{name} in the checkpoint's optimizer.safetensors has shape {tuple(saved.shape)}, the model "
                    f"says {tuple(value.shape)}"
                )
            value.copy_(saved)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states.pop("cpu").clone())
    for device, state in states.items():
        if torch.cuda.is_available() and int(device.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state.clone(), device)
