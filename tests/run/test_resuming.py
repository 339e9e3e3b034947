"""A run that goes on from a checkpoint is the run that was never interrupted."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    CAPTIONS,
    checkpoints,
    load_history,
    load_state,
    load_weights,
    logged,
    read_log,
    repeatable,
    same_bits,
)
from PIL import Image

from train_srpo_wan_t2i import list_checkpoints


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
    output_dir = Path(shutil.copytree(four_steps, tmp_path / "output", ignore=shutil.ignore_patterns("checkpoint-4")))
    (output_dir / "checkpoint-9.unfinished").mkdir()
    more = ["--max_train_steps", 4, "--train_batch_size", 2, "--resume_from_checkpoint", "latest"]
    train(*more, prompts=["a red cat"], output_dir=output_dir)
    assert f"Resumed from {output_dir}/checkpoint-2 at step 2" in read_log(output_dir)
    assert same_bits(load_weights(output_dir), load_weights(four_steps))


def test_latest_in_an_empty_folder_starts_at_step_0(train, plain_run, tmp_path):
    output_dir = train("--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert re.findall(r"step (\d): loss", read_log(output_dir)) == ["1", "2"]
    assert same_bits(load_weights(output_dir), load_weights(plain_run))


def test_the_latest_checkpoint_is_the_one_saved_last_whatever_its_files_say(train, four_steps, tmp_path):
    output_dir = Path(shutil.copytree(four_steps, tmp_path / "output"))
    for age, name in enumerate(["checkpoint-2", "checkpoint-4"]):  # the last becomes the oldest
        for path in [output_dir / name, *(output_dir / name).iterdir()]:
            os.utime(path, (1e9 - age * 1e6,) * 2)
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-2", "checkpoint-4"]
    flags = ["--train_batch_size", 2, "--max_train_steps", 5, "--resume_from_checkpoint", "latest"]
    train(*flags, prompts=["a red cat"], output_dir=output_dir)
    assert f"Resumed from {output_dir}/checkpoint-4 at step 4" in read_log(output_dir)


def test_the_last_update_has_a_checkpoint_wherever_it_falls(train, tmp_path):
    train("--max_train_steps", 3, "--checkpointing_steps", 2, output_dir=tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_a_run_cannot_go_back_behind_its_checkpoint(train, four_steps, tmp_path):
    more = ["--train_batch_size", 2, "--max_train_steps", 3, "--resume_from_checkpoint", four_steps / "checkpoint-4"]
    with pytest.raises(SystemExit, match="is beyond `--max_train_steps 3`"):
        train(*more, prompts=["a red cat"], output_dir=tmp_path)


def test_going_on_from_an_older_checkpoint_makes_it_the_latest_and_keeps_the_new_ones(train, tmp_path):
    steps = ["--max_train_steps", 4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    train(*steps, "--checkpoints_total_limit", 4, output_dir=tmp_path)
    again = ["--max_train_steps", 2, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    train(*again, "--resume_from_checkpoint", tmp_path / "checkpoint-1", output_dir=tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    train(*steps, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert f"Resumed from {tmp_path}/checkpoint-2 at step 2" in read_log(tmp_path)


def test_a_run_killed_before_its_first_checkpoint_still_logs_the_images_of_step_0(train, tmp_path):
    train("--max_train_steps", 1, output_dir=tmp_path, prompts=["a boat"])
    for name in ("checkpoint-1", "transformer_2"):
        shutil.rmtree(tmp_path / name)
    train("--resume_from_checkpoint", "latest", output_dir=tmp_path, prompts=["a boat"])
    assert [row["step"] for row in load_history(tmp_path) if "validation_reward" in row] == [0, 2]


def test_resuming_a_finished_run_writes_its_result_again(train, four_steps):
    more = ["--max_train_steps", 4, "--train_batch_size", 2]
    again = train(*more, "--resume_from_checkpoint", four_steps / "checkpoint-4", prompts=["a red cat"])
    assert same_bits(load_weights(again), load_weights(four_steps))
    assert (again / "README.md").is_file()


# ---- Going on with other flags. -------------------------------------------------------------------------------------


def test_going_on_with_other_flags_names_all_of_them_and_asks_for_allow_changes(train, plain_run, tmp_path):
    changes = ["--gradient_accumulation_steps", 2, "--seed", 43, "--loss", "linear", "--positive_words", "Real"]
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", plain_run / "checkpoint-2"]
    with pytest.raises(SystemExit) as caught:
        train(*changes, *more, output_dir=tmp_path / "output", prompts=["a boat"])
    assert re.fullmatch(f"error: {plain_run}/checkpoint-2 .*`--allow_changes`.*", caught.value.code)
    for difference in (
        "positive_words: ['Natural-lighting', 'Detail', 'Detailed', 'Real'], which is now ['Real']",
        "loss: hinge, which is now linear",
        "seed: 42, which is now 43",
        "gradient_accumulation_steps: 1, which is now 2",
        "validation_prompts: [], which is now ['a boat']",
    ):
        assert difference in caught.value.code
    assert caught.value.code.count("which is now") == 5
    assert not (tmp_path / "output").exists()


def test_with_allow_changes_a_run_goes_on_with_other_prompts_and_data(train, embed, tiny_model, tmp_path):
    train(output_dir=tmp_path, prompts=["a boat", "a dog"])
    more = ["--max_train_steps", 3, "--resume_from_checkpoint", "latest", "--allow_changes"]
    dataset = embed(tiny_model, CAPTIONS, "--validation_prompts", "a boat that costs $5 {or $6")
    train(*more, output_dir=tmp_path, dataset=dataset, prompts=None)
    Image.open(tmp_path / "before_after.png").verify()
    assert "3 updates" in (tmp_path / "README.md").read_text()
    identity = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())["run"]
    assert identity["validation_prompts"] is None, "the next run is compared with this one"


@pytest.mark.parametrize(
    "flags, group",
    [
        ("--learning_rate 1e-2", {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}),
        ("--adam_beta1 0.5 --adam_beta2 0.9", {"lr": 1e-3, "betas": (0.5, 0.9), "eps": 1e-8, "weight_decay": 1e-4}),
        pytest.param(
            "--adam_epsilon 1e-4 --adam_weight_decay 0.5",
            {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.5},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_with_allow_changes_new_settings_of_the_optimizer_take_effect(train, plain_run, flags, group):
    more = ["--max_train_steps", 3, "--resume_from_checkpoint", plain_run / "checkpoint-2"]
    same = train(*more)
    other = train(*more, *flags.split(), "--allow_changes")
    (saved,) = torch.load(other / "checkpoint-3/optimizer.bin")["param_groups"]
    assert {name: saved[name] for name in group} == group
    assert logged(other, "lr", 3) == [1e-3, 1e-3, group["lr"]]
    assert not same_bits(load_weights(other), load_weights(same))


def test_with_allow_changes_a_new_schedule_has_the_rate_of_the_step_at_hand(train, plain_run):
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", plain_run / "checkpoint-2", "--allow_changes"]
    resumed = train(*more, "--lr_scheduler", "linear")
    assert logged(resumed, "lr", 4) == [1e-3, 1e-3, pytest.approx(1e-3 * 2 / 4), pytest.approx(1e-3 * 1 / 4)]


def test_a_constant_schedule_may_be_prolonged_and_a_cosine_only_with_allow_changes(train, tmp_path):
    train("--lr_scheduler", "cosine", output_dir=tmp_path)
    more = ["--lr_scheduler", "cosine", "--max_train_steps", 3, "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit, match="was made with another max_train_steps: 2, which is now 3"):
        train(*more, output_dir=tmp_path)
    train(*more, "--allow_changes", output_dir=tmp_path)
    assert logged(tmp_path, "lr", 3)[2] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 2 / 3)) / 2)


@pytest.mark.parametrize("flags", ["", "--allow_changes"])
def test_what_a_checkpoint_cannot_be_loaded_into_is_refused_with_allow_changes_too(train, plain_run, tmp_path, flags):
    more = ["--lora_rank", 4, "--resume_from_checkpoint", plain_run / "checkpoint-2", *flags.split()]
    with pytest.raises(SystemExit) as caught:
        train(*more, output_dir=tmp_path / "output")
    assert re.fullmatch(r"error: .* another .*lora_rank: None, which is now 4;.*", caught.value.code)
    assert "start a new run" in caught.value.code and "--allow_changes" not in caught.value.code
    assert not (tmp_path / "output").exists()
