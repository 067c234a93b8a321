"""`predict` and `evaluate` on finished runs, from the command line and from Python."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import ft
from ft.checkpoint.store import checkpoints
from ft.cli.main import main
from ft.data.examples import END_OF_TEXT
from ft.errors import FtError
from ft.evaluation.classification import confident_mistakes, score_tables, scores
from ft.inference.classifier import load
from tests.conftest import write_parquet

ROOT = Path(__file__).parents[2]
TEXTS = ["the plot is dull .", "the acting is superb , and the plot is gripping .", ""]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A finished run of two epochs; its texts may have at most 20 tokens."""
    run = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--epochs", "2", "--max-length", "20", "--precision", "fp32", "--output-dir", str(run)]
    assert main([*inputs, *flags]) == 0
    return run


def expected_probabilities(folder, texts, max_length=20):
    """The same from `transformers`, one text at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    labels = [tokenizer(name)["input_ids"][0] for name in ("neg", "pos")]
    rows = []
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.convert_tokens_to_ids(END_OF_TEXT)][-(max_length - 1) :]
        with torch.no_grad():
            rows.append(model(torch.tensor([ids])).logits[0, -1, labels].softmax(dim=-1))
    return torch.stack(rows)


# --- from Python ------------------------------------------------------------------------------------------------------


def test_three_lines_of_python(finished):
    classifier = ft.load(finished, device="cpu")
    predictions = classifier.predict(TEXTS)
    expected = expected_probabilities(finished / "final", TEXTS)
    for prediction, row in zip(predictions, expected, strict=True):
        assert list(prediction.probabilities) == ["neg", "pos"]
        assert list(prediction.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert prediction.label == ("neg", "pos")[int(row.argmax())]
    assert classifier.max_length == 20, "that of the run"
    assert classifier.predict([]) == []
    assert classifier.predict(pandas.Series(["a film", "the cast"])) == classifier.predict(["a film", "the cast"])
    for wrong, message in (
        ("a film", "texts is 'a film', it must be a list: pass ['a film']"),
        (["a film", None], "text 2 is None, it must be a string"),
        ([3], "text 1 is 3, it must be a string"),
    ):
        with pytest.raises(ft.UsageError) as caught:
            classifier.predict(wrong)
        assert message in str(caught.value)


def test_a_long_text_is_read_as_in_training(finished):
    text = "the plot is dull , " * 30 + "but the acting is superb ."
    (prediction,) = load(finished, device="cpu").predict([text])
    expected = expected_probabilities(finished / "final", [text])[0]
    assert list(prediction.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("command", [["predict", "{run}", "a film"], ["evaluate", "{run}"]])
def test_more_tokens_than_positions_are_refused(finished, capsys, command):
    limit = transformers.AutoConfig.from_pretrained(finished / "final").n_positions
    words = [word.format(run=finished) for word in command]
    assert main([*words, "--device", "cpu", "--max-length", str(limit + 1)]) == 2
    assert f"--max-length is {limit + 1}, but {finished / 'final'} has {limit} positions" in capsys.readouterr().err
    assert main([*words, "--device", "cpu", "--max-length", str(limit)]) == 0
    with pytest.raises(ft.UsageError, match=f"has {limit} positions"):
        load(finished, device="cpu", max_length=limit + 1)


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_the_texts_that_lose_their_beginning_are_counted(finished, tmp_path, capsys, command):
    """A text of n tokens needs n + 2: end-of-text and the label come after it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "final")
    texts = ["a " * number for number in range(1, 30)]
    lengths = [len(tokenizer(text)["input_ids"]) + 2 for text in texts]
    table = pandas.DataFrame({"text": texts, "label": ["neg", "pos", "neg"] * 9 + ["pos"] * 2})
    table.to_csv(tmp_path / "texts.csv", index=False)
    words = [command, str(finished), "--file" if command == "predict" else "--dataset", str(tmp_path / "texts.csv")]
    words += ["--device", "cpu"]
    for limit in (max(lengths) - 1, min(lengths)):
        assert main([*words, "--max-length", str(limit)]) == 0
        cut = sum(length > limit for length in lengths)
        longer, keep = ("is longer", "keeps its") if cut == 1 else ("are longer", "keep their")
        expected = f"Note: {cut:,} of 29 examples {longer} than --max-length {limit} and {keep} end; "
        assert capsys.readouterr().err.count(expected) == 1
    assert main([*words, "--max-length", str(min(lengths)), "--quiet"]) == 0
    assert "Note" not in capsys.readouterr().err
    assert main([*words, "--max-length", str(max(lengths))]) == 0
    assert "longer than" not in capsys.readouterr().err


