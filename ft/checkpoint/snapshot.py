"""Everything a checkpoint contains, copied at one step, and restored on resume."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ft.checkpoint.host_buffer import HostBuffer, bytes_for
from ft.distributed.ranks import SINGLE_PROCESS, Ranks
from ft.distributed.sharding import full_tensor, is_sharded, local_shard, reshard, shard_of
from ft.errors import FtError
from ft.io.plain_files import read_json
from ft.model.gpt2 import GPT2, GPT2Config
from ft.model.lora import LoRASettings, adapter_parameters, lora_settings
from ft.model.pretrained import read_tensors
from ft.train.optim import AdamW
from ft.train.state import State

WEIGHTS, OPTIMIZER, RANDOM, STATE = "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint.

    Attributes:
        config: of the model.
        weights: by parameter name; of a model with an adapter those of the adapter only.
        optimizer: moments and step counts, by name.
        random_states: of the generators of all ranks.
        state: the progress of the run.
        grad_scaler: the state of the loss scaler; empty unless the run is in fp16.
        copied: a CUDA event after which queued copies are complete; None if no copies were queued.
        lora: the settings of the adapter, if the model has one.
    """

    config: GPT2Config
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random_states: dict[str, Tensor]
    state: State
    grad_scaler: dict[str, Any]
    copied: torch.cuda.Event | None = None
    lora: LoRASettings | None = None


def gather_weights(model: nn.Module, ranks: Ranks = SINGLE_PROCESS) -> dict[str, Tensor]:
    """The full parameters by name, on rank 0; parameters that are not sharded are not copied. All ranks must call this.

    Sharded parameters are gathered one at a time: rank 0 needs memory for all of them on the CPU, every rank for the
    largest one on its device.
    """
    reshard(model)
    return gather_tensors(dict(model.named_parameters()), ranks)


def take_snapshot(
    model: GPT2,
    optimizer: AdamW,
    scaler: torch.amp.GradScaler,
    state: State,
    *,
    copy: bool,
    ranks: Ranks = SINGLE_PROCESS,
    host: HostBuffer | None = None,
) -> Snapshot:
    """The content of a checkpoint, on rank 0: see `gather_weights`. All ranks must call this.

    Args:
        model: whose parameters are saved.
        optimizer: its next step waits for the copies to `host`, on the GPU.
        scaler: of the loss.
        state: the progress of the run.
        copy: copy the tensors, so that training can continue while they are written.
        ranks: of the run.
        host: pinned memory for the copies of GPU tensors; requires `copy`.
    """
    reshard(model)
    lora = lora_settings(model)
    weights = dict(model.named_parameters()) if lora is None else adapter_parameters(model, lora)
    moments = _moments(model, optimizer)
    trained = [name for name, weight in weights.items() if weight.requires_grad]  # the others never change
    if host is not None:
        host.begin(sum(map(bytes_for, (*(weights[name] for name in trained), *moments.values()))))
    gathered = gather_tensors(weights, ranks, copied=trained if copy else (), host=host)
    gathered_moments = gather_tensors(moments, ranks, copied=moments if copy else (), host=host)
    optimizer.waits_for = copied = None if host is None else host.end()
    return Snapshot(
        config=model.config,
        weights=gathered,
        optimizer=gathered_moments,
        random_states=_random_states(model.wte.weight.device, ranks),
        state=replace(state),
        grad_scaler=scaler.state_dict(),
        copied=copied,
        lora=lora,
    )


def gather_tensors(
    tensors: Mapping[str, Tensor], ranks: Ranks, copied: Collection[str] = (), host: HostBuffer | None = None
) -> dict[str, Tensor]:
    """The full tensors on rank 0; those that were sharded or are to be `copied` are on the CPU."""

    def gather(name: str, tensor: Tensor) -> Tensor | None:
        full = full_tensor(tensor.detach())
        if not ranks.is_rank_zero:
            return None
        if host is not None and name in copied:
            return host.copy(full, is_temporary=is_sharded(tensor))
        if is_sharded(tensor):
            return full.cpu()
        return full.to("cpu", copy=True) if name in copied else full

    gathered = (
        (name, gather(name, tensor)) for name, tensor in tensors.items()
    )  # one at a time, freed before the next
    return {name: tensor for name, tensor in gathered if tensor is not None}


