"""From gradients to new weights: parameter groups, the learning rate of each step, clipping, AdamW."""

from typing import Any

import torch
from torch import Tensor, nn

from ft.distributed.sharding import full_tensor, local_shard


class AdamW:
    """AdamW (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2).

    For a weight w with gradient g, learning rate lr, weight decay d, and steps t counted from 1:

        w <- w - lr d w
        m <- beta1 m + (1 - beta1) g                    the first moment, `exp_avg`
        v <- beta2 v + (1 - beta2) g^2                  the second, `exp_avg_sq`
        w <- w - lr m' / (sqrt(v') + eps)               where m' = m / (1 - beta1^t) and v' = v / (1 - beta2^t)

    One kernel does it all, the one behind `torch.optim.AdamW(fused=True)`: it reads and writes each weight, gradient
    and moment once per step, where operations one by one would make a pass over all of them for each. It is called
    directly because constructing PyTorch's class imports PyTorch's compiler, which takes more than a second.

    Attributes:
        learning_rate: lr of the next step.
        param_groups: the weights as lists under `params`, each with its `weight_decay`.
        state: for each weight its two moments and its number of steps, as tensors.
        grad_scale: what the next step divides all gradients by, a scalar tensor; absent for 1.
        found_inf: a scalar tensor that is 1 to skip the next step; absent for 0. `torch.amp.GradScaler` sets this one
            and `grad_scale`, and deletes both afterwards.
        skip: the same as `found_inf`, set by others.
    """

    grad_scale: Tensor
    found_inf: Tensor
    skip: Tensor | None = None
    _step_supports_amp_scaling = True  # tells GradScaler to hand over its scale rather than make a pass of its own

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.param_groups, self.learning_rate, self.betas, self.eps = param_groups, learning_rate, betas, eps
        self.state = {
            weight: {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(weight, requires_grad=False),
            }
            for group in param_groups
            for weight in group["params"]
        }

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights that have a gradient."""
        skips = [flag for flag in (getattr(self, "found_inf", None), self.skip) if flag is not None]
        found_inf = torch.stack(skips).amax() if skips else None
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:  # all of a group may be frozen, and the kernels take no empty list
                continue
            steps = [self.state[weight]["step"] for weight in weights]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                [local_shard(weight) for weight in weights],
                [local_shard(weight.grad) for weight in weights],
                [local_shard(self.state[weight]["exp_avg"]) for weight in weights],
                [local_shard(self.state[weight]["exp_avg_sq"]) for weight in weights],
                [],
                steps,
                lr=self.learning_rate,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=found_inf,
            )
            if found_inf is not None:
                torch._foreach_sub_(steps, [found_inf] * len(steps))  # a skipped step is none

    def zero_grad(self) -> None:
        """Free all gradients; the next backward pass makes new ones."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW with the recipe's constants and the parameter groups that GPT-2 was trained with, frozen weights left out.

    Weight decay acts on the matrices of linear layers only: biases and norms have no scale to shrink towards, and an
    embedding's row should not fade because its token is rare.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and not name.startswith(("wte", "wpe"))
        if parameter.requires_grad:
            (decayed if is_matrix else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return AdamW(groups, learning_rate)


def clip_in_optimizer(optimizer: AdamW, max_norm: float, loss_scale: float | Tensor = 1.0) -> Tensor:
    """Have the next `optimizer.step()` scale all gradients so that their global norm is at most `max_norm`.

    Clipping (Pascanu et al., "On the difficulty of training recurrent neural networks", 2013) multiplies gradients by
    max_norm / norm where norm exceeds max_norm. AdamW divides gradients by its `grad_scale` as it reads them, so
    that clipping costs no pass of its own over them, only the one that measures the norm.

    Args:
        optimizer: the optimiser of parameters that have gradients.
        max_norm: the largest norm that is left alone; 0 clips nothing.
        loss_scale: the factor by which mixed precision made the loss, and so the gradients, larger.

    Returns:
        The global norm before clipping, a scalar on the gradients' device, with the loss scale taken out.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients)) / loss_scale
    if max_norm > 0:
        # 1e-6 as in torch.nn.utils.clip_grad_norm_, so that the clipped gradients are the same; float, as the kernel
        # reads its scale in that type whatever the parameters' is.
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0).float()
    return norm
