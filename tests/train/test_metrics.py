"""What a run writes to metrics.jsonl and to the terminal, and what its speeds mean."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ft.train import metrics as report_module
from ft.train.metrics import MetricsLogger

ROOT = Path(__file__).parents[2]
TRAINING_KEYS = ["step", "epoch", "loss", "learning_rate", "grad_norm", "samples_per_second", "tokens_per_second"]
TRAINING_KEYS += ["seconds_by_part"]
FIGURES = {"loss": 0.75, "learning_rate": 2e-5, "grad_norm": 3.5}


class Clock:
    """A clock that moves only when the test advances it."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(report_module.time, "perf_counter", clock)
    return clock


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def open_report(path, first_step=0, metrics_bytes=0, **options):
    return MetricsLogger(path, total_steps=1000, first_step=first_step, metrics_bytes=metrics_bytes, **options)


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_each_event_is_one_line_of_json_with_the_documented_keys(path, clock):
    with open_report(path) as report:
        clock.now += 2
        report.count_step(examples=8, tokens=188)
        report.log_training(100, 0.0937207, **FIGURES)
        report.log_evaluation(100, 0.0937207, loss=0.5, accuracy=0.8125)
        report.log_evaluation(1067, 1.0, loss=0.4, accuracy=0.875, split="test")
    training, evaluation, test = events(path)
    assert list(training) == TRAINING_KEYS
    speeds = {"samples_per_second": 4.0, "tokens_per_second": 94.0, "seconds_by_part": {"training": 2.0}}
    assert training == {"step": 100, "epoch": 0.0937, **FIGURES, **speeds}
    assert evaluation == {"step": 100, "epoch": 0.0937, "eval_loss": 0.5, "eval_accuracy": 0.8125}
    assert test == {"step": 1067, "epoch": 1.0, "test_loss": 0.4, "test_accuracy": 0.875}
    assert path.read_bytes().endswith(b"}\n")


def test_an_event_is_in_the_file_at_once_and_counted(path):
    with open_report(path) as report:
        assert report.metrics_bytes == 0
        for step in range(1, 4):
            report.write(step, 0.5, {"loss": 1.0})
            assert len(events(path)) == step
            assert report.metrics_bytes == path.stat().st_size


def test_figures_are_written_in_full(path, clock):
    with open_report(path) as report:
        clock.now += 1
        report.log_training(1, 0.1, loss=0.1 + 0.2, learning_rate=1 / 3e5, grad_norm=1e-30)
    (event,) = events(path)
    assert (event["loss"], event["learning_rate"], event["grad_norm"]) == (0.1 + 0.2, 1 / 3e5, 1e-30)


@pytest.mark.parametrize("grad_norm", [float("inf"), float("nan")])
def test_a_gradient_that_overflowed_has_no_norm(path, clock, capsys, grad_norm):
    with open_report(path) as report:
        clock.now += 1
        report.log_training(1, 0.1, **{**FIGURES, "grad_norm": grad_norm})
    (event,) = events(path)
    assert list(event) == TRAINING_KEYS
    assert event["grad_norm"] is None
    assert not re.search("NaN|Infinity", path.read_text()), "neither is JSON"
    assert "  grad norm overflow  " in capsys.readouterr().out


def test_a_resumed_run_truncates_the_lines_after_its_checkpoint_and_appends(path):
    with open_report(path) as report:
        report.write(1, 0.1, {"loss": 1.0})
        kept = report.metrics_bytes
        report.write(2, 0.2, {"loss": 2.0})
        report.write(3, 0.3, {"loss": 3.0})
    with open_report(path, first_step=1, metrics_bytes=kept) as report:
        assert report.metrics_bytes == kept
        assert events(path) == [{"step": 1, "epoch": 0.1, "loss": 1.0}]
        report.write(2, 0.2, {"loss": 2.5})
        assert report.metrics_bytes == path.stat().st_size
    assert [(event["step"], event["loss"]) for event in events(path)] == [(1, 1.0), (2, 2.5)]


def test_a_run_from_the_start_drops_every_line(path, clock):
    path.write_text('{"step": 7}\n{"step": ')
    with open_report(path) as report:
        report.write(1, 0.1, {})
    assert events(path) == [{"step": 1, "epoch": 0.1}]


def test_the_file_is_closed_also_after_an_error(path):
    def break_off(report):
        with report:
            report.write(1, 0.1, {})
            raise RuntimeError("broken")

    report = open_report(path)
    with pytest.raises(RuntimeError, match="broken"):
        break_off(report)
    with pytest.raises(ValueError, match="closed"):
        report.write(2, 0.2, {})
    assert len(events(path)) == 1


# --- the speed --------------------------------------------------------------------------------------------------------


def test_the_speed_is_of_the_steps_since_the_last_training_line(path, clock):
    with open_report(path) as report:
        for _ in range(4):
            clock.now += 0.5
            report.count_step(examples=8, tokens=200)
        report.log_training(4, 0.1, **FIGURES)
        clock.now += 10
        report.count_step(examples=3, tokens=50)
        report.log_training(5, 0.2, **FIGURES)
    first, second = events(path)
    assert (first["samples_per_second"], first["tokens_per_second"]) == (4 * 8 / 2, 4 * 200 / 2)
    assert (second["samples_per_second"], second["tokens_per_second"]) == (0.3, 5.0)


def test_the_speed_has_two_decimals(path, clock):
    with open_report(path) as report:
        clock.now += 3
        report.count_step(examples=8, tokens=100)
        report.log_training(1, 0.1, **FIGURES)
    (event,) = events(path)
    assert (event["samples_per_second"], event["tokens_per_second"]) == (2.67, 33.33)


