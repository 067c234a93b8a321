"""Tables as other programs write them: pandas, `datasets`, Excel, Spark, plain joins by tabs; and what is broken."""

import csv
import json
import random
import shlex
import string
import subprocess
import sys

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ft.cli.main import main
from ft.config import Config
from ft.data import text_files
from ft.data.load import read_splits
from ft.data.tables import Columns, NoLabelsError, read_split, read_table
from ft.data.text_files import TextFormat, plain_lines
from ft.errors import FtError, UsageError
from tests.conftest import ROOT, write_parquet

LABELS = ["pos", "neg", "pos", "neg", "pos", "neg"]


def split_of(path, **flags):
    return read_split("train", [path], **flags)


def words_of(split):
    return [split.label_names[label] for label in split.labels]


def written(path, texts, labels=LABELS, delimiter="\t"):
    """Values joined as they are, without any quoting."""
    rows = [f"{text}{delimiter}{label}\n" for text, label in zip(texts, labels, strict=False)]
    path.write_bytes(("text" + delimiter + "label\n" + "".join(rows)).encode())
    return path


# --- quotes -----------------------------------------------------------------------------------------------------------

# Each a report: pytorch/text#612 and #349, huggingface/datasets#1763, pandas-dev/pandas#39857.
LONE = [
    ['First "', '"Second', 'Third "sentence"', "Fourth", '"Fifth" is', "Sixth"],
    ['a " c', '" b c', "d", "e", "f", "g"],
    ['"whole"', '"', '""', '"""', 'a ""b""', "plain"],
    ['"opens', "middle", 'closes"', "d", "e", "f"],
]


@pytest.mark.parametrize("texts", LONE)
def test_quotes_in_tab_separated_values_are_characters_like_others(tmp_path, texts):
    path = written(tmp_path / "x.tsv", texts)
    split = split_of(path)
    theirs = pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE)
    assert split.texts == texts == theirs["text"].tolist()
    assert words_of(split) == LABELS
    assert split.notes == ()


def test_the_real_reviews_as_plain_tab_separated_values_stay_as_they_are(real_dataset, tmp_path):
    real = read_split("train", [real_dataset / "train.parquet"])
    assert sum(text.count('"') for text in real.texts) > 100
    path = written(tmp_path / "train.tsv", real.texts, real.labels)
    assert split_of(path).texts == real.texts


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_what_pandas_writes_comes_back(tmp_path, suffix, quoting):
    texts = ['he said "no"', '"whole"', "two\nlines", "tab\tand , comma", '"', "a\r\nb"]
    path = tmp_path / f"x{suffix}"
    frame = pandas.DataFrame({"text": texts, "label": LABELS})
    frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",", quoting=quoting)
    split = split_of(path)
    assert split.texts == texts
    assert words_of(split) == LABELS
    assert split.notes == ("x" + suffix + " has 6 rows in 9 lines, as some values span several",)


def test_doubled_quotes_tell_that_tab_separated_values_are_quoted(tmp_path):
    texts = ['he said "no"', '"', "plain", "c", "d", "e"]
    pandas.DataFrame({"text": texts, "label": LABELS}).to_csv(tmp_path / "x.tsv", index=False, sep="\t")
    assert split_of(tmp_path / "x.tsv").texts == texts


def test_random_tables_come_back_from_every_writer(tmp_path):
    generator = random.Random(3)
    alphabet = string.ascii_lowercase[:3] + ' "",;\t\n|\\' + "é"
    for number in range(60):
        texts = ["".join(generator.choices(alphabet, k=generator.randrange(9))) for _ in range(5)] + ["a plain one"]
        delimiter, suffix = generator.choice([(",", ".csv"), (";", ".csv"), ("\t", ".tsv"), ("|", ".csv")])
        path = tmp_path / f"{number}{suffix}"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
            writer.writerows([("text", "label"), *zip(texts, LABELS, strict=True)])
        assert split_of(path).texts == texts
        assert words_of(split_of(path)) == LABELS


def test_lone_quotes_in_a_csv_are_kept_with_a_note(tmp_path):
    texts = ['"Great" film', '"opens', "b", 'closes"', '5" screen', '"x']
    split = split_of(written(tmp_path / "x.csv", texts, delimiter=","))
    assert split.texts == texts
    assert split.notes == ("the quotes in x.csv do not enclose values and are read as parts of them",)


