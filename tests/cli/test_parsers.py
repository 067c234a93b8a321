"""What all command lines have in common: positionals anywhere, `~` for the home directory, and flags of other tools."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ft
from ft.checks import flag
from ft.cli.arguments import COMMANDS, read_arguments
from ft.cli.main import main
from ft.cli.parsers import _OTHER_NAMES, DESTRUCTIVE, FOREIGN_FLAGS, describe_unknown_flag
from ft.config import NO_FLAGS, Config
from ft.errors import UsageError
from ft.io.paths import SETTINGS
from ft.settings import NOT_RECORDED
from tests.test_config import FIELDS

FLAGS = ["--config", *(flag(name) for name in FIELDS if name not in NO_FLAGS)]


@pytest.fixture(scope="module")
def home(inputs, tmp_path_factory):
    """A home directory with a run in it, which is asked for by its path from there."""
    folder = tmp_path_factory.mktemp("home")
    arguments = [*inputs, "--max-steps", "2", "--save-steps", "1", "--output-dir", str(folder / "run")]
    assert main([*arguments, "--precision", "fp32"]) == 0
    (folder / "texts.txt").write_text("a dull film\n")
    (folder / "long.txt").write_text("a dull film\n" * 20)
    return folder


@pytest.fixture(autouse=True)
def somewhere_else(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    yield
    assert not [path for path in tmp_path.rglob("*") if "~" in path.name]


# --- positionals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "{run}", "--json", "--device", "cpu", "a dull film", "a witty film"],
        ["predict", "--json", "{run}", "a dull film", "--device", "cpu", "a witty film"],
        ["predict", "--device=cpu", "--json", "{run}", "a dull film", "a witty film"],
    ],
)
def test_texts_may_follow_flags(home, words, capsys):
    assert main([word.format(run=home / "run") for word in words]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == ["a dull film", "a witty film"]


def test_a_prompt_may_follow_flags(home, capsys):
    printed = []
    for words in (["the film", "--max-new-tokens", "3"], ["--max-new-tokens", "3", "the film"]):
        assert main(["generate", str(home / "run"), "--device", "cpu", *words]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert main(["generate", "--device", "cpu", "--max-new-tokens", "3", str(home / "run"), "the film"]) == 0
    assert capsys.readouterr().out == printed[0]


def test_runs_may_follow_flags(home, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(home / "run"), "--output", str(tmp_path / "both.html"), str(home / "run" / ".")]) == 0
    assert (tmp_path / "both.html").exists()


def test_the_run_may_follow_flags(home, inputs, capsys):
    assert main(["evaluate", "--json", "--split", "test", "--device", "cpu", str(home / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "test"


def test_the_value_of_an_unknown_flag_is_not_reported(home, capsys):
    assert main(["report", str(home / "run"), "--ouput", "x"]) == 2
    assert capsys.readouterr().err == "error: there is no flag --ouput, is it --output?\n"


@pytest.mark.parametrize("command", ["predict", "evaluate", "generate", "report"])
def test_missing_and_unexpected_arguments_are_reported(command, home, capsys):
    assert main([command, "--xyzzy"]) == 2
    assert main([command]) == 2
    assert "RUN" in capsys.readouterr().err
    if command in ("evaluate", "generate"):
        assert main([command, "--device", "cpu", str(home / "run"), "one", "--device", "cpu", "two"]) == 2
        assert "unexpected argument 'two'" in capsys.readouterr().err


# --- the home directory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_the_home_directory_is_expanded_in_every_setting_that_is_a_path(name, home, tmp_path):
    expected = str(home / "x")
    assert getattr(Config(**{name: "~/x"}), name) == expected
    (tmp_path / "mine.json").write_text(json.dumps({name: "~/x"}))
    (home / "there.json").write_text(json.dumps({name: "~/x"}))
    if name not in NOT_RECORDED:  # which a file does not set
        assert getattr(read_arguments(["--config", "mine.json"]), name) == expected
        assert getattr(read_arguments(["--config=~/there.json"]), name) == expected
    assert getattr(read_arguments([f"{flag(name)}=~/x"]), name) == expected


def test_a_run_in_the_home_directory_is_resumed(home):
    config = read_arguments(["--resume=~/run"])
    assert (config.output_dir, config.resume, config.max_steps) == (str(home / "run"), str(home / "run"), 2)
    assert main(["--resume=~/run/checkpoint-2"]) == 0


def test_a_run_with_all_its_paths_in_the_home_directory(home, inputs):
    arguments = [*inputs, "--max-steps=1", "--output-dir=~/new", "--save-dataset=~/data", "--forgetting=~/long.txt"]
    assert main([*arguments, "--overwrite"]) == 0
    assert (home / "new/final").is_dir()
    assert list((home / "data").glob("train*"))


def test_models_in_the_home_directory_are_asked(home, capsys):
    assert ft.load("~/run", device="cpu").label_names == ("neg", "pos")
    assert main(["predict", "~/run", "--file=~/texts.txt", "--device=cpu"]) == 0
    assert main(["generate", "~/run", "a", "--max-new-tokens=1", "--device=cpu"]) == 0
    assert main(["evaluate", "~/run", "--device=cpu"]) == 0
    assert "a dull film" in capsys.readouterr().out


def test_a_report_in_the_home_directory(home):
    pytest.importorskip("matplotlib")
    assert main(["report", "~/run", "--output=~/report.html"]) == 0
    assert (home / "report.html").exists()


# --- flags of other tools ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--lr", "--learning-rate"),
        ("-lr", "--learning-rate"),
        ("--bs=8", "--batch-size"),
        ("--output", "--output-dir"),
        ("--num_train_epochs", "--epochs"),
        ("--per_device_train_batch_size", "--batch-size"),
        ("--fp16", "--precision fp16"),
        ("--bf16", "--precision bf16"),
        ("--max_seq_length", "--max-length"),
        ("--gradient_checkpointing", "--activation-checkpointing full"),
        ("--metric_for_best_model=eval_f1", "--best-metric"),
        ("--load_best_model_at_end", "--keep-best"),
        ("--class_weight", "--class-weights"),
        ("--Learning_Rate", "--learning-rate"),
        ("--text_colum", "--text-column"),
        ("--verbose", "--logging-steps 1"),
        ("--disable_tqdm", "--quiet"),
        ("--force", None),
        ("--overwrite_cache", None),
        ("--train.micro_batch_size", "--batch-size"),
        ("--train.max_seq_length=8", "--max-length"),
        ("--eval.interval", "--eval-steps"),
        ("--optimizer.init_args.lr", "--learning-rate"),
        ("--optimizer.weight_decay", "--weight-decay"),
        ("--sequence_len", "--max-length"),
        ("--micro_batch_size", "--batch-size"),
        ("--nproc_per_node", None),
        ("--overwrite_output_dir", None),
        ("--overwrit", None),
        ("--val_split", None),
    ],
)
def test_flags_of_other_tools_are_answered_with_ours(word, meant):
    name = word.partition("=")[0]
    ending = f", is it {meant}?" if meant else "; --help lists all flags"
    with pytest.raises(UsageError) as raised:
        read_arguments([word])
    assert raised.value.problems == (f"there is no flag {name}{ending}",)


@pytest.mark.parametrize(
    ("word", "meant"),
    [("epochs=3", "--epochs 3"), ("optimizer.lr=2e-5", "--learning-rate 2e-5"), ("dtype=bf16", "--precision bf16")],
)
def test_what_torchtune_writes_without_dashes_is_answered(word, meant):
    with pytest.raises(UsageError) as raised:
        read_arguments([word])
    assert raised.value.problems == (f"unexpected argument {word!r}; is it {meant}?",)


def test_flags_of_the_trainer_are_known():
    """Each of its arguments is ours too, or is in the table, so that no similar name of ours is proposed for it."""
    transformers = pytest.importorskip("transformers")
    theirs = {field.name.replace("_", "-") for field in dataclasses.fields(transformers.TrainingArguments)}
    assert {"num-train-epochs", "per-device-train-batch-size", "gradient-accumulation-steps"} <= theirs
    proposals = {
        name: describe_unknown_flag(f"--{name}", FLAGS).partition(", is it ")[2]
        for name in sorted(theirs - {each.removeprefix("--") for each in FLAGS} - set(FOREIGN_FLAGS))
    }
    assert {name: proposed for name, proposed in proposals.items() if proposed} == {}


def test_a_command_answers_with_its_own_flags(capsys):
    assert main(["generate", "run", "a", "--temp", "1", "--max_length", "5", "--lr", "1"]) == 2
    error = capsys.readouterr().err
    assert "--temp, is it --temperature?" in error
    assert "--max_length, is it --max-new-tokens?" in error
    assert "--lr; --help lists all flags" in error


def test_names_of_other_tools_are_in_order_and_those_suggested_exist(capsys):
    meanings = [meaning for meaning in _OTHER_NAMES if meaning]
    assert [*_OTHER_NAMES] == [*sorted(meanings), ""]
    for names in _OTHER_NAMES.values():
        assert names.split() == sorted(set(names.split()))
    known = set(FLAGS)
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert {meaning for meaning in meanings if f"--{meaning.split(' ')[0]}" not in known} == set()


@pytest.mark.parametrize(
    "path", ["x" * 256, "x/" * 2100 + "x", f"here/{'é' * 128}/x"], ids=["name", "path", "bytes of a name"]
)
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        *(([flag(setting)], flag(setting)) for setting in SETTINGS),
        (["data", "--dataset"], "--dataset"),
        (["runs"], "DIR"),
        (["report"], "RUN"),
        (["report", "runs", "--output"], "--output"),
        (["predict"], "RUN"),
        (["predict", "run", "--file"], "--file"),
        (["predict", "run", "a", "--base"], "--base"),
        (["predict", "run", "a", "--output"], "--output"),
        (["evaluate", "run", "--dataset"], "--dataset"),
        (["generate"], "RUN"),
        (["export", "--to", "gguf"], "RUN"),
        (["export", "run", "--to", "gguf", "--output"], "--output"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_too_long_a_path_is_named_by_its_flag(arguments, name, path, capsys):
    assert main([*arguments, path]) == 2
    error = capsys.readouterr().err
    assert f"error: {name} is 'x" in error or f"error: {name} is 'here/" in error, error
    assert "too long a path for this system: name a shorter one" in error


@pytest.mark.parametrize("arguments", [["data", "--config"], ["--resume", "--output-dir"], ["explain", "--model"]])
def test_too_long_a_path_of_other_arguments_is_wrong_usage(arguments, capsys):
    assert main([*arguments, "x" * 300]) == 2
    assert "too long" in capsys.readouterr().err


def test_a_long_word_in_place_of_a_flag_is_no_path(capsys):
    assert main(["x" * 300]) == 2
    assert "unexpected argument 'xxx" in capsys.readouterr().err


@pytest.mark.parametrize("habit", FOREIGN_FLAGS)
def test_what_is_proposed_for_a_habit_is_taken(habit):
    proposed = describe_unknown_flag(f"--{habit}", [name for name in FLAGS if name != f"--{habit}"])
    if ", is it " in proposed:
        words = proposed.partition(", is it ")[2].rstrip("?").split()
        assert words[0] in FLAGS
        if len(words) > 1:
            read_arguments(words)


@given(st.text("-abcdefghijklmnopqrstuvwxyz_=", max_size=12) | st.sampled_from(DESTRUCTIVE).flatmap(
    lambda name: st.sampled_from([name[:-1], name[:-3], name + "s", name.replace("w", ""), "--no-" + name[2:]])
))  # fmt: skip
@settings(derandomize=True, deadline=None, max_examples=300)
def test_nothing_that_deletes_is_ever_proposed(word):
    assert not any(f"is it {name}" in describe_unknown_flag(word, FLAGS) for name in DESTRUCTIVE)


def test_a_configuration_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "mine.json").write_bytes(b'\xef\xbb\xbf{"seed": 5}')
    assert read_arguments(["--config", "mine.json"]) == Config(seed=5)
