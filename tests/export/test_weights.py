"""The weights that an export takes from a model: all, and none of an adapter."""

import pytest
import torch
from safetensors.torch import load_file

import ft
from ft.errors import FtError
from ft.export.weights import exported_weights


def test_the_weights_are_those_of_the_file_and_of_nothing_else(inputs):
    model = ft.load(inputs[1], device="cpu").model
    weights = exported_weights(model)
    published = {
        name: tensor for name, tensor in load_file(f"{inputs[1]}/model.safetensors").items() if ".attn.bias" not in name
    }
    assert weights.keys() == published.keys()
    assert all(
        torch.equal(weights[name], tensor) and not weights[name].requires_grad for name, tensor in published.items()
    )
    model.h[1].attn.c_attn.lora_A = torch.nn.Parameter(torch.ones(2, 64))
    with pytest.raises(FtError, match=r"h\.1\.attn\.c_attn\.lora_A is not a weight of a GPT-2: export the final model"):
        exported_weights(model)
