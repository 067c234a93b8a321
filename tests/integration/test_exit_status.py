"""One rule for the exit status: 2 if the command must be changed, 1 if anything else must; over all commands."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ft
from ft.cli.main import main


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("a run") / "run"
    flags = ["--max-steps", "2", "--save-steps", "1", "--precision", "fp32", "--output-dir", str(run)]
    assert main([*inputs, *flags]) == 0
    return run


@pytest.fixture
def places(finished, inputs, tmp_path, monkeypatch):
    """The names in braces of the commands below."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("body,stars\na film,neg\nanother,pos\n" * 20)
    (tmp_path / "lines.txt").write_text("a film\n")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "empty.csv").write_text("text,label\n,neg\nx,\n" * 20)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    several = tmp_path / "several"
    for name in ("a", "b"):
        (several / name).mkdir(parents=True)
        pq.write_table(pa.table({"text": ["x"], "label": [0]}), several / name / "train.parquet")
    shutil.copytree(finished / "final", tmp_path / "copy" / "model")
    damaged = tmp_path / "damaged-run"
    shutil.copytree(finished, damaged)
    (damaged / "final" / "model.safetensors").write_bytes(b"12345678{")
    return {
        "run": finished,
        "model": inputs[1],
        "data": inputs[3],
        "copy": tmp_path / "copy" / "model",
        "damaged_run": damaged,
        "here": tmp_path,
    }


