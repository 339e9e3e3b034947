"""What one rollout contributes to an update: as in the published step, and with random models of all kinds."""

import json
from functools import partial
from typing import NamedTuple

import pytest
import torch
from helpers import ROOT, draw

from diffusers import AutoencoderKLWan, WanTransformer3DModel

from train_srpo_wan_t2i import (
    NEGATIVE_WORDS,
    POSITIVE_WORDS,
    Branch,
    CLIPReward,
    decode_latents,
    direct_align_step,
    graded_pass,
    make_branches,
    make_train_sigmas,
    predict_velocity,
    srp_score,
)


DENOISE, INVERSION = (0.675, 0.625), (0.575, 0.625)  # (sigma_from, sigma_to), both recover at 0.625


# ---- The recorded step. ---------------------------------------------------------------------------------------------


# What the published training step computes on small inputs; its "description" says how it was recorded.
PUBLISHED = json.loads((ROOT / "tests/fixtures/srpo_published_step.json").read_text())["cases"]

PUBLISHED_BRANCHES = [
    pytest.param(case, index, id=f"position {case['position']}, {case['branches'][index]['name']}")
    for case in PUBLISHED
    for index in range(2)
]


def flags(settings):
    """{"shift": 1.0, "discount_pos": [0.1, 0.25]} -> ["--shift", 1.0, "--discount_pos", 0.1, 0.25]"""
    return [
        part
        for name, value in settings.items()
        for part in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]


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
    return TinyParts(*loaded_models, draw(0, 2, 4, 1, 4, 6), draw(1, 2, 4, 1, 4, 6), draw(2, 2, 16, 16))


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
