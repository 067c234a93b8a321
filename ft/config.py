"""Every setting of a run: its default, its help text, its minimum, and what it does.

Those of input and output, which need no formula, are in `FileSettings` (ft/checks.py), and `Config` inherits them.

The command line is generated from this class: `batch_size` is the flag `--batch-size`. The text under a field explains
its formula, and the effect of a value that is too large or too small. The defaults are the recipe of the tutorial that
this program reproduces.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ft.checks import (
    LENGTH,
    LOGGING,
    MACHINE,
    OPTIMIZER,
    PARAMETERS,
    PROCESSES,
    FileSettings,
    find_problems,
    setting,
)
from ft.errors import UsageError
from ft.io import paths
from ft.io.plain_files import atomic_write_text


@dataclass(frozen=True)
class Config(FileSettings):
    """The settings of one run: those of `FileSettings`, and these. Frozen, so that no part of a run changes them."""

    epochs: float = setting(1.0, LENGTH, "passes over the training examples")
    """Steps of a run: epochs x ceil(examples / (batch_size x gradient_accumulation_steps x processes)), rounded up. The
    learning rate decays over all of them: one epoch is not the first third of three. Too few: the loss still falls at
    the end. Too many: the training loss falls while the validation loss rises, as examples are memorized.
    """
    max_steps: int | None = setting(
        None, LENGTH, "stop after this many optimizer steps, overriding --epochs", minimum=1
    )
    early_stopping_patience: int | None = setting(
        None,
        LENGTH,
        "stop after this many evaluations in a row without a better one, by --best-metric (default: never)",
        minimum=1,
    )
    best_metric: Literal["accuracy", "macro_f1", "loss"] = setting(
        "accuracy",
        LENGTH,
        "validation metric by which --early-stopping-patience and --keep-best compare evaluations; ties: by loss",
    )
    """Of classes of very different sizes accuracy measures the large ones: a model that always answers with a class of
    95 % has 95 % accuracy. macro_f1 is the mean of the F1 of each class, whatever its size. loss also sees how sure the
    model is: it can rise while both others still improve.
    """
    batch_size: int = setting(8, LENGTH, "examples per forward and backward pass, in each process", minimum=1)
    """The gradient of a step is the mean over these examples. Small: many steps per epoch, each in a noisy direction.
    Large: few steps in a good direction, each example computed faster until the device is full, and more memory. Too
    large at the same learning rate: too few steps. Too small: the noise is as large as the signal.
    """
    gradient_accumulation_steps: int = setting(
        1, LENGTH, "batches whose gradients are added up for one optimizer step", minimum=1
    )
    """The same gradient as that of a batch_size so many times larger, in the memory of one batch: losses are divided by
    the targets of all of them. It saves no time.
    """
    processes: int = setting(
        1, LENGTH, "number of processes, each with batch_size examples; recorded by the run under torchrun", minimum=1
    )
    eval_batch_size: int = setting(
        64, LENGTH, "examples per batch in evaluation; changes speed and memory, not the result", minimum=1
    )
    max_length: int = setting(
        32, LENGTH, "tokens per example, end-of-text and label included; a longer example keeps its end", minimum=2
    )
    """Time grows with the number of tokens, in attention with its square. Too small: what decides an example is cut
    off; `python run.py data` counts the examples that are cut. Too large costs only what the long examples take, as
    nothing is padded to it; the model's n_positions is the limit.
    """
    seed: int = setting(42, LENGTH, "determines the order of the examples, dropout and --init random", minimum=0)
    """Epoch e reads in the order of torch.randperm seeded with seed + e. No value is better than another: runs that
    differ in nothing else show how much of a difference between two settings is chance.
    """

    learning_rate: float = setting(2e-5, OPTIMIZER, "AdamW's step size at its maximum", minimum=0.0)
    """A step moves each weight by about this much or less, whatever the size of its gradient:
    w <- w - lr m' / (sqrt(v') + eps) (`AdamW`, ft/train/optim.py). Too large: the loss jumps, stays at chance level or
    becomes NaN, and pretraining is lost. Too small: the loss falls evenly, and the run ends long before it is low.
    """
    lr_schedule: Literal["linear", "cosine", "constant"] = setting(
        "linear", OPTIMIZER, "decay of the learning rate: linear to 0, half a cosine to 0, none"
    )
    """With p from 0 to 1 after the warm-up: lr (1 - p), lr (1 + cos(pi p)) / 2, or lr (ft/train/schedule.py). A rate
    that stays high ends with weights that depend on the last few batches; decay averages them out. The cosine stays
    high for longer and falls faster in the middle.
    """
    warmup_steps: int = setting(
        0, OPTIMIZER, "optimizer steps over which the learning rate first rises from 0", minimum=0
    )
    """Step s of the warm-up (from 0) has lr s / warmup_steps. AdamW's first steps are full ones in whatever direction
    the first batches point. Too few, with a high rate or random weights: the loss jumps at the start. Too many: part of
    the run is spent on steps that are too small.
    """
    weight_decay: float = setting(
        0.0, OPTIMIZER, "decoupled weight decay of all but biases and LayerNorm weights", minimum=0.0
    )
    """w <- w - lr weight_decay w in each step, apart from the gradient. Too large: weights shrink faster than they
    learn, and pretraining fades. 0, the default: a short run stays close to the pretrained weights anyway.
    """
    max_grad_norm: float = setting(
        1.0,
        OPTIMIZER,
        "scale gradients down to this global norm if theirs is larger; 0 disables clipping",
        minimum=0.0,
    )
    """g <- g min(1, max_grad_norm / |g|), with |g| over all parameters together (ft/train/optim.py): a single odd batch
    cannot fill AdamW's moments. Too small: every step is clipped, and AdamW, which divides by the size of past
    gradients, hardly notices. Too large, or 0: nothing is clipped. The log shows the norm before clipping.
    """
    dropout: float | None = setting(
        None,
        OPTIMIZER,
        "probability of GPT-2's three dropouts (default: the model's own, 0.1 as published)",
        minimum=0.0,
    )
    """In training a value x becomes 0 with probability p, else x / (1 - p): after the embeddings, in the attention
    probabilities, and in what attention and MLP add to the residual stream. Too small: long runs memorize their
    examples. Too large: little is learned. Evaluation has no dropout.
    """

    class_weights: str | None = setting(
        None,
        OPTIMIZER,
        "weights of the training loss by label: balanced (by inverse frequency), or numbers in the order of the "
        "labels, such as 1,5; evaluation stays unweighted",
    )
    """The loss of a step is sum(w_i loss_i) / sum(w_i) over its examples, with w_i the weight of the label of example
    i, as of torch.nn.CrossEntropyLoss(weight). balanced is n / (K count) for a label with count of n examples, of K
    labels. Without weights a label of 5 % has 5 % of the gradient, and a model may never answer with it. Large weights
    of rare labels: more of them are found, and more of the others are taken for them; steps are noisier, as few
    examples decide them.
    """

    train_only: tuple[str, ...] = setting(
        (),
        PARAMETERS,
        "train only parameters whose names match: wte.weight, h.11.*, *.bias, or last:N (last N blocks and final norm)",
    )
    """The others are frozen: no gradient and no moments (ft/model/freeze.py). Too few: the model cannot learn the task.
    All, the default: the most time and memory, and a long run can overwrite the most of the pretrained model.
    """
    freeze: tuple[str, ...] = setting((), PARAMETERS, "freeze parameters whose names match; applied after --train-only")
    lora_rank: int | None = setting(
        None,
        PARAMETERS,
        "LoRA: train a change of this rank of the linear layers, and none of their weights; --train-only adds biases",
        minimum=1,
    )
    """y = x W + b becomes y = x W + b + (lora_alpha / lora_rank) x A^T B^T, with A (lora_rank, in) and B (out,
    lora_rank) trained and W frozen (ft/model/lora.py). Too small: the change cannot hold what the task needs. Large:
    more memory and larger checkpoints, up to the model's width. Adapters learn with a larger learning_rate than all
    weights do, such as 2e-4.
    """
    lora_alpha: float | None = setting(
        None, PARAMETERS, "LoRA: the change is scaled by alpha / rank (default: twice the rank)"
    )
    lora_dropout: float | None = setting(
        None, PARAMETERS, "LoRA: dropout of the input of A (default: 0, or that of --adapter)", minimum=0.0
    )
    lora_targets: tuple[str, ...] = setting(
        (), PARAMETERS, "LoRA: adapt only linear layers whose names match: c_attn, h.11.*, last:N (default: all)"
    )
    adapter: str | None = setting(
        None,
        PARAMETERS,
        "continue a LoRA adapter: a directory that peft or this program wrote, for the base that --model names",
    )

    device: str | None = setting(None, MACHINE, "cpu, cuda, cuda:1, mps (default: the best present)")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", MACHINE, "format of matrix products; auto: bf16 or fp16 where the device computes it faster, else fp32"
    )
    tf32: bool = setting(
        False,
        MACHINE,
        "let NVIDIA GPUs round the inputs of fp32 matrix products to 10 bits of mantissa: faster, other losses",
    )
    compile: Literal["none", "default", "reduce-overhead"] = setting(
        "none",
        MACHINE,
        "compile the blocks with torch.compile, which takes minutes at the start; reduce-overhead: as CUDA graphs",
    )
    static_shapes: bool = setting(
        False,
        MACHINE,
        "pad every training batch to --batch-size examples of --max-length tokens; --compile implies it",
    )
    cuda_graphs: bool = setting(
        False,
        MACHINE,
        "record the training step as one CUDA graph and replay it, where a GPU waits for Python; pads batches too",
    )
    release_memory: bool = setting(
        False, MACHINE, "return freed memory to the system in every step: a smaller and slower process on Linux CPUs"
    )
    activation_checkpointing: Literal["none", "full", "selective"] = setting(
        "none", MACHINE, "recompute activations in the backward pass: less memory, more time, the same gradients"
    )

    shard: bool = setting(
        False,
        PROCESSES,
        "shard weights, gradients and moments over the processes, for models that do not fit one device",
    )
    bf16_gradients: bool = setting(
        False, PROCESSES, "send gradients between processes as bf16: half the bytes, and slightly other losses"
    )
    process_timeout: float = setting(600.0, PROCESSES, "seconds after which the run ends if a process does not answer")

    logging_steps: int = setting(
        100, LOGGING, "log loss, learning rate, gradient norm and speed every N steps", minimum=1
    )
    eval_steps: int = setting(100, LOGGING, "evaluate on the validation split every N steps", minimum=1)
    forgetting: str | None = setting(
        None,
        LOGGING,
        "also measure perplexity on general text, before, during and after: a UTF-8 file, a data set, or builtin",
    )
    save_steps: int = setting(
        100, LOGGING, "save a checkpoint, from which --resume continues, every N steps", minimum=1
    )
    """On a GPU many steps are taken while a checkpoint is written. A save that comes due meanwhile is deferred until
    the writer is free. Those of the last step, of a stop and, with keep_best, of the best evaluation are not deferred,
    and with save_blocking none is.
    """
    keep_checkpoints: int = setting(2, LOGGING, "number of newest checkpoints to keep", minimum=1)
    keep_best: bool = setting(
        False,
        LOGGING,
        "also keep the checkpoint of the best evaluation, by --best-metric, and save at each that is better",
    )
    tensorboard: bool = setting(
        False, LOGGING, "also write the metrics as event files for TensorBoard, to tensorboard/ in --output-dir"
    )
    profile: str | None = setting(
        None, LOGGING, "write a torch.profiler trace of three training steps to FILE (.json or .json.gz), for Perfetto"
    )
    quiet: bool = setting(
        False, LOGGING, "print the results alone: no progress; warnings and errors go to standard error"
    )
    save_blocking: bool = setting(
        False,
        LOGGING,
        "write checkpoints while training waits: slower, but without a second copy of weights and moments in memory",
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop", LOGGING, "if a loss or gradient is NaN or inf: stop before the update, or skip the update"
    )
    max_skipped_steps: int = setting(
        10, LOGGING, "with --on-nonfinite skip: stop after skipping more updates than this", minimum=0
    )

    def __post_init__(self) -> None:
        """Expand `~` in paths, and check all settings.

        Raises:
            UsageError: has one sentence for each problem.
        """
        for name in paths.SETTINGS:
            object.__setattr__(self, name, paths.expand_home(getattr(self, name)))
        if problems := find_problems(self):
            raise UsageError(*problems)

    @property
    def rows_per_batch(self) -> int:
        """Examples of a batch on all ranks together."""
        return self.batch_size * self.processes

    @property
    def rows_per_step(self) -> int:
        """Examples of an optimizer step: the global batch size."""
        return self.rows_per_batch * self.gradient_accumulation_steps

    @property
    def uses_lora(self) -> bool:
        """Whether the run trains an adapter and not the weights of the model."""
        return self.lora_rank is not None or self.adapter is not None

    def save(self, path: Path) -> None:
        """Write all settings as JSON, by an atomic rename."""
        atomic_write_text(path, json.dumps(asdict(self), indent=2) + "\n")


NEWEST = "newest"  # the value of `resume` for the newest checkpoint in the output directory
NO_FLAGS = ("processes",)  # settings that a run records and that have no flag
