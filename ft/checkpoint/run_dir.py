"""The run directory: its lock, the checkpoint to resume from, and disk space."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ft.checkpoint import resume, store
from ft.checks import flag
from ft.config import NEWEST, Config
from ft.data.load import with_demo_inputs
from ft.distributed.ranks import Ranks
from ft.errors import FtError, UsageError, shown
from ft.io.atomic import remove_stale_staging
from ft.io.lock import LOCK, DirectoryLock, locked
from ft.io.model_layout import EXPORTED_FILES
from ft.io.plain_files import refuse_special, remove
from ft.settings import read_config_file, rows_of_run, run_directory_of
from ft.train.profiler import require_writable
from ft.train.state import State

BYTES_PER_WEIGHT, BYTES_PER_TRAINED = 4, 8  # in a checkpoint: the weight, and AdamW's two moments if it is trained


def _has_files(run: Path) -> bool:
    """Whether there is anything but what a run leaves that ends before its first step: the lock, and its rows."""
    rows = _rows_in(run)
    names = {entry.name for entry in run.iterdir()}
    return bool(names - {LOCK, "inputs"}) or ("inputs" in names and len(rows) < len(list((run / "inputs").iterdir())))


def _rows_in(run: Path) -> list[Path]:
    """The rows in a run directory that were passed to `ft.fine_tune`."""
    return [path for path in run.glob("inputs/rows-*") if rows_of_run(str(path)) and path.is_dir()]


def _is_demo_run(run: Path) -> bool:
    """Whether the directory is of a --demo run, which is replaced without --overwrite."""
    if not (run / "config.json").exists():
        return {entry.name for entry in run.iterdir()} <= {LOCK, "inputs"}
    return read_config_file(run / "config.json").get("demo") is True


@dataclass(frozen=True)
class RunDirectory:
    """The output directory of a run, locked for this run alone.

    Attributes:
        path: the directory.
        config: the settings of the run, with the batch size of each rank and the inputs of --demo.
        resume_from: the checkpoint to resume from; None for a new run.
        lock: on rank 0; None on the others, which write nothing.
        started: `time.perf_counter()` when this process began.
    """

    path: Path
    config: Config
    resume_from: Path | None
    lock: DirectoryLock | None
    started: float

    def begin(self, state: State, num_parameters: int, num_trained: int, ranks: Ranks) -> str:
        """Prepare the directory for training from `state` on; returns a sentence on disk space, empty but on rank 0.

        Raises:
            FtError: the disk has no space for a checkpoint and the final model, or metrics.jsonl is not a regular file.
        """
        with ranks.rank_zero_first() as first:
            if not first:
                return ""
            space = check_disk_space(self.path, num_parameters, num_trained, self.config)
            if self.resume_from is not None:
                refuse_special(self.path / "metrics.jsonl")  # before anything is changed
                store.supersede_later(self.path, state.step)
                keep, keep_best = self.config.keep_checkpoints, self.config.keep_best
                store.delete_old(self.path, state, keep=keep, keep_best=keep_best)
            if self.config.resume is None:
                clear(self.path, Path(self.config.dataset))
            remove(self.path / "summary.json")  # of a shorter run: final/ remains, but this one is not finished
            self.config.save(self.path / "config.json")
            ranks.mark_started()
            return space

    def restore(self) -> None:
        """Restore the lock and config.json if the directory was moved or deleted during the run."""
        if self.lock is not None:
            self.lock.restore()
            self.restore_config()

    def restore_config(self) -> None:
        """Restore config.json if it is missing: no checkpoint is resumed without it."""
        if not (self.path / "config.json").exists():
            self.config.save(self.path / "config.json")


@contextmanager
def open_run_directory(
    config: Config, ranks: Ranks, write_rows: Callable[[Path], None] | None = None
) -> Iterator[RunDirectory]:
    """Lock the output directory on rank 0, and find the checkpoint to resume from, the same on all ranks.

    Args:
        config: the settings.
        ranks: the processes of the run.
        write_rows: writes the data set to `config.dataset`, which is in the output directory, unless it is there.

    Raises:
        FtError: another process uses the directory, or the given checkpoint is damaged.
        UsageError: the directory is not empty, the settings are not those of the run that is resumed, or --profile is
            not a file that can be written.
    """
    started = time.perf_counter()
    ranks.require_same({flag(name): repr(value) for name, value in asdict(config).items() if name != "device"})
    if ranks.is_restarted and config.resume is None:  # torchrun has restarted the processes
        config = replace(config, resume=NEWEST, overwrite=False)
    config = resume.divide_batch_over_ranks(config, ranks.size)
    run = Path(config.output_dir)
    with ExitStack() as stack:
        lock = resume_from = None
        with ranks.rank_zero_first() as first:
            if first:
                if config.profile is not None:
                    require_writable(Path(config.profile))
                lock = stack.enter_context(lock_run_directory(config))
        with ranks.rank_zero_first() as first:
            if first:
                resume_from = resume.checkpoint_to_resume(run, config)
            if config.demo:
                config = with_demo_inputs(config, run / "inputs", write=first)
        step = ranks.all_reduce_max(-1 if resume_from is None else store.step_of(resume_from))
        resume_from = store.checkpoint_path(run, step) if step >= 0 else None
        if resume_from is not None:
            resume.check_config_unchanged(resume_from, config)
        if write_rows is not None:
            with ranks.rank_zero_first() as first:
                if first and not Path(config.dataset).is_dir():
                    write_rows(Path(config.dataset))
        yield RunDirectory(run, config, resume_from, lock, started)


@contextmanager
def lock_run_directory(config: Config) -> Iterator[DirectoryLock]:
    """A context that holds the lock of the run directory; staging directories of a dead process are removed.

    Raises:
        FtError: another process uses the directory.
        UsageError: it is not empty and neither --resume nor --overwrite is given, or --resume is not a directory.
    """
    run = Path(config.output_dir)
    if config.resume not in (None, NEWEST):
        resumed = run_directory_of(Path(str(config.resume)))
        if not resumed.is_dir():
            raise UsageError(
                f"--resume is {shown(config.resume)}, there is no such directory; it must be a run or a checkpoint"
            )
        if resumed.resolve() != run.resolve():
            raise UsageError(
                f"--resume is {shown(config.resume)} and --output-dir {shown(str(run))}: a run is resumed in its own "
                "directory, omit --output-dir"
            )
    with locked(run) as lock:
        if (
            config.resume is None
            and not config.overwrite
            and not (config.demo and _is_demo_run(run))
            and _has_files(run)
        ):
            raise UsageError(
                f"--output-dir is {shown(str(run))}, which is not empty: --resume continues the run in it, "
                "--overwrite replaces that run, another --output-dir keeps it"
            )
        remove_stale_staging(run)
        yield lock


def check_disk_space(run: Path, parameters: int, trained: int, config: Config) -> str:
    """Check the disk space for checkpoints; returns a sentence with what they take and what is free.

    Raises:
        FtError: the free space is less than one checkpoint and the final model take.
    """
    final = BYTES_PER_WEIGHT * parameters
    each = BYTES_PER_WEIGHT * (trained if config.uses_lora else parameters) + BYTES_PER_TRAINED * trained
    most = (
        each * (config.keep_checkpoints + config.keep_best + 1) + final
    )  # one more while the oldest is not yet deleted
    # A resumed run already has checkpoints.
    present = sum(map(_bytes_in, store.checkpoints(run)))
    free = shutil.disk_usage(run).free
    if free < each + final - present:
        raise FtError(
            f"{run} has {_size(free)} free, a checkpoint and the final model need {_size(each + final)}: free "
            "disk space, or use an --output-dir on another disk"
        )
    short = free < most - present
    return (
        f"Disk: a checkpoint takes {_size(each)}, all that are kept at most {_size(most)}; {_size(free)} are free."
        + (" WARNING: that is too little; saves will fail when the disk is full." if short else "")
    )


def _bytes_in(directory: Path) -> int:
    """The total size of the files in a directory, without following links; 0 if it cannot be read."""
    try:
        return sum(path.lstat().st_size for path in directory.iterdir())
    except OSError:
        return 0


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def clear(run: Path, dataset: Path) -> None:
    """Delete what an earlier run wrote, and its exports, except the inputs of --demo and `dataset`; others are kept."""
    written = ("metrics.jsonl", "scores.json", "summary.json", "tensorboard", "final", "adapter", *EXPORTED_FILES)
    for path in (
        *(rows for rows in _rows_in(run) if rows.name != dataset.name),
        *(run / name for name in written),
        *store.checkpoints(run),
        *run.glob(f"{store.SUPERSEDED}*"),
    ):
        remove(path)
    (run / "config.json").unlink(missing_ok=True)  # last: checkpoints cannot be resumed without it
