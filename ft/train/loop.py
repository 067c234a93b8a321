"""The training loop."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ft.config import Config
from ft.data.batches import Batch
from ft.data.examples import Example
from ft.device import Precision
from ft.distributed.ranks import ALONE, Ranks
from ft.train.metrics import Report
from ft.train.nonfinite import NonFiniteGuard
from ft.train.optim import AdamW, clip_in_optimizer
from ft.train.schedule import SaveSchedule, learning_rate_at, steps_per_epoch, total_steps, windows
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

    When `stopping` says so, the step in hand is finished and saved. Several processes share every batch of every step.

    Raises:
        NonFiniteError: a loss or gradient is not finite, and no more steps may be skipped.
    """
    last_step, per_epoch = total_steps(len(examples), config), steps_per_epoch(len(examples), config)
    device, one = precision.device, torch.ones((), device=precision.device)
    loss_sum = state.loss_sum * one
    guard = NonFiniteGuard(device, state, limit=config.max_skipped_steps if config.on_nonfinite == "skip" else 0)
    saves = SaveSchedule(config, put_off)
    model.train()

    for window in windows(len(examples), config, state.step):
        batches = [collate(ranks.share([examples[row] for row in rows])) for rows in window]
        read = [examples[row] for rows in window for row in rows]
        num_targets = sum(len(example.target_ids) for example in read) / ranks.size

        # Forward and backward. Gradients of several batches add up, those of several processes are averaged; each loss
        # is divided by the supervised tokens of the whole window, so that the mean over them comes out.
        window_loss = 0.0 * one
        for number, batch in enumerate(batches, start=1):
            batch = batch.to(device)
            with ranks.exchange(model, last=number == len(batches)):
                with precision.autocast():
                    logits = model(batch.input_ids, batch.packing, batch.selection)  # (S, V)
                loss = F.cross_entropy(logits.float(), batch.target_ids, reduction="sum") / num_targets
                scaler.scale(loss).backward()
            window_loss += loss.detach()
        window_loss = ranks.mean(window_loss)

        # Clip and update.
        lr = learning_rate_at(state.step, last_step, config.learning_rate, config.warmup_steps, config.lr_schedule)
        optimizer.learning_rate = lr
        grad_norm = clip_in_optimizer(optimizer, config.max_grad_norm, loss_scale=scaler.scale(one))
        loss_sum += guard.watch(optimizer, window_loss, grad_norm, scales_loss=scaler.is_enabled())
        scaler.step(optimizer)  # type: ignore[arg-type]  # with fp16 it skips the update if a gradient overflowed
        scaler.update()
        optimizer.zero_grad()
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
        if saves.are_due(state, must=last or stops):
            guard.check()
            state.loss_sum = loss_sum.item()
            save(state)
        if stops:
            return
