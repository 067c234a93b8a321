"""Tables in every format, read as `datasets` reads them; splits found by their names; rows set aside and drawn."""

import csv
import gzip
import json
import random
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import transformers
from pyarrow import feather

from ft.cli.main import main
from ft.config import Config
from ft.data.batches import collate
from ft.data.dataset_files import sort_into_splits
from ft.data.examples import Example, encode, label_tokens, read_tokenizer
from ft.data.load import read_splits
from ft.data.splits import Split, stratified
from ft.data.tables import Columns, read_split
from ft.errors import FtError
from ft.io.formats import SUFFIXES
from ft.io.plain_files import read_json
from ft.model.gpt2 import GPT2, GPT2Config
from ft.model.pretrained import load_published
from tests.conftest import write_parquet
from tests.reference.synthetic import write_model

# What breaks readers: separators, quotes, line ends, texts that look like numbers, times or nulls, other alphabets.
TEXTS = [
    "plain",
    'a "quoted" , text',
    "two\nlines",
    "tab\tin it",
    "",
    "NA",
    "null",
    "2001",
    "2020-01-01",
    "żółć 電影 🎬",
]
WORDS = ["pos", "neg", "neutral", "pos", "neg", "neutral", "pos", "neg", "pos", "pos"]
ROWS = [{"id": i, "sentence": text, "tone": word} for i, (text, word) in enumerate(zip(TEXTS, WORDS, strict=True))]


def write_table(path, rows):
    """Rows in the format that the name says, by writers that are not PyArrow's where there are some."""
    opened = gzip.open if path.suffix == ".gz" else open
    if ".parquet" in path.suffixes:
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if path.suffix == ".feather":
        feather.write_feather(pa.Table.from_pylist(rows), path)
        return path
    if ".arrow" in path.suffixes:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        return path
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if ".json" in path.suffixes:
            json.dump(rows, file)
        elif {".jsonl", ".ndjson"} & set(path.suffixes):
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            delimiter = "\t" if ".tsv" in path.suffixes else ","
            writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_format_is_read_to_the_last_character(tmp_path, suffix):
    path = write_table(tmp_path / f"reviews{suffix}", ROWS)
    split = read_split("train", [path], Columns(text="sentence", label="tone"))
    assert split.texts == TEXTS
    assert split.label_names == ("neg", "neutral", "pos")
    assert [split.label_names[label] for label in split.labels] == WORDS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_datasets_reads_the_same(tmp_path, suffix):
    rows = [row for row in ROWS if row["sentence"] not in ("", "NA", "null")]  # which pandas takes for nothing in a CSV
    path = write_table(tmp_path / f"train{suffix}", rows)
    builder = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".csv": "csv", ".tsv": "csv"}.get(
        suffix.removesuffix(".gz"), "json"
    )
    options = {"sep": "\t"} if ".tsv" in suffix else {}
    theirs = datasets.load_dataset(
        builder, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"), **options
    )
    split = read_split("train", [path], Columns(text="sentence", label="tone"))
    assert split.texts == [str(text) for text in theirs["sentence"]]
    assert [split.label_names[label] for label in split.labels] == theirs["tone"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_whole_numbers_are_labels_even_as_text(tmp_path, suffix):
    path = write_table(tmp_path / f"x{suffix}", [{"text": "a", "label": "1"}, {"text": "b", "label": "0"}])
    assert read_split("train", [path]) == Split("train", ["a", "b"], [1, 0])
    assert read_split("train", [path], label_names=["1", "0"]).labels == [0, 1], "unless they are names"


def test_numbers_are_words_where_all_are_among_the_names(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [5, 1, 3]}), path)
    stars = ["1", "2", "3", "4", "5"]
    split = read_split("train", [path], label_names=stars)
    assert [stars[label] for label in split.labels] == ["5", "1", "3"]
    assert split.in_words
    assert read_split("train", [path], label_names=list("abcdef")).labels == [5, 1, 3]
    write_parquet(path, ["a", "b"], [1, 3], names=stars)
    assert read_split("train", [path], label_names=stars).labels == [1, 3], "the file says what they are called"


