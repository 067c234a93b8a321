"""`torch.compile` for the transformer blocks."""

import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import nn

from ft.errors import UsageError


def compile_blocks(blocks: Iterable[nn.Module], mode: str, device: torch.device) -> None:
    """Compile each block at its first call; all blocks but the last share one compilation.

    Only the blocks are compiled: they take most of the time, and one block compiles in a twelfth of the time of twelve.
    Shapes are static: a batch of a new shape recompiles, and after eight shapes PyTorch falls back to eager mode.

    Args:
        blocks: the blocks, compiled in place.
        mode: a mode of `torch.compile`, or "none".
        device: the device of the blocks.

    Raises:
        UsageError: what `torch.compile` needs on this device is not installed, or CUDA graphs without CUDA.
    """
    if mode == "none":
        return
    if mode == "reduce-overhead" and device.type != "cuda":
        raise UsageError(f"--compile reduce-overhead records CUDA graphs, and the device is {device}: use default")
    if missing := _missing_to_compile(device):
        raise UsageError(f"--compile needs {missing}; install it, or leave --compile out")
    for block in blocks:
        block.compile(mode=mode, dynamic=False)


def _missing_to_compile(device: torch.device) -> str | None:
    """What `torch.compile` needs on this device and is not installed; None if nothing is missing."""
    cxx = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if device.type == "cpu" and not shutil.which(cxx):
        return f"a C++ compiler on a CPU, and {cxx} is not installed here (CXX names another)"
    if device.type != "cuda":
        return None
    if find_spec("triton") is None:
        return "Triton on a GPU, and the package triton is not installed here"
    if torch.version.cuda is not None and torch.cuda.get_device_capability(device) < (7, 0):
        return f"a GPU of compute capability 7.0 or later, which Triton compiles for, and {device} is an earlier one"
    # Triton compiles the C function that launches each kernel, with $CC if it is set. On Windows, its package
    # includes a compiler.
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if sys.platform != "win32" and not any(map(shutil.which, compilers)):
        return f"a C compiler on a GPU, and {' or '.join(compilers)} is not installed here"
    return None


def eager_mode(mode: str) -> AbstractContextManager[object]:
    """A context in which compiled blocks run eagerly, for batches of other shapes than those of training."""
    return torch.compiler.set_stance("force_eager") if mode != "none" else nullcontext()
