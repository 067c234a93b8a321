"""Model folders against `transformers`, and what happens when a checkpoint is incomplete or does not fit."""

import json
import re
import shutil
from dataclasses import fields

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ft.checkpoint.model_description import read_description
from ft.checkpoint.snapshot import gather_weights, load_training_state, take_snapshot
from ft.checkpoint.store import checkpoints, step_of, verify_checkpoint, write_checkpoint
from ft.checkpoint.store import save_model as write_model
from ft.errors import FtError
from ft.io.atomic import StagedDirectory, atomic_directory, remove_stale_staging
from ft.io.model_layout import model_files
from ft.io.plain_files import read_json
from ft.model.gpt2 import GPT2, GPT2Config
from ft.model.packing import Packing
from ft.model.pretrained import load_weights
from ft.train.optim import build_optimizer
from ft.train.state import State
from tests.faults import Fault, Faults


@pytest.fixture
def source(demo_inputs):
    folder, _ = demo_inputs
    return read_description(model_files(str(folder))).source(("neg", "pos"))


@pytest.fixture
def model(source):
    model = GPT2(GPT2Config.from_dict(source.config))
    model.init_weights(3)
    return model


@pytest.fixture
def trained(model):
    """A model that has made one optimizer step, with its optimizer and scaler."""
    optimizer = build_optimizer(model, 1e-3, 0.0)
    model(torch.tensor([1, 2, 3]), Packing.of([3])).square().mean().backward()
    optimizer.step()
    return model, optimizer, torch.amp.GradScaler("cpu", enabled=False)


def save_model(path, model, source):
    write_model(StagedDirectory(path), model.config, gather_weights(model), source)


def save_checkpoint(run, model, source, optimizer, scaler, state, keep, keep_best=False):
    snapshot = take_snapshot(model, optimizer, scaler, state, copy=False)
    write_checkpoint(run, snapshot, source, keep=keep, keep_best=keep_best)


def test_transformers_loads_what_we_save_with_equal_logits_and_tokens(model, source, tmp_path, caplog):
    save_model(tmp_path, model, source)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert reference.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}, (
        "a pipeline would give an untrained head these names"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the plot is dull , but the acting is superb ."
    ids = tokenizer(text)["input_ids"]
    from tokenizers import Tokenizer

    assert ids == Tokenizer.from_buffer(source.tokenizer).encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == reference.generation_config.eos_token_id == source.config["eos_token_id"]
    assert tokenizer.model_max_length == model.config.n_positions
    with torch.inference_mode():
        ours = model.eval()(torch.tensor(ids), Packing.of([len(ids)]))
        theirs = reference.eval()(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        reference.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)


def test_a_saved_model_can_be_fine_tuned_again(model, source, tmp_path):
    save_model(tmp_path, model, source)
    again = GPT2(GPT2Config.from_dict(read_json(tmp_path / "config.json")))
    load_weights(again, [tmp_path / "model.safetensors"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_sharded_weights_load(model, tmp_path):
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:9]}, tmp_path / "a.safetensors")
    save_file({name: tensors[name] for name in names[9:]}, tmp_path / "b.safetensors")
    again = GPT2(model.config)
    load_weights(again, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_dropout_of_the_run_is_recorded(source, tmp_path):
    config = GPT2Config.from_dict({**source.config, "attn_pdrop": 0.25})
    model = GPT2(config)
    model.init_weights(0)
    save_model(tmp_path, model, source)
    assert read_json(tmp_path / "config.json")["attn_pdrop"] == 0.25


def restore(folder, model, optimizer, scaler):
    load_weights(model, [folder / "model.safetensors"])
    return load_training_state(folder, model, optimizer, scaler)


def test_everything_comes_back(trained, source, tmp_path):
    model, optimizer, scaler = trained
    state = State(step=7, loss_sum=0.1, loss_steps=3, best_step=5, best_accuracy=0.5, metrics_bytes=11, seconds=1.5)
    torch.manual_seed(5)
    save_checkpoint(tmp_path, model, source, optimizer, scaler, state, keep=2)
    drawn = torch.rand(4)

    again = GPT2(model.config)
    fresh = build_optimizer(again, 1e-3, 0.0)
    torch.manual_seed(6)
    assert restore(tmp_path / "checkpoint-7", again, fresh, scaler) == state
    assert torch.equal(torch.rand(4), drawn)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, value in optimizer.state[theirs].items():
            assert torch.equal(fresh.state[ours][key], value), key


def test_a_checkpoint_can_be_deleted_during_the_run(trained, source, tmp_path):
    """What was read from it is memory of its own, not pages of the file."""
    model, optimizer, scaler = trained
    save_checkpoint(tmp_path, model, source, optimizer, scaler, State(step=1), keep=1)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    restore(tmp_path / "checkpoint-1", model, optimizer, scaler)
    for path in (tmp_path / "checkpoint-1").glob("*.safetensors"):
        size = path.stat().st_size
        path.write_bytes(b"\xff" * size)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    assert all(torch.isfinite(value).all() for state in optimizer.state.values() for value in state.values())


def test_no_checkpoint_has_its_name_before_it_is_complete(trained, source, tmp_path, monkeypatch):
    model, optimizer, scaler = trained
    save_checkpoint(tmp_path, model, source, optimizer, scaler, State(step=1), keep=1)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ft.io.atomic.StagedDirectory.write_manifest", fail)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, model, source, optimizer, scaler, State(step=2), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    save_checkpoint(tmp_path, model, source, optimizer, scaler, State(step=2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_whatever_operation_of_a_save_fails_the_newest_good_checkpoint_loads(
    trained, source, tmp_path, record_property
):
    """Writing, forcing to the disk, renaming, and deleting the older ones."""
    model, optimizer, scaler = trained
    for step in (1, 2):
        save_checkpoint(tmp_path / "before", model, source, optimizer, scaler, State(step=step), keep=2)
    failures = 0
    for fails_at in range(1, 1000):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "before", run)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, fails_at)
            try:
                save_checkpoint(run, model, source, optimizer, scaler, State(step=3), keep=1)
                failed = False
            except Fault:
                failed = True
        failures += failed
        remove_stale_staging(run)
        found = checkpoints(run)
        assert all(verify_checkpoint(folder) is None for folder in found)
        assert step_of(found[-1]) == 3 or (failed and step_of(found[-1]) == 2)
        assert restore(found[-1], model, optimizer, scaler) == State(step=step_of(found[-1]))
        assert {path.name for path in run.iterdir()} == {path.name for path in found}
        if faults.count < fails_at:
            break
    else:
        pytest.fail("there is always one more operation")
    assert [step_of(folder) for folder in found] == [3]
    assert failures > 50
    record_property("file operations made to fail", fails_at - 1)


