"""Models as other libraries have written them: read as they mean them, and saved so that `transformers` agrees."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ft
from ft.checkpoint.model_description import read_description
from ft.cli.main import main
from ft.errors import FtError
from ft.io.model_layout import model_files
from ft.io.plain_files import read_json
from ft.model.packing import Packing


@pytest.fixture
def model(inputs, tmp_path):
    """A copy of the small model that may be rewritten."""
    shutil.copytree(inputs[1], tmp_path / "model")
    return tmp_path / "model"


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def fine_tune(inputs, model, tmp_path):
    """Train for a step; returns the run."""

    def fine_tune(*flags):
        arguments = ["--model", str(model), *inputs[2:], "--precision", "fp32", "--max-steps", "1", "--overwrite"]
        assert main([*arguments, "--output-dir", str(tmp_path / "run"), *flags]) == 0
        return tmp_path / "run"

    return fine_tune


def logits(loaded, ids):
    with torch.inference_mode():
        return loaded.model(torch.tensor(ids), Packing.of([len(ids)]))


def assert_transformers_agrees(folder):
    """What `transformers` loads by its defaults has the same weights, bit for bit, and the same logits."""
    ours, theirs = (
        ft.load(folder, device="cpu", label_names=("neg", "pos")),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    body = theirs.transformer.state_dict()
    assert all(torch.equal(parameter, body[name]) for name, parameter in ours.model.named_parameters())
    ids = [1, 5, 2, 9, 300]
    expected = theirs.eval()(torch.tensor([ids])).logits[0].detach()
    torch.testing.assert_close(logits(ours, ids), expected, rtol=1e-5, atol=1e-5)


# --- the type of the weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "float16", "float64", "float32", "torch.bfloat16", None, "auto"])
def test_config_and_weights_agree_whatever_the_source_had(model, fine_tune, key, value):
    stored = getattr(torch, str(value).removeprefix("torch."), torch.float32)
    weights = {name: tensor.to(stored) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    change(model / "config.json", **{key: value})
    run = fine_tune("--save-steps", "1")
    for folder in (run / "checkpoint-1", run / "final"):
        config, tensors = read_json(folder / "config.json"), load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, config["dtype"])} == {torch.float32}
        assert "torch_dtype" not in config
    assert_transformers_agrees(run / "final")


# --- config.json ------------------------------------------------------------------------------------------------------


def test_only_what_describes_the_model_is_carried_over(model, fine_tune):
    change(
        model / "config.json",
        auto_map={"AutoModelForCausalLM": "evil.Model"},
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
        task_specific_params={"text-generation": {"do_sample": True}},
        _name_or_path="/home/me/x",
        anything={"x": 1},
        pad_token_id=3,
        activation_function="gelu_pytorch_tanh",
        n_ctx=64,
    )
    config = read_json(fine_tune() / "final/config.json")
    source = read_json(model / "config.json")
    sizes = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon"]
    sizes += ["embd_pdrop", "attn_pdrop", "resid_pdrop", "initializer_range"]
    mine = ["model_type", "architectures", "dtype", "task_specific_params"]
    carried = ["activation_function", "bos_token_id", "eos_token_id", "pad_token_id", "n_ctx"]
    assert sorted(config) == sorted(sizes + mine + carried)
    assert all(config[name] == source[name] for name in carried)


def test_values_that_transformers_refuses_are_not_carried_over(model, fine_tune):
    change(
        model / "config.json",
        pad_token_id="__import__",
        eos_token_id=["x" * 100_000],
        bos_token_id=[True],
        n_ctx={"a": 1},
        scale_attn_weights=1,
        add_cross_attention=0.0,
    )
    final = fine_tune() / "final"
    config = read_json(final / "config.json")
    assert not {"pad_token_id", "bos_token_id", "n_ctx"} & config.keys()
    assert (config["scale_attn_weights"], config["add_cross_attention"]) == (True, False)
    assert isinstance(config["add_cross_attention"], bool)
    assert_transformers_agrees(final)


def test_token_ids_of_generation_are_those_that_training_uses(model, fine_tune):
    """A tokenizer made anew beside a config.json of the published model: huggingface/olm-training#6."""
    end = json.loads((model / "tokenizer.json").read_text())["added_tokens"][0]["id"]
    change(model / "config.json", eos_token_id=5, bos_token_id=5, pad_token_id=end)
    final = fine_tune() / "final"
    assert read_json(final / "config.json")["eos_token_id"] == end
    loaded = AutoModelForCausalLM.from_pretrained(final)
    generation = loaded.generation_config
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == (end, 5, end)
    change(model / "config.json", eos_token_id=[5, end])
    assert read_json(fine_tune() / "final/config.json")["eos_token_id"] == [5, end]


