"""The model card of a finished run: README.md with the Hub's metadata header, so that `final/` can be uploaded.

The header has the fields of https://huggingface.co/docs/hub/model-cards. Unknown fields, such as language and license,
are left out, and so are local paths: models and data sets are named by Hub ids only.
"""

import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from ft.checks import LENGTH, OPTIMIZER, PARAMETERS, flag
from ft.config import NO_FLAGS, Config
from ft.data.load import Data
from ft.errors import counted
from ft.evaluation.perplexity import perplexity
from ft.report.model_usage import usage
from ft.report.outcome import Outcome
from ft.settings import field_groups
from ft.train.class_weights import describe_weights
from ft.train.state import State

SETTINGS = (LENGTH, OPTIMIZER, PARAMETERS)  # the groups of settings that the card lists


def model_card(
    config: Config,
    data: Data,
    outcome: Outcome,
    *,
    num_parameters: int,
    device: str,
    weights: Sequence[float] | None = None,
) -> str:
    """The text of README.md.

    Args:
        config: the run's settings.
        data: the examples and label names.
        outcome: the results.
        num_parameters: of the model.
        device: on which it was trained, with the precision.
        weights: of the labels in the training loss; None for none.
    """
    base, dataset = hub_id(config.model), hub_id(config.dataset)
    base_name, dataset_name = _short_name(base, "GPT-2"), _short_name(dataset, "own data")
    start = "random weights" if config.init == "random" else _linked(base, "", "a local GPT-2")
    sizes = ", ".join(f"{len(examples):,} {name}" for name, examples in data.examples.items())
    answers = (
        f"Labels: {', '.join(map(_escaped, data.label_names))}." if data.label_names else "Completions of prompts."
    )
    task = "classifies text" if data.label_names else "completes a prompt"
    return "\n".join(
        [
            "---",
            _header(config, data, outcome, name=f"{base_name}-{dataset_name}".replace(" ", "-")),
            "---",
            "",
            f"# {_escaped(base_name)} fine-tuned on {_escaped(dataset_name)}",
            "",
            f"A GPT-2 of {num_parameters:,} parameters that {task}. It was trained from {start} with ft, which "
            "fine-tunes GPT-2 in plain PyTorch.",
            "",
            "## Data",
            "",
            f"{_linked(dataset, 'datasets/', 'A local data set')}: {sizes} examples. {answers}",
            "",
            "## Results",
            "",
            *_results(outcome, config.best_metric),
            "",
            f"{counted(outcome.state.step, 'step')} in {timedelta(seconds=round(outcome.seconds))} on {device}, "
            f"evaluation and saving included. Mean training loss {outcome.state.mean_train_loss:.4f}.",
            *([str(outcome.performance)] if outcome.performance else []),
            *([] if weights is None else ["", describe_weights(weights, [*map(_escaped, data.label_names)])]),
            *_forgotten(outcome.state),
            "",
            "## Settings",
            "",
            "| setting | value |",
            "|---|---|",
            *_settings(config),
            "",
            "## How to use it",
            "",
            usage(data.label_names, data.label_ids, config.max_length),
            "## Limits",
            "",
            *_limits(config, data),
            "",
        ]
    )


def hub_id(name: str) -> str | None:
    """A model's or data set's id on the Hub; None for a local path, which a card must not reveal."""
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII)
    return name if is_id and not Path(name).exists() else None


def _header(config: Config, data: Data, outcome: Outcome, *, name: str) -> str:
    """The metadata as YAML, by the Hub's own client."""
    from huggingface_hub import EvalResult, ModelCardData  # here: the import takes half a second

    dataset = hub_id(config.dataset)
    kind = "text-classification" if data.label_names else "text-generation"
    state, test = outcome.state, outcome.test
    figures = {"validation": (state.last_accuracy, state.last_loss, state.last_macro_f1)}
    if test is not None:
        figures["test"] = (test.accuracy, test.loss, test.macro_f1)
    results = [
        EvalResult(
            task_type=kind,
            dataset_type=dataset or "local",
            dataset_name=_short_name(dataset, "own data"),
            dataset_split=split,
            metric_type=metric,
            metric_name="macro F1" if metric == "f1" else None,
            metric_value=round(value, 6),
        )
        for split, values in figures.items()
        for metric, value in zip(("accuracy", "loss", "f1"), values, strict=True)
        if value is not None
    ]
    card = ModelCardData(
        library_name="transformers",
        # For labels too: they are the next token of a language model. A pipeline for classification would add an
        # untrained head; the command `export` writes a copy with the trained one.
        pipeline_tag="text-generation",
        base_model=hub_id(config.model),
        datasets=[dataset] if dataset else None,
        tags=["gpt2", "fine-tuned", kind],
        model_name=name,
        eval_results=results,
    )
    return card.to_yaml()


