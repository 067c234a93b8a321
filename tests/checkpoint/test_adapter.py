"""Runs with LoRA: what they write against the files that `peft` writes, and adapters of `peft` that they continue."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

import ft
from ft.checkpoint.store import verify_checkpoint
from ft.cli.main import main
from ft.inference.language_model import load_language_model
from ft.model.packing import Packing
from tests.reference.synthetic import write_model

SETTINGS = ["--precision", "fp32", "--eval-steps", "5", "--save-steps", "5", "--logging-steps", "1"]
LORA = ["--lora-rank", "4", "--learning-rate", "1e-2"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEXTS = ["a gorgeous , witty film", "dull"]


def base_of(inputs):
    return Path(inputs[1])


def train(inputs, folder, *flags):
    assert main([*inputs, *SETTINGS, *flags, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run of 10 steps with an adapter."""
    return train(inputs, tmp_path_factory.mktemp("lora") / "run", *LORA)


@pytest.fixture(scope="module")
def with_biases(inputs, tmp_path_factory):
    """One that trained the biases too."""
    targets = ["--lora-targets", "c_attn", "attn.c_proj", "--lora-alpha", "5.5", "--train-only", "*.bias"]
    return train(inputs, tmp_path_factory.mktemp("lora") / "run", *LORA, *targets)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run, to be continued or damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def transformers_base(inputs):
    return transformers.AutoModelForCausalLM.from_pretrained(base_of(inputs))


def logits_of(model, ids):
    with torch.inference_mode():
        if isinstance(model, ft.inference.language_model.LanguageModel):
            return model.model(torch.tensor(ids), Packing.of([len(ids)]))
        return model.eval()(torch.tensor([ids])).logits[0]


IDS = [5, 17, 250, 3, 99, 41]


def assert_same_logits(ours, expected):
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


# --- what a run writes


@pytest.mark.parametrize("which", ["finished", "with_biases"])
@pytest.mark.parametrize("where", ["adapter", "checkpoint-10"])
def test_peft_loads_what_a_run_writes_and_computes_the_same(which, where, inputs, request):
    run = request.getfixturevalue(which)
    theirs = peft.PeftModel.from_pretrained(transformers_base(inputs), run / where)
    expected = logits_of(theirs, IDS)
    assert not torch.allclose(expected, logits_of(transformers_base(inputs), IDS), atol=1e-2), "or nothing was trained"
    assert_same_logits(logits_of(load_language_model(run / where, device="cpu"), IDS), expected)
    final = transformers.AutoModelForCausalLM.from_pretrained(run / "final")
    assert_same_logits(logits_of(final, IDS), expected)
    merged = theirs.merge_and_unload().transformer.state_dict()
    for name, weight in load_file(run / "final" / "model.safetensors").items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["finished", "with_biases"])
def test_the_files_are_those_that_peft_writes(which, inputs, request, tmp_path):
    run = request.getfixturevalue(which)
    theirs = peft.PeftModel.from_pretrained(transformers_base(inputs), run / "adapter", is_trainable=True)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (run / "adapter" / WEIGHTS).read_bytes()
    # A configuration made by peft itself, from the flags.
    made = {
        "finished": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"]},
        "with_biases": {"r": 4, "lora_alpha": 5.5, "target_modules": ["c_attn", "attn.c_proj"], "bias": "all"},
    }[which]
    made = peft.LoraConfig(**made, lora_dropout=0.0, fan_in_fan_out=True, task_type="CAUSAL_LM", inference_mode=True)
    made.base_model_name_or_path = str(base_of(inputs))
    made.save_pretrained(tmp_path / "made")
    expected = json.loads((tmp_path / "made" / CONFIG).read_text())
    ours = json.loads((run / "adapter" / CONFIG).read_text())
    assert sorted(ours.pop("target_modules")) == sorted(expected.pop("target_modules"))
    assert ours == {name: expected[name] for name in ours}
    defaults = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
    assert all(
        value == defaults.get(name) for name, value in expected.items() if name not in ours | {"peft_version": 0}
    )
    loaded = peft.LoraConfig.from_pretrained(run / "adapter")
    assert loaded.to_dict() == {**made.to_dict(), "target_modules": loaded.target_modules}


