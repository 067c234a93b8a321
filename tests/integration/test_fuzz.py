"""Random damage to models, runs, names and command lines: whatever comes, a short message and the right exit status.

Each test does a fixed number of rounds, each with a seed of its own, which a failure names. `FUZZ_ROUNDS=100` does a
hundred times as many, and `FUZZ_SEED=7` other ones.
"""

import io
import json
import os
import random
import re
import shutil
import struct
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields

import pytest

from ft.checks import flag
from ft.cli.arguments import read_arguments
from ft.cli.main import main
from ft.config import Config
from ft.errors import UsageError

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "1"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))

LONGEST = 2000  # characters of a line of output


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """Nothing is fetched, and what a round writes lies in the test's own folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def rounds(number):
    return [random.Random(f"{SEED} {i}") for i in range(number * ROUNDS)]


def ends_well(words, about, stdin=b"a\nb"):
    """Run a command line in this process; fail unless it succeeds, or says on short printable lines why not."""
    out, err = io.StringIO(), io.StringIO()
    given, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = main(words)
    except SystemExit as end:  # of --help
        status = end.code
    except BaseException:
        pytest.fail(f"{about}: {words!r:.2000}\n{traceback.format_exc()[-3000:]}")
    finally:
        sys.stdin = given
    assert status in (0, 1, 2), (about, words, err.getvalue())
    if status:
        assert "error: " in err.getvalue(), (about, words)
    for line in err.getvalue().split("\n"):
        assert len(line) < LONGEST, (about, words, line)
        assert line.isprintable(), (about, words, line)
    return status


# --- values that somebody might try -----------------------------------------------------------------------------------

TEXTS = [
    *("", " ", "a", "neg,pos", ",", "\x1b[31m", "a\nb", "\u202e", "\ud800", "\0", "'\"", "\\", "%s{}", "z" * 100_000),
    *("-", "--", "=", "-1", "0", "1", "2", "1e-3", "1e400", "nan", "-inf", "9" * 30, "9" * 5000, "0x10", "1_000", "٣"),
    *("None", "true", "null", "[]", "~", "..", "a/b", "checkpoint-1", "x.csv", "x.jsonl.gz", "/dev/null", "last:1"),
    *("cpu", "cuda:0", "train", "newest", "é" * 300, "\r\n", "*", "h.[0", "*" * 200, "a" * 300 + "/b"),
]
LEAVES = [
    *(None, True, False, 0, 1, -1, 2, 3, 64, 2**31, 2**63, -(2**64), 10**30, 0.0, 0.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), "gpt2", *TEXTS),
]


def value(rng, depth=2):
    """A JSON value."""
    kind = rng.random()
    if depth == 0 or kind < 0.7:
        return rng.choice(LEAVES)
    if kind < 0.85:
        return [value(rng, depth - 1) for _ in range(rng.choice((0, 1, 2, 5)))]
    return {str(rng.choice(TEXTS)): value(rng, depth - 1) for _ in range(rng.choice((0, 1, 2, 5)))}


def places(tree):
    """Every container of a JSON value with each key or index in it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in list(items)[:50]:
        yield tree, key
        yield from places(child)


def mutate(rng, tree):
    """Change one to three places of a JSON value: replace, delete, add, or exchange with another."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = list(places(tree))
        if not found:
            return
        container, key = rng.choice(found)
        what = rng.random()
        if what < 0.6:
            container[key] = value(rng)
        elif what < 0.75:
            del container[key]
        elif what < 0.85:
            other, place = rng.choice(found)
            if place in other if isinstance(other, dict) else place < len(other):
                container[key] = json.loads(json.dumps(other[place]))
        elif isinstance(container, dict):
            container[str(rng.choice(TEXTS))] = value(rng)
        else:
            container.append(value(rng))


def spoil_json(rng, path):
    tree = json.loads(path.read_bytes())
    mutate(rng, tree)
    path.write_text(json.dumps(tree))  # in ASCII: surrogates and all


def spoil_bytes(rng, path, within=None):
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 10))):
        place = rng.randrange(min(within or len(content), len(content)) or 1)
        junk = rng.choice((bytes([rng.randrange(256)]), rng.randbytes(4), b"\0" * 8, b"\xff" * 8, b"[" * 2000, b""))
        content[place : place + rng.choice((0, len(junk), 1))] = junk
    path.write_bytes(content[: rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content)


def spoil_header(rng, path):
    """Change the JSON at the beginning of a safetensors file, its length with it or not."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    mutate(rng, header)
    encoded = json.dumps(header).encode()
    told = len(encoded) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**63, len(encoded) + 1))
    path.write_bytes(struct.pack("<Q", told) + encoded + content[8 + length :])


# --- models -----------------------------------------------------------------------------------------------------------

SPOILS = {
    "config.json": (spoil_json, spoil_json, spoil_bytes),
    "tokenizer.json": (spoil_json, spoil_json, spoil_bytes),
    "model.safetensors": (spoil_header, spoil_header, lambda rng, path: spoil_bytes(rng, path, 4000)),
}


