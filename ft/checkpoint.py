"""What a run leaves on disk: checkpoints to continue from, and the finished model in the Hub's layout.

Every folder written here is a complete model folder; a checkpoint adds what training needs besides the weights:

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json
    optimizer.safetensors    AdamW's moments and step counts, by the names of the parameters that are trained
    rng.safetensors          the random states that dropout draws from; those of process n under names that end in .n
    state.json               step, sums, best figures, loss scale: see `State`
    manifest.json            the size and SHA-256 of each of these

Tensors are in safetensors and the rest in JSON, so that reading a checkpoint never runs code.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ft.data import END_OF_TEXT
from ft.distributed import ALONE, Ranks, give_back, is_sharded, own_part, rows_here, whole
from ft.errors import FtError
from ft.files import UNFINISHED, Do, NewFolder, at_once, complete_or_absent, damage_of, read_json
from ft.gpt2 import GPT2, GPT2Config
from ft.optim import AdamW
from ft.plain_files import remove
from ft.state import State

WEIGHTS, OPTIMIZER, RANDOM, STATE = "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"
SUPERSEDED = ".superseded-"


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


def weights_of(model: nn.Module, ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """The parameters by name, not copied if they are whole; in the first of several processes, to which all must come.

    Sharded ones are put together one at a time: the first process needs room for all of them on the CPU, every process
    for the largest one on its device.
    """
    give_back(model)
    return _gathered(dict(model.named_parameters()), ranks)


def take_snapshot(
    model: GPT2,
    optimizer: AdamW,
    scaler: torch.amp.GradScaler,
    state: State,
    *,
    copy: bool,
    ranks: Ranks = ALONE,
) -> Snapshot:
    """All that a checkpoint holds; with `copy` in memory of its own, so that training can go on meanwhile.

    Of several processes all must come here, and the first gets the tensors: see `weights_of`.
    """
    give_back(model)
    weights, moments = dict(model.named_parameters()), _moments(model, optimizer)
    trained = [name for name, weight in weights.items() if weight.requires_grad]  # the others never change
    return Snapshot(
        config=model.config,
        weights=_gathered(weights, ranks, copied=trained if copy else ()),
        optimizer=_gathered(moments, ranks, copied=moments if copy else ()),
        random_states=_random_states(ranks),
        state=replace(state),
        grad_scaler=scaler.state_dict(),
    )


def _gathered(tensors: Mapping[str, Tensor], ranks: Ranks, copied: Collection[str] = ()) -> dict[str, Tensor]:
    """The whole tensors, in the first process, and there on the CPU those that were sharded or are to be `copied`."""

    def fetched(name: str, tensor: Tensor) -> Tensor | None:
        full = whole(tensor.detach())
        if not ranks.is_first:
            return None
        if is_sharded(tensor):
            return full.cpu()
        return full.to("cpu", copy=True) if name in copied else full

    kept = ((name, fetched(name, tensor)) for name, tensor in tensors.items())  # one by one, freed before the next
    return {name: tensor for name, tensor in kept if tensor is not None}


def write_checkpoint(
    run: Path, snapshot: Snapshot, source: ModelSource, *, keep: int, keep_best: bool, do: Do = at_once
) -> None:
    """Write `checkpoint-<step>` below `run`, and once it has proved whole, delete those that are no longer kept.

    Kept are the newest `keep`, and with `keep_best` that of the best evaluation. `do` does the pieces of the work.

    Raises:
        OSError: the disk is full, or refuses; the checkpoints that were there are there.
    """
    state = snapshot.state
    with complete_or_absent(folder_of(run, state.step), do) as new:
        save_model(new, snapshot.config, snapshot.weights, source)
        new.write_tensors(OPTIMIZER, snapshot.optimizer)
        new.write_tensors(RANDOM, snapshot.random_states)
        new.write_json(STATE, {**asdict(state), "grad_scaler": snapshot.grad_scaler})
        new.write_manifest()
    delete_old(run, state, keep=keep, keep_best=keep_best)
    for superseded in run.glob(f"{SUPERSEDED}*"):
        remove(superseded)


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
        remove(doomed)


def supersede_later(run: Path, step: int) -> None:
    """Take the name from the checkpoints of later steps, as the run goes on from `step` and will not come from them.

    They are deleted when it has saved for the first time.
    """
    for path in checkpoints(run):
        if step_of(path) > step:
            remove(run / (SUPERSEDED + path.name))
            path.rename(run / (SUPERSEDED + path.name))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first by step."""
    return sorted((path for path in run.glob("checkpoint-*") if is_checkpoint(path)), key=step_of)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a finished checkpoint."""
    return re.fullmatch(r"checkpoint-[0-9]{1,18}", folder.name) is not None and folder.is_dir()


def folder_of(run: Path, step: int) -> Path:
    """The checkpoint that is saved after a step."""
    return run / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(folder.name.removeprefix("checkpoint-"))


def damage_of_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None if they are whole and the state makes sense."""
    damage = damage_of(folder, needed=(WEIGHTS, OPTIMIZER, RANDOM, STATE))
    if damage is None:
        try:
            _read_state(folder)
        except FtError as error:
            damage = str(error)
    return damage


def _read_state(folder: Path) -> tuple[State, dict[str, Any]]:
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
    if state.step != step_of(folder):
        raise FtError(f"{folder / STATE} is of step {state.step}, its folder of step {step_of(folder)}")
    return state, loss_scale


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
    state, loss_scale = _read_state(folder)
    problem = FtError(f"{folder / STATE} or {RANDOM} does not fit this program")
    try:
        if loss_scale and scaler.is_enabled():  # it is empty where the run was not in fp16
            if not _fits(loss_scale, scaler.state_dict()):
                raise problem
            scaler.load_state_dict(loss_scale)
        _restore_random_states(dict(read_tensors([folder / RANDOM])), ranks)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise problem from error
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
        own_part(value).copy_(rows_here(saved, value, ranks))


def _random_states(ranks: Ranks) -> dict[str, Tensor]:
    """The states of all generators that a run draws from. Python's own and NumPy's are none of them."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()  # of the current device: a process has one
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return {
        f"{name}{_ending(rank)}": each
        for name, state in states.items()
        for rank, each in enumerate(ranks.gather(state))
    }


def _restore_random_states(states: dict[str, Tensor], ranks: Ranks) -> None:
    set_state = {"cpu": torch.set_rng_state}
    if torch.cuda.is_available():
        set_state["cuda"] = torch.cuda.set_rng_state
    if torch.backends.mps.is_available():
        set_state["mps"] = torch.mps.set_rng_state
    if "cpu" not in states:
        raise KeyError("cpu")
    for name, put in set_state.items():
        saved = states.get(f"{name}{_ending(ranks.rank)}")
        if saved is not None:
            put(saved.clone())


def _ending(rank: int) -> str:
    return f".{rank}" if rank else ""
