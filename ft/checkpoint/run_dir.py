"""The folder of a run: who may write there, what is to be continued, and whether there is room."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ft.checkpoint import store
from ft.config import NEWEST, Config
from ft.errors import FtError, UsageError, shown
from ft.io.atomic import remove_stale_staging
from ft.io.lock import LOCK, FolderLock, locked
from ft.io.plain_files import remove
from ft.settings import read_config_file, run_of

BYTES_PER_WEIGHT, BYTES_PER_TRAINED = 4, 8  # in a checkpoint: the weight, and AdamW's two moments if it is trained


def _has_files(run: Path) -> bool:
    return any(entry.name != LOCK for entry in run.iterdir())


def _is_of_a_demo(run: Path) -> bool:
    """Whether a folder holds a run of --demo, which may be replaced without being asked for."""
    if not (run / "config.json").exists():
        return {entry.name for entry in run.iterdir()} <= {LOCK, "inputs"}
    return read_config_file(run / "config.json").get("demo") is True


@contextmanager
def own_folder(config: Config) -> Iterator[FolderLock]:
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
