"""A run's folder: what may be written over, what is continued, and what counts as finished."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ft.checkpoint.resume import check_data_unchanged
from ft.checkpoint.store import checkpoints
from ft.checks import field_types, flag
from ft.cli.main import main
from ft.config import NO_FLAGS, Config
from ft.settings import FREE_ON_RESUME, LONGER_ON_RESUME
from ft.train.metrics import MetricsLogger
from ft.train.state import State
from tests.test_config import FIELDS, needed, other_value

SETTINGS = ["--precision", "fp32", "--eval-steps", "4", "--save-steps", "5", "--logging-steps", "3"]


@pytest.fixture
def run(inputs, tmp_path):
    """A finished run of one epoch, 10 steps."""
    assert main([*inputs, *SETTINGS, "--output-dir", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def steps(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def interrupt(monkeypatch, at):
    """Break the run off, as a kill would, when this step has been counted."""

    def step(self, **counts):
        count(self, **counts)
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == at:
            raise KeyboardInterrupt

    count = MetricsLogger.count_step
    monkeypatch.setattr(MetricsLogger, "count_step", step)


def test_a_longer_run_that_is_broken_off_at_its_end_is_not_finished(inputs, run, monkeypatch, capsys):
    short = weights(run / "final")
    longer = [*inputs, *SETTINGS, "--epochs", "2", "--output-dir", str(run), "--resume"]

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ft.report.results.atomic_directory", fail)
        assert main(longer) == 130
    assert weights(run / "final") == short, "the longer run's model was not written"
    capsys.readouterr()
    assert main(longer) == 0
    assert "This run is finished" not in capsys.readouterr().out
    assert weights(run / "final") == weights(run / "checkpoint-20") != short
    assert main(longer) == 0
    assert "This run is finished" in capsys.readouterr().out


def test_resuming_from_an_older_checkpoint_supersedes_later_ones(inputs, run, monkeypatch, capsys):
    longer = [*inputs, *SETTINGS, "--epochs", "2"]
    with monkeypatch.context() as patch:
        interrupt(patch, at=2)
        assert main([*longer, "--resume", str(run / "checkpoint-5"), "--output-dir", str(run)]) == 130
    assert [path.name for path in checkpoints(run)] == ["checkpoint-5"]
    assert (run / ".superseded-checkpoint-10").is_dir(), "deleted only when there is a new one"
    capsys.readouterr()
    assert main([*longer, "--resume", "--output-dir", str(run)]) == 0
    assert "Continuing after step 5" in capsys.readouterr().out
    assert steps(run) == [3, 4, 6, 8, 9, 12, 12, 15, 16, 18, 20, 20, 20]
    assert not list(run.glob(".superseded-*"))


def test_a_run_is_resumed_in_its_own_directory_only(inputs, run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    before = sorted(other.rglob("*"))
    for source in (run, run / "checkpoint-5"):
        assert main([*inputs, *SETTINGS, "--resume", str(source), "--output-dir", str(other)]) == 2
        assert "a run is resumed in its own directory, omit --output-dir" in capsys.readouterr().err
    assert sorted(other.rglob("*")) == before


def test_a_checkpoint_without_its_settings_is_not_continued(inputs, run, tmp_path, capsys):
    (tmp_path / "backup").mkdir()
    shutil.copytree(run / "checkpoint-10", tmp_path / "backup" / "checkpoint-10")
    assert main([*inputs, *SETTINGS, "--resume", str(tmp_path / "backup" / "checkpoint-10")]) == 1
    assert "has no " in capsys.readouterr().err
    shutil.copy(run / "config.json", tmp_path / "backup")
    shutil.copy(run / "metrics.jsonl", tmp_path / "backup")
    assert main(["--resume", str(tmp_path / "backup" / "checkpoint-10")]) == 0
    assert weights(tmp_path / "backup" / "final") == weights(run / "final")


def test_the_copy_of_the_data_does_not_stand_in_the_way_of_a_resume(inputs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, at=7)
        copy = ["--save-dataset", str(tmp_path / "copy")]
        assert main([*inputs, *SETTINGS, *copy, "--output-dir", str(run)]) == 130
    assert main(["--resume", str(run)]) == 0
    assert (run / "final").is_dir()


def test_a_resume_on_other_rows_under_the_same_name_is_refused(inputs, tmp_path, monkeypatch, capsys):
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(inputs[inputs.index("--dataset") + 1], data)
    with monkeypatch.context() as patch:
        interrupt(patch, at=7)
        assert main([*inputs, *SETTINGS, "--dataset", str(data), "--output-dir", str(run)]) == 130
    rows = pq.read_table(data / "train.parquet")
    pq.write_table(rows.take([*range(1, len(rows)), 0]), data / "train.parquet")
    capsys.readouterr()
    assert main(["--resume", str(run)]) == 1
    assert re.search("error: the data are not those of .*checkpoint-5, although the flags are", capsys.readouterr().err)
    pq.write_table(rows, data / "train.parquet")
    assert main(["--resume", str(run)]) == 0


def test_a_checkpoint_without_a_digest_of_the_data_is_resumed():
    check_data_unchanged(Path("checkpoint-1"), State(), "0" * 64)


def test_the_demo_does_not_replace_a_real_run(run, capsys):
    before = weights(run / "final")
    assert main(["--demo", "--output-dir", str(run)]) == 2
    assert "--overwrite replaces that run" in capsys.readouterr().err
    assert weights(run / "final") == before


def test_a_configuration_is_old_or_new_and_never_half(run, monkeypatch):

    before = (run / "config.json").read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space"):
            Config(seed=7).save(run / "config.json")
    assert (run / "config.json").read_bytes() == before


def test_a_second_run_in_a_directory_is_refused(inputs, run, capsys):
    from ft.io.lock import locked

    with locked(run):
        assert main([*inputs, *SETTINGS, "--output-dir", str(run), "--resume"]) == 1
    assert "another run is using" in capsys.readouterr().err


def test_fp16_without_clipping(inputs, tmp_path):
    flags = ["--precision", "fp16", "--max-grad-norm", "0", "--output-dir", str(tmp_path / "run")]
    assert main([*inputs, *flags]) == 0


def test_every_flag_that_changes_the_weights_is_refused_on_resume(inputs, run, capsys, monkeypatch):
    monkeypatch.setattr("ft.setup.require_cuda", lambda device: None)  # which refuses --cuda-graphs before
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    recorded = json.loads((run / "config.json").read_text())
    # Every setting but those that are free; the demo brings a model and data of its own along.
    names = [name for name in FIELDS if name not in (*FREE_ON_RESUME, *LONGER_ON_RESUME, *NO_FLAGS, "demo")]
    for name in names:
        value = next((choice for choice in field_types(Config)[name][1] if choice != recorded[name]), other_value(name))
        words = {bool: [], tuple: list(value) if isinstance(value, tuple) else []}.get(type(value), [str(value)])
        words += ["--completion-column", "c"] if name == "prompt_column" else []
        words += [word for needs, number in needed(name).items() for word in (flag(needs), str(number))]
        capsys.readouterr()
        assert main(["--resume", str(run), flag(name), *words]) == 2, name
        error = capsys.readouterr().err
        assert re.search(rf"^error: {flag(name)} +was .* and would be {re.escape(repr(value))}$", error, re.M), error
        assert "--resume continues the same run: omit these flags, or start another run" in error
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_does_not_write_through_a_link(inputs, run, tmp_path, capsys):
    mine = tmp_path / "mine"
    (run / "metrics.jsonl").rename(mine)
    (run / "metrics.jsonl").symlink_to(mine)
    before = mine.read_bytes()
    assert main([*inputs, *SETTINGS, "--epochs", "2", "--output-dir", str(run), "--resume"]) == 1
    assert f"{run / 'metrics.jsonl'} is a link" in capsys.readouterr().err
    assert mine.read_bytes() == before
