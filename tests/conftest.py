"""What several test files share: the real files where they are present, the demo's, and parquet made on the spot.

The tests run from the repository's root without an installation, by `pytest` and by `python -m pytest` alike.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests import emulated_cuda  # noqa: E402  (before anything that imports PyTorch)

emulated_cuda.load()
sys.argv[0] = str(ROOT / "run.py")  # by which messages name the program

HUB = ROOT.parent / "shared" / "hub"


def present_or_skip(folder):
    if not folder.is_dir():
        pytest.skip(f"needs the published files in ../{folder.relative_to(ROOT.parent)}, beside the repository")
    return folder


@pytest.fixture(scope="session")
def real_dataset():
    """The folder with the 8530 + 1066 + 1066 reviews of rotten_tomatoes."""
    return present_or_skip(HUB / "datasets" / "cornell-movie-review-data" / "rotten_tomatoes")


@pytest.fixture(scope="session")
def real_gpt2():
    """The folder with the configuration and the tokenizer of GPT-2, without its weights."""
    return present_or_skip(HUB / "models" / "openai-community" / "gpt2")


@pytest.fixture(scope="session")
def demo_inputs(tmp_path_factory):
    """The demo's model folder and data set folder: a stand-in for the real ones that is made in a second."""
    from ft.data.demo import write_demo

    return write_demo(tmp_path_factory.mktemp("demo"))


def write_parquet(path, texts, labels, names=("neg", "pos")):
    """A split's file as the `datasets` library writes it; `texts` and `labels` are lists or pyarrow arrays."""
    metadata = None
    if names is not None:
        features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": names, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table({"text": texts, "label": labels}).replace_schema_metadata(metadata), path)
    return path


@pytest.fixture(scope="session")
def inputs(demo_inputs, tmp_path_factory):
    """A two-layer GPT-2 and the first reviews of the demo, 77 of them to train on, as arguments of the command line."""
    from tests.reference.synthetic import write_model

    model, dataset = demo_inputs
    config = json.loads((model / "config.json").read_text())
    ids = {name: config[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    tiny = write_model(tmp_path_factory.mktemp("tiny"), "tiny", seed=1, tokenizer_from=model, **ids)
    folder = tmp_path_factory.mktemp("data")
    for split, rows in (("train", 77), ("validation", 12), ("test", 4)):
        pq.write_table(pq.read_table(dataset / f"{split}.parquet").slice(0, rows), folder / f"{split}.parquet")
    return ["--model", str(tiny), "--dataset", str(folder), "--device", "cpu", "--learning-rate", "1e-3"]


@pytest.fixture
def gpu(monkeypatch):
    """An emulated CUDA device, in tests that are marked with `emulated_cuda`."""
    with emulated_cuda.make_gpu(monkeypatch) as gpu:
        yield gpu


def pytest_runtest_protocol(item, nextitem):
    """Has the tests that are marked with `emulated_cuda` run where there is such a device."""
    if item.get_closest_marker(emulated_cuda.MARK) is None or emulated_cuda.is_here():
        return None
    emulated_cuda.replay(item, nextitem)
    return True


class Reports:
    """Writes down what becomes of each test where there is an emulated device."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        emulated_cuda.write_report(report, self.config)


def pytest_configure(config):
    config.pluginmanager.register(Reports(config))


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where PyTorch finds none, and lift the time limit of what runs in the second pytest.

    The first emulated test to be reported waits for all of them; each has its limit there.
    """
    for item in items:
        if item.get_closest_marker(emulated_cuda.MARK) is not None and not emulated_cuda.is_here():
            item.add_marker(pytest.mark.timeout(0))
    needing = [item for item in items if item.get_closest_marker("cuda")]
    if needing:
        import torch

        if not torch.cuda.is_available():
            for item in needing:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """The name of each device that a test's body runs on."""
    return request.param
