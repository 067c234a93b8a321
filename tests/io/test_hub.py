"""Files from a local folder, and through the real Hub client from a Hub on 127.0.0.1 that can be told to misbehave.

The client reads its environment when it is imported, so each test with a Hub runs it in a process of its own; there
`time.sleep` returns at once, for the client waits for up to half a minute between its attempts.
"""

import io
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ft.data.dataset_files import dataset_files, save_dataset
from ft.errors import FtError
from ft.io.model_layout import ModelFiles, model_files
from ft.io.stall import StalledError, run_with_stall_timeout
from tests.hub_server import Fault, HubServer, Repository, cdn_path

ROOT = Path(__file__).parents[2]
CALLS = """
import dataclasses, json, os, sys, time
time.sleep = lambda seconds: None
from ft.data.dataset_files import dataset_files, save_dataset
from ft.errors import FtError
from ft.io import hub, stall
from ft.io.model_layout import model_files
hub.STALL = float(os.environ.get("STALL", hub.STALL))
stall.SILENCE = stall.INTERVAL = 0.2
if "LARGEST_FILE" in os.environ:  # writing more fails as it does on a full disk
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LARGEST_FILE"]),) * 2)
results = []
for name, arguments, options in json.loads(sys.argv[1]):
    try:
        result = globals()[name](*arguments, **options)
    except FtError as error:
        result = {"error": str(error), "cause": type(error.__cause__).__name__}
    results.append(dataclasses.asdict(result) if name == "model_files" and not isinstance(result, dict) else result)
chunk = getattr(sys.modules.get("huggingface_hub.constants"), "DOWNLOAD_CHUNK_SIZE", None)
print(json.dumps({"results": results, "modules": list(sys.modules), "chunk": chunk}, default=str))
"""


def tensors(seed=0, size=300):
    """Bytes that begin as safetensors do; the Hub and its client look no further."""
    return b"\x02" + bytes(7) + b"{}" + random.Random(seed).randbytes(size)


def table(*texts):
    out = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts), "label": [0] * len(texts)}), out)
    return out.getvalue()


CONFIG, TOKENIZER, WEIGHTS = b'{"n_layer": 2}', b'{"version": "1.0"}', tensors()
MODEL = {"config.json": CONFIG, "tokenizer.json": TOKENIZER, "model.safetensors": WEIGHTS}
SHARDS = {"model-00001-of-00002.safetensors": tensors(1), "model-00002-of-00002.safetensors": tensors(2)}
TRAIN, VALIDATION, TEST = table("a film", "a mess"), table("so so"), table("at last")
DATASET = {"train.parquet": TRAIN, "validation.parquet": VALIDATION, "test.parquet": TEST, "README.md": b"# reviews"}


def index(*names):
    return json.dumps({"weight_map": {f"h.{i}.weight": name for i, name in enumerate(names)}}).encode()


@pytest.fixture
def hub():
    with HubServer() as server:
        server.repositories = {
            "models/owner/gpt": Repository(MODEL | {"pytorch_model.bin": b"pickle", "README.md": b"# GPT"}),
            "datasets/owner/reviews": Repository(DATASET),
        }
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """Call functions of `ft.hub` in a fresh process: `run(("model_files", "owner/gpt"), HF_HUB_OFFLINE="1")`."""

    def run(*calls, cwd=None, **environment):
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "SYSTEMROOT", "LANG")}
        defaults = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
        spec = [(name, [a for a in rest if not isinstance(a, dict)], rest[-1] if isinstance(rest[-1], dict) else {})
                for name, *rest in calls]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", CALLS, json.dumps(spec)],
            env=kept | defaults | environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        run.stderr, output = done.stderr, json.loads(done.stdout)
        run.modules, run.chunk = set(output["modules"]), output["chunk"]
        for result in output["results"]:
            if "error" in result:
                assert "\n" not in result["error"]
                assert not re.search("Error|signature|force_download", result["error"])
        return output["results"] if len(calls) > 1 else output["results"][0]

    return run


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(files):
    """The bytes behind the paths of a result."""
    if isinstance(files, dict):
        return {key: contents(value) for key, value in files.items() if key != "source"}
    return [contents(file) for file in files] if isinstance(files, list | tuple) else Path(files).read_bytes()


