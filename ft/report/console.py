"""The console text of a run: its plan at the start, its results at the end."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from ft.checkpoint import resume, store
from ft.config import Config
from ft.data.load import Data
from ft.data.table import listed
from ft.device import Precision
from ft.errors import counted, one_line, printable, program, quoted
from ft.evaluation.classification import majority_label
from ft.evaluation.perplexity import GeneralText, perplexity
from ft.inference.classifier import predict
from ft.inference.generation import Generation
from ft.inference.sampling import Sampling
from ft.model.freeze import num_trainable_parameters
from ft.model.gpt2 import GPT2
from ft.report.outcome import Outcome
from ft.train.class_weights import describe_weights
from ft.train.state import State

SHOWN_TOKENS = 24  # of a completion
MUCH_WORSE = 1.5  # times the perplexity before, from which on the rise is explained
VERB = {"train": "train on", "validation": "validate", "test": "test"}


def count_parameters(model: GPT2) -> int:
    """The number of parameters; the tied head and token embedding count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def opening(
    config: Config,
    model: GPT2,
    precision: Precision,
    data: Data,
    general_text: GeneralText | None,
    weights: Sequence[float] | None,
    last_step: int,
) -> str:
    """The summary at the start of a run: model, device, data, the weight of each label in the loss, and plan."""
    sizes = ", ".join(f"{counted(len(each), 'example')} to {VERB[name]}" for name, each in data.examples.items())
    start = "" if config.init == "pretrained" else ", from random weights"
    trained, parameters = num_trainable_parameters(model), count_parameters(model)
    share = "" if trained == parameters else f"{trained:,} of "
    lines = (
        f"Fine-tuning {config.model}{start}: {share}{parameters:,} parameters, on {precision.device} in "
        f"{precision.name} ({precision.reason}).",
        f"Data: {config.dataset}, {sizes}; {_describe_targets(config, data)}.",
        describe_weights(weights, data.label_names) if weights is not None else "",
        f"General text, to measure forgetting: {general_text}." if general_text else "",
        f"Plan: {counted(last_step, 'step')} of {_global_batch(config)}; every "
        f"{config.logging_steps} a log line, every {config.eval_steps} an evaluation, every {config.save_steps} a "
        f"checkpoint, in {config.output_dir}.",
        f"WARNING: --warmup-steps {config.warmup_steps:,} is not below the {counted(last_step, 'step')} of the run: "
        "the learning rate never reaches --learning-rate."
        if config.warmup_steps >= last_step
        else "",
    )
    return "\n".join(printable(line) for line in lines if line)


def _global_batch(config: Config) -> str:
    """The examples of an optimizer step, and the processes that share them."""
    if config.processes == 1:
        return counted(config.rows_per_step, "example")
    model = "each with a shard of the model" if config.shard else "each with a full copy of the model"
    return f"{counted(config.rows_per_step, 'example')} in all, shared by {config.processes} processes, {model}"


def _describe_targets(config: Config, data: Data) -> str:
    """The labels, or the column of completions."""
    if config.completion_column is not None:
        return f"completions from the column {config.completion_column}; accuracy counts their tokens"
    return f"labels {listed(data.label_names)}"


def closing(run: Path, outcome: Outcome, last_step: int, config: Config, data: Data) -> str:
    """The summary at the end of a run."""
    state, test, seconds = outcome.state, outcome.test, outcome.seconds
    examples = state.step * config.rows_per_step
    by_metric = "" if config.best_metric == "accuracy" else f", by {config.best_metric}"
    best = None  # its save may have failed, or --keep-best came after it was deleted
    if config.keep_best and state.best_step is not None and store.checkpoint_path(run, state.best_step).is_dir():
        best = store.checkpoint_path(run, state.best_step).name
    command, run = quoted(run), Path(printable(str(run)))
    return (
        ("" if state.step >= last_step else f"\nStopped early: {resume.describe_end(state, last_step)}.")
        + f"\nFinished {counted(state.step, 'step')} in {timedelta(seconds=round(seconds))}, evaluation and saving "
        f"included: {examples / seconds:.1f} examples/s, {state.step / seconds:.2f} steps/s. "
        f"Mean training loss {state.mean_train_loss:.4f}.\n"
        + (f"{outcome.performance}\n" if outcome.performance else "")
        + f"Validation accuracy {state.last_accuracy:.2%} at the end, {state.best_accuracy:.2%} at best"
        + (f" (step {state.best_step:,}{by_metric})" if state.best_step is not None else ", without a finite loss")
        + (f"; test accuracy {test.accuracy:.2%}" if test else "")
        + ".\n"
        + _macro_f1(outcome, data)
        + _forgotten(state, is_demo=config.demo)
        + f"The model is saved to {run / 'final'}, "
        + (f"the adapter to {run / 'adapter'}, " if config.uses_lora else "")
        + "the newest checkpoints beside it, "
        + (f"that of the best evaluation is {best}, " if best is not None else "")
        + f"all metrics in {run / 'metrics.jsonl'}. To use it: {program()} "
        + (f'predict {command} "an example"' if config.completion_column is None else f'generate {command} "a prompt"')
    )


