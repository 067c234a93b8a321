"""`ft.fine_tune` from Python: the losses of the command line, forms of rows, errors, the process left as it was."""

import contextlib
import ctypes
import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import ft
from ft.cli.main import main
from ft.session import Session
from ft.train.loop import train_step

ROOT = Path(__file__).parents[2]
SETTINGS = {"precision": "fp32", "device": "cpu", "learning_rate": 1e-3, "logging_steps": 1}
FLAGS = ["--precision", "fp32", "--device", "cpu", "--learning-rate", "1e-3", "--logging-steps", "1"]
FIGURES = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "test_loss", "test_accuracy")


@pytest.fixture(scope="module")
def model(demo_inputs):
    return demo_inputs[0]


@pytest.fixture(scope="module")
def rows(demo_inputs):
    """Texts and labels of the demo's three splits, by split."""
    counts = {"train": 40, "validation": 12, "test": 8}
    tables = {name: pq.read_table(demo_inputs[1] / f"{name}.parquet").slice(0, n) for name, n in counts.items()}
    return {name: (table["text"].to_pylist(), table["label"].to_pylist()) for name, table in tables.items()}


@pytest.fixture
def tune(model, tmp_path):
    """`ft.fine_tune` for a few steps, in a directory of the test."""

    def run(*arguments, **settings):
        return ft.fine_tune(
            *arguments, **{"model": model, "output_dir": tmp_path / "run", "max_steps": 3, **SETTINGS, **settings}
        )

    return run


def figures(run):
    path = run.path if isinstance(run, ft.Run) else Path(run)
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [[event.get(name) for name in FIGURES] for event in events]


def words(labels):
    return ["pos" if label else "neg" for label in labels]


# --- the same run as the command line's


@pytest.mark.parametrize("has_validation", [True, False])
def test_losses_are_those_of_the_command_line(tune, model, rows, tmp_path, has_validation):
    data = {name: rows[name] for name in (rows if has_validation else ["train"])}
    (tmp_path / "data").mkdir()
    for name, (texts, labels) in data.items():
        pd.DataFrame({"text": texts, "label": words(labels)}).to_csv(tmp_path / "data" / f"{name}.csv", index=False)
    assert (
        main([*FLAGS, *f"--model {model} --dataset {tmp_path / 'data'} --output-dir {tmp_path / 'cli'}".split()]) == 0
    )
    others = {name: (texts, words(labels)) for name, (texts, labels) in data.items() if name != "train"}
    run = tune(data["train"][0], words(data["train"][1]), **others, max_steps=None)
    assert figures(run) == figures(tmp_path / "cli")
    assert len(figures(run)) == (7 if has_validation else 6)
    names = ("config.json", "model.safetensors")
    assert [(run.final / n).read_bytes() for n in names] == [
        (tmp_path / "cli" / "final" / n).read_bytes() for n in names
    ]


def test_a_run_resumes_from_the_command_line_also_after_its_directory_was_moved(tune, rows, tmp_path):
    texts, labels = rows["train"]
    complete = tune(texts, labels, max_steps=5, output_dir=tmp_path / "complete", lr_schedule="constant")
    begun = tune(texts, labels, max_steps=3, lr_schedule="constant")
    begun.path.rename(tmp_path / "moved")
    assert main(["--resume", str(tmp_path / "moved"), "--max-steps", "4"]) == 0
    run = ft.fine_tune(output_dir=tmp_path / "moved", resume=True, max_steps=5)
    assert torch.equal(
        *(transformers.AutoModelForCausalLM.from_pretrained(r.final).lm_head.weight for r in (run, complete))
    )


def test_the_rows_of_a_run_train_another(tune, rows, tmp_path):
    first = tune(*rows["train"])
    (staged,) = (first.path / "inputs").iterdir()
    second = ft.fine_tune(model=first.config.model, dataset=staged, output_dir=tmp_path / "b", max_steps=3, **SETTINGS)
    assert figures(second) == figures(first)
    assert ft.fine_tune(output_dir=tmp_path / "b", resume=True, max_steps=4).history[-1]["step"] == 4


def test_a_run_resumes_with_its_rows_and_no_others(tune, rows):
    texts, labels = rows["train"]
    tune(texts, labels)
    assert tune(texts, labels, resume=True, max_steps=4).history[-1]["step"] == 4
    with pytest.raises(ft.UsageError, match="the rows are not those of the run"):
        tune(texts[:20], labels[:20], resume=True, max_steps=5)


