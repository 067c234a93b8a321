"""A run that is killed over and over ends in the same bytes as one that is left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ft.checkpoint.store import checkpoints, verify_checkpoint
from tests.reference.synthetic import write_model

ROOT = Path(__file__).parents[2]
FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "adapter_model.safetensors")


class Killable:
    """A server of `killable.py`."""

    def __init__(self, errors, seconds_per_fsync=0.0, threads=1):
        environment = {
            **os.environ,
            "THREADS": str(threads),
            "PYTHONPATH": str(ROOT),
            "SECONDS_PER_FSYNC": str(seconds_per_fsync),
            "ERRORS": str(errors),
        }
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "killable.py")],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, arguments):
        """Start a run; gives its process number."""
        self.server.stdin.write(json.dumps(arguments) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def status(self):
        """Wait for the run to end."""
        return int(self.server.stdout.readline())

    def close(self):
        self.server.stdin.close()
        self.server.wait(timeout=60)


@pytest.fixture
def killable(tmp_path):
    server = Killable(tmp_path / "errors", seconds_per_fsync=0.01)
    yield server
    server.close()


def metrics_without_clock(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def assert_same_figures(run, calm, steps):
    last = f"checkpoint-{steps}"
    assert verify_checkpoint(run / last) is None
    for name in (name for name in FILES if (calm / last / name).exists()):
        assert (run / last / name).read_bytes() == (calm / last / name).read_bytes(), name
    assert (run / "final" / FILES[0]).read_bytes() == (calm / "final" / FILES[0]).read_bytes()
    assert metrics_without_clock(run) == metrics_without_clock(calm)


def assert_same_end(run, calm, steps):
    assert_same_figures(run, calm, steps)
    assert [path.name for path in checkpoints(run)] == [path.name for path in checkpoints(calm)]
    assert not list(run.glob(".unfinished-*"))
    assert not list(run.glob(".replaced-*"))


def storm(killable, arguments, tmp_path, record_property, *, kills, steps, longest, seed):
    """Kill a run at random moments, some of them inside a save, and compare its end with that of a calm one."""
    calm, run = tmp_path / "calm", tmp_path / "storm"
    arguments = [*arguments, "--max-steps", str(steps), "--epochs", "1000"]
    killable.start([*arguments, "--output-dir", str(calm)])
    assert killable.status() == 0
    moments, in_saves, killed = random.Random(seed), 0, 0
    while killed < kills:
        newest = max((int(path.name.split("-")[1]) for path in checkpoints(run)), default=0)
        process = killable.start([*arguments, "--output-dir", str(run), "--resume"])
        # Most are let come to a new checkpoint first, so that the run gets on; the others die anywhere before.
        waits, delay, started = moments.random() < 0.7, moments.uniform(0, longest), time.monotonic()
        while waits and time.monotonic() < started + 120:
            if max((int(path.name.split("-")[1]) for path in checkpoints(run)), default=0) > newest:
                break
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        status = killable.status()
        assert status == -signal.SIGKILL, "the run must be long enough for so many kills"
        killed += 1
        in_saves += any(run.glob(".unfinished-checkpoint-*"))
    killable.start([*arguments, "--output-dir", str(run), "--resume"])
    assert killable.status() == 0
    assert_same_end(run, calm, steps)
    assert in_saves > 0
    record_property("kills", kills)
    record_property("kills inside a save", in_saves)


SETTINGS = ["--save-steps", "3", "--eval-steps", "5", "--logging-steps", "2", "--precision", "fp32"]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--precision", "fp16", "--gradient-accumulation-steps", "2", "--keep-best", "--save-blocking"],
        ["--lora-rank", "4", "--lora-dropout", "0.1"],
    ],
)
def test_a_run_that_is_killed_ten_times_ends_in_the_same_bytes(killable, inputs, tmp_path, record_property, flags):
    arguments = [*inputs, *SETTINGS, *flags]
    storm(killable, arguments, tmp_path, record_property, kills=10, steps=120, longest=0.3, seed=7)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_200_times_ends_in_the_same_bytes(killable, inputs, tmp_path, record_property):
    storm(killable, [*inputs, *SETTINGS], tmp_path, record_property, kills=200, steps=1500, longest=0.3, seed=8)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_at_124m_parameters_that_is_killed_ten_times_ends_in_the_same_bytes(
    tmp_path, real_gpt2, real_dataset, record_property
):
    model = write_model(tmp_path / "gpt2", "gpt2", tokenizer_from=real_gpt2)
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", 480), ("validation", 16), ("test", 16)):
        pq.write_table(pq.read_table(real_dataset / f"{split}.parquet").slice(0, rows), data / f"{split}.parquet")
    arguments = ["--model", str(model), "--dataset", str(data), "--device", "cpu", "--precision", "fp32"]
    arguments += ["--save-steps", "3", "--eval-steps", "10", "--logging-steps", "1"]
    killable = Killable(tmp_path / "errors", threads=2)
    try:
        storm(killable, arguments, tmp_path, record_property, kills=10, steps=60, longest=3.0, seed=9)
    finally:
        killable.close()
