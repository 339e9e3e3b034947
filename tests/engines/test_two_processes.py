"""A run on two processes: with ZeRO-2, and as plain data parallelism, computes what one process computes."""

import json

import pytest
import torch
from helpers import (
    TRAINING_SCALARS,
    TWO_PROCESSES,
    TWO_RANKS,
    VALIDATION_SCALARS,
    distance,
    gradient_descent,
    load_events,
    load_history,
    load_weights,
    logged,
)

from diffusers import WanTransformer3DModel


@pytest.fixture(scope="module")
def zero2_run(launch):
    """Two updates of gradient descent, learning rate 250, on gradients that are clipped to a norm of 0.002."""
    flags = "--checkpointing_steps 1 --report_to tensorboard --max_grad_norm 0.002"
    return launch(TWO_RANKS, *gradient_descent(250), *flags.split(), prompts=["a red cat"])


def test_zero2_writes_what_one_process_writes(zero2_run):
    assert sorted(path.name for path in zero2_run.iterdir()) == [
        "README.md",
        "before_after.png",
        "checkpoint-1",
        "checkpoint-2",
        "images",
        "logs",
        "reward.png",
        "run.json",
        "train.log",
        "transformer_2",
    ]
    assert set(load_events(zero2_run).Tags()["scalars"]) == TRAINING_SCALARS | VALIDATION_SCALARS
    identity = json.loads((zero2_run / "run.json").read_text())
    assert (identity["num_processes"], identity["engine"]) == (2, "ZeRO-2")
    assert [row["step"] for row in load_history(zero2_run)] == [0, 1, 2, 2]


def test_zero2_saves_an_expert_in_bfloat16_that_diffusers_loads(zero2_run, tiny_model):
    assert {tensor.dtype for tensor in load_weights(zero2_run).values()} == {torch.bfloat16}
    expert = WanTransformer3DModel.from_pretrained(zero2_run, subfolder="transformer_2", dtype=torch.bfloat16)
    base = WanTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer_2", dtype=torch.bfloat16)
    assert expert.config.num_layers == base.config.num_layers == 2
    assert distance(expert.state_dict(), base.state_dict()) > 0.1


def test_zero2_clips_gradients_to_max_grad_norm(zero2_run, tiny_model):
    assert all(norm > 0.004 for norm in logged(zero2_run, "grad_norm")), "logged before clipping"
    base = {name: tensor.bfloat16() for name, tensor in load_weights(tiny_model).items()}
    # Two steps of 250 * 0.002, not in quite the same direction.
    assert 0.5 < distance(load_weights(zero2_run), base) < 1.05


EQUAL_BATCHES = [*gradient_descent(1), "--max_grad_norm", 1, "--lr_scheduler", "linear"]


@pytest.fixture(scope="module")
def batch_of_4(train):
    return {
        noise: train("--train_batch_size", 4, "--noise", noise, *EQUAL_BATCHES) for noise in ("shared", "per_sample")
    }


def assert_same_step(output_dir, other, tiny_model):
    assert distance(load_weights(other), load_weights(tiny_model)) > 0.01
    torch.testing.assert_close(load_weights(output_dir), load_weights(other), rtol=0, atol=1e-6)
    for name in ("loss", "score", "score_denoise", "reward_positive", "grad_norm", "lr", "sigma"):
        assert logged(output_dir, name) == pytest.approx(logged(other, name), abs=1e-5)


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
def test_a_batch_of_4_is_a_batch_of_2_accumulated_twice(train, batch_of_4, tiny_model, noise):
    accumulated = train("--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--noise", noise, *EQUAL_BATCHES)
    assert_same_step(accumulated, batch_of_4[noise], tiny_model)


def test_a_batch_of_4_is_one_caption_accumulated_twice_on_two_processes(launch, batch_of_4, tiny_model):
    flags = ["--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--noise", "per_sample"]
    two = launch(
        f"{TWO_PROCESSES} --mixed_precision no", *flags, *EQUAL_BATCHES, environment={"ACCELERATE_USE_CPU": "true"}
    )
    identity = json.loads((two / "run.json").read_text())
    assert (identity["num_processes"], identity["engine"]) == (2, "without DeepSpeed")
    assert_same_step(two, batch_of_4["per_sample"], tiny_model)
