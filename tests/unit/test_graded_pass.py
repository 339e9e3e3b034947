"""What one rollout contributes to an update: as in the published step, and with random models of all kinds."""

import copy
import json

import pytest
import torch
from helpers import ROOT, draw

from diffusers import AutoencoderKLWan, WanTransformer3DModel

from train_srpo_wan_t2i import (
    Branch,
    CLIPReward,
    Models,
    Plan,
    Rollout,
    decode_latents,
    direct_align_step,
    graded_pass,
    set_up_transformer,
    srp_score,
    transformer_velocity,
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


@pytest.fixture
def published_branch(make_recipe, plan_at):
    """Function: a case and the index of a branch -> the branch as this script plans it, of one sample."""
    return lambda case, index: plan_at(make_recipe(*flags(case["settings"])), [case["position"]]).branches[index]


def published_velocity(x, sigma):
    """The stand-in of the recording. The published code truncates timesteps to integers; ours does not."""
    timestep = torch.trunc(1000 * torch.as_tensor(sigma, dtype=torch.float32)) / 1000
    return 0.7 * x - 0.2 * timestep.reshape(-1, *[1] * (x.ndim - 1)) + 0.1 * torch.tanh(x)


@pytest.mark.parametrize("case, index", PUBLISHED_BRANCHES)
def test_published_noise_levels_and_discount(published_branch, case, index):
    branch, expected = published_branch(case, index), case["branches"][index]
    assert branch.name == expected["name"]
    assert branch.sigma_from.item() == pytest.approx(expected["sigma_from"], abs=1e-6)
    assert branch.sigma_to.item() == pytest.approx(expected["sigma_to"], abs=1e-6)
    assert branch.discount.item() == pytest.approx(expected["discount"], abs=1e-6)


@pytest.mark.parametrize("case, index", PUBLISHED_BRANCHES)
def test_published_recovered_latents(published_branch, case, index):
    branch, expected = published_branch(case, index), case["branches"][index]
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
def test_published_captions(make_recipe, plan_at, tiny_models, case, index):
    """The published words, each in front of the caption, and which of the two the branch is drawn to."""
    recipe, expected = make_recipe(*flags(case["settings"])), case["branches"][index]
    plan = plan_at(recipe, [case["position"]] * 2, step=case["control_word_index"])
    plan = plan._replace(branches=[plan.branches[index]])
    _, metrics = graded_pass(tiny_models, ROLLOUT._replace(captions=["a red circle"] * 2), plan, recipe)

    reward = tiny_models.reward
    features = reward.encode_images(decode_latents(tiny_models.vae, recover(tiny_models, plan.branches[0]))[0])
    names = ("reward_positive_caption", "reward_negative_caption")
    positive, negative = reward.encode_texts([expected[name] for name in names])
    score = reward.scale * srp_score(features, positive, negative, expected["discount"])
    assert metrics["score"].item() == pytest.approx(score.mean().item(), abs=1e-5)


# ---- The graded pass, with a random transformer, VAE and reward model. ----------------------------------------------


ROLLOUT = Rollout(
    ["a red cat", "a blue dog"], draw(2, 2, 16, 16), range(2), draw(1, 2, 4, 1, 4, 6), draw(0, 2, 4, 1, 4, 6)
)


def branch(name, sigma_from, sigma_to, discount):
    """Two samples at the same noise level, unless two are given."""
    pairs = (torch.as_tensor(value, dtype=torch.float32).expand(2) for value in (sigma_from, sigma_to, discount))
    return Branch(name, *pairs, torch.full((2,), float(name == "inversion")))


BRANCHES = [branch("denoise", *DENOISE, 0.2), branch("inversion", *INVERSION, 0.1)]
PLAN = Plan("Real", "Oil", BRANCHES, torch.ones(2))

# Each sample at a noise level of its own, with a discount and a weight of its own.
SPREAD = Plan(
    "Real",
    "Oil",
    [
        branch("denoise", [0.675, 0.475], [0.625, 0.425], [0.2, 0.1]),
        branch("inversion", [0.575, 0.375], [0.625, 0.425], [0.1, 0.3]),
    ],
    torch.tensor([0.75, 0.5]),
)


def alone(branch, plan=PLAN):
    return plan._replace(branches=[branch])


def sample_of(plan, index):
    """The plan of one of its samples."""
    one = slice(index, index + 1)
    branches = [Branch(branch.name, *(column[one] for column in branch[1:])) for branch in plan.branches]
    return plan._replace(branches=branches, weight=plan.weight[one])


def part_of(rollout, index):
    """The rollout of one of its samples."""
    one = slice(index, index + 1)
    return Rollout(*(column[one] for column in rollout))


def recover(models, branch):
    """What the branch makes of the latents of `ROLLOUT`."""
    return direct_align_step(
        lambda x, sigma: models.velocity(x, sigma, ROLLOUT.prompt_embeds),
        ROLLOUT.x0,
        ROLLOUT.noise,
        branch.sigma_from,
        branch.sigma_to,
    )


def gradient(models, plan, recipe, rollout=ROLLOUT):
    """The gradient of the loss as one vector over all trained parameters of the transformer."""
    models.transformer.zero_grad()
    graded_pass(models, rollout, plan, recipe)[0].backward()
    grads = [parameter.grad for parameter in models.transformer.parameters() if parameter.requires_grad]
    return torch.cat([grad.flatten() for grad in grads])


class KnownVelocity(torch.nn.Module):
    """In the place of the transformer: a velocity that does not depend on its inputs."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = torch.nn.Parameter(velocity)

    def forward(self, latents, timestep, encoder_hidden_states, return_dict):
        return (self.velocity,)


@pytest.fixture(scope="module")
def loaded_models(tiny_model, tiny_reward):
    """Models in float32, frozen as in a run."""
    transformer = WanTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer_2")
    vae = AutoencoderKLWan.from_pretrained(tiny_model, subfolder="vae").requires_grad_(False)
    return Models(transformer, vae, CLIPReward(tiny_reward, tiny_reward))


@pytest.fixture
def tiny_models(loaded_models):
    loaded_models.transformer.zero_grad()
    return loaded_models


def test_both_branches_in_one_batch_give_the_average_of_each_alone(make_recipe, tiny_models):
    together, metrics = graded_pass(tiny_models, ROLLOUT, PLAN, make_recipe())
    each = [graded_pass(tiny_models, ROLLOUT, alone(branch), make_recipe()) for branch in BRANCHES]
    torch.testing.assert_close(together, (each[0][0] + each[1][0]) / 2, rtol=0, atol=1e-5)
    for (_, own), branch in zip(each, BRANCHES, strict=True):
        torch.testing.assert_close(metrics[f"score_{branch.name}"], own["score"], rtol=0, atol=1e-5)


def test_both_branches_in_one_batch_give_the_average_gradient(make_recipe, tiny_models):
    together = gradient(tiny_models, PLAN, make_recipe())
    each = [gradient(tiny_models, alone(branch), make_recipe()) for branch in BRANCHES]
    torch.testing.assert_close(together, (each[0] + each[1]) / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("flags", [[], ["--loss", "linear"]], ids=["hinge", "linear"])
def test_samples_at_noise_levels_of_their_own_give_the_average_of_each_alone(make_recipe, tiny_models, flags):
    recipe = make_recipe(*flags)
    together, metrics = graded_pass(tiny_models, ROLLOUT, SPREAD, recipe)
    each = [graded_pass(tiny_models, part_of(ROLLOUT, i), sample_of(SPREAD, i), recipe) for i in range(2)]
    torch.testing.assert_close(together, (each[0][0] + each[1][0]) / 2, rtol=0, atol=1e-5)
    assert (each[0][0] - each[1][0]).abs() > 1e-2
    assert metrics.keys() == each[0][1].keys() == each[1][1].keys()
    for name in metrics:
        torch.testing.assert_close(metrics[name], (each[0][1][name] + each[1][1][name]) / 2, rtol=0, atol=1e-5)
    assert metrics["sigma"].item() == pytest.approx((0.625 + 0.425) / 2)


def test_samples_at_noise_levels_of_their_own_give_the_average_gradient(make_recipe, tiny_models):
    together = gradient(tiny_models, SPREAD, make_recipe())
    each = [gradient(tiny_models, sample_of(SPREAD, i), make_recipe(), part_of(ROLLOUT, i)) for i in range(2)]
    assert (each[0] - each[1]).abs().max() > 1e-3
    torch.testing.assert_close(together, (each[0] + each[1]) / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.name)
def test_swapping_the_control_words_turns_the_gradient_around(make_recipe, tiny_models, branch):
    plan, recipe = alone(branch._replace(discount=torch.zeros(2))), make_recipe("--loss", "linear")
    plain = gradient(tiny_models, plan, recipe)
    swapped = gradient(tiny_models, plan._replace(positive_word="Oil", negative_word="Real"), recipe)
    assert plain.abs().max() > 1e-5
    torch.testing.assert_close(swapped, -plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())


def test_both_branches_push_an_exact_velocity_the_same_way(make_recipe, tiny_models):
    """Slopes of opposite sign and swapped captions cancel: here the two gradients are even equal."""
    gradients = []
    for branch in BRANCHES:
        models = tiny_models._replace(transformer=KnownVelocity(ROLLOUT.noise - ROLLOUT.x0))
        plan = alone(branch._replace(discount=torch.zeros(2)))
        gradients.append(gradient(models, plan, make_recipe("--loss", "linear")))
    assert gradients[0].abs().max() > 1e-6
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-3 * gradients[0].abs().max().item())


def test_a_step_against_the_gradient_raises_the_score(make_recipe, tiny_models):
    recipe, velocity = make_recipe("--loss", "linear"), (ROLLOUT.noise - ROLLOUT.x0).repeat(2, 1, 1, 1, 1)
    models = tiny_models._replace(transformer=KnownVelocity(velocity))
    loss, before = graded_pass(models, ROLLOUT, PLAN, recipe)
    loss.backward()
    grad = models.transformer.velocity.grad
    stepped = KnownVelocity(velocity - 1e-2 * grad / grad.abs().max())
    _, after = graded_pass(models._replace(transformer=stepped), ROLLOUT, PLAN, recipe)
    for name in ("score_denoise", "score_inversion"):
        assert after[name] > before[name]


def test_only_the_transformer_gets_gradients_and_all_of_it_does(make_recipe, tiny_models):
    loss, _ = graded_pass(tiny_models, ROLLOUT, PLAN, make_recipe())
    assert loss.requires_grad
    loss.backward()
    for frozen in (tiny_models.vae, tiny_models.reward):
        assert [name for name, parameter in frozen.named_parameters() if parameter.grad is not None] == []
    untrained = [
        name
        for name, parameter in tiny_models.transformer.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or parameter.grad.abs().max() == 0
    ]
    assert untrained == []


def test_linear_loss_is_minus_the_score_and_hinge_adds_the_margin(make_recipe, tiny_models):
    linear, metrics = graded_pass(tiny_models, ROLLOUT, PLAN, make_recipe("--loss", "linear"))
    hinge, _ = graded_pass(tiny_models, ROLLOUT, PLAN, make_recipe("--loss", "hinge", "--reward_margin", 2.0))
    assert linear.item() == pytest.approx(-metrics["score"].item(), abs=1e-6)
    assert hinge.item() == pytest.approx(2.0 - metrics["score"].item(), abs=1e-6)


def test_hinge_loss_of_images_beyond_the_margin_gives_no_gradient(make_recipe, tiny_models):
    recipe = make_recipe()._replace(reward_margin=-10.0)
    assert graded_pass(tiny_models, ROLLOUT, PLAN, recipe)[0].item() == 0
    assert gradient(tiny_models, PLAN, recipe).abs().max() == 0


@pytest.mark.parametrize("loss", ["hinge", "linear"])
def test_weight_scales_the_loss(make_recipe, tiny_models, loss):
    recipe = make_recipe("--loss", loss)
    plain, _ = graded_pass(tiny_models, ROLLOUT, PLAN, recipe)
    weighted, metrics = graded_pass(tiny_models, ROLLOUT, PLAN._replace(weight=torch.full((2,), 0.75)), recipe)
    assert weighted.item() == pytest.approx(0.75 * plain.item())
    assert metrics["loss"].item() == pytest.approx(0.75 * plain.item())


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.name)
def test_metrics_hold_the_rewards_of_both_worded_captions(make_recipe, tiny_models, branch):
    """Whichever of the two the branch is drawn to."""
    _, metrics = graded_pass(tiny_models, ROLLOUT, alone(branch), make_recipe())
    pixels, saturated = decode_latents(tiny_models.vae, recover(tiny_models, branch))
    positive = tiny_models.reward(pixels, ["Real. a red cat", "Real. a blue dog"]).mean()
    negative = tiny_models.reward(pixels, ["Oil. a red cat", "Oil. a blue dog"]).mean()
    assert metrics["reward_positive"].item() == pytest.approx(positive.item(), abs=1e-5)
    assert metrics["reward_negative"].item() == pytest.approx(negative.item(), abs=1e-5)
    assert metrics["saturated"] == saturated
    assert not any(value.requires_grad for value in metrics.values())


def test_the_transformer_sees_each_branch_at_its_own_noise_level(make_recipe, tiny_models):
    seen = []

    def record(module, args, kwargs):
        seen.append((args[1], kwargs["encoder_hidden_states"]))

    hook = tiny_models.transformer.register_forward_pre_hook(record, with_kwargs=True)
    graded_pass(tiny_models, ROLLOUT, SPREAD, make_recipe())
    hook.remove()
    ((timestep, prompt_embeds),) = seen
    torch.testing.assert_close(timestep, torch.tensor([675.0, 475.0, 575.0, 375.0]))
    assert torch.equal(prompt_embeds, torch.cat([ROLLOUT.prompt_embeds, ROLLOUT.prompt_embeds]))


# ---- The drift from the untrained expert. ---------------------------------------------------------------------------


@pytest.fixture(params=["LoRA", "frozen copy"])
def start_and_trained(request, make_args, tiny_models):
    """Models with the untrained expert, at the start of a run, and after training that changed all trained weights."""
    start, trained = (copy.deepcopy(tiny_models.transformer) for _ in range(2))
    base, args = None, make_args("--lora_rank", 4)
    if request.param == "LoRA":
        start, trained = set_up_transformer(start, args), set_up_transformer(trained, args)
    else:
        base = copy.deepcopy(start).requires_grad_(False).eval()
    with torch.no_grad():
        for seed, parameter in enumerate(trained.parameters()):
            if parameter.requires_grad:
                parameter += 0.1 * draw(seed, *parameter.shape)
    return [tiny_models._replace(transformer=transformer, base=base) for transformer in (start, trained)]


def hand_made_drift(models, untrained):
    """mean((v - v_base)^2) where the graded step looks, with a gradient for v alone."""
    sigma = torch.cat([branch.sigma_from for branch in SPREAD.branches])
    x0, noise, prompt_embeds = (
        torch.cat([tensor, tensor]) for tensor in (ROLLOUT.x0, ROLLOUT.noise, ROLLOUT.prompt_embeds)
    )
    level = sigma.view(-1, 1, 1, 1, 1)
    x = level * noise + (1 - level) * x0
    found, base = (transformer_velocity(each, x, sigma, prompt_embeds) for each in (models.transformer, untrained))
    return (found - base.detach()).square().mean()


def test_drift_adds_the_weighted_mean_square_of_what_training_changed(make_recipe, tiny_models, start_and_trained):
    _, models = start_and_trained
    plain, without = graded_pass(models, ROLLOUT, SPREAD, make_recipe())
    loss, metrics = graded_pass(models, ROLLOUT, SPREAD, make_recipe("--drift_weight", 2.5))
    drift = hand_made_drift(models, tiny_models.transformer).item()
    assert drift > 1e-3
    assert metrics["drift"].item() == pytest.approx(drift, rel=1e-5)
    assert loss.item() - plain.item() == pytest.approx(2.5 * drift, rel=1e-4)
    assert metrics["loss"].item() == loss.item()
    assert "drift" not in without


def test_the_gradient_of_the_drift_is_that_of_autograd(make_recipe, tiny_models, start_and_trained):
    _, models = start_and_trained
    found = gradient(models, SPREAD, make_recipe("--drift_weight", 2.5)) - gradient(models, SPREAD, make_recipe())
    models.transformer.zero_grad()
    (2.5 * hand_made_drift(models, tiny_models.transformer)).backward()
    trained = [parameter for parameter in models.transformer.parameters() if parameter.requires_grad]
    expected = torch.cat([parameter.grad.flatten() for parameter in trained])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_at_the_start_the_drift_is_zero_and_changes_neither_loss_nor_gradient(make_recipe, start_and_trained):
    models, _ = start_and_trained
    plain, _ = graded_pass(models, ROLLOUT, SPREAD, make_recipe())
    loss, metrics = graded_pass(models, ROLLOUT, SPREAD, make_recipe("--drift_weight", 2.5))
    assert metrics["drift"].item() == 0
    assert loss.item() == plain.item()
    with_drift, without = (gradient(models, SPREAD, make_recipe("--drift_weight", weight)) for weight in (2.5, 0))
    assert torch.equal(with_drift, without)


def test_after_a_graded_pass_with_drift_what_is_trained_is_on_again(make_recipe, start_and_trained):
    _, models = start_and_trained
    inputs = ROLLOUT.x0, 0.5, ROLLOUT.prompt_embeds
    with torch.no_grad():
        before = models.velocity(*inputs)
        assert not torch.equal(models.base_velocity(*inputs), before)
    grad = gradient(models, SPREAD, make_recipe("--drift_weight", 2.5))
    assert grad.isfinite().all() and grad.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(models.velocity(*inputs), before)


def test_the_untrained_expert_gets_no_gradient(make_recipe, start_and_trained):
    _, models = start_and_trained
    loss, _ = graded_pass(models, ROLLOUT, SPREAD, make_recipe("--drift_weight", 2.5))
    loss.backward()
    frozen = [parameter for parameter in models.transformer.parameters() if not parameter.requires_grad]
    frozen += [] if models.base is None else list(models.base.parameters())
    assert frozen and all(parameter.grad is None for parameter in frozen)
