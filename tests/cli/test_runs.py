"""The table of runs: real ones, unfinished and damaged ones, and one that is running."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

import ft
from ft.cli.main import main
from ft.config import Config
from ft.errors import FtError
from ft.io.lock import is_locked, locked

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """Two runs that differ in their learning rate and seed."""
    runs = tmp_path_factory.mktemp("place") / "runs"
    often = ["--eval-steps", "2", "--max-steps", "6", "--best-metric", "macro_f1"]
    for name, flags in (
        ("low", ["--learning-rate", "1e-5"]),
        ("sweep/high", ["--learning-rate", "3e-3", "--seed", "1"]),
    ):
        assert main([*inputs, *often, *flags, "--output-dir", str(runs / name)]) == 0
    return runs


@pytest.fixture
def runs(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def table(directory, capsys, *flags):
    capsys.readouterr()
    assert main(["runs", str(directory), "--json", *flags]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def last(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line][-1]


def write_run(run, accuracies, *, finished=True, rows=None, **settings):
    """A run directory with these validation accuracies, after every 10th step, on the rows with this digest."""
    run.mkdir(parents=True)
    Config(output_dir=str(run), **settings).save(run / "config.json")
    lines = [
        {"step": 10 * i, "epoch": i, "eval_loss": 1 / i, "eval_accuracy": x, "seconds_by_part": {"forward": 2.0}}
        for i, x in enumerate(accuracies, start=1)
    ]
    for line in lines if rows else ():
        line["eval_rows_sha256"] = rows
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / ".lock").touch()
    if finished:
        (run / "final").mkdir()
        (run / "final" / "model.safetensors").touch()
        (run / "summary.json").write_text("{}")


def test_the_figures_are_those_of_the_runs(runs, capsys):
    rows = table(runs, capsys)
    assert set(rows) == {"low", "sweep/high"}
    for name, row in rows.items():
        run = runs / name
        assert (row["state"], row["problem"], row["step"], row["best_metric"]) == ("finished", None, 6, "macro_f1")
        for figure in ("loss", "accuracy", "macro_f1", "majority_baseline"):
            assert row[figure] == last(run, f"eval_{figure}")
        assert (row["test_accuracy"], row["test_macro_f1"]) == (last(run, "test_accuracy"), last(run, "test_macro_f1"))
        state = json.loads((run / "checkpoint-6" / "state.json").read_text())
        assert [row[f"best_{figure}"] for figure in ("step", "accuracy", "macro_f1", "loss")] == [
            state[f"best_{figure}"] for figure in ("step", "accuracy", "macro_f1", "loss")
        ]
        assert row["seconds"] > 0
    assert rows["low"]["settings"] == {"seed": 42, "learning_rate": 1e-5}
    assert rows["sweep/high"]["settings"] == {"seed": 1, "learning_rate": 3e-3}
    assert list(table(runs / "low", capsys)) == ["low"], "a run directory itself"


def test_the_order_is_that_of_the_best_evaluation_or_of_a_figure(tmp_path, capsys):
    write_run(tmp_path / "a", [0.5, 0.8, 0.6])
    write_run(tmp_path / "b", [0.5, 0.9], epochs=2.0)
    write_run(tmp_path / "c", [0.5, 0.5, 0.5, 0.7], finished=False)
    write_run(tmp_path / "d", [])
    assert list(table(tmp_path, capsys)) == ["b", "a", "c", "d"]
    assert list(table(tmp_path, capsys, "--sort", "name")) == ["a", "b", "c", "d"]
    assert list(table(tmp_path, capsys, "--sort", "loss")) == ["c", "a", "b", "d"]
    assert list(table(tmp_path, capsys, "--sort", "accuracy")) == ["b", "c", "a", "d"]
    assert list(table(tmp_path, capsys, "--sort", "seconds")) == ["b", "a", "c", "d"]
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "b", "a", "c", "d"]
    assert "interrupted at step 40" in lines[3]
    assert lines[1].endswith("0:00:04  epochs 2.0")
    assert "F1" not in lines[0], "no run has recorded it"


def test_the_best_of_each_data_set_comes_first(tmp_path, capsys):
    write_run(tmp_path / "a", [0.5], rows="one")
    write_run(tmp_path / "b", [0.6, 0.5], rows="one", max_length=64)
    write_run(tmp_path / "held out by another seed", [0.9], rows="two", seed=1)
    write_run(tmp_path / "of an earlier version", [0.7], dataset="else/where")
    write_run(tmp_path / "other", [0.8, 0.95], dataset="else/where", best_metric="loss")
    write_run(tmp_path / "without", [])
    rows = table(tmp_path, capsys)
    names = ["b", "a", "held out by another seed", "other", "of an earlier version", "without"]
    assert list(rows) == names
    assert [row["data_set"] for row in rows.values()] == [1, 1, 2, 3, 3, None]
    assert [name for name, row in rows.items() if row["is_best"]] == ["b", "held out by another seed", "other"]
    assert next(iter(table(tmp_path, capsys, "--sort", "accuracy"))) == "other"
    assert main(["runs", str(tmp_path)]) == 0
    head, *lines, note, more = capsys.readouterr().out.splitlines()
    at = head.index("rows")
    marks = [line[at:].split("  ")[0] for line in lines]
    assert marks == ["1, best", "1", "2, best", "3, best", "3", ""]
    assert note.endswith("the same number have the same validation rows, and only their figures can be compared.")
    assert more == "Without a validation split, --seed draws these rows."


def test_runs_of_earlier_versions_have_the_rows_that_their_settings_name(tmp_path, capsys):
    write_run(tmp_path / "a", [0.5], rows="one")
    write_run(tmp_path / "earlier", [0.9], seed=1)
    write_run(tmp_path / "demo", [0.6], demo=True, dataset="runs/demo/inputs/dataset")
    write_run(tmp_path / "moved", [0.7], demo=True, dataset="elsewhere/inputs/dataset")
    assert [row["data_set"] for row in table(tmp_path, capsys, "--sort", "name").values()] == [1, 2, 1, 2]
    shutil.rmtree(tmp_path / "demo")
    shutil.rmtree(tmp_path / "moved")
    assert main(["runs", str(tmp_path)]) == 0
    assert "rows" not in capsys.readouterr().out, "there is one"


def test_a_run_records_the_rows_of_its_validation_split(inputs, trained, tmp_path, capsys):
    """They are the same whatever the seed, as the data set has a validation split; drawn from it, they differ."""
    assert {row["data_set"] for row in table(trained, capsys).values()} == {1}
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "train.csv").write_text("text,label\n" + "".join(f"film number {i},{i % 2}\n" for i in range(40)))
    flags = [*inputs, "--dataset", str(dataset), "--label-names", "neg,pos", "--max-steps", "1"]
    for name, settings in (("a", ["--seed", "1"]), ("b", ["--seed", "2"]), ("c", ["--seed", "1", "--max-length", "8"])):
        assert main([*flags, *settings, "--output-dir", str(tmp_path / "runs" / name)]) == 0
    assert [row["data_set"] for row in table(tmp_path / "runs", capsys, "--sort", "name").values()] == [1, 2, 1]


def test_extreme_figures_and_names_make_no_wide_table(tmp_path, capsys):
    run = tmp_path / ("\x1b[31m" + "\u202e" * 50)
    write_run(run, [1e299], label_names="x" * 10_000, finished=False)
    line = {"step": 10**298, "eval_loss": 1e299, "eval_accuracy": 1e299, "eval_macro_f1": 1e299}
    line |= {"eval_majority_baseline": 1e299, "test_accuracy": 1e299, "test_macro_f1": 1e299}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "summary.json").write_text('{"seconds": 1e299, "peak_memory_bytes": 1e299}')
    write_run(tmp_path / "other", [0.5], label_names="y" * 10_000)
    for name, state in (("done", True), ("lacks its configuration", False)):
        shutil.copytree(run, tmp_path / name)
        write_run(tmp_path / f"{name} too", [0.5], finished=state)
    (tmp_path / "done" / "final").mkdir()
    (tmp_path / "done" / "final" / "model.safetensors").touch()
    (tmp_path / "lacks its configuration" / "config.json").unlink()
    assert main(["runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "1e+299" in text
    assert max(map(len, text.splitlines())) < 400
    assert text.replace("\n", "").isprintable()


def test_csv_has_no_control_characters_and_json_is_exact(tmp_path, capsys):
    name = "\x1b]0;title\x07\x9b\r"
    write_run(tmp_path / name, [0.5], text_column="a\x1b[31m\nb")
    write_run(tmp_path / 'quotes", commas', [0.6])
    assert main(["runs", str(tmp_path), "--csv", "--sort", "loss"]) == 0
    text = capsys.readouterr().out
    assert text.replace("\n", "").isprintable()
    read = {row["name"]: row for row in csv.DictReader(io.StringIO(text))}
    assert set(read) == {r"\x1b]0;title\x07\x9b\r", 'quotes", commas'}
    assert read[r"\x1b]0;title\x07\x9b\r"]["setting_text_column"] == r"a\x1b[31m\nb"
    assert float(read['quotes", commas']["best_accuracy"]) == 0.6
    assert set(table(tmp_path, capsys)) == {name, 'quotes", commas'}


def test_csv_is_read_back(runs, capsys):
    assert main(["runs", str(runs), "--csv"]) == 0
    read = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    rows = table(runs, capsys)
    assert [row["name"] for row in read] == list(rows)
    for row in read:
        assert float(row["best_macro_f1"]) == rows[row["name"]]["best_macro_f1"]
        assert float(row["setting_learning_rate"]) == rows[row["name"]]["settings"]["learning_rate"]


def test_damaged_runs_are_listed_with_the_reason(runs, capsys):
    expected = last(runs / "low", "eval_accuracy")
    (runs / "low" / "config.json").write_text('{"model": ')
    (runs / "low" / "metrics.jsonl").open("a").write('{"step": 7, "half a li')
    write_run(runs / "no metrics", [0.5])
    (runs / "no metrics" / "metrics.jsonl").unlink()
    write_run(runs / "list", [0.5])
    (runs / "list" / "config.json").write_text("[]")
    write_run(runs / "pipe", [0.5])
    (runs / "pipe" / "config.json").unlink()
    os.mkfifo(runs / "pipe" / "config.json")
    write_run(runs / "strange", [0.5])
    (runs / "strange" / "metrics.jsonl").write_text('[]\n\0\n{"step": "x", "eval_loss": [], "eval_accuracy": 1e999}\n')
    (runs / "strange" / "summary.json").write_text('["seconds"]')
    (runs / "strange" / "config.json").write_text('{"best_metric": ["x"], "seed": {}}')
    (runs / "my-gpt2").mkdir()
    (runs / "my-gpt2" / "config.json").write_text("{}")
    (runs / "link").symlink_to(runs / "low")
    rows = table(runs, capsys)
    assert set(rows) == {"low", "sweep/high", "no metrics", "list", "pipe", "strange"}
    problems = {name: row["problem"] for name, row in rows.items() if row["state"] == "damaged"}
    assert problems.pop("pipe").startswith("config.json cannot be read: ")
    assert problems == {
        "low": "config.json is not JSON",
        "no metrics": "metrics.jsonl cannot be read: No such file or directory",
        "list": "config.json is not an object",
    }
    assert rows["low"]["accuracy"] == expected
    assert main(["runs", str(runs)]) == 0
    assert "damaged" in capsys.readouterr().out


def test_a_run_that_holds_its_lock_is_running(tmp_path, capsys):
    write_run(tmp_path / "run", [0.5, 0.6], finished=False)
    assert not is_locked(tmp_path / "run")
    code = "import sys; from pathlib import Path; from ft.io.lock import locked\n"
    code += "with locked(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    assert is_locked(tmp_path / "run")
    assert table(tmp_path, capsys)["run"]["state"] == "running"
    assert main(["runs", str(tmp_path)]) == 0
    assert "running, step 20" in capsys.readouterr().out
    holder.kill()  # whose process id remains in the file
    holder.wait()
    assert (tmp_path / "run" / ".lock").read_text()
    assert table(tmp_path, capsys)["run"]["state"] == "interrupted"
    with locked(tmp_path / "run"):  # looking has left no lock behind
        pass


def test_a_longer_run_is_unfinished_until_its_own_end(runs, monkeypatch, capsys):
    """Although `final/` has the model of the shorter run."""
    run = runs / "low"
    with monkeypatch.context() as patched:
        patched.setattr("ft.finetune.train", Mock(side_effect=FtError("killed")))
        assert main(["--resume", str(run), "--max-steps", "8"]) == 1
    assert (run / "final" / "model.safetensors").is_file()
    assert [row["state"] for row in table(run, capsys).values()] == ["interrupted"]
    assert "not finished" in repr(ft.Run(run))
    assert main(["--resume", str(run), "--max-steps", "8"]) == 0
    assert [row["state"] for row in table(run, capsys).values()] == ["finished"]
    assert repr(ft.Run(run)).endswith(str(run / "final"))


def test_a_run_that_was_killed_before_its_summary_is_finished_by_resuming_it(runs, capsys):
    summary = runs / "low" / "summary.json"
    summary.unlink()
    assert table(runs, capsys)["low"]["state"] == "interrupted"
    for output in ("The model is saved to", "This run is finished"):
        assert main(["--resume", str(runs / "low")]) == 0
        assert output in capsys.readouterr().out
        assert json.loads(summary.read_text())["step"] == 6


def test_a_hundred_runs_do_not_wait_for_pytorch(tmp_path):
    for number in range(100):
        write_run(tmp_path / "runs" / f"run-{number}", [0.5] * 100, seed=number)
    code = "import sys; from ft.cli.main import main; assert main(['runs']) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 101


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nowhere"], 2, "DIR is 'nowhere', there is no such directory"),
        ([".", "--json", "--csv"], 2, "--json and --csv are two formats: give one of them"),
        ([".", "--sort", "speed"], 2, "--sort is 'speed', it must be one of best, "),
        (["."], 1, "there is no run in or below"),
    ],
)
def test_wrong_usage(tmp_path, monkeypatch, capsys, arguments, status, words):
    monkeypatch.chdir(tmp_path)
    assert main(["runs", *arguments]) == status
    assert words in capsys.readouterr().err
