"""Loss, accuracy and probabilities against `transformers`' model, one example at a time."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import transformers

from ft.data.examples import Example, encode, label_tokens, read_tokenizer
from ft.data.splits import Split
from ft.device import Precision
from ft.evaluation.classification import majority_baseline, majority_label, scores
from ft.evaluation.evaluate import evaluate
from ft.inference.classifier import predict
from ft.model.gpt2 import GPT2, GPT2Config

TINY = GPT2Config(vocab_size=97, n_positions=24, n_embd=24, n_layer=2, n_head=3)
LABEL_IDS = [50, 7, 31]
FP32 = Precision("fp32", "", torch.device("cpu"))


def make_model(dtype=torch.float64, config=TINY, seed=0):
    model = GPT2(config).to(dtype)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():  # large enough that the examples' likeliest labels differ
        for parameter in model.parameters():
            parameter += torch.empty(parameter.shape, dtype=torch.float32).normal_(0, 0.3, generator=generator)
    return model


def make_reference(model):
    config = transformers.GPT2Config(
        **{field.name: getattr(model.config, field.name) for field in dataclasses.fields(model.config)}
    )
    reference = transformers.GPT2LMHeadModel(config).to(model.wte.weight.dtype)
    reference.transformer.load_state_dict(model.state_dict())
    return reference.eval()


def make_examples(number=40, targets=1, seed=2):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(number):
        length = int(torch.randint(targets, 20, (), generator=generator))
        labels = torch.randint(len(LABEL_IDS), (targets,), generator=generator)
        input_ids = torch.randint(TINY.vocab_size, (length,), generator=generator).tolist()
        examples.append(Example(input_ids, [LABEL_IDS[label] for label in labels.tolist()]))
    return examples


@torch.no_grad()
def plain_evaluation(model, examples):
    """Mean loss and share of right labels, each example by itself through the reference."""
    reference, losses, hits = make_reference(model), [], []
    for input_ids, target_ids in examples:
        logits = reference(torch.tensor([input_ids])).logits[0, -len(target_ids) :]
        for row, target in zip(logits, target_ids, strict=True):
            losses.append(F.cross_entropy(row.float(), torch.tensor(target)).item())
            hits.append(max(LABEL_IDS, key=lambda token: row[token].item()) == target)
    return math.fsum(losses) / len(losses), sum(hits) / len(hits)


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_accuracy_equal_a_plain_computation(dtype, targets):
    model, examples = make_model(dtype), make_examples(targets=targets)
    loss, accuracy = plain_evaluation(model, examples)
    result = evaluate(model, examples, LABEL_IDS, batch_size=7, precision=FP32)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.accuracy == accuracy
    assert 0.1 < accuracy < 0.9, "right and wrong answers must occur for this test to say anything"
    assert (type(result.loss), type(result.accuracy)) == (float, float)


def test_probabilities_are_of_the_labels_in_the_order_of_the_examples():
    model, examples = make_model(), make_examples()
    reference = make_reference(model)
    with torch.no_grad():
        logits = [reference(torch.tensor([input_ids])).logits[0, -1:] for input_ids, _ in examples]
    expected = torch.cat(logits)[:, LABEL_IDS].softmax(dim=-1).float()
    result = evaluate(model, examples, LABEL_IDS, batch_size=7, precision=FP32)
    torch.testing.assert_close(result.probabilities, expected)


@pytest.mark.parametrize("targets", [1, 3])
def test_without_labels_all_tokens_compete_for_each_target(targets):
    model, examples = make_model(), make_examples(targets=targets)
    reference = make_reference(model)
    hits = 0
    with torch.no_grad():
        examples = [
            Example(ids, reference(torch.tensor([ids])).logits[0, -targets:].argmax(-1).tolist())
            if row % 3
            else example
            for row, example in enumerate(examples)
            for ids in [example.input_ids]
        ]
        for input_ids, target_ids in examples:
            likeliest = reference(torch.tensor([input_ids])).logits[0, -targets:].argmax(dim=-1)
            hits += (likeliest == torch.tensor(target_ids)).sum().item()
    result = evaluate(model, examples, [], batch_size=7, precision=FP32)
    assert result.accuracy == hits / (targets * len(examples))
    assert 0.6 < result.accuracy < 1
    assert result.probabilities is None


def test_the_logits_of_completions_are_bounded(monkeypatch):
    """By the targets of a batch, whatever --eval-batch-size says."""
    model, rows = make_model(), []
    examples = [example for targets in (1, 2, 5) for example in make_examples(15, targets=targets, seed=targets)]
    expected = evaluate(model, examples, [], batch_size=64, precision=FP32)
    model.register_forward_hook(lambda module, inputs, logits: rows.append(len(logits)))
    monkeypatch.setattr("ft.data.batches.MOST_TARGETS", 9)
    result = evaluate(model, examples, [], batch_size=64, precision=FP32)
    assert max(rows) <= 9
    assert sum(rows) == 15 * (1 + 2 + 5)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.accuracy == expected.accuracy


@pytest.mark.parametrize("batch_size", [1, 3, 39, 1000])
def test_the_batch_size_changes_nothing(batch_size):
    model, examples = make_model(), make_examples()
    expected = evaluate(model, examples, LABEL_IDS, batch_size=40, precision=FP32)
    result = evaluate(model, examples, LABEL_IDS, batch_size=batch_size, precision=FP32)
    # Batches are of unequal size here: a mean of their means would differ in the second decimal.
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.accuracy == expected.accuracy


def test_the_order_of_the_examples_changes_nothing():
    model, examples = make_model(), make_examples()
    expected = evaluate(model, examples, LABEL_IDS, batch_size=8, precision=FP32)
    result = evaluate(model, examples[::-1], LABEL_IDS, batch_size=8, precision=FP32)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.accuracy == expected.accuracy


def test_only_label_tokens_compete_for_the_prediction():
    model, examples = make_model(), make_examples()
    expected = evaluate(model, examples, LABEL_IDS, batch_size=8, precision=FP32)
    with torch.no_grad():
        logits = [make_reference(model)(torch.tensor([input_ids])).logits[0, -1] for input_ids, _ in examples]
    likeliest_of_all = [int(row.argmax()) for row in logits]
    assert not set(likeliest_of_all) <= set(LABEL_IDS), "other tokens must win somewhere for this test to say anything"
    over_everything = sum(token == target for token, (_, (target,)) in zip(likeliest_of_all, examples, strict=True))
    assert expected.accuracy > over_everything / len(examples)
    assert evaluate(model, examples, LABEL_IDS[::-1], batch_size=8, precision=FP32)[:2] == expected[:2]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_the_random_state_stay_and_nothing_is_dropped(training):
    config = dataclasses.replace(TINY, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    model, examples = make_model(config=config).train(training), make_examples()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    result = evaluate(model, examples, LABEL_IDS, batch_size=8, precision=FP32)
    assert torch.equal(torch.get_rng_state(), state)
    assert {module.training for module in model.modules()} == {training}
    again = evaluate(make_model(), examples, LABEL_IDS, batch_size=8, precision=FP32)
    assert result[:2] == again[:2]
    assert torch.equal(result.probabilities, again.probabilities)


def test_evaluating_leaves_weights_and_gradients_alone():
    model, examples = make_model(), make_examples()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    evaluate(model, examples, LABEL_IDS, batch_size=8, precision=FP32)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.requires_grad
        assert (parameter.grad == 1).all()


def test_in_bf16_the_loss_is_near_and_summed_in_fp32():
    model, examples = make_model(torch.float32), make_examples()
    expected = evaluate(model, examples, LABEL_IDS, batch_size=8, precision=FP32)
    result = evaluate(model, examples, LABEL_IDS, batch_size=8, precision=Precision("bf16", "", torch.device("cpu")))
    assert result.loss != expected.loss, "the format must be at work for this test to say anything"
    assert result.loss == pytest.approx(expected.loss, rel=0.02)


# --- macro F1 and the majority baseline -------------------------------------------------------------------------------


def f1_by_definition(true, predicted):
    """scikit-learn's f1_score(average="macro"), from its documentation: over the classes that occur in either list."""
    found = []
    for label in sorted({*true, *predicted}):
        pairs = list(zip(true, predicted, strict=True))
        hits = sum(pair == (label, label) for pair in pairs)
        false_alarms = sum(p == label != t for t, p in pairs)
        misses = sum(t == label != p for t, p in pairs)
        found.append(2 * hits / (2 * hits + false_alarms + misses))
    return sum(found) / len(found)


