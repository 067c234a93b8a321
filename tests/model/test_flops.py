"""The number of operations against PyTorch's own counter, which sees every matrix product of a step."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ft.data.batches import collate
from ft.data.examples import Example
from ft.model.flops import training_flops
from ft.model.freeze import freeze
from ft.model.gpt2 import GPT2, GPT2Config

TINY = GPT2Config(vocab_size=97, n_positions=24, n_embd=12, n_layer=3, n_head=2)
LENGTHS = [(3, 1), (20, 1), (7, 4), (1, 1), (24, 24)]  # tokens and targets


def make_model(**settings):
    model = GPT2(dataclasses.replace(TINY, **settings)).double()  # in which the plain matrix products are used
    model.init_weights(0)
    return model


def counted(model, lengths):
    """The operations of matrix products that PyTorch counts in a step, with attention replaced by one without any."""
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(torch.randint(97, (length,), generator=generator).tolist(), [5] * count) for length, count in lengths
    ]
    batch = collate(examples)
    with FlopCounterMode(display=False) as counter:
        logits = model(batch.input_ids, batch.packing, batch.selection)
        F.cross_entropy(logits, batch.target_ids).backward()
    return counter.get_total_flops()


def attention(lengths, *, blocks):
    """What training_flops counts for attention: forward and backward, 4 C per pair of a query and a key before it."""
    total = 0
    for length, count in lengths:
        for block in range(blocks):
            queries = range(length - count, length) if block == blocks - 1 else range(length)
            total += 3 * sum(4 * TINY.n_embd * (query + 1) for query in queries)
    return total


@pytest.fixture(autouse=True)
def no_attention(monkeypatch):
    def attend(queries, keys, values, mask, **_):
        return queries + keys.mean(dim=2, keepdim=True) + values.mean(dim=2, keepdim=True)

    monkeypatch.setattr("ft.model.gpt2.attention", attend)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:1], LENGTHS[2:3]])
def test_the_operations_are_those_of_pytorchs_counter(layers, lengths):
    model = make_model(n_layer=layers)
    assert training_flops(model, lengths) - attention(lengths, blocks=layers) == pytest.approx(counted(model, lengths))


@pytest.mark.parametrize(("train_only", "frozen"), [(("last:1",), ()), ((), ("wte.weight", "wpe.weight", "h.0.*"))])
def test_frozen_weights_take_fewer(train_only, frozen):
    """At most what the first trained block computes for its inputs is counted too much."""
    model = make_model()
    everything = training_flops(model, LENGTHS)
    freeze(model, train_only, frozen)
    linear = training_flops(model, LENGTHS)
    tokens = sum(length for length, _ in LENGTHS)
    of_attention = attention(LENGTHS, blocks=3)
    first = next(i for i, block in enumerate(model.h) if any(p.requires_grad for p in block.parameters()))
    pairs = sum(length * (length + 1) // 2 for length, _ in LENGTHS)
    of_attention -= first * 2 * 4 * TINY.n_embd * pairs  # of blocks that have a forward pass only
    own_inputs = 2 * 3 * TINY.n_embd**2 * tokens
    difference = linear - of_attention - counted(model, LENGTHS)
    assert 0 <= difference <= own_inputs
    assert linear < everything


def test_a_full_step_of_long_examples_is_six_times_the_parameters():
    """Kaplan's formula, which holds where all positions have targets and attention is small beside the matrices."""
    model = make_model()
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name != "wpe.weight")
    lengths = [(24, 24)] * 3
    assert training_flops(model, lengths) - attention(lengths, blocks=3) == pytest.approx(6 * matrices * 72)
