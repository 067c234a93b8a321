"""Generation against `transformers`' generate and its filters of logits; and the command."""

import io
import json
import sys

import pytest
import torch
import transformers
from transformers.generation import logits_process

import ft
from ft.cli.main import main
from ft.data.examples import END_OF_TEXT
from ft.errors import FtError, UsageError
from ft.inference.generation import Generation, decode_stream
from ft.inference.kv_cache import Continuation
from ft.inference.language_model import LanguageModel, load_language_model
from ft.inference.sampling import Sampling
from ft.model import matmul
from ft.model.packing import Packing
from tests.model.test_gpt2 import TINY, make_batch, make_model
from tests.reference.synthetic import write_model

N_POSITIONS = 64
PROMPTS = ["the film", "", "the plot is dull , but the acting", "the acting is superb . " * 8]


@pytest.fixture(scope="module")
def folder(demo_inputs, tmp_path_factory):
    """A model of the demo's vocabulary that does not name its labels.

    Its weights are ten times as large as an untrained model's, so that its logits differ.
    """
    model, _ = demo_inputs
    config = json.loads((model / "config.json").read_text())
    ids = {name: config[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    place = tmp_path_factory.mktemp("writer")
    return write_model(place, "tiny", seed=4, tokenizer_from=model, initializer_range=0.2, **ids)


@pytest.fixture(scope="module")
def writer(folder):
    return load_language_model(folder, device="cpu")


@pytest.fixture(scope="module")
def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def written_by_reference(reference, prompt_ids, max_new_tokens, seed=0, **settings):
    torch.manual_seed(seed)
    prompt = torch.tensor([prompt_ids])
    written = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, pad_token_id=0, **settings
    )
    return written[0, len(prompt_ids) :].tolist()


def read(generation):
    """The full text and the tokens."""
    return "".join(generation), generation.token_ids


def without_end(token_ids, writer):
    """The tokens without the end-of-text that `transformers` returns too."""
    end_of_text = writer.tokenizer.token_to_id(END_OF_TEXT)
    return token_ids[:-1] if token_ids[-1] == end_of_text else token_ids


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_length", [1, 2, 17])
def test_logits_with_cache_are_those_without(prompt_length):
    model = make_model().eval()
    input_ids, _, _ = make_batch([TINY.n_positions])
    with torch.inference_mode():
        expected = model(input_ids, Packing.of([len(input_ids)]))
        rows = Continuation.of_prompt(prompt_length, len(input_ids), input_ids.device)
        logits = [model(input_ids[:prompt_length], rows)]
        for position in range(prompt_length, len(input_ids)):
            rows = rows.next()
            logits.append(model(input_ids[position : position + 1], rows))
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("faster", [True, False])
def test_generation_leaves_the_parameters_as_they_are(folder, monkeypatch, faster):
    if faster and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: faster)
    writer = load_language_model(folder, device="cpu")
    before = {name: (p.clone(), p.data_ptr(), p.stride()) for name, p in writer.model.named_parameters()}
    assert len(before) == 28
    writer.generate("the film", max_new_tokens=2)
    for name, parameter in writer.model.named_parameters():
        values, address, stride = before[name]
        assert torch.equal(parameter, values), name
        assert (parameter.data_ptr(), parameter.stride()) == (address, stride), name


# --- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_transformers_up_to_the_last_position(writer, reference, prompt):
    generation = writer.stream(prompt, max_new_tokens=1000)
    text, tokens = read(generation)
    most = N_POSITIONS - len(generation.prompt_ids) + 1
    expected = written_by_reference(reference, generation.prompt_ids, most, do_sample=False)
    assert tokens == without_end(expected, writer)
    assert len(tokens) > 5, "or nothing is compared"
    assert text == transformers.AutoTokenizer.from_pretrained(writer.source).decode(tokens)
    assert (generation.stopped_by == "the last of the model's 64 positions") is (len(tokens) == most)


@pytest.mark.parametrize("faster", [True, False])
def test_by_either_library_the_tokens_are_the_same(folder, reference, monkeypatch, faster):
    if faster and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: faster)
    writer = load_language_model(folder, device="cpu")
    generation = writer.stream("although the plot", max_new_tokens=40)
    _, tokens = read(generation)
    expected = written_by_reference(reference, generation.prompt_ids, 40, do_sample=False)
    assert tokens == without_end(expected, writer)


