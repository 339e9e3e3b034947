"""Each sample of an update has a noise level of its own, the same however the update is spread."""

import pytest
import torch
from helpers import logged, wrap

import train_srpo_wan_t2i


@pytest.fixture
def plans(monkeypatch):
    """The plans that graded passes followed: a list that grows."""
    plans = []

    def record(graded_pass, models, rollout, plan, recipe):
        plans.append(plan)
        return graded_pass(models, rollout, plan, recipe)

    wrap(monkeypatch, train_srpo_wan_t2i, "graded_pass", record)
    return plans


def levels(plans):
    """Where the steps of all samples of an update begin and end, (branches, 2, samples)."""
    branches = zip(*(plan.branches for plan in plans), strict=True)
    sigmas = [[[getattr(each, end) for each in same] for end in ("sigma_from", "sigma_to")] for same in branches]
    return torch.stack([torch.stack([torch.cat(parts) for parts in ends]) for ends in sigmas])


def test_every_sample_has_a_level_of_its_own(train, plans):
    train("--train_batch_size", 4, "--max_train_steps", 1)
    (found,) = [levels([plan]) for plan in plans]
    assert found.shape == (2, 2, 4)
    assert all(len(set(sigmas.tolist())) == 4 for sigmas in found.flatten(0, 1))


def test_a_batch_has_the_levels_of_rollouts_that_are_accumulated(train, plans):
    train("--train_batch_size", 4)
    train("--train_batch_size", 2, "--gradient_accumulation_steps", 2)
    assert len(plans) == 2 + 4
    for batch, accumulated in zip(plans[:2], (plans[2:4], plans[4:]), strict=True):
        assert torch.equal(levels([batch]), levels(accumulated))


def test_further_updates_on_a_rollout_have_other_levels(train, plans):
    train("--train_batch_size", 2, "--updates_per_rollout", 2)
    first, second = (levels([plan]) for plan in plans)
    assert (first != second).all()


def test_sigma_is_logged_as_the_mean_over_samples_of_where_the_denoise_branch_ends(train, plans):
    run = train("--train_batch_size", 2, "--gradient_accumulation_steps", 2)
    means = [levels(plans[start : start + 2])[0, 1].mean().item() for start in (0, 2)]
    assert logged(run, "sigma") == pytest.approx(means, abs=1e-6)