def test_quotes_escaped_by_backslashes_are_read(tmp_path):
    """As Spark and MySQL write them, and pandas with `escapechar`."""
    texts = ['he said "no", twice', "plain", 'a "b"', "c, d", r"C:\dir", "f"]
    path = tmp_path / "x.csv"
    frame = pandas.DataFrame({"text": texts, "label": LABELS})
    frame.to_csv(path, index=False, quoting=csv.QUOTE_ALL, doublequote=False, escapechar="\\")
    split = split_of(path)
    assert [text.replace("\\\\", "\\") for text in split.texts] == texts
    assert split.notes == (r"the quotes in x.csv are escaped as \"",)


def test_a_quote_that_swallows_rows_is_refused(tmp_path):
    path = written(tmp_path / "x.csv", ["a", '"opens', "middle", "another", 'closes"', "b"], delimiter=",")
    theirs = pandas.read_csv(path)
    assert len(theirs) == 3, "pandas joins four rows"
    with pytest.raises(FtError, match=r"lines 3 to 6 of .*x.csv are one row, .* yet each looks like a row") as raised:
        split_of(path)
    assert "double the quotes inside values" in str(raised.value)


def test_a_text_of_several_lines_is_no_row(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('text,label\n"one, two\nthree, four",pos\nfive,neg\n')
    split = split_of(path)
    assert split.texts == ["one, two\nthree, four", "five"]
    assert split.notes == ("x.csv has 2 rows in 4 lines, as some values span several",)


def test_a_carriage_return_inside_a_line_is_part_of_the_text(tmp_path):
    """huggingface/datasets#622 and #1989."""
    texts = ["a\rb", "c", "d", "e", "f", "g\r\rh"]
    for suffix, delimiter in ((".tsv", "\t"), (".csv", ",")):
        assert split_of(written(tmp_path / f"x{suffix}", texts, delimiter=delimiter)).texts == texts


# --- columns, delimiters, encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_delimiter_is_recognized_from_the_first_line(tmp_path, suffix, delimiter):
    path = tmp_path / f"x{suffix}"
    texts = ["a, b", "c; d", "e | f", "g\th", 'i "j"', "k"]
    pandas.DataFrame({"id": range(6), "text": texts, "label": LABELS}).to_csv(path, index=False, sep=delimiter)
    split = split_of(path)
    assert split.texts == texts
    usual = "\t" if suffix == ".tsv" else ","
    assert split.notes == (() if delimiter == usual else (f"the columns of x{suffix} are split at {delimiter!r}",))
    assert split_of(path, form=TextFormat(delimiter="tab" if delimiter == "\t" else delimiter)).notes == ()


def test_the_delimiter_that_is_given_decides(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text~label\na, b~pos\nc~neg\n")
    with pytest.raises(
        FtError, match=r"line 2 has 2 values and the first line 1; put quotes .* or name another delimiter by"
    ):
        split_of(path)
    assert split_of(path, form=TextFormat(delimiter="~")).texts == ["a, b", "c"]
    for wrong in ("~~", '"'):
        with pytest.raises(UsageError, match="it must be one character"):
            split_of(path, form=TextFormat(delimiter=wrong))


def test_a_line_that_tells_excel_the_delimiter_is_no_header(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"sep=;\r\ntext;label\r\na, b;pos\r\nc;\r\n")
    with pytest.raises(FtError, match=r"row 1 of .*x.csv \(line 4\) is missing"):
        split_of(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_bytes(b"sep=;\r\ntext;label\r\na, b;pos\r\nc;neg\r\n")
    assert split_of(tmp_path / "x.csv").texts == ["a, b", "c"]


def test_lines_of_blanks_are_not_rows(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na,1\n   \nb,0\n\n")
    theirs = pandas.read_csv(tmp_path / "x.csv")
    split = split_of(tmp_path / "x.csv")
    assert (split.texts, split.labels) == (theirs["text"].tolist(), theirs["label"].tolist()) == (["a", "b"], [1, 0])


def test_a_delimiter_at_the_end_of_each_row_is_no_column(tmp_path):
    """pandas-dev/pandas#14124 and apache/arrow#26743."""
    (tmp_path / "x.csv").write_text("text,label\na,pos,\nb,neg,\n")
    theirs = pandas.read_csv(tmp_path / "x.csv", index_col=False)
    split = split_of(tmp_path / "x.csv")
    assert split.texts == theirs["text"].tolist() == ["a", "b"]
    assert words_of(split) == theirs["label"].tolist()


def test_rows_without_any_value_are_left_out_with_a_note(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na,pos\n\n,\nb,neg\n,\n")
    split = split_of(tmp_path / "x.csv")
    assert split.texts == ["a", "b"]
    assert split.notes == ("2 rows of x.csv without any value are left out",)


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
@pytest.mark.parametrize(
    "lines", [["a", "", "b"], ["", "", "a b"], ["a", '""', "", '"b"'], ["a", "  ", "b"], ['"a', "", 'b"', "", "c"]]
)
def test_blank_lines_of_one_column_are_empty_values_except_at_the_end(tmp_path, lines, name, newline, end):
    path = tmp_path / name
    path.write_bytes((newline.join(["text", *lines]) + end.replace("\n", newline)).encode())
    theirs = pandas.read_csv(path, skip_blank_lines=False, keep_default_na=False, sep="\t")["text"].tolist()
    while theirs[-1] == "":
        theirs.pop()
    table, texts = read_table(path, "text")
    if name == "x.csv" or '"' not in "".join(lines):  # whose quotes are characters like others
        assert texts == theirs
    assert len(texts) == len(table.lines)
    assert (texts[-1], table.lines[-1]) == (lines[-1].strip('"') if name == "x.csv" else lines[-1], len(lines) + 1)


def test_a_quoted_empty_value_at_the_end_is_a_row(tmp_path):
    (tmp_path / "x.csv").write_text('text\na\n""\n\n')
    table, texts = read_table(tmp_path / "x.csv", "text")
    assert (texts, table.lines) == (["a", ""], [2, 3])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-16-be"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_byte_order_marks_tell_the_encoding(tmp_path, suffix, encoding):
    texts = ["schön", "電影 🎬", "\u2028 in it", "a", "b", "c"]
    frame = pandas.DataFrame({"text": texts, "label": LABELS})
    if "json" in suffix:
        content = frame.to_json(orient="records", lines=suffix == ".jsonl", force_ascii=False)
    else:
        content = frame.to_csv(index=False, sep="\t" if suffix == ".tsv" else ",")
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / f"x{suffix}").write_bytes((mark + content).encode(encoding))
    for form in (None, TextFormat(encoding="cp1252")):
        assert split_of(tmp_path / f"x{suffix}", form=form).texts == texts


def test_other_encodings_are_named(demo_inputs, tmp_path, capsys):
    path = tmp_path / "x.csv"
    rows = "".join(f"ein schöner film {i},{LABELS[i % 2]}\n" for i in range(30))
    path.write_bytes(("text,label\n" + rows).encode("cp1252"))
    flags = ["data", "--model", str(demo_inputs[0]), "--dataset", str(path)]
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert f"{path} is not UTF-8: invalid start byte in line 2, byte 18; name its encoding, such as --encoding" in error
    assert error.isprintable() or error.rstrip("\n").isprintable()
    remedy = error.partition("such as ")[2].partition(" for")[0]
    assert main([*flags, *shlex.split(remedy)]) == 0
    assert main([*flags, "--encoding", "latein"]) == 2
    assert main([*flags, "--encoding", "hex"]) == 2


def test_blanks_around_the_names_of_columns_are_none_of_them(tmp_path):
    (tmp_path / "x.csv").write_text(" text , label \na,1\nb,0\n")
    assert split_of(tmp_path / "x.csv").labels == [1, 0]
    assert split_of(tmp_path / "x.csv", columns=Columns(text=" text ")).labels == [1, 0]
    pq.write_table(pa.table({"text": ["a", "b"], "label ": [1, 0]}), tmp_path / "x.parquet")
    assert split_of(tmp_path / "x.parquet").labels == [1, 0]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("text", "label"), [("review", "sentiment"), ("the body", "star's"), ("text", "stars")])
def test_the_flags_that_an_error_proposes_are_right(demo_inputs, tmp_path, capsys, suffix, text, label):
    rows = {"id": range(30), text: ["the plot is dull ."] * 30, label: ["good", "bad"] * 15, "score": [0.5] * 30}
    frame = pandas.DataFrame(rows)
    path = tmp_path / f"x{suffix}"
    if suffix == ".csv":
        frame.to_csv(path)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    flags = ["data", "--model", str(demo_inputs[0]), "--dataset", str(path)]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert ": try --" in error
    assert main([*flags, *shlex.split(error.partition(": try ")[2])]) == 0
    assert f"{path}: 27 train, 3 validation examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        '"3","Wall St. Bears Claw Back Into the Black","Reuters - Short-sellers"\n',  # as AG News
        "a film I liked,pos\nawful,neg\nfine,pos\n",
        '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n',
    ],
)
def test_a_file_without_a_header_is_reported(tmp_path, content):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(FtError, match="its first line must name the columns, as in text,label"):
        split_of(tmp_path / "x.csv")


@pytest.mark.parametrize("na_rep", ["NA", "#N/A", "NaN", "null"])
def test_missing_labels_among_numbers_are_not_a_class(tmp_path, na_rep):
    frame = pandas.DataFrame({"text": list("abcd"), "label": pandas.array([1, None, 0, 1], dtype="Int64")})
    frame.to_csv(tmp_path / "x.csv", index=False, na_rep=na_rep)
    with pytest.raises(FtError, match=r"the label in row 1 of .*x.csv \(line 3\) is missing"):
        split_of(tmp_path / "x.csv")
    assert split_of(tmp_path / "x.csv", label_names=["0", "1", na_rep]).labels == [1, 2, 0, 1]
    (tmp_path / "y.csv").write_text(f"text,label\na,yes\nb,{na_rep}\nc,no\n")
    assert words_of(split_of(tmp_path / "y.csv")) == ["yes", na_rep, "no"], "among words it is a word"


@pytest.mark.parametrize("after", ["", " "])
def test_blanks_between_quotes_and_delimiters_are_left_out(tmp_path, after):
    texts = ["a, b", 'c ""d""', "e\nf", "", "g"]
    rows = [f'{label}, "{text}"{after}, x' for text, label in zip(texts, "01010", strict=True)]
    (tmp_path / "x.csv").write_text("\n".join(["label, text,other", *rows]) + "\n")
    split = split_of(tmp_path / "x.csv")
    assert split.texts == ["a, b", 'c "d"', "e\nf", "", "g"]
    assert split.notes[0] == "blanks around quotes in x.csv are left out"
    if not after:
        theirs = pandas.read_csv(tmp_path / "x.csv", skipinitialspace=True, keep_default_na=False)
        assert (split.texts, split.labels) == (theirs["text"].tolist(), theirs["label"].tolist())


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda frame, path: frame.to_excel(path, engine="openpyxl"), "x.csv is a ZIP archive, as Excel workbooks are"),
        (lambda frame, path: frame.to_parquet(path), "x.csv is a parquet file: name it .parquet"),
        (
            lambda frame, path: frame.to_csv(path, compression="gzip"),
            "x.csv is compressed by gzip: add .gz to its name",
        ),
    ],
)
def test_a_binary_file_under_a_text_name_is_named(tmp_path, write, message):
    with (tmp_path / "x.csv").open("wb") as file:
        write(pandas.DataFrame({"text": ["a"], "label": [1]}), file)
    with pytest.raises(FtError, match=message):
        split_of(tmp_path / "x.csv", form=TextFormat(encoding="cp1252"))


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".json.gz"])
@pytest.mark.parametrize(
    "options",
    [
        {"orient": "records"},
        {"orient": "records", "lines": True},
        {},
        {"orient": "table", "index": False},
        {"orient": "split"},
        {"orient": "index"},
    ],
)
def test_json_as_pandas_writes_it(tmp_path, suffix, options):
    texts = ["a", 'b "c"', "2001-01-01", "\u2028", "null", "é"]
    path = tmp_path / f"x{suffix}"
    pandas.DataFrame({"text": texts, "label": LABELS}).to_json(path, **options)
    split = split_of(path)
    assert split.texts == texts
    assert words_of(split) == LABELS


