"""What a rollout starts from and what noise is injected: Gaussian noise, or stored boundary latents and theirs."""

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from helpers import CAPTIONS, draw

from train_srpo_wan_t2i import collate_fn, draw_starts


SHAPE = 4, 1, 4, 6

SEEDS = np.arange(100, 150)

# The latents of each seed are full of it, plus a thousand for every caption: one sees where they come from.
STORED = [np.broadcast_to(SEEDS[:, None, None, None, None] + 1000 * i, (50, *SHAPE)) for i in range(4)]

BATCH = {"boundary_latents": [latents.astype(np.float32) for latents in STORED], "boundary_seeds": [SEEDS] * 4}


def picked_seeds(latents, noise):
    """The seeds of what `draw_starts` gave for `BATCH`, after checking that latents and noise belong to them."""
    assert latents.shape == noise.shape == (4, *SHAPE)
    assert latents.dtype == noise.dtype == torch.float32
    seeds = [int(sample.mean()) - 1000 * i for i, sample in enumerate(latents)]
    for i, seed in enumerate(seeds):
        assert torch.equal(latents[i], torch.full(SHAPE, 1000.0 * i + seed))
        assert torch.equal(noise[i], draw(seed, *SHAPE))
    return seeds


def starts(recipe, group=3, samples=(12, 13, 14, 15)):
    return picked_seeds(*draw_starts(recipe, SHAPE, group, samples, BATCH))


def test_shared_noise_picks_one_seed_for_all_samples(make_recipe):
    recipe = make_recipe("--noise", "shared")
    assert len(set(starts(recipe))) == 1
    assert starts(recipe) == starts(recipe, samples=(0, 1, 2, 3))
    assert starts(recipe) != starts(recipe, group=4)


def test_per_sample_noise_picks_a_seed_for_every_sample(make_recipe):
    recipe = make_recipe("--noise", "per_sample")
    assert len(set(starts(recipe))) > 1
    assert starts(recipe, samples=(14, 15, 12, 13)) == [*starts(recipe)[2:], *starts(recipe)[:2]]
    assert starts(recipe) == starts(recipe, group=4)  # the number of a sample is its own in the run


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
def test_what_a_rollout_starts_from_repeats_and_depends_on_the_seed(make_recipe, noise):
    recipe = make_recipe("--noise", noise)
    other = make_recipe("--noise", noise, "--seed", 1)
    torch.randn(5)  # the global generator has no part in it
    assert starts(recipe) == starts(recipe)
    assert starts(recipe) != starts(other)


def test_all_latents_of_a_caption_are_used(make_recipe):
    recipe = make_recipe()
    few = {name: [values[:3] for values in column] for name, column in BATCH.items()}
    picked = [picked_seeds(*draw_starts(recipe, SHAPE, group, range(4), few))[0] for group in range(30)]
    assert set(picked) == {100, 101, 102}


def test_from_noise_latents_and_noise_are_the_same(make_recipe):
    latents, noise = draw_starts(make_recipe(), SHAPE, 3, (12, 13), {})
    assert torch.equal(latents, noise)
    assert latents.std() == pytest.approx(1, abs=0.2)


def test_collate_passes_the_boundary_on_where_there_is_one(boundary_dataset):
    rows = list(load_from_disk(boundary_dataset)["train"].with_format("numpy").select([4, 1]))
    batch = collate_fn(rows, 16, torch.float32)
    assert batch["captions"] == [CAPTIONS[4], CAPTIONS[1]]
    for row, latents, seeds in zip(rows, batch["boundary_latents"], batch["boundary_seeds"], strict=True):
        assert np.array_equal(latents, row["boundary_latents"])
        assert seeds.tolist() == [7, 8, 9]
    for row in rows:
        del row["boundary_latents"], row["boundary_seeds"], row["boundary_settings"]
    assert collate_fn(rows, 16, torch.float32).keys() == {"captions", "prompt_embeds"}
