"""Saving beside the training, and what a run does when the disk refuses."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ft.checkpoint import snapshot as snapshots
from ft.checkpoint import store
from ft.checkpoint.async_writer import AsyncWriter
from ft.checkpoint.snapshot import load_training_state, take_snapshot
from ft.checkpoint.store import checkpoints, verify_checkpoint, write_checkpoint
from ft.cli.main import main
from ft.io import atomic, plain_files
from ft.model import pretrained
from ft.model.gpt2 import GPT2, GPT2Config
from ft.train.optim import build_optimizer
from ft.train.state import State

ROOT = Path(__file__).parents[2]
SETTINGS = ["--precision", "fp32", "--epochs", "2", "--eval-steps", "4", "--save-steps", "5", "--logging-steps", "3"]
FULL = OSError(28, "No space left on device")


class Step:
    """Stands for a snapshot."""

    def __init__(self, step):
        self.state = State(step=step)


def test_training_continues_during_a_write_and_waits_before_the_next():
    written, lines, may_end = [], [], threading.Event()

    def write(snapshot):
        assert may_end.wait(30)
        written.append(snapshot.state.step)

    saver = AsyncWriter(write, lines.append, blocking=False)
    saver.save(Step(1))
    assert written == [], "the call returned before the write ended"
    threading.Timer(0.05, may_end.set).start()
    saver.save(Step(2))
    assert written[0] == 1, "one at a time"
    saver.wait()
    assert (written, lines, saver.failure) == ([1, 2], [], None)


def test_all_ranks_defer_a_save_alike_and_report_it_once_per_write(monkeypatch):
    """Rank 0 writes; the others do what it says."""
    from types import SimpleNamespace

    from ft import session

    agreed, lines, may_end = [], [], threading.Event()

    def agree(number):
        agreed.append(number)
        return answer

    monkeypatch.setattr(session, "read_synchronizes", lambda device: True)
    rank = object.__new__(session.Session)
    rank._writer = AsyncWriter(lambda snapshot: may_end.wait(30), print, blocking=False)
    rank._report = SimpleNamespace(print_line=lines.append)
    rank._newest_save, rank._has_reported_deferral = 100, False
    rank._components = SimpleNamespace(
        precision=SimpleNamespace(device=None), ranks=SimpleNamespace(all_reduce_max=agree)
    )
    for answer, step in ((0, 199), (1, 200), (1, 201)):
        assert rank.defers_save(State(step=step)) == bool(answer)
    rank._writer.save(Step(100))
    assert rank.defers_save(State(step=202))
    may_end.set()
    rank._writer.wait()
    rank.defers_save(State(step=203))
    assert agreed == [0, 0, 0, 1, 0]
    assert lines == ["step    200  its checkpoint is deferred: that of step 100 is being written"]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Steps do not wait for saves, and the checkpoints of some steps are written until a later step is logged."""
    from ft import session

    ends_at, progress, changed = {}, {"step": 0}, threading.Condition()

    def write_checkpoint(run, snapshot, *arguments, **keywords):
        if step := ends_at.get(snapshot.state.step):
            with changed:
                assert changed.wait_for(lambda: progress["step"] >= step, 120)
        write(run, snapshot, *arguments, **keywords)

    def training(self, step, *arguments, **keywords):
        log(self, step, *arguments, **keywords)
        with changed:
            progress["step"] = step
            changed.notify_all()
        if step in ends_at.values():
            while any(saver.is_writing for saver in savers):
                time.sleep(0.001)

    def save(self, snapshot):
        savers.append(self)
        start(self, snapshot)

    savers, start = [], AsyncWriter.save
    monkeypatch.setattr(AsyncWriter, "save", save)
    write, log = store.write_checkpoint, session.MetricsLogger.log_training
    monkeypatch.setattr(session, "read_synchronizes", lambda device: True)
    monkeypatch.setattr(store, "write_checkpoint", write_checkpoint)
    monkeypatch.setattr(session.MetricsLogger, "log_training", training)
    return ends_at


EVERY_STEP = ["--precision", "fp32", "--epochs", "2", "--eval-steps", "4", "--save-steps", "5", "--logging-steps", "1"]


