"""Snapshots through one page-locked buffer: the same bytes, in the right order, without waiting.

The streams and events are a GPU's where there is one; elsewhere they are pretended, and note what is queued on them.
"""

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from ft.checkpoint.host_buffer import HostBuffer, bytes_for
from ft.checkpoint.snapshot import take_snapshot
from ft.checkpoint.store import ModelSource, write_checkpoint
from ft.model.gpt2 import GPT2, GPT2Config
from ft.train.optim import build_optimizer
from ft.train.state import State

CONFIG = GPT2Config(vocab_size=23, n_positions=8, n_embd=8, n_layer=2, n_head=2)
SOURCE = ModelSource({"model_type": "gpt2", "eos_token_id": 0}, b"{}", ("neg", "pos"), {})


class Streams:
    """Streams and events that only note what happens, one letter for each."""

    def __init__(self, monkeypatch):
        self.notes, self.pinned, self.locks_memory = [], [], True
        self.current = "training"
        notes = self.notes

        class Event:
            def wait(self):
                notes.append("update waits")

            def synchronize(self):
                notes.append("writer waits")

        class Stream:
            def wait_stream(self, other):
                notes.append(f"copies wait for {other}")

            def record_event(self):
                notes.append("event")
                return Event()

        @contextmanager
        def stream(_):
            self.current = "copies"
            yield
            self.current = "training"

        def empty(*size, pin_memory=False, **options):
            if pin_memory:
                if not self.locks_memory:
                    raise RuntimeError("CUDA error: out of memory")
                self.pinned.append(size[0])
            return torch_empty(*size, **options)

        def copy_(target, source, non_blocking=False):
            if non_blocking:
                notes.append(f"copy on {self.current}")
            return tensor_copy(target, source)

        torch_empty, tensor_copy = torch.empty, torch.Tensor.copy_
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.Tensor, "copy_", copy_)


@pytest.fixture
def streams(monkeypatch):
    return Streams(monkeypatch)


def make_training(device):
    model = GPT2(CONFIG)
    model.init_weights(0)
    model.wpe.weight.requires_grad = False
    model.to(device)
    optimizer = build_optimizer(model, 1e-2, 0.0)
    update(model, optimizer)
    return model, optimizer


def update(model, optimizer):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()


def snapshot_of(model, optimizer, host, step=1):
    scaler = torch.amp.GradScaler(enabled=False)
    return take_snapshot(model, optimizer, scaler, State(step=step), copy=True, host=host)


def tensors_of(model, optimizer):
    moments = {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, value in optimizer.state[parameter].items()
    }
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return [{name: tensor.cpu().clone() for name, tensor in tensors.items()} for tensors in (weights, moments)]


def check_two_snapshots(device, folder):
    """Two snapshots through one buffer are those of their moments, to the last bit, though updates follow at once."""
    model, optimizer = make_training(device)
    host = HostBuffer(torch.device(device))
    places = []
    for step in (1, 2):
        expected = tensors_of(model, optimizer)
        snapshot = snapshot_of(model, optimizer, host, step)
        places.append(snapshot.weights["wte.weight"].data_ptr())
        update(model, optimizer)
        write_checkpoint(folder, snapshot, SOURCE, keep=2, keep_best=False)
        for name, tensors in zip(("model", "optimizer"), expected, strict=True):
            written = load_file(folder / f"checkpoint-{step}" / f"{name}.safetensors")
            assert written.keys() == tensors.keys()
            assert all(torch.equal(written[key], tensor) for key, tensor in tensors.items())
    assert places[0] == places[1], "the same memory"


def test_snapshots_hold_their_moment_and_use_the_same_memory(streams, tmp_path):
    check_two_snapshots("cpu", tmp_path)
    assert len(streams.pinned) == 1


@pytest.mark.cuda
def test_snapshots_of_a_gpu_hold_their_moment(tmp_path):
    check_two_snapshots("cuda", tmp_path)


def test_copies_wait_for_the_update_before_and_the_next_one_for_them(streams, tmp_path):
    model, optimizer = make_training("cpu")
    host = HostBuffer(torch.device("cpu"))
    snapshot = snapshot_of(model, optimizer, host)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    copies = ["copy on copies"] * (4 * trained)  # the weight, two moments and a step count
    assert streams.notes == ["copies wait for training", *copies, "copies wait for training", "event"]
    streams.notes.clear()
    update(model, optimizer)
    update(model, optimizer)
    write_checkpoint(tmp_path, snapshot, SOURCE, keep=1, keep_best=False)
    assert streams.notes == ["update waits", "writer waits"]


def test_what_is_freed_at_once_is_copied_where_its_memory_is_given_away(streams):
    host = HostBuffer(torch.device("cpu"))
    tensor = torch.arange(5, dtype=torch.float32)
    host.begin(2 * bytes_for(tensor))
    first = host.copy(tensor, is_temporary=True)
    second = host.copy(tensor[1:].double(), is_temporary=False)
    host.end()
    assert [note for note in streams.notes if note.startswith("copy")] == ["copy on training", "copy on copies"]
    assert first.tolist() == [0, 1, 2, 3, 4]
    assert second.tolist() == [1, 2, 3, 4]


def test_a_larger_snapshot_gets_a_larger_buffer(streams):
    host = HostBuffer(torch.device("cpu"))
    for size in (100, 50, 200):
        host.begin(size)
    assert streams.pinned == [100, 200]


def test_pageable_memory_is_used_if_pinning_fails(streams, tmp_path):
    streams.locks_memory = False
    check_two_snapshots("cpu", tmp_path)
    assert streams.pinned == []
