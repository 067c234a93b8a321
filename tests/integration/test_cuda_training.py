"""Training on an NVIDIA GPU against the same training on the CPU and against `transformers`.

Each body takes a device and runs on the CPU too, the expensive ones among the slow tests, so that all of its lines are
executed where there is no GPU.
`pytest -m cuda` runs them on the GPU alone.

What is expected to be equal to the last bit on a GPU: what a checkpoint holds and what comes back from it, random
states included, so that the first step after a resume has the loss that it had before; weights that are frozen; a step
that is skipped. What is not: anything after an update. The gradients of the embeddings are added up by atomic
operations, in whatever order they come, as are those of flash and memory-efficient attention, so that two runs with the
same seed differ in the last digits (https://docs.pytorch.org/docs/stable/notes/randomness.html). There, losses and
gradient norms are compared within a tolerance that each test states. On a CPU all of it is equal to the last bit.
"""

import json
import math
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from ft import session
from ft.checkpoint.store import checkpoints, verify_checkpoint
from ft.cli.arguments import read_arguments
from ft.cli.main import main
from ft.data.batches import collate
from ft.data.examples import Example, read_tokenizer
from ft.data.load import read_data
from ft.model.gpt2 import GPT2, Block, GPT2Config
from ft.train.nonfinite import NonFiniteGuard
from ft.train.optim import build_optimizer, clip_in_optimizer
from ft.train.schedule import windows
from ft.train.state import State
from tests.graphs_on_cpu import emulate

ROOT = Path(__file__).parents[2]
STEPS = ["--max-steps", "20", "--logging-steps", "1", "--eval-steps", "1000", "--save-steps", "1000"]
FLAGS = [*STEPS, "--dropout", "0", "--learning-rate", "1e-4", "--precision", "fp32"]
EXPENSIVE = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.cuda)]
TINY = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=4, n_head=4)


@pytest.fixture
def train(inputs, tmp_path):
    """Run the program in this process; returns the run's folder."""

    def train(device, *flags, name="run"):
        folder = tmp_path / name
        assert main([*inputs, "--output-dir", str(folder), *flags, "--device", device]) == 0
        return folder

    return train


def steps_of(folder):
    """The lines of metrics.jsonl that steps have left, in order."""
    return [event for event in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in event]


def losses_and_norms(folder):
    """Of each step; infinity for the norm of a step in fp16 whose gradients overflowed, which JSON has as null."""
    figures = [event[name] for event in steps_of(folder) for name in ("loss", "grad_norm")]
    return [math.inf if figure is None else figure for figure in figures]


@pytest.fixture(scope="module")
def on_cpu(inputs, tmp_path_factory):
    """Losses and gradient norms of 20 steps on the CPU in fp32."""
    folder = tmp_path_factory.mktemp("cpu") / "run"
    assert main([*inputs, *FLAGS, "--output-dir", str(folder)]) == 0
    return losses_and_norms(folder)


# --- the same losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", EXPENSIVE)
def test_the_program_runs_as_a_process(inputs, tmp_path, device):
    """`run.py --device cuda`, without an index; what it leaves loads in `transformers`."""
    command = [sys.executable, "run.py", *inputs, "--max-steps", "4", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--device", device], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"parameters, on {device}" in done.stdout
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--activation-checkpointing", "full"],
        ["--activation-checkpointing", "selective"],
        ["--batch-size", "4", "--gradient-accumulation-steps", "2"],
        ["--static-shapes"],
        ["--save-steps", "3"],
    ],
    ids=lambda flags: "-".join(flags).replace("--", "") or "plain",
)
def test_fp32_is_that_of_the_cpu(train, device, on_cpu, flags):
    """Losses and gradient norms of 20 steps, within 1e-4."""
    assert losses_and_norms(train(device, *FLAGS, *flags)) == pytest.approx(on_cpu, rel=1e-4)