def test_a_second_run_needs_overwrite_and_deletes_the_rows_of_the_first(tune, rows):
    texts, labels = rows["train"]
    run = tune(texts, labels)
    with pytest.raises(ft.UsageError, match="not empty: resume continues the run in it, overwrite replaces that run"):
        tune(texts[:20], labels[:20])
    assert len(list((run.path / "inputs").iterdir())) == 1
    tune(texts[:20], labels[:20], overwrite=True)
    (staged,) = (run.path / "inputs").iterdir()
    assert pq.read_table(staged / "train.parquet").num_rows == 20


def test_a_run_that_fails_before_its_first_step_does_not_block_the_next(tune, rows):
    with pytest.raises(ft.UsageError, match="train_only"):
        tune(*rows["train"], train_only=["nothing.*"])
    assert tune(*rows["train"]).history


def test_without_output_dir_every_run_has_its_own(rows, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [ft.fine_tune(*rows["train"], model=model, max_steps=1, **SETTINGS) for _ in range(2)]
    assert runs[0].path != runs[1].path
    assert all(run.path.parent == Path("runs") and run.final.is_dir() for run in runs)


# --- forms of rows


def dataset(texts, labels):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


FORMS = {
    "lists": lambda texts, labels: (texts, words(labels)),
    "tuples": lambda texts, labels: (tuple(texts), tuple(words(labels))),
    "numpy": lambda texts, labels: (np.array(texts), np.array(words(labels))),
    "pandas": lambda texts, labels: (pd.Series(texts), pd.Series(words(labels), index=range(7, 7 + len(labels)))),
    "categorical": lambda texts, labels: (texts, pd.Categorical(words(labels))),
    "arrow": lambda texts, labels: (pa.array(texts), pa.chunked_array([words(labels)])),
    "frame": lambda texts, labels: (pd.DataFrame({"text": texts, "label": words(labels), "id": 0}),),
    "columns": lambda texts, labels: ({"text": texts, "label": words(labels)},),
    "table": lambda texts, labels: (pa.table({"text": texts, "label": words(labels)}),),
    "generators": lambda texts, labels: (iter(texts), (word for word in words(labels))),
    "datasets.Dataset": lambda texts, labels: (dataset(texts, labels),),
    "a stream": lambda texts, labels: (dataset(texts, labels).to_iterable_dataset(),),
    "datasets columns": lambda texts, labels: (dataset(texts, labels)["text"], words(labels)),
}


@pytest.fixture(scope="module")
def reference(model, rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "run"
    run = ft.fine_tune(rows["train"][0], words(rows["train"][1]), model=model, output_dir=path, max_steps=3, **SETTINGS)
    return figures(run)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_rows_trains_the_same(tune, rows, reference, form):
    run = tune(*FORMS[form](*rows["train"]))
    assert figures(run) == reference
    assert run.model.label_names == ("neg", "pos")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (lambda labels: [label + 1 for label in labels], ("1", "2")),
        (lambda labels: np.array(labels), ("0", "1")),
        (lambda labels: [np.int64(label) for label in labels], ("0", "1")),
        (lambda labels: pd.Series(labels, dtype="float64"), ("0", "1")),
        (lambda labels: pd.Series(labels, dtype="Int64"), ("0", "1")),
        (lambda labels: np.array(labels) == 1, ("False", "True")),
        (torch.tensor, ("0", "1")),
    ],
)
def test_labels_are_numbers_or_truth_values_of_any_library(tune, rows, labels, names):
    texts, numbers = rows["train"]
    run = tune(texts, labels(numbers))
    assert run.model.label_names == names
    assert run.evaluate(texts, labels(numbers)) == run.evaluate(texts, [names[label] for label in numbers])


def test_splits_and_names_of_a_dataset_dict(tune, rows):
    splits = datasets.DatasetDict({name: dataset(*split) for name, split in rows.items()})
    run = tune(splits)
    direct = tune(rows["train"][0], rows["train"][1], validation=rows["validation"], test=splits["test"],
                  label_names=["neg", "pos"], output_dir=run.path.parent / "direct")  # fmt: skip
    assert figures(run) == figures(direct)
    assert any("test_loss" in event for event in run.history)


def test_columns_have_any_names(tune, rows):
    texts, labels = rows["train"]
    frame = pd.DataFrame({"body": texts, "stars": words(labels)})
    run = tune(frame, text_column="body", label_column="stars")
    assert run.evaluate(frame) == run.evaluate(texts, words(labels))


