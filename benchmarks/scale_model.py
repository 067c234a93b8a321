"""A model of the step time on many devices, checked on this machine's processes and applied to published figures.

    python -m benchmarks.scale_model          (after python -m benchmarks.distributed, for the check)

A step of p devices that work on a batch each takes, in seconds,

    step(p)       a passes + update + exposed(p)          and its efficiency is step(1) / step(p)
    passes        max(F / R, K t)                         forward and backward, of which the backward takes B = 2/3
    update        28 P / M                                of AdamW; P / p parameters where they are sharded
    exposed(p)    queue(N, reduce(E / N), B) + reduce(L)  what the exchange adds to the time

where the exchange of n bytes takes what the faster of a ring and a tree does, as NCCL chooses between them,

    reduce(n)     min(ring, tree)
    ring          2 (p - 1) / p n / W + 2 (p - 1) l       pieces of n / p go round twice, first summed, then handed out
    tree          2 n / W + 2 (7 + log2(p / 8)) l         up to the root and down again, in a machine of 8 one by one

and queue(N, c, w) is by how much N transfers of c seconds each outlast w seconds of computing, when one becomes due
after each Nth part of it, and one goes after another: whichever is longer, the last transfer or all of them less what
had passed when the first was due,

    queue         max(c, N c - (1 - 1 / N) w)

The letters: a batches are accumulated; F operations of a batch's matrix products (counted by `benchmarks.roofline`) at
R a second; K kernels, each of which takes t to be queued; P parameters, of which AdamW moves 28 bytes each at M a
second; E bytes of gradients of the blocks, in N buckets of 25 MiB (DistributedDataParallel's size); W bytes a second
through the narrowest link in one direction, and l seconds until the first of them arrives, one number for hops within
a machine and one for those between two.

L are the bytes of the embeddings. The token embedding is the head too: the head's gradient is there first, but rows of
its look-up are added to it when the backward pass has come to the input, so that its bucket can only be sent at the
end, when nothing is left to be computed at the same time.

Sharded, the blocks' weights are gathered for the forward pass and for the backward pass, which also scatters their
gradients; the embeddings are gathered once and their gradients scattered: (p - 1) / p n / W + (p - 1) l each time.

    exposed(p)    queue(N, gather, passes - B) + queue(N, gather + scatter, B) + gather(L) + scatter(L), N blocks

What is published: peaks, bandwidths and link speeds of NVIDIA's H100 SXM in machines of eight. What is assumed is what
stands under ASSUMED below. What is left out: batches of unequal length, for the longest of which all wait; casting
weights and gradients between fp32 and bf16; that exchanging takes memory bandwidth and processors from computing;
evaluations, checkpoints and failures. All of these make real runs slower than this.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import PUBLISHED, benchmark_parser, markdown_table, picture_path, write_result
from benchmarks.roofline import ADAMW_BYTES, needed_flops
from benchmarks.step import parameter_count
from ft.data.examples import Example
from ft.model.gpt2 import GPT2, GPT2Config
from tests.reference.synthetic import model_config

MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
DEVICES = tuple(2**power for power in range(11))
THRESHOLDS = (0.8, 0.5)
BUCKET_BYTES = 25 * 2**20
BACKWARD = 2 / 3  # of both passes: two products for each of the forward pass
FP32_BYTES, BF16_BYTES = 4, 2

# ASSUMED, not measured for this program: the achieved share of the published figures, and small times.
USED_FLOPS = 0.4  # of the matrix products' peak
USED_BANDWIDTH = 0.8  # of memory and of links
QUEUE_SECONDS = 5e-6  # for PyTorch to queue a kernel
KERNELS_PER_BLOCK = 70  # PyTorch's operations, forward and backward, in bf16, with attention and dropout as one each
LATENCY_INSIDE, LATENCY_INFINIBAND, LATENCY_ETHERNET = 3e-6, 10e-6, 50e-6  # seconds, with the library's part


@dataclass(frozen=True)
class Cluster:
    """Machines with devices in them; rates are those that are reached, in bytes or operations a second.

    Attributes:
        name: for table and picture.
        flops: R, of a device's matrix products.
        memory: M, of a device's memory.
        queue_seconds: t, for a kernel.
        per_machine: devices in a machine.
        inside: W of a device's link within its machine, in one direction.
        outside: W of all links of a machine to others together, in one direction. A ring leaves a machine at one
            place, and as many rings as there are network cards share the bytes.
        latency_inside: l within a machine.
        latency_outside: l between machines.
    """

    name: str
    flops: float
    memory: float
    queue_seconds: float
    per_machine: int
    inside: float
    outside: float
    latency_inside: float
    latency_outside: float

    def link(self, devices: int) -> float:
        """W of a ring through so many devices: that of its narrowest place."""
        return self.inside if devices <= self.per_machine else min(self.inside, self.outside)

    def round_latency(self, devices: int) -> float:
        """Seconds until something has come through a ring of so many devices, machine by machine."""
        machines = math.ceil(devices / self.per_machine)
        return (devices - machines) * self.latency_inside + (machines - 1) * self.latency_outside

    def tree_latency(self, devices: int) -> float:
        """Seconds from a tree's root to its last leaf: a tree of machines, in each of which it goes one by one."""
        machines = math.ceil(devices / self.per_machine)
        return (min(devices, self.per_machine) - 1) * self.latency_inside + math.log2(machines) * self.latency_outside


