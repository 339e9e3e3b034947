"""Which caption a sample is, which noise it starts from, and the embeddings that come from `embed_prompts.py`."""

import pytest
import torch
from datasets import load_from_disk

from diffusers import WanPipeline

from train_srpo_wan_t2i import (
    TEXT_ENCODER_LAYER,
    TRANSFORMERS_STEM,
    SampleSampler,
    collate_fn,
    draw_noise,
    load_prompt_dataset,
    make_generator,
    unpack_prompt_embeds,
    weights_fingerprint,
)


# ---- The stream of captions. ----------------------------------------------------------------------------------------


def captions(rollouts, batch_size, process_index=0, num_processes=1, dataset_size=6, seed=42):
    """The batches of one process, as lists of row numbers."""
    return list(SampleSampler(dataset_size, seed, rollouts, batch_size, process_index, num_processes))


def test_every_epoch_covers_each_caption_once():
    stream = sum(captions(range(9), 4), [])  # 36 samples, and batches that reach from one epoch into the next
    epochs = [stream[start : start + 6] for start in range(0, 36, 6)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4, 5]] * 6
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_larger_than_the_dataset_repeats_captions():
    (batch,) = captions(range(1), 8, dataset_size=3)
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]
    assert len(batch) == 8


def test_every_process_takes_the_same_number_of_full_batches():
    for process in range(4):
        batches = captions(range(5), 3, process, 4, dataset_size=7)
        assert [len(batch) for batch in batches] == [3] * 5


def test_a_step_sees_the_same_captions_on_two_processes_as_on_one():
    alone = captions(range(5), 4)
    shares = captions(range(5), 2, 0, 2), captions(range(5), 2, 1, 2)
    assert [first + second for first, second in zip(*shares, strict=True)] == alone


def test_a_step_sees_the_same_captions_in_two_accumulated_rollouts_as_in_one():
    alone = captions(range(5), 4)
    accumulated = captions(range(10), 2)
    assert [first + second for first, second in zip(accumulated[::2], accumulated[1::2], strict=True)] == alone


def test_a_resumed_run_goes_on_with_the_next_caption():
    for process in range(2):
        whole = captions(range(9), 2, process, 2)
        assert captions(range(4, 9), 2, process, 2) == whole[4:]


def test_the_seed_decides_the_order():
    assert captions(range(6), 1, seed=1) == captions(range(6), 1, seed=1)
    assert captions(range(6), 1, seed=1) != captions(range(6), 1, seed=2)


def test_samples_are_numbered_through_the_run():
    first, second = (SampleSampler(6, 42, range(3), 2, process, 2) for process in range(2))
    assert [first.samples(rollout) for rollout in range(3)] == [range(0, 2), range(4, 6), range(8, 10)]
    assert [second.samples(rollout) for rollout in range(3)] == [range(2, 4), range(6, 8), range(10, 12)]


# ---- Random numbers. ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [(2, 1, 7), (1, 2, 7), (1, 1, 8), (7, 1, 1), (1, 1)])
def test_generator_depends_on_every_number_of_its_key(other):
    def draw(key):
        return torch.randn(4, generator=make_generator(*key))

    assert torch.equal(draw((1, 1, 7)), draw((1, 1, 7)))
    assert not torch.equal(draw((1, 1, 7)), draw(other))


def test_generator_leaves_the_global_one_alone():
    torch.manual_seed(0)
    expected = torch.randn(4)
    torch.manual_seed(0)
    torch.randn(4, generator=make_generator(1, 2, 3))
    assert torch.equal(torch.randn(4), expected)


SHAPE = (4, 1, 2, 3)


def test_shared_noise_is_the_same_for_all_samples_of_a_group(make_recipe):
    recipe = make_recipe("--noise", "shared")
    noise = draw_noise(recipe, SHAPE, 7, range(28, 32))
    assert noise.shape == (4, *SHAPE) and noise.dtype == torch.float32
    assert all(torch.equal(sample, noise[0]) for sample in noise)
    # Another process, or the next rollout of the same step.
    assert torch.equal(draw_noise(recipe, SHAPE, 7, range(30, 32)), noise[:2])


