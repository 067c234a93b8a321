"""Set up a run, one function each: device, inputs, model, components, state."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ft.checkpoint import resume
from ft.checkpoint.model_description import ModelDescription, find_model, read_description
from ft.checkpoint.run_dir import RunDirectory
from ft.checkpoint.snapshot import load_training_state, read_state
from ft.config import Config
from ft.data.dataset_files import check_local_file
from ft.data.load import Data, read_data
from ft.device import (
    Precision,
    choose_precision,
    disable_malloc_trim,
    precision_for_size,
    require_format,
    use_device,
)
from ft.distributed.launch import local_rank, world_size
from ft.distributed.ranks import Ranks
from ft.errors import UsageError
from ft.evaluation.perplexity import GeneralText, read_general_text
from ft.io.model_layout import ModelFiles
from ft.model.compile import compile_blocks
from ft.model.gpt2 import GPT2, GPT2Config
from ft.model.pretrained import model_config_of
from ft.train.class_weights import TargetWeights, class_weights
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
        class_weights: of the loss, by label; None without `--class-weights`.
    """

    files: ModelFiles
    description: ModelDescription
    model_config: GPT2Config
    data: Data
    general_text: GeneralText | None
    sha256: str
    class_weights: list[float] | None

    def notes(self, config: Config) -> list[str]:
        """Notes for the user on the model, the tokenizer and the data, a sentence each."""
        is_in_run = Path(self.files.source) != Path(config.model)
        model = [f"--model is the run {config.model}: the model is read from {self.files.source}"] if is_in_run else []
        cut = self.data.describe_cut(config.max_length, self.model_config.n_positions)
        return [*model, *self.description.tokenizer.notes, *self.data.notes, *cut]


def prepare_device(config: Config) -> Precision:
    """Choose device and precision, and apply process-wide settings of PyTorch and of the allocator.

    Raises:
        UsageError: the device is not present or does not support the settings.
    """
    device = use_device(config.device, local_rank() if world_size() > 1 else None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # this process may have trained another model before
    if config.cuda_graphs:
        require_cuda(device)
    if config.tensorboard:
        summary_writer()  # raises now if the package is not installed, not after reading the data
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if not config.release_memory:
        disable_malloc_trim()
    return choose_precision(config.precision, device)


def precision_of_run(run: RunDirectory, precision: Precision, num_parameters: int, ranks: Ranks) -> Precision:
    """The precision chosen for this machine and model; for `auto` in a resumed run the one in which the run began.

    Raises:
        FtError: the checkpoint is damaged.
        UsageError: the device does not compute it, the machines of several ranks choose different ones, or --shard
            does not work with it.
    """
    precision = precision_for_size(precision, run.config.precision, num_parameters)
    if run.config.precision == "auto":
        began = "" if run.resume_from is None else read_state(run.resume_from)[0].precision
        if began not in ("", precision.name):
            require_format(
                began, precision.device, f"the run began in {began}", "resume it on the device where it began"
            )
            precision = replace(precision, name=began, reason="as the run began")
    ranks.require_same(
        {"the format that --precision auto selects": precision.name}, "name one that all compute, such as fp32"
    )
    if run.config.shard and precision.name == "fp16":  # whose loss scale would differ between the ranks
        raise UsageError(f"--shard does not work with fp16 ({precision.reason}): take --precision fp32, or bf16")
    return precision


def read_inputs(run: RunDirectory, ranks: Ranks) -> Inputs:
    """Find or download the model and the data set, tokenize, and check that all ranks have the same data.

    Raises:
        FtError: a file is missing, unreadable or not valid.
        UsageError: the ranks read different data, or --class-weights does not fit the labels.
    """
    config = run.config
    check_local_file(config.dataset)  # before a model is downloaded
    needs_weights = config.uses_lora or (config.init == "pretrained" and run.resume_from is None)
    with ranks.local_rank_zero_first():  # it downloads, the other ranks read its cache
        files = find_model(config.model, config.model_revision, with_weights=needs_weights)
        description = read_description(files)
        model_config = model_config_of(description.config, config)
        data = read_data(config, description.tokenizer.tokenizer)
        general_text = None
        if config.forgetting is not None:
            general_text = read_general_text(config.forgetting, data.tokenizer, model_config.n_positions)
    digest = data.sha256()
    ranks.require_same({"the SHA-256 of the data": digest})
    return Inputs(files, description, model_config, data, general_text, digest, class_weights(config, data))


def build_components(model: GPT2, config: Config, inputs: Inputs, precision: Precision, ranks: Ranks) -> Components:
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
    weights = None
    if inputs.class_weights is not None:
        device, vocab_size = precision.device, model.config.vocab_size
        weights = TargetWeights.of(inputs.class_weights, inputs.data.label_ids, vocab_size, device)
    return Components(parallel, optimizer, precision.grad_scaler(), precision, ranks, weights)


def restore_state(run: RunDirectory, inputs: Inputs, model: GPT2, components: Components) -> State:
    """The state of a new run, or of the checkpoint; then optimizer, loss scale and random states are restored too.

    Raises:
        FtError: the checkpoint does not fit the model, or the data are not those of the run.
    """
    state = State()
    if run.resume_from is not None:
        state = load_training_state(run.resume_from, model, components.optimizer, components.scaler, components.ranks)
        resume.check_data_unchanged(run.resume_from, state, inputs.sha256)
    state.data, state.precision = inputs.sha256, components.precision.name
    return state
