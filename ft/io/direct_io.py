"""One file on its way to the disk: written in pieces, hashed, forced down, read back and compared.

On Linux the pieces go past the system's cache of files. Through it, the system would find and clear memory for a copy
of everything, once for writing and once for reading, and the processor that does so is one that trains.
"""

import ctypes
import errno
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

if sys.platform != "win32":
    import fcntl


PIECE = 2**24  # bytes that are written, forced to the disk and read back at a time: few enough to need little memory
CHUNK = 2**18  # bytes that are copied, hashed or compared at a time: few enough that other threads get their turn
BLOCK = 2**12  # bytes: what goes past the cache begins and ends at multiples of this, in memory as in the file


class Memory:
    """Room for a piece, at an address from which and to which a disk transfers directly."""

    def __init__(self) -> None:
        size = -(-PIECE // BLOCK) * BLOCK
        self._bytes = bytearray(size + BLOCK)
        self._start = -ctypes.addressof(ctypes.c_char.from_buffer(self._bytes)) % BLOCK
        self.view = memoryview(self._bytes)[self._start : self._start + size]

    def begins_with(self, other: memoryview) -> bool:
        """Whether the first bytes are these; at memory's speed, at which two views are not compared."""
        parts = range(0, len(other), CHUNK)
        return all(self._bytes.startswith(other[i : i + CHUNK], self._start + i) for i in parts)


class BufferPair:
    """The memory through which files are written and read back, made once for many files.

    Memory that is touched for the first time costs more than what is then done with it.
    """

    def __init__(self) -> None:
        self.written, self.back = Memory(), Memory()


def write_verified(
    path: Path, chunks: Iterable[bytes | memoryview], desk: BufferPair, do: Callable[[Callable[[], None]], None]
) -> tuple[int, str]:
    """Write a new file, and see that the disk gives back the same. Returns its size in bytes and its SHA-256.

    `do` does the pieces of the work, and may choose when and where.

    Raises:
        OSError: the disk is full, or refuses, or gives back other bytes.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "x+b", buffering=0) as file:
        _set_direct_io(file, True)
        for piece in _pieces(chunks):
            do(partial(_write_piece, file, size, piece, digest.update, desk))
            size += sum(map(len, piece))
    return size, digest.hexdigest()


def _pieces(chunks: Iterable[bytes | memoryview]) -> Iterator[list[memoryview]]:
    """Chunks, cut into smaller ones, in lists of `PIECE` bytes; in the last list there are fewer."""
    piece: list[memoryview] = []
    room = PIECE
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            part = rest[: min(room, CHUNK)]
            rest = rest[len(part) :]
            piece.append(part)
            room -= len(part)
            if room == 0:
                yield piece
                piece, room = [], PIECE
    yield piece  # of an empty file too, whose name is to be on the disk


def _write_piece(
    file: io.FileIO, start: int, piece: Sequence[memoryview], update: Callable[[memoryview], None], desk: BufferPair
) -> None:
    """Write a piece at `start`, hash it, force it to the disk, and compare what the disk gives back."""
    written, back, size = desk.written.view, desk.back.view, 0
    for chunk in piece:
        copy = written[size : size + len(chunk)]
        copy[:] = chunk
        update(copy)  # which the processor still has at hand
        size += len(chunk)
    whole = -(-size // BLOCK) * BLOCK  # the last block of a file is written whole, and cut off
    file.seek(start)
    _transfer(file, file.write, written[:whole], size)
    if whole > size:
        file.truncate(start + size)
    os.fsync(file.fileno())
    _forget(file)
    file.seek(start)
    if _transfer(file, file.readinto, back[:whole], size) < size or not desk.back.begins_with(written[:size]):
        raise OSError(None, "what was written reads back otherwise", file.name)
    _forget(file)


def _transfer(file: io.FileIO, move: Callable[[memoryview], int], memory: memoryview, size: int) -> int:
    """Move `size` bytes by `file.write` or `file.readinto`, which may take several calls; fewer at the file's end only.

    `memory` is as much and the rest of a block. A system may allow transfers past the cache and then refuse them all
    the same, for it wants larger blocks: then the cache has to do.
    """
    done = 0
    while done < size:
        try:
            moved = move(memory[done:])
        except OSError as error:
            if error.errno != errno.EINVAL or not _set_direct_io(file, False):
                raise
            continue
        if moved == 0:
            break
        done += moved
    return done


def _set_direct_io(file: io.FileIO, wanted: bool) -> bool:
    """Have what is written and read go past the system's cache of files, or not; says whether that is a change."""
    if sys.platform != "linux":
        return False
    before = fcntl.fcntl(file, fcntl.F_GETFL)
    after = before | os.O_DIRECT if wanted else before & ~os.O_DIRECT
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, after)
    except OSError:  # this file system knows no other way than through the cache
        return False
    return after != before


def _forget(file: io.FileIO) -> None:
    """Have the system keep no copy of a file in memory, on systems that take this advice.

    After writing, so that it is really the disk that is read; after reading, so that the next piece can use the memory.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
