"""A run that goes on from a checkpoint is the run that was never interrupted."""

import re
import shutil

import pytest
from helpers import CAPTIONS, checkpoints, load_history, load_state, load_weights, read_log, repeatable, same_bits
from PIL import Image


@pytest.fixture(scope="module")
def four_steps(train):
    return train("--max_train_steps", 4, "--train_batch_size", 2, "--validation_steps", 2, prompts=["a red cat"])


def test_two_steps_and_two_more_are_four_steps_bit_for_bit(train, four_steps):
    flags = ["--train_batch_size", 2, "--validation_steps", 2]
    output_dir = train(*flags, prompts=["a red cat"])
    assert checkpoints(output_dir) == ["checkpoint-2"]
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    train(*flags, *more, prompts=["a red cat"], output_dir=output_dir)
    assert same_bits(load_weights(output_dir), load_weights(four_steps))
    assert repeatable(load_history(output_dir, 4)) == repeatable(load_history(four_steps, 4))
    assert [row["step"] for row in load_history(output_dir, 4)] == [0, 1, 2, 2, 3, 4, 4]


def test_a_run_of_larger_batches_goes_on_bit_for_bit_with_captions_that_it_has_not_seen(train, embed, tiny_model):
    captions = [f"a {colour} {thing} on a {place}" for colour in ("red", "blue") for thing in ("cat", "dog", "boat")
                for place in ("boat", "dog")]  # fmt: skip
    flags, dataset = ["--train_batch_size", 3, "--max_train_steps", 4], embed(tiny_model, captions)
    whole = train(*flags, dataset=dataset)
    resumed = train(*flags, "--resume_from_checkpoint", whole / "checkpoint-2", dataset=dataset)
    assert len(captions) == 12, "so that each of the four updates sees new ones"
    assert same_bits(load_state(resumed, 4), load_state(whole, 4))
    assert same_bits(load_weights(resumed), load_weights(whole))
    assert repeatable(load_history(resumed, 4)) == repeatable(load_history(whole, 4))


def test_a_checkpoint_can_be_named_and_the_learning_rate_goes_on(train):
    schedule = ["--max_train_steps", 4, "--lr_scheduler", "cosine", "--lr_warmup_steps", 1]
    whole = train(*schedule)
    resumed = train(*schedule, "--resume_from_checkpoint", whole / "checkpoint-2")
    assert same_bits(load_weights(resumed), load_weights(whole))
    assert repeatable(load_history(resumed, 4)) == repeatable(load_history(whole, 4))
    assert checkpoints(resumed) == ["checkpoint-4"]


def test_an_unfinished_checkpoint_is_not_the_latest(train, four_steps, tmp_path):
    output_dir = tmp_path / "output"
    shutil.copytree(four_steps / "checkpoint-2", output_dir / "checkpoint-2")
    (output_dir / "checkpoint-9.unfinished").mkdir()
    more = ["--max_train_steps", 4, "--train_batch_size", 2, "--resume_from_checkpoint", "latest"]
    train(*more, output_dir=output_dir)
    assert f"Resumed from {output_dir}/checkpoint-2 at step 2" in read_log(output_dir)
    assert same_bits(load_weights(output_dir), load_weights(four_steps))


def test_latest_in_an_empty_folder_starts_at_step_0_with_a_warning(train, plain_run, tmp_path):
    output_dir = train("--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert re.search(r"WARNING .* holds no checkpoint yet: training starts at step 0", read_log(output_dir))
    assert same_bits(load_weights(output_dir), load_weights(plain_run))


@pytest.mark.parametrize("name, value", [("train_batch_size", 4), ("gradient_accumulation_steps", 2)])
def test_a_run_cannot_go_on_with_other_batches(train, four_steps, tmp_path, name, value):
    more = ["--max_train_steps", 4, "--train_batch_size", 2, "--resume_from_checkpoint", four_steps / "checkpoint-2"]
    was = {"train_batch_size": 2, "gradient_accumulation_steps": 1}[name]
    message = f"error: {four_steps}/checkpoint-2 was made with another {name}: {was}. It cannot go on with {value}."
    with pytest.raises(SystemExit, match=re.escape(message)):
        train(*more, f"--{name}", value, output_dir=tmp_path)


def test_a_run_cannot_go_back_behind_its_checkpoint(train, four_steps, tmp_path):
    more = ["--train_batch_size", 2, "--max_train_steps", 3, "--resume_from_checkpoint", four_steps / "checkpoint-4"]
    with pytest.raises(SystemExit, match="is beyond `--max_train_steps 3`"):
        train(*more, output_dir=tmp_path)


def test_going_on_from_an_older_checkpoint_makes_it_the_latest_and_keeps_the_new_ones(train, tmp_path):
    steps = ["--max_train_steps", 4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    train(*steps, "--checkpoints_total_limit", 4, output_dir=tmp_path)
    again = ["--max_train_steps", 2, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    train(*again, "--resume_from_checkpoint", tmp_path / "checkpoint-1", output_dir=tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    train(*steps, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert f"Resumed from {tmp_path}/checkpoint-2 at step 2" in read_log(tmp_path)


def test_other_prompts_after_resuming_still_end_in_a_card_and_a_picture(train, embed, tiny_model, tmp_path):
    train(output_dir=tmp_path, prompts=["a boat", "a dog"])
    more = ["--max_train_steps", 3, "--resume_from_checkpoint", "latest"]
    dataset = embed(tiny_model, CAPTIONS, "--validation_prompts", "a boat that costs $5 {or $6")
    train(*more, output_dir=tmp_path, dataset=dataset, prompts=None)
    Image.open(tmp_path / "before_after.png").verify()
    assert "3 updates" in (tmp_path / "README.md").read_text()


def test_a_run_stopped_before_its_first_checkpoint_still_logs_the_images_of_step_0(train, tmp_path):
    train("--max_train_steps", 1, output_dir=tmp_path, prompts=["a boat"])
    assert checkpoints(tmp_path) == []
    train("--resume_from_checkpoint", "latest", output_dir=tmp_path, prompts=["a boat"])
    assert [row["step"] for row in load_history(tmp_path) if "validation_reward" in row] == [0, 2]


def test_a_run_that_is_not_finite_ends_before_it_saves(train, tmp_path):
    with pytest.raises(SystemExit, match="error: not finite at step 2"):
        train("--learning_rate", 1e30, "--checkpointing_steps", 1, output_dir=tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-1"]


def test_resuming_a_finished_run_writes_its_result_again(train, four_steps):
    more = ["--max_train_steps", 4, "--train_batch_size", 2]
    again = train(*more, "--resume_from_checkpoint", four_steps / "checkpoint-4")
    assert same_bits(load_weights(again), load_weights(four_steps))
    assert (again / "README.md").is_file()