@pytest.mark.parametrize("flags", [{}, {"label_names": "pos,neg"}])
def test_words_and_numbers_go_together_where_it_is_known_how(tmp_path, flags):
    names = ["pos", "neg"]
    write_parquet(tmp_path / "train.parquet", ["a", "b"], [0, 1], names=None if flags else names)
    write_table(tmp_path / "validation.csv", [{"text": "c", "label": "neg"}])
    write_table(tmp_path / "test.csv", [{"text": "d", "label": "1"}])
    splits, _ = read_splits(Config(dataset=str(tmp_path), **flags))
    assert [splits[name].labels for name in ("train", "validation", "test")] == [[0, 1], [1], [1]]
    assert [splits[name].in_words for name in ("train", "validation", "test")] == [False, True, False]


def test_names_that_are_numbers_do_not_tell_words_from_numbers(tmp_path):
    """Of 0 to 2 one split holds all, another only what might be names too."""
    write_table(tmp_path / "train.csv", [{"text": "a", "label": str(i)} for i in range(3)])
    write_table(tmp_path / "validation.csv", [{"text": "a", "label": "1"}])
    with pytest.raises(FtError, match=r"train.csv is the number 0, that in row 0 of .*validation.csv the word '1'"):
        read_splits(Config(dataset=str(tmp_path), label_names="1,2,3"))


