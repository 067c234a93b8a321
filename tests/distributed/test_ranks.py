"""Several processes, really started and connected by gloo on this machine, against one process."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ft.checkpoint.resume import divide_batch_over_ranks
from ft.checkpoint.snapshot import gather_weights
from ft.checkpoint.store import checkpoints, verify_checkpoint
from ft.cli.main import main
from ft.config import Config
from ft.data.batches import IGNORED
from ft.data.examples import Example
from ft.device import choose_device
from ft.distributed.ranks import SINGLE_PROCESS, Ranks
from ft.distributed.sharding import full_tensor, local_shard, shard_of
from ft.errors import UsageError
from ft.train.schedule import windows
from tests.hub_server import HubServer, Repository

ROOT = Path(__file__).parents[2]
TENSORS = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


class Several:
    """A server of `several.py`."""

    def __init__(self, folder):
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "several.py")],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "FOLDER": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, commands, folders=None):
        """Start a process for each command line, in a folder of its own if they are named; gives their numbers."""
        self.server.stdin.write(json.dumps([commands, folders or [str(ROOT)] * len(commands)]) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def statuses(self):
        """Wait for all to end."""
        return json.loads(self.server.stdout.readline())

    def said(self, rank=0):
        return (self.folder / f"out-{rank}").read_text()

    def run(self, size, arguments):
        """Run the same command line in `size` processes, which must all succeed."""
        self.start([arguments] * size)
        statuses = self.statuses()
        assert statuses == [0] * size, "\n".join(self.said(rank) for rank in range(size))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    server = Several(tmp_path_factory.mktemp("several"))
    yield server
    server.server.stdin.close()
    server.server.wait(timeout=60)


@pytest.fixture
def command(inputs, tmp_path):
    """A command line on the tiny model: 77 reviews to train on, 12 to validate."""

    def command(name, batch_size, *flags):
        settings = ["--precision", "fp32", "--batch-size", str(batch_size), "--output-dir", str(tmp_path / name)]
        often = ["--logging-steps", "1", "--eval-steps", "4", "--save-steps", "4", "--eval-batch-size", "5"]
        return [*inputs, *settings, *often, *flags]

    return command


def lines_of(run):
    """The lines of metrics.jsonl without the fields that a clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def assert_same_run(ours, theirs, bound):
    """All figures are within a relative bound, and the final weights; each tensor by itself is within ten times that.

    A bias begins at 0 and is a sum of AdamW's steps alone, each as large for a gradient that is nearly rounding.
    """
    mine, reference = lines_of(ours), lines_of(theirs)
    assert len(mine) == len(reference)
    for line, expected in zip(mine, reference, strict=True):
        for digest in ("eval_rows_sha256", "test_rows_sha256"):
            assert line.pop(digest, None) == expected.pop(digest, None)
        assert line == pytest.approx(expected, rel=bound)
    weights, expected = (load_file(run / "final" / "model.safetensors") for run in (ours, theirs))
    assert weights.keys() == expected.keys()
    weights, expected = ({name: without_keys_bias(name, w) for name, w in each.items()} for each in (weights, expected))
    full_tensor, difference = math.hypot(*(w.norm() for w in expected.values())), 0.0
    for name, weight in weights.items():
        distance = (weight - expected[name]).norm()
        assert distance <= 10 * bound * expected[name].norm(), name
        difference = math.hypot(difference, distance)
    assert difference <= bound * full_tensor


def without_keys_bias(name, weight):
    """Softmax ignores the keys' bias, so that its gradient is rounding, which AdamW takes for real."""
    if not name.endswith("attn.c_attn.bias"):
        return weight
    third = len(weight) // 3
    return torch.cat([weight[:third], weight[2 * third :]])


def same_bytes(a, b):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in TENSORS)


# The same mathematics


@pytest.mark.parametrize(
    ("size", "batch_size", "flags"),
    [
        (2, 4, []),
        (2, 2, ["--gradient-accumulation-steps", "3"]),  # the last window is short, and so is its last batch
        (4, 2, ["--activation-checkpointing", "full"]),
        (4, 19, ["--epochs", "3"]),  # a last batch of one review, for four processes
        (2, 4, ["--shard"]),
        (2, 2, ["--shard", "--gradient-accumulation-steps", "3", "--freeze", "h.0.*"]),
        (2, 4, ["--static-shapes", "--weight-decay", "0.1"]),
        (2, 2, ["--class-weights", "1,5", "--gradient-accumulation-steps", "3"]),
        (4, 19, ["--class-weights", "3,1", "--epochs", "2", "--static-shapes"]),
        (2, 4, ["--lora-rank", "4", "--train-only", "*.bias"]),
        (
            2,
            2,
            ["--lora-rank", "3", "--shard", "--gradient-accumulation-steps", "3", "--lora-targets", "c_attn", "c_fc"],
        ),
    ],
)
def test_several_processes_do_what_one_does(several, command, tmp_path, size, batch_size, flags):
    flags = ["--dropout", "0", "--learning-rate", "1e-4", *flags]
    several.run(1, command("one", size * batch_size, *(flag for flag in flags if flag != "--shard")))
    several.run(size, command("several", batch_size, *flags))
    assert_same_run(tmp_path / "several", tmp_path / "one", bound=1e-6)


