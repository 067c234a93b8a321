"""Fine-tuning GPT-2 in plain PyTorch; start reading in `ft/finetune.py`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft.inference.classifier import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """`ft.load`, imported when it is first asked for: `python run.py --help` need not wait for PyTorch."""
    if name == "load":
        from ft.inference.classifier import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