# H100 SXM by its data sheet: 989 TFLOP/s in bf16 without sparsity, 3.35 TB/s, NVLink 900 GB/s in both directions
# together. Eight in a machine (DGX H100), which has a card of 400 Gb/s for each, or here one of 10 Gb/s for all.
INFINIBAND = Cluster(
    name="400 Gb/s per GPU",
    flops=USED_FLOPS * 989e12,
    memory=USED_BANDWIDTH * 3.35e12,
    queue_seconds=QUEUE_SECONDS,
    per_machine=8,
    inside=USED_BANDWIDTH * 450e9,
    outside=USED_BANDWIDTH * 8 * 50e9,
    latency_inside=LATENCY_INSIDE,
    latency_outside=LATENCY_INFINIBAND,
)
ETHERNET = replace(
    INFINIBAND,
    name="10 Gb/s per machine",
    outside=USED_BANDWIDTH * 1.25e9,
    latency_outside=LATENCY_ETHERNET,
)
CLUSTERS = (INFINIBAND, ETHERNET)


@dataclass(frozen=True)
class Setting:
    """What a step computes and how it exchanges.

    Attributes:
        reviews: per batch and device.
        tokens: per review, on average.
        accumulation: a, batches per step; for what is not sharded.
        gradient_bytes: of each number that is sent.
        shard: hold a part of the weights, gradients and moments in each device.
        graphs: kernels are queued as recorded graphs (--compile reduce-overhead), which takes no time.
    """

    reviews: int
    tokens: float
    accumulation: int = 1
    gradient_bytes: int = FP32_BYTES
    shard: bool = False
    graphs: bool = False


RECIPE, LARGE = Setting(reviews=8, tokens=23.5), Setting(reviews=64, tokens=512)


def remedies(setting: Setting) -> dict[str, Setting]:
    """The setting as it is, and with one thing changed."""
    return {
        "as it is": setting,
        "batch x 4": replace(setting, reviews=4 * setting.reviews),
        "accumulation x 4": replace(setting, accumulation=4),
        "bf16 gradients": replace(setting, gradient_bytes=BF16_BYTES),
        "sharded": replace(setting, shard=True),
        "graphs": replace(setting, graphs=True),
    }


@dataclass(frozen=True)
class Model:
    """What the size of a model amounts to: numbers of parameters, and its configuration."""

    config: GPT2Config
    in_blocks: int
    in_embeddings: int

    @classmethod
    def of(cls, size: str) -> "Model":
        """The published model of that name, without memory for its weights."""
        config = GPT2Config.from_dict(model_config(size))
        with torch.device("meta"):
            model = GPT2(config)
        in_blocks = parameter_count(model.h)
        return cls(config, in_blocks, parameter_count(model) - in_blocks)

    def flops(self, setting: Setting) -> float:
        """F: operations of the matrix products of a batch, forward and backward."""
        ends = [math.floor(number * setting.tokens) for number in range(setting.reviews + 1)]
        lengths = [end - start for start, end in pairwise(ends)]
        return sum(needed_flops(self.config, [Example([0] * length, [0]) for length in lengths]).values())


