"""The wheel: it holds every module and data file of `ft`, and nothing else."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BACKEND = PROJECT["build-system"]["build-backend"]
DATA = {"ft/report/report.css", "ft/py.typed"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built of a copy of the tree by the build backend, as pip calls it; no network, no isolation."""
    if find_spec(BACKEND.partition(".")[0]) is None:
        pytest.skip(f"the build backend {BACKEND} is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source, output = folder / "source", folder / "output"
    output.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("ft", "tests", "benchmarks"):  # the last two must not be packaged
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", PROJECT["project"]["readme"], "run.py"):
        shutil.copy(ROOT / name, source / name)
    build = f"import sys, {BACKEND} as backend; backend.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(output)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = output.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packaged = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ft").rglob("*.py")}
    assert packaged == modules | DATA


def test_every_data_file_of_the_tree_is_packaged_or_documentation():
    others = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ft").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != "README.md"
    }
    assert others == DATA


def test_the_wheel_is_described_by_the_readme(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    assert PROJECT["project"]["readme"] == "README.md"
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in metadata


def test_the_command_line_of_the_wheel_starts_without_torch(wheel):
    code = "import sys, ft.cli.main; print(ft.__file__, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=wheel.parent,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(wheel / "ft" / "__init__.py"), "False"], done.stderr


@pytest.fixture(scope="module")
def installed(wheel):
    """A directory into which pip has installed the wheel; its dependencies are those of this environment."""
    if find_spec("pip") is None:
        pytest.skip("pip is not installed")
    prefix = wheel.parents[1] / "installed"
    where = ["--prefix", str(prefix), "--ignore-installed"]  # or pip would uninstall that of this environment
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", *where, str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return prefix


@pytest.mark.parametrize("start", ["ft", "python -m ft"])
def test_the_installed_program_runs_under_its_name(installed, start, tmp_path):
    (package,) = installed.rglob("ft/__main__.py")
    environment = {**os.environ, "PYTHONPATH": str(package.parents[1])}
    command = [str(next(installed.rglob("bin/ft")))] if start == "ft" else [sys.executable, "-m", "ft"]

    def run(*arguments):
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    for arguments in ([], ["predict"]):
        output = run(*arguments, "--help").stdout
        assert output.startswith(f"usage: {' '.join([start, *arguments])} ")
        assert f"  {start} predict runs/rotten_tomatoes" in output
        assert "run.py" not in output
    done = run("--demo", "--max-steps", "1")
    assert done.returncode == 0, done.stderr
    assert f"To use it: {start} predict runs/demo" in done.stdout
    done = run("predict", "runs/demo", "a superb film")
    assert done.returncode == 0, done.stderr
    assert {"neg", "pos"} & set(done.stdout.split())
