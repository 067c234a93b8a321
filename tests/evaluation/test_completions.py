"""Scores of completions against `transformers`: losses, most likely tokens, and greedy decoding."""

import json
import math
import shutil

import pytest
import torch
import transformers

from ft.cli.main import main
from ft.data.examples import END_OF_TEXT, Example
from ft.evaluation.completions import score_completions
from ft.inference.language_model import load_language_model

TOPICS = {"sport": "goal", "money": "bank", "food": "soup", "travel": "hotel", "music": "song", "law": "court"}
# What was taught, what was not, a prompt of nothing, a completion of nothing.
TESTED = [
    *((f"{word} {i}", f" is {topic}") for topic, word in TOPICS.items() for i in (3, 41)),
    ("bank 3", " is a river's"),
    ("goal 7", " is law and order ."),
    ("", " is sport"),
    ("soup 1", ""),
]


def write_rows(path, rows, columns=("question", "answer")):
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    taught = [(f"{word} {i}", f" is {topic}") for i in range(30) for topic, word in TOPICS.items()]
    write_rows(folder / "train.jsonl", taught)
    write_rows(folder / "test.jsonl", TESTED)
    return folder


@pytest.fixture(scope="module")
def finished(demo_inputs, data, tmp_path_factory):
    """A run on completions that has memorized its training data."""
    run = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--model", str(demo_inputs[0]), "--dataset", str(data), "--device", "cpu", "--precision", "fp32"]
    columns = ["--prompt-column", "question", "--completion-column", "answer"]
    assert main([*flags, *columns, "--epochs", "6", "--learning-rate", "2e-3", "--output-dir", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def reference(finished):
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "final").eval()
    return model, transformers.AutoTokenizer.from_pretrained(finished / "final")


def tokens_of(tokenizer, prompt, completion):
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return tokenizer(prompt)["input_ids"] or [end], [*tokenizer(completion)["input_ids"], end]


@torch.inference_mode()
def scored_by_reference(reference, prompt, completion):
    """The summed loss, the number of most likely tokens, and the text of greedy decoding."""
    model, tokenizer = reference
    before, after = tokens_of(tokenizer, prompt, completion)
    ids = torch.tensor([[*before, *after]])
    result = model(ids, labels=torch.tensor([[*[-100] * len(before), *after]]))
    likeliest = result.logits[0, len(before) - 1 : -1].argmax(dim=-1)
    written = model.generate(
        torch.tensor([before]),
        attention_mask=torch.ones(1, len(before), dtype=torch.int64),
        max_new_tokens=len(after),
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )[0, len(before) :]
    return result.loss.item() * len(after), int((likeliest == torch.tensor(after)).sum()), written.tolist(), after


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_completion_is_scored_as_by_transformers(finished, reference, batch_size):
    loaded = load_language_model(finished, device="cpu")
    pairs = [tokens_of(reference[1], *row) for row in TESTED]
    examples = [Example([*before, *after[:-1]], after) for before, after in pairs]
    scored = score_completions(loaded.model, examples, batch_size)
    expected = [scored_by_reference(reference, *row) for row in TESTED]
    assert scored.losses.tolist() == pytest.approx([loss for loss, *_ in expected], rel=1e-4, abs=1e-5)
    assert scored.hits.tolist() == [hits for _, hits, *_ in expected]
    whole = [written == after for _, _, written, after in expected]
    assert (scored.hits == scored.counts).tolist() == whole, "an exact match is what greedy decoding generates"
    assert 0 < sum(whole) < len(whole), "right and wrong must occur for this test to say anything"
    assert scored.scores().exact_match == pytest.approx(sum(whole) / len(whole))


def test_the_logits_of_a_batch_are_bounded(finished, monkeypatch):
    loaded = load_language_model(finished, device="cpu")
    examples = [Example([1] * (5 + i % 7), [2] * (1 + i % 5)) for i in range(40)]
    expected = score_completions(loaded.model, examples, 64)
    rows = []
    hook = loaded.model.register_forward_hook(lambda module, inputs, logits: rows.append(len(logits)))
    monkeypatch.setattr("ft.data.batches.MOST_TARGETS", 12)
    found = score_completions(loaded.model, examples, 64)
    monkeypatch.setattr("ft.data.batches.MOST_TARGETS", 3)
    alone = score_completions(loaded.model, examples, 64)
    hook.remove()
    assert max(rows) == 12
    assert min(rows) <= 3
    for each in (found, alone):
        torch.testing.assert_close(each.losses, expected.losses, rtol=1e-5, atol=1e-5)
        assert torch.equal(each.hits, expected.hits)


def test_evaluate_agrees_with_the_run_and_with_transformers(finished, reference, capsys):
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()][-1]
    assert main(["evaluate", str(finished), "--device", "cpu", "--json", "--mistakes", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    expected = [scored_by_reference(reference, *row) for row in TESTED]
    counts = [len(after) for *_, after in expected]
    assert (result["split"], result["completions"], result["tokens"]) == ("test", len(TESTED), sum(counts))
    assert result["loss"] == pytest.approx(sum(loss for loss, *_ in expected) / sum(counts), rel=1e-4)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert (result["loss"], result["accuracy"]) == (
        pytest.approx(logged["test_loss"], rel=1e-4),
        pytest.approx(logged["test_accuracy"]),
    )
    wrong = [row for row, (_, _, written, after) in enumerate(expected) if written != after]
    assert result["exact_match"] == pytest.approx(1 - len(wrong) / len(TESTED))
    worst = sorted(wrong, key=lambda row: -expected[row][0] / counts[row])[:3]
    assert [mistake["row"] for mistake in result["mistakes"]] == worst
    for row, mistake in zip(worst, result["mistakes"], strict=True):
        loss, hits, written, after = expected[row]
        assert mistake["loss"] == pytest.approx(loss / len(after), rel=1e-4)
        assert (mistake["right_tokens"], mistake["tokens"]) == (hits, len(after))
        assert (mistake["prompt"], mistake["completion"]) == TESTED[row]
        assert mistake["written"] == reference[1].decode(written, skip_special_tokens=True)


def test_evaluate_prints_a_summary_and_the_worst(finished, capsys):
    assert main(["evaluate", str(finished), "--device", "cpu", "--mistakes", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"test: {len(TESTED)} completions of ")
    for part in ("nats per token", "perplexity", "token accuracy", "exact match", "examples/s, by"):
        assert part in out
    assert out.count("generated: ") == out.count("expected:  ") == 2
    assert main(["evaluate", str(finished), "--split", "validation", "--device", "cpu"]) == 0
    assert "validation: 18 completions" in capsys.readouterr().out


def test_all_splits_together_are_scored_as_their_rows(finished, reference, tmp_path, capsys):
    output = tmp_path / "all.jsonl"
    flags = ["--device", "cpu", "--split", "all", "--mistakes", "4"]
    assert main(["evaluate", str(finished), *flags, "--json", "--output", str(output)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["train", "validation", "test", "all"]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    expected = [scored_by_reference(reference, row["prompt"], row["completion"]) for row in rows]
    counts = [len(after) for *_, after in expected]
    record = result["all"]
    assert (record["completions"], record["tokens"]) == (len(rows), sum(counts))
    assert record["loss"] == pytest.approx(sum(loss for loss, *_ in expected) / sum(counts), rel=1e-4)
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert record["accuracy"] == pytest.approx(sum(hits for _, hits, *_ in expected) / sum(counts))
    exact = [written == after for _, _, written, after in expected]
    assert record["exact_match"] == pytest.approx(sum(exact) / len(rows))
    every = [mistake for name in ("train", "validation", "test") for mistake in result[name]["mistakes"]]
    assert record["mistakes"] == sorted(every, key=lambda mistake: -mistake["loss"])[:4]
    assert main(["evaluate", str(finished), *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("nats per token") == 4
    assert f"\nall: {len(rows)} completions of {sum(counts):,} tokens, loss " in out


def test_truncated_completions_are_reported(finished, capsys):
    assert main(["evaluate", str(finished), "--device", "cpu", "--max-length", "3", "--json"]) == 0
    out, error = capsys.readouterr()
    assert "Note: " in error
    assert "completions are longer than --max-length 3: only their ends are scored" in error
    assert json.loads(out)["tokens"] <= 2 * len(TESTED)
    assert main(["evaluate", str(finished), "--device", "cpu", "--json"]) == 0
    assert "longer" not in capsys.readouterr().err


def test_any_model_is_scored_on_completions(finished, tmp_path, capsys):
    """A model outside a run directory, and columns named by flags."""
    shutil.copytree(finished / "final", tmp_path / "moved" / "model")
    path = write_rows(tmp_path / "own.jsonl", [("goal 1", " is sport")] * 20, columns=("q", "a"))
    flags = ["--dataset", str(path), "--prompt-column", "q", "--completion-column", "a", "--split", "train"]
    assert main(["evaluate", str(tmp_path / "moved" / "model"), *flags, "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exact_match"] == 1.0
    assert result["mistakes"] == []
    assert result["completions"] == 20, "all rows of a file that the model was not trained on"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["evaluate", "{run}", "--label-column", "x"], 2, "--label-column is for labels, but the completions of"),
        (["evaluate", "{run}", "--label-names", "a,b"], 2, "--label-names is for labels, but the completions of"),
        (["evaluate", "{run}", "--completion-column", "x"], 2, "has no column 'x'; its columns are question, answer"),
        (["evaluate", "{run}", "--mistakes", "-1"], 2, "--mistakes is -1, it must be at least 0"),
        (["evaluate", "{run}", "--mistakes", "some"], 2, "--mistakes is 'some', it must be a whole number"),
        (
            ["evaluate", "{model}", "--dataset", "x", "--prompt-column", "y"],
            2,
            "--prompt-column is 'y' without --compl",
        ),
        (["predict", "{run}", "a text"], 2, "was trained on completions and has no labels: use python run.py generate"),
    ],
)
def test_mistakes_are_reported_in_one_line(finished, demo_inputs, capsys, arguments, status, message):
    places = {"run": finished, "model": demo_inputs[0]}
    assert main([*(argument.format(**places) for argument in arguments), "--device", "cpu"]) == status
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_report_says_how_to_judge_completions(finished, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["report", str(finished), "--output", str(tmp_path / "report.html")]) == 0
    markup = (tmp_path / "report.html").read_text()
    assert f"<code>python run.py evaluate {finished}</code>" in markup
    assert "no valid scores.json" not in markup
