"""The whole program as a user meets it: `python run.py`, what it prints, where it leaves things, how it fails."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from ft import device
from ft.cli.main import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(demo_inputs, tmp_path):
    """Arguments for a short run on the demo's model and the first of its reviews."""
    model, dataset = demo_inputs
    folder = tmp_path / "data"
    folder.mkdir()
    for split, rows in (("train", 40), ("validation", 20), ("test", 10)):
        pq.write_table(pq.read_table(dataset / f"{split}.parquet").slice(0, rows), folder / f"{split}.parquet")
    return {
        "--model": str(model),
        "--dataset": str(folder),
        "--output-dir": str(tmp_path / "run"),
        "--device": "cpu",
        "--precision": "fp32",
    }


def command(arguments):
    return [part for item in arguments.items() for part in item]


def metrics(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def test_the_program_from_start_to_end(small, tmp_path):
    done = subprocess.run(
        [sys.executable, "run.py", *command(small)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no bar without a terminal"
    assert "135,232 parameters, on cpu in fp32 (set by --precision)" in done.stdout
    assert "40 examples to train on, 20 examples to validate, 10 examples to test; labels neg, pos" in done.stdout
    assert "Plan: 5 steps of 8 examples" in done.stdout
    assert "Finished 5 steps in" in done.stdout
    assert "examples/s" in done.stdout
    assert "Three validation examples:" in done.stdout
    run = tmp_path / "run"
    names = [".lock", "checkpoint-5", "config.json", "final", "metrics.jsonl", "scores.json", "summary.json"]
    assert sorted(path.name for path in run.iterdir()) == names
    training, evaluation, test = metrics(run)
    assert list(training) == [
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "samples_per_second",
        "tokens_per_second",
        "seconds_by_part",
    ]
    scores = ["loss", "accuracy", "macro_f1", "majority_baseline"]
    scores.append("rows_sha256")
    assert list(evaluation) == ["step", "epoch", *(f"eval_{name}" for name in scores), "seconds_by_part"]
    assert list(test) == ["step", "epoch", *(f"test_{name}" for name in scores), "seconds_by_part"]
    assert list(training["seconds_by_part"]) == ["data", "forward", "backward", "update"]
    assert "evaluating" in evaluation["seconds_by_part"]
    assert {"saving", "evaluating"} <= set(test["seconds_by_part"])
    assert transformers.AutoModelForCausalLM.from_pretrained(run / "final")


def test_a_second_run_does_not_overwrite_the_first(small, capsys):
    assert main(command(small)) == 0
    before = metrics(small["--output-dir"])
    capsys.readouterr()
    assert main(command({**small, "--seed": "7"})) == 2
    error = capsys.readouterr().err
    assert "is not empty: --resume continues" in error
    assert "Traceback" not in error
    assert metrics(small["--output-dir"]) == before
    assert main([*command({**small, "--seed": "7"}), "--overwrite"]) == 0
    assert metrics(small["--output-dir"])[0]["loss"] != before[0]["loss"]


def test_overwrite_deletes_only_what_a_run_wrote_and_only_once_the_new_one_can_start(small, capsys):
    assert main(command(small)) == 0
    run = Path(small["--output-dir"])
    (run / "notes.txt").write_text("mine")
    assert main([*command({**small, "--dataset": "./nowhere"}), "--overwrite"]) == 2
    assert (run / "final" / "model.safetensors").exists()
    assert main([*command({**small, "--max-steps": "1"}), "--overwrite"]) == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "checkpoint-5").exists()


def test_save_dataset_keeps_a_copy_that_reads_back(small, tmp_path, capsys):
    assert main([*command(small), "--save-dataset", str(tmp_path / "copy")]) == 0
    again = {**small, "--dataset": str(tmp_path / "copy"), "--output-dir": str(tmp_path / "again")}
    assert main(command(again)) == 0
    assert metrics(tmp_path / "again")[0]["loss"] == metrics(small["--output-dir"])[0]["loss"]


def test_resume_by_path_needs_no_other_flag(small, tmp_path, capsys):
    assert main(command(small)) == 0
    shutil.rmtree(tmp_path / "run" / "final")
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert "Continuing after step 5" in capsys.readouterr().out
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert main(["--resume", "--output-dir", str(tmp_path / "run")]) == 0
    assert "This run is finished" in capsys.readouterr().out


def test_a_resumed_run_keeps_the_precision_that_auto_chose(small, monkeypatch, capsys):
    arguments = command({**small, "--precision": "auto", "--save-steps": "2"})
    monkeypatch.setattr(device, "has_amx", lambda: False)
    assert main([*arguments, "--max-steps", "2"]) == 0
    assert " on cpu in fp32 (" in capsys.readouterr().out
    monkeypatch.setattr(device, "has_amx", lambda: True)
    monkeypatch.setattr(device, "SMALL_MODEL", 0)
    assert main([*arguments, "--max-steps", "4", "--resume"]) == 0
    assert " on cpu in fp32 (as the run began)" in capsys.readouterr().out
    assert main([*arguments, "--max-steps", "2", "--overwrite"]) == 0
    assert " on cpu in bf16 (this processor has AMX" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(device, "has_amx", lambda: True)
    assert main([*arguments, "--max-steps", "4", "--resume"]) == 0
    assert " on cpu in bf16 (as the run began)" in capsys.readouterr().out


def test_a_resumed_run_whose_format_the_device_does_not_compute_is_refused(small, monkeypatch, capsys):
    arguments = command({**small, "--precision": "auto", "--save-steps": "2"})
    monkeypatch.setattr(device, "has_amx", lambda: True)
    monkeypatch.setattr(device, "SMALL_MODEL", 0)
    assert main([*arguments, "--max-steps", "2"]) == 0
    monkeypatch.setattr(device, "has_amx", lambda: False)
    mac = torch.device("mps")
    monkeypatch.setattr("torch.backends.mps.is_macos_or_newer", lambda *_: False)
    monkeypatch.setattr("ft.setup.choose_precision", lambda *_: device.Precision("fp32", "pretended", mac))
    capsys.readouterr()
    assert main([*arguments, "--max-steps", "4", "--resume"]) == 2
    message = "the run began in bf16, which mps does not compute before macOS 14: resume it on the device where it "
    assert capsys.readouterr().err == f"error: {message}began, or another --device\n"


def test_with_amx_a_small_model_takes_fp32(small, monkeypatch, capsys):
    monkeypatch.setattr(device, "has_amx", lambda: True)
    assert main([*command({**small, "--precision": "auto"}), "--max-steps", "1"]) == 0
    assert " on cpu in fp32 (the faster one for so small a model)" in capsys.readouterr().out
    assert main([*command({**small, "--precision": "bf16"}), "--max-steps", "1", "--overwrite"]) == 0
    assert " on cpu in bf16 (set by --precision)" in capsys.readouterr().out


def test_label_names_from_the_command_line_and_labels_of_several_tokens(small, capsys):
    assert main([*command(small), "--label-names", "negative, good"]) == 0
    output = capsys.readouterr().out
    assert "labels negative, good" in output
    assert "Note: the label 'negative' is several tokens; its first, 'neg', stands for it." in output


def rewrite(small, split, columns, names=("neg", "pos")):
    path = Path(small["--dataset"]) / f"{split}.parquet"
    metadata = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}} if names else {}
    pq.write_table(pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(metadata)}), path)


