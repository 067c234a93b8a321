"""bf16 or fp16 copies of weights that live as long as the model: cast once per optimizer step, not once per use.

Autocast casts a weight where it is used, and its gradient back: two kernels for each of GPT-2's 96 weights and biases
of linear layers, in each forward and backward pass. Here one `torch._foreach_copy_` after each update writes all
copies, and one per block in the backward pass casts that block's gradients to fp32. Everything else, such as the dtype
of activations, is left to autocast, so that the numbers are exactly those of autocast.

The copies cost 2 bytes per weight: 170 MB for the 124M model. The token table has none: it is read by the look-up in
fp32, and by the head as `GPT2` explains.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Layer(Protocol):
    """A layer that multiplies by `half_copies`, a weight and a bias, in place of its own where they are not None."""

    weight: nn.Parameter
    bias: nn.Parameter
    half_copies: tuple[Tensor, Tensor] | None


class HalfWeights:
    """Copies of the weights and biases of some layers in `dtype`."""

    def __init__(self, layers: Mapping[nn.Module, Sequence[Layer]], dtype: torch.dtype) -> None:
        """Make the copies, on the device of the weights.

        Args:
            layers: of each block its layers; blocks run by `run`.
            dtype: `torch.bfloat16` or `torch.float16`.
        """
        self._layers, self._dtype = layers, dtype
        self._weights = {
            block: [weight for layer in of_block for weight in (layer.weight, layer.bias)]
            for block, of_block in layers.items()
        }
        self._copies = {
            block: [torch.empty_like(weight, dtype=dtype, requires_grad=False) for weight in weights]
            for block, weights in self._weights.items()
        }
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the copies anew, after the weights have changed."""
        copies, weights = (
            [tensor for tensors in each.values() for tensor in tensors] for each in (self._copies, self._weights)
        )
        torch._foreach_copy_(copies, weights)

    def run(self, block: nn.Module, *inputs: Any) -> Tensor:  # noqa: ANN401
        """`block(*inputs)`, under autocast to the dtype of the copies with these as weights."""
        device_type = self._copies[block][0].device.type
        if not torch.is_autocast_enabled(device_type) or torch.get_autocast_dtype(device_type) != self._dtype:
            return block(*inputs)
        copies = self._differentiable(block)
        try:
            for layer, weight, bias in zip(self._layers[block], copies[::2], copies[1::2], strict=True):
                layer.half_copies = weight, bias
            return block(*inputs)
        finally:
            for layer in self._layers[block]:
                layer.half_copies = None

    def _differentiable(self, block: nn.Module) -> list[Tensor]:
        """The copies of a block, those of trained weights connected with them for the backward pass."""
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
    """Casts fp32 weights by handing out copies that exist already; gradients are cast back together."""

    @staticmethod
    def forward(context: Any, copies: Sequence[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        """The copies, as new tensors with the same memory: autograd marks what is returned here as computed."""
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """The gradients of the copies -> those of the fp32 weights, which add up in fp32 over several batches."""
        exact = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
        torch._foreach_copy_(exact, gradients)
        return None, *exact
