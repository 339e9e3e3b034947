"""SRPO's core: noise levels, the graded step and its slope, the relative score, and what one rollout contributes."""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from diffusers import AutoencoderKLWan, WanTransformer3DModel

from train_srpo_wan_t2i import (
    NEGATIVE_WORDS,
    POSITIVE_WORDS,
    Branch,
    CLIPReward,
    branch_sigmas,
    decode_latents,
    direct_align_step,
    graded_pass,
    make_branches,
    make_train_sigmas,
    predict_velocity,
    shift_sigmas,
    srp_score,
    srpo_loss,
)


# What the published training step computes on small inputs; its "description" says how it was recorded.
PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "srpo_published_step.json").read_text())["cases"]
PUBLISHED_BRANCHES = [
    pytest.param(case, index, id=f"position {case['position']}, {case['branches'][index]['name']}")
    for case in PUBLISHED
    for index in range(2)
]

DENOISE, INVERSION = (0.675, 0.625), (0.575, 0.625)  # (sigma_from, sigma_to), both recover at 0.625


def flags(settings):
    """{"shift": 1.0, "discount_pos": [0.1, 0.25]} -> ["--shift", 1.0, "--discount_pos", 0.1, 0.25]"""
    return [
        part
        for name, value in settings.items()
        for part in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]


