"""The last lines of a run: what a rise of the perplexity means, and what to try after the demo."""

import math
import shlex
from pathlib import Path

import pytest

from ft.cli.arguments import COMMANDS, read_arguments
from ft.config import Config
from ft.report.console import MUCH_WORSE, _forgotten, after_demo, closing
from ft.report.outcome import Outcome
from ft.train.state import State


@pytest.mark.parametrize("is_demo", [True, False])
@pytest.mark.parametrize("factor", [0.9, 1.0, MUCH_WORSE + 0.01, 1e6])
def test_a_large_rise_of_the_perplexity_is_explained(factor, is_demo):
    state = State(general_loss_before=math.log(500.0), general_loss=math.log(500.0 * factor))
    line = _forgotten(state, is_demo=is_demo)
    assert line.startswith(f"Perplexity on general text 500.00 before, {500 * factor:,.2f} after")
    assert line.endswith("after.\n") == (factor <= MUCH_WORSE)
    assert ("the demo's model" in line) == (is_demo and factor > MUCH_WORSE)
    assert _forgotten(State(), is_demo=is_demo) == ""


def test_what_to_try_after_the_demo_are_command_lines():
    lines = after_demo(Path("runs/demo")).splitlines()[2:]
    assert len(lines) == 3
    for line in lines:
        python, script, *words = shlex.split(line.strip().partition("   ")[0])
        assert (python, script) == ("python", "run.py")
        if words and words[0] in COMMANDS:
            assert words[1] in ("runs/demo", "--demo")
        else:
            read_arguments(words)


@pytest.mark.parametrize(
    ("present", "best_step", "keep_best", "named"),
    [
        ([5, 10], 5, True, "checkpoint-5"),
        ([10], 5, True, None),  # deleted, or its save has failed
        ([10], None, True, None),  # no evaluation was finite
        ([5, 10], 5, False, None),
    ],
)
def test_the_checkpoint_of_the_best_evaluation_is_named_if_it_is_there(tmp_path, present, best_step, keep_best, named):
    for step in present:
        (tmp_path / f"checkpoint-{step}").mkdir()
    state = State(step=10, best_step=best_step, last_accuracy=0.5)
    lines = closing(tmp_path, Outcome(state, None, 60.0), 10, Config(keep_best=keep_best), None)
    assert "the newest checkpoints beside it, " in lines
    assert (f"that of the best evaluation is {named}, " in lines) == (named is not None)
    assert ("checkpoint-" in lines) == (named is not None)
