"""What can go wrong in the middle of a run, turned into errors that say what helps."""

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
def nonfinite_advice(config: Config, run: Path, split: Split) -> Iterator[None]:
    """Turn a loss or gradient that is not finite into an error that says what helps.

    Raises:
        FtError: there was one inside.
    """
    try:
        yield
    except NonFiniteError as error:
        numbers = split.rows or range(len(split.texts))
        rows = ", ".join(str(numbers[row]) for row in rows_of_step(len(split.texts), config, error.step))
        before = [path for path in store.checkpoints(run) if store.step_of(path) <= error.step]
        newest = before[-1] if before else None
        raise FtError(
            f"{error}; it read the rows {rows} of the training split. The weights were not updated with it"
            + (f", and {newest} is from before it" if newest else "")
            + f". A lower --learning-rate (now {config.learning_rate}) or --precision fp32 may help; --on-nonfinite "
            f"skip leaves out up to --max-skipped-steps {config.max_skipped_steps} such steps"
        ) from error


@contextmanager
def memory_advice(given: str, remedy: str) -> Iterator[None]:
    """Turn memory that runs out into an error that says what helps.

    Args:
        given: what was asked for, and took too much.
        remedy: with what less is needed.

    Raises:
        FtError: it ran out inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        detail = str(error).partition("\n")[0]
        raise FtError(f"out of memory with {given}: less is needed with {remedy}. {detail}".rstrip()) from error


def training_memory_advice(config: Config) -> AbstractContextManager[None]:
    """`memory_advice` for what trains with these settings."""
    return memory_advice(
        f"--batch-size {config.batch_size}, --max-length {config.max_length} and --activation-checkpointing "
        f"{config.activation_checkpointing}",
        "--activation-checkpointing full, with a smaller --batch-size (and as much more of "
        "--gradient-accumulation-steps), or with --precision bf16; in an evaluation with a smaller --eval-batch-size "
        f"(now {config.eval_batch_size})",
    )
