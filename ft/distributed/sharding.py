"""The local shard and the full tensor of parameters that FSDP2 distributes."""

from torch import Tensor, nn

from ft.distributed.ranks import Ranks


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold a part of this tensor. By a method, as one process need not import the class."""
    return hasattr(tensor, "full_tensor")


def reshard(model: nn.Module) -> None:
    """Free the parts of other processes that a forward pass without a backward one has left in a sharded model.

    Until then the model shows whole parameters, which are not those that the optimiser has.
    """
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]


def local_shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its rows of one that is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, fetched from the other processes if it is sharded: all of them must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def rows_here(tensor: Tensor, like: Tensor, ranks: Ranks) -> Tensor:
    """The part of a whole tensor that belongs into what this process holds of `like`, which may be sharded."""
    if not is_sharded(like):
        return tensor
    chunks = tensor.chunk(ranks.size, dim=0)  # as many as there are rows, if those are fewer than processes
    return chunks[ranks.rank] if ranks.rank < len(chunks) else tensor[:0]
