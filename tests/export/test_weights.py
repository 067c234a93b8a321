"""The weights that an export takes from a model: all, with an adapter merged into them."""

import torch
from safetensors.torch import load_file

import ft
from ft.export.weights import exported_weights
from ft.model.lora import LoRASettings, add_lora


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


def test_an_adapter_is_merged(inputs):
    model = ft.load(inputs[1], device="cpu").model
    targets = ("h.1.attn.c_attn",)
    add_lora(model, LoRASettings(rank=2, alpha=4.0, dropout=0.0, targets=targets, base_sha256=""), seed=0)
    before, layer = exported_weights(model), model.h[1].attn.c_attn
    torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(0))
    after = exported_weights(model)
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"h.1.attn.c_attn.weight"}
    change = 2.0 * (layer.lora_B @ layer.lora_A).T
    torch.testing.assert_close(after["h.1.attn.c_attn.weight"], layer.weight + change)