def test_every_place_of_a_model_is_found(finished, inputs, tmp_path):
    whole = load(finished, device="cpu").predict(TEXTS)
    newest = checkpoints(finished)[-1]
    assert load(finished / "final", device="cpu").predict(TEXTS) == whole
    assert load(str(newest), device="cpu").predict(TEXTS) == whole
    unfinished = tmp_path / "run"
    shutil.copytree(finished, unfinished)
    shutil.rmtree(unfinished / "final")
    assert load(unfinished, device="cpu").predict(TEXTS) == whole
    shutil.copytree(finished / "final", tmp_path / "moved")
    moved = load(tmp_path / "moved", device="cpu")
    assert (moved.max_length, moved.label_names) == (20, ("neg", "pos"))
    untrained = load(inputs[1], device="cpu", label_names=["neg", "pos"], max_length=9)
    assert untrained.max_length == 9
    assert untrained.predict(TEXTS) != whole


def test_what_cannot_be_loaded_is_refused(finished, inputs, tmp_path):
    with pytest.raises(FtError, match=r"does not name its labels: name them by --label-names neg,pos"):
        load(inputs[1]).predict(TEXTS)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "final")
    for folder in checkpoints(run):
        (folder / "state.json").unlink()
        with pytest.raises(FtError, match=r"is damaged: state.json is missing"):
            load(folder)
    with pytest.raises(FtError, match=r"no finished model and no complete checkpoint yet"):
        load(run)
    with pytest.raises(FtError, match=r"begin with the same token"):
        load(finished, label_names=["pos", "positive"])


def test_the_package_has_nothing_else():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        ft.lode  # noqa: B018


# --- predict ----------------------------------------------------------------------------------------------------------


