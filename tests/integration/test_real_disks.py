"""Real full disks and missing permissions, made by the system and not by a mock.

Skipped where no small file system can be mounted, or where root cannot drop its privileges.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ft.checkpoint.store import checkpoints, verify_checkpoint
from ft.cli.main import main
from tests.integration.test_kill import assert_same_end, assert_same_figures

ROOT = Path(__file__).parents[2]
SETTINGS = ["--precision", "fp32", "--epochs", "2", "--eval-steps", "4", "--save-steps", "5", "--logging-steps", "3"]
SETTINGS += ["--save-blocking"]  # so that it is certain what is on the disk when
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0

# With mounts that nobody else sees, and that end with the process.
WITH_OWN_MOUNTS = ["unshare", "--mount"] if IS_ROOT else ["unshare", "--user", "--map-root-user", "--mount"]
# As a user whom permissions bind, which root is without these privileges.
PRIVILEGES = "-dac_override,-dac_read_search"
AS_A_USER = ["setpriv", f"--bounding-set={PRIVILEGES}", f"--inh-caps={PRIVILEGES}"] if IS_ROOT else []

# Runs the program on a folder; before some evaluations, counted from 1, something happens to the folder. A file system
# that ends with the process is copied at its end.
PROGRAM = """
import shutil, sys
from pathlib import Path
from ft import session
from ft.cli.main import main

folder, original, seen = Path(sys.argv[1]), session.evaluate, []

def fill():
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**12))
        except OSError:
            pass

def evaluate(*arguments, **keywords):
    seen.append(1)
    happens.get(len(seen), lambda: None)()
    return original(*arguments, **keywords)

happens = HAPPENS
session.evaluate = evaluate
status = main(sys.argv[2:])
if folder.is_mount():
    shutil.copytree(folder, f"{folder}-after")
