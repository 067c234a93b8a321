"""The whole training step as one CUDA graph: recorded once, then started by one call instead of hundreds.

A GPU finishes the kernels of a small step faster than Python can launch them. A graph holds all of them with their
arguments, among these the addresses of tensors: a replay reads its inputs where the recording read them. So the inputs
of a step lie in tensors of fixed shape, and what changes between steps is written there first.

Recorded as in https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture: some steps before it on a
side stream, for libraries that allocate at first use, and gradients set to None, so that the backward pass writes them
(rather than adding to them) in memory of the graph. Here these steps are steps of the training: nothing has to be put
back after them. Random numbers come from the device's default generator, which every recording registers by itself and
every replay advances, as the same step without a graph does.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ft.data.batches import Batch
from ft.errors import UsageError

EAGER_STEPS = 3  # before the recording

Step = Callable[[Sequence[Batch], float | Tensor, float | Tensor], Tensor]


def require_cuda(device: torch.device) -> None:
    """Refuse to record the work of a device that cannot be recorded.

    Raises:
        UsageError: the device is none of CUDA's.
    """
    if device.type != "cuda":
        raise UsageError(f"--cuda-graphs records the work of an NVIDIA GPU, and the device is {device}: leave it out")


class GraphedStep:
    """Runs a training step: eagerly at first, then by recording it, then by replaying that."""

    def __init__(self, step: Step, batches: Sequence[Batch], empty: Batch) -> None:
        """Take tensors for the inputs; nothing is run yet.

        Args:
            step: `train_step` with all else bound.
            batches: as many as a step has, on the device; overwritten in each step. All have the same shapes.
            empty: a batch without targets, in place of those that a shorter step lacks.
        """
        self._step, self._batches = step, batches
        self._inputs = [_tensors(batch) for batch in batches]
        self._empty = _tensors(empty)
        device = empty.input_ids.device
        # float32: the type in which the AdamW kernel of CUDA reads a learning rate that is a tensor.
        self._num_targets, self._learning_rate = torch.zeros(2, device=device).unbind()
        self._side_stream = torch.cuda.Stream(device)
        self._eager_steps_left = EAGER_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._grad_norm: Tensor

    def __call__(self, batches: Sequence[Batch], num_targets: float | Tensor, learning_rate: float | Tensor) -> Tensor:
        """Run the step on these inputs.

        Args:
            batches: of the shapes of those given at first; as many, or fewer.
            num_targets: supervised tokens in all of them.
            learning_rate: of this step.

        Returns:
            The norm of the gradients; the next step overwrites it.
        """
        for number, inputs in enumerate(self._inputs):
            torch._foreach_copy_(inputs, _tensors(batches[number]) if number < len(batches) else self._empty)
        self._num_targets.fill_(num_targets)
        self._learning_rate.fill_(learning_rate)
        if self._eager_steps_left > 0:
            self._eager_steps_left -= 1
            return self._run_on_side_stream()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # Other threads, such as the one that writes checkpoints, may go on using the device meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._grad_norm = self._run()
        self._graph.replay()
        return self._grad_norm

    def _run(self) -> Tensor:
        return self._step(self._batches, self._num_targets, self._learning_rate)

    def _run_on_side_stream(self) -> Tensor:
        main_stream = torch.cuda.current_stream(self._num_targets.device)
        self._side_stream.wait_stream(main_stream)
        with torch.cuda.stream(self._side_stream):
            grad_norm = self._run()
        main_stream.wait_stream(self._side_stream)
        return grad_norm


def _tensors(batch: object) -> list[Tensor]:
    """All tensors of a batch, those of its parts included."""
    if isinstance(batch, Tensor):
        return [batch]
    if not dataclasses.is_dataclass(batch):
        return []
    return [tensor for field in dataclasses.fields(batch) for tensor in _tensors(getattr(batch, field.name))]
