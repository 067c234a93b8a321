"""What a run leaves beside its checkpoints and metrics: the final model with its card, the adapter, its performance."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ft.checkpoint import store
from ft.checkpoint.adapter import write_adapter
from ft.data.examples import Example
from ft.device import peak_memory
from ft.errors import printable, program, quoted
from ft.io.atomic import atomic_directory
from ft.io.model_layout import EXPORTED_FILES, GGUF
from ft.model.flops import training_flops
from ft.model.gpt2 import GPT2, GPT2Config
from ft.model.lora import adapter_parameters, lora_settings, merge_lora
from ft.report.outcome import Performance
from ft.train.timing import Speed


def write_final_model(
    run: Path, model: GPT2, gathered: dict[str, Tensor], config: GPT2Config, source: store.ModelSource, card: str
) -> None:
    """Write `final/`, and with LoRA `adapter/`, in the run directory.

    Args:
        run: the run directory.
        model: the model in training.
        gathered: its full parameters, by name: see `gather_weights`.
        config: of the model that is saved.
        source: what is copied from the model's source.
        card: the text of final/README.md.

    Raises:
        OSError: the disk is full, or the system refuses.
    """
    lora = lora_settings(model)
    with atomic_directory(run / "final") as staged:
        store.save_model(staged, config, gathered if lora is None else merge_lora(gathered, lora), source)
        staged.write("README.md", [card.encode()])
    if lora is not None:
        adapter = {name: gathered[name] for name in adapter_parameters(model, lora)}
        with atomic_directory(run / "adapter") as staged:
            write_adapter(staged, lora, adapter, config.n_layer, source.base)


def performance(
    speed: Speed | None, model: GPT2, examples: Sequence[Example], device: torch.device
) -> Performance | None:
    """Speed and memory of this process; None if it took no step, as after a resumed run was complete."""
    if speed is None:
        return None
    flops = training_flops(model, ((len(each.input_ids), len(each.target_ids)) for each in examples))
    return Performance(speed, speed.samples_per_second * flops / len(examples), peak_memory(device))


def notes_on_exports(run: Path) -> str:
    """A line for each export in the run directory that is of an earlier model; empty without any."""
    commands: Mapping[Path, str] = {
        run / name: f"{program()} export {quoted(run)} --to {name} --overwrite"
        + (" --dtype f16" if (run / name / f"model-f16{GGUF}").exists() else "")
        for name in EXPORTED_FILES
        if (run / name).exists()
    }
    lines = (
        printable(f"Note: {path} was exported from the earlier model; to replace it: {command}")
        for path, command in commands.items()
    )
    return "".join(f"{line}\n" for line in lines)