def test_json_lines_as_datasets_writes_them(tmp_path):
    theirs = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [True, False]})
    theirs.to_json(tmp_path / "x.json")
    theirs.to_json(tmp_path / "array.json", lines=False)
    for name in ("x.json", "array.json"):
        assert words_of(split_of(tmp_path / name)) == ["True", "False"]


def test_columns_that_only_some_lines_have(tmp_path):
    """huggingface/datasets#7169."""
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": 1}\n{"more": [], "label": 0, "text": "b"}\n')
    assert split_of(tmp_path / "x.jsonl").labels == [1, 0]


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow"])
@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        ([True, False, True], [1, 0, 1], ("False", "True")),
        ([0.0, 1.0, 1.0], [0, 1, 1], None),
        ([5, 1, 3], [5, 1, 3], None),
        (["2", "0", "1"], [2, 0, 1], None),
        (["b", "a", "b"], [1, 0, 1], ("a", "b")),
    ],
)
def test_labels_are_the_same_in_every_format(tmp_path, suffix, labels, expected, names):
    frame = pandas.DataFrame({"text": ["x", "y", "z"], "label": labels})
    path = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".arrow":
        table = pa.Table.from_pandas(frame)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    elif "json" in suffix:
        frame.to_json(path, orient="records", lines=suffix == ".jsonl")
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    split = split_of(path)
    assert (split.labels, split.label_names) == (expected, names)


