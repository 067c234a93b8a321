"""Folders that are complete or absent, whatever fails; manifests, the safetensors written here, and the lock."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ft.errors import FtError
from ft.io import atomic, lock, manifest
from ft.io.atomic import StagedDirectory, atomic_directory, remove_stale_staging
from ft.io.lock import locked
from ft.io.manifest import MANIFEST, verify_manifest
from ft.io.plain_files import atomic_file, read_json
from ft.io.safetensors_file import safetensors_chunks
from tests.faults import Fault, Faults

ROOT = Path(__file__).parents[2]

# --- tensors ----------------------------------------------------------------------------------------------------------


def test_tensors_are_read_back_by_the_library(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(7, 5, generator=generator),
        "transposed": torch.randn(3, 4, generator=generator).T,
        "half": torch.randn(3, generator=generator).half(),
        "brain": torch.randn(2, 2, generator=generator).bfloat16(),
        "double": torch.randn(1, generator=generator).double(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "bytes": torch.arange(11, dtype=torch.uint8),
        "whole": torch.arange(3),
        "ünï": torch.zeros(1),
    }
    StagedDirectory(tmp_path).write("x.safetensors", safetensors_chunks(tensors, {"format": "pt"}))
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name


def test_tensors_of_many_chunks_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "CHUNK", 16)
    tensors = {"a": torch.arange(101.0), "b": torch.arange(5.0)}
    StagedDirectory(tmp_path).write("x.safetensors", safetensors_chunks(tensors))
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "x.safetensors").items())


# --- complete or absent -----------------------------------------------------------------------------------------------


def write_good(folder, content=b"good"):
    with atomic_directory(folder) as new:
        new.write("a", [content, b"!"])
        new.write_json("b.json", {"x": 1})
        new.write_manifest()


def test_a_whole_folder_has_no_damage(tmp_path):
    write_good(tmp_path / "f")
    assert verify_manifest(tmp_path / "f", ["a", "b.json"]) is None
    assert sorted(os.listdir(tmp_path / "f")) == ["a", "b.json", MANIFEST]
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 5000])
def test_a_file_has_every_byte_and_its_crc_is_that_of_zip(tmp_path, monkeypatch, size):
    import zipfile

    for module in (atomic, manifest):
        monkeypatch.setattr(module, "CHUNK", 16)
    content = bytes(i * i % 251 for i in range(size))
    staged = StagedDirectory(tmp_path)
    staged.write("a", [content[i : i + 333] for i in range(0, size, 333)])
    staged.write_manifest()
    assert (tmp_path / "a").read_bytes() == content
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", content)
        crc = archive.getinfo("a").CRC
    assert read_json(tmp_path / MANIFEST)["files"]["a"] == {"size": size, "crc32": f"{crc:08x}"}
    assert verify_manifest(tmp_path, ["a"]) is None


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    write_good(tmp_path / "f", bytes(range(40)))
    content = (tmp_path / "f" / "a").read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "f" / "a").write_bytes(flipped)
        assert verify_manifest(tmp_path / "f", ["a"]) == "a has another digest than when it was written"
    for size in range(len(content)):
        (tmp_path / "f" / "a").write_bytes(content[:size])
        assert verify_manifest(tmp_path / "f", ["a"]) == f"a has {size} bytes, not {len(content)}"


def test_every_file_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename

    def record_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        assert os.fstat(descriptor).st_size, "nothing is left in Python's buffer"
        fsync(descriptor)

    def record_rename(self, target):
        events.append(f"{self.name} -> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    write_good(tmp_path / "f")
    assert events == ["a", "b.json", MANIFEST, ".unfinished-f", ".unfinished-f -> f", tmp_path.name]


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        StagedDirectory(tmp_path).write("a", [b"abc"])
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_a_manifest_of_an_earlier_version_has_sha_256(tmp_path):
    write_good(tmp_path / "f")
    entries = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name in ("a", "b.json")
        for content in [(tmp_path / "f" / name).read_bytes()]
    }
    (tmp_path / "f" / MANIFEST).write_text(json.dumps({"files": entries}))
    assert verify_manifest(tmp_path / "f", ["a", "b.json"]) is None
    (tmp_path / "f" / "a").write_bytes(b"goof!")
    assert verify_manifest(tmp_path / "f", ["a"]) == "a has another digest than when it was written"


NO_LIST = "manifest.json is not a list of files, their sizes and digests"


def rewrite_manifest(change):
    def do(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest["files"])
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return do


def lead_outside(folder):
    (folder.parent / "outside").write_bytes(b"good!")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../outside"] = manifest["files"]["a"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def make_link(folder):
    (folder.parent / "elsewhere").write_bytes((folder / "a").read_bytes())
    (folder / "a").unlink()
    (folder / "a").symlink_to(folder.parent / "elsewhere")


def make_link_of_the_manifest(folder):
    (folder / MANIFEST).rename(folder.parent / "elsewhere")
    (folder / MANIFEST).symlink_to(folder.parent / "elsewhere")


def make_pipe_of_the_manifest(folder):
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)  # reading it would wait for ever


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a").write_bytes(b"goof!"), "a has another digest than when it was written"),
        (lambda f: (f / "a").write_bytes(b"good"), "a has 4 bytes, not 5"),
        (lambda f: (f / "a").write_bytes(b""), "a has 0 bytes, not 5"),
        (lambda f: (f / "a").unlink(), "a is missing or not a regular file"),
        (lambda f: ((f / "a").unlink(), (f / "a").mkdir()), "a is missing or not a regular file"),
        (make_link, "a is missing or not a regular file"),
        (lead_outside, "../outside is missing or not a regular file"),
        (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing or not a regular file"),
        (make_link_of_the_manifest, "manifest.json is missing or not a regular file"),
        (make_pipe_of_the_manifest, "manifest.json is missing or not a regular file"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff"), NO_LIST),
        (lambda f: (f / MANIFEST).write_text("{"), NO_LIST),
        (lambda f: (f / MANIFEST).write_text("[" * 100_000), NO_LIST),
        (lambda f: (f / MANIFEST).write_text("[]"), NO_LIST),
        (lambda f: (f / MANIFEST).write_text("{}"), NO_LIST),
        (lambda f: (f / MANIFEST).write_text('{"files": 3}'), NO_LIST),
        (lambda f: (f / MANIFEST).write_text('{"files": {"a": null}}'), NO_LIST),
        (rewrite_manifest(lambda entries: entries.pop("a")), "manifest.json does not list a"),
        (
            rewrite_manifest(lambda entries: entries["a"].update(crc32=None)),
            "a has another digest than when it was written",
        ),
        (rewrite_manifest(lambda entries: entries["a"].pop("crc32")), NO_LIST),
        (rewrite_manifest(lambda entries: entries["a"].pop("size")), NO_LIST),
        (rewrite_manifest(lambda entries: entries["a"].update(size="5")), "a has 5 bytes, not 5"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    write_good(tmp_path / "f")
    damage(tmp_path / "f")
    assert verify_manifest(tmp_path / "f", ["a", "b.json"]) == message


def test_a_name_that_no_file_can_have_is_damage(tmp_path):
    for name in ("x" * 5000, "a\0b", "\ud800"):
        write_good(tmp_path / "f")
        rewrite_manifest(lambda entries, name=name: entries.update({name: entries["a"]}))(tmp_path / "f")
        assert verify_manifest(tmp_path / "f", ["a", "b.json"]).startswith(name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["files", "a", "size", ".."]), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["files", "a"]), JSON) | JSON)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_no_manifest_makes_a_traceback(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("f") / "f"
    write_good(folder)
    (folder / MANIFEST).write_text(json.dumps(content))
    assert verify_manifest(folder, ["a"])


@pytest.mark.parametrize("replaces", [False, True])
def test_whatever_operation_fails_the_folder_is_old_or_new_and_whole(tmp_path, replaces, record_property):
    failures = 0
    for fails_at in range(1, 300):
        parent = tmp_path / str(fails_at)
        parent.mkdir()
        if replaces:
            write_good(parent / "f", b"old")
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, fails_at)
            try:
                write_good(parent / "f", b"new")
                failed = False
            except Fault:
                failed = True
        failures += failed
        remove_stale_staging(parent)
        if replaces or not failed:
            assert verify_manifest(parent / "f", ["a", "b.json"]) is None
            assert (parent / "f" / "a").read_bytes() in ((b"old!", b"new!") if failed else (b"new!",))
        else:
            assert not (parent / "f").exists() or verify_manifest(parent / "f", ["a", "b.json"]) is None
        assert set(os.listdir(parent)) <= {"f"}
        if faults.count < fails_at:
            break
    else:
        pytest.fail("there is always one more operation")
    assert failures > 15
    record_property("file operations made to fail", fails_at - 1)


def test_a_process_that_dies_between_the_two_renames_loses_nothing(tmp_path):
    write_good(tmp_path / "f", b"old")
    (tmp_path / "f").rename(tmp_path / ".replaced-f")
    (tmp_path / ".unfinished-f").mkdir()
    remove_stale_staging(tmp_path)
    assert os.listdir(tmp_path) == ["f"]
    assert verify_manifest(tmp_path / "f", ["a"]) is None


def test_a_file_that_was_half_written_is_cleared(tmp_path):
    from ft.io.plain_files import atomic_write_text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # as if the process had died before
        patch.setattr(os, "fsync", lambda number: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            atomic_write_text(tmp_path / "config.json", "{}")
    assert os.listdir(tmp_path) == [f".unfinished-{os.getpid()}"]
    remove_stale_staging(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_was_replaced_is_cleared(tmp_path):
    write_good(tmp_path / "f", b"new")
    write_good(tmp_path / ".replaced-f", b"old")
    remove_stale_staging(tmp_path)
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f" / "a").read_bytes() == b"new!"


# --- the lock ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from ft.io.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_folder_in_use_names_the_process_and_is_free_when_that_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        message = rf"another run is using .*run: process {holder.pid}\."
        with pytest.raises(FtError, match=message), locked(tmp_path / "run"):
            pytest.fail("two at once")
        holder.kill()
        holder.wait()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


def test_a_folder_that_stays_empty_is_not_left_behind(tmp_path):
    with locked(tmp_path / "a" / "run"):
        pass
    assert not (tmp_path / "a" / "run").exists()
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert (tmp_path / "run" / "file").exists()


def test_a_folder_may_vanish_under_the_lock(tmp_path):
    import shutil

    with locked(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")


def test_no_number_is_left_in_the_lock_of_a_run_that_ended(tmp_path):
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert (tmp_path / "run" / ".lock").read_bytes() == b""


def test_the_lock_does_not_empty_what_a_link_leads_to(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(FtError, match=r"\.lock is a link"), locked(tmp_path / "run"):
        pytest.fail("through a link")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that knows none."""

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)


