"""One CUDA device that is not there: real programs run on it, and everything they ask of it is noted.

Tensors on the device are fake: they have a shape, a type and a device, and no numbers. Tensors on the CPU are real. So
the lines of a CUDA path are executed, forward and backward, on a machine without a GPU; what a number read from the
device is, does not matter: it is 0 or 1.

PyTorch must find the device when it is loaded. Therefore a test that is marked with `emulated_cuda` runs in a second
pytest, one for all such tests of a session: see `run_marked_tests`. To add one, mark it and use the fixture `gpu`.
"""

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock, Thread
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).with_suffix(".cpp")
MARK = "emulated_cuda"
LIBRARY = "EMULATED_CUDA_LIBRARY"  # variables of the second pytest: the library that it loads,
REPORTS = "EMULATED_CUDA_REPORTS"  # and the file for what became of each test
RESULTS = pytest.StashKey()


# --- the second pytest ------------------------------------------------------------------------------------------------


def is_here():
    """Whether this is the second pytest."""
    return LIBRARY in os.environ


def load():
    """In the second pytest, load the library; PyTorch must not be imported yet."""
    if is_here():
        assert "torch" not in sys.modules
        ctypes.CDLL(os.environ[LIBRARY])


def obstacle():
    """Why no device can be emulated here; None if one can."""
    import torch

    if torch.version.cuda or torch.version.hip:
        return "a PyTorch that is built with CUDA has no room for an emulated device: see `pytest -m cuda`"
    if sys.platform != "linux" or compiler() is None:
        return "emulating a CUDA device needs Linux and a C++ compiler (g++ or clang++)"
    return None


def compiler():
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def build(folder):
    """Compile the library into `folder`, unless it is there."""
    import torch

    package = Path(torch.__file__).parent
    digest = hashlib.sha256(f"{torch.__version__} {package} {compiler()}".encode() + SOURCE.read_bytes()).hexdigest()
    library = folder / f"{digest[:16]}.so"
    if not library.exists():
        new = folder / f"{digest[:16]}.{os.getpid()}"
        paths = [f"-I{package / 'include'}", f"-L{package / 'lib'}", f"-Wl,-rpath,{package / 'lib'}"]
        options = ["-O0", "-std=c++20", "-shared", "-fPIC", *paths, "-lc10", "-ltorch_cpu"]
        subprocess.run([compiler(), SOURCE, "-o", new, *options], check=True)
        new.rename(library)
    return library


def run_marked_tests(session):
    """Run the marked tests of a session in a second pytest: its reports, by their test, and all that it printed."""
    names = [item.nodeid for item in session.items if item.get_closest_marker(MARK)]
    with TemporaryDirectory() as temporary:
        caches = hasattr(session.config, "cache")
        library = build(session.config.cache.mkdir(MARK) if caches else Path(temporary))
        reports = Path(temporary) / "reports"
        variables = {LIBRARY: str(library), REPORTS: str(reports), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names],
            cwd=session.config.rootpath,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = reports.read_text().splitlines() if reports.exists() else []
    found = {name: [] for name in names}
    for line in lines:
        report = session.config.hook.pytest_report_from_serializable(config=session.config, data=json.loads(line))
        found[report.nodeid].append(report)
    return found, f"the pytest with an emulated device ended early:\n{done.stdout}\n{done.stderr}"


def replay(item, nextitem):
    """Report what became of a marked test in the second pytest, as if it had run here."""
    session = item.session
    reason = obstacle()
    if reason is None and RESULTS not in session.stash:
        session.stash[RESULTS] = run_marked_tests(session)
    reports, crash = session.stash.get(RESULTS, ({}, ""))
    outcome = ("failed", crash) if reason is None else ("skipped", (str(item.path), item.location[1], reason))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports.get(item.nodeid) or [
        pytest.TestReport(item.nodeid, item.location, {}, *outcome, when="call")
    ]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    session._setupstate.teardown_exact(nextitem)  # what the tests before have left, and those after do not need


