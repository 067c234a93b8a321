"""From gradients to new weights: parameter groups, the learning rate of each step, clipping, AdamW."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019) with the recipe's constants.

    Weight decay acts on the matrices of linear layers only, as GPT-2 was trained: biases and norms have no scale to
    shrink towards, and an embedding's row should not fade because its token is rare.

    `fused=True` reads and writes each weight, gradient and moment once per step; the unfused forms make a pass over
    all of them for every operation of the formula.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and not name.startswith(("wte", "wpe"))
        (decayed if is_matrix else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def learning_rate_at(
    step: int,
    total_steps: int,
    *,
    peak: float,
    warmup_steps: int = 0,
    schedule: Literal["linear", "cosine", "constant"] = "linear",
) -> float:
    """The learning rate of optimiser step `step` (from 0): a rise over the warm-up, then the schedule.

    A pure function of the step, so that a resumed run needs no scheduler's state. The linear schedule ends at 0 one
    step after the last: the last step still learns.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return peak


def clip_in_optimizer(optimizer: AdamW, max_norm: float, loss_scale: float | Tensor = 1.0) -> Tensor:
    """Have the next `optimizer.step()` scale all gradients so that their global norm is at most `max_norm`.

    Clipping (Pascanu et al., "On the difficulty of training recurrent neural networks", 2013) multiplies gradients by
    max_norm / norm where norm exceeds max_norm. Fused AdamW divides gradients by its `grad_scale` as it reads them, so
    that clipping costs no pass of its own over them, only the one that measures the norm.

    Args:
        optimizer: a fused AdamW whose parameters have gradients.
        max_norm: the largest norm that is left alone; 0 clips nothing.
        loss_scale: the factor by which mixed precision made the loss, and so the gradients, larger.

    Returns:
        The global norm before clipping, a scalar on the gradients' device, with the loss scale taken out.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) / loss_scale
    if max_norm > 0:
        # 1e-6 as in torch.nn.utils.clip_grad_norm_, so that the clipped gradients are the same; float, as the kernel
        # reads its scale in that type whatever the parameters' is.
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0).float()  # type: ignore[attr-defined]
    return norm
