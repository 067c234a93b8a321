"""The command line: what wins, what is refused and in which words, and that no mistake ends in a traceback."""

import dataclasses
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv

import ft.finetune
from ft.checks import field_types, flag
from ft.cli.arguments import (
    _ID_OR_PATH,
    COMMANDS,
    HELP_PAGES,
    MOST_USED,
    RUN_FLAG_COMMANDS,
    SUMMARIES,
    read_arguments,
)
from ft.cli.main import main
from ft.config import NEWEST, NO_FLAGS, Config
from ft.errors import FtError, UsageError
from ft.io.paths import SETTINGS
from ft.settings import DATA_SETTINGS, DEMO_SETTINGS, NOT_RECORDED, field_groups, field_help
from tests.test_config import EVERY_FIELD, FIELDS, changed, needed, other_value

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Run every test in a folder of its own, in which no earlier run lies."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_json(path, **content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def problems_of(*arguments):
    with pytest.raises(UsageError) as raised:
        read_arguments(arguments)
    return list(raised.value.problems)


# --- the flags --------------------------------------------------------------------------------------------------------


def test_without_flags_every_setting_has_its_default():
    assert read_arguments([]) == Config()


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in NO_FLAGS])
@pytest.mark.parametrize("form", ["two words", "one word"])
def test_every_field_has_a_flag(name, form):
    value = other_value(name)
    if field_types(Config)[name][0] is bool:
        arguments = [flag(name)]
    elif field_types(Config)[name][0] is tuple:
        value = value if form == "two words" else value[:1]
        arguments = [flag(name), *value] if form == "two words" else [f"{flag(name)}={value[0]}"]
    else:
        arguments = [flag(name), str(value)] if form == "two words" else [f"{flag(name)}={value}"]
    arguments += {"prompt_column": ["--completion-column", "c"], "max_skipped_steps": ["--on-nonfinite", "skip"]}.get(
        name, []
    )
    arguments += [word for needs, number in needed(name).items() for word in (flag(needs), str(number))]
    follows = {
        "prompt_column": {"completion_column": "c"},
        "max_skipped_steps": {"on_nonfinite": "skip"},
        "demo": DEMO_SETTINGS,
        "resume": {"output_dir": value},
    }.get(name, {})
    assert read_arguments(arguments) == Config(**{name: value, **follows, **needed(name)})


def test_what_a_run_notes_by_itself_cannot_be_asked_for():
    assert problems_of("--processes", "2") == ["there is no flag --processes; --help lists all flags"]


def test_resume_needs_no_value():
    assert read_arguments(["--resume"]) == Config(resume=NEWEST)
    assert read_arguments(["--resume", "--seed", "1"]) == Config(resume=NEWEST, seed=1)


def test_a_flag_of_several_values_takes_all_up_to_the_next_flag():
    config = read_arguments(["--freeze", "wte.weight", "h.[01].*", "--seed", "7", "--train-only", "last:2"])
    assert config == Config(freeze=("wte.weight", "h.[01].*"), seed=7, train_only=("last:2",))


def test_of_a_flag_given_twice_the_last_counts():
    assert read_arguments(["--seed", "1", "--seed", "2"]) == Config(seed=2)