def test_completions(tune, rows):
    texts, labels = rows["train"]
    run = tune(texts, completions=words(labels))
    assert set(run.evaluate(texts, words(labels))) == {"loss", "accuracy"}
    table = datasets.Dataset.from_dict({"question": texts, "answer": words(labels)})
    other = tune(table, prompt_column="question", completion_column="answer", output_dir=run.path.parent / "other")
    assert figures(run) == figures(other)
    assert isinstance(run.model.generate("the film", max_new_tokens=2), str)


# --- wrong rows and settings

BAD_ROWS = {
    "lengths": (lambda t, y: (t, y[:-1]), "40 texts and 39 labels: pass one for each"),
    "empty": (lambda t, y: ([], []), "there are no texts: pass at least one"),
    "a string": (lambda t, y: ("a film", y), "texts is the str 'a film', it must be a list"),
    "a set": (lambda t, y: (set(t), y), "texts is the set"),
    "a number": (lambda t, y: (t, 1), "labels is 1, it must be a list"),
    "None": (lambda t, y: ([None, *t[1:]], y), "1 of the texts is missing, like None (at 0): fill them in"),
    "NaN": (lambda t, y: ([*t[:-2], float("nan"), np.nan], y), "2 of the texts are missing, like nan (at 38, 39)"),
    "NA": (lambda t, y: (pd.Series([pd.NA, *t[1:]], dtype="string"), y), "1 of the texts is missing, like <NA> (at 0)"),
    "a label NaN": (lambda t, y: (t, pd.Series([np.nan, *y[1:]])), "1 of the labels is missing, like nan (at 0)"),
    "an empty label": (lambda t, y: (t, [" ", *words(y[1:])]), "1 of the labels is missing"),
    "a text number": (lambda t, y: ([7, *t[1:]], y), "texts has 7 at 0, it must be a string"),
    "a surrogate": (lambda t, y: (["\ud800", *t[1:]], y), "texts at 0 is not UTF-8"),
    "a fraction": (lambda t, y: (t, [0.5, *y[1:]]), "labels has 0.5 at 0, it must be a whole number or a word"),
    "an array as a label": (lambda t, y: (t, [np.array([0, 1])] * len(t)), "labels has array([0, 1]) at 0, it must be"),
    "a tensor as a label": (lambda t, y: (t, [torch.ones(2)] * len(t)), "labels has tensor([1., 1.]) at 0, it must be"),
    "a surrogate as a label": (lambda t, y: (t, ["\ud800", *words(y[1:])]), "labels at 0 is not UTF-8"),
    "two types": (lambda t, y: (t, ["neg", *y[1:]]), "labels has 'neg' at 0 and"),
    "one class": (lambda t, y: (t, ["pos"] * len(t)), "all 40 labels are 'pos': there must be two"),
    "no labels": (lambda t, y: (t,), "labels are missing: pass one for each of the texts, or a table"),
    "no texts": (lambda t, y: (None, y), "texts are missing"),
    "columns": (lambda t, y: (pd.DataFrame({"a": t, "label": y}),), "the table has no column 'text', its columns are"),
    "a number as a table": (lambda t, y: (7,), "texts is 7: pass lists of texts and labels, or a table"),
    "splits": (lambda t, y: ({"test": dataset(t, y)},), "neither a column 'text' nor a split train"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_wrong_rows_are_named(tune, rows, case, tmp_path):
    make, message = BAD_ROWS[case]
    with pytest.raises(ft.FtError) as caught:
        tune(*make(*rows["train"]))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 1e-4}, "there is no setting lr, is it learning_rate?"),
        ({"epoch": 1}, "there is no setting epoch, is it epochs?"),
        ({"processes": 2}, "there is no setting processes"),
        ({"xyzzy": 2}, "there is no setting xyzzy; help(ft.fine_tune) lists all settings"),
        ({"batch_size": 0}, "batch_size is 0, it must be at least 1"),
        ({"batch_size": "8"}, "batch_size is '8', it must be a whole number"),
        ({"batch_size": np.array([1, 2])}, "batch_size is array([1, 2]), it must be a whole number"),
        ({"resume": 3}, "resume is 3, it must be a string"),
        ({"text_column": "\ud800"}, "it must be valid UTF-8"),
        ({"lora_rank": 2, "lora_alpha": 1e308}, "lora_alpha is 1e+308, it must be above 0 and at most 1e+09"),
        ({"class_weights": "1e39,1"}, "class_weights is '1e39,1', it must be balanced, or one number from 1e-09 to"),
        ({"profile": "\udcff"}, "profile is '\\udcff', it must be valid UTF-8"),
        ({"dataset": "x"}, "dataset is 'x', and rows are given too: leave one out"),
        (
            {"validation": ["a"]},
            "validation is ['a']: pass a tuple (texts, labels), or a table in memory with both",
        ),
        ({"test": [["a"], [0]]}, "test is [['a'], [0]]: pass a tuple (texts, labels), or a table"),
        ({"validation": (["a", "b"], [0])}, "there are 2 texts of validation and 1 labels"),
        ({"validation": (["a", "b"], ["neg", "pos"])}, "pass labels of one type"),
        ({"label_names": ["a,b", "c"]}, "a name must not contain a comma"),
        ({"completions": ["a"] * 40}, "labels and completions are both given"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"device": "tpu"}, "device is 'tpu', it must be cpu"),
        ({"model": "./absent"}, "check model"),
    ],
)
def test_wrong_settings_are_named_as_in_python(tune, rows, settings, message):
    with pytest.raises(ft.FtError) as caught:
        tune(*rows["train"], **settings)
    assert message in str(caught.value)
    assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"demo": True, "model": "gpt2"}, "demo has its own model and data: leave out demo, or model"),
        ({"max_skipped_steps": 3}, "max_skipped_steps limits what on_nonfinite skip leaves out: give both or neither"),
        ({"prompt_column": "a"}, "prompt_column is 'a' without completion_column: give both or neither"),
        (
            {"completion_column": "a", "text_column": "b", "label_column": "c"},
            "completion_column trains on completions, without labels: leave out text_column and label_column",
        ),
    ],
)
def test_settings_without_effect_are_refused_as_on_the_command_line(settings, message, demo_inputs, tmp_path):
    inputs = {} if "demo" in settings else {"model": demo_inputs[0], "dataset": demo_inputs[1]}
    with pytest.raises(ft.UsageError, match=f"^{message}$"):
        ft.fine_tune(output_dir=tmp_path / "run", max_steps=1, **SETTINGS, **inputs, **settings)
    assert not (tmp_path / "run").exists()