def test_end_of_text_ends_it(writer):
    """The token that comes third is made the end-of-text: the first two remain."""
    _, tokens = read(writer.stream("the film", max_new_tokens=20))
    third = next(i for i in range(2, 20) if tokens[i] not in tokens[:i])

    class Renamed:
        def token_to_id(self, token):
            return {END_OF_TEXT: tokens[third]}[token]

        def __getattr__(self, name):
            return getattr(writer.tokenizer, name)

    generation = Generation(writer.model, Renamed(), "the film", max_new_tokens=20, sampling=Sampling())
    _, shorter = read(generation)
    assert shorter == tokens[:third]
    assert generation.stopped_by == "end-of-text"
    assert list(generation) == [], "a generation is read once"


def test_the_limits(writer):
    full = writer.tokenizer.decode([5] * N_POSITIONS)
    generation = writer.stream(full)
    assert len(generation.prompt_ids) == N_POSITIONS
    assert len(read(generation)[1]) == 1, "what follows the last position, and is not read any more"
    assert generation.stopped_by == "the last of the model's 64 positions"
    with pytest.raises(FtError, match="the prompt has 65 tokens and the model 64 positions: shorten it"):
        writer.stream(writer.tokenizer.decode([5] * (N_POSITIONS + 1)))
    generation = writer.stream("the film", max_new_tokens=3)
    assert len(read(generation)[1]) == 3
    assert generation.stopped_by == "--max-new-tokens"
    with pytest.raises(UsageError, match="--max-new-tokens is 0"):
        writer.stream("the film", max_new_tokens=0)
    with pytest.raises(FtError, match="the prompt is not UTF-8"):
        writer.stream("\udcff")


# --- sampled ----------------------------------------------------------------------------------------------------------

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.9},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_drawn_tokens_are_those_that_transformers_draws_with_the_same_seed(writer, reference, settings):
    for seed in range(3):
        generation = writer.stream("the film", max_new_tokens=30, sampling=Sampling(**settings, seed=seed))
        _, tokens = read(generation)
        theirs = {"top_k": 0, "top_p": 1.0, **settings}
        expected = written_by_reference(reference, generation.prompt_ids, 30, seed, do_sample=True, **theirs)
        assert tokens == without_end(expected, writer)


