"""Speed-up by several processes, the cost of their communication, and its overlap with the backward pass.

    python -m benchmarks.distributed

The step is that of `ft.train.train`, with the model's own dropout, in fp32, from random weights. Every process takes 8
reviews of random tokens that are as long as real ones, and computes with one thread. The processes are started here as
torchrun would start them, and are new for each measurement. The cases take turns:

    one      a process by itself
    apart    several at a time, each training a model of its own: what sharing memory and caches costs, without exchange
    ddp      several that exchange their gradients (DistributedDataParallel)
    bf16     the same, with gradients sent as bf16
    shard    several that hold a part of the weights, gradients and moments each (fully_shard)
    release  the same, with freed memory returned to the system (--release-memory)
    threads  one process with as many threads as the others are processes, on all their reviews

In every case a process reads the same reviews in the same order, so that differences of time are not of the data.

With p processes and G bytes of gradients, a ring all-reduce has each of them send 2 (p - 1) / p G a step (Patarasuk &
Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). A sharded model fetches the weights
of its blocks for the forward pass and again for the backward pass, and sends its gradients to where they belong: 3
times (p - 1) / p of their bytes. What is in no block, the embeddings, stays after the forward pass: 2 times. gloo,
which connects CPUs, sends gradients to where they belong by an all-reduce, of which each process keeps its part: once
more in both cases. What the processes really send is what the kernel counts on the loopback interface (Linux only),
through which all of it goes; the traffic of other programs is counted too.
"""

import os
import socket
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import benchmark_parser, markdown_table, peak_memory, picture_path, write_result
from benchmarks.step import (
    FP32,
    GIB,
    WARM_UP,
    parameter_count,
    random_examples,
    review_like_lengths,
    timed_steps,
)
from ft.config import Config
from ft.data.batches import epoch_order
from ft.data.examples import Example
from ft.device import disable_malloc_trim
from ft.distributed.launch import process_group
from ft.distributed.ranks import SINGLE_PROCESS, Ranks
from ft.model.gpt2 import GPT2, GPT2Config
from ft.train.optim import build_optimizer
from tests.reference.synthetic import SIZES, model_config

PARTS = {"forward": ("data", "forward"), "backward": ("backward",), "update": ("clip", "AdamW", "other")}
EXCHANGES = 7  # how often the buckets are exchanged by themselves, after once that does not count
TIMEOUT = 600.0  # seconds for which a process waits for another
FP32_BYTES, BF16_BYTES = 4, 2
MB = 1e6


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        key: its name in the results.
        label: its name in the table.
        processes: how many.
        threads: of each.
        reviews: per step and process.
        exchanges: whether the processes train one model, or each its own.
        bf16_gradients: as the flag of the program.
        shard: as the flag of the program.
        release_memory: as the flag of the program.
    """

    key: str
    label: str
    processes: int
    threads: int
    reviews: int
    exchanges: bool = True
    bf16_gradients: bool = False
    shard: bool = False
    release_memory: bool = False

    @property
    def cores(self) -> int:
        """How many cores it computes on."""
        return self.processes * self.threads


def cases_of(processes: int, reviews: int) -> list[Case]:
    """The cases of the docstring above."""
    several = f"{processes} processes"
    return [
        Case("one", "1 process", 1, 1, reviews),
        Case("apart", f"{several}, nothing exchanged", processes, 1, reviews, exchanges=False),
        Case("ddp", several, processes, 1, reviews),
        Case("bf16", f"{several}, bf16 gradients", processes, 1, reviews, bf16_gradients=True),
        Case("shard", f"{several}, sharded", processes, 1, reviews, shard=True),
        Case(
            "release", f"{several}, sharded, --release-memory", processes, 1, reviews, shard=True, release_memory=True
        ),
        Case(
            "threads", f"1 process, {processes} threads, batch {processes * reviews}", 1, processes, processes * reviews
        ),
    ]


def main() -> None:
    """Measure the cases in turns, and write table and picture."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--processes", type=int, default=2, help="two or more, for each of which there is a core")
    parser.add_argument("--batch-size", type=int, default=8, help="reviews per process and step")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each measurement, after a warm-up")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each case")
    options = parser.parse_args()
    if not 2 <= options.processes <= (os.cpu_count() or 1):
        parser.error(f"--processes must be from 2 to the number of cores, {os.cpu_count()}")

    cases = cases_of(options.processes, options.batch_size)
    measured: dict[str, list[list[dict[str, Any]]]] = {case.key: [] for case in cases}  # by round and process
    for _ in range(options.rounds):
        for case in cases:
            processes = measure(case, options.processes * options.batch_size, options.size, options.steps)
            measured[case.key].append(processes)
            print(f"{case.label}: {slowest_seconds([processes]):.3f} s", flush=True)

    summaries = {case.key: summary(case, measured[case.key]) for case in cases}
    figures = {
        "size": options.size,
        "processes": options.processes,
        "reviews_per_process": options.batch_size,
        "timed_steps": options.steps,
        "rounds": options.rounds,
        "gradient_bytes": FP32_BYTES * measured["ddp"][0][0]["parameters"],
        "bucket_bytes": measured["ddp"][0][0]["bucket_bytes"],
        "cases": {case.key: summaries[case.key] | comparison(case, summaries) for case in cases},
    }
    draw(figures, cases, picture_path(options.output, "distributed"))
    write_result(options.output, "distributed", figures, table(figures, cases))


