"""An update of the optimizer, from the rollouts of a process, and how these are painted in batches."""

import copy

import pytest
import torch
from accelerate import Accelerator
from helpers import CAPTIONS, distance, draw, fresh_state

from diffusers import AutoencoderKLWan, WanTransformer3DModel

from train_srpo_wan_t2i import CLIPReward, Models, Rollout, Solver, make_rollouts, make_scheduler, update


SHAPE = 4, 1, 4, 6
RATE = 10.0  # gradients are small: they have a norm of 0.05


@pytest.fixture(scope="module")
def models(tiny_model, tiny_reward):
    transformer = WanTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer_2")
    vae = AutoencoderKLWan.from_pretrained(tiny_model, subfolder="vae").requires_grad_(False)
    solver = Solver(make_scheduler("unipc", 3.0), 2, 3.0)
    return Models(transformer, vae, CLIPReward(tiny_reward, tiny_reward), solver, draw(9, 1, 16, 16))


def rollout(samples):
    """The samples with these numbers, whatever micro-batch they are in."""
    columns = (
        torch.stack([draw(10 * kind + i, *shape) for i in samples])
        for kind, shape in enumerate([(16, 16), SHAPE, SHAPE])
    )
    prompt_embeds, noise, x0 = columns
    return Rollout([CAPTIONS[i] for i in samples], prompt_embeds, samples, noise, x0)


def take_update(models, recipe, micro_batches, step=0):
    """The weights after one update of gradient descent on these rollouts, and what it measured."""
    transformer = copy.deepcopy(models.transformer)
    with fresh_state():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(micro_batches))
        optimizer = torch.optim.SGD(transformer.parameters(), lr=RATE)
        transformer, optimizer = accelerator.prepare(transformer, optimizer)
        rollouts = [rollout(samples) for samples in micro_batches]
        metrics = update(accelerator, models._replace(transformer=transformer), optimizer, rollouts, recipe, step)
    return transformer.state_dict(), metrics


def test_accumulated_rollouts_make_the_update_of_one_large_rollout(make_recipe, models):
    recipe = make_recipe("--max_grad_norm", 1e9)
    whole, expected = take_update(models, recipe, [range(4)])
    parts, found = take_update(models, recipe, [range(0, 2), range(2, 4)])
    moved = distance(whole, models.transformer.state_dict())
    assert moved > 0.1
    assert distance(parts, whole) < 1e-3 * moved
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-3, abs=1e-5)


def test_the_gradient_is_clipped_and_its_norm_before_that_is_told(make_recipe, models):
    weights, metrics = take_update(models, make_recipe("--max_grad_norm", 0.001), [range(2)])
    _, unclipped = take_update(models, make_recipe("--max_grad_norm", 1e9), [range(2)])
    assert metrics["grad_norm"].item() == unclipped["grad_norm"].item() > 0.01
    assert distance(weights, models.transformer.state_dict()) == pytest.approx(RATE * 0.001, rel=1e-3)


def test_words_and_noise_levels_change_with_the_step(make_recipe, models):
    first, second = (take_update(models, make_recipe(), [range(2)], step)[1] for step in (0, 1))
    assert first["sigma"] != second["sigma"]
    assert first["reward_positive"] != second["reward_positive"]


# ---- Rollouts. ------------------------------------------------------------------------------------------------------


def batch(samples):
    return {"captions": [CAPTIONS[i] for i in samples], "prompt_embeds": rollout(samples).prompt_embeds}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_rollouts_are_the_same_painted_one_by_one_or_together(make_recipe, models, batch_size):
    parts = [range(4, 6), range(6, 8), range(0, 2)]
    batches = [(samples, batch([i % 6 for i in samples])) for samples in parts]
    recipe = make_recipe("--noise", "per_sample")
    found = make_rollouts(models, batches, recipe, SHAPE, 0, batch_size)
    expected = [make_rollouts(models, [each], recipe, SHAPE, 0, 2)[0] for each in batches]
    for one, other, samples in zip(found, expected, parts, strict=True):
        assert one.captions == other.captions and one.samples == samples
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.prompt_embeds, other.prompt_embeds)
        torch.testing.assert_close(one.x0, other.x0, rtol=0, atol=1e-5)
        assert not one.x0.requires_grad and (one.x0 - one.noise).abs().max() > 0.1