def test_categories_of_pandas_are_words_and_numbers(tmp_path):
    """huggingface/datasets#5706."""
    frame = pandas.DataFrame({"text": pandas.Categorical(["x", "y", "x"]), "label": pandas.Categorical(LABELS[:3])})
    frame.to_parquet(tmp_path / "x.parquet")
    assert words_of(split_of(tmp_path / "x.parquet")) == LABELS[:3]
    frame["label"] = pandas.Categorical([3, 1, 3])
    frame.to_parquet(tmp_path / "x.parquet")
    assert split_of(tmp_path / "x.parquet").labels == [3, 1, 3]
    assert split_of(tmp_path / "x.parquet").texts == ["x", "y", "x"]


def test_all_empty_labels_are_counted_with_their_lines(tmp_path):
    frame = pandas.DataFrame({"text": ["two\nlines", "b", "c", "d"], "label": ["pos", None, "neg", None]})
    frame.to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(
        FtError, match=r"the label in 2 rows of .*x.csv \(lines 4, 6\) is missing; fill it in, or leave the"
    ):
        split_of(tmp_path / "x.csv")
    frame.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(FtError, match=r"the label in 2 rows of .*x.parquet \(rows 1, 3\) is missing"):
        split_of(tmp_path / "x.parquet")
    frame["label"] = [1.0, None, 0.0, 1.0]
    frame.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    with pytest.raises(FtError, match=r"the label in row 1 of .*x.jsonl \(line 2\) is missing"):
        split_of(tmp_path / "x.jsonl")


