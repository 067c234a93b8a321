"""The step as a CUDA graph: that it can be one, and that what surrounds the graph gives the same training."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from ft.config import Config
from ft.data.batches import collate_padded
from ft.data.examples import Example
from ft.device import Precision
from ft.errors import UsageError
from ft.model.freeze import freeze
from ft.model.gpt2 import GPT2, GPT2Config
from ft.train.class_weights import TargetWeights
from ft.train.cuda_graphs import _tensors
from ft.train.loop import Components, StepRecorder, train, train_step
from ft.train.nonfinite import NonFiniteError, NonFiniteGuard
from ft.train.optim import build_optimizer
from ft.train.schedule import learning_rate_at, windows
from ft.train.state import State
from tests.graphs_on_cpu import emulate


@pytest.fixture(autouse=True)
def without_amx(monkeypatch):
    """As on a GPU, products under autocast read bf16 weights; with AMX they would round fp32 weights themselves."""
    monkeypatch.setattr("ft.model.matmul.has_amx", lambda: False)


TINY = GPT2Config(vocab_size=97, n_positions=16, n_embd=16, n_layer=2, n_head=2)
CPU = torch.device("cpu")
NEVER = 10**9
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 8


def make_examples(n=41):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (n,), generator=generator).tolist()
    return [Example(torch.randint(97, (k,), generator=generator).tolist(), [5 + k % 2]) for k in lengths]


WEIGHTS = TargetWeights.of([1.0, 5.0], [5, 6], TINY.vocab_size, CPU)


def make_config(**settings):
    # A learning rate whose values on the way to 0 are all exact in float32, the type of the tensor that holds it.
    defaults = {"batch_size": 4, "learning_rate": 2.0**-10, "max_steps": STEPS, "max_length": 13}
    every = {"logging_steps": 1, "eval_steps": NEVER, "save_steps": NEVER}
    return Config(**{**defaults, **every, **settings})


def prepare(precision, frozen=(), p=0.1):
    model = GPT2(dataclasses.replace(TINY, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p))
    model.init_weights(0)
    freeze(model, (), frozen)
    if precision in DTYPES:
        model.keep_half_weights(DTYPES[precision])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=3, enabled=precision == "fp16")
    torch.manual_seed(0)
    return model.train(), build_optimizer(model, 0.0, 0.01), scaler, Precision(precision, "", CPU)


def pad(examples):
    return collate_padded(examples, batch_size=4, max_length=13)


def in_the_loop(config, precision, weights=None, **settings):
    """Losses and norms of each step of the training loop, and the model it ends in."""
    model, optimizer, scaler, choice = prepare(precision, **settings)
    hooks = StepRecorder()
    components = Components(model, optimizer, scaler, choice, target_weights=weights)
    train(components, make_examples(), pad, config, State(), hooks)
    return [(each["loss"], each["grad_norm"]) for each in hooks.logged], model


@pytest.fixture(autouse=True)
def dropout_as_on_a_gpu(monkeypatch):
    for module in ("dropout", "matmul"):
        monkeypatch.setattr(f"ft.model.{module}.dropout_by_16_bits", F.dropout)


@pytest.mark.parametrize(
    ("precision", "settings", "kept", "weights"),
    [
        ("fp16", {}, {}, None),
        # Without dropout, as a batch that is missing in the last step of an epoch is replaced by an empty one.
        ("fp32", {"gradient_accumulation_steps": 2}, {"p": 0.0}, None),
        ("fp32", {"gradient_accumulation_steps": 2}, {"p": 0.0}, WEIGHTS),
        ("bf16", {}, {"frozen": ("h.0.*", "wte.weight")}, None),
    ],
)
def test_a_step_is_a_pure_tensor_program(precision, settings, kept, weights):
    """Traced at the first step, and then run on the data of the others: what it did not read then is not read now.

    Tracing refuses to read a value on the host.
    """
    config = make_config(**settings)
    expected, expected_model = in_the_loop(config, precision, weights, **kept)
    model, optimizer, scaler, choice = prepare(precision, **kept)
    scaler.scale(torch.ones(()))  # makes its tensors, as the steps before a recording do
    examples, loss_sum = make_examples(), torch.zeros(())
    batches = [pad([]) for _ in range(config.gradient_accumulation_steps)]
    total_weight, learning_rate = torch.zeros(()), torch.zeros(())
    guard = NonFiniteGuard(CPU, State(), limit=0)

    def step():
        return train_step(
            Components(model, optimizer, scaler, choice, target_weights=weights),
            batches,
            total_weight,
            learning_rate,
            max_grad_norm=1.0,
            guard=guard,
            loss_sum=loss_sum,
        )

    program, lines = None, []
    for number, window in enumerate(windows(len(examples), config, 0)):
        window += [[]] * (len(batches) - len(window))
        for batch, rows in zip(batches, window, strict=True):
            for old, new in zip(_tensors(batch), _tensors(pad([examples[row] for row in rows])), strict=True):
                old.copy_(new)
        read = [examples[row] for rows in window for row in rows]
        total_weight.fill_(len(read) if weights is None else weights.total(read))
        learning_rate.fill_(learning_rate_at(number, STEPS, config.learning_rate))
        if program is None:
            program = make_fx(step)()  # which runs it, too
            continue_from = loss_sum.item()
            lines.append((continue_from, None))
        else:
            grad_norm = program().item()
            lines.append((loss_sum.item(), grad_norm))
        loss_sum.zero_()
    assert lines[1:] == expected[1:]
    assert lines[0][0] == expected[0][0]
    for (name, ours), theirs in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    operations = {str(node.target) for node in program.graph.nodes}
    assert not {name for name in operations if "_local_scalar_dense" in name or "nonzero" in name}


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    monkeypatch.setattr("ft.setup.require_cuda", lambda device: None)
    return emulate(monkeypatch)


@pytest.mark.parametrize(
    ("precision", "settings"), [("fp32", {}), ("bf16", {}), ("fp16", {}), ("fp32", {"gradient_accumulation_steps": 2})]
)
def test_the_loop_with_graphs_is_the_loop_without(precision, settings, graphs_on_cpu):
    p = 0.0 if settings else 0.1
    expected, expected_model = in_the_loop(make_config(**settings), precision, p=p)
    lines, model = in_the_loop(make_config(cuda_graphs=True, **settings), precision, p=p)
    assert repr(lines) == repr(expected), "compared as text, as the norm of a step that fp16 skips may be NaN"
    for (name, ours), theirs in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    (graph,) = graphs_on_cpu
    assert (graph.recordings, graph.replays) == (1, STEPS - 3)


def test_a_run_with_graphs_is_resumed_to_the_same_bits(inputs, tmp_path, graphs_on_cpu, monkeypatch):
    from ft.checkpoint.async_writer import AsyncWriter
    from ft.cli.main import main

    flags = ["--precision", "fp32", "--max-steps", "16", "--save-steps", "6"]
    flags = [*inputs, *flags, "--learning-rate", str(2.0**-10), "--eval-steps", "4", "--output-dir"]
    plain, graphed = tmp_path / "plain", tmp_path / "graphed"
    assert main([*flags, str(plain), "--static-shapes"]) == 0

    class Broken(Exception):
        pass

    def save_and_break(self, snapshot):
        save(self, snapshot)
        self.wait()
        raise Broken

    save = AsyncWriter.save
    with monkeypatch.context() as patch:
        patch.setattr(AsyncWriter, "save", save_and_break)
        with pytest.raises(Broken):
            main([*flags, str(graphed), "--cuda-graphs"])
    assert main([*flags, str(graphed), "--cuda-graphs", "--resume"]) == 0
    assert [graph.replays for graph in graphs_on_cpu] == [6 - 3, 16 - 6 - 3]
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (plain / "checkpoint-16" / name).read_bytes() == (graphed / "checkpoint-16" / name).read_bytes(), name


def test_a_loss_that_is_not_finite_in_a_replay_is_found(graphs_on_cpu, monkeypatch):
    """With the number of its step, which the recording has as a tensor."""
    monkeypatch.setattr("ft.train.nonfinite.read_synchronizes", lambda device: True)  # as on a GPU
    model, optimizer, scaler, choice = prepare("fp32")

    class Spoil(StepRecorder):
        def evaluate(self, state):
            if state.step == 6:
                model.ln_f.bias.data.fill_(float("nan"))

    config = make_config(cuda_graphs=True, logging_steps=NEVER, eval_steps=1)
    with pytest.raises(NonFiniteError, match="step 7 is not finite"):
        train(Components(model, optimizer, scaler, choice), make_examples(), pad, config, State(), Spoil())


def test_settings_that_exclude_cuda_graphs_are_usage_errors(inputs, tmp_path, capsys):
    from ft.cli.main import main

    flags = [*inputs, "--cuda-graphs", "--output-dir", str(tmp_path / "run")]
    assert main(flags) == 2
    assert (
        "--cuda-graphs records the work of an NVIDIA GPU, and the device is cpu: leave it out"
        in capsys.readouterr().err
    )
    assert main([*flags, "--compile", "default", "--shard", "--activation-checkpointing", "full"]) == 2
    error = capsys.readouterr().err
    assert "--cuda-graphs does not work with --compile and --shard and --activation-checkpointing: leave" in error
    assert main([*flags, "--completion-column", "answer"]) == 2
    assert "--cuda-graphs and --static-shapes need one target per row" in capsys.readouterr().err
    with pytest.raises(UsageError, match="does not work with 2 processes"):
        make_config(cuda_graphs=True, processes=2)
    assert not (tmp_path / "run").exists()
