"""What an update decides: a function of the seed, its number and the numbers of its samples."""

import pytest
import torch

from train_srpo_wan_t2i import SampleSampler, draw_positions, plan_update


def numbers(plan):
    """All numbers of a plan, sample by sample: a list of tuples."""
    columns = [column for branch in plan.branches for column in branch[1:]]
    return list(zip(*(column.tolist() for column in (*columns, plan.weight)), strict=True))


# ---- Positions. -----------------------------------------------------------------------------------------------------


def test_the_same_seed_step_and_samples_give_the_same_plan(make_recipe):
    torch.randn(5)  # the global generator has no part in it
    first, second = (plan_update(make_recipe("--loss_weight_shift", 3), 7, range(12, 16)) for _ in range(2))
    assert numbers(first) == numbers(second)
    assert first[:2] == second[:2]


def test_every_sample_of_an_update_has_a_noise_level_of_its_own(make_recipe):
    plan = plan_update(make_recipe(), 0, range(32))
    for branch in plan.branches:
        assert branch.sigma_to.shape == branch.sigma_from.shape == branch.discount.shape == (32,)
        assert len(set(branch.sigma_to.tolist())) > 28
    denoise, inversion = plan.branches
    torch.testing.assert_close(denoise.sigma_to, inversion.sigma_to, rtol=0, atol=6e-4)  # one level of the grid


@pytest.mark.parametrize(
    "flags, step, sample", [(["--seed", 43], 3, 5), ([], 4, 5), ([], 3, 6)], ids=["seed", "step", "sample"]
)
def test_a_position_depends_on_the_seed_the_step_and_the_sample(make_recipe, flags, step, sample):
    (position,) = draw_positions(make_recipe(), 3, [5])
    assert draw_positions(make_recipe(*flags), step, [sample]) != [position]


def test_a_sample_has_the_same_position_in_any_micro_batch_and_process(make_recipe):
    recipe, alone = make_recipe("--loss_weight_shift", 3), SampleSampler(6, 42, range(9), 4)
    processes = [SampleSampler(6, 42, range(9), 2, index, 2) for index in range(2)]
    accumulated = SampleSampler(6, 42, range(9), 1)
    whole = numbers(plan_update(recipe, 2, alone.samples(2)))
    assert sum((numbers(plan_update(recipe, 2, each.samples(2))) for each in processes), []) == whole
    assert sum((numbers(plan_update(recipe, 2, accumulated.samples(n))) for n in range(8, 12)), []) == whole


def test_positions_keep_a_margin_of_five_to_both_ends_and_reach_it(make_recipe):
    recipe = make_recipe("--timestep_length", 12)
    assert set(draw_positions(recipe, 0, range(100))) == {5, 6, 7}


# ---- What follows from a position. ----------------------------------------------------------------------------------


def test_sigmas_and_discounts_follow_the_position_of_each_sample(make_recipe, plan_at):
    """The grid falls from 0.875 to 0.375 in 999 steps; a step spans 100. Discounts are read at p and at p - 100."""
    denoise, inversion = plan_at(make_recipe(), [250, 750]).branches
    torch.testing.assert_close(denoise.sigma_from, torch.tensor([0.875 - 325 / 999, 0.875 - 75 / 999]))
    torch.testing.assert_close(denoise.sigma_to, torch.tensor([0.875 - 375 / 999, 0.875 - 125 / 999]))
    torch.testing.assert_close(inversion.sigma_from, torch.tensor([0.875 - 425 / 999, 0.875 - 175 / 999]))
    torch.testing.assert_close(inversion.sigma_to, torch.tensor([0.875 - 375 / 999, 0.875 - 125 / 999]))
    torch.testing.assert_close(denoise.discount, torch.tensor([0.1375375, 0.2126126]))
    torch.testing.assert_close(inversion.discount, torch.tensor([0.2564565, 0.1113113]))


@pytest.mark.parametrize(
    "flags, expected", [([], [1.0, 1.0, 1.0]), (["--loss_weight_shift", 3], [0.5, 0.9, 0.75])], ids=["none", "shift 3"]
)
def test_every_sample_has_the_weight_of_its_position(make_recipe, plan_at, flags, expected):
    """At a quarter, 3 * 0.25 / (1 + 2 * 0.25) = 0.5."""
    torch.testing.assert_close(plan_at(make_recipe(*flags), [250, 750, 500]).weight, torch.tensor(expected))


# ---- Branches and words. --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice, expected",
    [
        ("both", {"denoise": [0, 0], "inversion": [1, 1]}),
        ("denoise", {"denoise": [0, 0]}),
        ("inversion", {"inversion": [1, 1]}),
    ],
)
def test_the_inversion_branch_alone_swaps_the_captions(make_recipe, choice, expected):
    plan = plan_update(make_recipe("--branches", choice), 0, range(2))
    assert {branch.name: branch.swap.tolist() for branch in plan.branches} == expected


def test_words_change_by_step_and_not_by_sample(make_recipe):
    recipe = make_recipe("--positive_words", "Real", "Detail", "--negative_words", "Oil", "Flat", "Anime")
    words = [("Real", "Oil"), ("Detail", "Flat"), ("Real", "Anime"), ("Detail", "Oil"), ("Real", "Flat")]
    for samples in (range(2), range(100, 104)):
        assert [plan_update(recipe, step, samples)[:2] for step in range(5)] == words


def test_the_words_of_the_published_run_are_the_default(make_recipe):
    plans = [plan_update(make_recipe(), step, range(1)) for step in range(5)]
    assert [plan.positive_word for plan in plans] == ["Natural-lighting", "Detail", "Detailed", "Real"] + [
        "Natural-lighting"
    ]
    assert [plan.negative_word for plan in plans] == ["Concept art", "Painting", "Anime", "Flat", "Oil"]