@pytest.mark.parametrize("labels", [[-1] * 6, [-1.0] * 6, ["-1"] * 6, [None] * 6])
def test_a_split_without_labels_is_left_out_with_a_note(tmp_path, labels):
    write_parquet(tmp_path / "train.parquet", list("abcdef"), [0, 1] * 3)
    write_parquet(tmp_path / "validation.parquet", list("abcdef"), [0, 1] * 3)
    write_parquet(tmp_path / "test.parquet", list("abcdef"), labels)
    splits, notes = read_splits(Config(dataset=str(tmp_path)))
    assert list(splits) == ["train", "validation"]
    assert any(note.startswith("the test split is left out: no row of the test split has a label") for note in notes)
    pq.write_table(pa.table({"text": list("abcdef")}), tmp_path / "test.parquet")
    splits, notes = read_splits(Config(dataset=str(tmp_path)))
    assert list(splits) == ["train", "validation"]
    assert any("has no column 'label'" in note for note in notes)
    write_parquet(tmp_path / "train.parquet", list("abcdef"), labels)
    with pytest.raises(NoLabelsError, match="no row of the train split has a label"):
        read_splits(Config(dataset=str(tmp_path)))


@pytest.mark.parametrize("labels", [[1, 2, 3, 4, 5], [0, 4], ["5", "4", "1"], [1.0, 0.0], [10, 9, -1]])
def test_numbers_without_names_are_labels_as_they_are(tmp_path, labels):
    rows = [(f"text {i}", labels[i % len(labels)]) for i in range(60)]
    pandas.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "train.csv", index=False)
    pandas.DataFrame(rows[:3], columns=["text", "label"]).to_json(tmp_path / "test.json", orient="records")
    splits, notes = read_splits(Config(dataset=str(tmp_path)))
    names = tuple(str(number) for number in sorted({int(float(label)) for label in labels}))
    assert all(split.label_names == names for split in splits.values())
    assert words_of(splits["test"]) == [str(int(float(label))) for _, label in rows[:3]]
    assert any(f"the labels are the numbers {', '.join(names)} themselves" in note for note in notes)
    pandas.DataFrame([("a", 77)], columns=["text", "label"]).to_json(tmp_path / "test.json", orient="records")
    with pytest.raises(FtError, match=f"label in row 0 of .*test.json is 77, those to train on are {names[0]}, "):
        read_splits(Config(dataset=str(tmp_path)))


