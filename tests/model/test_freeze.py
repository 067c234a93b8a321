"""Training some parameters only: against training all, against `transformers`, and what it must not cost."""

import copy
import json
import re
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ft.checkpoint.store import verify_checkpoint
from ft.cli.main import main
from ft.errors import UsageError
from ft.model.compile import compile_blocks
from ft.model.freeze import freeze, num_trainable_parameters
from ft.model.gpt2 import GPT2, GPT2Config
from ft.model.packing import Packing, Selection
from ft.report.console import count_parameters
from ft.train.optim import build_optimizer, clip_in_optimizer
from tests.model.test_gpt2 import LENGTHS, TINY, SavedBytes, make_batch, make_model, make_reference
from tests.reference.synthetic import write_model

# In a model of three layers; flags, and names by which a trained parameter is known.
CHOICES = {
    "last block": (("last:1",), (), lambda name: name.startswith(("h.2.", "ln_f."))),
    "biases": (("*.bias",), (), lambda name: name.endswith("bias")),
    "embedding": (("wte.weight",), (), lambda name: name == "wte.weight"),
    "positions": (("wpe.*",), (), lambda name: name == "wpe.weight"),
    "norm": (("ln_f.*",), (), lambda name: name.startswith("ln_f.")),
    "not the embeddings": ((), ("w[tp]e.weight",), lambda name: not name.startswith("w")),
    "both flags": (
        ("last:2", "wpe.weight"),
        ("*.ln_?.*", "h.1.*"),
        lambda name: name == "wpe.weight" or (name.startswith(("h.2.", "ln_f.")) and not name.startswith("h.2.ln_")),
    ),
}
EVERY_CHOICE = pytest.mark.parametrize(("train_only", "frozen", "is_trained"), CHOICES.values(), ids=CHOICES)
EVERY_CHECKPOINTING = pytest.mark.parametrize("kind", ["none", "full", "selective"])


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(model, seed=3):
    input_ids, _, _ = make_batch(seed=seed)
    logits = model(input_ids, Packing.of(LENGTHS), Selection.last(LENGTHS, [1] * len(LENGTHS)))
    return F.cross_entropy(logits, torch.arange(len(LENGTHS)) * 7)


# --- the choice -------------------------------------------------------------------------------------------------------


@EVERY_CHOICE
def test_patterns_choose_by_name(train_only, frozen, is_trained):
    model = GPT2(TINY)
    freeze(model, train_only, frozen)
    names = [name for name, _ in model.named_parameters()]
    assert trained_names(model) == {name for name in names if is_trained(name)}
    assert num_trainable_parameters(model) == sum(p.numel() for name, p in model.named_parameters() if is_trained(name))
    assert num_trainable_parameters(model) < count_parameters(model) == sum(p.numel() for p in model.parameters())


def test_without_patterns_all_is_trained_even_after_less():
    model = GPT2(TINY)
    freeze(model, ("last:1",), ())
    freeze(model, (), ())
    assert num_trainable_parameters(model) == count_parameters(model)


@pytest.mark.parametrize(
    ("train_only", "frozen", "problems"),
    [
        (["h.3.*"], [], ["--train-only is 'h.3.*', which matches no parameter.*h.2.\\*"]),
        (["lnf.bias"], [], ["--train-only is 'lnf.bias'.*there are ln_f.bias"]),
        ([], ["transformer.h.1.*"], ["--freeze is 'transformer.h.1.*'.*there are h.1.\\*"]),
        ([], ["lm_head.weight"], ["--freeze is 'lm_head.weight'.*wte.weight"]),
        ([], ["zzz"], ["--freeze is 'zzz'.*there are wte.weight, \\*.bias, last:1"]),
        (["last:4"], [], ["--train-only is 'last:4', it must be last:1 to last:3, as the model has 3 blocks"]),
        (["last:0"], [], ["--train-only is 'last:0', it must be last:1 to last:3"]),
        (["last:"], ["last:-1"], ["--train-only is 'last:', it must be", "--freeze is 'last:-1', it must be"]),
        (["wte.weight", "H.1.*"], ["x"], ["--train-only is 'H.1.*'.*h.1.\\*", "--freeze is 'x'"]),
        ([], ["*"], ["with --freeze \\* nothing is left to train"]),
        (["last:1"], ["h.*", "ln_f.*"], ["with --train-only last:1 and --freeze h.\\* ln_f.\\* nothing is left"]),
    ],
)
def test_patterns_without_a_match_are_reported_with_similar_ones(train_only, frozen, problems):
    with pytest.raises(UsageError) as raised:
        freeze(GPT2(TINY), train_only, frozen)
    assert len(raised.value.problems) == len(problems)
    for told, expected in zip(raised.value.problems, problems, strict=True):
        assert re.search(expected, told), told


