"""Event files, read back by TensorBoard itself."""

import json
import sys

import pytest

from ft.cli.main import main


def figures_of_metrics(run):
    """(name, step) -> value, of every number in metrics.jsonl, the last one of each step."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        for name, value in event.items():
            parts = {f"{name}/{part}": x for part, x in value.items()} if isinstance(value, dict) else {name: value}
            found |= {
                (part, event["step"]): x
                for part, x in parts.items()
                if part not in ("step", "epoch") and not isinstance(x, str)
            }
    return found


def figures_of_tensorboard(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {(name, each.step): each.value for name in events.Tags()["scalars"] for each in events.Scalars(name)}


def test_tensorboard_reads_the_same_figures_also_of_a_resumed_run(inputs, tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    often = ["--logging-steps", "1", "--eval-steps", "2", "--save-steps", "2"]
    arguments = [*inputs, *often, "--output-dir", str(run), "--epochs", "1"]
    assert main([*arguments, "--max-steps", "5", "--tensorboard"]) == 0
    found = figures_of_tensorboard(run)
    assert {"loss", "eval_accuracy", "test_loss", "learning_rate", "seconds_by_part/forward"} <= {n for n, _ in found}
    assert found == {key: pytest.approx(value, rel=1e-6) for key, value in figures_of_metrics(run).items()}

    assert main(["--resume", str(run / "checkpoint-4"), "--max-steps", "7"]) == 0
    found = figures_of_tensorboard(run)
    assert max(step for _, step in found) == 7
    assert not {name for name, step in found if step == 5} & {"test_loss"}, "which only the shorter run noted"
    assert found == {key: pytest.approx(value, rel=1e-6) for key, value in figures_of_metrics(run).items()}

    assert main([*arguments, "--max-steps", "1", "--overwrite"]) == 0
    assert not (run / "tensorboard").exists()


def test_tensorboard_reads_the_settings_and_the_metrics_to_compare(inputs, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plugin_data_pb2 = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    run = tmp_path / "run"
    flags = ["--max-steps", "3", "--freeze", "wte.*", "h.0.*", "--tensorboard", "--output-dir", str(run)]
    assert main([*inputs, *flags]) == 0
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    content = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(data)
        for tag, data in events.PluginTagToContent("hparams").items()
    }
    started = content["_hparams_/session_start_info"].session_start_info.hparams
    assert started["learning_rate"].number_value == 1e-3
    assert started["batch_size"].number_value == 8
    assert started["best_metric"].string_value == "accuracy"
    assert started["freeze"].string_value == "wte.* h.0.*"
    assert started["train_only"].string_value == ""
    recorded = json.loads((run / "config.json").read_text())
    assert set(started) == {name for name, value in recorded.items() if value is not None} - {
        "output_dir", "resume", "overwrite", "save_dataset", "quiet"
    }  # fmt: skip
    metrics = [info.name.tag for info in content["_hparams_/experiment"].experiment.metric_infos]
    names = [f"{split}_{figure}" for split in ("eval", "test") for figure in ("loss", "accuracy", "macro_f1")]
    assert sorted(metrics) == sorted(names)
    assert set(metrics) <= set(events.Tags()["scalars"])
    assert content["_hparams_/session_end_info"].session_end_info.status == 1  # STATUS_SUCCESS
    assert [path.name for path in (run / "tensorboard").iterdir() if path.is_dir()] == []


def test_a_missing_package_is_an_error_at_the_start(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main([*inputs, "--output-dir", str(tmp_path / "run"), "--tensorboard"]) == 1
    assert "pip install -e '.[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
