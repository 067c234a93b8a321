"""Packing against the padded batch that it replaces: `pad_sequence`, masks, and plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from ft.model.packing import Packing, Selection
from ft.model.transfer import to_device

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
FEATURES = 3


@st.composite
def lengths_and_counts(draw):
    lengths = draw(LENGTHS)
    return lengths, [draw(st.integers(1, length)) for length in lengths]


def sequences_of(lengths, seed=0, **options):
    """Random (length, C) arrays, none of their numbers 0."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(length, FEATURES, generator=generator, **options) + 0.5 for length in lengths]


def real_places(lengths):
    """(B, T) bool: which places of the padded grid hold a token."""
    return pad_sequence([torch.ones(length, dtype=torch.bool) for length in lengths], batch_first=True)


@given(LENGTHS)
@settings(derandomize=True, deadline=None)
def test_unpack_pads_and_pack_drops_the_padding(lengths):
    packing, sequences = Packing.of(lengths), sequences_of(lengths)
    padded = pad_sequence(sequences, batch_first=True)
    assert torch.equal(packing.unpack(torch.cat(sequences)), padded)
    assert torch.equal(packing.pack(padded), padded[real_places(lengths)])
    assert torch.equal(packing.pack(padded), torch.cat(sequences))


@given(LENGTHS)
@settings(derandomize=True, deadline=None)
def test_pack_is_the_inverse_of_unpack_whatever_stands_in_the_padding(lengths):
    packing, packed = Packing.of(lengths), torch.cat(sequences_of(lengths))
    padded = packing.unpack(packed)
    assert torch.equal(packing.pack(padded), packed)
    padded[~real_places(lengths)] = float("nan")
    assert torch.equal(packing.pack(padded), packed)


@given(LENGTHS)
@settings(derandomize=True, deadline=None)
def test_shape_positions_and_slots(lengths):
    packing = Packing.of(lengths)
    assert packing.shape == (len(lengths), max(lengths))
    assert packing.positions.tolist() == [position for length in lengths for position in range(length)]
    assert packing.slots.tolist() == real_places(lengths).flatten().nonzero().squeeze(1).tolist()
    assert packing.positions.dtype == packing.slots.dtype == torch.int64


def test_the_example_of_the_module():
    packing = Packing.of([4, 2, 3])
    assert packing.shape == (3, 4)
    assert packing.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert packing.slots.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    letters = torch.arange(1.0, 10.0).unsqueeze(1)
    assert packing.unpack(letters).squeeze(-1).tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]]


