"""Tables that `predict` and `evaluate` write, read by pandas and by `datasets`."""

import codecs
import io
import json
import math
import os
import re
import sys
from decimal import Decimal

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ft
from ft.cli import output_table
from ft.cli.main import main
from ft.errors import FtError
from ft.io.paths import OUTPUT_SUFFIXES, find_output_problems

TEXTS = ["=1+2", 'a "fine" film', "a, comma", "two\nlines", "a;b|c~d", "schön", " blanks ", "@cmd", "-3", "'"]
READERS = {
    ".csv": lambda path: pandas.read_csv(path, keep_default_na=False, dtype=str),
    ".tsv": lambda path: pandas.read_csv(path, sep="\t", keep_default_na=False, dtype=str),
    ".jsonl": lambda path: pandas.read_json(path, lines=True, dtype=False, precise_float=True),
    ".json": lambda path: pandas.read_json(path, dtype=False, precise_float=True),
    ".parquet": pandas.read_parquet,
}
ENCODED_MARKS = {
    **dict.fromkeys(["UTF-16", "utf_16", "U16"], codecs.BOM_UTF16),
    **dict.fromkeys(["utf_8_sig", "UTF-8-SIG"], codecs.BOM_UTF8),
    "utf-32": codecs.BOM_UTF32,
}
DAY_AND_SCORE = pa.struct({"day": pa.date32(), "score": pa.float64()})
ADDED = ["predicted", "probability", "probability_neg", "probability_pos"]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main([*inputs, "--max-steps", "3", "--precision", "fp32", "--output-dir", str(run)]) == 0
    return run


def frame():
    return pandas.DataFrame({"id": [f"{n:03}" for n in range(len(TEXTS))], "text": TEXTS, "note": ["", "x"] * 5})


def write(path, table):
    match path.suffix:
        case ".csv":
            table.to_csv(path, index=False)
        case ".tsv":
            table.to_csv(path, index=False, sep="\t")
        case ".jsonl":
            table.to_json(path, orient="records", lines=True, force_ascii=False)
        case ".json":
            table.to_json(path, orient="records")
        case _:
            table.to_parquet(path)
    return path


def predict(finished, *arguments):
    return main(["predict", str(finished), "--device", "cpu", *map(str, arguments)])


@pytest.mark.parametrize("target", list(READERS))
@pytest.mark.parametrize("source", list(READERS))
def test_the_same_table_comes_back_with_added_columns(finished, tmp_path, source, target):
    path = write(tmp_path / f"in{source}", frame())
    before = path.read_bytes()
    assert predict(finished, "--file", path, "--output", tmp_path / f"out{target}", "--batch-size", "2") == 0
    assert path.read_bytes() == before
    answers = READERS[target](tmp_path / f"out{target}")
    assert list(answers.columns) == ["id", "text", "note", *ADDED]
    pandas.testing.assert_frame_equal(
        answers[["id", "text", "note"]].astype(str), frame().astype(str), check_dtype=False
    )
    expected = ft.load(finished, device="cpu").predict(TEXTS, batch_size=2)
    assert list(answers["predicted"]) == [prediction.label for prediction in expected]
    for column, name in (("probability_neg", "neg"), ("probability_pos", "pos")):
        values = [prediction.probabilities[name] for prediction in expected]
        assert list(answers[column].astype(float)) == pytest.approx(values, abs=1e-6)
    most = [max(prediction.probabilities.values()) for prediction in expected]
    assert list(answers["probability"].astype(float)) == pytest.approx(most, abs=1e-6)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_line_breaks_of_all_kinds_are_quoted(finished, tmp_path, suffix):
    texts = ["one\rtwo", "one\r\ntwo", "\n", 'tab\tand "quotes"', ""]
    write(tmp_path / "in.jsonl", pandas.DataFrame({"text": texts}))
    assert predict(finished, "--file", tmp_path / "in.jsonl", "--output", tmp_path / f"out{suffix}") == 0
    assert list(READERS[suffix](tmp_path / f"out{suffix}")["text"]) == texts
    again = tmp_path / f"again{suffix}"
    assert predict(finished, "--file", tmp_path / f"out{suffix}", "--output", again) == 0, "read by this program"
    assert list(READERS[suffix](again)["text"]) == texts


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet"])
def test_datasets_loads_what_is_written(finished, tmp_path, name):
    table = frame()
    if name == "x.parquet":
        features = datasets.Features({column: datasets.Value("string") for column in table})
        datasets.Dataset.from_pandas(table, features=features).to_parquet(str(tmp_path / name))
    else:
        write(tmp_path / name, table)
    assert predict(finished, "--file", tmp_path / name, "--output", tmp_path / f"out-{name}") == 0
    builder = {"csv": "csv", "jsonl": "json", "parquet": "parquet"}[name.partition(".")[2]]
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset(builder, data_files=str(tmp_path / f"out-{name}"), cache_dir=cache, split="train")
    assert loaded.column_names == ["id", "text", "note", *ADDED]
    assert loaded["predicted"][:2] == [p.label for p in ft.load(finished, device="cpu").predict(TEXTS[:2])]


