"""`evaluate --split all`: the figures over all rows, recomputed from the rows of --output, and by `transformers`."""

import json
import math
import re

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import transformers

from ft.cli.main import main
from ft.data.examples import END_OF_TEXT


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--epochs", "2", "--max-length", "20", "--precision", "fp32", "--output-dir", str(run)]
    assert main([*inputs, *flags]) == 0
    return run


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory):
    """A data set of three files with other columns; the validation split has fewer, and a test split of two files."""
    path = tmp_path_factory.mktemp("mine")
    names = ("neg", "pos")
    for split, parts in (("train", [(0, 40)]), ("validation", [(0, 12)]), ("test", [(40, 44), (44, 50)])):
        source = pq.read_table(f"{inputs[3]}/{'train' if split == 'test' else split}.parquet").to_pydict()
        for number, (first, last) in enumerate(parts):
            rows = range(first, last)
            table = pandas.DataFrame(
                {
                    "id": [f"{split}-{row}" for row in rows],
                    "text": source["text"][first:last],
                    "label": [names[label] for label in source["label"][first:last]],
                }
            )
            if split != "validation":
                table["stars"] = [row / 2 for row in rows]
            name = f"{split}-{number:05}-of-{len(parts):05}.csv" if len(parts) > 1 else f"{split}.csv"
            table.to_csv(path / name, index=False)
    return path


def evaluate(run, *flags):
    return main(["evaluate", str(run), "--device", "cpu", *map(str, flags)])


def macro_f1(true, predicted):
    """By the definition: the mean over the labels of 2 P R / (P + R)."""
    found = []
    for label in sorted({*true, *predicted}):
        hits = ((true == label) & (predicted == label)).sum()
        precision, recall = (hits / max((each == label).sum(), 1) for each in (predicted, true))
        found.append(0.0 if hits == 0 else 2 * precision * recall / (precision + recall))
    return np.mean(found)


