"""Verified file writes: each piece is written, hashed, flushed with fsync, read back and compared.

On Linux the pieces bypass the page cache with direct I/O (O_DIRECT, https://man7.org/linux/man-pages/man2/open.2.html).
Through the page cache the kernel would allocate and clear memory for a copy of every byte, once for writing and once
for reading, on the processors that also train.
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


PIECE = 2**24  # bytes that are written, flushed and read back at a time: few enough to need little memory
CHUNK = 2**18  # bytes that are copied, hashed or compared at a time: few enough that other threads get their turn
BLOCK = 2**12  # bytes: direct I/O needs offsets, sizes and addresses that are multiples of this


class AlignedBuffer:
    """A buffer of one piece, at an address that is aligned for direct I/O."""

    def __init__(self) -> None:
        size = -(-PIECE // BLOCK) * BLOCK
        self._bytes = bytearray(size + BLOCK)
        self._start = -ctypes.addressof(ctypes.c_char.from_buffer(self._bytes)) % BLOCK
        self.view = memoryview(self._bytes)[self._start : self._start + size]

    def startswith(self, prefix: memoryview) -> bool:
        """Whether the buffer starts with `prefix`: compared as bytes, which is much faster than `view == prefix`."""
        starts = range(0, len(prefix), CHUNK)
        return all(self._bytes.startswith(prefix[i : i + CHUNK], self._start + i) for i in starts)


class BufferPair:
    """The buffers for writing and for reading back, allocated once for many files.

    The first touch of new memory costs more than everything else that is done with it.
    """

    def __init__(self) -> None:
        self.written, self.read_back = AlignedBuffer(), AlignedBuffer()


def write_verified(
    path: Path,
    chunks: Iterable[bytes | memoryview],
    buffers: BufferPair,
    executor: Callable[[Callable[[], None]], None],
) -> tuple[int, str]:
    """Write a new file, and verify that the disk returns the same bytes.

    Args:
        path: the file, which must not exist.
        chunks: its content.
        buffers: reused from file to file.
        executor: runs each piece of the work, and may choose when and in which thread.

    Returns:
        The size in bytes and the SHA-256 as hexadecimal digits.

    Raises:
        OSError: the disk is full, the system refuses, or other bytes are read back.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "x+b", buffering=0) as file:
        _set_direct_io(file, True)
        for piece in _pieces(chunks):
            executor(partial(_write_piece, file, size, piece, digest.update, buffers))
            size += sum(map(len, piece))
    return size, digest.hexdigest()


def _pieces(chunks: Iterable[bytes | memoryview]) -> Iterator[list[memoryview]]:
    """Split chunks into lists of `PIECE` bytes in total; the last list is shorter."""
    piece: list[memoryview] = []
    free = PIECE
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            part = rest[: min(free, CHUNK)]
            rest = rest[len(part) :]
            piece.append(part)
            free -= len(part)
            if free == 0:
                yield piece
                piece, free = [], PIECE
    yield piece  # of an empty file too, so that its name is flushed


def _write_piece(
    file: io.FileIO, start: int, piece: Sequence[memoryview], update: Callable[[memoryview], None], buffers: BufferPair
) -> None:
    """Write a piece at offset `start`, hash it, flush it, read it back and compare."""
    written, read_back, size = buffers.written.view, buffers.read_back.view, 0
    for chunk in piece:
        copy = written[size : size + len(chunk)]
        copy[:] = chunk
        update(copy)  # while it is still in the processor's cache
        size += len(chunk)
    padded_size = -(-size // BLOCK) * BLOCK  # the last block of a file is written in full, then truncated
    file.seek(start)
    _transfer(file, file.write, written[:padded_size], size)
    if padded_size > size:
        file.truncate(start + size)
    os.fsync(file.fileno())
    _drop_from_page_cache(file)  # so that the comparison reads the disk
    file.seek(start)
    num_read = _transfer(file, file.readinto, read_back[:padded_size], size)
    if num_read < size or not buffers.read_back.startswith(written[:size]):
        raise OSError(None, "other bytes are read back than were written", file.name)
    _drop_from_page_cache(file)  # so that the next piece can use the memory


def _transfer(file: io.FileIO, move: Callable[[memoryview], int], buffer: memoryview, size: int) -> int:
    """Move `size` bytes by `file.write` or `file.readinto`, in several calls if need be; fewer only at end of file.

    `buffer` has `size` bytes, rounded up to full blocks. A file system may accept O_DIRECT and then fail with EINVAL,
    since it needs larger blocks: then the page cache is used.
    """
    done = 0
    while done < size:
        try:
            moved = move(buffer[done:])
        except OSError as error:
            if error.errno != errno.EINVAL or not _set_direct_io(file, False):
                raise
            continue
        if moved == 0:
            break
        done += moved
    return done


def _set_direct_io(file: io.FileIO, enabled: bool) -> bool:
    """Set or clear O_DIRECT on an open file; returns whether that changed anything."""
    if sys.platform != "linux":
        return False
    before = fcntl.fcntl(file, fcntl.F_GETFL)
    after = before | os.O_DIRECT if enabled else before & ~os.O_DIRECT
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, after)
    except OSError:  # this file system has no direct I/O
        return False
    return after != before


def _drop_from_page_cache(file: io.FileIO) -> None:
    """Drop a file's pages from the page cache, where the system has posix_fadvise."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
