"""The training loop: one optimizer step, and when to log, evaluate and save between steps.

`train` is the loop, `train_step` one step of it: forward, backward, clip, update.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ft.config import Config
from ft.data.batches import Batch
from ft.data.examples import Example
from ft.device import Precision
from ft.distributed.ranks import SINGLE_PROCESS, Ranks
from ft.train.class_weights import TargetWeights
from ft.train.cuda_graphs import GraphedStep, Step
from ft.train.nonfinite import NonFiniteGuard
from ft.train.optim import AdamW, clip_in_optimizer
from ft.train.schedule import SaveSchedule, learning_rate_at, steps_per_epoch, total_steps, windows
from ft.train.state import State


@dataclass(frozen=True)
class Components:
    """What a training step needs besides its batches.

    Attributes:
        model: on its device; wrapped by DistributedDataParallel or sharded by FSDP2 in several processes.
        optimizer: of the trained parameters of `model`.
        scaler: of the loss, for fp16; disabled in the other formats.
        precision: the dtype of matrix products, and the device.
        ranks: the processes of the run, which share every batch and sum their gradients.
        target_weights: of the loss, with `--class-weights`; None to weigh all targets alike.
    """

    model: nn.Module
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    precision: Precision
    ranks: Ranks = SINGLE_PROCESS
    target_weights: TargetWeights | None = None


class Hooks(Protocol):
    """What the loop calls between steps. In a run this is `ft.session.Session`; others use `StepRecorder`."""

    def step_done(self, num_examples: int, num_tokens: int) -> None:
        """Count an optimizer step that read this many examples and input tokens on all ranks together."""

    def log(self, step: int, epoch: float, *, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Report the mean training loss since the last call."""

    def evaluate(self, state: State) -> None:
        """Evaluate the model, and record the result in `state`."""

    def defers_save(self, state: State) -> bool:
        """Whether to postpone the save that is due now, because the previous one is still being written."""

    def save(self, state: State) -> None:
        """Write a checkpoint."""

    def should_stop(self, state: State) -> bool:
        """Whether to stop after this step, on a signal or by early stopping. The same on all ranks."""


class StepRecorder:
    """Hooks that record what the loop logs, and neither evaluate nor save: for `explain`, benchmarks and tests.

    Attributes:
        logged: the loss, learning rate and gradient norm of each call of `log`.
    """

    def __init__(self, *, stop: bool = False) -> None:
        """With `stop`, training ends after its first step."""
        self.logged: list[dict[str, float]] = []
        self._stop = stop

    def step_done(self, num_examples: int, num_tokens: int) -> None:
        """Do nothing."""

    def log(self, step: int, epoch: float, **figures: float) -> None:
        """Record the figures."""
        self.logged.append(figures)

    def evaluate(self, state: State) -> None:
        """Do nothing."""

    def defers_save(self, state: State) -> bool:
        """Never."""
        return False

    def save(self, state: State) -> None:
        """Do nothing."""

    def should_stop(self, state: State) -> bool:
        """After the first step, if `stop` is set."""
        return self._stop


