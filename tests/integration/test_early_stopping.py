"""Early stopping: the place against `transformers`' callback, and a run that ends there as if it was planned so."""

import hashlib
import json
import random
import shutil

import pytest
import transformers

from ft.cli.main import main
from ft.train.state import State

SETTINGS = ["--precision", "fp32", "--eval-steps", "1", "--save-steps", "4", "--logging-steps", "3"]


def stops_at(accuracies, patience):
    """The number of the evaluation after which we stop; None if never."""
    state = State()
    for number, accuracy in enumerate(accuracies):
        state.record_evaluation(loss=0.5, accuracy=accuracy)
        if state.is_out_of_patience(patience):
            return number
    return None


def trainer_stops_at(accuracies, patience, tmp_path):
    """The same of the Trainer's callback, which sees each figure before it may become the best."""
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), metric_for_best_model="accuracy", greater_is_better=True, use_cpu=True
    )
    callback = transformers.EarlyStoppingCallback(early_stopping_patience=patience)
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    for number, accuracy in enumerate(accuracies):
        callback.on_evaluate(args, state, control, metrics={"eval_accuracy": accuracy})
        if control.should_training_stop:
            return number
        if state.best_metric is None or accuracy > state.best_metric:
            state.best_metric = accuracy
    return None


def test_it_stops_where_the_trainer_stops(tmp_path):
    rng = random.Random(0)
    ends = []
    for _ in range(50):
        accuracies = [rng.randrange(8) / 8 for _ in range(12)]  # with ties, which are no improvement
        patience = rng.randint(1, 6)
        ends.append(stops_at(accuracies, patience))
        assert ends[-1] == trainer_stops_at(accuracies, patience, tmp_path), (accuracies, patience)
    assert None in ends
    assert len(set(ends)) > 5


def test_at_equal_accuracy_a_lower_loss_is_better_and_what_is_no_number_never_is():
    state = State()
    for loss, since_best in ((0.5, 0), (0.6, 1), (0.5, 2), (0.4, 0), (float("nan"), 1), (float("inf"), 2), (0.3, 0)):
        state.record_evaluation(loss, accuracy=0.75)
        assert state.evaluations_since_best == since_best
        assert not state.is_out_of_patience(None)


@pytest.mark.parametrize(
    ("metric", "best"),
    [("accuracy", (3, 0.9, 0.6, 0.5)), ("macro_f1", (2, 0.8, 0.5, 0.7)), ("loss", (4, 0.7, 0.3, 0.4))],
)
def test_the_best_evaluation_is_by_the_metric_and_then_by_the_loss(metric, best):
    state = State()
    evaluations = [(0.7, 0.9, 0.5), (0.5, 0.8, 0.7), (0.6, 0.9, 0.5), (0.3, 0.7, 0.4), (0.6, 0.8, 0.7)]
    for state.step, (loss, accuracy, macro_f1) in enumerate(evaluations, start=1):
        state.record_evaluation(loss, accuracy, macro_f1, metric)
    assert (state.best_step, state.best_accuracy, state.best_loss, state.best_macro_f1) == best
    assert state.evaluations_since_best == 5 - best[0]
    assert (state.last_loss, state.last_accuracy, state.last_macro_f1) == evaluations[-1]


def test_a_run_keeps_the_best_by_its_metric_and_so_does_its_continuation(inputs, tmp_path, monkeypatch, capsys):
    from ft import session
    from ft.evaluation.evaluate import Evaluation

    # Loss, accuracy and macro F1 after each step; the last two are of the test split.
    results = [(0.5, 0.9, 0.5), (0.4, 0.8, 0.7), (0.3, 0.7, 0.6), (0.6, 0.9, 0.6)]
    figures = iter([*results, results[0], *results, results[0]])
    monkeypatch.setattr(session, "evaluate", lambda *_, **__: Evaluation(*next(figures)))
    run = tmp_path / "run"
    flags = ["--keep-best", "--keep-checkpoints", "1", "--best-metric", "macro_f1", "--output-dir", str(run)]
    flags += ["--early-stopping-patience", "6"]
    assert main([*inputs, *SETTINGS, *flags, "--max-steps", "4"]) == 0
    assert "80.00% at best (step 2, by macro_f1)" in capsys.readouterr().out
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert "best by macro f1 (step 2) | 80.00% | 0.7000 | 0.4000 |" in (run / "final" / "README.md").read_text()
    assert main(["--resume", str(run), "--max-steps", "8"]) == 0
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-8"]
    assert "Stopped early: after step 8 of 8" not in capsys.readouterr().out
    state = json.loads((run / "checkpoint-8" / "state.json").read_text())
    assert (state["best_step"], state["best_macro_f1"], state["evaluations_since_best"]) == (2, 0.7, 6)
    assert main(["--resume", str(run), "--best-metric", "loss"]) == 2
    assert "--best-metric was 'macro_f1' and would be 'loss'" in capsys.readouterr().err


