"""Labels, texts, names and values that would move the cursor, forge a line, run over the screen or break a snippet."""

import ast
import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ft.cli.main import main
from ft.data.examples import read_tokenizer
from ft.errors import MAX_MESSAGE_LENGTH, MAX_PROBLEMS, FtError, UsageError, one_line, printable, shown

FUZZ = settings(derandomize=True, deadline=None, max_examples=50)

LABELS = ("\x1b[2J\x1b[31mred", "two\nlines 'and' \"quotes\" \\", "\u202ereversed\u2066 ```", "x" * 300)
TEXTS = ("\x1b]0;title\x07 dull", "a\rb\nerror: forged", "\x9b31m \u202efine\u202c \x00", "y" * 5000)


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A finished run on labels and texts that mean harm, with what it printed, and the file of its data."""
    folder = tmp_path_factory.mktemp("hostile")
    name = "run \x1b[31m<script>\u202e"
    data = folder / "train.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([TEXTS[i % 4] + f" {i}", LABELS[i // 4 % 4]] for i in range(40))
    flags = ["--model", inputs[1], "--dataset", str(data), "--device", "cpu", "--max-steps", "2", "--save-steps", "2"]
    out = io.StringIO()
    stdout, sys.stdout = sys.stdout, out
    try:
        status = main([*flags, "--output-dir", str(folder / name)])
    finally:
        sys.stdout = stdout
    assert status == 0
    return folder / name, out.getvalue(), flags


def assert_harmless(output):
    unseen = {c for c in output if not c.isprintable()} - {"\n"}
    assert not unseen
    assert not [line for line in output.splitlines() if line.startswith("error: forged")]
    assert max(map(len, output.splitlines())) < 2000


def test_a_run_prints_them_escaped(run):
    assert_harmless(run[1])
    assert r"labels \x1b[2J\x1b[31mred, two\nlines" in run[1]


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "{run}", *TEXTS],
        ["evaluate", "{run}", "--split", "train", "--mistakes", "40"],
        ["explain", "{flags}", "--row", "0", "--max-steps", "9"],
        ["data", "{flags}"],
        ["report", "{run}"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_prints_them_escaped(run, command, capsys):
    folder, _, flags = run
    words = [w for word in command for w in (flags if word == "{flags}" else [word.format(run=folder)])]
    device = ["--device", "cpu"] if command[0] in ("predict", "evaluate") else []
    assert main([*words, *device]) == 0
    out, err = capsys.readouterr()
    assert_harmless(out + err)
    if command[0] == "report":
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert not {c for c in page if not c.isprintable()} - {"\n"}
        assert "<script" not in page
        assert "&lt;script&gt;" in page
    else:
        assert r"\x1b[2J\x1b[31mred" in out


def test_json_holds_them_as_they_are(run, capsys):
    folder = str(run[0])
    assert main(["predict", folder, *TEXTS, "--json", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert [line["text"] for line in lines] == list(TEXTS)
    assert {name for line in lines for name in line["probabilities"]} == set(LABELS)
    assert main(["evaluate", folder, "--split", "train", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == sorted(LABELS)


@pytest.mark.parametrize("on_terminal", [True, False])
def test_generated_text_is_escaped_on_a_terminal_only(run, monkeypatch, on_terminal):
    monkeypatch.setattr("ft.inference.language_model.Generation", lambda *_, **__: Written("a\tb\n\x1b[31mc\u202e"))

    class Output(io.StringIO):
        def isatty(self):
            return on_terminal

    monkeypatch.setattr(sys, "stdout", Output())
    assert main(["generate", str(run[0]), "the", "--device", "cpu"]) == 0
    written = sys.stdout.getvalue()
    assert written == ("a\tb\n\\x1b[31mc\\u202e\n" if on_terminal else "a\tb\n\x1b[31mc\u202e\n")


class Written:
    token_ids, stopped_by = (1,), "end-of-text"

    def __init__(self, text):
        self.text = text

    def __iter__(self):
        return iter([self.text])


# --- messages ---------------------------------------------------------------------------------------------------------


@given(st.text() | st.text(alphabet="\x1b\u202e\ud800\n\t\\ a", max_size=300))
@FUZZ
def test_a_message_is_one_short_printable_line(text):
    for message in (str(FtError(text)), *UsageError(text, "b").problems, printable(text), one_line(text), shown(text)):
        assert message.isprintable() or message == ""
    assert len(str(FtError(text * 50))) <= MAX_MESSAGE_LENGTH + 5
    assert len(one_line(text)) <= 600
    assert len(shown(text * 50)) <= 203
    if text.isprintable():
        assert printable(text) == text
        assert ast.literal_eval(shown(text[:90])) == text[:90]


def test_a_long_message_keeps_what_is_wrong_and_what_helps():
    message = str(FtError("--seed is " + "9" * 10**6 + ", it must be below 2**63"))
    assert message.startswith("--seed is 999")
    assert message.endswith("999, it must be below 2**63")


def test_of_very_many_problems_the_first_are_told():
    problems = UsageError(*map(str, range(5000))).problems
    assert problems[:MAX_PROBLEMS] == tuple(map(str, range(MAX_PROBLEMS)))
    assert problems[MAX_PROBLEMS:] == ("and 4,980 more problems",)


@pytest.mark.parametrize("value", ["z" * 100_000, ["z" * 1000] * 1000, {"a": {"b": {"c": "z" * 10_000}}}, 10**4000])
def test_a_value_of_any_size_is_quoted_shortly(value):
    assert len(shown(value)) < 1500


def test_a_tokenizer_on_which_the_library_panics_is_refused(inputs, tmp_path):
    described = json.loads((Path(inputs[1]) / "tokenizer.json").read_text())
    described["model"]["continuing_subword_prefix"] = "longer than any token"
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(FtError, match=r"cannot read .*tokenizer.json as a tokenizer: .*out of range"):
        read_tokenizer(tmp_path / "tokenizer.json")


# --- the model card ---------------------------------------------------------------------------------------------------


@given(st.lists(st.text() | st.sampled_from(['"""', "'''", "```", "\n---\n", "{0}", "%s", "\u2028"]), min_size=2))
@FUZZ
def test_every_snippet_of_a_card_compiles(labels):
    yaml = pytest.importorskip("yaml")
    from tests.report.test_model_card import make_card

    card = make_card(tuple(labels))
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    found = re.findall(r"^```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    assert len(found) == 3
    for code in found:
        compile(code, "card", "exec")
    (assigned,) = (s for s in ast.parse(found[0]).body if isinstance(s, ast.Assign) and s.targets[0].id == "labels")
    assert ast.literal_eval(assigned.value) == labels
    card.encode()