@pytest.mark.parametrize(
    ("encoding", "delimiter", "flags"),
    [
        ("utf-8", ";", []),
        ("utf-8-sig", ",", []),
        ("utf-16", "\t", []),
        ("cp1252", ";", ["--encoding", "cp1252"]),
        ("utf-8", "|", []),
        ("utf-8", "~", ["--delimiter", "~"]),
    ],
)
def test_csv_keeps_its_delimiter_and_encoding(finished, tmp_path, encoding, delimiter, flags):
    path, output = tmp_path / "in.csv", tmp_path / "out.csv"
    frame().to_csv(path, index=False, sep=delimiter, encoding=encoding)
    assert predict(finished, "--file", path, "--output", output, *flags) == 0
    answers = pandas.read_csv(output, sep=delimiter, encoding=encoding, keep_default_na=False, dtype=str)
    pandas.testing.assert_frame_equal(answers[["id", "text", "note"]], frame())
    assert output.read_bytes()[:3] == path.read_bytes()[:3], "the same byte order mark, or none"


@pytest.mark.parametrize("encoding", ["UTF-16", "utf_16", "U16", "utf_8_sig", "UTF-8-SIG", "utf-32", "iso2022_jp"])
def test_a_byte_order_mark_is_written_once_in_every_spelling_of_the_encoding(finished, tmp_path, encoding):
    path, output = tmp_path / "in.csv", tmp_path / "out.csv"
    table = frame()[["id", "text"]]
    table["text"] = table["text"].str.replace("schön", "映画")
    without_mark = table.to_csv(index=False).encode(encoding).removeprefix(ENCODED_MARKS.get(encoding, b""))
    path.write_bytes(without_mark)
    flags = ["--encoding", encoding, "--batch-size", "2"]
    assert predict(finished, "--file", path, "--output", output, *flags) == 0
    written = output.read_text(encoding)
    assert "\ufeff" not in written
    answers = READERS[".csv"](io.StringIO(written))
    pandas.testing.assert_frame_equal(answers[["id", "text"]], table)


NESTED = {
    "times": pa.array([[0], None], pa.list_(pa.timestamp("ms"))),
    "prices": pa.array([[Decimal("1.50")], []], pa.list_(pa.decimal128(5, 2))),
    "record": pa.array([{"day": 0, "score": 1.5}, {"day": 1, "score": math.nan}], DAY_AND_SCORE),
    "bytes": pa.array([b"a", b"\xff"]),
    "scores": pa.array([[1.0, math.nan, math.inf], None]),
    "map": pa.array([[("a", math.nan)], None], pa.map_(pa.string(), pa.float64())),
}
AS_JSON = {
    "times": [["1970-01-01 00:00:00"], None],
    "prices": [["1.50"], []],
    "record": [{"day": "1970-01-01", "score": 1.5}, {"day": "1970-01-02", "score": None}],
    "bytes": ["b'a'", "b'\\xff'"],
    "scores": [[1.0, None, None], None],
    "map": [[["a", None]], None],
}


