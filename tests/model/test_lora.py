"""LoRA against `peft` on the same weights, and against itself with each saving turned off."""

import copy
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

from ft.errors import UsageError
from ft.model import matmul
from ft.model.compile import compile_blocks
from ft.model.freeze import freeze
from ft.model.gpt2 import GPT2, GPT2Config
from ft.model.lora import (
    LoRALinear,
    LoRASettings,
    adapter_parameters,
    add_lora,
    find_targets,
    is_lora,
    linear_layers,
    merge_lora,
)
from ft.model.packing import Packing, Selection
from ft.train.optim import build_optimizer, clip_in_optimizer
from tests.model.test_gpt2 import LENGTHS, make_batch, make_model, make_reference, relative

WIDE = GPT2Config(vocab_size=211, n_positions=40, n_embd=64, n_layer=3, n_head=4)
CALM = GPT2Config(**{**vars(WIDE), "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0})
EVERYTHING = ("c_attn", "c_proj", "c_fc")


def settings_for(model, rank=4, alpha=None, dropout=0.0, patterns=(), **others):
    alpha = 2.0 * rank if alpha is None else alpha
    return LoRASettings(rank, alpha, dropout, find_targets(model, patterns), base_sha256="", **others)


def adapt(model, train_only=(), frozen=(), random_b=True, **settings):
    """Add an adapter, whose B is random unless it is to start as in training, and freeze the rest."""
    freeze(model, train_only, frozen, adapter=add_lora(model, settings_for(model, **settings), seed=5))
    if random_b:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def reference_for(model, base, **options):
    """peft's model around the same base, with the same adapter."""
    settings = next(m.settings for m in model.modules() if isinstance(m, LoRALinear))
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, fan_in_fan_out=True, task_type="CAUSAL_LM", **options
    )
    reference = peft.get_peft_model(make_reference(base), config)
    theirs = dict(reference.named_parameters())
    ours = {name: parameter for name, parameter in model.named_parameters() if is_lora(name)}
    assert sum("lora_" in name for name in theirs) == len(ours)
    with torch.no_grad():
        for name, parameter in ours.items():
            theirs[f"base_model.model.transformer.{name}.default.weight"].copy_(parameter)
    return reference


def their_name(name, model):
    module, _, own = name.rpartition(".")
    if is_lora(name):
        return f"base_model.model.transformer.{name}.default.weight"
    wrapped = isinstance(model.get_submodule(module), LoRALinear)
    return (
        f"base_model.model.transformer.{module}.base_layer.{own}" if wrapped else f"base_model.model.transformer.{name}"
    )


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ((), EVERYTHING),
        (("c_attn",), ("c_attn",)),
        (("h.1.*", "attn.c_proj"), r".*(h\.1\..*\.c_\w+|attn\.c_proj)"),
        (("last:1",), r".*h\.2\..*\.c_\w+"),
    ],
)
def test_logits_and_gradients_equal_peft(patterns, names, rslora):
    base = make_model(WIDE).eval()
    model = adapt(copy.deepcopy(base), patterns=patterns, alpha=5.0, rslora=rslora)
    reference = reference_for(
        model, base, target_modules=list(names) if isinstance(names, tuple) else names, use_rslora=rslora
    ).eval()
    input_ids, padded, mask = make_batch()
    target_ids = torch.tensor([5, 9, 200, 17])
    expected = reference(input_ids=padded, attention_mask=mask).logits
    assert relative(model(input_ids, Packing.of(LENGTHS)), expected[mask.bool()]) < 1e-12
    F.cross_entropy(expected[torch.arange(4), torch.tensor(LENGTHS) - 1], target_ids).backward()
    F.cross_entropy(model(input_ids, Packing.of(LENGTHS), Selection.last(LENGTHS, [1] * 4)), target_ids).backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if is_lora(name):
            assert relative(parameter.grad, theirs[their_name(name, model)].grad) < 1e-9, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(
    ("rank", "bias", "train_only"),
    [(1, "none", ()), (8, "none", ()), (64, "none", ()), (8, "all", ("*.bias",)), (2, "lora_only", ("*.c_*.bias",))],
)
def test_fifty_steps_equal_peft_in_a_loop_by_hand(rank, bias, train_only):
    base = make_model(CALM, torch.float32)
    model = adapt(copy.deepcopy(base), train_only, rank=rank, random_b=False).train()
    reference = reference_for(model, base, target_modules=list(EVERYTHING), bias=bias).train()
    trained = [p for p in reference.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    theirs = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    ours = build_optimizer(model, 1e-3, 0.1)
    losses = []
    for step in range(50):
        input_ids, padded, mask = make_batch(seed=step)
        labels = (torch.arange(4) * 7 + step) % 11
        loss = F.cross_entropy(model(input_ids, Packing.of(LENGTHS), Selection.last(LENGTHS, [1] * 4)), labels)
        loss.backward()
        clip_in_optimizer(ours, 1.0)
        ours.step()
        ours.zero_grad()

        logits = reference(input_ids=padded, attention_mask=mask).logits[torch.arange(4), torch.tensor(LENGTHS) - 1]
        expected = F.cross_entropy(logits, labels)
        expected.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        theirs.step()
        theirs.zero_grad()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5), step
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), "or nothing was learned"


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 1, 12, 2)])
@pytest.mark.parametrize("patterns", [(), ("c_attn",)])
def test_computing_selected_rows_only_changes_neither_loss_nor_gradients(counts, patterns):
    model = adapt(make_model(WIDE).eval(), ("*.bias",), patterns=patterns)
    input_ids, _, _ = make_batch()
    selection, targets = Selection.last(LENGTHS, counts), torch.arange(sum(counts)) * 7
    results = []
    for select in (True, False):
        model.zero_grad()
        logits = model(input_ids, Packing.of(LENGTHS), selection if select else None)
        loss = F.cross_entropy(logits if select else logits[selection.rows], targets)
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    assert abs(results[0][0] - results[1][0]) < 1e-10
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-9, atol=1e-12)


