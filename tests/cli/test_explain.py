"""`explain`: its figures equal those of transformers and torch, and it leaves no file behind."""

import json
import re
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft import device
from ft.cli.main import main
from ft.explain.text import explain_lower_probability

ROOT = Path(__file__).parents[2]
NUMBER = r"(-?\d+\.?\d*(?:e-?\d+)?)"


@pytest.fixture
def explained(capsys, tmp_path, monkeypatch):
    """What `explain` prints, run in a directory that must stay empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def explain(*arguments, status=0):
        assert main(["explain", *map(str, arguments)]) == status
        assert list((tmp_path / "here").iterdir()) == []
        out, err = capsys.readouterr()
        return err.splitlines() if status else out

    return explain


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "max_length", "row"), [(8, 1, 32, 9), (5, 3, 9, 40), (8, 1, 32, None)]
)
def test_figures_are_those_of_transformers_and_torch(explained, inputs, batch_size, accumulation, max_length, row):
    folder, dataset = Path(inputs[1]), Path(inputs[3])
    flags = ["--batch-size", batch_size, "--gradient-accumulation-steps", accumulation, "--max-length", max_length]
    flags += ["--precision", "fp32"]  # on every processor
    text = explained(
        *inputs, *flags, "--dropout", "0", "--weight-decay", "0.1", *([] if row is None else ["--row", row])
    )
    table = pq.read_table(dataset / "train.parquet").to_pydict()
    order = torch.randperm(77, generator=torch.Generator().manual_seed(42)).tolist()
    place = 0 if row is None else order.index(row)
    size = batch_size * accumulation
    step = place // size
    rows = order[step * size : (step + 1) * size]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [[*tokenizer(table["text"][n])["input_ids"], tokenizer.eos_token_id] for n in rows]
    targets = torch.tensor([tokenizer(("neg", "pos")[table["label"][n]])["input_ids"][0] for n in rows])
    own = ids[place % size]
    assert f"   ids        {' '.join(map(str, own[:-1]))}" in re.sub(r"\n {14}", " ", text)
    if len(own) >= max_length:
        assert f"truncated  the first {len(own) - max_length + 1} tokens: " in text
    shown = re.findall(r"^ +(\d+) +(\d+)  \|.*\| +(-?\d+) (ignored|\|\w+\|)$", text, re.MULTILINE)
    kept = own[-(max_length - 1) :]
    assert [int(token) for _, token, _, _ in shown] == kept
    assert [int(target) for _, _, target, _ in shown] == [-100] * (len(kept) - 1) + [int(targets[place % size])]

    def logits():
        return torch.cat([model(torch.tensor([each[-(max_length - 1) :]])).logits[:, -1] for each in ids])

    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
         {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}],
        lr=1e-3 * (1 - step / -(-77 // size)),
    )  # fmt: skip
    before = logits()
    loss = F.cross_entropy(before, targets)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        after = logits()
    number = place % size
    for name in ("neg", "pos"):
        token = tokenizer(name)["input_ids"][0]
        figures = re.search(rf"^   \|{name}\| +{NUMBER} +{NUMBER}% +{NUMBER}% +{NUMBER} +{NUMBER}%", text, re.MULTILINE)
        values = list(map(float, figures.groups()))
        assert values[0] == pytest.approx(before[number, token].item(), abs=2e-4)
        assert values[1] == pytest.approx(100 * before[number].softmax(-1)[token].item(), abs=2e-3)
        assert values[3] == pytest.approx(after[number, token].item(), abs=2e-4)
        assert values[4] == pytest.approx(100 * after[number].softmax(-1)[token].item(), abs=2e-3)
    assert "  <- target" in text.split(f"   |{('neg', 'pos')[table['label'][rows[number]]]}| ")[1].splitlines()[0]
    of_example, of_step = re.findall(rf"{NUMBER} before the step, {NUMBER} after it, of", text)
    for printed, chosen in ((of_example, slice(number, number + 1)), (of_step, slice(None))):
        assert float(printed[0]) == pytest.approx(F.cross_entropy(before[chosen], targets[chosen]).item(), abs=2e-4)
        assert float(printed[1]) == pytest.approx(F.cross_entropy(after[chosen], targets[chosen]).item(), abs=2e-4)
    assert float(re.search(rf"its norm is {NUMBER}", text)[1]) == pytest.approx(norm.item(), rel=1e-3)
    assert float(re.search(rf"rate of this step is {NUMBER}", text)[1]) == pytest.approx(
        optimizer.param_groups[0]["lr"], rel=1e-2
    )
    batch = re.search(r"batch +rows ([\d\s]+)\n   packed", text)[1].split()
    first = number // batch_size * batch_size
    assert list(map(int, batch)) == rows[first : first + batch_size]


def test_a_completion_is_shown_token_by_token(explained, inputs, tmp_path):
    for split in ("train", "validation"):
        rows = {"ask": ["the plot is", "the cast feels"] * 4, "say": [" dull and flat .", " superb ."] * 4}
        pq.write_table(pa.table(rows), tmp_path / f"{split}.parquet")
    columns = ["--prompt-column", "ask", "--completion-column", "say"]
    text = explained(*inputs, "--dataset", tmp_path, *columns, "--max-length", "7", "--row", "0")
    assert "   completion ' dull and flat .'\n" in text
    assert "   truncated  the first 1 tokens: |the|\n" in text
    wanted = ["ignored", "| dull|", "| and|", "| flat|", "| .|", "|<|endoftext|>|"]
    assert re.findall(r"^ +\d+ +\d+  \|.*\| +-?\d+ (.*)$", text, re.MULTILINE) == wanted
    assert re.findall(r"^   (\|.*?\|) +-?\d+\.\d{4}", text, re.MULTILINE) == wanted[1:]


def test_the_printed_position_is_that_of_the_tokens_in_the_batch(explained, inputs):
    text = explained(*inputs, "--batch-size", "4", "--row", "3")
    start, end = map(int, re.search(r"rows +(\d+) to (\d+) are this", text).groups())
    place = int(re.search(r"number (\d+) of the batch", text)[1])
    first, last = map(int, re.search(r"slots +(\d+) to (\d+) of", text).groups())
    longest = int(re.search(r"grid of 4 x (\d+)", text)[1])
    assert (first, last) == ((place - 1) * longest, (place - 1) * longest + end - start)
    assert f"row {end} is number {place} of the 4 whose logits are computed" in text


def test_the_demo_needs_no_network_and_the_first_full_rate_is_chosen(explained):
    text = explained("--demo", "--device", "cpu")
    assert "step 101 of 1,880" in " ".join(text.split())
    assert "rate       the learning rate of this step is 0.001\n" in text
    assert max(map(len, text.splitlines())) <= 100
    losses = [float(x) for x in re.findall(rf"{NUMBER} (?:before the step,|after it, of the 32)", text)]
    assert losses[-1] < losses[-2]


def test_the_precision_is_that_of_the_run(explained, inputs, monkeypatch):
    """Of a small model on a processor with AMX."""
    monkeypatch.setattr(device, "has_amx", lambda: True)
    of_fp32, of_bf16 = (explained(*inputs, "--precision", precision) for precision in ("fp32", "bf16"))
    assert explained(*inputs) == of_fp32 != of_bf16
    monkeypatch.setattr(device, "SMALL_MODEL", 0)
    assert explained(*inputs) == of_bf16


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        (
            ["--train-only", "last:1"],
            lambda weights: sum(w.numel() for n, w in weights if re.search(r"h\.1\.|ln_f", n)),
        ),
        (
            ["--lora-rank", "2", "--lora-targets", "c_attn"],
            lambda weights: sum(2 * sum(w.shape) for n, w in weights if n.endswith("c_attn.weight")),
        ),
    ],
)
def test_the_update_of_frozen_embeddings_is_that_of_the_other_parameters(explained, inputs, flags, trained):
    text = explained(*inputs, *flags, "--dropout", "0")
    count = trained(list(AutoModelForCausalLM.from_pretrained(inputs[1]).named_parameters()))
    words = rf"the embedding is frozen; AdamW changes each of the {count:,} trained parameters by {NUMBER} on average"
    assert 0 < float(re.search(words, " ".join(text.split()))[1]) < 1.1e-3  # at a learning rate of 1e-3
    before, after = re.search(rf"{NUMBER} before the step, {NUMBER} after it, of the 8", text).groups()
    assert float(after) < float(before)


def test_the_settings_of_a_finished_run_are_taken_from_its_file(explained, inputs, tmp_path):
    flags = ["--seed", "3", "--batch-size", "3"]
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3, "batch_size": 3}))
    assert explained(*inputs, *flags) == explained(*inputs, "--config", tmp_path / "config.json")
    assert explained(*inputs, *flags) != explained(*inputs)


def test_each_stage_is_a_step_of_the_walk_through_and_names_functions_that_exist(explained, inputs):
    headings = re.findall(r"^(\d\. .*?) \((.*)\)$", explained(*inputs), re.MULTILINE)
    steps = re.findall(r"^## (\d\. .*)$", (ROOT / "ft" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in headings] == steps
    for _, stage in headings:
        for entry in stage.split(", "):
            module, name = re.fullmatch(r"(ft/[\w/]+)\.py ([\w.]+)", entry).groups()
            attrgetter(name)(import_module(module.replace("/", ".")))


def test_long_and_hostile_texts_stay_within_the_columns(explained, inputs, tmp_path):
    from tests.conftest import write_parquet

    texts = ["\x1b[31m" + "x" * 300, "a\nb\rc", "", "naïve 影 " * 60] * 3
    names = ("neg" * 20, "pos" * 20)
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"{split}.parquet", texts, [0, 1] * 6, names=names)
    arguments = ["--model", inputs[1], "--dataset", tmp_path, "--device", "cpu", "--dropout", "0.1"]
    for row in range(4):
        text = explained(*arguments, "--row", row, "--max-length", "64")
        text = text[text.index("Row ") :]  # behind the notes on labels of several tokens, which each run prints
        assert max(map(len, text.splitlines())) <= 100
        assert text.replace("\n", "").isprintable()
        assert "those above are without dropout" in " ".join(text.split())
    assert "...\n" in explained(*arguments, "--row", "3", "--max-length", "64")


@pytest.mark.parametrize(
    ("arguments", "status", "problems"),
    [
        (["--row", "77"], 2, ["--row is 77, the training split has the rows 0 to 76"]),
        (["--row", "-1"], 2, ["--row is '-1', it must be a whole number from 0"]),
        (["--row", "x", "--seed", "-1"], 2, ["--row is 'x', it must be a whole number from 0",
                                             "--seed is -1, it must be at least 0"]),
        (["--row"], 2, ["--row needs a value"]),
        (["--resume", "--lerning-rate", "1"], 2, ["there is no flag --lerning-rate, is it --learning-rate?"]),
        (["--resume"], 2, ["--resume continues a run, and explain trains none: pass its config.json with --config"]),
        (["--row", "9", "--max-steps", "1", "--batch-size", "1"], 1,
         ["--row is 9, which the run's 1 steps do not read: use another row, or more --epochs"]),
    ],
)  # fmt: skip
def test_usage_errors_are_reported_in_full(explained, inputs, arguments, status, problems):
    assert explained(*inputs, *arguments, status=status) == [f"error: {problem}" for problem in problems]


def test_a_step_that_overflows_in_fp16_changes_nothing_and_says_so(explained, inputs):
    text = explained(*inputs, "--precision", "fp16")  # the loss scale of the first step is too large
    assert "it overflowed in fp16" in text
    assert "by 0.00e+00 on average" in text


def test_a_nan_loss_is_an_error(explained, inputs, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(inputs[1]) / name).read_bytes())
    tensors = load_file(Path(inputs[1]) / "model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (problem,) = explained(*inputs, "--model", tmp_path, status=1)
    assert problem.startswith("error: ")
    assert "a lower --learning-rate or fp32 may help" in problem


def note_of(before, after, targets, own, label_ids):
    return explain_lower_probability(torch.tensor(before), torch.tensor(after), torch.tensor(targets), own, label_ids)


def test_a_target_that_becomes_less_likely_is_explained():
    """Two targets over the tokens 0, 1 (labels) and 2."""
    better = [[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]]
    start = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    worse = [[-1.0, 0.0, 0.0], [0.0, 3.0, 0.0]]
    first = slice(0, 1)
    assert note_of(start, better, [0, 1], first, [0, 1]) == ""
    assert "follows the mean gradient of 2 targets, 1 of them with this label" in note_of(
        start, worse, [0, 1], first, [0, 1]
    )
    assert "follows the mean gradient of 2 targets, not" in note_of(start, worse, [0, 1], first, [])
    assert "A lower --learning-rate" in note_of(better, start, [0, 1], first, [0, 1])
    both_rise = [[1.0, 2.0, -9.0], [0.0, 3.0, 0.0]]
    rare = [[0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
    assert "from 9.06% to 100.00%: the first steps learn" in note_of(rare, both_rise, [0, 1], first, [0, 1])
    assert note_of(rare, both_rise, [0, 1], first, []) == ""


def test_the_demo_explains_why_its_label_is_less_likely_among_the_labels(explained):
    text = " ".join(explained("--demo", "--device", "cpu").split())
    rows = re.findall(r"\|(?:neg|pos)\| +\S+ +(\S+)% +(\S+)% +\S+ +(\S+)% +(\S+)% +<- target", text)
    ((all_before, share_before, all_after, share_after),) = [tuple(map(float, row)) for row in rows]
    fell = all_after < all_before or share_after < share_before
    assert fell == (" note " in text)
