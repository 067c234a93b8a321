"""Set up a run, one function each: device, inputs, model, components, state."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ft.checkpoint import resume
from ft.checkpoint.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    load_adapter,
    read_about,
    read_adapter_settings,
    read_base,
)
from ft.checkpoint.model_description import ModelDescription, read_description
from ft.checkpoint.run_dir import RunDirectory
from ft.checkpoint.snapshot import WEIGHTS, load_training_state
from ft.checks import flag
from ft.config import Config
from ft.data.load import Data, read_data
from ft.device import Precision, choose_precision, disable_malloc_trim, use_device
from ft.distributed.launch import local_rank, world_size
from ft.distributed.ranks import Ranks
from ft.errors import UsageError, sentence, shown
from ft.evaluation.perplexity import GeneralText, read_general_text
from ft.model.compile import compile_blocks
from ft.model.freeze import freeze
from ft.model.gpt2 import GPT2, GPT2Config
from ft.model.lora import LoRASettings, add_lora, find_targets, weights_sha256
from ft.model.pretrained import ModelFiles, load_weights, model_config_of, model_files
from ft.train.cuda_graphs import require_cuda
from ft.train.loop import Components
from ft.train.optim import build_optimizer
from ft.train.state import State
from ft.train.tensorboard import summary_writer


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        files: where the model's files are.
        description: the model's configuration and tokenizer, as published.
        model_config: the configuration with the changes of the settings, such as dropout.
        data: the splits as rows and as examples.
        general_text: the text to measure forgetting on; None without `--forgetting`.
        sha256: of all examples; a resumed run compares it with that of its checkpoint.
    """

    files: ModelFiles
    description: ModelDescription
    model_config: GPT2Config
    data: Data
    general_text: GeneralText | None
    sha256: str


def prepare_device(config: Config) -> Precision:
    """Choose device and precision, and apply process-wide settings of PyTorch and of the allocator.

    Raises:
        UsageError: the device is not present, or does not support the settings.
    """
    device = use_device(config.device, local_rank() if world_size() > 1 else None)
    if config.cuda_graphs:
        require_cuda(device)
    if config.tensorboard:
        summary_writer()  # raises now if the package is not installed, not after reading the data
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if not config.release_memory:
        disable_malloc_trim()
    return choose_precision(config.precision, device)


def read_inputs(run: RunDirectory, ranks: Ranks) -> Inputs:
    """Find or download the model and the data set, tokenize, and check that all ranks have the same data.

    Raises:
        FtError: a file is missing, unreadable or not valid.
        UsageError: the ranks read different data.
    """
    config = run.config
    needs_weights = config.uses_lora or (config.init == "pretrained" and run.resume_from is None)
    with ranks.local_rank_zero_first():  # it downloads, the other ranks read its cache
        files = model_files(config.model, config.model_revision, with_weights=needs_weights)
        description = read_description(files)
        model_config = model_config_of(description.config, config)
        data = read_data(config, description.tokenizer.tokenizer)
        general_text = None
        if config.forgetting is not None:
            general_text = read_general_text(config.forgetting, data.tokenizer, model_config.n_positions)
    digest = data.sha256()
    ranks.require_same({"the SHA-256 of the data": digest})
    return Inputs(files, description, model_config, data, general_text, digest)


def build_model(config: Config, files: ModelFiles, model_config: GPT2Config, checkpoint: Path | None = None) -> GPT2:
    """Build the model on the CPU, with the weights of the checkpoint, pretrained weights, or random ones.

    Args:
        config: the settings.
        files: of the pretrained model.
        model_config: the configuration with the changes of the settings.
        checkpoint: to resume from; one of LoRA has an adapter only, for the pretrained weights.

    Raises:
        FtError: the weights do not fit the configuration, or the adapter does not fit the weights.
        UsageError: a pattern of --train-only, --freeze or --lora-targets matches nothing, or --lora-rank is too large;
            or a flag of LoRA is given without LoRA.
    """
    of_lora = ("lora_alpha", "lora_dropout", "lora_targets")
    given = [name for name in of_lora if getattr(config, name) not in (None, ())]
    if given and not config.uses_lora:
        raise UsageError(*(f"{flag(name)} is for LoRA, which --lora-rank 8 or --adapter turns on" for name in given))
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
    if not directory.is_dir():
        raise UsageError(
            f"--adapter is {shown(config.adapter)}, there is no such directory; it must have {ADAPTER_CONFIG} and "
            f"{ADAPTER_WEIGHTS}, as `hf download` gets them from the Hub"
        )
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


def build_components(model: GPT2, config: Config, precision: Precision, ranks: Ranks) -> Components:
    """Move the model to its device, and build the optimizer and the loss scaler.

    Raises:
        UsageError: --compile does not work on this machine.
    """
    compile_blocks(model.h, config.compile, precision.device)
    parallel = ranks.parallelize(model, precision.device, shard=config.shard, bf16_gradients=config.bf16_gradients)
    # Compiled blocks cast inside their kernels, and sharded weights are gathered per block: both use autocast.
    if precision.name != "fp32" and config.compile == "none" and not config.shard:
        model.keep_half_weights(precision.dtype)
    optimizer = build_optimizer(model, config.learning_rate, config.weight_decay)
    torch.manual_seed(config.seed + ranks.rank)  # different dropout masks on each rank
    return Components(parallel, optimizer, precision.grad_scaler(), precision, ranks)


def restore_state(run: RunDirectory, inputs: Inputs, model: GPT2, components: Components) -> State:
    """The state of a new run, or of the checkpoint; then optimizer, loss scale and random states are restored too.

    Raises:
        FtError: the checkpoint does not fit the model, or the data are not those of the run.
    """
    state = State()
    if run.resume_from is not None:
        state = load_training_state(run.resume_from, model, components.optimizer, components.scaler, components.ranks)
        resume.check_data_unchanged(run.resume_from, state, inputs.sha256)
    state.data = inputs.sha256
    return state
