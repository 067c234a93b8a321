"""CUDA graphs without a GPU: what is recorded are the operations, with the tensors that they read and write."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """Records operations with the very tensors they read and write, and leaves no trace of having run them."""

    def __init__(self, graph):
        super().__init__()
        self.operations, self.created, self.before = graph.operations, {}, {}
        graph.recordings += 1

    def __enter__(self):
        self.random_state = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.random_state)
        with torch.no_grad():
            for tensor, value in self.before.values():
                tensor.copy_(value)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        assert function is not torch.ops.aten._local_scalar_dense.default, "a read that waits for the device"
        for described, value in zip(function._schema.arguments, arguments, strict=False):
            if described.alias_info is not None and described.alias_info.is_write:
                for tensor in tree_leaves(value):
                    if address(tensor) not in self.created:
                        self.before.setdefault(address(tensor), (tensor, tensor.detach().clone()))
        result = function(*arguments, **keywords)
        read = {address(leaf) for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and address(tensor) not in read:
                self.created[address(tensor)] = tensor
        self.operations.append((function, arguments, keywords, result))
        return result


def address(tensor):
    return tensor.untyped_storage().data_ptr()


class GraphOnCPU:
    """What a CUDA graph does: the same operations again, on the same memory."""

    def __init__(self):
        self.operations, self.recordings, self.replays = [], 0, 0

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, arguments, keywords, result in self.operations:
            again = function(*arguments, **keywords)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(new, torch.Tensor) and address(old) != address(new):
                    old.copy_(new)


class FakeStream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        assert isinstance(other, FakeStream)


def emulate(monkeypatch):
    """Have `torch.cuda` record and replay the work of the CPU. Returns a list, to which each graph is added."""
    graphs = []

    def make_graph():
        graphs.append(GraphOnCPU())
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make_graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: Recording(graph))
    return graphs
