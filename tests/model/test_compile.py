"""What torch.compile needs on a device is asked for before a run begins."""

import pytest
import torch

from ft.errors import UsageError
from ft.model import compile
from ft.model.compile import compile_blocks


@pytest.mark.parametrize(
    ("present", "environment", "capability", "triton", "message"),
    [
        ({"gcc"}, {}, (8, 0), True, None),
        ({"clang"}, {}, (7, 0), True, None),
        ({"/opt/cc"}, {"CC": "/opt/cc"}, (8, 0), True, None),
        ({"gcc"}, {"CC": "/opt/cc"}, (8, 0), True, "needs a C compiler on a GPU, and /opt/cc is not installed"),
        (set(), {}, (8, 0), True, "needs a C compiler on a GPU, and gcc or clang is not installed"),
        ({"gcc"}, {}, (6, 1), True, "needs a GPU of compute capability 7.0 or later"),
        ({"gcc"}, {}, (8, 0), False, "the package triton is not installed"),
    ],
)
def test_compiling_for_a_gpu_needs_triton_and_a_c_compiler(
    monkeypatch, present, environment, capability, triton, message
):
    monkeypatch.delenv("CC", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compile.shutil, "which", lambda name: name if name in present else None)
    monkeypatch.setattr(compile, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    compiled = []

    class Block:
        def compile(self, **options):
            compiled.append(options)

    if message is None:
        compile_blocks([Block()], "reduce-overhead", torch.device("cuda:0"))
        assert compiled == [{"mode": "reduce-overhead", "dynamic": False}]
        return
    with pytest.raises(UsageError, match=message):
        compile_blocks([Block()], "default", torch.device("cuda:0"))
    assert not compiled
