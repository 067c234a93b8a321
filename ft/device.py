"""The device, the dtype of matrix products, the memory allocator, and the number of threads."""

import ctypes
import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ft.errors import UsageError, shown

if sys.platform != "win32":
    import resource


def use_device(name: str | None, local_rank: int | None = None) -> torch.device:
    """Return the device of `choose_device`, and make a CUDA device the current one of this process.

    Pinned memory, random states and streams belong to the current device by default: without this, a process on
    `cuda:1` also creates a context on `cuda:0`, which takes hundreds of megabytes.

    Args:
        name: the value of `--device`.
        local_rank: the rank of this process on its machine; None for a single process.

    Raises:
        UsageError: see `choose_device`, or PyTorch was not built for the GPU.
    """
    device = choose_device(name, local_rank)
    if device.type == "cuda":
        _check_compute_capability(device)
        torch.cuda.set_device(device)
        # PyTorch 2.11 and later prefer cuDNN attention on an H100. It builds a plan for each shape, which is slow with
        # batches of many different lengths; flash and memory-efficient attention remain. Process-wide, not in a
        # context: activation checkpointing calls attention again in the backward pass.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


SMALL_MODEL = 2**20  # parameters below which one thread, and fp32 on a CPU, are faster


def choose_device(name: str | None, local_rank: int | None = None) -> torch.device:
    """The device that `--device` names; without a name CUDA, else Apple's MPS, else the CPU.

    In several processes each uses the CUDA device of its `local_rank`. In a single process `cuda` without an index is
    the current CUDA device.

    Returns:
        The device; a CUDA device has an index, which `torch.cuda.set_device` requires.

    Raises:
        UsageError: the device is not present, or several processes cannot share it.
    """
    if name is None:
        has_mps = torch.backends.mps.is_available() and local_rank is None
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if local_rank is not None:
        if name.startswith(("cuda:", "mps")):
            raise UsageError(f"--device is {shown(name)}, which several processes cannot share: it must be cuda or cpu")
        present = torch.cuda.device_count() if name == "cuda" else 0
        if local_rank >= present > 0:
            raise UsageError(
                f"torchrun has started {local_rank + 1} processes or more here, where PyTorch finds {present} CUDA "
                f"devices: --nproc-per-node must be at most {present}"
            )
        name = f"cuda:{local_rank}" if name == "cuda" else name
    # Not by torch.device(): it accepts other accelerators, and an index above 127 wraps around.
    kind = re.fullmatch(r"cpu|mps|cuda(:(?P<index>0|[1-9][0-9]{0,8}))?", name)
    if kind is None:
        raise UsageError(f"--device is {shown(name)}, it must be cpu, cuda, cuda:N or mps")
    if name.startswith("cuda"):
        present = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(kind["index"] or 0) >= present:
            raise UsageError(
                f"--device is {shown(name)}, PyTorch {torch.__version__} finds {present} CUDA devices here"
            )
        if kind["index"] is None:
            return torch.device("cuda", torch.cuda.current_device())
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device is {shown(name)}, PyTorch {torch.__version__} finds no MPS device here")
    return torch.device(name)


def _check_compute_capability(device: torch.device) -> None:
    """Check that PyTorch was built for this GPU; otherwise the first kernel fails.

    Code for `sm_XY` runs on GPUs of the same major version and a later minor one; code for `compute_XY` is compiled
    when it is loaded, for any later GPU.

    Raises:
        UsageError: the GPU's compute capability is not among those that PyTorch was built for.
    """
    built_for = torch.cuda.get_arch_list()
    known = [found for arch in built_for if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch))]
    if not known:  # ROCm has other names
        return
    major, minor = torch.cuda.get_device_capability(device)
    for kind, *numbers in (arch.groups() for arch in known):
        its_major, its_minor = map(int, numbers)
        if (its_major, its_minor) <= (major, minor) and (kind == "compute" or its_major == major):
            return
    raise UsageError(
        f"--device is {str(device)!r}, a GPU of compute capability {major}.{minor}, and PyTorch {torch.__version__} "
        f"was built for {' '.join(built_for)}: install a build for this GPU "
        "(https://pytorch.org/get-started/locally/), or use --device cpu"
    )


def read_synchronizes(device: torch.device) -> bool:
    """Whether reading a value from the device waits for all kernels that are queued on it."""
    return device.type != "cpu"


