"""The weights of a model that is exported."""

from torch import Tensor

from ft.model.gpt2 import GPT2
from ft.model.lora import lora_settings, merge_lora


def exported_weights(model: GPT2) -> dict[str, Tensor]:
    """The weights by their published names, without gradients; an adapter is merged into them."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    lora = lora_settings(model)
    return weights if lora is None else merge_lora(weights, lora)
