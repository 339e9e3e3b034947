"""Training a LoRA beside the weights: what is trained, saved, loaded and resumed; the float8 base; merged saving."""

import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import (
    CAPTIONS,
    checkpoints,
    distance,
    file_hashes,
    gradient_descent,
    load_history,
    load_weights,
    logged,
    read_log,
    read_scores,
    repeatable,
    same_bits,
)
from datasets import load_from_disk
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from train_srpo_wan_t2i import VALIDATION, make_generator


ATTENTION = [f"blocks.{block}.attn{kind}.{name}" for block in (0, 1) for kind in (1, 2) for name in
             ("to_q", "to_k", "to_v", "to_out.0")]  # fmt: skip
LORA = ["--lora_rank", 4, "--lora_alpha", 8]  # a scale of 8 / 4 = 2
DROPOUT = [*LORA, "--lora_dropout", 0.5]
FP8 = [*LORA, "--base_weights", "fp8"]


def load_lora(output_dir):
    return load_file(Path(output_dir, "pytorch_lora_weights.safetensors"))


def load_state(output_dir, step):
    return load_file(Path(output_dir, f"checkpoint-{step}", "model.safetensors"))


def added_weights(output_dir, scale):
    """What a LoRA adds: {name of a weight of the transformer: scale * B @ A}."""
    lora = load_lora(output_dir)
    layers = sorted({re.fullmatch(r"transformer\.(.*)\.lora_[AB]\.weight", name).group(1) for name in lora})
    return {
        f"{layer}.weight": scale
        * (lora[f"transformer.{layer}.lora_B.weight"] @ lora[f"transformer.{layer}.lora_A.weight"])
        for layer in layers
    }


class Pass(NamedTuple):
    """One forward pass of the transformer."""

    graded: bool  # with a gradient
    training: bool  # some layer is in the mode that drops out
    velocity: torch.Tensor
    transformer: WanTransformer3DModel
    dtypes: dict[str, torch.dtype]  # of the parameters, right after it


@contextmanager
def watch_transformer():
    """A list that grows by a [`Pass`] with every forward pass of a transformer."""
    passes = []

    def watch(module, inputs, output):
        if isinstance(module, WanTransformer3DModel):
            dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
            training = any(layer.training for layer in module.modules())
            passes.append(Pass(torch.is_grad_enabled(), training, output[0].detach().clone(), module, dtypes))

    handle = register_module_forward_hook(watch)
    try:
        yield passes
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def lora_run(train):
    """Two updates of a LoRA, far enough to be seen, with a checkpoint and a validation image after each."""
    flags = ["--learning_rate", 0.05, "--adam_weight_decay", 0, "--checkpointing_steps", 1, "--validation_steps", 1]
    return train(*LORA, *flags, prompts=["a red cat"])


@pytest.fixture(scope="module")
def quick_lora(train):
    """Two updates with none but the quick flags."""
    return train(*LORA)


# ---- What a run leaves behind. --------------------------------------------------------------------------------------


def test_a_run_writes_the_lora_and_no_expert(lora_run):
    assert sorted(path.name for path in lora_run.iterdir()) == [
        "README.md",
        "before_after.png",
        "checkpoint-1",
        "checkpoint-2",
        "images",
        "pytorch_lora_weights.safetensors",
        "reward.png",
        "train.log",
    ]
    assert f"Saved {lora_run}/pytorch_lora_weights.safetensors" in read_log(lora_run)


def test_a_lora_has_two_matrices_for_every_linear_layer_of_the_attention(lora_run):
    lora = load_lora(lora_run)
    assert sorted(lora) == sorted(f"transformer.{layer}.lora_{x}.weight" for layer in ATTENTION for x in "AB")
    assert {tuple(lora[name].shape) for name in lora if "lora_A" in name} == {(4, 24)}
    assert {tuple(lora[name].shape) for name in lora if "lora_B" in name} == {(24, 4)}


