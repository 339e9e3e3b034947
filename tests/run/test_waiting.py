"""Nothing waits for the GPU between the first step of a rollout and the end of the update."""

import importlib
import inspect
import os
import signal
from contextlib import ExitStack
import pytest
import torch
from accelerate import Accelerator
from helpers import CAPTIONS, ROOT, checkpoints, distance, gradient_descent, load_history, load_weights, logged, repeatable, same_bits
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
import train_srpo_wan_t2i
from train_srpo_wan_t2i import RewardModel, SampleSampler, make_optimizer
from helpers import wrap


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
