"""Tensors as the bytes of a safetensors file."""

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
    """Tensors in the safetensors format, one memory view per tensor: https://huggingface.co/docs/safetensors.

    The format is the header's length (8 bytes, little-endian), the header as JSON, then the values of all tensors. The
    library reads what is written here. It would hold a second copy of all tensors in memory; here each view is of the
    tensor itself.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the numbers begin at a multiple of their size
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for tensor in tensors.values():
        numbers = tensor.detach().cpu().contiguous()
        size = numbers.numel() * numbers.element_size()
        array: Any = (ctypes.c_char * size).from_address(numbers.data_ptr())
        array.owner = numbers  # which must live as long as a view of it does
        yield memoryview(array).cast("B")