IN_FULL = {"config": CONFIG, "tokenizer": {"tokenizer.json": TOKENIZER}, "weights": [WEIGHTS]}


# --- a local folder ---------------------------------------------------------------------------------------------------


def test_a_folder_is_read_where_it_is(tmp_path):
    folder = put(tmp_path / "m", MODEL)
    expected = ModelFiles(
        str(folder),
        folder / "config.json",
        {"tokenizer.json": folder / "tokenizer.json"},
        (folder / "model.safetensors",),
    )
    assert model_files(str(folder)) == expected


def test_weights_are_neither_looked_for_nor_returned_where_not_asked_for(tmp_path):
    folder = put(tmp_path / "m", {"config.json": CONFIG, "tokenizer.json": TOKENIZER})
    assert model_files(str(folder), with_weights=False).weights == ()
    with pytest.raises(FtError, match=r"no model\.safetensors.*pytorch_model\.bin.*convert"):
        model_files(str(folder))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path, missing):
    folder = put(tmp_path / "m", {name: content for name, content in MODEL.items() if name != missing})
    with pytest.raises(FtError, match=f"{folder} has no {missing}: .*--model"):
        model_files(str(folder))


def test_home_and_relative_folders(tmp_path, monkeypatch):
    put(tmp_path / "m", MODEL)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/m", "./m", "m", "../" + tmp_path.name + "/m"):
        assert contents(model_files(name).weights) == [WEIGHTS]


@pytest.mark.parametrize("name", ["/no/where", "./m", "~/nowhere-at-all", "a/b/c", "C:\\m", "", "a b", "x--y", "file"])
def test_a_name_that_is_neither_a_directory_nor_a_hub_id_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(put(tmp_path, {"file": b""}))
    name = name.replace("file", str(tmp_path / "file"))
    with pytest.raises(FtError, match=r"there is no directory .* check --model"):
        model_files(name)
    refused = "whose format is not supported" if name.endswith("file") else "there is no directory .* check --dataset"
    with pytest.raises(FtError, match=refused):
        dataset_files(name)


def test_a_revision_of_a_folder_is_refused(tmp_path):
    with pytest.raises(FtError, match="leave out --model-revision"):
        model_files(str(put(tmp_path / "m", MODEL)), "main")
    with pytest.raises(FtError, match="leave out --dataset-revision"):
        dataset_files(str(put(tmp_path / "d", DATASET)), "main")


ABOUT = {"tokenizer_config.json": b"{}", "special_tokens_map.json": b"{}", "chat_template.jinja": b"{{ messages }}"}
PARTS = {"vocab.json": b'{"a": 0}', "merges.txt": b"#version: 0.2\n"}


def test_what_is_said_of_a_tokenizer_comes_along(tmp_path):
    folder = put(tmp_path / "m", {**MODEL, **PARTS, **ABOUT})
    assert contents(model_files(str(folder)).tokenizer) == {"tokenizer.json": TOKENIZER, **ABOUT}
    (folder / "tokenizer.json").unlink()
    assert contents(model_files(str(folder)).tokenizer) == {**PARTS, **ABOUT}
    (folder / "merges.txt").unlink()
    with pytest.raises(FtError, match=r"has no tokenizer\.json: "):
        model_files(str(folder))


def test_what_is_said_of_a_tokenizer_comes_from_the_hub_and_its_cache(run, hub):
    files = {name: content for name, content in MODEL.items() if name != "tokenizer.json"}
    hub.repositories["models/owner/parts"] = Repository({**files, **PARTS, **ABOUT, "evil.py": b"print()"})
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        found = run(("model_files", "owner/parts"), **environment)
        assert contents(found["tokenizer"]) == {**PARTS, **ABOUT}


