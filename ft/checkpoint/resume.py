"""Which checkpoint a run resumes from, and what may differ from the run that wrote it."""

import hashlib
from dataclasses import replace
from pathlib import Path

from ft.checkpoint import snapshot as snapshots
from ft.checkpoint import store
from ft.config import NEWEST, Config, flag
from ft.errors import FtError, UsageError, printable, sentence, shown
from ft.io.json_file import read_json
from ft.io.manifest import MANIFEST
from ft.settings import changed_on_resume, read_config_file
from ft.train.schedule import total_steps
from ft.train.state import State


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
        raise UsageError(
            f"--resume is {shown(config.resume)}, there is no such folder; it must be a run or a checkpoint"
        )
    if store.is_checkpoint(given):
        if damage := store.verify_checkpoint(given):
            raise FtError(f"{given} is damaged: {damage}. --resume {given.parent} takes the newest whole one")
        return given
    found = store.checkpoints(given)
    for folder in reversed(found):
        damage = store.verify_checkpoint(folder)
        if damage is None:
            return folder
        print(sentence(f"WARNING: {folder} is damaged and left out: {damage}."))
    if found:
        raise FtError(f"no checkpoint in {given} is whole, so that nothing can be continued; --overwrite starts anew")
    print(f"No checkpoint in {printable(str(given))} yet: starting from the beginning.")
    return None


def check_config_unchanged(resume_from: Path, config: Config) -> None:
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


def check_data_unchanged(resume_from: Path, state: State, digest: str) -> None:
    """Stop a resume whose files hold other rows than those that the run has read so far, though by the same names.

    Raises:
        FtError: the SHA-256 of the examples is not that of the checkpoint.
    """
    if state.data not in ("", digest):  # "" in checkpoints from before this was noted
        raise FtError(
            f"the data are not those of {resume_from}, though the flags are the same: their SHA-256 was "
            f"{state.data[:12]}... and is {digest[:12]}...: put the files back as they were, or start another run"
        )


def check_extended_schedule(resume_from: Path, config: Config, num_examples: int) -> str | None:
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
    weights = run / "final" / snapshots.WEIGHTS
    if not weights.is_file():  # absent, or a FIFO, which would be waited for
        return False
    listed = read_json(resume_from / MANIFEST)["files"][snapshots.WEIGHTS]["sha256"]
    with weights.open("rb") as file:
        return bool(hashlib.file_digest(file, "sha256").hexdigest() == listed)
