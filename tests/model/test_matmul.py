"""Products by oneDNN and attention with dropout against PyTorch's own, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from ft.model import matmul
from ft.model.dropout import dropout_by_16_bits

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this PyTorch has no oneDNN",
)


def operands(layout, bias, n=37, n_in=48, n_out=80):
    generator = torch.Generator().manual_seed(n)
    x = torch.empty(n, n_in).normal_(generator=generator).requires_grad_()
    if layout == "as is":
        base = torch.empty(n_in, n_out)
        weight = base
    else:
        base = torch.empty(n_out, n_in)
        weight = base.T
    base.normal_(generator=generator)
    weight = weight.detach().requires_grad_()
    b = torch.empty(n_out).normal_(generator=generator).requires_grad_() if bias else None
    return x, weight, b


@needs_onednn
@pytest.mark.parametrize("layout", ["as is", "transposed"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [0, 1, 8, 37, 100])
def test_values_and_gradients_equal_plain_products(layout, bias, n):
    results = []
    onednn = lambda x, w, b: matmul.OneDNNAffine.apply(x, w, b, False)  # noqa: E731
    for function in (onednn, lambda x, w, b: x @ w if b is None else torch.addmm(b, x, w)):
        x, weight, b = operands(layout, bias, n)
        y = function(x, weight, b)
        y.square().sum().backward()
        results.append([y, x.grad, weight.grad] + ([b.grad] if bias else []))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)
    assert results[0][2].stride(0) == (1 if layout == "transposed" else 80), "the layout of the weight itself"


@needs_onednn
def test_only_wanted_gradients_are_computed():
    x, weight, b = operands("as is", True)
    matmul.OneDNNAffine.apply(x.detach(), weight, b.detach(), False).sum().backward()
    assert weight.grad is not None
    x.requires_grad_()
    y = matmul.OneDNNAffine.apply(x, weight.detach(), None, False)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("vendor_id: AuthenticAMD\nflags: avx2 avx512f", True),
        ("vendor_id: AuthenticAMD\nflags: avx2", False),
        ("vendor_id: GenuineIntel\nflags: avx2 avx512f", False),
    ],
)
@needs_onednn
def test_it_is_chosen_on_amd_with_512_bit_instructions(monkeypatch, cpuinfo, expected):
    monkeypatch.setattr("ft.device.Path.exists", lambda self: True)
    monkeypatch.setattr("ft.device.Path.read_text", lambda self: cpuinfo)
    assert matmul.onednn_is_faster.__wrapped__() is expected


@needs_onednn
@pytest.mark.parametrize("faster", [True, False])
def test_only_fp32_on_the_cpu_outside_autocast_takes_it(monkeypatch, faster):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: faster)
    monkeypatch.setattr(matmul, "has_amx", lambda: False)

    def taken(x, weight):
        return type(matmul.affine(x, weight).grad_fn).__name__ == "OneDNNAffineBackward"

    x, weight, _ = operands("as is", False)
    assert taken(x, weight) is faster
    assert taken(x, weight.T.contiguous().T) is faster
    assert not taken(x, weight[:, 8:16])
    assert not taken(x.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken(x, weight)


needs_amx = pytest.mark.skipif(not matmul.rounds_inputs("cpu", torch.bfloat16), reason="this processor has no AMX")


@needs_amx
@pytest.mark.parametrize("layout", ["as is", "transposed"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [37, 200])
def test_with_amx_the_inputs_of_products_are_rounded_and_the_results_are_not(layout, bias, n):
    x, weight, b = operands(layout, bias, n)
    with torch.autocast("cpu", torch.bfloat16):
        y = matmul.affine(x, weight, b)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(gradient)
    assert torch.get_float32_matmul_precision() == "highest", "no other product is rounded"

    exact = [x.detach(), weight.detach(), gradient]
    rounded = [tensor.bfloat16().float() for tensor in exact]
    for is_near, (inputs, weights, gradients) in ((True, rounded), (False, exact)):
        expected = inputs @ weights if b is None else torch.addmm(b.detach(), inputs, weights)
        for ours, theirs in (
            (y.detach(), expected),
            (x.grad, gradients @ weights.T),
            (weight.grad, inputs.T @ gradients),
        ):
            assert ours.dtype == torch.float32
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) is is_near
    if bias:
        torch.testing.assert_close(b.grad, gradient.sum(0))
    assert weight.grad.stride() == weight.stride()


@needs_onednn
@pytest.mark.parametrize("amx", [True, False])
def test_autocast_to_bf16_on_a_cpu_with_amx_takes_it(monkeypatch, amx):
    monkeypatch.setattr(matmul, "has_amx", lambda: amx)
    x, weight, _ = operands("as is", False)

    def taken(dtype, weight):
        with torch.autocast("cpu", dtype):
            return type(matmul.affine(x, weight).grad_fn).__name__ == "OneDNNAffineBackward"

    assert taken(torch.bfloat16, weight) is amx
    assert not taken(torch.float16, weight)
    assert not taken(torch.bfloat16, weight.bfloat16())
    assert taken(torch.bfloat16, weight[:, 8:16]) is amx


def attention_inputs(queries, keys, dtype=torch.float32):
    """(B, H, Q, D) and twice (B, H, T, D), as views of (B, T, H, D), like those of the model."""
    generator = torch.Generator().manual_seed(keys)
    made = (torch.empty(3, rows, 4, 16).normal_(generator=generator) for rows in (queries, keys, keys))
    return [x.to(dtype).transpose(1, 2).detach().requires_grad_() for x in made]


MASK = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
CASES = {
    "causal": (7, {"mask": None, "is_causal": True}),
    "selected rows": (1, {"mask": MASK[:, None, None], "is_causal": False}),
    "all rows": (2, {"mask": None, "is_causal": False}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_attention_with_dropout_of_nothing_equals_pytorchs(case, dtype):
    queries, how = CASES[case]
    results = []
    for ours in (True, False):
        inputs = attention_inputs(queries, 7, dtype)
        if ours:  # the probability is rounded to 0
            attended = matmul.attention(*inputs, **how, dropout_p=1e-6)
        else:
            attended = F.scaled_dot_product_attention(*inputs, attn_mask=how["mask"], is_causal=how["is_causal"])
        attended.float().square().sum().backward()
        results.append([attended, *(x.grad for x in inputs)])
    for own, expected in zip(*results, strict=True):
        assert (own.shape, own.dtype) == (expected.shape, expected.dtype)
        assert (own - expected).float().norm() <= (1e-6 if dtype == torch.float32 else 0.01) * expected.float().norm()


@pytest.mark.parametrize("case", CASES)
def test_attention_weights_are_dropped_after_the_softmax(case):
    queries, how = CASES[case]
    inputs = attention_inputs(queries, 7)
    torch.manual_seed(5)
    attended = matmul.attention(*inputs, **how, dropout_p=0.5)
    attended.square().sum().backward()

    torch.manual_seed(5)
    noise = dropout_by_16_bits(torch.ones(12, queries, 7), 0.5).view(3, 4, queries, 7)  # 0 or 2
    assert 0.3 < (noise == 0).double().mean() < 0.7
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    scores = q @ k.transpose(2, 3) / 16**0.5
    if how["is_causal"]:
        scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), float("-inf"))
    elif how["mask"] is not None:
        scores = scores.masked_fill(~how["mask"], float("-inf"))
    expected = (scores.softmax(-1) * noise.double()) @ v
    expected.square().sum().backward()
    torch.testing.assert_close(attended.double(), expected, rtol=1e-5, atol=1e-6)
    for own, exact in zip(inputs, (q, k, v), strict=True):
        torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
