"""Labels that are numbers other than 0, 1, ...: stars, -1 and 1, floats, booleans; from the file to `evaluate`."""

import json
import re

import datasets
import pandas
import pytest

import ft
from ft.cli.main import main

STARS = [1, 2, 4, 5]


def write(path, labels):
    frame = pandas.DataFrame({"body": [f"film number {n} is fine" for n in range(len(labels))], "stars": labels})
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        case _:
            frame.to_parquet(path)
    return path


@pytest.fixture
def train(inputs, tmp_path):
    def train(path, *flags):
        arguments = ["--dataset", str(path), "--text-column", "body", "--label-column", "stars", "--device", "cpu"]
        arguments += ["--output-dir", str(tmp_path / "run"), "--max-steps", "2", "--precision", "fp32"]
        return main([*inputs[:2], *arguments, *flags])

    return train


def confusion(run, capsys, *flags):
    capsys.readouterr()
    assert main(["evaluate", str(run), "--device", "cpu", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet"])
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (STARS, ["1", "2", "4", "5"]),
        ([1.0, 2.0, 4.0, 5.0], ["1", "2", "4", "5"]),
        ([-1, 1], ["-1", "1"]),
        ([0, 10, 200], ["0", "10", "200"]),
        ([True, False], ["False", "True"]),
        (["9", "10", "100"], ["9", "10", "100"]),
    ],
    ids=str,
)
def test_numbers_are_their_own_names(train, tmp_path, capsys, name, labels, words):
    path = write(tmp_path / name, labels * 12)
    assert train(path) == 0
    assert f"labels {', '.join(words)}" in capsys.readouterr().out
    run = tmp_path / "run"
    model = ft.load(run / "final", device="cpu")
    assert list(model.label_names) == words
    assert set(model.predict(["a film"])[0].probabilities) == set(words)
    for record in (confusion(run, capsys), confusion(run, capsys, "--dataset", str(path))):
        assert record["labels"] == words
    assert [sum(row) for row in record["confusion"]] == [12] * len(words)
    assert train(path, "--resume", "--max-steps", "3") == 0


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
@pytest.mark.parametrize("labels", [STARS, [1.0, 2.0, 4.0, 5.0], [-2, -1, 1, 2]], ids=str)
def test_label_names_name_them_in_ascending_order(train, tmp_path, capsys, name, labels):
    path = write(tmp_path / name, (labels * 12)[:46])
    assert train(path, "--label-names", "awful,bad,good,superb") == 0
    out = capsys.readouterr().out
    assert f"the label {labels[0]:.0f} is awful, {labels[1]:.0f} is bad" in out
    run = tmp_path / "run"
    record = confusion(run, capsys, "--dataset", str(path))
    assert record["labels"] == ["awful", "bad", "good", "superb"]
    assert [sum(row) for row in record["confusion"]] == [12, 12, 11, 11]
    # Of a file in which some are absent, each number still is its name.
    few = write(tmp_path / f"few-{name}", [labels[1], labels[3], labels[3]])
    assert [sum(row) for row in confusion(run, capsys, "--dataset", str(few))["confusion"]] == [0, 1, 0, 2]
    assert sum(map(sum, confusion(run, capsys)["confusion"])) == 5, "its own validation rows"
    own = ft.Run(run, device="cpu")
    of_file = pandas.DataFrame({"body": ["a", "b", "c"], "stars": [labels[1], labels[3], labels[3]]})
    assert own.evaluate(of_file) == own.evaluate(["a", "b", "c"], ["bad", "superb", "superb"])
    with pytest.raises(
        ft.FtError, match=r"row 0 of the given split is 3, the model has .* \(awful, bad, good, superb\)"
    ):
        own.evaluate(["a"], [3])
    assert train(path, "--label-names", "awful,bad,good,superb", "--resume", "--max-steps", "3") == 0


