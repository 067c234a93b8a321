"""The model against `transformers`' GPT-2 on the same weights, and against itself with each saving turned off."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from ft.errors import FtError
from ft.model import matmul
from ft.model.gpt2 import GPT2, GPT2Config, TiedEmbedding
from ft.model.packing import Packing, Selection
from ft.model.pretrained import load_published

TINY = GPT2Config(vocab_size=211, n_positions=40, n_embd=48, n_layer=3, n_head=4)
LENGTHS = [7, 1, 12, 5]


def dropout(config, p):
    return dataclasses.replace(config, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p)


def make_model(config=TINY, dtype=torch.float64, seed=0):
    model = GPT2(config).to(dtype)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():  # biases and norms too, which start at 0 and 1 and would hide a mistake
        for parameter in model.parameters():
            parameter += torch.empty(parameter.shape, dtype=torch.float32).normal_(0, 0.1, generator=generator)
    return model


def make_reference(model):
    config = transformers.GPT2Config(
        **{field.name: getattr(model.config, field.name) for field in dataclasses.fields(model.config)}
    )
    reference = transformers.GPT2LMHeadModel(config).to(model.wte.weight.dtype)
    missing = reference.transformer.load_state_dict(model.state_dict(), strict=True)
    assert not missing.missing_keys
    return reference


def make_batch(lengths=LENGTHS, vocab_size=TINY.vocab_size, seed=3):
    """Packed ids for our model, right-padded ids and mask for the reference."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=0)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
    return torch.cat(sequences), padded, mask


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("dtype", "logits_bound", "grad_bound"), [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4)]
)
@pytest.mark.parametrize("n_inner", [None, 100])
def test_logits_loss_and_every_gradient_equal_transformers(dtype, logits_bound, grad_bound, n_inner):
    model = make_model(dataclasses.replace(TINY, n_inner=n_inner), dtype).eval()
    reference = make_reference(model).eval()
    input_ids, padded, mask = make_batch()
    target_ids = torch.tensor([5, 9, 200, 17])
    selection = Selection.last(LENGTHS, [1] * 4)

    logits = model(input_ids, Packing.of(LENGTHS))
    expected = reference(padded, attention_mask=mask).logits
    assert relative(logits, expected[mask.bool()]) < logits_bound

    # Not the reference's own `labels=`, whose loss is computed in float32 whatever the model's type.
    last_rows = torch.tensor(LENGTHS) - 1
    expected_loss = F.cross_entropy(expected[torch.arange(4), last_rows], target_ids)
    expected_loss.backward()
    loss = F.cross_entropy(model(input_ids, Packing.of(LENGTHS), selection), target_ids)
    loss.backward()
    assert abs(loss.item() / expected_loss.item() - 1) < logits_bound
    gradients = {name: p.grad for name, p in reference.transformer.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.endswith("attn.c_attn.bias"):
            # The keys' bias adds the same to all of a row's scores, which softmax ignores: its gradient is 0.
            c = model.config.n_embd
            assert parameter.grad[c : 2 * c].abs().max() < grad_bound
            keep = torch.cat([torch.arange(c), torch.arange(2 * c, 3 * c)])
            assert relative(parameter.grad[keep], gradients[name][keep]) < grad_bound, name
        else:
            assert relative(parameter.grad, gradients[name]) < grad_bound, name


def loss_and_gradients(model, select=True, counts=(1, 1, 1, 1)):
    input_ids, _, _ = make_batch()
    selection = Selection.last(LENGTHS, counts)
    target_ids = torch.arange(sum(counts)) * 7
    model.zero_grad()
    logits = model(input_ids, Packing.of(LENGTHS), selection if select else None)
    if not select:
        logits = logits[selection.rows]
    loss = F.cross_entropy(logits, target_ids)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 1, 12, 2)])
def test_computing_selected_rows_only_changes_neither_loss_nor_gradients(counts):
    model = make_model()
    model.eval()
    loss, gradients = loss_and_gradients(model, counts=counts)
    expected_loss, expected = loss_and_gradients(model, select=False, counts=counts)
    assert abs(loss - expected_loss) < 1e-10
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


