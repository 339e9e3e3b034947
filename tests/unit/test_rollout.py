"""Velocity and solver: what the transformer is asked, and that `paint_latents` paints what `WanPipeline` paints."""

import inspect

import pytest
import torch
from helpers import draw

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from train_srpo_wan_t2i import Models, Solver, make_scheduler, paint_latents, transformer_velocity


STEPS = 4
MODELS = {"two experts": ("tiny_model", "transformer_2"), "one expert": ("tiny_one_expert_model", "transformer")}


PROMPT_EMBEDS, NEGATIVE_PROMPT_EMBEDS = draw(1, 2, 16, 16), draw(2, 1, 16, 16)


def paint(transformer, scheduler, noise, guidance_scale=1.0, num_steps=STEPS, **models):
    """What the transformer paints of two latents with the prompts above. `models` are further fields of `Models`."""
    solver = Solver(scheduler, num_steps, guidance_scale)
    models = {"solver": solver, "negative_prompt_embeds": NEGATIVE_PROMPT_EMBEDS, **models}
    return paint_latents(Models(transformer, **models), noise, PROMPT_EMBEDS)


@pytest.fixture(scope="module")
def transformer(tiny_model):
    return WanTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer_2")


@pytest.fixture
def calls(transformer):
    """What the transformer was called with: a list that grows, of dicts of its arguments by name."""
    calls, signature = [], inspect.signature(transformer.forward)

    def record(module, args, kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)

    hook = transformer.register_forward_pre_hook(record, with_kwargs=True)
    yield calls
    hook.remove()


def pipeline_latents(pipeline, noise, guidance_scale):
    """What diffusers' own pipeline paints of this noise, before decoding."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=PROMPT_EMBEDS,
        negative_prompt_embeds=NEGATIVE_PROMPT_EMBEDS.expand(2, -1, -1),
        latents=noise,
        height=64,
        width=96,
        num_frames=1,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).frames


# ---- The rollout. ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
@pytest.mark.parametrize("fixture, expert", MODELS.values(), ids=MODELS.keys())
def test_rollout_paints_the_latents_of_the_pipeline(request, fixture, expert, guidance_scale):
    folder = request.getfixturevalue(fixture)
    transformer = WanTransformer3DModel.from_pretrained(folder, subfolder=expert)
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
    scale, alone = vae.config.scale_factor_spatial, fixture == "tiny_one_expert_model"
    noise = draw(0, 2, 4, 1, 64 // scale, 96 // scale)
    # Euler's first timestep is exactly 1000, which `boundary_ratio=1.0` still gives to `transformer`: so the expert is
    # passed as the only transformer, without a boundary.
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
        expand_timesteps=alone,
    )
    expected = pipeline_latents(pipeline, noise, guidance_scale)

    token_patch = (1, 2, 2) if alone else None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = paint(transformer, scheduler, noise, guidance_scale, token_patch=token_patch)
    assert (expected - noise).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "guidance_scale, batch", [(1.0, 2), (3.0, 4)], ids=["without guidance", "both halves of guidance"]
)
def test_rollout_calls_the_transformer_once_a_step(transformer, calls, guidance_scale, batch):
    paint(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), draw(0, 2, 4, 1, 4, 6), guidance_scale)
    assert [len(call["hidden_states"]) for call in calls] == [batch] * STEPS
    assert [len(call["encoder_hidden_states"]) for call in calls] == [batch] * STEPS


def test_rollouts_repeat_and_carry_no_gradient(transformer):
    """The scheduler starts over with every rollout."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    first, second = (paint(transformer, scheduler, draw(0, 2, 4, 1, 4, 6), 3.0) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.float32
    assert not first.requires_grad


def test_rollout_leaves_the_noise_as_it_is(transformer):
    """The graded step injects the same noise again."""
    noise = draw(0, 2, 4, 1, 4, 6)
    paint(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), noise)
    assert torch.equal(noise, draw(0, 2, 4, 1, 4, 6))


# ---- The solver. ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture, expert", MODELS.values(), ids=MODELS.keys())
def test_a_unipc_rollout_paints_the_latents_of_the_pipeline_as_it_is_saved(request, fixture, expert):
    folder = request.getfixturevalue(fixture)
    transformer = WanTransformer3DModel.from_pretrained(folder, subfolder=expert)
    alone = fixture == "tiny_one_expert_model"
    experts = {"transformer": transformer, "transformer_2": None, "boundary_ratio": None}
    pipeline = WanPipeline.from_pretrained(folder, tokenizer=None, text_encoder=None, **experts)
    scale = pipeline.vae.config.scale_factor_spatial
    noise = draw(0, 2, 4, 1, 64 // scale, 96 // scale)
    expected = pipeline_latents(pipeline, noise, 3.0)

    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler)
    schedulers = (make_scheduler(name, pipeline.scheduler.config.flow_shift) for name in ("unipc", "euler"))
    token_patch = (1, 2, 2) if alone else None
    found, other = (paint(transformer, each, noise, 3.0, token_patch=token_patch) for each in schedulers)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (other - expected).abs().max() > 1e-2


