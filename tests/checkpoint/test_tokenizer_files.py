"""Tokenizers as `transformers` has written them over the years: the same tokens before, here, and in a saved model."""

import json
import logging

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import NFKC, Lowercase
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ft.checkpoint.model_description import read_description
from ft.checkpoint.store import save_model
from ft.cli.main import main
from ft.errors import FtError
from ft.io.atomic import StagedDirectory
from ft.io.model_layout import model_files

END = "<|endoftext|>"
TEXTS = [
    "the plot is dull",
    " The Plot IS dull ",
    "a [PAD] b[PAD]",
    f"x {END}y",
    "ﬁn ½ ａｂ",
    "",
    " ",
    "\u00e9\u0301 \t\n",
    "🎬 so so",
]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture
def folder(inputs, tmp_path):
    """A small model's config.json and weights, to which a test adds a tokenizer."""
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((model_of(inputs) / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    return source


def model_of(inputs):
    from pathlib import Path

    return Path(inputs[1])


def pipeline(inputs):
    return Tokenizer.from_file(str(model_of(inputs) / "tokenizer.json"))


def alone(inputs, folder, change):
    """A tokenizer.json without a tokenizer_config.json."""
    tokenizer = pipeline(inputs)
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))


def by_transformers(inputs, folder, change, **options):
    """What `save_pretrained` writes of a tokenizer."""
    alone(inputs, folder, lambda tokenizer: None)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    change(tokenizer)
    tokenizer.save_pretrained(folder)


def general(inputs, folder, change, **options):
    """What `save_pretrained` writes of a pipeline that is not GPT-2's."""
    tokenizer = pipeline(inputs)
    change(tokenizer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, **options).save_pretrained(folder)


def in_parts(inputs, folder, end_in_vocabulary=True, **files):
    """vocab.json and merges.txt, and small files beside them, as before tokenizer.json was thought of."""
    pipeline(inputs).model.save(str(folder))
    if end_in_vocabulary:
        vocabulary = json.loads((folder / "vocab.json").read_text())
        (folder / "vocab.json").write_text(json.dumps({**vocabulary, END: len(vocabulary)}))
    free = len(json.loads((folder / "vocab.json").read_text()))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(
            json.dumps(content).replace(': "FREE"', f": {free}").replace("FREE", str(free))
        )


def set_prefix(tokenizer):
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)


def nothing(tokenizer):
    pass


def with_template(tokenizer):
    tokenizer.chat_template = TEMPLATE


PAD = {"pad_token": "[PAD]"}
FLAGS = {"content": "[PAD]", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
PUBLISHED = {
    "a tokenizer.json alone": (alone, nothing, {}),
    "saved as it is": (by_transformers, nothing, {}),
    "an added [PAD]": (by_transformers, lambda t: t.add_special_tokens(PAD), {}),
    "added words": (by_transformers, lambda t: t.add_tokens(["so so", AddedToken("dull", lstrip=True)]), {}),
    "end-of-text as padding": (by_transformers, lambda t: setattr(t, "pad_token", END), {}),
    "add_prefix_space": (by_transformers, nothing, {"add_prefix_space": True}),
    "a start of text": (by_transformers, nothing, {"bos_token": "<|startoftext|>", "pad_token": "<|pad|>"}),
    "a chat template": (by_transformers, with_template, {}),
    "truncation": (by_transformers, lambda t: t(TEXTS, truncation=True, max_length=4), {}),
    "Lowercase": (general, lambda t: setattr(t, "normalizer", Lowercase()), {}),
    "NFKC and [PAD]": (general, lambda t: setattr(t, "normalizer", NFKC()), PAD),
    "a prefix in a general class": (general, set_prefix, {}),
    "parts": (in_parts, True, {}),
    "parts without end-of-text": (in_parts, False, {}),
    "parts and [PAD]": (in_parts, True, {"added_tokens": {"[PAD]": "FREE"}, "special_tokens_map": PAD}),
    "parts, [PAD] with flags": (in_parts, True, {"special_tokens_map": {"pad_token": FLAGS}}),
    "parts and a prefix": (in_parts, True, {"tokenizer_config": {"add_prefix_space": True}}),
    "parts and words": (
        in_parts, True, {"tokenizer_config": {"added_tokens_decoder": {"FREE": {**FLAGS, "special": True}}}}
    ),
    "parts, more special tokens": (in_parts, True, {"tokenizer_config": {"additional_special_tokens": ["so", "<x>"]}}),
}  # fmt: skip


def saved(folder, target):
    """What a run would save beside its weights; returns what was read."""
    description = read_description(model_files(str(folder), with_weights=False))
    target.mkdir()
    save_model(StagedDirectory(target), description.config, {}, description.source(("neg", "pos")))
    return description


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("write", "change", "options"), PUBLISHED.values(), ids=PUBLISHED)
def test_tokens_are_the_same_in_source_run_and_saved_model(inputs, folder, tmp_path, write, change, options):
    write(inputs, folder, change, **options)
    description = saved(folder, tmp_path / "saved")
    before, after = (AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "saved"))
    ours = description.tokenizer.tokenizer
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == ids(before, text) == ids(after, text)
        assert before(text)["input_ids"] == after(text)["input_ids"]
        assert before.decode(ids(before, text)) == after.decode(ids(after, text))
    assert before.special_tokens_map == after.special_tokens_map
    assert before.all_special_ids == after.all_special_ids
    assert (before.pad_token, before.chat_template) == (after.pad_token, after.chat_template)
    assert len(before) == len(after) == len(ours.get_vocab())
    assert not description.tokenizer.notes
    if before.chat_template:
        chat = [{"role": "user", "content": "is it dull?"}]
        assert before.apply_chat_template(chat) == after.apply_chat_template(chat)


