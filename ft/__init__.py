"""Fine-tuning GPT-2 in plain PyTorch; start reading in `ft/finetune.py`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ft.errors import FtError, UsageError

if TYPE_CHECKING:
    from ft.api.fine_tune import fine_tune
    from ft.api.run import Run
    from ft.inference.classifier import load

__all__ = ["FtError", "Run", "UsageError", "fine_tune", "load"]


# Imported at first use: `import ft`, `--help` and a wrong flag do not wait for PyTorch.
_MODULES = {"Run": "ft.api.run", "fine_tune": "ft.api.fine_tune", "load": "ft.inference.classifier"}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """The public names that need PyTorch."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return sorted({*globals(), *__all__})