@pytest.mark.parametrize("labels", [[1, 2, 3, 4, 5], [-1, 0, 1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_too_few_label_names_are_wrong_usage_and_all_labels_named(train, tmp_path, capsys, labels, name):
    path = write(tmp_path / name, labels * 12)
    assert train(path, "--label-names", "bad,good") == 2
    error = capsys.readouterr().err
    first = next(row for row, label in enumerate(labels) if label not in (0, 1))
    assert "--label-names has 2 names, bad, good, and the training rows have" in error
    assert f"{len(labels)} labels, {', '.join(map(str, labels))}, such as {labels[first]} in row {first} of" in error
    assert "name each, in ascending order, or correct the data" in error
    assert train(path, "--label-names", ",".join("abcde"[: len(labels)])) == 0


def test_a_label_that_the_model_does_not_have_is_named_by_file_and_line(train, tmp_path, capsys):
    assert train(write(tmp_path / "x.csv", STARS * 12)) == 0
    unknown = write(tmp_path / "unknown.csv", [1, 2, 3])
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu", "--dataset", str(unknown)]) == 1
    expected = f"the label in row 2 of {unknown} (line 4) is 3, the model has 1, 2, 4, 5"
    assert expected in capsys.readouterr().err


def of_words(labels):
    return [["awful", "bad"][label] for label in labels]


def of_features(labels, names):
    features = datasets.Features({"body": datasets.Value("string"), "stars": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"body": [f"film {n}" for n in range(len(labels))], "stars": labels}, features)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: pandas.DataFrame({"stars": [0, 1, 1, 0]}), [0, 1, 1, 0]),
        (lambda: pandas.DataFrame({"stars": [0.0, 1.0, 1.0]}), [0, 1, 1]),
        (lambda: pandas.DataFrame({"stars": of_words([0, 1, 1])}), [0, 1, 1]),
        (lambda: pandas.DataFrame({"stars": [" bad ", "awful"]}), [1, 0]),
        (lambda: of_features([0, 1, 1], ["awful", "bad"]), [0, 1, 1]),
        (lambda: of_features([0, 1, 1], ["bad", "awful"]), [1, 0, 0]),
        (lambda: of_features([2, 0, 0], ["bad", "unused", "awful"]), [0, 1, 1]),
        (lambda: of_features([0, 1, 1], ["one", "two"]), [0, 1, 1]),
        (lambda: of_features([0, 1, 1], ["good", "bad"]), "is 'good', the labels are awful, bad"),
        (lambda: pandas.DataFrame({"stars": [0, 2]}), r"is 2, the model has 0, 1 \(awful, bad\)"),
        (lambda: pandas.DataFrame({"stars": [0, -3]}), r"is -3, the model has 0, 1 \(awful, bad\)"),
        (lambda: pandas.DataFrame({"stars": ["bad", "good"]}), "is 'good', the labels are awful, bad"),
    ],
)
def test_python_and_the_command_line_number_labels_alike(train, tmp_path, capsys, make, expected):
    words = write(tmp_path / "words.csv", of_words([0, 1]) * 12)
    assert train(words) == 0
    run, path, table = tmp_path / "run", tmp_path / "mine.parquet", make()
    if isinstance(table, pandas.DataFrame):
        table.insert(0, "body", [f"film {n}" for n in range(len(table))])
    table.to_parquet(str(path))
    arguments = ["evaluate", str(run), "--device", "cpu", "--dataset", str(path), "--json"]
    capsys.readouterr()
    if isinstance(expected, str):
        with pytest.raises(ft.FtError, match=expected):
            ft.Run(run, device="cpu").evaluate(table)
        assert main(arguments) == 1
        assert re.search(expected, capsys.readouterr().err)
        return
    of_words_alone = ft.Run(run, device="cpu").evaluate(list(table["body"]), of_words(expected))
    assert ft.Run(run, device="cpu").evaluate(table) == of_words_alone
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert [sum(row) for row in record["confusion"]] == [expected.count(0), expected.count(1)]
    assert {name: record[name] for name in of_words_alone} == pytest.approx(of_words_alone)