@pytest.fixture
def help_text(capsys, monkeypatch):
    """What --help prints, each run of white space as one space."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return " ".join(out.split()) + " "


def shown_default(name):
    kind, _ = field_types(Config)[name]
    default = FIELDS[name].default
    if kind in (bool, tuple) or default is None:
        return ""
    return f" (default: {default:g})" if kind is float else f" (default: {default})"


def test_the_help_explains_every_flag_with_its_value_and_default(help_text):
    for name in FIELDS:
        if name in NO_FLAGS:
            assert f" {flag(name)} " not in help_text
            continue
        kind, choices = field_types(Config)[name]
        value = " " + ("|".join(choices) or {int: "N", float: "X", str: "TEXT", tuple: "PATTERN ..."}.get(kind, ""))
        value = "" if kind is bool else value
        if name in SETTINGS:
            value = " ID|PATH" if name in _ID_OR_PATH else " PATH"
            value = {"resume": " [PATH]", "profile": " FILE"}.get(name, value)
        assert f" {flag(name)}{value} {field_help()[name]}{shown_default(name)} " in help_text
    assert " --config FILE read settings from" in help_text
    assert "no value" not in help_text
    assert "left out" not in help_text


def test_the_help_has_the_commands_and_examples_then_the_most_used_flags_then_the_others_by_group(help_text):
    headings = [f"Advanced: {each[0].lower()}{each[1:]}:" for each in dict.fromkeys(field_groups().values())]
    assert set(field_groups()) == set(FIELDS)
    assert len(headings) >= 5
    flags = [f" {flag(name)} " for name in MOST_USED]
    order = ["usage:", "commands:", "examples:", "Most used flags:", *flags, *headings, " Help: -h"]
    after_examples = help_text.index("Most used flags:")
    places = [help_text.index(text, after_examples if text.startswith(" --") else 0) for text in order]
    assert places == sorted(places)
    assert 10 <= len(MOST_USED) <= 12
    assert help_text.index(" --weight-decay X") > help_text.index("Advanced: optimizer:")
    for name in (*COMMANDS, *RUN_FLAG_COMMANDS):
        assert f" {name} {SUMMARIES[name]} " in help_text


PAGES = [[], *([name] for name in (*COMMANDS, *RUN_FLAG_COMMANDS))]


def help_of(words, capsys):
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert raised.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
@pytest.mark.parametrize("command", PAGES, ids=" ".join)
def test_the_help_fits_the_terminal(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = help_of([*command, "--help"], capsys).splitlines()
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize("command", PAGES, ids=" ".join)
def test_each_command_has_its_own_help_which_the_command_help_prints_too(command, capsys):
    text = help_of([*command, "--help"], capsys)
    assert text.startswith(f"usage: python run.py {(command or ['[COMMAND]'])[0]} ")
    assert help_of(["help", *command], capsys) == text
    assert help_of([*command, "-h"], capsys) == text


def test_the_help_of_data_has_the_flags_that_choose_rows_and_no_others(capsys):
    listed = set(re.findall(r"^  (--[a-z-]+)", help_of(["data", "--help"], capsys), re.MULTILINE))
    assert {flag(name) for name in DATA_SETTINGS} <= listed
    assert {"--max-length", "--label-names", "--demo", "--model", "--config"} <= listed
    assert not listed & {"--learning-rate", "--output-dir", "--resume", "--epochs", "--save-steps", "--overwrite"}
    assert read_arguments(["--learning-rate", "1"], HELP_PAGES["data"]) == Config(learning_rate=1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predct"], "there is no command 'predct', is it predict?"),
        (["xyzzy"], f"there is no command 'xyzzy', is it {', '.join([*COMMANDS, *RUN_FLAG_COMMANDS])}?"),
        (["predict", "data"], "help takes one command, not 2: it is one of"),
    ],
)
def test_help_of_what_is_no_command_is_refused(words, message, capsys):
    assert main(["help", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_version_prints_what_a_bug_report_needs(capsys):
    import torch

    assert f"torch {torch.__version__}, Python {platform.python_version()}\n" in help_of(["--version"], capsys)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a full disk")
@pytest.mark.parametrize("words", [["--help"], ["data", "--help"], ["predict", "-h"], ["help"], ["--version"]])
def test_help_that_cannot_be_written_is_an_error(words):
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "run.py"), *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device: standard output\n")


@pytest.mark.parametrize(("word", "command"), [("predct", "predict"), ("evalute", "evaluate")])
def test_a_misspelt_command_is_told_with_the_nearest(word, command, capsys):
    assert main([word, "runs/x"]) == 2
    assert f"error: unexpected argument {word!r}; is it the command {command}?\n" in capsys.readouterr().err


def test_a_run_without_a_command_is_told_with_what_takes_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(["runs/demo"]) == 2
    assert "'runs/demo', a directory: --resume runs/demo continues the run in it" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_flag_of_a_command_is_told_with_the_nearest(command, capsys):
    assert main([command, "runs/x", "--jsonn"]) == 2
    assert "there is no flag --jsonn" in capsys.readouterr().err


def test_the_help_shows_flags_that_exist(help_text):
    known = {"--help", "--config", *map(flag, FIELDS)}
    known |= {"--version", "--nproc-per-node", "--split", "--to"}  # in examples of `evaluate`, `export` and torchrun
    assert {word.rstrip(":;,.)") for word in help_text.split() if word.startswith("--")} <= known


# --- what wins --------------------------------------------------------------------------------------------------------


def test_a_saved_configuration_comes_back_through_its_file():
    # These exclude --label-names, --compile or --lora-rank.
    left_out = (*NOT_RECORDED, "completion_column", "shard", "cuda_graphs", "init")
    saved = Config(**{name: other_value(name) for name in FIELDS if name not in left_out})
    saved.save(Path("saved.json"))
    assert read_arguments(["--config", "saved.json"]) == saved


@EVERY_FIELD
def test_each_setting_comes_back_through_its_file(name):
    saved = changed(name)
    saved.save(Path("saved.json"))
    assert read_arguments(["--config", "saved.json"]) == (Config() if name in NOT_RECORDED else saved)


def test_a_flag_wins_over_the_file_and_the_file_over_the_default():
    mine = write_json("mine.json", batch_size=5, seed=5)
    assert read_arguments(["--config", mine]) == Config(batch_size=5, seed=5)
    assert read_arguments(["--batch-size", "3", "--config", mine]) == Config(batch_size=3, seed=5)
    assert read_arguments(["--config", mine, "--batch-size", "8"]) == Config(batch_size=8, seed=5), "even the default's"


def test_flag_and_file_win_over_the_demo():
    assert DEMO_SETTINGS.items() <= dataclasses.asdict(read_arguments(["--demo"])).items()
    assert set(DEMO_SETTINGS) <= set(FIELDS)
    mine = write_json("mine.json", batch_size=5, epochs=1.5)
    expected = {**DEMO_SETTINGS, "batch_size": 3, "epochs": 1.5}
    assert read_arguments(["--demo", "--config", mine, "--batch-size", "3"]) == Config(demo=True, **expected)
    asks_for_demo = write_json("demo.json", demo=True, batch_size=5)
    assert read_arguments(["--config", asks_for_demo]) == Config(demo=True, **{**DEMO_SETTINGS, "batch_size": 5})


def test_flag_and_file_win_over_the_resumed_run():
    write_json("runs/a/config.json", batch_size=6, seed=6, epochs=6.0, output_dir="where/it/was")
    mine = write_json("mine.json", batch_size=5, seed=5)
    resumed = {"resume": NEWEST, "output_dir": "runs/a", "epochs": 6.0}
    arguments = ["--resume", "--output-dir", "runs/a"]
    assert read_arguments(arguments) == Config(**resumed, batch_size=6, seed=6)
    assert read_arguments([*arguments, "--config", mine]) == Config(**resumed, batch_size=5, seed=5)
    assert read_arguments([*arguments, "--config", mine, "--seed", "3"]) == Config(**resumed, batch_size=5, seed=3)


def test_resume_finds_the_run_in_the_default_folder():
    write_json(f"{Config.output_dir}/config.json", seed=6, output_dir="where/it/was")
    assert read_arguments(["--resume"]) == Config(resume=NEWEST, seed=6)
    assert read_arguments([]) == Config(), "without --resume an earlier run says nothing"


@pytest.mark.parametrize("path", ["runs/a", "runs/a/checkpoint-200"])
def test_resume_takes_a_run_or_one_of_its_checkpoints(path):
    write_json("runs/a/config.json", seed=6, output_dir="where/it/was")
    assert read_arguments(["--resume", path]) == Config(resume=path, seed=6, output_dir="runs/a")
    elsewhere = read_arguments(["--resume", path, "--output-dir", "runs/b"])
    assert elsewhere == Config(resume=path, seed=6, output_dir="runs/b")


def test_a_resumed_demo_goes_on_in_its_folder():
    resumed = read_arguments(["--demo", "--resume"])
    assert resumed == Config(resume=NEWEST, demo=True, **DEMO_SETTINGS)
    in_b = {**DEMO_SETTINGS, "output_dir": "runs/b"}
    assert read_arguments(["--demo", "--resume", "--output-dir", "runs/b"]) == Config(resume=NEWEST, demo=True, **in_b)
    assert read_arguments(["--demo", "--resume", "runs/b"]) == Config(resume="runs/b", demo=True, **in_b)


def test_that_a_run_was_resumed_or_overwrote_another_is_not_inherited():
    mine = write_json("mine.json", resume=NEWEST, overwrite=True, seed=5)
    assert read_arguments(["--config", mine]) == Config(seed=5)
    write_json("runs/a/config.json", overwrite=True, seed=6)
    assert read_arguments(["--resume", "runs/a"]) == Config(resume="runs/a", output_dir="runs/a", seed=6)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command_line", "problems"),
    [
        ("--batch-sze 3", ["there is no flag --batch-sze, is it --batch-size?"]),
        ("--batch-sze=3", ["there is no flag --batch-sze, is it --batch-size?"]),
        ("--learning_rate 1e-3", ["there is no flag --learning_rate, is it --learning-rate?"]),
        ("--epoch 3", ["there is no flag --epoch, is it --epochs?"]),
        ("--batch 3", ["there is no flag --batch, is it --batch-size?"]),
        ("--conifg x.json", ["there is no flag --conifg, is it --config?"]),
        ("--xyzzy", ["there is no flag --xyzzy; --help lists all flags"]),
        ("--xyzzy --plugh 2", ["there is no flag --xyzzy; --help lists all flags",
                               "there is no flag --plugh; --help lists all flags"]),
        ("-b 3", ["there is no flag -b; --help lists all flags"]),
        ("train", ["unexpected argument 'train'"]),
        ("--seed 1 2", ["unexpected argument '2'"]),
        ("--overwrite yes", ["unexpected argument 'yes'"]),
        ("--seed", ["--seed needs a value"]),
        ("--seed --epochs 2", ["--seed needs a value"]),
        ("--seed --epochs --config", ["--epochs needs a value", "--seed needs a value", "--config needs a value"]),
        ("--freeze", ["--freeze needs a value"]),
        ("--freeze --train-only --seed x", ["--freeze needs a value", "--train-only needs a value",
                                            "--seed is 'x', it must be a whole number"]),
        ("--freeze= --train-only wte.weight", ["--freeze is empty"]),
        ("--seed x", ["--seed is 'x', it must be a whole number"]),
        ("--seed=", ["--seed is '', it must be a whole number"]),
        ("--batch-size 8.0", ["--batch-size is '8.0', it must be a whole number"]),
        ("--batch-size 0", ["--batch-size is 0, it must be at least 1"]),
        ("--batch-size -8", ["--batch-size is -8, it must be at least 1"]),
        ("--max-length 1", ["--max-length is 1, it must be at least 2"]),
        ("--epochs nan", ["--epochs is nan, it must be finite"]),
        ("--epochs inf", ["--epochs is inf, it must be finite"]),
        ("--epochs 0", ["--epochs is 0.0, it must be above 0 and at most 1000000"]),
        ("--learning-rate NaN", ["--learning-rate is nan, it must be finite"]),
        ("--learning-rate 1e999", ["--learning-rate is inf, it must be finite"]),
        ("--learning-rate -1e-3", ["--learning-rate is -0.001, it must be at least 0.0"]),
        ("--learning-rate -.5e+2 --seed 1", ["--learning-rate is -50.0, it must be at least 0.0"]),
        ("--epochs -inf", ["--epochs is -inf, it must be finite"]),
        ("--epochs 1e308", ["--epochs is 1e+308, it must be above 0 and at most 1000000"]),
        ("--xyzzy -1e3", ["there is no flag --xyzzy; --help lists all flags"]),
        ("--foo=4 stray", ["there is no flag --foo; --help lists all flags", "unexpected argument 'stray'"]),
        ("--demo=1 --batch-size 0", ["--demo takes no value, leave '1' out",
                                     "--batch-size is 0, it must be at least 1"]),
        ("--overwrite -1", ["--overwrite takes no value, leave '-1' out"]),
        ("--learning-rate fast", ["--learning-rate is 'fast', it must be a number"]),
        ("--dropout 1", ["--dropout is 1.0, it must be below 1"]),
        ("--precision fp8", ["--precision is 'fp8', it must be one of auto, fp32, bf16, fp16"]),
        ("--init Random", ["--init is 'Random', it must be one of pretrained, random"]),
        ("--output-dir=", ["--output-dir is empty"]),
        ("--resume=", ["--resume is empty"]),
        ("--resume --overwrite", ["--resume continues a run and --overwrite deletes it: give one of them"]),
        ("--overwrite --resume runs/a", ["--resume continues a run and --overwrite deletes it: give one of them"]),
        ("--config absent.json", ["cannot read the configuration absent.json: No such file or directory"]),
        ("--config .", ["cannot read the configuration .: Is a directory"]),
        (
            "train --batch-sze 3 --epochs --seed x --precision fp8 --max-steps 0 --config absent.json",
            [
                "unexpected argument 'train'",
                "there is no flag --batch-sze, is it --batch-size?",
                "--epochs needs a value",
                "--seed is 'x', it must be a whole number",
                "cannot read the configuration absent.json: No such file or directory",
                "--max-steps is 0, it must be at least 1",
                "--precision is 'fp8', it must be one of auto, fp32, bf16, fp16",
            ],
        ),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused_with_everything_that_is_wrong(command_line, problems, capsys, monkeypatch):
    monkeypatch.setattr(ft.finetune, "fine_tune", lambda config: pytest.fail("the job must not start"))
    assert sorted(problems_of(*command_line.split())) == sorted(problems)
    assert main(command_line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(err.splitlines()) == sorted(f"error: {problem}" for problem in problems)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "the configuration mine.json is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[8]", "the configuration mine.json must be a JSON object of settings"),
        ('{"batch-size": 8, "lr": 1}', "the configuration mine.json has unknown settings: batch-size, lr"),
        ('{"batch_size": 0}', "--batch-size is 0, it must be at least 1"),
        ('{"batch_size": "8"}', "--batch-size is '8', it must be a whole number"),
        ('{"batch_size": null}', "--batch-size is None, it must be a whole number"),
        ('{"epochs": NaN}', "--epochs is nan, it must be finite"),
        ('{"epochs": ' + "9" * 400 + "}", f"--epochs is {'9' * 18}...{'9' * 19}, it must be finite"),
        ('{"max_steps": ' + "9" * 400 + "}", f"--max-steps is {'9' * 18}...{'9' * 19}, it must be below 2**63"),
        ('{"output_dir": 3}', "--output-dir is 3, it must be a string"),
        ('{"output_dir": null}', "--output-dir is None, it must be a string"),
        ('{"output_dir": "a\\u0000b"}', "--output-dir is 'a\\x00b', it must not hold a NUL character"),
        ('{"demo": "yes"}', "--demo is 'yes', it must be true or false"),
    ],
)
def test_a_wrong_configuration_file_is_refused_like_a_wrong_flag(content, problem):
    Path("mine.json").write_text(content)
    assert problems_of("--config", "mine.json") == [problem]
    assert sorted(problems_of("--config", "mine.json", "--seed", "-1")) == sorted(
        [problem, "--seed is -1, it must be at least 0"]
    )
    if problem.startswith("the configuration"):
        Path("mine.json").rename("config.json")
        assert problems_of("--resume", ".") == [problem.replace("mine", "config")]


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in NOT_RECORDED])
def test_every_setting_of_a_file_is_checked_for_its_type(name):
    kind, _ = field_types(Config)[name]
    wanted = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", tuple: "a string"}[kind]
    write_json("mine.json", **{name: [1]})
    value = 1 if kind is tuple else [1]  # of several texts, the one that is none
    assert problems_of("--config", "mine.json") == [f"{flag(name)} is {value}, it must be {wanted}"]


WORDS = ["", "-", "--", "=", "0", "-1", "1e5", "nan", "8", "x", "-x", "--x=", "ü", "\0", "%s", "linear", "fp16", "*"]
ARGUMENTS = st.sampled_from([*WORDS, "--config", "mine.json", *map(flag, FIELDS)])


@given(st.lists(ARGUMENTS | st.builds("{}={}".format, ARGUMENTS, ARGUMENTS), max_size=8))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_any_command_line_is_understood_or_refused(arguments):
    try:
        understood, problems = read_arguments(arguments), ()
    except UsageError as error:
        understood, problems = None, error.problems
    assert isinstance(understood, Config) or problems
    assert all(problem and "\n" not in problem for problem in problems)


# --- the exit status --------------------------------------------------------------------------------------------------


def test_the_job_gets_the_configuration_and_success_is_0(monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr(ft.finetune, "fine_tune", jobs.append)
    assert main(["--seed", "7"]) == 0
    assert jobs == [Config(seed=7)]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (FtError("it is broken; mend it"), 1, "error: it is broken; mend it\n"),
        (OSError(28, "No space left on device"), 1, f"error: No space left on device: {Config.output_dir}\n"),
        (PermissionError(13, "Permission denied", "a/b"), 1, "error: Permission denied: a/b\n"),
        (UsageError("one", "two"), 2, "error: one\nerror: two\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted; --resume continues from the newest checkpoint\n"),
    ],
)
def test_how_a_job_ends_is_told_by_the_exit_status(monkeypatch, capsys, error, status, said):
    def fine_tune(config):
        raise error

    monkeypatch.setattr(ft.finetune, "fine_tune", fine_tune)
    assert main([]) == status
    assert capsys.readouterr() == ("", said)


def test_a_defect_of_the_program_keeps_its_traceback(monkeypatch):
    def fine_tune(config):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(ft.finetune, "fine_tune", fine_tune)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main([])


def test_the_door_tells_of_wrong_usage_and_exits_with_2(empty_folder):
    command = [sys.executable, str(ROOT / "run.py"), "--batch-size", "0", "--epochs", "nan", "--sede", "1"]
    done = subprocess.run(command, cwd=empty_folder, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: there is no flag --sede, is it --seed?",
        "error: --epochs is nan, it must be finite",
        "error: --batch-size is 0, it must be at least 1",
    ]
    assert list(empty_folder.iterdir()) == []


WITHOUT_TORCH = """
import sys
from ft.cli.arguments import read_arguments
from ft.cli.main import main
read_arguments([])
read_arguments(["--batch-size", "16", "--resume", "runs/a"])
assert main(["--batch-size", "0", "--xyzzy"]) == 2
assert main(["explain", "--row", "x"]) == 2
assert main(["predict", "nowhere", "a", "--max-length", "0"]) == 2
assert main(["evaluate", "nowhere", "--split", "x"]) == 2
for arguments in (["--help"], ["explain", "--help"], ["predict", "--help"], ["evaluate", "--help"]):
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 0
slow = {"torch", "numpy", "pyarrow", "tokenizers", "huggingface_hub"} & set(sys.modules)
assert not slow, slow
"""


def test_help_and_mistakes_do_not_wait_for_torch():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m ft [COMMAND] [FLAG ...]")


# --- torchrun ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("local_rank", "prints"), [("0", True), ("1", False)])
def test_of_the_processes_of_torchrun_one_prints_what_is_wrong_and_the_others_end_later(
    local_rank, prints, monkeypatch, capsys
):
    slept = []
    monkeypatch.setattr("ft.cli.main.time.sleep", slept.append)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert main(["--sed", "1"]) == 2
    assert capsys.readouterr().err == ("error: there is no flag --sed, is it --seed?\n" if prints else "")
    assert bool(slept) != prints


UP_TO_THE_FIRST_STEP = """
import os, sys
from ft.cli.main import main
import ft.train.loop

def stop(*_, **__):
    slow = {"pyarrow", "pandas", "huggingface_hub", "sympy", "torch._dynamo", "torch._inductor",
            "torch.distributed.fsdp", "torch.utils.tensorboard"}
    print("imported:", *sorted(slow & set(sys.modules)), flush=True)
    os._exit(0)

ft.train.loop.train_step = stop
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("suffix", "imported"), [(".csv", []), (".parquet", ["pyarrow"])])
def test_the_first_step_does_not_wait_for_packages_that_it_does_not_need(inputs, tmp_path, suffix, imported):
    _, model, _, dataset, *_ = inputs
    table = pq.read_table(Path(dataset) / "train.parquet")
    data = tmp_path / f"reviews{suffix}"
    pq.write_table(table, data) if suffix == ".parquet" else csv.write_csv(table, data)
    flags = ["--model", model, "--dataset", str(data), "--device", "cpu", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", UP_TO_THE_FIRST_STEP, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1].split() == ["imported:", *imported], done.stderr
