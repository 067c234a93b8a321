"""The command `export`: where it writes, what it replaces, what it refuses, and what a failure leaves."""

import json
import shutil
import sys

import pytest
from huggingface_hub import ModelCard, metadata_load

from ft.cli.main import main
from tests.faults import Faults


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--precision", "fp32", "--max-length", "20", "--max-steps", "4", "--save-steps", "2"]
    assert main([*inputs, *flags, "--output-dir", str(run)]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of a finished run, as `runs/it` in the current directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "it")
    return tmp_path / "runs" / "it"


def error_of(capsys, *arguments, status=2):
    capsys.readouterr()
    assert main(["export", *arguments]) == status
    return capsys.readouterr().err


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("source", ["runs/it", "runs/it/", "runs/it/final"])
def test_an_export_of_a_run_is_in_the_run(run, capsys, source):
    assert main(["export", source, "--to", "classifier"]) == 0
    assert capsys.readouterr().out.startswith("runs/it/classifier: classifier, ")
    expected = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert names_in(run / "classifier") == expected
    assert main(["export", source, "--to", "gguf", "--dtype", "f16"]) == 0
    assert names_in(run / "gguf") == ["README.md", "model-f16.gguf"]


@pytest.mark.parametrize("to", ["classifier", "gguf"])
@pytest.mark.parametrize("quiet", [True, False])
def test_a_line_is_shown_while_a_file_is_written(run, capsys, monkeypatch, to, quiet):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["export", "runs/it", "--to", to, *(["--quiet"] if quiet else [])]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"runs/it/{to}: {to}, ")
    line = f"Writing runs/it/{to} ...\r\x1b[K"
    assert err == "" if quiet else err.endswith(line)


def test_an_earlier_export_is_replaced_only_on_request(run, capsys):
    assert main(["export", "runs/it", "--to", "gguf"]) == 0
    before = (run / "gguf" / "README.md").stat().st_ino
    message = "the output 'runs/it/gguf' exists: --overwrite replaces it, another --output keeps it"
    assert message in error_of(capsys, "runs/it", "--to", "gguf")
    assert (run / "gguf" / "README.md").stat().st_ino == before
    assert main(["export", "runs/it", "--to", "gguf", "--dtype", "f16", "--overwrite"]) == 0
    assert names_in(run / "gguf") == ["README.md", "model-f16.gguf"]


@pytest.mark.parametrize("to", ["classifier", "gguf"])
@pytest.mark.parametrize("output", ["runs/it", "runs/it/final", ".", "..", "/", "notes", "model"])
def test_no_other_directory_is_replaced(run, tmp_path, capsys, to, output):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    (tmp_path / "model").mkdir()  # with only the names of an export
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(run / "final" / name, tmp_path / "model")
    before = sorted(map(str, tmp_path.rglob("*")))
    message = error_of(capsys, "runs/it", "--to", to, "--output", output, "--overwrite")
    assert f"the output {output!r} has other files than an export: name another by --output" in message
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_link_or_a_file_is_not_replaced(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "broken").symlink_to("nowhere")
    for name in ("file", "link", "broken"):
        message = error_of(capsys, "runs/it", "--to", "gguf", "--output", name, "--overwrite")
        assert f"the output {name!r} is not a directory" in message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["runs/it"], 2, "--to is missing, it must be classifier or gguf"),
        (["runs/it", "--to", "onnx"], 2, "error: --to is 'onnx', it must be one of classifier, gguf\n"),
        (["runs/it", "--to", "classifier", "--dtype", "f16"], 2, "--dtype does not apply to --to classifier"),
        (["runs/it", "--to", "gguf", "--max-length", "9"], 2, "--max-length does not apply to --to gguf"),
        (["runs/it", "--to", "gguf", "--dtype", "q4"], 2, "--dtype is 'q4', it must be one of f32, f16"),
        (["runs/it", "--to", "classifier", "--max-length", "1"], 2, "--max-length is 1, it must be at least 2"),
        (["runs/it", "--to", "classifier", "--label-names", "good,good ones"], 2, "begin with the same token"),
        (["runs/it/checkpoint-4", "--to", "gguf"], 2, "is not a run directory: name a directory to write by --output"),
        (["runs", "--to", "gguf"], 2, "'runs' is not a run directory"),
        (["runs/it/final/config.json", "--to", "gguf", "--output", "x"], 2, "config.json is a file"),
        (["runs/nothing", "--to", "gguf", "--output", "x"], 2, "there is no run runs/nothing; in runs are it"),
    ],
)
def test_what_is_refused(run, tmp_path, capsys, arguments, status, message):
    before = sorted(map(str, tmp_path.rglob("*")))
    assert message in error_of(capsys, *arguments, status=status)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_missing_format_is_reported_with_the_other_mistakes(run, capsys):
    errors = error_of(capsys, "runs/it", "--max-length", "1", "--label-names", "\udcff", "--dtype", "q4").splitlines()
    assert [error.partition(", it must")[0] for error in errors] == [
        "error: --dtype is 'q4'",
        "error: --to is missing",
        "error: --max-length is 1",
        "error: --label-names is '\\udcff'",
    ]


