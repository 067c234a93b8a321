"""The same fine-tuning on the Hugging Face Trainer: what `ft` must agree with, and the time it must beat.

    python -m tests.reference.trainer --model DIR --dataset DIR --steps 10

This is a user's script, neither slowed down nor tuned: the recipe says what differs from the Trainer's defaults, and
everything else, among it the attention kernel (`sdpa`) and the optimizer (`adamw_torch_fused`), is left to the library.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

IGNORED = -100  # the target that PyTorch's cross-entropy leaves out
DROPOUT_KEYS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


@dataclass(frozen=True)
class Step:
    """What the Trainer logged after one update: `grad_norm` is before clipping, `learning_rate` the one applied."""

    step: int  # from 1
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float


class StepRecorder(TrainerCallback):
    """Append a `Step` to `steps` at every log; `seconds` is the mean over the updates since the log before.

    The clock runs from the first forward pass of an update until its gradients are cleared: reading the batch and
    logging are not counted.
    """

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self.started = now(args.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock."""
        self.seconds.append(now(args.device) - self.started)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        """Record a log of the training; those of an evaluation and of the end of the run have no `loss`."""
        if "loss" in logs:
            seconds = statistics.mean(self.seconds)
            self.seconds.clear()
            self.steps.append(Step(state.global_step, logs["loss"], logs["grad_norm"], logs["learning_rate"], seconds))


def now(device: torch.device) -> float:
    """Return the time in seconds once the device has finished what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer, padding with the end token: GPT-2 has no token of its own for that."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def preprocess(
    texts: Sequence[str],
    labels: Sequence[int],
    label_names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 32,
) -> dict[str, list[list[int]]]:
    """Turn reviews into `tokens(text) + [eos] + [label token]`, of which only the label token is a target.

    A long example loses its beginning, because its end is what is learned. The lists are not padded yet.
    """
    label_tokens = [tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in label_names]
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    input_ids = [
        [*ids, tokenizer.eos_token_id, label_tokens[label]][-max_length:]
        for ids, label in zip(encoded, labels, strict=True)
    ]
    return {
        "input_ids": input_ids,
        "attention_mask": [[1] * len(ids) for ids in input_ids],
        "labels": [[IGNORED] * (len(ids) - 1) + ids[-1:] for ids in input_ids],
    }


def read_examples(
    dataset: Path | Sequence[dict[str, Any]],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    max_length: int,
) -> Dataset:
    """Read rows of `text` and `label`, from a folder of parquet files or from a list, and preprocess them."""
    rows = load_dataset(str(dataset), split=split) if isinstance(dataset, Path) else Dataset.from_list(list(dataset))
    return Dataset.from_dict(preprocess(rows["text"], rows["label"], label_names, tokenizer, max_length))


def build_trainer(
    model_dir: Path,
    dataset: Path | Sequence[dict[str, Any]],
    output_dir: Path,
    *,
    eval_dataset: Path | Sequence[dict[str, Any]] | None = None,
    label_names: Sequence[str] = ("neg", "pos"),
    max_length: int = 32,
    dropout: float | None = None,
    gradient_checkpointing: bool = True,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 2e-5,
    max_steps: int = -1,
    epochs: float = 1,
    seed: int = 42,
    logging_steps: int = 1,
    bf16: bool = False,
    use_cpu: bool = True,
    **arguments: Any,
) -> tuple[Trainer, list[Step]]:
    """Build the Trainer of the recipe, and the list that its `train()` fills with a `Step` per log.

    `dataset` and `eval_dataset` are each a folder, read for its train or its validation split, or a list of rows.
    `dropout=None` keeps the rates of the model's `config.json`. `arguments` are further `TrainingArguments`; without
    them nothing is evaluated or saved.

    Building seeds torch, and the Trainer takes the order of the rows from torch's seed when `train()` is called:
    reseed in between, and the order is another one.
    """
    tokenizer = load_tokenizer(model_dir)
    rates = {} if dropout is None else dict.fromkeys(DROPOUT_KEYS, dropout)
    train_examples = read_examples(dataset, "train", tokenizer, label_names, max_length)
    eval_examples = None
    if eval_dataset is not None:
        eval_examples = read_examples(eval_dataset, "validation", tokenizer, label_names, max_length)
    steps: list[Step] = []
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_checkpointing": gradient_checkpointing,  # the name that every transformers 5 knows; later ones warn
        "learning_rate": learning_rate,
        "weight_decay": 0.0,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "max_steps": max_steps,
        "num_train_epochs": epochs,
        "seed": seed,
        "bf16": bf16,
        "use_cpu": use_cpu,
        "logging_steps": logging_steps,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, **rates),
        args=TrainingArguments(**settings | arguments),
        train_dataset=train_examples,
        eval_dataset=eval_examples,
        processing_class=tokenizer,
        # Pads on the right to the longest example of the batch, the labels with IGNORED.
        data_collator=DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED),
        callbacks=[StepRecorder(steps)],
    )
    trainer.remove_callback(PrinterCallback)  # it would print every log a second time
    return trainer, steps


def main() -> None:
    """Run some steps, and print each of them and the median time."""
    parser = argparse.ArgumentParser(description="Time the Hugging Face Trainer on the job that ft does.")
    parser.add_argument("--model", type=Path, required=True, help="folder with a model and its tokenizer.json")
    parser.add_argument("--dataset", type=Path, required=True, help="folder with train.parquet")
    parser.add_argument("--steps", type=int, required=True, help="updates; the learning rate reaches 0 after them")
    parser.add_argument("--dropout", type=float, help="all three rates; default: those of the model's config.json")
    parser.add_argument("--no-gradient-checkpointing", action="store_true", help="keep activations: faster, larger")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as output_dir:
        trainer, steps = build_trainer(
            options.model,
            options.dataset,
            Path(output_dir),
            dropout=options.dropout,
            gradient_checkpointing=not options.no_gradient_checkpointing,
            batch_size=options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            max_steps=options.steps,
            seed=options.seed,
            bf16=options.bf16,
            use_cpu=options.device == "cpu",
        )
        trainer.train()

    for step in steps:
        print(f"step {step.step}  loss {step.loss:.6f}  grad_norm {step.grad_norm:.6f}  seconds {step.seconds:.4f}")
    # The first step pays for allocations and kernel choices that no other makes, so it is left out if there are more.
    warm = [step.seconds for step in steps[1:] or steps]
    print(f"median of {len(warm)} steps: {statistics.median(warm):.4f} seconds")


if __name__ == "__main__":
    main()
