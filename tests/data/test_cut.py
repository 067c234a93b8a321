"""The examples that --max-length cuts, and the lengths that keep more, counted by the tokenizer of `transformers`."""

import re

import pandas
import pytest
import transformers

from ft.cli.main import main

NOTE = re.compile(
    r"([\d,]+) of ([\d,]+) examples are longer than --max-length ([\d,]+) and keep their end; "
    r"(?:--max-length ([\d,]+) keeps (95%|all) of them complete(?:, ([\d,]+) all)?|the model reads at most ([\d,]+))"
)


def write(path, words):
    labels = ["neg", "pos"] * (len(words) // 2)
    frame = pandas.DataFrame({"text": ["the film is dull . " * n for n in words], "label": labels})
    frame.to_csv(path, index=False)
    return frame["text"]


@pytest.mark.parametrize("max_length", [5, 16, 30, 31, 48])
def test_the_note_counts_what_is_cut_and_the_lengths_it_names_keep_what_it_says(
    demo_inputs, tmp_path, capsys, max_length
):
    texts = write(tmp_path / "x.csv", [1 + n % 9 for n in range(90)] + [10] * 10)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_inputs[0])
    lengths = [len(tokenizer(text)["input_ids"]) + 2 for text in texts]  # with end-of-text and label
    flags = ["--model", str(demo_inputs[0]), "--dataset", str(tmp_path / "x.csv"), "--max-length", str(max_length)]
    assert main([*flags, "--device", "cpu", "--max-steps", "1", "--output-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    (note,) = NOTE.findall(out)
    cut, total, limit, named, share, everything, _ = note
    assert int(cut) == sum(length > max_length for length in lengths)
    assert (int(total), int(limit)) == (100, max_length)

    def kept(length):
        return sum(each <= length for each in lengths)

    if share == "95%":
        assert kept(int(named)) >= 95 > kept(int(named) - 1)
    assert kept(int(everything or named)) == 100 > kept(int(everything or named) - 1)
    assert main(["data", *flags]) == 0
    assert NOTE.findall(capsys.readouterr().out) == [note]
    card = (tmp_path / "run" / "final" / "README.md").read_text("utf-8")
    cut_in_training = int(re.search(r"truncated to their end: (\d+) of 90\.", card)[1])
    assert 0 <= int(cut) - cut_in_training <= 10


def test_nothing_is_said_where_nothing_is_cut(demo_inputs, tmp_path, capsys):
    write(tmp_path / "x.csv", [1, 2] * 20)
    assert main(["data", "--model", str(demo_inputs[0]), "--dataset", str(tmp_path / "x.csv")]) == 0
    out = capsys.readouterr().out
    assert "keep their end" not in out
    assert "; 0 of 36 examples (0.0%) are longer" in out


def test_no_length_is_named_that_the_model_cannot_read(demo_inputs, tmp_path, capsys):
    write(tmp_path / "x.csv", [100, 200] * 20)
    flags = ["data", "--model", str(demo_inputs[0]), "--dataset", str(tmp_path / "x.csv"), "--max-length", "20"]
    assert main(flags) == 0
    (note,) = NOTE.findall(capsys.readouterr().out)
    assert note[:3] == ("40", "40", "20")
    assert int(note[-1]) < 400


def test_completions_are_counted_with_the_tokens_they_are_trained_on(demo_inputs, tmp_path, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_inputs[0])
    frame = pandas.DataFrame({"prompt": ["the film is"] * 40, "answer": ["dull", "the plot is flat ."] * 20})
    frame.to_csv(tmp_path / "x.csv", index=False)
    longest = len(tokenizer("the film is")["input_ids"]) + len(tokenizer("the plot is flat .")["input_ids"]) + 1
    flags = [
        "data",
        "--model",
        str(demo_inputs[0]),
        "--dataset",
        str(tmp_path / "x.csv"),
        "--completion-column",
        "answer",
    ]
    assert main([*flags, "--max-length", str(longest)]) == 0
    assert "keep their end" not in capsys.readouterr().out
    assert main([*flags, "--max-length", str(longest - 1)]) == 0
    ((cut, _, _, named, *_),) = NOTE.findall(capsys.readouterr().out)
    assert (int(cut), int(named)) == (20, longest)
