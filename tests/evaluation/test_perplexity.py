"""The loss on general text against `transformers`' own, what is read of a text, and that training does not notice."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from ft.cli.main import main
from ft.device import choose_precision
from ft.errors import FtError, Stopped
from ft.evaluation import perplexity as perplexity_module
from ft.evaluation.evaluate import evaluate
from ft.evaluation.general_text import GENERAL_TEXT
from ft.evaluation.perplexity import BUILTIN, WINDOWS_AT_ONCE, perplexity, read_general_text
from ft.io.plain_files import read_json
from ft.model.gpt2 import GPT2, GPT2Config
from ft.model.pretrained import load_weights

FP32 = choose_precision("fp32", torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(demo_inputs):
    return Tokenizer.from_file(str(demo_inputs[0] / "tokenizer.json"))


@pytest.fixture(scope="module")
def model(demo_inputs):
    model = GPT2(GPT2Config.from_dict(read_json(demo_inputs[0] / "config.json")))
    load_weights(model, [demo_inputs[0] / "model.safetensors"])
    return model


def general_loss(model, windows, stop_requested=lambda: False):
    result = evaluate(model, windows, [], batch_size=WINDOWS_AT_ONCE, precision=FP32, stop_requested=stop_requested)
    return result and result.loss


def joined(windows):
    """The windows' tokens as `transformers` takes them, inputs and targets in one."""
    return [[*window.input_ids, window.target_ids[-1]] for window in windows]


def test_the_loss_is_that_of_transformers_on_the_same_windows(model, tokenizer, demo_inputs):
    text = read_general_text(BUILTIN, tokenizer, n_positions=64)
    reference = transformers.AutoModelForCausalLM.from_pretrained(demo_inputs[0]).eval()
    loss_sum = count = 0
    with torch.inference_mode():
        for ids in joined(text.windows):
            batch = torch.tensor([ids])
            loss_sum += reference(input_ids=batch, labels=batch).loss.item() * (len(ids) - 1)
            count += len(ids) - 1
    assert count > 2000
    ours = general_loss(model, text.windows)
    assert ours == pytest.approx(loss_sum / count, rel=1e-5)
    assert perplexity(ours) == pytest.approx(math.exp(loss_sum / count), rel=1e-4)


@pytest.mark.parametrize("n_positions", [2, 64, 256, 1024])
def test_every_token_but_the_first_is_predicted_once(tokenizer, n_positions):
    windows = read_general_text(BUILTIN, tokenizer, n_positions).windows
    ids = tokenizer.encode(GENERAL_TEXT).ids
    assert [target for window in windows for target in window.target_ids] == ids[1:]
    assert all(window.input_ids[1:] == window.target_ids[:-1] for window in windows)
    assert {len(window) for window in joined(windows)[:-1]} == {min(256, n_positions)}


def test_a_number_that_is_none_has_an_infinite_perplexity():
    assert [perplexity(loss) for loss in (0.0, math.inf, math.nan, 800.0)] == [1.0, math.inf, math.inf, math.inf]


def test_measuring_draws_nothing_keeps_the_mode_and_bounds_the_logits(model, tokenizer):
    windows = read_general_text(BUILTIN, tokenizer, n_positions=64).windows
    rows = []
    hook = model.register_forward_hook(lambda module, inputs, logits: rows.append(len(logits)))
    for training in (True, False):
        model.train(training)
        before = torch.get_rng_state()
        assert general_loss(model, windows) > 0
        assert torch.equal(before, torch.get_rng_state())
        asked = iter([False, True])
        assert general_loss(model, windows, stop_requested=lambda asked=asked: next(asked)) is None
        assert model.training == training
    hook.remove()
    assert max(rows) == 4 * 63


