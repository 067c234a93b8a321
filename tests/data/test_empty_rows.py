"""Rows without a text, label or completion: all are named by file and line, and `--skip-empty` leaves them out."""

import json

import datasets
import pandas
import pytest

from ft.cli.main import main
from ft.data.tables import Columns, read_split
from ft.errors import FtError

TEXTS = ["a fine film", None, "dull", "", "  ", "a good one", "so so"]
LABELS = ["pos", "neg", None, "neg", "pos", "pos", "neg"]


def write(path, texts=TEXTS, labels=LABELS):
    frame = pandas.DataFrame({"text": texts, "label": labels})
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        case _:
            frame.to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("name", "label", "text"),
    [
        ("x.jsonl", r"row 2 of .*x.jsonl \(line 3\)", r"row 1 of .*x.jsonl \(line 2\)"),
        ("x.parquet", "row 2 of .*x.parquet", "row 1 of .*x.parquet"),
    ],
)
def test_all_missing_values_are_named_at_once(tmp_path, name, label, text):
    with pytest.raises(FtError, match=rf"the text in {text} is missing; the label in {label} is missing; .*skip-empty"):
        read_split("train", [write(tmp_path / name)])


def test_many_missing_labels_are_counted_and_the_first_named(tmp_path):
    path = write(tmp_path / "x.csv", ["a text"] * 40, [None] * 25 + ["pos", "neg", "pos"] * 5)
    with pytest.raises(FtError, match=r"the label in 25 rows of .* \(lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, \.\.\.\)"):
        read_split("train", [path])


def test_blank_texts_are_kept_with_a_note(tmp_path):
    path = write(tmp_path / "x.csv", ["a", "", " ", "b"], ["pos", "neg", "pos", "neg"])
    split = read_split("train", [path])
    assert split.texts == ["a", "", " ", "b"]
    (note,) = split.notes
    assert "the text in 2 rows of" in note
    assert "(lines 3, 4) is blank, and is kept" in note


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet"])
def test_skip_empty_keeps_the_rows_that_pandas_and_datasets_keep(tmp_path, name):
    path = write(tmp_path / name)
    reader = {"csv": "csv", "jsonl": "json", "parquet": "parquet"}[path.suffix[1:]]
    loaded = datasets.load_dataset(reader, data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    kept = loaded.filter(lambda row: bool(row["label"] and row["text"] and row["text"].strip()))
    split = read_split("train", [path], skip_empty=True)
    assert split.texts == list(kept["text"])
    assert [split.label_names[label] for label in split.labels] == list(kept["label"])
    assert split.rows == (0, 5, 6)
    assert [split.place(row).line for row in range(3)] == ([None] * 3 if name == "x.parquet" else LINES[name])
    assert "4 rows of" in split.notes[-1]
    assert split.notes[-1].endswith("without text or label: left out")


LINES = {"x.csv": [2, 7, 8], "x.jsonl": [1, 6, 7]}


def test_rows_of_several_files_keep_their_places(tmp_path):
    paths = [write(tmp_path / "a.csv"), write(tmp_path / "b.jsonl")]
    split = read_split("train", paths, skip_empty=True)
    assert split.rows == (0, 5, 6, 7, 12, 13)
    places = [split.only([1, 4]).place(row) for row in (0, 1)]
    assert places == [(paths[0], 5, 7), (paths[1], 5, 6)]
    assert split.where(4) == f"row 5 of {paths[1]} (line 6)"


def test_nothing_left_is_an_error(tmp_path):
    path = write(tmp_path / "x.csv", [" ", "a"], ["pos", None])
    with pytest.raises(FtError, match="--skip-empty leaves no row of"):
        read_split("train", [path], skip_empty=True)


def test_completions_may_follow_a_blank_prompt_but_not_be_missing(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [("", "one"), ("q", None), ("q", " "), ("q", "two")]
    path.write_text("".join(json.dumps(dict(zip(("q", "a"), row, strict=True))) + "\n" for row in rows))
    columns = Columns(text="q", completion="a")
    with pytest.raises(FtError, match=r"the a in row 1 of .* \(line 2\) is missing"):
        read_split("train", [path], columns)
    split = read_split("train", [path], columns, skip_empty=True)
    assert (split.texts, split.completions) == (["", "q"], ["one", "two"])


def test_a_run_records_that_it_skips_and_evaluate_has_the_flag_too(inputs, tmp_path, capsys):
    texts = ["a fine film", "a dull film", None, ""] * 15
    write(tmp_path / "x.jsonl", texts, ["pos", "neg", "pos", "neg"] * 15)
    run = str(tmp_path / "run")
    arguments = [*inputs[:2], "--dataset", str(tmp_path / "x.jsonl"), "--device", "cpu", "--max-steps", "2"]
    assert main([*arguments, "--output-dir", run]) == 1
    assert "15 rows of" in capsys.readouterr().err
    assert main([*arguments, "--output-dir", run, "--skip-empty", "--save-steps", "1"]) == 0
    assert "27 examples to train on, 3 examples to validate" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["skip_empty"] is True
    assert main(["evaluate", run, "--device", "cpu"]) == 0
    assert main(["evaluate", run, "--device", "cpu", "--dataset", str(tmp_path / "x.jsonl")]) == 1
    capsys.readouterr()
    assert main(["evaluate", run, "--device", "cpu", "--dataset", str(tmp_path / "x.jsonl"), "--skip-empty"]) == 0
    assert "x.jsonl: 30 examples" in capsys.readouterr().out
