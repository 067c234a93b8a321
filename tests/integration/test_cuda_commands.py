"""Commands that ask a finished model, on an NVIDIA GPU against the CPU and `transformers`.

As in `test_cuda_training.py`, each body takes a device and runs on the CPU everywhere. Tokens that are chosen greedily
are expected to be equal; probabilities and losses within the tolerance that a test states.
"""

import json

import pytest
import torch
import transformers

from ft.cli.main import main
from ft.data.examples import Example
from ft.device import choose_device, choose_precision
from ft.evaluation.evaluate import evaluate
from ft.inference.classifier import load
from ft.inference.language_model import load_language_model

TEXTS = [
    "a gorgeous , witty film",
    "two hours that i want back",
    "so so",
    "the plot is dull , but the cast is superb .",
]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run of 20 steps on the CPU."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main([*inputs, "--max-steps", "20", "--precision", "fp32", "--output-dir", str(run)]) == 0
    return run


def test_greedy_tokens_are_those_of_transformers(finished, device):
    model = load_language_model(finished, device=device)
    stream = model.stream("the film", max_new_tokens=24)
    "".join(stream)
    reference = transformers.AutoModelForCausalLM.from_pretrained(finished / "final").eval()
    ids = torch.tensor([model.tokenizer.encode("the film").ids])
    expected = reference.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert list(stream.token_ids) == expected[: len(stream.token_ids)]


def test_drawn_tokens_follow_from_the_seed(finished, device):
    """The generator lies on the CPU, so that a seed draws the same on every device."""
    texts = [
        load_language_model(finished, device=name).generate("the film", max_new_tokens=12, seed=3, temperature=1.0)
        for name in (device, device, "cpu")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_probabilities_are_those_of_the_cpu(finished, device):
    """Within 1e-4."""
    ours, expected = (load(finished, device=name).predict(TEXTS) for name in (device, "cpu"))
    assert [each.label for each in ours] == [each.label for each in expected]
    for each, other in zip(ours, expected, strict=True):
        assert each.probabilities == pytest.approx(other.probabilities, abs=1e-4)


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_command_says_the_same_as_on_the_cpu(finished, device, capsys, command):
    """Numbers within 1e-4."""
    answers = []
    for name in (device, "cpu"):
        texts = TEXTS if command == "predict" else []
        assert main([command, str(finished), *texts, "--json", "--device", name]) == 0
        answers.append(capsys.readouterr().out)
    ours, expected = (numbers_of(text) for text in answers)
    assert ours == pytest.approx(expected, abs=1e-4)


def numbers_of(text):
    """All numbers in JSON, in order."""
    numbers = []
    for line in text.splitlines() if text.startswith('{"') else [text]:
        json.loads(line, parse_float=lambda number: numbers.append(float(number)), parse_int=lambda _: None)
    assert numbers
    return numbers


def test_explain_goes_through_a_step(inputs, device, capsys):
    assert main(["explain", *inputs, "--row", "3", "--device", device]) == 0
    assert "gradient" in capsys.readouterr().out


def test_a_split_is_evaluated_as_on_the_cpu(finished, device):
    """Loss within 1e-4, and as much accuracy; many targets, in batches that are cut by their number."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(300, (30, 20), generator=generator).tolist()
    examples = [Example(row, row[: 1 + number % 9]) for number, row in enumerate(rows)]
    results = []
    for name in (device, "cpu"):
        chosen = choose_device(name)
        model = load_language_model(finished, device=name).model
        precision = choose_precision("fp32", chosen)
        results.append(evaluate(model, examples, [], batch_size=64, precision=precision))
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-4)
    assert results[0].accuracy == pytest.approx(results[1].accuracy, abs=0.02)
