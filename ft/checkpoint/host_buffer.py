"""Copies of a GPU's tensors in the host's memory, made while the training goes on."""

from contextlib import nullcontext

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, a multiple of every element's size


class HostBuffer:
    """One page-locked buffer for the tensors of a snapshot, allocated once and used again for the next one.

    Copies into page-locked memory run at the full speed of the bus, and beside the GPU's computing: they are queued on
    a stream of their own, and nobody waits for them but the thread that writes them to the disk, and the next update.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def begin(self, size: int) -> None:
        """Begin a snapshot of at most `size` bytes (see `bytes_for`). The tensors of the one before become invalid."""
        if len(self._buffer) < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one is freed before the new one is allocated
            self._buffer = _page_locked(size)
        self._used = 0
        self._stream.wait_stream(torch.cuda.current_stream())  # until the update before is made

    def copy(self, tensor: Tensor, *, is_temporary: bool) -> Tensor:
        """Queue the copy of a tensor; returns the tensor in the buffer that will hold it.

        Args:
            tensor: on the GPU.
            is_temporary: it will be freed at once: the copy is queued where its memory is given to others.
        """
        size = tensor.numel() * tensor.element_size()
        target = self._buffer[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += bytes_for(tensor)
        with nullcontext() if is_temporary else torch.cuda.stream(self._stream):
            target.copy_(tensor, non_blocking=True)
        return target

    def end(self) -> torch.cuda.Event:
        """End a snapshot; returns the event after which all copies are made."""
        self._stream.wait_stream(torch.cuda.current_stream())  # which may have made some
        return self._stream.record_event()


def bytes_for(tensor: Tensor) -> int:
    """The bytes that a tensor takes in the buffer, of a sharded one those of the whole."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _page_locked(size: int) -> Tensor:
    """Memory that the system keeps in place, of which PyTorch takes the next power of two; ordinary memory if none.

    Copies into ordinary memory are as right, and slower.
    """
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(size, dtype=torch.uint8)
