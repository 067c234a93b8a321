"""Which device and number format are chosen, on machines that are pretended, and the allocator's setting."""

import platform
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from ft import device
from ft.cli.main import main
from ft.config import Config
from ft.device import (
    SMALL_MODEL,
    Precision,
    choose_device,
    choose_precision,
    disable_malloc_trim,
    threads_for,
    use_device,
)
from ft.errors import UsageError
from ft.setup import prepare_device

ROOT = Path(__file__).parents[1]
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.fixture
def pretend(monkeypatch):
    """Pretend that the machine has so many CUDA devices, MPS or not, and such a processor."""

    def pretend(*, cuda=0, mps=False, bf16=True, cpuinfo=None, current=0, emulates=True, macos=14):
        class FakePath:
            def __init__(self, path):
                assert path == "/proc/cpuinfo"

            def exists(self):
                return cpuinfo is not None

            def read_text(self, *_, **__):
                return cpuinfo

        def is_bf16_supported(including_emulation=True):
            return bf16 or (including_emulation and emulates)  # PyTorch computes bf16 on every GPU, on old ones slowly

        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major)
        monkeypatch.setattr(device, "Path", FakePath)
        for name in ("has_amx", "has_amd_bf16"):  # not what the real processor has
            monkeypatch.setattr(device, name, getattr(device, name).__wrapped__)

    return pretend


# --- the device -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(1, False, "cuda:0"), (2, True, "cuda:0"), (0, True, "mps"), (0, False, "cpu")]
)
def test_without_a_name_the_best_device_is_taken(pretend, cuda, mps, best):
    pretend(cuda=cuda, mps=mps)
    assert choose_device(None) == torch.device(best)


@pytest.mark.parametrize("name", ["cpu", "cuda:0", "cuda:1", "mps"])
def test_a_device_that_is_present_is_taken(pretend, name):
    pretend(cuda=2, mps=True)
    assert choose_device(name) == torch.device(name)


@pytest.mark.parametrize("name", [None, "cuda"])
def test_cuda_without_a_number_is_the_current_device(pretend, name):
    pretend(cuda=2, current=1)
    assert choose_device(name) == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "cuda", "message"),
    [
        ("cuda", 0, "--device is 'cuda', PyTorch {torch} finds 0 CUDA devices here"),
        ("cuda:0", 0, "--device is 'cuda:0', PyTorch {torch} finds 0 CUDA devices here"),
        ("cuda:2", 2, "--device is 'cuda:2', PyTorch {torch} finds 2 CUDA devices here"),
        ("mps", 1, "--device is 'mps', PyTorch {torch} finds no MPS device here"),
        ("gpu", 1, "--device is 'gpu', it must be cpu, cuda, cuda:N or mps"),
        ("CPU", 1, "--device is 'CPU', it must be cpu, cuda, cuda:N or mps"),
        ("", 1, "--device is '', it must be cpu, cuda, cuda:N or mps"),
        ("cuda:x", 1, "--device is 'cuda:x', it must be cpu, cuda, cuda:N or mps"),
        ("cuda:200", 1, "--device is 'cuda:200', PyTorch {torch} finds 1 CUDA devices here"),
        ("cuda:256", 1, "--device is 'cuda:256', PyTorch {torch} finds 1 CUDA devices here"),
        ("cuda:01", 2, "--device is 'cuda:01', it must be cpu, cuda, cuda:N or mps"),
        ("cuda:", 2, "--device is 'cuda:', it must be cpu, cuda, cuda:N or mps"),
        ("cpu:1", 1, "--device is 'cpu:1', it must be cpu, cuda, cuda:N or mps"),
        ("mps:3", 1, "--device is 'mps:3', it must be cpu, cuda, cuda:N or mps"),
        ("cuda:-1", 1, "--device is 'cuda:-1', it must be cpu, cuda, cuda:N or mps"),
        ("meta", 1, "--device is 'meta', it must be cpu, cuda, cuda:N or mps"),
        ("xpu", 1, "--device is 'xpu', it must be cpu, cuda, cuda:N or mps"),
    ],
)
def test_a_device_that_is_absent_or_unknown_is_refused_by_its_flag(pretend, name, cuda, message):
    pretend(cuda=cuda)
    with pytest.raises(UsageError) as raised:
        choose_device(name)
    assert raised.value.problems == (message.format(torch=torch.__version__),)