def write_report(report, config):
    """In the second pytest, write down what became of a test."""
    if REPORTS in os.environ:
        data = config.hook.pytest_report_to_serializable(config=config, report=report)
        with open(os.environ[REPORTS], "a") as file:
            file.write(json.dumps(data) + "\n")


# --- the device -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """Something that was asked of the device.

    Attributes:
        kind: "kernel"; "read", for which the host waits; "fetch", a copy to pinned memory that it does not wait for;
            "send", a copy to the device; "slow send", one that waits because it is not from pinned memory; or "mix",
            an operation on tensors of both devices.
        operation: its name in PyTorch.
        where: the line of `ft` that asked, or "backward".
        numel: how many elements were copied.
    """

    kind: str
    operation: str
    where: str
    numel: int = 0


def summary(notes, *, by_line=True):
    """How often each operation was noted, and by which line; kernels are left out unless there is nothing else."""
    shown = [note for note in notes if note.kind != "kernel"] or notes
    return Counter((note.kind, note.operation, note.where if by_line else "") for note in shown).most_common()


def caller():
    """The innermost line of `ft` that is being executed."""
    frame = sys._getframe(1)
    package = str(ROOT / "ft") + os.sep
    while frame is not None:
        if frame.f_code.co_filename.startswith(package):
            return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


class Event:
    """What stands for `torch.cuda.Event`."""

    def __init__(self, **options):
        pass

    def record(self, stream=None):
        pass

    def query(self):
        return True

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1.0


class Stream:
    """What stands for `torch.cuda.Stream`, also as the context of `torch.cuda.stream`."""

    def __init__(self, device=None, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Event()

    def query(self):
        return True

    def synchronize(self):
        pass


def make_gpu(monkeypatch):
    """The emulated device, as a context in which it exists and notes what is asked of it."""
    import torch
    from torch._subclasses import fake_tensor
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils import _foreach_utils
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    aten = torch.ops.aten
    properties = SimpleNamespace(
        name="emulated", major=8, minor=0, total_memory=2**36, multi_processor_count=108, gcnArchName=""
    )
    no_kernels = {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        aten.detach.default,
        aten.lift_fresh.default,
        aten.set_.source_Tensor,
        aten.record_stream.default,
        aten._unsafe_view.default,
        aten._reshape_alias.default,
    }

    class GPU(TorchDispatchMode):
        """Runs what concerns the device on fake tensors, everything else as it is."""

        device = torch.device("cuda", 0)

        def __init__(self):
            super().__init__()
            self.notes = []
            self._fake = FakeTensorMode(allow_non_fake_inputs=True)
            self._lock = RLock()  # fake tensors do not expect threads
            self._pinned = {}  # storages in page-locked memory, kept so that no address is used twice

        def note(self, kind, operation, numel=0):
            self.notes.append(Note(kind, str(operation).removeprefix("aten."), caller(), numel))

        def is_pinned(self, tensor):
            return tensor.untyped_storage().data_ptr() in self._pinned

        def pinned(self, tensor):
            self._pinned[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function is torch.ops.prim.device.default:
                return arguments[0].fake_device
            keywords = dict(keywords or {})
            if torch.is_inference_mode_enabled() and function.namespace == "aten" and function._can_decompose():
                with self:  # without inference mode, autograd has done that
                    return function.decompose(*arguments, **keywords)
            if function in (aten.is_pinned.default, aten._pin_memory.default):
                (tensor, *_) = arguments
                return self.is_pinned(tensor) if function is aten.is_pinned.default else self.pinned(tensor.clone())
            pin = keywords.get("pin_memory") is True
            keywords.update({"pin_memory": False} if pin else {})
            tensors = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)]
            there = [x for x in tensors if isinstance(x, FakeTensor)]
            here = [x for x in tensors if not isinstance(x, FakeTensor)]
            goes_there = getattr(keywords.get("device"), "type", None) == "cuda"
            if not there and not goes_there:
                result = function(*arguments, **keywords)
                return self.pinned(result) if pin else result
            with self._lock:
                return self._on_the_device(function, arguments, keywords, there, here)

        def _on_the_device(self, function, arguments, keywords, there, here):
            if function is aten._local_scalar_dense.default:
                self.note("read", function, 1)
                dtype = there[0].dtype
                return 1.0 if dtype.is_floating_point else False if dtype == torch.bool else 0
            if function is aten.equal.default:
                self.note("read", function, 1)
                return True
            if function is aten._to_copy.default:
                return self._converted(*arguments, **keywords)
            if function in (aten.copy_.default, aten._foreach_copy_.default):
                return self._copied(function, *arguments, **keywords)
            if not function.is_view and function not in no_kernels:
                self.note("kernel", function)
            if any(tensor.ndim for tensor in here):
                self.note("mix", function)
            if (
                function is aten._fused_adamw_.tensor_lr
            ):  # PyTorch has no fake one with a tensor, and it returns nothing
                return None
            with self._fake:
                return function(*arguments, **keywords)

        def _converted(self, tensor, *, dtype=None, device=None, non_blocking=False, **options):
            """What `aten._to_copy` returns."""
            dtype, device = dtype or tensor.dtype, device or tensor.device
            if device.type == "cpu":
                self.note("read", aten._to_copy.default, tensor.numel())
                return torch.zeros(tensor.shape, dtype=dtype)
            if isinstance(tensor, FakeTensor):
                self.note("kernel", aten._to_copy.default)
            else:
                fast = non_blocking and self.is_pinned(tensor)
                self.note("send" if fast else "slow send", aten._to_copy.default, tensor.numel())
            with self._fake:
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=self.device)

        def _copied(self, function, targets, sources, non_blocking=False):
            """What `aten.copy_` and `aten._foreach_copy_` return."""
            pairs = list(zip(tree_leaves(targets), tree_leaves(sources), strict=True))
            returned = None if function is aten._foreach_copy_.default else targets
            if all(isinstance(tensor, FakeTensor) for pair in pairs for tensor in pair):
                self.note("kernel", function)
                return returned
            for target, source in pairs:
                if not isinstance(target, FakeTensor):
                    fast = non_blocking and self.is_pinned(target)
                    self.note("fetch" if fast else "read", function, target.numel())
                    target.zero_()
                elif not isinstance(source, FakeTensor):
                    fast = non_blocking and self.is_pinned(source)
                    self.note("send" if fast else "slow send", function, source.numel())
            return returned

    cuda, gpu = torch.cuda, GPU()

    class Graph:
        """What stands for `torch.cuda.CUDAGraph`: a replay is one launch, and computes nothing."""

        def replay(self):
            gpu.note("kernel", "cuda.graph")

    @contextmanager
    def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        """What stands for `torch.cuda.graph`: what is recorded does not run, and must neither wait nor be sent."""
        first = len(gpu.notes)
        yield
        refused = [note for note in gpu.notes[first:] if note.kind != "kernel"]
        assert not refused, summary(refused)
        del gpu.notes[first:]

    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_device_properties": lambda device=None: properties,
        "get_arch_list": lambda: ["sm_80"],
        "default_generators": (torch.Generator(),),
        "synchronize": lambda device=None: gpu.note("read", "cuda.synchronize"),
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": graph,
        "stream": lambda stream: stream,
        "current_stream": Stream,
        "default_stream": Stream,
    }.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda device: None, raising=False)
    run = Thread.run

    def run_on_the_device(thread):  # where a mode is active is a matter of each thread
        with gpu:
            run(thread)

    monkeypatch.setattr(Thread, "run", run_on_the_device)
    # What `torch.tensor(..., device="cuda")` copies from must be seen here, and not be made on the device.
    torch._C._set_only_lift_cpu_tensors(True)
    # PyTorch takes one kernel for many tensors only if it knows their class.
    monkeypatch.setattr(_foreach_utils, "_foreach_supported_types", [torch.Tensor, FakeTensor])
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    monkeypatch.setattr(fake_tensor.FakeTensorMode, "avoid_device_init", True)
    return gpu
