"""Training, evaluation, prediction and generation on an emulated CUDA device: what they ask of it, and how often."""

import pytest

from ft.cli.main import main

pytestmark = pytest.mark.emulated_cuda


@pytest.fixture
def command(inputs, tmp_path):
    """The arguments of a run on the device."""
    _, model, _, dataset, *_ = inputs
    run = ["--model", model, "--dataset", dataset, "--device", "cuda", "--batch-size", "8", "--max-length", "16"]
    return [*run, "--output-dir", str(tmp_path / "run")]


def test_run(gpu, command):
    assert main([*command, "--max-steps", "4"]) == 0
    print(gpu.of("read", "fetch", "send", "slow send", "mix"))
    print(gpu.count("kernel"))
