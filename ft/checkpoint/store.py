"""What a run leaves on disk: checkpoints to continue from, and the finished model in the Hub's layout.

Every folder written here is a complete model folder; a checkpoint adds what training needs besides the weights:

    config.json  model.safetensors  tokenizer.json  generation_config.json  and what is said of the tokenizer
    optimizer.safetensors    AdamW's moments and step counts, by the names of the parameters that are trained
    rng.safetensors          the random states that dropout draws from; those of process n under names that end in .n
    state.json               step, sums, best figures, loss scale: see `State`
    manifest.json            the size and SHA-256 of each of these

Tensors are in safetensors and the rest in JSON, so that reading a checkpoint never runs code.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ft.checkpoint.snapshot import OPTIMIZER, RANDOM, STATE, WEIGHTS, Snapshot, read_state
from ft.errors import FtError
from ft.io.atomic import UNFINISHED, Executor, StagedDirectory, atomic_directory, run_now
from ft.io.manifest import verify_manifest
from ft.io.plain_files import remove
from ft.io.safetensors_file import safetensors_chunks
from ft.model.gpt2 import GPT2Config
from ft.train.state import State

SUPERSEDED = ".superseded-"

# What is carried over from the source's config.json: what describes GPT-2's weights and tokens, and nothing else, such
# as code to run or how the source was quantized.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
CARRIED = (*GPT2Config.FIXED, "n_ctx", *TOKEN_IDS)


def _carried(published: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The keys that are carried over, as far as their values are of the types that `transformers` reads."""
    kept = {}
    for key in (key for key in CARRIED if key in published):
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
    """What is copied into every saved model folder unchanged, or nearly so.

    Attributes:
        config: the published config.json.
        tokenizer: the content of tokenizer.json, as its file may be gone when the run is saved.
        label_names: the words of the labels, kept in config.json as `id2label`.
        about_tokenizer: the content of tokenizer_config.json and of what else is said of the tokenizer, by file name.
    """

    config: dict[str, Any]
    tokenizer: bytes
    label_names: Sequence[str]
    about_tokenizer: Mapping[str, bytes]


def save_model(folder: StagedDirectory, config: GPT2Config, weights: dict[str, Tensor], source: ModelSource) -> None:
    """Write what `transformers` loads as it is: AutoModelForCausalLM and AutoTokenizer."""
    labels = {
        "id2label": {str(label): name for label, name in enumerate(source.label_names)},
        "label2id": {name: label for label, name in enumerate(source.label_names)},
    }
    published = _carried(source.config, config.vocab_size) | asdict(config)
    # The weights are written as fp32, whatever type the source's had; `transformers` loads them as the file says.
    published |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    if source.label_names:  # and none where completions were learnt
        published |= labels
    folder.write_json("config.json", published)
    folder.write_json("generation_config.json", {key: published[key] for key in TOKEN_IDS if key in published})
    for name, content in source.about_tokenizer.items():
        folder.write(name, [content])
    folder.write("tokenizer.json", [source.tokenizer])
    folder.write(WEIGHTS, safetensors_chunks(weights, metadata={"format": "pt"}))


def write_checkpoint(
    run: Path, snapshot: Snapshot, source: ModelSource, *, keep: int, keep_best: bool, do: Executor = run_now
) -> None:
    """Write `checkpoint-<step>` below `run`, and once it has proved whole, delete those that are no longer kept.

    Kept are the newest `keep`, and with `keep_best` that of the best evaluation. `do` does the pieces of the work.

    Raises:
        OSError: the disk is full, or refuses; the checkpoints that were there are there.
    """
    state = snapshot.state
    if snapshot.copied is not None:
        snapshot.copied.synchronize()
    with atomic_directory(checkpoint_path(run, state.step), do) as new:
        save_model(new, snapshot.config, snapshot.weights, source)
        new.write(OPTIMIZER, safetensors_chunks(snapshot.optimizer))
        new.write(RANDOM, safetensors_chunks(snapshot.random_states))
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


def checkpoint_path(run: Path, step: int) -> Path:
    """The checkpoint that is saved after a step."""
    return run / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(folder.name.removeprefix("checkpoint-"))


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None if they are whole and the state makes sense."""
    damage = verify_manifest(folder, needed=(WEIGHTS, OPTIMIZER, RANDOM, STATE))
    if damage is None:
        try:
            read_state(folder)
        except FtError as error:
            damage = str(error)
    return damage