def test_shards_come_in_order_and_beside_no_single_file(tmp_path):
    names = sorted(SHARDS)
    files = {**MODEL, **SHARDS, "model.safetensors.index.json": index(names[1], names[0], names[1])}
    folder = put(tmp_path / "m", files)
    assert contents(model_files(str(folder)).weights) == [WEIGHTS]  # the single file, where there are both
    (folder / "model.safetensors").unlink()
    assert [path.name for path in model_files(str(folder)).weights] == names
    (folder / names[1]).unlink()
    with pytest.raises(FtError, match=f"has no {names[1]}"):
        model_files(str(folder))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", "", ".x.safetensors",
     "pytorch_model.bin", "C:x.safetensors", 3, "x.safetensors\n", "*.safetensors"],
)  # fmt: skip
def test_an_index_must_name_plain_files(tmp_path, name):
    put(tmp_path, {"x.safetensors": WEIGHTS, "m/a/b.safetensors": WEIGHTS, "m/pytorch_model.bin": b"pickle"})
    files = {"config.json": CONFIG, "tokenizer.json": TOKENIZER, "model.safetensors.index.json": index(name)}
    with pytest.raises(FtError, match=r"index\.json lists .* not the name of a \.safetensors file beside it"):
        model_files(str(put(tmp_path / "m", files)))


@pytest.mark.parametrize("content", [b"{", b'{"weight_map": 3}', b"{}", b'{"weight_map": {"a": []}}', b"{\xff"])
def test_a_broken_index_is_named(tmp_path, content):
    files = {"config.json": CONFIG, "tokenizer.json": TOKENIZER, "model.safetensors.index.json": content}
    with pytest.raises(FtError, match=r"model\.safetensors\.index\.json is not an index"):
        model_files(str(put(tmp_path / "m", files)))


@pytest.mark.parametrize("name", [*MODEL, "train.parquet"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html><head><title>Log in", "it begins with b'<!DOCTYPE"),
        (b"", "it begins with b''"),
    ],
)
def test_a_stand_in_for_a_file_is_named(tmp_path, name, content, message):
    folder = put(tmp_path, MODEL | {"train.parquet": TRAIN, name: content})
    with pytest.raises(FtError, match=f"{name} is .*{message}"):
        dataset_files(str(folder)) if name == "train.parquet" else model_files(str(folder))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    folder = put(tmp_path / "m", MODEL)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(FtError, match=f"cannot read {folder}, named by --model: Permission denied"):
        model_files(str(folder))


# --- the splits of a data set -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "data/", "plain_text/"])
@pytest.mark.parametrize("word", ["validation", "valid", "val", "dev"])
def test_splits_as_the_hub_lays_them_out(tmp_path, prefix, word):
    files = {
        f"{prefix}train-00001-of-00002.parquet": table("second"),
        f"{prefix}train-00000-of-00002.parquet": table("first"),
        f"{prefix}{word}.parquet": VALIDATION,
        f"{prefix}test-00000-of-00001-0a1b2c3d4e5f6071.parquet": TEST,
        f"{prefix}unsupervised.parquet": table("no split of ours"),
        f"{prefix}training.parquet": table("nor this"),
        "README.md": b"# reviews",
    }
    found = dataset_files(str(put(tmp_path, files)))
    assert list(found) == ["train", "validation", "test"]
    assert contents(found) == {
        "train": [table("first"), table("second")], "validation": [VALIDATION], "test": [TEST],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test.parquet"], "no training split.*--dataset"),
        (["train.txt", "train.xlsx"], "no training split.*--dataset"),
        (["train.csv", "train.parquet"], "several files for the same part of train"),
        (
            ["train-00000-of-00003.parquet"],
            r"lacks 2 of the 3 .* train: train-00001-of-00003.parquet, train-00002-of-00003.parquet\.$",
        ),
        (
            ["train.parquet", "dev-00001-of-00002.parquet"],
            r"lacks 1 of the 2 .* validation: dev-00000-of-00002.parquet\.$",
        ),
        (
            ["train-00000-of-99999.parquet"],
            r"lacks 99998 of the 99999 shards of train: .*-00003-of-99999.parquet, \.\.\.\.$",
        ),
        (["a/train.parquet", "b/train.parquet"], "several data sets, in a, b"),
        (["a/train.parquet", "b/test.parquet"], "several data sets, in a, b"),
        (["train.parquet", "train-00000-of-00001.parquet"], "several files for the same part of train"),
        (["train.parquet", "dev.parquet", "validation.parquet"], r"same part of validation: dev.parquet, validation"),
        (["train-00000-of-00001-aa.parquet", "train-00000-of-00001-bb.parquet"], "same part of train"),
    ],
)
def test_incomplete_or_ambiguous_splits_are_named(tmp_path, names, message):
    folder = put(tmp_path, dict.fromkeys(names, TRAIN))
    with pytest.raises(FtError, match=message):
        dataset_files(str(folder))


