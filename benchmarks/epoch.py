"""The full recipe once: an epoch at 124M parameters on the real reviews, from random weights in the published layout.

    python -m benchmarks.epoch --dataset DIR --tokenizer DIR --work DIR

It does not download the published weights (548 MB): it measures the time of the full run, and its accuracies are those
of an untrained start, far below those of the published weights. Started again with the same `--work`, it resumes.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import benchmark_parser, markdown_table, picture_path, write_result
from tests.reference.synthetic import write_model

SIZE = "gpt2"


def main() -> None:
    """Run the program as a user would, then write table and chart."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--dataset", type=Path, required=True, help="directory with the reviews as parquet")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with GPT-2's tokenizer.json")
    parser.add_argument("--work", type=Path, required=True, help="directory for the weights and the run, about 4 GB")
    options = parser.parse_args()

    model = options.work / "model"
    if not (model / "config.json").exists():
        write_model(model, SIZE, tokenizer_from=options.tokenizer)
    run = options.work / "run"
    arguments = ["--model", str(model), "--dataset", str(options.dataset), "--output-dir", str(run), "--resume"]
    subprocess.run([sys.executable, "run.py", *arguments], check=True)

    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = json.loads(newest_checkpoint(run).joinpath("state.json").read_text())["seconds"]
    training = [event for event in events if "loss" in event]
    evaluations = {event["step"]: event for event in events if "eval_loss" in event}
    test = next(event for event in events if "test_loss" in event)
    rows = [
        [
            str(event["step"]),
            f"{event['loss']:.4f}",
            f"{evaluations[event['step']]['eval_loss']:.4f}",
            f"{evaluations[event['step']]['eval_accuracy']:.1%}",
            f"{event['samples_per_second']:.1f}",
        ]
        for event in training
    ]
    table = markdown_table(["step", "training loss", "validation loss", "validation accuracy", "examples/s"], rows)
    last = training[-1]["step"]
    table += (
        f"\n\nFrom random weights: {last} steps in {seconds / 60:.1f} minutes, {len(evaluations)} evaluations and "
        f"{last // 100 + 1} checkpoints included. Test loss {test['test_loss']:.4f}, test accuracy "
        f"{test['test_accuracy']:.1%}. The start is untrained, so that accuracy says nothing about GPT-2."
    )
    write_result(options.output, "epoch", {"seconds": seconds, "events": events}, table)
    draw(training, list(evaluations.values()), picture_path(options.output, "epoch"))


def newest_checkpoint(run: Path) -> Path:
    """The checkpoint of the highest step."""
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def draw(training: list[dict[str, Any]], evaluations: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy over the steps, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = [event["step"] for event in evaluations]
    left.plot([event["step"] for event in training], [event["loss"] for event in training], "o-", label="training")
    left.plot(steps, [event["eval_loss"] for event in evaluations], "s-", label="validation")
    left.set(xlabel="optimizer step", ylabel="loss (nats per label)")
    left.legend()
    right.plot(steps, [100 * event["eval_accuracy"] for event in evaluations], "s-", color="C1", label="validation")
    right.axhline(50, color="grey", linestyle=":", label="guessing")
    right.set(xlabel="optimizer step", ylabel="accuracy (%)")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle("One epoch at 124M parameters on rotten_tomatoes, from random weights")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
