"""What a run leaves, in the programs that people use next to this one."""

import datasets
import pytest
import torch
import transformers

import ft
from ft.cli.main import main

TEXTS = ["the plot is dull .", 'with "quotes" , commas', "Zoë 😀"]


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("other-programs") / "run"
    assert main([*inputs, "--precision", "fp32", "--max-steps", "4", "--output-dir", str(directory)]) == 0
    return directory


@pytest.mark.parametrize("name", ["answers.csv", "answers.jsonl"])
def test_datasets_reads_the_predictions(run, tmp_path, name):
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    assert main(["predict", str(run), "--file", str(lines), "--output", str(tmp_path / name), "--device", "cpu"]) == 0
    kind = {"csv": "csv", "jsonl": "json"}[name.partition(".")[2]]
    table = datasets.load_dataset(
        kind, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert table["text"][:] == TEXTS
    expected = ft.load(run, device="cpu").predict(TEXTS)
    for row, prediction in zip(table, expected, strict=True):
        recorded = (
            row["probabilities"]
            if "probabilities" in row
            else {label: row[f"probability_{label}"] for label in prediction.probabilities}
        )
        assert recorded == pytest.approx(prediction.probabilities, rel=1e-5)


def test_a_pipeline_for_classification_does_not_answer_with_the_labels_of_a_run(run):
    """`transformers` gives the directory of a language model an untrained head, and that must not look trained."""
    classify = transformers.pipeline("text-classification", model=str(run / "final"), top_k=None)
    assert {each["label"] for answer in classify(TEXTS) for each in answer} == {"LABEL_0", "LABEL_1"}


def test_a_pipeline_for_generation_continues_as_generate_does(run):
    complete = transformers.pipeline("text-generation", model=str(run / "final"), return_full_text=False)
    (answer,) = complete("the plot", max_new_tokens=8, do_sample=False)
    assert answer["generated_text"] == ft.load(run, device="cpu").generate("the plot", max_new_tokens=8)


def test_peft_adds_an_adapter_to_the_final_model_and_to_the_exported_classifier(run):
    import peft

    assert main(["export", str(run), "--to", "classifier"]) == 0
    for directory, kind in (("final", "CausalLM"), ("classifier", "SequenceClassification")):
        model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(run / directory)
        ids = torch.tensor([[5, 6, 7]])
        with torch.inference_mode():
            before = model(ids).logits
            adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
            torch.testing.assert_close(adapted.eval()(ids).logits, before)