def test_names_in_another_order_are_the_same_labels(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["a", "b"], [0, 1], names=["neg", "pos"])
    write_parquet(tmp_path / "validation.parquet", ["a", "b"], [1, 0], names=["pos", "neg"])
    splits, _ = read_splits(Config(dataset=str(tmp_path)))
    assert splits["validation"].labels == [0, 1]
    write_parquet(tmp_path / "validation.parquet", ["a", "b"], [1, 0], names=["good", "neg"])
    with pytest.raises(FtError, match=r"row 1 of .*validation.parquet is 'good', the labels are neg, pos: correct"):
        read_splits(Config(dataset=str(tmp_path)))


@pytest.mark.parametrize("way", ["flag", "file", "parquet"])
def test_names_that_are_not_utf8_are_refused_when_read(inputs, tmp_path, capsys, way):
    flags = [*inputs, "--output-dir", str(tmp_path / "run")]
    if way == "flag":
        flags += ["--label-names", "neg,p\udcf6s"]
    elif way == "file":
        (tmp_path / "config.json").write_text('{"label_names": "neg,p\\ud800s"}')
        flags += ["--config", str(tmp_path / "config.json")]
    else:
        for split in ("train", "validation"):
            write_parquet(tmp_path / f"{split}.parquet", ["a", "b"], [0, 1], names=["neg", "p\ud800s"])
        flags += ["--dataset", str(tmp_path)]
    assert main(flags) == (1 if way == "parquet" else 2)
    message = "the name of label 1 is not UTF-8: it holds '\\ud" if way == "parquet" else "it must be valid UTF-8"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_metadata_that_are_not_utf8_are_refused_and_not_passed_over(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["a", "b"], [0, 1], names=["neg", "pos"])
    table = pq.read_table(tmp_path / "train.parquet")
    about = table.schema.metadata[b"huggingface"].replace(b"pos", b"p\xf6s")
    pq.write_table(table.replace_schema_metadata({b"huggingface": about}), tmp_path / "train.parquet")
    with pytest.raises(FtError, match=r"the metadata of .*train.parquet, .* are not valid UTF-8 \(.* at byte \d+\)"):
        read_split("train", [tmp_path / "train.parquet"], Columns("text", "label"))


# --- files and splits -------------------------------------------------------------------------------------------------


def test_suffixes_and_names_of_splits_are_compared_without_case(tmp_path):
    frame = pandas.DataFrame({"text": ["a", "b"], "label": ["x", "y"]})
    frame.to_csv(tmp_path / "Train.CSV", index=False)
    frame.to_parquet(tmp_path / "VALIDATION.Parquet")
    frame.to_json(tmp_path / "test-00000-of-00001.JSONL.GZ", orient="records", lines=True, compression="gzip")
    splits, _ = read_splits(Config(dataset=str(tmp_path)))
    assert [split.texts for split in splits.values()] == [["a", "b"]] * 3
    frame.to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(FtError, match=r"several files for the same part of train: Train.CSV, train.csv"):
        read_splits(Config(dataset=str(tmp_path)))