@pytest.fixture
def record_graphs(device, monkeypatch):
    """On a CPU, CUDA graphs that record its operations."""
    if device == "cpu":
        monkeypatch.setattr("ft.setup.require_cuda", lambda device: None)
        emulate(monkeypatch)


@pytest.mark.parametrize(
    "flags", [[], ["--save-steps", "3"], ["--batch-size", "4", "--gradient-accumulation-steps", "2"]]
)
@pytest.mark.parametrize("device", EXPENSIVE)
@pytest.mark.usefixtures("record_graphs")
def test_recorded_steps_are_those_of_the_cpu(train, device, on_cpu, flags):
    """Losses and gradient norms of 20 steps in fp32, 17 of them replayed, within 1e-4."""
    assert losses_and_norms(train(device, *FLAGS, *flags, "--cuda-graphs")) == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("device", EXPENSIVE)
@pytest.mark.usefixtures("record_graphs")
def test_recorded_steps_in_half_precision_are_those_without_a_graph(train, device, precision):
    """With dropout, whose random numbers a replay draws as the step itself would. Within 1e-2, see the module."""
    flags = [*STEPS, "--learning-rate", "1e-4", "--precision", precision]
    expected = losses_and_norms(train(device, *flags, "--static-shapes", name="plain"))
    recorded = losses_and_norms(train(device, *flags, "--cuda-graphs", name="graph"))
    assert recorded == pytest.approx(expected, rel=1e-2)


def reference_run(arguments, device, precision):
    """Losses and gradient norms of 20 steps of `transformers` and `torch.optim` under PyTorch's own autocast."""
    config = read_arguments(arguments)
    folder = Path(config.model)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    examples = read_data(config, tokenizer).examples["train"]
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **no_dropout).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    figures = []
    for step, (rows,) in enumerate(windows(len(examples), config, 0)):
        batch = [examples[row] for row in rows]
        ids = pad_sequence([torch.tensor(example.input_ids) for example in batch], batch_first=True).to(device)
        ends = torch.tensor([len(example.input_ids) - 1 for example in batch], device=device)
        targets = torch.tensor([example.target_ids[0] for example in batch], device=device)
        with torch.autocast(device, dtype=dtype):
            logits = model(ids).logits[torch.arange(len(batch), device=device), ends]
        loss = F.cross_entropy(logits.float(), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / 20)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        figures += [loss.item(), norm.item()]
    return figures


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_that_of_transformers(train, inputs, device, precision, monkeypatch):
    """Losses within 2 %, gradient norms within 10 %: both round matrix products, and not at the same places.

    From a loss scale at which fp16 skips no step.
    """
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **options: scaler(*a, init_scale=1024.0, **options))
    flags = [*FLAGS, "--precision", precision]
    ours = losses_and_norms(train(device, *flags))
    expected = reference_run([*inputs, *flags], device, precision)
    for i, tolerance in ((0, 0.02), (1, 0.1)):
        assert ours[i::2] == pytest.approx(expected[i::2], rel=tolerance)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("device", EXPENSIVE)
def test_compiled_blocks_compute_the_same(train, device, on_cpu, mode):
    """Within 1e-3: compiled kernels add in another order."""
    if (device, mode) == ("cpu", "reduce-overhead"):
        pytest.skip("a CPU has no CUDA graphs")
    assert losses_and_norms(train(device, *FLAGS, "--compile", mode)) == pytest.approx(on_cpu, rel=1e-3)


