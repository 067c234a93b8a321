"""The parts of a step, with a clock that moves only while a part is at work; and that watching changes nothing."""

import json
import re
import time

import pytest
import torch
from torch import nn

from ft.cli.main import main
from ft.train.timing import StepIntervals, StepTimes

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


def test_what_is_before_the_first_step_is_no_part_of_one(clock):
    times = StepTimes()
    clock.now += 5
    times.skip()
    clock.now += 1
    times.mark("evaluating")
    assert times.take() == {"evaluating": 1.0}


def test_steps_are_timed_one_by_one_without_pauses(clock):
    intervals = StepIntervals(each_step=True)
    assert intervals.speed() is None
    clock.now += 100
    intervals.leave_out(90)  # an evaluation before the first step
    seconds = [0.5, 0.1, 0.2, 0.4, 0.3, 0.6, 0.8, 0.7, 1.0, 0.9]
    for number, each in enumerate(seconds):
        clock.now += each
        intervals.step_done(8, 100)
        intervals.values_read()
        if number % 3 == 0:
            clock.now += 50
            intervals.leave_out(50)
    speed = intervals.speed()
    ranked = sorted(seconds)
    assert (speed.median, speed.percentile_90) == pytest.approx((ranked[4], ranked[8]))
    assert speed.steps_per_interval == 1
    assert speed.samples_per_second == pytest.approx(80 / 5.5)
    assert speed.tokens_per_second == pytest.approx(1000 / 5.5)


def test_on_a_gpu_steps_are_timed_between_reads(clock):
    """The host returns from a step at once, and waits when it reads a value."""
    intervals = StepIntervals(each_step=False)
    for steps, seconds in ((10, 5.0), (4, 1.0), (10, 3.0), (1, 9.0)):
        for _ in range(steps):
            intervals.step_done(2, 10)
        clock.now += seconds
        intervals.values_read()
    intervals.step_done(2, 10)  # not waited for
    speed = intervals.speed()
    assert speed.median == pytest.approx(0.3)  # 4 steps of 0.25, 10 of 0.3, 10 of 0.5, 1 of 9
    assert speed.percentile_90 == pytest.approx(0.5)
    assert speed.steps_per_interval == 25 / 4
    assert speed.tokens_per_second == pytest.approx(250 / 18)


def test_a_run_reports_its_speed_and_memory(inputs, tmp_path, capsys):
    """In the summary, in the model card and in summary.json; measured against a clock around the program."""
    started = time.perf_counter()
    assert main([*inputs, "--epochs", "2", "--batch-size", "7", "--output-dir", str(tmp_path / "run")]) == 0
    elapsed = time.perf_counter() - started
    output = capsys.readouterr().out
    pattern = r"Step time [\d.]+ ms median, [\d.]+ ms 90th percentile; [\d,]+ tokens/s; [\d.e-]+ TFLOP/s .*GB\."
    (line,) = re.findall(pattern, output)
    assert line in (tmp_path / "run" / "final" / "README.md").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == 22
    assert summary["seconds"] <= elapsed
    assert summary["step_seconds_median"] <= summary["step_seconds_90th_percentile"]
    assert 154 / summary["samples_per_second"] < elapsed
    assert summary["steps_per_interval"] == 1
    with open("/proc/self/status") as file:
        resident = int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) * 1024
    assert summary["peak_memory_bytes"] == pytest.approx(resident, rel=0.2)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert "training" not in first["seconds_by_part"]


def test_the_time_before_the_first_step_is_not_shown_as_training(inputs, tmp_path):
    flags = ["--forgetting", "builtin", "--max-steps", "2", "--output-dir", str(tmp_path / "run")]
    assert main([*inputs, *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(lines[0]["seconds_by_part"]) == ["evaluating"]
    assert not [line for line in lines if "training" in line.get("seconds_by_part", {})]


def test_a_watched_run_learns_the_same(inputs, tmp_path, monkeypatch):
    arguments = [*inputs, "--max-steps", "3", "--gradient-accumulation-steps", "2"]
    assert main([*arguments, "--output-dir", str(tmp_path / "watched")]) == 0
    monkeypatch.setattr(StepTimes, "observe", lambda self, model, collate: collate)
    assert main([*arguments, "--output-dir", str(tmp_path / "alone")]) == 0
    weights = [(tmp_path / run / "final" / "model.safetensors").read_bytes() for run in ("watched", "alone")]
    assert weights[0] == weights[1]
    assert "forward" in (tmp_path / "watched" / "metrics.jsonl").read_text()
    assert "forward" not in (tmp_path / "alone" / "metrics.jsonl").read_text()
