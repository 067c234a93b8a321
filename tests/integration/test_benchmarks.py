"""The benchmarks on the CPU: their flags, where they write, and small runs of those that no other test executes."""

import importlib
import json
import random
from pathlib import Path

import pytest

from benchmarks import ablation, common, epoch, freeze, settings, survival

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in ("__init__", "common"))


def run(monkeypatch, module, *flags):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, flags)])
    module.main()


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_the_flags_of_all(monkeypatch, capsys, name):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, module, "--help")
    text = capsys.readouterr().out
    assert "--output" in text
    assert "--publish" in text
    assert f"python -m benchmarks.{name}" in text


def test_results_are_published_only_on_request():
    parser = common.benchmark_parser("")
    assert parser.parse_args([]).output == Path("runs/benchmarks"), "which git ignores"
    assert parser.parse_args(["--output", "here"]).output == Path("here")
    assert parser.parse_args(["--publish"]).output == ROOT / "benchmarks" / "results"
    with pytest.raises(SystemExit):
        parser.parse_args(["--publish", "--output", "here"])


RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("folder", [RESULTS, *(path for path in RESULTS.iterdir() if path.is_dir())])
def test_the_published_results_can_be_compared(folder):
    """All of a folder are of one processor and one version of PyTorch; those of a GPU name it themselves."""
    results = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    machines = {name: each["machine"] for name, each in results.items() if each["machine"]["gpu"] is None}
    of = ("processor", "instruction_sets", "cores", "torch")
    assert len({tuple(str(machine[name]) for name in of) for machine in machines.values()}) == 1, list(machines)


def test_a_result_names_the_instruction_sets_of_the_processor(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "INSTRUCTION_SETS", {"fpu": "X87", "unheard_of": "ABC"})
    common.write_result(tmp_path / "new", "name", {"seconds": 1}, "| a table |")
    text = (tmp_path / "new" / "name.md").read_text()
    assert ("X87" in text) == ("fpu" in Path("/proc/cpuinfo").read_text())
    assert "ABC" not in text
    figures = json.loads((tmp_path / "new" / "name.json").read_text())
    assert figures["seconds"] == 1
    assert "| a table |" in capsys.readouterr().out


def test_the_interval_contains_the_true_median_in_95_of_100_cases():
    """Of skewed noise, with outliers, on a machine whose speed drifts."""
    draw = random.Random(1)
    hits, trials = 0, 600
    for _ in range(trials):
        drift = [draw.uniform(0.5, 2) for _ in range(100)]
        reference = [each * draw.lognormvariate(0, 0.05) for each in drift]
        variant = [1.05 * each * draw.lognormvariate(0, 0.05) for each in drift]
        _, low, high = ablation.paired_ratio(variant, reference)
        hits += low <= 1.05 <= high
    assert 0.93 < hits / trials < 0.98


@pytest.mark.parametrize(
    ("low", "high", "memory", "expected"),
    [
        (1.03, 1.05, 1.0, "pays: time"),
        (0.99, 1.01, 1.05, "pays: memory"),
        (1.03, 1.05, 1.05, "pays: time and memory"),
        (0.99, 1.01, 1.01, "does not pay"),
        (1.01, 1.03, 1.0, "not decided"),
    ],
)
def test_what_pays(low, high, memory, expected):
    assert ablation.verdict(low, high, memory) == expected


def test_settings_runs_the_demo_once_per_value(monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "STUDIES", {"learning_rate": ("learning rate {:g}", (settings.LEARNING_RATE,))})
    monkeypatch.setattr(settings, "GIVEN", {**settings.GIVEN, "epochs": 0.2})
    flags = ["--work", tmp_path / "work", "--output", tmp_path]
    run(monkeypatch, settings, *flags)
    assert "| learning rate 0.001 (the demo's) |" in (tmp_path / "settings.md").read_text()
    assert (tmp_path / "settings.png").stat().st_size > 1000
    monkeypatch.setattr(settings.subprocess, "run", None)
    run(monkeypatch, settings, *flags)  # nothing runs again


def test_epoch_runs_the_program(monkeypatch, tmp_path, demo_inputs, inputs):
    monkeypatch.setattr(epoch, "SIZE", "tiny")
    flags = ["--work", tmp_path / "work", "--output", tmp_path, "--tokenizer", demo_inputs[0], "--dataset", inputs[3]]
    run(monkeypatch, epoch, *flags)
    text = (tmp_path / "epoch.md").read_text()
    assert "From random weights:" in text
    assert (tmp_path / "epoch.png").stat().st_size > 1000


def test_freeze_measures_every_case(monkeypatch, tmp_path):
    kept = {name: freeze.CASES[name] for name in ("all", "biases", "LoRA")}
    monkeypatch.setattr(freeze, "CASES", kept)
    monkeypatch.setattr(freeze, "measure_demo", lambda folder: {})
    monkeypatch.setattr(freeze, "demo_table", lambda demo: "")
    run(monkeypatch, freeze, "--size", "tiny", "--turns", "1", "--output", tmp_path)
    assert list(json.loads((tmp_path / "freeze.json").read_text())["cases"]) == list(kept)


def test_survival_counts_the_faults_of_the_tests(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider")
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, survival, "--tests", "train/test_nonfinite", "--output", tmp_path)
    figures = json.loads((tmp_path / "survival.json").read_text())
    assert figures["failed"] == 0
    assert figures["passed"]["test_nonfinite"] > 0