@pytest.mark.parametrize("lengths", [[1], [5], [4, 2, 3], [1, 1, 1], [2, 7, 7, 1]])
def test_gradients_pass_unchanged_and_padding_gets_none(lengths):
    packing = Packing.of(lengths)
    padded = pad_sequence(sequences_of(lengths, dtype=torch.float64), batch_first=True).requires_grad_()
    packing.pack(padded).square().sum().backward()
    assert torch.equal(padded.grad, 2 * padded.detach() * real_places(lengths).unsqueeze(-1))

    packed = torch.cat(sequences_of(lengths, dtype=torch.float64)).requires_grad_()
    weights = torch.rand(*packing.shape, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (packing.unpack(packed) * weights).sum().backward()
    assert torch.equal(packed.grad, weights[real_places(lengths)])
    assert torch.autograd.gradcheck(lambda x: packing.pack(packing.unpack(x).sin()), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_the_type_of_the_numbers_stays(dtype):
    packed = torch.ones(4, FEATURES, dtype=dtype)
    padded = Packing.of([1, 3]).unpack(packed)
    assert padded.dtype == Packing.of([1, 3]).pack(padded).dtype == dtype


@given(lengths_and_counts())
@settings(derandomize=True, deadline=None)
def test_a_selection_names_the_last_rows_of_each_sequence(lengths_counts):
    lengths, counts = lengths_counts
    selection, sequences = Selection.last(lengths, counts), sequences_of(lengths)
    tails = [sequence[-count:] for sequence, count in zip(sequences, counts, strict=True)]
    selected = torch.cat(sequences).index_select(0, selection.rows)
    assert torch.equal(selected, torch.cat(tails))
    assert torch.equal(selection.packing.unpack(selected), pad_sequence(tails, batch_first=True))
    assert selection.rows.tolist() == sorted(set(selection.rows.tolist()))
    assert selection.rows.dtype == torch.int64


@given(lengths_and_counts())
@settings(derandomize=True, deadline=None)
def test_a_selected_row_sees_the_keys_up_to_itself(lengths_counts):
    lengths, counts = lengths_counts
    mask = Selection.last(lengths, counts).mask
    assert mask.shape == (len(lengths), 1, max(counts), max(lengths))
    assert mask.dtype == torch.bool
    for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for query in range(count):
            position = length - count + query
            assert mask[sequence, 0, query].nonzero().flatten().tolist() == list(range(position + 1))
    # softmax over nothing is not a number, also in the padded queries, whose gradients would spoil the others.
    assert mask.any(dim=-1).all()


@given(LENGTHS)
@settings(derandomize=True, deadline=None)
def test_selecting_every_row_is_the_causal_mask(lengths):
    selection = Selection.last(lengths, lengths)
    causal = torch.ones(max(lengths), max(lengths)).tril().bool()
    assert torch.equal(selection.rows, torch.arange(sum(lengths)))
    for sequence, length in enumerate(lengths):
        assert torch.equal(selection.mask[sequence, 0, :length], causal[:length])


@given(lengths_and_counts(), st.integers(0, 3))
@settings(derandomize=True, deadline=None)
def test_a_selection_in_sequences_padded_to_one_length_is_the_same_selection(lengths_counts, more):
    lengths, counts = lengths_counts
    length = max(lengths) + more
    packed, padded = Selection.last(lengths, counts), Selection.last(lengths, counts, pad_to=length)
    starts = torch.arange(len(lengths)).repeat_interleave(torch.tensor(counts)) * length
    assert torch.equal(padded.rows, starts + Packing.of(lengths).positions[packed.rows])
    assert padded.mask.shape[-1] == length
    assert torch.equal(padded.mask[..., : max(lengths)], packed.mask)
    assert not padded.mask[..., max(lengths) :].any()
    assert torch.equal(padded.packing.slots, packed.packing.slots)


def test_a_selection_needs_one_count_per_sequence():
    with pytest.raises(ValueError, match="zip"):
        Selection.last([3, 4], [1])


def test_moving_keeps_everything_but_the_device():
    selection = Selection.last([4, 2], [2, 1])
    moved = to_device(selection, torch.device("meta"))
    assert moved.packing.shape == selection.packing.shape
    arrays = [(moved.rows, selection.rows), (moved.mask, selection.mask)]
    arrays += [(getattr(moved.packing, name), getattr(selection.packing, name)) for name in ("positions", "slots")]
    for there, here in arrays:
        assert (there.device.type, there.shape, there.dtype) == ("meta", here.shape, here.dtype)
    same = to_device(selection, torch.device("cpu"))
    assert torch.equal(same.rows, selection.rows)
    assert torch.equal(same.mask, selection.mask)
    assert torch.equal(same.packing.slots, selection.packing.slots)
    assert torch.equal(same.packing.positions, selection.packing.positions)


def test_spare_rows_leave_few_numbers_of_rows():
    for low in (64, 128, 1024):
        padded = [Packing.of([count]).with_spare_rows() for count in range(low, 2 * low)]
        counts = [len(packing.positions) for packing in padded]
        assert len(set(counts)) <= 33
        assert all(count <= now <= count * 33 / 32 for count, now in zip(range(low, 2 * low), counts, strict=True))
    assert Packing.of([20, 30]).with_spare_rows().spare == 0
    twice = Packing.of([66]).with_spare_rows().with_spare_rows()
    assert (len(twice.positions), twice.spare) == (66, 0)


@pytest.mark.parametrize("contents", [0.0, float("nan")])
def test_nothing_depends_on_spare_rows(contents):
    plain = Packing.of([70, 51, 80])
    packing = plain.with_spare_rows()
    assert packing.spare == 3
    rows = torch.randn(201, 5)
    packed = torch.cat([rows, torch.full((3, 5), contents)])
    assert torch.equal(packing.unpack(packed), plain.unpack(rows))
    assert torch.equal(packing.pack(packing.unpack(packed))[:201], rows)
    assert packing.pack(packing.unpack(packed)).shape == (204, 5)
