"""Matrix products, four fifths of a training step, by the faster of PyTorch's two CPU libraries.

For fp32 on x86, PyTorch calls Intel's MKL. On AMD processors with 512-bit instructions, oneDNN computes most of the
same products faster. PyTorch includes it too: `torch.compile` uses it for linear layers.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear map x W + b: (N, in) and (in, out) -> (N, out)."""
    plain = x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    # For a slice of columns, where neither W nor W^T is contiguous, oneDNN falls back to its reference implementation,
    # which is 500 times as slow.
    sliced = not (weight.is_contiguous() or weight.T.is_contiguous())
    if plain or sliced or torch.compiler.is_compiling() or not onednn_is_faster():
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    return OneDNNAffine.apply(x, weight, bias)


def matrix_products() -> set[Any]:
    """The PyTorch operators that compute the matrix products of this model."""
    plain = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
    return plain | {torch.ops.mkldnn._linear_pointwise.default} if onednn_is_faster() else plain


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with 512-bit instructions and PyTorch includes oneDNN."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or not torch.backends.mkldnn.is_available():
        return False
    text = cpuinfo.read_text()
    return "AuthenticAMD" in text and "avx512f" in text and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class OneDNNAffine(torch.autograd.Function):
    """The linear map y = x W + b, with the forward pass and the gradient of x computed by oneDNN.

    With the gradient g of y, the gradient of x is g W^T, that of W is x^T g, and that of b is the sum of the rows of g.
    MKL computes x^T g as fast as oneDNN.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        """(N, in), (in, out), (out) -> (N, out)."""
        needs_weight = context.needs_input_grad[1]  # otherwise x can be freed
        context.save_for_backward(x if needs_weight else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401
        """(N, out) -> the gradients of x, weight and bias."""
        x, weight = context.saved_tensors
        needs_x, needs_weight, needs_bias = context.needs_input_grad
        return (
            _product(gradient, weight.T, None) if needs_x else None,
            _weight_gradient(x, weight, gradient) if needs_weight else None,
            gradient.sum(dim=0) if needs_bias else None,
        )


def _weight_gradient(x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """The product x^T g in the memory layout of `weight`: autograd would copy any other, 154 MB for the head."""
    is_transposed_view = weight.stride(0) == 1
    return (gradient.T @ x).T if is_transposed_view else x.T @ gradient


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W + b by oneDNN, whose linear operator takes W^T; a transposed view is fine."""
    return torch.ops.mkldnn._linear_pointwise(x, weight.T, bias, "none", [], "")
