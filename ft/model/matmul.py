"""Matrix products, where four fifths of a training step go, by the faster of PyTorch's two CPU libraries.

For fp32 on x86, PyTorch calls Intel's MKL. On AMD processors with 512-bit instructions oneDNN, which PyTorch contains
too and which `torch.compile` takes for linear layers, computes most of the same products faster.
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
    # A slice of columns, neither (in, out) nor its transpose, would take oneDNN's reference code: 500 times as slow.
    sliced = not (weight.is_contiguous() or weight.T.is_contiguous())
    if plain or sliced or torch.compiler.is_compiling() or not onednn_is_faster():
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    return OneDNNAffine.apply(x, weight, bias)


def laid_out_for_one_row(weight: Tensor) -> Tensor:
    """The same (in, out) numbers, laid out in memory as (out, in) where one row times them is then faster.

    Such a product takes as long as reading the weight once; oneDNN reads it faster in this order.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not onednn_is_faster():
        return weight
    return weight.T.contiguous().T


def matrix_products() -> set[Any]:
    """The operations of PyTorch that compute the products of this model."""
    plain = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
    return plain | {torch.ops.mkldnn._linear_pointwise.default} if onednn_is_faster() else plain


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with 512-bit instructions, and PyTorch has oneDNN."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or not torch.backends.mkldnn.is_available():
        return False
    text = cpuinfo.read_text()
    return "AuthenticAMD" in text and "avx512f" in text and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class OneDNNAffine(torch.autograd.Function):
    """The linear map x W + b, with the products of the forward pass and of the gradient of x computed by oneDNN.

    For y = x W + b and the gradient g of y: the gradient of x is g W^T, of W it is x^T g, of b the sum of g's rows.
    MKL computes x^T g as fast as oneDNN does, and keeps it.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        """(N, in), (in, out), (out) -> (N, out)."""
        needs_weight = context.needs_input_grad[1]  # a frozen weight has no use for x, which can then be freed
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
    """(in, out) in the memory layout of `weight`, so that autograd need not copy the 154 MB of the head's."""
    is_transposed_view = weight.stride(0) == 1
    return (gradient.T @ x).T if is_transposed_view else x.T @ gradient


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear map x W + b by oneDNN, whose linear layer takes W transposed, as a view or not."""
    return torch.ops.mkldnn._linear_pointwise(x, weight.T, bias, "none", [], "")
