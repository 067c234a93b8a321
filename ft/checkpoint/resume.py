"""Which checkpoint a run resumes from, and which settings may differ from the run that wrote it."""

from dataclasses import replace
from pathlib import Path

from ft.checkpoint import snapshot as snapshots
from ft.checkpoint import store
from ft.checkpoint.adapter import ADAPTER_WEIGHTS, is_adapter
from ft.checks import flag
from ft.config import NEWEST, Config
from ft.errors import FtError, UsageError, counted, printable, quoted, sentence, shown
from ft.io.manifest import MANIFEST, has_digest
from ft.io.plain_files import read_json
from ft.settings import find_changed_settings, read_config_file
from ft.train.schedule import total_steps
from ft.train.state import State


def divide_batch_over_ranks(config: Config, processes: int) -> Config:
    """The settings for this world size. A resumed run keeps its global batch size: `batch_size` is adapted.

    Raises:
        UsageError: the global batch size is not divisible by the world size.
    """
    recorded = Path(config.output_dir) / "config.json"
    if config.resume is None or not recorded.exists():
        return replace(config, processes=processes)
    before = Config(**read_config_file(recorded))
    is_given = config.batch_size != before.batch_size  # by a flag, not by the file
    if is_given or before.processes == processes:
        return replace(config, processes=processes)
    batch_size, rest = divmod(before.rows_per_batch, processes)
    if rest:
        divisors = [str(n) for n in range(1, before.rows_per_batch + 1) if before.rows_per_batch % n == 0]
        raise UsageError(
            f"the run has batches of {before.rows_per_batch} examples, which {processes} processes cannot share "
            f"equally: resume it with {', '.join(divisors)}"
        )
    return replace(config, batch_size=batch_size, processes=processes)


def checkpoint_to_resume(run: Path, config: Config) -> Path | None:
    """The checkpoint of --resume: the one given, or the newest that is complete. None if there is none.

    Raises:
        UsageError: --resume is not a run directory or checkpoint.
        FtError: the checkpoint named is damaged, or all are.
    """
    if config.resume is None:
        return None
    given = run if config.resume == NEWEST else Path(config.resume)
    if not given.is_dir():
        raise UsageError(
            f"--resume is {shown(config.resume)}, there is no such directory; it must be a run or a checkpoint"
        )
    if store.is_checkpoint(given):
        if damage := store.verify_checkpoint(given):
            raise FtError(
                f"{given} is damaged: {damage}. --resume {quoted(given.parent)} takes the newest complete one"
            )
        return given
    found = store.checkpoints(given)
    for checkpoint in reversed(found):
        damage = store.verify_checkpoint(checkpoint)
        if damage is None:
            return checkpoint
        print(sentence(f"WARNING: {checkpoint} is damaged and ignored: {damage}."))
    if found:
        raise FtError(f"all checkpoints in {given} are damaged, so the run cannot be resumed; --overwrite starts anew")
    print(f"No checkpoint in {printable(str(given))} yet: starting from the beginning.")
    return None


def check_config_unchanged(resume_from: Path, config: Config) -> None:
    """Check that the settings are those of the run that is resumed, but for those that may change.

    Raises:
        UsageError: one line for each setting that changed.
        FtError: the run has no config.json.
    """
    recorded = resume_from.parent / "config.json"
    if not recorded.exists():
        raise FtError(
            f"{resume_from} has no {recorded} beside it, so its settings are not known: restore that file, or start "
            "another run"
        )
    changed = find_changed_settings(read_config_file(recorded), config)
    if changed:
        raise UsageError(*changed, "--resume continues the same run: omit these flags, or start another run")


def check_data_unchanged(resume_from: Path, state: State, digest: str) -> None:
    """Check that the examples are those that the run has read so far.

    Raises:
        FtError: the SHA-256 of the examples is not that of the checkpoint.
    """
    if state.data not in ("", digest):  # "" in checkpoints of earlier versions
        raise FtError(
            f"the data are not those of {resume_from}, although the flags are the same: their SHA-256 was "
            f"{state.data[:12]}... and is {digest[:12]}...: restore the files, or start another run"
        )


def check_extended_schedule(resume_from: Path, config: Config, num_examples: int) -> str | None:
    """Describe the effect of a longer --epochs or --max-steps on the schedule; None if the length did not change.

    Raises:
        UsageError: the run would become shorter.
    """
    before = Config(**read_config_file(resume_from.parent / "config.json"))
    old, new = (total_steps(num_examples, each) for each in (before, config))
    if new < old:
        names = [name for name in ("epochs", "max_steps") if getattr(before, name) != getattr(config, name)]
        raise UsageError(
            f"{' and '.join(map(flag, names))} would end the run after {counted(new, 'step')}, it was planned for "
            f"{old}: a resumed run can only become longer"
        )
    if new == old:
        return None
    what = "stays as it is" if config.lr_schedule == "constant" else f"now falls to 0 at step {new:,}"
    return (
        f"The run becomes longer: {counted(new, 'step')} instead of {old:,}. From here on the learning rate {what}, as "
        f"if the run had been planned so, while the steps up to here followed the schedule of {old:,}."
    )


def describe_end(state: State, last_step: int) -> str:
    """The reason why a finished run has ended, as a clause."""
    if state.step >= last_step:
        return f"all {last_step:,} steps are done" if last_step > 1 else "its one step is done"
    since_best = state.evaluations_since_best
    last = "evaluation had" if since_best == 1 else f"{since_best:,} evaluations had"
    return (
        f"after step {state.step:,} of {last_step:,}, the last {last} not been better than the best before "
        f"{'it' if since_best == 1 else 'them'} (--early-stopping-patience)"
    )


def is_finished(run: Path, resume_from: Path) -> bool:
    """Whether `final/`, with LoRA `adapter/`, has the weights of this checkpoint, and summary.json is written after it.

    `final/` may be that of a shorter run.
    """
    if not (run / "summary.json").is_file():
        return False
    final, name = run / "final", snapshots.WEIGHTS
    saved = run / "adapter" / ADAPTER_WEIGHTS if is_adapter(resume_from) else final / name
    if not (saved.is_file() and (final / name).is_file()):  # absent, or a FIFO, which would block
        return False
    return has_digest(saved, read_json(resume_from / MANIFEST)["files"][saved.name])