def test_a_file_is_read_as_utf8_up_to_a_reported_bound(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("Äpfel und Birnen", encoding="utf-8-sig")
    text = read_general_text(str(path), tokenizer, 64)
    ids = tokenizer.encode("Äpfel und Birnen").ids
    assert joined(text.windows) == [ids]
    assert str(text) == f"{path}, {len(ids) - 1} tokens"
    monkeypatch.setattr(perplexity_module, "MOST_TOKENS", 10)
    text = read_general_text(str(path), tokenizer, 64)
    assert joined(text.windows) == [ids[:10]]
    assert str(text) == f"{path}, the first 9 tokens"
    monkeypatch.setattr(perplexity_module, "MOST_TOKENS", 20_000)
    monkeypatch.setattr(perplexity_module, "MOST_CHARACTERS", 5)
    text = read_general_text(str(path), tokenizer, 64)
    assert joined(text.windows) == [tokenizer.encode("Äpfel").ids]
    assert not text.complete


@pytest.mark.parametrize(
    ("splits", "read"), [(("train",), "train"), (("test",), "test"), (("train", "validation", "test"), "test")]
)
def test_of_a_data_set_one_split_is_read(tokenizer, tmp_path, splits, read):
    for split in splits:
        pq.write_table(pa.table({"text": [f"the {split}", "ends ."], "n": [1, 2]}), tmp_path / f"{split}.parquet")
    text = read_general_text(str(tmp_path), tokenizer, 64)
    assert joined(text.windows) == [tokenizer.encode(f"the {read}\n\nends .\n\n").ids]


def test_one_of_several_data_sets_is_named_by_its_folder(tokenizer, tmp_path, monkeypatch):
    for part in ("books", "news"):
        (tmp_path / part).mkdir()
        pq.write_table(pa.table({"text": [f"the {part}"]}), tmp_path / part / "test.parquet")
    with pytest.raises(FtError, match=f"holds several data sets, books, news: name one of them, as {tmp_path}/books$"):
        read_general_text(str(tmp_path), tokenizer, 64)
    expected = [tokenizer.encode("the news\n\n").ids]
    assert joined(read_general_text(str(tmp_path / "news"), tokenizer, 64).windows) == expected

    def fetched(name, part, first_of):
        assert (name, part, first_of[0]) == ("owner/texts", "news", "test")
        return {"test": [tmp_path / "news" / "test.parquet"]}

    monkeypatch.setattr(perplexity_module, "dataset_files", fetched)
    assert joined(read_general_text("owner/texts/news", tokenizer, 64).windows) == expected


def test_a_csv_file_is_a_data_set(tokenizer, tmp_path):
    (tmp_path / "texts.csv").write_text("text,n\nthe plot,1\nends .,2\n")
    text = read_general_text(str(tmp_path / "texts.csv"), tokenizer, 64)
    assert joined(text.windows) == [tokenizer.encode("the plot\n\nends .\n\n").ids]


def write_without_text(folder):
    pq.write_table(pa.table({"review": ["a"]}), folder / "train.parquet")
    return folder


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda folder: folder / "absent" / "notes.txt",
            "notes.txt', there is no such file",
        ),
        (
            lambda folder: (folder / "latin1.txt").write_bytes(b"caf\xe9") and folder / "latin1.txt",
            "which is not UTF-8",
        ),
        (lambda folder: (folder / "empty.txt").touch() or folder / "empty.txt", "holds 0 tokens: name a text of at"),
        (lambda folder: folder, "as a data set: "),
        (write_without_text, "has no column 'text'"),
    ],
)
def test_an_unreadable_text_is_reported_before_anything_is_done(inputs, tmp_path, prepare, message, capsys):
    (tmp_path / "texts").mkdir()
    source = prepare(tmp_path / "texts")
    status = 1 if message in ("which is not UTF-8", "as a data set: ") else 2  # the text, or its name
    assert main([*inputs, "--forgetting", str(source), "--output-dir", str(tmp_path / "run")]) == status
    error = capsys.readouterr().err
    assert error.startswith("error: --forgetting is ")
    assert message in error
    assert not (tmp_path / "run").exists()


SETTINGS = ["--precision", "fp32", "--eval-steps", "4", "--save-steps", "5", "--logging-steps", "5"]


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if "second" not in name} for line in found]


def test_before_meanwhile_and_after_and_training_does_not_notice(inputs, tmp_path, capsys):
    without, measured = tmp_path / "without", tmp_path / "measured"
    assert main([*inputs, *SETTINGS, "--output-dir", str(without)]) == 0
    assert "eneral text" not in capsys.readouterr().out
    path = tmp_path / "text.txt"
    path.write_text(GENERAL_TEXT[:500])
    assert main([*inputs, *SETTINGS, "--forgetting", str(path), "--output-dir", str(measured)]) == 0
    output = capsys.readouterr().out
    general = [line for line in lines(measured) if "general_loss" in line]
    assert [line["step"] for line in general] == [0, 4, 8, 10]
    assert [line for line in lines(measured) if "general_loss" not in line] == lines(without)
    for line in general:
        assert list(line) == ["step", "epoch", "general_loss", "general_perplexity"]
        assert line["general_perplexity"] == pytest.approx(math.exp(line["general_loss"]))
    before, after = general[0]["general_perplexity"], general[-1]["general_perplexity"]
    assert f"Perplexity on general text {before:,.2f} before, {after:,.2f} after" in output
    assert after != before
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        files = [(run / "checkpoint-10" / name).read_bytes() for run in (without, measured)]
        assert files[0] == files[1]


@pytest.mark.parametrize("at", [0, 1])
def test_a_resumed_run_writes_the_same_lines_each_once(inputs, tmp_path, monkeypatch, capsys, at):
    """Broken off by a signal in the first measurement, or in the second, and resumed."""
    from ft.train.signals import StopRequest

    (tmp_path / "text.txt").write_text(GENERAL_TEXT[:500])
    flags = [*inputs, *SETTINGS, "--forgetting", str(tmp_path / "text.txt")]
    assert main([*flags, "--output-dir", str(tmp_path / "calm")]) == 0
    broken = tmp_path / "broken"
    measured, request = [], []

    def stop_in(model, examples, label_ids, **options):
        if not label_ids:
            measured.append(examples)
        request.extend(measured[at:])
        return evaluate(model, examples, label_ids, **options)

    with monkeypatch.context() as patch:
        patch.setattr("ft.session.evaluate", stop_in)
        patch.setattr(StopRequest, "__call__", lambda self: bool(request))
        patch.setattr(StopRequest, "stopped", lambda self, message: Stopped(message, status=130))
        assert main([*flags, "--output-dir", str(broken)]) == 130
    assert [line["step"] for line in lines(broken)] == [[], [0]][at]
    capsys.readouterr()
    assert main(["--resume", str(broken)]) == 0
    assert lines(broken) == lines(tmp_path / "calm")
    output = capsys.readouterr().out
    assert f"Perplexity on general text {lines(broken)[0]['general_perplexity']:,.2f} before" in output


def test_another_text_is_another_run(inputs, tmp_path, capsys):
    flags = [*inputs, "--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    assert main([*flags, "--forgetting", BUILTIN]) == 0
    (tmp_path / "text.txt").write_text("something else")
    assert main([*flags, "--forgetting", str(tmp_path / "text.txt"), "--resume"]) == 2
    assert "--forgetting was 'builtin' and would be" in capsys.readouterr().err


def test_the_built_in_text_is_general_and_of_some_length():
    words = GENERAL_TEXT.split()
    assert 600 <= len(words) <= 1000
    assert not {"film", "films", "movie", "review", "reviews", "actor"} & {
        word.strip('.,;:"').lower() for word in words
    }
