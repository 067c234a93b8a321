"""After which steps a checkpoint is saved."""

import pytest

from ft.config import Config
from ft.train.schedule import SaveSchedule
from ft.train.state import State


def saved(config, *, busy=(), must=(), best=()):
    """The steps of 12 that are saved, and those after which `defers` was called."""
    asked = []

    def defers(state):
        asked.append(state.step)
        return state.step in busy

    saves, state, steps = SaveSchedule(config, defers), State(), []
    for step in range(1, 13):
        state.step = step
        if step in best:
            state.best_step = step
        if saves.are_due(state, must=step in must):
            steps.append(step)
    return steps, asked


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ([4, 8, 12], [4, 8, 12])),
        ({"busy": (4, 5, 6)}, ([7, 8, 12], [4, 5, 6, 7, 8, 12])),
        ({"busy": range(4, 13)}, ([], [*range(4, 13)])),
        ({"busy": range(4, 13), "must": (12,)}, ([12], [*range(4, 12)])),  # the last step, which does not ask
        ({"busy": range(4, 11), "must": (6,)}, ([6, 11, 12], [4, 5, 8, 9, 10, 11, 12])),  # that of 6 has done for 4
        ({"must": (5,)}, ([4, 5, 8, 12], [4, 8, 12])),
        ({"best": (6,)}, ([4, 8, 12], [4, 8, 12])),
    ],
)
def test_a_save_waits_for_the_first_step_that_need_not_put_it_off(settings, expected):
    assert saved(Config(save_steps=4), **settings) == expected


def test_the_save_of_the_best_evaluation_is_not_deferred_with_keep_best():
    config = Config(save_steps=4, keep_best=True)
    assert saved(config, busy=range(4, 11), best=(6,)) == ([6, 11, 12], [4, 5, 8, 9, 10, 11, 12])
