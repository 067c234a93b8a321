"""The weighted loss against PyTorch's, and the balanced weights against scikit-learn's figures."""

import dataclasses
import json
import math

import pytest
import torch
import transformers
from torch import nn

from ft.cli.main import main
from ft.config import Config
from ft.data.batches import collate, collate_padded
from ft.data.examples import Example
from ft.device import Precision
from ft.model.gpt2 import GPT2, GPT2Config
from ft.train.class_weights import TargetWeights, balanced_weights
from ft.train.loop import Components, StepRecorder, train
from ft.train.optim import build_optimizer
from ft.train.state import State
from tests.conftest import write_parquet

TINY = GPT2Config(
    vocab_size=97, n_positions=16, n_embd=16, n_layer=2, n_head=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
)
CPU = torch.device("cpu")
LABEL_IDS = [5, 11, 40]


def padded(examples):
    return collate_padded(examples, batch_size=4, max_length=13)


def make_examples(n):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (n,), generator=generator).tolist()
    labels = torch.multinomial(torch.tensor([0.8, 0.15, 0.05]), n, replacement=True, generator=generator).tolist()
    return [
        Example(torch.randint(97, (k,), generator=generator).tolist(), [LABEL_IDS[label]])
        for k, label in zip(lengths, labels, strict=True)
    ]


@pytest.mark.parametrize(
    ("labels", "num_labels", "expected"),  # compute_class_weight("balanced", classes=np.unique(y), y=y), version 1.9.1
    [
        ([0] * 95 + [1] * 5, 2, [0.52631579, 10.0]),
        ([0] * 6 + [2] * 3 + [3], 5, [0.55555556, 1.11111111, 3.33333333]),
    ],
)
def test_balanced_weights_are_those_of_scikit_learn(labels, num_labels, expected):
    weights = balanced_weights(labels, num_labels)
    assert [weights[label] for label in sorted(set(labels))] == pytest.approx(expected, rel=1e-7)
    assert [weights[label] for label in set(range(num_labels)) - set(labels)] == [0.0] * (num_labels - len(expected))
    assert sum(weights[label] for label in labels) == pytest.approx(len(labels))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("collate_function", [collate, padded])
def test_a_step_is_that_of_pytorchs_weighted_cross_entropy(accumulation, collate_function):
    """Over all batches of the step together, with the last step of the epoch and its last batch short."""
    weights = [0.5, 2.0, 7.0]
    examples = make_examples(34)
    model = GPT2(TINY)
    model.init_weights(0)
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{field.name: getattr(TINY, field.name) for field in dataclasses.fields(TINY)})
    ).eval()
    reference.transformer.load_state_dict(model.state_dict())
    of_tokens = torch.ones(97)
    of_tokens[LABEL_IDS] = torch.tensor(weights)
    criterion, adam = nn.CrossEntropyLoss(weight=of_tokens), torch.optim.AdamW(reference.parameters(), 1e-3)

    steps = math.ceil(34 / (4 * accumulation))
    config = Config(
        batch_size=4,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        lr_schedule="constant",
        eval_steps=1000,
        save_steps=1000,
    )
    hooks, choice = StepRecorder(), Precision("fp32", "", CPU)
    components = Components(
        model,
        build_optimizer(model, 1e-3, 0.01),
        choice.grad_scaler(),
        choice,
        target_weights=TargetWeights.of(weights, LABEL_IDS, 97, CPU),
    )
    train(components, examples, collate_function, config, State(), hooks)
    assert len(hooks.logged) == steps

    order = torch.randperm(34, generator=torch.Generator().manual_seed(42)).tolist()
    for number, logged in enumerate(hooks.logged):
        read = [examples[row] for row in order[number * 4 * accumulation :][: 4 * accumulation]]
        logits = torch.cat([reference(torch.tensor([example.input_ids])).logits[:, -1] for example in read])
        loss = criterion(logits, torch.tensor([example.target_ids[0] for example in read]))
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), math.inf)
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4), number
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), number
        adam.step()


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unequal")
    for split, count in (("train", 40), ("validation", 20)):
        labels = [0 if row % 10 == 3 else 1 for row in range(count)]
        texts = [f"the plot is {'dull' if label == 0 else 'superb'} number {row}" for row, label in enumerate(labels)]
        write_parquet(folder / f"{split}.parquet", texts, labels)
    return ["--dataset", str(folder)]


def test_a_run_records_its_weights_and_evaluates_without_them(inputs, unequal, tmp_path, capsys, monkeypatch):
    run, plain = tmp_path / "run", tmp_path / "plain"
    computed = []

    def recorded(*arguments):
        computed.append(balanced_weights(*arguments))
        return computed[-1]

    monkeypatch.setattr("ft.train.class_weights.balanced_weights", recorded)
    flags = [*inputs, *unequal, "--max-steps", "5", "--logging-steps", "1", "--learning-rate", "0"]
    assert main([*flags, "--class-weights", "balanced", "--output-dir", str(run)]) == 0
    weights = "Training losses are weighted by class: neg 5, pos 0.5556; losses of evaluations are not weighted."
    assert weights in capsys.readouterr().out
    assert len(computed) == 1, "loss, console and model card have the same"
    assert json.loads((run / "config.json").read_text())["class_weights"] == "balanced"
    card = (run / "final" / "README.md").read_text()
    assert "| `--class-weights` | balanced |" in card
    assert "weighted by class: neg 5, pos 0.5556;" in card
    assert main([*flags, "--output-dir", str(plain)]) == 0
    assert "weighted" not in capsys.readouterr().out + (plain / "final" / "README.md").read_text()
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (run, plain)
    )
    assert [line["eval_loss"] for line in ours if "eval_loss" in line] == [
        line["eval_loss"] for line in theirs if "eval_loss" in line
    ]
    assert [line["loss"] for line in ours if "loss" in line] != [line["loss"] for line in theirs if "loss" in line]
    assert main(["--resume", str(run), "--class-weights", "1,2"]) == 2
    assert "--class-weights was 'balanced' and would be '1,2'" in capsys.readouterr().err
    assert main(["--resume", str(run), "--max-steps", "6"]) == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1,2,3", "has 3 of 2 weights: give one for each of the labels neg, pos, in this order"),
        ("1,0", "it must be balanced, or one number from 1e-09 to 1e+09 for each label"),
        ("1,-2", "it must be balanced, or one number from 1e-09"),
        ("1,nan", "it must be balanced, or one number from 1e-09"),
        ("1,inf", "it must be balanced, or one number from 1e-09"),
        ("even", "--class-weights is 'even', it must be balanced"),
        ("", "--class-weights is empty"),
    ],
)
def test_weights_that_do_not_fit_are_refused(inputs, unequal, tmp_path, capsys, value, words):
    flags = [*inputs, *unequal, f"--class-weights={value}", "--output-dir", str(tmp_path / "run")]
    assert main(flags) == 2
    assert words in capsys.readouterr().err


def test_completions_have_no_classes(tmp_path, capsys):
    for value in ("balanced", "1,2"):
        assert main(["--completion-column", "answer", "--class-weights", value]) == 2
        assert "--class-weights are of labels, and with --completion-column there are none" in capsys.readouterr().err
