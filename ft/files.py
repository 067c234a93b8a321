"""Folders that are on the disk as a whole or not at all, the manifest that proves it, and a lock on a run's folder.

Nothing here knows what is in the files.
"""

import ctypes
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ft.errors import FtError

if sys.platform != "win32":
    import fcntl

MANIFEST = "manifest.json"
UNFINISHED, REPLACED, LOCK = ".unfinished-", ".replaced-", ".lock"
CHUNK = 2**20  # bytes that are written, hashed or compared at a time: few enough that other threads get their turn
PIECE = 2**25  # bytes that are forced to the disk and read back at a time: few enough to need little memory
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
        self.path, self._do = path, do
        self._files: dict[str, dict[str, Any]] = {}

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file.

        Raises:
            OSError: the disk is full, or refuses, or gives back other bytes.
        """
        digest, size = hashlib.sha256(), 0
        with open(self.path / name, "x+b") as file:
            for piece in _pieces(chunks):
                self._do(partial(_write_piece, file, piece, digest.update))
                size += sum(len(chunk) for chunk in piece)
        self._files[name] = {"size": size, "sha256": digest.hexdigest()}

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object."""
        self.write(name, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write tensors as safetensors."""
        self.write(name, _safetensors(tensors, metadata))

    def write_manifest(self) -> None:
        """Write what each file must be, for `damage_of`."""
        self.write_json(MANIFEST, {"files": dict(self._files)})


def _pieces(chunks: Iterable[bytes | memoryview]) -> Iterator[list[bytes | memoryview]]:
    """Chunks in lists of about `PIECE` bytes, the last one shorter."""
    piece: list[bytes | memoryview] = []
    for chunk in chunks:
        piece.append(chunk)
        if sum(map(len, piece)) >= PIECE:
            yield piece
            piece = []
    yield piece  # of an empty file too, whose name is to be on the disk


def _write_piece(
    file: io.BufferedRandom, piece: Sequence[bytes | memoryview], update: Callable[[bytes | memoryview], None]
) -> None:
    """Write, hash, force to the disk, and compare what the disk gives back.

    The system's own copy of the piece is given up in between, so that it is really the disk that is read, and the next
    piece can use the same memory.
    """
    start = file.tell()
    for chunk in piece:
        file.write(chunk)
        update(chunk)
    file.flush()
    os.fsync(file.fileno())
    _forget(file)
    file.seek(start)
    for chunk in piece:
        back: Any = bytearray(len(chunk))  # as this type compares itself with any bytes, and at memory's speed
        if file.readinto(back) != len(chunk) or back != chunk:
            raise OSError(None, "what was written reads back otherwise", file.name)
    _forget(file)


def _forget(file: io.BufferedRandom) -> None:
    """Have the system keep no copy of a file in memory, on systems that take this advice."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> Iterator[bytes | memoryview]:
    """The format of https://huggingface.co/docs/safetensors: the header's length, the header as JSON, the numbers.

    Written here, and read by the library: this way each byte is hashed as it is written, and the numbers are never
    copied, neither at once nor to a second array.
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
        array.owner = numbers  # which must live as long as a chunk of it does
        view = memoryview(array).cast("B")
        for start in range(0, size, CHUNK):
            yield view[start : start + CHUNK]


@contextmanager
def complete_or_absent(folder: Path, do: Do = at_once) -> Iterator[NewFolder]:
    """A folder to write into that takes the name `folder` only when all of it is on the disk.

    A folder that had the name keeps it until then. If the process dies meanwhile, `tidy` finds what is left over.
    `do` is that of `NewFolder`.

    Raises:
        OSError: the disk is full, or refuses; `folder` is as it was.
    """
    unfinished, replaced = (folder.with_name(prefix + folder.name) for prefix in (UNFINISHED, REPLACED))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield NewFolder(unfinished, do)
        fsync(unfinished)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        unfinished.rename(folder)
        fsync(folder.parent)
    except BaseException:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def tidy(parent: Path) -> None:
    """Put right what a process that died in `complete_or_absent` left in `parent`."""
    for replaced in parent.glob(f"{REPLACED}*"):
        folder = parent / replaced.name.removeprefix(REPLACED)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(folder)
    for unfinished in parent.glob(f"{UNFINISHED}*"):
        shutil.rmtree(unfinished, ignore_errors=True)


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
        files = read_json(folder / MANIFEST)["files"]
        expected = {str(name): (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FtError:
        return f"{MANIFEST} is missing or unreadable"
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is no list of files"
    for name in dict.fromkeys([*needed, *expected]):  # each once
        path = folder / name
        if name not in expected:
            return f"{MANIFEST} does not list {name}"
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            return f"{name} is missing or no plain file"
        size, sha256 = expected[name]
        try:
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
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FtError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FtError(f"{path} must hold a JSON object")
    return value


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder for oneself, until the process ends, however it ends. Leaves no folder that was empty all along.

    Raises:
        FtError: another process has it.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        file = path.open("a+")
        if sys.platform == "win32":
            break
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = file.read().strip() or "unknown"
            file.close()
            raise FtError(
                f"another run is at work in {folder}: process {process}. Wait for it, stop it (kill {process}), or "
                "take another --output-dir"
            ) from None
        except OSError:
            break  # this file system has no locks
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()  # its owner deleted it just now: once more with a new one
    try:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        with suppress(OSError):  # another process may be coming in
            if [entry.name for entry in folder.iterdir()] == [LOCK]:
                path.unlink()
                folder.rmdir()
        file.close()