def measure(case: Case, together: int, size: str, steps: int) -> list[dict[str, Any]]:
    """What `run` returns in each process of a case, by rank."""
    port = free_port()
    with ProcessPoolExecutor(case.processes, mp_context=get_context("spawn")) as pool:
        arguments = (case, together, size, steps, port)
        return [future.result() for future in [pool.submit(run, rank, *arguments) for rank in range(case.processes)]]


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(rank: int, case: Case, together: int, size: str, steps: int, port: int) -> dict[str, Any]:
    """Train for `steps` after the warm-up, as process `rank` of a case.

    Returns:
        steps: seconds of each step by part, the warm-up left out. sent_bytes: per step and process, over all steps.
        peak_bytes: the most memory of this process. parameters, block_parameters: of the whole model, and what of it
        is in blocks. bucket_bytes: gradients of each bucket of DistributedDataParallel, in the order in which they
        are sent. exchange_seconds: of the exchange of these buckets when nothing else is done.
    """
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in places.items()} | {"WORLD_SIZE": str(case.processes)}
    torch.set_num_threads(case.threads)
    if not case.release_memory:
        disable_malloc_trim()
    config = GPT2Config.from_dict(model_config(size))
    with process_group(FP32.device, TIMEOUT) as ranks:
        trained_by = ranks if case.exchanges else SINGLE_PROCESS
        model = GPT2(config)
        model.init_weights(seed=42)
        parameters, block_parameters = parameter_count(model), parameter_count(model.h)
        parallel = trained_by.parallelize(model, FP32.device, shard=case.shard, bf16_gradients=case.bf16_gradients)
        optimizer = build_optimizer(model, learning_rate=2e-5, weight_decay=0.0)
        torch.manual_seed(42 + rank)
        examples = own_reviews(case, rank, together, steps, config.vocab_size)

        ranks.all_reduce_max(0)  # a barrier
        sent_before = sent_bytes()
        seconds = timed_steps(parallel, optimizer, examples, case.reviews, trained_by)
        ranks.all_reduce_max(0)
        sent = (sent_bytes() - sent_before) / len(seconds) / case.processes
        peak = peak_memory()  # of the training: the buckets below come on top

        is_ddp = isinstance(parallel, torch.nn.parallel.DistributedDataParallel)
        buckets = bucket_bytes(parallel) if is_ddp else []
        return {
            "steps": seconds[WARM_UP:],
            "sent_bytes": sent,
            "peak_bytes": peak,
            "parameters": parameters,
            "block_parameters": block_parameters,
            "bucket_bytes": buckets,
            "exchange_seconds": exchange_seconds(buckets, case.bf16_gradients, ranks) if is_ddp else [],
        }