def test_a_saved_data_set_reads_back_byte_for_byte(tmp_path):
    shards = {f"data/train-0000{i}-of-00003.parquet": table(str(i)) for i in range(3)}
    files = dataset_files(str(put(tmp_path / "d", shards | {"data/dev.parquet": VALIDATION})))
    copy = tmp_path / "new" / "copy"
    save_dataset(files, copy)
    assert contents(dataset_files(str(copy))) == contents(files)
    with pytest.raises(FtError, match="not empty"):
        save_dataset(files, copy)


def test_a_copy_that_fails_leaves_no_half_a_data_set(tmp_path):
    files = dataset_files(str(put(tmp_path / "d", DATASET)))
    (tmp_path / "d" / "test.parquet").unlink()
    with pytest.raises(FtError, match=r"cannot save the data set in .*copy: No such file"):
        save_dataset(files, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    put(tmp_path / "d", DATASET)
    (tmp_path / "copy").mkdir()
    save_dataset(files, tmp_path / "copy")
    assert contents(dataset_files(str(tmp_path / "copy"))) == contents(files)


# --- the Hub ----------------------------------------------------------------------------------------------------------


def test_first_run_second_run_and_offline(hub, run, tmp_path):
    sharded = {"config.json": CONFIG, "tokenizer.json": TOKENIZER, "model-other.safetensors": tensors(9), **SHARDS}
    hub.repositories["models/owner/big"] = Repository(sharded | {"model.safetensors.index.json": index(*SHARDS)})
    calls = ("model_files", "owner/gpt"), ("dataset_files", "owner/reviews"), ("model_files", "owner/big")
    model, dataset, big = first = run(*calls)
    assert contents(model) == IN_FULL
    assert contents(dataset) == {"train": [TRAIN], "validation": [VALIDATION], "test": [TEST]}
    assert contents(big) == IN_FULL | {"weights": list(SHARDS.values())}
    names = [name for name, _ in hub.fetched()]
    assert sorted(set(names)) == sorted({*MODEL, *DATASET, *SHARDS, "model.safetensors.index.json"} - {"README.md"})
    assert "torch" not in run.modules

    hub.requests.clear()
    assert run(*calls) == first
    assert hub.requests
    assert hub.fetched() == []

    hub.requests.clear()
    assert run(*calls, HF_HUB_OFFLINE="1") == first
    assert run(*calls, HF_ENDPOINT="http://127.0.0.1:9") == first  # nobody listens there
    assert hub.requests == []
    hub.faults = {"/api/models/owner/gpt": Fault(status=503), "/api/datasets/owner/reviews": Fault(status=401)}
    assert run(*calls) == first
    assert hub.fetched() == []

    save_dataset({split: list(map(Path, shards)) for split, shards in dataset.items()}, tmp_path / "copy")
    assert contents(dataset_files(str(tmp_path / "copy"))) == contents(dataset)


def test_a_folder_needs_no_hub_client(run, tmp_path):
    run(("model_files", str(put(tmp_path / "m", MODEL))), ("dataset_files", str(put(tmp_path / "d", DATASET))))
    assert not {"huggingface_hub", "torch", "pyarrow"} & run.modules


def test_offline_what_the_cache_lacks_is_missed(hub, run, tmp_path):
    assert contents(run(("model_files", "owner/gpt", {"with_weights": False})))["weights"] == []
    assert {name for name, _ in hub.fetched()} == {"config.json", "tokenizer.json"}
    hub.requests.clear()
    for result in run(("model_files", "owner/gpt"), ("dataset_files", "owner/reviews"), HF_HUB_OFFLINE="1"):
        assert f"HF_HUB_OFFLINE is set and the cache {tmp_path / 'hf'}" in result["error"]
        assert "HF_HOME" in result["error"]
    assert hub.requests == []


def test_a_branch_that_moved_is_followed_and_known_offline(hub, run):
    run(("dataset_files", "owner/reviews"))
    hub.commit = "f00d" + "0" * 36
    hub.repositories["datasets/owner/reviews"].files = DATASET | {"train.parquet": table("new")}
    hub.requests.clear()
    assert contents(run(("dataset_files", "owner/reviews")))["train"] == [table("new")]
    assert [name for name, _ in hub.fetched()] == ["train.parquet"]
    assert contents(run(("dataset_files", "owner/reviews"), HF_HUB_OFFLINE="1"))["train"] == [table("new")]


def test_an_interrupted_download_is_not_taken_for_a_data_set_without_validation(hub, run):
    hub.faults[cdn_path(VALIDATION)] = Fault(cut_after=3)
    assert "cannot fetch dataset owner/reviews" in run(("dataset_files", "owner/reviews"))["error"]
    assert "does not have all files" in run(("dataset_files", "owner/reviews"), HF_HUB_OFFLINE="1")["error"]
    hub.faults.clear()
    assert contents(run(("dataset_files", "owner/reviews")))["validation"] == [VALIDATION]


def test_what_a_repository_lacks_is_said_before_anything_is_fetched(hub, run):
    small = {"config.json": CONFIG, "tokenizer.json": TOKENIZER}
    hub.repositories |= {
        "models/owner/pickled": Repository(small | {"pytorch_model.bin": b"pickle"}),
        "models/owner/bare": Repository({"config.json": CONFIG, "model.safetensors": WEIGHTS}),
        "datasets/owner/csv": Repository({"train.csv": b"text,label"}),
        "datasets/owner/two": Repository({"a/train.parquet": TRAIN, "b/train.parquet": TRAIN}),
        "datasets/owner/partial": Repository({"train-00000-of-00002.parquet": TRAIN}),
        "models/owner/evil": Repository(small | {"model.safetensors.index.json": index("../../x.safetensors")}),
    }
    models, datasets = ("pickled", "bare", "evil"), ("csv", "two", "partial")
    calls = [("model_files", f"owner/{name}") for name in models] + [("dataset_files", f"owner/{n}") for n in datasets]
    pickled, bare, evil, csv, two, partial = (result["error"] for result in run(*calls))
    assert "owner/pickled has no model.safetensors" in pickled
    assert "convert" in pickled
    assert bare == "owner/bare has no tokenizer.json: use another --model or --model-revision."
    assert "owner/csv has no training split" in csv
    assert "owner/two holds several data sets, in a, b" in two
    assert partial == "owner/partial lacks 1 of the 2 shards of train: train-00001-of-00002.parquet."
    assert "lists '../../x.safetensors'" in evil
    assert [name for name, _ in hub.fetched()] == ["config.json", "tokenizer.json", "model.safetensors.index.json"]


def test_what_the_hub_has_converted_to_parquet_is_found(hub, run):
    converted = {"default/train/0000.parquet": TRAIN, "default/test/0000.parquet": TEST}
    csv = {"train.csv": b"text,label"}
    hub.repositories |= {
        "datasets/owner/csv": Repository(csv, branches={"refs/convert/parquet": converted}),
        "datasets/owner/two": Repository(csv, branches={"refs/convert/parquet": {
            f"{part}/train/0000.parquet": table(part) for part in ("fr", "en")
        }}),
    }  # fmt: skip
    one, ambiguous, chosen = run(
        ("dataset_files", "owner/csv"), ("dataset_files", "owner/two"), ("dataset_files", "owner/two", {"part": "fr"})
    )
    assert contents(one) == {"train": [TRAIN], "test": [TEST]}
    assert "owner/two holds several data sets, in en, fr: choose one by --dataset-config en." in ambiguous["error"]
    assert contents(chosen) == {"train": [table("fr")]}
    hub.requests.clear()
    calls = ("dataset_files", "owner/csv"), ("dataset_files", "owner/csv", "refs/convert/parquet")
    calls += (("dataset_files", "owner/two", {"part": "fr"}),)
    assert run(*calls, HF_HUB_OFFLINE="1") == [one, one, chosen]
    assert run(*calls, HF_ENDPOINT="http://127.0.0.1:9") == [one, one, chosen]  # nobody listens there
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["first", "second"])
def test_an_interrupted_download_of_what_is_converted_is_not_taken_for_the_whole(hub, run, missing):
    shards = [table("first"), table("second")]
    converted = {f"default/train/000{i}.parquet": shard for i, shard in enumerate(shards)}
    branches = {"refs/convert/parquet": converted}
    hub.repositories["datasets/owner/csv"] = Repository({"train.csv": b"text,label"}, branches=branches)
    hub.faults[cdn_path(table(missing))] = Fault(cut_after=3)
    assert "cannot fetch dataset owner/csv" in run(("dataset_files", "owner/csv"))["error"]
    assert "does not have all files" in run(("dataset_files", "owner/csv"), HF_HUB_OFFLINE="1")["error"]
    hub.faults.clear()
    whole = run(("dataset_files", "owner/csv"))
    assert contents(whole) == {"train": shards}
    assert run(("dataset_files", "owner/csv"), HF_HUB_OFFLINE="1") == whole