def test_a_checkpoint_holds_the_lora_and_no_base_weights(lora_run):
    state, lora = load_state(lora_run, 2), load_lora(lora_run)
    assert {f"transformer.{name.replace('.default.', '.')}" for name in state} == lora.keys()
    assert all(torch.equal(state[name], lora[f"transformer.{name.replace('.default.', '.')}"]) for name in state)


@pytest.fixture
def pipeline_with_lora(lora_run, tiny_model):
    """Both experts of the base model, and the LoRA in `transformer_2`, as diffusers loads it."""
    pipe = WanPipeline.from_pretrained(tiny_model, boundary_ratio=1.0)  # all noise levels are transformer_2's
    pipe.load_lora_weights(lora_run, load_into_transformer_2=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_diffusers_loads_the_lora_into_transformer_2_only(pipeline_with_lora, tiny_model, lora_run):
    assert same_bits(pipeline_with_lora.transformer.state_dict(), load_weights(tiny_model, "transformer"))
    state, lora = pipeline_with_lora.transformer_2.state_dict(), load_lora(lora_run)
    loaded = {name.replace(".default_0.", "."): tensor for name, tensor in state.items() if "lora_" in name}
    assert same_bits({f"transformer.{name}": tensor for name, tensor in loaded.items()}, lora)


def test_rank_and_alpha_survive_saving_and_loading(pipeline_with_lora):
    (config,) = pipeline_with_lora.transformer_2.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 8)
    assert pipeline_with_lora.transformer_2.blocks[0].attn1.to_q.scaling == {"default_0": 2.0}


def test_the_loaded_lora_paints_the_last_validation_image(pipeline_with_lora, lora_run, tiny_dataset):
    pipeline_with_lora.text_encoder.bfloat16()  # the type that captions are embedded in
    image = pipeline_with_lora(
        "a red cat",
        negative_prompt=load_from_disk(tiny_dataset)["negative"]["caption"][0],
        latents=torch.randn(1, 4, 1, 4, 4, generator=make_generator(42, VALIDATION, 0)),
        num_frames=1,
        height=32,
        width=32,
        num_inference_steps=40,
        guidance_scale=3.0,
        max_sequence_length=16,
    ).frames[0, 0]
    before, after = (
        np.asarray(Image.open(lora_run / f"images/step-{step}/000-a-red-cat.png"), dtype=int) for step in (0, 2)
    )
    assert np.abs(image * 255 - after).max() < 2
    assert np.abs(before - after).max() > 20


def test_a_lora_of_a_model_with_one_expert_loads_into_its_transformer(train, embed, tiny_one_expert_model):
    flags = ["--transformer_subfolder", "transformer", "--height", 64, "--width", 64, "--validation_size", 64]
    dataset = embed(tiny_one_expert_model, CAPTIONS)
    output_dir = train(*LORA, *flags, model=tiny_one_expert_model, dataset=dataset)
    pipe = WanPipeline.from_pretrained(tiny_one_expert_model)
    pipe.load_lora_weights(output_dir)
    assert pipe.transformer.blocks[0].attn1.to_q.scaling == {"default_0": 2.0}


def test_a_full_run_that_overwrites_a_lora_run_leaves_no_lora(train, lora_run, tmp_path):
    output_dir = shutil.copytree(lora_run, tmp_path / "output")
    train("--overwrite_output_dir", output_dir=output_dir)
    assert (output_dir / "transformer_2").is_dir()
    assert not (output_dir / "pytorch_lora_weights.safetensors").exists()


# ---- The card. ------------------------------------------------------------------------------------------------------


def use_card(output_dir, folder, monkeypatch):
    """Runs the code of the card in `folder`, on the CPU, and returns its variables."""
    code = re.search(r"```python\n(.*?)```", ModelCard.load(output_dir / "README.md").text, re.DOTALL).group(1)
    monkeypatch.chdir(folder)
    variables = {}
    code = code.replace(f'"{output_dir.name}"', f'"{output_dir}"').replace('.to("cuda")', '.to("cpu")')
    exec(compile(code, "README.md", "exec"), variables)
    return variables


