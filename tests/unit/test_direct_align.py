"""SRPO's core: noise levels, the graded step and its slope, the relative score and the loss."""

import pytest
import torch
from helpers import draw

from train_srpo_wan_t2i import branch_sigmas, direct_align_step, make_train_sigmas, shift_sigmas, srp_score, srpo_loss


DENOISE, INVERSION = (0.675, 0.625), (0.575, 0.625)  # (sigma_from, sigma_to), both recover at 0.625


# ---- Noise levels. --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sigma, shift, expected",
    [
        (0.5, 1.0, 0.5),
        (0.5, 3.0, 0.75),
        (0.875, 3.0, 2.625 / 2.75),
        (0.5, 12.0, 6 / 6.5),
        (0.0, 5.0, 0),
        (1.0, 5.0, 1),
    ],
)
def test_shift_bends_noise_levels_towards_one_and_keeps_the_ends(sigma, shift, expected):
    assert shift_sigmas(sigma, shift) == pytest.approx(expected, abs=1e-12)


def test_shift_of_a_tensor_is_elementwise():
    shifted = shift_sigmas(torch.tensor([[1.0, 0.5], [0.25, 0.0]]), 3.0)
    torch.testing.assert_close(shifted, torch.tensor([[1.0, 0.75], [0.5, 0.0]]))


def test_default_window_starts_at_the_boundary_of_the_experts():
    sigmas = make_train_sigmas(40, 1.0, (5, 25), 1000)
    assert sigmas.shape == (1000,) and sigmas.dtype == torch.float32
    assert sigmas[0].item() == 0.875
    assert sigmas[500].item() == pytest.approx(0.875 - 0.5 * 500 / 999, abs=1e-6)
    assert sigmas[-1].item() == 0.375
    assert (sigmas.diff() < 0).all()


def test_window_ends_are_shifted_and_levels_between_them_are_evenly_spaced():
    sigmas = make_train_sigmas(40, 3.0, [5, 25], 3)
    torch.testing.assert_close(sigmas, torch.tensor([0.9545455, 0.7987013, 0.6428571]))


TEN_SIGMAS = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


@pytest.mark.parametrize(
    "position, denoise, inversion, positions",
    [
        (5, (0.6, 0.4), (0.2, 0.4), (5, 3)),
        (8, (0.9, 0.7), (0.5, 0.7), (8, 6)),
        (9, (0.9, 0.8), (0.7, 0.8), (9, 8)),  # no room above: the step of both branches is cut
        (2, (0.3, 0.1), (0.0, 0.2), (2, 1)),  # no room below: the inversion branch starts from the lowest level
        (1, (0.1, 0.0), (0.0, 0.1), (1, 1)),
    ],
)
def test_branches_recover_from_above_and_from_below(position, denoise, inversion, positions):
    """10 levels with groundtruth_ratio 0.81: the step spans int(0.19 * 10) + 1 = 2 of them."""
    found = branch_sigmas(TEN_SIGMAS, position, 0.81)
    assert [sigma.item() for sigma in found[0]] == pytest.approx(denoise)
    assert [sigma.item() for sigma in found[1]] == pytest.approx(inversion)
    assert found[2] == positions


@pytest.mark.parametrize("position", [-1, 0, 10])
def test_positions_outside_the_grid_are_refused(position):
    with pytest.raises(ValueError, match=f"`position` must be between 1 and 9, but is {position}"):
        branch_sigmas(TEN_SIGMAS, position, 0.9)


@pytest.mark.parametrize(
    "choice, names", [("both", ["denoise", "inversion"]), ("denoise", ["denoise"]), ("inversion", ["inversion"])]
)
def test_branches_flag_chooses_branches_and_changes_no_number(make_recipe, plan_at, choice, names):
    both = {
        "denoise": pytest.approx((0.6747998, 0.6247497, 0.1750751)),
        "inversion": pytest.approx((0.5746997, 0.6247497, 0.1838839)),
    }
    branches = plan_at(make_recipe("--branches", choice), [500]).branches
    assert [branch.name for branch in branches] == names
    for branch in branches:
        assert (branch.sigma_from.item(), branch.sigma_to.item(), branch.discount.item()) == both[branch.name]


QWEN_IMAGE = [
    *("--branches", "denoise", "--loss", "linear", "--loss_weight_shift", 3.0, "--discount_pos", 0, 0),
    *("--groundtruth_ratio", 0.6, "--timestep_length", 100, "--shift", 1.0),
    *("--train_timestep", 5, 40, "--num_inference_steps", 50),
    *("--learning_rate", 3e-6, "--max_grad_norm", 50, "--reward_model", "PickScore"),
]


@pytest.mark.parametrize(
    "position, sigma_from, sigma_to, weight",
    [(50, 0.8363636, 0.5464646, 0.75), (5, 0.2636364, 0.2282828, 3 / 22), (95, 0.9, 0.8646465, 57 / 58)],
)
def test_recipe_published_for_qwen_image_is_reachable(
    make_args, make_recipe, plan_at, position, sigma_from, sigma_to, weight
):
    recipe = make_recipe(*QWEN_IMAGE)
    assert recipe.timestep_length == 100
    plan = plan_at(recipe, [position])
    (branch,) = plan.branches
    assert branch.name == "denoise" and branch.discount == 0
    assert (branch.sigma_from.item(), branch.sigma_to.item()) == pytest.approx((sigma_from, sigma_to), abs=1e-6)
    assert plan.weight.item() == pytest.approx(weight)
    args = make_args(*QWEN_IMAGE)
    assert (args.loss, args.reward_model, args.learning_rate, args.max_grad_norm) == ("linear", "PickScore", 3e-6, 50)