def test_words_are_numbered_by_the_names_given(tmp_path):
    path = write_table(tmp_path / "x.csv", [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}])
    split = read_split("test", [path], label_names=["pos", "neg"])
    assert (split.labels, split.label_names) == ([0, 1], ("pos", "neg"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "is empty: its first line must name the columns"),
        ("x.csv", b"text,label\n", "the train split has no rows"),
        ("x.csv", b"text,label\na,1,2\n", "cannot read .*x.csv: line 2 has 3 values and the first line 2; put quotes"),
        ("x.csv", b"text,label\na\n", "cannot read .*x.csv: line 2 has 1 value and the first line 2"),
        (
            "x.csv",
            b"text,mark\na,1\nb,0\nc,1\n",
            "has no column 'label'; its columns are text, mark: try --label-column mark$",
        ),
        ("x.csv", b"text,label,text\na,1,b\n", "has several columns 'text': rename all but one"),
        (
            "x.csv",
            b"text,label\na,\nb,pos\n",
            r"the label in row 0 of .*x.csv \(line 2\) is missing; fill it in, or leave",
        ),
        ("x.csv", b"text,label\n\xff,1\n", "x.csv is not UTF-8: invalid start byte in line 2, byte 11; name its enc"),
        ("x.csv", b'text,label\n"a,b,1\nc,0\n', "the row that begins in line 2 is not complete"),
        ("x.csv", b'text,label\n"a, b" c,1\n', "line 2 has a quote that neither ends a value nor is doubled"),
        ("x.csv", b"t\0e\0x\0t\0\n\0", "holds NUL characters: try --encoding utf-16-le"),
        ("x.jsonl", b"", "x.jsonl is empty"),
        ("x.jsonl", b'{"text": "a", "label": 1}\n{"text"', "invalid JSON in line 2, column 8: "),
        ("x.jsonl", b'{"text": 3, "label": 1}\n', r"the text in row 0 of .*x.jsonl \(line 1\) is 3, it must be text"),
        (
            "x.jsonl",
            b'{"text": "a", "label": [1]}\n',
            r"label in row 0 .* is \[1\], it must be a whole number or a word",
        ),
        ("x.jsonl", b'{"text": null, "label": 1}\n', "the text in row 0 of .*x.jsonl .line 1. is missing"),
        (
            "x.jsonl",
            b'{"text": "a", "label": 1}\n\n{"label": 1}\n',
            "the text in row 1 of .*x.jsonl .line 3. is missing",
        ),
        (
            "x.jsonl",
            b'{"text": "a", "label": 1}\nnull\n',
            r'line 2 of .*x.jsonl is null, it must be an object such as \{"',
        ),
        ("x.jsonl", b'{"text": "\\ud800", "label": 1}\n', "the text in row 0 of .* is not UTF-8"),
        ("x.jsonl", b'{"text": 1}\n' + b"[" * 20_000 + b"]" * 20_000, "JSON in line 2 is nested too deeply"),
        ("x.json", b"[" * 20_000 + b"]" * 20_000, "cannot read .*x.json: JSON is nested too deeply"),
        ("x.json", b'[{"text": "a", "label": 1},\n{"text"]', "invalid JSON in line 2, column 8: "),
        ("x.json", b'["a"]', 'row 0 of .*x.json is "a", it must be an object'),
        ("x.json", b'{"text": {"0": "a"}, "label": {"0": 1, "1": 0}}', "its columns have different lengths"),
        ("x.jsonl.gz", b"no gzip", "cannot read .*x.jsonl.gz as jsonl: "),
        ("x.csv.gz", gzip.compress(b"text,label\na,1\n")[:-9], "cannot read .*x.csv.gz: it is damaged or truncated"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FtError, match=message):
        read_split("train", [tmp_path / name])


def test_a_word_that_is_no_label_is_named_with_the_labels(tmp_path):
    path = write_table(tmp_path / "x.csv", [{"text": "a", "label": "good"}])
    with pytest.raises(FtError, match=r"label in row 0 of .*x.csv \(line 2\) is 'good', the labels are neg, pos;"):
        read_split("test", [path], label_names=["neg", "pos"])


@pytest.mark.parametrize(
    ("name", "rows", "message", "remedy"),
    [
        ("validation", [("c", "neutral"), ("d", "pos")], "is 'neutral', the labels are neg, pos; ", "neg,pos,neutral"),
        ("train", [("a", "0"), ("b", "1")] * 9, "begin with the same token", "no,yes"),
        ("test", [("a", "0"), ("b", "1")], "the word 'neg', that in row 0 of", "neg,pos"),
    ],
)
def test_labels_named_as_an_error_says_are_right(demo_inputs, tmp_path, capsys, name, rows, message, remedy):
    all_rows = {"train": [("a", "neg"), ("b", "pos")] * 9, "validation": [("a", "neg")], name: rows}
    for split, pairs in all_rows.items():
        write_table(tmp_path / f"{split}.csv", [{"text": text, "label": label} for text, label in pairs])
    flags = ["data", "--model", str(demo_inputs[0]), "--dataset", str(tmp_path)]
    if name == "train":
        write_table(tmp_path / "validation.csv", [{"text": "a", "label": "0"}])
        flags += ["--label-names", "pos,posh"]
    assert main(flags) == (2 if name == "train" else 1)
    error = capsys.readouterr().err
    assert message in error
    assert "by --label-names" in error
    assert main([*flags, "--label-names", remedy]) == 0


def test_words_that_begin_alike_may_be_put_in_order(demo_inputs, tmp_path, capsys):
    rows = [{"text": f"{word} {i}", "label": word} for i in range(20) for word in ("pos", "posh")]
    path = write_table(tmp_path / "x.csv", rows)
    flags = ["--model", str(demo_inputs[0]), "--dataset", str(path), "--label-names", "posh,pos", "--device", "cpu"]
    assert main([*flags, "--max-steps", "1", "--output-dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    for names in ([], ["--label-names", "posh,pos"]):
        assert main(["evaluate", str(tmp_path / "run"), "--json", "--device", "cpu", *names]) == 0
        assert json.loads(capsys.readouterr().out)["labels"] == ["posh", "pos"]


# --- splits by name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_splits_in_every_format(suffix):
    names = [f"data/{split}{suffix}" for split in ("test", "dev", "train")] + ["README.md"]
    assert sort_into_splits(names, "x") == {
        "train": [f"data/train{suffix}"],
        "validation": [f"data/dev{suffix}"],
        "test": [f"data/test{suffix}"],
    }


def test_what_the_hub_has_converted():
    names = ["default/train/0001.parquet", "default/train/0000.parquet", "default/partial-test/0000.parquet"]
    assert sort_into_splits(names, "x") == {
        "train": ["default/train/0000.parquet", "default/train/0001.parquet"],
        "test": ["default/partial-test/0000.parquet"],
    }
    with pytest.raises(FtError, match=r"lacks 1 of the 2 shards of train: train/0000\.parquet"):
        sort_into_splits(["default/train/0001.parquet"], "x")


@pytest.mark.parametrize(
    "names",
    [
        ["train/a.csv", "train/b.csv", "test/a.csv"],
        ["data/train/a.csv", "data/train/b.csv", "data/test/only.csv"],
        ["x/my_train.csv", "x/my_test.csv"],
        ["train-data.csv", "reviews.test.csv", "latest.csv", "restrain.csv"],
    ],
)
def test_splits_as_datasets_finds_them_in_names_and_directories(tmp_path, names):
    """huggingface/datasets#3027 and #4895, OpenRLHF#367."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"text,label\n{name},1\n")
    found = sort_into_splits(names, "x")
    theirs = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert {split: sorted(paths) for split, paths in found.items()} == {
        split: sorted(rows["text"]) for split, rows in theirs.items()
    }


def test_names_that_only_hold_the_word_must_be_one_file():
    with pytest.raises(FtError, match=r"several files for the same part of train: train_v1\.csv, train_v2"):
        sort_into_splits(["train_v1.csv", "train_v2.csv"], "x")
    assert sort_into_splits(["train.csv", "train_v2.csv"], "x") == {"train": ["train.csv"]}


def test_one_of_several_data_sets_is_chosen_by_its_folder():
    names = ["sst2/train-00000-of-00001.parquet", "cola/train-00000-of-00001.parquet"]
    assert sort_into_splits(names, "x", "cola") == {"train": names[1:]}
    with pytest.raises(FtError, match="in cola, sst2: choose one by --dataset-config cola"):
        sort_into_splits(names, "x")
    with pytest.raises(FtError, match="no data set in a directory 'rte', it has one at its top: correct"):
        sort_into_splits(["train.parquet"], "x", "rte")
    with pytest.raises(FtError, match="no data set in a directory 'rte', it has cola, sst2"):
        sort_into_splits(names, "x", "rte")


@pytest.mark.parametrize(
    ("present", "taken"),
    [(("train", "validation", "test"), "test"), (("train", "dev"), "validation"), (("test",), "test")],
)
def test_the_first_of_some_splits(present, taken):
    names = [f"{split}-0000{i}-of-00002.parquet" for split in present for i in (1, 0)]
    found = sort_into_splits(names, "x", first_of=("test", "validation", "train"))
    word = "dev" if taken == "validation" else taken
    assert found == {taken: [f"{word}-0000{i}-of-00002.parquet" for i in (0, 1)]}
    with pytest.raises(FtError, match=r"lacks 1 of the 2 shards of"):
        sort_into_splits([name for name in names if word not in name or "00001-" in name], "x", first_of=(taken,))
    with pytest.raises(FtError, match="x has no test or training split"):
        sort_into_splits(["dev.parquet"], "x", first_of=("test", "train"))


# --- rows drawn -------------------------------------------------------------------------------------------------------


def test_a_stratified_sample_holds_each_class_in_proportion():
    generator = random.Random(0)
    for _ in range(50):
        classes = generator.randint(1, 9)
        groups = [generator.randrange(classes) for _ in range(generator.randint(1, 200))]
        count = generator.randint(0, len(groups))
        rows = stratified(groups, count, seed=3)
        assert rows == sorted(set(rows))
        assert len(rows) == count
        for group in set(groups):
            taken = sum(groups[row] == group for row in rows)
            assert abs(taken - count * groups.count(group) / len(groups)) < 1


def test_a_sample_is_a_function_of_the_seed():
    groups = [0, 1] * 50
    assert stratified(groups, 30, seed=1) == stratified(groups, 30, seed=1) != stratified(groups, 30, seed=2)


def test_rows_keep_the_numbers_of_the_file():
    split = Split("train", list("abcde"), [0, 1, 0, 1, 0])
    some = split.only([1, 3, 4]).only([0, 2], "validation")
    assert some == Split("validation", ["b", "e"], [1, 0], rows=(1, 4))


# --- labels and completions as tokens ---------------------------------------------------------------------------------


def test_labels_that_begin_alike_are_represented_by_numbers(demo_inputs):
    tokenizer = read_tokenizer(demo_inputs[0] / "tokenizer.json")
    names = ["positive", "posh", "negative"]
    assert label_tokens(names, tokenizer, or_numbers=True) == [tokenizer.token_to_id(digit) for digit in "012"]
    with pytest.raises(FtError, match="begin with the same token"):
        label_tokens(names, tokenizer)
    with pytest.raises(FtError, match="begin with the same token"):
        label_tokens(["pos", "pos"], tokenizer, or_numbers=True)


def test_labels_that_begin_alike_are_explained_by_themselves(demo_inputs):
    """Of more than ten labels, the demo's tokenizer has no token of their own for the numbers, 1 and 10 among them."""
    tokenizer = read_tokenizer(demo_inputs[0] / "tokenizer.json")
    with pytest.raises(
        FtError, match=r"the labels 'posh' and 'posy' begin with the same token.*rename words in the data"
    ):
        label_tokens(["posh", "posy", *map(str, range(100, 120))], tokenizer, or_numbers=True)


@pytest.mark.parametrize("classes", [2, 4, 6, 77])
def test_labels_of_the_real_tokenizer_are_distinct(real_gpt2, classes):
    tokenizer = read_tokenizer(real_gpt2 / "tokenizer.json")
    assert len(set(label_tokens([f"card_{i}" for i in range(classes)], tokenizer, or_numbers=True))) == classes


def test_targets_are_the_completion_and_a_closing_end_of_text(demo_inputs):
    tokenizer = read_tokenizer(demo_inputs[0] / "tokenizer.json")
    end = tokenizer.token_to_id("<|endoftext|>")
    prompts, completions = ["the plot", "", "the acting is superb"], [" is dull", "good", ""]
    split = Split("train", prompts, [0] * 3, completions=completions)
    examples = encode(split, tokenizer, [], max_length=64)
    for prompt, completion, example in zip(prompts, completions, examples, strict=True):
        before = tokenizer.encode(prompt).ids or [end]
        targets = [*tokenizer.encode(completion).ids, end]
        assert example == Example([*before, *targets[:-1]], targets)
    batch = collate(examples)
    shifted = batch.input_ids[batch.selection.rows][1:]
    assert (shifted == batch.target_ids[:-1]).sum() >= len(batch.target_ids) - 3, "each target is the next row's input"
    for max_length in (2, 3, 5):
        for whole, cut in zip(examples, encode(split, tokenizer, [], max_length), strict=True):
            assert [*whole.input_ids, end][-max_length:] == [*cut.input_ids, end]
            assert cut.target_ids == whole.target_ids[-len(cut.target_ids) :]
            assert 1 <= len(cut.target_ids) <= len(cut.input_ids)


def test_the_loss_on_completions_is_transformers(demo_inputs):
    reference = transformers.AutoModelForCausalLM.from_pretrained(demo_inputs[0]).double().eval()
    model = GPT2(GPT2Config.from_dict(read_json(demo_inputs[0] / "config.json"))).double().eval()
    load_published(model, reference.state_dict().items())
    tokenizer = read_tokenizer(demo_inputs[0] / "tokenizer.json")
    split = Split(
        "train", ["the plot", "", "in the end , the acting"], [0] * 3, completions=[" is dull", "a", " is fine"]
    )
    batch = collate(encode(split, tokenizer, [], max_length=64))
    ours = F.cross_entropy(model(batch.input_ids, batch.packing, batch.selection), batch.target_ids, reduction="none")
    theirs = []
    end = tokenizer.token_to_id("<|endoftext|>")
    for prompt, completion in zip(split.texts, split.completions, strict=True):
        before, after = tokenizer.encode(prompt).ids or [end], [*tokenizer.encode(completion).ids, end]
        labels = torch.tensor([[*[-100] * len(before), *after]])
        loss = reference(torch.tensor([[*before, *after]]), labels=labels).loss
        theirs.append(loss.item() * len(after))
    assert ours.sum().item() == pytest.approx(sum(theirs), rel=1e-6)


# --- runs -------------------------------------------------------------------------------------------------------------

TOPICS = {"sport": "goal", "money": "bank", "food": "soup", "travel": "hotel", "music": "song", "law": "court"}


def topical(path, classes, column="topic"):
    """Rows whose text names their class; 20 of each."""
    rows = [{"sentence": f"{word} {word} {i}", column: topic} for topic, word in list(TOPICS.items())[:classes]
            for i in range(20)]  # fmt: skip
    return write_table(path, rows)


@pytest.mark.parametrize("classes", [2, 4, 6])
def test_a_run_on_a_file_of_ones_own_learns_its_classes(demo_inputs, tmp_path, capsys, classes):
    path = topical(tmp_path / "topics.csv", classes)
    flags = ["--dataset", str(path), "--text-column", "sentence", "--label-column", "topic", "--device", "cpu"]
    model = ["--model", str(demo_inputs[0])]
    recipe = ["--epochs", "6", "--learning-rate", "2e-3", "--output-dir", str(tmp_path / "run")]
    assert main(["data", *flags, *model]) == 0
    told = capsys.readouterr().out
    assert f"{12 * classes // 2 * 3} train, {2 * classes} validation examples" in told
    assert all(f"\n{topic} " in told for topic in list(TOPICS)[:classes])
    assert main([*flags, *model, *recipe]) == 0
    told = capsys.readouterr().out
    assert f"{2 * classes} training rows, drawn by --seed, are set aside" in told
    assert f"labels {', '.join(sorted(list(TOPICS)[:classes]))}." in told
    assert main(["evaluate", str(tmp_path / "run"), "--split", "test", "--device", "cpu"]) == 2
    assert "topics.csv has no test split; it has train and validation: name one by --split" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--device", "cpu"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["split"] == "validation"
    assert scores["labels"] == sorted(list(TOPICS)[:classes])
    assert scores["accuracy"] == 1.0
    assert main(["predict", str(tmp_path / "run"), "bank bank 7", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "money"


def test_a_run_of_77_classes_from_the_table_to_the_report(real_gpt2, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    things = ["card", "transfer", "top up", "exchange", "refund", "pin", "limit"]
    troubles = ["lost", "late", "pending", "declined", "fee", "rate", "broken", "cancelled", "twice", "abroad", "wrong"]
    names = [f"{thing}_{trouble}" for thing in things for trouble in troubles]
    rows = [{"text": f"why is my {name.replace('_', ' ')} {i}", "label": name} for i in range(20) for name in names]
    path = write_table(tmp_path / "bank.csv", rows)
    model = write_model(tmp_path / "model", "tiny", seed=1, tokenizer_from=real_gpt2)
    flags = ["--model", str(model), "--dataset", str(path), "--device", "cpu", "--precision", "fp32"]
    recipe = ["--epochs", "2", "--learning-rate", "3e-3", "--eval-steps", "1000", "--save-steps", "1000"]
    assert main([*flags, *recipe, "--output-dir", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "several labels begin alike, so that numbers stand for them: 0 for 'card_abroad'" in told
    assert "and 65 more." in told
    asked = ["evaluate", str(tmp_path / "run"), "--split", "validation", "--device", "cpu", "--json"]
    assert main(asked) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["labels"] == sorted(names)
    assert sum(map(sum, scores["confusion"])) == 154
    assert scores["accuracy"] > 10 / 77
    assert main(["report", str(tmp_path / "run")]) == 0
    assert 'class="scroll matrix many"' in (tmp_path / "run" / "report.html").read_text()


def test_a_run_on_completions_learns_them(demo_inputs, tmp_path, capsys):
    path = tmp_path / "topics.jsonl.gz"
    rows = [
        {"prompt": f"{word} {i}", "completion": f" is {topic}"} for i in range(30) for topic, word in TOPICS.items()
    ]
    write_table(path, rows)
    flags = ["--dataset", str(path), "--prompt-column", "prompt", "--completion-column", "completion"]
    model = ["--model", str(demo_inputs[0]), "--device", "cpu", "--precision", "fp32"]
    recipe = ["--epochs", "6", "--learning-rate", "2e-3", "--output-dir", str(tmp_path / "run")]
    assert main([*flags, *model, *recipe]) == 0
    told = capsys.readouterr().out
    assert "completions from the column completion; accuracy counts their tokens" in told
    shown = re.findall(r"  (\w+) \d+ -> is (\w+)\n", told.partition("Three validation examples:")[2])
    assert len(shown) == 3
    assert all(TOPICS[topic] == word for word, topic in shown), "the model goes on as it was taught"
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["eval_accuracy"] for event in events if "eval_accuracy" in event][-1] > 0.95
    assert "id2label" not in json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert main(["evaluate", str(tmp_path / "run"), "--split", "validation", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["exact_match"] > 0.9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt-column", "a", "--completion-column", "b", "--label-names", "x,y"], "there are none: leave it out"),
        (["--prompt-column", "a", "--completion-column", "b", "--static-shapes"], "need one target per row"),
        (["--demo", "--prompt-column", "a"], "--prompt-column is 'a' without --completion-column: give both"),
        (["--train-fraction", "0"], "--train-fraction is 0.0, it must be above 0 and at most 1"),
        (["--train-fraction", "1.5"], "--train-fraction is 1.5, it must be above 0 and at most 1"),
        (["--max-train-samples", "0"], "--max-train-samples is 0, it must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("absent.csv", "there is no file 'absent.csv': check --dataset"),
        ("notes.txt", "whose format is not supported: it must be one of .parquet, .arrow, .csv"),
        ("page.csv", "begins with b'<!DOCTYPE html>': put the file itself there"),
        ("pointer.csv", "is a Git LFS pointer"),
        ("one.csv", "no validation split, and 1 training row is too few"),
    ],
)
def test_a_file_that_is_no_data_set(demo_inputs, tmp_path, monkeypatch, capsys, dataset, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("text,label\na,1\n")
    (tmp_path / "page.csv").write_text("<!DOCTYPE html>")
    (tmp_path / "pointer.csv").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "one.csv").write_text("text,label\na,1\n")
    status = 2 if dataset in ("absent.csv", "notes.txt") else 1
    assert main(["data", "--dataset", dataset, "--model", str(demo_inputs[0])]) == status
    assert message in capsys.readouterr().err
