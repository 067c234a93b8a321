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
    for function in (matmul.OneDNNAffine.apply, lambda x, w, b: x @ w if b is None else torch.addmm(b, x, w)):
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
    matmul.OneDNNAffine.apply(x.detach(), weight, b.detach()).sum().backward()
    assert weight.grad is not None
    x.requires_grad_()
    y = matmul.OneDNNAffine.apply(x, weight.detach(), None)
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

    def taken(x, weight):
        return type(matmul.affine(x, weight).grad_fn).__name__ == "OneDNNAffineBackward"

    x, weight, _ = operands("as is", False)
    assert taken(x, weight) is faster
    assert taken(x, weight.T.contiguous().T) is faster
    assert not taken(x, weight[:, 8:16])
    assert not taken(x.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken(x, weight)
