"""The effect of learning rate, batch size and epochs: one run of the demo for each value, and curves.

    python -m benchmarks.settings --work DIR

Every run is `python run.py --demo` with one more flag, on the same generated reviews, the same untrained small GPT-2
and the same seed. There is one run for each value, so differences of one or two percent are noise. Finished runs in DIR
are not repeated.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import benchmark_parser, markdown_table, picture_path, write_result
from ft.data.demo import SPLITS
from ft.settings import DEMO_SETTINGS

LEARNING_RATE = float(str(DEMO_SETTINGS["learning_rate"]))
GIVEN = {name: DEMO_SETTINGS[name] for name in ("learning_rate", "batch_size", "epochs")}

# The columns of the picture: a setting, what its values are called, and the values; one of them is the demo's own.
STUDIES: dict[str, tuple[str, tuple[float, ...]]] = {
    "learning_rate": ("learning rate {:g}", (LEARNING_RATE / 10, LEARNING_RATE, LEARNING_RATE * 10)),
    "batch_size": ("batch of {}", (2, 8, 32, 64)),
    "epochs": ("epochs: {:g}", (1.0, 3.0, 10.0, 30.0)),
}
EVALUATIONS_PER_EPOCH = 4


def main() -> None:
    """Run what has not run yet, then write the table and the picture."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory for the runs, about 200 MB")
    options = parser.parse_args()

    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    rows = []
    for setting, (label, values) in STUDIES.items():
        curves[setting] = {}
        for value in values:
            events = run(options.work, {**GIVEN, setting: value})
            name = label.format(value) + (" (the demo's)" if value == GIVEN[setting] else "")
            evaluations = [event for event in events if "eval_loss" in event]
            training = [event for event in events if "loss" in event]
            curves[setting][name] = evaluations
            last = evaluations[-1]
            rows.append(
                [
                    name,
                    f"{last['step']:,}",
                    f"{training[-1]['loss']:.4f}",
                    f"{last['eval_loss']:.4f}",
                    f"{last['eval_accuracy']:.1%}",
                    f"{max(event['eval_accuracy'] for event in evaluations):.1%}",
                ]
            )
    header = ["run", "steps", "last training loss", "last validation loss", "last accuracy", "best accuracy"]
    rest = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in GIVEN.items())
    table = markdown_table(header, rows)
    table += f"\n\nThe demo's own settings are {rest}; each run changes the one that is named. One run each, seed 42."
    write_result(options.output, "settings", {"given": GIVEN, "evaluations": curves}, table)
    draw(curves, picture_path(options.output, "settings"))


def run(work: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of the demo with these settings, from a finished run in `work` or from a new one."""
    folder = work / "-".join(f"{name}-{value:g}" for name, value in settings.items())
    if not (folder / "final").is_dir():
        evaluate_every = str(max(1, SPLITS["train"] // settings["batch_size"] // EVALUATIONS_PER_EPOCH))
        flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", f"{value}")]
        rhythm = ["--logging-steps", evaluate_every, "--eval-steps", evaluate_every, "--save-steps", "100000"]
        command = [sys.executable, "run.py", "--demo", "--device", "cpu", "--output-dir", str(folder), *flags, *rhythm]
        subprocess.run(command, check=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def draw(curves: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Validation loss above, accuracy below, a column for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(curves), figsize=(13, 6.4), layout="constrained", sharey="row", squeeze=False)
    for column, (setting, runs) in enumerate(curves.items()):
        above, below = axes[0][column], axes[1][column]
        for name, evaluations in runs.items():
            epochs = [event["epoch"] for event in evaluations]
            style = {"label": name, **({"linewidth": 2.4, "color": "black"} if "demo" in name else {})}
            above.plot(epochs, [event["eval_loss"] for event in evaluations], **style)
            below.plot(epochs, [100 * event["eval_accuracy"] for event in evaluations], **style)
        above.set(title=setting.replace("_", " "), yscale="log")
        above.legend(fontsize=8)
        below.axhline(50, color="grey", linestyle=":")
        below.set(xlabel="epochs")
        for each in (above, below):
            each.grid(alpha=0.3)
    axes[0][0].set_ylabel("validation loss (nats per label)")
    axes[1][0].set_ylabel("validation accuracy (%)")
    figure.suptitle("One setting changed at a time: the demo's small GPT-2 from random weights, composed reviews")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