def test_only_the_first_process_speaks(several, command):
    several.run(2, command("run", 4, "--max-steps", "4"))
    assert several.said(0).count("Finished 4 steps") == 1
    assert "8 examples in all, shared by 2 processes" in several.said(0)
    assert several.said(1) == ""


def test_processes_drop_different_elements(several, command, tmp_path):
    """With dropout the run is another than with one process, and the random states are kept for each."""
    several.run(2, command("two", 4, "--max-steps", "4"))
    states = load_file(tmp_path / "two" / "checkpoint-4" / "rng.safetensors")
    assert states.keys() == {"cpu", "cpu.1"}
    assert not torch.equal(states["cpu"], states["cpu.1"])


def test_bf16_gradients_are_near(several, command, tmp_path):
    flags = ["--dropout", "0", "--learning-rate", "1e-4", "--max-steps", "8"]
    several.run(2, command("fp32", 4, *flags))
    several.run(2, command("bf16", 4, *flags, "--bf16-gradients"))
    several.run(2, command("sharded", 4, *flags, "--bf16-gradients", "--shard"))
    assert_same_run(tmp_path / "bf16", tmp_path / "fp32", bound=1e-2)
    assert_same_run(tmp_path / "sharded", tmp_path / "fp32", bound=1e-2)
    for run in ("bf16", "sharded"):
        assert lines_of(tmp_path / run) != lines_of(tmp_path / "fp32")


# Going on


def stopped(several, command, run, *, size=2, step=4, rank=1):
    """Start a run, and send SIGTERM to one of its processes when it has come to a step."""
    processes = several.start([command] * size)
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b'"loss"') >= step)
    os.kill(processes[rank], signal.SIGTERM)
    assert several.statuses() == [128 + signal.SIGTERM] * size, several.said(0) + several.said(1)


