"""Matrix products, four fifths of a training step, by the faster of PyTorch's two CPU libraries.

For fp32 on x86, PyTorch calls Intel's MKL. PyTorch includes oneDNN too, and `torch.compile` uses it for linear layers.
oneDNN is faster in two cases:

- fp32 on AMD processors with 512-bit instructions: most of the products.
- bf16 on processors with AMX, whose tiles multiply bf16 and add in fp32. oneDNN rounds the fp32 inputs of a product to
  bf16 as it reads them, and writes the result in fp32 (its "floating-point math mode"). Neither weights nor gradients
  are cast, and activations keep fp32, where autocast would round the result of each product to bf16 as well.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft.device import cpu_has, has_amx
from ft.model.dropout import dropout_by_16_bits


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


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, is_causal: bool, dropout_p: float
) -> Tensor:
    """Attention of (B, H, Q, D) queries to (B, H, T, D) keys and values -> (B, H, Q, D).

    By `F.scaled_dot_product_attention`, in fp32 where autocast would only add casts. With dropout PyTorch has no fused
    kernel for CPUs, and `attention_with_dropout` is faster.

    Args:
        queries: Q of each of B x H heads.
        keys: T of each head.
        values: as many.
        mask: bool, broadcast to (B, H, Q, T): the keys that each query attends to, at least one. Default: all.
        is_causal: without a mask, query n attends to keys up to n.
        dropout_p: the probability with which each attention weight is dropped.
    """
    if dropout_p > 0 and queries.device.type == "cpu" and not torch.compiler.is_compiling():
        with torch.autocast("cpu", enabled=False):
            return attention_with_dropout(queries, keys, values, mask, is_causal=is_causal, dropout_p=dropout_p)
    with torch.autocast("cpu", enabled=False) if rounds_inputs_of(queries) else nullcontext():
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=is_causal, dropout_p=dropout_p
        )


def attention_with_dropout(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, is_causal: bool, dropout_p: float
) -> Tensor:
    """The same step by step, softmax(Q K^T / sqrt(D)) V, with cheaper dropout.

    Half precision is computed in fp32, as in PyTorch.
    """
    shape, dtype, scores_shape = queries.shape, queries.dtype, (*queries.shape[:3], keys.shape[2])
    # (B, H, Q, D) -> (B H, Q, D), as `bmm` takes it
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    queries, keys, values = (tensor.to(wide).flatten(0, 1) for tensor in (queries, keys, values))
    if is_causal:
        hidden = queries.new_full(scores_shape[2:], -math.inf).triu(diagonal=1)  # (Q, T)
    elif mask is None:
        hidden = queries.new_zeros(())
    else:
        hidden = queries.new_zeros(mask.shape).masked_fill(~mask, -math.inf).expand(scores_shape).flatten(0, 1)
    scores = torch.baddbmm(hidden, queries, keys.transpose(1, 2), alpha=1 / math.sqrt(shape[-1]))  # (B H, Q, T)
    weights = dropout_by_16_bits(scores.softmax(dim=-1), dropout_p)
    return torch.bmm(weights, values).view(shape).to(dtype)


def matrix_products() -> set[Any]:
    """The PyTorch operators that compute the matrix products of this model."""
    aten = torch.ops.aten
    plain = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
    return plain | {torch.ops.mkldnn._linear_pointwise.default} if has_onednn() else plain


def rounds_inputs(device_type: str, dtype: torch.dtype) -> bool:
    """Whether products under autocast to `dtype` read fp32 weights and round them themselves: bf16 on CPUs with AMX."""
    return device_type == "cpu" and dtype == torch.bfloat16 and has_onednn() and has_amx()


def rounds_inputs_of(x: Tensor) -> bool:
    """Whether a product with `x` does so here and now."""
    active = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return active and rounds_inputs("cpu", torch.get_autocast_dtype("cpu"))


def compiles_shapes(x: Tensor) -> bool:
    """Whether oneDNN computes products with `x`, and so generates code for each number of rows."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return has_onednn() and (torch.is_autocast_enabled("cpu") or onednn_is_faster())


def has_onednn() -> bool:
    """Whether PyTorch includes oneDNN and its linear operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with 512-bit instructions and PyTorch includes oneDNN."""
    return has_onednn() and cpu_has("AuthenticAMD", "avx512f")


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
    """The linear map y = x W + b in fp32, with its three products computed by oneDNN.

    With the gradient g of y, the gradient of x is g W^T, that of W is x^T g, and that of b is the sum of the rows of g.
    Where inputs may be rounded, PyTorch's own product calls oneDNN too, and keeps fp32 for some products of few rows.
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
                _product(gradient, weight.T) if needs_x else None,
                _weight_gradient(x, weight, gradient, context.rounded) if needs_weight else None,
                gradient.sum(dim=0) if needs_bias else None,
                None,
            )


def _weight_gradient(x: Tensor, weight: Tensor, gradient: Tensor, rounded: bool) -> Tensor:
    """The product x^T g in the memory layout of `weight`: autograd would copy any other, 154 MB for the head."""
    is_transposed_view = weight.stride(0) == 1
    # oneDNN copies its first factor, which is transposed. For many rows of logits the copy takes more than it saves.
    many_logits = is_transposed_view and len(x) > 64
    product = torch.mm if rounded or many_logits or len(x) == 0 else _product
    return product(gradient.T, x).T if is_transposed_view else product(x.T, gradient)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W + b by oneDNN, whose linear operator takes W^T; a transposed view is fine."""
    return torch.ops.mkldnn._linear_pointwise(x, weight.T, bias, "none", [], "")
