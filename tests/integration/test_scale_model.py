"""The formulas of the prediction at their limits, where the right answer is known without them."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale_model import (
    BF16_BYTES,
    CLUSTERS,
    DEVICES,
    ETHERNET,
    INFINIBAND,
    LARGE,
    RECIPE,
    Model,
    accumulation_for,
    efficiency,
    exposed_seconds,
    falls_below,
    gather_seconds,
    queue_seconds,
    reduce_seconds,
    remedies,
    ring_bytes,
    step_seconds,
)

GPT2_SMALL, GPT2_XL = Model.of("gpt2"), Model.of("gpt2-xl")
PLAIN = replace(ETHERNET, inside=1e9, outside=1e9, latency_inside=0, latency_outside=0)
EVERY_WAY = [(cluster, changed) for cluster in CLUSTERS for changed in remedies(RECIPE).values()]


@pytest.mark.parametrize("model", [GPT2_SMALL, GPT2_XL])
@pytest.mark.parametrize(("cluster", "setting"), EVERY_WAY)
def test_one_device_exchanges_nothing(model, cluster, setting):
    assert exposed_seconds(model, setting, cluster, 1, passes=0.01) == 0
    assert efficiency(model, setting, cluster, 1) == 1


@pytest.mark.parametrize(("cluster", "setting"), EVERY_WAY)
@pytest.mark.parametrize("devices", DEVICES)
def test_a_faster_network_never_hurts(cluster, setting, devices):
    before = efficiency(GPT2_SMALL, setting, cluster, devices)
    wider = replace(cluster, inside=2 * cluster.inside, outside=2 * cluster.outside)
    prompter = replace(cluster, latency_inside=cluster.latency_inside / 2, latency_outside=cluster.latency_outside / 2)
    assert 0 < before <= efficiency(GPT2_SMALL, setting, wider, devices)
    assert before <= efficiency(GPT2_SMALL, setting, prompter, devices)


def test_a_ring_sends_almost_twice_the_gradients():
    assert ring_bytes(100, 1) == 0
    assert ring_bytes(100, 2) == 100
    assert ring_bytes(100, 10**6) == pytest.approx(200, rel=1e-5)
    assert reduce_seconds(1e9, PLAIN, 2) == 1


def test_a_ring_makes_two_rounds():
    assert reduce_seconds(0, replace(PLAIN, latency_inside=1), 8) == 14
    assert gather_seconds(0, replace(PLAIN, latency_inside=1), 8) == 7
    assert gather_seconds(0, replace(PLAIN, latency_inside=1, latency_outside=100), 16) == 14 + 100


def test_a_tree_takes_over_where_the_ring_has_too_many_stations():
    assert reduce_seconds(0, replace(PLAIN, latency_outside=1), 1024) == 2 * math.log2(1024 / 8)
    assert reduce_seconds(1e12, PLAIN, 1024) == 1e3 * ring_bytes(1, 1024)  # and not where there is nothing to wait for


def test_rings_share_the_network_cards_of_a_machine():
    cluster = replace(PLAIN, inside=10, outside=4)
    assert cluster.link(8) == 10
    assert cluster.link(9) == 4
    assert replace(cluster, outside=40).link(9) == 10


def test_bf16_halves_what_takes_bandwidth():
    halved = replace(RECIPE, gradient_bytes=BF16_BYTES)
    fp32, bf16 = (exposed_seconds(GPT2_SMALL, setting, PLAIN, 64, passes=0) for setting in (RECIPE, halved))
    assert bf16 == pytest.approx(fp32 / 2)


@given(st.integers(1, 50), st.floats(0, 10), st.floats(0, 10))
def test_a_queue_by_its_formula_is_one_that_is_played_through(number, each, window):
    finished = 0.0
    for due in range(1, number + 1):
        finished = max(finished, due * window / number) + each
    assert queue_seconds(number, each, window) == pytest.approx(finished - window, abs=1e-9)


def test_the_embeddings_are_never_hidden():
    """With so much to compute that all else is hidden, what comes last still takes its time."""
    last = reduce_seconds(4 * GPT2_SMALL.in_embeddings, INFINIBAND, 8)
    assert exposed_seconds(GPT2_SMALL, RECIPE, INFINIBAND, 8, passes=1000) >= last


def test_parameters_are_those_of_the_model():
    assert GPT2_SMALL.in_blocks + GPT2_SMALL.in_embeddings == 124_439_808
    assert GPT2_XL.in_blocks + GPT2_XL.in_embeddings == 1_557_611_200


def test_operations_grow_with_the_batch():
    assert GPT2_SMALL.flops(replace(RECIPE, reviews=16)) == pytest.approx(2 * GPT2_SMALL.flops(RECIPE), rel=1e-3)
    assert GPT2_SMALL.flops(LARGE) > 100 * GPT2_SMALL.flops(RECIPE)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_as_many_batches_are_accumulated_as_are_needed_and_no_more(cluster):
    batches = accumulation_for(0.8, GPT2_SMALL, RECIPE, cluster, devices=64)
    assert efficiency(GPT2_SMALL, replace(RECIPE, accumulation=batches), cluster, 64) >= 0.8
    assert batches == 1 or efficiency(GPT2_SMALL, replace(RECIPE, accumulation=batches - 1), cluster, 64) < 0.8


def test_the_first_number_of_devices_below_a_threshold():
    limit = falls_below(0.5, GPT2_SMALL, RECIPE, ETHERNET)
    assert limit == 16  # the first that is more than a machine
    assert efficiency(GPT2_SMALL, RECIPE, ETHERNET, limit // 2) >= 0.5 > efficiency(GPT2_SMALL, RECIPE, ETHERNET, limit)
    nothing_sent = replace(INFINIBAND, inside=math.inf, outside=math.inf, latency_inside=0, latency_outside=0)
    assert falls_below(0.8, GPT2_SMALL, RECIPE, nothing_sent) is None


def test_graphs_make_a_step_shorter_and_the_efficiency_lower():
    graphs = replace(RECIPE, graphs=True)
    assert step_seconds(GPT2_SMALL, graphs, INFINIBAND, 64) < step_seconds(GPT2_SMALL, RECIPE, INFINIBAND, 64)
    assert efficiency(GPT2_SMALL, graphs, INFINIBAND, 64) < efficiency(GPT2_SMALL, RECIPE, INFINIBAND, 64)
