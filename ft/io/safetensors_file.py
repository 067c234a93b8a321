"""Serialize tensors in the safetensors format, from their memory: the library's `save_file` needs NumPy."""

import ctypes
import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def safetensors_chunks(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Iterator[memoryview]:
    """Serialize tensors in the safetensors format (https://huggingface.co/docs/safetensors), without copying them.

    The format is the header's length (8 bytes, little-endian), the header as JSON, then the values of all tensors.
    The tensors may be on any device. Yields length and header, then for each tensor a view of its memory.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype = str(tensor.dtype)[6:].upper().replace("FLOAT", "F").replace("UINT", "U").replace("INT", "I")  # F32
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the values must be aligned
    yield memoryview(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in tensors.values():
        yield tensor_bytes(tensor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor in row-major order: its memory if it is contiguous and on the CPU, else a copy."""
    values = tensor.detach().cpu().contiguous()
    array: Any = (ctypes.c_char * values.nbytes).from_address(values.data_ptr())
    array.owner = values  # keeps the memory alive as long as the view
    return memoryview(array).cast("B")