sys.exit(status)
"""


@functools.cache
def works(*command):
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """Gives the beginning of a command that finds a file system of some MiB in the folder `disk`."""

    def small_disk(size):
        (tmp_path / "disk").mkdir()
        mount = f'mount -t tmpfs -o size={size}m none "$0" && exec "$@"'
        command = (*WITH_OWN_MOUNTS, "sh", "-c", mount, str(tmp_path / "disk"))
        if not works(*command, "true"):
            pytest.skip("the system lets nobody mount anything here")
        return command

    return small_disk


@pytest.fixture
def as_a_user():
    if IS_ROOT and not works(*AS_A_USER, "true"):
        pytest.skip("root cannot be made to respect permissions here")
    return AS_A_USER


@pytest.fixture
def calm(inputs, tmp_path):
    assert main([*inputs, *SETTINGS, "--output-dir", str(tmp_path / "calm")]) == 0
    return tmp_path / "calm"


def execute(prefix, folder, arguments, happens="{}"):
    command = [*prefix, sys.executable, "-c", PROGRAM.replace("HAPPENS", happens), str(folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def error_of(done):
    """The one line of a run that failed."""
    assert done.returncode == 1, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def assert_resumes_to_the_same_end(inputs, run, calm):
    assert [path.name for path in checkpoints(run)] == ["checkpoint-5"]
    assert verify_checkpoint(run / "checkpoint-5") is None
    assert main([*inputs, *SETTINGS, "--output-dir", str(run), "--resume"]) == 0
    assert_same_figures(run, calm, 20)


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_a_while_costs_no_step(inputs, calm, small_disk, tmp_path):
    """From the evaluation after step 8 to that after step 12."""
    arguments = [*inputs, *SETTINGS, "--output-dir", str(tmp_path / "disk" / "run")]
    happens = "{2: fill, 3: (folder / 'filler').unlink}"
    done = execute(small_disk(6), tmp_path / "disk", arguments, happens)
    assert "WARNING: checkpoint 10 could not be written: No space left on device." in done.stdout
    assert done.stdout.count("could not be written") == 1
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / "disk-after" / "run", calm, 20)


def test_of_a_disk_that_stays_full_the_last_good_checkpoint_is_left(inputs, calm, small_disk, tmp_path):
    arguments = [*inputs, *SETTINGS, "--output-dir", str(tmp_path / "disk" / "run")]
    done = execute(small_disk(6), tmp_path / "disk", arguments, "{2: fill}")
    assert done.stdout.count("could not be written: No space left on device.") == 3
    assert "No space left on device" in error_of(done)
    assert_resumes_to_the_same_end(inputs, tmp_path / "disk-after" / "run", calm)


def test_a_disk_that_cannot_hold_a_checkpoint_is_refused(inputs, small_disk, tmp_path):
    arguments = [*inputs, *SETTINGS, "--output-dir", str(tmp_path / "disk" / "run")]
    done = execute(small_disk(1), tmp_path / "disk", arguments)
    assert "free, a checkpoint and the final model need" in error_of(done)
    assert not (tmp_path / "disk-after" / "run").exists()


# --- permissions ------------------------------------------------------------------------------------------------------


def test_a_folder_that_may_not_be_written_for_a_while_costs_no_step(inputs, calm, as_a_user, tmp_path):
    run = tmp_path / "run"
    happens = "{2: lambda: folder.chmod(0o555), 3: lambda: folder.chmod(0o755)}"
    done = execute(as_a_user, run, [*inputs, *SETTINGS, "--output-dir", str(run)], happens)
    assert "WARNING: checkpoint 10 could not be written: Permission denied." in done.stdout
    assert done.stdout.count("could not be written") == 1
    assert done.returncode == 0, done.stderr
    assert_same_end(run, calm, 20)


def test_of_a_folder_that_may_not_be_written_any_more_the_last_good_checkpoint_is_left(
    inputs, calm, as_a_user, tmp_path
):
    run = tmp_path / "run"
    arguments = [*inputs, *SETTINGS, "--output-dir", str(run)]
    done = execute(as_a_user, run, arguments, "{2: lambda: folder.chmod(0o555)}")
    run.chmod(0o755)
    assert done.stdout.count("could not be written: Permission denied.") == 3
    assert "Permission denied" in error_of(done)
    assert_resumes_to_the_same_end(inputs, run, calm)


def test_a_folder_that_may_not_be_written_from_the_start_is_named(inputs, as_a_user, tmp_path):
    (tmp_path / "folder").mkdir(mode=0o555)
    run = tmp_path / "folder" / "run"
    done = execute(as_a_user, run, [*inputs, *SETTINGS, "--output-dir", str(run)])
    assert error_of(done) == f"error: Permission denied: {run}"


@pytest.mark.parametrize(
    "name",
    ["data", "data/train.parquet", "model", "model/model.safetensors", "model/config.json", "model/tokenizer.json"],
)
def test_what_may_not_be_read_is_named(inputs, as_a_user, tmp_path, name):
    shutil.copytree(inputs[1], tmp_path / "model")
    shutil.copytree(inputs[3], tmp_path / "data")
    (tmp_path / name).chmod(0)
    flags = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "data"), "--device", "cpu"]
    done = execute(as_a_user, tmp_path, [*flags, *SETTINGS, "--output-dir", str(tmp_path / "run")])
    (tmp_path / name).chmod(0o755)
    error = error_of(done)
    assert f"cannot read {tmp_path / name}" in error
    assert "Permission denied" in error


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_checkpoint_that_may_not_be_read_is_left_out(inputs, calm, as_a_user, name):
    (calm / "checkpoint-20" / name).chmod(0)
    done = execute(as_a_user, calm, ["--resume", str(calm)])
    assert f"WARNING: {calm / 'checkpoint-20'} is damaged and ignored: {name} " in done.stdout
    assert "Continuing after step 15" in done.stdout
    assert done.returncode == 0, done.stderr