# (true, predicted), f1_score(average="macro") of scikit-learn 1.9.1
KNOWN = [
    ([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], 0.26666666666666666),
    ([0] * 95 + [1] * 5, [0] * 100, 0.48717948717948717),
    ([0, 0, 2, 2, 3], [0, 2, 2, 2, 0], 0.43333333333333335),
]


@pytest.mark.parametrize(("true", "predicted", "expected"), KNOWN)
def test_the_macro_f1_is_that_of_scikit_learn(true, predicted, expected):
    assert f1_by_definition(true, predicted) == pytest.approx(expected, rel=1e-12)
    result = scores(F.one_hot(torch.tensor(predicted), 5).double(), torch.tensor(true))
    assert result.macro_f1 == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_macro_f1_of_random_predictions(seed):
    generator = torch.Generator().manual_seed(seed)
    k, n = 2 + seed % 5, 1 + seed * 3
    labels = torch.randint(k, (n,), generator=generator)
    probabilities = torch.rand(n, k + 1, generator=generator)  # the last class has no examples
    expected = f1_by_definition(labels.tolist(), probabilities.argmax(dim=1).tolist())
    assert scores(probabilities, labels).macro_f1 == pytest.approx(expected, rel=1e-12)


def test_an_evaluation_has_the_macro_f1_of_its_predictions():
    model, examples = make_model(), make_examples()
    result = evaluate(model, examples, LABEL_IDS, batch_size=7, precision=FP32)
    true = [LABEL_IDS.index(example.target_ids[0]) for example in examples]
    expected = f1_by_definition(true, result.probabilities.argmax(dim=1).tolist())
    assert result.macro_f1 == pytest.approx(expected, rel=1e-12)
    assert result.macro_f1 != result.accuracy
    assert evaluate(model, examples, [], batch_size=7, precision=FP32).macro_f1 is None


