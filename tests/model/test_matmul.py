"""Products by oneDNN against PyTorch's own, values and gradients."""

import pytest
import torch

from ft.model import matmul

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
@pytest.mark.parametrize("n", [1, 8, 37])
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
    monkeypatch.setattr("ft.model.matmul.Path.exists", lambda self: True)
    monkeypatch.setattr("ft.model.matmul.Path.read_text", lambda self: cpuinfo)
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
