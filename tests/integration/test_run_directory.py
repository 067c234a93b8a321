"""A run directory that is moved, deleted or rearranged: what is lost is put back, and nothing leads out of it."""

import json
import os
import re
import shutil
import threading
import zlib
from contextlib import ExitStack
from pathlib import Path

import pytest

from ft.checkpoint import model_description
from ft.checkpoint.store import checkpoints, step_of, verify_checkpoint
from ft.cli.main import main
from ft.errors import FtError
from ft.inference import language_model
from ft.io.atomic import StagedDirectory, atomic_directory
from ft.io.lock import locked
from ft.train.metrics import MetricsLogger

SETTINGS = ["--precision", "fp32", "--eval-steps", "4", "--save-steps", "2", "--logging-steps", "1", "--max-steps", "6"]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A finished run of 6 steps with two checkpoints."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == 0
    return run


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def during_step(monkeypatch, number, action):
    """Have something happen in a step of the run."""

    def step(self, **counts):
        count(self, **counts)
        seen.append(1)
        if len(seen) == number:
            action()

    count, seen = MetricsLogger.count_step, []
    monkeypatch.setattr(MetricsLogger, "count_step", step)


def delete(run):
    while run.exists():  # a checkpoint may be being written there
        shutil.rmtree(run, ignore_errors=True)


def lines(run):
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in event.items() if "second" not in name} for event in events]


# --- moved or deleted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["deleted", "moved", "metrics", "lock", "replaced"])
@pytest.mark.parametrize("step", [3, 6])
def test_what_is_lost_during_a_run_is_put_back_and_told_once(
    inputs, finished, tmp_path, monkeypatch, capsys, lost, step
):
    def lose():
        if lost == "deleted":
            delete(run)
        elif lost == "moved":
            run.rename(tmp_path / "elsewhere")
        elif lost == "lock":
            (run / ".lock").unlink()
        else:
            (run / "metrics.jsonl").unlink()
            if lost == "replaced":
                (run / "metrics.jsonl").write_text("of somebody else\n")

    def keeps_others_out(self, *arguments, **keywords):
        write(self, *arguments, **keywords)
        with pytest.raises(FtError, match="another run is using"), locked(run):
            pytest.fail("two at once")

    run, write = tmp_path / "run", MetricsLogger.write
    during_step(monkeypatch, step, lose)
    monkeypatch.setattr(MetricsLogger, "write", keeps_others_out)
    assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "was moved or deleted during the run" in line]
    assert len(told) == 1
    assert lines(run) == lines(finished)
    assert {"config.json", "metrics.jsonl", "scores.json", "final", "checkpoint-6"} <= {p.name for p in run.iterdir()}
    assert (run / "final" / "model.safetensors").read_bytes() == (finished / "final" / "model.safetensors").read_bytes()
    assert all(verify_checkpoint(folder) is None for folder in checkpoints(run))
    with locked(run):
        pass


def test_a_folder_that_another_run_has_taken_meanwhile_is_left_to_it(inputs, tmp_path, monkeypatch, capsys):
    def take():
        delete(run)
        others.enter_context(locked(run))
        (run / "theirs").touch()

    run = tmp_path / "run"
    during_step(monkeypatch, 3, take)
    with ExitStack() as others:
        assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == 1
        error = capsys.readouterr().err
        assert f"error: {run} was moved or deleted during the run, which ends here: another run is using" in error
        assert {path.name for path in run.iterdir()} <= {".lock", "theirs"}


def test_a_folder_that_is_lost_after_the_last_line_still_gets_all(inputs, finished, tmp_path, monkeypatch):
    from ft import session

    def lose(*arguments):
        delete(run)
        return gather_weights(*arguments)

    run, gather_weights = tmp_path / "run", session.gather_weights
    monkeypatch.setattr(session, "gather_weights", lose)
    assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == 0
    assert {path.name for path in run.iterdir()} == {
        ".lock", "config.json", "scores.json", "summary.json", "final"
    }  # fmt: skip