def _macro_f1(outcome: Outcome, data: Data) -> str:
    """Macro F1 and the majority baseline, with a note if the run does not beat it; empty without labels."""
    state, test, baselines = outcome.state, outcome.test, outcome.baselines
    if state.last_macro_f1 is None or not baselines:
        return ""
    figures = [f"{state.last_macro_f1:.4f} at the end"]
    figures += [f"{state.best_macro_f1:.4f} at best"] if state.best_macro_f1 is not None else []
    figures += [f"{test.macro_f1:.4f} on the test split"] if test and test.macro_f1 is not None else []
    label = one_line(data.label_names[majority_label(data.splits["train"].labels)])
    shares = ", ".join(f"{baselines[split]:.2%} {split}" for split in outcome.accuracies)
    note = outcome.baseline_note()
    return f"Macro F1 {', '.join(figures)}. Majority baseline, always answering {label}: {shares} accuracy.\n" + (
        f"WARNING: {note}\n" if note else ""
    )


def after_demo(run: Path) -> str:
    """What to try next, at the end of the demo."""
    lines = {
        f'{program()} predict {printable(str(run))} "the plot is not dull"': "ask the model that was just trained",
        f"{program()} explain --demo": "follow one review through one training step",
        program(): "fine-tune the 124M-parameter GPT-2 on real film reviews; downloads 550 MB",
    }
    width = max(map(len, lines))
    return "\n".join(
        [
            "\nThat was the demo: generated reviews, and a model small enough to learn them in half a minute. Next:",
            *(f"  {command:{width}}   {purpose}" for command, purpose in lines.items()),
        ]
    )


def _forgotten(state: State, *, is_demo: bool) -> str:
    """The perplexity on general text before and after, and what a large rise means; empty if it was not measured."""
    if state.general_loss_before is None or state.general_loss is None:
        return ""
    before, after = perplexity(state.general_loss_before), perplexity(state.general_loss)
    meaning = ""
    if after > MUCH_WORSE * before:
        meaning = ": the model has become worse at other text than that of its training"
        if is_demo:  # with a vocabulary of a few hundred tokens, learned from the demo's reviews
            meaning = ": the demo's model reads nothing but its own reviews, and is surprised by any other text"
    return f"Perplexity on general text {before:,.2f} before, {after:,.2f} after{meaning}.\n"


def three_predictions(model: GPT2, data: Data, max_length: int) -> str:
    """Three validation examples of as many labels as possible, with their predicted labels."""
    split = data.splits["validation"]
    rows = rows_of_several_labels(split.labels, 3)
    probabilities = predict(
        model, data.tokenizer, [split.texts[row] for row in rows], data.label_ids, max_length=max_length
    )
    lines = [
        "\n" + ("One validation example:", "Two validation examples:", "Three validation examples:")[len(rows) - 1]
    ]
    for row, (probability, label) in zip(rows, zip(*probabilities.max(dim=-1), strict=True), strict=True):
        predicted, true = (one_line(data.label_names[i]) for i in (int(label), split.labels[row]))
        verdict = "correct" if int(label) == split.labels[row] else f"wrong, true label {true}"
        lines.append(f"  {predicted} ({probability:.1%}, {verdict}): {one_line(split.texts[row], 90)}")
    return "\n".join(lines)


def rows_of_several_labels(labels: Sequence[int], number: int) -> list[int]:
    """At most `number` rows, spread over the split, each of a label that those before it have not, if there is one."""
    rows: list[int] = []
    for part in range(min(number, len(labels))):
        start = len(labels) * part // number
        after = [row for row in (*range(start, len(labels)), *range(start)) if row not in rows]
        seen = {labels[row] for row in rows}
        rows.append(next((row for row in after if labels[row] not in seen), after[0]))
    return rows


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