# ---- The graded step. -----------------------------------------------------------------------------------------------


BATCHED = tuple(torch.tensor(pair, dtype=torch.float64) for pair in zip(DENOISE, INVERSION, strict=True))


@pytest.mark.parametrize(
    "sigma_from, sigma_to", [DENOISE, INVERSION, BATCHED], ids=["denoise", "inversion", "a level per sample"]
)
def test_an_exact_velocity_recovers_the_clean_latents_exactly(sigma_from, sigma_to):
    x0, noise = (draw(seed, 2, 4, 1, 6, 8, dtype=torch.float64) for seed in (0, 1))
    x0_hat = direct_align_step(lambda x, sigma: noise - x0, x0, noise, sigma_from, sigma_to)
    torch.testing.assert_close(x0_hat, x0, rtol=0, atol=1e-14)


def test_the_network_sees_the_injected_noise_and_its_level():
    x0, noise = draw(0, 2, 4, 1, 6, 8), draw(1, 2, 4, 1, 6, 8)
    seen = []

    def velocity(x, sigma):
        seen.append((x, sigma))
        return x

    sigma_from = torch.tensor([0.675, 0.575])
    direct_align_step(velocity, x0, noise, sigma_from, torch.tensor([0.625, 0.625]))
    ((x, sigma),) = seen
    torch.testing.assert_close(x[0], 0.675 * noise[0] + 0.325 * x0[0])
    torch.testing.assert_close(x[1], 0.575 * noise[1] + 0.425 * x0[1])
    assert torch.equal(sigma, sigma_from)


@pytest.mark.parametrize(
    "sigma_from, sigma_to, slope",
    [(*DENOISE, -0.05 / 0.375), (*INVERSION, 0.05 / 0.375)],
    ids=["denoise is negative", "inversion is positive"],
)
def test_slope_of_the_recovered_latents_in_the_velocity(sigma_from, sigma_to, slope):
    x0, noise = (draw(seed, 1, 4, 1, 2, 2, dtype=torch.float64) for seed in (0, 1))
    velocity = draw(2, 1, 4, 1, 2, 2, dtype=torch.float64).requires_grad_()
    direct_align_step(lambda x, sigma: velocity, x0, noise, sigma_from, sigma_to).sum().backward()
    torch.testing.assert_close(velocity.grad, torch.full_like(velocity, slope), rtol=0, atol=1e-14)


def test_no_gradient_flows_into_the_clean_latents():
    x0 = draw(0, 1, 4, 1, 2, 2).requires_grad_()
    bias = torch.zeros((), requires_grad=True)
    direct_align_step(lambda x, sigma: x + bias, x0, draw(1, 1, 4, 1, 2, 2), *DENOISE).sum().backward()
    assert x0.grad is None
    assert bias.grad is not None


# ---- The relative score and the loss. -------------------------------------------------------------------------------


IMAGE = torch.tensor([[1.0, 0.0], [0.6, 0.8]])

POSITIVE = torch.tensor([[0.8, 0.6], [1.0, 0.0]])

NEGATIVE = torch.tensor([[0.6, 0.8], [0.0, 1.0]])


@pytest.mark.parametrize(
    "discount, expected",
    [(0.0, [0.2, -0.2]), (0.1, [0.28, -0.14]), (torch.tensor([0.1, 0.5]), [0.28, 0.1])],
    ids=["none", "one for all", "one per sample"],
)
def test_score_is_relative_and_discount_adds_weight_to_the_positive_caption(discount, expected):
    torch.testing.assert_close(srp_score(IMAGE, POSITIVE, NEGATIVE, discount), torch.tensor(expected))


def test_loss_leaves_scores_above_the_margin_alone():
    score = torch.tensor([0.2, 0.7, 0.9, -0.5], requires_grad=True)
    loss = srpo_loss(score, margin=0.7)
    loss.backward()
    assert loss.item() == pytest.approx((0.5 + 0 + 0 + 1.2) / 4)
    torch.testing.assert_close(score.grad, torch.tensor([-0.25, 0.0, 0.0, -0.25]))


def test_without_a_margin_the_loss_is_linear():
    score = torch.tensor([0.2, 0.7, 0.9, -0.5], requires_grad=True)
    loss = srpo_loss(score, margin=None)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.2 + 0.7 + 0.9 - 0.5) / 4)
    torch.testing.assert_close(score.grad, torch.full((4,), -0.25))


@pytest.mark.parametrize(
    "margin, expected", [(0.7, (1.0 * 0.5 + 0.5 * 0.2) / 3), (None, -(1.0 * 0.2 + 0.5 * 0.5 + 2.0 * 0.9) / 3)]
)
def test_each_score_has_a_weight_of_its_own_in_the_loss(margin, expected):
    score, weight = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([1.0, 0.5, 2.0])
    assert srpo_loss(score, margin, weight).item() == pytest.approx(expected)
