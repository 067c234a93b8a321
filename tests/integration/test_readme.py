"""The READMEs: snippets run in their order, links and anchors resolve, command lines parse, and the cheap ones run."""

import re
import shlex
import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from ft.cli.arguments import COMMANDS, read_arguments
from ft.cli.main import main
from ft.cli.parsers import CommandParser
from ft.config import Config

ROOT = Path(__file__).parents[2]
MAIN = ROOT / "README.md"
READMES = [MAIN, *sorted(ROOT.glob("ft/**/README.md")), ROOT / "benchmarks" / "README.md"]
TEXTS = {path: path.read_text(encoding="utf-8") for path in READMES}
NAMES = {path: str(path.relative_to(ROOT)) for path in READMES}
WALK_THROUGH = TEXTS[ROOT / "ft" / "README.md"]
*SNIPPETS, FROM_PYTHON = re.findall(r"^```python\n(.*?)^```$", WALK_THROUGH, re.MULTILINE | re.DOTALL)
MOST_LINES = 220
OF_OTHER_PROGRAMS = ("--help", "--index-url", "--nproc-per-node", "--max-restarts", "--master-port", "--standalone")


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """GitHub's anchors of headings: lower case, no punctuation, hyphens for blanks, a number if repeated."""
    seen = Counter()
    for heading in re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        yield f"{slug}-{seen[slug]}" if seen[slug] else slug
        seen[slug] += 1


def command_lines():
    """Each `run.py` command line of the READMEs, as its arguments and whether torchrun starts it."""
    for path, text in TEXTS.items():
        blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`((?:\S*python |torchrun )[^`]*)`", without_code(text))
        for line in lines:
            for part in re.findall(r"(?:^|: )([^#]*\brun\.py\b.*)$", line):
                before, after = re.split(r"\brun\.py\b", part, maxsplit=1)
                arguments = shlex.split(after.partition(";")[0], comments=True)
                yield pytest.param(arguments, "torchrun" in before, id=f"{NAMES[path]}: {shlex.join(arguments)}")


ALL_COMMANDS = list(command_lines())


def has_flag(arguments, *names):
    return any(word.partition("=")[0] in names for word in arguments)


class ParsedError(Exception):
    """Raised in place of what a command does after it has read its arguments."""


@pytest.fixture(scope="module")
def workplace(inputs, tmp_path_factory):
    """A directory with a finished run and the files that the READMEs name."""
    folder = tmp_path_factory.mktemp("readme")
    _, model, _, dataset, *_ = inputs
    run = folder / "runs" / "demo"
    assert main([*inputs, "--max-steps", "4", "--batch-size", "4", "--output-dir", str(run)]) == 0
    for other in ("rotten_tomatoes", "low", "high"):
        shutil.copytree(run, folder / "runs" / other)
    lora = folder / "lora"
    assert main([*inputs, "--max-steps", "2", "--lora-rank", "8", "--output-dir", str(lora)]) == 0
    shutil.copytree(lora / "adapter", folder / "from-peft")
    shutil.copytree(model, folder / "my-gpt2")
    shutil.copytree(dataset, folder / "my-reviews")
    shutil.copytree(model, run / "inputs" / "model")
    shutil.copytree(dataset, run / "inputs" / "dataset")
    words = ("a gorgeous film", "the plot is flat", "a witty script", "dull and awkward") * 5
    reviews = "".join(f"{text} number {n},{('pos', 'neg')[n % 2]}\n" for n, text in enumerate(words))
    (folder / "reviews.csv").write_text("body,stars\n" + reviews)
    (folder / "test.csv").write_text("text,label\n" + reviews)
    (folder / "faq.jsonl").write_text(
        "".join(f'{{"question": "{text} {n} ?", "answer": "it is"}}\n' for n, text in enumerate(words))
    )
    return folder


@pytest.fixture
def here(workplace, tmp_path, monkeypatch):
    """A copy of it, as the current directory."""
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_is_short():
    assert len(TEXTS[MAIN].splitlines()) <= MOST_LINES


def test_the_snippets_run_in_their_order_and_a_step_lowers_the_loss(inputs, capsys):
    _, model, _, dataset, *_ = inputs
    code = "\n".join(SNIPPETS)
    for published, ours in (("openai-community/gpt2", model), ("cornell-movie-review-data/rotten_tomatoes", dataset)):
        assert code.count(published) == 1
        code = code.replace(published, ours)
    names = {}
    torch.manual_seed(0)  # of dropout
    exec(compile(code, "ft/README.md", "exec"), names)
    assert len(names["examples"]) == len(names["split"].texts) == 77
    assert names["batch"].target_ids.tolist() == [e.target_ids[0] for e in names["examples"][:8]]
    printed = re.findall(r"^[01] (\d+\.\d+)", capsys.readouterr().out, re.MULTILINE)
    assert len(printed) == 4, "two steps of all weights, and two of LoRA"
    before, after, before_lora, after_lora = map(float, printed)
    assert after < before
    assert after_lora < before_lora


def test_the_snippet_from_python_runs(inputs, capsys, tmp_path, monkeypatch):
    assert FROM_PYTHON.count("openai-community/gpt2") == 1
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(FROM_PYTHON.replace("openai-community/gpt2", inputs[1]), "ft/README.md", "exec"), names)
    assert "Run('runs/mine'), 10 steps" in capsys.readouterr().out
    assert main(["--resume", "runs/mine", "--epochs", "3"]) == 0
    assert names["run"].history[-1]["step"] == 15


def test_there_are_eight_steps_and_each_names_a_file():
    steps = re.split(r"^## (?=\d\. )", WALK_THROUGH, flags=re.MULTILINE)[1:]
    assert [int(step[0]) for step in steps] == list(range(1, 9))
    assert all("`ft/" in step for step in steps)