def test_commands_and_flags_of_other_programs_are_not_renamed(tune, rows, monkeypatch):
    message = "`{} --demo` needs no network, {}; torchrun --master-port is free; take a smaller {} or {}"

    def fail(*arguments, **options):
        raise ft.FtError(message.format("python -m ft", "--dataset", "--batch-size", "--max-length"))

    monkeypatch.setattr("ft.finetune.fine_tune", fail)
    with pytest.raises(ft.FtError) as caught:
        tune(*rows["train"])
    assert str(caught.value) == message.format("python -m ft", "dataset", "batch_size", "max_length")


def test_errors_of_the_system_are_of_this_package(tune, rows, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ft.FtError, match=f"Not a directory: {tmp_path / 'file' / 'run'}"):
        tune(*rows["train"], output_dir=tmp_path / "file" / "run")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ft.FtError, match=r"^No space left on device: ") as caught:
        tune(*rows["train"])
    assert isinstance(caught.value.__cause__, OSError)


def test_all_problems_are_reported_at_once(tune, rows):
    with pytest.raises(ft.UsageError) as caught:
        tune(rows["train"][0], rows["train"][1][1:], validation=([None], [0]), test=(["a"], []))
    assert len(caught.value.problems) == 3


def test_unknown_settings_wrong_values_and_limits_are_reported_at_once(tune, rows):
    with pytest.raises(ft.UsageError) as caught:
        tune(*rows["train"], epochss=3, batch_size=0, label_names=["a,b", "c"], learning_rate="fast", dataset="x")
    problems = "\n".join(caught.value.problems)
    for message in (
        "there is no setting epochss, is it epochs?",
        "label_names is ['a,b', 'c'], a name must not contain a comma",
        "dataset is 'x', and rows are given too",
        "batch_size is 0, it must be at least 1",
        "learning_rate is 'fast', it must be a number",
    ):
        assert message in problems
    assert len(caught.value.problems) == 5
    with pytest.raises(ft.UsageError) as caught:
        ft.fine_tune(labels=[1], completions=["a"], epochss=3, batch_size=0)
    assert len(caught.value.problems) == 4


# --- the run


