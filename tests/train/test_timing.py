"""The parts of a step, with a clock that moves only while a part is at work; and that watching changes nothing."""

import time

import pytest
import torch
from torch import nn

from ft.cli.main import main
from ft.train.timing import StepTimes

SECONDS = {"data": 1.0, "forward": 2.0, "backward": 4.0, "update": 8.0, "evaluating": 16.0, "saving": 32.0}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Slow(torch.autograd.Function):
    """The identity, with a backward pass that takes its time."""

    @staticmethod
    def forward(context, x, clock):
        context.clock = clock
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        context.clock.now += SECONDS["backward"]
        return gradient, None


class Model(nn.Module):
    """Two layers; the first parameter's gradient is the last to come."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x):
        self.clock.now += SECONDS["forward"]
        return self.second(Slow.apply(self.first(x) * self.frozen, self.clock))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def pause(times, clock, activity):
    """As ft/train/metrics.py does it."""
    times.end_of_step()
    clock.now += SECONDS[activity]
    times.mark(activity)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_each_part_gets_its_time(clock, accumulation):
    def collate(examples):
        clock.now += SECONDS["data"]
        return torch.ones(2, 3)

    times, model = StepTimes(), Model(clock)
    collate = times.observe(model, collate)
    for _ in range(2):
        for batch in [collate([]) for _ in range(accumulation)]:
            model(batch).sum().backward()
        clock.now += SECONDS["update"]
    pause(times, clock, "evaluating")
    model.eval()
    with torch.no_grad():
        model(torch.ones(2, 3))  # which is evaluating, and no part of a step
    times.mark("evaluating")
    pause(times, clock, "saving")
    taken = times.take()
    assert list(taken) == list(SECONDS), "in the order of a step"
    per_step = {name: 2 * accumulation * SECONDS[name] for name in ("data", "forward", "backward")}
    evaluating = SECONDS["evaluating"] + SECONDS["forward"]
    assert taken == {**per_step, "update": 2 * SECONDS["update"], "evaluating": evaluating, "saving": SECONDS["saving"]}
    assert sum(taken.values()) == clock.now - 100.0, "no moment is lost or counted twice"
    assert times.take() == {}
    pause(times, clock, "evaluating")
    assert times.take() == {"evaluating": SECONDS["evaluating"]}


def test_unobserved_it_is_training_and_pauses(clock):
    times = StepTimes()
    clock.now += 5
    pause(times, clock, "saving")
    clock.now += 7
    times.end_of_step()
    assert times.take() == {"training": 12.0, "saving": SECONDS["saving"]}


def test_a_watched_run_learns_the_same(inputs, tmp_path, monkeypatch):
    arguments = [*inputs, "--max-steps", "3", "--gradient-accumulation-steps", "2"]
    assert main([*arguments, "--output-dir", str(tmp_path / "watched")]) == 0
    monkeypatch.setattr(StepTimes, "observe", lambda self, model, collate: collate)
    assert main([*arguments, "--output-dir", str(tmp_path / "alone")]) == 0
    weights = [(tmp_path / run / "final" / "model.safetensors").read_bytes() for run in ("watched", "alone")]
    assert weights[0] == weights[1]
    assert "forward" in (tmp_path / "watched" / "metrics.jsonl").read_text()
    assert "forward" not in (tmp_path / "alone" / "metrics.jsonl").read_text()