def wait_until(happened, seconds=120):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_run_of_two_processes_resumes_in_one_or_four(several, command, tmp_path):
    flags = ["--dropout", "0", "--learning-rate", "1e-5", "--epochs", "8"]
    several.run(1, command("one", 8, *flags))
    for size in (1, 4):
        run = tmp_path / f"in {size}"
        stopped(several, command(run.name, 4, *flags), run)
        several.run(size, ["--output-dir", str(run), "--resume"])
        assert_same_run(run, tmp_path / "one", bound=1e-6)
        recorded = json.loads((run / "config.json").read_text())
        assert (recorded["batch_size"], recorded["processes"]) == (8 // size, size)


@pytest.mark.parametrize("flags", [[], ["--shard"], ["--precision", "fp16", "--gradient-accumulation-steps", "2"]])
def test_sigterm_on_one_process_stops_all_and_the_rest_is_the_same_to_the_last_bit(several, command, tmp_path, flags):
    flags = ["--epochs", "6", *flags]
    calm, run = tmp_path / "calm", tmp_path / "run"
    several.run(2, command("calm", 4, *flags))
    stopped(several, command("run", 4, *flags), run)
    assert several.said(0).count("To continue:") == 1
    assert all(verify_checkpoint(path) is None for path in checkpoints(run))
    several.run(2, ["--output-dir", str(run), "--resume"])
    assert lines_of(run) == lines_of(calm)
    assert same_bytes(checkpoints(run)[-1], checkpoints(calm)[-1])


def test_the_reviews_of_a_batch_must_be_shared_equally(several, command, tmp_path):
    several.run(2, command("run", 4, "--max-steps", "4"))
    several.start([["--output-dir", str(tmp_path / "run"), "--resume", "--max-steps", "8"]] * 3)
    assert several.statuses() == [2, 2, 2]
    assert "batches of 8 examples, which 3 processes cannot share equally" in several.said()
    assert "resume it with 1, 2, 4, 8" in several.said()


def test_a_resumed_run_keeps_its_global_batch_size(several, command, tmp_path):
    several.run(2, command("run", 4, "--max-steps", "4"))
    several.start([["--output-dir", str(tmp_path / "run"), "--resume", "--batch-size", "5"]] * 2)
    assert 2 in several.statuses()
    assert "--batch-size was 4 x 2 processes and would be 5 x 2 processes" in several.said()


# What goes wrong


def test_a_process_with_other_flags_is_refused(several, command):
    several.start([command("run", 4), command("run", 4, "--seed", "7")])
    assert several.statuses() == [2, 2]
    assert "--seed is 42 in process 0 and 7 in process 1" in several.said()


def test_a_process_with_other_data_is_refused(several, command, inputs, tmp_path):
    """As on two machines, where one path leads to different files: here a folder that changes in between."""
    dataset = Path(inputs[inputs.index("--dataset") + 1])
    for name in ("first", "second"):
        (tmp_path / name / "here").mkdir(parents=True)
        for path in dataset.iterdir():
            (tmp_path / name / "here" / path.name).write_bytes(path.read_bytes())
    os.replace(tmp_path / "second" / "here" / "validation.parquet", tmp_path / "second" / "here" / "train.parquet")
    flags = command("run", 4)
    flags[flags.index("--dataset") + 1] = "here"
    several.start([flags, flags], folders=[str(tmp_path / "first"), str(tmp_path / "second")])
    assert several.statuses() == [2, 2]
    assert "the SHA-256 of the data is" in several.said()


def test_what_fails_in_the_first_process_ends_the_others(several, command, tmp_path):
    several.run(2, command("run", 4, "--max-steps", "4"))
    several.start([command("run", 4)] * 2)  # into a folder that holds files
    assert several.statuses() == [2, 1]
    assert "which is not empty" in several.said(0)
    assert "another process of this run has failed" in several.said(1)


def test_a_trace_that_cannot_be_written_ends_all_before_they_begin(several, command, tmp_path):
    several.start([command("run", 4, "--profile", str(tmp_path / "missing" / "trace.json"))] * 2)
    assert several.statuses() == [2, 1]
    assert several.said(0).count("error: --profile is ") == 1
    assert several.said(1) == "error: another process of this run has failed; its own message has the reason\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "size"), [(signal.SIGSTOP, 3), (signal.SIGKILL, 2)])
def test_a_process_that_does_not_answer_is_named(several, command, tmp_path, number, size):
    run = tmp_path / "run"
    processes = several.start([command("run", 4, "--epochs", "1000", "--process-timeout", "3")] * size)
    wait_until(lambda: checkpoints(run))
    os.kill(processes[1], number)
    if number == signal.SIGSTOP:
        wait_until(lambda: "process 1" in several.said(0))
        os.kill(processes[1], signal.SIGKILL)
    statuses = several.statuses()
    assert statuses[1] == -signal.SIGKILL
    assert set(statuses) == {1, -signal.SIGKILL}
    for rank in {0, size - 1} - {1}:
        assert f"error: process 1 of {size} (counted from 0) ended, or did not answer" in several.said(rank)
        assert "Traceback" not in several.said(rank)
    assert verify_checkpoint(checkpoints(run)[-1]) is None


def torchrun(arguments, *flags, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *flags]
    return subprocess.Popen(
        [*command, "run.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_torchrun_starts_a_killed_process_anew_and_the_end_is_the_same(several, command, tmp_path):
    calm, run = tmp_path / "calm", tmp_path / "run"
    several.run(2, command("calm", 4, "--epochs", "12"))
    elastic = torchrun(command("run", 4, "--epochs", "12"), "--max-restarts", "3")
    wait_until(lambda: len(checkpoints(run)) > 1)
    worker = next(
        int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if is_worker(path, rank=1, output=run)
    )
    os.kill(worker, signal.SIGKILL)
    output, _ = elastic.communicate(timeout=200)
    assert elastic.returncode == 0, output
    assert "Continuing after step" in output
    assert lines_of(run) == lines_of(calm)
    assert same_bytes(checkpoints(run)[-1], checkpoints(calm)[-1])


def is_worker(environ, rank, output):
    """Whether a process of /proc is the one of this rank in the run with this output directory."""
    try:
        is_ranked = f"RANK={rank}".encode() in environ.read_bytes().split(b"\0")
        return is_ranked and str(output).encode() in (environ.parent / "cmdline").read_bytes()
    except OSError:
        return False


def test_torchrun_does_not_go_on_with_a_run_that_it_did_not_begin(several, command, tmp_path):
    """A directory with files is refused, also after a restart by torchrun: this does not mean --resume."""
    several.run(2, command("run", 4, "--max-steps", "4"))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    elastic = torchrun(command("run", 4, "--max-steps", "8"), "--max-restarts", "1")
    output, _ = elastic.communicate(timeout=200)
    assert elastic.returncode != 0
    assert output.count("which is not empty") == 2
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_one_process_downloads_and_the_others_find_it_in_the_cache(command, inputs, tmp_path):
    model, dataset = (Path(inputs[inputs.index(flag) + 1]) for flag in ("--model", "--dataset"))
    with HubServer() as hub:
        hub.repositories = {
            "models/owner/gpt": Repository({path.name: path.read_bytes() for path in model.iterdir()}),
            "datasets/owner/reviews": Repository({path.name: path.read_bytes() for path in dataset.iterdir()}),
        }
        flags = command("run", 4, "--max-steps", "2", "--model", "owner/gpt", "--dataset", "owner/reviews")
        elastic = torchrun(flags, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="0")
        output, _ = elastic.communicate(timeout=200)
        assert elastic.returncode == 0, output
        downloads = [request.file for request in hub.requests if request.file and request.sent]
        assert {"model.safetensors", "train.parquet"} <= set(downloads)
        assert len(downloads) == len(set(downloads))


# The parts by themselves


def test_a_process_that_is_not_the_first_keeps_nothing_of_what_it_helps_to_put_together():
    alive = []

    class Sharded(torch.Tensor):
        def full_tensor(self):
            assert all(full() is None for full in alive), "one tensor at a time"
            full = torch.ones(4)
            alive.append(weakref.ref(full))
            return full

    model = torch.nn.ParameterList([torch.zeros(2) for _ in range(3)])
    sharded = {name: Sharded(parameter.detach()) for name, parameter in model.named_parameters()}
    model.named_parameters = lambda: sharded.items()
    assert gather_weights(model, Ranks(rank=1, size=2)) == {}
    assert len(alive) == 3


@given(st.integers(1, 9), st.integers(1, 40))
def test_shares_are_a_partition_of_a_batch_and_differ_by_one_at_most(size, count):
    batch = [Example([number], [number]) for number in range(count)]
    shares = [Ranks(rank, size).local_examples(batch) for rank in range(size)]
    real = [[example for example in share if example.target_ids != [IGNORED]] for share in shares]
    assert sorted(example for share in real for example in share) == batch
    assert max(map(len, real)) - min(map(len, real)) <= 1
    assert all(shares)  # every rank has a forward pass: the others would wait for it


def test_several_processes_read_in_the_order_of_one():
    one = Config(batch_size=12, gradient_accumulation_steps=2, epochs=2)
    several = Config(batch_size=4, processes=3, gradient_accumulation_steps=2, epochs=2)
    assert list(windows(77, one, 0)) == list(windows(77, several, 0))


def test_one_process_exchanges_nothing():
    tensor, model = torch.ones(3), torch.nn.Linear(2, 2)
    assert SINGLE_PROCESS.sum(tensor) is tensor
    assert SINGLE_PROCESS.parallelize(model, torch.device("cpu"), shard=True, bf16_gradients=True) is model
    assert local_shard(tensor) is full_tensor(tensor) is shard_of(tensor, tensor, SINGLE_PROCESS) is tensor
    assert divide_batch_over_ranks(Config(), 1) == Config()


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_processes_cannot_share_a_device(device):
    with pytest.raises(UsageError, match="which several processes cannot share"):
        choose_device(device, local_rank=1)


@pytest.mark.parametrize(("present", "local_rank"), [(1, 1), (4, 6)])
def test_more_processes_than_gpus(monkeypatch, present, local_rank):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    with pytest.raises(UsageError, match=f"--nproc-per-node must be at most {present}"):
        choose_device(None, local_rank)
    assert choose_device("cuda", 0) == torch.device("cuda:0")


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", "-1"), ("RANK", "x")])
def test_a_rank_that_is_not_a_number(monkeypatch, capsys, command, name, value):
    from ft.cli.main import main

    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for key, text in {**places, name: value}.items():
        monkeypatch.setenv(key, text)
    assert main(command("run", 4)) == 2
    assert f"the environment variable {name} is {value!r}, it must be a number" in capsys.readouterr().err


def test_missing_variables_of_torchrun(monkeypatch, capsys, command):
    from ft.cli.main import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main(command("run", 4)) == 2
    assert re.search("WORLD_SIZE is 2, but MASTER_ADDR, .*RANK.* are not set", capsys.readouterr().err)


def test_a_taken_port_is_named_with_the_remedy(inputs, tmp_path, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        assert main([*inputs, "--output-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert f"error: port {port} of 127.0.0.1 is in use by another program" in error
    assert "--master-port" in error
    assert not (tmp_path / "run").exists()