def test_the_run_predicts_evaluates_and_shows_itself(tune, rows):
    texts, labels = rows["train"]
    run = tune(texts, words(labels), max_steps=None, epochs=10, test=(rows["test"][0], words(rows["test"][1])))
    predicted = [prediction.label for prediction in run.predict(texts)]
    scores = run.evaluate(texts, words(labels))
    assert predicted == [prediction.label for prediction in ft.load(run.path).predict(texts)]
    assert scores["accuracy"] == pytest.approx(np.mean(np.array(predicted) == np.array(words(labels))))
    on_test = run.evaluate(rows["test"][0], words(rows["test"][1]))
    assert on_test["loss"] == pytest.approx(run.history[-1]["test_loss"], rel=1e-5)
    text = repr(run)
    assert str(run.path) in text
    assert f"test       loss {run.history[-1]['test_loss']:.4f}" in text
    assert str(run.final) in text
    assert run.config.epochs == 10
    assert [path.name for path in run.checkpoints] == ["checkpoint-50"]
    with pytest.raises(ft.FtError, match="the label in row 1 of the given split is 'good', the labels are neg, pos"):
        run.evaluate(["a", "b"], ["neg", "good"])
    assert "has not begun" in repr(ft.Run("nowhere"))


@pytest.mark.parametrize("line", ["[1]", "5", '{"a": 1}', '{"step": null}', "x"])
def test_a_history_of_other_lines_is_an_error(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ft.FtError, match=r"metrics\.jsonl"):
        repr(ft.Run(tmp_path))


def test_the_signature_has_every_setting():
    import inspect
    from dataclasses import fields

    from ft.config import NO_FLAGS, Config

    assert {field.name for field in fields(Config)} - set(NO_FLAGS) <= set(inspect.signature(ft.fine_tune).parameters)


# --- the process that calls it


def process_state():
    return {
        "threads": {each for each in threading.enumerate() if type(each).__name__ != "TMonitor"},  # of any bar
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "random": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default": (torch.get_default_dtype(), torch.get_default_device()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "torch threads": torch.get_num_threads(),
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "streams": (sys.stdout, sys.stderr),
        "logging": (list(logging.root.handlers), logging.root.level),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "files": {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2
                  and os.path.exists(f"/proc/self/fd/{fd}")},
    }  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("fails", ["", "before", "during"])
def test_nothing_in_the_process_stays_changed(tune, rows, fails, monkeypatch, tmp_path):
    tune(*rows["train"], output_dir=tmp_path / "first")  # what imports change for good, they have changed now
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(123)
    before = process_state()
    try:
        if fails == "before":
            with pytest.raises(ft.UsageError):
                tune(*rows["train"], train_only=["nothing.*"])
        elif fails == "during":

            def fail(*_, **__):
                raise ZeroDivisionError

            monkeypatch.setattr("ft.train.loop.train_step", fail)
            with pytest.raises(ZeroDivisionError):
                tune(*rows["train"])
        else:
            tune(*rows["train"])
        assert process_state() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    if fails == "":
        with pytest.raises(ft.UsageError, match="not empty"):  # so the lock is free
            tune(*rows["train"])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("variable", [None, False])
@pytest.mark.parametrize("states", [{}, {"_global": False, "my.group": True}, {"my.group": False}])
def test_a_quiet_run_shows_no_download_bars_and_restores_them(
    tune, rows, monkeypatch, capsys, quiet, states, fails, variable
):
    """Those of huggingface_hub, which it asks before it shows one; the variable of its environment has precedence."""
    bars = sys.modules["huggingface_hub.utils.tqdm"]
    for module in ("constants", "utils.tqdm"):
        monkeypatch.setattr(sys.modules[f"huggingface_hub.{module}"], "HF_HUB_DISABLE_PROGRESS_BARS", variable)
    monkeypatch.setattr(bars, "progress_bar_states", dict(states))

    def download(*_, **__):
        for name in ("huggingface_hub.http_get", "my.group"):
            list(bars.tqdm(range(3), name=name, desc=f"Fetching {name}"))
        if fails:
            raise ft.FtError("there is no network")

    monkeypatch.setattr("ft.finetune.fine_tune", download)
    with pytest.raises(ft.FtError) if fails else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("error")
        tune(*rows["train"], quiet=quiet)
    before = {"huggingface_hub.http_get": states.get("_global", True), "my.group": states.get("my.group", True)}
    shown = {name: not quiet and is_shown for name, is_shown in before.items()} if variable is None else before
    text = capsys.readouterr().err
    assert {name: f"Fetching {name}: " in text for name in before} == shown
    assert bars.progress_bar_states == states
    assert {name: not bars.are_progress_bars_disabled(name) for name in before} == before