def test_a_checkpoint_and_a_model_without_names_are_exported_by_flags(run, inputs, tmp_path):
    assert main(["export", "runs/it/checkpoint-2", "--to", "classifier", "--output", "new/second"]) == 0
    assert json.loads((tmp_path / "new" / "second" / "config.json").read_text())["id2label"] == {"0": "neg", "1": "pos"}
    flags = ["--label-names", "bad, good,so so", "--max-length", "9", "--output", "third"]
    assert main(["export", inputs[1], "--to", "classifier", *flags]) == 0
    assert json.loads((tmp_path / "third" / "config.json").read_text())["label2id"] == {"bad": 0, "good": 1, "so so": 2}
    assert json.loads((tmp_path / "third" / "tokenizer_config.json").read_text())["model_max_length"] == 8
    assert metadata_load(tmp_path / "third" / "README.md")["pipeline_tag"] == "text-classification"


def test_completions_have_no_classifier(run, tmp_path, capsys):
    settings = json.loads((run / "config.json").read_text())
    settings |= {"prompt_column": "q", "completion_column": "a"}
    (run / "config.json").write_text(json.dumps(settings))
    message = error_of(capsys, "runs/it", "--to", "classifier")
    assert (
        "runs/it was trained on completions and has no labels: a classifier needs them, --to gguf does not" in message
    )


def test_a_model_without_labels_has_no_classifier(inputs, tmp_path, capsys):
    flags = ["--to", "classifier", "--output", str(tmp_path / "x")]
    assert "does not name its labels: name them by --label-names" in error_of(capsys, inputs[1], *flags, status=2)
    assert names_in(tmp_path) == []


def test_a_fault_at_any_step_leaves_the_earlier_export_or_the_new_one(run, tmp_path, monkeypatch, capsys):
    GGUFReader = pytest.importorskip("gguf").GGUFReader
    assert main(["export", "runs/it", "--to", "gguf"]) == 0
    shutil.copytree(run / "gguf", tmp_path / "kept")
    before = {name: (run / "gguf" / name).read_bytes() for name in names_in(run / "gguf")}
    failures, fails_at, is_reached = 0, 0, True
    while is_reached:
        fails_at += 1
        with monkeypatch.context() as patch:
            faults = Faults(patch, fails_at)
            status = main(["export", "runs/it", "--to", "gguf", "--dtype", "f16", "--overwrite"])
            is_reached = faults.count >= fails_at
        written = {name: (run / "gguf" / name).read_bytes() for name in names_in(run / "gguf")}
        if status == 1:
            assert "No space left on device" in capsys.readouterr().err
            failures += written == before
        if written != before:  # it failed only to flush the rename, or to delete what has been replaced
            assert sorted(written) == ["README.md", "model-f16.gguf"]
            assert GGUFReader(run / "gguf" / "model-f16.gguf").tensors
            shutil.rmtree(run / "gguf")
            shutil.copytree(tmp_path / "kept", run / "gguf")
    assert failures > 10


def test_the_card_is_that_of_the_run_with_another_use(run):
    assert main(["export", "runs/it", "--to", "classifier"]) == 0
    assert main(["export", "runs/it", "--to", "gguf"]) == 0
    own, classifier, gguf = (ModelCard.load(run / name / "README.md") for name in ("final", "classifier", "gguf"))
    assert classifier.data.pipeline_tag == "text-classification"
    assert gguf.data.library_name == "gguf"
    for card in (classifier, gguf):
        assert [vars(each) for each in card.data.eval_results] == [vars(each) for each in own.data.eval_results]
        for part in ("## Data", "## Results", "## Settings", "## Limits"):
            assert card.text.count(part) == own.text.count(part) == 1
        assert card.text.partition("## How to use it")[0] == own.text.partition("## How to use it")[0]
        assert "run.py export" not in card.text


@pytest.mark.parametrize(
    "content", [b"", b"no header", b"---\n: [\n---\n# x", b"\xff\xfe", b"---\nmodel-index: 3\n---\n"]
)
def test_an_edited_card_does_not_prevent_an_export(run, content):
    (run / "final" / "README.md").write_bytes(content)
    assert main(["export", "runs/it", "--to", "classifier"]) == 0
    assert metadata_load(run / "classifier" / "README.md")["pipeline_tag"] == "text-classification"
    assert ModelCard.load(run / "classifier" / "README.md").text.count('pipeline("text-classification"') == 1


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_exports_of_an_earlier_model_do_not_stay_unnoticed(run, inputs, capsys, dtype):
    """A new run deletes them with `final/`; a longer one names them, and the command that writes the same file."""
    assert main(["export", "runs/it", "--to", "gguf", "--dtype", dtype]) == 0
    capsys.readouterr()
    assert main(["--resume", "runs/it", "--max-steps", "6"]) == 0
    note = "Note: runs/it/gguf was exported from the earlier model; to replace it: python run.py "
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(note)]
    assert main(command.removeprefix(note).split()) == 0
    assert [path.name for path in (run / "gguf").glob("*.gguf")] == [f"model-{dtype}.gguf"]
    capsys.readouterr()
    assert main([*inputs, "--max-steps", "2", "--output-dir", "runs/it", "--overwrite"]) == 0
    assert not (run / "gguf").exists()
    assert "Note: runs/it/gguf" not in capsys.readouterr().out