def test_a_checkpoint_of_an_earlier_version_is_resumed(inputs, tmp_path, capsys):
    """Its state.json has no macro F1, and its config.json no metric."""
    run = tmp_path / "run"
    assert main([*inputs, *SETTINGS, "--max-steps", "4", "--keep-best", "--output-dir", str(run)]) == 0
    for path in (run / "checkpoint-4" / "state.json", run / "config.json"):
        values = json.loads(path.read_text())
        added = {"best_macro_f1", "last_macro_f1", "best_metric"} & set(values)
        assert added
        path.write_text(json.dumps({name: value for name, value in values.items() if name not in added}))
    manifest, content = run / "checkpoint-4" / "manifest.json", (run / "checkpoint-4" / "state.json").read_bytes()
    listed = json.loads(manifest.read_text())
    listed["files"]["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(listed))
    assert main(["--resume", str(run), "--max-steps", "6"]) == 0
    assert "Continuing after step 4" in capsys.readouterr().out


# The best evaluation is the third, and the sixth is the third in a row that is not better.
ACCURACIES = [0.5, 0.6, 0.8, 0.7, 0.8, 0.8, 0.9, 0.9, 0.9, 0.9]
LOSSES = [0.9, 0.8, 0.5, 0.4, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]


@pytest.fixture
def staged(inputs, tmp_path, monkeypatch):
    """Run the program, its weights as they are, its validation figures those above, by step."""
    note = State.record_evaluation

    def staged_note(self, *_):
        note(self, LOSSES[self.step - 1], ACCURACIES[self.step - 1])

    monkeypatch.setattr(State, "record_evaluation", staged_note)

    def run(*flags, name="run", status=0):
        assert main([*inputs, *SETTINGS, "--output-dir", str(tmp_path / name), *flags]) == status
        return tmp_path / name

    return run


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_run_ends_as_if_it_was_finished_and_says_why(staged, capsys):
    run = staged("--early-stopping-patience", "3")
    output = capsys.readouterr().out
    assert (
        "Stopped early: after step 6 of 10, the last 3 evaluations had not been better than the best before them "
        "(--early-stopping-patience).\nFinished 6 steps in" in output
    )
    assert "80.00% at best (step 3); test accuracy" in output
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-6"]
    assert weights(run / "final") == weights(run / "checkpoint-6")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6, 6], "training at 3 and 6, a validation each, and the test"
    # A run without patience has the same weights at that step, and goes on.
    calm = staged("--keep-checkpoints", "9", "--save-steps", "2", name="calm")
    assert weights(calm / "checkpoint-6") == weights(run / "final") != weights(calm / "final")


def metrics_without_times(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def test_an_early_stopped_run_is_finished_until_it_is_given_more_patience(staged, capsys):
    run = staged("--early-stopping-patience", "3")
    capsys.readouterr()
    before = metrics_without_times(run)
    staged("--early-stopping-patience", "3", "--resume")
    output = capsys.readouterr().out
    assert "This run is finished: after step 6 of 10, the last 3 evaluations had not been better" in output
    assert metrics_without_times(run) == before
    shutil.rmtree(run / "final")
    staged("--early-stopping-patience", "3", "--resume")
    assert "Continuing after step 6" in capsys.readouterr().out
    assert weights(run / "final") == weights(run / "checkpoint-6")
    assert metrics_without_times(run) == before, "only the test was done once more, with the same result"
    staged("--early-stopping-patience", "4", "--resume")
    output = capsys.readouterr().out
    assert "Stopped early" not in output
    assert "Finished 10 steps" in output


def test_the_count_survives_a_resume(staged, monkeypatch, capsys):
    from ft.checkpoint.async_writer import AsyncWriter

    calm = staged("--early-stopping-patience", "3", name="calm")

    def save_and_break(self, snapshot):
        save(self, snapshot)
        self.wait()
        raise KeyboardInterrupt

    save = AsyncWriter.save
    with monkeypatch.context() as patch:
        patch.setattr(AsyncWriter, "save", save_and_break)
        staged("--early-stopping-patience", "3", status=130)
    capsys.readouterr()
    run = staged("--early-stopping-patience", "3", "--resume")
    assert "Continuing after step 4" in capsys.readouterr().out
    assert weights(run / "final") == weights(calm / "final")
    states = [json.loads((folder / "checkpoint-6" / "state.json").read_text()) for folder in (run, calm)]
    for state in states:
        del state["seconds"], state["metrics_bytes"]
    assert states[0] == states[1]
    assert states[0]["evaluations_since_best"] == 3


def test_the_mean_loss_counts_the_steps_after_the_last_log_line(inputs, tmp_path, capsys):
    flags = ["--precision", "fp32", "--eval-steps", "2", "--learning-rate", "0", "--early-stopping-patience", "1"]
    each, none = tmp_path / "each", tmp_path / "none"
    for run, logging_steps in ((each, "1"), (none, "100")):
        assert main([*inputs, *flags, "--logging-steps", logging_steps, "--output-dir", str(run)]) == 0
    ends = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Finished 4 steps")]
    assert len({line[line.index("Mean training loss") :] for line in ends}) == 1
    assert "Mean training loss 0.0000" not in ends[1]


def test_a_warm_up_beyond_the_end_is_told(inputs, tmp_path, capsys):
    for steps, told in ((1, False), (2, True), (3, True)):
        flags = ["--max-steps", "2", "--warmup-steps", str(steps), "--output-dir", str(tmp_path / str(steps))]
        assert main([*inputs, *flags]) == 0
        assert (f"WARNING: --warmup-steps {steps} is not below the 2 steps" in capsys.readouterr().out) == told