# --- what is learnt ---------------------------------------------------------------------------------------------------


@EVERY_CHOICE
@EVERY_CHECKPOINTING
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_training_all(train_only, frozen, is_trained, kind, dtype):
    model = make_model(GPT2Config(**{**vars(TINY), "resid_pdrop": 0.2}), dtype).train()
    model.activation_checkpointing = kind
    torch.manual_seed(0)
    expected_loss = loss_of(model)
    expected_loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    freeze(model, train_only, frozen)
    torch.manual_seed(0)  # frozen layers drop what they drop when all are trained
    loss = loss_of(model)
    loss.backward()
    assert torch.equal(loss, expected_loss)
    for name, parameter in model.named_parameters():
        if is_trained(name):
            rtol, atol = (1e-12, 1e-14) if dtype == torch.float64 else (1e-5, 1e-7)
            torch.testing.assert_close(parameter.grad, expected[name], rtol=rtol, atol=atol)
        else:
            assert parameter.grad is None


@EVERY_CHOICE
def test_steps_equal_transformers_with_the_same_parameters_frozen(train_only, frozen, is_trained):
    config = GPT2Config(**{**vars(TINY), "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0})
    model = make_model(config)
    reference = make_reference(model).train()
    before = copy.deepcopy(model.state_dict())
    freeze(model, train_only, frozen)
    for name, parameter in reference.transformer.named_parameters():
        parameter.requires_grad_(is_trained(name))
    trained = [(name, p) for name, p in reference.transformer.named_parameters() if p.requires_grad]
    is_matrix = {name: p.ndim == 2 for name, p in trained}
    groups = [
        {"params": [p for name, p in trained if is_matrix[name]], "weight_decay": 0.1},
        {"params": [p for name, p in trained if not is_matrix[name]], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)
    ours = build_optimizer(model, 1e-2, 0.1)
    losses = []
    for step in range(4):
        loss = loss_of(model, seed=step)
        loss.backward()
        norm = clip_in_optimizer(ours, 0.0)
        ours.step()
        ours.zero_grad()

        _, padded, mask = make_batch(seed=step)
        logits = reference(padded, attention_mask=mask).logits[torch.arange(4), torch.tensor(LENGTHS) - 1]
        expected = F.cross_entropy(logits, torch.arange(4) * 7)
        expected.backward()
        expected_norm = torch.nn.utils.get_total_norm([p.grad for _, p in trained])
        theirs.step()
        theirs.zero_grad()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6), step
        assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-5), step
        losses.append(loss.item())
    assert len(set(losses)) == 4
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not is_trained(name), name


def test_an_optimiser_has_moments_of_what_is_trained_only():
    model = make_model(dtype=torch.float32)
    freeze(model, ("*.bias",), ())
    optimizer = build_optimizer(model, 1e-3, 0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, len(trained_names(model))]
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert sum(moment.numel() * moment.element_size() for moment in moments) == 8 * num_trainable_parameters(model)


# --- what it must not cost --------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Writes down the name and the shapes of every operation."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen.append((str(function), [tuple(each.shape) for each in arguments if isinstance(each, torch.Tensor)]))
        return function(*arguments, **(keywords or {}))


class Held:
    """A tensor that autograd holds on to."""

    def __init__(self, tensor):
        self.tensor = tensor


class HeldBytes:
    """Counts what autograd still holds after the forward pass; checkpointing also saves and lets go at once."""

    def __init__(self):
        self.held = weakref.WeakSet()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.hold, lambda held: held.tensor)

    def hold(self, tensor):
        held = Held(tensor)
        self.held.add(held)
        return held

    def bytes(self):
        return sum(held.tensor.numel() * held.tensor.element_size() for held in self.held)


def deep_model(n_layer, kind, dtype=torch.float32, **changes):
    model = make_model(GPT2Config(**{**vars(TINY), "n_layer": n_layer, **changes}), dtype).train()
    model.activation_checkpointing = kind
    return model


@EVERY_CHECKPOINTING
@pytest.mark.parametrize("train_only", ["last:2", "ln_f.*"])
def test_layers_below_the_lowest_trained_one_keep_nothing_and_do_nothing_backward(train_only, kind):
    backward, kept = [], []
    for n_layer in (2, 6):
        model = deep_model(n_layer, kind)
        freeze(model, (train_only,), ())
        held = HeldBytes()
        with held.hooks:
            loss = loss_of(model)
        kept.append(held.bytes())
        with Operations() as operations:
            loss.backward()
        backward.append(operations.seen)
    assert backward[0] == backward[1]
    assert kept[0] == kept[1] > 0


