"""The weights beside a LoRA: in float8 or bfloat16, and with the LoRA merged into them."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    LORA,
    distance,
    gradient_descent,
    load_history,
    load_lora,
    load_state,
    load_weights,
    logged,
    repeatable,
    same_bits,
    use_card,
    watch_transformer,
)

from diffusers import WanTransformer3DModel


ATTENTION = [f"blocks.{block}.attn{kind}.{name}" for block in (0, 1) for kind in (1, 2) for name in
             ("to_q", "to_k", "to_v", "to_out.0")]  # fmt: skip

FP8 = [*LORA, "--base_weights", "fp8"]


def added_weights(output_dir, scale):
    """What a LoRA adds: {name of a weight of the transformer: scale * B @ A}."""
    lora = load_lora(output_dir)
    layers = sorted({re.fullmatch(r"transformer\.(.*)\.lora_[AB]\.weight", name).group(1) for name in lora})
    return {
        f"{layer}.weight": scale
        * (lora[f"transformer.{layer}.lora_B.weight"] @ lora[f"transformer.{layer}.lora_A.weight"])
        for layer in layers
    }


# ---- Merged. --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged_run(train):
    """Two updates beside a base in float8, merged; far enough to be seen."""
    return train(*LORA, "--learning_rate", 0.05, "--base_weights", "fp8", "--save_merged")


def test_the_merged_expert_is_the_base_on_the_disk_plus_the_lora(merged_run, tiny_model):
    merged, base, added = load_weights(merged_run), load_weights(tiny_model), added_weights(merged_run, scale=2)
    assert merged.keys() == base.keys()
    assert sorted(added) == sorted(f"{layer}.weight" for layer in ATTENTION)
    assert all(torch.equal(merged[name], base[name]) for name in base.keys() - added.keys())
    expected = {name: base[name] + added[name] for name in added}
    torch.testing.assert_close({name: merged[name] for name in added}, expected, rtol=0, atol=1e-6)
    assert min(distance({name: added[name]}, {name: torch.zeros(())}) for name in added) > 0.01


def test_diffusers_loads_the_merged_expert_and_predicts_what_base_and_lora_predict(merged_run, tiny_model):
    merged, adapted, base = (
        WanTransformer3DModel.from_pretrained(folder, subfolder="transformer_2")
        for folder in (merged_run, tiny_model, tiny_model)
    )
    adapted.load_lora_adapter(merged_run, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    generator = torch.Generator().manual_seed(0)
    latents, embeds = (torch.randn(shape, generator=generator) for shape in ((2, 4, 1, 4, 4), (2, 16, 16)))
    with torch.no_grad():
        velocities = [
            model(latents, torch.tensor([400.0, 800.0]), encoder_hidden_states=embeds, return_dict=False)[0]
            for model in (merged, adapted, base)
        ]
    torch.testing.assert_close(velocities[0], velocities[1], rtol=0, atol=1e-5)
    assert (velocities[0] - velocities[2]).abs().max() > 1e-2


def test_saving_merged_also_saves_the_lora_and_changes_nothing_else(train, merged_run):
    alone = train(*LORA, "--learning_rate", 0.05, "--base_weights", "fp8")
    assert same_bits(load_lora(merged_run), load_lora(alone))
    names = {path.name for path in merged_run.iterdir()}
    assert names - {path.name for path in alone.iterdir()} == {"transformer_2"}
    assert sorted(path.name for path in (merged_run / "transformer_2").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_the_card_of_a_merged_lora_loads_transformer_2(merged_run, tmp_path, monkeypatch):
    text = (merged_run / "README.md").read_text()
    assert f'WanTransformer3DModel.from_pretrained("{merged_run.name}", subfolder="transformer_2"' in text
    assert "load_lora_adapter" not in text
    expert = use_card(merged_run, tmp_path, monkeypatch)["expert"]
    weight = load_weights(merged_run)["blocks.0.attn1.to_q.weight"]
    assert torch.equal(expert.blocks[0].attn1.to_q.weight, weight.bfloat16())


# ---- In float8 and in bfloat16. -------------------------------------------------------------------------------------


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