@pytest.mark.parametrize("suffix", list(READERS))
def test_nested_columns_are_written(finished, tmp_path, suffix):
    table = pa.table({"text": ["a", "b"], **NESTED})
    pq.write_table(table, tmp_path / "in.parquet")
    output = tmp_path / f"out{suffix}"
    assert predict(finished, "--file", tmp_path / "in.parquet", "--output", output) == 0
    if suffix == ".parquet":
        assert pq.read_table(output).select(NESTED.keys()).schema == table.select(NESTED.keys()).schema
        return

    def refuse(name):
        pytest.fail(f"{name} is not JSON")

    if suffix in (".csv", ".tsv"):
        cells = READERS[suffix](output)
        assert list(cells["bytes"]) == AS_JSON["bytes"]
        nested = [name for name in NESTED if name != "bytes"]
        read = {
            name: [json.loads(cell, parse_constant=refuse) if cell else None for cell in cells[name]] for name in nested
        }
        assert read == {name: AS_JSON[name] for name in nested}
        return
    text = output.read_text()
    rows = json.loads(text if suffix == ".json" else f"[{','.join(text.splitlines())}]", parse_constant=refuse)
    assert {name: [row[name] for row in rows] for name in NESTED} == AS_JSON


def test_types_and_metadata_of_parquet_are_kept(finished, tmp_path):
    table = pa.table(
        {
            "when": pa.array([0, 1], pa.timestamp("ms")),
            "text": pa.array(["a", "b"], pa.large_string()),
            "score": pa.array([1.5, None], pa.float32()),
            "tags": pa.array([["x"], None]),
        }
    ).replace_schema_metadata({"mine": "yes"})
    pq.write_table(table, tmp_path / "in.parquet")
    assert predict(finished, "--file", tmp_path / "in.parquet", "--output", tmp_path / "out.parquet") == 0
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.select(table.column_names).equals(table)
    assert written.schema.metadata == table.schema.metadata
    assert predict(finished, "--file", tmp_path / "in.parquet", "--output", tmp_path / "out.jsonl") == 0
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert (first["when"], first["score"], first["tags"]) == ("1970-01-01 00:00:00", 1.5, ["x"])


def test_a_column_with_the_name_of_an_added_one_is_kept_and_said(finished, tmp_path, capsys):
    write(tmp_path / "in.csv", frame().assign(predicted="mine", probability_pos="too"))
    assert predict(finished, "--file", tmp_path / "in.csv", "--output", tmp_path / "out.csv") == 0
    answers = pandas.read_csv(tmp_path / "out.csv")
    assert set(answers["predicted"]) == {"mine"}
    assert list(answers.columns)[-4:] == [f"ft_{name}" for name in ADDED]
    assert "in.csv has predicted, probability_pos already: the new columns are ft_predicted" in capsys.readouterr().err


def test_rows_without_a_text_are_kept_without_a_prediction(finished, tmp_path, capsys):
    pq.write_table(pa.table({"text": ["a film", None, ""]}), tmp_path / "in.parquet")
    assert predict(finished, "--file", tmp_path / "in.parquet", "--output", tmp_path / "out.parquet") == 0
    assert "the text in row 1 of" in capsys.readouterr().err
    answers = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert [label is None for label in answers["predicted"]] == [False, True, False]
    assert predict(finished, "--file", tmp_path / "in.parquet", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["label"] is None for line in lines] == [False, True, False]


def test_blank_lines_of_one_column_are_rows_of_the_output_too(finished, tmp_path, capsys):
    (tmp_path / "in.csv").write_text("text\na film\n\n  \nanother\n\n")
    assert predict(finished, "--file", tmp_path / "in.csv", "--output", tmp_path / "out.csv") == 0
    assert "the text in 2 rows of" in capsys.readouterr().err
    read = [pandas.read_csv(tmp_path / name, skip_blank_lines=False) for name in ("in.csv", "out.csv")]
    texts = [frame["text"].fillna("").tolist() for frame in read]
    assert texts[1] == texts[0][:4] == ["a film", "", "  ", "another"]
    assert read[1]["predicted"].notna().all()


