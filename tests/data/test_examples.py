"""Rows, examples and batches against the Trainer's recipe, the `datasets` library and a plain padded batch."""

import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.utils.rnn import pad_sequence

from ft.data.batches import batches_by_length, by_length, collate, epoch_order, in_batches
from ft.data.examples import Example, encode, label_tokens, read_tokenizer
from ft.data.splits import Split
from ft.data.tables import read_split
from ft.errors import FtError
from tests.conftest import write_parquet
from tests.reference.trainer import IGNORED, load_tokenizer, preprocess

SPLITS = ["train", "validation", "test"]
NAMES = ("neg", "pos")
ODD_TEXTS = [
    "",
    " ",
    "a",
    " leading and trailing ",
    "two  spaces\tand\nlines",
    "naïve café — 映画 \U0001f3ac",
    "e\u0301 is not \u00e9",
    "it's what they'll say , isn't it ?",
    "12345 !!! ...",
    "<|endoftext|>",
    "before<|endoftext|>after",
    "long " * 200,
]


@pytest.fixture(scope="module")
def demo_tokenizer(demo_inputs):
    return read_tokenizer(demo_inputs[0] / "tokenizer.json")


# --- rows -------------------------------------------------------------------------------------------------------------


def assert_reads_as_datasets_does(folder, name):
    split = read_split(name, [folder / f"{name}.parquet"])
    table = datasets.Dataset.from_parquet(str(folder / f"{name}.parquet"), cache_dir=str(folder / "cache"))
    assert split.name == name
    assert split.texts == table["text"][:]
    assert split.labels == table["label"][:]
    assert split.label_names == tuple(table.features["label"].names) == NAMES


@pytest.mark.parametrize(("name", "rows"), [("train", 8530), ("validation", 1066), ("test", 1066)])
def test_the_real_reviews_are_read_as_datasets_reads_them(real_dataset, tmp_path, name, rows):
    (tmp_path / f"{name}.parquet").symlink_to(real_dataset / f"{name}.parquet")
    assert_reads_as_datasets_does(tmp_path, name)
    assert len(read_split(name, [real_dataset / f"{name}.parquet"]).texts) == rows


def test_what_datasets_writes_and_what_the_demo_writes_is_read_alike(demo_inputs, tmp_path):
    features = datasets.Features({"label": datasets.ClassLabel(names=NAMES), "text": datasets.Value("string")})
    rows = {"label": [index % 2 for index in range(len(ODD_TEXTS))], "text": ODD_TEXTS}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "odd.parquet")
    assert_reads_as_datasets_does(tmp_path, "odd")
    (tmp_path / "test.parquet").symlink_to(demo_inputs[1] / "test.parquet")
    assert_reads_as_datasets_does(tmp_path, "test")


def test_several_files_follow_one_another_and_the_first_names_count(tmp_path):
    paths = [
        write_parquet(tmp_path / "0.parquet", ["a", "b"], [0, 1], names=None),
        write_parquet(tmp_path / "1.parquet", ["c"], [1], names=["bad", "good"]),
        write_parquet(tmp_path / "2.parquet", pa.array([], pa.string()), pa.array([], pa.int64()), names=None),
        write_parquet(tmp_path / "3.parquet", ["d"], [0], names=["no", "yes"]),
    ]
    assert read_split("train", paths) == Split("train", ["a", "b", "c", "d"], [0, 1, 1, 0], ("bad", "good"))


