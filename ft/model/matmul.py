"""Matrix products, four fifths of a training step, by the faster of PyTorch's two CPU libraries.

For fp32 on x86, PyTorch calls Intel's MKL. PyTorch includes oneDNN too, and `torch.compile` uses it for linear layers.
oneDNN is faster in two cases:

- fp32 on AMD processors with 512-bit instructions: most of the products.
- bf16 on processors with AMX, whose tiles multiply bf16 and add in fp32. oneDNN rounds the fp32 inputs of a product to
  bf16 as it reads them, and writes the result in fp32 (its "floating-point math mode"). Neither weights nor gradients
  are cast, and activations keep fp32, where autocast would round the result of each product to bf16 as well.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft.device import has_amx


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear map x W + b: (N, in) and (in, out) -> (N, out)."""
    # For a slice of columns, where neither W nor W^T is contiguous, oneDNN falls back to its reference implementation,
    # which is 500 times as slow.
    sliced = not (weight.is_contiguous() or weight.T.is_contiguous())
    if rounds_inputs_of(x) and weight.dtype == torch.float32:
        return OneDNNAffine.apply(x.float(), weight.contiguous() if sliced else weight, bias, True)
    plain = x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    if plain or sliced or torch.compiler.is_compiling() or not onednn_is_faster():
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    return OneDNNAffine.apply(x, weight, bias, False)


def attention(queries: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:  # noqa: ANN401
    """`F.scaled_dot_product_attention`, in fp32 where autocast would only add casts.

    With dropout PyTorch computes it step by step on CPUs, for bf16 inputs in fp32 too.
    """
    if rounds_inputs_of(queries):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(queries, keys, values, **options)
    return F.scaled_dot_product_attention(queries, keys, values, **options)


def matrix_products() -> set[Any]:
    """The PyTorch operators that compute the matrix products of this model."""
    plain = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
    return plain | {torch.ops.mkldnn._linear_pointwise.default} if has_onednn() else plain


def rounds_inputs(device_type: str, dtype: torch.dtype) -> bool:
    """Whether products under autocast to `dtype` read fp32 weights and round them themselves: bf16 on CPUs with AMX."""
    return device_type == "cpu" and dtype == torch.bfloat16 and has_onednn() and has_amx()


def rounds_inputs_of(x: Tensor) -> bool:
    """Whether a product with `x` does so here and now."""
    active = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return active and rounds_inputs("cpu", torch.get_autocast_dtype("cpu"))


def has_onednn() -> bool:
    """Whether PyTorch includes oneDNN and its linear operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with 512-bit instructions and PyTorch includes oneDNN."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or not has_onednn():
        return False
    text = cpuinfo.read_text()
    return "AuthenticAMD" in text and "avx512f" in text


@contextmanager
def rounded_inputs() -> Iterator[None]:
    """A context in which oneDNN rounds the inputs of fp32 products to bf16, which PyTorch calls "medium" precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class OneDNNAffine(torch.autograd.Function):
    """The linear map y = x W + b in fp32, with the forward pass and the gradient of x computed by oneDNN.

    With the gradient g of y, the gradient of x is g W^T, that of W is x^T g, and that of b is the sum of the rows of g.
    MKL computes x^T g as fast as oneDNN, but rounds no inputs: where they may be rounded PyTorch calls oneDNN for this
    one too. oneDNN keeps fp32 for some products of few rows.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rounded: bool) -> Tensor:  # noqa: ANN401
        """(N, in), (in, out), (out) -> (N, out); `rounded`: the inputs of the three products are rounded to bf16."""
        needs_weight = context.needs_input_grad[1]  # otherwise x can be freed
        context.save_for_backward(x if needs_weight else None, weight)
        context.rounded = rounded
        with rounded_inputs() if rounded else nullcontext():
            return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # noqa: ANN401
        """(N, out) -> the gradients of x, weight and bias."""
        x, weight = context.saved_tensors
        needs_x, needs_weight, needs_bias, _ = context.needs_input_grad
        with rounded_inputs() if context.rounded else nullcontext():
            return (
                _product(gradient, weight.T, None) if needs_x else None,
                _weight_gradient(x, weight, gradient) if needs_weight else None,
                gradient.sum(dim=0) if needs_bias else None,
                None,
            )


def _weight_gradient(x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """The product x^T g in the memory layout of `weight`: autograd would copy any other, 154 MB for the head."""
    is_transposed_view = weight.stride(0) == 1
    return (gradient.T @ x).T if is_transposed_view else x.T @ gradient


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W + b by oneDNN, whose linear operator takes W^T; a transposed view is fine."""
    return torch.ops.mkldnn._linear_pointwise(x, weight.T, bias, "none", [], "")