def ring_bytes(size: float, devices: int) -> float:
    """Bytes that each of the devices sends, to have the sum of `size` bytes of each in all of them."""
    return 2 * (devices - 1) / devices * size


def reduce_seconds(size: float, cluster: Cluster, devices: int) -> float:
    """Seconds of an all-reduce of `size` bytes, by a ring or by a tree."""
    ring = ring_bytes(size, devices) / cluster.link(devices) + 2 * cluster.round_latency(devices)
    tree = 2 * size / cluster.link(devices) + 2 * cluster.tree_latency(devices)
    return min(ring, tree)


def gather_seconds(size: float, cluster: Cluster, devices: int) -> float:
    """Seconds to gather `size` bytes, of which each device has a part, in all of them; or the reverse, to scatter."""
    return ring_bytes(size, devices) / 2 / cluster.link(devices) + cluster.round_latency(devices)


def queue_seconds(number: int, each: float, window: float) -> float:
    """By how many seconds `number` transfers outlast a window of computing in which they become due evenly."""
    return max(each, number * each - (1 - 1 / number) * window) if number else 0.0


def exposed_seconds(model: Model, setting: Setting, cluster: Cluster, devices: int, passes: float) -> float:
    """What the exchange adds to a step whose last batch takes `passes` seconds, forward and backward."""
    backward = BACKWARD * passes
    if setting.shard:
        blocks = model.config.n_layer
        gather = gather_seconds(FP32_BYTES * model.in_blocks / blocks, cluster, devices)
        scatter = gather_seconds(setting.gradient_bytes * model.in_blocks / blocks, cluster, devices)
        last = gather_seconds(FP32_BYTES * model.in_embeddings, cluster, devices)
        last += gather_seconds(setting.gradient_bytes * model.in_embeddings, cluster, devices)
        in_forward = queue_seconds(blocks, gather, passes - backward)
        in_backward = queue_seconds(blocks, gather + scatter, backward)
        return in_forward + in_backward + last
    buckets = math.ceil(FP32_BYTES * model.in_blocks / BUCKET_BYTES)
    each = reduce_seconds(setting.gradient_bytes * model.in_blocks / buckets, cluster, devices)
    last = reduce_seconds(setting.gradient_bytes * model.in_embeddings, cluster, devices)
    return queue_seconds(buckets, each, backward) + last


def step_seconds(model: Model, setting: Setting, cluster: Cluster, devices: int) -> float:
    """Seconds of a step, by the formulas above."""
    queueing = 0.0 if setting.graphs else KERNELS_PER_BLOCK * model.config.n_layer * cluster.queue_seconds
    passes = max(model.flops(setting) / cluster.flops, queueing)
    updated = (model.in_blocks + model.in_embeddings) / (devices if setting.shard else 1)
    computing = setting.accumulation * passes + ADAMW_BYTES * updated / cluster.memory
    return computing + exposed_seconds(model, setting, cluster, devices, passes)


def efficiency(model: Model, setting: Setting, cluster: Cluster, devices: int) -> float:
    """The share of its time that a device does what it would do by itself."""
    return step_seconds(model, setting, cluster, 1) / step_seconds(model, setting, cluster, devices)


def falls_below(threshold: float, model: Model, setting: Setting, cluster: Cluster) -> int | None:
    """The least power of two of devices at which the efficiency is below the threshold; None if that is not to 1024."""
    return next((p for p in DEVICES if efficiency(model, setting, cluster, p) < threshold), None)


def accumulation_for(threshold: float, model: Model, setting: Setting, cluster: Cluster, devices: int) -> int:
    """How many batches must be accumulated for an efficiency of `threshold`.

    The exchange adds the same to a step of any number of batches. So the computing, which grows by `passes` with each,
    must be threshold / (1 - threshold) times as long as what is added.
    """
    one, two = (step_seconds(model, replace(setting, accumulation=a), cluster, 1) for a in (1, 2))
    added = step_seconds(model, setting, cluster, devices) - one
    return max(1, math.ceil(1 + (threshold / (1 - threshold) * added - one) / (two - one)))


