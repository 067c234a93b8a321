"""The inputs of the demo: reproducible, complete, readable by the libraries, and not separable by single words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft.cli.main import main
from ft.config import Config
from ft.data import demo
from ft.data.examples import encode, label_tokens
from ft.data.tables import read_split
from ft.settings import DEMO_SETTINGS

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert demo.write_demo(folder) == (folder / "model", folder / "dataset")
    return folder


@pytest.fixture(scope="module")
def rows(folder) -> dict[str, list[tuple[str, int]]]:
    tables = {split: pq.read_table(folder / "dataset" / f"{split}.parquet") for split in SPLITS}
    return {s: list(zip(t["text"].to_pylist(), t["label"].to_pylist(), strict=True)) for s, t in tables.items()}


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_makes_the_same_bytes_in_another_process(folder, tmp_path):
    code = "import sys; from pathlib import Path; from ft.data.demo import write_demo; write_demo(Path(sys.argv[1]))"
    hashing = {"PYTHONHASHSEED": "7"}  # sets and dictionaries of strings come in another order
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        cwd=Path(demo.__file__).parents[1],
        env={**os.environ, **hashing},
    )
    assert contents(tmp_path) == contents(folder)
    assert sorted(contents(folder)) == [
        *(f"dataset/{split}.parquet" for split in sorted(SPLITS)),
        *(f"model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")),
    ]


def test_another_seed_makes_other_reviews_and_weights(folder, tmp_path):
    demo.write_demo(tmp_path, seed=1)
    first, other = contents(folder), contents(tmp_path)
    for name in ("dataset/train.parquet", "dataset/validation.parquet", "model/model.safetensors"):
        assert first[name] != other[name]


def test_what_lay_there_is_replaced_or_kept_whole(tmp_path, monkeypatch):
    demo.write_demo(tmp_path)
    (tmp_path / "model" / "old").touch()
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_dataset", fail)
        with pytest.raises(OSError, match="disk full"):
            demo.write_demo(tmp_path)
    assert contents(tmp_path) == before

    demo.write_demo(tmp_path)
    del before["model/old"]
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "model"]


def test_splits_share_no_text_and_labels_are_balanced(rows):
    texts = [text for split in rows.values() for text, _ in split]
    assert len(texts) == len(set(texts)) == sum(demo.SPLITS.values())
    for split, size in demo.SPLITS.items():
        labels = [label for _, label in rows[split]]
        assert len(labels) == size
        assert sum(labels) == size // 2


def test_labels_are_single_tokens_and_reviews_fit(folder, rows, tokenizer):
    label_ids = label_tokens(demo.LABELS, tokenizer)
    assert [tokenizer.encode(name).ids for name in demo.LABELS] == [[token] for token in label_ids]

    max_length = Config().max_length
    for split in SPLITS:
        examples = encode(
            read_split(split, [folder / "dataset" / f"{split}.parquet"]), tokenizer, label_ids, max_length
        )
        whole = [len(text.split()) + 1 for text, _ in rows[split]]  # a token per word, and end-of-text
        assert [len(example.input_ids) for example in examples] == whole
        assert max(whole) + 1 <= max_length


def test_transformers_reads_the_model(folder, rows, tokenizer):
    model, report = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(report.values())
    config = model.config
    assert config.vocab_size == tokenizer.get_vocab_size()
    assert config.bos_token_id == config.eos_token_id == tokenizer.token_to_id("<|endoftext|>") == config.vocab_size - 1
    assert model.transformer.h[0].mlp.c_fc.weight.std().item() == pytest.approx(config.initializer_range, rel=0.05)

    theirs = AutoTokenizer.from_pretrained(folder / "model")
    for text, _ in rows["test"][:20]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
        assert theirs.decode(tokenizer.encode(text).ids, clean_up_tokenization_spaces=False) == text


def test_datasets_reads_the_data(folder, rows, tmp_path):
    loaded = datasets.load_dataset(str(folder / "dataset"), cache_dir=str(tmp_path))
    assert {split: loaded[split].num_rows for split in loaded} == demo.SPLITS
    assert loaded["train"].features == datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    assert [(row["text"], row["label"]) for row in loaded["validation"]] == rows["validation"]


def count_words(texts: list[str], vocabulary: list[str]) -> torch.Tensor:
    return torch.tensor([[float(text.split().count(word)) for word in vocabulary] for text in texts])


def test_single_words_do_not_decide(rows):
    """Logistic regression on word counts, fitted to the end, hardly beats a coin."""
    vocabulary = sorted({word for text, _ in rows["train"] for word in text.split()})
    counts, labels = {}, {}
    for split in ("train", "validation"):
        counts[split] = count_words([text for text, _ in rows[split]], vocabulary)
        labels[split] = torch.tensor([float(label) for _, label in rows[split]])

    torch.manual_seed(0)
    classifier = torch.nn.Linear(len(vocabulary), 1)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=100)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(classifier(counts["train"]).squeeze(1), labels["train"])
        loss.backward()
        return loss

    before = loss().item()
    optimizer.step(loss)
    assert loss().item() < before
    for split in counts:
        accuracy = ((classifier(counts[split]).squeeze(1) > 0) == labels[split].bool()).float().mean().item()
        assert accuracy < 0.65, split


def read_review(text: str) -> int:
    """The label by the rules of English: find the clause that decides, and turn its word around for each negation."""
    opening = next(opening for opening in sorted(demo.OPENINGS, key=len, reverse=True) if text.startswith(opening))
    body = text.removeprefix(opening).strip()
    if body.startswith("although "):
        clause = body.partition(" , ")[2]
    elif body.startswith("that "):
        clause = body.partition(" matters more than ")[0]
    else:
        clause = body.partition(" , but ")[2] or body.partition(" , and yet ")[2] or body.partition(" , ")[0]
        clause = clause.partition(" and ")[0]
    words = clause.split()
    good = any(word in demo.ADJECTIVES[True] + demo.VERBS[True] for word in words)
    negations = sum(word in ("not", "anything", "hardly", "fails", "never", "less") for word in words)
    return int(good != (negations % 2 == 1))


def test_the_order_of_words_decides(rows):
    for split in SPLITS:
        assert [read_review(text) for text, _ in rows[split]] == [label for _, label in rows[split]]


def test_settings_are_settings_of_a_run():
    config = Config(**DEMO_SETTINGS)
    assert config != Config()


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    assert main(["--demo", "--output-dir", str(tmp_path)]) == 0
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["eval_accuracy"] for event in events if "eval_accuracy" in event][-1] > 0.95