def latents(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- The recorded step. ---------------------------------------------------------------------------------------------


def published_branch(make_args, case, index):
    args = make_args(*flags(case["settings"]))
    train_sigmas = make_train_sigmas(args.num_inference_steps, args.shift, args.train_timestep, args.timestep_length)
    return make_branches(args, train_sigmas, case["position"])[index]


def published_velocity(x, sigma):
    """The stand-in of the recording. The published code truncates timesteps to integers; ours does not."""
    timestep = torch.trunc(1000 * torch.as_tensor(sigma, dtype=torch.float32)) / 1000
    return 0.7 * x - 0.2 * timestep.reshape(-1, *[1] * (x.ndim - 1)) + 0.1 * torch.tanh(x)


@pytest.mark.parametrize("case, index", PUBLISHED_BRANCHES)
def test_published_noise_levels_and_discount(make_args, case, index):
    branch, expected = published_branch(make_args, case, index), case["branches"][index]
    assert branch.name == expected["name"]
    assert branch.sigma_from == pytest.approx(expected["sigma_from"], abs=1e-6)
    assert branch.sigma_to == pytest.approx(expected["sigma_to"], abs=1e-6)
    assert branch.discount == pytest.approx(expected["discount"], abs=1e-6)


@pytest.mark.parametrize("case, index", PUBLISHED_BRANCHES)
def test_published_recovered_latents(make_args, case, index):
    branch, expected = published_branch(make_args, case, index), case["branches"][index]
    x0, noise, recovered = (
        torch.tensor(values).view(case["shape"]) for values in (case["x0"], case["noise"], expected["recovered"])
    )
    if (case["position"], branch.name) == (5, "inversion"):
        # Here alone the recording injected sigma_from * noise rounded to bfloat16; as much is added to x0.
        injected = branch.sigma_from * noise
        x0 = x0 + (injected.bfloat16().float() - injected) / (1 - branch.sigma_from)
    x0_hat = direct_align_step(published_velocity, x0, noise, branch.sigma_from, branch.sigma_to)
    # Recorded are 7 decimals of x0, whose rounding grows by 1 / (1 - sigma_to): eightfold at position 995.
    torch.testing.assert_close(x0_hat, recovered, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case, index", PUBLISHED_BRANCHES)
def test_published_captions(make_args, tiny_parts, case, index):
    """The published words, each in front of the caption, and which of the two the branch is drawn to."""
    branch, expected = published_branch(make_args, case, index), case["branches"][index]
    words = POSITIVE_WORDS[case["control_word_index"]], NEGATIVE_WORDS[case["control_word_index"]]
    _, metrics = tiny_parts.graded_pass(make_args(), [branch], words=words, captions=["a red circle", "a red circle"])

    reward = tiny_parts.reward_model
    x0_hat = tiny_parts.recover(branch)
    positive, negative = reward.encode_texts(
        [expected["reward_positive_caption"], expected["reward_negative_caption"]]
    )
    score = srp_score(
        reward.encode_images(decode_latents(tiny_parts.vae, x0_hat)[0]), positive, negative, expected["discount"]
    )
    assert metrics["score"].item() == pytest.approx(reward.scale * score.mean().item(), abs=1e-5)


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
def test_branches_flag_chooses_branches_and_changes_no_number(make_args, choice, names):
    train_sigmas = make_train_sigmas(40, 1.0, (5, 25), 1000)
    both = {
        "denoise": pytest.approx((0.6747998, 0.6247497, 0.1750751)),
        "inversion": pytest.approx((0.5746997, 0.6247497, 0.1838839)),
    }
    branches = make_branches(make_args("--branches", choice), train_sigmas, 500)
    assert [branch.name for branch in branches] == names
    for branch in branches:
        assert (branch.sigma_from, branch.sigma_to, branch.discount) == both[branch.name]


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
def test_recipe_published_for_qwen_image_is_reachable(make_args, position, sigma_from, sigma_to, weight):
    args = make_args(*QWEN_IMAGE)
    train_sigmas = make_train_sigmas(args.num_inference_steps, args.shift, args.train_timestep, args.timestep_length)
    assert len(train_sigmas) == 100
    (branch,) = make_branches(args, train_sigmas, position)
    assert branch.name == "denoise" and branch.discount == 0
    assert (branch.sigma_from, branch.sigma_to) == pytest.approx((sigma_from, sigma_to), abs=1e-6)
    assert shift_sigmas(position / args.timestep_length, args.loss_weight_shift) == pytest.approx(weight)
    assert (args.loss, args.reward_model, args.learning_rate, args.max_grad_norm) == ("linear", "PickScore", 3e-6, 50)


# ---- The graded step. -----------------------------------------------------------------------------------------------


BATCHED = tuple(torch.tensor(pair, dtype=torch.float64) for pair in zip(DENOISE, INVERSION, strict=True))


@pytest.mark.parametrize(
    "sigma_from, sigma_to", [DENOISE, INVERSION, BATCHED], ids=["denoise", "inversion", "a level per sample"]
)
def test_an_exact_velocity_recovers_the_clean_latents_exactly(sigma_from, sigma_to):
    x0, noise = (latents(seed, 2, 4, 1, 6, 8, dtype=torch.float64) for seed in (0, 1))
    x0_hat = direct_align_step(lambda x, sigma: noise - x0, x0, noise, sigma_from, sigma_to)
    torch.testing.assert_close(x0_hat, x0, rtol=0, atol=1e-14)


def test_the_network_sees_the_injected_noise_and_its_level():
    x0, noise = latents(0, 2, 4, 1, 6, 8), latents(1, 2, 4, 1, 6, 8)
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
    x0, noise = (latents(seed, 1, 4, 1, 2, 2, dtype=torch.float64) for seed in (0, 1))
    velocity = latents(2, 1, 4, 1, 2, 2, dtype=torch.float64).requires_grad_()
    direct_align_step(lambda x, sigma: velocity, x0, noise, sigma_from, sigma_to).sum().backward()
    torch.testing.assert_close(velocity.grad, torch.full_like(velocity, slope), rtol=0, atol=1e-14)


def test_no_gradient_flows_into_the_clean_latents():
    x0 = latents(0, 1, 4, 1, 2, 2).requires_grad_()
    bias = torch.zeros((), requires_grad=True)
    direct_align_step(lambda x, sigma: x + bias, x0, latents(1, 1, 4, 1, 2, 2), *DENOISE).sum().backward()
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


# ---- The graded pass, with a random transformer, VAE and reward model. ----------------------------------------------


class TinyParts(NamedTuple):
    """Models in float32, frozen as in a run, and the inputs of one rollout of two samples."""

    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan
    reward_model: CLIPReward
    x0: torch.Tensor
    noise: torch.Tensor
    prompt_embeds: torch.Tensor

    def graded_pass(
        self, args, branches, words=("Real", "Oil"), captions=("a red cat", "a blue dog"), weight=1.0, velocity_fn=None
    ):
        return graded_pass(
            velocity_fn or partial(predict_velocity, self.transformer),
            self.vae,
            self.reward_model,
            self.x0,
            self.noise,
            self.prompt_embeds,
            list(captions),
            words,
            branches,
            args,
            weight,
        )

    def recover(self, branch):
        return direct_align_step(
            lambda x, sigma: predict_velocity(self.transformer, x, sigma, self.prompt_embeds),
            self.x0,
            self.noise,
            branch.sigma_from,
            branch.sigma_to,
        )

    def gradient(self, *args, **kwargs):
        """The gradient of the loss as one vector over all parameters of the transformer."""
        self.transformer.zero_grad()
        self.graded_pass(*args, **kwargs)[0].backward()
        return torch.cat([parameter.grad.flatten() for parameter in self.transformer.parameters()])


@pytest.fixture(scope="module")
def loaded_models(tiny_model, tiny_reward):
    transformer = WanTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer_2")
    vae = AutoencoderKLWan.from_pretrained(tiny_model, subfolder="vae").requires_grad_(False)
    return transformer, vae, CLIPReward(tiny_reward, tiny_reward)


@pytest.fixture
def tiny_parts(loaded_models):
    loaded_models[0].zero_grad()
    return TinyParts(*loaded_models, latents(0, 2, 4, 1, 4, 6), latents(1, 2, 4, 1, 4, 6), latents(2, 2, 16, 16))


BRANCHES = [Branch("denoise", *DENOISE, 0.2), Branch("inversion", *INVERSION, 0.1)]


def test_both_branches_in_one_batch_give_the_average_of_each_alone(make_args, tiny_parts):
    together, metrics = tiny_parts.graded_pass(make_args(), BRANCHES)
    alone = [tiny_parts.graded_pass(make_args(), [branch]) for branch in BRANCHES]
    torch.testing.assert_close(together, (alone[0][0] + alone[1][0]) / 2, rtol=0, atol=1e-5)
    for (_, own), branch in zip(alone, BRANCHES, strict=True):
        torch.testing.assert_close(metrics[f"score_{branch.name}"], own["score"], rtol=0, atol=1e-5)


def test_both_branches_in_one_batch_give_the_average_gradient(make_args, tiny_parts):
    together = tiny_parts.gradient(make_args(), BRANCHES)
    alone = [tiny_parts.gradient(make_args(), [branch]) for branch in BRANCHES]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.name)
def test_swapping_the_control_words_turns_the_gradient_around(make_args, tiny_parts, branch):
    branch, args = branch._replace(discount=0.0), make_args("--loss", "linear")
    gradient = tiny_parts.gradient(args, [branch], words=("Real", "Oil"))
    swapped = tiny_parts.gradient(args, [branch], words=("Oil", "Real"))
    assert gradient.abs().max() > 1e-5
    torch.testing.assert_close(swapped, -gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_both_branches_push_an_exact_velocity_the_same_way(make_args, tiny_parts):
    """Slopes of opposite sign and swapped captions cancel: here the two gradients are even equal."""
    gradients = []
    for branch in BRANCHES:
        velocity = (tiny_parts.noise - tiny_parts.x0).requires_grad_()
        args = make_args("--loss", "linear")
        loss, _ = tiny_parts.graded_pass(args, [branch._replace(discount=0.0)], velocity_fn=lambda *_, v=velocity: v)
        loss.backward()
        gradients.append(velocity.grad)
    assert gradients[0].abs().max() > 1e-6
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-3 * gradients[0].abs().max().item())


def test_a_step_against_the_gradient_raises_the_score(make_args, tiny_parts):
    args = make_args("--loss", "linear")
    velocity = (tiny_parts.noise - tiny_parts.x0).repeat(2, 1, 1, 1, 1).requires_grad_()
    loss, before = tiny_parts.graded_pass(args, BRANCHES, velocity_fn=lambda *_: velocity)
    loss.backward()
    stepped = velocity.detach() - 1e-2 * velocity.grad / velocity.grad.abs().max()
    _, after = tiny_parts.graded_pass(args, BRANCHES, velocity_fn=lambda *_: stepped)
    for name in ("score_denoise", "score_inversion"):
        assert after[name] > before[name]


def test_only_the_transformer_gets_gradients_and_all_of_it_does(make_args, tiny_parts):
    tiny_parts.graded_pass(make_args(), BRANCHES)[0].backward()
    for frozen in (tiny_parts.vae, tiny_parts.reward_model):
        assert [name for name, parameter in frozen.named_parameters() if parameter.grad is not None] == []
    untrained = [
        name
        for name, parameter in tiny_parts.transformer.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or parameter.grad.abs().max() == 0
    ]
    assert untrained == []


def test_linear_loss_is_minus_the_score_and_hinge_adds_the_margin(make_args, tiny_parts):
    linear, metrics = tiny_parts.graded_pass(make_args("--loss", "linear"), BRANCHES)
    hinge, _ = tiny_parts.graded_pass(make_args("--loss", "hinge", "--reward_margin", 2.0), BRANCHES)
    assert linear.item() == pytest.approx(-metrics["score"].item(), abs=1e-6)
    assert hinge.item() == pytest.approx(2.0 - metrics["score"].item(), abs=1e-6)


def test_hinge_loss_of_images_beyond_the_margin_gives_no_gradient(make_args, tiny_parts):
    args = make_args("--reward_margin", -10.0)
    assert tiny_parts.graded_pass(args, BRANCHES)[0].item() == 0
    assert tiny_parts.gradient(args, BRANCHES).abs().max() == 0


@pytest.mark.parametrize("loss", ["hinge", "linear"])
def test_weight_scales_the_loss(make_args, tiny_parts, loss):
    args = make_args("--loss", loss)
    plain, _ = tiny_parts.graded_pass(args, BRANCHES)
    weighted, metrics = tiny_parts.graded_pass(args, BRANCHES, weight=0.75)
    assert weighted.item() == pytest.approx(0.75 * plain.item())
    assert metrics["loss"].item() == pytest.approx(0.75 * plain.item())


def test_metrics_hold_the_rewards_of_both_worded_captions(make_args, tiny_parts):
    _, metrics = tiny_parts.graded_pass(make_args(), BRANCHES[:1])
    pixels, saturated = decode_latents(tiny_parts.vae, tiny_parts.recover(BRANCHES[0]))
    reward = tiny_parts.reward_model
    positive = reward.score(pixels, ["Real. a red cat", "Real. a blue dog"]).mean()
    negative = reward.score(pixels, ["Oil. a red cat", "Oil. a blue dog"]).mean()
    assert metrics["reward_positive"].item() == pytest.approx(positive.item(), abs=1e-5)
    assert metrics["reward_negative"].item() == pytest.approx(negative.item(), abs=1e-5)
    assert metrics["saturated"] == saturated
    assert not any(value.requires_grad for value in metrics.values())


def test_the_transformer_sees_each_branch_at_its_own_noise_level(make_args, tiny_parts):
    seen = []

    def velocity_fn(x, sigma, prompt_embeds):
        seen.append((sigma, prompt_embeds))
        return predict_velocity(tiny_parts.transformer, x, sigma, prompt_embeds)

    tiny_parts.graded_pass(make_args(), BRANCHES, velocity_fn=velocity_fn)
    ((sigma, prompt_embeds),) = seen
    torch.testing.assert_close(sigma, torch.tensor([0.675, 0.675, 0.575, 0.575]))
    assert torch.equal(prompt_embeds, torch.cat([tiny_parts.prompt_embeds, tiny_parts.prompt_embeds]))