@pytest.mark.parametrize(
    ("patterns", "targets"),
    [
        (["c_attn"], ["c_attn"]),
        (["mlp.c_proj"], ["mlp.c_proj"]),
        (["*.c_proj"], ["c_proj"]),
        (["last:1"], [f"h.1.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]),
        (["h.0.attn.c_attn", "mlp.*"], ["c_fc", "mlp.c_proj", "h.0.attn.c_attn"]),
    ],
)
def test_peft_selects_the_same_layers(patterns, targets, inputs, tmp_path):
    run = train(inputs, tmp_path / "run", *LORA, "--max-steps", "1", "--lora-targets", *patterns)
    assert json.loads((run / "adapter" / CONFIG).read_text())["target_modules"] == targets
    config = peft.LoraConfig.from_pretrained(run / "adapter")
    theirs = peft.get_peft_model(transformers_base(inputs), config)
    names = {name.replace(".default", "") for name, _ in theirs.named_parameters() if "lora_" in name}
    assert names == set(load_file(run / "adapter" / WEIGHTS))


def test_a_checkpoint_has_the_adapter_and_its_moments_only(finished, inputs, capsys):
    folder = finished / "checkpoint-10"
    assert verify_checkpoint(folder) is None
    files = {path.name for path in folder.iterdir()}
    others = {"ft.json", "manifest.json", "optimizer.safetensors", "rng.safetensors", "state.json"}
    assert files == {CONFIG, WEIGHTS} | others
    adapter = load_file(folder / WEIGHTS)
    optimizer = load_file(folder / "optimizer.safetensors")
    names = [name.removeprefix("base_model.model.transformer.").removesuffix(".weight") for name in adapter]
    assert set(optimizer) == {f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in names}
    numbers = sum(tensor.numel() for tensor in adapter.values())
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert 12 * numbers <= size <= 12 * numbers + 30_000
    assert size < 0.2 * (base_of(inputs) / "model.safetensors").stat().st_size


def test_the_base_is_not_changed(finished, inputs):
    base = load_file(base_of(inputs) / "model.safetensors")
    for name, weight in load_file(finished / "final" / "model.safetensors").items():
        assert torch.equal(weight, base[name]) is not bool(re.search(r"c_\w+\.weight$", name)), name


def test_the_start_names_what_is_trained_and_the_disk_space(inputs, tmp_path, capsys):
    run = train(inputs, tmp_path / "run", *LORA)
    output = capsys.readouterr().out
    trained = sum(tensor.numel() for tensor in load_file(run / "adapter" / WEIGHTS).values())
    everything = sum(tensor.numel() for tensor in load_file(run / "final" / "model.safetensors").values())
    assert f": {trained:,} of {everything + trained:,} parameters, on cpu" in output
    assert f"a checkpoint takes {12 * trained / 1e6:.1f} MB" in output
    assert f"A GPT-2 of {everything:,} parameters" in (run / "final" / "README.md").read_text()


# --- resume


def stop_after_first_save(monkeypatch, arguments):
    from ft.checkpoint.async_writer import AsyncWriter

    save = AsyncWriter.save

    def save_and_break(self, snapshot):
        save(self, snapshot)
        self.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AsyncWriter, "save", save_and_break)
        assert main(arguments) == 130


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora-dropout", "0.2"],
        ["--train-only", "*.bias", "--lora-targets", "c_attn", "--save-blocking", "--precision", "bf16"],
        ["--freeze", "*.lora_A", "--activation-checkpointing", "selective"],
    ],
)
def test_a_resumed_run_ends_in_the_same_bits(inputs, tmp_path, monkeypatch, flags):
    calm = train(inputs, tmp_path / "calm", *LORA, *flags)
    broken = tmp_path / "broken"
    stop_after_first_save(monkeypatch, [*inputs, *SETTINGS, *LORA, *flags, "--output-dir", str(broken)])
    torch.manual_seed(999)
    assert main(["--resume", str(broken)]) == 0
    for name in (WEIGHTS, "optimizer.safetensors", "rng.safetensors", CONFIG, "ft.json"):
        assert (calm / "checkpoint-10" / name).read_bytes() == (broken / "checkpoint-10" / name).read_bytes(), name
    for name in ("final/model.safetensors", f"adapter/{WEIGHTS}", f"adapter/{CONFIG}"):
        assert (calm / name).read_bytes() == (broken / name).read_bytes(), name