@pytest.mark.parametrize(
    ("prepare", "flags", "message"),
    [
        (lambda s: rewrite(s, "train", {"text": ["a", None], "label": [0, 1]}), [], "text in row 1 of"),
        (
            lambda s: rewrite(s, "train", {"text": ["a", "b"], "label": [0, 2]}),
            [],
            "train.parquet is 2, it must be from 0 to 1",
        ),
        (
            lambda s: rewrite(s, "train", {"text": ["a"], "label": [0]}, names=None),
            [],
            "those to train on are 0: correct the data",
        ),
        (lambda s: rewrite(s, "test", {"review": ["a"], "label": [0]}), [], "has no column 'text'"),
        (lambda s: None, ["--label-names", "pos,positive"], "begin with the same token"),
        (lambda s: None, ["--max-length", "200"], "--max-length is 200, but"),
        (lambda s: None, ["--model", "./nowhere"], "no directory './nowhere'"),
        (lambda s: None, ["--save-dataset", str(ROOT)], "is not empty"),
    ],
)
def test_failures_have_a_message_and_leave_no_files(small, prepare, flags, message, capsys):
    prepare(small)
    names = ("no column", "same token", "--max-length", "no directory", "is not empty")  # what another flag mends
    assert main([*command(small), *flags]) == (2 if any(name in message for name in names) else 1)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert not Path(small["--output-dir"]).exists()


def test_a_device_that_is_not_there_is_wrong_usage(small, capsys):
    assert main(command({**small, "--device": "cuda:99"})) == 2
    assert "--device is 'cuda:99', PyTorch" in capsys.readouterr().err


def test_an_output_directory_that_cannot_be_written_is_named(small, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(command({**small, "--output-dir": str(tmp_path / "file" / "run")})) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "file" / "run") in error
    assert "Traceback" not in error


def test_without_a_hub_the_error_names_what_helps(tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "run.py", "--output-dir", str(tmp_path / "run")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for help_text in ("http://127.0.0.1:9", "HF_ENDPOINT", "--model DIR", "python run.py --demo"):
        assert help_text in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_demo_is_the_same_program_and_can_be_run_again(tmp_path, capsys):
    for _ in range(2):
        assert main(["--demo", "--max-steps", "3", "--output-dir", str(tmp_path / "demo")]) == 0
        output = capsys.readouterr().out
        assert "Finished 3 steps" in output
        assert f'python run.py predict {tmp_path / "demo"} "' in output[output.index("That was the demo") :]
    assert len(metrics(tmp_path / "demo")) == 5, "training, validation, test, and general text before and after"


def test_a_resumed_demo_keeps_the_settings_of_its_run(tmp_path, capsys):
    arguments = ["--demo", "--output-dir", str(tmp_path / "demo")]
    assert main([*arguments, "--max-steps", "2", "--batch-size", "3", "--save-steps", "1"]) == 0
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(tmp_path / "demo" / name)
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 0
    output = capsys.readouterr().out
    assert "Continuing after step 1" in output
    assert "Plan: 2 steps of 3 examples" in output