def peak_memory(device: torch.device) -> int | None:
    """The peak memory of this process in bytes: on a CUDA device what PyTorch allocated there, else resident memory.

    Resident memory since the start of the process; on a CUDA device since `torch.cuda.reset_peak_memory_stats`, which
    each run calls. None where it is not known: on MPS and on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, kibibytes elsewhere


@dataclass(frozen=True)
class Precision:
    """The dtype of matrix products; weights and optimizer state are fp32 in any case."""

    name: str
    reason: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The `torch.dtype`."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    def autocast(self) -> AbstractContextManager[None]:
        """`torch.autocast` for this dtype; disabled for fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "fp32")

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for fp16, in which small gradients would round to 0; disabled for other dtypes.

        Micikevicius et al., "Mixed Precision Training" (2018), section 3.2.
        """
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def require_format(name: str, device: torch.device, what: str, remedy: str) -> None:
    """Check that PyTorch computes a format on a device, in hardware or, more slowly, by emulation.

    CPUs compute all formats, and MPS computes bf16 from macOS 14 on.

    Args:
        name: of the format.
        device: the device.
        what: the start of the message, with the setting and its value.
        remedy: its end.

    Raises:
        UsageError: it does not.
    """
    if name != "bf16" or device.type == "cpu":
        return
    if device.type == "cuda":
        with torch.cuda.device(device):  # the query is about the current device
            is_computed, since = torch.cuda.is_bf16_supported(), ""
    else:
        is_computed, since = torch.backends.mps.is_macos_or_newer(14, 0), " before macOS 14"
    if not is_computed:
        raise UsageError(f"{what}, which {device} does not compute{since}: {remedy}, or another --device")


def choose_precision(setting: str, device: torch.device) -> Precision:
    """The precision of `--precision`; for `auto` the fastest that the device computes in hardware.

    Raises:
        UsageError: the device does not compute the given one at all.
    """
    if setting != "auto":
        require_format(setting, device, f"--precision is {shown(setting)}", "use --precision fp32")
        return Precision(setting, "set by --precision", device)
    if device.type == "cuda":
        with torch.cuda.device(device):  # the query is about the current device
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if has_bf16:
            return Precision("bf16", "this GPU computes bf16 in hardware", device)
        return Precision("fp16", "this GPU computes fp16 but no bf16 in hardware", device)
    if device.type == "mps":
        return Precision("fp32", "the format that MPS computes most reliably", device)
    if device.type == "cpu" and has_amx():
        return Precision("bf16", "this processor has AMX, which multiplies bf16 matrices", device)
    if device.type == "cpu" and has_amd_bf16():
        return Precision("bf16", "this AMD processor has AVX512_BF16, at twice the rate of fp32", device)
    reason = "auto uses bf16 on CPUs with AMX, and on AMD's with AVX512_BF16, and this one has neither"
    return Precision("fp32", reason, device)


def precision_for_size(precision: Precision, setting: str, num_parameters: int) -> Precision:
    """The precision for a model of this size: with `auto`, a small model on a CPU takes fp32.

    On a Xeon with AMX the demo's step takes 7.9 ms, in bf16 27 ms, as calls of oneDNN take longer than its products.

    Args:
        precision: that of `choose_precision`.
        setting: the value of `--precision`.
        num_parameters: of the model.
    """
    is_small = precision.device.type == "cpu" and num_parameters < SMALL_MODEL
    if setting != "auto" or precision.name == "fp32" or not is_small:
        return precision
    return replace(precision, name="fp32", reason="the faster one for so small a model")


@functools.cache
def has_amx() -> bool:
    """Whether this processor has AMX, with 16 times the operations per cycle in bf16 that AVX-512 has in fp32."""
    return cpu_has("amx_bf16")


@functools.cache
def has_amd_bf16() -> bool:
    """Whether this is an AMD processor with AVX512_BF16 (Zen 4 and later), with twice the operations per cycle in bf16.

    Intel's processors with AVX512_BF16 and no AMX keep fp32: on a Xeon of which oneDNN used no more
    (ONEDNN_MAX_CPU_ISA), a step took 956 ms in bf16 and 618 ms in fp32.
    """
    return cpu_has("AuthenticAMD", "avx512_bf16")


def cpu_has(*names: str) -> bool:
    """Whether Linux names all of these, a vendor or instruction sets, in its description of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and set(names) <= set(cpuinfo.read_text().split())


def disable_malloc_trim() -> bool:
    """Have glibc keep freed memory for the next step instead of returning it to the kernel.

    Each step frees and allocates gradients as large as the weights. By default glibc returns blocks of that size to the
    kernel, which must zero every page again.

    Returns:
        Whether the C library accepted the setting; only glibc has it.
    """
    if not sys.platform.startswith("linux"):
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, 2**31 - 1))


def restore_malloc_trim() -> None:
    """Undo `disable_malloc_trim`, and return freed memory to the kernel.

    glibc cannot adjust its thresholds itself any more. They are set to the values that it reaches by freeing a large
    block, from malloc.c: DEFAULT_MMAP_THRESHOLD_MAX, and twice that to trim.
    """
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
    largest = 4 * 2**20 * ctypes.sizeof(ctypes.c_long)
    for parameter, value in ((m_mmap_max, 65536), (m_mmap_threshold, largest), (m_trim_threshold, 2 * largest)):
        libc.mallopt(parameter, value)
    libc.malloc_trim(0)


@contextmanager
def threads_for(num_parameters: int) -> Iterator[None]:
    """A context that uses one thread for a small model, unless OMP_NUM_THREADS is set.

    OpenMP threads synchronize by spinning at the end of every operation. If another program uses a core, they wait for
    the thread that is not running: with two threads on two busy cores the demo takes eight times as long as with one.
    For a large model the wait is short compared with the operation. Sums of several threads may round differently, so
    losses can differ in their last bits from those with another number of threads.

    Args:
        num_parameters: of the model.
    """
    before = torch.get_num_threads()
    if num_parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