@pytest.mark.parametrize("suffix", list(READERS))
def test_lines_become_rows(finished, tmp_path, suffix):
    texts = ["=1+2", 'a "fine" film', "", "schön"]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n", "utf-8")
    assert predict(finished, "--input", tmp_path / "in.txt", "--output", tmp_path / f"out{suffix}") == 0
    answers = READERS[suffix](tmp_path / f"out{suffix}")
    assert list(answers["text"]) == texts
    assert list(map(int, answers["row"])) == [0, 1, 2, 3]


# --- atomic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", list(READERS))
def test_an_output_that_fails_leaves_the_old_file_and_nothing_else(finished, tmp_path, monkeypatch, capsys, suffix):
    path = write(tmp_path / "in.csv", frame())
    output = tmp_path / f"out{suffix}"
    output.write_text("old")
    calls = []

    def fail_in_the_second_chunk(self, rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("ft.cli.predict.CHUNK_OF_BATCHES", 1)
    monkeypatch.setattr(output_table.TableWriter, "write", fail_in_the_second_chunk)
    assert predict(finished, "--file", path, "--output", output, "--batch-size", "4") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert calls == [4, 4]
    assert output.read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {"in.csv", output.name}


def test_values_that_the_encoding_lacks_are_an_error_with_a_remedy(finished, tmp_path, capsys):
    table = frame()
    table.to_csv(tmp_path / "in.csv", index=False, encoding="cp1252")
    flags = ["--file", tmp_path / "in.csv", "--encoding", "cp1252", "--output", tmp_path / "out.csv"]
    assert predict(finished, *flags) == 0
    flags = ["--label-names", "neg,позитив", *flags]
    assert predict(finished, *flags) == 1
    assert "cannot be written in cp1252" in capsys.readouterr().err


@pytest.mark.parametrize("value", [2**70, -(2**70), "\ud83d", ["\ud83d"], {"a": 2**70}], ids=repr)
@pytest.mark.parametrize("suffix", OUTPUT_SUFFIXES)
def test_values_that_a_format_lacks_are_an_error_with_a_remedy_that_works(tmp_path, value, suffix):
    """JSON holds every text and number."""
    path = tmp_path / f"out{suffix}"
    problem = None
    try:
        with output_table.open_output(path, ["text", "x"]) as writer:
            writer.write([["a", value]])
    except FtError as error:
        problem = str(error)
    if suffix in (".json", ".jsonl"):
        found = json.loads(path.read_text())
        assert (found[0] if suffix == ".json" else found) == {"text": "a", "x": value}
    if problem is not None:
        assert problem.endswith("name an --output that ends in .jsonl")
        assert not path.exists()


def test_a_column_of_several_types_is_no_parquet(finished, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "a", "x": 1}\n{"text": "b", "x": "y"}\n')
    assert predict(finished, "--file", tmp_path / "in.jsonl", "--output", tmp_path / "out.parquet") == 1
    assert "name an --output that ends in .jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()


# --- as they are made -------------------------------------------------------------------------------------------------


def test_lines_are_predicted_as_they_come(finished, monkeypatch, capsys):
    printed = []

    class Slow(io.RawIOBase):
        """Standard input in which a line comes when the one before has been answered."""

        def __init__(self):
            self.lines = [b"\xef\xbb\xbfone\n", b"two\nthr", b"ee\r\n", b"four"]

        def readable(self):
            return True

        def readinto(self, buffer):
            printed.append(capsys.readouterr().out)
            line = self.lines.pop(0) if self.lines else b""
            buffer[: len(line)] = line
            return len(line)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Slow())))
    assert predict(finished, "--json") == 0
    printed.append(capsys.readouterr().out)
    answers = [[json.loads(line)["text"] for line in part.splitlines()] for part in printed]
    assert [texts for texts in answers if texts] == [["one"], ["two"], ["three"], ["four"]]


