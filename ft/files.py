"""Folders that are on the disk as a whole or not at all, the manifest that proves it, and a lock on a run's folder.

Nothing here knows what is in the files.
"""

import ctypes
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ft.disk import Desk, write_verified
from ft.errors import FtError
from ft.plain_files import is_at, open_to_write, read_regular, remove

if sys.platform != "win32":
    import fcntl

MANIFEST = "manifest.json"
UNFINISHED, REPLACED, LOCK = ".unfinished-", ".replaced-", ".lock"
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


Do = Callable[[Callable[[], None]], None]  # does a piece of work, and returns or raises when it is done


def at_once(work: Callable[[], None]) -> None:
    """Do a piece of work here and now."""
    work()


class NewFolder:
    """A folder that is being written: every file goes to the disk at once, is read back, and its SHA-256 is noted."""

    def __init__(self, path: Path, do: Do = at_once) -> None:
        """`do` may choose when and where each piece of the work is done."""
        self.path, self._do, self._desk = path, do, Desk()
        self._files: dict[str, dict[str, Any]] = {}

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file.

        Raises:
            OSError: the disk is full, or refuses, or gives back other bytes.
        """
        size, sha256 = write_verified(self.path / name, chunks, self._desk, self._do)
        self._files[name] = {"size": size, "sha256": sha256}

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object."""
        self.write(name, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write tensors as safetensors."""
        self.write(name, _safetensors(tensors, metadata))

    def write_manifest(self) -> None:
        """Write what each file must be, for `damage_of`."""
        self.write_json(MANIFEST, {"files": dict(self._files)})


def _safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> Iterator[bytes | memoryview]:
    """The format of https://huggingface.co/docs/safetensors: the header's length, the header as JSON, the numbers.

    Written here, and read by the library: this way each byte is hashed as it is written, and the numbers are never
    copied but a piece at a time.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": SAFETENSORS_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the numbers begin at a multiple of their size
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for tensor in tensors.values():
        numbers = tensor.detach().cpu().contiguous()
        size = numbers.numel() * numbers.element_size()
        array: Any = (ctypes.c_char * size).from_address(numbers.data_ptr())
        array.owner = numbers  # which must live as long as a view of it does
        yield memoryview(array).cast("B")


@contextmanager
def complete_or_absent(folder: Path, do: Do = at_once) -> Iterator[NewFolder]:
    """A folder to write into that takes the name `folder` only when all of it is on the disk.

    A folder that had the name keeps it until then. If the process dies meanwhile, `tidy` finds what is left over.
    `do` is that of `NewFolder`.

    Raises:
        OSError: the disk is full, or refuses; `folder` is as it was.
    """
    unfinished, replaced = (folder.with_name(prefix + folder.name) for prefix in (UNFINISHED, REPLACED))
    remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield NewFolder(unfinished, do)
        fsync(unfinished)
        if os.path.lexists(folder):
            remove(replaced)
            folder.rename(replaced)
        unfinished.rename(folder)
        fsync(folder.parent)
    except BaseException:
        if os.path.lexists(replaced) and not os.path.lexists(folder):
            replaced.rename(folder)
        remove(unfinished)
        raise
    remove(replaced)


def tidy(parent: Path) -> None:
    """Put right what is left in `parent` of a process that died in `complete_or_absent` or in `write_whole`."""
    for replaced in parent.glob(f"{REPLACED}*"):
        folder = parent / replaced.name.removeprefix(REPLACED)
        if os.path.lexists(folder):
            remove(replaced)
        else:
            replaced.rename(folder)
    for unfinished in parent.glob(f"{UNFINISHED}*"):
        remove(unfinished)


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk itself."""
    if sys.platform == "win32" and path.is_dir():
        return  # which Windows cannot be asked for
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage_of(folder: Path, needed: Iterable[str]) -> str | None:
    """What is wrong with a folder against its manifest, in a few words; None if every byte is as it was written.

    Only plain files count: a manifest that came from elsewhere must not lead out of its folder.
    """
    try:
        if (folder / MANIFEST).is_symlink() or not (folder / MANIFEST).is_file():
            return f"{MANIFEST} is missing or no plain file"
        files = read_json(folder / MANIFEST)["files"]
        expected = {str(name): (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except OSError as error:  # a directory that may not be entered
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except FtError:
        return f"{MANIFEST} is unreadable"
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is no list of files"
    for name in dict.fromkeys([*needed, *expected]):  # each once
        path = folder / name
        if name not in expected:
            return f"{MANIFEST} does not list {name}"
        size, sha256 = expected[name]
        try:
            if Path(name).name != name or path.is_symlink() or not path.is_file():
                return f"{name} is missing or no plain file"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, hashlib.sha256).hexdigest() != sha256:
                    return f"{name} has other bytes than were written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FtError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(read_regular(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise FtError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FtError(f"{path} must hold a JSON object")
    return value


class FolderLock:
    """A folder that this process has for itself, by a lock on a file in it."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if need be, and lock it.

        Raises:
            FtError: another process has it, or seems to on a file system without locks; the file is a link or a FIFO.
            OSError: the folder cannot be made or written.
        """
        self.folder, self._file = folder, _locked_file(folder)

    def restore(self) -> bool:
        """Take the lock again if the folder or the file has been moved or deleted; says whether it has.

        Raises:
            FtError: another process has taken it meanwhile.
            OSError: the folder cannot be made or written.
        """
        if is_at(self._file.fileno(), self.folder / LOCK):
            return False
        try:
            file = _locked_file(self.folder)
        except FtError as error:
            raise FtError(f"{self.folder} was moved or deleted during the run, which ends here: {error}") from error
        self._close()
        self._file = file
        return True

    def release(self) -> None:
        """Give the folder back, and delete it if it was empty all along."""
        with suppress(OSError):  # another process may be coming in, or the folder is gone
            if [entry.name for entry in self.folder.iterdir()] == [LOCK] and is_at(
                self._file.fileno(), self.folder / LOCK
            ):
                (self.folder / LOCK).unlink()
                self.folder.rmdir()
        self._close()

    def _close(self) -> None:
        with suppress(OSError):
            self._file.truncate(0)  # so that a number stands only there where a process has died
        self._file.close()


@contextmanager
def locked(folder: Path) -> Iterator[FolderLock]:
    """Have a folder for oneself, until the process ends, however it ends: see `FolderLock`."""
    lock = FolderLock(folder)
    try:
        yield lock
    finally:
        lock.release()


def _locked_file(folder: Path) -> io.FileIO:
    """The file of a folder's lock, which this process has locked and put its number into."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        file = os.fdopen(open_to_write(path), "r+b", buffering=0)
        try:
            _take(file, folder)
        except FtError:
            file.close()
            raise
        if is_at(file.fileno(), path):
            break
        file.close()  # its owner deleted it just now: once more with a new one
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    return file


def _take(file: io.FileIO, folder: Path) -> None:
    """Lock the file of a folder's lock.

    A file system may know no locks. There the process whose number the file holds decides: whether one of that number
    lives on this machine.

    Raises:
        FtError: another process has it, or seems to.
    """
    if sys.platform == "win32":
        return
    process = file.read(20).decode(errors="replace").strip() or "unknown"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FtError(
            f"another run is at work in {folder}: process {process}. Wait for it, stop it (kill {process}), or "
            "take another --output-dir"
        ) from None
    except OSError:
        if _lives(process):
            raise FtError(
                f"another run may be at work in {folder}, whose file system has no locks: process {process} began one, "
                f"and there is such a process. If it is none of this program, delete {folder / LOCK}"
            ) from None


def _lives(process: str) -> bool:
    """Whether there is another process of this number."""
    if not re.fullmatch("[1-9][0-9]{0,8}", process) or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)  # which sends nothing
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True