def test_dropout_of_the_last_block_drops_the_same_for_queries_as_for_keys():
    model = adapt(make_model(WIDE), patterns=("c_attn",), dropout=0.5).train()
    layer, rows = model.h[2].attn.c_attn, torch.tensor([1, 4])
    x = torch.randn(6, 64, dtype=torch.float64)
    torch.manual_seed(1)
    together = layer(x)
    torch.manual_seed(1)
    first, others = layer.forward_in_parts(x, rows, 64)
    torch.testing.assert_close(first, together[rows, :64])
    torch.testing.assert_close(others, together[:, 64:])
    torch.manual_seed(2)
    assert not torch.allclose(layer(x), together)


def test_a_new_adapter_changes_nothing_and_its_a_is_drawn_as_in_peft():
    base = make_model(GPT2Config(vocab_size=211, n_positions=40, n_embd=256, n_layer=2, n_head=4)).eval()
    model = adapt(copy.deepcopy(base), rank=64, random_b=False)
    input_ids, _, _ = make_batch()
    assert torch.equal(model(input_ids, Packing.of(LENGTHS)), base(input_ids, Packing.of(LENGTHS)))
    torch.manual_seed(0)
    reference = peft.get_peft_model(make_reference(base), peft.LoraConfig(r=64, target_modules=list(EVERYTHING)))
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A"):
            expected = theirs[their_name(name, model)]
            bound = 1 / math.sqrt(parameter.shape[1])
            assert parameter.abs().max() <= bound
            assert expected.abs().max().item() == pytest.approx(parameter.abs().max().item(), rel=0.01)
            assert expected.std().item() == pytest.approx(parameter.std().item(), rel=0.03)