def main() -> None:
    """Check the model on what was measured here, apply it to GPUs, and write tables and picture."""
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--measured", type=Path, default=PUBLISHED / "distributed.json", help="of benchmarks.distributed"
    )
    options = parser.parse_args()
    if not options.measured.exists():
        parser.error(f"there is no {options.measured}: run python -m benchmarks.distributed first")

    measured = json.loads(options.measured.read_text(encoding="utf-8"))
    checks = [check(measured, key) for key in ("ddp", "bf16")]
    models = {size: Model.of(size) for size in MODELS}
    predictions = [
        prediction(size, model, setting, cluster)
        for cluster in CLUSTERS
        for setting in (RECIPE, LARGE)
        for size, model in models.items()
    ]
    draw(predictions, picture_path(options.output, "scale_model"))
    figures = {"measured_size": measured["size"], "checks": checks, "predictions": predictions}
    tables = f"{check_table(measured, checks)}\n\n{prediction_tables(predictions)}"
    write_result(options.output, "scale_model", figures, tables, done="Calculated")


def check(measured: dict[str, Any], key: str) -> dict[str, Any]:
    """A measured case beside its prediction from the step of one process and from the exchange by itself, in seconds.

    Where the exchange has hardware of its own it goes on beside the computing, as in the formulas above. Processes of
    one machine move each byte by the processors that compute, so that what they exchange they do not compute: then the
    whole exchange is added.
    """
    one, case = measured["cases"]["one"], measured["cases"][key]
    alone = case["exchange_seconds"]
    *early, last = (alone * size / sum(measured["bucket_bytes"]) for size in measured["bucket_bytes"])
    each = sum(early) / max(1, len(early))
    beside = one["step_seconds"] + queue_seconds(len(early), each, one["part_seconds"]["backward"]) + last
    instead = one["step_seconds"] + alone
    return {
        "case": key,
        "measured_seconds": case["step_seconds"],
        "beside_seconds": beside,
        "beside_error": beside / case["step_seconds"] - 1,
        "instead_seconds": instead,
        "instead_error": instead / case["step_seconds"] - 1,
    }


def prediction(size: str, model: Model, setting: Setting, cluster: Cluster) -> dict[str, Any]:
    """The figures of a model, setting and cluster, by number of devices and by remedy."""
    return {
        "cluster": cluster.name,
        "batch": f"{setting.reviews} x {setting.tokens:g} tokens",
        "model": size,
        "step_seconds": {str(p): step_seconds(model, setting, cluster, p) for p in DEVICES},
        "efficiency": {str(p): efficiency(model, setting, cluster, p) for p in DEVICES},
        "falls_below": {
            name: {str(threshold): falls_below(threshold, model, changed, cluster) for threshold in THRESHOLDS}
            for name, changed in remedies(setting).items()
        },
        "accumulation_for_80_percent_on_64": accumulation_for(0.8, model, setting, cluster, devices=64),
    }


def check_table(measured: dict[str, Any], checks: Sequence[dict[str, Any]]) -> str:
    """Predicted and measured step times of this machine's processes."""
    cases = measured["cases"]
    labels = {"ddp": f"{measured['processes']} processes", "bf16": f"{measured['processes']} processes, bf16 gradients"}
    rows = [
        [
            labels[each["case"]],
            f"{1e3 * each['measured_seconds']:.0f}",
            f"{1e3 * each['instead_seconds']:.0f}",
            f"{each['instead_error']:+.0%}",
            f"{1e3 * each['beside_seconds']:.0f}",
            f"{each['beside_error']:+.0%}",
        ]
        for each in checks
    ]
    header = ["ms per step", "measured", "exchange on the same cores", "error", "exchange beside them", "error"]
    apart = cases["apart"]["step_seconds"] - cases["one"]["step_seconds"]
    rate = ring_bytes(measured["gradient_bytes"], measured["processes"]) / cases["ddp"]["exchange_seconds"]
    return (
        f"**Checked** on {measured['size']}, from the step of one process "
        f"({1e3 * cases['one']['step_seconds']:.0f} ms) and the exchange by itself ({rate / 1e9:.2f} GB/s in one "
        "direction), both measured:\n\n"
        + markdown_table(header, rows)
        + f"\n\nOf the error, {1e3 * apart:.0f} ms are what the processes take longer than one even when they exchange "
        "nothing: memory and caches that they share, and unequal batches. The model has neither."
    )


