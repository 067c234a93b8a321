"""Signals stop a run after the current step, which is saved, and the run resumes from there exactly."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ft import session
from ft.checkpoint.store import checkpoints
from ft.cli.main import main
from ft.io.atomic import StagedDirectory
from ft.train.metrics import MetricsLogger
from ft.train.signals import StopRequest
from tests.integration.test_kill import assert_same_end, assert_same_figures

ROOT = Path(__file__).parents[2]
SETTINGS = ["--precision", "fp32", "--epochs", "2", "--eval-steps", "4", "--save-steps", "5", "--logging-steps", "3"]
SIGNALS = pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])


@pytest.fixture
def calm(inputs, tmp_path):
    assert main([*inputs, *SETTINGS, "--output-dir", str(tmp_path / "calm")]) == 0
    return tmp_path / "calm"


def resume_and_compare(inputs, run, calm, capsys, compare=assert_same_end):
    capsys.readouterr()
    assert main([*inputs, *SETTINGS, "--output-dir", str(run), "--resume"]) == 0
    output = capsys.readouterr().out
    compare(run, calm, 20)
    return output


@SIGNALS
@pytest.mark.parametrize("step", [1, 7, 8, 20])
def test_a_signal_ends_the_run_after_its_step(inputs, calm, tmp_path, monkeypatch, capfd, name, status, step):
    def step_and_signal(self, **counts):
        count(self, **counts)
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), getattr(signal, name))

    count, steps = MetricsLogger.count_step, []
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "count_step", step_and_signal)
        assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == status
    error = capfd.readouterr().err
    assert f"{name}: finishing this step and saving" in error
    assert f"Stopped after step {step}. To continue: python run.py --resume {run}" in error
    assert "Traceback" not in error
    assert not (run / "final").exists()
    assert f"Continuing after step {step}," in resume_and_compare(inputs, run, calm, capfd)


@SIGNALS
def test_a_signal_in_an_evaluation_leaves_it_for_the_resumed_run(
    inputs, calm, tmp_path, monkeypatch, capfd, name, status
):
    def evaluate(*arguments, stop_requested, **keywords):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return original(*arguments, stop_requested=stop_requested, **keywords)

    original, calls = session.evaluate, []
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(session, "evaluate", evaluate)
        assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == status
    assert json.loads((run / "checkpoint-8" / "state.json").read_text())["evaluation_due"] is True
    evaluated = [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "eval" in line
    ]
    assert evaluated == [4]
    resume_and_compare(inputs, run, calm, capfd)


@pytest.mark.parametrize("number", [5, 6], ids=["of the last step", "of the test split"])
def test_a_signal_in_the_last_evaluations(inputs, calm, tmp_path, monkeypatch, capfd, number):
    def evaluate(*arguments, **keywords):
        seen.append(1)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **keywords)

    original, seen = session.evaluate, []
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(session, "evaluate", evaluate)
        assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == 143
    resume_and_compare(inputs, run, calm, capfd)


@SIGNALS
@pytest.mark.parametrize("blocking", [[], ["--save-blocking"]], ids=["background", "blocking"])
def test_a_signal_in_a_save(inputs, calm, tmp_path, monkeypatch, capfd, name, status, blocking):
    def write_manifest(self):
        if self.path.name == ".unfinished-checkpoint-10":
            os.kill(os.getpid(), getattr(signal, name))
        original(self)

    original = StagedDirectory.write_manifest
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(StagedDirectory, "write_manifest", write_manifest)
        assert main([*inputs, *SETTINGS, *blocking, "--output-dir", str(run)]) == status
    saved = [path.name for path in checkpoints(run)]
    assert "checkpoint-10" in saved or not blocking, "the current save is completed, too"
    assert f"Stopped after step {saved[-1].removeprefix('checkpoint-')}." in capfd.readouterr().err
    resume_and_compare(inputs, run, calm, capfd, assert_same_figures)


def test_several_signals_are_one(inputs, tmp_path, monkeypatch, capfd):
    def step_and_signals(self, **counts):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLogger, "count_step", step_and_signals)
    assert main([*inputs, *SETTINGS, "--output-dir", str(tmp_path / "run")]) == 130
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


TWICE = """
import os, signal, time
from ft.train.signals import StopRequest
with StopRequest() as stop_requested:
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", stop_requested(), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
"""


def test_a_second_ctrl_c_leaves_at_once():
    done = subprocess.run(
        [sys.executable, "-c", TWICE], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (130, "still here True\n")
    assert "Ctrl-C again: leave at once" in done.stderr
    assert "Traceback" not in done.stderr


NEVER_SAVES_STEP_10 = """
import os, sys, time
from ft.cli.main import main
fsync = os.fsync