def train(
    components: Components,
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], Batch],
    config: Config,
    state: State,
    hooks: Hooks,
) -> None:
    """Train the model in place from step `state.step` to the last step; log, evaluate and save on the way.

    If `hooks.should_stop` returns True, training ends after saving. A save every `save_steps` may be deferred; the
    saves of the last step, of a stop and of the best evaluation are not.

    Args:
        components: model, optimizer, loss scaler, precision and ranks.
        examples: the training split.
        collate: makes a batch from a list of examples.
        config: the settings.
        state: the progress of the run; updated in place.
        hooks: called between steps.

    Raises:
        NonFiniteError: a loss or gradient is not finite, and no more steps may be skipped.
    """
    device, ranks, weights = components.precision.device, components.ranks, components.target_weights
    last_step = total_steps(len(examples), config)
    per_epoch = steps_per_epoch(len(examples), config)
    # The sum of losses stays on the device until it is logged: reading it makes the host wait for all queued kernels.
    loss_sum = torch.full((), state.loss_sum, device=device)
    guard = NonFiniteGuard(device, state, limit=config.max_skipped_steps if config.on_nonfinite == "skip" else 0)
    step: Step = partial(train_step, components, max_grad_norm=config.max_grad_norm, guard=guard, loss_sum=loss_sum)
    if config.cuda_graphs:
        *inputs, empty = (collate([]).to(device) for _ in range(config.gradient_accumulation_steps + 1))
        step = GraphedStep(step, inputs, empty)
    saves = SaveSchedule(config, hooks.defers_save)
    components.model.train()

    # A window holds the rows of one optimizer step: one list per batch, and one batch unless gradients are accumulated.
    for window in windows(len(examples), config, state.step):
        # Each rank collates its own examples. The number of targets, or the sum of their weights, is that of all ranks.
        batches = [collate(ranks.local_examples([examples[row] for row in rows])).to(device) for rows in window]
        read = [examples[row] for rows in window for row in rows]
        total_weight = sum(len(example.target_ids) for example in read) if weights is None else weights.total(read)
        lr = learning_rate_at(state.step, last_step, config.learning_rate, config.warmup_steps, config.lr_schedule)
        grad_norm = step(batches, total_weight, lr)
        guard.check_at_once()
        state.step += 1
        state.loss_steps += 1
        hooks.step_done(len(read), sum(len(example.input_ids) for example in read))

        # Log, evaluate, save: in this order, so that a checkpoint contains all that was logged up to its step. On a GPU
        # values are read from the device only here.
        epoch, last = state.step / per_epoch, state.step == last_step
        if state.step % config.logging_steps == 0 or last:
            guard.check()
            mean_loss = state.record_losses(loss_sum.item())
            hooks.log(state.step, epoch, loss=mean_loss, learning_rate=lr, grad_norm=grad_norm.item())
            loss_sum.zero_()
        if state.step % config.eval_steps == 0 or last:
            state.evaluation_due = True  # stays set if a signal interrupts the evaluation
            hooks.evaluate(state)
        stops = hooks.should_stop(state)
        if saves.are_due(state, must=last or stops):
            guard.check()
            state.loss_sum = loss_sum.item()
            hooks.save(state)
        if stops:
            return


def train_step(
    components: Components,
    batches: Sequence[Batch],
    total_weight: float | Tensor,
    learning_rate: float | Tensor,
    *,
    max_grad_norm: float,
    guard: NonFiniteGuard,
    loss_sum: Tensor,
) -> Tensor:
    """One optimizer step: forward and backward pass of each batch, clipping, AdamW update. Frees the gradients.

    The step reads no value from the device, so that the host runs ahead of a GPU and `--cuda-graphs` can capture the
    step. What differs between steps is passed as `batches`, `total_weight` and `learning_rate`; a captured step gets
    them as tensors.

    Args:
        components: updated in place, as are `guard` and `loss_sum`.
        batches: on the device; their gradients are accumulated.
        total_weight: the number of supervised tokens of all batches on all ranks, or the sum of their weights.
        learning_rate: of this step.
        max_grad_norm: the largest global norm that is not scaled down; 0 disables clipping.
        guard: skips the update if the loss or the gradient is not finite.
        loss_sum: scalar on the device; the mean loss of the step is added to it.

    Returns:
        The global norm of the gradients before clipping, a scalar on the device.
    """
    optimizer, scaler, ranks = components.optimizer, components.scaler, components.ranks
    # Forward and backward. The gradients of all batches and of all ranks add up. Each loss is a sum divided by the
    # number of supervised tokens in the window, so that the total is the mean over these tokens; with class weights it
    # is the weighted mean, as of torch.nn.CrossEntropyLoss(weight).
    weights = None if components.target_weights is None else components.target_weights.tensor
    window_loss = torch.zeros_like(loss_sum)
    for number, batch in enumerate(batches, start=1):
        with ranks.gradient_sync(components.model, last=number == len(batches)):
            with components.precision.autocast():
                logits = components.model(batch.input_ids, batch.packing, batch.selection)  # (S, V)
            loss = F.cross_entropy(logits.float(), batch.target_ids, weight=weights, reduction="sum") / total_weight
            scaler.scale(loss).backward()
        window_loss += loss.detach()
    window_loss = ranks.sum(window_loss)

    # Clip and update. In fp16 the gradients have the factor of the loss scale, which is removed before clipping.
    scaler.unscale_(optimizer)  # type: ignore[arg-type]
    grad_norm = clip_in_optimizer(optimizer, max_grad_norm)
    optimizer.learning_rate = learning_rate
    loss_sum += guard.watch(optimizer, window_loss, grad_norm, scales_loss=scaler.is_enabled())
    scaler.step(optimizer)  # type: ignore[arg-type]  # in fp16: skips the update if a gradient overflowed
    scaler.update()
    optimizer.zero_grad()
    return grad_norm
