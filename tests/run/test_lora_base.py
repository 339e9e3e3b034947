"""The weights beside a LoRA: in float8 or bfloat16."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    LORA,
    gradient_descent,
    load_history,
    load_lora,
    load_state,
    logged,
    repeatable,
    same_bits,
    watch_transformer,
)

from diffusers import WanTransformer3DModel


FP8 = [*LORA, "--base_weights", "fp8"]


PRECISIONS = pytest.mark.parametrize(
    "mixed_precision, compute_dtype",
    [pytest.param("no", torch.float32, marks=pytest.mark.slow), ("bf16", torch.bfloat16)],
)


@PRECISIONS
def test_fp8_stores_the_linear_layers_of_the_blocks_and_nothing_else(train, mixed_precision, compute_dtype):
    with watch_transformer() as passes:
        train(*FP8, mixed_precision=mixed_precision)
    assert [step.graded for step in passes] == [False, False, True] * 2
    for step in passes:
        linear = {
            name for name in step.dtypes if re.search(r"^blocks\..*\.(base_layer|proj|net\.2)\.(weight|bias)$", name)
        }
        assert len(linear) == 2 * (8 + 2) * 2, "blocks, layers of attention and feed-forward, weights and biases"
        assert {step.dtypes[name] for name in linear} == {torch.float8_e4m3fn}
        assert {dtype for name, dtype in step.dtypes.items() if "lora_" in name} == {torch.float32}
        others = {dtype for name, dtype in step.dtypes.items() if name not in linear and "lora_" not in name}
        assert others == {torch.float32, compute_dtype}, "diffusers keeps some layers in float32"


@PRECISIONS
def test_fp8_trains_what_a_base_rounded_to_fp8_and_back_trains(
    train, tiny_model, tmp_path, mixed_precision, compute_dtype
):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    transformer = WanTransformer3DModel.from_pretrained(model, subfolder="transformer_2")
    for module in transformer.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(compute_dtype).to(torch.float8_e4m3fn).to(torch.float32)
    transformer.save_pretrained(model / "transformer_2")
    fp8 = train(*FP8, mixed_precision=mixed_precision)
    rounded = train(*LORA, model=model, mixed_precision=mixed_precision)
    assert repeatable(load_history(fp8)) == repeatable(load_history(rounded)), "scores and norms of gradients"
    assert same_bits(load_lora(fp8), load_lora(rounded))


@pytest.mark.parametrize("mixed_precision", [pytest.param("no", marks=pytest.mark.slow), "bf16"])
def test_fp8_gives_nearly_the_loss_and_the_gradient_of_the_precision_of_the_run(train, mixed_precision):
    # An update is minus the gradient.
    flags = [*gradient_descent(1), "--checkpointing_steps", 1, "--rollout_scheduler", "euler"]
    runs = [train(*lora, *flags, mixed_precision=mixed_precision) for lora in (FP8, LORA)]
    losses = [logged(run, "loss") for run in runs]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.004)  # of 0.68
    fp8, full = (load_state(run, 1) for run in runs)
    updates = [torch.cat([state[name].flatten() for name in state if "lora_B" in name]) for state in (fp8, full)]
    assert torch.cosine_similarity(*updates, dim=0) > 0.98


def test_mixed_precision_trains_a_float32_lora_beside_a_bfloat16_base_and_saves_bfloat16(train):
    with watch_transformer() as passes:
        output_dir = train(*LORA, mixed_precision="bf16")
    dtypes = passes[-1].dtypes
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "base_layer" in name} == {torch.bfloat16}
    state, lora = load_state(output_dir, 2), load_lora(output_dir)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    rounded = {f"transformer.{name.replace('.default.', '.')}": tensor.bfloat16() for name, tensor in state.items()}
    assert same_bits(lora, rounded)
