"""Weights cast once per step: the numbers of autocast, which casts at each use, and fewer kernels."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ft.config import Config
from ft.data.batches import collate
from ft.data.examples import Example
from ft.device import Precision
from ft.evaluation.evaluate import evaluate
from ft.model import matmul
from ft.model.freeze import freeze
from ft.model.gpt2 import GPT2, GPT2Config
from ft.train.loop import Components, StepRecorder, train
from ft.train.optim import build_optimizer
from ft.train.state import State

TINY = GPT2Config(vocab_size=97, n_positions=16, n_embd=16, n_layer=3, n_head=2)
CPU = torch.device("cpu")
NEVER = 10**9
needs_amx = pytest.mark.skipif(not matmul.has_amx(), reason="this processor has no AMX")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_examples(n):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (n,), generator=generator).tolist()
    return [Example(torch.randint(97, (k,), generator=generator).tolist(), [5 + k % 2]) for k in lengths]


def trained(precision="bf16", *, half, checkpointing="none", frozen=(), accumulation=1, p=0.1, steps=6):
    """Losses and gradient norms of some steps, and the model they end in."""
    model = GPT2(dataclasses.replace(TINY, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p))
    model.init_weights(0)
    freeze(model, (), frozen)
    model.activation_checkpointing = checkpointing
    if half:
        model.keep_half_weights(DTYPES[precision])
    torch.manual_seed(0)
    choice = Precision(precision, "", CPU)
    hooks = StepRecorder()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=precision == "fp16")
    train(
        Components(model, build_optimizer(model, 1e-3, 0.0), scaler, choice),
        make_examples(60),
        collate,
        Config(
            batch_size=4,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            logging_steps=1,
            eval_steps=NEVER,
            save_steps=NEVER,
        ),
        State(),
        hooks,
    )
    return [(each["loss"], each["grad_norm"]) for each in hooks.logged], model


@pytest.fixture(autouse=True)
def no_amx(monkeypatch):
    """With AMX a CPU needs no copies for bf16."""
    monkeypatch.setattr(matmul, "has_amx", lambda: False)


@pytest.fixture
def head_as_autocast_has_it(monkeypatch):
    monkeypatch.setattr("ft.model.gpt2.FP32_HEAD_ROWS", 0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "fp16"},
        {"checkpointing": "full"},
        {"checkpointing": "selective"},
        {"accumulation": 3, "steps": 4},
        {"frozen": ("h.0.*", "*.c_proj.*", "wte.weight")},
    ],
    ids=str,
)
def test_every_bit_is_that_of_autocast(settings, head_as_autocast_has_it):
    losses, model = trained(half=True, **settings)
    expected_losses, expected = trained(half=False, **settings)
    assert losses == expected_losses
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.dtype == torch.float32


class Casts(TorchDispatchMode):
    """Records the casts between formats: of how many numbers each is, and those of several tensors at once."""

    def __init__(self):
        super().__init__()
        self.single, self.together = [], []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype != arguments[0].dtype:
            self.single.append(result.numel())
        if function is torch.ops.aten._foreach_copy_.default:
            self.together.append((len(arguments[0]), arguments[0][0].dtype))
        return result


def test_weights_are_cast_together_once_per_step_and_gradients_once_per_block(monkeypatch):
    with Casts() as now:
        trained(half=True, p=0.0, steps=5)
    monkeypatch.setattr("ft.model.gpt2.FP32_HEAD_ROWS", 0)
    with Casts() as before:
        trained(half=False, p=0.0, steps=5)
    assert now.together.count((24, torch.bfloat16)) == 1 + 5, "at the start, and after each step"
    assert now.together.count((8, torch.float32)) == 3 * 5
    assert len(now.together) == 6 + 15
    of_weights = 2 * 24 + 2  # all weights of the blocks, and the head, forward and backward; the last splits c_attn
    assert len(before.single) - len(now.single) >= 5 * of_weights
    table = 97 * 16
    assert before.single.count(table) == 2 * 5
    assert now.single.count(table) == 0, "the head is in fp32"


def test_many_rows_take_the_head_in_half_precision():
    model = GPT2(TINY).eval()
    model.init_weights(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for rows, dtype in ((32, torch.float32), (33, torch.bfloat16)):
            batch = collate([Example([1, 2, 3], [5])] * rows)
            assert model(batch.input_ids, batch.packing, batch.selection).dtype == dtype


def test_evaluation_reads_the_copies_of_the_newest_weights(head_as_autocast_has_it):
    _, model = trained(half=True)
    precision = Precision("bf16", "", CPU)
    examples = make_examples(20)
    ours = evaluate(model, examples, [5, 6], batch_size=7, precision=precision)
    plain = evaluate(model, examples, [5, 6], batch_size=7, precision=Precision("fp32", "", CPU))
    model.half_weights = None
    theirs = evaluate(model, examples, [5, 6], batch_size=7, precision=precision)
    assert ours.loss == theirs.loss
    assert torch.equal(ours.probabilities, theirs.probabilities)
    assert ours.loss != plain.loss, "outside autocast the fp32 weights are read"


@pytest.mark.parametrize("amx", [False, pytest.param(True, marks=needs_amx)])
def test_losses_and_gradients_are_as_near_to_fp32_as_those_of_transformers_under_autocast(monkeypatch, amx):
    from transformers import GPT2Config as PublishedConfig
    from transformers import GPT2LMHeadModel

    monkeypatch.setattr(matmul, "has_amx", lambda: amx)
    model = GPT2(dataclasses.replace(TINY, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    model.init_weights(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 5  # so that formats differ
    published = PublishedConfig(**dataclasses.asdict(model.config), attn_implementation="sdpa")
    reference = GPT2LMHeadModel(published)
    reference.transformer.load_state_dict(dict(model.named_parameters()))
    reference.tie_weights()
    model.keep_half_weights(torch.bfloat16)
    assert (model.half_weights is None) is amx
    examples = [Example(e.input_ids, e.target_ids) for e in make_examples(8)]

    def of_reference(half):
        reference.zero_grad()
        losses = []
        for example in examples:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = reference(torch.tensor([example.input_ids])).logits[0, -1:]
            losses.append(F.cross_entropy(logits.float(), torch.tensor(example.target_ids)))
        sum(losses).backward()
        named = reference.transformer.named_parameters()
        return torch.stack(losses).detach(), {name: parameter.grad for name, parameter in named}

    exact, exact_gradients = of_reference(half=False)
    exact_gradients = {name: gradient.clone() for name, gradient in exact_gradients.items()}
    rounded, rounded_gradients = of_reference(half=True)
    batch = collate(examples)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.input_ids, batch.packing, batch.selection)
    losses = F.cross_entropy(logits, batch.target_ids, reduction="none")
    losses.sum().backward()
    assert (losses.detach() - exact).norm() <= (1.0 if amx else 1.5) * (rounded - exact).norm()
    for name, parameter in model.named_parameters():
        error, allowed = (
            (parameter.grad - exact_gradients[name]).norm(),
            rounded_gradients[name] - exact_gradients[name],
        )
        assert error <= (1.2 if amx else 2) * allowed.norm() + 1e-6, name


def test_a_job_keeps_copies_where_it_computes_in_half_precision(inputs, tmp_path, monkeypatch):
    from ft import finetune, setup
    from ft.cli.main import main

    seen = {}

    def no_training(components, *_):
        seen[name] = components.model.half_weights
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "train", no_training)
    monkeypatch.setattr(setup, "compile_blocks", lambda *_: None)
    for name, flags in {
        "fp32": ["--precision", "fp32"],
        "bf16": ["--precision", "bf16"],
        "fp16": ["--precision", "fp16"],
        "compiled": ["--precision", "bf16", "--compile", "default"],
        "sharded": ["--precision", "bf16", "--shard"],
    }.items():
        with contextlib.suppress(KeyboardInterrupt):
            main([*inputs, *flags, "--output-dir", str(tmp_path / name)])
    assert {name for name, copies in seen.items() if copies is not None} == {"bf16", "fp16"}
    assert set(seen) == {"fp32", "bf16", "fp16", "compiled", "sharded"}