def test_the_card_of_a_lora_says_how_to_load_it(lora_run, tiny_model, tmp_path, monkeypatch):
    text = (lora_run / "README.md").read_text()
    assert "A LoRA of rank 4 for `transformer_2`" in text
    assert f'expert.load_lora_adapter("{lora_run.name}", weight_name="pytorch_lora_weights.safetensors"' in text
    expert = use_card(lora_run, tmp_path, monkeypatch)["expert"]
    assert expert.blocks[0].attn1.to_q.scaling == {"default_0": 2.0}
    weight = load_lora(lora_run)["transformer.blocks.0.attn1.to_q.lora_B.weight"]
    assert torch.equal(expert.blocks[0].attn1.to_q.lora_B["default_0"].weight, weight.bfloat16())
    assert Image.open(tmp_path / "fox.png").size == (32, 32)


def test_the_card_of_a_lora_has_its_tag(lora_run):
    assert ModelCard.load(lora_run / "README.md").data.tags == ["text-to-image", "diffusers", "wan", "srpo", "lora"]


def test_the_card_of_a_merged_lora_loads_transformer_2(merged_run, tmp_path, monkeypatch):
    text = (merged_run / "README.md").read_text()
    assert f'WanTransformer3DModel.from_pretrained("{merged_run.name}", subfolder="transformer_2"' in text
    assert "load_lora_adapter" not in text
    expert = use_card(merged_run, tmp_path, monkeypatch)["expert"]
    weight = load_weights(merged_run)["blocks.0.attn1.to_q.weight"]
    assert torch.equal(expert.blocks[0].attn1.to_q.weight, weight.bfloat16())


# ---- What is trained. -----------------------------------------------------------------------------------------------


def test_a_lora_changes_nothing_at_the_start(train, lora_run):
    full = train("--max_train_steps", 1, "--checkpointing_steps", 1, prompts=["a red cat"])
    assert read_scores(lora_run) == read_scores(full)
    assert logged(lora_run, "score")[0] == logged(full, "score", step=1)[0]


def test_b_is_trained_from_the_first_update_on_and_a_from_the_second(train, lora_run):
    start = load_state(train(*LORA, "--learning_rate", 0), 2)
    first, second = load_state(lora_run, 1), load_state(lora_run, 2)
    a, b = ([name for name in start if f"lora_{x}" in name] for x in "AB")
    assert len(a) == len(b) == 16
    assert all(start[name].count_nonzero() == 0 for name in b), "so the LoRA changes nothing, and A has no gradient"
    assert [name for name in b if torch.equal(start[name], first[name])] == []
    assert [name for name in a if not torch.equal(start[name], first[name])] == []
    assert [name for name in a + b if torch.equal(first[name], second[name])] == []


def test_the_base_is_not_trained(train, tiny_model):
    with watch_transformer() as passes:
        train(*LORA, "--learning_rate", 1, "--adam_weight_decay", 0.1)
    weights = passes[-1].transformer.state_dict()
    base = {name.replace(".base_layer.", "."): weights[name] for name in weights if "lora_" not in name}
    assert same_bits(base, load_weights(tiny_model))


def test_rollouts_go_through_the_lora(train):
    velocities = []
    for rate in (0, 0.05):
        with watch_transformer() as passes:
            train(*LORA, "--learning_rate", rate)
        # Each update has two passes without a gradient and one with it.
        assert [step.graded for step in passes] == [False, False, True] * 2
        velocities.append([step.velocity for step in passes])
    assert torch.equal(velocities[0][0], velocities[1][0])
    assert not torch.equal(velocities[0][3], velocities[1][3])


def test_lora_target_modules_choose_the_layers(train):
    lora = load_lora(train("--lora_rank", 2, "--lora_target_modules", "ffn.net.0.proj", "attn2.to_q"))
    layers = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("ffn.net.0.proj", "attn2.to_q")]
    assert sorted(lora) == sorted(f"transformer.{layer}.lora_{x}.weight" for layer in layers for x in "AB")


def test_lora_alpha_scales_what_the_lora_adds(train):
    # At the start B is zero, so only B has a gradient: alpha / rank times that of a LoRA whose alpha is its rank.
    plain, double = (logged(train("--lora_rank", 4, *alpha), "grad_norm") for alpha in ([], ["--lora_alpha", 8]))
    assert double[0] == pytest.approx(2 * plain[0], rel=1e-5)


