"""Runs whose files were changed at random, by a seed: resumed, asked and reported, in process.

Each command succeeds or says in an error what is wrong. Any other exception is a defect, and `main` lets it through.
"""

import json
import os
import random
import shutil
import zlib
from pathlib import Path

import pytest

from ft.checkpoint.store import checkpoints, verify_checkpoint
from ft.cli.main import main

SETTINGS = ["--precision", "fp32", "--eval-steps", "2", "--save-steps", "1", "--logging-steps", "1", "--max-steps", "2"]
VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    1e30,
    float("nan"),
    float("-inf"),
    2**70,
    "",
    "x" * 99,
    "\ud800",
    [],
    {},
    [[]],
    {"": 0},
]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A finished run of two steps, each with a checkpoint."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == 0
    return run


@pytest.fixture
def outside(tmp_path):
    """What links lead to, which nothing may change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("{}")
    yield tmp_path / "outside"
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["file"]
    assert (tmp_path / "outside" / "file").read_text() == "{}"


def mutate(rng, path):
    """Change a file: a value, a key, some bytes, or its length."""
    content = bytearray(path.read_bytes())
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        number = rng.randrange(len(lines))
        value = json.loads(lines[number])
        inner = rng.choice([value, *(each for each in value.values() if isinstance(each, dict) and each)])
        key = rng.choice(sorted(inner))
        if rng.random() < 0.2:
            del inner[key]
        else:
            inner[key if rng.random() < 0.8 else "other"] = rng.choice(VALUES)
        lines[number] = json.dumps(value)
        content = bytearray("\n".join(lines).encode())
    elif rng.random() < 0.5:
        content = content[: rng.randrange(len(content))]
    else:
        start = rng.randrange(len(content))
        content[start : start + 9] = rng.randbytes(rng.randrange(6))
    path.write_bytes(content)


def sign(folder, name):
    """Note a file in the manifest as it is now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"size": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace(rng, path, outside):
    """Put something else in the place of a file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        path.symlink_to(outside / "nowhere")
    elif kind == 1:
        path.symlink_to(outside if rng.random() < 0.5 else outside / "file")
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        path.touch()


def statuses(run, capfd, *, report=False):
    """What a resume of the run ends with, and prints; all commands that fail say why in one line for each problem."""
    capfd.readouterr()
    found = {}
    for command in (
        *([["report", str(run), "--output", str(run.parent / "report.html")]] if report else []),
        ["predict", str(run), "a fine film", "--device", "cpu"],
        ["--resume", str(run), "--max-steps", "3"],
    ):
        status = found[command[0]] = main(command)
        out, err = capfd.readouterr()
        assert status in (0, 1, 2), command
        if status:
            assert all(line.startswith("error: ") for line in err.splitlines()), (command, err)
            assert err, command
    return found["--resume"], out


@pytest.mark.parametrize("seed", range(6))
def test_a_changed_newest_checkpoint_is_refused_and_the_one_before_taken(finished, tmp_path, capfd, seed):
    rng, run = random.Random(seed), tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "final")
    newest = checkpoints(run)[-1]
    name = rng.choice(["state.json", "state.json", "manifest.json", "config.json", "rng.safetensors"])
    mutate(rng, newest / name)
    signed = name != "manifest.json" and rng.random() < 0.6
    if signed:
        sign(newest, name)
    is_whole = verify_checkpoint(newest) is None
    status, out = statuses(run, capfd)
    if not is_whole:
        assert status == 0
        assert f"{newest} is damaged and ignored" in out
    if not is_whole or name in ("state.json", "config.json"):
        assert status == 0
        assert verify_checkpoint(checkpoints(run)[-1]) is None


@pytest.mark.parametrize("seed", range(5))
def test_changed_records_of_a_run_make_no_traceback(finished, tmp_path, capfd, seed):
    rng, run = random.Random(seed), tmp_path / "run"
    shutil.copytree(finished, run)
    for _ in range(rng.choice([1, 3])):
        mutate(rng, run / rng.choice(["config.json", "metrics.jsonl", "scores.json"]))
    statuses(run, capfd, report=True)


@pytest.mark.parametrize("seed", range(9))
def test_replaced_files_and_folders_of_a_run_make_no_traceback(finished, tmp_path, outside, capfd, seed):
    rng, run = random.Random(seed), tmp_path / "run"
    shutil.copytree(finished, run)
    entries = sorted(path for path in run.rglob("*") if rng.random() < 0.5 or path.parent == run)
    path = Path(rng.choice(entries))
    replace(rng, path, outside)
    status, _ = statuses(run, capfd)
    if checkpoints(run) and path.is_relative_to(checkpoints(run)[-1]):
        assert status == 0