def test_a_seed_draws_the_same_and_another_something_else(writer):
    texts = [writer.generate("the film", temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert Sampling().seed != Sampling().seed


@pytest.mark.parametrize("settings", [*SETTINGS, {"temperature": 1.0, "top_k": 9999}, {"temperature": 1, "top_p": 1.0}])
def test_scores_are_those_of_the_warpers_of_transformers(settings):
    logits = 4 * torch.empty(20, 300).normal_(generator=torch.Generator().manual_seed(0))
    logits[:, 7] = logits[:, 200]  # a tie
    warpers = [logits_process.TemperatureLogitsWarper(float(settings["temperature"]))]
    if "top_k" in settings:
        warpers.append(logits_process.TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        warpers.append(logits_process.TopPLogitsWarper(settings["top_p"]))
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    scores = torch.stack([Sampling(**settings).scores(row) for row in logits])
    torch.testing.assert_close(scores, expected)


def test_the_likeliest_token_is_left_whatever_the_settings():
    logits = torch.tensor([0.0, 1.0, 2.0])
    for settings in ({"top_p": 0.001}, {"top_k": 1}, {"temperature": 0.001}, {"temperature": 0.001, "top_p": 0.001}):
        sampling = Sampling(**{"temperature": 1.0, **settings})
        assert {sampling.choose(logits, torch.Generator().manual_seed(seed)) for seed in range(20)} == {2}


# --- text -------------------------------------------------------------------------------------------------------------


def test_pieces_are_decode_stream(writer):
    tokenizer = writer.tokenizer
    text = "schön \U0001f3ac\u4f60\u597d \ufffd!"
    tokens = tokenizer.encode(text).ids
    assert len(tokens) > len(text), "or no character is made of several tokens"
    pieces = list(decode_stream(tokenizer, tokens))
    assert "".join(pieces) == text
    assert "\U0001f3ac" in pieces
    assert list(decode_stream(tokenizer, tokens[: tokens.index(tokenizer.token_to_id("!"))]))[-1] == "\ufffd"


def test_bytes_that_are_no_text_come_out_as_the_tokenizer_has_them(writer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        tokens = torch.randint(256, (12,), generator=generator).tolist()  # the bytes are the first of the vocabulary
        assert "".join(decode_stream(writer.tokenizer, tokens)) == writer.tokenizer.decode(tokens)
    assert list(decode_stream(writer.tokenizer, [])) == [""]


# --- the command ------------------------------------------------------------------------------------------------------


class Input(io.StringIO):
    """A standard input, a terminal or a pipe."""

    def __init__(self, content, terminal=False):
        super().__init__()
        self.buffer = io.BytesIO(content)
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def test_the_command_prints_what_the_library_returns(folder, writer, monkeypatch, capsys):
    expected = writer.generate("the plot", max_new_tokens=12)
    assert main(["generate", str(folder), "the plot", "--max-new-tokens", "12", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert err.startswith("12 tokens, stopped by --max-new-tokens; ")
    monkeypatch.setattr(sys, "stdin", Input(b"the plot\r\n"))
    assert main(["generate", str(folder), "--max-new-tokens", "12", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_the_seed_is_printed_and_reproduces_the_text(folder, capsys):
    command = ["generate", str(folder), "the plot", "--temperature", "1", "--device", "cpu"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    seed = err.partition("sampled with --seed ")[2].partition(",")[0]
    assert main([*command, "--seed", seed]) == 0
    assert capsys.readouterr().out == out


def test_it_is_printed_as_it_comes(folder, monkeypatch):
    printed = []

    class Output(io.StringIO):
        def flush(self):
            printed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Output())
    assert main(["generate", str(folder), "the plot", "--max-new-tokens", "12", "--device", "cpu"]) == 0
    assert len({len(text) for text in printed}) > 5


@pytest.mark.parametrize(
    ("arguments", "status", "messages"),
    [
        ([], 2, ["RUN"]),
        (["{model}"], 2, ["there is no prompt: pass it as an argument, or through a pipe"]),
        (["{model}", "a", "b"], 2, ["unexpected argument 'b'"]),
        (["{model}", "a", "--tempature"], 2, ["there is no flag --tempature, is it --temperature?"]),
        (["{model}", "a", "--top-k", "5"], 2, ["--top-k limits sampling", "add --temperature 1"]),
        (
            ["{model}", "a", "--temperature=nan", "--top-k=0", "--top-p=2", "--seed=-1", "--max-new-tokens=0"],
            2,
            ["--temperature is nan", "--top-k is 0", "--top-p is 2.0", "--seed is -1", "--max-new-tokens is 0"],
        ),
        (["./absent", "a"], 2, ["./absent"]),
        (["{model}", "\udcff", "--device", "cpu"], 1, ["the prompt is not UTF-8"]),
        (["{model}", "a" * 500, "--device", "cpu"], 1, ["and the model 64 positions: shorten it"]),
        (
            ["{mismatched}", "a", "--device", "cpu"],
            1,
            ["the model embeds the ids below 300: they do not belong together"],
        ),
    ],
)
def test_mistakes_are_reported(folder, demo_inputs, tmp_path, monkeypatch, capsys, arguments, status, messages):
    monkeypatch.setattr(sys, "stdin", Input(b"", terminal=True))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mismatched = write_model(tmp_path, "tiny", tokenizer_from=demo_inputs[0], vocab_size=300)
    places = {"model": folder, "mismatched": mismatched}
    assert main(["generate", *(argument.format(**places) for argument in arguments)]) == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for message in messages:
        assert message in error


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n", "standard input is empty"), (b"sch\xf6n", "is not valid UTF-8")]
)
def test_a_pipe_without_a_prompt_is_refused(folder, monkeypatch, capsys, content, message):
    monkeypatch.setattr(sys, "stdin", Input(content))
    assert main(["generate", str(folder)]) == 1
    assert message in capsys.readouterr().err


def test_what_is_loaded_to_classify_writes_too(folder, writer):
    classifier = ft.load(folder, device="cpu")
    assert isinstance(classifier, LanguageModel)
    assert classifier.generate("the film") == writer.generate("the film")
    with pytest.raises(FtError, match="does not name its labels"):
        classifier.predict(["the film"])


# --- the real tokenizer and size --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_greedy_tokens_at_124m_parameters_are_those_of_transformers(real_gpt2, tmp_path):
    write_model(tmp_path, "gpt2", tokenizer_from=real_gpt2)
    writer = load_language_model(tmp_path, device="cpu")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for prompt, most in (("a gorgeous , witty film", 40), ("two hours that i want back . " * 125, 20)):
        generation = writer.stream(prompt, max_new_tokens=most)
        _, tokens = read(generation)
        expected = written_by_reference(reference, generation.prompt_ids, most, do_sample=False)
        assert tokens == without_end(expected, writer)