def test_a_save_that_comes_due_while_one_is_written_is_made_later(inputs, tmp_path, as_on_a_gpu, capsys):
    """That of step 10 when the one of step 5 is written, after step 12; the last one in any case."""
    as_on_a_gpu.update({5: 12, 12: 14, 15: 18})
    run = tmp_path / "run"
    assert main([*inputs, *EVERY_STEP, "--keep-checkpoints", "9", "--output-dir", str(run)]) == 0
    assert [path.name for path in checkpoints(run)] == [f"checkpoint-{step}" for step in (5, 12, 15, 20)]
    output = capsys.readouterr().out
    assert output.count("deferred") == 1
    assert "step     10  its checkpoint is deferred: that of step 5 is being written\n" in output


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_resumes_from_a_deferred_checkpoint_to_the_same_bits(inputs, tmp_path, as_on_a_gpu, capsys, precision):
    flags = [*inputs, *EVERY_STEP, "--keep-checkpoints", "9", "--precision", precision]
    baseline, run = tmp_path / "baseline", tmp_path / "run"
    assert main([*flags, "--save-blocking", "--output-dir", str(baseline)]) == 0
    as_on_a_gpu.update({5: 12})
    assert main([*flags, "--output-dir", str(run)]) == 0
    as_on_a_gpu.clear()
    assert main(["--resume", str(run / "checkpoint-12")]) == 0
    assert "Continuing after step 12" in capsys.readouterr().out
    for name in ("model", "optimizer", "rng"):
        file = f"checkpoint-20/{name}.safetensors"
        assert (run / file).read_bytes() == (baseline / file).read_bytes()
    assert_same_metrics(run, baseline)


def test_the_best_checkpoint_is_never_deferred(inputs, tmp_path, as_on_a_gpu, monkeypatch):
    """Its weights are those that were evaluated; the save of step 5, still being written, is waited for."""
    from ft import session
    from ft.evaluation.evaluate import Evaluation

    accuracies = iter([0.5, 0.9, 0.6, 0.6, 0.6, 0.6])  # after steps 4, 8, 12, 16 and 20, and on the test split
    monkeypatch.setattr(session, "evaluate", lambda *_, **__: Evaluation(0.5, next(accuracies)))
    run, is_waited_for = tmp_path / "run", threading.Event()

    def write_checkpoint(run, snapshot, *arguments, **keywords):
        if snapshot.state.step == 5:
            assert is_waited_for.wait(30)
        write(run, snapshot, *arguments, **keywords)

    def wait(self):
        if self._written is not None:  # that of step 5
            is_waited_for.set()
        original(self)

    write, original = store.write_checkpoint, AsyncWriter.wait
    monkeypatch.setattr(store, "write_checkpoint", write_checkpoint)
    monkeypatch.setattr(AsyncWriter, "wait", wait)
    assert main([*inputs, *EVERY_STEP, "--keep-best", "--keep-checkpoints", "1", "--output-dir", str(run)]) == 0
    assert [path.name for path in checkpoints(run)] == ["checkpoint-8", "checkpoint-20"]
    assert json.loads((run / "checkpoint-8" / "state.json").read_text())["best_step"] == 8


def test_a_blocking_save_has_ended_when_it_returns():
    written = []
    AsyncWriter(lambda snapshot: written.append(threading.current_thread()), print, blocking=True).save(Step(1))
    assert written


def test_a_failed_write_is_reported_and_the_next_save_tries_again():
    errors, lines = [FULL, None], []

    def write(snapshot):
        if error := errors.pop(0):
            raise error

    saver = AsyncWriter(write, lines.append, blocking=False)
    saver.save(Step(1))
    saver.wait()
    assert saver.failure is FULL
    assert lines == [
        "WARNING: checkpoint 1 could not be written: No space left on device. The run continues and tries again at the "
        "next one; earlier checkpoints are not affected."
    ]
    saver.save(Step(2))
    saver.wait()
    assert saver.failure is None


def test_a_defect_in_the_thread_is_raised_in_the_run():
    def write(snapshot):
        raise ZeroDivisionError("a defect")

    saver = AsyncWriter(write, print, blocking=False)
    saver.save(Step(1))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        saver.wait()
    saver.wait()


def test_a_snapshot_does_not_follow_the_training(demo_inputs, tmp_path):
    folder, _ = demo_inputs
    published = plain_files.read_json(folder / "config.json")
    model = GPT2(GPT2Config.from_dict(published))
    model.init_weights(1)
    optimizer, scaler = build_optimizer(model, 1e-3, 0.0), torch.amp.GradScaler("cpu", enabled=False)
    state = State(step=3)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    snapshot = take_snapshot(model, optimizer, scaler, state, copy=True)
    state.step = 4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
            optimizer.state[parameter]["exp_avg"].add_(1.0)
    source = store.ModelSource(published, (folder / "tokenizer.json").read_bytes(), ("neg", "pos"), {})
    write_checkpoint(tmp_path, snapshot, source, keep=1, keep_best=False)
    pretrained.load_weights(model, [tmp_path / "checkpoint-3" / snapshots.WEIGHTS])
    assert load_training_state(tmp_path / "checkpoint-3", model, optimizer, scaler) == State(step=3)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    assert all((state["exp_avg"] == 0).all() for state in optimizer.state.values())