def test_unipc_rollouts_repeat(transformer):
    """Nothing of the steps before is left in the scheduler."""
    scheduler, noise = make_scheduler("unipc", 3.0), draw(0, 2, 4, 1, 4, 6)
    solvers = (Solver(scheduler, STEPS, 3.0, boundary) for boundary in (None, 0.875) * 2)
    whole, rest, again, rest_again = (paint(transformer, scheduler, noise, solver=solver) for solver in solvers)
    assert torch.equal(whole, again)
    assert torch.equal(rest, rest_again)


@pytest.mark.parametrize(
    "name, kind, option",
    [("euler", FlowMatchEulerDiscreteScheduler, "shift"), ("unipc", UniPCMultistepScheduler, "flow_shift")],
)
def test_make_scheduler_takes_the_shift(name, kind, option):
    scheduler = make_scheduler(name, 5.0)
    assert type(scheduler) is kind
    assert scheduler.config[option] == 5.0


# ---- From the boundary. ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_from_the_boundary_the_transformer_sees_only_the_noise_levels_below_it(transformer, calls, name):
    start, scheduler = draw(0, 2, 4, 1, 4, 6), make_scheduler(name, 3.0)
    paint(transformer, scheduler, start, solver=Solver(scheduler, 10, 3.0, boundary=0.875))
    seen = torch.stack([call["timestep"][0] for call in calls])
    below = [timestep for timestep in scheduler.timesteps.tolist() if timestep < 875]
    assert 0 < len(below) < 10
    torch.testing.assert_close(seen, torch.tensor(below, dtype=torch.float32))
    assert torch.equal(calls[0]["hidden_states"], torch.cat([start, start]))


@pytest.mark.parametrize("boundary, steps", [(0.75, 2), (0.7501, 3)])
def test_a_noise_level_at_the_boundary_is_the_high_noise_experts(transformer, calls, boundary, steps):
    """As in `WanPipeline`. The timesteps are 999, 750, 500 and 250."""
    scheduler = make_scheduler("unipc", 1.0)
    paint(transformer, scheduler, draw(0, 2, 4, 1, 4, 6), solver=Solver(scheduler, 4, 1.0, boundary))
    assert len(calls) == steps


def test_the_steps_below_the_boundary_are_those_of_the_whole_rollout(transformer, calls):
    """From where a whole rollout is at the boundary, the rest of it is the same."""
    scheduler = make_scheduler("euler", 3.0)
    whole = paint(transformer, scheduler, draw(0, 2, 4, 1, 4, 6), num_steps=10)
    start = next(call["hidden_states"].clone() for call in calls if call["timestep"][0] < 875)
    rest = paint(transformer, scheduler, start, solver=Solver(scheduler, 10, 1.0, boundary=0.875))
    assert torch.equal(rest, whole)


# ---- The velocity. --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sigma, expected",
    [
        (0.6747998, [674.7998, 674.7998]),
        (torch.tensor(0.6747998), [674.7998, 674.7998]),
        (torch.tensor([0.6747998, 0.375]), [674.7998, 375.0]),
    ],
    ids=["float", "0-d tensor", "one per sample"],
)
def test_timestep_is_1000_sigma_and_not_truncated(transformer, calls, sigma, expected):
    transformer_velocity(transformer, draw(0, 2, 4, 1, 4, 6), sigma, PROMPT_EMBEDS)
    assert calls[0]["timestep"].dtype == torch.float32
    torch.testing.assert_close(calls[0]["timestep"], torch.tensor(expected))


def test_timestep_is_repeated_for_every_token_of_models_that_expand_timesteps(transformer, calls):
    latents = draw(0, 2, 4, 1, 4, 6)
    transformer_velocity(transformer, latents, torch.tensor([0.6747998, 0.375]), PROMPT_EMBEDS, token_patch=(1, 2, 2))
    torch.testing.assert_close(calls[0]["timestep"], torch.tensor([[674.7998] * 6, [375.0] * 6]))


def test_a_timestep_per_token_gives_the_velocity_of_a_timestep_per_sample(transformer):
    latents = draw(0, 2, 4, 1, 4, 6)
    per_sample = transformer_velocity(transformer, latents, 0.5, PROMPT_EMBEDS)
    per_token = transformer_velocity(transformer, latents, 0.5, PROMPT_EMBEDS, token_patch=(1, 2, 2))
    torch.testing.assert_close(per_token, per_sample, rtol=0, atol=1e-5)


def test_velocity_is_float32_whatever_the_transformer_computes_in(transformer):
    half = WanTransformer3DModel.from_config(transformer.config).to(torch.bfloat16)
    latents = draw(0, 2, 4, 1, 4, 6)
    velocity = transformer_velocity(half, latents, 0.5, PROMPT_EMBEDS.to(torch.bfloat16))
    assert velocity.dtype == torch.float32
    assert velocity.shape == latents.shape
