"""File operations that fail when a test wants them to."""

import os
from pathlib import Path

from ft.io import atomic


class Fault(OSError):
    """The error that the test makes the system give."""


class Faults:
    """Lets the n-th file operation (from 1) of what is written fail, and counts them."""

    def __init__(self, monkeypatch, fails_at):
        self.count, self.fails_at = 0, fails_at
        for name in ("fsync", "rename", "unlink", "rmdir", "mkdir", "open"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        monkeypatch.setattr(atomic, "open", self.open, raising=False)

    def tick(self):
        self.count += 1
        if self.count == self.fails_at:
            raise Fault(28, "No space left on device")

    def wrap(self, function):
        def call(*arguments, **keywords):
            self.tick()
            return function(*arguments, **keywords)

        return call

    def open(self, path, mode):
        self.tick()
        return FaultyFile(self, path, open(path, mode))


class FaultyFile:
    """A file whose operations count among those of `faults`."""

    def __init__(self, faults, path, file):
        self.faults, self.path, self.file = faults, path, file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, memory):
        if self.faults.count + 1 == self.faults.fails_at:
            Path(self.path).write_bytes(bytes(memory)[: len(memory) // 2])  # half of it gets through
        self.faults.tick()
        return self.file.write(memory)

    def __getattr__(self, name):
        operation = getattr(self.file, name)
        return self.faults.wrap(operation) if name == "flush" else operation
