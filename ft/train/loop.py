"""The training loop."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ft.config import Config
from ft.data.batches import Batch
from ft.data.examples import Example
from ft.device import Precision
from ft.distributed.ranks import ALONE, Ranks
from ft.train.cuda_graphs import GraphedStep, Step
from ft.train.metrics import Report
from ft.train.nonfinite import NonFiniteGuard
from ft.train.optim import AdamW, clip_in_optimizer
from ft.train.schedule import learning_rate_at, steps_per_epoch, total_steps, windows
from ft.train.state import State


def train(
    model: nn.Module,
    optimizer: AdamW,
    scaler: torch.amp.GradScaler,
    examples: Sequence[Example],
    config: Config,
    state: State,
    *,
    precision: Precision,
    collate: Callable[[Sequence[Example]], Batch],
    report: Report,
    evaluate: Callable[[State], None],
    save: Callable[[State], None],
    stopping: Callable[[], bool],
    put_off: Callable[[State], bool] = lambda state: False,
    ranks: Ranks = ALONE,
) -> None:
    """Train `model` in place from step `state.step` to the last one, evaluating and saving on the way.

    When `stopping` says so, the step in hand is finished and saved. A save that is due by its number waits for a later
    step while `put_off` says so; those of the last step, of a stop and of the best evaluation do not. Several processes
    share every batch of every step.

    Raises:
        NonFiniteError: a loss or gradient is not finite, and no more steps may be skipped.
    """
    device = precision.device
    last_step = total_steps(len(examples), config)
    per_epoch = steps_per_epoch(len(examples), config)
    loss_sum = torch.full((), state.loss_sum, device=device)
    guard = NonFiniteGuard(device, state, limit=config.max_skipped_steps if config.on_nonfinite == "skip" else 0)
    step: Step = partial(
        train_step,
        model,
        optimizer,
        scaler,
        precision=precision,
        max_grad_norm=config.max_grad_norm,
        guard=guard,
        loss_sum=loss_sum,
        ranks=ranks,
    )
    if config.cuda_graphs:
        *inputs, empty = (collate([]).to(device) for _ in range(config.gradient_accumulation_steps + 1))
        step = GraphedStep(step, inputs, empty)
    save_due = False
    model.train()

    for window in windows(len(examples), config, state.step):
        batches = [collate(ranks.share([examples[row] for row in rows])).to(device) for rows in window]
        read = [examples[row] for rows in window for row in rows]
        num_targets = sum(len(example.target_ids) for example in read) / ranks.size
        lr = learning_rate_at(state.step, last_step, config.learning_rate, config.warmup_steps, config.lr_schedule)
        grad_norm = step(batches, num_targets, lr)
        guard.check_at_once()
        state.step += 1
        state.loss_steps += 1
        report.step(reviews=len(read), tokens=sum(len(example.input_ids) for example in read))

        # Log, evaluate, save: in this order, so that a checkpoint knows of all that was said up to its step. Only here
        # is anything read from the device: it would have to finish first what the steps have queued on it.
        epoch, last = state.step / per_epoch, state.step == last_step
        if state.step % config.logging_steps == 0 or last:
            guard.check()
            mean_loss = state.note_losses(loss_sum.item())
            report.training(state.step, epoch, loss=mean_loss, learning_rate=lr, grad_norm=grad_norm.item())
            loss_sum.zero_()
        if state.step % config.eval_steps == 0 or last:
            state.evaluation_due = True  # and stays so if the run is stopped meanwhile
            evaluate(state)
        stops = stopping()
        save_due = save_due or state.step % config.save_steps == 0
        # The weights of these steps no later checkpoint can hold.
        must_save = last or stops or (config.keep_best and state.best_step == state.step)
        if must_save or (save_due and not put_off(state)):
            save_due = False
            guard.check()
            state.loss_sum = loss_sum.item()
            save(state)
        if stops:
            return


def train_step(
    model: nn.Module,
    optimizer: AdamW,
    scaler: torch.amp.GradScaler,
    batches: Sequence[Batch],
    num_targets: float | Tensor,
    learning_rate: float | Tensor,
    *,
    precision: Precision,
    max_grad_norm: float,
    guard: NonFiniteGuard,
    loss_sum: Tensor,
    ranks: Ranks = ALONE,
) -> Tensor:
    """One optimizer step: forward and backward of all its batches, clipping, AdamW. It frees the gradients.

    It reads no value from the device and decides nothing by one, so that a GPU never waits for it, and `--cuda-graphs`
    can record it. Whatever differs between steps comes in by the three arguments after `scaler`; a recorded step has
    them as tensors.

    Args:
        model: changed in place, as are `optimizer`, `scaler`, `guard` and `loss_sum`.
        optimizer: of the parameters of `model`.
        scaler: of the loss, for fp16.
        batches: whose gradients add up, on the device.
        num_targets: supervised tokens of all batches.
        learning_rate: of this step.
        precision: of matrix products.
        max_grad_norm: as for `clip_in_optimizer`.
        guard: sees that a loss or gradient that is not finite changes no weight.
        loss_sum: scalar; the mean loss is added to it.
        ranks: the processes of the run, which average their gradients.

    Returns:
        The global norm of the gradients before clipping, a scalar on the device.
    """
    # Forward and backward. Gradients of several batches add up, those of several processes are averaged; each loss is
    # divided by the supervised tokens of the whole window, so that the mean over them comes out.
    window_loss = torch.zeros_like(loss_sum)
    for number, batch in enumerate(batches, start=1):
        with ranks.exchange(model, last=number == len(batches)):
            with precision.autocast():
                logits = model(batch.input_ids, batch.packing, batch.selection)  # (S, V)
            loss = F.cross_entropy(logits.float(), batch.target_ids, reduction="sum") / num_targets
            scaler.scale(loss).backward()
        window_loss += loss.detach()
    window_loss = ranks.mean(window_loss)

    # Clip and update.
    optimizer.learning_rate = learning_rate
    grad_norm = clip_in_optimizer(optimizer, max_grad_norm, loss_scale=scaler.scale(torch.ones_like(loss_sum)))
    loss_sum += guard.watch(optimizer, window_loss, grad_norm, scales_loss=scaler.is_enabled())
    scaler.step(optimizer)  # type: ignore[arg-type]  # with fp16 it skips the update if a gradient overflowed
    scaler.update()
    optimizer.zero_grad()
    return grad_norm