def test_the_first_of_some_splits_is_fetched_and_no_other(hub, run):
    first_of = {"first_of": ["test", "validation", "train"]}
    some = run(("dataset_files", "owner/reviews", first_of))
    assert contents(some) == {"test": [TEST]}
    assert [name for name, _ in hub.fetched()] == ["test.parquet"]
    offline = ("dataset_files", "owner/reviews", first_of), ("dataset_files", "owner/reviews")
    again, whole = run(*offline, HF_HUB_OFFLINE="1")
    assert again == some
    assert "does not have all files" in whole["error"], "one split is not taken for the data set"
    assert list(run(("dataset_files", "owner/reviews"))) == ["train", "validation", "test"]
    assert [name for name, _ in hub.fetched()][1:] == ["validation.parquet", "train.parquet"]
    assert run(offline[0], HF_HUB_OFFLINE="1") == some


def test_what_the_hub_refuses(hub, run):
    names = ["none", "gated", "private", "sick", "gone", "busy", "portal", "other"]
    for name in names[1:]:
        hub.repositories[f"models/owner/{name}"] = Repository(MODEL, private=name == "private", gated=name == "gated")
    hub.faults = {
        "/api/models/owner/sick": Fault(status=503),
        "/owner/gone/resolve/main/config.json": Fault(status=500),
        cdn_path(TRAIN): Fault(status=403),
        "/api/models/owner/busy": Fault(status=429),
        "/api/models/owner/portal": Fault(body=b"<html>Log in to the network</html>"),
        "/api/models/owner/other": Fault(body=b'{"message": "another program that answers in JSON"}'),
    }
    *results, revision, cdn = run(
        *[("model_files", f"owner/{name}") for name in names],
        ("model_files", "owner/gpt", "v9"),
        ("dataset_files", "owner/reviews"),
    )
    errors = {name: result["error"] for name, result in zip(names, results, strict=True)}
    for name in ("none", "private"):
        assert f"{hub.url} has no model owner/{name}, or none that you may read (401)" in errors[name]
        assert "HF_TOKEN" in errors[name]
        assert "--model" in errors[name]
    assert f"is gated: accept its conditions at {hub.url}/owner/gated" in errors["gated"]
    assert "HF_TOKEN" in errors["gated"]
    assert f"{hub.url}/api/models/owner/sick answered 503" in errors["sick"]
    assert f"{hub.url}/owner/gone/resolve/main/config.json answered 500" in errors["gone"]
    assert "answered 429" in errors["busy"]
    for name in ("portal", "other"):
        assert f"does not answer for model owner/{name} as the Hub does: check HF_ENDPOINT" in errors[name]
    assert "owner/gpt has no revision v9: name a branch, tag or commit" in revision["error"]
    assert f"{hub.url} has no dataset owner/reviews, or none that you may read (403)" in cdn["error"]
    assert revision["cause"] == "RevisionNotFoundError"
    assert all("--demo" in errors[name] for name in ("sick", "gone", "busy", "portal"))


