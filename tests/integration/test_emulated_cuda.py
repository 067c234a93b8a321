"""Training, evaluation, prediction and generation on an emulated CUDA device: what they ask of it, and how often.

The lines that a GPU would execute are executed, by the command line itself. What a GPU would compute is not computed:
see tests/emulated_cuda.py.
"""

import pytest
import torch

from ft.cli.main import main
from ft.config import Config
from ft.data.batches import collate
from ft.data.examples import Example
from ft.device import Precision
from ft.evaluation.completions import score_completions
from ft.evaluation.evaluate import evaluate
from ft.inference.classifier import predict
from ft.model.gpt2 import GPT2, GPT2Config
from ft.train.loop import Components, StepRecorder, train
from ft.train.metrics import MetricsLogger
from ft.train.optim import build_optimizer
from ft.train.state import State
from tests.emulated_cuda import Event, summary

pytestmark = pytest.mark.emulated_cuda


@pytest.fixture
def steps(gpu, monkeypatch):
    """For each training step since the last one, the notes of the device."""
    steps = []
    count_step = MetricsLogger.count_step

    def step(report, **counts):
        steps.append(list(gpu.notes))
        gpu.notes.clear()
        count_step(report, **counts)

    monkeypatch.setattr(MetricsLogger, "count_step", step)
    return steps


@pytest.fixture
def paths(inputs):
    """The folders of a model of two layers and of a data set."""
    _, model, _, dataset, *_ = inputs
    return model, dataset


@pytest.fixture
def command(paths, tmp_path):
    """The arguments of a run on the device of two steps, the last of which logs, evaluates and saves.

    All examples are cut to one length: fake tensors take long the first time that they see a shape.
    """
    model, dataset = paths
    run = ["--model", model, "--dataset", dataset, "--device", "cuda", "--max-length", "5", "--max-steps", "2"]
    return [*run, "--output-dir", str(tmp_path / "run")]


def kinds(notes):
    """How often each kind was noted, but for kernels."""
    found = [note.kind for note in notes if note.kind != "kernel"]
    return {kind: found.count(kind) for kind in sorted(set(found))}


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "batches"),
    [
        (["--precision", "fp32"], 1),
        (["--precision", "bf16"], 1),
        (["--precision", "fp16"], 1),
        (["--precision", "fp32", "--activation-checkpointing", "full"], 1),
        (["--precision", "bf16", "--activation-checkpointing", "selective"], 1),
        (["--precision", "bf16", "--static-shapes", "--save-blocking"], 1),
        (["--precision", "bf16", "--gradient-accumulation-steps", "2"], 2),
        (["--precision", "fp16", "--freeze", "wte.*", "h.0.*", "--activation-checkpointing", "full"], 1),
        (["--precision", "bf16", "--train-only", "h.1.*", "--on-nonfinite", "skip", "--max-grad-norm", "0"], 1),
        (["--precision", "bf16", "--lora-rank", "4", "--lora-dropout", "0.1"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_step_waits_for_nothing_and_sends_each_batch_once(gpu, steps, command, flags, batches):
    assert main([*command, *flags]) == 0
    first, second = map(kinds, steps)
    assert second == {"send": batches}, summary(steps[1])
    assert first.keys() <= {"read", "send", "slow send"}, summary(steps[0])
    assert "mix" not in kinds(gpu.notes), summary(
        gpu.notes
    )  # of logging, evaluating, saving and the examples at the end


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "fp32"],
        ["--precision", "bf16", "--on-nonfinite", "skip"],
        ["--precision", "fp16"],
        ["--precision", "bf16", "--gradient-accumulation-steps", "2", "--train-only", "h.1.*"],
        ["--precision", "bf16", "--lora-rank", "4", "--lora-dropout", "0.1"],
    ],
    ids=" ".join,
)
def test_a_step_with_a_graph_is_one_launch_behind_its_inputs(gpu, steps, command, flags):
    """The fourth step is recorded, the fifth is the first that is only replayed; none of the six logs or saves."""
    assert main([*command, *flags, "--max-steps", "6", "--cuda-graphs"]) == 0
    batches = 2 if "--gradient-accumulation-steps" in flags else 1
    for notes in steps[3:]:
        assert kinds(notes) == {"send": batches}, summary(notes)
        kernels = [note.operation for note in notes if note.kind == "kernel"]
        assert kernels == ["_foreach_copy_.default"] * batches + ["fill_.Scalar"] * 2 + ["cuda.graph"]
    assert "mix" not in kinds(gpu.notes), summary(gpu.notes)