@pytest.mark.parametrize("name", SPOILS)
def test_no_damaged_model_makes_a_traceback(inputs, tmp_path, name):
    model, data = tmp_path / "model", inputs[3]
    shutil.copytree(inputs[1], model)
    whole = (model / name).read_bytes()
    for number, rng in enumerate(rounds(40)):
        (model / name).write_bytes(whole)
        spoil = rng.choice(SPOILS[name])
        spoil(rng, model / name)
        words = rng.choice(
            (
                ["predict", str(model), "the plot is dull", "", "é", "--label-names", "neg,pos", "--device", "cpu"],
                ["generate", str(model), "the", "--max-new-tokens", "3", "--device", "cpu"],
                ["data", "--model", str(model), "--dataset", data],
                ["explain", "--model", str(model), "--dataset", data, "--device", "cpu"],
            )
        )
        ends_well(words, f"round {number}")


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main([*inputs, "--max-steps", "2", "--save-steps", "2", "--output-dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "scores.json"])
def test_no_damaged_run_makes_a_traceback(run, tmp_path, name):
    pytest.importorskip("matplotlib")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    whole = (copy / name).read_bytes()
    for number, rng in enumerate(rounds(2)):
        (copy / name).write_bytes(whole)
        if name == "metrics.jsonl":
            lines = whole.decode().splitlines()
            place = rng.randrange(len(lines))
            event = json.loads(lines[place])
            mutate(rng, event)
            (copy / name).write_text("\n".join([*lines[:place], json.dumps(event), *lines[place + 1 :]]))
        else:
            spoil_json(rng, copy / name)
        ends_well(["report", str(copy)], f"round {number}")
        if name == "config.json":
            ends_well(["evaluate", str(copy), "--device", "cpu"], f"round {number}")
            ends_well(["predict", str(copy), "a", "--device", "cpu"], f"round {number}")


# --- command lines ----------------------------------------------------------------------------------------------------

FLAGS = [flag(field.name) for field in fields(Config)]
OF_COMMANDS = {
    "predict": ("base", "label-names", "max-length", "batch-size", "device", "file", "json"),
    "evaluate": (
        *["split", "dataset", "dataset-config", "text-column", "label-column", "label-names", "mistakes", "json"],
        *["prompt-column", "completion-column", "max-length", "batch-size"],
    ),
    "generate": ("base", "max-new-tokens", "temperature", "top-k", "top-p", "seed", "device"),
    "export": ("base", "to", "output", "overwrite", "dtype", "label-names", "max-length"),
    "report": ("output",),
}


def word(rng, flags):
    """A flag, a value, a flag with its value, or a flag that is none."""
    name = rng.choice(flags)
    kind = rng.random()
    if kind < 0.45:
        return name
    if kind < 0.75:
        return rng.choice(TEXTS)
    if kind < 0.9:
        return f"{name}={rng.choice(TEXTS)}"
    return rng.choice((name[:-1], name + "x", f"--{rng.choice(TEXTS)}", f"-{rng.choice(TEXTS)}", "-h", "--config"))


def test_no_command_line_of_a_run_makes_a_traceback():
    for number, rng in enumerate(rounds(150)):
        words = [word(rng, FLAGS) for _ in range(rng.choice((0, 1, 2, 3, 5, 10)))]
        problems = []
        try:
            with redirect_stdout(io.StringIO()):
                read_arguments(words)
        except UsageError as error:
            problems = error.problems
        except OSError:  # a name that is too long, of which `main` tells
            pass
        except SystemExit:  # of --help
            pass
        except Exception:
            pytest.fail(f"round {number}: {words!r:.2000}\n{traceback.format_exc()[-3000:]}")
        assert all(line.isprintable() and 0 < len(line) < LONGEST for line in problems), (number, words)


@pytest.mark.parametrize("command", [*OF_COMMANDS, "data", "explain"])
def test_no_command_line_of_a_command_makes_a_traceback(run, inputs, command):
    pytest.importorskip("matplotlib")
    flags = [f"--{name}" for name in OF_COMMANDS.get(command, ())] or FLAGS
    for number, rng in enumerate(rounds(3 if command == "report" else 15)):  # whose curves take a second
        words = [word(rng, flags) for _ in range(rng.choice((0, 1, 2, 3, 4)))]
        last = inputs if command not in OF_COMMANDS else []
        first = [str(run)] if command in OF_COMMANDS else []
        ends_well([command, *first, *words, *last], f"round {number}", stdin=rng.randbytes(20))


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = [os.fsdecode(text.encode("utf-8", "replace")[:200]) for text in TEXTS]


def test_no_name_of_a_file_a_column_or_a_label_makes_a_traceback(inputs, tmp_path):
    for number, rng in enumerate(rounds(40)):
        column, answer, *labels = (rng.choice(TEXTS) for _ in range(2 + rng.choice((1, 2, 3))))
        rows = [{column: rng.choice(TEXTS), answer: rng.choice(labels)} for _ in range(20)]
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / (re.sub(r"[/\0]|^\.+$", "_", rng.choice(NAMES)) + rng.choice((".jsonl", ".jsonl", "_")))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = [f"--dataset={path}", f"--text-column={column}", f"--label-column={answer}", *inputs[:2]]
        if rng.random() < 0.3:
            words.append(f"--label-names={','.join(labels)}")
        ends_well([rng.choice(("data", "data", "explain")), *words, "--device", "cpu"], f"round {number}")
