"""Everything that a batch needs on the GPU, sent by one copy.

A small copy to a GPU costs the host time that does not depend on its size, and a batch consists of eight small tensors.
So they are laid one behind the other in one buffer, which is copied, and what arrives is cut into views:

    on the CPU      input_ids  target_ids  positions  slots  ...      a tensor each
    buffer          |input_ids..|target_ids..|positions..|slots..|    bytes in page-locked memory
    on the GPU      |input_ids..|target_ids..|positions..|slots..|    one copy, and a view for each tensor

Only page-locked memory can be copied while both sides go on working.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

ALIGNMENT = 16  # bytes: a view as another type must begin at a multiple of that type's size


def send(value: T, device: torch.device) -> T:
    """The same value with its tensors on `device`; the copy to a GPU neither waits for queued work nor holds it up.

    Args:
        value: a tensor, or a dataclass whose fields are tensors, such dataclasses, or anything else, which is kept.
        device: where the tensors are to lie.
    """
    return _with_tensors(value, iter(_send_together(list(_tensors_of(value)), device)))


def _tensors_of(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors_of(getattr(value, field.name))


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:  # noqa: ANN401
    """The value with other tensors, in the order of `_tensors_of`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _with_tensors(getattr(value, f.name), tensors) for f in fields(value)})
    return value


def _send_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for part, tensor in zip(_cut(buffer, sizes, tensors), tensors, strict=True):
        part.copy_(tensor)
    return _cut(buffer.to(device, non_blocking=True), sizes, tensors)


def _cut(buffer: Tensor, sizes: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a buffer, of so many bytes each, with the types and shapes of other tensors."""
    parts = zip(buffer.split(list(sizes)), like, strict=True)
    return [part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for part, tensor in parts]