# --- memory -----------------------------------------------------------------------------------------------------------

FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore")


@pytest.mark.parametrize(
    ("command", "where", "message"),
    [
        (
            ["predict", "{run}", "a"],
            "ft.model.gpt2.Block.forward",
            "with --batch-size 64: less is needed with a smaller",
        ),
        (
            ["evaluate", "{run}", "--split", "train"],
            "ft.model.gpt2.Block.forward",
            "with --batch-size 64: less is needed",
        ),
        (["generate", "{run}", "a"], "ft.model.gpt2.Block.forward", "with --max-new-tokens 100: less is needed with a"),
        (["explain", "{flags}"], "ft.model.gpt2.Block.forward", "--activation-checkpointing none: less is needed with"),
        (["data", "{flags}"], "ft.data.load.encode", "train.csv': less is needed with fewer or shorter rows"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("error", [FULL, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried")])
def test_every_command_says_what_takes_less_memory(run, command, where, message, error, monkeypatch, capsys):
    folder, _, flags = run
    words = [w for word in command for w in (flags if word == "{flags}" else [word.format(run=folder)])]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(where, fail)
    assert main([*words, *(["--device", "cpu"] if command[1] == "{run}" else [])]) == 1
    told = capsys.readouterr().err
    (line,) = (line for line in told.splitlines() if not line.startswith("Note: "))
    assert line.startswith("error: out of memory with ")
    assert message in line
