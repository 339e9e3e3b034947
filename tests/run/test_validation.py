"""The images that are painted while a run goes on, and its events."""

import numpy as np
import pytest
from helpers import load_weights, logged, read_scores, same_bits
from PIL import Image


@pytest.fixture(scope="module")
def two_images(train):
    """A run that paints one caption of the dataset and one prompt that is not in it."""
    return train("--logging_dir", "events", "--report_to", "tensorboard", prompts=["a boat", "a blue boat, red"])


def test_prompts_that_are_not_captions_are_painted(two_images):
    names = sorted(path.name for path in (two_images / "images/step-2").glob("*.png"))
    assert names == ["000-a-boat.png", "001-a-blue-boat-red.png"]
    assert len(set(read_scores(two_images))) == 2


def test_a_prompt_encoded_at_the_start_paints_what_its_caption_paints(train, embed, tiny_model, two_images):
    without_it = embed(tiny_model, ["a red cat", "a blue dog"])
    output_dir = train(prompts=["a boat"], dataset=without_it)
    image, expected = (Image.open(run / "images/step-0/000-a-boat.png") for run in (output_dir, two_images))
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected)).max() <= 1


def test_the_first_images_are_painted_before_any_update(train, two_images):
    prompts = ["a boat", "a blue boat, red"]
    assert read_scores(train("--learning_rate", 1, prompts=prompts)) == read_scores(two_images)


def test_no_validation_prompts_turn_validation_off(plain_run):
    assert not (plain_run / "images").exists() and not (plain_run / "before_after.png").exists()
    assert logged(plain_run, "validation_reward") == []
    assert "before_after.png" not in (plain_run / "README.md").read_text()
    assert (plain_run / "reward.png").is_file()


def test_validation_does_not_change_training(two_images, plain_run):
    assert same_bits(load_weights(two_images), load_weights(plain_run))


def test_validation_size_is_the_side_of_the_images(train):
    output_dir = train("--validation_size", 48, prompts=["a boat"])
    assert Image.open(output_dir / "images/step-0/000-a-boat.png").size == (48, 48)


def test_validation_guidance_scale_changes_the_images_and_not_training(train, two_images, plain_run):
    output_dir = train("--validation_guidance_scale", 1, prompts=["a boat", "a blue boat, red"])
    assert read_scores(output_dir) != read_scores(two_images)
    assert same_bits(load_weights(output_dir), load_weights(plain_run))


def test_logging_dir_is_where_events_lie(two_images):
    assert list((two_images / "events").rglob("events.out.tfevents.*"))
    assert not (two_images / "logs").exists()


def test_report_to_none_writes_no_events(plain_run):
    assert [path for path in plain_run.rglob("*") if "tfevents" in path.name] == []
