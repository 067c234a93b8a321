"""Move all tensors of a batch to the GPU in one copy.

Each copy to a GPU has a fixed cost on the host, whatever its size, and a batch consists of eight small tensors. They
are concatenated in one buffer, which is copied, and the copy is split into views:

    on the CPU      input_ids  target_ids  positions  slots  ...      separate tensors
    buffer          |input_ids..|target_ids..|positions..|slots..|    bytes in pinned memory
    on the GPU      |input_ids..|target_ids..|positions..|slots..|    one copy, and a view for each tensor

Only copies from pinned (page-locked) memory are asynchronous.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

ALIGNMENT = 16  # bytes: a view as another dtype must start at a multiple of its item size


def to_device(value: T, device: torch.device) -> T:
    """Move the tensors of a value to `device`; the copy to a GPU is asynchronous.

    Args:
        value: a tensor, or a dataclass whose fields are tensors, such dataclasses, or other values, which are kept.
        device: the device to copy to.

    Returns:
        The same value with its tensors on `device`.
    """
    return _with_tensors(value, iter(_copy_together(list(_tensors_of(value)), device)))


def _tensors_of(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors_of(getattr(value, field.name))


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:  # noqa: ANN401
    """The value with its tensors replaced, in the order of `_tensors_of`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _with_tensors(getattr(value, f.name), tensors) for f in fields(value)})
    return value


def _copy_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for view, tensor in zip(_split(buffer, sizes, tensors), tensors, strict=True):
        view.copy_(tensor)
    return _split(buffer.to(device, non_blocking=True), sizes, tensors)


def _split(buffer: Tensor, sizes: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Views of consecutive parts of a buffer, `sizes` bytes each, with the dtypes and shapes of the tensors `like`."""
    parts = zip(buffer.split(list(sizes)), like, strict=True)
    return [part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for part, tensor in parts]
