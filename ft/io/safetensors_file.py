"""Serialize tensors in the safetensors format."""

import ctypes
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def safetensors_chunks(
    tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Serialize tensors in the safetensors format (https://huggingface.co/docs/safetensors), without copying them.

    The format is the header's length (8 bytes, little-endian), the header as JSON, then the values of all tensors. The
    library's own `save` needs a second copy of all tensors in memory.

    Args:
        tensors: on any device, by name.
        metadata: for the header.

    Yields:
        The header, then for each tensor a view of its memory.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the values must be aligned
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for tensor in tensors.values():
        yield tensor_bytes(tensor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor in row-major order: its memory if it is contiguous and on the CPU, else a copy."""
    values = tensor.detach().cpu().contiguous()
    size = values.numel() * values.element_size()
    array: Any = (ctypes.c_char * size).from_address(values.data_ptr())
    array.owner = values  # keeps the memory alive as long as the view
    return memoryview(array).cast("B")