def load_training_state(
    checkpoint: Path, model: GPT2, optimizer: AdamW, scaler: torch.amp.GradScaler, ranks: Ranks = SINGLE_PROCESS
) -> State:
    """Restore optimizer, loss scale and random states from a checkpoint; returns the state of the run.

    The weights are loaded by `load_weights`, before the model is sharded. A rank that the checkpoint does not have
    keeps its random state.

    Raises:
        FtError: a file is missing, unreadable or does not fit the model.
    """
    _restore_optimizer(model, optimizer, dict(read_tensors([checkpoint / OPTIMIZER])), ranks)
    state, loss_scale = read_state(checkpoint)
    mismatch = FtError(f"{checkpoint / STATE} or {RANDOM} does not fit this program")
    try:
        if loss_scale and scaler.is_enabled():  # it is empty unless the run was in fp16
            if not _fits(loss_scale, scaler.state_dict()):
                raise mismatch
            scaler.load_state_dict(loss_scale)
        _restore_random_states(dict(read_tensors([checkpoint / RANDOM])), model.wte.weight.device, ranks)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise mismatch from error
    return state


def read_state(checkpoint: Path) -> tuple[State, dict[str, Any]]:
    """The state in a checkpoint, and its loss scale, which is empty unless the run was in fp16.

    Raises:
        FtError: the file cannot be read, or a value is not possible for a run at this step.
    """
    saved = read_json(checkpoint / STATE)
    loss_scale = saved.pop("grad_scaler", None)
    if not isinstance(loss_scale, dict):
        raise FtError(f"{checkpoint / STATE} has no grad_scaler")
    try:
        state = State.from_dict(saved)
    except FtError as error:
        raise FtError(f"{checkpoint / STATE}: {error}") from error
    if checkpoint.name != f"checkpoint-{state.step}":
        raise FtError(f"{checkpoint / STATE} is of step {state.step}, which is not that of its directory")
    return state, loss_scale


def _fits(loss_scale: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a saved loss scale has the same fields as the scaler, of the same types and within limits."""
    kinds, own_kinds = ({name: type(number) for name, number in each.items()} for each in (loss_scale, own))
    return kinds == own_kinds and all(0 <= x < (2**31 if type(x) is int else 3e38) for x in loss_scale.values())


def _moments(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """The moments and step counts of all trained parameters, by name, not copied."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, value in optimizer.state[parameter].items()
    }


@torch.no_grad()
def _restore_optimizer(model: nn.Module, optimizer: AdamW, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    moments = _moments(model, optimizer)
    if superfluous := sorted(tensors.keys() - moments.keys()):
        raise FtError(f"the checkpoint's {OPTIMIZER} has {superfluous[0]}, which this run does not train")
    for name, value in moments.items():
        saved = tensors.get(name)
        if saved is None:
            raise FtError(f"the checkpoint's {OPTIMIZER} has no {name}")
        if saved.shape != value.shape:
            raise FtError(
                f"{name} in the checkpoint's {OPTIMIZER} has shape {tuple(saved.shape)}, the model has "
                f"{tuple(value.shape)}"
            )
        local_shard(value).copy_(shard_of(saved, value, ranks))


def _random_states(device: torch.device, ranks: Ranks) -> dict[str, Tensor]:
    """The states of the generators of all ranks: of the CPU and of `device`. Python's and NumPy's are not used.

    A run on a CPU does not query other devices: this would create a context on a GPU.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return {
        f"{name}{_suffix(rank)}": each
        for name, state in states.items()
        for rank, each in enumerate(ranks.gather(state))
    }


def _restore_random_states(states: dict[str, Tensor], device: torch.device, ranks: Ranks) -> None:
    if "cpu" not in states:
        raise KeyError("cpu")
    for kind in {"cpu", device.type}:
        saved = states.get(f"{kind}{_suffix(ranks.rank)}")
        if saved is None:
            continue
        if kind == "cpu":
            torch.set_rng_state(saved.clone())
        else:
            torch.get_device_module(device).set_rng_state(saved.clone(), device)


def _suffix(rank: int) -> str:
    return f".{rank}" if rank else ""