@EVERY_CHECKPOINTING
def test_all_layers_work_backward_when_all_are_trained(kind):
    counts, kept = [], []
    for n_layer in (2, 6):
        held = HeldBytes()
        with held.hooks:
            loss = loss_of(deep_model(n_layer, kind))
        kept.append(held.bytes())
        with Operations() as operations:
            loss.backward()
        counts.append(len(operations.seen))
    assert counts[1] > 2 * counts[0], "or the test above could not fail"
    assert kept[1] > kept[0]


def backward_flops(model):
    loss = loss_of(model)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def test_products_for_frozen_weights_are_not_computed():
    model = make_model()
    everything = backward_flops(model)
    rows, selected, width = sum(LENGTHS), len(LENGTHS), TINY.n_embd
    freeze(model, (), ("wte.weight",))
    assert everything - backward_flops(model) == 2 * selected * width * TINY.vocab_size
    freeze(model, (), ("h.*.mlp.c_fc.weight",))
    assert everything - backward_flops(model) == 2 * (2 * rows + selected) * width * 4 * width
    freeze(model, ("ln_f.*",), ())
    assert backward_flops(model) == 2 * selected * width * TINY.vocab_size, "through the head, and no further"


def test_a_frozen_weight_keeps_no_input_for_its_gradient():
    kept = {}
    for choice in ("*", "*.bias"):
        model = deep_model(3, "none")
        freeze(model, (choice,), ())
        with SavedBytes() as saved:
            loss_of(model)
        kept[choice] = saved.bytes
    inner = 4 * TINY.n_embd * 4  # bytes of a row between the MLP's two layers, which c_proj's weight gradient reads
    rows = 2 * sum(LENGTHS) + len(LENGTHS)
    assert kept["*"] - kept["*.bias"] >= rows * inner


# --- runs -------------------------------------------------------------------------------------------------------------

SETTINGS = ["--precision", "fp32", "--eval-steps", "4", "--save-steps", "5", "--logging-steps", "3"]
LAST = ["--train-only", "last:1", "--freeze", "*.ln_2.*"]


def weights_before(inputs):
    return load_file(f"{inputs[1]}/model.safetensors")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run of 10 steps that trained some parameters only."""
    folder = tmp_path_factory.mktemp("freeze") / "run"
    assert main([*inputs, *SETTINGS, *LAST, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be continued or spoilt."""
    return shutil.copytree(finished, tmp_path / "run")


def is_trained_in_run(name):
    return name.startswith(("h.1.", "ln_f.")) and ".ln_2." not in name


def test_a_run_changes_the_chosen_weights_and_no_other_bit(inputs, tmp_path, capsys):
    assert main([*inputs, *SETTINGS, *LAST, "--output-dir", str(tmp_path / "run")]) == 0
    output, run = capsys.readouterr().out, tmp_path / "run"
    after, before = load_file(run / "final" / "model.safetensors"), weights_before(inputs)
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) is not is_trained_in_run(name), name
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(run / "final").transformer
    assert all(torch.equal(p, after[name]) for name, p in reloaded.named_parameters())
    trained = sum(weight.numel() for name, weight in after.items() if is_trained_in_run(name))
    everything = sum(weight.numel() for weight in after.values())
    assert f": {trained:,} of {everything:,} parameters, on cpu" in output


def test_a_checkpoint_holds_moments_of_what_was_trained_only(run):
    folder = run / "checkpoint-10"
    names = {name for name in load_file(folder / "model.safetensors") if is_trained_in_run(name)}
    expected = {f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in names}
    assert set(load_file(folder / "optimizer.safetensors")) == expected
    assert verify_checkpoint(folder) is None


@pytest.mark.parametrize("flags", [[], ["--save-blocking", "--activation-checkpointing", "selective"]])
def test_a_resumed_run_ends_in_the_same_bits(finished, inputs, tmp_path, monkeypatch, flags):
    from ft.checkpoint.async_writer import AsyncWriter

    def save_and_break(self, snapshot):
        save(self, snapshot)
        self.wait()
        raise KeyboardInterrupt

    save = AsyncWriter.save
    broken = [*flags, "--output-dir", str(tmp_path / "broken")]
    with monkeypatch.context() as patch:
        patch.setattr(AsyncWriter, "save", save_and_break)
        assert main([*inputs, *SETTINGS, *LAST, *broken]) == 130
    torch.manual_seed(999)
    assert main(["--resume", str(tmp_path / "broken")]) == 0
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        calm = finished / "checkpoint-10" / name
        assert calm.read_bytes() == (tmp_path / "broken" / "checkpoint-10" / name).read_bytes(), name