def _results(outcome: Outcome, best_metric: str) -> list[str]:
    state, test = outcome.state, outcome.test
    rows = [("validation, at the end", state.last_accuracy, state.last_loss, state.last_macro_f1)]
    if state.best_step is not None:
        best = f"validation, at best by {best_metric.replace('_', ' ')} (step {state.best_step:,})"
        rows.append((best, state.best_accuracy, state.best_loss, state.best_macro_f1))
    if test is not None:
        rows.append(("test", test.accuracy, test.loss, test.macro_f1))
    if not outcome.baselines:
        table = ["| split | accuracy | loss (nats per token) |", "|---|---:|---:|"]
        return [*table, *(f"| {split} | {accuracy:.2%} | {_number(loss)} |" for split, accuracy, loss, _ in rows)]
    note = outcome.baseline_note()
    return [
        "| split | accuracy | macro F1 | loss (nats per token) |",
        "|---|---:|---:|---:|",
        *(f"| {split} | {accuracy:.2%} | {_number(f1)} | {_number(loss)} |" for split, accuracy, loss, f1 in rows),
        *(f"| {split}, majority baseline | {outcome.baselines[split]:.2%} | | |" for split in outcome.accuracies),
        "",
        "The majority baseline always answers with the most frequent training label.",
        *([note] if note else []),
    ]


def _settings(config: Config) -> list[str]:
    """The rows of the table of settings, without those that are not set."""
    values = {name: getattr(config, name) for name, heading in field_groups().items() if heading in SETTINGS}
    if config.adapter is not None:
        values["adapter"] = "a local adapter"  # its path must not be revealed
    return [
        f"| `{name if name in NO_FLAGS else flag(name)}` | "
        f"{_escaped(' '.join(value) if isinstance(value, tuple) else str(value))} |"
        for name, value in values.items()
        if value not in (None, ())
    ]


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"


def _forgotten(state: State) -> list[str]:
    if state.general_loss_before is None or state.general_loss is None:
        return []
    before, after = perplexity(state.general_loss_before), perplexity(state.general_loss)
    return ["", f"Perplexity on a general text: {before:,.2f} before training, {after:,.2f} after."]


def _limits(config: Config, data: Data) -> list[str]:
    lengths = data.lengths["train"]
    cut = sum(length > config.max_length for length in lengths)
    kept = (
        f"In training, examples of more than {config.max_length} tokens were truncated to their end: {cut:,} of "
        f"{len(lengths):,}."
    )
    if not data.label_names:
        return [
            f"- {kept}",
            "- Completions are likely, not necessarily true; the model has GPT-2's biases and those of the data.",
        ]
    return [
        f"- Every input gets one of the {len(data.label_names)} labels, even if it is unlike the training data.",
        f"- {kept}",
        "- The probabilities are normalized over the label tokens only.",
        "- The model has GPT-2's biases and those of the data, and has forgotten some of what GPT-2 could do.",
    ]


def _short_name(identifier: str | None, otherwise: str) -> str:
    return identifier.rpartition("/")[2] if identifier else otherwise


def _linked(identifier: str | None, kind: str, otherwise: str) -> str:
    return f"[{_escaped(identifier)}](https://huggingface.co/{kind}{identifier})" if identifier else otherwise


def _escaped(text: str) -> str:
    """Escape a text for Markdown: no markup, no HTML, no line breaks, no invisible characters."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$:@-])", r"\\\1", " ".join(printable.split()))
