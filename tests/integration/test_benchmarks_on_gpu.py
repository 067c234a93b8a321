"""Every benchmark that takes --device cuda, with a pretended GPU: its clock, its memory, its name in the tables.

The tensors lie on the CPU. What is CUDA's own in the benchmarks is `benchmarks/common.py`, which asks `torch.cuda` for
time and memory, and that answers here what the tests expect to find again.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ablation, checkpoint, common, generate, memory, roofline, scaling, step, trainer
from ft import finetune
from tests.graphs_on_cpu import emulate

CPU = torch.device("cpu")
PEAK, HELD = 3 * 2**30, 2**30
MODULES = (ablation, checkpoint, common, generate, memory, roofline, scaling, step, trainer)


class Event:
    """A CUDA event: each is a millisecond after the one before it, and has no time before the device has come to it."""

    count = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.is_done = False

    def record(self):
        Event.count += 1
        self.at = Event.count

    def synchronize(self):
        self.is_done = True

    def elapsed_time(self, end):
        assert end.is_done
        return float(end.at - self.at)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Runs a benchmark's `main` on the pretended GPU; returns its table and its figures."""
    synchronized, chosen, drawn = [], [], []
    described = common.machine

    def machine():
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return described()

    def choose_device(name, local_rank=None):
        chosen.append(name)
        return CPU

    monkeypatch.setattr(common, "GPU_TYPES", ("cpu",))
    for module in ("ft.device", "ft.model.matmul"):  # the real processor does not matter
        monkeypatch.setattr(f"{module}.has_amx", lambda: False)
    monkeypatch.setattr(common, "machine", machine)
    monkeypatch.setattr("ft.device.choose_device", choose_device)
    for name, answer in {
        "Event": Event,
        "set_device": lambda device: None,
        "synchronize": synchronized.append,
        "max_memory_allocated": lambda device: PEAK,
        "memory_allocated": lambda device: HELD,
        "current_device": lambda: 0,
        "get_device_name": lambda: "Pretended H100",
        "get_device_properties": lambda index: SimpleNamespace(total_memory=80 * 2**30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    for module in MODULES:
        for name, stand_in in {
            "draw": lambda *arguments: drawn.append(Path(arguments[-1]).stem),
            "in_own_process": lambda function, *arguments, device=CPU: function(*arguments),
            "disable_malloc_trim": lambda: None,
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(step, "GPU_WARM_UP", 1)
    monkeypatch.setattr(trainer, "GPU_WARM_UP", 1)

    def run(module, name, *flags):
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", [name, "--device", "cuda", "--size", "tiny", "--output", str(tmp_path), *flags])
            module.main()
        assert chosen[0] == "cuda"  # later ones name the device that this stood for
        assert drawn in ([], [f"{name}-cuda"])
        table = (tmp_path / f"{name}-cuda.md").read_text()
        assert "Pretended H100, 80.0 GiB" in table
        return table, json.loads((tmp_path / f"{name}-cuda.json").read_text())

    run.synchronized = synchronized
    return run


@pytest.mark.parametrize("module", [trainer, memory, checkpoint])
def test_a_comparison_with_the_trainer_needs_one_visible_gpu(gpu, monkeypatch, capsys, demo_inputs, inputs, module):
    """Beside a second one the Trainer would wrap the model in DataParallel, and read two batches a step."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    data = ["--dataset", inputs[3]] if module is trainer else []
    with pytest.raises(SystemExit, match="2"):
        gpu(module, "refused", "--tokenizer", str(demo_inputs[0]), *data)
    assert "the Trainer would compute on all 2 GPUs, and ft on one: set CUDA_VISIBLE_DEVICES" in capsys.readouterr().err


def test_ft_is_measured_with_the_attention_that_it_runs_with(monkeypatch):
    """And the Trainer, which asks for no device here, with that of PyTorch's defaults."""
    options = SimpleNamespace(device="cuda", precision="fp32")
    for name, answer in {"is_available": True, "device_count": 1, "current_device": 0, "get_arch_list": []}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    enabled = []

    def measure():
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return {}

    try:
        device = common.precision_of(options).device
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(True)  # as in a fresh process
        step.within_memory(device, None, measure)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert enabled == [False]


def test_step_has_the_time_of_events_and_the_memory_of_the_device(gpu, tmp_path):
    trace = tmp_path / "trace.json"
    table, figures = gpu(step, "step", "--steps", "2", "--precision", "bf16", "--profile", str(trace))
    parts = figures["step_seconds_by_part"]
    assert parts == pytest.approx(dict.fromkeys(step.PARTS, 1e-3)), "an event at the end of each"
    assert figures["step_seconds"] == pytest.approx(6e-3)
    assert figures["peak_bytes"] == PEAK
    assert figures["precision"] == "bf16"
    assert figures["share_of_matmul_rate"] == pytest.approx(figures["flops_per_step"] / 6e-3 / (2 * 1024**3 / 1e-3))
    assert "| launches per step | 0 |" in table
    assert "| peak memory (GiB) | 3.00 |" in table
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::_fused_adamw_" in names


def test_step_replays_a_graph(gpu, monkeypatch):
    monkeypatch.setattr(step, "GPU_WARM_UP", 5)
    graphs = emulate(monkeypatch)
    table, figures = gpu(step, "step-graphs", "--steps", "2", "--cuda-graphs")
    assert figures["cuda_graphs"]
    assert "padded to one shape, one CUDA graph" in table
    assert [graph.replays for graph in graphs] == [5 + 2 - 3, 5 + 2 + 3 - 3], "timed, and profiled"
    assert figures["step_seconds"] == pytest.approx(1e-3), "one event a step"


def test_launches_are_counted_by_what_starts_them():
    counts = {"cudaLaunchKernel": 5, "cuLaunchKernelEx": 2, "cudaMemcpyAsync": 1, "cudaGraphLaunch": 1, "aten::mm": 9}
    events = [SimpleNamespace(key=key, count=count) for key, count in counts.items()]
    assert common.launches(SimpleNamespace(key_averages=lambda: events)) == 9


def test_roofline(gpu, monkeypatch):
    monkeypatch.setattr(roofline, "BANDWIDTH_NUMBERS", 2**10)
    monkeypatch.setattr(roofline, "BEYOND_CACHES", 2**12)
    flags = ["--steps", "1", "--repetitions", "1", "--precision", "bf16"]
    table, figures = gpu(roofline, "roofline", *flags)
    assert figures["bytes_per_second"]["copy"] == pytest.approx(8 * 2**10 / 1e-3)
    assert figures["precisions"]["bf16"]["performed_to_needed_flops"] > 0.9
    assert "in GFLOP/s (bf16)" in table


def test_memory(gpu, demo_inputs):
    flags = ["--tokenizer", str(demo_inputs[0]), "--long", "40", "--short-steps", "1", "--long-steps", "1"]
    flags += [
        "--batch-size",
        "1",
        "--precision",
        "fp32",
    ]  # the pretended GPU is a CPU, on which the Trainer has no bf16
    _, figures = gpu(memory, "memory", *flags)
    assert {case["peak_bytes"] for case in figures["cases"]} == {PEAK}
    ours = [case for case in figures["cases"] if case["program"] == "ft"]
    assert {case["process_bytes"] for case in ours} == {HELD}
    assert len(figures["cases"]) == 10


def test_scaling(gpu, monkeypatch, demo_inputs, inputs):
    for name, value in {"BATCHES": (1, 2), "LENGTHS": (8,), "REVIEWS": (5,)}.items():
        monkeypatch.setattr(scaling, name, value)
    flags = ["--tokenizer", str(demo_inputs[0]), "--dataset", inputs[3]]
    _, figures = gpu(scaling, "scaling", *flags)
    assert [point["label"] for point in figures["points"] if point["series"] == "model"] == ["tiny"], "no large one"
    steps = [point for point in figures["points"] if point["series"] != "data"]
    assert {point["bytes"] for point in steps} == {PEAK}
    assert {round(point["seconds"], 6) for point in steps} == {6e-3}


def test_generate(gpu, monkeypatch, demo_inputs):
    monkeypatch.setattr(generate, "PROMPTS", (4,))
    flags = ["--tokenizer", str(demo_inputs[0]), "--tokens", "2", "--rounds", "1"]
    _, figures = gpu(generate, "generate", *flags)
    assert figures["precision"] == "fp32"
    assert len(gpu.synchronized) == 2 * 2 * 2, "before and after each turn of each side"


class OwnTraining:
    """A process pool without a process, whose module has a training of its own."""

    def __init__(self, *_, **__):
        self.training = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        checkpoint.training = self.training
        result = function(*arguments)
        self.training = checkpoint.training
        return SimpleNamespace(result=lambda: result)


def test_checkpoint(gpu, monkeypatch, demo_inputs):
    monkeypatch.setattr(checkpoint, "ProcessPoolExecutor", OwnTraining)
    monkeypatch.setattr(checkpoint, "training", None, raising=False)
    monkeypatch.setattr(checkpoint, "WAYS", {name: checkpoint.WAYS[name] for name in ("ft", "ft blocking", "trainer")})
    flags = ["--tokenizer", str(demo_inputs[0]), "--saves", "1", "--steps", "1"]
    table, figures = gpu(checkpoint, "checkpoint", *flags)
    assert list(figures["cases"]) == ["the GPU trains"]
    assert "Where the GPU trains, a step takes" in table
    assert gpu.synchronized


class Inline:
    """A process pool without a process."""

    def __enter__(self):
        ablation.build.cache_clear()  # a new process has no model yet
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        result = function(*arguments)
        return SimpleNamespace(result=lambda: result)


def test_ablation(gpu, monkeypatch, demo_inputs, inputs):
    monkeypatch.setattr(ablation, "process", Inline)
    monkeypatch.setattr(ablation, "LOSS_STEPS", 1)
    wanted = ("all optimizations", "PyTorch's own dropout", "weights cast at each use")
    monkeypatch.setattr(ablation, "VARIANTS", tuple(each for each in ablation.VARIANTS if each.name in wanted))
    flags = ["--tokenizer", str(demo_inputs[0]), "--dataset", inputs[3], "--steps", "1", "--precision", "bf16"]
    table, figures = gpu(ablation, "ablation", *flags)
    assert list(figures["variants"]) == ["all optimizations", "weights cast at each use"], "not what is for CPUs"
    assert figures["variants"]["weights cast at each use"]["loss_difference"] < 1e-2
    assert {figure["peak_bytes"] for figure in figures["variants"].values()} == {PEAK}
    assert "bf16" in table


class Script:
    """The driver's end of a pipe: grants some steps, has each action done once, and ends."""

    def __init__(self):
        self.sent = []
        self.commands = [("steps", 2), ("evaluate", 0), ("save", 0), ("finish", 0)]

    def send(self, message):
        self.sent.append(message)

    def recv(self):
        return self.commands.pop(0)


@pytest.mark.parametrize("name", ["ft", "trainer"])
def test_workers_of_the_comparison_synchronize(gpu, name, monkeypatch, inputs, tmp_path):
    monkeypatch.setattr(finetune, "train", finetune.train)  # which the worker replaces
    row = trainer.ROWS[0]
    connection = Script()
    trainer.work(connection, name, row, trainer.Inputs(Path(inputs[1]), Path(inputs[3]), tmp_path, CPU))
    first, second, evaluation, save = connection.sent
    assert len(first.steps) == 1
    assert len(second.steps) == 2
    assert second.peak_bytes == PEAK
    assert evaluation > 0
    assert save > 0
    assert len([device for device in gpu.synchronized if device == CPU]) >= 4


def test_the_comparison_takes_the_rows_of_gpus(gpu, monkeypatch, demo_inputs, inputs):
    class Worker:
        def __init__(self, name, row, inputs):
            assert inputs.device == CPU
            self.blocks, self.steps, self.seconds = [trainer.Block([], 0.0, PEAK)], [], {"evaluate": [], "save": []}
            self.start_up, self.first_step_done = 1.0, 2.0
            self.train(1)

        def train(self, steps):
            self.steps += [trainer.Step(0.5, 1.0, 24)] * steps

        def time(self, action):
            self.seconds[action].append(1.0)

        def finish(self):
            pass

    monkeypatch.setattr(trainer, "Worker", Worker)
    flags = ["--tokenizer", str(demo_inputs[0]), "--dataset", inputs[3], "--steps", "5", "--loss-steps", "5"]
    table, figures = gpu(trainer, "trainer", *flags, "--rounds", "1")
    assert list(figures["rows"]) == list("abcdef")
    assert figures["rows"]["f"]["row"]["cuda_graphs"]
    assert "Peak memory is that of the device" in table