def test_a_finished_run_is_not_repeated_and_a_missing_adapter_is_written_again(run, capsys):
    assert main(["--resume", str(run)]) == 0
    assert "This run is finished" in capsys.readouterr().out
    before = (run / "adapter" / WEIGHTS).read_bytes()
    for missing in ("adapter", "final"):
        shutil.rmtree(run / missing)
        assert main(["--resume", str(run)]) == 0
        assert (run / "adapter" / WEIGHTS).read_bytes() == before
        assert (run / "final" / "model.safetensors").exists()


def test_another_base_is_refused_and_the_same_one_elsewhere_is_not(run, inputs, tmp_path, capsys):
    longer = ["--resume", str(run), "--epochs", "2"]
    other = shutil.copytree(base_of(inputs), tmp_path / "other")
    assert main([*longer, "--model", str(other)]) == 0
    weights = load_file(other / "model.safetensors")
    weights["h.0.mlp.c_fc.weight"][0, 0] += 1e-3
    save_file(weights, other / "model.safetensors")
    capsys.readouterr()
    assert main([*longer, "--epochs", "3", "--model", str(other)]) == 1
    error = capsys.readouterr().err
    assert "checkpoint-20 was trained on another base: the SHA-256 of the base's weights was " in error
    assert str(other) in error
    shutil.rmtree(other)
    assert main([*longer, "--epochs", "3"]) == 2
    assert f"there is no run {other}; in" in capsys.readouterr().err


def test_a_damaged_adapter_is_ignored_on_resume(run, capsys):
    path = run / "checkpoint-10" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert main(["--resume", str(run)]) == 0
    output = capsys.readouterr().out
    assert f"checkpoint-10 is damaged and ignored: {WEIGHTS} has another digest" in output
    assert verify_checkpoint(run / "checkpoint-10") is None


@pytest.mark.parametrize("flags", [["--static-shapes"], ["--precision", "fp16"], ["--forgetting", "builtin"]])
def test_other_settings_work_with_an_adapter(flags, inputs, tmp_path):
    run = train(inputs, tmp_path / "run", *LORA, *flags, "--max-steps", "6")
    assert (run / "metrics.jsonl").exists()
    assert_same_logits(
        logits_of(load_language_model(run / "adapter", device="cpu"), IDS),
        logits_of(load_language_model(run / "final", device="cpu"), IDS),
    )


# --- adapters of peft


@pytest.fixture
def trained_by_peft(inputs, tmp_path):
    """An adapter that peft has trained a little; returns a function from peft's options to its directory."""

    def make(name="theirs", **options):
        torch.manual_seed(3)
        options = {"target_modules": ["c_attn", "c_fc"], "r": 3, "lora_alpha": 7, **options}
        options = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True, **options}
        model = peft.get_peft_model(transformers_base(inputs), peft.LoraConfig(**options)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(5):
            ids = torch.randint(0, 250, (4, 12), generator=torch.Generator().manual_seed(step))
            logits = model(ids).logits
            logits = logits.logits if hasattr(logits, "logits") else logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return make


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": "all", "lora_dropout": 0.1},
        {"bias": "lora_only", "use_rslora": True},
        {"layers_to_transform": [1], "init_lora_weights": "gaussian"},
    ],
)
def test_an_adapter_of_peft_predicts_as_in_peft_and_is_continued(options, inputs, tmp_path, trained_by_peft, capsys):
    adapter, theirs = trained_by_peft(**options)
    expected = logits_of(theirs, IDS)
    ours = load_language_model(adapter, device="cpu")
    assert_same_logits(logits_of(ours, IDS), expected)
    assert ft.load(adapter, device="cpu", label_names=["neg", "pos"]).predict(TEXTS)

    # With a learning rate of 0 the run writes what it read.
    kept = train(inputs, tmp_path / "kept", "--adapter", str(adapter), "--learning-rate", "0", "--max-steps", "2")
    read, written = (load_file(folder / WEIGHTS) for folder in (adapter, kept / "adapter"))
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in read)
    configs = [json.loads((folder / CONFIG).read_text()) for folder in (adapter, kept / "adapter")]
    for name in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora"):
        assert configs[0][name] == configs[1][name]

    # Continued, it changes, and peft computes the same as we do.
    run = train(inputs, tmp_path / "run", "--adapter", str(adapter), "--learning-rate", "1e-2")
    capsys.readouterr()
    changed = load_file(run / "adapter" / WEIGHTS)
    assert not any(torch.equal(read[name], changed[name]) for name in read if "lora_" in name)
    assert any(not torch.equal(read[name], changed[name]) for name in read if name.endswith("bias")) is (
        options.get("bias") is not None
    )
    continued = peft.PeftModel.from_pretrained(transformers_base(inputs), run / "adapter")
    assert_same_logits(logits_of(load_language_model(run / "adapter", device="cpu"), IDS), logits_of(continued, IDS))
    shutil.rmtree(adapter)
    assert main(["--resume", str(run), "--epochs", "2"]) == 0, "a resumed run reads its checkpoint"


REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora is True, which this program does not compute.*merge_and_unload"),
    "other ranks": ({"rank_pattern": {"c_fc": 5}}, r"rank_pattern is {'c_fc': 5}, which this program does not"),
    "other scales": ({"alpha_pattern": {"c_fc": 5}}, "alpha_pattern is"),
    "full modules": ({"modules_to_save": ["ln_f"]}, r"modules_to_save is \['ln_f'\], which"),
    "biases of B": ({"lora_bias": True}, "lora_bias is True"),
    "another task": ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', this program trains CAUSAL_LM"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3', it must be LORA"),
    "another base": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which also changed the weights"),
    "unknown": ({"use_later_invention": True}, "use_later_invention is True, which"),
    "rank 0": ({"r": 0}, "r is 0, it must be a whole number from 1"),
    "rank in words": ({"r": "8"}, "r is '8', it must be a whole number"),
    "no rank": ({"r": None}, "r is None, it must be"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha is 0, it must be a number above 0"),
    "dropout 1": ({"lora_dropout": 1.0}, "lora_dropout is 1.0, it must be a number from 0 to below 1"),
    "bias": ({"bias": "some"}, "bias is 'some', it must be none, all or lora_only"),
    "a surrogate in the base": (
        {"base_model_name_or_path": "a\ud800"},
        r"base_model_name_or_path is 'a\\ud800', it must",
    ),
    "NUL in the base": ({"base_model_name_or_path": "a\0"}, r"base_model_name_or_path is 'a\\x00', it must be a str"),
    "NUL in the revision": ({"revision": "a\0"}, r"revision is 'a\\x00', it must be a string without NUL"),
    "wrong rank": ({"r": 5}, r"r is 5, and lora_A of h.0.attn.c_attn in adapter_model.safetensors has shape \(4, 64\)"),
}


@pytest.mark.parametrize(("changes", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_computed_is_refused(changes, problem, run, inputs, tmp_path, capsys):
    path = run / "adapter" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    flags = ["--adapter", str(run / "adapter"), "--output-dir", str(tmp_path / "new")]
    for command in ([*inputs, *flags], ["predict", str(run / "adapter"), "text", "--device", "cpu"]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert re.search(problem, error), error
        assert "adapter_" in error


def damage_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def with_nan(tensors):
    next(iter(tensors.values()))[0, 0] = float("nan")


A_NAME = "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"
DAMAGE = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "No such file"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), f"has no {CONFIG}"),
    "not JSON": (lambda folder: (folder / CONFIG).write_text("{"), "as JSON"),
    "truncated": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
        f"cannot read the weights in .*{WEIGHTS}",
    ),
    "NaN": (lambda folder: damage_tensors(folder, with_nan), "holds NaN or inf"),
    "a tensor less": (lambda folder: damage_tensors(folder, lambda each: each.pop(A_NAME)), f"{A_NAME} is missing"),
    "a tensor more": (
        lambda folder: damage_tensors(folder, lambda each: each.update({"score.weight": torch.zeros(2)})),
        "score.weight is not a tensor of a LoRA adapter of this GPT-2",
    ),
    "nothing of LoRA": (lambda folder: damage_tensors(folder, lambda each: each.clear()), "has no lora_A"),
    "ft.json": (lambda folder: (folder / "ft.json").write_text("{}"), "ft.json has no base_sha256"),
}


