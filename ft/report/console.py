"""The console text of a run: its plan at the start, its results at the end."""

from datetime import timedelta
from pathlib import Path

from ft.checkpoint import resume
from ft.config import Config
from ft.data.load import Data
from ft.data.tables import listed
from ft.device import Precision
from ft.errors import one_line, printable
from ft.evaluation.evaluate import Evaluation
from ft.evaluation.perplexity import GeneralText, perplexity
from ft.inference.classifier import predict
from ft.inference.generation import Generation
from ft.inference.sampling import Sampling
from ft.model.freeze import num_trainable_parameters
from ft.model.gpt2 import GPT2
from ft.train.state import State

SHOWN_TOKENS = 24  # of a completion
VERB = {"train": "train on", "validation": "validate", "test": "test"}


def count_parameters(model: GPT2) -> int:
    """The number of parameters; the tied head and token embedding count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def opening(
    config: Config, model: GPT2, precision: Precision, data: Data, general_text: GeneralText | None, last_step: int
) -> str:
    """The summary at the start of a run: model, device, data and plan."""
    sizes = {name: len(examples) for name, examples in data.examples.items()}
    start = "" if config.init == "pretrained" else ", from random weights"
    trained, parameters = num_trainable_parameters(model), count_parameters(model)
    share = "" if trained == parameters else f"{trained:,} of "
    lines = (
        f"Fine-tuning {config.model}{start}: {share}{parameters:,} parameters, on {precision.device} in "
        f"{precision.name} ({precision.reason}).",
        f"Data: {config.dataset}, {', '.join(f'{n:,} examples to {VERB[name]}' for name, n in sizes.items())}; "
        f"{_describe_targets(config, data)}.",
        f"General text, to measure forgetting: {general_text}." if general_text else "",
        f"Plan: {last_step:,} steps of {_global_batch(config)}; every "
        f"{config.logging_steps} a log line, every {config.eval_steps} an evaluation, every {config.save_steps} a "
        f"checkpoint, in {config.output_dir}.",
        f"WARNING: --warmup-steps {config.warmup_steps:,} is not below the {last_step:,} steps of the run: the "
        "learning rate never reaches --learning-rate."
        if config.warmup_steps >= last_step
        else "",
    )
    return "\n".join(printable(line) for line in lines if line)


def _global_batch(config: Config) -> str:
    """The examples of an optimizer step, and the processes that share them."""
    if config.processes == 1:
        return f"{config.rows_per_step} examples"
    model = "each with a shard of the model" if config.shard else "each with a full copy of the model"
    return f"{config.rows_per_step} examples in all, shared by {config.processes} processes, {model}"


def _describe_targets(config: Config, data: Data) -> str:
    """The labels, or the column of completions."""
    if config.completion_column is not None:
        return f"completions from the column {config.completion_column}; accuracy counts their tokens"
    return f"labels {listed(data.label_names)}"


def closing(run: Path, state: State, last_step: int, seconds: float, config: Config, test: Evaluation | None) -> str:
    """The summary at the end of a run."""
    examples = state.step * config.rows_per_step
    run = Path(printable(str(run)))
    return (
        ("" if state.step >= last_step else f"\nStopped early: {resume.describe_end(state, last_step)}.")
        + f"\nFinished {state.step:,} steps in {timedelta(seconds=round(seconds))}, evaluation and saving included: "
        f"{examples / seconds:.1f} examples/s, {state.step / seconds:.2f} steps/s. "
        f"Mean training loss {state.mean_train_loss:.4f}.\n"
        f"Validation accuracy {state.last_accuracy:.2%} at the end, {state.best_accuracy:.2%} at best"
        + (f" (step {state.best_step:,})" if state.best_step is not None else ", without a finite loss")
        + (f"; test accuracy {test.accuracy:.2%}" if test else "")
        + ".\n"
        + _forgotten(state)
        + f"The model is saved to {run / 'final'}, "
        + (f"the adapter to {run / 'adapter'}, " if config.uses_lora else "")
        + f"the newest checkpoints beside it, all metrics in "
        f"{run / 'metrics.jsonl'}. To use it: python run.py "
        + (f'predict {run} "an example"' if config.completion_column is None else f'generate {run} "a prompt"')
    )


def _forgotten(state: State) -> str:
    """The perplexity on general text before and after; empty if it was not measured."""
    if state.general_loss_before is None or state.general_loss is None:
        return ""
    before, after = perplexity(state.general_loss_before), perplexity(state.general_loss)
    return f"Perplexity on general text {before:,.2f} before, {after:,.2f} after.\n"


def three_predictions(model: GPT2, data: Data, max_length: int) -> str:
    """Three validation examples with their predicted labels."""
    split = data.splits["validation"]
    rows = [len(split.texts) * third // 3 for third in range(3)]
    probabilities = predict(
        model, data.tokenizer, [split.texts[row] for row in rows], data.label_ids, max_length=max_length
    )
    lines = ["\nThree validation examples:"]
    for row, (probability, label) in zip(rows, zip(*probabilities.max(dim=-1), strict=True), strict=True):
        predicted, true = (one_line(data.label_names[i]) for i in (int(label), split.labels[row]))
        verdict = "correct" if int(label) == split.labels[row] else f"wrong, true label {true}"
        lines.append(f"  {predicted} ({probability:.1%}, {verdict}): {one_line(split.texts[row], 90)}")
    return "\n".join(lines)


def three_completions(model: GPT2, data: Data) -> str:
    """Three validation prompts with their completions by greedy decoding. Leaves the model in evaluation mode."""
    split = data.splits["validation"]
    model.eval()
    lines = ["\nThree validation examples:"]
    for third in range(3):
        # A prompt that is too long for a completion loses its beginning, as in training.
        ids = data.tokenizer.encode(split.texts[len(split.texts) * third // 3], add_special_tokens=False).ids
        prompt = data.tokenizer.decode(
            ids[-max(1, model.config.n_positions - SHOWN_TOKENS) :], skip_special_tokens=False
        )
        answer = Generation(model, data.tokenizer, prompt, max_new_tokens=SHOWN_TOKENS, sampling=Sampling(seed=0))
        lines.append(f"  {one_line(prompt)} -> {one_line(''.join(answer))}")
    return "\n".join(lines)
