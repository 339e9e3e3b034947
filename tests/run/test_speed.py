"""What makes an update cheaper changes nothing else: reuse and batches of rollouts, solvers, compiling, no waiting."""

import importlib
import inspect
import os
import signal
from contextlib import ExitStack

import pytest
import torch
from accelerate import Accelerator
from helpers import (
    CAPTIONS,
    ROOT,
    checkpoints,
    distance,
    gradient_descent,
    load_history,
    load_weights,
    logged,
    repeatable,
    same_bits,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import train_srpo_wan_t2i
from train_srpo_wan_t2i import RewardModel, SampleSampler, make_optimizer


def wrap(monkeypatch, owner, name, wrapper):
    """Replaces a function by one that calls `wrapper` with it and with its arguments."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: wrapper(function, *args, **kwargs))


@pytest.fixture
def calls(monkeypatch):
    """What these functions were called with: lists that grow, of dicts of their arguments by name."""
    calls = {"rollout": [], "graded_pass": []}

    def record(function, *args, **kwargs):
        calls[function.__name__].append(inspect.signature(function).bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    for name in calls:
        wrap(monkeypatch, train_srpo_wan_t2i, name, record)
    return calls


def assert_same_update(output_dir, other, base):
    """Of two runs of gradient descent: up to the rounding of weights in float32."""
    update = distance(load_weights(other), load_weights(base))
    assert update > 0.01
    assert distance(load_weights(output_dir), load_weights(other)) < 1e-4 * update


# ---- Several updates on one rollout. --------------------------------------------------------------------------------

TWICE = ["--updates_per_rollout", 2]
FOUR_STEPS = ["--max_train_steps", 4]
RENEWED = ["--renew_noise", "--train_batch_size", 2]


def test_two_updates_share_a_rollout_and_nothing_else(train, calls):
    train(*TWICE, *FOUR_STEPS)
    assert (len(calls["rollout"]), len(calls["graded_pass"])) == (2, 4)
    graded = calls["graded_pass"]
    for painted, first, second in zip(calls["rollout"], graded[::2], graded[1::2], strict=True):
        for name in ("noise", "prompt_embeds"):
            assert torch.equal(painted[name], first[name]) and torch.equal(first[name], second[name])
        assert torch.equal(first["x0"], second["x0"]) and first["captions"] == second["captions"]
        assert first["branches"] != second["branches"]
        assert all(word != other for word, other in zip(first["words"], second["words"], strict=True))
    for name in ("x0", "noise", "prompt_embeds"):
        assert not torch.equal(graded[0][name], graded[2][name])


def test_no_caption_is_skipped(train, calls):
    train(*TWICE, *FOUR_STEPS, "--train_batch_size", 2)
    stream = [[CAPTIONS[index] for index in batch] for batch in SampleSampler(6, 42, range(2), 2)]
    assert [call["captions"] for call in calls["graded_pass"]] == [stream[0], stream[0], stream[1], stream[1]]


def test_the_last_rollout_may_be_used_less_often(train, calls):
    train("--updates_per_rollout", 4, "--checkpointing_steps", 4, "--max_train_steps", 5)
    assert (len(calls["rollout"]), len(calls["graded_pass"])) == (2, 5)


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
def test_renew_noise_injects_other_noise_into_the_same_latents(train, calls, noise):
    train("--updates_per_rollout", 3, "--checkpointing_steps", 3, "--max_train_steps", 3, *RENEWED, "--noise", noise)
    (painted,), graded = calls["rollout"], calls["graded_pass"]
    assert all(torch.equal(call["x0"], graded[0]["x0"]) for call in graded)
    assert torch.equal(painted["noise"], graded[0]["noise"])
    assert len({tuple(call["noise"].flatten().tolist()) for call in graded}) == 3
    assert [torch.equal(*call["noise"]) for call in graded] == [noise == "shared"] * 3


def test_one_update_per_rollout_is_the_default(train, plain_run):
    output_dir = train("--updates_per_rollout", 1)
    assert same_bits(load_weights(output_dir), load_weights(plain_run))
    assert repeatable(load_history(output_dir)) == repeatable(load_history(plain_run))


def test_the_first_of_two_updates_is_the_one_without_the_flag(train, plain_run):
    losses, expected = logged(train(*TWICE), "loss"), logged(plain_run, "loss")
    assert losses[0] == expected[0] and losses[1] != expected[1]


@pytest.mark.parametrize("flags", [[], RENEWED], ids=["same noise", "renewed noise"])
def test_a_resumed_run_that_reuses_rollouts_repeats_the_straight_one_bit_for_bit(train, flags):
    flags = [*TWICE, *FOUR_STEPS, *flags]
    straight = train(*flags)
    resumed = train(*flags, "--resume_from_checkpoint", straight / "checkpoint-2")
    assert same_bits(load_weights(resumed), load_weights(straight))
    assert repeatable(load_history(resumed, 4)) == repeatable(load_history(straight, 4))


@pytest.fixture
def own_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


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


@pytest.mark.parametrize("noise", [[], ["--renew_noise"]], ids=["same noise", "renewed noise"])
def test_accumulated_rollouts_are_reused_like_a_batch(train, calls, tiny_model, noise):
    batch = train("--train_batch_size", 2, *TWICE, *noise, *EQUAL_BATCHES)
    accumulated = train("--gradient_accumulation_steps", 2, *TWICE, *noise, *EQUAL_BATCHES)
    assert [len(call["noise"]) for call in calls["rollout"]] == [2, 1, 1]
    assert [len(call["x0"]) for call in calls["graded_pass"]] == [2, 2, 1, 1, 1, 1]
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
    assert [len(call["noise"]) for call in calls["rollout"]] == 2 * sizes
    assert [len(call["x0"]) for call in calls["graded_pass"]] == 2 * [1, 1, 1, 1]
    assert_same_update(together, one_by_one, tiny_model)


@pytest.mark.parametrize(
    "flags, sizes", [([], [2, 2]), (["--rollout_batch_size", 1], [1, 1, 1, 1])], ids=["default", "one by one"]
)
def test_a_batch_is_rolled_out_at_once_unless_told_otherwise(train, calls, flags, sizes):
    train("--train_batch_size", 2, *flags)
    assert [len(call["noise"]) for call in calls["rollout"]] == sizes


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
    (call,) = calls["rollout"]
    assert isinstance(call["scheduler"], scheduler)
    assert call["num_steps"] == len(call["scheduler"].timesteps) == 3


def test_rollouts_take_10_steps_by_default(make_args):
    assert make_args().sampling_steps == 10


# ---- Compiling and the optimizer. -----------------------------------------------------------------------------------


def test_compiled_blocks_compute_the_same(train, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # torchao compiles its optimizer in other tests
    flags = ["--max_train_steps", 1, "--checkpointing_steps", 1, *EQUAL_BATCHES]
    plain = train(*flags)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    compiled = train(*flags, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    assert_same_update(compiled, plain, tiny_model)
    assert logged(compiled, "loss", 1) == pytest.approx(logged(plain, "loss", 1), rel=1e-5)


def test_adamw_is_fused_and_computes_what_adamw_computes(make_args):
    args = make_args("--learning_rate", 0.1, "--adam_weight_decay", 0.5, "--adam_beta1", 0.8, "--adam_epsilon", 0.1)
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2)]
    fused = make_optimizer(args, weights[:1])
    plain = torch.optim.AdamW(weights[1:], 0.1, betas=(0.8, 0.999), eps=0.1, weight_decay=0.5, fused=False)
    assert fused.defaults["fused"]
    for optimizer, weight in zip((fused, plain), weights, strict=True):
        for power in (1, 2, 3):
            weight.grad = torch.linspace(-2, 3, 1000) ** power
            optimizer.step()
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


# ---- Waiting for the GPU. -------------------------------------------------------------------------------------------


class Scalars(TorchDispatchMode):
    """Records operations that make Python wait for a value on the GPU: `item`, `float`, `if`, solving equations."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_linalg_check_errors"):
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Records methods that copy a tensor from the GPU; on the CPU they dispatch nothing."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("tolist", "cpu", "numpy", "__array__"):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """What would wait for the GPU from the first step of a rollout until the update is logged: a list that grows."""
    found, watched = [], ExitStack()

    def begin(function, *args, **kwargs):
        result = function(*args, **kwargs)
        watched.enter_context(Scalars(found))
        watched.enter_context(Copies(found))
        return result

    def end(function, *args, **kwargs):
        watched.close()
        return function(*args, **kwargs)

    def leave_out(function, *args):
        before = len(found)
        result = function(*args)
        del found[before:]
        return result

    for scheduler in (UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler):
        wrap(monkeypatch, scheduler, "set_timesteps", begin)
    wrap(monkeypatch, Accelerator, "gather", end)
    wrap(monkeypatch, RewardModel, "encode_texts", leave_out)  # once for every text
    yield found
    watched.close()


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_nothing_waits_for_the_gpu_until_the_update_is_done(train, waits, scheduler):
    train("--rollout_scheduler", scheduler, "--sampling_steps", 4, "--train_batch_size", 2)
    assert set(waits) == ({"_linalg_check_errors"} if scheduler == "unipc" else set()), "its corrector, of order 2"


READERS = {
    "item": ("predict_velocity", lambda velocity: velocity.mean().item()),
    "tolist": ("predict_velocity", lambda velocity: velocity.tolist()),
    "cpu": ("decode_latents", lambda pixels_and_saturated: pixels_and_saturated[0].cpu()),
    "if": ("decode_latents", lambda pixels_and_saturated: bool(pixels_and_saturated[1] > 0.5)),
    "numpy": ("srp_score", lambda score: score.detach().numpy()),
    "format": ("srp_score", lambda score: f"{score.mean():.3f}"),
    "float": ("srpo_loss", lambda loss: float(loss.detach())),
    "backward": ("srpo_loss", lambda loss: loss.register_hook(lambda gradient: gradient * gradient.item())),
}


@pytest.mark.parametrize("name, read", READERS.values(), ids=READERS.keys())
def test_whatever_waits_would_be_found(train, waits, monkeypatch, name, read):
    def and_read(function, *args, **kwargs):
        result = function(*args, **kwargs)
        read(result)
        return result

    wrap(monkeypatch, train_srpo_wan_t2i, name, and_read)
    train("--max_train_steps", 1, "--rollout_scheduler", "euler")
    assert waits != []


# ---- The benchmarks. ------------------------------------------------------------------------------------------------


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = importlib.import_module("measure")
    monkeypatch.setattr(measure, "DEVICE", torch.device("cpu"))
    return measure


ONE_UPDATE = ["--max_train_steps", 1, "--checkpointing_steps", 1, "--train_batch_size", 2]
ONE_UPDATE += ["--rollout_scheduler", "euler", "--sampling_steps", 3, *gradient_descent(10)]


@pytest.mark.parametrize("noise, max_grad_norm", [("shared", 1), ("per_sample", 0.01)], ids=["free", "clipped"])
def test_the_plain_loop_of_the_benchmarks_computes_what_the_trainer_computes(
    measure, train, command, tiny_model, tmp_path, noise, max_grad_norm
):
    flags = [*ONE_UPDATE, "--noise", noise, "--max_grad_norm", max_grad_norm]
    loop = measure.PlainLoop(command(tmp_path, *flags))
    assert loop.update(0) > 0
    weights = load_weights(train(*flags))
    update = distance(weights, load_weights(tiny_model))
    assert update > 0.01
    assert distance(weights, loop.transformer.state_dict()) < 1e-4 * update


def test_the_benchmarks_count_the_same_forwards_for_both_and_more_flop_for_a_3d_vae(measure, train, command, tmp_path):
    with measure.Anatomy().watch() as ours:
        train(*ONE_UPDATE)
    loop = measure.PlainLoop(command(tmp_path, *ONE_UPDATE))
    with measure.Anatomy().watch() as plain:
        loop.update(0)
    assert ours.forwards == plain.forwards == 2 * (2 * 3 + 2), "prompts, steps with guidance, branches"
    assert 0 < ours.flop < plain.flop
    for anatomy in (ours, plain):
        assert anatomy.seconds.keys() == {"rollout", "graded pass", "decode", "reward", "optimizer"}
        assert min(anatomy.seconds.values()) > 0
