"""--profile: a trace that other tools read, of the steps that the message names; a file that cannot be written."""

import contextlib
import gzip
import json
import os
import re

import pytest
import torch

from ft.cli.main import main
from ft.errors import UsageError
from ft.train.profiler import ACTIVE, WAIT, WARM_UP, require_writable, trace_steps


def events_of(path):
    """The complete events of Chrome's trace format, as chrome://tracing and Perfetto read it."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events = json.loads(content)["traceEvents"]
    assert all(event["ph"] in "XsftiMBEbe" for event in events)
    return [event for event in events if event["ph"] == "X"]


@pytest.mark.parametrize(
    ("first", "last", "traced"),
    [
        (0, 100, range(12, 15)),
        (50, 100, range(62, 65)),
        (0, 14, range(12, 15)),
        (0, 5, range(3, 6)),
        (7, 9, range(9, 10)),
    ],
)
def test_the_trace_has_the_steps_that_the_message_names(first, last, traced, tmp_path):
    path, lines = tmp_path / "trace.json", []
    x = torch.zeros(3)
    with trace_steps(path, first, last, lines.append) as after_step:
        for step in range(first + 1, last + 1):
            with torch.profiler.record_function(f"step {step}"):
                x.add_(1)
            after_step()
    names = [event["name"] for event in events_of(path)]
    assert [name for name in names if re.fullmatch(r"step \d+", name)] == [f"step {step}" for step in traced]
    assert names.count("aten::add_") == len(traced)
    steps = f"the steps {traced[0]} to {traced[-1]}" if len(traced) > 1 else f"step {traced[0]}"
    assert lines[0].startswith(f"Trace of {steps} written to {path} (")
    assert len(lines) == 1
    assert len(traced) <= ACTIVE
    assert WAIT + WARM_UP + ACTIVE == 14


def test_a_run_writes_a_compressed_trace_of_its_training(inputs, tmp_path, capsys):
    path = tmp_path / "trace.json.gz"
    arguments = [*inputs, "--max-steps", "3", "--output-dir", str(tmp_path / "run"), "--precision", "fp32"]
    assert main([*arguments, "--profile", str(path)]) == 0
    assert f"Trace of the steps 2 to 3 written to {path}" in capsys.readouterr().out
    names = {event["name"] for event in events_of(path)}
    assert {"aten::mm", "aten::gelu_backward"} & names
    assert any("_fused_adamw" in name for name in names)


def test_without_the_flag_nothing_is_traced(tmp_path, monkeypatch):
    monkeypatch.setattr("ft.train.profiler.profile", None)
    with trace_steps(None, 0, 100, print) as after_step:
        after_step()


@pytest.mark.parametrize(("first", "last"), [(0, 1), (5, 6), (7, 7)])
def test_a_run_of_one_step_says_that_it_is_too_short(tmp_path, first, last):
    lines, path = [], tmp_path / "trace.json"
    with trace_steps(path, first, last, lines.append) as after_step:
        after_step()
    needs = f"--profile needs at least 2 steps, and the run has {last - first} to do"
    assert lines == [f"WARNING: {needs}: no trace is written to {path}."]
    assert list(tmp_path.iterdir()) == []


class ItEndsError(Exception):
    """Whatever ends a run."""


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("done", "traced"), [(0, []), (9, []), (10, []), (11, []), (12, [12]), (13, [12, 13])])
def test_a_run_that_ends_early_says_which_steps_the_trace_has(tmp_path, done, traced, fails):
    """Stopped between two steps, or by an error in the middle of one."""
    path, lines = tmp_path / "trace.json", []
    ending = pytest.raises(ItEndsError) if fails else contextlib.nullcontext()
    with ending, trace_steps(path, 0, 100, lines.append) as after_step:
        for step in range(1, done + 1):
            with torch.profiler.record_function(f"step {step}"):
                torch.zeros(3).add_(1)
            after_step()
        if fails:
            raise ItEndsError
    assert path.exists() == bool(traced)
    if traced:
        names = [event["name"] for event in events_of(path) if re.fullmatch(r"step \d+", event["name"])]
        assert names == [f"step {step}" for step in traced]
        words = "step 12" if traced == [12] else "the steps 12 to 13"
        ended = "WARNING: the run ended while the trace was recorded. "
        assert lines[0].startswith(f"{ended}Trace of {words} written to {path} (")
        assert len(lines) == 1
    else:
        ended = f"WARNING: the run ended after step {done}, and --profile traces the steps 12 to 14"
        assert lines == [f"{ended}: no trace is written to {path}."]


def test_an_earlier_trace_is_not_taken_for_one_of_this_run(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("{}")
    for last in (1, 100):
        lines = []
        with trace_steps(path, 0, last, lines.append):
            pass
        assert lines[0].endswith(f": no trace is written to {path}; the file there is an earlier one.")
    assert path.read_text() == "{}"


def test_a_run_that_is_stopped_says_that_there_is_no_trace(inputs, tmp_path, monkeypatch, capsys):
    path = tmp_path / "trace.json"
    monkeypatch.setattr("ft.session.Session.should_stop", lambda self, state: state.step == 3)
    assert main([*inputs, "--output-dir", str(tmp_path / "run"), "--profile", str(path), "--quiet"]) == 0
    assert "WARNING: the run ended after step 3, and --profile traces the steps 8 to 10" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("name", ["missing/trace.json", ".", "pipe", "dangling", "x" * 300])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_done(name, inputs, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("absent")
    run = tmp_path / "run"
    assert main([*inputs, "--output-dir", str(run), "--profile", str(tmp_path / name)]) == 2
    assert re.match(
        r"error: --profile is '.*', (which cannot be written|it must be a file|which is too long)",
        capsys.readouterr().err,
    )
    assert not run.exists()


def test_the_check_leaves_no_file_and_keeps_one(tmp_path):
    require_writable(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()
    (tmp_path / "old.json").write_text("old")
    require_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "old"
    with pytest.raises(UsageError):
        require_writable(tmp_path / "old.json" / "x.json")


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fail)
    lines = []
    with trace_steps(tmp_path / "trace.json", 0, 5, lines.append) as after_step:
        for _ in range(5):
            after_step()
    assert lines == [
        f"WARNING: the trace cannot be written to {tmp_path / 'trace.json'}: [Errno 28] No space left on device"
    ]