# --- the number format ------------------------------------------------------------------------------------------------

HAS_AMX = "this processor has AMX, which multiplies bf16 matrices"
HAS_AMD_BF16 = "this AMD processor has AVX512_BF16, at twice the rate of fp32"
NEITHER = "auto uses bf16 on CPUs with AMX, and on AMD's with AVX512_BF16, and this one has neither"
ZEN4 = "vendor_id : AuthenticAMD\nflags : fpu avx512f avx512_bf16\n"
ZEN3 = "vendor_id : AuthenticAMD\nflags : fpu avx2\n"
AMX = "processor : 0\nflags : fpu avx512f avx512_bf16 amx_bf16 amx_tile\n"
AVX512 = "processor : 0\nflags : fpu avx512f avx512_bf16\n"


@pytest.mark.parametrize(
    ("device", "machine_has", "name", "reason"),
    [
        (CUDA, {"cuda": 1, "bf16": True}, "bf16", "this GPU computes bf16 in hardware"),
        (CUDA, {"cuda": 1, "bf16": False}, "fp16", "this GPU computes fp16 but no bf16 in hardware"),
        (MPS, {"mps": True}, "fp32", "the format that MPS computes most reliably"),
        (MPS, {"mps": True, "cpuinfo": AMX}, "fp32", "the format that MPS computes most reliably"),
        (CPU, {"cpuinfo": AMX}, "bf16", HAS_AMX),
        (CPU, {"cpuinfo": AVX512}, "fp32", NEITHER),
        (CPU, {"cpuinfo": ZEN4}, "bf16", HAS_AMD_BF16),
        (CPU, {"cpuinfo": ZEN3}, "fp32", NEITHER),
        (CPU, {"cpuinfo": ""}, "fp32", NEITHER),
        (CPU, {"cpuinfo": None}, "fp32", NEITHER),
        (CPU, {"cpuinfo": AVX512, "cuda": 1}, "fp32", NEITHER),
    ],
)
def test_auto_takes_the_fastest_format_that_is_computed_in_hardware(pretend, device, machine_has, name, reason):
    pretend(**machine_has)
    assert choose_precision("auto", device) == Precision(name, reason, device)


def test_auto_asks_the_gpu_that_is_meant_not_the_current_one(pretend, monkeypatch):
    pretend(cuda=2)
    current = [torch.device("cuda:0")]

    class FakeCurrent:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", FakeCurrent)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: current[-1] == torch.device("cuda:1"))
    assert choose_precision("auto", torch.device("cuda:1")).name == "bf16"
    assert choose_precision("auto", torch.device("cuda:0")).name == "fp16"


@pytest.mark.parametrize("setting", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
def test_a_format_given_is_taken_as_it_is(pretend, setting, device):
    pretend(cuda=1, mps=True, bf16=False, cpuinfo=AVX512)
    assert choose_precision(setting, device) == Precision(setting, "set by --precision", device)


@pytest.mark.parametrize(
    ("device", "machine_has", "message"),
    [
        (CUDA, {"cuda": 1, "bf16": False, "emulates": False}, "which cuda:0 does not compute: use --precision fp32"),
        (MPS, {"mps": True, "macos": 13}, "which mps does not compute before macOS 14: use --precision fp32"),
    ],
)
def test_a_format_that_the_device_does_not_compute_is_refused(pretend, device, machine_has, message):
    pretend(**machine_has)
    with pytest.raises(UsageError, match=f"--precision is 'bf16', {message}, or another --device"):
        choose_precision("bf16", device)
    for setting in ("fp32", "fp16", "auto"):
        assert choose_precision(setting, device).name != "bf16"


@pytest.mark.parametrize(("name", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_autocast_gives_matrix_products_the_format_and_keeps_the_rest(name, dtype):
    precision = Precision(name, "", CPU)
    assert precision.dtype == getattr(torch, dtype)
    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    with precision.autocast():
        product = x @ x
        norm = torch.nn.functional.layer_norm(x, (4,))
        assert torch.is_autocast_enabled("cpu") == (name != "fp32")
    assert product.dtype == precision.dtype
    assert x.dtype == norm.dtype == torch.float32
    torch.testing.assert_close(product.float(), x @ x, rtol=2**-7, atol=0)
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_losses_are_scaled_in_fp16_only(name):
    scaler = Precision(name, "", CPU).grad_scaler()
    assert scaler.is_enabled() == (name == "fp16")
    scaled = scaler.scale(torch.ones(())).item()
    assert scaled > 1 if name == "fp16" else scaled == 1


# --- the allocator ----------------------------------------------------------------------------------------------------

ALLOCATE = """
import torch
from ft.device import disable_malloc_trim
print(disable_malloc_trim(), disable_malloc_trim())
for _ in range(3):  # 64 MiB, above every size that glibc would keep by itself
    x = torch.full((16 * 2**20,), 2.0)
    assert x.sum() == 2.0 * 16 * 2**20
    del x
"""


def test_freed_memory_is_kept_and_memory_still_works():
    # In a process of its own, since nothing undoes the setting.
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second
    assert first == str(platform.libc_ver()[0] == "glibc")


class FakeLibrary:
    """A C library whose `mallopt` returns given values."""

    def __init__(self, answers):
        self.calls = []
        self.answers = dict(answers)

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))
        return self.answers[parameter]


@pytest.mark.parametrize(
    ("answers", "taken"), [({-4: 1, -1: 1}, True), ({-4: 1, -1: 0}, False), ({-4: 0, -1: 1}, False)]
)
def test_the_setting_counts_as_taken_where_both_parts_are(monkeypatch, answers, taken):
    library = FakeLibrary(answers)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: library)
    assert disable_malloc_trim() is taken
    assert set(library.calls) <= {(-4, 0), (-1, 2**31 - 1)}  # no mmap; never trim
    if taken:
        assert len(library.calls) == 2