# --- links and other special files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "config.json"])
@pytest.mark.parametrize("kind", ["link", "FIFO", "directory"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(copy, tmp_path, capsys, name, kind):
    (tmp_path / "mine").write_text("mine")
    (copy / name).unlink()
    make = {"link": lambda p: p.symlink_to(tmp_path / "mine"), "FIFO": os.mkfifo, "directory": Path.mkdir}
    make[kind](copy / name)
    before = sorted(copy.rglob("*"))
    assert main(["--resume", str(copy), "--max-steps", "8"]) in (1, 2)
    error = capsys.readouterr().err
    assert name in error
    assert error.startswith("error: ")
    assert name == "config.json" or f"{name} is a {kind}" in error
    assert (tmp_path / "mine").read_text() == "mine"
    assert set(before) <= set(copy.rglob("*"))
    main(["report", str(copy)])  # which must not wait either


@pytest.fixture
def outside(tmp_path):
    """A directory with a file, behind which nothing of a run may come."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    (tmp_path / "outside" / "model").mkdir()
    yield tmp_path / "outside"
    assert sorted(path.name for path in (tmp_path / "outside").iterdir()) == ["file", "model"]
    assert (tmp_path / "outside" / "file").read_text() == "mine"


@pytest.mark.parametrize("flags", [[], ["--output", "{}"]])
def test_a_report_is_not_written_through_a_link(copy, outside, capsys, flags):
    (copy / "report.html").symlink_to(outside / "file")
    assert main(["report", str(copy), *(flag.format(copy / "report.html") for flag in flags)]) == 2
    assert "report.html', which is a link: delete it" in capsys.readouterr().err


def test_event_files_are_not_written_behind_a_link(copy, outside, capsys):
    pytest.importorskip("tensorboard")
    (copy / "tensorboard").symlink_to(outside)
    assert main(["--resume", str(copy), "--max-steps", "8", "--tensorboard"]) == 1
    assert "tensorboard is a symbolic link" in capsys.readouterr().err


def test_the_demo_replaces_nothing_behind_a_link(tmp_path, outside, capsys):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "inputs").symlink_to(outside)
    assert main(["--demo", "--overwrite", "--output-dir", str(tmp_path / "demo")]) == 1
    assert "inputs is a link" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_links_in_the_place_of_what_a_run_writes_and_deletes_are_replaced(inputs, finished, copy, outside, flag):
    files = ("scores.json", "summary.json")
    names = ["final", *files, ".unfinished-checkpoint-8", ".replaced-final", ".superseded-checkpoint-9"]
    for name in [*names, f".unfinished-{os.getpid()}"]:
        if name == "final":
            shutil.rmtree(copy / name)
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(outside / ("file" if name in files else ""))
    (copy / "checkpoint-2").symlink_to(outside)
    steps = SETTINGS[:-1] + (["8"] if flag == "--resume" else ["6"])
    assert main([*inputs, *steps, "--output-dir", str(copy), flag]) == 0
    assert not [path for path in copy.rglob("*") if path.is_symlink()]
    assert verify_checkpoint(checkpoints(copy)[-1]) is None
    assert (copy / "final" / "model.safetensors").is_file()


def test_a_folder_takes_the_place_of_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "final").symlink_to(tmp_path / "nowhere")
    with atomic_directory(tmp_path / "final") as new:
        assert isinstance(new, StagedDirectory)
        new.write("a", [b"a"])
    assert os.listdir(tmp_path) == ["final"]
    assert (tmp_path / "final" / "a").read_bytes() == b"a"


def test_a_link_that_leads_nowhere_in_the_newest_checkpoint_is_damage_like_any_other(copy, capsys):
    newest = checkpoints(copy)[-1]
    (newest / "rng.safetensors").unlink()
    (newest / "rng.safetensors").symlink_to(copy / "nowhere")
    assert main(["--resume", str(copy), "--max-steps", "7"]) == 0
    output = capsys.readouterr().out
    assert f"{newest} is damaged and ignored: rng.safetensors is missing or not a regular file" in output
    assert "Continuing after step 4" in output


def test_a_fifo_in_place_of_the_finished_weights_is_replaced_and_not_waited_for(copy):
    before = (copy / "final" / "model.safetensors").read_bytes()
    (copy / "final" / "model.safetensors").unlink()
    os.mkfifo(copy / "final" / "model.safetensors")
    assert main(["--resume", str(copy)]) == 0
    assert (copy / "final" / "model.safetensors").read_bytes() == before


def test_a_demo_that_was_moved_is_continued(tmp_path, capsys):
    flags = ["--demo", "--device", "cpu", "--batch-size", "2", "--save-steps", "1"]
    assert main([*flags, "--max-steps", "1", "--output-dir", str(tmp_path / "run")]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    assert main([*flags, "--max-steps", "2", "--output-dir", str(tmp_path / "moved"), "--resume"]) == 0
    assert "Continuing after step 1" in capsys.readouterr().out
    other = [*flags, "--max-steps", "3", "--seed", "7", "--output-dir", str(tmp_path / "moved"), "--resume"]
    assert main(other) == 2


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [("r\udcffn", 2, "--output-dir is .*udcffn', it must be valid UTF-8"), ("a/" * 1500, 1, "is too deep: it has 1,5")],
    ids=["not UTF-8", "deep"],
)
def test_a_directory_that_no_run_could_be_read_from_is_refused(inputs, tmp_path, capsys, name, status, message):
    assert main([*inputs, "--output-dir", f"{tmp_path}/{name}"]) == status
    assert re.search(message, capsys.readouterr().err)


def test_the_configuration_that_a_user_names_may_be_a_pipe(tmp_path, inputs):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=['{"max_steps": 1}'])
    writer.start()
    assert main([*inputs, "--config", str(tmp_path / "pipe"), "--output-dir", str(tmp_path / "run")]) == 0
    writer.join()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["max_steps"] == 1


# --- checkpoints that rotate while they are read ----------------------------------------------------------------------


def rotate(run):
    """What a run does when it saves: a newer checkpoint comes, the oldest goes."""
    old = checkpoints(run)
    step = step_of(old[-1]) + 1
    shutil.copytree(old[-1], run / f"checkpoint-{step}")
    state = json.loads((run / f"checkpoint-{step}" / "state.json").read_text())
    (run / f"checkpoint-{step}" / "state.json").write_text(json.dumps({**state, "step": step}))
    content = (run / f"checkpoint-{step}" / "state.json").read_bytes()
    manifest = json.loads((run / f"checkpoint-{step}" / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"size": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    (run / f"checkpoint-{step}" / "manifest.json").write_text(json.dumps(manifest))
    for folder in old:
        shutil.rmtree(folder)


@pytest.mark.parametrize("moment", ["verified", "found", "read"])
def test_a_checkpoint_that_vanishes_while_it_is_read_is_replaced_by_the_next(copy, monkeypatch, capsys, moment):
    def then_rotate(function):
        def wrapped(*arguments, **keywords):
            if moment == "verified" and not rotated:
                rotated.append(rotate(copy))
            result = function(*arguments, **keywords)
            if moment != "verified" and not rotated:
                rotated.append(rotate(copy))
            return result

        return wrapped

    rotated = []
    shutil.rmtree(copy / "final")
    monkeypatch.setattr("ft.io.hub._hub_files", lambda *_: pytest.fail("asked the Hub"))
    name = {"verified": "verify_checkpoint", "found": "model_directory", "read": "read_description"}[moment]
    module = model_description if moment == "verified" else language_model
    monkeypatch.setattr(module, name, then_rotate(getattr(module, name)))
    assert main(["predict", str(copy), "a fine film", "--device", "cpu"]) == 0
    assert rotated == [None]
    assert f"by {copy / 'checkpoint-7'}" in capsys.readouterr().err


def test_a_checkpoint_that_was_named_and_is_gone_is_not_asked_of_the_hub(copy, monkeypatch, capsys):
    monkeypatch.setattr("ft.io.hub._hub_files", lambda *_: pytest.fail("asked the Hub"))
    monkeypatch.chdir(copy.parent)
    for command in (
        ["predict", "run/checkpoint-12", "a"],
        ["evaluate", "run/checkpoint-12"],
        ["generate", "run/x", "a"],
    ):
        assert main([*command, "--device", "cpu"]) in (1, 2)
        assert "error: " in capsys.readouterr().err