def own_reviews(case: Case, rank: int, together: int, steps: int, vocab_size: int) -> list[Example]:
    """The reviews for `timed_steps` in process `rank`, placed so that the loop, with its own order, reads them in turn.

    Processes that train one model have one list of `together` reviews a step, of which the loop gives each its share.
    One that trains by itself has that share as its list.
    """
    reviews = random_examples(review_like_lengths(together * (WARM_UP + steps)), vocab_size)
    lists = together // (case.reviews * case.processes if case.exchanges else case.reviews)
    own = reviews[rank % lists :: lists]
    placed = dict(zip(epoch_order(len(own), Config().seed, epoch=0), own, strict=True))
    return [placed[row] for row in range(len(own))]


def sent_bytes() -> int:
    """Bytes that the loopback interface has sent so far, of all programs (Linux only)."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    counters = next(line for line in lines if line.strip().startswith("lo:")).partition(":")[2].split()
    return int(counters[8])  # the first of what was transmitted


def bucket_bytes(parallel: torch.nn.parallel.DistributedDataParallel) -> list[int]:
    """Bytes of gradients in each bucket, in the order in which they are sent: that of the backward pass."""
    return [int(number) for number in parallel._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")]


def exchange_seconds(buckets: Sequence[int], bf16: bool, ranks: Ranks) -> list[float]:
    """Seconds of each of several exchanges of all buckets, queued at once, while nothing is computed.

    What is sent in bf16 is converted and converted back, as the hook of DistributedDataParallel does it.
    """
    gradients = [torch.ones(size // FP32_BYTES) for size in buckets]
    seconds = []
    for _ in range(1 + EXCHANGES):
        ranks.all_reduce_max(0)
        started = time.perf_counter()
        queued = []
        for gradient in gradients:
            sent = gradient.bfloat16().div_(ranks.size) if bf16 else gradient
            queued.append((torch.distributed.all_reduce(sent, async_op=True), sent, gradient))
        for work, sent, gradient in queued:
            work.wait()
            if bf16:
                gradient.copy_(sent)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def slowest_seconds(rounds: Sequence[Sequence[dict[str, Any]]]) -> float:
    """The median over all steps of the time that the slowest process took for it."""
    return statistics.median(
        max(sum(step.values()) for step in same_step)
        for processes in rounds
        for same_step in zip(*(process["steps"] for process in processes), strict=True)
    )


def summary(case: Case, rounds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of a case by itself, from what `run` returned in each process of each round."""
    processes = [process for each_round in rounds for process in each_round]
    steps = [step for process in processes for step in process["steps"]]
    step_seconds = slowest_seconds(rounds)
    alone = [seconds for process in processes for seconds in process["exchange_seconds"]]
    return {
        "step_seconds": step_seconds,
        "step_seconds_by_round": [slowest_seconds([each_round]) for each_round in rounds],
        "process_step_seconds": statistics.median(sum(step.values()) for step in steps),
        "part_seconds": {
            name: statistics.median(sum(step[part] for part in parts) for step in steps)
            for name, parts in PARTS.items()
        },
        "reviews_per_second": case.reviews * case.processes / step_seconds,
        "peak_bytes": max(process["peak_bytes"] for process in processes),
        "sent_bytes": min(process["sent_bytes"] for process in processes),  # what others send can only add to it
        "needed_bytes": needed_bytes(case, processes[0]["parameters"], processes[0]["block_parameters"]),
        "exchange_seconds": statistics.median(alone) if alone else None,
    }


def needed_bytes(case: Case, parameters: int, block_parameters: int) -> float:
    """Bytes that each process must send in a step, by the formulas of the docstring above."""
    share = (case.processes - 1) / case.processes if case.exchanges else 0.0
    if case.shard:
        return share * FP32_BYTES * (3 * block_parameters + 2 * (parameters - block_parameters))
    return share * 2 * parameters * (BF16_BYTES if case.bf16_gradients else FP32_BYTES)


def comparison(case: Case, summaries: dict[str, Any]) -> dict[str, float | None]:
    """The figures of a case that others are needed for; None where they have no meaning."""
    own, one, apart = (summaries[key] for key in (case.key, "one", "apart"))
    exposed = own["step_seconds"] - apart["step_seconds"] if case.processes > 1 and case.exchanges else None
    alone = own["exchange_seconds"]
    return {
        "efficiency": own["reviews_per_second"] / (case.cores * one["reviews_per_second"]),
        "exposed_seconds": exposed,
        "overlap": 1 - exposed / alone if exposed is not None and alone else None,
    }