def test_a_lora_without_alpha_has_a_scale_of_1(train, tiny_model):
    pipe = WanPipeline.from_pretrained(tiny_model)
    pipe.load_lora_weights(train("--lora_rank", 4), load_into_transformer_2=True)
    assert pipe.transformer_2.blocks[0].attn1.to_q.scaling == {"default_0": 1.0}


@pytest.mark.parametrize("flags", ["", "--lora_dropout 0.5", "--base_weights fp8"])
def test_gradient_checkpointing_gives_the_same_lora(train, flags):
    runs = [train(*LORA, *flags.split(), *more) for more in ([], ["--gradient_checkpointing"])]
    torch.testing.assert_close(load_lora(runs[0]), load_lora(runs[1]), rtol=0, atol=1e-6)


# ---- Dropout. -------------------------------------------------------------------------------------------------------


def test_dropout_changes_the_graded_pass_and_no_rollout(train, quick_lora):
    more = ["--max_train_steps", 3, "--resume_from_checkpoint", quick_lora / "checkpoint-2"]
    velocities = []
    for flags in (LORA, DROPOUT):
        with watch_transformer() as passes:
            train(*flags, *more)
        assert [(step.graded, step.training) for step in passes] == [(False, False), (False, False), (True, True)]
        velocities.append([step.velocity for step in passes])
    same = [torch.equal(plain, dropped) for plain, dropped in zip(*velocities, strict=True)]
    assert same == [True, True, False]


def test_dropout_does_not_reach_validation(train, quick_lora):
    again = ["--resume_from_checkpoint", quick_lora / "checkpoint-2"]
    plain, dropped = (train(*flags, *again, prompts=["a red cat"]) for flags in (LORA, DROPOUT))
    assert read_scores(dropped, 2) == read_scores(plain, 2) != read_scores(plain, 0)


def test_the_same_seed_drops_out_the_same(train):
    runs = [train(*DROPOUT, *seed) for seed in ([], [], ["--seed", 43])]
    assert same_bits(load_lora(runs[0]), load_lora(runs[1]))
    assert not same_bits(load_lora(runs[0]), load_lora(runs[2]))


def test_every_layer_and_every_pass_drops_out_something_else(train):
    masks = []

    def watch(module, inputs, output):
        if isinstance(module, torch.nn.Dropout) and module.p == 0.5 and module.training:
            masks.append(output == 0)

    handle = register_module_forward_hook(watch)
    try:
        train(*DROPOUT, "--gradient_accumulation_steps", 2)
    finally:
        handle.remove()
    assert len(masks) == 2 * 2 * 16, "updates, rollouts, layers"
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)