@pytest.mark.parametrize("name", transformers.activations.ACT2FN)
def test_every_name_of_the_same_activation_is_accepted_and_no_other(model, name):
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    try:
        same = torch.allclose(transformers.activations.ACT2FN[name](x), torch.nn.functional.gelu(x, approximate="tanh"))
    except Exception:  # activations that take other inputs
        same = False
    change(model / "config.json", activation_function=name)
    if same:
        read_description(model_files(str(model)))
        assert_transformers_agrees(model)
    else:
        with pytest.raises(FtError, match=f"activation_function is '{name}'"):
            read_description(model_files(str(model)))


@pytest.mark.parametrize("place", ['{"x\\ud800": 1, ', '{"task": ["\\udfff"], ', '{"x": {"y": [{"\\ud912": 0}]}, '])
def test_a_lone_surrogate_is_refused_before_training(model, inputs, tmp_path, place, capsys):
    path = model / "config.json"
    path.write_text(path.read_text().replace("{", place, 1))
    assert main(["--model", str(model), *inputs[2:], "--output-dir", str(tmp_path / "run")]) == 1
    assert "config.json is not UTF-8: it holds" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- weights ----------------------------------------------------------------------------------------------------------


def theirs(model):
    return AutoModelForCausalLM.from_pretrained(model)


def test_what_safetensors_save_model_wrote_is_read(model, tmp_path):
    """Of a shared tensor it keeps one name, which for a GPT-2 is the head's."""
    expected = load_file(model / "model.safetensors")["wte.weight"]
    safetensors.torch.save_model(theirs(model), str(model / "model.safetensors"))
    names = load_file(model / "model.safetensors")
    assert "lm_head.weight" in names
    assert "transformer.wte.weight" not in names
    assert torch.equal(ft.load(model, label_names=("neg", "pos"), device="cpu").model.wte.weight, expected)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_compiled_and_parallel_models_are_left_out(model, prefix):
    """karpathy/nanoGPT#325."""
    tensors = {f"{prefix}{name}": tensor.clone() for name, tensor in theirs(model).state_dict().items()}
    expected = load_file(model / "model.safetensors")["wte.weight"]
    save_file(tensors, model / "model.safetensors")
    assert torch.equal(ft.load(model, label_names=("neg", "pos"), device="cpu").model.wte.weight, expected)


HEADS = {
    "GPT2ForSequenceClassification": "score.weight",
    "GPT2ForTokenClassification": "classifier.weight",
    "GPT2ForQuestionAnswering": "qa_outputs.weight",
    "GPT2DoubleHeadsModel": "multiple_choice_head.summary.weight",
}


@pytest.mark.parametrize(("kind", "tensor"), HEADS.items())
def test_another_head_is_refused_with_a_remedy_that_works(model, tmp_path, kind, tensor):
    getattr(transformers, kind).from_pretrained(model).save_pretrained(tmp_path / "other")
    for path in model.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "other")
    with pytest.raises(FtError, match=f"{tensor} is the head of a {kind}, .* AutoModelForCausalLM .* save_pretrained"):
        ft.load(tmp_path / "other", device="cpu", label_names=("neg", "pos"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "other").save_pretrained(tmp_path / "other")
    ft.load(tmp_path / "other", device="cpu", label_names=("neg", "pos"))
    assert_transformers_agrees(tmp_path / "other")


def test_an_adapter_is_refused_with_a_remedy_that_works(model, tmp_path):
    """huggingface/peft#298: a folder of `save_pretrained` without a config.json."""
    import peft

    adapted = peft.get_peft_model(theirs(model), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(FtError, match=r"is an adapter, .*--adapter"):
        model_files(str(tmp_path / "adapter"))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    for path in model.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "merged")
    assert_transformers_agrees(tmp_path / "merged")


def test_embeddings_padded_beyond_the_tokenizer_are_kept(model, fine_tune):
    """huggingface/transformers#25729: `pad_to_multiple_of` embeds more ids than there are tokens."""
    padded = theirs(model)
    padded.resize_token_embeddings(500, pad_to_multiple_of=64)
    padded.save_pretrained(model)
    final = fine_tune() / "final"
    assert read_json(final / "config.json")["vocab_size"] == 512
    assert_transformers_agrees(final)


@pytest.mark.parametrize("size", ["200KB", "1GB"])
def test_what_save_pretrained_writes_is_read(model, size):
    """Whole and in shards, with the generation settings that it adds."""
    saved = theirs(model)
    (model / "model.safetensors").unlink()
    saved.save_pretrained(model, max_shard_size=size)
    assert len(list(Path(model).glob("*.safetensors"))) > (size != "1GB")
    assert_transformers_agrees(model)