@pytest.mark.parametrize("blocking", [[], ["--save-blocking"]])
def test_a_failed_save_does_not_stop_training(inputs, tmp_path, monkeypatch, capsys, blocking):
    calm, run = tmp_path / "calm", tmp_path / "run"
    assert main([*inputs, *SETTINGS, "--output-dir", str(calm)]) == 0
    seen = []

    def write_manifest(self):
        seen.append(1)
        if len(seen) in (1, 3):
            raise FULL
        original(self)

    original = atomic.StagedDirectory.write_manifest
    monkeypatch.setattr(atomic.StagedDirectory, "write_manifest", write_manifest)
    capsys.readouterr()
    assert main([*inputs, *SETTINGS, *blocking, "--output-dir", str(run)]) == 0
    output = capsys.readouterr().out
    assert "WARNING: checkpoint 5 could not be written: No space left on device." in output
    assert "WARNING: checkpoint 15 could not be written" in output
    assert [path.name for path in checkpoints(run)] == ["checkpoint-10", "checkpoint-20"]
    last = "checkpoint-20/optimizer.safetensors"
    assert (run / last).read_bytes() == (calm / last).read_bytes()


def test_a_last_save_that_fails_is_a_failure_and_the_one_before_stays(inputs, tmp_path, monkeypatch, capsys):
    seen = []

    def write_manifest(self):
        seen.append(1)
        if len(seen) == 4:
            raise FULL
        original(self)

    original = atomic.StagedDirectory.write_manifest
    with monkeypatch.context() as patch:
        patch.setattr(atomic.StagedDirectory, "write_manifest", write_manifest)
        assert main([*inputs, *SETTINGS, "--output-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "the last checkpoint could not be written (No space left on device)" in error
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-10", "checkpoint-15"]
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert all(verify_checkpoint(path) is None for path in checkpoints(tmp_path / "run"))


def test_a_deleted_directory_does_not_stop_training(inputs, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    def vanish(*arguments, **keywords):
        seen.append(1)
        while len(seen) == 2 and run.exists():  # files may appear while it is deleted: a checkpoint is being written
            shutil.rmtree(run, ignore_errors=True)
        return original(*arguments, **keywords)

    from ft import session
    from ft.evaluation import evaluate

    original, seen = evaluate.evaluate, []
    monkeypatch.setattr(session, "evaluate", vanish)
    assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == 0
    assert (run / "final" / "model.safetensors").exists()
    assert [path.name for path in checkpoints(run)] == ["checkpoint-15", "checkpoint-20"]


LIMITED = """
import resource, sys
from ft.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def test_a_file_size_limit_is_reported_and_does_not_end_the_run(inputs, tmp_path):
    run = tmp_path / "run"
    weights = (Path(inputs[1]) / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", LIMITED, str(weights + 5000), *inputs, *SETTINGS, "--output-dir", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.count("could not be written: File too large.") == 4
    assert done.returncode == 1
    assert "the last checkpoint could not be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoints(run) == []
    assert (run / "final" / "model.safetensors").exists(), "the finished model is smaller than the limit"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_disk_space_is_reported_and_a_disk_without_it_is_an_error(inputs, tmp_path, monkeypatch, capsys):
    from ft.checkpoint import run_dir

    arguments = [*inputs, *SETTINGS, "--output-dir", str(tmp_path / "run")]
    usage = shutil.disk_usage(tmp_path)
    each = 12 * 1_000_000 / 1e9
    parameters = 1_000_000
    monkeypatch.setattr(run_dir.shutil, "disk_usage", lambda path: usage._replace(free=int(2 * each * 1e9)))
    from ft.config import Config

    text = run_dir.check_disk_space(tmp_path, parameters, parameters, Config())
    assert text == (
        "Disk: a checkpoint takes 12.0 MB, all that are kept at most 40.0 MB; 24.0 MB are free. WARNING: that is too "
        "little; saves will fail when the disk is full."
    )
    monkeypatch.setattr(run_dir.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "has 0.0 MB free, a checkpoint and the final model need" in error
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_is_kept(inputs, tmp_path, monkeypatch):
    from ft import session
    from ft.evaluation.evaluate import Evaluation

    # By accuracy, then by loss; the seventh is that of the last step, the eighth that of the test split.
    results = iter([(0.9, 0.5), (0.8, 0.7), (0.7, 0.7), (0.7, 0.7), (0.5, 0.6), (0.9, 0.7), (0.1, 0.2), (0.1, 0.9)])
    monkeypatch.setattr(session, "evaluate", lambda *_, **__: Evaluation(*next(results)))
    run = tmp_path / "run"
    flags = ["--keep-best", "--keep-checkpoints", "1", "--eval-steps", "3", "--output-dir", str(run)]
    assert main([*inputs, *SETTINGS, *flags]) == 0
    assert [path.name for path in checkpoints(run)] == ["checkpoint-9", "checkpoint-20"]
    state = json.loads((run / "checkpoint-20" / "state.json").read_text())
    assert (state["best_step"], state["best_accuracy"], state["best_loss"]) == (9, 0.7, 0.7)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
@pytest.mark.parametrize("forbidden", [False, True])
def test_the_thread_that_writes_has_a_lower_priority_than_training(monkeypatch, forbidden):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    if forbidden:
        monkeypatch.setattr(os, "setpriority", refuse)
    before, seen = os.getpriority(os.PRIO_PROCESS, 0), []
    saver = AsyncWriter(lambda snapshot: seen.append(os.getpriority(os.PRIO_PROCESS, 0)), print, blocking=False)
    saver.save(Step(1))
    saver.wait()
    assert seen == [before if forbidden else max(before, 10)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before, "that of training"
    assert saver.failure is None


def test_metrics_that_a_full_disk_does_not_take_are_written_later(inputs, tmp_path, monkeypatch, capsys):
    from ft.train.metrics import MetricsLogger

    calm, run = tmp_path / "calm", tmp_path / "run"
    assert main([*inputs, *SETTINGS, "--output-dir", str(calm)]) == 0

    class FullFor:
        """A file on a disk that is full for some writes, and takes only half of the next one."""

        def __init__(self, file):
            self.file, self.writes = file, 0

        def write(self, data):
            self.writes += 1
            if 2 <= self.writes <= 6:
                raise FULL
            return self.file.write(data[: len(data) // 2 + 1])

        def __getattr__(self, name):
            return getattr(self.file, name)

    def init(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        self._file = FullFor(self._file)

    original = MetricsLogger.__init__
    monkeypatch.setattr(MetricsLogger, "__init__", init)
    capsys.readouterr()
    assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == 0
    assert "WARNING: checkpoint 5 could not be written: No space left on device." in capsys.readouterr().out
    assert [path.name for path in checkpoints(run)] == ["checkpoint-15", "checkpoint-20"]
    assert_same_metrics(run, calm)


def assert_same_metrics(run, calm):
    from tests.integration.test_kill import metrics_without_clock

    assert metrics_without_clock(run) == metrics_without_clock(calm)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs to know which file is flushed")
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "a flipped bit"),
        ("optimizer.safetensors", "a lost block"),
        ("rng.safetensors", "a torn file"),
        ("state.json", "a flipped bit"),
    ],
)
def test_what_a_bad_disk_changes_is_found_on_resume_and_the_checkpoint_before_is_taken(
    inputs, tmp_path, monkeypatch, capsys, name, damage
):
    run = tmp_path / "run"

    def fsync_on_a_bad_disk(descriptor):
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(f"checkpoint-20/{name}"):
            content = bytearray(Path(path).read_bytes())
            middle = len(content) // 2
            if damage == "a flipped bit":
                content[middle] ^= 1
            elif damage == "a lost block":
                content[middle : middle + 512] = bytes(len(content[middle : middle + 512]))
            else:
                del content[middle:]
            Path(path).write_bytes(content)
            damaged.append(path)

    fsync, damaged = os.fsync, []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync_on_a_bad_disk)
        assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == 0
    assert len(damaged) == 1
    expected = (run / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "final")
    capsys.readouterr()
    assert main(["--resume", str(run)]) == 0
    output = capsys.readouterr().out
    assert f"WARNING: {run / 'checkpoint-20'} is damaged and ignored: {name} has " in output
    assert "Continuing after step 15" in output
    assert verify_checkpoint(run / "checkpoint-20") is None
    assert (run / "final" / "model.safetensors").read_bytes() == expected


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_the_save(inputs, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    def rename(self, target):
        if self.name == "checkpoint-5":
            raise PermissionError(1, "Operation not permitted")
        return original(self, target)

    original = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == 0
    assert "could not be written" not in capsys.readouterr().out
    assert [path.name for path in checkpoints(run)] == ["checkpoint-5", "checkpoint-15", "checkpoint-20"]