def test_noise_per_sample_differs_between_samples(make_recipe):
    noise = draw_noise(make_recipe("--noise", "per_sample"), SHAPE, 7, range(28, 32))
    assert noise.shape == (4, *SHAPE) and noise.dtype == torch.float32
    assert len({tuple(sample.flatten().tolist()) for sample in noise}) == 4


def test_noise_per_sample_does_not_depend_on_how_samples_are_spread(make_recipe):
    recipe = make_recipe("--noise", "per_sample")
    alone = draw_noise(recipe, SHAPE, 7, range(28, 32))
    shares = [draw_noise(recipe, SHAPE, 7, samples) for samples in (range(28, 30), range(30, 32))]
    assert torch.equal(torch.cat(shares), alone)


@pytest.mark.parametrize("kind", ["shared", "per_sample"])
def test_noise_differs_between_groups_reuses_and_seeds(make_recipe, kind):
    recipe, other = make_recipe("--noise", kind), make_recipe("--noise", kind, "--seed", 43)
    first = draw_noise(recipe, SHAPE, 0, range(0, 2))
    assert not torch.equal(draw_noise(recipe, SHAPE, 1, range(2, 4)), first)
    assert not torch.equal(draw_noise(recipe, SHAPE, 0, range(0, 2), 1), first)
    assert not torch.equal(draw_noise(other, SHAPE, 0, range(0, 2)), first)


# ---- Embeddings. ----------------------------------------------------------------------------------------------------


def test_bfloat16_survives_its_bit_pattern():
    embeds = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    embeds[0, :3] = torch.tensor([float("inf"), -0.0, 1e-40])
    (unpacked,) = unpack_prompt_embeds([embeds.view(torch.int16).numpy()], 5, torch.bfloat16)
    assert torch.equal(unpacked.view(torch.int16), embeds.view(torch.int16))


def test_embeddings_are_padded_with_zeros():
    rows = [torch.ones(tokens, 16).to(torch.bfloat16).view(torch.int16).tolist() for tokens in (1, 3)]
    unpacked = unpack_prompt_embeds(rows, 4, torch.float32)
    assert unpacked.shape == (2, 4, 16) and unpacked.dtype == torch.float32
    assert unpacked[:, :, 0].tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]


def test_batch_equals_the_embeddings_of_the_pipeline(tiny_model, tiny_dataset):
    rows = load_from_disk(tiny_dataset)["train"].with_format("numpy")
    batch = collate_fn([rows[index] for index in range(len(rows))], 16, torch.bfloat16)
    pipeline = WanPipeline.from_pretrained(
        tiny_model, vae=None, transformer=None, transformer_2=None, scheduler=None, dtype=torch.bfloat16
    )
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            batch["captions"], do_classifier_free_guidance=False, max_sequence_length=16
        )
    assert batch["captions"][3] == "a red boat on a blue cat"
    assert expected[3, 7].abs().max() > 0 and expected[3, 8:].abs().max() == 0
    assert torch.equal(batch["prompt_embeds"], expected)


def test_dataset_loads_from_the_folder_that_embed_prompts_wrote(tiny_dataset):
    dataset = load_prompt_dataset(tiny_dataset)
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 6, "negative": 1}


def fingerprint(folder):
    source = {"pretrained_model_name_or_path": folder}
    return weights_fingerprint(source, "text_encoder", TRANSFORMERS_STEM, TEXT_ENCODER_LAYER)


@pytest.mark.parametrize("split", ["train", "negative"])
def test_both_scripts_identify_the_text_encoder_alike(tiny_model, tiny_dataset, split):
    assert load_from_disk(tiny_dataset)[split].unique("text_encoder_fingerprint") == [fingerprint(tiny_model)]


def test_another_text_encoder_has_another_fingerprint(tiny_model, tiny_one_expert_model):
    assert fingerprint(tiny_model) != fingerprint(tiny_one_expert_model)
