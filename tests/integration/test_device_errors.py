"""What a GPU's errors become: one line with what helps, in every command; other errors keep their traceback."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ft.cli.main import main
from ft.distributed.launch import process_group
from ft.errors import FtError, UsageError, is_out_of_memory

NO_KERNEL = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nmore")
BUSY = torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore")
ALLOC_FAILED = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.fixture(scope="module")
def command(demo_inputs):
    model, dataset = demo_inputs
    return {
        "predict": ["predict", str(model), "a text", "--device", "cpu", "--label-names", "neg,pos"],
        "generate": ["generate", str(model), "a text", "--device", "cpu"],
        "evaluate": ["evaluate", str(model), "--device", "cpu", "--dataset", str(dataset), "--label-names", "neg,pos"],
        "explain": ["explain", "--model", str(model), "--dataset", str(dataset), "--device", "cpu"],
        "job": ["--model", str(model), "--dataset", str(dataset), "--device", "cpu", "--max-steps", "1"],
    }


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("predict", NO_KERNEL, "this build of PyTorch has no kernels for the GPU: install one that has"),
        ("predict", BUSY, "the GPU is in use by another process"),
        ("predict", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nmore"), "out of memory"),
        ("predict", MemoryError(), "out of memory"),
        ("evaluate", ALLOC_FAILED, "out of memory"),
        ("generate", ALLOC_FAILED, "out of memory"),
        ("explain", ALLOC_FAILED, "out of memory"),
        ("job", ALLOC_FAILED, "out of memory with --batch-size 8"),
        ("job", NO_KERNEL, "this build of PyTorch has no kernels for the GPU"),
    ],
)
def test_an_error_of_the_device_is_one_line_with_advice(command, tmp_path, monkeypatch, capsys, name, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("ft.model.gpt2.Block.forward", fail)
    monkeypatch.chdir(tmp_path)
    assert main(command[name]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]


@pytest.mark.parametrize("place", ["ft.inference.language_model.GPT2", "ft.export.gguf.write_gguf"])
def test_memory_that_ends_in_an_export_needs_a_smaller_model(demo_inputs, tmp_path, monkeypatch, capsys, place):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(place, fail)
    assert main(["export", str(demo_inputs[0]), "--to", "gguf", "--output", str(tmp_path / "out")]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error == "error: out of memory with --to gguf: less is needed with a smaller model."
    assert not (tmp_path / "out").exists()


def test_a_defect_keeps_its_traceback(command, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr("ft.model.gpt2.Block.forward", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        main(command["predict"])


def test_another_error_of_cublas_is_no_lack_of_memory():
    assert is_out_of_memory(ALLOC_FAILED)
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_graphs_and_accumulation_are_refused_together(inputs, capsys):
    flags = ["--compile", "reduce-overhead", "--gradient-accumulation-steps", "2"]
    assert main([*inputs, *flags]) == 2
    assert "--compile reduce-overhead cannot add up gradients, and --gradient-accumulation-steps is 2" in (
        capsys.readouterr().err
    )


@pytest.fixture
def group(monkeypatch):
    """Pretend to be one of two processes; notes what becomes of the process group."""
    calls = []
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "TCPStore", lambda *_, **__: SimpleNamespace(check=lambda keys: False))
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: calls in (["gloo"], ["nccl"]))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: calls.append("aborted"))
    return calls


@pytest.mark.parametrize("error", [None, FtError("an error"), KeyboardInterrupt(), RuntimeError("a defect")])
@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda:1", "nccl")])
def test_the_process_group_is_torn_down_whatever_happens(group, error, device, backend):
    try:
        with process_group(torch.device(device), 5.0):
            assert group == [backend]
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error  # noqa: PT017
    assert group == [backend, "destroyed" if error is None else "aborted"]


def test_a_group_that_comes_together_by_half_is_torn_down(group, monkeypatch):
    def fail(**_):
        raise RuntimeError("timed out")

    monkeypatch.setattr(dist, "new_group", fail)
    with pytest.raises(FtError, match="did not find all others"), process_group(torch.device("cpu"), 5.0):
        pass
    assert group == ["gloo", "aborted"]


def test_a_group_is_torn_down_by_a_pytorch_that_cannot_abort(group, monkeypatch):
    monkeypatch.delattr(dist.distributed_c10d, "_abort_process_group")  # it is private
    with pytest.raises(UsageError, match="the error"), process_group(torch.device("cuda:1"), 5.0):
        raise UsageError("the error")
    assert group == ["nccl", "destroyed"]


def test_a_group_that_cannot_be_torn_down_hides_no_error(group, monkeypatch):
    def fail():
        raise RuntimeError("NCCL communicator was aborted")

    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", fail)
    with pytest.raises(UsageError, match="the error"), process_group(torch.device("cpu"), 5.0):
        raise UsageError("the error")