def reference_loss(folder, table, max_length=20):
    """The mean cross-entropy of the label tokens over the vocabulary, by `transformers`, one text at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    losses = []
    for text, label in zip(table["text"], table["label"], strict=True):
        ids = [*tokenizer(text)["input_ids"], tokenizer.convert_tokens_to_ids(END_OF_TEXT)][-(max_length - 1) :]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1:]
        losses.append(F.cross_entropy(logits, torch.tensor(tokenizer(label)["input_ids"][:1])).item())
    return losses


def test_the_figures_over_all_rows_are_those_of_all_rows(finished, folder, tmp_path, capsys):
    output = tmp_path / "all.csv"
    flags = ["--dataset", folder, "--split", "all", "--json", "--mistakes", "60", "--output", output]
    assert evaluate(finished, *flags) == 0
    out, err = capsys.readouterr()
    assert f"62 rows are written to {output}." in err
    result = json.loads(out)
    assert list(result) == ["train", "validation", "test", "all"]
    table = pandas.read_csv(output, keep_default_na=False)
    assert table["split"].value_counts().to_dict() == {"train": 40, "validation": 12, "test": 10}
    losses = reference_loss(finished / "final", table)
    majority = json.loads((finished / "scores.json").read_text())["majority_label"]
    for name, record in result.items():
        rows = table if name == "all" else table[table["split"] == name]
        assert record["split"] == name
        assert sum(map(sum, record["confusion"])) == len(rows)
        assert record["accuracy"] == pytest.approx((rows["label"] == rows["predicted"]).mean())
        assert record["macro_f1"] == pytest.approx(macro_f1(rows["label"], rows["predicted"]))
        assert record["loss"] == pytest.approx(np.mean([losses[row] for row in rows.index]), rel=1e-4)
        assert record["majority_label"] == majority
        assert record["majority_baseline"] == pytest.approx((rows["label"] == majority).mean())
        wrong = rows[rows["label"] != rows["predicted"]].sort_values("probability", ascending=False, kind="stable")
        places = [(each["file"], each["line"], each["text"]) for each in record["mistakes"]]
        assert sorted(places) == sorted(zip(wrong["file"], wrong["line"], wrong["text"], strict=True))
        confidence = [each["probability"] for each in record["mistakes"]]
        assert confidence == sorted(confidence, reverse=True)


def test_all_rows_have_a_report_of_their_own_if_there_are_several_splits(finished, folder, capsys):
    assert evaluate(finished, "--dataset", folder, "--split", "all", "--mistakes", "2") == 0
    out = capsys.readouterr().out
    heads = re.findall(
        r"^(\S+): ([\d,]+) examples, accuracy \S+, macro F1 \S+, loss \S+, calibration", out, re.MULTILINE
    )
    assert heads == [("train", "40"), ("validation", "12"), ("test", "10"), ("all", "62")]
    assert out.count("Majority baseline, always ") == 4
    places = re.findall(r"line \d+ of (\S+)\)", out.partition("\nall: ")[2])
    assert places, "of several files the places name them"
    assert evaluate(finished, "--dataset", folder / "train.csv", "--split", "all") == 0
    assert re.findall(r"^(\S+): 40 examples", capsys.readouterr().out, re.MULTILINE) == ["train.csv"]


def test_of_a_single_file_all_rows_are_its_rows(finished, folder, capsys):
    assert evaluate(finished, "--dataset", folder / "train.csv", "--split", "all", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["train.csv", "all"]
    assert result["all"].pop("loss") == pytest.approx(result["train.csv"].pop("loss"))
    assert {**result["train.csv"], "split": "all"} == result["all"]


def test_the_training_file_of_a_run_is_evaluated_row_by_row_as_it_was_split(inputs, tmp_path, capsys):
    """Train and validation rows are drawn from one file: together they are each of its rows once."""
    texts = [f"film {n} is {'dull' if n % 2 else 'superb'}" for n in range(60)]
    table = pandas.DataFrame({"n": range(60), "text": texts, "label": ["pos", "neg"] * 30})
    table.to_csv(tmp_path / "mine.csv", index=False)
    run, output = tmp_path / "run", tmp_path / "all.csv"
    flags = ["--dataset", str(tmp_path / "mine.csv"), "--device", "cpu", "--max-steps", "1", "--output-dir", str(run)]
    assert main([*inputs[:2], *flags]) == 0
    capsys.readouterr()
    assert evaluate(run, "--split", "all", "--json", "--output", output) == 0
    result = json.loads(capsys.readouterr().out)
    assert {name: sum(map(sum, each["confusion"])) for name, each in result.items()} == {
        "train": 54, "validation": 6, "all": 60
    }  # fmt: skip
    written = pandas.read_csv(output).sort_values("n")
    assert list(written["n"]) == list(range(60))
    assert list(written["text"]) == texts
    assert list(written["row"]) == list(range(60))


def test_without_a_known_majority_it_is_that_of_the_rows(inputs, folder, capsys):
    flags = ["--dataset", folder, "--split", "all", "--label-names", "neg,pos", "--json"]
    assert evaluate(inputs[1], *flags) == 0
    out, err = capsys.readouterr()
    assert err.count("Note: the most frequent training label is not known") == 1
    assert "most frequent label of each split." in err
    for record in json.loads(out).values():
        counts = [sum(row) for row in record["confusion"]]
        assert record["majority_baseline"] == pytest.approx(max(counts) / sum(counts))


def test_texts_are_counted_over_all_splits(finished, folder, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "final")
    texts = [text for file in folder.iterdir() for text in pandas.read_csv(file)["text"]]
    lengths = sorted(len(tokenizer(text)["input_ids"]) + 2 for text in texts)
    limit = lengths[len(lengths) // 2]
    cut = sum(length > limit for length in lengths)
    assert 1 < cut < 62
    flags = ["--dataset", folder, "--split", "all", "--max-length", limit]
    assert evaluate(finished, *flags) == 0
    assert capsys.readouterr().err.count(f"Note: {cut} of 62 examples are longer than --max-length {limit}") == 1
    assert evaluate(finished, *flags, "--quiet") == 0
    assert capsys.readouterr().err == ""


# --- other columns ----------------------------------------------------------------------------------------------------


OWN = [
    "split",
    "file",
    "row",
    "line",
    "text",
    "label",
    "predicted",
    "probability",
    "probability_neg",
    "probability_pos",
]
READERS = {
    ".csv": lambda path: pandas.read_csv(path),
    ".jsonl": lambda path: pandas.read_json(path, lines=True),
    ".parquet": pandas.read_parquet,
}


@pytest.mark.parametrize("suffix", list(READERS))
def test_the_other_columns_of_all_files_are_kept(finished, folder, tmp_path, suffix):
    output = tmp_path / f"all{suffix}"
    assert evaluate(finished, "--dataset", folder, "--split", "all", "--output", output) == 0
    written = READERS[suffix](output)
    assert list(written.columns) == [*OWN, "id", "stars"]
    written["stars"] = pandas.to_numeric(written["stars"])  # values of a CSV file are text
    for _, row in written.iterrows():
        source = pandas.read_csv(row["file"]).iloc[row["row"]]
        assert (row["id"], row["text"], row["label"]) == (source["id"], source["text"], source["label"])
        stars = source.get("stars", math.nan)
        assert row["stars"] == stars or (math.isnan(row["stars"]) and math.isnan(stars))


def test_columns_with_the_names_of_added_ones_are_kept_and_noted(finished, tmp_path, capsys):
    table = pandas.DataFrame({"row": [7, 8], "body": ["a", "b"], "stars": ["neg", "pos"], "text": ["c", "d"]})
    table.to_csv(tmp_path / "mine.csv", index=False)
    columns = ["--text-column", "body", "--label-column", "stars"]
    flags = ["--dataset", tmp_path / "mine.csv", *columns, "--output", tmp_path / "o.csv"]
    assert evaluate(finished, *flags) == 0
    assert "Note: the data set has row, text already: the new columns are ft_split, ft_file" in capsys.readouterr().err
    written = pandas.read_csv(tmp_path / "o.csv")
    assert list(written.columns) == [*(f"ft_{name}" for name in OWN), "row", "text"]
    assert (list(written["ft_text"]), list(written["text"]), list(written["row"])) == (["a", "b"], ["c", "d"], [7, 8])
    assert evaluate(finished, *flags, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_columns_of_one_name_are_all_kept_and_one_row_is_one_row(finished, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("x,text,x,label,x.1\n1,a,2,neg,3\n")
    assert evaluate(finished, "--dataset", tmp_path / "mine.csv", "--output", tmp_path / "o.csv") == 0
    assert f"1 row is written to {tmp_path / 'o.csv'}." in capsys.readouterr().err
    head, row = (tmp_path / "o.csv").read_text().splitlines()
    assert sorted(head.split(",")[len(OWN) :]) == ["x", "x.1", "x.1.1"]
    assert sorted(row.split(",")[-3:]) == ["1", "2", "3"]


def test_rows_that_are_left_out_do_not_shift_the_columns(finished, tmp_path):
    table = pandas.DataFrame({"id": range(6), "text": ["a", "", "b", "c", "", "d"], "label": ["neg", "pos"] * 3})
    table.to_csv(tmp_path / "mine.csv", index=False)
    flags = ["--dataset", tmp_path / "mine.csv", "--skip-empty", "--output", tmp_path / "o.csv"]
    assert evaluate(finished, *flags) == 0
    written = pandas.read_csv(tmp_path / "o.csv")
    assert (list(written["id"]), list(written["text"])) == ([0, 2, 3, 5], list("abcd"))
