"""The ways a run ends before its end: two that the user can mend, and one that was asked for."""

import re

# Parts of a RuntimeError that PyTorch raises for a device, and what they say about the machine. cuBLAS allocates a
# workspace when its handle is created: where that fails, the GPU's memory is full.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|allocate memory|STATUS_ALLOC_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `?cublasCreate"
)
_REMEDIES = {
    "no kernel image is available": (
        "this build of PyTorch has no kernels for the GPU: install one that has "
        "(https://pytorch.org/get-started/locally/), or take --device cpu"
    ),
    "busy or unavailable": (
        "the GPU is in use by another process, or reserved for one (nvidia-smi shows which): wait for it, or take "
        "another --device"
    ),
}


class FtError(Exception):
    """A failure with a message meant for the user: what happened, the value, the limit and the remedy.

    The command line prints the message without a traceback and exits with 1. Every other exception is a defect of
    this program and keeps its traceback.
    """


class UsageError(FtError):
    """The command line or a configuration is wrong; exits with 2, before any work was done.

    `problems` holds one sentence each, so that all of them are reported at once.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class Stopped(Exception):  # noqa: N818, as nothing is wrong
    """A signal has ended the run, after it was saved; `status` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the CPU or of an accelerator, is full."""
    return isinstance(error, MemoryError) or bool(
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}")
    )


def remedy_of(error: BaseException) -> str | None:
    """What helps against an error of the device, in a sentence; None for an error that is a defect of the program."""
    return next((remedy for part, remedy in _REMEDIES.items() if part in str(error)), None)
