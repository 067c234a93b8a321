"""The README's text to learn from: its snippets run, in their order, and its links lead to files."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## How fine-tuning works.*?(?=^## )", README, re.MULTILINE | re.DOTALL)[0]
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)


def test_the_snippets_run_in_their_order_and_a_step_lowers_the_loss(inputs, capsys):
    _, model, _, dataset, *_ = inputs
    code = "\n".join(SNIPPETS)
    for published, ours in (("openai-community/gpt2", model), ("cornell-movie-review-data/rotten_tomatoes", dataset)):
        assert code.count(published) == 1
        code = code.replace(published, ours)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["examples"]) == len(names["split"].texts) == 77
    assert names["batch"].target_ids.tolist() == [e.target_ids[0] for e in names["examples"][:8]]
    first, second = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[-2:])
    assert second < first


def test_there_are_eight_steps_and_each_names_a_file():
    steps = re.split(r"^\*\*(?=\d\. )", SECTION, flags=re.MULTILINE)[1:]
    assert [int(step[0]) for step in steps] == list(range(1, 9))
    assert all("`ft/" in step for step in steps)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_every_link_within_the_repository_leads_somewhere(target):
    if not target.startswith("http"):
        assert (Path(__file__).parents[2] / target).exists()