def table(figures: dict[str, Any], cases: Sequence[Case]) -> str:
    """What the steps take, what the exchange takes, and what the columns mean."""
    summaries = figures["cases"]
    times, exchanges = [], []
    for case in cases:
        own = summaries[case.key]
        parts = [f"{1e3 * own['part_seconds'][part]:.0f}" for part in PARTS]
        speed = [f"{own['reviews_per_second']:.2f}", f"{own['efficiency']:.0%}", f"{own['peak_bytes'] / GIB:.2f}"]
        times.append([case.label, f"{1e3 * own['step_seconds']:.0f}", *parts, *speed])
        if own["exposed_seconds"] is not None:
            alone, overlap = own["exchange_seconds"], own["overlap"]
            exchanges.append(
                [
                    case.label,
                    f"{own['sent_bytes'] / MB:.1f}",
                    f"{own['needed_bytes'] / MB:.1f}",
                    "–" if alone is None else f"{1e3 * alone:.0f}",
                    f"{1e3 * own['exposed_seconds']:.0f}",
                    "–" if overlap is None else f"{overlap:.0%}",
                ]
            )
    apart = summaries["apart"]
    waiting = apart["step_seconds"] - apart["process_step_seconds"]
    return (
        markdown_table(["", "step (ms)", *PARTS, "examples/s", "efficiency", "peak (GiB)"], times)
        + "\n\n"
        + markdown_table(
            ["", "sent (MB)", "needed (MB)", "exchange alone (ms)", "exposed (ms)", "overlap"],
            exchanges,
        )
        + f"\n\n{figures['size']}, {figures['reviews_per_process']} reviews per process and step, fp32, one thread per "
        f"process but in the last row. Medians of {figures['rounds']} x {figures['timed_steps']} steps.\n\n"
        "- step: of the slowest process, for which the others wait. Without communication no process waits, but the "
        f"slowest counts there too, which makes {1e3 * waiting:.0f} ms of that row: batches are not equally long. The "
        "parts, in ms, are those of all processes. backward has the exchange as far as it is waited for; of the "
        "sharded model forward has it too.\n"
        "- efficiency: examples/s, divided by the number of cores and by the examples/s of 1 process.\n"
        "- peak: the most memory that any process held, from its start to its last step.\n"
        "- sent: what the loopback interface carried per step and process, in the round with the least. needed: what "
        f"a ring needs, 2 (p - 1) / p times the gradients' {figures['gradient_bytes'] / MB:.1f} MB, half of that in "
        "bf16; of the sharded model 3 (p - 1) / p times the bytes of its blocks and 2 (p - 1) / p times those of its "
        "embeddings, of which gloo sends 4 and 3.\n"
        f"- exchange alone: of the same {len(figures['bucket_bytes'])} buckets, the largest of "
        f"{max(figures['bucket_bytes']) / MB:.1f} MB, while nothing is computed. exposed: the step less that of the "
        "row where nothing is exchanged. overlap: 1 - exposed / alone, the part of the exchange that takes no time of "
        "its own. The cores that exchange are those that compute, and gradients are also copied into the buckets, so "
        "that it can be below 0."
    )


def draw(figures: dict[str, Any], cases: Sequence[Case], path: Path) -> None:
    """A bar for each case, made of the parts of its step, as `results/distributed.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summaries = [figures["cases"][case.key] for case in cases]
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    lefts = [0.0] * len(cases)
    for part in PARTS:
        widths = [1e3 * own["part_seconds"][part] for own in summaries]
        axes.barh([case.label for case in cases], widths, left=lefts, label=part)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, (end, own) in enumerate(zip(lefts, summaries, strict=True)):
        axes.text(end, place, f" {own['reviews_per_second']:.1f} examples/s, {own['efficiency']:.0%}", va="center")
    axes.set(xlabel="ms per step", title=f"{figures['size']}, {figures['reviews_per_process']} reviews per process")
    axes.set_xlim(right=1.4 * max(lefts))  # room for what is written behind the bars
    axes.invert_yaxis()
    axes.legend(ncols=len(PARTS), loc="upper center", bbox_to_anchor=(0.4, -0.18), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
