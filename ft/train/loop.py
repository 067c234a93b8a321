"""The training loop: one optimizer step, and when to log, evaluate and save between steps."""

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
from ft.distributed.ranks import ALONE, Ranks
from ft.train.cuda_graphs import GraphedStep, Step
from ft.train.nonfinite import NonFiniteGuard
from ft.train.optim import AdamW, clip_in_optimizer
from ft.train.schedule import SaveSchedule, learning_rate_at, steps_per_epoch, total_steps, windows
from ft.train.state import State


@dataclass(frozen=True)
class Components:
    """What a training step changes, and how it computes.

    Attributes:
        model: on its device; several processes wrap it by DistributedDataParallel or shard it by FSDP2.
        optimizer: of the trained parameters of `model`.
        scaler: of the loss, for fp16; disabled in the other formats.
        precision: the number format of matrix products, and the device.
        ranks: the processes of the run, which share every batch and sum their gradients.
    """

    model: nn.Module
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    precision: Precision
    ranks: Ranks = ALONE


class Hooks(Protocol):
    """What the loop calls between steps: `ft.session.Session` in a run; benchmarks and tests have their own."""

    def step_done(self, num_examples: int, num_tokens: int) -> None:
        """Count an optimizer step that saw so many examples and input tokens, in all processes together."""

    def log(self, step: int, epoch: float, *, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Report the mean training loss since the last call."""

    def evaluate(self, state: State) -> None:
        """Evaluate the model, and note the result in `state`."""

    def defers_save(self, state: State) -> bool:
        """Whether a save that is due waits for a later step, as the one before is still being written."""

    def save(self, state: State) -> None:
        """Write a checkpoint."""

    def should_stop(self, state: State) -> bool:
        """Whether this step is the last: a signal has come, or evaluations no longer improve. The same on all ranks."""


class StepRecorder:
    """Hooks that keep what the loop logs, and neither evaluate nor save: for one step, benchmarks and tests.

    Attributes:
        logged: the loss, learning rate and gradient norm of each call of `log`.
    """

    def __init__(self, *, stop: bool = False) -> None:
        """`stop` ends the training after its first step."""
        self.logged: list[dict[str, float]] = []
        self._stop = stop

    def step_done(self, num_examples: int, num_tokens: int) -> None:
        """Do nothing."""

    def log(self, step: int, epoch: float, **figures: float) -> None:
        """Keep the figures."""
        self.logged.append(figures)

    def evaluate(self, state: State) -> None:
        """Do nothing."""

    def defers_save(self, state: State) -> bool:
        """Never."""
        return False

    def save(self, state: State) -> None:
        """Do nothing."""

    def should_stop(self, state: State) -> bool:
        """As asked for."""
        return self._stop


def train(
    components: Components,
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], Batch],
    config: Config,
    state: State,
    hooks: Hooks,
) -> None:
    """Train the model in place from step `state.step` to the last one, evaluating and saving on the way.

    When `hooks` says stop, the current step is finished and saved. A save that is due by its number may be deferred;
    those of the last step, of a stop and of the best evaluation are not.

    Args:
        components: what the steps change.
        examples: the training split.
        collate: makes a batch of examples.
        config: the settings; see `ft.config.Config`.
        state: where the run stands; updated in place.
        hooks: called between steps.

    Raises:
        NonFiniteError: a loss or gradient is not finite, and no more steps may be skipped.
    """
    device, ranks = components.precision.device, components.ranks
    last_step = total_steps(len(examples), config)
    per_epoch = steps_per_epoch(len(examples), config)
    # The sum stays on the device until it is logged: reading it makes the host wait for all queued work.
    loss_sum = torch.full((), state.loss_sum, device=device)
    guard = NonFiniteGuard(device, state, limit=config.max_skipped_steps if config.on_nonfinite == "skip" else 0)
    step: Step = partial(train_step, components, max_grad_norm=config.max_grad_norm, guard=guard, loss_sum=loss_sum)
    if config.cuda_graphs:
        *inputs, empty = (collate([]).to(device) for _ in range(config.gradient_accumulation_steps + 1))
        step = GraphedStep(step, inputs, empty)
    saves = SaveSchedule(config, hooks.defers_save)
    components.model.train()

    # A window is the rows of one optimizer step: as many batches as gradients are accumulated over.
    for window in windows(len(examples), config, state.step):
        batches = [collate(ranks.share([examples[row] for row in rows])).to(device) for rows in window]
        read = [examples[row] for rows in window for row in rows]
        num_targets = sum(len(example.target_ids) for example in read)
        lr = learning_rate_at(state.step, last_step, config.learning_rate, config.warmup_steps, config.lr_schedule)
        grad_norm = step(batches, num_targets, lr)
        guard.check_at_once()
        state.step += 1
        state.loss_steps += 1
        hooks.step_done(len(read), sum(len(example.input_ids) for example in read))

        # Log, evaluate, save: in this order, so that a checkpoint holds everything logged up to its step. Only here
        # are values read from the device.
        epoch, last = state.step / per_epoch, state.step == last_step
        if state.step % config.logging_steps == 0 or last:
            guard.check()
            mean_loss = state.note_losses(loss_sum.item())
            hooks.log(state.step, epoch, loss=mean_loss, learning_rate=lr, grad_norm=grad_norm.item())
            loss_sum.zero_()
        if state.step % config.eval_steps == 0 or last:
            state.evaluation_due = True  # remains set if the run is stopped during the evaluation
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
    num_targets: float | Tensor,
    learning_rate: float | Tensor,
    *,
    max_grad_norm: float,
    guard: NonFiniteGuard,
    loss_sum: Tensor,
) -> Tensor:
    """One optimizer step: forward and backward pass of all its batches, clipping, AdamW. Frees the gradients.

    The step reads no value from the device and takes no decision by one: a GPU never waits for the host, and
    `--cuda-graphs` can record the step. What differs between steps comes in by `batches`, `num_targets` and
    `learning_rate`; a recorded step has them as tensors.

    Args:
        components: changed in place, as are `guard` and `loss_sum`.
        batches: on the device; their gradients add up.
        num_targets: supervised tokens of all batches on all ranks.
        learning_rate: of this step.
        max_grad_norm: as for `clip_in_optimizer`.
        guard: skips the update if the loss or the gradient is not finite.
        loss_sum: scalar; the mean loss is added to it.

    Returns:
        The global norm of the gradients before clipping, a scalar on the device.
    """
    optimizer, scaler, ranks = components.optimizer, components.scaler, components.ranks
    # Forward and backward. The gradients of all batches and of all ranks add up. Each loss is a sum divided by the
    # number of supervised tokens in the window, so that the total is the mean over these tokens.
    window_loss = torch.zeros_like(loss_sum)
    for number, batch in enumerate(batches, start=1):
        with ranks.exchange(components.model, last=number == len(batches)):
            with components.precision.autocast():
                logits = components.model(batch.input_ids, batch.packing, batch.selection)  # (S, V)
            loss = F.cross_entropy(logits.float(), batch.target_ids, reduction="sum") / num_targets
            scaler.scale(loss).backward()
        window_loss += loss.detach()
    window_loss = ranks.sum(window_loss)

    # Clip and update.
    scaler.unscale_(optimizer)  # the norm is that of the gradients without the loss scale; only fp16 has one
    grad_norm = clip_in_optimizer(optimizer, max_grad_norm)
    optimizer.learning_rate = learning_rate
    loss_sum += guard.watch(optimizer, window_loss, grad_norm, scales_loss=scaler.is_enabled())
    scaler.step(optimizer)  # type: ignore[arg-type]  # in fp16 it skips the update if a gradient overflowed
    scaler.update()
    optimizer.zero_grad()
    return grad_norm
