"""Build a model on the CPU: with pretrained weights, random ones or those of a checkpoint, and with an adapter."""

import os
from dataclasses import replace
from pathlib import Path

from ft.checkpoint.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    is_adapter,
    load_adapter,
    read_about,
    read_adapter_settings,
    read_base,
)
from ft.checkpoint.snapshot import WEIGHTS
from ft.config import Config
from ft.errors import UsageError, sentence, shown
from ft.io.model_layout import ModelFiles
from ft.model.freeze import freeze
from ft.model.gpt2 import GPT2, GPT2Config
from ft.model.lora import LoRASettings, add_lora, find_targets, weights_sha256
from ft.model.pretrained import load_weights


def build_model(config: Config, files: ModelFiles, model_config: GPT2Config, checkpoint: Path | None = None) -> GPT2:
    """Build the model on the CPU, with the weights of the checkpoint, pretrained weights, or random ones.

    Args:
        config: the settings.
        files: of the pretrained model.
        model_config: the configuration with the changes of the settings.
        checkpoint: to resume from; one of LoRA has an adapter only, for the pretrained weights.

    Raises:
        FtError: the weights do not fit the configuration, or the adapter does not fit the weights.
        UsageError: a pattern of --train-only, --freeze or --lora-targets matches nothing, or --lora-rank is too large.
    """
    model = GPT2(model_config)
    if config.uses_lora:
        load_weights(model, files.weights)
        add_adapter(model, config, checkpoint)
    else:
        freeze(model, config.train_only, config.freeze)
        if checkpoint is not None:
            load_weights(model, [checkpoint / WEIGHTS])
        elif config.init == "pretrained":
            load_weights(model, files.weights)
        else:
            model.init_weights(config.seed)
    model.activation_checkpointing = config.activation_checkpointing
    return model


def add_adapter(model: GPT2, config: Config, checkpoint: Path | None) -> None:
    """Add the adapter of the run to a model with the weights of its base: a new one, or a saved one."""
    settings = _lora_settings_of(config, model, checkpoint)
    names = add_lora(model, settings, config.seed)
    freeze(model, config.train_only or settings.bias_patterns, config.freeze, adapter=names)
    if checkpoint is not None or config.adapter is not None:
        load_adapter(model, checkpoint or Path(str(config.adapter)))


def _lora_settings_of(config: Config, model: GPT2, checkpoint: Path | None) -> LoRASettings:
    """The settings of the adapter of a run: those of its checkpoint, of --adapter, or of --lora-rank.

    Args:
        config: with `uses_lora`.
        model: with the weights of the base.
        checkpoint: to resume from, if any.

    Raises:
        UsageError: --lora-targets matches no layer, or the flags differ from the adapter.
        FtError: the adapter cannot be read, is of another base, or of a kind that is not computed here.
    """
    if checkpoint is not None:
        return read_adapter_settings(checkpoint, model)
    dropout = config.lora_dropout
    if config.adapter is None:
        assert config.lora_rank is not None
        return LoRASettings(
            rank=config.lora_rank,
            alpha=2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
            dropout=dropout or 0.0,
            targets=find_targets(model, config.lora_targets),
            base_sha256=weights_sha256(model),
        )
    directory = Path(config.adapter)
    if not os.path.isdir(directory):
        raise UsageError(
            f"--adapter is {shown(config.adapter)}, there is no such directory; it must have {ADAPTER_CONFIG} and "
            f"{ADAPTER_WEIGHTS}, as `hf download` gets them from the Hub"
        )
    if not os.path.lexists(directory / ADAPTER_CONFIG):
        within = directory / "adapter"
        remedy = f"it is in {within}" if is_adapter(within) else "name a directory that peft or this program wrote"
        raise UsageError(f"--adapter is {shown(config.adapter)}, which has no {ADAPTER_CONFIG}: {remedy}")
    settings = read_adapter_settings(directory, model)
    recorded, _ = read_base(directory)
    is_known = bool(read_about(directory))  # then the hash of the base was compared
    if recorded is not None and Path(recorded).name != Path(config.model).name and not is_known:
        print(
            sentence(
                f"WARNING: {directory} names {recorded} as its base, and --model is {config.model}: another base "
                "makes the adapter worthless."
            )
        )
    given = {
        "--lora-rank": (config.lora_rank, settings.rank),
        "--lora-alpha": (config.lora_alpha, settings.alpha),
        "--lora-targets": (find_targets(model, config.lora_targets) if config.lora_targets else None, settings.targets),
    }
    problems = [
        f"{name} is {shown(value)}, and the adapter in {directory} has {shown(own)}: leave it out"
        for name, (value, own) in given.items()
        if value not in (None, own)
    ]
    if problems:
        raise UsageError(*problems)
    return settings if dropout is None else replace(settings, dropout=dropout)