def test_without_locks_a_process_that_lives_is_taken_for_a_run(tmp_path, no_locks):
    (tmp_path / ".lock").write_text(str(os.getppid()))
    message = rf"whose file system has no locks: process {os.getppid()} started one.*delete .*\.lock"
    with pytest.raises(FtError, match=message), locked(tmp_path):
        pytest.fail("two at once")
    assert (tmp_path / ".lock").read_text() == str(os.getppid())


@pytest.mark.parametrize("content", [b"", b"999999999", b"0", b"-1", b"x", b"\xff", b"9" * 5000, None])
def test_without_locks_what_is_no_living_process_keeps_nobody_out(tmp_path, no_locks, content):
    (tmp_path / ".lock").write_bytes(str(os.getpid()).encode() if content is None else content)
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_without_locks_a_process_of_somebody_else_lives(tmp_path, no_locks, monkeypatch):
    def refuse(process, number):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    (tmp_path / ".lock").write_text("1")
    with pytest.raises(FtError, match="process 1 started one"), locked(tmp_path):
        pytest.fail("two at once")


class Kernel32:
    """A stand-in for the three functions of Windows, over the processes of this machine."""

    def __init__(self, *, denied=(), ended=()):
        self.denied, self.ended, self.open, self.error = denied, ended, {}, 0
        self.OpenProcess = lambda access, inherit, process: self._open(access, process)

    def _open(self, access, process):
        assert access == 0x00100000, "SYNCHRONIZE is what WaitForSingleObject needs"
        self.error = 5 if process in self.denied else 0 if Path(f"/proc/{process}").exists() else 87
        if self.error:
            return None
        self.open[handle := 2**40 + process] = process  # does not fit an int
        return handle

    def WaitForSingleObject(self, handle, milliseconds):
        assert milliseconds == 0
        return 0 if self.open[handle.value] in self.ended else 0x102

    def CloseHandle(self, handle):
        del self.open[handle.value]
        return 1


