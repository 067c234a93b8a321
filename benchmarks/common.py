"""What every benchmark shares: a description of the machine, and where results are written."""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine, versions and date that a figure belongs to."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if (cpuinfo.exists())
        else []
    )
    packages = ("torch", "transformers", "accelerate", "tokenizers", "safetensors")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def write_result(name: str, figures: dict[str, Any], table: str, done: str = "Measured") -> None:
    """Write `results/NAME.json` and `results/NAME.md`, and print the table; `done` is what was done on this machine."""
    RESULTS.mkdir(exist_ok=True)
    described = {"machine": machine(), **figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    about = described["machine"]
    where = f"{about['processor']}, {about['threads']} threads, {about['memory_gib']} GiB, torch {about['torch']}"
    (RESULTS / f"{name}.md").write_text(f"{table}\n\n{done} on {about['date']}: {where}.\n", encoding="utf-8")
    print(table)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