def test_time_spent_in_a_pause_does_not_slow_training_down(path, clock):
    with open_report(path) as report:
        for activity in ("evaluating", "saving"):
            clock.now += 1
            report.count_step(examples=4, tokens=50)
            with report.pause(activity):
                clock.now += 1000
        clock.now += 2
        report.log_training(1, 0.1, **FIGURES)
        with report.pause("evaluating"):  # of the next line's time, not of the last one's
            clock.now += 500
        clock.now += 4
        report.count_step(examples=8, tokens=100)
        report.log_training(2, 0.2, **FIGURES)
        clock.now += 8
        report.count_step(examples=8, tokens=100)
        report.log_training(3, 0.3, **FIGURES)
    assert [event["samples_per_second"] for event in events(path)] == [2.0, 2.0, 1.0]
    assert [event["seconds_by_part"] for event in events(path)] == [
        {"training": 4.0, "evaluating": 1000.0, "saving": 1000.0},
        {"training": 4.0, "evaluating": 500.0},
        {"training": 8.0},
    ]


def test_log_lines_have_the_same_figures(path, clock, capsys):
    with open_report(path) as report:
        clock.now += 2
        report.count_step(examples=9, tokens=100)
        report.log_training(100, 0.09, loss=0.75, learning_rate=2e-5, grad_norm=3.5)
        report.log_evaluation(100, 0.09, loss=0.5, accuracy=0.8125)
        report.log_evaluation(100, 0.09, loss=0.25, accuracy=1.0, split="test")
    assert capsys.readouterr().out.splitlines() == [
        "step    100  epoch  0.09  loss   0.7500  lr 2.00e-05  grad norm    3.500     4.5 examples/s",
        "step    100  epoch  0.09  validation loss 0.5000, accuracy 81.25%",
        "step    100  epoch  0.09  test loss 0.2500, accuracy 100.00%",
    ]


# --- the terminal -----------------------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
from ft.train.metrics import MetricsLogger
with MetricsLogger(Path(sys.argv[1]), total_steps=40, first_step=10, metrics_bytes=0) as report:
    for step in range(11, 41):
        report.count_step(examples=8, tokens=100)
        if step % 10 == 0:
            report.log_training(step, step / 40, loss=0.5, learning_rate=1e-5, grad_norm=1.0)
            with report.pause("evaluating"):
                report.log_evaluation(step, step / 40, loss=0.25, accuracy=0.75)
"""
TRAINING_LINE = r"step +\d+  epoch +\d\.\d\d  loss +0\.5000  lr 1\.00e-05  grad norm +1\.000 +[\d.]+ examples/s"
EVALUATION_LINE = r"step +\d+  epoch +\d\.\d\d  validation loss 0\.2500, accuracy 75\.00%"


def assert_whole_log_lines(lines):
    assert len(lines) == 6
    for training, evaluation in zip(lines[::2], lines[1::2], strict=True):
        assert re.fullmatch(TRAINING_LINE, training)
        assert re.fullmatch(EVALUATION_LINE, evaluation)


def test_without_a_terminal_there_are_complete_lines_and_no_bar(path):
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout
    assert_whole_log_lines(done.stdout.splitlines())


def run_on_a_terminal(path):
    """What the run writes to a terminal of 120 columns."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are a thing of Unix")
    import fcntl
    import struct
    import termios

    terminal, process_side = pty.openpty()
    fcntl.ioctl(process_side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(path)],
        cwd=ROOT,
        env={**os.environ, "TQDM_MININTERVAL": "0"},  # show every step, however fast they come
        stdin=subprocess.DEVNULL,
        stdout=process_side,
        stderr=process_side,
    )
    os.close(process_side)
    written = b""
    try:
        while chunk := os.read(terminal, 65536):
            written += chunk
    except OSError:  # the error of Linux after the last writer has closed
        pass
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    return written.decode()


def screen(written):
    """The lines that stand on a terminal in the end: `\\r` goes back to the start of a line and overwrites it."""
    lines, row, column = [[]], 0, 0
    for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[^\x1b]", written):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            if row == len(lines):
                lines.append([])
        elif token == "\x1b[A":
            row -= 1
        elif token.startswith("\x1b"):
            raise AssertionError(f"unexpected control sequence {token!r}")
        else:
            lines[row] += " " * (column + 1 - len(lines[row]))
            lines[row][column] = token
            column += 1
    return ["".join(line).rstrip() for line in lines]


def test_on_a_terminal_a_bar_follows_the_log_lines_and_breaks_none(path):
    written = run_on_a_terminal(path)
    for step in range(10, 41):
        assert f" {step}/40 " in written, "the bar starts at the step that a resumed run has reached"
    assert "evaluating" in written
    *lines, bar, end = screen(written)
    assert_whole_log_lines(lines)
    assert re.match(r"training: 100%\|.*\| 40/40 \[.*loss 0\.5000, lr 1\.00e-05, [\d.]+ examples/s\]$", bar)
    assert end == ""
    assert [event["step"] for event in events(path)] == [20, 20, 30, 30, 40, 40]


def test_without_a_terminal_nothing_is_written_to_stderr(path, monkeypatch, clock):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with open_report(path) as report:
        clock.now += 1
        report.count_step(examples=8, tokens=100)
        report.log_training(1, 0.1, **FIGURES)
    assert stderr.getvalue() == ""


def test_a_file_that_is_truncated_during_the_run_is_reported_once(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    with open_report(path) as report:
        report.write(1, 0.1, {"loss": 1.0})
        path.write_bytes(b"")
        report.write(2, 0.2, {"loss": 0.5})
        report.write(3, 0.3, {"loss": 0.4})
        assert report.metrics_bytes == path.stat().st_size
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 3]
    assert capsys.readouterr().out.count("was truncated during the run: lines of earlier steps are missing") == 1