@pytest.fixture
def windows(monkeypatch):
    """Windows, as far as the lock sees it: no flock, and a signal 0 that must not be sent."""
    kernel32 = Kernel32()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(lock.ctypes, "WinDLL", lambda name, use_last_error: kernel32, raising=False)
    monkeypatch.setattr(lock.ctypes, "get_last_error", lambda: kernel32.error, raising=False)
    for module, name in ((os, "kill"), (lock.fcntl, "flock")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("not on Windows"))
    yield kernel32
    assert kernel32.open == {}, "each handle is closed"


def test_on_windows_a_process_that_runs_is_taken_for_a_run(tmp_path, windows):
    (tmp_path / ".lock").write_text(str(os.getppid()))
    message = rf"another run may be using {tmp_path}: process {os.getppid()} started one.*delete .*\.lock"
    with pytest.raises(FtError, match=message), locked(tmp_path):
        pytest.fail("two at once")
    assert lock.is_locked(tmp_path)
    windows.ended = [os.getppid()]  # while another program still has a handle of it
    assert not lock.is_locked(tmp_path)
    windows.denied = [os.getppid()]
    assert lock.is_locked(tmp_path)
    assert (tmp_path / ".lock").read_text() == str(os.getppid())


@pytest.mark.parametrize("content", ["", "999999999", "own"])
def test_on_windows_what_is_no_running_process_does_not_count(tmp_path, windows, content):
    (tmp_path / ".lock").write_text(str(os.getpid()) if content == "own" else content)
    assert not lock.is_locked(tmp_path)
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_process_that_only_looks_does_not_refuse_a_run(tmp_path, monkeypatch):
    """`ft runs` holds the shared lock for an instant, and the run that starts then tries again."""
    (tmp_path / ".lock").write_text("999999999")  # of a run that was killed
    with (tmp_path / ".lock").open() as looking:
        lock.fcntl.flock(looking, lock.fcntl.LOCK_SH)
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: lock.fcntl.flock(looking, lock.fcntl.LOCK_UN))
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text() == str(os.getpid())


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"3", b"{", b"[" * 100_000, b"<html>", b"version https://git"]
)
def test_what_is_no_json_object_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(FtError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


# --- full disks -------------------------------------------------------------------------------------------------------


def test_an_error_without_a_name_names_the_file(tmp_path):
    def fail():
        yield b"x"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"x\.bin"), atomic_directory(tmp_path / "d") as staged:
        staged.write("x.bin", fail())
    with pytest.raises(OSError, match=r"y\.txt"), atomic_file(tmp_path / "y.txt"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
