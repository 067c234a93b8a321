"""Failures in the middle of a run, turned into errors with a remedy."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ft.checkpoint import store
from ft.config import Config
from ft.data.splits import Split
from ft.errors import FtError, is_out_of_memory
from ft.train.nonfinite import NonFiniteError
from ft.train.schedule import rows_of_step


@contextmanager
def explain_nonfinite(config: Config, run: Path, split: Split) -> Iterator[None]:
    """A context that turns `NonFiniteError` into an error that names the rows, the last checkpoint and a remedy.

    Raises:
        FtError: a loss or gradient was not finite.
    """
    try:
        yield
    except NonFiniteError as error:
        rows = ", ".join(str(split.number_in_files(row)) for row in rows_of_step(len(split.texts), config, error.step))
        before = [path for path in store.checkpoints(run) if store.step_of(path) <= error.step]
        newest = before[-1] if before else None
        raise FtError(
            f"{error}; it read the rows {rows} of the training split. The weights were not updated with it"
            + (f", and {newest} is from before it" if newest else "")
            + f". A lower --learning-rate (now {config.learning_rate}) or --precision fp32 may help; --on-nonfinite "
            f"skip leaves out up to --max-skipped-steps {config.max_skipped_steps} such steps"
        ) from error


@contextmanager
def explain_out_of_memory(given: str, remedy: str) -> Iterator[None]:
    """A context that turns an out-of-memory error into one with a remedy.

    Args:
        given: the settings that took too much memory.
        remedy: settings that need less.

    Raises:
        FtError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        detail = str(error).partition("\n")[0]
        raise FtError(f"out of memory with {given}: less is needed with {remedy}. {detail}".rstrip()) from error


def explain_out_of_memory_in_training(config: Config) -> AbstractContextManager[None]:
    """`explain_out_of_memory` for training with these settings."""
    return explain_out_of_memory(
        f"--batch-size {config.batch_size}, --max-length {config.max_length} and --activation-checkpointing "
        f"{config.activation_checkpointing}",
        "--activation-checkpointing full, with a smaller --batch-size (and more "
        "--gradient-accumulation-steps), or with --precision bf16; in an evaluation with a smaller --eval-batch-size "
        f"(now {config.eval_batch_size})",
    )
