"""The task of a saved model: kept by copies of its directory, and by `transformers`."""

import json
import shutil

import pytest
import transformers

import ft
from ft.checkpoint.saved_task import SavedTask, read_task, task_fields
from ft.cli.main import main
from ft.io.plain_files import read_json


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A finished run whose texts may have at most 9 tokens."""
    run = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--max-steps", "3", "--max-length", "9", "--precision", "fp32", "--output-dir", str(run)]
    assert main([*inputs, *flags]) == 0
    return run


@pytest.mark.parametrize("name", ["final", "checkpoint-3"])
def test_a_copy_of_a_saved_model_predicts_as_in_the_run(run, name, tmp_path):
    texts = ["the plot is dull , but the acting is superb , and the rest is not to be described in a few words ."]
    expected = ft.load(run, device="cpu").predict(texts)
    target = tmp_path / "elsewhere" / name
    shutil.copytree(run / name, target)
    copied = ft.load(target, device="cpu")
    assert (copied.max_length, copied.label_names) == (9, ("neg", "pos"))
    assert copied.predict(texts) == expected
    assert ft.load(target, device="cpu", max_length=32).predict(texts) != expected


def test_evaluation_of_a_copy_is_that_of_the_run(run, inputs, tmp_path, capsys):
    shutil.copytree(run / "final", tmp_path / "copy")
    records = []
    for model in (run, tmp_path / "copy"):
        capsys.readouterr()
        assert main(["evaluate", str(model), "--dataset", inputs[3], "--device", "cpu", "--json"]) == 0
        records.append(json.loads(capsys.readouterr().out))
    of_the_run = {"majority_label", "majority_baseline"}  # of the training labels, which the copy does not know
    assert {key: records[0][key] for key in records[0].keys() - of_the_run} == {
        key: records[1][key] for key in records[1].keys() - of_the_run
    }


def test_transformers_keeps_the_task_when_it_saves_the_model_again(run, tmp_path):
    transformers.AutoModelForCausalLM.from_pretrained(run / "final").save_pretrained(tmp_path)
    assert read_task(read_json(tmp_path / "config.json")) == SavedTask(("neg", "pos"), 9)


def test_models_of_earlier_versions_take_the_length_of_the_run_that_they_are_in(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "final" / "config.json"
    published = read_json(config)
    del published["task_specific_params"]
    published["id2label"] = {"0": "neg", "1": "pos"}
    config.write_text(json.dumps(published))
    loaded = ft.load(tmp_path / "run", device="cpu")
    assert (loaded.max_length, loaded.label_names) == (9, ("neg", "pos"))


@pytest.mark.parametrize(
    ("published", "task"),
    [
        (task_fields(["1", "3"], 20), SavedTask(("1", "3"), 20)),
        (task_fields([], 20), SavedTask(None, 20)),
        (task_fields([], None), SavedTask(None, None)),
        ({"id2label": {"0": "neg", "1": "pos"}}, SavedTask(("neg", "pos"), None)),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, SavedTask(None, None)),
        ({"id2label": {"0": "a", "1": "b"}, **task_fields(["c", "d"], 2)}, SavedTask(("c", "d"), 2)),
        ({"task_specific_params": {"text-generation": {"max_length": 50}}}, SavedTask(None, None)),
        ({"task_specific_params": {"ft": {"label_names": [1], "max_length": True}}}, SavedTask(None, None)),
        ({"task_specific_params": {"ft": [3]}, "id2label": []}, SavedTask(None, None)),
        ({"task_specific_params": None}, SavedTask(None, None)),
        ({"task_specific_params": {"ft": {"label_names": [], "max_length": 1}}}, SavedTask(None, None)),
    ],
)
def test_what_is_not_a_task_is_ignored(published, task):
    assert read_task(published) == task