def test_a_resumed_run_trains_what_it_trained_before(run, inputs, capsys):
    for other in (["--train-only", "last:2", "--freeze", "*.ln_2.*"], ["--train-only", "last:1", "--freeze", "ln_f.*"]):
        assert main([*inputs, *SETTINGS, *other, "--output-dir", str(run), "--resume"]) == 2
        assert "was ('" in capsys.readouterr().err


def test_moments_of_other_parameters_than_the_run_trains_are_refused(run, capsys):
    settings = json.loads((run / "config.json").read_text())
    for train_only, problem in ((["ln_f.*"], "which this run does not train"), ([], "has no step.")):
        (run / "config.json").write_text(json.dumps({**settings, "train_only": train_only, "epochs": 2}))
        assert main(["--resume", str(run)]) == 1
        assert problem in capsys.readouterr().err


def test_the_reported_disk_space_is_the_size_of_a_checkpoint(inputs, tmp_path, capsys, monkeypatch):
    from ft.checkpoint import run_dir

    told = []
    check_disk_space = run_dir.check_disk_space
    monkeypatch.setattr(
        run_dir, "check_disk_space", lambda *arguments: told.append(arguments) or check_disk_space(*arguments)
    )
    assert main([*inputs, *SETTINGS, *LAST, "--output-dir", str(tmp_path / "run")]) == 0
    (_, parameters, trained, _), checkpoint = told[0], tmp_path / "run" / "checkpoint-10"
    tensors = [load_file(checkpoint / name) for name in ("model.safetensors", "optimizer.safetensors")]
    stored = sum(tensor.numel() * 4 for each in tensors for tensor in each.values() if tensor.ndim)
    assert stored == 4 * parameters + 8 * trained
    assert f"a checkpoint takes {stored / 1e6:.1f} MB" in capsys.readouterr().out


def test_a_wrong_pattern_leaves_an_earlier_run_alone(run, inputs, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    arguments = [*inputs, "--output-dir", str(run), "--overwrite", "--freeze", "h.9.*", "--train-only", "last:9"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --train-only is 'last:9', it must be last:1 to last:2, as the model has 2 blocks",
        "error: --freeze is 'h.9.*', which matches no parameter of this model; there are h.1.*, h.0.*, h.*, "
        "for instance",
    ]
    assert {path: path.read_bytes() for path in before} == before


def test_a_choice_in_a_file_is_that_of_the_flags(run, inputs, tmp_path):
    shutil.copy(run / "config.json", tmp_path / "mine.json")
    assert main(["--config", str(tmp_path / "mine.json"), "--output-dir", str(tmp_path / "again")]) == 0
    final = [(folder / "final" / "model.safetensors").read_bytes() for folder in (run, tmp_path / "again")]
    assert final[0] == final[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_the_chosen_weights_only(inputs, tmp_path, precision):
    arguments = ["--train-only", "*.bias", "--precision", precision, "--output-dir", str(tmp_path / "run")]
    assert main([*inputs, *arguments]) == 0
    before = weights_before(inputs)
    changed = {n for n, w in load_file(tmp_path / "run/final/model.safetensors").items() if not w.equal(before[n])}
    assert changed == {name for name in changed if name.endswith("bias")} != set()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("train_only", ["last:1", "*.bias"])
def test_compiled_blocks_train_the_same(train_only):
    losses, gradients = [], []
    for mode in ("none", "default"):
        # Without dropout: compiled code draws its random numbers otherwise.
        model = deep_model(4, "none", embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
        freeze(model, (train_only,), ())
        compile_blocks(model.h, mode, torch.device("cpu"))
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_a_model_of_another_prefix_is_frozen_by_the_same_names(demo_inputs, tmp_path):
    ids = json.loads((demo_inputs[0] / "config.json").read_text())
    ids = {name: ids[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    model = write_model(tmp_path / "m", "tiny", tokenizer_from=demo_inputs[0], prefix="transformer.", **ids)
    arguments = ["--model", str(model), "--dataset", str(demo_inputs[1]), "--max-steps", "2", "--device", "cpu"]
    assert main([*arguments, "--train-only", "ln_f.*", "--output-dir", str(tmp_path / "run")]) == 0
    before = load_file(model / "model.safetensors")
    for name, weight in load_file(tmp_path / "run" / "final" / "model.safetensors").items():
        assert torch.equal(weight, before[f"transformer.{name}"]) is not name.startswith("ln_f.")
