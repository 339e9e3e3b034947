"""Training a LoRA beside the weights: what is trained, what drops out, what is saved and how it is loaded."""

import shutil

import numpy as np
import pytest
import torch
from helpers import (
    LORA,
    load_lora,
    load_state,
    load_weights,
    logged,
    paint_published,
    read_log,
    read_scores,
    same_bits,
    use_card,
    watch_transformer,
)
from huggingface_hub import ModelCard
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook

from diffusers import WanPipeline


ATTENTION = [f"blocks.{block}.attn{kind}.{name}" for block in (0, 1) for kind in (1, 2) for name in
             ("to_q", "to_k", "to_v", "to_out.0")]  # fmt: skip

DROPOUT = [*LORA, "--lora_dropout", 0.5]


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
        "run.json",
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
    image = paint_published(pipeline_with_lora, "a red cat", 0, tiny_dataset)
    before, after = (
        np.asarray(Image.open(lora_run / f"images/step-{step}/000-a-red-cat.png"), dtype=int) for step in (0, 2)
    )
    assert np.abs(image * 255 - after).max() < 2
    assert np.abs(before - after).max() > 20


def test_a_full_run_that_overwrites_a_lora_run_leaves_no_lora(train, lora_run, tmp_path):
    output_dir = shutil.copytree(lora_run, tmp_path / "output")
    train("--overwrite_output_dir", output_dir=output_dir)
    assert (output_dir / "transformer_2").is_dir()
    assert not (output_dir / "pytorch_lora_weights.safetensors").exists()


# ---- The card. ------------------------------------------------------------------------------------------------------


def test_the_card_of_a_lora_says_how_to_load_it(lora_run, tiny_model, tmp_path, monkeypatch):
    text = (lora_run / "README.md").read_text()
    assert "A LoRA of rank 4 for `transformer_2`" in text
    assert 'expert.load_lora_adapter(trained, weight_name="pytorch_lora_weights.safetensors"' in text
    variables = use_card(lora_run, tiny_model, tmp_path, monkeypatch)
    expert, image = variables["expert"], variables["image"]
    assert expert.blocks[0].attn1.to_q.scaling == {"default_0": 2.0}
    weight = load_lora(lora_run)["transformer.blocks.0.attn1.to_q.lora_B.weight"]
    assert torch.equal(expert.blocks[0].attn1.to_q.lora_B["default_0"].weight, weight.bfloat16())
    assert image.size == (32, 32)


def test_the_card_of_a_lora_has_its_tag(lora_run):
    assert ModelCard.load(lora_run / "README.md").data.tags == ["text-to-image", "diffusers", "wan", "srpo", "lora"]


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


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("", marks=pytest.mark.slow),
        pytest.param("--lora_dropout 0.5", marks=pytest.mark.slow),
        "--base_weights fp8",
    ],
)
def test_gradient_checkpointing_gives_the_same_lora(train, flags):
    runs = [train(*LORA, *flags.split(), *more) for more in ([], ["--gradient_checkpointing"])]
    torch.testing.assert_close(load_lora(runs[0]), load_lora(runs[1]), rtol=0, atol=1e-6)


# ---- Dropout. -------------------------------------------------------------------------------------------------------


def test_dropout_changes_the_graded_pass_and_no_rollout(train, quick_lora):
    more = ["--max_train_steps", 3, "--resume_from_checkpoint", quick_lora / "checkpoint-2", "--allow_changes"]
    velocities = []
    for flags in (LORA, DROPOUT):
        with watch_transformer() as passes:
            train(*flags, *more)
        assert [(step.graded, step.training) for step in passes] == [(False, False), (False, False), (True, True)]
        velocities.append([step.velocity for step in passes])
    same = [torch.equal(plain, dropped) for plain, dropped in zip(*velocities, strict=True)]
    assert same == [True, True, False]


def test_dropout_does_not_reach_validation(train, quick_lora):
    again = ["--resume_from_checkpoint", quick_lora / "checkpoint-2", "--allow_changes"]
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
