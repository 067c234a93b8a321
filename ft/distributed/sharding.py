"""The local shard and the full tensor of parameters that FSDP2 distributes."""

from torch import Tensor, nn

from ft.distributed.ranks import Ranks


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor. By a method of it: a single process need not import the class."""
    return hasattr(tensor, "full_tensor")


def reshard(model: nn.Module) -> None:
    """Free the full parameters that a forward pass without a backward pass leaves in a sharded model.

    Until then the model has full parameters, not the shards that the optimizer updates.
    """
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank: all of it, or some rows of a sharded one."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if it is sharded: all ranks must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_of(tensor: Tensor, like: Tensor, ranks: Ranks) -> Tensor:
    """The part of a full tensor that corresponds to the local shard of `like`; all of it if `like` is not sharded."""
    if not is_sharded(like):
        return tensor
    chunks = tensor.chunk(ranks.size, dim=0)  # fewer than ranks if the tensor has fewer rows
    return chunks[ranks.rank] if ranks.rank < len(chunks) else tensor[:0]