def test_a_line_that_is_not_utf8_is_named_by_its_number_in_the_file(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ft.cli.predict.BLOCK", 8)
    (tmp_path / "in.txt").write_bytes(b"one\ntwo\nthree\nfour and \xff\n")
    assert predict(finished, "--file", tmp_path / "in.txt") == 1
    assert "in line 4, byte 9" in capsys.readouterr().err


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", list(READERS))
def test_evaluate_writes_each_text_with_label_and_prediction(finished, tmp_path, capsys, suffix):
    table = frame().assign(label=["pos", "neg"] * 5)
    path = write(tmp_path / "mine.csv", table)
    output = tmp_path / f"out{suffix}"
    flags = ["evaluate", str(finished), "--device", "cpu", "--dataset", str(path), "--json", "--output", str(output)]
    assert main(flags) == 0
    record = json.loads(capsys.readouterr().out)
    answers = READERS[suffix](output)
    assert list(answers.columns) == ["split", "file", "row", "line", "text", "label", *ADDED, "id", "note"]
    assert list(answers["id"]) == list(table["id"])
    assert list(answers["note"]) == list(table["note"])
    assert list(answers["text"]) == TEXTS
    assert list(answers["label"]) == list(table["label"])
    assert (answers["label"] == answers["predicted"]).mean() == record["accuracy"]
    lines = path.read_text("utf-8").split("\n")
    assert [int(line) for line in answers["line"]] == [2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    for mistake in record["mistakes"]:
        assert mistake["file"] == str(path)
        assert f"{mistake['row']:03}" in lines[mistake["line"] - 1]
        assert TEXTS[mistake["row"]] == mistake["text"]


@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl", "mine.parquet"])
def test_mistakes_of_all_rows_are_named_as_in_the_file(finished, tmp_path, capsys, name):
    texts = [f"film {n}" for n in range(8)]
    wrong = {"neg": "pos", "pos": "neg"}
    labels = [wrong[prediction.label] for prediction in ft.load(finished, device="cpu").predict(texts)]
    path = write(tmp_path / name, pandas.DataFrame({"text": texts, "label": labels}))
    flags = ["evaluate", str(finished), "--device", "cpu", "--dataset", str(path), "--mistakes", "8"]
    for split in ([], ["--split", "all"], ["--split", "train"]):
        assert main([*flags, *split]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{split[1] if 'train' in split else name}: 8 examples, accuracy 0.00%")
        for n in range(8):
            place = {"mine.csv": f"line {n + 2}", "mine.jsonl": f"line {n + 1}", "mine.parquet": f"row {n}"}[name]
            assert f", {place}): film {n}\n" in out


def test_the_drawn_validation_rows_of_a_file_are_named_as_in_the_file(inputs, tmp_path, capsys):
    texts = [f"film {n}" for n in range(60)]
    path = write(tmp_path / "mine.csv", pandas.DataFrame({"text": texts, "label": ["neg", "pos"] * 30}))
    run = tmp_path / "run"
    flags = ["--dataset", str(path), "--device", "cpu", "--max-steps", "1", "--output-dir", str(run)]
    assert main([*inputs[:2], *flags]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--device", "cpu", "--json", "--output", str(tmp_path / "o.csv")]) == 0
    record = json.loads(capsys.readouterr().out)
    lines = path.read_text().splitlines()
    assert record["split"] == "validation"
    assert record["mistakes"]
    for mistake in [*record["mistakes"], *json.loads((run / "scores.json").read_text())["mistakes"]]:
        assert lines[mistake["line"] - 1].startswith(f"{mistake['text']},")
    written = pandas.read_csv(tmp_path / "o.csv")
    assert [lines[line - 1].partition(",")[0] for line in written["line"]] == list(written["text"])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("x.xlsx", "it must end in .csv, .tsv, .json, .jsonl or .parquet"),
        ("none/x.csv", "does not"),
        ("in.csv", "the file that is read: name another"),
        ("dir.csv", "which is a directory"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys, command, output, message):
    (tmp_path / "dir.csv").mkdir()
    path = write(tmp_path / "in.csv", frame())
    flag = "--file" if command == "predict" else "--dataset"
    assert main([command, str(tmp_path / "run"), flag, str(path), "--output", str(tmp_path / output)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run/metrics.jsonl", "run/config.json", "model/config.json", "model/tokenizer.json"])
@pytest.mark.parametrize("command", [["predict", "m", "text"], ["evaluate", "m", "--dataset", "d"]])
def test_files_of_a_run_or_model_are_not_written_over(tmp_path, capsys, command, name):
    for file in ("run/metrics.jsonl", "run/config.json", "model/model.safetensors", name):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("old")
    assert main([*command, "--output", str(tmp_path / name)]) == 2
    assert "a file of the run or model in that directory: name another" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "old"


@pytest.mark.parametrize("command", [["predict", "m", "text"], ["evaluate", "m", "--dataset", "d"]])
def test_a_fifo_is_not_replaced(tmp_path, capsys, command):
    os.mkfifo(tmp_path / "pipe.csv")
    assert main([*command, "--output", str(tmp_path / "pipe.csv")]) == 2
    assert "which is not a regular file" in capsys.readouterr().err
    assert (tmp_path / "pipe.csv").is_fifo()


def test_a_link_to_itself_is_no_file_of_a_run(tmp_path):
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    assert find_output_problems(tmp_path / "loop.csv", [tmp_path]) == []


def link_names(tmp_path, file):
    """Other names of a file: a symbolic link, a hard link, a path with `..`, and one through a linked directory."""
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / f"symbolic{file.suffix}").symlink_to(file)
    (tmp_path / "links" / f"hard{file.suffix}").hardlink_to(file)
    (tmp_path / "directory").symlink_to(file.parent)
    return [
        file,
        tmp_path / "links" / f"symbolic{file.suffix}",
        tmp_path / "links" / f"hard{file.suffix}",
        file.parent / ".." / file.parent.name / file.name,
        tmp_path / "directory" / file.name,
    ]


INPUTS_OF_COMMANDS = {
    "run/inputs/dataset/train.parquet": [["predict", "run", "text"], ["evaluate", "run"]],
    "run/final/config.json": [["predict", "run", "text"], ["evaluate", "run/final", "--dataset", "data"]],
    "run/checkpoint-5/state.json": [["predict", "run/checkpoint-5", "text"], ["evaluate", "run/final"]],
    "run/gguf/added.csv": [["predict", "m", "text"], ["evaluate", "m", "--dataset", "data"]],
    "base/tokenizer.json": [["predict", "m", "text", "--base", "base"], ["evaluate", "m", "--base", "base"]],
    "data/train.csv": [["evaluate", "m", "--dataset", "data"], ["evaluate", "m", "--dataset", "data/train.csv"]],
    "data/test.csv": [["evaluate", "m", "--dataset", "data", "--split", "train"], ["predict", "m", "--file", "{file}"]],
    "parts/one/test-00000-of-00001.parquet": [["evaluate", "m", "--dataset", "parts", "--dataset-config", "one"]],
}


@pytest.mark.parametrize(
    ("name", "command"), [(name, command) for name, commands in INPUTS_OF_COMMANDS.items() for command in commands]
)
def test_no_file_that_is_read_is_replaced_under_any_name(tmp_path, capsys, monkeypatch, name, command):
    monkeypatch.chdir(tmp_path)
    for file in ("run/metrics.jsonl", "run/final/model.safetensors", "base/model.safetensors", *INPUTS_OF_COMMANDS):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("PAR1, old" if file.endswith(".parquet") else "old")  # as parquet files begin
    before = (tmp_path / name).read_text()
    for output in link_names(tmp_path, tmp_path / name):
        if name == "run/gguf/added.csv" and output.name.startswith("hard"):
            continue  # nothing that the command reads
        words = [word.format(file=tmp_path / name) for word in command]
        assert main([*words, "--output", str(output)]) == 2
        assert re.search("name another|name a file outside it", capsys.readouterr().err)
    assert (tmp_path / name).read_text() == before


def test_a_new_file_is_not_put_among_the_inputs_of_a_run_and_earlier_predictions_are_replaced(finished, capsys):
    (finished / "inputs" / "dataset").mkdir(parents=True, exist_ok=True)
    assert main(["predict", str(finished), "a", "--output", str(finished / "inputs" / "dataset" / "test.csv")]) == 2
    assert "in a directory that a run writes: name a file outside it" in capsys.readouterr().err
    for _ in range(2):
        assert main(["predict", str(finished), "a", "--device", "cpu", "--output", str(finished / "a.csv")]) == 0
