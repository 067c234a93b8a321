"""From gradients to new weights: parameter groups, the learning rate of each step, clipping, AdamW."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ft.distributed.sharding import full_tensor, is_sharded, local_shard
from ft.model.half_weights import HalfWeights

NORM_PIECE = 2**20  # gradients per dot product, whose error grows with their number


class AdamW:
    """AdamW (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2).

    For a weight w with gradient g, learning rate lr, weight decay d, and steps t counted from 1:

        w <- w - lr d w
        m <- beta1 m + (1 - beta1) g                    the first moment, `exp_avg`
        v <- beta2 v + (1 - beta2) g^2                  the second, `exp_avg_sq`
        w <- w - lr m' / (sqrt(v') + eps)               where m' = m / (1 - beta1^t) and v' = v / (1 - beta2^t)

    One kernel does it all, the one behind `torch.optim.AdamW(fused=True)`: it reads and writes each weight, gradient
    and moment once per step; single operations would make a pass over all of them for each line. `adamw_function`
    chooses single operations on devices where the kernel lacks a feature.

    Constructing PyTorch's class imports PyTorch's compiler, which this class does not need: that takes 2.5 s of CPU
    time (2026-11-26, torch 2.13, AMD EPYC, 2 cores; medians of 5 fresh processes each, alternating: 5.3 s and 2.8 s).

    Attributes:
        learning_rate: lr of the next step; in a CUDA graph a scalar tensor of float32, whose value may change.
        param_groups: the weights as lists under `params`, each with its `weight_decay`.
        state: for each weight its two moments and its number of steps, as tensors.
        grad_scale: a scalar tensor by which the next step divides all gradients, set by `clip_in_optimizer`; absent
            for 1.
        found_inf: a scalar tensor that is 1 to skip the next step, set by `torch.amp.GradScaler`, which deletes it and
            `grad_scale` after the step.
        skip: the same as `found_inf`, set by `NonFiniteGuard`.
        half_weights: copies of weights in half precision, which each step refreshes; None without half precision.
        waits_for: a CUDA event that the next step waits for before it changes anything: until then another stream
            copies weights and moments.
    """

    grad_scale: Tensor
    found_inf: Tensor
    skip: Tensor | None = None
    half_weights: HalfWeights | None = None
    waits_for: torch.cuda.Event | None = None
    _step_supports_amp_scaling = True  # GradScaler then sets found_inf, and does not read it on the host

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.param_groups, self.betas, self.eps = param_groups, betas, eps
        self.learning_rate: float | Tensor = learning_rate
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
        if self.waits_for is not None:
            self.waits_for.wait()
            self.waits_for = None
        skips = [flag for flag in (getattr(self, "found_inf", None), self.skip) if flag is not None]
        found_inf = torch.stack(skips).amax() if skips else None
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:  # all of a group may be frozen, and the kernels accept no empty list
                continue
            steps = [self.state[weight]["step"] for weight in weights]
            torch._foreach_add_(steps, 1)
            adamw = adamw_function(weights[0].device)
            adamw(
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
                torch._foreach_sub_(steps, [found_inf] * len(steps))  # a skipped step does not count
        if self.half_weights is not None:
            self.half_weights.refresh()

    def zero_grad(self) -> None:
        """Free all gradients; the next backward pass makes new ones."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None


def adamw_function(device: torch.device) -> Callable[..., None]:
    """The function that updates weights on a device: PyTorch's fused kernel, on Apple's MPS `plain_adamw`.

    On MPS the fused kernel accepts `grad_scale` and `found_inf` and ignores them
    (https://github.com/pytorch/pytorch/pull/186360): no gradient would be clipped, and no step be skipped.
    """
    return plain_adamw if device.type == "mps" else torch._fused_adamw_


def plain_adamw(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    _: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    **_unused: bool,
) -> None:
    """AdamW in single operations, with the arguments of `torch._fused_adamw_`.

    A skipped step is computed and not stored, so that nothing is read from the device.
    """
    skip = None if found_inf is None else found_inf != 0
    for weight, gradient, exp_avg, exp_avg_sq, step in zip(
        weights, gradients, exp_avgs, exp_avg_sqs, steps, strict=True
    ):
        unscaled = gradient if grad_scale is None else gradient / grad_scale
        first = exp_avg.lerp(unscaled, 1 - beta1)
        second = exp_avg_sq * beta2 + unscaled.square() * (1 - beta2)
        # 1 - beta^t, which for a beta near 1 would lose half of its digits in fp32.
        exact = step.to(weight.dtype)
        correction1, correction2 = (-torch.expm1(exact * math.log(beta)) for beta in (beta1, beta2))
        denominator = (second / correction2).sqrt() + eps
        updated = weight * (1 - lr * weight_decay) - lr * (first / correction1) / denominator
        for target, value in ((weight, updated), (exp_avg, first), (exp_avg_sq, second)):
            target.copy_(value if skip is None else torch.where(skip, target, value))


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW over the trained parameters of a model, in two groups: with and without weight decay.

    Weight decay acts on the matrices: the weights of linear layers and the embeddings. Biases and LayerNorm weights,
    which have one dimension, are left out. The Hugging Face Trainer and nanoGPT decay the same parameters.

    Args:
        model: frozen parameters are left out.
        learning_rate: of the first step; the training loop sets it before each step.
        weight_decay: of the matrices.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, learning_rate)
    optimizer.half_weights = getattr(model, "half_weights", None)
    return optimizer


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar; sharded if they are.

    On a CPU by dot products, at the speed of memory: the kernel behind `get_total_norm` takes more than twice as long,
    and its sum of 38 million squares, in one fp32 number per lane, is off by a thousandth. Dot products of
    pieces are off by a few millionths.
    """
    if any(gradient.device.type != "cpu" or is_sharded(gradient) for gradient in gradients) or not gradients:
        return torch.nn.utils.get_total_norm(gradients)
    pieces = [piece for gradient in gradients for piece in gradient.flatten().split(NORM_PIECE)]
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum().sqrt()


def clip_in_optimizer(optimizer: AdamW, max_norm: float) -> Tensor:
    """Have the next `optimizer.step()` scale all gradients so that their global norm is at most `max_norm`.

    Clipping (Pascanu et al., "On the difficulty of training recurrent neural networks", 2013) multiplies gradients by
    max_norm / norm if norm exceeds max_norm. AdamW divides gradients by its `grad_scale` as it reads them, so only the
    norm needs a pass over the gradients of its own.

    Args:
        optimizer: of parameters that have gradients, without a loss scale (`GradScaler.unscale_`).
        max_norm: the largest norm that is not scaled down; 0 disables clipping.

    Returns:
        The global norm before clipping, a scalar on the gradients' device.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = full_tensor(global_norm(gradients))
    if max_norm > 0:
        # 1e-6 as in torch.nn.utils.clip_grad_norm_, so that the clipped gradients are the same. float, as the kernel
        # reads the scale in that type whatever the type of the parameters is.
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0).float()
    return norm
