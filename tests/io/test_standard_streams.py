"""Programs whose standard streams are closed or full, started by a shell as a person would."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
from contextlib import suppress
from ft.io.standard_streams import standard_streams
with standard_streams() as make_optional, open(sys.argv[1], "w") as file:
    if len(sys.argv) > 2:
        make_optional()
    print("to standard output", flush=True)
    print("to standard error", file=sys.stderr)
    with suppress(OSError):
        os.write(2, b"by its number")
    print("\\udcff and more", flush=True)
    file.write("to the file")
"""
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")


def shell(command, *arguments):
    return subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, *map(str, arguments)],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_messages_to_a_closed_stream_go_nowhere_and_into_no_file(tmp_path, closed):
    done = shell(f'"$@" {closed}', "-c", PROGRAM, tmp_path / "file")
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "to the file"
    assert done.stdout == (
        "" if ">&- " in f"{closed} ".replace("2>&-", "") else "to standard output\n\\udcff and more\n"
    )
    assert done.stderr == ("" if "2>&-" in closed else "to standard error\nby its number")


@FULL
def test_an_optional_output_that_is_full_is_told_once(tmp_path):
    done = shell('"$@" >/dev/full', "-c", PROGRAM, tmp_path / "file", "optional")
    warning = "WARNING: standard output: No space left on device. The run continues without it.\n"
    assert (done.returncode, done.stderr) == (0, f"{warning}to standard error\nby its number")
    assert (tmp_path / "file").read_text() == "to the file"
    assert shell('"$@" 2>/dev/full', "-c", PROGRAM, tmp_path / "file").returncode == 0


@FULL
def test_a_command_whose_output_is_full_names_it_and_fails():
    done = shell('"$@" report --help >/dev/full', "run.py")
    assert (done.returncode, done.stderr) == (1, "error: No space left on device: standard output\n")


@FULL
@pytest.mark.parametrize("streams", [">/dev/full", ">&- 2>&-"])
def test_a_run_goes_on_without_a_console(inputs, tmp_path, streams):
    run = tmp_path / "run"
    done = shell(f'"$@" {streams}', "run.py", *inputs, "--max-steps", "2", "--output-dir", run)
    assert done.returncode == 0
    assert (run / "final" / "model.safetensors").is_file()
    assert len(re.findall("WARNING", done.stderr)) == streams.count("full")