def test_texts_from_arguments_as_a_table(finished, capsys):
    assert main(["predict", str(finished), *TEXTS[:2], "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    head, *rows = out.splitlines()
    assert head.split() == ["label", "neg", "pos", "text"]
    expected = expected_probabilities(finished / "final", TEXTS[:2])
    for row, text, probabilities in zip(rows, TEXTS, expected, strict=False):
        assert text in row
        assert row.split()[0] == ("neg", "pos")[int(probabilities.argmax())]
        assert row.split()[1] == f"{float(probabilities[0]):.2%}"
    assert "2 examples, " in err
    assert f"examples/s, by {finished / 'final'}" in err


class Pipe(io.StringIO):
    """A standard input that is no terminal."""

    def __init__(self, content):
        super().__init__()
        self.buffer = io.BytesIO(content)

    def isatty(self):
        return False


@pytest.mark.parametrize("way", ["file", "pipe"])
def test_texts_from_a_file_or_a_pipe_as_json(finished, tmp_path, monkeypatch, capsys, way):
    content = "\ufeff" + "\n".join(["ein schöner film", "", 'it says "no" \U0001f3ac']) + "\n"
    arguments = ["predict", str(finished), "--json", "--device", "cpu"]
    if way == "file":
        (tmp_path / "texts.txt").write_text(content, encoding="utf-8")
        arguments += ["--file", str(tmp_path / "texts.txt")]
    else:
        monkeypatch.setattr(sys, "stdin", Pipe(content.encode()))
    assert main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["ein schöner film", "", 'it says "no" \U0001f3ac']
    assert all(sum(line["probabilities"].values()) == pytest.approx(1.0) for line in lines)
    assert all(line["label"] == max(line["probabilities"], key=line["probabilities"].get) for line in lines)


class Terminal(Pipe):
    """A standard input at which a person sits."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "RUN"),
        (["{run}"], 2, "there are no examples"),
        (["{run}", "a", "--file", "x"], 2, "pass examples or --file, not both"),
        (["{run}", "a", "--batch-size", "0"], 2, "--batch-size is 0, it must be at least 1"),
        (["{run}", "a", "--max-length", "1"], 2, "--max-length is 1, it must be at least 2"),
        (["{run}", "a", "--batch-size", "x"], 2, "--batch-size is 'x', it must be a whole number"),
        (["{run}", "a", "--jsn"], 2, "--jsn"),
        (["{run}", "a", "--device", "gpu"], 2, "--device is 'gpu'"),
        (["{run}", "--file", "absent.txt"], 2, "cannot read absent.txt: No such file"),
        (["{run}", "--file", "/dev/null"], 1, "/dev/null has no lines"),
        (["{run}", "--file", "{latin}"], 1, "is not UTF-8"),
        (["{run}", "--file", "{latin}", "--encoding", "latein"], 2, "--encoding is 'latein', it must be an encoding"),
        (
            ["{run}", "a", "--output", "x.txt"],
            2,
            "--output is 'x.txt', it must end in .csv, .tsv, .json, .jsonl or .parquet",
        ),
        (["./absent", "a"], 2, "./absent"),
        (["{run}s", "a"], 2, "there is no run "),
        (["{latin}", "a"], 2, "latin.txt is a file: a run, a checkpoint or a model is a directory"),
        (["{unnamed}", "a"], 2, "does not name its labels: name them by --label-names neg,pos"),
        (["{run}", "good", "--label-names", "a,\udcf6"], 2, "--label-names is 'a,\\udcf6', it must be valid UTF-8"),
        (["{run}", "good", "sch\udcf6n"], 2, "text 2 is not UTF-8: it holds '\\udcf6' at character 3"),
        (["{run}", "a", "--label-names", "good,goodness"], 2, "begin with the same token"),
    ],
)
def test_mistakes_are_told_in_one_line(finished, inputs, tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.setattr(sys, "stdin", Terminal(b""))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    places = {"run": finished, "latin": tmp_path / "latin.txt", "unnamed": inputs[1]}
    assert main(["predict", *(argument.format(**places) for argument in arguments)]) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1


def test_lines_end_where_files_end_them_and_nowhere_else(finished, tmp_path, capsys):
    lines = ["one\u2028line", "one\x85line", "one\x0cline\x0b", "", "last"]
    (tmp_path / "texts.txt").write_bytes("\r\n".join(lines[:3]).encode() + b"\n" + "\r".join(lines[3:]).encode())
    assert main(["predict", str(finished), "--json", "--device", "cpu", "--file", str(tmp_path / "texts.txt")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert [row["text"] for row in rows] == lines
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4]
    (tmp_path / "texts.txt").write_bytes("schön\n".encode("cp1252"))
    arguments = ["predict", str(finished), "--json", "--device", "cpu", "--file", str(tmp_path / "texts.txt")]
    assert main(arguments) == 1
    assert "name its encoding, such as --encoding cp1252" in capsys.readouterr().err
    assert main([*arguments, "--encoding", "cp1252"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "schön"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_tables_are_read_as_the_data_set_is(finished, tmp_path, capsys, suffix):
    texts = ['he said "no" ,', "two\nlines", "a film", "", "NA"]
    frame = pandas.DataFrame({"id": range(5), "body": texts, "label": ["pos"] * 5})
    path = tmp_path / f"reviews{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif ".json" in suffix:
        frame.to_json(path, orient="records", lines=suffix == ".jsonl")
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    arguments = ["predict", str(finished), "--device", "cpu", "--file", str(path)]
    assert main(arguments) == 2
    assert "has no column 'text'; its columns are id, body, label: name one by --text-column" in capsys.readouterr().err
    expected = load(finished, device="cpu").predict(texts)
    for output in ("answers.csv", "answers.jsonl"):
        assert main([*arguments, "--text-column", "body", "--output", str(tmp_path / output)]) == 0
        assert capsys.readouterr().out == ""
    written = pandas.read_csv(tmp_path / "answers.csv", keep_default_na=False)
    assert list(written.columns)[:5] == ["id", "body", "label", "predicted", "probability"]
    assert list(written.columns)[5:] == ["probability_neg", "probability_pos"]
    assert written["id"].tolist() == list(range(5))
    assert written["body"].tolist() == texts
    assert written["predicted"].tolist() == [each.label for each in expected]
    assert written["probability_pos"].tolist() == pytest.approx([each.probabilities["pos"] for each in expected])
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [(int(line["id"]), line["body"], line["predicted"]) for line in lines] == [
        (row, text, each.label) for row, (text, each) in enumerate(zip(texts, expected, strict=True))
    ]


def test_a_reader_that_has_seen_enough_is_no_error(finished, tmp_path):
    (tmp_path / "texts.txt").write_text("a film\n" * 20_000)
    command = f"{sys.executable} run.py predict {finished} --device cpu --file {tmp_path / 'texts.txt'} | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["label", "neg", "pos", "text"]
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


# --- evaluate ---------------------------------------------------------------------------------------------------------


def without_files(record):
    """The same scores without the places of the mistakes."""
    mistakes = [
        {name: value for name, value in mistake.items() if name not in ("file", "line")}
        for mistake in record["mistakes"]
    ]
    return {**record, "mistakes": mistakes}


def test_evaluate_agrees_with_the_run_and_counts_right(finished, inputs, capsys):
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()][-1]
    assert main(["evaluate", str(finished), "--split", "test", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] == pytest.approx(logged["test_accuracy"])
    table = pq.read_table(Path(inputs[3]) / "test.parquet").to_pydict()
    probabilities = expected_probabilities(finished / "final", table["text"])
    confusion = torch.zeros(2, 2, dtype=torch.int64)
    for label, row in zip(table["label"], probabilities, strict=True):
        confusion[label, row.argmax()] += 1
    assert result["confusion"] == confusion.tolist()
    wrong = {row for row, label in enumerate(table["label"]) if int(probabilities[row].argmax()) != label}
    assert {mistake["row"] for mistake in result["mistakes"]} == wrong if len(wrong) <= 5 else True
    assert result["labels"] == ["neg", "pos"]


def test_a_run_leaves_the_scores_that_evaluate_finds(finished, capsys):
    written = json.loads((finished / "scores.json").read_text())
    assert written.pop("step") == json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert main(["evaluate", str(finished), "--device", "cpu", "--mistakes", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(written) == list(found)
    for part in ("split", "labels", "accuracy", "confusion", "macro_f1"):
        assert written[part] == found[part]
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()][-1]
    assert written["loss"] == logged["test_loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert len(written["mistakes"]) == sum(map(sum, written["confusion"])) - sum(
        row[i] for i, row in enumerate(written["confusion"])
    )
    for mistake, expected in zip(written["mistakes"], found["mistakes"], strict=True):
        assert mistake == {**expected, "probability": pytest.approx(expected["probability"], rel=1e-4)}


def test_without_a_test_split_the_scores_are_of_the_last_validation(inputs, tmp_path):
    folder, run = tmp_path / "data", tmp_path / "run"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.parquet").write_bytes((Path(inputs[3]) / f"{split}.parquet").read_bytes())
    flags = ["--dataset", str(folder), "--output-dir", str(run), "--max-steps", "2", "--eval-steps", "1"]
    assert main([*inputs, *flags]) == 0
    written = json.loads((run / "scores.json").read_text())
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert (written["split"], written["step"], written["accuracy"]) == ("validation", 2, logged["eval_accuracy"])
    (run / "scores.json").unlink()
    (run / "final").rename(tmp_path / "elsewhere")
    assert main(["--resume", str(run)]) == 0
    assert json.loads((run / "scores.json").read_text()) == written, "a run that broke off after its last step"


def test_evaluate_prints_tables(finished, capsys):
    assert main(["evaluate", str(finished), "--split", "validation", "--device", "cpu", "--mistakes", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("validation: 12 examples, accuracy ")
    for part in ("macro F1", "calibration error", "precision", "true \\ predicted", "mean probability"):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{moved}"], 2, "does not record its training data: pass a --dataset"),
        (["{run}x"], 2, "x is not a directory here, and a model on the Hub does not record"),
        (["{run}x", "--dataset", "{two}"], 2, "there is no run "),
        (["{run}", "--split", "dev"], 2, "--split is 'dev', it must be one of train, validation, test, all"),
        (["{run}", "--mistakes", "-1"], 2, "--mistakes is -1"),
        (["{run}", "--dataset", "{two}", "--split", "test"], 2, "has no test split; it has train"),
        (["{run}", "--dataset", "{two}"], 0, ""),
        (["{run}", "--label-names", "pos,neg,good"], 0, ""),
    ],
)
def test_mistakes_of_evaluate_are_told(finished, inputs, tmp_path, capsys, arguments, status, message):
    shutil.copytree(finished / "final", tmp_path / "moved" / "model")
    (tmp_path / "two").mkdir()
    shutil.copy(Path(inputs[3]) / "train.parquet", tmp_path / "two")
    places = {"run": finished, "moved": tmp_path / "moved" / "model", "two": tmp_path / "two"}
    assert main(["evaluate", *(argument.format(**places) for argument in arguments), "--device", "cpu"]) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


# --- many labels ------------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmn"  # each a token of the demo's vocabulary


@pytest.fixture(scope="module")
def lettered(tmp_path_factory):
    """A data set of 14 classes."""
    path = tmp_path_factory.mktemp("letters") / "letters.csv"
    path.write_text("text,label\n" + "".join(f"the plot {i},{LETTERS[i % 14]}\n" for i in range(280)))
    return path


def test_of_many_labels_the_likeliest_are_shown(inputs, capsys):
    arguments = ["predict", inputs[1], *TEXTS[:2], "--label-names", ",".join(LETTERS), "--device", "cpu"]
    assert main([*arguments, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main(arguments) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["label", "most", "probable", "text"]
    for row, answer in zip(rows, answers, strict=True):
        ranked = sorted(answer["probabilities"].items(), key=lambda pair: -pair[1])[:3]
        assert row.split()[0] == answer["label"] == ranked[0][0]
        assert ", ".join(f"{name} {value:.2%}" for name, value in ranked) in row
        assert len(row) < 150


def test_of_many_labels_the_frequent_confusions_are_shown(inputs, lettered, capsys):
    arguments = ["evaluate", inputs[1], "--dataset", str(lettered), "--split", "train", "--device", "cpu"]
    arguments += ["--label-names", ",".join(LETTERS)]
    assert main([*arguments, "--json"]) == 0
    matrix = json.loads(capsys.readouterr().out)["confusion"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "true \\ predicted" not in out
    assert max(map(len, out.splitlines())) < 160
    shown = re.findall(r"^([a-n])  +([a-n])  +(\d+)$", out, re.MULTILINE)
    counts = [int(count) for *_, count in shown]
    assert len(shown) == min(
        15, sum(count > 0 for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j)
    )
    assert counts == sorted(counts, reverse=True)
    for true, predicted, count in shown:
        assert matrix[LETTERS.index(true)][LETTERS.index(predicted)] == int(count)


def test_labels_in_another_order_are_matched_by_name(finished, inputs, tmp_path, capsys):
    table = pq.read_table(Path(inputs[3]) / "validation.parquet").to_pydict()
    turned = [1 - label for label in table["label"]]
    write_parquet(tmp_path / "test.parquet", table["text"], turned, names=("pos", "neg"))
    arguments = ["evaluate", str(finished), "--device", "cpu", "--json", "--split"]
    assert main([*arguments, "test", "--dataset", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main([*arguments, "validation"]) == 0
    expected = without_files(json.loads(capsys.readouterr().out))
    assert without_files(found) == {**expected, "split": "test"}
    assert main([*arguments, "test", "--dataset", str(tmp_path), "--label-names", "neg,pos"]) == 0
    by_names = json.loads(capsys.readouterr().out)
    assert {**by_names, "mistakes": []} == {**found, "mistakes": []}
    write_parquet(tmp_path / "test.parquet", table["text"], turned, names=("good", "neg"))
    assert main([*arguments, "test", "--dataset", str(tmp_path)]) == 1
    assert "test.parquet is 'good', the labels are neg, pos: correct the data" in capsys.readouterr().err
    write_parquet(tmp_path / "test.parquet", table["text"], turned, names=("bad", "good"))
    assert main([*arguments, "test", "--dataset", str(tmp_path)]) == 0
    assert (
        "the labels of the data are bad, good, those of the model neg, pos: they are matched" in capsys.readouterr().err
    )


@pytest.fixture
def own(inputs, tmp_path):
    """A data set of 12 rows of words: a file, and directories that hold nothing else but it."""
    table = pq.read_table(Path(inputs[3]) / "validation.parquet").to_pydict()
    rows = [(text, ("neg", "pos")[label]) for text, label in zip(table["text"], table["label"], strict=True)]
    for name in ("train", "validation", "test"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return tmp_path


def test_a_file_of_ones_own_is_judged_whole(finished, own, capsys):
    arguments = ["evaluate", str(finished), "--device", "cpu", "--json"]
    assert main([*arguments, "--split", "validation"]) == 0
    expected = without_files(json.loads(capsys.readouterr().out))
    for flags in ([], ["--split", "test"], ["--split", "train"]):
        assert main([*arguments, "--dataset", str(own / "test" / "test.csv"), *flags]) == 0
        found = without_files(json.loads(capsys.readouterr().out))
        assert found == {**expected, "split": flags[1] if flags else "test.csv"}
    assert main([*arguments, "--dataset", str(own / "test" / "test.csv"), "--split", "all"]) == 0
    assert without_files(json.loads(capsys.readouterr().out)["test.csv"]) == {**expected, "split": "test.csv"}


@pytest.mark.parametrize("name", ["test", "validation", "train"])
def test_a_directory_with_one_split_is_judged_by_it(finished, own, capsys, name):
    assert main(["evaluate", str(finished), "--device", "cpu", "--json", "--dataset", str(own / name)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], sum(map(sum, found["confusion"]))) == (name, 12)


def test_all_splits_are_judged_and_no_other_is_read(finished, inputs, tmp_path, capsys):
    arguments = ["evaluate", str(finished), "--device", "cpu", "--json"]
    assert main([*arguments, "--split", "all"]) == 0
    counts = {name: sum(map(sum, found["confusion"])) for name, found in json.loads(capsys.readouterr().out).items()}
    assert counts == {"train": 77, "validation": 12, "test": 4, "all": 93}
    assert main([*arguments[:-1], "--split", "all"]) == 0
    assert len(re.findall(r"^(?:train|validation|test|all): \d+ examples", capsys.readouterr().out, re.MULTILINE)) == 4
    shutil.copytree(inputs[3], tmp_path / "data")
    for name in ("train", "validation"):
        (tmp_path / "data" / f"{name}.parquet").write_bytes(b"PAR1 and nothing else")
    assert main([*arguments, "--dataset", str(tmp_path / "data")]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "test"
    assert main([*arguments, "--dataset", str(tmp_path / "data"), "--split", "validation"]) == 1


def test_a_split_without_labels_is_left_out(finished, inputs, tmp_path, capsys):
    shutil.copytree(inputs[3], tmp_path / "data")
    write_parquet(tmp_path / "data" / "test.parquet", ["a", "b"], [-1, -1])
    arguments = ["evaluate", str(finished), "--device", "cpu", "--json", "--dataset", str(tmp_path / "data")]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["split"] == "validation"
    assert "Note: the test split is left out: no row of the test split has a label" in err
    assert main([*arguments, "--split", "test"]) == 1
    assert "no row of the test split has a label" in capsys.readouterr().err


def test_of_another_data_set_all_rows_are_read(finished, inputs, tmp_path, capsys):
    """The run's share of its own training rows is none of another's."""
    shutil.copytree(finished, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "max_train_samples": 5}))
    arguments = ["evaluate", str(tmp_path / "run"), "--split", "train", "--device", "cpu"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("train: 5 examples")
    assert main([*arguments, "--dataset", inputs[3]]) == 0
    assert capsys.readouterr().out.startswith("train: 77 examples")


def test_what_would_command_a_terminal_is_shown_in_codes(finished, capsys):
    assert main(["predict", str(finished), "a\x1b[31m film\u202e \x07", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "a\\x1b[31m film\\u202e" in out
    assert not {"\x1b", "\u202e", "\x07"} & set(out)


@pytest.mark.parametrize(
    ("command", "message"), [("predict", "there are no examples: pass"), ("generate", "there is no prompt: pass")]
)
def test_without_a_standard_input_there_is_nothing_to_read(finished, monkeypatch, capsys, command, message):
    monkeypatch.setattr(sys, "stdin", None)
    assert main([command, str(finished), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_of_a_small_example_by_hand():
    probabilities = torch.tensor(
        [[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.15, 0.75], [0.95, 0.05, 0]],
        dtype=torch.float64,
    )
    result = scores(probabilities, torch.tensor([0, 1, 1, 1, 0]))
    assert result.accuracy == pytest.approx(3 / 5)
    assert result.confusion == [[2, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert result.precision == pytest.approx([2 / 3, 1.0, 0.0])
    assert result.recall == pytest.approx([1.0, 1 / 3, 0.0])
    assert result.f1 == pytest.approx([0.8, 0.5, 0.0])
    assert result.macro_f1 == pytest.approx(1.3 / 3)
    # Bins: (0.5, 0.6] holds 0.6 (wrong), (0.6, 0.7] 0.7 (right), (0.7, 0.8] 0.75 (wrong), (0.8, 0.9] 0.9, then 0.95.
    assert [count for _, _, count in result.bins] == [1, 1, 1, 1, 1]
    expected = (0.6 + 0.3 + 0.75 + 0.1 + 0.05) / 5
    assert result.calibration_error == pytest.approx(expected, rel=1e-6)
    assert confident_mistakes(probabilities, torch.tensor([0, 1, 1, 1, 0]), 5) == [3, 2]
    assert confident_mistakes(probabilities, torch.tensor([0, 1, 1, 1, 0]), 1) == [3]


def test_perfect_predictions_score_one():
    result = scores(torch.eye(4), torch.arange(4))
    assert (result.accuracy, result.macro_f1, result.calibration_error) == (1.0, 1.0, 0.0)
    assert confident_mistakes(torch.eye(4), torch.arange(4), 3) == []


@pytest.mark.parametrize(
    ("suffix", "what"), [("xlsx", "a ZIP archive, as Excel workbooks are"), ("csv.bz2", "compressed by bzip2")]
)
def test_a_file_that_is_no_text_is_not_taken_for_one_in_another_encoding(finished, tmp_path, capsys, suffix, what):
    path, table = tmp_path / f"x.{suffix}", pandas.DataFrame({"text": ["a film"] * 9})
    table.to_excel(path) if suffix == "xlsx" else table.to_csv(path)
    assert main(["predict", str(finished), "--file", str(path), "--encoding", "cp1252"]) == 1
    assert f"{path} is {what}" in capsys.readouterr().err


def test_where_answers_cannot_be_written_is_said_before_they_are_made(finished, tmp_path, capsys):
    (tmp_path / "x.csv").mkdir()
    for output, message in (("none/x.csv", "in a directory that exists"), ("x.csv", "which is a directory")):
        assert main(["predict", str(finished), "a film", "--output", str(tmp_path / output)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--text-column", "--delimiter"])
def test_flags_of_tables_are_refused_for_lines_of_text(finished, tmp_path, capsys, flag):
    (tmp_path / "x.txt").write_text("text\tlabel\na film\t1\n", encoding="utf-8")
    assert main(["predict", str(finished), "--file", str(tmp_path / "x.txt"), flag, "text"]) == 2
    assert f"{flag} is of tables" in capsys.readouterr().err


def test_of_a_table_blank_texts_are_noted(finished, tmp_path, capsys):
    (tmp_path / "t.csv").write_text('id,text\n1,a good film\n2,\n3," "\n')
    arguments = ["predict", str(finished), "--device", "cpu", "--file", str(tmp_path / "t.csv")]
    assert main([*arguments, "--output", str(tmp_path / "o.csv")]) == 0
    assert "(lines 3, 4) is blank: the label there is that of no text." in capsys.readouterr().err


def test_a_run_that_is_absent_is_named_with_the_column_that_is_missing(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("body\na good film\n")
    assert main(["predict", "runs/absent", "--file", str(tmp_path / "t.csv")]) == 2
    assert "runs/absent is not a directory here, so its text column is unknown" in capsys.readouterr().err
    assert main(["predict", "runs/absent", "--file", str(tmp_path / "t.csv"), "--text-column", "x"]) == 2
    assert "is not a directory here" not in capsys.readouterr().err


def test_columns_of_a_matrix_with_long_names_are_numbered():
    result = scores(torch.eye(3).softmax(dim=-1), torch.arange(3))
    names = ["a" * 40, "b" * 40, "c" * 40]
    lines = score_tables(result, names).splitlines()
    head = next(line for line in lines if line.startswith("true"))
    assert head.split() == ["true", "\\", "predicted", "(1)", "(2)", "(3)"]
    rows = lines[lines.index(head) + 1 :][:3]
    assert [row.split() for row in rows] == [
        [f"({i + 1})", name, *("1" if i == j else "0" for j in range(3))] for i, name in enumerate(names)
    ]
    assert len({len(line) for line in (head, *rows)}) == 1
    assert "true \\ predicted" in score_tables(result, ["a", "b", "c"])
    assert "(1)" not in score_tables(result, ["a", "b", "c"])