@pytest.mark.parametrize(("damage", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(damage, problem, run, inputs, tmp_path, capsys):
    damage(run / "adapter")
    status = 1 if (run / "adapter" / CONFIG).exists() else 2  # a directory without it is no adapter: name another
    assert main([*inputs, "--adapter", str(run / "adapter"), "--output-dir", str(tmp_path / "new")]) == status
    error = capsys.readouterr().err
    assert re.search(problem, error), error


def test_a_revision_of_a_local_base_is_named_by_its_field(run, inputs, capsys):
    path = run / "adapter" / CONFIG
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({**recorded, "revision": "main"}))
    assert main(["predict", str(run / "adapter"), "text", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert f"{path} names" in error
    assert "its revision is 'main', and " in error
    assert "remove the field revision" in error
    assert "--model-revision" not in error
    base = ["--base", recorded["base_model_name_or_path"]]
    assert main(["predict", str(run / "adapter"), "text", "--device", "cpu", *base]) == 0


def bias_names(folder):
    return sorted(name for name in load_file(folder / WEIGHTS) if name.endswith(".bias"))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_missing_bias_is_named(bias, trained_by_peft, inputs, tmp_path, capsys):
    adapter, _ = trained_by_peft(bias=bias)
    name = bias_names(adapter)[1]
    damage_tensors(adapter, lambda tensors: tensors.pop(name))
    peft.PeftModel.from_pretrained(transformers_base(inputs), adapter)  # keeps the bias of the base
    flags = ["--adapter", str(adapter), "--output-dir", str(tmp_path / "new")]
    labels = ["--label-names", "neg,pos"]
    for command in ([*inputs, *flags], ["predict", str(adapter), "text", "--device", "cpu", *labels]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert f"{name} is missing, and bias in adapter_config.json is '{bias}'" in error, error
        assert error.count(".bias") == 1, "the others are there"


@pytest.mark.parametrize(("trained", "recorded"), [("all", "none"), ("lora_only", "none"), ("all", "lora_only")])
def test_a_bias_beyond_the_configuration_is_named(trained, recorded, trained_by_peft, inputs, tmp_path, capsys):
    adapter, _ = trained_by_peft(bias=trained)
    path = adapter / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "bias": recorded}))
    extra = [name for name in bias_names(adapter) if recorded == "none" or ".base_layer." not in name]
    assert main([*inputs, "--adapter", str(adapter), "--output-dir", str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    named = re.findall(r"(\S+) is in the file, and bias in adapter_config.json is '(\w+)'", error)
    assert named, error
    assert {name for name, _ in named} <= set(extra)
    assert {bias for _, bias in named} == {recorded}


def test_flags_that_differ_from_the_adapter_are_refused(finished, inputs, tmp_path, capsys):
    flags = ["--lora-rank", "8", "--lora-alpha", "3", "--lora-targets", "c_fc"]
    adapter = ["--adapter", str(finished / "adapter"), "--output-dir", str(tmp_path / "new")]
    assert main([*inputs, *adapter, *flags]) == 2
    errors = capsys.readouterr().err.splitlines()
    adapter_of = f"the adapter in {finished / 'adapter'} has"
    assert errors[:2] == [
        f"error: --lora-rank is 8, and {adapter_of} 4: leave it out",
        f"error: --lora-alpha is 3.0, and {adapter_of} 8.0: leave it out",
    ]
    assert errors[2].startswith("error: --lora-targets is ('h.0.mlp.c_fc', 'h.1.mlp.c_fc'), and the adapter in ")
    same = ["--lora-rank", "4", "--lora-alpha", "8", "--lora-targets", "c_*", "--lora-dropout", "0.5"]
    assert main([*inputs, *adapter, *same, "--max-steps", "1"]) == 0
    assert json.loads((tmp_path / "new" / "adapter" / CONFIG).read_text())["lora_dropout"] == 0.5


def test_an_adapter_of_a_shallower_base_is_refused_and_one_of_another_name_reported(
    inputs, trained_by_peft, tmp_path, capsys
):
    adapter, _ = trained_by_peft()
    config = json.loads((base_of(inputs) / "config.json").read_text())
    ids = {name: config[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    deep = write_model(tmp_path / "deep", "tiny", tokenizer_from=base_of(inputs), **ids, n_layer=3)
    flags = ["--adapter", str(adapter), "--output-dir", str(tmp_path / "new"), "--max-steps", "1"]
    assert main([*inputs, "--model", str(deep), *flags]) == 1
    assert "selects h.2.attn.c_attn, for which adapter_model.safetensors has no lora_A" in capsys.readouterr().err
    elsewhere = shutil.copytree(base_of(inputs), tmp_path / "elsewhere")
    assert main([*inputs, "--model", str(elsewhere), *flags]) == 0
    assert f"names {base_of(inputs)} as its base, and --model is {elsewhere}" in capsys.readouterr().out
    assert main([*inputs, *flags[:2], "--output-dir", str(tmp_path / "same"), "--max-steps", "1"]) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_an_adapter_of_another_size_or_place_is_refused(inputs, trained_by_peft, tmp_path, capsys):
    adapter, _ = trained_by_peft()
    config = json.loads((base_of(inputs) / "config.json").read_text())
    ids = {name: config[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    wide = write_model(tmp_path / "wide", "tiny", tokenizer_from=base_of(inputs), **ids, n_embd=32)
    rest = ["--output-dir", str(tmp_path / "new")]
    assert main([*inputs, "--model", str(wide), "--adapter", str(adapter), *rest]) == 1
    assert re.search(r"lora_A.weight has shape \(3, 64\), the configuration says \(3, 32\)", capsys.readouterr().err)
    assert main([*inputs, "--adapter", str(tmp_path / "nowhere"), *rest]) == 2
    assert "there is no such directory; it must have adapter_config.json" in capsys.readouterr().err
    assert main([*inputs, "--model", str(adapter), *rest]) == 1
    message = capsys.readouterr().err
    assert "is an adapter, not a full model: pass it as --adapter" in message
    assert "predict, evaluate, generate and export take it as it is" in message


@pytest.mark.parametrize(
    ("flags", "status", "problem"),
    [
        ("--lora-rank 0", 2, "--lora-rank is 0, it must be at least 1"),
        ("--lora-rank -1", 2, "--lora-rank is -1, it must be at least 1"),
        ("--lora-rank x", 2, "--lora-rank is 'x', it must be a whole number"),
        ("--lora-rank 65", 2, "--lora-rank is 65, it must be at most 64, the width of h.0.attn.c_attn"),
        ("--lora-rank 4 --lora-alpha 0", 2, "--lora-alpha is 0.0, it must be above 0"),
        ("--lora-rank 4 --lora-alpha nan", 2, "--lora-alpha is nan, it must be finite"),
        ("--lora-rank 4 --lora-dropout 1", 2, "--lora-dropout is 1.0, it must be below 1"),
        ("--lora-rank 4 --lora-targets q_proj", 2, "--lora-targets is 'q_proj', which matches no linear layer"),
        (
            "--lora-rank 4 --lora-targets wte ln_f",
            2,
            "--lora-targets is 'ln_f', which matches ln_f, not a linear layer",
        ),
        ("--lora-rank 4 --train-only wte.weight", 2, "--train-only selects wte.weight, and beside an adapter only"),
        ("--lora-rank 4 --freeze *", 2, "nothing is left to train"),
        ("--lora-rank 4 --init random", 2, "--init random trains all weights anew, and LoRA changes"),
        ("--lora-alpha 4", 2, "--lora-alpha is for LoRA, which --lora-rank 8 or --adapter turns on"),
        ("--lora_r 4", 2, "there is no flag --lora_r, is it --lora-rank?"),
        ("--lora-r 4", 2, "there is no flag --lora-r, is it --lora-rank?"),
        ("--lora_target_modules c_attn", 2, "there is no flag --lora_target_modules, is it --lora-targets?"),
    ],
)
def test_wrong_flags_are_refused_with_a_remedy(flags, status, problem, inputs, tmp_path, capsys):
    assert main([*inputs, *flags.split(), "--output-dir", str(tmp_path / "run")]) == status
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


# --- the commands


def test_commands_read_an_adapter_a_checkpoint_and_an_unfinished_run(run, inputs, tmp_path, capsys):
    expected = ft.load(run, device="cpu").predict(TEXTS)
    for source in (run / "adapter", run / "checkpoint-10"):
        classifier = ft.load(source, device="cpu")
        assert classifier.label_names == ("neg", "pos")
        for ours, theirs in zip(classifier.predict(TEXTS), expected, strict=True):
            assert ours.label == theirs.label
            assert ours.probabilities["pos"] == pytest.approx(theirs.probabilities["pos"], rel=1e-5)
        assert main(["predict", str(source), *TEXTS, "--device", "cpu"]) == 0
        assert main(["evaluate", str(source), "--device", "cpu"]) == 0
        assert main(["generate", str(source), "the film", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    capsys.readouterr()
    shutil.rmtree(run / "final")
    assert ft.load(run, device="cpu").source == str(run / "checkpoint-10")
    assert main(["explain", *inputs, *LORA]) == 0


def test_the_base_can_be_a_run(run, inputs, tmp_path):
    second = train([inputs[0], str(run), *inputs[2:]], tmp_path / "second", *LORA)
    recorded = json.loads((second / "adapter" / CONFIG).read_text())["base_model_name_or_path"]
    assert recorded == str(run / "final"), "peft reads no run directory"
    expected, ours = (ft.load(second / name, device="cpu").predict(TEXTS) for name in ("final", "adapter"))
    assert ours[0].probabilities["pos"] == pytest.approx(expected[0].probabilities["pos"], rel=1e-5)
    assert ft.load(second / "adapter", device="cpu", base=run).predict(TEXTS) == ours


def test_generation_from_an_adapter_is_that_of_the_merged_model(run):
    texts = [
        load_language_model(run / name, device="cpu").generate("the film", max_new_tokens=12)
        for name in ("adapter", "final")
    ]
    assert texts[0] == texts[1] != ""


def test_a_base_can_be_elsewhere(run, inputs, tmp_path, capsys):
    moved = shutil.copytree(base_of(inputs), tmp_path / "moved")
    path = run / "adapter" / CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    command = ["predict", str(run / "adapter"), "text", "--device", "cpu"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "cannot load the base of the adapter" in error
    assert "adapter_config.json names; --base, in Python base=, names another place" in error
    assert main([*command, "--base", str(moved)]) == 0
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert main(command) == 1
    assert "does not name its base: name it by --base" in capsys.readouterr().err
    weights = load_file(moved / "model.safetensors")
    weights["wpe.weight"][3] += 1
    save_file(weights, moved / "model.safetensors")
    assert main([*command, "--base", str(moved)]) == 1
    assert "was trained on another base" in capsys.readouterr().err
    assert main(["predict", str(run / "final"), "text", "--device", "cpu", "--base", str(moved)]) == 2
    assert "is not an adapter: leave the base out" in capsys.readouterr().err


def test_weights_that_are_a_fifo_do_not_block(run, inputs, tmp_path, capsys):
    path = run / "adapter" / WEIGHTS
    path.unlink()
    os.mkfifo(path)
    flags = ["--adapter", str(run / "adapter"), "--output-dir", str(tmp_path / "new")]
    for command in ([*inputs, *flags], ["predict", str(run / "adapter"), "text", "--device", "cpu"]):
        assert main(command) == 1
        assert f"{WEIGHTS} is not a file" in capsys.readouterr().err


def test_a_run_in_place_of_its_adapter_is_wrong_usage(run, inputs, tmp_path, capsys):
    assert main([*inputs, "--adapter", str(run), "--output-dir", str(tmp_path / "new")]) == 2
    assert f"which has no {CONFIG}: it is in {run / 'adapter'}" in capsys.readouterr().err