@pytest.mark.parametrize(("labels", "majority"), [([1, 0, 1], 1), ([2, 1, 2, 1, 0], 1), ([0], 0)])
def test_the_majority_label_is_the_most_frequent_and_of_several_the_first(labels, majority):
    assert majority_label(labels) == majority


def test_the_majority_baseline_is_of_the_training_labels():
    assert majority_baseline([1] * 95 + [0] * 5, [0, 0, 1, 0]) == 0.25
    assert majority_baseline([2], [0, 1]) == 0.0


# --- predict ----------------------------------------------------------------------------------------------------------

TEXTS = [
    "the plot is superb .",
    "",
    "the acting is never less than dull , and the ending is weak , but the score manages to lift the film .",
    "dull",
    "although the cast is witty , the camera fails to save the film .",
]


@pytest.fixture(scope="module")
def demo_model(demo_inputs):
    """A model with the demo's tokenizer and weights that tell the labels apart."""
    tokenizer = read_tokenizer(demo_inputs[0] / "tokenizer.json")
    return make_model(config=dataclasses.replace(TINY, vocab_size=tokenizer.get_vocab_size())), tokenizer


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("names", [("neg", "pos"), ("pos", "neg", "a")])
def test_probabilities_are_a_softmax_over_the_label_tokens(demo_model, batch_size, names):
    model, tokenizer = demo_model
    label_ids = label_tokens(names, tokenizer)
    examples = encode(Split("given", TEXTS, [0] * len(TEXTS)), tokenizer, label_ids, max_length=12)
    reference = make_reference(model)
    with torch.no_grad():
        logits = torch.stack([reference(torch.tensor([example.input_ids])).logits[0, -1] for example in examples])
    expected = logits[:, label_ids].float().softmax(dim=-1)
    result = predict(model, tokenizer, TEXTS, label_ids, max_length=12, batch_size=batch_size)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert result.shape == (len(TEXTS), len(names))
    torch.testing.assert_close(result.sum(dim=-1), torch.ones(len(TEXTS)))
    assert result.max(dim=-1).values.std() > 0.01, "texts must differ for this test to say anything"


def test_no_texts_have_no_probabilities(demo_model):
    assert predict(*demo_model, [], [1, 2], max_length=12).shape == (0, 2)


@pytest.mark.parametrize("training", [True, False])
def test_predicting_keeps_the_mode_and_the_random_state(demo_model, training):
    model, tokenizer = demo_model
    config = dataclasses.replace(model.config, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    dropping = make_model(config=config).train(training)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    result = predict(dropping, tokenizer, TEXTS, [1, 2], max_length=12)
    assert torch.equal(torch.get_rng_state(), state)
    assert {module.training for module in dropping.modules()} == {training}
    assert torch.equal(result, predict(model, tokenizer, TEXTS, [1, 2], max_length=12))
    assert not result.requires_grad