@pytest.mark.parametrize(("flags", "update"), [([], "_fused_adamw_.default"), (["--cuda-graphs"], "cuda.graph")])
def test_an_update_waits_for_the_copies_of_a_checkpoint(gpu, steps, command, monkeypatch, flags, update):
    """A recorded step cannot wait in its middle: all of it begins only when what it changes is copied."""
    monkeypatch.setattr(Event, "wait", lambda event, stream=None: gpu.note("wait", "cuda.event"))
    assert main([*command, *flags, "--precision", "fp32", "--max-steps", "6", "--save-steps", "5"]) == 0
    notes = [note.kind if note.kind in ("fetch", "wait") else note.operation for note in steps[5]]
    assert notes.count("wait") == 1
    last_copy = len(notes) - 1 - notes[::-1].index("fetch")
    assert last_copy < notes.index("wait") < notes.index(update)


def test_a_run_goes_on_from_its_checkpoint(gpu, steps, command):
    assert main([*command, "--precision", "fp16"]) == 0
    steps.clear()
    assert main([*command, "--precision", "fp16", "--max-steps", "4", "--resume"]) == 0
    assert len(steps) == 2
    assert kinds(steps[1]) == {"send": 1}, summary(steps[1])


# How many kernels a step of the 124M model asks for. An operation counts once, though one on
# many tensors, such as AdamW's, takes several launches. A higher number is a slower step: a GPU computes most of these
# kernels faster than the host asks for them.
KERNELS = {"fp32": 547, "bf16": 634, "fp16": 642}


@pytest.mark.parametrize("precision", KERNELS)
def test_a_step_asks_for_no_more_kernels_than_it_did(gpu, steps, precision):
    with torch.device(gpu.device):
        model = GPT2(GPT2Config())
    choice = Precision(precision, "", gpu.device)
    if precision != "fp32":
        model.keep_half_weights(choice.dtype)

    class CountSteps(StepRecorder):
        def step_done(self, num_examples, num_tokens):
            steps.append(list(gpu.notes))
            gpu.notes.clear()

    def begin_step(examples):
        gpu.notes.clear()
        return collate(examples)

    components = Components(model, build_optimizer(model, 2e-5, 0.0), choice.grad_scaler(), choice)
    train(components, [Example(list(range(20)), [1])] * 8, begin_step, Config(max_steps=1), State(), CountSteps())
    kernels = [note for note in steps[0] if note.kind == "kernel"]
    assert len(kernels) <= KERNELS[precision], summary(kernels, by_line=False)


# --- what is done with a model ----------------------------------------------------------------------------------------


@pytest.fixture
def model(gpu):
    """A small model on the device, in evaluation mode."""
    with torch.device(gpu.device):
        return GPT2(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()


@pytest.mark.parametrize("label_ids", [[5, 7], []], ids=["labels", "completions"])
def test_evaluation_reads_at_its_end_and_sends_each_batch_once(gpu, model, label_ids):
    examples = [Example([1, 2, 3, 4], [5]), Example([1, 2], [7])] * 5
    reads = set()
    for batch_size, batches in ((10, 1), (4, 3)):
        gpu.notes.clear()
        choice = Precision("bf16", "", gpu.device)
        assert evaluate(model, examples, label_ids, batch_size=batch_size, precision=choice) is not None
        found = kinds(gpu.notes)
        assert found.pop("slow send") == 1  # the label tokens
        assert found.pop("send") == batches
        reads.add(found.pop("read"))
        assert not found
    assert len(reads) == 1


def test_prediction_reads_once_and_sends_each_batch_once(gpu, model, demo_inputs):
    from ft.data.examples import read_tokenizer

    tokenizer = read_tokenizer(demo_inputs[0] / "tokenizer.json")
    predict(model, tokenizer, ["a film", "a long and fine film", "bad"], [5, 7], max_length=16, batch_size=1)
    assert kinds(gpu.notes) == {"read": 1, "send": 3, "slow send": 1}, summary(gpu.notes)


def test_completions_are_judged(gpu, model):
    score_completions(model, [Example([1, 2, 3, 4], [3, 4, 5]), Example([1, 2], [7])], batch_size=1)
    assert kinds(gpu.notes) == {"read": 4, "send": 2}, summary(gpu.notes)


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "MODEL", "a fine film", "a bad one", "--label-names", "neg,pos"],
        ["evaluate", "MODEL", "--dataset", "DATA", "--label-names", "neg,pos"],
        ["generate", "MODEL", "a fine", "--max-new-tokens", "4"],
        ["generate", "MODEL", "a fine", "--max-new-tokens", "4", "--temperature", "1", "--top-p", "0.9"],
        ["explain", "--model", "MODEL", "--dataset", "DATA", "--row", "3"],
        ["explain", "--model", "MODEL", "--dataset", "DATA", "--precision", "fp16"],
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[-2:]),
)
def test_the_other_commands(gpu, paths, arguments):
    model, dataset = paths
    words = [{"MODEL": model, "DATA": dataset}.get(word, word) for word in arguments]
    assert main([*words, "--device", "cuda"]) == 0
    assert any(note.kind == "kernel" for note in gpu.notes)
    assert "mix" not in kinds(gpu.notes), summary(gpu.notes)
