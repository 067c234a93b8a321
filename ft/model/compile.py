"""torch.compile for the blocks of a model."""

import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ft.errors import UsageError


def compile_blocks(blocks: Iterable[nn.Module], mode: str, device: torch.device) -> None:
    """Have each block of a model compiled at its first call; all but the last share one compilation.

    Only the blocks: they are where the time goes, and a single block compiles in a twelfth of the time of all. Shapes
    are taken as fixed, so that a batch of another shape would compile anew, and after eight shapes not any more.

    Raises:
        UsageError: there is no C++ compiler, which PyTorch needs to compile for a CPU, or CUDA graphs without CUDA.
    """
    if mode == "none":
        return
    if mode == "reduce-overhead" and device.type != "cuda":
        raise UsageError(f"--compile reduce-overhead records CUDA graphs, and the device is {device}: use default")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise UsageError("--compile needs a C++ compiler (g++ or clang++) on a CPU, and none is installed here")
    for block in blocks:
        block.compile(mode=mode, dynamic=False)


def eager_mode(mode: str) -> AbstractContextManager[object]:
    """A context in which compiled blocks run as they are written: for batches of other shapes than the training's."""
    return torch.compiler.set_stance("force_eager") if mode != "none" else nullcontext()
