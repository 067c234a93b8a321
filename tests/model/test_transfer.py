"""Tensors that are sent together arrive as they were, in one copy. On a GPU: test_emulated_cuda.py."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ft.data.batches import collate, collate_padded
from ft.data.examples import Example
from ft.model.transfer import to_device


@dataclass(frozen=True)
class Inner:
    mask: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    numbers: Tensor
    inner: Inner
    scalar: Tensor
    empty: Tensor


VALUE = Outer(
    numbers=torch.arange(5, dtype=torch.int16),
    inner=Inner(mask=torch.tensor([[True, False, True]]), shape=(1, 3)),
    scalar=torch.tensor(2.5, dtype=torch.float64),
    empty=torch.zeros(0, 4),
)
EXAMPLES = [Example([1, 2, 3], [4]), Example([5], [6]), Example([7, 8, 9, 10], [11])]
BATCHES = [collate(EXAMPLES), collate(EXAMPLES[1:2]), collate_padded(EXAMPLES, batch_size=4, max_length=8)]


@pytest.fixture
def copies(monkeypatch):
    """Pretends that a GPU's memory is the CPU's; gives what is copied there, as bytes."""
    copies, empty = [], torch.empty

    def to(tensor, device, non_blocking):
        assert non_blocking
        assert device == torch.device("cuda", 0)
        copies.append(tensor)
        return tensor.clone()

    def pinned(size, *, dtype, pin_memory):
        assert pin_memory
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch, "empty", pinned)
    return copies


def assert_same(sent, value):
    for name, expected in vars(value).items():
        found = getattr(sent, name)
        if isinstance(expected, Tensor):
            assert found is not expected
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(found, expected)
        elif hasattr(expected, "__dict__"):
            assert type(found) is type(expected)
            assert_same(found, expected)
        else:
            assert found == expected


@pytest.mark.parametrize("value", [VALUE, *BATCHES])
def test_what_arrives_is_what_was_sent_in_one_copy(copies, value):
    sent = to_device(value, torch.device("cuda", 0))
    assert_same(sent, value)
    assert len(copies) == 1
    assert copies[0].dtype == torch.uint8


def test_a_tensor_by_itself(copies):
    tensor = torch.tensor([[1.5, 2.5]])
    sent = to_device(tensor, torch.device("cuda", 0))
    assert torch.equal(sent, tensor)
    assert len(copies) == 1


def test_on_the_cpu_nothing_is_copied():
    (batch, *_) = BATCHES
    assert to_device(batch, torch.device("cpu")).selection.mask is batch.selection.mask


def test_a_device_that_is_no_gpu():
    sent = to_device(VALUE, torch.device("meta"))
    assert {sent.numbers.device.type, sent.inner.mask.device.type, sent.scalar.device.type} == {"meta"}
    assert sent.inner.shape == (1, 3)
