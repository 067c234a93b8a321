"""Dropout against its definition: how often, how much, what flows back, and what decides it."""

import math

import pytest
import torch

from ft.model.dropout import LEVELS, Dropout, dropout_by_16_bits


def dropped(p, size=400_000):
    torch.manual_seed(0)
    return dropout_by_16_bits(torch.ones(size), p) == 0


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_elements_are_dropped_as_often_as_p_says(p):
    size = 400_000
    assert abs(dropped(p).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / size)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("distance", [1, 2, 3, 4, 768])
def test_neighbors_are_dropped_independently(p, distance):
    # Above all those that share one random number of 64 bits.
    drops = dropped(p).double()
    both = (drops[:-distance] * drops[distance:]).mean()
    assert abs(both - p**2) < 5 * math.sqrt(p**2 * (1 - p**2) / len(drops))


@pytest.mark.parametrize("p", [0.1, 1 / 3, 0.9, 1 - 1e-9, 1e-9])
def test_what_is_kept_is_scaled_by_the_rounded_probability(p):
    x = torch.randn(7, 5, 33, dtype=torch.float64)
    result = dropout_by_16_bits(x, p)
    rounded = min(round(p * LEVELS), LEVELS - 1) / LEVELS
    assert abs(rounded - p) < 2 / LEVELS
    kept = result != 0
    torch.testing.assert_close(result[kept], x[kept] / (1 - rounded), rtol=1e-12, atol=0)


def test_the_gradient_flows_through_what_was_kept():
    x = torch.randn(9, 31, requires_grad=True)
    result = Dropout(0.4)(x)
    result.sum().backward()
    assert torch.equal(x.grad == 0, result == 0)
    torch.testing.assert_close(x.grad * x.detach(), result.detach())


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (5,), (0,), (2, 0, 3), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shape_and_type_stay(shape, dtype):
    result = Dropout(0.3)(torch.ones(shape, dtype=dtype))
    assert (result.shape, result.dtype) == (shape, dtype)


def test_the_seed_decides():
    def draw(seed):
        torch.manual_seed(seed)
        return Dropout(0.5)(torch.ones(100))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1), Dropout(0.5)(torch.ones(100)))


@pytest.mark.parametrize("module", [Dropout(0.0), Dropout(0.9).eval()])
def test_nothing_is_dropped_and_nothing_drawn_in_evaluation_or_at_0(module):
    x, state = torch.randn(50), torch.get_rng_state()
    assert module(x) is x
    assert torch.equal(torch.get_rng_state(), state)
