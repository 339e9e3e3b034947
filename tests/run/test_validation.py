"""The images that are painted while a run goes on, and its events."""

import shutil

import numpy as np
import pytest
from helpers import load_weights, logged, read_scores, same_bits
from PIL import Image
from safetensors.torch import load_file, save_file

from train_srpo_wan_t2i import TEXT_ENCODER_LAYER


@pytest.fixture(scope="module")
def two_images(train, validation_dataset):
    """A run that paints the split `validation`: one prompt that is a caption, too, and one that is not."""
    flags = ["--logging_dir", "events", "--report_to", "tensorboard"]
    return train(*flags, dataset=validation_dataset, prompts=None)


def test_the_split_validation_is_painted_by_default(two_images):
    names = sorted(path.name for path in (two_images / "images/step-2").glob("*.png"))
    assert names == ["000-a-boat.png", "001-a-blue-boat-red.png"]
    assert len(set(read_scores(two_images))) == 2


def test_a_prompt_of_the_split_validation_paints_what_the_same_caption_paints(train, two_images):
    output_dir = train(prompts=["a boat"])
    image, expected = (Image.open(run / "images/step-0/000-a-boat.png") for run in (output_dir, two_images))
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected)).max() <= 1


def test_prompts_of_both_splits_can_be_chosen(train, validation_dataset):
    output_dir = train(dataset=validation_dataset, prompts=["a blue boat, red", "a red cat"])
    names = sorted(path.name for path in (output_dir / "images/step-0").glob("*.png"))
    assert names == ["000-a-blue-boat-red.png", "001-a-red-cat.png"]


def test_a_prompt_that_the_dataset_does_not_have_is_refused(refusal, tiny_dataset):
    message = refusal("--validation_prompts", "a boat", "a blue boat, red")
    assert message.startswith(f"`--validation_prompts`: `--dataset_name {tiny_dataset}` has no ")
    assert "'a blue boat, red'" in message and "embed_prompts.py" in message


def test_training_loads_no_text_encoder(train, validation_dataset, two_images, model_copy):
    """Of the text encoder it reads one layer, to compare it with the one of the dataset."""
    file = model_copy / "text_encoder/model.safetensors"
    save_file({TEXT_ENCODER_LAYER: load_file(file)[TEXT_ENCODER_LAYER]}, file)
    shutil.rmtree(model_copy / "tokenizer")
    output_dir = train(model=model_copy, dataset=validation_dataset, prompts=None)
    assert read_scores(output_dir) == read_scores(two_images)
    assert same_bits(load_weights(output_dir), load_weights(two_images))


def test_the_first_images_are_painted_before_any_update(train, validation_dataset, two_images):
    output_dir = train("--learning_rate", 1, dataset=validation_dataset, prompts=None)
    assert read_scores(output_dir) == read_scores(two_images)


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


def test_validation_guidance_scale_changes_the_images_and_not_training(
    train, validation_dataset, two_images, plain_run
):
    output_dir = train("--validation_guidance_scale", 1, dataset=validation_dataset, prompts=None)
    assert read_scores(output_dir) != read_scores(two_images)
    assert same_bits(load_weights(output_dir), load_weights(plain_run))


def test_logging_dir_is_where_events_lie(two_images):
    assert list((two_images / "events").rglob("events.out.tfevents.*"))
    assert not (two_images / "logs").exists()


def test_report_to_none_writes_no_events(plain_run):
    assert [path for path in plain_run.rglob("*") if "tfevents" in path.name] == []
