"""What a run leaves on disk: checkpoints to continue from, and the finished model in the Hub's layout.

Every folder written here is a complete model folder; a checkpoint adds what training needs besides the weights:

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json
    optimizer.safetensors    AdamW's moments and step counts, by the names of the parameters that are trained
    rng.safetensors          the random states that dropout draws from
    state.json               step, sums, best figures, loss scale: see `State`
    manifest.json            the size and SHA-256 of each of these

Tensors are in safetensors and the rest in JSON, so that reading a checkpoint never runs code.
"""

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ft.data import END_OF_TEXT
from ft.errors import FtError
from ft.files import UNFINISHED, Do, NewFolder, at_once, complete_or_absent, damage_of, read_json
from ft.gpt2 import GPT2, GPT2Config
from ft.optim import AdamW

WEIGHTS, OPTIMIZER, RANDOM, STATE = "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"
SUPERSEDED = ".superseded-"


@dataclass
class State:
    """Where a run stands besides its tensors. The place in the data follows from `step` alone.

    Attributes:
        step: optimiser steps done.
        loss_sum: sum of the training losses since the last logged line.
        loss_steps: how many losses that sum holds.
        train_loss_sum: sum of the training losses of all steps up to the last logged line.
        skipped_steps: steps without an update, because loss or gradient was not finite.
        evaluation_due: the run was stopped before or in the evaluation that belongs to this step.
        best_step, best_accuracy, best_loss: the best evaluation so far, by accuracy, then loss.
        last_accuracy, last_loss: those of the newest evaluation.
        evaluations_since_best: how many evaluations in a row have not been better than the best.
        general_loss_before, general_loss: the loss on general text before the first step, and the newest.
        metrics_bytes: the length of metrics.jsonl at this point; what a broken run wrote after it is cut off.
        seconds: time spent in the run, all its parts together.
    """

    step: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    train_loss_sum: float = 0.0
    skipped_steps: int = 0
    evaluation_due: bool = False
    best_step: int | None = None
    best_accuracy: float = 0.0
    best_loss: float | None = None
    last_accuracy: float = 0.0
    last_loss: float | None = None
    evaluations_since_best: int = 0
    general_loss_before: float | None = None
    general_loss: float | None = None
    metrics_bytes: int = 0
    seconds: float = 0.0

    @property
    def mean_train_loss(self) -> float:
        """The mean training loss of all steps that updated the weights."""
        return (self.train_loss_sum + self.loss_sum) / max(1, self.step - self.skipped_steps)

    def note(self, loss: float, accuracy: float) -> None:
        """The evaluation that was due had this result."""
        self.evaluation_due, self.last_accuracy, self.last_loss = False, accuracy, loss
        better = self.best_loss is None or (accuracy, -loss) > (self.best_accuracy, -self.best_loss)
        if better and math.isfinite(loss):
            self.best_step, self.best_accuracy, self.best_loss = self.step, accuracy, loss
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row have not been better than the best; without a patience never."""
        return patience is not None and self.evaluations_since_best >= patience


@dataclass(frozen=True)
class ModelSource:
    """What is copied into every saved model folder unchanged, or nearly so.

    Attributes:
        config: the published config.json.
        tokenizer: the content of tokenizer.json, as its file may be gone when the run is saved.
        label_names: the words of the labels, kept in config.json as `id2label`.
    """

    config: dict[str, Any]
    tokenizer: bytes
    label_names: Sequence[str]


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, as it was at one moment."""

    config: GPT2Config
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random_states: dict[str, Tensor]
    state: State
    grad_scaler: dict[str, Any]


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
        FtError: a file is unreadable, or a tensor is missing, superfluous, of another shape, or holds what is no
            number; names the file.
    """
    try:
        model.load_published(read_tensors(paths))
    except FtError as error:
        raise FtError(f"{', '.join(map(str, paths))}: {error}") from error


def save_model(folder: NewFolder, config: GPT2Config, weights: dict[str, Tensor], source: ModelSource) -> None:
    """Write what `transformers` loads as it is: AutoModelForCausalLM and AutoTokenizer."""
    own = {field.name: getattr(config, field.name) for field in fields(GPT2Config)}
    labels = {
        "id2label": {str(label): name for label, name in enumerate(source.label_names)},
        "label2id": {name: label for label, name in enumerate(source.label_names)},
    }
    # `transformers` notes under `_name_or_path` where a model was loaded from, a path that is nobody else's business.
    dropped = {*labels, "_name_or_path"}
    published = {key: value for key, value in source.config.items() if key not in dropped}
    published |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **own}
    if source.label_names:  # and none where completions were learnt
        published |= labels
    end_of_text_id = source.config.get("eos_token_id", config.vocab_size - 1)
    generation = {"bos_token_id": source.config.get("bos_token_id", end_of_text_id), "eos_token_id": end_of_text_id}
    tokenizer = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": config.n_positions,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_prefix_space": False,
    }
    folder.write_json("config.json", published)
    folder.write_json("generation_config.json", generation)
    folder.write_json("tokenizer_config.json", tokenizer)
    folder.write("tokenizer.json", [source.tokenizer])
    folder.write_tensors(WEIGHTS, weights, metadata={"format": "pt"})


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, not copied."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def take_snapshot(model: GPT2, optimizer: AdamW, scaler: torch.amp.GradScaler, state: State, *, copy: bool) -> Snapshot:
    """All that a checkpoint holds; with `copy` in memory of its own, so that training can go on meanwhile."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}  # never changes

    def kept(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not copy:
            return tensors
        return {name: tensor.to("cpu", copy=name not in frozen) for name, tensor in tensors.items()}

    return Snapshot(
        config=model.config,
        weights=kept(weights_of(model)),
        optimizer=kept(_moments(model, optimizer)),
        random_states=_random_states(),
        state=replace(state),
        grad_scaler=scaler.state_dict(),
    )


def write_checkpoint(
    run: Path, snapshot: Snapshot, source: ModelSource, *, keep: int, keep_best: bool, do: Do = at_once
) -> None:
    """Write `checkpoint-<step>` below `run`, and once it has proved whole, delete those that are no longer kept.

    Kept are the newest `keep`, and with `keep_best` that of the best evaluation. `do` does the pieces of the work.

    Raises:
        OSError: the disk is full, or refuses; the checkpoints that were there are there.
    """
    state = snapshot.state
    with complete_or_absent(run / f"checkpoint-{state.step}", do) as new:
        save_model(new, snapshot.config, snapshot.weights, source)
        new.write_tensors(OPTIMIZER, snapshot.optimizer)
        new.write_tensors(RANDOM, snapshot.random_states)
        new.write_json(STATE, {**asdict(state), "grad_scaler": snapshot.grad_scaler})
        new.write_manifest()
    delete_old(run, state, keep=keep, keep_best=keep_best)
    for superseded in run.glob(f"{SUPERSEDED}*"):
        shutil.rmtree(superseded, ignore_errors=True)


def delete_old(run: Path, state: State, *, keep: int, keep_best: bool) -> None:
    """Delete the checkpoints that are no longer kept when that of `state` is the newest: see `write_checkpoint`."""
    old = [path for path in checkpoints(run) if step_of(path) <= state.step][:-keep]
    old = [path for path in old if not (keep_best and step_of(path) == state.best_step)]
    for path in old:
        # Under another name first: what is half deleted must not pass for a checkpoint. What cannot be deleted now may
        # be after the next save, and is no reason to call this one a failure.
        with suppress(OSError):
            path.rename(path.with_name(UNFINISHED + path.name))
    for doomed in run.glob(f"{UNFINISHED}checkpoint-*"):
        shutil.rmtree(doomed, ignore_errors=True)


def supersede_later(run: Path, step: int) -> None:
    """Take the name from the checkpoints of later steps, as the run goes on from `step` and will not come from them.

    They are deleted when it has saved for the first time.
    """
    for path in checkpoints(run):
        if step_of(path) > step:
            shutil.rmtree(run / (SUPERSEDED + path.name), ignore_errors=True)
            path.rename(run / (SUPERSEDED + path.name))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first by step."""
    return sorted((path for path in run.glob("checkpoint-*") if is_checkpoint(path)), key=step_of)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a finished checkpoint."""
    return re.fullmatch(r"checkpoint-[0-9]{1,18}", folder.name) is not None and folder.is_dir()


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(folder.name.removeprefix("checkpoint-"))


def damage_of_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None if they are as they were written."""
    return damage_of(folder, needed=(WEIGHTS, OPTIMIZER, RANDOM, STATE))


def load_checkpoint(folder: Path, model: GPT2, optimizer: AdamW, scaler: torch.amp.GradScaler) -> State:
    """Put model, optimiser, loss scale and random states back to where they were when the checkpoint was taken.

    Raises:
        FtError: a file is missing, unreadable or does not fit the model.
    """
    load_weights(model, [folder / WEIGHTS])
    _restore_optimizer(model, optimizer, dict(read_tensors([folder / OPTIMIZER])))
    saved = read_json(folder / STATE)
    problem = FtError(f"{folder / STATE} is not a state of this program")
    try:
        loss_scale = dict(saved.pop("grad_scaler"))
        state = State(**saved)
        if loss_scale and scaler.is_enabled():  # it is empty where the run was not in fp16
            if not _fits(loss_scale, scaler.state_dict()):
                raise problem
            scaler.load_state_dict(loss_scale)
        _restore_random_states(dict(read_tensors([folder / RANDOM])))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise problem from error
    for field in fields(State):
        value, default = getattr(state, field.name), field.default
        optional = default is None and value is None
        whole = isinstance(default, int) or field.name == "best_step"
        if not optional and type(value) not in ((int, bool) if whole else (int, float)):
            raise problem
    if state.step < 0 or state.loss_steps < 0 or state.metrics_bytes < 0:
        raise problem
    return state


def _fits(loss_scale: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a saved loss scale has the numbers that a scaler's own has, of the same kinds and within their bounds."""
    kinds, own_kinds = ({name: type(number) for name, number in each.items()} for each in (loss_scale, own))
    return kinds == own_kinds and all(0 <= x < (2**31 if type(x) is int else 3e38) for x in loss_scale.values())


def _moments(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """AdamW's moments and step counts of all trained parameters, by name, not copied."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, value in optimizer.state[parameter].items()
    }


@torch.no_grad()
def _restore_optimizer(model: nn.Module, optimizer: AdamW, tensors: dict[str, Tensor]) -> None:
    moments = _moments(model, optimizer)
    if superfluous := sorted(tensors.keys() - moments.keys()):
        raise FtError(f"the checkpoint's {OPTIMIZER} has {superfluous[0]}, which this run does not train")
    for name, value in moments.items():
        saved = tensors.get(name)
        if saved is None:
            raise FtError(f"the checkpoint's {OPTIMIZER} has no {name}")
        if saved.shape != value.shape:
            raise FtError(
                f"{name} in the checkpoint's {OPTIMIZER} has shape {tuple(saved.shape)}, the model says "
                f"{tuple(value.shape)}"
            )
        value.copy_(saved)


def _random_states() -> dict[str, Tensor]:
    """The states of all generators that a run draws from. Python's own and NumPy's are none of them."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states.pop("cpu").clone())
    for device, state in states.items():
        if device == "mps":
            if torch.backends.mps.is_available():
                torch.mps.set_rng_state(state.clone())
        elif torch.cuda.is_available() and int(device.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state.clone(), device)
