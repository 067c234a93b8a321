"""The training step as one CUDA graph: captured once, then replayed by one launch instead of hundreds.

A GPU finishes the kernels of a small step faster than Python launches them. A graph contains the kernels with their
arguments, including the addresses of tensors: a replay reads its inputs from the memory that the capture read. So the
inputs are static tensors of fixed shape, and each step first copies its values into them.

The capture follows https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture: some warm-up steps on a
side stream, for libraries that allocate at first use, and gradients set to None, so that the backward pass creates them
in the memory pool of the graph. The warm-up steps are steps of the training, so nothing has to be restored after them.
Random numbers come from the default generator of the device: each capture registers it, and each replay advances it
as the eager step does.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ft.data.batches import Batch
from ft.errors import UsageError

EAGER_STEPS = 3  # warm-up steps before the capture

Step = Callable[[Sequence[Batch], float | Tensor, float | Tensor], Tensor]


def require_cuda(device: torch.device) -> None:
    """Check that the device supports CUDA graphs.

    Raises:
        UsageError: the device is not a CUDA device.
    """
    if device.type != "cuda":
        raise UsageError(f"--cuda-graphs records the work of an NVIDIA GPU, and the device is {device}: leave it out")


class GraphedStep:
    """A training step that runs eagerly at first, then captures itself as a CUDA graph, then replays the graph."""

    def __init__(self, step: Step, batches: Sequence[Batch], empty: Batch) -> None:
        """Allocate the static inputs.

        Args:
            step: `train_step` with all other arguments bound.
            batches: the static inputs: as many batches as a step has, on the device, all of the same shapes. Each step
                overwrites them.
            empty: a batch without targets, for the missing batches of a shorter step.
        """
        self._step, self._batches = step, batches
        self._inputs = [_tensors(batch) for batch in batches]
        self._empty = _tensors(empty)
        device = empty.input_ids.device
        # float32: the type in which the AdamW kernel of CUDA reads a learning rate that is a tensor.
        self._total_weight, self._learning_rate = torch.zeros(2, device=device).unbind()
        self._side_stream = torch.cuda.Stream(device)
        self._eager_steps_left = EAGER_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._grad_norm: Tensor

    def __call__(self, batches: Sequence[Batch], total_weight: float | Tensor, learning_rate: float | Tensor) -> Tensor:
        """Run the step on these inputs.

        Args:
            batches: of the same shapes as the static inputs; as many, or fewer.
            total_weight: the number of supervised tokens of all batches on all ranks, or the sum of their weights.
            learning_rate: of this step.

        Returns:
            The global norm of the gradients, a scalar on the device; the next step overwrites it.
        """
        for number, inputs in enumerate(self._inputs):
            torch._foreach_copy_(inputs, _tensors(batches[number]) if number < len(batches) else self._empty)
        self._total_weight.fill_(total_weight)
        self._learning_rate.fill_(learning_rate)
        if self._eager_steps_left > 0:
            self._eager_steps_left -= 1
            return self._run_on_side_stream()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # "thread_local": the thread that writes checkpoints may use the device during the capture.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._grad_norm = self._run()
        self._graph.replay()
        return self._grad_norm

    def _run(self) -> Tensor:
        return self._step(self._batches, self._total_weight, self._learning_rate)

    def _run_on_side_stream(self) -> Tensor:
        main_stream = torch.cuda.current_stream(self._total_weight.device)
        self._side_stream.wait_stream(main_stream)
        with torch.cuda.stream(self._side_stream):
            grad_norm = self._run()
        main_stream.wait_stream(self._side_stream)
        return grad_norm


def _tensors(batch: object) -> list[Tensor]:
    """All tensors of a batch, including those of nested dataclasses."""
    if isinstance(batch, Tensor):
        return [batch]
    if not dataclasses.is_dataclass(batch):
        return []
    return [tensor for field in dataclasses.fields(batch) for tensor in _tensors(getattr(batch, field.name))]