def test_a_directory_is_replaced_atomically(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    with atomic_directory(tmp_path / "final") as folder:
        folder.write("new", [])
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["new"]


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-x", ".unfinished-checkpoint-300"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-500").touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]


def without(name):
    def change(folder):
        tensors = load_file(folder / "optimizer.safetensors")
        tensors.pop(name)
        save_file(tensors, folder / "optimizer.safetensors")

    return change


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut("model.safetensors"), r"cannot read the weights in .*model\.safetensors"),
        (cut("optimizer.safetensors"), r"cannot read the weights in .*optimizer\.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"cannot read the weights in .*model\.safetensors"),
        (without("exp_avg.wte.weight"), r"optimizer.safetensors has no exp_avg.wte.weight"),
        (lambda folder: (folder / "state.json").write_text("{"), r"cannot read .*state\.json as JSON"),
        (lambda folder: (folder / "state.json").write_text("[]"), r"state\.json must contain a JSON object"),
        (
            lambda folder: (folder / "state.json").write_text(json.dumps({"stop": 1, "grad_scaler": {}})),
            r"state\.json: stop is unknown",
        ),
        (lambda folder: (folder / "state.json").write_text('{"grad_scaler": {}}'), r"state\.json: step is missing"),
        (lambda folder: (folder / "state.json").write_text("{}"), r"state\.json has no grad_scaler"),
    ],
)
def test_a_damaged_checkpoint_is_named(trained, source, tmp_path, change, message):
    model, optimizer, scaler = trained
    save_checkpoint(tmp_path, model, source, optimizer, scaler, State(step=1), keep=1)
    change(tmp_path / "checkpoint-1")
    with pytest.raises(FtError, match=message):
        restore(tmp_path / "checkpoint-1", model, optimizer, scaler)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 2}, "is of step 2, which is not that of its directory"),
        ({"step": True}, "step is 'True', it must be of type int"),
        ({"step": 1.0}, "step is '1.0', it must be of type int"),
        ({"seconds": float("nan")}, "seconds is nan, it must be from 0 to 1e"),
        ({"seconds": 1e30}, r"seconds is 1e\+30, it must be from 0 to 1e"),
        ({"seconds": -1}, "seconds is -1, it must be from 0"),
        ({"loss_sum": float("inf")}, "loss_sum is inf, it must be finite"),
        ({"train_loss_sum": 10**400}, "train_loss_sum is 10000.*, it must be finite"),
        ({"general_loss": 10**400}, "general_loss is 10000"),
        ({"loss_sum": False}, "loss_sum is 'False', it must be of type float"),
        ({"evaluation_due": 1}, "evaluation_due is '1', it must be of type bool"),
        ({"best_step": 3}, "best_step is 3, it must be from 0 to the step"),
        ({"skipped_steps": 5}, "skipped_steps is 5"),
        ({"best_accuracy": 1.5}, "best_accuracy is 1.5, it must be from 0 to 1"),
        ({"metrics_bytes": 2**64}, "metrics_bytes is 18446744073709551616"),
        ({"data": None}, "data is 'None', it must be of type str"),
    ],
)
def test_an_impossible_state_is_damage(trained, source, tmp_path, changes, message):
    """With a manifest to match: it may have been written so."""
    model, optimizer, scaler = trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ft.checkpoint.store.asdict", lambda state: {**vars(state), **changes})
        save_checkpoint(tmp_path, model, source, optimizer, scaler, State(step=1), keep=1)
    assert re.search(message, verify_checkpoint(tmp_path / "checkpoint-1"))
    with pytest.raises(FtError, match=message):
        restore(tmp_path / "checkpoint-1", model, optimizer, scaler)


