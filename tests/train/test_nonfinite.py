"""Losses and gradients that are not finite: stopped before the update, or left out and counted."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ft.cli.main import main
from ft.config import Config
from ft.report.console import closing
from ft.report.outcome import Outcome
from ft.train import loop
from ft.train.nonfinite import NonFiniteError, NonFiniteGuard
from ft.train.optim import AdamW
from ft.train.schedule import rows_of_step
from ft.train.state import State

SETTINGS = ["--precision", "fp32", "--epochs", "2", "--eval-steps", "50", "--save-steps", "3", "--logging-steps", "2"]


@pytest.fixture
def poison(monkeypatch):
    """Make the loss of some calls (from 1) NaN or inf; with a tensor's `kind`, only its gradient."""

    def poison(*calls, kind="loss"):
        def cross_entropy(logits, targets, **options):
            seen.append(1)
            loss = F_cross_entropy(logits, targets, **options)
            if len(seen) not in calls:
                return loss
            if kind == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss * 1.0 if loss.requires_grad else loss

        F_cross_entropy, seen = F.cross_entropy, []
        functional = type("Functional", (), {"cross_entropy": staticmethod(cross_entropy)})
        monkeypatch.setattr(loop, "F", functional)

    return poison


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_the_run_stops_before_the_update_and_names_step_and_rows(inputs, tmp_path, poison, capsys, kind):
    poison(8, kind=kind)
    run = tmp_path / "run"
    assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == 1
    error = capsys.readouterr().err
    rows = ", ".join(map(str, rows_of_step(77, Config(), 7)))
    assert f"the loss or the gradient of step 8 is not finite; it read the rows {rows} of the training split" in error
    assert f"{run / 'checkpoint-6'} is from before it" in error
    for remedy in ("--learning-rate (now 0.001)", "--precision fp32", "--on-nonfinite skip"):
        assert remedy in error
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert [event["step"] for event in metrics(run)] == [2, 4, 6]


def test_after_the_error_the_run_can_be_continued(inputs, tmp_path, monkeypatch, poison, capsys):
    calm, run = tmp_path / "calm", tmp_path / "run"
    assert main([*inputs, *SETTINGS, "--output-dir", str(calm)]) == 0
    with monkeypatch.context():
        poison(8)
        assert main([*inputs, *SETTINGS, "--output-dir", str(run)]) == 1
    monkeypatch.setattr(loop, "F", F)
    assert main([*inputs, *SETTINGS, "--output-dir", str(run), "--resume"]) == 0
    name = "checkpoint-20/optimizer.safetensors"
    assert (run / name).read_bytes() == (calm / name).read_bytes()


def test_steps_are_left_out_up_to_a_number(inputs, tmp_path, poison, capsys):
    poison(3, 4, 9)
    run = tmp_path / "run"
    flags = ["--on-nonfinite", "skip", "--max-skipped-steps", "3"]
    assert main([*inputs, *SETTINGS, *flags, "--output-dir", str(run)]) == 0
    state = json.loads((run / "checkpoint-20" / "state.json").read_text())
    assert state["skipped_steps"] == 3
    losses = {event["step"]: event["loss"] for event in metrics(run) if "loss" in event}
    assert losses[4] is None, "no step since the line before had a loss"
    assert all(loss > 0 for step, loss in losses.items() if step != 4)
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert all(torch.isfinite(tensor).all() for tensor in load_file(run / "final" / "model.safetensors").values())
    steps = load_file(run / "checkpoint-20" / "optimizer.safetensors")["step.wte.weight"]
    assert steps == 17, "AdamW counts the updates that were made"


def test_one_more_than_the_number_stops(inputs, tmp_path, poison, capsys):
    poison(3, 4, 9)
    flags = ["--on-nonfinite", "skip", "--max-skipped-steps", "2"]
    assert main([*inputs, *SETTINGS, *flags, "--output-dir", str(tmp_path / "run")]) == 1
    assert "of step 9 is not finite" in capsys.readouterr().err


def test_what_was_skipped_before_a_resume_counts(inputs, tmp_path, poison, capsys):
    flags = ["--on-nonfinite", "skip", "--max-skipped-steps", "1", "--output-dir", str(tmp_path / "run")]
    poison(2, 8)
    assert main([*inputs, *SETTINGS, *flags]) == 1
    poison(2)
    assert main([*inputs, *SETTINGS, *flags, "--resume"]) == 1
    assert "of step 8 is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("scales_loss", [False, True])
def test_nothing_is_read_from_the_device_until_it_is_checked(scales_loss, monkeypatch):
    monkeypatch.setattr("ft.train.nonfinite.read_synchronizes", lambda device: True)  # as on an accelerator
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = AdamW([{"params": [weight], "weight_decay": 0.0}], 0.1)
    state = State(step=5, loss_steps=1)
    guard = NonFiniteGuard(torch.device("cpu"), state, limit=0)
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    assert guard.watch(optimizer, one, one, scales_loss=scales_loss) == 1.0
    optimizer.step()
    guard.check()
    after = weight.detach().clone()
    assert not torch.equal(after, torch.ones(3))
    assert guard.watch(optimizer, one, nan, scales_loss=scales_loss) == (1.0 if scales_loss else 0.0)
    if scales_loss:
        guard.check()  # the gradient scaler's business
    assert guard.watch(optimizer, nan, one, scales_loss=scales_loss) == 0.0
    optimizer.step()
    assert torch.equal(weight, after)
    state.step = 9  # the loop has gone on
    first = 8 if scales_loss else 7  # the guard has watched three steps, after five
    with pytest.raises(NonFiniteError, match=re.escape(f"step {first} is not finite")):
        guard.check()


def test_an_infinite_loss_with_finite_gradients_is_skipped_in_fp16_too(monkeypatch):
    monkeypatch.setattr("ft.train.nonfinite.read_synchronizes", lambda device: True)  # so that the update is tried
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = AdamW([{"params": [weight], "weight_decay": 0.0}], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    guard = NonFiniteGuard(torch.device("cpu"), State(), limit=0)
    guard.watch(optimizer, torch.tensor(float("inf")), torch.tensor(1.0), scales_loss=True)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight.detach(), torch.ones(3))
    with pytest.raises(NonFiniteError):
        guard.check()


def test_the_summary_reports_that_no_validation_loss_was_finite(tmp_path):
    outcome = Outcome(State(step=3, last_accuracy=0.0, last_loss=math.nan), None, 60.0)
    summary = closing(tmp_path, outcome, 3, Config(), None)
    assert "Validation accuracy 0.00% at the end, 0.00% at best, without a finite loss.\n" in summary
