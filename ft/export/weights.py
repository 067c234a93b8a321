"""The weights of a model that is exported."""

import torch
from torch import Tensor

from ft.errors import FtError
from ft.model.gpt2 import GPT2


def exported_weights(model: GPT2) -> dict[str, Tensor]:
    """The weights by their published names, without gradients.

    Raises:
        FtError: there are others than GPT-2's, such as those of an adapter, which an export would leave out.
    """
    with torch.device("meta"):
        known = {name for name, _ in GPT2(model.config).named_parameters()}
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if others := sorted(weights.keys() - known):
        raise FtError(f"{others[0]} is not a weight of a GPT-2: export the final model of the run, which has no other")
    return weights
