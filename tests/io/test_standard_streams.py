"""Programs whose standard streams are closed or full, started by a shell as a person would."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ft.cli.main import main
from ft.io.standard_streams import quiet_output, results, waiting_line

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
    done = shell(f'"$@" {closed}', "-c", PROGRAM, tmp_path / "file", "optional")
    has_output = ">&- " not in f"{closed} ".replace("2>&-", "")
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "to the file"
    assert done.stdout == ("to standard output\n\\udcff and more\n" if has_output else "")
    warning = "" if has_output else "WARNING: standard output: Closed. The run continues without it.\n"
    assert done.stderr == ("" if "2>&-" in closed else f"{warning}to standard error\nby its number")


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "{run}", "a film", "--device", "cpu"],
        ["predict", "{run}", "a film", "--device", "cpu", "--json"],
        ["evaluate", "{run}", "--device", "cpu"],
        ["evaluate", "{run}", "--device", "cpu", "--json"],
        ["generate", "{run}", "a film", "--device", "cpu", "--max-new-tokens", "2"],
        ["runs", "{run}"],
        ["data", "--demo"],
        ["help", "predict"],
    ],
)
def test_results_that_nobody_can_read_are_an_error(inputs, tmp_path_factory, command):
    run = tmp_path_factory.getbasetemp() / "read-by-nobody"
    if not run.exists():
        assert main([*inputs, "--max-steps", "1", "--quiet", "--output-dir", str(run)]) == 0
    done = shell('"$@" >&-', "run.py", *(word.format(run=run) for word in command))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: Closed: standard output"


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


# --- quiet ------------------------------------------------------------------------------------------------------------


def test_quiet_output_shows_results_and_warnings_alone(capsys):
    with quiet_output(True):
        print("a line")
        print("WARNING: a", "warning")
        with results():
            print("the result")
        print("WARNING: without its end", end="")
        print("\nanother line")
    print("afterwards")
    assert capsys.readouterr() == ("the result\nafterwards\n", "WARNING: a warning\nWARNING: without its end\n")
    with quiet_output(False), results():
        print("a line")
    assert capsys.readouterr() == ("a line\n", "")


def test_a_quiet_run_prints_its_results_alone(inputs, tmp_path, capsys):
    arguments = [*inputs, "--max-steps", "2", "--output-dir", str(tmp_path / "run"), "--quiet"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("\nFinished 2 steps in ")
    assert "Three validation examples:" in out
    assert not re.search("^(step|Fine-tuning|Data:|Plan:|Disk:)", out, re.MULTILINE)
    assert all(line.startswith("WARNING") for line in err.splitlines())
    assert main(["--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("This run is finished: ")
    assert main(["predict", str(tmp_path / "run"), "a film", "--quiet", "--json", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert (out[:10], out.count("\n"), err) == ('{"row": 0,', 1, "")
    answers = ["--output", str(tmp_path / "answers.csv")]
    assert main(["evaluate", str(tmp_path / "run"), "--quiet", "--device", "cpu", *answers]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("test: ")
    assert "examples/s" not in out
    assert main(["generate", str(tmp_path / "run"), "a", "--quiet", "--device", "cpu", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("quiet", [True, False])
def test_a_line_to_wait_is_shown_on_a_terminal_only_and_removed(is_terminal, quiet, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with waiting_line("Loading ...", quiet=quiet):
        shown = capsys.readouterr().err
    assert shown == ("Loading ..." if is_terminal and not quiet else "")
    assert capsys.readouterr() == ("", "\r\x1b[K" if shown else "")
