"""The command line on machines with pretended GPUs: which device each command takes, and makes the current one.

Only the driver is pretended. `torch.cuda.set_device` and all of PyTorch's Python are the real ones, so that a device
they refuse is refused here.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from ft import finetune, setup
from ft.cli.main import main
from ft.device import choose_precision
from ft.distributed.ranks import SINGLE_PROCESS
from ft.explain import step as explain
from ft.model.gpt2 import GPT2


class Placed(Exception):
    """The model is about to move to its device: a CPU build of PyTorch can go no further."""


class Driver:
    """The GPUs of a machine, and what has been asked of them."""

    def __init__(self, monkeypatch):
        self.count, self.major, self.current = 1, 8, 0
        self.precisions = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self.count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "_exchange_device", self.set_device)
        monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", self.set_device)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=self.major))
        monkeypatch.setattr(torch._C, "_cuda_setDevice", self.set_device, raising=False)  # CPU builds lack these two
        monkeypatch.setattr(torch._C, "_cuda_resetPeakMemoryStats", lambda device: None, raising=False)
        for module in (setup, explain):
            monkeypatch.setattr(module, "choose_precision", self.choose_precision)
        monkeypatch.setattr(GPT2, "to", lambda model, device: self.place(device))

    def set_device(self, index):
        previous, self.current = self.current, index
        return previous

    def choose_precision(self, setting, device):
        precision = choose_precision(setting, device)
        self.precisions.append((precision.name, str(precision.device)))
        return precision

    def place(self, device):
        raise Placed(str(device))


@pytest.fixture
def driver(monkeypatch):
    return Driver(monkeypatch)


@pytest.fixture
def command(inputs, tmp_path):
    """The arguments of each command, without its device."""
    _, model, _, dataset, *_ = inputs
    of_a_run = ["--model", model, "--dataset", dataset]
    return {
        "run": [*of_a_run, "--output-dir", str(tmp_path / "run")],
        "explain": ["explain", *of_a_run],
        "predict": ["predict", model, "a fine film", "--label-names", "neg,pos"],
        "evaluate": ["evaluate", model, "--dataset", dataset, "--label-names", "neg,pos"],
        "generate": ["generate", model, "a fine"],
    }


COMMANDS = ["run", "explain", "predict", "evaluate", "generate"]


def placed(arguments):
    """Where a command is about to put its model."""
    with pytest.raises(Placed) as raised:
        main(arguments)
    return str(raised.value)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("device", [[], ["--device", "cuda"], ["--device", "cuda:0"]], ids=["none", "cuda", "cuda:0"])
def test_every_command_takes_the_one_gpu(driver, command, name, device):
    assert placed([*command[name], *device]) == "cuda:0"
    assert driver.current == 0
    assert driver.precisions == ([("bf16", "cuda:0")] if name in ("run", "explain") else [])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_makes_its_gpu_the_current_one(driver, command, name):
    driver.count = 2
    assert placed([*command[name], "--device", "cuda:1"]) == "cuda:1"
    assert driver.current == 1


@pytest.mark.parametrize("device", [[], ["--device", "cuda"]], ids=["none", "cuda"])
@pytest.mark.parametrize("local_rank", [0, 1])
def test_each_process_of_torchrun_takes_a_gpu_of_its_own(driver, command, monkeypatch, device, local_rank):
    driver.count = 2
    for key, value in {"WORLD_SIZE": 2, "RANK": local_rank, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(
        finetune, "process_group", lambda device, timeout: nullcontext(SINGLE_PROCESS)
    )  # the others are not there
    assert placed([*command["run"], *device]) == f"cuda:{local_rank}"
    assert driver.current == local_rank
    assert driver.precisions == [("bf16", f"cuda:{local_rank}")]


def test_a_gpu_without_bf16_takes_fp16(driver, command):
    driver.major = 7
    assert placed(command["run"]) == "cuda:0"
    assert driver.precisions == [("fp16", "cuda:0")]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_gpu_that_is_absent_is_refused_by_every_command(driver, command, name, capsys):
    assert main([*command[name], "--device", "cuda:1"]) == 2
    assert "--device is 'cuda:1', PyTorch" in capsys.readouterr().err


def test_a_run_on_the_cpu_leaves_the_gpu_alone(command, monkeypatch, capsys):
    """CUDA is not initialized, which would create a context, not even to save and restore random states."""
    touched = []

    def initialize():
        touched.append("initialized")
        raise RuntimeError("the GPU is touched")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_lazy_init", initialize)
    steps = ["--device", "cpu", "--max-steps", "2", "--save-steps", "1"]
    assert main([*command["run"], *steps]) == 0
    assert main([*command["run"], *steps[:-3], "3", "--resume"]) == 0
    for name in ("explain", "predict", "evaluate", "generate"):
        assert main([*command[name], "--device", "cpu"]) == 0
    assert not touched
