"""Verified file writes: with direct I/O where the file system has it, through the page cache elsewhere."""

import errno
import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path

import pytest

from ft.io import direct_io
from ft.io.direct_io import BufferPair, write_verified

linux = pytest.mark.skipif(sys.platform != "linux", reason="the system has no such flag")
CONTENT = bytes(i * i % 251 for i in range(50_000))
SIZES = [0, 1, 4095, 4096, 4097, 8191, 8192, 8193, 16384, 20_001]


@pytest.fixture(params=["the disk", "memory"])
def folder(request, tmp_path):
    """A directory on a disk, and one on a file system in memory."""
    if request.param == "the disk":
        yield tmp_path
    elif Path("/dev/shm").is_dir():
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            yield Path(name)
    else:
        pytest.skip("needs a file system in memory at /dev/shm")


def is_direct(file):
    import fcntl

    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)


class Wrapped:
    """A file whose writes and reads are functions of the test, called with the file and the buffer."""

    def __init__(self, file, write=io.FileIO.write, readinto=io.FileIO.readinto):
        self.file = file
        self.write = lambda memory: write(file, memory)
        self.readinto = lambda memory: readinto(file, memory)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def wrap(monkeypatch, **functions):
    def wrapped(path, mode, buffering):
        return Wrapped(open(path, mode, buffering), **functions)

    monkeypatch.setattr(direct_io, "open", wrapped, raising=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunk", [333, 5000, 30_000])
def test_a_file_has_every_byte_that_was_written(folder, monkeypatch, size, chunk):
    monkeypatch.setattr(direct_io, "PIECE", 8192)
    monkeypatch.setattr(direct_io, "CHUNK", 1000)
    content, pieces = CONTENT[:size], []
    chunks = [content[i : i + chunk] for i in range(0, size, chunk)]
    result = write_verified(folder / "a", chunks, BufferPair(), lambda work: pieces.append(work()))
    assert (folder / "a").read_bytes() == content
    assert result == (size, hashlib.sha256(content).hexdigest())
    assert len(pieces) == size // 8192 + 1, "the last one may be empty"


def test_one_buffer_pair_serves_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_io, "PIECE", 8192)
    buffers = BufferPair()
    for size in reversed(SIZES):
        write_verified(tmp_path / str(size), [CONTENT[:size]], buffers, lambda work: work())
        assert (tmp_path / str(size)).read_bytes() == CONTENT[:size]


def test_buffers_are_aligned_for_direct_io():
    import ctypes

    for buffer in (BufferPair().written, BufferPair().read_back):
        assert ctypes.addressof(ctypes.c_char.from_buffer(buffer.view)) % direct_io.BLOCK == 0
        assert len(buffer.view) == direct_io.PIECE


@pytest.mark.parametrize("place", [0, 1, 999, 1000, 2500])
def test_a_single_other_byte_is_seen(monkeypatch, place):
    monkeypatch.setattr(direct_io, "PIECE", 4096)
    monkeypatch.setattr(direct_io, "CHUNK", 1000)
    memory = BufferPair().read_back
    memory.view[:2501] = CONTENT[:2501]
    assert memory.startswith(memoryview(CONTENT)[:2501])
    memory.view[place] ^= 1
    assert not memory.startswith(memoryview(CONTENT)[:2501])
    assert memory.startswith(memoryview(CONTENT)[:place])


def test_every_piece_is_flushed(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_io, "PIECE", 8192)
    fsync, sizes = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size) or fsync(number))
    write_verified(tmp_path / "a", [CONTENT[:20_001]], BufferPair(), lambda work: work())
    assert sizes == [8192, 16384, 20_001]


@linux
def test_pieces_bypass_the_page_cache_where_the_file_system_allows_it(tmp_path, monkeypatch):
    try:
        os.close(os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of the tests does not allow it")
    monkeypatch.setattr(direct_io, "PIECE", 8192)
    seen = []

    def write(file, memory):
        seen.append(is_direct(file))
        return file.write(memory)

    def readinto(file, memory):
        seen.append(is_direct(file))
        return file.readinto(memory)

    wrap(monkeypatch, write=write, readinto=readinto)
    write_verified(tmp_path / "a", [CONTENT[:20_001]], BufferPair(), lambda work: work())
    assert seen == [True] * 6
    assert (tmp_path / "a").read_bytes() == CONTENT[:20_001]


# --- file systems of other kinds --------------------------------------------------------------------------------------


def invalid(*_):
    raise OSError(errno.EINVAL, "Invalid argument")


@linux
def test_a_file_system_without_direct_io_is_written_through_the_page_cache(tmp_path, monkeypatch):
    original, refused = direct_io.fcntl.fcntl, []

    def fcntl(file, command, argument=0):
        if command == direct_io.fcntl.F_SETFL:
            refused.append(argument)
            invalid()
        return original(file, command, argument)

    monkeypatch.setattr(direct_io.fcntl, "fcntl", fcntl)
    write_verified(tmp_path / "a", [CONTENT], BufferPair(), lambda work: work())
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert refused


@linux
@pytest.mark.parametrize("refuses", [("write",), ("readinto",), ("write", "readinto")])
def test_a_file_system_that_accepts_o_direct_and_then_fails_is_written_through_the_page_cache(
    tmp_path, monkeypatch, refuses
):
    """Such as one with larger blocks."""
    monkeypatch.setattr(direct_io, "PIECE", 8192)
    refused = []

    def unless_direct(move):
        def call(file, memory):
            if is_direct(file):
                refused.append(move)
                invalid()
            return getattr(io.FileIO, move)(file, memory)

        return call

    wrap(monkeypatch, **{move: unless_direct(move) for move in refuses})
    size, _ = write_verified(tmp_path / "a", [CONTENT], BufferPair(), lambda work: work())
    assert size == len(CONTENT)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert len(refused) <= 1, "it is asked once"


@pytest.mark.parametrize("piece", [16, 1000, 4100])
def test_pieces_that_begin_within_a_block_are_written_through_the_page_cache(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(direct_io, "PIECE", piece)
    write_verified(tmp_path / "a", [CONTENT[:9000]], BufferPair(), lambda work: work())
    assert (tmp_path / "a").read_bytes() == CONTENT[:9000]


@pytest.mark.parametrize("most", [4096, 1000])
def test_short_writes_and_reads_are_completed(tmp_path, monkeypatch, most):
    monkeypatch.setattr(direct_io, "PIECE", 8192)
    wrap(
        monkeypatch,
        write=lambda file, memory: file.write(memory[:most]),
        readinto=lambda file, memory: file.readinto(memory[:most]),
    )
    write_verified(tmp_path / "a", [CONTENT[:20_001]], BufferPair(), lambda work: work())
    assert (tmp_path / "a").read_bytes() == CONTENT[:20_001]


@pytest.mark.parametrize("move", ["write", "readinto"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_a_persistent_refusal_is_an_error(tmp_path, monkeypatch, move, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    wrap(monkeypatch, **{move: refuse})
    with pytest.raises(OSError, match=os.strerror(number)):
        write_verified(tmp_path / "a", [b"abc"], BufferPair(), lambda work: work())


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_verified(tmp_path / "a", [b"abc"], BufferPair(), lambda work: work())
    assert (tmp_path / "a").read_bytes() == b"mine"
