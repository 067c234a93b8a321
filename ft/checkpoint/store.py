"""Write checkpoints and the final model, in the layout of the Hub.

Every directory written here loads as a model; a checkpoint also has what training needs to resume:

    config.json  model.safetensors  tokenizer.json  generation_config.json  and the other files of the tokenizer
    optimizer.safetensors    AdamW's moments and step counts, by the names of the trained parameters
    rng.safetensors          random states of the generators; those of rank n have names that end in .n
    state.json               step, sums of losses, best evaluation, loss scale: see `State`
    manifest.json            size and CRC-32 of each of these files

With LoRA a checkpoint has the files of an adapter in place of those of a model: see `adapter.py`.

Tensors are in safetensors and the rest in JSON, so that reading a checkpoint never runs code.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ft.checkpoint.adapter import ADAPTER_FILES, Base, is_adapter, write_adapter
from ft.checkpoint.saved_task import task_fields
from ft.checkpoint.snapshot import OPTIMIZER, RANDOM, STATE, WEIGHTS, Snapshot, read_state
from ft.errors import FtError
from ft.io.atomic import StagedDirectory, atomic_directory
from ft.io.manifest import verify_manifest
from ft.io.plain_files import UNFINISHED, remove
from ft.io.safetensors_file import safetensors_chunks
from ft.model.gpt2 import GPT2Config
from ft.train.state import State

SUPERSEDED = ".superseded-"

# The fields of the source's config.json that are copied: those that describe GPT-2's weights and tokens, and no others,
# such as remote code or quantization.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
COPIED_FIELDS = (*GPT2Config.FIXED, "n_ctx", *TOKEN_IDS)


def copied_fields(published: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The fields that are copied, if their values are of the types that `transformers` reads."""
    kept = {}
    for key in (key for key in COPIED_FIELDS if key in published):
        value = published[key]
        if key in GPT2Config.FIXED:  # 1 for true, which compares equal, is refused by `transformers`
            kept[key] = next((fixed for fixed in GPT2Config.FIXED[key] if fixed == value), value)
        elif key == "n_ctx":
            if type(value) is int:
                kept[key] = value
        else:
            ids = value if key == "eos_token_id" and isinstance(value, list) and value else [value]
            if value is None or all(type(token) is int and 0 <= token < vocab_size for token in ids):
                kept[key] = value
    return kept


@dataclass(frozen=True)
class ModelSource:
    """What is copied from the source to every saved model.

    Attributes:
        config: the published config.json.
        tokenizer: the content of tokenizer.json, whose file may be gone when the model is saved.
        label_names: the names of the labels, saved in config.json; empty for completions.
        about_tokenizer: the content of tokenizer_config.json and similar files, by file name.
        max_length: tokens of an example in training, saved in config.json; None if unknown.
        label_numbers: the numbers in the data that the names stand for, unless they are 0, 1, ...
        name: the directory or Hub id of the source, which adapters record as their base.
        revision: branch, tag or commit on the Hub.
    """

    config: dict[str, Any]
    tokenizer: bytes
    label_names: Sequence[str]
    about_tokenizer: Mapping[str, bytes]
    max_length: int | None = None
    label_numbers: Sequence[int] | None = None
    name: str = ""
    revision: str | None = None

    @property
    def task(self) -> dict[str, Any]:
        """The fields that record the task in config.json, or beside an adapter."""
        return task_fields(self.label_names, self.max_length, self.label_numbers)

    @property
    def base(self) -> Base:
        """What an adapter records of this source."""
        return Base(self.name, self.revision, self.task)


