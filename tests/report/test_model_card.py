"""The model card: its header read by the Hub's client, its snippets run, names and paths that must do no harm."""

import ast
import io
import json
import re
import shlex
import shutil
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

import ft
from ft.cli.main import main
from ft.config import Config
from ft.evaluation.evaluate import Evaluation
from ft.report.model_card import hub_id, model_card
from ft.report.outcome import Outcome
from ft.train.state import State


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A finished run on local files."""
    folder = tmp_path_factory.mktemp("private-place") / "run"
    flags = ["--precision", "fp32", "--max-length", "20", "--forgetting", "builtin", "--output-dir", str(folder)]
    assert main([*inputs, *flags]) == 0
    return folder


def events(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_the_card_has_the_results_and_no_path(run):
    text = (run / "final" / "README.md").read_text(encoding="utf-8")
    card = ModelCard.load(run / "final" / "README.md")
    header = metadata_load(run / "final" / "README.md")
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "text-generation"
    assert not {"license", "language", "base_model", "datasets"} & set(header), "of local files nothing is known"
    recorded = {(each.dataset_split, each.metric_type): each.metric_value for each in card.data.eval_results}
    for split, name in (("validation", "eval"), ("test", "test")):
        for metric, key in (("accuracy", "accuracy"), ("loss", "loss"), ("f1", "macro_f1")):
            assert recorded[split, metric] == pytest.approx(events(run, f"{name}_{key}")[-1], abs=1e-6)
    assert {each.task_type for each in card.data.eval_results} == {"text-classification"}
    accuracy, f1, loss, baseline = (
        events(run, f"test_{name}")[0] for name in ("accuracy", "macro_f1", "loss", "majority_baseline")
    )
    assert f"| test | {accuracy:.2%} | {f1:.4f} | {loss:.4f} |" in text
    assert f"| test, majority baseline | {baseline:.2%} | | |" in text
    assert f"{events(run, 'general_perplexity')[-1]:,.2f} after" in text
    assert "77 train, 12 validation, 4 test examples. Labels: neg, pos." in text
    assert "10 steps in 0:0" in text
    assert "| `--learning-rate` | 0.001 |" in text
    for path in (run.parent.name, "private", "/tmp", str(run)):
        assert path not in text
    assert not list(run.glob("checkpoint-*/README.md"))


def snippets(folder):
    """The Python of a card, as functions that run it on some text in a folder and read what it prints."""
    found = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)

    def answer(code, text):
        assert code.count('"an input like the training data"') == 1
        output = io.StringIO()
        with redirect_stdout(output):
            exec(code.replace('"an input like the training data"', repr(text)), {})
        return output.getvalue()

    return [lambda text, code=code: answer(code, text) for code in found]


def run_commands(folder):
    """Run the command lines of a card that start with the program, and return how many there are."""
    blocks = re.findall(r"```sh\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.removeprefix("python run.py ") for block in blocks for line in block.splitlines()]
    for line in lines:
        assert main([*shlex.split(line), *["--device", "cpu"] * (not line.startswith("export"))]) == 0
    return len(lines)


def test_all_ways_to_use_it_run_and_agree(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run / "final", tmp_path / "moved")  # where no settings of a run lie beside it
    monkeypatch.chdir(tmp_path / "moved")
    by_transformers, by_ft, by_pipeline = snippets(tmp_path / "moved")
    assert run_commands(tmp_path / "moved") == 3
    assert (tmp_path / "gguf" / "model-f32.gguf").exists()
    (by_exported_card,) = snippets(tmp_path / "classifier")
    texts = ["the plot is dull .", "the plot is superb , " * 20, "Zoë's 'quoted' \"text\""]
    expected = ft.load(run, device="cpu").predict(texts)
    for text, prediction in zip(texts, expected, strict=True):
        recorded = ast.literal_eval(by_transformers(text))
        assert list(recorded) == ["neg", "pos"]
        assert recorded == pytest.approx(prediction.probabilities, rel=1e-4)
        assert f"label={prediction.label!r}" in by_ft(text)
        (answer,) = ast.literal_eval(by_pipeline(text))
        assert {each["label"]: each["score"] for each in answer} == pytest.approx(prediction.probabilities, abs=1e-5)
    monkeypatch.chdir(tmp_path / "classifier")
    assert by_exported_card(texts[-1]) == f"[{answer}]\n"


def test_a_card_of_completions_runs_too(inputs, tmp_path, monkeypatch, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        pq.write_table(
            pa.table({"q": ["the plot", "the cast"] * 4, "a": [" is dull", " is fresh"] * 4}), data / f"{split}.parquet"
        )
    flags = ["--prompt-column", "q", "--completion-column", "a", "--dataset", str(data)]
    assert main([*inputs, *flags, "--output-dir", str(tmp_path / "run")]) == 0
    final = tmp_path / "run" / "final"
    assert metadata_load(final / "README.md")["model-index"][0]["results"][0]["task"]["type"] == "text-generation"
    assert "Completions of prompts." in (final / "README.md").read_text()
    monkeypatch.chdir(final)
    by_transformers, by_pipeline, by_ft = snippets(final)
    assert by_transformers("the plot").strip()
    assert by_transformers("the plot") == by_pipeline("the plot") == by_ft("the plot")
    capsys.readouterr()
    assert run_commands(final) == 2
    assert capsys.readouterr().out.startswith(by_ft("an input like the training data"))


def make_card(labels=("neg", "pos"), **settings):
    examples, lengths = {"train": [0] * 1200, "validation": [0]}, {"train": [8] * 1100 + [40] * 100}
    data = SimpleNamespace(examples=examples, lengths=lengths, label_names=labels, label_ids=[5, 7])
    state = State(step=3, best_step=2, best_accuracy=0.75, best_loss=0.5, last_accuracy=0.5, last_loss=0.7)
    outcome = Outcome(state, Evaluation(0.25, 0.875), 61.2)
    return model_card(Config(**settings), data, outcome, num_parameters=124_439_808, device="cpu in fp32")


def test_what_comes_from_the_hub_is_named_and_linked(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(make_card(), encoding="utf-8")
    card = ModelCard.load(path)
    assert card.data.base_model == Config.model
    assert card.data.datasets == [Config.dataset]
    assert {each.dataset_type for each in card.data.eval_results} == {Config.dataset}
    assert "(https://huggingface.co/datasets/cornell-movie-review-data/rotten_tomatoes)" in card.text
    assert "(https://huggingface.co/openai-community/gpt2)" in card.text
    from_nothing = make_card(init="random")
    assert "trained from random weights" in from_nothing
    assert "| validation, at best by accuracy (step 2) | 75.00% | 0.5000 |" in from_nothing


def settings_in(card):
    """The rows of the table of settings, as a reader sees them."""
    rows = re.findall(r"^\| `(.*?)` \| (.*) \|$", card.partition("## Settings")[2], re.MULTILINE)
    return {name: re.sub(r"\\(.)", r"\1", value) for name, value in rows}


def test_the_settings_include_which_parameters_were_trained():
    of_all = settings_in(make_card())
    assert of_all["--learning-rate"] == "2e-05"
    assert not {name for name in of_all if "lora" in name} | of_all.keys() & {"--train-only", "--freeze", "--adapter"}
    given = {"lora_rank": 4, "lora_targets": ("c_attn", "last:2"), "train_only": ("*.bias",), "freeze": ("h.0.*",)}
    of_lora = settings_in(make_card(**given))
    expected = {"--lora-rank": "4", "--lora-targets": "c_attn last:2", "--train-only": "*.bias", "--freeze": "h.0.*"}
    assert of_lora == of_all | expected
    assert settings_in(make_card(adapter="/home/secret")) == of_all | {"--adapter": "a local adapter"}


@pytest.mark.parametrize("name", ["./a", "/a/b", "a/b/c", "~/a", "..", "a\\b", "C:/a", "a b/c", "ä/b", "here"])
def test_a_local_path_is_no_id(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_id(name) is None


def test_what_a_hub_id_is():
    assert [hub_id(name) for name in ("gpt2", "a-b/c.d_e")] == ["gpt2", "a-b/c.d_e"]


HOSTILE = (
    "a|b",
    "`code`",
    "<script>alert(1)</script>",
    "[x](http://y)",
    "---\nlicense: mit",
    "{braces}",
    "😀 'q\" \\",
    "# h",
)


def test_hostile_names_stay_text(tmp_path):
    markdown_it = pytest.importorskip("markdown_it")
    path = tmp_path / "README.md"
    path.write_text(make_card(HOSTILE, model="./<b>: - *x*", dataset="./#'\"|"), encoding="utf-8")
    card = ModelCard.load(path)
    assert "license" not in yaml.safe_load(card.content.split("---\n")[1])
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(card.text)
    assert not [token for token in tokens if token.type == "html_block"]
    inline = next(token for token in tokens if token.type == "inline" and "Labels" in token.content)
    assert {child.type for child in inline.children} == {"text"}
    shown = "".join(child.content for child in inline.children)
    assert shown.endswith("Labels: " + ", ".join(" ".join(name.split()) for name in HOSTILE) + ".")
    code = next(token.content for token in tokens if token.type == "fence")
    assert ast.literal_eval(re.search(r"^labels = (.*)$", code, re.MULTILINE)[1]) == list(HOSTILE)


def test_where_a_model_was_loaded_from_is_not_passed_on(inputs, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(inputs[1], model)
    published = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**published, "_name_or_path": "/home/somebody/secret"}))
    assert main([*inputs, "--model", str(model), "--max-steps", "1", "--output-dir", str(tmp_path / "run")]) == 0
    for name in ("config.json", "README.md"):
        assert "secret" not in (tmp_path / "run" / "final" / name).read_text(encoding="utf-8")
