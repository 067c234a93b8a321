"""The GGUF file, read by the `gguf` package of llama.cpp, and run by llama.cpp where it is installed."""

import ast
import io
import json
import re
import shutil
from contextlib import redirect_stdout

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Whitespace

import ft
from ft.cli.main import main
from ft.inference.language_model import load_language_model
from tests.reference.synthetic import write_model

gguf = pytest.importorskip("gguf")

TEXTS = ["the plot is dull .", "it's  a\n\n b\t  c 12345", "Zoë's 'quoted' \"text\" 😀 日本", "the<|endoftext|> end"]


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "run"
    flags = ["--precision", "fp32", "--max-length", "20", "--max-steps", "20", "--output-dir", str(directory)]
    assert main([*inputs, *flags]) == 0
    return directory


@pytest.fixture(scope="module")
def completions(inputs, tmp_path_factory):
    """A run on completions."""
    directory = tmp_path_factory.mktemp("completions")
    (directory / "faq.jsonl").write_text(
        '{"q": "the plot", "a": " is dull ."}\n{"q": "the cast", "a": " is fresh"}\n' * 9
    )
    flags = ["--prompt-column", "q", "--completion-column", "a", "--dataset", str(directory / "faq.jsonl")]
    flags += ["--max-length", "20", "--precision", "fp32", "--epochs", "4", "--output-dir", str(directory / "run")]
    assert main([*inputs, *flags]) == 0
    return directory / "run"


def export(run, *flags):
    output = run.with_name("-".join((run.name, "gguf", *flags)))
    assert main(["export", str(run), "--to", "gguf", "--overwrite", "--output", str(output), *flags]) == 0
    (path,) = output.glob("*.gguf")
    return path