class Mallinfo2(ctypes.Structure):
    """Of malloc.h; `hblks` counts the blocks that are mapped one by one."""

    _fields_ = tuple(
        (name, ctypes.c_size_t) for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "a", "b", "c", "d", "e"]
    )


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_the_allocator_returns_large_blocks_to_the_kernel_again(tune, rows, monkeypatch):
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2

    def mapped_blocks():
        before = mallinfo2().hblks
        block = torch.empty(100 * 2**20, dtype=torch.uint8)
        return mallinfo2().hblks - before if len(block) else None

    during = []

    def observed(*arguments, **options):
        during.append(mapped_blocks())
        return train_step(*arguments, **options)

    monkeypatch.setattr("ft.train.loop.train_step", observed)
    tune(*rows["train"])
    assert (set(during), mapped_blocks()) == ({0}, 1)


def test_defaults_of_the_caller_do_not_change_the_run(tune, rows, reference):
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        run = tune(rows["train"][0], words(rows["train"][1]))
        assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.float64, "meta")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert figures(run) == reference


def test_it_runs_in_a_thread_that_is_not_the_main_one(tune, rows, reference):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(tune(rows["train"][0], words(rows["train"][1]))))
    thread.start()
    thread.join()
    assert figures(runs[0]) == reference


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_continue(tune, rows, reference, monkeypatch, number):
    def interrupted(*arguments, **options):
        os.kill(os.getpid(), number)
        return train_step(*arguments, **options)

    texts, labels = rows["train"][0], words(rows["train"][1])
    with monkeypatch.context() as patch:
        patch.setattr("ft.train.loop.train_step", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            tune(texts, labels)
    message = str(caught.value)
    assert message.startswith("stopped after step 1, and saved. To continue: ft.fine_tune(output_dir=")
    call = message.partition("To continue: ")[2].partition(", or on a command line")[0]
    run = eval(call, {"ft": ft})
    assert figures(run)[-2:] == reference[-2:]


def test_an_interrupt_before_the_first_step_says_that_nothing_is_saved(tune, rows, reference, monkeypatch):
    def interrupted(self, state):
        os.kill(os.getpid(), signal.SIGINT)
        return prepare(self, state)

    prepare = Session.prepare
    with monkeypatch.context() as patch:
        patch.setattr(Session, "prepare", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"^stopped before the first step, with nothing to save") as caught:
            tune(rows["train"][0], words(rows["train"][1]))
    call = str(caught.value).partition("To continue: ")[2].partition(", or on a command line")[0]
    assert figures(eval(call, {"ft": ft})) == reference


def test_a_second_interrupt_raises_at_once_and_the_process_lives(tune, rows, monkeypatch):
    def interrupted(*arguments, **options):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second interrupt raises")

    monkeypatch.setattr("ft.train.loop.train_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tune(*rows["train"])
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_bar_is_that_of_a_notebook(tune, rows, monkeypatch):
    """A stand-in for a kernel's shell, whose bar without ipywidgets is text on standard error."""
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    tune(*rows["train"])
    assert "3/3" in sys.stderr.getvalue()


# --- imports


def test_importing_ft_imports_neither_torch_nor_pyarrow():
    code = (
        "import ft, sys; ft.UsageError; print([m for m in ('torch', 'pyarrow', 'numpy', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fine_tuning_imports_neither_pandas_nor_datasets(model, tmp_path):
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pandas", "datasets", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import ft
run = ft.fine_tune(["a film", "a mess"] * 10, [1, 0] * 10, model={str(model)!r}, output_dir={str(tmp_path / "run")!r},
                   max_steps=1, device="cpu")
run.predict(["a film"])
print([name for name in ("pandas", "datasets", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_mypy_sees_the_types(tmp_path):
    (tmp_path / "use.py").write_text(
        "import ft\n"
        "run = ft.fine_tune(['a'], [1], epochs=1)\n"
        "reveal_type(run.predict(['a'])[0].label)\n"
        "reveal_type(run.evaluate(['a'], [1]))\n"
        "reveal_type(ft.load('x'))\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", os.devnull]
    done = subprocess.run(
        [*command, "--follow-imports=silent", str(tmp_path / "use.py")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    found = [line.rpartition('is "')[2].rstrip('"') for line in done.stdout.splitlines() if "Revealed" in line]
    assert found == ["str", "dict[str, float]", "ft.inference.classifier.Classifier"]
