"""The HTML report: parsed by `html.parser`, shown by a real Chromium if there is one, with hostile texts."""

import builtins
import itertools
import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.figure
import pytest

from ft.cli.arguments import read_arguments
from ft.cli.main import main
from ft.config import Config
from ft.report.run_record import command_of, read_run
from ft.settings import DEMO_SETTINGS

HARM = "<script>top.hacked = 1</script></style></title>\"'><img src=x onerror='top.hacked = 1'>&lt;"
UNSEEN = "a\0b\x1b[31m\u202ereversed\u2066 \u200b\x85"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The elements, the text, and whether every element that is opened is closed."""

    def __init__(self, markup):
        super().__init__()
        self.elements, self.open, self.words, self.ids = [], [], [], []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return "".join(self.words)


def write_run(folder, *, events=12, rate=1e-3, label="pos", text="a fine film", scores=True, **settings):
    folder.mkdir(parents=True)
    settings = {"output_dir": str(folder), "learning_rate": rate, **settings}
    Config(**{name: value for name, value in settings.items() if isinstance(value, str | float | bool)}).save(
        folder / "config.json"
    )
    lines = []
    for step in range(1, events + 1):
        event = {"step": step * 10, "epoch": step / events, "loss": 2 / step, "learning_rate": rate / step}
        event |= {"grad_norm": None if step == 3 else 1.5, "samples_per_second": 40.0 + step}
        lines.append({**event, "seconds_by_part": {"data": 0.25, "forward": 1.0, "backward": 2.0, "update": 0.75}})
        if step % 4 == 0:
            lines.append({"step": step * 10, "epoch": step / events, "eval_loss": 1 / step, "eval_accuracy": 0.8})
            lines.append({"step": step * 10, "epoch": step / events, "general_perplexity": 50.0 + step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if scores:
        (folder / "final").mkdir()
        (folder / "final" / "model.safetensors").write_bytes(b"")
        (folder / "summary.json").write_text("{}")
        mistake = {"row": 7, "true": "neg", "predicted": label, "probability": 0.987, "text": text}
        record = {"step": events * 10, "split": "test", "labels": ["neg", label], "accuracy": 0.8, "macro_f1": 0.8}
        record |= {"precision": [0.9, 0.7], "recall": [0.7, 0.9], "f1": [0.79, 0.79], "confusion": [[30, 12], [4, 54]]}
        record |= {"calibration_error": 0.1, "bins": [[0.6, 0.5, 20], [0.9, 0.875, 80]], "mistakes": [mistake] * 3}
        (folder / "scores.json").write_text(json.dumps(record))
    return folder


def report_of(*runs, output=None):
    flags = ["--output", str(output)] if output else []
    assert main(["report", *map(str, runs), *flags]) == 0
    return (output or runs[0] / "report.html").read_text(encoding="utf-8")


def charts(page):
    return [attributes["aria-label"].split(" by ")[0] for attributes in page.all("svg")]


def test_one_run_shows_everything(tmp_path):
    page = Page(report_of(write_run(tmp_path / "run")))
    names = ["Loss", "Accuracy", "Learning rate", "Gradient norm", "Throughput", "Forgetting", "Time of run 1"]
    assert charts(page)[:7] == names
    assert charts(page)[7].startswith(
        "Calibration of run 1: probability 60%, accuracy 50%; probability 90%, accuracy 88%"
    )
    assert all(attributes["role"] == "img" for attributes in page.all("svg"))
    for words in ("54", "a fine film", "98.7%", "row 7", "87.50%", "learning_rate", "3.00 s", "finished"):
        assert words.replace("3.00 s", "12.0 s").replace("87.50%", "90.00%") in page.text, words
    assert len(page.ids) == len(set(page.ids))
    loss = page.all("svg")[0]["aria-label"]
    assert "training 2 at step 10, 0.1667 at step 120; validation 0.25 at step 40, 0.08333 at step 120" in loss


def test_the_same_files_make_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "run")
    assert report_of(run) == report_of(run)


def many_classes_run(folder, classes=77):
    """A run whose labels are as many and have names as long as those of a bank's questions."""
    run = write_run(folder)
    labels = [
        f"{['card', 'transfer', 'top_up', 'exchange'][i % 4]}_not_as_expected_by_anyone_{i}" for i in range(classes)
    ]
    rng = random.Random(0)
    confusion = []
    for true in range(classes):
        counts = [0] * classes
        for _ in range(40):
            counts[true if rng.random() < 0.8 else min(classes - 1, rng.randrange(classes) // 4 * 4 + true % 4)] += 1
        confusion.append(counts)
    scores = json.loads((run / "scores.json").read_text())
    mistakes = [{**mistake, "true": labels[3], "predicted": labels[7]} for mistake in scores["mistakes"]]
    per_class = dict.fromkeys(("precision", "recall", "f1"), [0.8] * classes)
    record = {**scores, **per_class, "labels": labels, "confusion": confusion, "mistakes": mistakes}
    (run / "scores.json").write_text(json.dumps(record))
    return run


def test_many_classes_are_a_map_of_numbers_and_a_list_of_what_is_confused(tmp_path):
    run = many_classes_run(tmp_path / "run")
    markup = report_of(run)
    page = Page(markup)
    scores = json.loads((run / "scores.json").read_text())
    matrix = re.search('aria-label="Confusion matrix">(.*?)</table>', markup, re.DOTALL)[1]
    assert re.findall(r'<th scope="col">(\d+)</th>', matrix) == [str(i) for i in range(77)]
    counts = [[int(cell or 0) for cell in re.findall(r"<td>(?:<span[^>]*>(\d+)</span>)?</td>", row)]
              for row in matrix.partition("<tbody>")[2].split("</tr>")[:-1]]  # fmt: skip
    assert counts == scores["confusion"]
    assert matrix.count('class="cell right"') == sum(row[i] > 0 for i, row in enumerate(counts))
    confused = re.search('aria-label="Most confused">(.*?)</table>', markup, re.DOTALL)[1]
    shown = [tuple(map(int, row)) for row in re.findall(
        r'number">(\d+)</span>.*?number">(\d+)</span>.*?<td>(\d+)</td>', confused)]  # fmt: skip
    expected = sorted(
        (row[predicted] for i, row in enumerate(counts) for predicted in range(77) if predicted != i), reverse=True
    )[:20]
    assert [count for *_, count in shown] == expected
    assert all(counts[true][predicted] == count for true, predicted, count in shown)
    assert page.text.count("card_not_as_expected_by_anyone_12") >= 2, "in the matrix and among the labels"
    assert len(markup) < 1_000_000


def test_several_runs_are_laid_over_each_other(tmp_path):
    runs = [write_run(tmp_path / name, rate=rate) for name, rate in (("low", 1e-4), ("high", 1e-2))]
    output = tmp_path / "both.html"
    page = Page(report_of(*runs, output=output))
    assert charts(page)[:2] == ["Loss", "Accuracy"]
    assert "of run 1" in page.all("svg")[0]["aria-label"]
    assert "of run 2" in page.all("svg")[0]["aria-label"]
    table = re.search("Settings that differ</h3>(.*?)</table>", output.read_text(), re.DOTALL)[1]
    assert re.findall('<th scope="row">([^<]*)', table) == ["learning_rate"]
    assert "0.0001" in table
    assert "0.01" in table
    assert main(["report", *map(str, runs)]) == 0
    assert (tmp_path / "report.html").exists(), "of several runs it lies beside them"
    assert not (runs[0] / "report.html").exists()


def write_evaluations(run, figures):
    """Replace the evaluations of a run by these losses, accuracies and macro F1, and a majority baseline."""
    lines = [
        {"step": step, "epoch": step / 10, "eval_loss": loss, "eval_accuracy": accuracy, "eval_macro_f1": macro_f1}
        | {"eval_majority_baseline": 0.9}
        for step, (loss, accuracy, macro_f1) in enumerate(figures, start=1)
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(("metric", "best"), [("accuracy", "low"), ("macro_f1", "high"), ("loss", "deep/er")])
def test_the_best_run_is_marked(tmp_path, metric, best):
    figures = {
        "low": [(0.5, 0.97, 0.5), (0.4, 0.9, 0.5)],
        "high": [(0.5, 0.92, 0.75), (0.6, 0.91, 0.5)],
        "deep/er": [(0.05, 0.9, 0.6)],
    }
    runs = [write_run(tmp_path / name, events=2, best_metric=metric) for name in figures]
    for run, each in zip(runs, figures.values(), strict=True):
        write_evaluations(run, each)
    markup = report_of(*runs, output=tmp_path / "all.html")
    table = re.search("The runs and their newest metrics(.*?)</table>", markup, re.DOTALL)[1]
    rows = dict(re.findall(r'<th scope="row">.*?<bdi>([^<]*)</bdi>(.*?)</tr>', table, re.DOTALL))
    assert list(rows) == list(figures), "named by their paths below the directory of all"
    assert [name for name, row in rows.items() if ">best</span>" in row] == [best]
    shown = {"accuracy": "97.00%, F1 0.5000", "macro_f1": "92.00%, F1 0.7500", "loss": "90.00%, F1 0.6000"}
    assert shown[metric] in rows[best]
    assert "90.00%</td>" in rows["low"], "the majority baseline"
    assert f"has the best validation {metric.replace('_', ' ')}." in markup
    assert str(tmp_path) not in re.sub("<code>.*?</code>|<details>.*?</details>", "", markup, flags=re.DOTALL)


def test_the_times_of_several_runs_are_one_table(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    line = {"step": 121, "seconds_by_part": {"saving": 3.0}}
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    write_run(tmp_path / "c", events=0)
    markup = report_of(*runs, tmp_path / "c", output=tmp_path / "all.html")
    (table,) = re.findall("Time per step by run and part(.*?)</table>", markup, re.DOTALL)
    rows = [re.sub("<svg.*?</svg>|<[^>]*>", " ", row, flags=re.DOTALL).split() for row in table.split("<tr>")[1:]]
    assert rows[0] == ["run", "total", "per", "step", "shares", "data", "forward", "backward", "update", "saving"]
    assert rows[1][:6] == ["a", "48.0", "s", "400.00", "ms", "25.00"]
    assert rows[2][:3] == ["b", "51.0", "s"]
    assert rows[2][-3:] == ["24.79", "ms", "6%"]
    assert rows[3] == ["c", "not", "recorded"]
    assert markup.count("Time of run") == 2


def test_the_axis_of_throughput_begins_at_zero(tmp_path):
    markup = report_of(write_run(tmp_path / "run"))
    throughput = re.search('<svg[^>]*aria-label="Throughput.*?</svg>', markup, re.DOTALL)[0]
    assert ">0<" in throughput
    loss = re.search('<svg[^>]*aria-label="Gradient norm.*?</svg>', markup, re.DOTALL)[0]
    assert ">0<" not in loss


@pytest.mark.parametrize(
    ("values", "lowest", "highest"),
    [([0.5, 1.0], 0.475, 1), ([1.0], 0.945, 1), ([0.0, 0.5], 0, 0.525), ([0.0], 0, 0.055), ([0.6, 0.7], 0.595, 0.705)],
)
def test_the_axis_of_a_share_ends_at_its_limits(tmp_path, monkeypatch, values, lowest, highest):
    ends = {}
    draw = matplotlib.figure.Figure.savefig

    def record(figure, *arguments, **settings):
        ends.setdefault(len(ends), figure.axes[0].get_ylim())
        return draw(figure, *arguments, **settings)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", record)
    run = write_run(tmp_path / "run", events=1)
    lines = [
        {"step": step, "epoch": step / 10, "eval_loss": 1.0, "eval_accuracy": value, "eval_macro_f1": value}
        for step, value in enumerate(values, start=1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = charts(Page(report_of(run)))
    assert names[:3] == ["Loss", "Accuracy", "Macro F1"]
    for chart in (1, 2):
        assert ends[chart] == pytest.approx((lowest, highest), abs=1e-6)
        assert 0 <= ends[chart][0] < ends[chart][1] <= 1


def test_the_best_run_of_each_data_set_is_marked(tmp_path):
    """Figures on other rows are not compared: by the digest of the rows, else by the settings that name them."""
    cases = {
        "a": ("one", 0.7, {}),
        "b": ("one", 0.8, {}),
        "held out by another seed": ("two", 0.9, {"learning_rate": 1e-5}),
        "of an earlier version": (None, 0.75, {"dataset": "else/where"}),
        "c": ("one", 0.6, {"dataset": "a/copy"}),
    }
    runs = []
    for name, (digest, accuracy, settings) in cases.items():
        runs.append(write_run(tmp_path / name, events=2, **settings))
        line = {"step": 1, "epoch": 1, "eval_loss": 1.0, "eval_accuracy": accuracy}
        line |= {} if digest is None else {"eval_rows_sha256": digest}
        (runs[-1] / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    markup = report_of(*runs, output=tmp_path / "all.html")
    table = re.search("The runs and their newest metrics(.*?)</table>", markup, re.DOTALL)[1]
    rows = dict(re.findall(r'<th scope="row">.*?<bdi>([^<]*)</bdi>(.*?)</tr>', table, re.DOTALL))
    best = [name for name, row in rows.items() if ">best</span>" in row]
    assert best == ["b", "held out by another seed", "of an earlier version"]
    numbers = {name: re.search(r"<td>([0-9]*)</td>", row)[1] for name, row in rows.items()}
    assert list(numbers.values()) == ["1", "1", "2", "3", "1"]
    assert '<th scope="col">rows</th>' in table
    assert "Only figures on the same validation rows can be compared" in markup
    markup = report_of(*runs[:2], runs[-1], output=tmp_path / "all.html")
    assert markup.count(">best</span>") == 1
    assert "validation rows" not in markup


def test_extreme_figures_are_short(tmp_path):
    run = write_run(tmp_path / "run", events=1)
    line = {"step": 10**298, "eval_loss": 1e299, "eval_accuracy": 1e299, "samples_per_second": 1e299}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    write_run(tmp_path / "other", events=1)
    for runs in ([run], [run, tmp_path / "other"]):
        page = Page(report_of(*runs, output=tmp_path / "page.html"))
        assert "1e+299" in page.text
        assert not re.search("[0-9,]{50}", page.text)


def test_scores_of_earlier_versions_are_shown(tmp_path):
    """In which the predicted label of a mistake is `label`, and there is no baseline."""
    run = write_run(tmp_path / "run")
    assert "predicted <b><bdi>pos</bdi></b>" in report_of(run)
    scores = json.loads((run / "scores.json").read_text())
    for mistake in scores["mistakes"]:
        mistake["label"] = mistake.pop("predicted", None) or mistake["label"]
    (run / "scores.json").write_text(json.dumps(scores))
    assert "predicted <b><bdi>pos</bdi></b>" in report_of(run)


def test_more_runs_than_colors_are_distinguished_by_dashes(tmp_path):
    runs = [write_run(tmp_path / f"run{i}", events=4, scores=False) for i in range(9)]
    markup = report_of(*runs, output=tmp_path / "many.html")
    assert 'class="swatch dash-1" style="--own: var(--color-0)"' in markup
    assert "stroke-dasharray" in markup


def test_parts_come_in_the_order_of_a_step(tmp_path):
    run = write_run(tmp_path / "run", events=1)
    before = {"step": 0, "seconds_by_part": {"saving": 1.0, "other": 0.5, "update": 0.25, "data": 2.0, "forward": "x"}}
    (run / "metrics.jsonl").write_text(json.dumps(before) + "\n" + (run / "metrics.jsonl").read_text())
    expected = [("data", 2.25), ("forward", 1.0), ("backward", 2.0), ("update", 1.0), ("saving", 1.0), ("other", 0.5)]
    assert list(read_run(run).seconds_by_part().items()) == expected


@pytest.mark.parametrize("ending", ["", '{"step": 130, "epo', '{"step": "x", "loss": []}\n[1]\nnull\n\xff\n'])
def test_an_unfinished_run_has_a_report_too(tmp_path, ending):
    run = write_run(tmp_path / "run", scores=False)
    with (run / "metrics.jsonl").open("a", encoding="latin-1") as file:
        file.write(ending)
    page = Page(report_of(run))
    assert "not finished: step 120, epoch 1.00 of 1.0" in page.text
    assert "This run has no scores: they are written at its end." in page.text


def test_nothing_noted_yet_and_files_that_cannot_be_read(tmp_path):
    run = write_run(tmp_path / "run", events=0)
    for name in ("config.json", "scores.json"):
        (run / name).write_text("{")
    page = Page(report_of(run))
    assert charts(page) == []
    for words in ("No metrics yet", "no valid config.json", "no valid scores.json"):
        assert words in page.text


@pytest.mark.parametrize(
    "change",
    [{"labels": 3}, {"confusion": [[1]]}, {"f1": ["x", 1]}, {"mistakes": [{}]}, {"bins": [[1]]}, {"step": "<b>"}],
)
def test_scores_of_another_form_are_left_out(tmp_path, change):
    run = write_run(tmp_path / "run")
    scores = json.loads((run / "scores.json").read_text())
    (run / "scores.json").write_text(json.dumps(scores | change))
    assert read_run(run).scores is None
    assert "no valid scores.json" in report_of(run)


def hostile_run(folder):
    run = write_run(
        folder / HARM.replace("/", "∕"),
        label=HARM,
        text=f"{HARM} {UNSEEN} " + "x" * 100_000,
        dataset=HARM,
        model=UNSEEN[2:],
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 130, "epoch": 1.0, HARM: 1.0, "seconds_by_part": {HARM: 1.0}}) + "\n")
    scores = json.loads((run / "scores.json").read_text())
    scores["mistakes"][0]["row"] = scores["mistakes"][0]["true"] = scores["split"] = HARM
    (run / "scores.json").write_text(json.dumps(scores))
    return run


def test_hostile_texts_stay_text(tmp_path):
    run = hostile_run(tmp_path)
    output = tmp_path / "report.html"
    markup = report_of(run, write_run(tmp_path / "other"), output=output)
    page = Page(markup)
    assert not page.all("script")
    assert not page.all("img")
    assert len(page.all("style")) == len(page.all("title")) == 1
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count(HARM) >= 8
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]", markup)
    assert "a\\u0000b\\u001b[31m\\u202ereversed\\u2066 \\u200b\\u0085" in page.text
    assert len(markup) < 300_000, "of a text of 100,000 characters the beginning is shown"
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert not [a for _, attributes in page.elements for a in ("src", "action") if a in attributes]
    assert all(attributes["href"].startswith("#") for _, attributes in page.elements if "href" in attributes)


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 7, "tf32": True, "dataset": "it's $(here) & there", "learning_rate": 3e-5},
        {"demo": True, "output_dir": "runs/demo", "epochs": 10.0, "batch_size": 16, "max_steps": 5},
        {"label_names": "-a,b", "dropout": 0.0, "train_only": ("last:1", "*.bias")},
    ],
)
def test_the_command_makes_the_run_again(settings):
    base = DEMO_SETTINGS if settings.get("demo") else {}
    config = Config(**{**base, **settings})
    words = shlex.split(command_of(json.loads(json.dumps(vars(config)))))
    assert words[:2] == ["python", "run.py"]
    assert read_arguments(words[2:]) == config


def test_usage_errors_are_reported_together(tmp_path, capsys):
    assert main(["report", str(tmp_path), str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 3
    assert "has no metrics.jsonl: it must be a run directory" in error[0]
    assert "there is no such directory" in error[1]
    assert "it must be a file" in error[2]
    assert main(["report", str(write_run(tmp_path / "run")), "--output", str(tmp_path / "none" / "x.html")]) == 2
    assert "there is no directory" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run" / "config.json")]) == 2
    assert "which is a file: it must be a run directory" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "RUN" in capsys.readouterr().err


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "ft.report.html", "ft.report.charts"))]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["report", str(run)]) == 1
    assert "pip install -e '.[plot]'" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    before = report_of(run)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ft.io.plain_files.os.fsync", full)
    assert main(["report", str(run)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (run / "report.html").read_text() == before
    assert not list(run.glob(".unfinished*"))


# --- in a browser -----------------------------------------------------------------------------------------------------

HARNESS = """<!DOCTYPE html><body><iframe id=page width={width} height=800 src="report.html"></iframe>
<iframe srcdoc="<script>top.control = 1</script>"></iframe><pre></pre><script>
onload = () => {{
  const page = document.getElementById("page").contentDocument
  for (const details of page.querySelectorAll("details")) details.open = true
  const focusable = page.querySelectorAll("summary, [tabindex]")
  document.querySelector("pre").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth, hacked: top.hacked ?? null, control: top.control ?? null,
    paper: page.defaultView.getComputedStyle(page.body).backgroundColor, text: page.body.innerText.length,
    line: page.defaultView.getComputedStyle(page.querySelector("svg path[style*=color]")).stroke,
    narrow: [...page.querySelectorAll("svg")].filter(each => each.getBoundingClientRect().width < 200).length,
    focusable: focusable.length,
  }})
}}
</script>"""


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs a Chromium on the PATH (Debian's package chromium)")
    return path


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1280, False)])
def test_in_a_browser_it_fits_takes_the_scheme_and_runs_no_script(chromium, tmp_path, width, dark):
    runs = hostile_run(tmp_path), write_run(tmp_path / "other"), many_classes_run(tmp_path / "many")
    report_of(*runs, output=tmp_path / "report.html")
    (tmp_path / "harness.html").write_text(HARNESS.format(width=width))
    done = subprocess.run(
        [
            chromium,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={width + 100},1000",
            "--virtual-time-budget=5000",
            "--dump-dom",
            (tmp_path / "harness.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(re.search(r"<pre>(\{.*?\})</pre>", done.stdout, re.DOTALL)[1])
    assert found["control"] == 1, "a script must be able to run here for this test to say anything"
    assert found["hacked"] is None
    assert found["width"] <= width
    assert found["text"] > 3000
    assert found["narrow"] == 0
    assert found["focusable"] > 5
    assert (found["paper"], found["line"]) == (
        ("rgb(14, 17, 22)", "rgb(132, 170, 255)") if dark else ("rgb(246, 247, 249)", "rgb(36, 89, 211)")
    )


@pytest.mark.parametrize(
    ("perplexities", "ticks"),
    [
        ([30.0, 2000.0, 550_000.0], ["100", "1000", "10k", "100k"]),
        ([30.0, 200.0, 2900.0], None),  # 97 times as much
        ([30.0, 2000.0, 3000.0], ["100", "1000"]),
        ([3e-5, 30.0, 3e9], ["0.01", "10", "10k", "10M"]),
        ([0.0, 30.0, 3000.0], None),
    ],
)
def test_forgetting_over_orders_of_magnitude_is_logarithmic(tmp_path, perplexities, ticks):
    run = write_run(tmp_path / "run", events=0, scores=False)
    lines = [{"step": step, "epoch": 0.1, "general_perplexity": value} for step, value in enumerate(perplexities)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report_of(run)
    (label,) = [attributes["aria-label"] for attributes in Page(page).all("svg")]
    assert label.startswith("Forgetting by step (logarithmic): " if ticks else "Forgetting by step: ")
    assert ("higher is worse; logarithmic" in page) == bool(ticks)
    shown = re.findall(r"<text[^>]*>([^<]+)</text>", page)
    if ticks:
        assert [tick for tick in shown if tick in ticks] == ticks
        heights = [float(y) for y in re.findall(r'<use x="[^"]+" y="([^"]+)" style="fill: var\(--colou?r-0\)', page)]
        lower, upper = heights[0] - heights[1], heights[1] - heights[2]
        first, second = (math.log(b / a) for a, b in itertools.pairwise(perplexities))
        assert lower / upper == pytest.approx(first / second, rel=1e-3)
