"""The model card: its header, how to use what was trained, and what it says of settings and results."""

import re

import pytest
import torch
from helpers import logged
from huggingface_hub import ModelCard

from train_srpo_wan_t2i import Run, save_model_card


@pytest.fixture(scope="module")
def trained(train):
    """The output folder of three updates with validation."""
    flags = "--max_train_steps 3 --validation_steps 3 --learning_rate 0.01 --hub_token hf_secret"
    return train(*flags.split(), "--checkpointing_steps", 3, prompts=None)


def test_the_header_of_the_card_names_no_folder_as_base_model(trained):
    data = ModelCard.load(trained / "README.md").data
    assert data.base_model is None
    assert data.library_name == "diffusers"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-to-image"
    assert data.tags == ["text-to-image", "diffusers", "wan", "srpo"]


def test_the_header_of_the_card_names_a_base_model_of_the_hub(make_args, tmp_path):
    args = make_args("--pretrained_model_name_or_path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    save_model_card(Run(tmp_path, vars(args), "transformer_2", True, torch.bfloat16, {}, "me/fox"), [])
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"


def test_the_card_says_how_to_use_the_expert(trained, tiny_model):
    text = ModelCard.load(trained / "README.md").text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    compile(code, "README.md", "exec")
    assert f'WanTransformer3DModel.from_pretrained("{trained.name}", subfolder="transformer_2"' in code
    assert f'"{tiny_model}", transformer=None, transformer_2=expert, boundary_ratio=1.0' in code
    for setting in ("num_frames=1", "height=32", "num_inference_steps=40", "guidance_scale=3.0"):
        assert setting in code


def test_the_card_names_settings_results_and_sources(trained):
    text = (trained / "README.md").read_text()
    for line in (
        "| `--learning_rate` | 0.01 |",
        "| `--max_train_steps` | 3 |",
        "| `--train_timestep` | 5 25 |",
        "| `--reward_model` | CLIP |",
        "| `--positive_words` | Natural-lighting Detail Detailed Real |",
        "![Reward curve](reward.png)",
        "(before_after.png)",
        "2509.06942",
        "3 updates",
    ):
        assert line in text
    rewards = logged(trained, "validation_relative", step=3)
    assert f"{rewards[0]:.4f} -> {rewards[-1]:.4f}" in text
    assert "TODO" not in text and "hub_token" not in text