def test_another_seed_draws_another_a_and_the_same_seed_the_same():
    first, second, third = (GPT2(WIDE) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (third, 2)):
        model.init_weights(0)
        add_lora(model, settings_for(model), seed)
    name = "h.1.mlp.c_fc.lora_A"
    a, b, c = (model.get_parameter(name) for model in (first, second, third))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, first.get_parameter("h.0.mlp.c_fc.lora_A"))


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_merged_weights_compute_the_same_as_in_peft(rank):
    base = make_model(WIDE).eval()
    model = adapt(copy.deepcopy(base), rank=rank)
    settings = next(m.settings for m in model.modules() if isinstance(m, LoRALinear))
    merged = merge_lora(dict(model.named_parameters()), settings)
    plain = GPT2(WIDE).to(torch.float64)
    plain.load_state_dict(merged)
    input_ids, _, _ = make_batch()
    torch.testing.assert_close(
        plain.eval()(input_ids, Packing.of(LENGTHS)), model(input_ids, Packing.of(LENGTHS)), rtol=1e-10, atol=1e-10
    )
    theirs = reference_for(model, base, target_modules=list(EVERYTHING)).merge_and_unload().transformer.state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-12, atol=1e-12)
    assert torch.equal(model.h[0].mlp.c_fc.weight, base.h[0].mlp.c_fc.weight), "the base is not changed"


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activation_checkpointing_gives_the_same_gradients(kind):
    gradients = []
    for activation_checkpointing in ("none", kind):
        model = adapt(make_model(WIDE), dropout=0.3).train()
        model.activation_checkpointing = activation_checkpointing
        input_ids, _, _ = make_batch()
        torch.manual_seed(0)
        model(input_ids, Packing.of(LENGTHS), Selection.last(LENGTHS, [1] * 4)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_blocks_train_the_same():
    losses, gradients = [], []
    for mode in ("none", "default"):
        model = adapt(make_model(CALM, torch.float32), ("*.bias",)).train()
        compile_blocks(model.h, mode, torch.device("cpu"))
        input_ids, _, _ = make_batch()
        loss = F.cross_entropy(
            model(input_ids, Packing.of(LENGTHS), Selection.last(LENGTHS, [1] * 4)), torch.arange(4) * 7
        )
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("train_only", [(), ("*.bias",)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_copies_give_the_bits_of_autocast_and_follow_the_updates(dtype, train_only, monkeypatch):
    monkeypatch.setattr(matmul, "has_amx", lambda: False)  # with AMX a CPU needs no copies for bf16
    results = []
    for keeps_copies in (False, True):
        model = adapt(make_model(CALM, torch.float32), train_only)
        if keeps_copies:
            model.keep_half_weights(dtype)
        assert (model.half_weights is not None) == keeps_copies
        optimizer = build_optimizer(model, 1e-2, 0.0)
        for step in range(3):
            input_ids, _, _ = make_batch(seed=step)
            with torch.autocast("cpu", dtype):
                logits = model(input_ids, Packing.of(LENGTHS), Selection.last(LENGTHS, [1] * 4))
            F.cross_entropy(logits.float(), torch.arange(4)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([logits.detach(), *(p.detach() for p in model.parameters())])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_activations_stay_fp32_where_products_round_their_inputs(monkeypatch):
    monkeypatch.setattr(matmul, "has_amx", lambda: True)
    layer = linear_layers(adapt(make_model(CALM, torch.float32), patterns=("c_attn",)))["h.0.attn.c_attn"]
    x = torch.randn(6, 64)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x)
        parts = layer.forward_in_parts(x, torch.arange(6), 64)
    assert rounded.dtype == torch.float32
    assert relative(rounded, exact) < 1e-2
    for part, expected in zip(parts, rounded.split((64, 128), dim=1), strict=True):
        assert part.dtype == torch.float32
        assert relative(part, expected) < 1e-2


def test_the_base_has_no_gradients_and_no_moments():
    model = adapt(make_model(WIDE, torch.float32))
    optimizer = build_optimizer(model, 1e-3, 0.0)
    input_ids, _, _ = make_batch()
    model(input_ids, Packing.of(LENGTHS)).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(filter(is_lora, model.state_dict()))
    adapters = [p for name, p in model.named_parameters() if is_lora(name)]
    assert {id(weight) for weight in optimizer.state} == set(map(id, adapters))


# --- what is trained


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_biases_are_trained_beside_the_adapter_and_saved_with_it_as_in_peft():
    def after(bias="none", patterns=("c_attn",), **flags):
        model = adapt(make_model(WIDE), patterns=patterns, bias=bias, **flags)
        settings = next(m.settings for m in model.modules() if isinstance(m, LoRALinear))
        return trained(model), set(adapter_parameters(model, settings)), model

    every, saved, model = after()
    adapters = set(filter(is_lora, model.state_dict()))
    biases = {name for name in model.state_dict() if name.endswith("bias")}
    own = {name for name in biases if "c_attn" in name}
    assert every == saved == adapters
    assert after(train_only=("*.c_attn.bias",))[:2] == (adapters | own, adapters | own)
    assert after(train_only=("*.bias",))[:2] == (adapters | biases, adapters | biases)
    one = {"h.1.ln_1.bias"}
    assert after(train_only=tuple(one))[:2] == (adapters | one, adapters | biases)
    assert after(bias="lora_only")[:2] == (adapters, adapters | own), "it was trained before"
    frozen_a = {name for name in adapters if name.endswith("lora_A")}
    assert after(frozen=("*.lora_A",))[:2] == (adapters - frozen_a, adapters), "as in LoRA-FA"


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ((), lambda name: True),
        (("c_attn",), lambda name: name.endswith("c_attn")),
        (("*.c_proj", "mlp.c_fc"), lambda name: name.endswith(("c_proj", "c_fc"))),
        (("h.1.*",), lambda name: name.startswith("h.1.")),
        (("last:2",), lambda name: not name.startswith("h.0.")),
        (("h.[02].attn.*",), lambda name: "attn" in name and not name.startswith("h.1.")),
    ],
)
def test_patterns_choose_layers(patterns, expected):
    model = GPT2(WIDE)
    names = list(linear_layers(model))
    assert len(names) == 12
    assert find_targets(model, patterns) == tuple(filter(expected, names))


@pytest.mark.parametrize(
    ("patterns", "problems"),
    [
        (["wte"], ["--lora-targets is 'wte', which matches wte, not a linear layer of a block; there are c_attn"]),
        (["ln_1"], ["--lora-targets is 'ln_1', which matches h.0.ln_1, not a linear layer"]),
        (["c_atn"], ["--lora-targets is 'c_atn', which matches no linear layer of this model; there are \\*.c_attn"]),
        (["last:9", "q_proj"], ["--lora-targets is 'last:9', it must be last:1 to last:3", "'q_proj'"]),
    ],
)
def test_patterns_without_a_layer_are_refused(patterns, problems):
    with pytest.raises(UsageError) as raised:
        find_targets(GPT2(WIDE), patterns)
    assert len(raised.value.problems) == len(problems)
    for told, expected in zip(raised.value.problems, problems, strict=True):
        assert re.search(expected, told), told


def test_a_rank_above_the_width_and_weights_beside_an_adapter_are_refused():
    with pytest.raises(UsageError, match=r"--lora-rank is 65, it must be at most 64, the width of h\.0\.attn\.c_attn"):
        adapt(make_model(WIDE), rank=65)
    with pytest.raises(UsageError, match=r"--train-only selects h\.2\.ln_1\.weight, and beside an adapter only biases"):
        adapt(make_model(WIDE), ("last:1",))
