"""What makes an update cheap: compiled blocks, and nothing that waits for the GPU until the update is done."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from helpers import assert_same_update, gradient_descent, logged, wrap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanTransformer3DModel

import train_srpo_wan_t2i
from train_srpo_wan_t2i import RewardModel


# ---- Compiling. -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)], ids=["graphs alone", "compiled"]
)
def test_compiled_blocks_compute_the_same(train, tiny_model, monkeypatch, backend):
    """Finding the graphs of the blocks takes seconds; compiling them, which is the default, more than a minute."""
    compile_blocks = partial(WanTransformer3DModel.compile_repeated_blocks, backend=backend)
    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", lambda self: compile_blocks(self))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # torchao compiles its optimizer in other tests
    one_update = ["--max_train_steps", 1, "--checkpointing_steps", 1, "--noise", "per_sample"]
    flags = [*one_update, *gradient_descent(1), "--max_grad_norm", 1]
    plain = train(*flags)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    compiled = train(*flags, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    assert_same_update(compiled, plain, tiny_model)
    assert logged(compiled, "loss", 1) == pytest.approx(logged(plain, "loss", 1), rel=1e-5)


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
    wrap(monkeypatch, train_srpo_wan_t2i, "plan_update", leave_out)  # random numbers are drawn on the CPU
    yield found
    watched.close()


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_nothing_waits_for_the_gpu_until_it_is_asked_once_whether_the_gradient_is_finite(train, waits, scheduler):
    train("--rollout_scheduler", scheduler, "--sampling_steps", 4, "--train_batch_size", 2)
    assert waits.count("_local_scalar_dense") == 2, "in two updates"
    others = set(waits) - {"_local_scalar_dense"}
    assert others == ({"_linalg_check_errors"} if scheduler == "unipc" else set()), "its corrector, of order 2"


READERS = {
    "item": ("transformer_velocity", lambda velocity: velocity.mean().item()),
    "tolist": ("transformer_velocity", lambda velocity: velocity.tolist()),
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
    assert len(waits) > 1, "one is there anyway"