def test_what_save_to_disk_wrote_is_read(inputs, tmp_path):
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names, "id": datasets.Value("int32")})
    rows = {"text": [f"text {i}" for i in range(20)], "label": [0, 1] * 10, "id": range(20)}
    whole = datasets.Dataset.from_dict(rows, features=features)
    parts = datasets.DatasetDict({"train": whole.select(range(2, 20)), "Test": whole.select([1, 0])})
    parts = parts.filter(lambda row: row["id"] != 7)
    parts.save_to_disk(tmp_path / "saved", num_shards={"train": 3, "Test": 1})
    parts.map(lambda row: {"n": len(row["text"])})
    splits, notes = read_splits(Config(dataset=str(tmp_path / "saved"), seed=1))
    assert splits["test"].texts == ["text 1", "text 0"]
    assert splits["test"].label_names == ("neg", "pos")
    together = {*zip(splits["train"].texts, splits["train"].labels, strict=True)}
    together |= {*zip(splits["validation"].texts, splits["validation"].labels, strict=True)}
    assert together == {*zip(parts["train"]["text"], parts["train"]["label"], strict=True)}
    assert len(notes) == 1
    parts["Test"].save_to_disk(tmp_path / "one")
    (shard,) = (tmp_path / "one").glob("*.arrow")
    for path in (tmp_path / "one", shard):
        with pytest.raises(FtError, match="has no validation split, and 2 training rows are too few"):
            read_splits(Config(dataset=str(path)))
    (tmp_path / "saved" / "train" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(FtError, match=r"lacks 1 of the 3 shards of train: train/data-00001-of-00003.arrow"):
        read_splits(Config(dataset=str(tmp_path / "saved")))


def test_a_damaged_arrow_file_makes_no_traceback(tmp_path):
    table = pa.table({"text": ["some text", "more"] * 40, "label": [0, 1] * 40})
    path = tmp_path / "x.arrow"
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    whole = path.read_bytes()
    generator = random.Random(5)
    program = (
        "import sys\nfrom pathlib import Path\nfrom ft.data.tables import read_split\nfrom ft.errors import FtError\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.arrow')):\n"
        "    try:\n        read_split('train', [path])\n"
        "    except FtError as error:\n        assert '\\n' not in str(error), error\n"
    )
    for number in range(300):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / f"{number}.arrow").write_bytes(damaged[: generator.choice([len(whole), len(whole), 700, 90])])
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# --- too large --------------------------------------------------------------------------------------------------------


def test_a_value_that_is_too_large_is_refused_with_its_line_and_the_limit(tmp_path, monkeypatch):
    assert text_files.LARGEST_VALUE == 2**26
    monkeypatch.setattr(text_files, "LARGEST_VALUE", 1000)
    (tmp_path / "x.csv").write_text('text,label\na,pos\n"' + "b\n" * 600 + '",neg\n')
    before = csv.field_size_limit()
    message = "line 3 holds a value of more than 1,000 characters: is a quote never closed"
    with pytest.raises(FtError, match=message):
        split_of(tmp_path / "x.csv")
    assert csv.field_size_limit() == before


