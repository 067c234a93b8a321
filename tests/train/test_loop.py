"""The loop against the Hugging Face Trainer, and against itself interrupted, evaluated, recomputed and in fp16."""

import dataclasses
import json
import math
import shutil
from itertools import pairwise

import pytest
import torch

from ft.config import Config
from ft.errors import FtError
from ft.finetune import fine_tune
from ft.train.schedule import steps_per_epoch, total_steps, windows
from tests.reference.synthetic import write_model
from tests.reference.trainer import build_trainer


@pytest.fixture(scope="module")
def tiny_model(demo_inputs, tmp_path_factory):
    """A two-layer GPT-2 with the demo's tokenizer."""
    model, _ = demo_inputs
    config = json.loads((model / "config.json").read_text())
    ids = {name: config[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    return write_model(tmp_path_factory.mktemp("tiny"), "tiny", seed=1, tokenizer_from=model, **ids)


@pytest.fixture(scope="module")
def small_data(demo_inputs, tmp_path_factory):
    """The first reviews of the demo's data: 77 to train on, so that the last batch and the last window are short."""
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("data")
    for split, rows in (("train", 77), ("validation", 30), ("test", 20)):
        pq.write_table(pq.read_table(demo_inputs[1] / f"{split}.parquet").slice(0, rows), folder / f"{split}.parquet")
    return folder


@pytest.fixture
def run(tiny_model, small_data, tmp_path):
    """Run a job on the tiny model and the small data; returns the run directory."""

    def run(name="run", **settings):
        defaults = {
            "model": str(tiny_model),
            "dataset": str(small_data),
            "device": "cpu",
            "precision": "fp32",
            "learning_rate": 1e-3,
            "epochs": 2,
            "logging_steps": 1,
            "eval_steps": 1000,
            "save_steps": 1000,
        }
        fine_tune(Config(output_dir=str(tmp_path / name), **{**defaults, **settings}))
        return tmp_path / name

    return run


def events(folder, key="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def tensors(folder, name="model.safetensors"):
    from safetensors.torch import load_file

    return load_file(folder / name)


def same(a, b, files=("model.safetensors", "optimizer.safetensors", "rng.safetensors")):
    """Whether two checkpoints hold the same bytes."""
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in files)


def without_clock(folder):
    """The lines of metrics.jsonl without the fields that a clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def assert_parity(ours, theirs, bound=1e-4):
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine["step"] == reference.step
        assert mine["loss"] == pytest.approx(reference.loss, rel=bound), mine["step"]
        assert mine["grad_norm"] == pytest.approx(reference.grad_norm, rel=bound), mine["step"]
        assert mine["learning_rate"] == pytest.approx(reference.learning_rate, rel=1e-9)


@pytest.mark.parametrize(("accumulation", "epochs", "weight_decay"), [(1, 10, 0.0), (3, 25, 0.0), (1, 10, 0.1)])
def test_each_of_100_steps_equals_the_trainers(
    run, tiny_model, small_data, tmp_path, accumulation, epochs, weight_decay
):
    trainer, reference = build_trainer(
        tiny_model,
        small_data,
        tmp_path / "trainer",
        dropout=0.0,
        gradient_checkpointing=False,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        weight_decay=weight_decay,
        epochs=epochs,
    )
    trainer.train()
    folder = run(dropout=0.0, epochs=epochs, gradient_accumulation_steps=accumulation, weight_decay=weight_decay)
    ours = events(folder)
    assert len(ours) == {1: 100, 3: 100}[accumulation]
    assert_parity(ours, reference)
    final = tensors(folder / "final")
    for name, parameter in trainer.model.transformer.named_parameters():
        ours, theirs = final[name], parameter.detach()
        if name.endswith("c_attn.bias"):
            # Without the keys' bias: softmax ignores it, so that its gradient is rounding, which AdamW takes for real.
            ours, theirs = (torch.cat([bias[:64], bias[128:]]) for bias in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_100_steps_at_124m_parameters_equal_the_trainers(real_gpt2, real_dataset, tmp_path, accumulation):
    model = write_model(tmp_path / "gpt2", "gpt2", tokenizer_from=real_gpt2)
    steps = 100 // accumulation
    trainer, reference = build_trainer(
        model,
        real_dataset,
        tmp_path / "trainer",
        dropout=0.0,
        gradient_checkpointing=False,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
    )
    trainer.train()
    del trainer
    config = Config(
        model=str(model),
        dataset=str(real_dataset),
        output_dir=str(tmp_path / "run"),
        device="cpu",
        precision="fp32",
        dropout=0.0,
        max_steps=steps,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        eval_steps=1000,
        save_steps=1000,
    )
    fine_tune(config)
    assert_parity(events(tmp_path / "run"), reference)


def test_windows_hold_every_row_once_per_epoch_in_order():
    config = Config(batch_size=4, gradient_accumulation_steps=3, epochs=2)
    assert steps_per_epoch(37, config) == 4
    assert total_steps(37, config) == 8
    all_windows = list(windows(37, config, 0))
    assert [[len(batch) for batch in window] for window in all_windows] == [[4, 4, 4]] * 3 + [[1]] + [[4, 4, 4]] * 3 + [
        [1]
    ]
    for epoch in (0, 1):
        rows = [row for window in all_windows[4 * epoch : 4 * epoch + 4] for batch in window for row in batch]
        assert rows == torch.randperm(37, generator=torch.Generator().manual_seed(42 + epoch)).tolist()
    for first in range(9):
        assert list(windows(37, config, first)) == all_windows[first:]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(1.5, None, 15), (0.01, None, 1), (1, 3, 3), (1, 25, 25)]
)
def test_the_number_of_steps(run, epochs, max_steps, expected):
    folder = run(epochs=epochs, max_steps=max_steps)
    assert [event["step"] for event in events(folder)] == list(range(1, expected + 1))
    assert events(folder)[-1]["epoch"] == pytest.approx(expected / 10)


def test_logged_losses_are_means_over_their_steps(run):
    each = [event["loss"] for event in events(run("each"))]
    folder = run("some", logging_steps=7)
    means = [(event["step"], event["loss"]) for event in events(folder)]
    assert [step for step, _ in means] == [7, 14, 20]
    for step, mean in means:
        first = (step - 1) // 7 * 7
        assert mean == pytest.approx(sum(each[first:step]) / (step - first), rel=1e-6)


def test_evaluating_and_logging_leave_the_weights_as_they_are(run):
    plain = run("plain")
    busy = run("busy", eval_steps=3, logging_steps=2, eval_batch_size=7)
    assert same(plain / "checkpoint-20", busy / "checkpoint-20")
    assert [event["step"] for event in events(busy, "eval_loss")] == [3, 6, 9, 12, 15, 18, 20]


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activation_checkpointing_ends_in_the_same_weights(run, kind):
    assert same(run("none") / "checkpoint-20", run(kind, activation_checkpointing=kind) / "checkpoint-20")


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("stop", ["middle of an epoch", "its edge", "second epoch"])
def test_a_resumed_run_ends_in_the_same_bits(run, stop, precision, accumulation, monkeypatch):
    per_epoch = math.ceil(10 / accumulation)
    at = {"middle of an epoch": per_epoch // 2, "its edge": per_epoch, "second epoch": per_epoch + 1}[stop]
    settings = {
        "precision": precision,
        "gradient_accumulation_steps": accumulation,
        "save_steps": at,
        "eval_steps": 3,
        "logging_steps": 2,
        "keep_checkpoints": 100,
    }
    calm = run("calm", **settings)

    from ft.checkpoint.async_writer import AsyncWriter

    def save_and_break(self, snapshot):
        save(self, snapshot)
        self.wait()
        raise KeyboardInterrupt

    save = AsyncWriter.save
    with monkeypatch.context() as patch:
        patch.setattr(AsyncWriter, "save", save_and_break)
        with pytest.raises(KeyboardInterrupt):
            run("broken", **settings)
    with (run_folder := calm.parent / "broken").joinpath("metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "torn li')  # as if the run had gone on and broken off while writing
    torch.manual_seed(999)
    assert run("broken", resume="newest", **settings) == run_folder
    last = f"checkpoint-{2 * per_epoch}"
    assert same(calm / last, run_folder / last)
    assert without_clock(calm) == without_clock(run_folder)
    states = [json.loads((folder / last / "state.json").read_text()) for folder in (calm, run_folder)]
    for state in states:
        state.pop("seconds"), state.pop("metrics_bytes")
    assert states[0] == states[1]


def test_resume_without_a_checkpoint_starts_anew_and_a_finished_run_is_reported(run, capsys):
    folder = run(resume="newest")
    assert "No checkpoint" in capsys.readouterr().out
    before = (folder / "metrics.jsonl").read_bytes()
    run(resume="newest")
    assert "This run is finished: all 20 steps are done" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_resuming_from_an_older_checkpoint_repeats_the_same_steps(run):
    folder = run(save_steps=5, keep_checkpoints=10)
    expected = without_clock(folder)
    last = (folder / "checkpoint-20" / "model.safetensors").read_bytes()
    run(save_steps=5, keep_checkpoints=10, resume=str(folder / "checkpoint-10"))
    assert without_clock(folder) == expected
    assert (folder / "checkpoint-20" / "model.safetensors").read_bytes() == last


def test_only_the_newest_checkpoints_are_kept(run):
    folder = run(save_steps=3, keep_checkpoints=2)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-18", "checkpoint-20"]
    assert not list(folder.glob(".unfinished-*"))


def test_resume_refuses_settings_that_make_it_another_run(run):
    run(epochs=1)
    with pytest.raises(FtError, match=r"--learning-rate was 0.001 and would be 0.5"):
        run(epochs=1, learning_rate=0.5, resume="newest")
    run(epochs=1, resume="newest", eval_batch_size=3, logging_steps=9)


def test_bf16_and_fp16_losses_track_fp32(run, monkeypatch):
    """Within 2 % over 20 steps, from a loss scale at which fp16 skips none of them."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **options: scaler(*a, init_scale=1024.0, **options))
    settings = {"dropout": 0.0, "learning_rate": 1e-4}
    expected = [event["loss"] for event in events(run("fp32", **settings))]
    for precision in ("bf16", "fp16"):
        losses = [event["loss"] for event in events(run(precision, precision=precision, **settings))]
        assert losses == pytest.approx(expected, rel=0.02)
        assert losses != expected
        assert losses[0] == pytest.approx(expected[0], rel=1e-3)


def test_a_step_that_fp16_skips_is_logged_without_a_norm(run, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **options: scaler(*a, init_scale=2.0**40, **options))
    folder = run(precision="fp16", max_steps=30)
    norms = [event["grad_norm"] for event in events(folder)]
    assert norms[0] is None
    assert norms[-1] > 0
    assert "Infinity" not in (folder / "metrics.jsonl").read_text()
    states = [json.loads((folder / "checkpoint-30" / "state.json").read_text())["grad_scaler"]["scale"]]
    assert states[0] <= 2.0 ** (40 - norms.count(None))


def test_fp16_saves_its_loss_scale_and_survives_the_first_overflows(run):
    folder = run(precision="fp16")
    scale = json.loads((folder / "checkpoint-20" / "state.json").read_text())["grad_scaler"]["scale"]
    assert 0 < scale <= 65536.0
    assert events(folder)[-1]["loss"] < events(folder)[0]["loss"]


@pytest.mark.parametrize("at", [4, 10, 17])
def test_a_changing_loss_scale_is_resumed(run, monkeypatch, at):
    """It falls at first, while gradients overflow, and rises again after every third step without one."""
    scaler = torch.amp.GradScaler

    def moving(*arguments, **options):
        return scaler(*arguments, init_scale=2.0**30, growth_interval=3, **options)

    monkeypatch.setattr(torch.amp, "GradScaler", moving)
    settings = {"precision": "fp16", "save_steps": 1, "keep_checkpoints": 100, "eval_steps": 3}
    folder = run(**settings)
    states = [json.loads((folder / f"checkpoint-{step}" / "state.json").read_text()) for step in range(1, 21)]
    scales = [state["grad_scaler"]["scale"] for state in states]
    assert any(a > b for a, b in pairwise(scales[:at]))
    assert any(a < b for a, b in pairwise(scales[at - 1 :]))
    expected = without_clock(folder)
    shutil.copytree(folder / "checkpoint-20", folder.parent / "expected")
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run(resume=str(folder / f"checkpoint-{at}"), **settings)
    assert same(folder / "checkpoint-20", folder.parent / "expected")
    assert json.loads((folder / "checkpoint-20" / "state.json").read_text())["grad_scaler"] == states[-1]["grad_scaler"]
    assert without_clock(folder) == expected


def test_the_seed_decides_order_and_dropout(run):
    first = run("first")
    assert same(first / "checkpoint-20", run("again") / "checkpoint-20")
    assert not same(first / "checkpoint-20", run("other", seed=7) / "checkpoint-20", ["model.safetensors"])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere."),
        MemoryError(),
    ],
)
def test_out_of_memory_names_settings_that_need_less(run, error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("ft.model.gpt2.Block.forward", fail)
    with pytest.raises(FtError, match=r"out of memory with --batch-size 8.*--activation-checkpointing full"):
        run()


def test_other_errors_inside_the_loop_keep_their_traceback(run, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr("ft.model.gpt2.Block.forward", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run()


def test_a_run_from_random_weights_learns(run):
    losses = [event["loss"] for event in events(run(init="random", epochs=10))]
    assert losses[0] == pytest.approx(math.log(800), rel=0.2), "at first every token is about as likely as any other"
    assert losses[-1] < 1.0


def test_the_configuration_of_a_run_reproduces_it(run, tmp_path):
    from ft.cli.arguments import read_arguments

    folder = run()
    again = read_arguments(["--config", str(folder / "config.json"), "--output-dir", str(tmp_path / "again")])
    assert dataclasses.replace(again, output_dir=str(folder)) == read_arguments(
        ["--config", str(folder / "config.json")]
    )
    fine_tune(again)
    assert same(folder / "checkpoint-20", tmp_path / "again" / "checkpoint-20")


def test_a_longer_run_resumes_and_reports_the_new_schedule(run, capsys):
    run(epochs=1)
    capsys.readouterr()
    folder = run(epochs=2, resume="newest")
    output = capsys.readouterr().out
    assert "Continuing after step 10" in output
    assert (
        "The run becomes longer: 20 steps instead of 10. From here on the learning rate now falls to 0 at step 20"
        in (output)
    )
    rates = {event["step"]: event["learning_rate"] for event in events(folder)}
    assert rates[10] == pytest.approx(1e-3 * 1 / 10)
    assert rates[11] == pytest.approx(1e-3 * 10 / 20)
    assert rates[20] == pytest.approx(1e-3 * 1 / 20)
    assert [event["step"] for event in events(folder)] == list(range(1, 21))
    assert json.loads((folder / "config.json").read_text())["epochs"] == 2


def test_a_run_cannot_become_shorter(run):
    run(epochs=2)
    with pytest.raises(FtError, match=r"--epochs would end the run after 10 steps, it was planned for 20"):
        run(epochs=1, resume="newest")
    with pytest.raises(FtError, match=r"--max-steps would end the run after 15 steps"):
        run(epochs=2, max_steps=15, resume="newest")


def test_of_a_constant_rate_a_longer_run_keeps_it(run, capsys):
    run(epochs=1, lr_schedule="constant")
    run(epochs=2, lr_schedule="constant", resume="newest")
    assert "the learning rate stays as it is" in capsys.readouterr().out