TRAIN = "--device cpu --output-dir new --max-steps 1"
SLIPS = [
    # training, and what takes its flags
    ("--batch-size x --xyzzy --epochs 0 --init none", 2, ["--batch-size", "--xyzzy", "--epochs", "--init"]),
    (TRAIN + " --model ./absent --dataset {data}", 2, ["./absent", "check --model"]),
    (TRAIN + " --model {model} --dataset ./absent", 2, ["./absent", "check --dataset"]),
    (TRAIN + " --model {model} --dataset absent.csv", 2, ["there is no file 'absent.csv'"]),
    (TRAIN + " --model ./absent --dataset absent.csv", 2, ["there is no file 'absent.csv'"]),  # before the model
    (TRAIN + " --model {model} --dataset lines.txt", 2, ["whose format is not supported"]),
    (TRAIN + " --model {here}/lines.txt --dataset {data}", 2, ["is a file"]),
    (TRAIN + " --model {model} --dataset table.csv --dataset-revision v1", 2, ["--dataset-revision has no meaning"]),
    (TRAIN + " --model {model} --dataset table.csv --dataset-config x", 2, ["--dataset-config has no meaning"]),
    (TRAIN + " --model {model} --dataset {data} --dataset-revision v1", 2, ["has no revisions"]),
    (TRAIN + " --model {model} --dataset {data} --model-revision v1", 2, ["has no revisions"]),
    (TRAIN + " --model {model} --dataset table.csv", 2, ["has no column 'text'"]),
    (TRAIN + " --model {model} --dataset table.csv --text-column body", 2, ["has no column 'label'"]),
    (TRAIN + " --model {model} --dataset several", 2, ["choose one by --dataset-config a"]),
    (TRAIN + " --model {model} --dataset several --dataset-config c", 2, ["correct --dataset-config"]),
    (TRAIN + " --model {model} --dataset {data} --max-length 5000", 2, ["--max-length is 5000"]),
    (TRAIN + " --model {model} --dataset {data} --label-names neg", 2, ["at least two labels"]),
    (TRAIN + " --model {model} --dataset {data} --train-fraction 0.0001", 2, ["--train-fraction is 0.0001"]),
    (TRAIN + " --model {model} --dataset {data} --save-dataset used", 2, ["is not empty"]),
    (TRAIN + " --model {model} --dataset {data} --forgetting absent.txt", 2, ["--forgetting is 'absent.txt'"]),
    (TRAIN + " --model {model} --dataset {data} --device gpu", 2, ["--device is 'gpu'"]),
    (TRAIN + " --model {model} --dataset {data} --prompt-column x --seed -1", 2, ["--prompt-column is 'x'", "--seed"]),
    (TRAIN + " --model {model} --dataset damaged.parquet", 1, ["damaged.parquet"]),
    (TRAIN + " --model {model} --dataset empty.csv", 1, ["the label in 20 rows of", "--skip-empty"]),
    ("--config absent.json", 2, ["absent.json"]),
    ("--resume absent", 2, ["absent"]),
    ("--output-dir {run} --model {model} --dataset {data}", 2, ["is not empty"]),
    ("data --model ./absent --dataset {data}", 2, ["./absent"]),
    ("data --model {model} --dataset table.csv", 2, ["has no column 'text'"]),
    ("data --model {model} --dataset damaged.parquet", 1, ["damaged.parquet"]),
    ("explain --row x --batch-size 0", 2, ["--row is 'x'", "--batch-size is 0"]),
    ("explain --model ./absent --dataset {data}", 2, ["./absent"]),
    # predict
    ("predict", 2, ["RUN"]),
    ("predict ./absent text", 2, ["./absent"]),
    ("predict {run}s text", 2, ["there is no run"]),
    ("predict {here}/lines.txt text", 2, ["is a file"]),
    ("predict {model} text", 2, ["--label-names"]),
    ("predict {run} text --batch-size x --xyzzy --max-length 1", 2, ["--batch-size", "--xyzzy", "--max-length"]),
    ("predict {run} --file absent.txt --xyzzy", 2, ["cannot read absent.txt", "--xyzzy"]),
    ("predict {run} --file table.csv", 2, ["has no column 'text'"]),
    ("predict {run} --file table.csv --text-column body --output x.doc", 2, ["it must end in .csv"]),
    ("predict {run} text --encoding latin-1 --delimiter ;", 2, ["--encoding is of files", "--delimiter is of tables"]),
    ("predict {run} text --json --output x.csv", 2, ["--json prints"]),
    ("predict {run} --file damaged.parquet", 1, ["damaged.parquet"]),
    ("predict {damaged_run} text", 1, ["model.safetensors"]),
    # evaluate
    ("evaluate", 2, ["RUN"]),
    ("evaluate {run}s", 2, ["does not record its training data"]),
    ("evaluate ./absent --dataset {data}", 2, ["./absent"]),
    ("evaluate {run} --dataset absent.csv", 2, ["there is no file 'absent.csv'"]),
    ("evaluate {run} --dataset several --dataset-config a --split test", 2, ["has no test split"]),
    ("evaluate {run} --split dev --mistakes -1 --batch-size x", 2, ["--split is 'dev'", "--mistakes", "--batch"]),
    ("evaluate {run} --dataset table.csv", 2, ["has no column 'text'"]),
    ("evaluate {run} --prompt-column x --xyzzy", 2, ["--prompt-column is 'x'", "--xyzzy"]),
    ("evaluate {run} --dataset damaged.parquet", 1, ["damaged.parquet"]),
    # generate and report
    ("generate ./absent text", 2, ["./absent"]),
    ("generate {run} text --top-k 0 --max-new-tokens x --xyzzy", 2, ["--top-k", "--max-new-tokens", "--xyzzy"]),
    ("generate {damaged_run} text", 1, ["model.safetensors"]),
    ("report absent --xyzzy", 2, ["absent", "--xyzzy"]),
]


@pytest.mark.parametrize(("command", "status", "parts"), SLIPS, ids=[slip[0] for slip in SLIPS])
def test_the_exit_status_follows_one_rule_and_all_problems_are_reported(places, capsys, command, status, parts):
    assert main([word.format(**places) for word in command.split()]) == status
    err = capsys.readouterr().err
    assert all(part in err for part in parts), err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len([line for line in err.splitlines() if not line.startswith("Note: ")])
    assert "Traceback" not in err
    assert "pickle" not in err
    if "predict" in command or "evaluate" in command or "generate" in command:
        assert "--model" not in err, "these commands have no such flag"


# --- flags that have no effect ----------------------------------------------------------------------------------------

IGNORED = {
    "model": "x",
    "model_revision": "v1",
    "dataset": "x.csv",
    "dataset_config": "x",
    "dataset_revision": "v1",
    "text_column": "body",
    "label_column": "stars",
    "delimiter": ";",
    "encoding": "cp1252",
}