def test_a_state_without_the_figures_of_later_versions_and_with_losses_that_overflowed_is_read(
    trained, source, tmp_path
):
    model, optimizer, scaler = trained
    old = {"step": 1, "seconds": 2, "last_loss": float("inf"), "general_loss": float("nan")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ft.checkpoint.store.asdict", lambda state: old)
        save_checkpoint(tmp_path, model, source, optimizer, scaler, State(step=1), keep=1)
    assert verify_checkpoint(tmp_path / "checkpoint-1") is None
    assert restore(tmp_path / "checkpoint-1", model, optimizer, scaler).last_loss == float("inf")


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=1), st.integers(), max_size=1)
)
STATE = st.fixed_dictionaries({}, optional=dict.fromkeys([*(field.name for field in fields(State)), "other"], VALUES))
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker", "other")
SCALE = st.fixed_dictionaries({}, optional=dict.fromkeys(SCALER, VALUES))


@given(STATE, SCALE | VALUES)
@settings(
    derandomize=True, deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_state_leads_to_a_traceback(trained, source, tmp_path, changes, scale):
    """It is understood, or refused by name; what is understood can be gone on with."""
    model, optimizer, _ = trained
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    folder = tmp_path / "checkpoint-1"
    if not folder.exists():
        save_checkpoint(tmp_path, model, source, optimizer, scaler, State(step=1), keep=1)
    good = read_json(folder / "state.json")
    saved_scale = {**good["grad_scaler"], **scale} if isinstance(scale, dict) else scale
    (folder / "state.json").write_text(json.dumps({**good, **changes, "grad_scaler": saved_scale}))
    try:
        state = restore(folder, model, optimizer, scaler)
        scaler.scale(torch.ones(()))
        scaler.state_dict()
        state.record_evaluation(0.5, 0.5)
    except FtError as error:
        assert "state.json" in str(error)  # noqa: PT017
    (folder / "state.json").write_text(json.dumps(good))


@pytest.mark.parametrize(
    "states",
    [
        {},
        {"cpu": torch.zeros(3, dtype=torch.uint8)},
        {"cpu": torch.zeros(5056)},
        {"cpu": torch.zeros(5056, dtype=torch.uint8)},
        {"cpu": torch.zeros(0, dtype=torch.uint8)},
        {"cuda:0": torch.zeros(3, dtype=torch.uint8)},
        {"mps": torch.zeros(3, dtype=torch.uint8)},
    ],
)
def test_random_states_that_are_none_are_refused(trained, source, tmp_path, states):
    model, optimizer, scaler = trained
    save_checkpoint(tmp_path, model, source, optimizer, scaler, State(step=1), keep=1)
    save_file(states, tmp_path / "checkpoint-1" / "rng.safetensors")
    with pytest.raises(FtError, match=r"rng\.safetensors|state\.json"):
        restore(tmp_path / "checkpoint-1", model, optimizer, scaler)