@pytest.mark.parametrize("change", [lambda t: setattr(t, "normalizer", Lowercase()), set_prefix,
                                    lambda t: setattr(t, "normalizer", NFKC())])  # fmt: skip
def test_without_a_config_the_saved_one_follows_tokenizer_json(inputs, folder, tmp_path, change):
    alone(inputs, folder, change)
    ours = saved(folder, tmp_path / "saved").tokenizer.tokenizer
    after = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert ours.encode(text).ids == ids(after, text)
    assert after.eos_token == END


def test_tokenizer_json_takes_precedence_over_its_class_with_a_note(inputs, folder, tmp_path):
    alone(inputs, folder, lambda tokenizer: setattr(tokenizer, "normalizer", Lowercase()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "pad_token": END}))
    description = saved(folder, tmp_path / "saved")
    (note,) = description.tokenizer.notes
    assert "names GPT2Tokenizer, which does not give the pipeline of tokenizer.json" in note
    after = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert ids(after, "The PLOT") == ids(after, "the plot") == description.tokenizer.tokenizer.encode("The Plot").ids
    assert (after.pad_token, after.eos_token) == (END, END)


def test_the_prefix_of_a_config_decides(inputs, folder, tmp_path):
    alone(inputs, folder, nothing)
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True}))
    ours = saved(folder, tmp_path / "saved").tokenizer.tokenizer
    before, after = (AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "saved"))
    for text in TEXTS:
        assert ours.encode(text).ids == ids(before, text) == ids(after, text)


def test_remote_code_and_local_paths_are_not_copied(inputs, folder, tmp_path):
    alone(inputs, folder, nothing)
    config = {"auto_map": {"AutoTokenizer": ["evil.py", None]}, "tokenizer_class": "Evil", "name_or_path": "/home/me/x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    saved(folder, tmp_path / "saved")
    assert not {"auto_map", "name_or_path"} & json.loads((tmp_path / "saved/tokenizer_config.json").read_text()).keys()
    after = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert ids(after, "the plot") == pipeline(inputs).encode("the plot").ids


def test_the_published_vocabulary_and_merges_give_the_published_ids(real_gpt2, tmp_path):
    for name in ("config.json", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((real_gpt2 / name).read_bytes())
    ours = read_description(model_files(str(tmp_path), with_weights=False)).tokenizer.tokenizer
    published, theirs = Tokenizer.from_file(str(real_gpt2 / "tokenizer.json")), AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "".join(map(chr, range(0x2000)))]:
        assert ours.encode(text).ids == published.encode(text).ids == ids(theirs, text)
    assert ours.get_vocab() == published.get_vocab()


def test_checkpoints_and_resumed_runs_carry_them_too(inputs, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in model_of(inputs).iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    by_transformers(inputs, model, with_template)
    (model / "special_tokens_map.json").write_text('{"pad_token": "<|endoftext|>"}')
    run, flags = tmp_path / "run", ["--eval-steps", "9", "--save-steps", "1", "--precision", "fp32"]
    arguments = ["--model", str(model), *inputs[2:], *flags, "--output-dir", str(run)]
    assert main([*arguments, "--max-steps", "1"]) == 0
    assert main([*arguments, "--max-steps", "2", "--resume"]) == 0
    names = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.json")
    for name in names:
        contents = {(run / folder / name).read_bytes() for folder in ("checkpoint-1", "checkpoint-2", "final")}
        assert len(contents) == 1
    assert (run / "final/chat_template.jinja").read_bytes() == (model / "chat_template.jinja").read_bytes()
    assert json.loads((run / "checkpoint-2/manifest.json").read_text())["files"].keys() >= set(names)
    assert transformers.AutoTokenizer.from_pretrained(run / "checkpoint-2").chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"[PAD]": 700}}, r"'\[PAD\]' has the id 700 .* would have \d+: save the tokenizer again"),
        ({"added_tokens": {"[PAD]": "x"}}, "added_tokens.json"),
        ({"special_tokens_map": {"pad_token": 3}}, "3 is not an added token"),
        ({"special_tokens_map": {"pad_token": {"x": 1}}}, "is not an added token"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": "y"}}}, "tokenizer_config.json"),
        ({"tokenizer_config": {"added_tokens_decoder": ["y"]}}, "tokenizer_config.json"),
        ({"tokenizer_config": {"pad_token": "\ud800"}}, "tokenizer_config.json is not UTF-8"),
        ({"vocab": {"a": "b"}}, "cannot read .*vocab.json and .*merges.txt as a tokenizer"),
        ({"vocab": {"a": 0}}, "cannot read .*vocab.json and .*merges.txt as a tokenizer"),
    ],
)
def test_parts_that_contradict_each_other_are_named(inputs, folder, files, message):
    in_parts(inputs, folder, **files)
    with pytest.raises(FtError, match=message):
        read_description(model_files(str(folder), with_weights=False))