def save_model(staged: StagedDirectory, config: GPT2Config, weights: dict[str, Tensor], source: ModelSource) -> None:
    """Write a model that `transformers` loads by AutoModelForCausalLM and AutoTokenizer."""
    published = copied_fields(source.config, config.vocab_size) | asdict(config)
    # The weights are fp32, whatever dtype the source had; `transformers` loads them in the dtype of the file.
    published |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    # Not as `id2label`: pipelines of `transformers` would then answer with these labels, by an untrained head.
    published |= source.task
    staged.write_json("config.json", published)
    staged.write_json("generation_config.json", {key: published[key] for key in TOKEN_IDS if key in published})
    for name, content in source.about_tokenizer.items():
        staged.write(name, [content])
    staged.write("tokenizer.json", [source.tokenizer])
    staged.write(WEIGHTS, safetensors_chunks(weights, metadata={"format": "pt"}))


def write_checkpoint(run: Path, snapshot: Snapshot, source: ModelSource, *, keep: int, keep_best: bool) -> None:
    """Write `checkpoint-<step>` in the run directory, and then delete the checkpoints that are no longer kept.

    Args:
        run: the run directory.
        snapshot: the content of the checkpoint.
        source: what is copied from the model's source.
        keep: the number of newest checkpoints to keep.
        keep_best: also keep the checkpoint of the best evaluation.

    Raises:
        OSError: the disk is full, or writing fails; the earlier checkpoints are not affected.
    """
    state = snapshot.state
    if snapshot.copied is not None:
        snapshot.copied.synchronize()
    with atomic_directory(checkpoint_path(run, state.step)) as new:
        if snapshot.lora is None:
            save_model(new, snapshot.config, snapshot.weights, source)
        else:
            write_adapter(new, snapshot.lora, snapshot.weights, snapshot.config.n_layer, source.base)
        new.write(OPTIMIZER, safetensors_chunks(snapshot.optimizer))
        new.write(RANDOM, safetensors_chunks(snapshot.random_states))
        new.write_json(STATE, {**asdict(state), "grad_scaler": snapshot.grad_scaler})
        new.write_manifest()
    delete_old(run, state, keep=keep, keep_best=keep_best)
    for superseded in run.glob(f"{SUPERSEDED}*"):
        remove(superseded)


def delete_old(run: Path, state: State, *, keep: int, keep_best: bool) -> None:
    """Delete the checkpoints that are not kept once that of `state` is the newest: see `write_checkpoint`."""
    old = [path for path in checkpoints(run) if step_of(path) <= state.step][:-keep]
    old = [path for path in old if not (keep_best and step_of(path) == state.best_step)]
    for path in old:
        # Rename first: a partly deleted directory must not look like a checkpoint. One that cannot be deleted now is
        # tried again after the next save, and does not make this save a failure.
        with suppress(OSError):
            path.rename(path.with_name(UNFINISHED + path.name))
    for unfinished in run.glob(f"{UNFINISHED}checkpoint-*"):
        remove(unfinished)


def supersede_later(run: Path, step: int) -> None:
    """Rename the checkpoints of later steps when a run resumes from `step`; its first save deletes them."""
    for path in checkpoints(run):
        if step_of(path) > step:
            remove(run / (SUPERSEDED + path.name))
            path.rename(run / (SUPERSEDED + path.name))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, sorted by step."""
    return sorted((path for path in run.glob("checkpoint-*") if is_checkpoint(path)), key=step_of)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory has the name of a complete checkpoint."""
    return re.fullmatch(r"checkpoint-[0-9]{1,18}", directory.name) is not None and directory.is_dir()


def checkpoint_path(run: Path, step: int) -> Path:
    """The directory of the checkpoint of a step."""
    return run / f"checkpoint-{step}"


def step_of(directory: Path) -> int:
    """The step of a checkpoint."""
    return int(directory.name.removeprefix("checkpoint-"))


def verify_checkpoint(directory: Path) -> str | None:
    """Describe what is damaged in a checkpoint; None if its files match the manifest and its state is valid."""
    model = ADAPTER_FILES if is_adapter(directory) else (WEIGHTS,)
    damage = verify_manifest(directory, needed=(*model, OPTIMIZER, RANDOM, STATE))
    if damage is None:
        try:
            read_state(directory)
        except FtError as error:
            damage = str(error)
    return damage