@pytest.mark.parametrize("command", [[], ["data"], ["explain"]])
def test_the_demo_refuses_the_users_inputs_and_names_all(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = {f"--{name.replace('_', '-')}": value for name, value in IGNORED.items()}
    words = [word for pair in flags.items() for word in pair]
    assert main([*command, "--demo", *words]) == 2
    (problem,) = capsys.readouterr().err.splitlines()
    assert all(flag in problem for flag in flags)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_refuses_the_inputs_of_a_config_file_and_takes_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps({"dataset": "x.csv", "text_column": "text", "batch_size": 4}))
    assert main(["--demo", "--config", "c.json"]) == 2
    (problem,) = capsys.readouterr().err.splitlines()
    assert problem.endswith("leave out --demo, or dataset of the --config")
    assert main(["--demo", "--device", "cpu", "--max-steps", "1"]) == 0
    again = ["--config", "runs/demo/config.json", "--output-dir", "again", "--max-steps", "1"]
    assert main(again) == 0, "the file of a demo"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--completion-column c --text-column t --label-column l", "leave out --text-column and --label-column"),
        ("--completion-column c --label-names a,b", "--label-names are words for labels"),
        ("--prompt-column q", "without --completion-column"),
        ("--max-skipped-steps 3", "--on-nonfinite skip"),
    ],
)
def test_a_flag_that_another_leaves_without_effect_is_refused(flags, message, capsys):
    assert main(flags.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--delimiter", ";"), ("--encoding", "cp1252")])
def test_a_flag_of_text_files_is_said_to_have_no_effect_on_parquet(inputs, tmp_path, capsys, flag, value):
    assert main(["data", *inputs[:4], flag, value]) == 0
    assert f"Note: {flag} has no effect" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["nonsense", "hex", "cp1252\0", "undefined"])
@pytest.mark.parametrize("command", ["train", "data", "evaluate", "predict"])
def test_an_unknown_encoding_is_refused_whatever_the_file(finished, inputs, tmp_path, capsys, command, encoding):
    file = next(Path(inputs[3]).rglob("*.parquet"))
    arguments = {
        "train": [*inputs, "--output-dir", str(tmp_path / "run")],
        "data": ["data", *inputs[:4]],
        "evaluate": ["evaluate", str(finished), "--dataset", str(file)],
        "predict": ["predict", str(finished), "--file", str(file)],
    }[command]
    assert main([*arguments, "--encoding", encoding]) == 2
    assert "--encoding is " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- a run as a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["final", "checkpoint-2", "checkpoint-1"])
def test_a_run_or_checkpoint_is_a_model_to_train_on(finished, inputs, tmp_path, capsys, which):
    source = tmp_path / "my run"
    shutil.copytree(finished, source)
    if which != "final":
        shutil.rmtree(source / "final")
    if which == "checkpoint-1":
        (source / "checkpoint-2" / "model.safetensors").write_bytes(b"12345678{")
    flags = ["--device", "cpu", "--precision", "fp32", "--learning-rate", "0", "--max-steps", "1"]
    run = tmp_path / "next"
    assert main(["--model", str(source), *inputs[2:4], *flags, "--output-dir", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"Note: --model is the run {source}: the model is read from {source / which}" in out
    assert f"python run.py predict {run} " in out
    texts = ["a film", "another"]
    assert ft.load(run, device="cpu").predict(texts) == ft.load(source / which, device="cpu").predict(texts)
    assert main(["--resume", str(run), "--max-steps", "2"]) == 0
    assert main(["data", "--model", str(source), *inputs[2:4]]) == 0


def test_a_checkpoint_of_another_program_is_a_model(finished, tmp_path):
    theirs = tmp_path / "checkpoint-500"
    shutil.copytree(finished / "final", theirs)
    (theirs / "trainer_state.json").write_text("{}")
    assert ft.load(theirs, device="cpu").predict(["a film"]) == ft.load(finished, device="cpu").predict(["a film"])


def test_suggested_commands_quote_paths(inputs, tmp_path, capsys):
    run = tmp_path / "it's a run"
    assert main([*inputs, "--max-steps", "1", "--output-dir", str(run)]) == 0
    quoted = "'" + str(run).replace("'", "'\"'\"'") + "'"
    assert f"python run.py predict {quoted} " in capsys.readouterr().out