def test_frozen_blocks_stay_to_the_last_bit(train, inputs, device, on_cpu):
    folder = train(device, *FLAGS, "--train-only", "last:1")
    before, after = (load_file(path / "model.safetensors") for path in (Path(inputs[1]), folder / "final"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in changed} <= {"h", "ln_f"}
    assert any(name.startswith("h.1.") for name in changed)
    assert not any(name.startswith("h.0.") for name in changed)
    assert steps_of(folder)[0]["loss"] == pytest.approx(on_cpu[0], rel=1e-4)


@pytest.mark.parametrize("flags", [[], ["--precision", "bf16"], ["--cuda-graphs"]], ids=" ".join)
def test_an_adapter_learns_as_on_the_cpu_and_its_base_stays(train, inputs, device, flags):
    if device == "cpu" and "--cuda-graphs" in flags:
        pytest.skip("a CPU has no CUDA graphs")
    lora = [*FLAGS, "--lora-rank", "4", "--learning-rate", "1e-3"]
    folder = train(device, *lora, *flags)
    expected = losses_and_norms(train("cpu", *lora, name="cpu"))
    assert losses_and_norms(folder) == pytest.approx(expected, rel=0.05 if "bf16" in flags else 1e-3)
    before, after = (load_file(path / "model.safetensors") for path in (Path(inputs[1]), folder / "final"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in after if ".c_" in name and name.endswith(".weight")}


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_first_step_after_a_resume_is_the_same_to_the_last_bit(train, device, precision, record_property):
    """With dropout, so that the device's random state counts. Later steps: within 1e-2, on a CPU to the last bit."""
    flags = [*STEPS, "--save-steps", "10", "--save-blocking", "--precision", precision, "--learning-rate", "1e-4"]
    folder = train(device, *flags)
    before = losses_and_norms(folder)
    checkpoint = folder / "checkpoint-10"
    generators = {"cpu", "cuda"} if device == "cuda" else {"cpu"}
    assert load_file(checkpoint / "rng.safetensors").keys() == generators
    assert main(["--resume", str(checkpoint), "--device", device]) == 0
    after = losses_and_norms(folder)
    assert after[20] == before[20]
    assert after == (before if device == "cpu" else pytest.approx(before, rel=1e-2))
    equal = sum(a == b for a, b in zip(before[20::2], after[20::2], strict=True))
    record_property("losses after a resume that are equal to the last bit, of 10", equal)


def test_saves_beside_the_training_are_whole_and_the_last_one_is_the_finished_model(train, device, monkeypatch):
    """A save after every step: on a GPU most of them are deferred."""
    monkeypatch.setattr(session, "read_synchronizes", lambda _: True)
    folder = train(device, *STEPS, "--save-steps", "1", "--keep-checkpoints", "30")
    found = checkpoints(folder)
    assert all(verify_checkpoint(path) is None for path in found)
    last, final = (load_file(path / "model.safetensors") for path in (found[-1], folder / "final"))
    assert found[-1].name == "checkpoint-20"
    assert all(torch.equal(last[name], tensor) for name, tensor in final.items())


# --- single parts -----------------------------------------------------------------------------------------------------


def make_model(device):
    model = GPT2(TINY)
    model.init_weights(0)
    return model.to(device)


def make_batch(device, sequences=16, length=32):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(TINY.vocab_size, (sequences, length), generator=generator).tolist()
    return collate([Example(row, [row[0]]) for row in rows]).to(torch.device(device))


def backward(model, batch):
    logits = model(batch.input_ids, batch.packing, batch.selection)
    F.cross_entropy(logits.float(), batch.target_ids).backward()


def test_clipping_and_skipping_in_the_fused_kernel(device):
    """Against `torch.optim.AdamW` on the CPU, within 1e-5; a skipped step changes no bit."""
    ours, theirs = make_model(device), make_model("cpu")
    optimizer = build_optimizer(ours, 1e-2, 0.1)
    matrices = [group["params"] for group in build_optimizer(theirs, 1e-2, 0.1).param_groups]
    groups = [{"params": params, "weight_decay": decay} for params, decay in zip(matrices, (0.1, 0.0), strict=True)]
    reference = torch.optim.AdamW(groups, lr=1e-2)
    for _ in range(3):
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad = torch.linspace(-1, 2, other.numel()).view_as(other)
            parameter.grad = other.grad.to(device)
        norm = clip_in_optimizer(optimizer, 1.0)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        torch.testing.assert_close(norm.cpu(), expected, rtol=1e-5, atol=0)
        optimizer.step()
        reference.step()
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.cpu(), other, rtol=1e-5, atol=1e-6)

    before = [parameter.detach().clone() for parameter in ours.parameters()]
    guard = NonFiniteGuard(torch.device(device), State(), limit=1)
    guard.watch(optimizer, torch.tensor(float("nan"), device=device), norm, scales_loss=False)
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, ours.parameters(), strict=True))