def test_a_c_library_without_the_call_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: object())
    assert disable_malloc_trim() is False


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_other_systems_are_left_alone(monkeypatch, platform):
    def refuse(name):
        raise AssertionError("no library must be opened")

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(device.ctypes, "CDLL", refuse)
    assert disable_malloc_trim() is False


# --- what a GPU needs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((9, 0), ["sm_75", "sm_80", "sm_86", "sm_90"], True),
        ((8, 9), ["sm_75", "sm_80"], True),  # a later minor version
        ((8, 0), ["sm_86"], False),  # an earlier one
        ((6, 1), ["sm_75", "sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "compute_90"], True),  # compiled when it is loaded
        ((7, 0), ["sm_80", "compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 4), ["gfx942"], True),  # ROCm
        ((6, 1), [], True),  # not known
    ],
)
def test_a_gpu_that_pytorch_was_not_built_for_is_refused(pretend, monkeypatch, capability, built_for, runs):
    pretend(cuda=2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {1: capability}[device.index])
    if runs:
        assert use_device("cuda:1") == torch.device("cuda:1")
        return
    with pytest.raises(UsageError) as refused:
        use_device("cuda:1")
    assert f"'cuda:1', a GPU of compute capability {capability[0]}.{capability[1]}" in str(refused.value)
    assert f"was built for {' '.join(built_for)}: install a build" in str(refused.value)


@pytest.mark.parametrize(("name", "enabled"), [("cuda:0", False), ("cpu", True)])
def test_attention_by_cudnn_is_turned_off_where_a_gpu_is_used(pretend, monkeypatch, name, enabled):
    pretend(cuda=1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        use_device(name)
        assert torch.backends.cuda.cudnn_sdp_enabled() is enabled
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize(("name", "reset"), [("cuda:1", [torch.device("cuda:1")]), ("cpu", [])])
def test_each_run_measures_its_own_peak_of_a_gpus_memory(pretend, monkeypatch, name, reset):
    pretend(cuda=2)
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", seen.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    prepare_device(Config(device=name, release_memory=True))
    assert seen == reset


def test_a_small_model_is_trained_by_one_thread_and_others_by_all(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with threads_for(SMALL_MODEL - 1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with threads_for(SMALL_MODEL):
            assert torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        with threads_for(SMALL_MODEL - 1):
            assert torch.get_num_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        with pytest.raises(ZeroDivisionError), threads_for(1):
            _ = 1 / 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_run_of_a_small_model_trains_on_one_thread(inputs, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    arguments = [*inputs, "--precision", "fp32", "--max-steps", "3", "--output-dir"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen = []
    monkeypatch.setattr("ft.finetune.train", lambda *args, **options: seen.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        assert main([*arguments, str(tmp_path / "run")]) == 0
    finally:
        torch.set_num_threads(before)
    assert seen == [1]