def test_a_hub_that_cannot_be_reached(run):
    error = run(("model_files", "owner/gpt"), HF_ENDPOINT="http://me:pass-word@127.0.0.1:9")["error"]
    assert "cannot fetch model owner/gpt from http://127.0.0.1:9: " in error
    assert "refused" in error
    assert "pass-word" not in error
    assert all(help_ in error for help_ in ("HF_ENDPOINT", "--model DIR", " --demo"))


def test_a_hub_that_never_answers(hub, run):
    hub.faults["/api/datasets/owner/reviews"] = Fault(delay=30)
    error = run(("dataset_files", "owner/reviews"), HF_HUB_ETAG_TIMEOUT="1")["error"]
    assert "cannot fetch dataset owner/reviews" in error
    assert "timed out" in error


def test_a_hub_that_answers_and_never_gives_the_file_is_given_up_in_one_wait(hub, run):
    hub.faults["/owner/gpt/resolve/main/tokenizer.json"] = Fault(delay=30)
    error = run(("model_files", "owner/gpt"), STALL="1", HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")["error"]
    assert f"{hub.url} sent nothing of model owner/gpt for 2 s: try again later, or check HF_ENDPOINT" in error
    assert run.stderr.startswith(f"Waiting for owner/gpt from {hub.url}: timeout in ")
    assert run.stderr.count("Waiting") == 1, "without a terminal it is told once"


def test_the_cache_does_where_the_hub_never_gives_the_file(hub, run):
    first = run(("model_files", "owner/gpt"))
    hub.commit = "f00d" + "0" * 36
    hub.repositories["models/owner/gpt"].files = MODEL | {"config.json": b'{"n_layer": 3}'}
    hub.faults["/owner/gpt/resolve/main/config.json"] = Fault(delay=30)
    limits = {"STALL": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    assert run(("model_files", "owner/gpt"), **limits) == first
    assert "The files in the cache are used." in run.stderr


def test_a_slow_line_is_waited_for_as_long_as_something_arrives(hub, run):
    sizes = iter(range(4 << 10))
    results = run_with_stall_timeout(lambda: time.sleep(1.5) or "done", lambda: next(sizes), seconds=0.6, what="a file")
    assert results == "done"
    with pytest.raises(StalledError, match=r"nothing arrived for 0\.6 s"):
        run_with_stall_timeout(lambda: time.sleep(30), lambda: 0, seconds=0.6, what="a file")
    with pytest.raises(KeyError):
        run_with_stall_timeout(lambda: {}["x"], lambda: 0, seconds=0.6, what="a file")


def test_a_name_that_is_a_path_never_reaches_the_hub(hub, run, tmp_path):
    """The Hub has a model of each name that could be an id, which a stranger may have put there."""
    names = ["runs/gone", "gone/checkpoint-12", "checkpoint-12", "./gpt", "../owner/gpt", "~/gpt", "/owner/gpt"]
    for name in names:
        hub.repositories[f"models/{name}"] = hub.repositories["models/owner/gpt"]
    (tmp_path / "runs").mkdir()
    calls = [("model_files", name) for name in names] + [("dataset_files", name) for name in names]
    for result, (_, name) in zip(run(*calls, cwd=tmp_path), calls, strict=True):
        assert f"there is no directory '{name}'" in result["error"]
    assert hub.requests == []


def test_a_folder_that_vanished_never_reaches_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("ft.io.hub._hub_files", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(FtError, match=r"there is no directory 'owner/gpt'"):
        model_files(Path("owner/gpt"))


def test_a_download_cut_short_goes_on_where_it_stopped(hub, run):
    weights = tensors(size=12 << 20)  # more than the 10 MiB which the client keeps in memory before it writes
    hub.repositories["models/owner/gpt"].files = MODEL | {"model.safetensors": weights}
    hub.faults[cdn_path(weights)] = Fault(cut_after=11 << 20, times=1)
    assert contents(run(("model_files", "owner/gpt")))["weights"] == [weights]
    ranges = [request.headers.get("range") for request in hub.requests if request.file == "model.safetensors"]
    assert ranges[0] is None
    assert ranges[1] == f"bytes={11 << 20}-"


def test_the_client_keeps_its_own_chunk_size(run):
    assert contents(run(("model_files", "owner/gpt"))) == IN_FULL
    assert run.chunk == 10 * 2**20
    assert "owner/absent" in run(("model_files", "owner/absent"))["error"]
    assert run.chunk == 10 * 2**20


def test_what_arrives_damaged_is_not_kept(hub, run, tmp_path):
    names = ["owner/cut", "owner/long", "owner/config", "owner/weights"]
    weights = {name: tensors(seed) for seed, name in enumerate(names)}
    for name in names:
        hub.repositories[f"models/{name}"] = Repository(MODEL | {"model.safetensors": weights[name]})
    swapped = CONFIG.replace(b"2", b"3"), weights["owner/weights"][:-1] + b"?"
    hub.faults = {
        cdn_path(weights["owner/cut"]): Fault(cut_after=40),
        cdn_path(weights["owner/long"]): Fault(body=weights["owner/long"] + b"and more"),
        "/owner/config/resolve/main/config.json": Fault(body=swapped[0]),
        cdn_path(weights["owner/weights"]): Fault(body=swapped[1]),
    }
    calls = [("model_files", name) for name in names]
    cut, long, config, whole = (result["error"] for result in run(*calls))
    assert "cannot fetch model owner/cut" in cut
    assert "cannot fetch model owner/long" in long
    assert "config.json of owner/config arrived damaged" in config
    assert "model.safetensors of owner/weights arrived damaged" in whole
    kept = [path.read_bytes() for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    assert not set(swapped) & set(kept)

    hub.faults.clear()
    results = run(*calls)
    assert [contents(result) for result in results] == [IN_FULL | {"weights": [weights[name]]} for name in names]


def test_what_is_in_the_cache_is_not_hashed_again(hub, run):
    (file,) = run(("model_files", "owner/gpt"))["weights"]
    Path(file).write_bytes(WEIGHTS[:-1] + b"?")
    assert contents(run(("model_files", "owner/gpt"))["weights"]) == [WEIGHTS[:-1] + b"?"]


def test_a_token_goes_to_the_hub_and_nowhere_else(hub, run):
    hub.repositories["models/owner/gpt"].private = True
    assert contents(run(("model_files", "owner/gpt"), HF_TOKEN=hub.token)) == IN_FULL
    sent = {(request.path.startswith("/cdn/"), request.headers.get("authorization")) for request in hub.requests}
    assert sent == {(False, f"Bearer {hub.token}"), (True, None)}


@pytest.mark.parametrize("token", ["hf_wrongToken", "hf_wr\x0bongToken", "hf_wröngToken"])
def test_a_token_that_is_not_accepted_appears_in_no_message(hub, run, token):
    error = run(("model_files", "owner/gpt"), HF_TOKEN=token)["error"]
    assert "HF_TOKEN" in error
    assert "Token" not in error.replace("HF_TOKEN", "")
    assert "ngToken" not in run.stderr


def test_a_cache_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    error = run(("model_files", "owner/gpt"), HF_HOME=str(tmp_path / "file"))["error"]
    assert f"cannot write model owner/gpt to the cache {tmp_path / 'file'}" in error
    assert "HF_HOME" in error


def test_a_disk_that_is_full(hub, run):
    hub.repositories["models/owner/gpt"].files = MODEL | {"model.safetensors": tensors(size=1 << 20)}
    error = run(("model_files", "owner/gpt"), LARGEST_FILE=str(1 << 19))["error"]
    assert "cannot write model owner/gpt to the cache" in error
    assert "File too large" in error
