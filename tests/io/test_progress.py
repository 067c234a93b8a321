"""The bar and the time left: what is estimated, what a terminal shows, and that a file gets no control characters."""

import subprocess
import sys
from pathlib import Path

import pytest

import ft
from ft.cli.main import main
from ft.config import Config
from ft.io import progress
from ft.io.progress import RunBar, TimeLeft
from ft.train.schedule import planned_work, times_due
from tests.train.test_metrics import Clock, open_report, screen

ROOT = Path(__file__).parents[2]


def test_a_run_of_even_work_is_estimated_exactly():
    left = TimeLeft({"training": 100, "evaluating": 50, "saving": 4})
    for _ in range(40):
        left.count("training", 1, 0.5)
    assert left.seconds() == pytest.approx(30.0), "what has not been measured is not in the estimate"
    left.count("evaluating", 10, 2.0)
    left.count("saving", 1, 3.0)
    assert left.seconds() == pytest.approx(60 * 0.5 + 40 * 0.2 + 3 * 3.0)


def test_before_the_first_step_there_is_no_estimate():
    left = TimeLeft({"training": 100})
    assert left.seconds() is None
    left.count("evaluating", 10, 2.0)
    assert left.seconds() is None


def test_a_slow_first_step_fades():
    left = TimeLeft({"training": 1001})
    left.count("training", 1, 60.0)  # compiles
    for _ in range(200):
        left.count("training", 1, 0.1)
    assert left.seconds() == pytest.approx(80.0, rel=0.01)


def test_more_work_than_planned_leaves_none():
    left = TimeLeft({"training": 1, "saving": 1})
    for _ in range(3):
        left.count("training", 1, 1.0)
        left.count("saving", 1, 1.0)
    assert left.seconds() == 0


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(("first", "last"), [(0, 1), (0, 10), (5, 10), (6, 21), (10, 10), (99, 201)])
def test_the_planned_times_are_those_of_the_loop(every, first, last):
    assert times_due(every, first, last) == sum(s % every == 0 or s == last for s in range(first + 1, last + 1))


@pytest.mark.parametrize("windows", [0, 7])
def test_the_planned_work_is_that_of_a_run(windows):
    examples = {"train": [0] * 80, "validation": [0] * 20, "test": [0] * 5}
    config = Config(batch_size=8, epochs=2, eval_steps=6, save_steps=10)
    planned = planned_work(config, examples, windows, step=0)
    assert planned == {"evaluating": 4 * 20 + 5, "general text": 4 * windows, "saving": 2}
    assert planned_work(config, examples, windows, step=10)["evaluating"] == 3 * 20 + 5


def test_the_time_left_has_evaluations_and_saves(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", clock)
    with open_report(tmp_path / "metrics.jsonl", planned={"evaluating": 40, "saving": 2}) as report:
        for _ in range(10):
            clock.now += 0.5
            report.count_step(examples=8, tokens=100)
        with report.pause("evaluating", units=20) as count:
            for _ in range(4):
                clock.now += 1.0
                count(5)
                before = report._time_left.seconds()
        with report.pause("saving"):
            clock.now += 3.0
        assert before == pytest.approx(990 * 0.5 + 20 * 0.2)
        assert report._time_left.seconds() == pytest.approx(990 * 0.5 + 20 * 0.2 + 3.0)


def test_the_bar_advances_during_an_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ft.train.metrics.can_show_bar", lambda: True)
    monkeypatch.setattr(progress, "_REFRESH_SECONDS", 0)
    with open_report(tmp_path / "metrics.jsonl") as report:
        report.count_step(examples=8, tokens=100)
        with report.pause("evaluating", units=20) as count:
            for _ in range(4):
                count(5)
    written = capsys.readouterr().err
    assert [written.count(f"evaluating {share}%: ") for share in (25, 50, 75, 100)] == [1, 1, 1, 1]
    assert "training: " in screen(written)[-2]


def test_a_bar_that_is_not_shown_writes_nothing(capsys):
    bar = RunBar(total=3, initial=0, time_left=TimeLeft({"training": 3}), is_shown=False)
    bar.show_activity("evaluating", 1, 2)
    bar.update()
    bar.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("progress_flag", "is_shown"), [(True, True), (False, False)])
def test_predict_and_evaluate_show_a_bar_on_a_terminal_only(
    progress_flag, is_shown, inputs, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    assert main([*inputs, "--max-steps", "1", "--output-dir", str(run)]) == 0
    monkeypatch.setattr(progress, "can_show_bar", lambda: progress_flag)
    capsys.readouterr()
    for words in (["evaluate", str(run), "--split", "train", "--batch-size", "7"], ["predict", str(run), "a", "b"]):
        assert main([*words, "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        assert "\r" not in out
        assert ("\r" in err) == is_shown
        assert ("/77 [" in err) == (is_shown and words[0] == "evaluate")


def test_every_text_is_counted_once(inputs):
    counted = []
    model = ft.load(inputs[1], device="cpu", label_names=["neg", "pos"])
    model.predict(["a", "b c", "d"] * 5, 4, counted.append)
    assert counted == [4, 4, 4, 3]


def test_in_a_notebook_there_is_a_bar_without_a_terminal():
    """With the modules and the shell of a kernel."""
    code = """
import sys, types
sys.modules["ipykernel.zmqshell"] = types.ModuleType("zmqshell")
ipython = types.ModuleType("IPython"); sys.modules["IPython"] = ipython
ipython.get_ipython = lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
import tqdm.notebook
tqdm.notebook.IProgress = object
from ft.io.progress import can_show_bar
print(can_show_bar())
"""
    run = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "True\n", done.stderr