@pytest.mark.parametrize("path", READMES, ids=NAMES.get)
def test_functions_and_classes_are_in_the_files_that_the_text_names(path):
    for link, name in re.findall(r"\]\(([^)]+\.py)\)\s`([A-Za-z_]\w*)`", TEXTS[path]):
        source = (path.parent / link).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), f"{link} has no {name}"


@pytest.mark.parametrize("path", READMES, ids=NAMES.get)
def test_every_relative_link_and_anchor_resolves(path):
    for target in set(re.findall(r"\]\(([^)\s]+)\)", without_code(TEXTS[path]))):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("path", READMES, ids=NAMES.get)
def test_every_file_and_module_in_code_exists(path):
    """Paths in backticks, from the root or from the README's directory, and `python -m benchmarks.NAME`."""
    for name in re.findall(r"`((?:ft|tests|benchmarks)/[\w./]*|\w+\.py)`", without_code(TEXTS[path])):
        places = (ROOT / name, path.parent / name, ROOT / "ft" / name)
        assert any(place.exists() for place in places), name
    for name in re.findall(r"-m benchmarks\.(\w+)", TEXTS[path]):
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name


@pytest.mark.parametrize("path", READMES, ids=NAMES.get)
def test_every_flag_in_code_exists(path):
    sources = [*(ROOT / "ft" / "cli").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    added = {name for source in sources for name in re.findall(r'"(--[a-z0-9-]+)"', source.read_text(encoding="utf-8"))}
    flags = added | {"--" + field.name.replace("_", "-") for field in fields(Config)} | {*OF_OTHER_PROGRAMS}
    for code in re.findall(r"`([^`]+)`", without_code(TEXTS[path])):
        assert {word.partition("=")[0] for word in re.findall(r"(?<!\S)--[a-z0-9-]+", code)} <= flags, code


def test_every_benchmark_with_results_is_in_the_table_of_figures():
    text = TEXTS[ROOT / "benchmarks" / "README.md"]
    for path in (ROOT / "benchmarks" / "results").rglob("*.json"):
        name = path.relative_to(ROOT / "benchmarks")
        assert f"({name})" in text
        assert f"({name.with_suffix('.md')})" in text


@pytest.mark.parametrize("path", [MAIN, ROOT / "benchmarks" / "README.md"], ids=NAMES.get)
def test_figures_against_the_trainer_are_those_of_the_result_file(path):
    files = (ROOT / "benchmarks" / "results").rglob("trainer.md")
    measured = "".join(file.read_text(encoding="utf-8") for file in files)
    rows = re.findall(r"^\|[^|]+\| ([\d.]+) \S+ \| ([\d.]+) \S+ \| ([\d.]+) x \|$", TEXTS[path], re.MULTILINE)
    assert rows
    for trainer, ours, factor in rows:
        assert f"| {trainer} | {ours} | {factor} x |" in measured


def test_the_lines_that_a_newcomer_copies_are_found_in_the_readme():
    """By the patterns of `.ci/run`."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    patterns = re.findall(r"grep -m1 -o '([^']+)' README\.md", script)
    assert len(patterns) == 2
    run, test = (re.search(pattern, TEXTS[MAIN])[0] for pattern in patterns)
    assert run.endswith("run.py --demo")
    assert test.endswith("-m pytest")


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```$", TEXTS[MAIN], re.MULTILINE | re.DOTALL))
def test_the_python_snippets_of_the_readme_run(code, here, inputs):
    if "transformers" in code:
        pytest.importorskip("transformers")
    exec(compile(code.replace("openai-community/gpt2", inputs[1]), "README.md", "exec"), {})


def test_the_demo_prints_what_the_readme_shows(tmp_path, monkeypatch, capsys):
    """Whatever its numbers are; here they are those of two steps."""

    def masked(line):
        return re.sub(r"[\d.,]*\d\S*", "0", " ".join(line.split()))

    (shown,) = re.findall(r"^```text\n(.*?)^```$", TEXTS[MAIN], re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert main(["--demo", "--max-steps", "2", "--device", "cpu"]) == 0
    printed = [masked(line) for line in capsys.readouterr().out.splitlines()]
    for line in shown.splitlines():
        expected = masked(line.removesuffix("..."))
        if not line.startswith("  "):  # a prediction, which depends on the training
            assert any(each.startswith(expected) for each in printed), line


def test_command_lines_are_found():
    assert len(ALL_COMMANDS) > 20
    assert any(through_torchrun for _, through_torchrun in (each.values for each in ALL_COMMANDS))


@pytest.mark.parametrize(("arguments", "_through_torchrun"), ALL_COMMANDS)
def test_every_command_line_parses(arguments, _through_torchrun, here, monkeypatch):
    if "--help" in arguments or arguments[:1] == ["help"]:
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        return
    if not arguments or arguments[0] not in COMMANDS:
        read_arguments(arguments[1:] if arguments[:1] == ["data"] else arguments)
        return
    parse = CommandParser.parse_args

    def parse_only(self, words):
        parse(self, words)
        assert self.problems == []
        raise ParsedError

    def stop(*_):
        raise ParsedError

    monkeypatch.setattr(CommandParser, "parse_args", parse_only)
    monkeypatch.setattr("ft.explain.step.explain", stop)
    with pytest.raises(ParsedError):
        main(arguments)


CHEAP = [
    each
    for each in ALL_COMMANDS
    for arguments, through_torchrun in (each.values,)
    if not through_torchrun and not has_flag(arguments, "--help", "--compile", "--cuda-graphs")
]


@pytest.mark.parametrize(("arguments", "_through_torchrun"), CHEAP)
def test_cheap_command_lines_run(arguments, _through_torchrun, here, capsys):
    """On the demo's inputs, and runs for two steps."""
    command = next(iter(arguments), "")
    if command == "report":
        pytest.importorskip("matplotlib")
    if command == "explain" and "--demo" not in arguments:
        arguments = [*arguments, "--config", "runs/rotten_tomatoes/config.json", "--model", "./my-gpt2"]
    elif command == "help":
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        return
    elif command not in COMMANDS and not has_flag(arguments, "--resume"):
        own = [] if has_flag(arguments, "--demo", "--model") else ["--model", "./my-gpt2"]
        own += [] if has_flag(arguments, "--demo", "--dataset") else ["--dataset", "./my-reviews"]
        own += [] if command == "data" or has_flag(arguments, "--output-dir") else ["--output-dir", "runs/new"]
        arguments = [*arguments, *own, "--max-steps", "2", "--max-length", "32", "--device", "cpu"]
    assert main(arguments) == 0, capsys.readouterr().err
