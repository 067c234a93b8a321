"""Shared by all benchmarks: the device and its clock, a description of the machine, and the result files.

On a GPU a call returns before its work is done. There, times are taken with CUDA events, which are queued with the
work.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ft.device import Precision

CPU = torch.device("cpu")
GPU_TYPES = ("cuda",)
PUBLISHED = Path(__file__).parent / "results"
TRIALS = Path("runs") / "benchmarks"
INSTRUCTION_SETS = {  # by the name of the flag in /proc/cpuinfo
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX512_BF16",
    "amx_bf16": "AMX",
}
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch")

Moment = float | torch.cuda.Event


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of all benchmarks; `output` is the directory of the result files."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, default=TRIALS, help=f"directory of the results (default: {TRIALS})")
    where.add_argument(
        "--publish",
        action="store_const",
        dest="output",
        const=PUBLISHED,
        help="write to benchmarks/results, and replace the results that are published there",
    )
    return parser


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `precision_of` reads."""
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), help="default: fp32, on a GPU auto")


def precision_of(options: argparse.Namespace) -> "Precision":
    """The device and precision that the flags select; a GPU becomes the current device."""
    from ft.device import choose_precision, use_device  # here, as the Trainer's process needs none of it

    device = use_device(options.device)  # as the program: without cuDNN's attention
    return choose_precision(options.precision or ("auto" if is_gpu(device) else "fp32"), device)


def require_one_gpu(parser: argparse.ArgumentParser, device: torch.device) -> None:
    """Refuse a comparison with the Trainer among several GPUs: it computes on all that it sees, a batch on each.

    Raises:
        SystemExit: the device is one of several GPUs.
    """
    if is_gpu(device) and (count := torch.cuda.device_count()) > 1:
        parser.error(f"the Trainer would compute on all {count} GPUs, and ft on one: set CUDA_VISIBLE_DEVICES to one")


def is_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU, with its own clock, memory and queue."""
    return device.type in GPU_TYPES


def moment(device: torch.device) -> Moment:
    """The current time in the work of the device."""
    if not is_gpu(device):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """Seconds between two moments; waits for the later one."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def wall_clock(device: torch.device) -> float:
    """The time in seconds when the device has finished its queued work."""
    if is_gpu(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds_of(function: Callable[[], Any], repetitions: int, device: torch.device) -> float:
    """The median seconds of a call, after one warm-up call."""
    function()
    seconds = []
    for _ in range(repetitions):
        start = moment(device)
        function()
        seconds.append(seconds_between(start, moment(device)))
    return statistics.median(seconds)


def matmul_rate(precision: "Precision") -> float:
    """Operations per second of a large square matrix product, whose inputs have the format of `precision`."""
    device = precision.device
    width = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(width, width, device=device).to(precision.dtype) for _ in range(2))
    return 2 * width**3 / median_seconds_of(lambda: torch.mm(a, b), 10, device)


def peak_memory(device: torch.device = CPU) -> int:
    """The peak memory of this process in bytes: on a GPU what PyTorch allocated, else resident memory.

    Not `ru_maxrss`, which starts with the parent's peak (Linux only).
    """
    if is_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    return _kibibytes("/proc/self/status", "VmHWM") * 1024


def current_memory(device: torch.device = CPU) -> int:
    """The current memory of this process in bytes, as `peak_memory` counts it."""
    if is_gpu(device):
        return torch.cuda.memory_allocated(device)
    return _kibibytes("/proc/self/status", "VmRSS") * 1024


def available_memory() -> int:
    """Bytes that are available without swapping (Linux only)."""
    return _kibibytes("/proc/meminfo", "MemAvailable") * 1024


def _kibibytes(path: str, key: str) -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


def launches(profiler: torch.profiler.profile) -> int:
    """The number of launches on a GPU while it was profiled."""
    return sum(event.count for event in profiler.key_averages() if event.key.startswith(LAUNCHES))


def result_name(name: str, device: torch.device) -> str:
    """The stem of a result's files, which differs between CPU and GPU."""
    return f"{name}-cuda" if is_gpu(device) else name


def machine() -> dict[str, Any]:
    """The machine, package versions and date of a measurement."""
    cpuinfo = Path("/proc/cpuinfo")
    about = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = re.findall(r"^model name\s*: (.*)$", about, re.MULTILINE)
    has_gpu = torch.cuda.is_available()
    packages = ("torch", "transformers", "accelerate", "tokenizers", "safetensors")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_sets": [title for flag, title in INSTRUCTION_SETS.items() if re.search(rf"\b{flag}\b", about)],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "gpu_memory_gib": round(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30, 1)
        if has_gpu
        else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def describe_machine(about: dict[str, Any]) -> str:
    """What `machine` returned, in one line: processor with its instruction sets, threads, memory, torch."""
    sets = ", ".join(about["instruction_sets"] or [about["cpu_capability"]])
    processor = f"{about['processor']} ({sets})"
    return f"{processor}, {about['threads']} threads, {about['memory_gib']} GiB, torch {about['torch']}"


def write_result(
    directory: Path,
    name: str,
    figures: dict[str, Any],
    table: str,
    done: str = "Measured",
    precision: "Precision | None" = None,
) -> None:
    """Write `NAME.json` and `NAME.md` in a directory, and print the table.

    Args:
        directory: of the flags `--output` and `--publish`.
        name: of the files; on a GPU with `-cuda` behind it.
        figures: for the JSON file.
        table: for the other one.
        done: what was done on this machine.
        precision: with the device that was measured; default: the CPU.
    """
    on_gpu = precision is not None and is_gpu(precision.device)
    if precision is not None:
        name = result_name(name, precision.device)
        figures = {"device": str(precision.device), "precision": precision.name, **figures}
    directory.mkdir(parents=True, exist_ok=True)
    described = {"machine": machine(), **figures}
    (directory / f"{name}.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    about = described["machine"]
    where = describe_machine(about)
    if on_gpu:
        where = f"{about['gpu']}, {about['gpu_memory_gib']} GiB, CUDA {torch.version.cuda}, beside {where}"
    (directory / f"{name}.md").write_text(f"{table}\n\n{done} on {about['date']}: {where}.\n", encoding="utf-8")
    print(table)
    print(f"\nWritten to {directory / name}.json and {name}.md.")


def picture_path(directory: Path, name: str, device: torch.device = CPU) -> Path:
    """The file of a result's picture, in a directory that exists."""
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{result_name(name, device)}.png"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