SCALARS = st.sampled_from([None, True, 0, -1, 2**70, 1.5, "", "x", END, "\ud800", [], {}, [1], {"content": "y"}])
KEYS = ["pad_token", "eos_token", "additional_special_tokens", "added_tokens_decoder", "tokenizer_class", "auto_map",
        "add_prefix_space", "model_max_length", "chat_template", "600"]  # fmt: skip
OBJECTS = st.dictionaries(st.sampled_from(KEYS), SCALARS | st.dictionaries(st.sampled_from(["600", "x"]), SCALARS))


@given(OBJECTS, OBJECTS, OBJECTS, st.booleans())
@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_tokenizer_config_leads_to_a_traceback(inputs, folder, config, special, added, in_one):
    (alone if in_one else in_parts)(inputs, folder, *[nothing] * in_one)
    for name, content in (("tokenizer_config", config), ("special_tokens_map", special), ("added_tokens", added)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    try:
        description = read_description(model_files(str(folder), with_weights=False))
    except FtError:
        pass
    else:
        assert description.tokenizer.tokenizer.encode("the plot").ids
    finally:
        for path in folder.glob("[!c]*"):
            path.unlink()


def test_the_highest_id_counts_and_not_how_many_there_are(inputs, folder, capsys):
    vocabulary = {"a": 0, "b": 1, END: 10**6}
    Tokenizer(WordLevel(vocabulary, unk_token="a")).save(str(folder / "tokenizer.json"))
    message = r"'<\|endoftext\|>' with the id 1000000, .* below [0-9]+: .* `model.resize_token_embeddings\(1000001\)`"
    with pytest.raises(FtError, match=message):
        read_description(model_files(str(folder), with_weights=False))
    (folder / "model.safetensors").write_bytes((model_of(inputs) / "model.safetensors").read_bytes())
    for command in (
        ["predict", str(folder), "a", "--label-names", "a,b"],
        ["generate", str(folder), "a"],
        ["evaluate", str(folder), "--label-names", "a,b", "--dataset", inputs[3]],
        ["explain", "--model", str(folder), *inputs[2:]],
        ["data", "--model", str(folder), *inputs[2:]],
        ["--model", str(folder), *inputs[2:], "--output-dir", str(folder / "run")],
    ):
        assert main(command) == 1
        assert "they do not belong together" in capsys.readouterr().err


def test_bpe_without_merges_is_not_a_gpt2_pipeline(inputs, folder, tmp_path):
    """`GPT2Tokenizer` makes merges up where there are none; the saved model must not."""
    vocabulary = {**{letter: i for i, letter in enumerate("abcdehlopstu")}, "Ġ": 12, "the": 13, END: 14}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    ours = saved(folder, tmp_path / "saved").tokenizer.tokenizer
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "saved"), "the plot") == ours.encode("the plot").ids


def test_a_panic_of_the_library_is_a_message(folder):
    """A token that is there twice makes `BPE.from_file` panic, which is no `Exception`."""
    (folder / "vocab.json").write_text('{"a": 0, "b": 1, "c": 2, "Ġ": 3, "ab": 4, "a": 5}', encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n", encoding="utf-8")
    with pytest.raises(FtError, match=r"cannot read .*vocab\.json and .*merges\.txt as a tokenizer"):
        read_description(model_files(str(folder), with_weights=False))