def prediction_tables(predictions: Sequence[dict[str, Any]]) -> str:
    """Step and efficiency by devices, and where the efficiency falls below the thresholds."""
    shown = ("8", "64", "1024")
    steps, limits = [], []
    for each in predictions:
        name = [f"{each['cluster']}; {each['batch']}; {each['model']}"]
        taken = each["step_seconds"]
        cells = [f"{1e3 * taken[p]:.1f} ms, {each['efficiency'][p]:.0%}" for p in shown]
        steps.append([*name, f"{1e3 * taken['1']:.1f} ms", *cells])
        ends = [" / ".join(str(number or "–") for number in ends.values()) for ends in each["falls_below"].values()]
        limits.append([*name, *ends, str(each["accumulation_for_80_percent_on_64"])])
    return (
        "**Predicted, not measured: no GPU has run this program.** Step and efficiency on so many H100, eight in a "
        "machine, by the network between machines and the batch of each GPU:\n\n"
        + markdown_table(["network; batch; model", "1 GPU", *(f"{p} GPUs" for p in shown)], steps)
        + "\n\nThe number of GPUs (powers of two, – for none up to 1,024) at which the efficiency has fallen below 80 "
        "/ below 50 %, with one thing changed at a time; and how many batches must be accumulated for 80 % on 64:\n\n"
        + markdown_table(["network; batch; model", *predictions[0]["falls_below"], "batches for 80 %"], limits)
        + "\n\nEfficiency is the step on one GPU with the same setting, divided by the step on so many. It is not "
        "speed: graphs, which queue kernels at no cost, make every step shorter, and the exchange so much the more of "
        f"it. At the recipe's batch it is the queueing that takes the time, so that four times the batch takes no "
        "longer, and as efficiently computes four times as many reviews.\n\n"
        f"Assumed: {USED_FLOPS:.0%} of the peak of the matrix products and {USED_BANDWIDTH:.0%} of the bandwidths are "
        f"reached, {KERNELS_PER_BLOCK} kernels per block are queued in {1e6 * QUEUE_SECONDS:.0f} µs each, and a "
        f"message takes {1e6 * LATENCY_INSIDE:.0f} µs within a machine and {1e6 * LATENCY_INFINIBAND:.0f} or "
        f"{1e6 * LATENCY_ETHERNET:.0f} µs between two."
    )


def draw(predictions: Sequence[dict[str, Any]], path: Path) -> None:
    """Efficiency over devices, a panel for each network and batch, as `results/scale_model.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(9, 6), sharex=True, sharey=True, layout="constrained")
    panels = list(dict.fromkeys((each["cluster"], each["batch"]) for each in predictions))
    for axes, (cluster, batch) in zip(grid.flat, panels, strict=True):
        for each in predictions:
            if (each["cluster"], each["batch"]) == (cluster, batch):
                percent = [100 * value for value in each["efficiency"].values()]
                axes.semilogx(DEVICES, percent, "o-", base=2, markersize=3, label=each["model"])
        for threshold in THRESHOLDS:
            axes.axhline(100 * threshold, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=f"{cluster}, {batch}", ylim=(0, 105))
        axes.set_xticks(DEVICES, [str(p) for p in DEVICES])
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set(xlabel="H100 GPUs, eight in a machine")
    for axes in grid[:, 0]:
        axes.set(ylabel="efficiency (%)")
    grid[0, 0].legend(loc="lower left")
    figure.suptitle("Predicted, not measured: network between machines, batch per GPU")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
