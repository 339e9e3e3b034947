"""Fixtures that unit tests share."""

import pytest

import train_srpo_wan_t2i
from train_srpo_wan_t2i import plan_update


@pytest.fixture(scope="session")
def make_recipe(make_args):
    """Function: flags -> the `Recipe` of a run with these flags."""
    return lambda *flags: train_srpo_wan_t2i.make_recipe(vars(make_args(*flags)))


@pytest.fixture
def plan_at(monkeypatch):
    """Function: a recipe and positions -> the `Plan` of samples that have these positions in the training grid."""

    def plan(recipe, positions, step=0):
        with monkeypatch.context() as patch:
            patch.setattr(train_srpo_wan_t2i, "draw_positions", lambda recipe, step, samples: list(positions))
            return plan_update(recipe, step, range(len(positions)))

    return plan
