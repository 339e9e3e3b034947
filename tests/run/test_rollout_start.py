"""`--rollout_start boundary`: training goes on from stored latents, with the low-noise expert alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets, load_from_disk
from helpers import SMALL, distance, draw, load_weights, logged, run_in_process, wrap

import train_srpo_wan_t2i


BOUNDARY = 0.875  # of all models here


# ---- Training from the boundary. ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--lora_rank", 2]], ids=["all weights", "LoRA"])
def test_training_from_the_boundary_needs_the_low_noise_expert_alone(train, boundary_dataset, low_noise_model, flags):
    output = train(
        "--rollout_start", "boundary", *flags, dataset=boundary_dataset, model=low_noise_model, prompts=["a dog"]
    )
    rewards = logged(output, "reward_positive")
    assert len(rewards) == 2
    if not flags:
        assert distance(load_weights(output), load_weights(low_noise_model)) > 0


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
def test_a_run_goes_on_from_stored_latents_and_injects_their_noise(
    train, boundary_dataset, low_noise_model, monkeypatch, noise
):
    painted, graded = [], []

    def record_painting(paint_latents, models, start, prompt_embeds):
        x0 = paint_latents(models, start, prompt_embeds)
        painted.append((start, models.solver.boundary, x0))
        return x0

    def record_graded_pass(graded_pass, models, rollout, *args):
        graded.append(rollout)
        return graded_pass(models, rollout, *args)

    wrap(monkeypatch, train_srpo_wan_t2i, "paint_latents", record_painting)
    wrap(monkeypatch, train_srpo_wan_t2i, "graded_pass", record_graded_pass)
    flags = ["--rollout_start", "boundary", "--noise", noise, "--train_batch_size", 3]
    train(*flags, dataset=boundary_dataset, model=low_noise_model)

    stored = {
        row["caption"]: row["boundary_latents"]
        for row in load_from_disk(boundary_dataset)["train"].with_format("torch")
    }
    assert len(painted) == len(graded) == 2
    for (start, boundary, x0), rollout in zip(painted, graded, strict=True):
        assert boundary == BOUNDARY
        assert torch.equal(x0, rollout.x0)
        for latents, each, caption in zip(start, rollout.noise, rollout.captions, strict=True):
            (seed,) = (seed for seed in (7, 8, 9) if torch.equal(each, draw(seed, 4, 1, 4, 4)))
            assert torch.equal(latents, stored[caption][seed - 7])


# ---- What is refused. -----------------------------------------------------------------------------------------------


@pytest.fixture
def train_refusal(command, no_loading, tmp_path):
    """Function: flags and inputs that must be refused -> the message: one line, and nothing loaded or written."""

    def refuse(*flags, **inputs):
        with pytest.raises(SystemExit) as caught:
            run_in_process(*command(tmp_path / "output", "--rollout_start", "boundary", *flags, **inputs))
        assert not (tmp_path / "output").exists()
        assert re.fullmatch("error: .+", caught.value.code), "one line, which makes Python exit with 1"
        return caught.value.code.removeprefix("error: ")

    return refuse


def test_a_dataset_without_boundary_latents(train_refusal, tiny_dataset):
    message = train_refusal()
    advice = "has no boundary latents, or rows without; see `embed_prompts.py --help`."
    assert message == f"`--dataset_name {tiny_dataset}` {advice}"


def test_rows_without_boundary_latents_among_others(train_refusal, boundary_dataset, tiny_dataset, tmp_path):
    dataset, plain = load_from_disk(boundary_dataset), load_from_disk(tiny_dataset)
    dataset["train"] = concatenate_datasets([dataset["train"], plain["train"]])
    dataset.save_to_disk(tmp_path / "mixed")
    message = train_refusal(dataset=tmp_path / "mixed")
    assert message.startswith(f"`--dataset_name {tmp_path}/mixed` has ") and "no boundary latents" in message


@pytest.fixture(scope="module")
def small_of_shift_5(embed, tiny_model):
    return embed(tiny_model, ["a cat"], *SMALL, "--boundary_latents", 3, "--rollout_shift", 5)


def test_rows_of_other_settings_among_others(train_refusal, boundary_dataset, small_of_shift_5, tmp_path):
    dataset, other = load_from_disk(boundary_dataset), load_from_disk(small_of_shift_5)
    dataset["train"] = concatenate_datasets([dataset["train"], other["train"]])
    dataset.save_to_disk(tmp_path / "mixed")
    message = train_refusal(dataset=tmp_path / "mixed")
    assert "has boundary latents of `--rollout_shift 5.0`, not 3.0." in message


@pytest.mark.parametrize("column", ["boundary_latents", "boundary_seeds", "boundary_settings"])
def test_boundary_latents_that_lack_a_column(train_refusal, boundary_dataset, tmp_path, column):
    load_from_disk(boundary_dataset).remove_columns(column).save_to_disk(tmp_path / "less")
    assert "has no boundary latents" in train_refusal(dataset=tmp_path / "less")


@pytest.mark.parametrize(
    "flag, value, found, wanted",
    [
        ("--height", 64, 32, "64"),
        ("--width", 64, 32, "64"),
        ("--sampling_steps", 3, 2, "3"),
        ("--rollout_scheduler", "euler", "unipc", "euler"),
        ("--rollout_shift", 5, 3.0, "5.0"),
    ],
)
def test_latents_of_other_settings(train_refusal, boundary_dataset, flag, value, found, wanted):
    message = train_refusal(flag, value, dataset=boundary_dataset)
    assert message.startswith(
        f"`--dataset_name {boundary_dataset}` has boundary latents of `{flag} {found}`, not {wanted}. "
    )


def test_latents_of_another_shift_than_the_models(train_refusal, boundary_dataset, low_noise_model, tmp_path):
    model = Path(shutil.copytree(low_noise_model, tmp_path / "model"))
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "flow_shift": 5.0}))
    message = train_refusal(dataset=boundary_dataset, model=model)
    assert "has boundary latents of `--rollout_shift 3.0`, not 5.0." in message


def test_the_shift_of_the_latents_may_be_given(command, boundary_dataset, tmp_path, monkeypatch):
    class Accepted(Exception):
        pass

    def accept(*args, **kwargs):
        raise Accepted

    monkeypatch.setattr(train_srpo_wan_t2i, "make_accelerator", accept)
    flags = ["--rollout_start", "boundary", "--rollout_shift", 3]
    with pytest.raises(Accepted):
        run_in_process(*command(tmp_path / "output", *flags, dataset=boundary_dataset))


def test_the_boundary_of_a_model_of_one_expert(train_refusal, tiny_one_expert_model, boundary_dataset):
    flags = ["--transformer_subfolder", "transformer"]
    message = train_refusal(*flags, model=tiny_one_expert_model, dataset=boundary_dataset)
    assert message == "`--rollout_start boundary` needs a model of two experts; this one has no boundary."
