"""The tensors and states of a run at one moment: taken, and put back on resume."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ft.checkpoint.host_buffer import HostBuffer, bytes_for
from ft.distributed.ranks import ALONE, Ranks
from ft.distributed.sharding import full_tensor, is_sharded, local_shard, reshard, rows_here
from ft.errors import FtError
from ft.io.json_file import read_json
from ft.model.gpt2 import GPT2, GPT2Config
from ft.model.pretrained import read_tensors
from ft.train.optim import AdamW
from ft.train.state import State

WEIGHTS, OPTIMIZER, RANDOM, STATE = "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, as it was at one moment.

    Attributes:
        copied: where copies were queued on a GPU, the event after which the tensors hold what they should.
    """

    config: GPT2Config
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random_states: dict[str, Tensor]
    state: State
    grad_scaler: dict[str, Any]
    copied: torch.cuda.Event | None = None


def gather_weights(model: nn.Module, ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """The parameters by name, not copied if they are whole; in the first of several processes, to which all must come.

    Sharded ones are put together one at a time: the first process needs room for all of them on the CPU, every process
    for the largest one on its device.
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
    ranks: Ranks = ALONE,
    host: HostBuffer | None = None,
) -> Snapshot:
    """All that a checkpoint holds; with `copy` in memory of its own, so that training can go on meanwhile.

    Of several processes all must come here, and the first gets the tensors: see `gather_weights`. With `host`, copies
    of a GPU's tensors go there, and the optimizer's next step waits for them on the GPU; `copy` must be true.
    """
    reshard(model)
    weights, moments = dict(model.named_parameters()), _moments(model, optimizer)
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
    )


def gather_tensors(
    tensors: Mapping[str, Tensor], ranks: Ranks, copied: Collection[str] = (), host: HostBuffer | None = None
) -> dict[str, Tensor]:
    """The whole tensors, in the first process, and there on the CPU those that were sharded or are to be `copied`."""

    def fetched(name: str, tensor: Tensor) -> Tensor | None:
        full = full_tensor(tensor.detach())
        if not ranks.is_rank_zero:
            return None
        if host is not None and name in copied:
            return host.copy(full, is_temporary=is_sharded(tensor))
        if is_sharded(tensor):
            return full.cpu()
        return full.to("cpu", copy=True) if name in copied else full

    kept = ((name, fetched(name, tensor)) for name, tensor in tensors.items())  # one by one, freed before the next
    return {name: tensor for name, tensor in kept if tensor is not None}


def load_training_state(
    folder: Path, model: GPT2, optimizer: AdamW, scaler: torch.amp.GradScaler, ranks: Ranks = ALONE
) -> State:
    """Put optimiser, loss scale and random states back to where they were when the checkpoint was taken.

    The weights are `load_weights`'s matter, before the model is sharded. A process that the run did not have then keeps
    the random state that it has.

    Raises:
        FtError: a file is missing, unreadable or does not fit the model.
    """
    _restore_optimizer(model, optimizer, dict(read_tensors([folder / OPTIMIZER])), ranks)
    state, loss_scale = read_state(folder)
    problem = FtError(f"{folder / STATE} or {RANDOM} does not fit this program")
    try:
        if loss_scale and scaler.is_enabled():  # it is empty where the run was not in fp16
            if not _fits(loss_scale, scaler.state_dict()):
                raise problem
            scaler.load_state_dict(loss_scale)
        _restore_random_states(dict(read_tensors([folder / RANDOM])), model.wte.weight.device, ranks)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise problem from error
    return state


def read_state(folder: Path) -> tuple[State, dict[str, Any]]:
    """The state in a checkpoint, and its loss scale, which is empty where the run was not in fp16.

    Raises:
        FtError: it cannot be read, or a value of it cannot be that of a run at this step.
    """
    saved = read_json(folder / STATE)
    loss_scale = saved.pop("grad_scaler", None)
    if not isinstance(loss_scale, dict):
        raise FtError(f"{folder / STATE} has no grad_scaler")
    try:
        state = State.from_dict(saved)
    except FtError as error:
        raise FtError(f"{folder / STATE}: {error}") from error
    if folder.name != f"checkpoint-{state.step}":
        raise FtError(f"{folder / STATE} is of step {state.step}, which is not that of its folder")
    return state, loss_scale


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
                f"{name} in the checkpoint's {OPTIMIZER} has shape {tuple(saved.shape)}, the model says "
                f"{tuple(value.shape)}"
            )
        local_shard(value).copy_(rows_here(saved, value, ranks))


def _random_states(device: torch.device, ranks: Ranks) -> dict[str, Tensor]:
    """The states of the generators that a run on `device` draws from. Python's own and NumPy's are none of them.

    A run on a CPU asks no other device: the question alone would create a context on a GPU.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return {
        f"{name}{_ending(rank)}": each
        for name, state in states.items()
        for rank, each in enumerate(ranks.gather(state))
    }


def _restore_random_states(states: dict[str, Tensor], device: torch.device, ranks: Ranks) -> None:
    if "cpu" not in states:
        raise KeyError("cpu")
    for kind in {"cpu", device.type}:
        saved = states.get(f"{kind}{_ending(ranks.rank)}")
        if saved is None:
            continue
        if kind == "cpu":
            torch.set_rng_state(saved.clone())
        else:
            torch.get_device_module(device).set_rng_state(saved.clone(), device)


def _ending(rank: int) -> str:
    return f".{rank}" if rank else ""
