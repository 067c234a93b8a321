"""What a run on classes of very different sizes reports: the baseline that it has to beat, in every place."""

import json

import pytest

from ft.cli.main import main
from ft.report.console import rows_of_several_labels
from tests.conftest import write_parquet


@pytest.fixture(scope="module")
def unequal(inputs, tmp_path_factory):
    """A run on 95 % of one class that has learned nothing: it always answers with that class."""
    folder = tmp_path_factory.mktemp("unequal")
    (folder / "data").mkdir()
    for split, count in (("train", 100), ("validation", 40), ("test", 20)):
        labels = [0 if row % 20 == 7 else 1 for row in range(count)]
        texts = [f"the plot is {'dull' if label == 0 else 'superb'} number {row}" for row, label in enumerate(labels)]
        write_parquet(folder / "data" / f"{split}.parquet", texts, labels)
    flags = ["--dataset", str(folder / "data"), "--output-dir", str(folder / "run"), "--max-steps", "12"]
    assert main([*inputs, *flags]) == 0
    return folder / "run"


NOTE = "accuracy does not beat the majority baseline"


def test_a_run_that_learned_nothing_is_reported_as_such(unequal, inputs, capsys):
    """In metrics.jsonl, scores.json, the model card and the report."""
    events = [json.loads(line) for line in (unequal / "metrics.jsonl").read_text().splitlines()]
    for split in ("eval", "test"):
        event = next(event for event in events if f"{split}_loss" in event)
        assert event[f"{split}_accuracy"] == event[f"{split}_majority_baseline"] == 0.95
        assert event[f"{split}_macro_f1"] == pytest.approx(0.95 / 1.95)  # F1 of 2 * 0.95 / 1.95 and of 0
    scores = json.loads((unequal / "scores.json").read_text())
    assert (scores["majority_label"], scores["majority_baseline"]) == ("pos", 0.95)
    card = (unequal / "final" / "README.md").read_text()
    assert f"The validation and test {NOTE}" in card
    assert "| validation, majority baseline | 95.00% | | |" in card
    assert main(["report", str(unequal)]) == 0
    page = (unequal / "report.html").read_text(encoding="utf-8")
    assert "(majority baseline <b>95.00%</b>, always <bdi>pos</bdi>, <b>which it does not beat</b>)" in page
    assert "validation macro F1" in page


def test_the_summary_has_the_baseline_and_examples_of_both_classes(unequal, capsys):
    assert main(["--config", str(unequal / "config.json"), "--overwrite"]) == 0
    output = capsys.readouterr().out
    assert "accuracy 95.00% (majority baseline 95.00%), macro F1 0.4872" in output
    baseline = "Majority baseline, always answering pos: 95.00% validation, 95.00% test accuracy."
    assert f"Macro F1 0.4872 at the end, 0.4872 at best, 0.4872 on the test split. {baseline}" in output
    assert f"WARNING: The validation and test {NOTE}" in output
    examples = output.partition("Three validation examples:")[2]
    assert examples.count("wrong, true label neg") == 1
    assert examples.count("correct") == 2


def test_evaluate_has_the_baseline_of_the_training_labels(unequal, inputs, tmp_path, capsys):
    data = tmp_path / "data.parquet"
    write_parquet(data, ["the plot is dull"] * 3 + ["the plot is superb"], [0, 0, 0, 1])
    assert main(["evaluate", str(unequal), "--dataset", str(data), "--device", "cpu", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["majority_label"], result["majority_baseline"]) == ("pos", 0.25)
    assert "Note" not in captured.err
    assert {mistake["predicted"] for mistake in result["mistakes"]} == {"pos"}
    assert main(["evaluate", str(unequal), "--split", "test", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "test: 20 examples, accuracy 95.00%, macro F1 0.4872" in output
    assert "Majority baseline, always pos: accuracy 95.00%, which the model does not beat\n" in output
    _, model, *_ = inputs  # of which no run has recorded anything
    flags = ["--dataset", str(data), "--label-names", "neg,pos", "--device", "cpu", "--json"]
    assert main(["evaluate", model, *flags]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["majority_baseline"] == 0.75
    assert "Note: the most frequent training label is not known" in captured.err


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        ([1, 1, 1, 1, 1, 1], [0, 2, 4]),
        ([1, 1, 1, 1, 1, 0], [0, 5, 4]),
        ([0, 1, 1, 1, 1, 1], [0, 2, 4]),
        ([1, 0, 1, 1, 1, 1, 1, 1, 2], [0, 8, 1]),
        ([1, 0], [0, 1]),
        ([1], [0]),
    ],
)
def test_examples_are_of_as_many_labels_as_there_are(labels, rows):
    found = rows_of_several_labels(labels, 3)
    assert found == rows
    assert len({labels[row] for row in found}) == min(3, len(set(labels)))