def fields_of(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def name_in_gguf(name, blocks):
    """The name of a tensor by the table of llama.cpp."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, blocks)
    return names.get_name(name, try_suffixes=(".weight", ".bias"))


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_tensors_are_those_of_the_model(run, dtype):
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(export(run, "--dtype", dtype)).tensors}
    weights = load_file(run / "final" / "model.safetensors")
    assert len(tensors) == len(weights)
    assert all(tensor.data_offset % 32 == 0 for tensor in tensors.values())
    for name, weight in weights.items():
        written = tensors[name_in_gguf(name, 2)]
        expected = weight.T if re.search(r"\.c_\w+\.weight$", name) else weight
        is_half = dtype == "f16" and weight.dim() == 2 and name != "wpe.weight"
        assert written.tensor_type == (gguf.GGMLQuantizationType.F16 if is_half else gguf.GGMLQuantizationType.F32)
        assert list(written.shape) == list(expected.shape[::-1])
        assert torch.equal(torch.tensor(written.data), expected.half() if is_half else expected)


def test_the_metadata_are_those_that_llama_cpp_reads(run):
    fields = fields_of(gguf.GGUFReader(export(run)))
    config = json.loads((run / "final" / "config.json").read_text())
    keys, arch = gguf.Keys, "gpt2"
    expected = {
        keys.General.ARCHITECTURE: gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2],
        keys.General.FILE_TYPE: gguf.LlamaFileType.ALL_F32,
        keys.LLM.BLOCK_COUNT.format(arch=arch): config["n_layer"],
        keys.LLM.CONTEXT_LENGTH.format(arch=arch): config["n_positions"],
        keys.LLM.EMBEDDING_LENGTH.format(arch=arch): config["n_embd"],
        keys.LLM.FEED_FORWARD_LENGTH.format(arch=arch): 4 * config["n_embd"],
        keys.Attention.HEAD_COUNT.format(arch=arch): config["n_head"],
        keys.Tokenizer.MODEL: "gpt2",
        keys.Tokenizer.PRE: "gpt-2",
        keys.Tokenizer.EOS_ID: config["eos_token_id"],
        keys.Tokenizer.BOS_ID: config["bos_token_id"],
        keys.Tokenizer.ADD_BOS: False,
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields[keys.Attention.LAYERNORM_EPS.format(arch=arch)] == pytest.approx(1e-5)


def test_the_vocabulary_is_the_tokenizers(inputs, tmp_path):
    """With added tokens, and rows of the embedding that no token has."""
    tokenizer = Tokenizer.from_file(f"{inputs[1]}/tokenizer.json")
    tokenizer.add_special_tokens(["<|user|>"])
    tokenizer.add_tokens(["plain added"])
    known = tokenizer.get_vocab_size()
    model = write_model(tmp_path / "model", "tiny", vocab_size=known + 2)
    tokenizer.save(str(model / "tokenizer.json"))
    assert main(["export", str(model), "--to", "gguf", "--output", str(tmp_path / "gguf")]) == 0
    fields = fields_of(gguf.GGUFReader(tmp_path / "gguf" / "model-f32.gguf"))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:known] == [tokenizer.id_to_token(i) for i in range(known)]
    assert len(tokens) == len(types) == known + 2
    kinds = gguf.TokenType
    expected = {"<|endoftext|>": kinds.CONTROL, "<|user|>": kinds.CONTROL, "plain added": kinds.USER_DEFINED}
    for token, kind in zip(tokens, types, strict=True):
        unused = kinds.UNUSED if token.startswith("[PAD") else kinds.NORMAL
        assert kind == expected.get(token, unused), token
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]


def change_tokenizer(change):
    def changed(model):
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(model / "tokenizer.json"))

    return changed


def add_a_large_weight(model):
    weights = load_file(model / "model.safetensors")
    weights["h.1.mlp.c_fc.weight"][3, 5] = -70000.0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_tokenizer(lambda t: setattr(t, "pre_tokenizer", ByteLevel(add_prefix_space=True))), "byte-level BPE"),
        (change_tokenizer(lambda t: setattr(t, "pre_tokenizer", Whitespace())), "byte-level BPE"),
        (add_a_large_weight, "blk.1.ffn_up.weight has values above 65,504"),
    ],
)
def test_what_the_format_cannot_represent_is_refused(completions, tmp_path, capsys, change, message):
    model = tmp_path / "model"
    shutil.copytree(completions / "final", model)
    (model / "tokenizer_config.json").unlink()
    change(model)
    flags = ["--to", "gguf", "--dtype", "f16", "--output", str(tmp_path / "gguf")]
    assert main(["export", str(model), *flags]) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "nothing is left"


# --- llama.cpp itself -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which compiles llama.cpp")


def answers_of_the_card(path, text, monkeypatch):
    """What the Python of the card beside a GGUF file prints for a text."""
    code = re.search(r"```python\n(.*?)```", (path.parent / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert code.count('"an input like the training data"') == 1
    monkeypatch.chdir(path.parent)
    output = io.StringIO()
    with redirect_stdout(output):
        exec(code.replace('"an input like the training data"', repr(text)), {})
    return output.getvalue()


def test_llama_cpp_computes_the_same_logits(run, llama_cpp):
    trained = load_language_model(run, device="cpu")
    model = llama_cpp.Llama(str(export(run)), n_ctx=0, logits_all=True, verbose=False)
    for text in TEXTS:
        ids = model.tokenize(text.encode(), add_bos=True, special=True)
        assert ids == trained.tokenizer.encode(text, add_special_tokens=False).ids
        model.reset()
        model.eval(ids)
        expected = logits_of(trained.model, ids)
        # GELU is a table of fp16 values in llama.cpp.
        torch.testing.assert_close(torch.tensor(model.scores[: len(ids)]), expected, atol=5e-3, rtol=0)


def logits_of(model, ids):
    """The logits at each position, by `transformers`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    reference = GPT2LMHeadModel(
        GPT2Config(
            **{key: getattr(model.config, key) for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
        )
    ).eval()
    reference.load_state_dict(
        {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}, strict=False
    )
    with torch.inference_mode():
        return reference(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_card_of_labels_runs_in_llama_cpp(run, llama_cpp, dtype, monkeypatch):
    path = export(run, "--dtype", dtype)
    for text in [*TEXTS, "the plot is superb , " * 20, ""]:
        (expected,) = ft.load(run, device="cpu").predict([text])
        recorded = ast.literal_eval(answers_of_the_card(path, text, monkeypatch))
        assert recorded == pytest.approx(expected.probabilities, abs=5e-3)


def test_the_card_of_completions_runs_in_llama_cpp(completions, llama_cpp, monkeypatch):
    path = export(completions)
    expected = load_language_model(completions, device="cpu").generate("the plot", max_new_tokens=20)
    assert answers_of_the_card(path, "the plot", monkeypatch).removesuffix("\n") == expected
    assert expected.strip()