def fsync_that_hangs(descriptor):
    if "unfinished-checkpoint-10" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(600)
    fsync(descriptor)

os.fsync = fsync_that_hangs
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs to know which file is forced to the disk")
@pytest.mark.parametrize("blocking", [[], ["--save-blocking"]], ids=["background", "blocking"])
def test_a_second_ctrl_c_during_a_save_exits_at_once_and_keeps_checkpoints(inputs, calm, tmp_path, capfd, blocking):
    run = tmp_path / "run"
    arguments = [*inputs, *SETTINGS, *blocking, "--output-dir", str(run)]
    command = [sys.executable, "-c", NEVER_SAVES_STEP_10, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (run / ".unfinished-checkpoint-10").is_dir():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert "Ctrl-C again: leave at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert [path.name for path in checkpoints(run)] == ["checkpoint-5"]
    assert "Continuing after step 5," in resume_and_compare(inputs, run, calm, capfd)


def test_handlers_are_put_back_and_other_threads_ask_for_none():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop_requested:
        assert signal.getsignal(signal.SIGTERM) != before
        assert not stop_requested()
    assert signal.getsignal(signal.SIGTERM) == before
    errors = []

    def work():
        try:
            with StopRequest() as stop_requested:
                assert not stop_requested()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def test_a_signal_during_the_all_reduce_stops_all_ranks_at_the_next_one(capfd):
    numbers = []

    def agree(number):
        numbers.append(number)
        if len(numbers) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # which lets the handler run
        return number

    with StopRequest(agree) as stop_requested:
        assert not stop_requested()  # as the other ranks know
        assert stop_requested()
    assert numbers == [0, signal.SIGTERM]


def test_a_signal_to_another_process_stops_this_one_with_the_same_status():
    with StopRequest(all_reduce_max=lambda number: max(number, signal.SIGUSR1)) as stop_requested:
        assert stop_requested()
        assert stop_requested.stopped("").status == 128 + signal.SIGUSR1


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130)])
@pytest.mark.parametrize("command", ["fine_tune", "report"])
def test_a_signal_before_the_first_step_ends_the_program_with_a_message(
    inputs, tmp_path, monkeypatch, capsys, name, status, command
):
    """Also while PyTorch is being imported, which takes a second."""

    def import_module(module):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("ft.cli.main.import_module", import_module)
    run = str(tmp_path / "run")
    assert main([*inputs, "--output-dir", run] if command == "fine_tune" else ["report", run]) == status
    by = "" if name == "SIGINT" else f" by {name}"
    advice = "; --resume continues from the newest checkpoint" if command == "fine_tune" else ""
    assert capsys.readouterr().err == f"\ninterrupted{by}{advice}\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_after_the_last_step_leaves_the_run_to_be_finished(inputs, tmp_path, monkeypatch, capsys):
    def kill(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("ft.report.results.atomic_directory", kill)
        assert main([*inputs, "--max-steps", "2", "--output-dir", str(run)]) == 143
    assert "interrupted by SIGTERM; --resume continues" in capsys.readouterr().err
    assert not (run / "final").exists()
    assert main(["--resume", str(run)]) == 0
    assert (run / "final" / "model.safetensors").is_file()


SIGNAL_DURING_IMPORT = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "ft.cli.main":
            os.kill(os.getpid(), signal.SIGUSR1)
sys.meta_path.insert(0, Finder())
sys.argv = ["run.py", "--help"]
runpy.run_path("run.py", run_name="__main__")
"""


def test_a_signal_while_the_program_is_imported_ends_it_with_a_message():
    command = [sys.executable, "-c", SIGNAL_DURING_IMPORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGUSR1
    assert done.stderr == "\ninterrupted by SIGUSR1\n"
