"""The exported classifier, by `transformers`: the tokens that a run feeds, and the probabilities of `ft.load`."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import ft
from ft.cli.main import main
from ft.data.examples import END_OF_TEXT, encode
from ft.data.splits import Split
from tests.reference.synthetic import write_model

TEXTS = [
    "the plot is dull .",
    "",
    " ",
    "the plot is superb , " * 20,
    "a\n\n b\t  c",
    "Zoë's 'quoted' \"text\" 😀 日本",
    f"{END_OF_TEXT}the{END_OF_TEXT} end {END_OF_TEXT}",
    "word " * 17,
    "<|padding|>"[:-1],
]


def random_texts(count):
    generator = random.Random(0)
    return ["".join(generator.choices("abc .,'\n\u00e9\u4e2d the", k=generator.randrange(60))) for _ in range(count)]


def write_run(directory, model, *, labels, max_length):
    """What a run with these settings leaves, without training."""
    final = directory / "final"
    shutil.copytree(model, final)
    config = json.loads((final / "config.json").read_text())
    config |= {"id2label": dict(enumerate(labels)), "label2id": {name: label for label, name in enumerate(labels)}}
    (final / "config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"max_length": max_length}))
    return directory


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "run"
    flags = ["--precision", "fp32", "--max-length", "20", "--max-steps", "20", "--output-dir", str(directory)]
    assert main([*inputs, *flags]) == 0
    assert main(["export", str(directory), "--to", "classifier"]) == 0
    return directory


@pytest.fixture(scope="module", params=["a run", "3 classes", "GPT-2's tokenizer"])
def exported(request, run, demo_inputs, inputs, tmp_path_factory):
    """The directory of a run with an exported classifier."""
    if request.param == "a run":
        return run
    directory = tmp_path_factory.mktemp("other") / "run"
    directory.mkdir()
    if request.param == "3 classes":
        write_run(directory, inputs[1], labels=["bad", "so so", "good"], max_length=9)
    else:
        published = request.getfixturevalue("real_gpt2")
        model = tmp_path_factory.mktemp("real")
        write_model(model, "tiny", seed=2, tokenizer_from=published, n_positions=1024)
        write_run(directory, model, labels=["neg", "pos"], max_length=32)
    assert main(["export", str(directory), "--to", "classifier"]) == 0
    return directory


def test_the_tokens_are_those_of_a_run(exported):
    trained = ft.load(exported, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(exported / "classifier")
    texts = [*TEXTS, *random_texts(200)]
    split = Split("given", texts, [0] * len(texts))
    examples = encode(split, trained.tokenizer, trained.label_ids, trained.max_length)
    assert max(map(len, (example.input_ids for example in examples))) == trained.max_length - 1
    assert tokenizer(texts, truncation=True)["input_ids"] == [example.input_ids for example in examples]
    padded = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    assert sorted(padded) == ["attention_mask", "input_ids"]
    for ids, mask, example in zip(padded["input_ids"], padded["attention_mask"], examples, strict=True):
        assert ids[mask.bool()].tolist() == example.input_ids
        assert set(ids[~mask.bool()].tolist()) <= {tokenizer.pad_token_id}
    assert tokenizer.pad_token_id not in (trained.tokenizer.get_vocab().values())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_pipeline_gives_the_probabilities_of_predict(exported, batch_size):
    trained = ft.load(exported, device="cpu")
    classify = pipeline("text-classification", model=str(exported / "classifier"), truncation=True, top_k=None)
    answers = classify(TEXTS, batch_size=batch_size)
    for answer, expected in zip(answers, trained.predict(TEXTS), strict=True):
        assert {each["label"]: each["score"] for each in answer} == pytest.approx(expected.probabilities, abs=1e-5)
        assert answer[0]["label"] == expected.label


def test_the_model_class_gives_the_probabilities_of_predict(exported):
    trained = ft.load(exported, device="cpu")
    model, about = AutoModelForSequenceClassification.from_pretrained(exported / "classifier", output_loading_info=True)
    assert {name: set(about[name]) for name in about if about[name]} == {}
    assert [model.config.id2label[label] for label in range(model.config.num_labels)] == list(trained.label_names)
    tokenizer = AutoTokenizer.from_pretrained(exported / "classifier")
    for side in ("right", "left"):
        padded = tokenizer(TEXTS, truncation=True, padding=True, return_tensors="pt", padding_side=side)
        # `transformers` numbers positions from the start of a row: padding on the left needs them named.
        positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            rows = model(**padded, position_ids=positions).logits.softmax(-1).tolist()
        for row, expected in zip(rows, trained.predict(TEXTS), strict=True):
            assert row == pytest.approx(list(expected.probabilities.values()), abs=1e-5)


def test_training_goes_on_in_transformers(run):
    """The loss of the exported classifier is that of the run: cross-entropy over the labels, by `problem_type`."""
    model = AutoModelForSequenceClassification.from_pretrained(run / "classifier")
    tokenizer = AutoTokenizer.from_pretrained(run / "classifier")
    batch = tokenizer(TEXTS[:2], truncation=True, padding=True, return_tensors="pt")
    result = model(**batch, labels=torch.tensor([0, 1]))
    expected = ft.load(run, device="cpu").predict(TEXTS[:2])
    likelihoods = torch.tensor([expected[0].probabilities["neg"], expected[1].probabilities["pos"]])
    assert result.loss.item() == pytest.approx(-likelihoods.log().mean().item(), abs=1e-5)
    result.loss.backward()
    assert model.score.weight.grad.abs().sum() > 0


def test_the_shortest_examples_are_end_of_text_alone(inputs, tmp_path):
    (tmp_path / "run").mkdir()
    run = write_run(tmp_path / "run", inputs[1], labels=["neg", "pos"], max_length=2)
    assert main(["export", str(run), "--to", "classifier"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(run / "classifier")
    assert tokenizer(["the plot", ""], truncation=True)["input_ids"] == [[tokenizer.eos_token_id]] * 2


def test_the_padding_token_is_a_new_one_and_has_a_row(inputs, tmp_path):
    """Also if the tokenizer has a token of that name, and if the embedding has rows beyond the tokenizer's."""
    from tokenizers import Tokenizer

    model = tmp_path / "model"
    shutil.copytree(inputs[1], model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|padding|>"])
    tokenizer.save(str(model / "tokenizer.json"))
    config = json.loads((model / "config.json").read_text())
    spare = tokenizer.get_vocab_size() + 3
    write_model(tmp_path / "larger", "tiny", seed=1, **{**config, "vocab_size": spare})
    shutil.copy(model / "tokenizer.json", tmp_path / "larger")
    (tmp_path / "run").mkdir()
    run = write_run(tmp_path / "run", tmp_path / "larger", labels=["neg", "pos"], max_length=20)
    assert main(["export", str(run), "--to", "classifier"]) == 0
    assert len(load_file(run / "classifier" / "model.safetensors")["transformer.wte.weight"]) == spare
    exported = AutoTokenizer.from_pretrained(run / "classifier")
    assert exported.pad_token_id == spare - 3
    texts = ["the <|padding|> plot", "dull"]
    classify = pipeline("text-classification", model=str(run / "classifier"), truncation=True, top_k=None)
    for answer, expected in zip(classify(texts, batch_size=2), ft.load(run, device="cpu").predict(texts), strict=True):
        assert {each["label"]: each["score"] for each in answer} == pytest.approx(expected.probabilities, abs=1e-5)