# ---- Resuming. ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, mixed_precision",
    [
        ("", "no"),
        ("", "bf16"),
        ("--lora_dropout 0.5", "no"),
        ("--checkpointing_steps 1 --checkpoints_total_limit 1", "no"),
        ("--base_weights fp8 --gradient_checkpointing --lora_dropout 0.5", "bf16"),
    ],
)
def test_two_updates_and_two_more_are_four_bit_for_bit(train, flags, mixed_precision):
    flags, precision = [*LORA, *flags.split()], {"mixed_precision": mixed_precision}
    whole = train(*flags, "--max_train_steps", 4, **precision)
    output_dir = train(*flags, **precision)
    train(*flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", output_dir=output_dir, **precision)
    assert checkpoints(output_dir) == checkpoints(whole)
    assert same_bits(load_lora(output_dir), load_lora(whole))
    assert repeatable(load_history(output_dir, 4)) == repeatable(load_history(whole, 4))


def test_resuming_a_finished_run_writes_the_same_lora_again(train, quick_lora):
    again = train(*LORA, "--resume_from_checkpoint", quick_lora / "checkpoint-2")
    assert same_bits(load_lora(again), load_lora(quick_lora))


@pytest.mark.parametrize(
    "flags, difference",
    [
        ("--lora_rank 2 --lora_alpha 8", "LoRA"),
        ("--lora_rank 4 --lora_alpha 4", "LoRA"),
        ("--lora_rank 4 --lora_alpha 8 --lora_target_modules to_q", "LoRA"),
        ("", "LoRA"),
        ("--lora_rank 4 --lora_alpha 8 --optimizer adamw_8bit", "optimizer"),
    ],
)
def test_a_run_cannot_go_on_with_something_else_to_train(train, lora_run, flags, difference):
    if "8bit" in flags:
        pytest.importorskip("torchao")
    checkpoint, before = lora_run / "checkpoint-2", file_hashes(lora_run)
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", checkpoint]
    with pytest.raises(SystemExit, match=f"error: {checkpoint} was made with another {difference}.*") as caught:
        train(*flags.split(), *more, output_dir=lora_run)
    assert "\n" not in caught.value.code
    assert file_hashes(lora_run) == before


def test_a_lora_cannot_go_on_from_a_full_run(train, plain_run):
    before = file_hashes(plain_run)
    with pytest.raises(SystemExit, match="was made with another LoRA"):
        train(*LORA, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", output_dir=plain_run)
    assert file_hashes(plain_run) == before


def test_a_lora_cannot_go_on_with_another_base_model(train, lora_run, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.copytree(model / "transformer", model / "transformer_2", dirs_exist_ok=True)
    before = file_hashes(lora_run)
    with pytest.raises(SystemExit, match="was made with another base model"):
        train(*LORA, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", model=model, output_dir=lora_run)
    assert file_hashes(lora_run) == before


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


# ---- The base in float8 and in bfloat16. ----------------------------------------------------------------------------


@pytest.mark.parametrize("mixed_precision, compute_dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
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


@pytest.mark.parametrize("mixed_precision, compute_dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
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


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
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


# ---- What is refused. -----------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(make_args, capsys):
    """Function: flags that the parser must refuse -> its message, one line."""

    def refuse(flags):
        with pytest.raises(SystemExit) as caught:
            make_args(*flags.split())
        assert caught.value.code == 2
        return re.search(r"^\S+: error: (.*)\n\Z", capsys.readouterr().err, re.MULTILINE).group(1)

    return refuse


@pytest.mark.parametrize(
    "flags",
    [
        "--lora_alpha 8",
        "--lora_dropout 0.1",
        "--lora_dropout 0",
        "--lora_target_modules to_q",
        "--base_weights fp8",
        "--save_merged",
    ],
)
def test_a_flag_of_the_lora_without_a_lora(refusal, flags):
    name = flags.split()[0]
    assert refusal(flags).startswith(f"`{name}` needs `--lora_rank`")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lora_rank 0", "`--lora_rank` must be at least 1, but is 0."),
        ("--lora_rank 4 --lora_alpha 0", "`--lora_alpha` must be positive, but is 0.0."),
        ("--lora_rank 4 --lora_dropout 1", "`--lora_dropout` must be at least 0 and below 1, but is 1.0."),
        ("--lora_rank 4 --lora_dropout -0.1", "`--lora_dropout` must be at least 0 and below 1, but is -0.1."),
    ],
)
def test_values_that_no_lora_has(refusal, flags, message):
    assert refusal(flags) == message


@pytest.mark.parametrize("modules", ["to_nothing", "to_q to_nothing", "attn1", "norm_q"])
def test_names_that_are_no_linear_layers_of_the_transformer(train, monkeypatch, tmp_path, modules):
    def fail(*args, **kwargs):
        pytest.fail("a model was loaded before the input was checked")

    for model_class in (WanTransformer3DModel, AutoencoderKLWan):
        monkeypatch.setattr(model_class, "from_pretrained", fail)
    with pytest.raises(SystemExit, match="^error: .*`--lora_target_modules`?.*$") as caught:
        train("--lora_rank", 4, "--lora_target_modules", *modules.split(), output_dir=tmp_path / "output")
    assert "\n" not in caught.value.code
    assert not (tmp_path / "output").exists()