def test_a_parquet_file_that_memory_does_not_hold_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 1000), pa.array(["x" * 2**20]))
    pq.write_table(pa.table({"text": texts, "label": [0, 1] * 500}), path, store_schema=False)
    assert path.stat().st_size < 2**21
    program = """if True:
        import resource, sys
        from pathlib import Path
        import pyarrow.parquet
        from ft.data.tables import read_split
        from ft.errors import FtError

        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        try:
            read_split("train", [Path(sys.argv[1])])
        except FtError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert "does not fit into memory; split the file into several" in done.stdout, done.stderr[-2000:]


def test_lines_of_a_text():
    assert plain_lines("a\r\nb\rc\n\nd\u2028\x85\x0c\x1c") == ["a", "b", "c", "", "d\u2028\x85\x0c\x1c"]
    assert plain_lines("a\n") == ["a"]
    assert plain_lines("") == []


# --- commands ---------------------------------------------------------------------------------------------------------


def test_delimiter_and_encoding_are_taken_by_every_command(inputs, tmp_path, capsys):
    rows = [f"ein schöner, {word} film {i}~{word}\n" for i in range(20) for word in ("pos", "neg")]
    path = tmp_path / "x.csv"
    path.write_bytes(("text~label\n" + "".join(rows)).encode("cp1252"))
    form = ["--delimiter", "~", "--encoding", "cp1252"]
    flags = [*inputs, "--dataset", str(path), *form]
    run = str(tmp_path / "run")
    assert main(["data", *flags]) == 0
    assert main(["explain", *flags, "--row", "1"]) == 0
    assert "ein schöner, " in capsys.readouterr().out
    assert main([*flags, "--max-steps", "1", "--output-dir", run]) == 0
    assert main(["evaluate", run, "--device", "cpu", "--split", "all", "--json"]) == 0
    capsys.readouterr()
    arguments = ["evaluate", run, "--device", "cpu", "--json", "--dataset", str(path)]
    assert main(arguments) == 1
    assert "--encoding cp1252" in capsys.readouterr().err
    assert main([*arguments, *form]) == 0
    assert sum(map(sum, json.loads(capsys.readouterr().out)["confusion"])) == 40
    arguments = ["predict", run, "--device", "cpu", "--json", "--file", str(path)]
    assert main([*arguments, *form]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 40
    assert main([*arguments, "--encoding", "cp1252"]) == 1
    assert "name another delimiter by --delimiter" in capsys.readouterr().err


# --- what other programs write besides --------------------------------------------------------------------------------


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE])
def test_values_with_escaped_quotes_delimiters_and_backslashes_are_those_of_pandas(tmp_path, quoting):
    texts = [r'back\slash "q" a, b', r"C:\dir\new", '"a" x', "ends \\", 'x "y"', r"a\"b"]
    path, how = tmp_path / "x.csv", {"doublequote": False, "escapechar": "\\", "quoting": quoting}
    pandas.DataFrame({"text": texts, "label": LABELS}).to_csv(path, index=False, **how)
    split = split_of(path)
    assert split.texts == texts == pandas.read_csv(path, **how)["text"].tolist()
    assert words_of(split) == LABELS


def test_a_backslash_that_escapes_nothing_is_kept(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('text,label\n"say \\"hi\\" in C:\\dir",pos\n"b, c",neg\n', encoding="utf-8")
    assert split_of(path).texts == ['say "hi" in C:\\dir', "b, c"]


@pytest.mark.parametrize("orient", ["split", "index", "records", "columns", "table"])
def test_every_orientation_of_pandas_that_names_columns_is_read(tmp_path, orient):
    table = pandas.DataFrame({"text": list("abcdef"), "label": LABELS}, index=[f"key {i}" for i in range(6)])
    path = tmp_path / "x.json"
    table.to_json(path, orient=orient)
    split = split_of(path)
    assert (split.texts, words_of(split)) == (list("abcdef"), LABELS)


def test_what_to_feather_wrote_is_read(tmp_path):
    path = tmp_path / "x.feather"
    pandas.DataFrame({"text": list("abcdef"), "label": LABELS}).to_feather(path)
    split = split_of(path)
    assert (split.texts, words_of(split)) == (list("abcdef"), LABELS)


def test_decimals_are_labels_where_they_are_whole(tmp_path):
    table = pa.table({"text": list("abc"), "label": pa.array([0, 1, 0], pa.decimal128(5, 2))})
    pq.write_table(table, tmp_path / "x.parquet")
    assert split_of(tmp_path / "x.parquet").labels == [0, 1, 0]
    pq.write_table(
        table.set_column(1, "label", pa.array(["0.5"] * 3).cast(pa.decimal128(5, 2))), tmp_path / "y.parquet"
    )
    with pytest.raises(FtError, match=r"the label in row 0 of .* is Decimal\('0.50'\), it must be a whole number"):
        split_of(tmp_path / "y.parquet")


def test_a_header_in_the_middle_of_joined_files_is_no_row(tmp_path):
    path, parts = tmp_path / "x.csv", [["a", "b"], ["c", "d"]]
    path.write_text("".join(f"text,label\n{x},pos\n{y},neg\n" for x, y in parts), encoding="utf-8")
    split = split_of(path)
    assert (split.texts, split.label_names) == (list("abcd"), ("neg", "pos"))
    assert split.notes == ("1 row of x.csv with the names of the columns again is left out",)


@pytest.mark.parametrize(
    "rows", ["a film to see,1\nthe plot is dull,0\nit is fine,1\n", "0\ta b c\n1\tc d e\n0\tf g h\n"]
)
def test_a_first_line_of_data_is_not_proposed_as_names(tmp_path, rows):
    path = tmp_path / ("x.tsv" if "\t" in rows else "x.csv")
    path.write_text(rows * 3, encoding="utf-8")
    with pytest.raises(FtError, match="its first line must name the columns, as in text,label"):
        split_of(path)


def test_splits_without_labels_are_refused_with_what_to_do(tmp_path):
    write_parquet(tmp_path / "x.parquet", ["a", "b"], [-1, -1])
    with pytest.raises(NoLabelsError, match="--label-column, or take another split"):
        split_of(tmp_path / "x.parquet")
    (tmp_path / "y.csv").write_text("text\na\n", encoding="utf-8")
    with pytest.raises(NoLabelsError, match=r"its columns are text: name one by --label-column$"):
        split_of(tmp_path / "y.csv")
