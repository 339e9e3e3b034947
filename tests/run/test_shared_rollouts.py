"""Several updates on one rollout, and several samples in one: cheaper, and the same up to what the flags say."""

import inspect
import os
import signal

import pytest
import torch
from helpers import (
    CAPTIONS,
    assert_same_update,
    checkpoints,
    gradient_descent,
    load_history,
    load_weights,
    logged,
    repeatable,
    same_bits,
    wrap,
)

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import train_srpo_wan_t2i
from train_srpo_wan_t2i import SampleSampler


@pytest.fixture
def calls(monkeypatch):
    """What these functions were called with: lists that grow, of dicts of their arguments by name."""
    calls = {"paint_latents": [], "graded_pass": []}

    def record(function, *args, **kwargs):
        calls[function.__name__].append(inspect.signature(function).bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    for name in calls:
        wrap(monkeypatch, train_srpo_wan_t2i, name, record)
    return calls


# ---- Several updates on one rollout. --------------------------------------------------------------------------------


TWICE = ["--updates_per_rollout", 2]

FOUR_STEPS = ["--max_train_steps", 4]

RENEWED = ["--renew_noise", "--train_batch_size", 2]


def test_two_updates_share_a_rollout_and_nothing_else(train, calls):
    train(*TWICE, *FOUR_STEPS)
    assert (len(calls["paint_latents"]), len(calls["graded_pass"])) == (2, 4)
    rollouts, plans = ([call[name] for call in calls["graded_pass"]] for name in ("rollout", "plan"))
    for painted, first, second in zip(calls["paint_latents"], rollouts[::2], rollouts[1::2], strict=True):
        assert torch.equal(painted["latents"], first.noise)
        assert torch.equal(painted["prompt_embeds"], first.prompt_embeds)
        for name in ("x0", "noise", "prompt_embeds"):
            assert torch.equal(getattr(first, name), getattr(second, name))
        assert first.captions == second.captions
    for first, second in zip(plans[::2], plans[1::2], strict=True):
        for branch, other in zip(first.branches, second.branches, strict=True):
            assert not torch.equal(branch.sigma_from, other.sigma_from)
        assert first.positive_word != second.positive_word and first.negative_word != second.negative_word
    for name in ("x0", "noise", "prompt_embeds"):
        assert not torch.equal(getattr(rollouts[0], name), getattr(rollouts[2], name))


def test_no_caption_is_skipped(train, calls):
    train(*TWICE, *FOUR_STEPS, "--train_batch_size", 2)
    stream = [[CAPTIONS[index] for index in batch] for batch in SampleSampler(6, 42, range(2), 2)]
    assert [call["rollout"].captions for call in calls["graded_pass"]] == [stream[0], stream[0], stream[1], stream[1]]


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
def test_renew_noise_injects_other_noise_into_the_same_latents(train, calls, noise):
    train("--updates_per_rollout", 3, "--checkpointing_steps", 3, "--max_train_steps", 3, *RENEWED, "--noise", noise)
    (painted,), rollouts = calls["paint_latents"], [call["rollout"] for call in calls["graded_pass"]]
    assert all(torch.equal(rollout.x0, rollouts[0].x0) for rollout in rollouts)
    assert torch.equal(painted["latents"], rollouts[0].noise)
    assert len({tuple(rollout.noise.flatten().tolist()) for rollout in rollouts}) == 3
    assert [torch.equal(*rollout.noise) for rollout in rollouts] == [noise == "shared"] * 3


def test_one_update_per_rollout_is_the_default(train, plain_run):
    output_dir = train("--updates_per_rollout", 1)
    assert same_bits(load_weights(output_dir), load_weights(plain_run))
    assert repeatable(load_history(output_dir)) == repeatable(load_history(plain_run))


def test_the_first_of_two_updates_is_the_one_without_the_flag(train, plain_run):
    losses, expected = logged(train(*TWICE), "loss"), logged(plain_run, "loss")
    assert losses[0] == expected[0] and losses[1] != expected[1]


@pytest.mark.parametrize(
    "flags", [pytest.param([], marks=pytest.mark.slow), RENEWED], ids=["same noise", "renewed noise"]
)
def test_a_resumed_run_that_reuses_rollouts_repeats_the_straight_one_bit_for_bit(train, flags):
    flags = [*TWICE, *FOUR_STEPS, *flags]
    straight = train(*flags)
    resumed = train(*flags, "--resume_from_checkpoint", straight / "checkpoint-2")
    assert same_bits(load_weights(resumed), load_weights(straight))
    assert repeatable(load_history(resumed, 4)) == repeatable(load_history(straight, 4))


def test_a_signal_lets_a_rollout_be_used_up_before_the_run_is_saved(
    train, monkeypatch, own_signal_handlers, calls, tmp_path
):
    def stop(function, *args, **kwargs):
        if len(calls["graded_pass"]) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    wrap(monkeypatch, train_srpo_wan_t2i, "graded_pass", stop)
    flags = [*TWICE, *FOUR_STEPS, "--checkpointing_steps", 4]
    with pytest.raises(SystemExit) as stopped:
        train(*flags, output_dir=tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    train(*flags, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    straight = train(*flags)
    assert same_bits(load_weights(tmp_path), load_weights(straight))
    assert repeatable(load_history(tmp_path, 4)) == repeatable(load_history(straight, 4))


EQUAL_BATCHES = [*gradient_descent(1), "--max_grad_norm", 1, "--noise", "per_sample"]


@pytest.mark.parametrize(
    "noise", [pytest.param([], marks=pytest.mark.slow), ["--renew_noise"]], ids=["same noise", "renewed noise"]
)
def test_accumulated_rollouts_are_reused_like_a_batch(train, calls, tiny_model, noise):
    batch = train("--train_batch_size", 2, *TWICE, *noise, *EQUAL_BATCHES)
    accumulated = train("--gradient_accumulation_steps", 2, *TWICE, *noise, *EQUAL_BATCHES)
    assert [len(call["latents"]) for call in calls["paint_latents"]] == [2, 1, 1]
    assert [len(call["rollout"].x0) for call in calls["graded_pass"]] == [2, 2, 1, 1, 1, 1]
    assert_same_update(accumulated, batch, tiny_model)


# ---- How many samples are rolled out at once, and by which solver. --------------------------------------------------


FOUR_SAMPLES = ["--gradient_accumulation_steps", 4, *EQUAL_BATCHES]


@pytest.fixture(scope="module")
def one_by_one(train):
    return train(*FOUR_SAMPLES)


@pytest.mark.parametrize(
    "size, sizes", [(4, [4]), (3, [3, 1]), (9, [4])], ids=["the whole update", "most of it", "more than there are"]
)
def test_samples_of_an_update_can_be_rolled_out_together(train, calls, one_by_one, tiny_model, size, sizes):
    together = train(*FOUR_SAMPLES, "--rollout_batch_size", size)
    assert [len(call["latents"]) for call in calls["paint_latents"]] == 2 * sizes
    assert [len(call["rollout"].x0) for call in calls["graded_pass"]] == 2 * [1, 1, 1, 1]
    assert_same_update(together, one_by_one, tiny_model)


@pytest.mark.parametrize(
    "flags, sizes", [([], [2, 2]), (["--rollout_batch_size", 1], [1, 1, 1, 1])], ids=["default", "one by one"]
)
def test_a_batch_is_rolled_out_at_once_unless_told_otherwise(train, calls, flags, sizes):
    train("--train_batch_size", 2, *flags)
    assert [len(call["latents"]) for call in calls["paint_latents"]] == sizes


@pytest.mark.parametrize(
    "flags, scheduler",
    [
        ([], UniPCMultistepScheduler),
        (["--rollout_scheduler", "unipc"], UniPCMultistepScheduler),
        (["--rollout_scheduler", "euler"], FlowMatchEulerDiscreteScheduler),
    ],
    ids=["default", "unipc", "euler"],
)
def test_the_solver_of_rollouts(train, calls, flags, scheduler):
    train(*flags, "--max_train_steps", 1, "--sampling_steps", 3)
    (call,) = calls["paint_latents"]
    solver = call["models"].solver
    assert isinstance(solver.scheduler, scheduler)
    assert solver.num_steps == len(solver.scheduler.timesteps) == 3
