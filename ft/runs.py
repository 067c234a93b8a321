"""The folder of a run: who may write there, what is to be continued, and whether there is room."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ft import checkpoint
from ft.config import NEWEST, Config, flag
from ft.errors import FtError, UsageError
from ft.files import LOCK, MANIFEST, FolderLock, locked, read_json, tidy
from ft.plain_files import remove
from ft.settings import changed_on_resume, read_config_file, run_of
from ft.state import State
from ft.train import total_steps

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
                f"--resume is {config.resume!r}, there is no such folder; it must be a run or a checkpoint"
            )
        if resumed.resolve() != run.resolve():
            raise UsageError(
                f"--resume is {config.resume!r} and --output-dir {str(run)!r}: a run is continued in its own folder, "
                "leave --output-dir out"
            )
    with locked(run) as lock:
        if (
            config.resume is None
            and not config.overwrite
            and not (config.demo and _is_of_a_demo(run))
            and _has_files(run)
        ):
            raise UsageError(
                f"--output-dir is {str(run)!r}, which holds files already: --resume continues the run in it, "
                "--overwrite replaces that run, another --output-dir keeps it"
            )
        tidy(run)
        yield lock


def shared_by(config: Config, processes: int) -> Config:
    """The same run in so many processes: one that is resumed keeps the reviews of its batches, whoever shares them.

    Raises:
        UsageError: they cannot be shared equally.
    """
    recorded = Path(config.output_dir) / "config.json"
    if config.resume is None or not recorded.exists():
        return replace(config, processes=processes)
    before = Config(**read_config_file(recorded))
    asked_for = config.batch_size != before.batch_size  # and was not taken from the file
    if asked_for or before.processes == processes:
        return replace(config, processes=processes)
    batch_size, rest = divmod(before.rows_per_batch, processes)
    if rest:
        divisors = [str(n) for n in range(1, before.rows_per_batch + 1) if before.rows_per_batch % n == 0]
        raise UsageError(
            f"the run has batches of {before.rows_per_batch} reviews, which {processes} processes cannot share "
            f"equally: continue it with {', '.join(divisors)}"
        )
    return replace(config, batch_size=batch_size, processes=processes)


def checkpoint_to_resume(run: Path, config: Config) -> Path | None:
    """The newest whole checkpoint to continue from, if that is wanted and there is one.

    Raises:
        UsageError: --resume names no checkpoint.
        FtError: the checkpoint named is damaged, or all are.
    """
    if config.resume is None:
        return None
    given = run if config.resume == NEWEST else Path(config.resume)
    if not given.is_dir():
        raise UsageError(f"--resume is {config.resume!r}, there is no such folder; it must be a run or a checkpoint")
    if checkpoint.is_checkpoint(given):
        if damage := checkpoint.damage_of_checkpoint(given):
            raise FtError(f"{given} is damaged: {damage}. --resume {given.parent} takes the newest whole one")
        return given
    found = checkpoint.checkpoints(given)
    for folder in reversed(found):
        damage = checkpoint.damage_of_checkpoint(folder)
        if damage is None:
            return folder
        print(f"WARNING: {folder} is damaged and left out: {damage}.")
    if found:
        raise FtError(f"no checkpoint in {given} is whole, so that nothing can be continued; --overwrite starts anew")
    print(f"No checkpoint in {given} yet: starting from the beginning.")
    return None


def refuse_another_run(resume_from: Path, config: Config) -> None:
    """Stop a resume whose settings would make it another run.

    Raises:
        UsageError: one line per setting.
        FtError: nobody knows what the settings were.
    """
    recorded = resume_from.parent / "config.json"
    if not recorded.exists():
        raise FtError(
            f"{resume_from} has no {recorded} beside it, so that its settings are not known: put that file back, or "
            "start another run"
        )
    changed = changed_on_resume(read_config_file(recorded), config)
    if changed:
        raise UsageError(*changed, "--resume continues the same run: leave these flags out, or start another run")


def refuse_other_data(resume_from: Path, state: State, digest: str) -> None:
    """Stop a resume whose files hold other rows than those that the run has read so far, though by the same names.

    Raises:
        FtError: the SHA-256 of the examples is not that of the checkpoint.
    """
    if state.data not in ("", digest):  # "" in checkpoints from before this was noted
        raise FtError(
            f"the data are not those of {resume_from}, though the flags are the same: their SHA-256 was "
            f"{state.data[:12]}... and is {digest[:12]}...: put the files back as they were, or start another run"
        )


def lengthened(resume_from: Path, config: Config, num_examples: int) -> str | None:
    """What a longer --epochs or --max-steps does to the schedule of a resumed run; None if it is as long as before.

    Raises:
        UsageError: the run would be shorter than before.
    """
    before = Config(**read_config_file(resume_from.parent / "config.json"))
    old, new = (total_steps(num_examples, each) for each in (before, config))
    if new < old:
        names = [name for name in ("epochs", "max_steps") if getattr(before, name) != getattr(config, name)]
        raise UsageError(
            f"{' and '.join(map(flag, names))} would end the run after {new} steps, it was planned for {old}: a "
            "resumed run can only become longer"
        )
    if new == old:
        return None
    what = "stays as it is" if config.lr_schedule == "constant" else f"now falls to 0 at step {new:,}"
    return (
        f"The run becomes longer: {new:,} steps instead of {old:,}. From here on the learning rate {what}, as if the "
        f"run had been planned so, while the steps up to here followed the schedule of {old:,}."
    )


def reason_of_end(state: State, last_step: int) -> str:
    """Why a run that has ended did so, in half a sentence."""
    if state.step >= last_step:
        return f"all {last_step:,} steps are done"
    return (
        f"after step {state.step:,} of {last_step:,}, the last {state.evaluations_since_best} evaluations had not been "
        "better than the best before them (--early-stopping-patience)"
    )


def is_finished(run: Path, resume_from: Path) -> bool:
    """Whether the finished model is that of this checkpoint: a longer run may have left that of a shorter one."""
    try:
        listed = read_json(resume_from / MANIFEST)["files"][checkpoint.WEIGHTS]["sha256"]
        with (run / "final" / checkpoint.WEIGHTS).open("rb") as file:
            return bool(hashlib.file_digest(file, "sha256").hexdigest() == listed)
    except FileNotFoundError:
        return False


def room_for(run: Path, parameters: int, trained: int, config: Config) -> str:
    """How much disk the checkpoints will take and how much is free, in a sentence.

    Raises:
        FtError: there is no room for a single one and the finished model.
    """
    final = BYTES_PER_WEIGHT * parameters
    each = final + BYTES_PER_TRAINED * trained
    most = each * (config.keep_checkpoints + config.keep_best + 1) + final  # one is written before the oldest goes
    # What an earlier part of the run has written lies there already.
    present = sum(map(_bytes_in, checkpoint.checkpoints(run)))
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
        *checkpoint.checkpoints(run),
        *run.glob(f"{checkpoint.SUPERSEDED}*"),
    ):
        remove(path)
    (run / "config.json").unlink(missing_ok=True)  # last, as checkpoints without it would be of an unknown run
