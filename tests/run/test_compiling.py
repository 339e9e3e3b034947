"""`--compile` computes the same."""

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
from helpers import assert_same_update


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
