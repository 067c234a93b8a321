"""Persistent bf16 or fp16 copies of weights: cast once per optimizer step, not once per use.

Autocast casts each weight where it is used, and its gradient back: two kernels for each of GPT-2's 96 weights and
biases of linear layers, in each forward and backward pass. Here one `torch._foreach_copy_` after each update writes all
copies, and one per block in the backward pass casts the gradients of the block to fp32. Autocast still decides
everything else, such as the dtype of activations, so that the results are bitwise those of autocast.

The copies take 2 bytes per weight: 170 MB for the 124M model. The token table has no copy: the look-up reads it in
fp32, and for the head see `FP32_HEAD_ROWS` in `gpt2.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Layer(Protocol):
    """A linear layer that computes with `half_copies`, one for each of its parameters, in place of them if set."""

    half_copies: tuple[Tensor, ...] | None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weight and bias, and those of an adapter."""


class HalfWeights:
    """Copies of the weights and biases of linear layers in bf16 or fp16."""

    def __init__(self, layers: Mapping[nn.Module, Sequence[Layer]], dtype: torch.dtype) -> None:
        """Allocate the copies on the device of the weights, and fill them.

        Args:
            layers: the linear layers of each block.
            dtype: `torch.bfloat16` or `torch.float16`.
        """
        self._layers, self._dtype = layers, dtype
        self._weights = {
            block: [weight for layer in block_layers for weight in layer.parameters()]
            for block, block_layers in layers.items()
        }
        self._counts = {layer: len(list(layer.parameters())) for each in layers.values() for layer in each}
        self._copies = {
            block: [torch.empty_like(weight, dtype=dtype, requires_grad=False) for weight in weights]
            for block, weights in self._weights.items()
        }
        self._copy(only_trained=False)

    def refresh(self) -> None:
        """Update the copies after an update of the trained weights; frozen ones have not changed."""
        self._copy(only_trained=True)

    @torch.no_grad()
    def _copy(self, *, only_trained: bool) -> None:
        pairs = [
            (copy, weight)
            for block, copies in self._copies.items()
            for copy, weight in zip(copies, self._weights[block], strict=True)
            if weight.requires_grad or not only_trained
        ]
        if pairs:  # all may be frozen, and `_foreach_copy_` accepts no empty list
            copies, weights = zip(*pairs, strict=True)
            torch._foreach_copy_(copies, weights)

    def run(self, block: nn.Module, *inputs: Any) -> Tensor:  # noqa: ANN401
        """`block(*inputs)`, computed with the copies under autocast to their dtype."""
        device_type = self._copies[block][0].device.type
        if not torch.is_autocast_enabled(device_type) or torch.get_autocast_dtype(device_type) != self._dtype:
            return block(*inputs)
        copies = self._differentiable(block)
        try:
            remaining = iter(copies)
            for layer in self._layers[block]:
                layer.half_copies = tuple(islice(remaining, self._counts[layer]))
            return block(*inputs)
        finally:
            for layer in self._layers[block]:
                layer.half_copies = None

    def _differentiable(self, block: nn.Module) -> list[Tensor]:
        """The copies of a block; for autograd, those of trained weights depend on the weights."""
        weights, copies = self._weights[block], self._copies[block]
        trained = [number for number, weight in enumerate(weights) if weight.requires_grad]
        if not trained or not torch.is_grad_enabled():
            return copies
        connected = Cast.apply([copies[number] for number in trained], *(weights[number] for number in trained))
        copies = copies.copy()
        for number, copy in zip(trained, connected, strict=True):
            copies[number] = copy
        return copies


class Cast(torch.autograd.Function):
    """The cast from fp32 weights to their existing copies; the backward pass casts all gradients at once."""

    @staticmethod
    def forward(context: Any, copies: Sequence[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        """The copies, detached: autograd sets `grad_fn` on what is returned here, and must not on the copies."""
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients of the copies -> gradients of the weights in fp32, in which gradient accumulation adds them up."""
        fp32_gradients = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
        torch._foreach_copy_(fp32_gradients, gradients)
        return None, *fp32_gradients