def test_an_overflow_in_fp16_skips_the_update_to_the_last_bit(device):
    model = make_model(device)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, 1e-2, 0.0)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    scaler.scale(torch.ones((), device=device))  # creates the scaler's tensors
    scaler.unscale_(optimizer)
    clip_in_optimizer(optimizer, 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


class StoredBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts on a CPU, in place of the GPU's allocator, what a forward pass keeps for the backward pass."""

    def __init__(self, monkeypatch):
        self.count = 0
        super().__init__(self.pack, lambda tensor: tensor)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(self, "count", 0))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.count)

    def pack(self, tensor):
        self.count += tensor.numel() * tensor.element_size()
        return tensor


def test_activation_checkpointing_needs_less_memory(device, monkeypatch):
    """Peak of a step's forward and backward pass."""
    counting = StoredBytes(monkeypatch) if device == "cpu" else nullcontext()
    batch, peaks = make_batch(device, sequences=64), []
    for mode in ("full", "none"):
        model = make_model(device)
        model.activation_checkpointing = mode
        with counting:
            torch.cuda.reset_peak_memory_stats()
            backward(model, batch)
            peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] < peaks[1]


def test_running_out_of_memory_is_advice_in_a_line(train, inputs, tmp_path, device, monkeypatch, capsys):
    """The allocator is allowed nothing more, where there is a GPU; elsewhere it is pretended."""
    if device == "cpu":

        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\n")

        monkeypatch.setattr(
            torch.cuda,
            "set_per_process_memory_fraction",
            lambda fraction: monkeypatch.setattr(Block, "forward", Block.forward if fraction else fail),
        )
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        status = main([*inputs, *FLAGS, "--output-dir", str(tmp_path / "run"), "--device", device])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert status == 1
    error = capsys.readouterr().err
    assert "error: out of memory with --batch-size 8" in error
    assert "Traceback" not in error


def test_nothing_is_read_from_the_device_between_log_lines(train, device, monkeypatch):
    """As many waits for the device in 5 steps as in 20: those of the last step, its evaluation and its checkpoint."""
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    counts = []
    for number in ("5", "20"):
        flags = [*FLAGS, "--logging-steps", "1000", "--max-steps", number, "--save-blocking"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train(device, *flags, name=number)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_flash_or_memory_efficient(train, device, dtype):
    """After a run has chosen its device; cuDNN's would build a plan for each shape."""
    train(device, *FLAGS, "--max-steps", "1")
    model, batch = make_model(device).eval(), make_batch(device)
    with torch.profiler.profile() as profile, torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        model(batch.input_ids, batch.packing)
    names = {event.name for event in profile.events() if "_scaled_dot_product" in event.name}
    assert any("flash_attention" in name or "efficient_attention" in name for name in names)
    assert not any("cudnn" in name for name in names)


def test_a_run_that_was_copied_goes_on_on_the_other_device(train, device):
    """A run that began on the CPU goes on where it is told to, and the other way round, within 1e-3."""
    folder = train("cpu", *FLAGS, "--save-steps", "10")
    expected = losses_and_norms(folder)
    shutil.copytree(folder, folder.with_name("copy"))
    assert main(["--resume", str(folder.with_name("copy") / "checkpoint-10"), "--device", device]) == 0
    assert losses_and_norms(folder.with_name("copy")) == pytest.approx(expected, rel=1e-3)
