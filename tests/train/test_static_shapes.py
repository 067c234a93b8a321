"""Batches whose shapes never change: the same losses and gradients, one compilation, no waiting for the device."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ft.config import Config
from ft.data.batches import collate, collate_padded
from ft.data.examples import Example
from ft.device import Precision
from ft.errors import UsageError
from ft.model.compile import compile_blocks, eager_mode
from ft.model.gpt2 import GPT2, GPT2Config
from ft.train.loop import Components, StepRecorder, train
from ft.train.optim import build_optimizer
from ft.train.state import State

TINY = GPT2Config(vocab_size=97, n_positions=16, n_embd=16, n_layer=3, n_head=2)
CPU = torch.device("cpu")


def make_model(p=0.0, dtype=torch.float64):
    model = GPT2(dataclasses.replace(TINY, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p)).to(dtype)
    model.init_weights(0)
    return model


def make_examples(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (n,), generator=generator).tolist()
    return [Example(torch.randint(97, (k,), generator=generator).tolist(), [5 + k % 2]) for k in lengths]


def loss_and_gradients(model, batch):
    model.zero_grad()
    logits = model(batch.input_ids, batch.packing, batch.selection)
    loss = F.cross_entropy(logits, batch.target_ids, reduction="sum")
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("n", [4, 3, 1])
def test_padding_to_a_fixed_shape_changes_neither_loss_nor_gradients(n):
    model, examples = make_model(), make_examples(n)
    loss, gradients = loss_and_gradients(model, collate(examples))
    padded = collate_padded(examples, batch_size=4, max_length=12)
    padded_loss, padded_gradients = loss_and_gradients(model, padded)
    assert padded.input_ids.shape == (4 * 11,)
    assert padded.target_ids.shape == (4,)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-10, atol=0)
    for ours, theirs in zip(padded_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_all_batches_have_the_same_shapes():
    shapes = set()
    for n in (4, 4, 2):
        batch = collate_padded(make_examples(n, seed=n), batch_size=4, max_length=12)
        tensors = (batch.input_ids, batch.packing.slots, batch.selection.rows, batch.selection.mask)
        shapes.add((batch.packing.shape, *(tensor.shape for tensor in tensors)))
    assert len(shapes) == 1


def run_loop(config, precision="fp32", collate_function=collate, n=34, compiled="none"):
    model = make_model(p=0.1, dtype=torch.float32)
    compile_blocks(model.h, compiled, CPU)
    torch.manual_seed(0)
    choice = Precision(precision, "", CPU)
    hooks = StepRecorder()
    components = Components(model, build_optimizer(model, 1e-3, 0.0), choice.grad_scaler(), choice)
    train(components, make_examples(n), collate_function, config, State(), hooks)
    return [each["loss"] for each in hooks.logged]


class ScalarReads(TorchDispatchMode):
    """Counts the values that are read out of tensors: on a GPU each read waits for all work queued before it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += function in reads
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_nothing_is_read_from_the_device_between_log_lines(precision, accumulation, monkeypatch):
    monkeypatch.setattr("ft.train.nonfinite.read_synchronizes", lambda device: True)  # as on an accelerator
    counts = []
    for max_steps in (10, 30):
        config = Config(
            batch_size=4,
            gradient_accumulation_steps=accumulation,
            epochs=100,
            max_steps=max_steps,
            logging_steps=1000,
            eval_steps=1000,
            save_steps=1000,
        )
        with ScalarReads() as reads:
            run_loop(config, precision)
        counts.append(reads.count)
    assert counts[0] == counts[1], "the reads of the last step's log line, however many steps went before"
    assert 0 < counts[0] <= 5


def test_compiling_needs_a_compiler_and_cuda_graphs_need_cuda(monkeypatch):
    with pytest.raises(UsageError, match="CUDA graphs, and the device is cpu"):
        compile_blocks(make_model().h, "reduce-overhead", CPU)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UsageError, match="needs a C\\+\\+ compiler"):
        compile_blocks(make_model().h, "default", CPU)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_run_compiles_once_and_computes_the_same():
    import torch._dynamo.utils

    settings = {"batch_size": 4, "epochs": 3, "logging_steps": 1, "eval_steps": 1000, "save_steps": 1000}

    def pad(examples):
        return collate_padded(examples, batch_size=4, max_length=12)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = Config(**settings)
    compiled = run_loop(config, collate_function=pad, compiled="default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for most blocks, one for the last"
    assert len(compiled) == 27
    assert all(loss == loss for loss in compiled)

    model = make_model(dtype=torch.float32).eval()
    batch = pad(make_examples(4))
    expected = model(batch.input_ids, batch.packing, batch.selection)
    compile_blocks(model.h, "default", CPU)
    torch.testing.assert_close(model(batch.input_ids, batch.packing, batch.selection), expected, rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with eager_mode("default"):
        other = collate(make_examples(3, seed=8))
        model(other.input_ids, other.packing, other.selection)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