def test_packing_changes_nothing_for_any_one_sequence():
    model = make_model().eval()
    input_ids, _, _ = make_batch()
    together = model(input_ids, Packing.of(LENGTHS)).split(LENGTHS)
    for sequence, logits in zip(input_ids.split(LENGTHS), together, strict=True):
        alone = model(sequence, Packing.of([len(sequence)]))
        torch.testing.assert_close(logits, alone, rtol=1e-10, atol=1e-10)


def test_the_lookup_gradient_is_added_into_the_heads(monkeypatch):
    model = make_model().eval()
    loss, gradients = loss_and_gradients(model)
    monkeypatch.setattr(TiedEmbedding, "apply", lambda table, input_ids: (F.embedding(input_ids, table), table))
    expected_loss, expected = loss_and_gradients(model)
    assert loss == expected_loss
    assert gradients["wte.weight"].layout == torch.strided
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


class Tables(TorchDispatchMode):
    """Counts the arrays of the embedding's size that operations make."""

    def __init__(self, shape):
        super().__init__()
        self.shapes, self.made = {shape, shape[::-1]}, set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and tuple(result.shape) in self.shapes:
            self.made.add(result.untyped_storage().data_ptr())
        return result


def test_the_backward_pass_makes_one_array_of_the_embeddings_size():
    model = make_model().eval()
    input_ids, _, _ = make_batch()
    selection = Selection.last(LENGTHS, [1] * len(LENGTHS))
    loss = model(input_ids, Packing.of(LENGTHS), selection).logsumexp(dim=-1).sum()
    weight = model.wte.weight
    with Tables(tuple(weight.shape)) as tables:
        loss.backward()
    assert tables.made - {weight.data_ptr()} == {weight.grad.data_ptr()}


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_checkpointing_gives_the_same_gradients_bit_for_bit_with_dropout(kind, dtype):
    model = make_model(dropout(TINY, 0.3), dtype).train()
    torch.manual_seed(5)
    loss, expected = loss_and_gradients(model)
    state = torch.get_rng_state()
    model.activation_checkpointing = kind
    torch.manual_seed(5)
    again, gradients = loss_and_gradients(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    assert not torch.equal(loss_and_gradients(model)[0], loss), "dropout must be at work for this test to say anything"


class SavedBytes:
    """Counts what autograd keeps for the backward pass."""

    def __enter__(self):
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def pack(self, tensor):
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def test_full_activation_checkpointing_keeps_less_and_evaluation_recomputes_nothing():
    model = make_model(dropout(TINY, 0.1)).train()
    kept = {}
    for kind in ("none", "full"):
        model.activation_checkpointing = kind
        with SavedBytes() as saved:
            input_ids, _, _ = make_batch()
            model(input_ids, Packing.of(LENGTHS))
        kept[kind] = saved.bytes
    assert kept["full"] < kept["none"] / 3
    calls = []
    model.h[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(input_ids, Packing.of(LENGTHS))
    assert len(calls) == 1


def test_dropout_is_at_the_three_places_and_off_in_evaluation():
    input_ids, _, _ = make_batch()
    packing = Packing.of(LENGTHS)
    plain = make_model().eval()(input_ids, packing)
    for place in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        config = dataclasses.replace(dropout(TINY, 0.0), **{place: 0.5})
        model = make_model(config)
        assert torch.equal(model.eval()(input_ids, packing), plain)
        torch.manual_seed(0)
        assert relative(model.train()(input_ids, packing), plain) > 1e-3, place
    assert torch.equal(make_model(dropout(TINY, 0.0)).train()(input_ids, packing), plain)


def test_random_weights_are_gpt2s():
    config = GPT2Config(vocab_size=500, n_positions=64, n_embd=128, n_layer=8, n_head=4)
    model = GPT2(config)
    model.init_weights(7)
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=500, n_positions=64, n_embd=128, n_layer=8, n_head=4)
    ).transformer
    for (name, ours), (their_name, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert name == their_name
        if theirs.std() == 0:
            assert torch.equal(ours, theirs), name
        else:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1), name
    again = GPT2(config)
    again.init_weights(7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    again.init_weights(8)
    assert not torch.equal(model.wte.weight, again.wte.weight)


def published(model, prefix="", masks=False, head=False):
    tensors = {prefix + name: p.detach().clone() for name, p in model.named_parameters()}
    if masks:
        tensors |= {f"{prefix}h.{i}.attn.bias": torch.ones(1, 1, 40, 40) for i in range(TINY.n_layer)}
        tensors |= {f"{prefix}h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(TINY.n_layer)}
    if head:
        tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"].clone()
    return tensors


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_every_published_layout_loads(prefix, masks, head):
    model = make_model(dtype=torch.float32)
    loaded = GPT2(TINY)
    load_published(loaded, published(model, prefix, masks, head).items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_half_precision_weights_are_upcast():
    model = make_model(dtype=torch.float32)
    loaded = GPT2(TINY)
    load_published(loaded, ((name, tensor.bfloat16()) for name, tensor in published(model, head=True).items()))
    assert loaded.wte.weight.dtype == torch.float32
    assert torch.equal(loaded.wte.weight, model.wte.weight.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias is missing"),
        (
            lambda t: t.update({"h.3.ln_1.weight": torch.ones(48)}),
            "h.3.ln_1.weight is not a tensor of a GPT-2 with 3 layers",
        ),
        (lambda t: t.update({"wpe.weight": torch.ones(41, 48)}), r"wpe.weight has shape \(41, 48\).*\(40, 48\)"),
        (lambda t: t.update({"lm_head.weight": torch.ones(211, 48)}), "lm_head.weight differs from wte.weight"),
        (lambda t: t.clear(), "wte.weight is missing.*and 35 more"),
    ],
)
def test_loading_is_strict_and_names_the_tensor(change, message):
    tensors = published(make_model(dtype=torch.float32))
    change(tensors)
    with pytest.raises(FtError, match=message):
        load_published(GPT2(TINY), tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_head": 5}, "n_embd 768 is not divisible by n_head 5"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_embd": "768"}, "n_embd is '768'"),
        ({"attn_pdrop": 1.5}, "attn_pdrop is 1.5"),
        ({"attn_pdrop": float("nan")}, "attn_pdrop is nan"),
    ],
)
def test_a_configuration_of_another_model_is_refused(change, message):
    with pytest.raises(FtError, match=message):
        GPT2Config.from_dict({"model_type": "gpt2", **change})


