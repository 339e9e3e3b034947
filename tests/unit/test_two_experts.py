"""
Two experts, one at a time: the boundary latents that `embed_prompts.py` paints with the high-noise expert, and what
the low-noise one makes of them, are what `WanPipeline` paints with both.
"""

import pytest
import torch
from helpers import MINIATURE, draw
from miniature.drawings import captions as drawing_captions

from diffusers import WanPipeline

from train_srpo_wan_t2i import Models, Solver, collate_fn, load_prompt_dataset, make_scheduler, paint_latents


BOUNDARY = 0.875  # of all models here


@pytest.fixture(scope="module")
def pipeline():
    """The miniature with both experts."""
    pipeline = WanPipeline.from_pretrained(MINIATURE / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def compare(pipeline, embed):
    """
    Function: the scheduler and flags of `embed_prompts.py` -> what the low-noise expert alone makes of the boundary
    latents of three drawings, and a function: a number of steps -> what the pipeline makes with both experts.
    """

    def run(name, *flags, guidance_scale=4.0, shift=3.0):
        size = ["--height", 64, "--width", 64, "--dtype", "fp32", "--batch_size", 2]
        flags = [*size, "--boundary_latents", 2, "--seed", 5, "--rollout_scheduler", name, *flags]
        dataset = load_prompt_dataset(embed(MINIATURE / "model", drawing_captions()[:81:40], *flags))
        batch, negative = (
            collate_fn(list(dataset[split].with_format("numpy")), 16, torch.float32) for split in ("train", "negative")
        )
        embeds, negative = batch["prompt_embeds"], negative["prompt_embeds"]
        second = torch.stack([torch.as_tensor(latents[1]) for latents in batch["boundary_latents"]])
        solver = Solver(make_scheduler(name, shift), 10, 3.0, BOUNDARY)
        models = Models(pipeline.transformer_2, solver=solver, negative_prompt_embeds=negative)
        found = paint_latents(models, second, embeds)

        def both(steps):
            pipeline.scheduler = make_scheduler(name, shift)
            return pipeline(
                prompt_embeds=embeds,
                negative_prompt_embeds=negative.expand(3, -1, -1),
                latents=draw(6, 8, 1, 8, 8).expand(3, -1, -1, -1, -1),
                height=64,
                width=64,
                num_frames=1,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                guidance_scale_2=3.0,
                output_type="latent",
            ).frames

        return found, both

    return run


@pytest.mark.parametrize(
    "flags, settings",
    [([], {}), (["--boundary_guidance_scale", 2, "--rollout_shift", 5], {"guidance_scale": 2.0, "shift": 5.0})],
    ids=["default", "other guidance and shift"],
)
def test_the_experts_one_at_a_time_paint_the_latents_of_the_pipeline(compare, flags, settings):
    found, both = compare("euler", *flags, **settings)
    torch.testing.assert_close(found, both(10), rtol=0, atol=1e-4)


def test_with_unipc_they_come_as_near_to_the_exact_solution_as_the_pipeline(compare):
    """The low-noise expert starts anew at first order: UniPC's history is not stored."""
    found, both = compare("unipc")
    expected, exact = both(10), both(100)

    def relative(latents, others):
        return (latents - others).norm() / others.norm()

    assert relative(found, expected) < 0.05
    assert relative(found, exact) < 1.05 * relative(expected, exact)