@pytest.mark.parametrize("text_type", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("label_type", [pa.int8(), pa.uint8(), pa.int32(), pa.int64(), pa.uint64()])
def test_every_type_of_text_and_whole_number_is_read(tmp_path, text_type, label_type):
    path = write_parquet(tmp_path / "x.parquet", pa.array(["a", "ü"], text_type), pa.array([1, 0], label_type))
    assert read_split("train", [path]) == Split("train", ["a", "ü"], [1, 0], NAMES)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"pandas": "{}"},
        {"huggingface": "not JSON"},
        {"huggingface": "[]"},
        {"huggingface": "{}"},
        {"huggingface": '{"info": {"features": {"label": {"dtype": "int64"}}}}'},
        {"huggingface": '{"info": {"features": {"label": {"names": "neg"}}}}'},
        {"huggingface": '{"info": {"features": {"label": {"names": [1, 2]}}}}'},
        {"huggingface": '{"info": {"features": {"label": {"names": ["neg", 2]}}}}'},
    ],
)
def test_metadata_without_label_names_is_no_error(tmp_path, metadata):
    table = pa.table({"text": ["a"], "label": [0]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "x.parquet")
    assert read_split("train", [tmp_path / "x.parquet"]).label_names is None


REMEDY = ": name them by --text-column and --label-column, or --prompt-column and --completion-column"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0]}, "{path} has no column 'text'; its columns are label: name one by --text-column"),
        (
            {"text": ["a"], "lable": [0], "id": [1]},
            "{path} has no column 'label'; its columns are text, lable, id: name one by --label-column",
        ),
        ({"sentence": ["a"]}, "{path} has no column 'text'; its columns are sentence" + REMEDY),
        ({"text": [7], "label": [0]}, "the text in row 0 of {path} is 7, it must be text"),
        ({"text": [b"a"], "label": [0]}, "the text in row 0 of {path} is b'a', it must be text"),
        (
            {"text": [None], "label": [0]},
            "the text in row 0 of {path} is missing; fill it in, or leave the row out by --skip-empty",
        ),
        (
            {"text": ["a"], "label": [0.5]},
            "the label in row 0 of {path} is 0.5, it must be a whole number or a word; to take such numbers as "
            "classes, write them as words, as in '0.5 stars'",
        ),
        (
            {"text": ["a"], "label": [b"pos"]},
            "the label in row 0 of {path} is b'pos', it must be a whole number or a word",
        ),
        (
            {"text": ["a", "b", None, None], "label": [0, 1, 0, 1]},
            "the text in 2 rows of {path} (rows 2, 3) is missing; fill it in, or leave the rows out by --skip-empty",
        ),
        (
            {"text": ["a", "b"], "label": [0, None]},
            "the label in row 1 of {path} is missing; fill it in, or leave the row out by --skip-empty",
        ),
        (
            {"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())},
            "the train split has no rows ({path})",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_file_column_and_row(tmp_path, columns, message):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(FtError) as raised:
        read_split("train", [path])
    assert str(raised.value) == message.format(path=path)


def test_a_text_that_is_not_utf8_is_refused_by_row(tmp_path):
    buffers = pa.array([b"good", b"\xff\xfe bad"], pa.binary()).buffers()
    text = pa.StringArray.from_buffers(2, buffers[1], buffers[2])
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": text, "label": [0, 1]}), path)
    with pytest.raises(FtError, match=f"the text in row 1 of {path} is not UTF-8: invalid start byte"):
        read_split("train", [path])


def test_the_file_named_is_the_one_that_is_wrong(tmp_path):
    good = write_parquet(tmp_path / "good.parquet", ["a", "b"], [0, 1])
    bad = write_parquet(tmp_path / "bad.parquet", ["c", None], [0, 1])
    with pytest.raises(FtError, match=re.escape(f"the text in row 1 of {bad} is missing")):
        read_split("train", [good, bad])


def test_what_is_not_whole_parquet_is_refused_by_name(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", ODD_TEXTS, [0] * len(ODD_TEXTS))
    whole = path.read_bytes()
    cut_off = [whole[: len(whole) * part // 8] for part in range(8)]
    overwritten = whole[:20] + bytes(len(whole) // 2) + whole[20 + len(whole) // 2 :]
    for content in [*cut_off, whole[:-1], overwritten, b"text,label\na,0\n", b"<html>404</html>" * 9]:
        path.write_bytes(content)
        with pytest.raises(FtError) as raised:
            read_split("train", [path])
        assert str(raised.value).startswith(f"cannot read {path} as parquet: ")
        assert "\n" not in str(raised.value)
    path.unlink()
    for absent_or_folder in (path, tmp_path):
        with pytest.raises(FtError, match=re.escape(f"cannot read {absent_or_folder} as parquet: ")):
            read_split("train", [absent_or_folder])


# --- the tokenizer and the labels -------------------------------------------------------------------------------------


def test_padding_and_truncation_of_the_file_are_turned_off(demo_inputs, tmp_path):
    tokenizer = Tokenizer.from_file(str(demo_inputs[0] / "tokenizer.json"))
    plain = [encoding.ids for encoding in tokenizer.encode_batch(ODD_TEXTS, add_special_tokens=False)]
    tokenizer.enable_padding(length=100)
    tokenizer.enable_truncation(max_length=5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    asking = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert {len(encoding.ids) for encoding in asking.encode_batch(ODD_TEXTS, add_special_tokens=False)} == {100}

    read = read_tokenizer(tmp_path / "tokenizer.json")
    assert [encoding.ids for encoding in read.encode_batch(ODD_TEXTS, add_special_tokens=False)] == plain
    split = Split("train", ODD_TEXTS, [0] * len(ODD_TEXTS))
    assert [len(example.input_ids) for example in encode(split, read, [1, 2], 1000)] == [len(ids) + 1 for ids in plain]


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"version": "1.0", "model": {"type": "None"}}', b"\xff\xfe"])
def test_an_unreadable_tokenizer_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FtError, match=re.escape(f"cannot read {path} as a tokenizer: ")):
        read_tokenizer(path)
    path.write_bytes(content)
    with pytest.raises(FtError, match=re.escape(f"cannot read {path} as a tokenizer: ")):
        read_tokenizer(path)


def test_the_label_tokens_of_gpt2(real_gpt2):
    tokenizer = read_tokenizer(real_gpt2 / "tokenizer.json")
    assert label_tokens(NAMES, tokenizer) == [12480, 1930]
    assert label_tokens(NAMES[::-1], tokenizer) == [1930, 12480]
    reference = transformers.AutoTokenizer.from_pretrained(real_gpt2)
    names = ["negative", "positive", " neg", "very good", "Neutral"]
    assert label_tokens(names, tokenizer) == [reference(name)["input_ids"][0] for name in names]


def test_the_label_tokens_of_the_demo(demo_tokenizer):
    ids = label_tokens(NAMES, demo_tokenizer)
    assert [demo_tokenizer.decode([token]) for token in ids] == list(NAMES)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there must be at least two labels, not []; name them by --label-names neg,pos"),
        (["pos"], "there must be at least two labels, not ['pos']; name them by --label-names neg,pos"),
        (["neg", ""], "the name of label 1 is empty; name all labels by --label-names"),
        (["", "pos"], "the name of label 0 is empty; name all labels by --label-names"),
        (
            ["neg", "pos", "neg"],
            "the labels 'neg' and 'neg' begin with the same token 'neg'; "
            "give them names that differ from the start by --label-names",
        ),
        (
            ["neg", "pos-ish", "pos."],
            "the labels 'pos-ish' and 'pos.' begin with the same token 'pos'; "
            "give them names that differ from the start by --label-names",
        ),
    ],
)
def test_labels_with_the_same_first_token_are_refused(demo_tokenizer, names, message):
    with pytest.raises(FtError) as raised:
        label_tokens(names, demo_tokenizer)
    assert str(raised.value) == message


# --- examples ---------------------------------------------------------------------------------------------------------


def assert_examples_are_the_trainers(model_folder, split, max_length):
    """The Trainer's example is the input and the label in one; ours has them apart."""
    tokenizer = read_tokenizer(model_folder / "tokenizer.json")
    examples = encode(split, tokenizer, label_tokens(NAMES, tokenizer), max_length)
    expected = preprocess(split.texts, split.labels, NAMES, load_tokenizer(model_folder), max_length)
    assert [[*example.input_ids, *example.target_ids] for example in examples] == expected["input_ids"]
    assert [[IGNORED] * len(example.input_ids) + list(example.target_ids) for example in examples] == expected["labels"]
    assert len(examples) == len(split.texts)


@pytest.mark.parametrize("name", SPLITS)
def test_every_real_review_becomes_the_trainers_example(real_dataset, real_gpt2, name):
    assert_examples_are_the_trainers(real_gpt2, read_split(name, [real_dataset / f"{name}.parquet"]), max_length=32)


def test_every_demo_review_becomes_the_trainers_example(demo_inputs):
    model, dataset = demo_inputs
    split = read_split("validation", [dataset / "validation.parquet"])
    for max_length in (8, 32):
        assert_examples_are_the_trainers(model, split, max_length)


@pytest.mark.parametrize("max_length", [2, 3, 9, 32, 1000])
def test_odd_texts_become_the_trainers_examples(demo_inputs, max_length):
    labels = [index % 2 for index in range(len(ODD_TEXTS))]
    assert_examples_are_the_trainers(demo_inputs[0], Split("train", ODD_TEXTS, labels), max_length)


def test_odd_texts_become_the_trainers_examples_with_the_real_tokenizer(real_gpt2):
    labels = [index % 2 for index in range(len(ODD_TEXTS))]
    assert_examples_are_the_trainers(real_gpt2, Split("train", ODD_TEXTS, labels), max_length=32)


def test_of_a_long_review_the_end_is_kept(demo_tokenizer):
    text = "the plot is dull , but the acting is superb ."
    ids = demo_tokenizer.encode(text, add_special_tokens=False).ids
    end = demo_tokenizer.token_to_id("<|endoftext|>")
    (whole,) = encode(Split("train", [text], [1]), demo_tokenizer, [5, 6], len(ids) + 2)
    assert whole == Example([*ids, end], [6])
    for max_length in range(2, len(ids) + 2):
        (example,) = encode(Split("train", [text], [1]), demo_tokenizer, [5, 6], max_length)
        assert example.input_ids == [*ids, end][-(max_length - 1) :]
        assert len(example.input_ids) + len(example.target_ids) == max_length
        assert example.target_ids == [6]


@pytest.mark.parametrize(("label", "row"), [(2, 0), (-1, 1), (10**12, 2)])
def test_a_label_out_of_range_is_refused_by_row(demo_tokenizer, label, row):
    labels = [1, 0, 1]
    labels[row] = label
    with pytest.raises(FtError) as raised:
        encode(Split("validation", ["a", "b", "c"], labels), demo_tokenizer, [5, 6], 32)
    assert str(raised.value) == (
        f"the label in row {row} of the validation split is {label}, it must be from 0 to 1; "
        "correct the data, or name all labels by --label-names"
    )


def test_a_tokenizer_without_end_of_text_is_refused():
    tokenizer = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(FtError) as raised:
        encode(Split("train", ["a"], [0]), tokenizer, [0, 1], 32)
    assert str(raised.value) == "the tokenizer has no token <|endoftext|>; it is not a GPT-2 tokenizer"


# --- batches ----------------------------------------------------------------------------------------------------------


def random_examples(number, seed=0, most_targets=1):
    generator = torch.Generator().manual_seed(seed)

    def whole(low, high, count=1):
        return torch.randint(low, high, (count,), generator=generator).tolist()

    examples = []
    for _ in range(number):
        length = whole(most_targets, 12)[0]
        examples.append(Example(whole(0, 500, length), whole(0, 500, whole(1, most_targets + 1)[0])))
    return examples


@pytest.mark.parametrize("most_targets", [1, 4])
@pytest.mark.parametrize("number", [1, 2, 7])
def test_collate_is_the_padded_batch_without_its_padding(number, most_targets):
    examples = random_examples(number, seed=number, most_targets=most_targets)
    batch = collate(examples)
    inputs = pad_sequence([torch.tensor(example.input_ids) for example in examples], batch_first=True)
    # The padded target of each place, as the Trainer has it, shifted: what should follow that place.
    targets = torch.full_like(inputs, IGNORED)
    for row, (input_ids, target_ids) in enumerate(examples):
        targets[row, len(input_ids) - len(target_ids) : len(input_ids)] = torch.tensor(target_ids)

    assert torch.equal(batch.packing.unpack(batch.input_ids.unsqueeze(-1)).squeeze(-1), inputs)
    packed_targets = batch.packing.pack(targets.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(batch.selection.rows, (packed_targets != IGNORED).nonzero().squeeze(1))
    assert torch.equal(batch.target_ids, packed_targets[batch.selection.rows])
    assert batch.input_ids.dtype == batch.target_ids.dtype == torch.int64
    assert batch.selection.mask.shape[-1] == batch.packing.shape[1] == inputs.shape[1]


def test_a_batch_moves_as_a_whole():
    batch = collate(random_examples(3))
    moved = batch.to(torch.device("meta"))
    arrays = [moved.input_ids, moved.target_ids, moved.packing.slots, moved.packing.positions]
    arrays += [moved.selection.rows, moved.selection.mask, moved.selection.packing.slots]
    assert {array.device.type for array in arrays} == {"meta"}
    assert moved.input_ids.shape == batch.input_ids.shape
    assert moved.target_ids.shape == batch.target_ids.shape
    same = batch.to(torch.device("cpu"))
    assert torch.equal(same.input_ids, batch.input_ids)
    assert torch.equal(same.target_ids, batch.target_ids)


@pytest.mark.parametrize(("number", "batch_size"), [(10, 3), (9, 3), (2, 5), (4, 1), (0, 3)])
def test_in_batches_visits_the_order_and_ends_with_a_smaller_batch(number, batch_size):
    examples = random_examples(12)
    order = epoch_order(12, seed=1, epoch=0)[:number]
    batches = list(in_batches(examples, order, batch_size))
    assert [len(batch.target_ids) for batch in batches] == [
        min(batch_size, number - start) for start in range(0, number, batch_size)
    ]
    seen = [token for batch in batches for token in batch.input_ids.tolist()]
    assert seen == [token for index in order for token in examples[index].input_ids]
    targets = [token for batch in batches for token in batch.target_ids.tolist()]
    assert targets == [token for index in order for token in examples[index].target_ids]


def test_by_length_goes_from_the_shortest_to_the_longest_and_leaves_none_out():
    examples = random_examples(30)
    lengths = [len(examples[index].input_ids) for index in by_length(examples)]
    assert lengths == sorted(lengths)
    assert sorted(by_length(examples)) == list(range(30))
    assert len(set(lengths)) > 5
    assert by_length([]) == []


# --- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "seed"), [(8530, 42), (77, 0), (77, 12345)])
def test_the_order_is_the_trainers(tmp_path, number, seed):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), seed=seed, per_device_train_batch_size=8, use_cpu=True, report_to="none"
    )
    trainer = transformers.Trainer(
        torch.nn.Linear(1, 1), arguments, train_dataset=list(range(number)), data_collator=list
    )
    loader = trainer.get_train_dataloader()
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert [row for batch in loader for row in batch] == epoch_order(number, seed, epoch)


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    order = epoch_order(100, seed=42, epoch=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert order == torch.randperm(100, generator=torch.Generator().manual_seed(42 + 1)).tolist()
    torch.manual_seed(9)
    assert epoch_order(100, 42, 1) == order
    assert sorted(order) == list(range(100))
    assert epoch_order(100, 42, 0) != order
    assert epoch_order(100, 43, 1) != order
    assert {type(row) for row in order} == {int}


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("batch_size", "most"), [(4, 1000), (64, 12), (3, 12), (64, 1)])
def test_batches_hold_every_example_once_and_no_process_gets_too_much(monkeypatch, processes, batch_size, most):
    monkeypatch.setattr("ft.data.batches.MOST_TARGETS", most)
    examples = [Example([1] * (9 + i % 7), [2] * (1 + i * i % 8)) for i in range(41)]
    batches = list(batches_by_length(examples, batch_size, processes))
    assert [number for batch in batches for number in batch] == by_length(examples)
    for batch in batches:
        for rank in range(processes):
            targets = [len(examples[number].target_ids) for number in batch[rank::processes]]
            assert len(targets) <= batch_size
            assert sum(targets) <= most or len(targets) == 1
    if most == 1000:
        assert [len(batch) for batch in batches[:-1]] == [batch_size * processes] * (len(batches) - 1)
    assert list(batches_by_length([], batch_size, processes)) == []