@pytest.mark.slow
@pytest.mark.parametrize("size", ["distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_all_published_sizes_load_and_equal_transformers(size, tmp_path):
    from ft.io.plain_files import read_json
    from ft.model.pretrained import load_weights
    from tests.reference.synthetic import write_model

    folder = write_model(tmp_path, size)
    model = GPT2(GPT2Config.from_dict(read_json(folder / "config.json")))
    load_weights(model, [folder / "model.safetensors"])
    input_ids, padded, mask = make_batch(vocab_size=50257)
    with torch.inference_mode():
        logits = model.eval()(input_ids, Packing.of(LENGTHS))
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        expected = reference(padded, attention_mask=mask).logits[mask.bool()]
    assert relative(logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("selected", "head_rows"), [([1, 2, 1, 3], (7, 7)), ([30, 33, 1, 9], (74, 73)), (None, (144, 141))]
)
def test_spare_rows_change_neither_logits_nor_gradients(selected, head_rows, monkeypatch):
    lengths = [40, 33, 28, 40]
    input_ids, _, _ = make_batch(lengths)
    selection = Selection.last(lengths, selected) if selected else None
    results = []
    for spare in (True, False):
        monkeypatch.setattr("ft.model.gpt2.compiles_shapes", lambda x, spare=spare: spare)
        model = make_model().eval()
        rows = []
        for module in (model.h[1], model.ln_f):
            module.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(len(inputs[0])))
        logits = model(input_ids, Packing.of(lengths), selection)
        logits.square().sum().backward()
        assert rows == [144, head_rows[0]] if spare else [141, head_rows[1]]
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    for own, expected in zip(*results, strict=True):
        assert own.shape == expected.shape
        assert relative(own, expected) < 1e-12


def test_spare_rows_are_for_onednn_on_cpus(monkeypatch):
    monkeypatch.setattr(matmul, "has_onednn", lambda: True)
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: False)
    assert not matmul.compiles_shapes(torch.empty(100))
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul.compiles_shapes(torch.empty(100))
        assert not matmul.compiles_shapes(torch.empty(100, device="meta"))
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    assert matmul.compiles_shapes(torch.empty(100))
    monkeypatch.setattr(matmul, "has_onednn", lambda: False)
    assert not matmul.compiles_shapes(torch.empty(100))
