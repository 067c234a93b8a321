"""Copies of GPU tensors in pinned host memory, made while training continues."""

from contextlib import nullcontext

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, a multiple of every element's size


class HostBuffer:
    """A pinned buffer for the tensors of a snapshot, allocated once and reused for the next one.

    Copies to pinned memory run at the full speed of the bus and overlap with kernels: they are queued on their own
    stream. Only the thread that writes the checkpoint and the next optimizer step wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def begin(self, size: int) -> None:
        """Start a snapshot of at most `size` bytes (see `bytes_for`). Tensors of the previous one become invalid."""
        if len(self._buffer) < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # free the old buffer before allocating the new one
            self._buffer = _allocate_pinned(size)
        self._used = 0
        self._stream.wait_stream(torch.cuda.current_stream())  # after the last optimizer step

    def copy(self, tensor: Tensor, *, is_temporary: bool) -> Tensor:
        """Queue the copy of a tensor; returns its tensor in the buffer.

        Args:
            tensor: on the GPU.
            is_temporary: the tensor is freed after this call. Its copy is queued on the current stream, on which the
                allocator reuses its memory.
        """
        size = tensor.numel() * tensor.element_size()
        target = self._buffer[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += bytes_for(tensor)
        with nullcontext() if is_temporary else torch.cuda.stream(self._stream):
            target.copy_(tensor, non_blocking=True)
        return target

    def end(self) -> torch.cuda.Event:
        """End a snapshot; returns the event after which all copies are complete."""
        self._stream.wait_stream(torch.cuda.current_stream())  # copies of temporary tensors are there
        return self._stream.record_event()


def bytes_for(tensor: Tensor) -> int:
    """The bytes that a tensor takes in the buffer; for a sharded one those of the full tensor."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _allocate_pinned(size: int) -> Tensor:
    """Pinned memory, which PyTorch rounds up to a power of two; pageable memory if that fails.

    Copies to pageable memory are as correct, and slower.
    """
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(size, dtype=torch.uint8)
