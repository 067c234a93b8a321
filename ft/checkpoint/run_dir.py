"""The folder of a run: who may write there, what is to be continued, and whether there is room."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ft.checkpoint import resume, store
from ft.config import NEWEST, Config, flag
from ft.data.load import with_demo_inputs
from ft.distributed.ranks import Ranks
from ft.errors import FtError, UsageError, shown
from ft.io.atomic import remove_stale_staging
from ft.io.lock import LOCK, DirectoryLock, locked
from ft.io.plain_files import remove
from ft.settings import read_config_file, run_of
from ft.train.state import State

BYTES_PER_WEIGHT, BYTES_PER_TRAINED = 4, 8  # in a checkpoint: the weight, and AdamW's two moments if it is trained


def _has_files(run: Path) -> bool:
    return any(entry.name != LOCK for entry in run.iterdir())


def _is_of_a_demo(run: Path) -> bool:
    """Whether a folder holds a run of --demo, which may be replaced without being asked for."""
    if not (run / "config.json").exists():
        return {entry.name for entry in run.iterdir()} <= {LOCK, "inputs"}
    return read_config_file(run / "config.json").get("demo") is True


@dataclass(frozen=True)
class RunDirectory:
    """The output directory of a run, locked for this run alone.

    Attributes:
        path: the directory.
        config: the settings of the run: those of the command line, shared by the processes, with the demo's inputs.
        resume_from: the checkpoint to resume from; None for a run that starts anew.
        lock: in rank 0; None in the others, which write nothing.
        started: `time.perf_counter()` when this process began.
    """

    path: Path
    config: Config
    resume_from: Path | None
    lock: DirectoryLock | None
    started: float

    def begin(self, state: State, num_parameters: int, num_trained: int, ranks: Ranks) -> str:
        """Prepare the directory for training from `state` on; returns a sentence on disk space, empty but in rank 0.

        Raises:
            FtError: there is no room for a checkpoint and the finished model.
        """
        with ranks.rank_zero_first() as first:
            if not first:
                return ""
            space = check_disk_space(self.path, num_parameters, num_trained, self.config)
            if self.resume_from is not None:
                store.supersede_later(self.path, state.step)
                keep, keep_best = self.config.keep_checkpoints, self.config.keep_best
                store.delete_old(self.path, state, keep=keep, keep_best=keep_best)
            if self.config.resume is None:
                clear(self.path)
            self.config.save(self.path / "config.json")
            ranks.note_beginning()
            return space

    def restore(self) -> None:
        """Write the lock and the settings again if the directory was moved or deleted during the run."""
        if self.lock is not None:
            self.lock.restore()
            self.restore_config()

    def restore_config(self) -> None:
        """Write the settings again if their file is gone: no checkpoint is resumed without them."""
        if not (self.path / "config.json").exists():
            self.config.save(self.path / "config.json")


@contextmanager
def open_run_directory(config: Config, ranks: Ranks) -> Iterator[RunDirectory]:
    """Lock the output directory in rank 0, and find the checkpoint to resume from, the same on all ranks.

    Raises:
        FtError: another process is at work there, or a checkpoint that is named is damaged.
        UsageError: the directory holds files, or the settings are not those of the run that is resumed.
    """
    started = time.perf_counter()
    ranks.require_same({flag(name): repr(value) for name, value in asdict(config).items() if name != "device"})
    if ranks.has_begun and config.resume is None:  # torchrun has restarted a run that had begun
        config = replace(config, resume=NEWEST, overwrite=False)
    config = resume.shared_by(config, ranks.size)
    run = Path(config.output_dir)
    with ExitStack() as stack:
        lock = resume_from = None
        with ranks.rank_zero_first() as first:
            if first:
                lock = stack.enter_context(own_folder(config))
        with ranks.rank_zero_first() as first:
            if first:
                resume_from = resume.checkpoint_to_resume(run, config)
            if config.demo:
                config = with_demo_inputs(config, run / "inputs", write=first)
        step = ranks.all_reduce_max(-1 if resume_from is None else store.step_of(resume_from))
        resume_from = store.checkpoint_path(run, step) if step >= 0 else None
        if resume_from is not None:
            resume.check_config_unchanged(resume_from, config)
        yield RunDirectory(run, config, resume_from, lock, started)


@contextmanager
def own_folder(config: Config) -> Iterator[DirectoryLock]:
    """The run's folder, for this process alone, without what a process that died there has left half done.

    Raises:
        FtError: another process is at work there.
        UsageError: it holds files and neither --resume nor --overwrite is given, or --resume names no folder.
    """
    run = Path(config.output_dir)
    if config.resume not in (None, NEWEST):
        resumed = run_of(Path(str(config.resume)))
        if not resumed.is_dir():
            raise UsageError(
                f"--resume is {shown(config.resume)}, there is no such folder; it must be a run or a checkpoint"
            )
        if resumed.resolve() != run.resolve():
            raise UsageError(
                f"--resume is {shown(config.resume)} and --output-dir {shown(str(run))}: a run is continued in its own "
                "folder, leave --output-dir out"
            )
    with locked(run) as lock:
        if (
            config.resume is None
            and not config.overwrite
            and not (config.demo and _is_of_a_demo(run))
            and _has_files(run)
        ):
            raise UsageError(
                f"--output-dir is {shown(str(run))}, which holds files already: --resume continues the run in it, "
                "--overwrite replaces that run, another --output-dir keeps it"
            )
        remove_stale_staging(run)
        yield lock


def check_disk_space(run: Path, parameters: int, trained: int, config: Config) -> str:
    """How much disk the checkpoints will take and how much is free, in a sentence.

    Raises:
        FtError: there is no room for a single one and the finished model.
    """
    final = BYTES_PER_WEIGHT * parameters
    each = final + BYTES_PER_TRAINED * trained
    most = each * (config.keep_checkpoints + config.keep_best + 1) + final  # one is written before the oldest goes
    # What an earlier part of the run has written lies there already.
    present = sum(map(_bytes_in, store.checkpoints(run)))
    free = shutil.disk_usage(run).free
    if free < each + final - present:
        raise FtError(
            f"{run} has {_size(free)} free, a checkpoint and the finished model need {_size(each + final)}: make "
            "room, or take an --output-dir on another disk"
        )
    short = free < most - present
    return (
        f"Disk: a checkpoint takes {_size(each)}, all that are kept at most {_size(most)}; {_size(free)} are free."
        + (" WARNING: that is too little; saves will fail when the disk is full." if short else "")
    )


def _bytes_in(folder: Path) -> int:
    """The size of a folder's files; of a link its own, as it may lead nowhere. 0 if the folder may not be read."""
    try:
        return sum(path.lstat().st_size for path in folder.iterdir())
    except OSError:
        return 0


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def clear(run: Path) -> None:
    """Delete what an earlier run wrote, but for the demo's inputs, and nothing else that may lie in its folder."""
    written = ("metrics.jsonl", "scores.json", "tensorboard", "final")
    for path in (
        *(run / name for name in written),
        *store.checkpoints(run),
        *run.glob(f"{store.SUPERSEDED}*"),
    ):
        remove(path)
    (run / "config.json").unlink(missing_ok=True)  # last, as checkpoints without it would be of an unknown run
