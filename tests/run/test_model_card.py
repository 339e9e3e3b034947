"""The model card: its header, how to use what was trained, and what it says of settings and results."""

import json
import re

import pytest
import torch
from helpers import LORA, logged, use_card
from huggingface_hub import ModelCard

from train_srpo_wan_t2i import Run, save_model_card


WAN = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"


@pytest.fixture(scope="module")
def trained(train):
    """The output folder of three updates with validation."""
    flags = "--max_train_steps 3 --validation_steps 3 --learning_rate 0.01 --checkpointing_steps 3".split()
    return train(*flags, prompts=None)


@pytest.fixture
def write_card(make_args, tmp_path):
    """Function: flags -> the card of a run that has done nothing yet."""

    def write(*flags):
        args = make_args("--output_dir", tmp_path, *flags)
        save_model_card(Run(tmp_path, vars(args), "transformer_2", torch.bfloat16, {}, 0, "me/fox"), [])
        return ModelCard.load(tmp_path / "README.md")

    return write


# ---- The header. ----------------------------------------------------------------------------------------------------


def test_the_header_names_what_every_card_has(trained):
    data = ModelCard.load(trained / "README.md").data
    assert data.library_name == "diffusers"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-to-image"
    assert data.tags == ["text-to-image", "diffusers", "wan", "srpo"]


def test_the_header_names_no_folder_as_base_model(trained):
    data = ModelCard.load(trained / "README.md").data.to_dict()
    assert not {"base_model", "base_model_relation"} & data.keys()


@pytest.mark.parametrize("flags, relation", [([], "finetune"), (LORA, "adapter")])
def test_the_header_names_a_base_model_of_the_hub_and_how_this_one_descends_from_it(write_card, flags, relation):
    data = write_card("--pretrained_model_name_or_path", WAN, *flags).data
    assert data.base_model == WAN
    assert data.base_model_relation == relation


def test_the_header_shows_the_last_validation_images(trained):
    scores = json.loads((trained / "images/step-3/scores.json").read_text())
    widget = ModelCard.load(trained / "README.md").data.widget
    assert widget == [{"text": r["caption"], "output": {"url": f"images/step-3/{r['image']}"}} for r in scores]
    assert len(widget) == 4 and all((trained / each["output"]["url"]).is_file() for each in widget)


def test_the_header_has_the_scores_before_and_after_training(trained):
    data = ModelCard.load(trained / "README.md").data
    assert data.model_name == trained.name
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    expected = {}
    for name in ("reward", "relative"):
        before, after = logged(trained, f"validation_{name}", step=3)
        expected |= {f"CLIP, {name}, before training": before, f"CLIP, {name}, after training": after}
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_header_of_a_run_without_validation_has_no_scores_and_images(write_card):
    data = write_card("--pretrained_model_name_or_path", WAN).data.to_dict()
    assert not {"widget", "model-index"} & data.keys()


# ---- The text. ------------------------------------------------------------------------------------------------------


def test_the_card_says_how_to_use_the_expert(trained, tiny_model):
    text = ModelCard.load(trained / "README.md").text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert f'\nbase = "{tiny_model.name}"' in code and f'\ntrained = "{trained.name}"' in code
    assert 'WanTransformer3DModel.from_pretrained(trained, subfolder="transformer_2"' in code
    assert '"transformer": None, "transformer_2": expert, "boundary_ratio": 1.0' in code
    for setting in ("num_frames=1", "height=32", "num_inference_steps=40", "guidance_scale=3.0"):
        assert setting in code


def test_the_code_of_the_card_runs_wherever_its_two_folders_are_named(trained, tiny_model, tmp_path, monkeypatch):
    variables = use_card(trained, tiny_model, tmp_path, monkeypatch)
    assert variables["image"].size == (32, 32)


def test_the_card_names_settings_results_and_sources(trained, tiny_model, tiny_dataset):
    text = (trained / "README.md").read_text()
    for line in (
        f"| `--pretrained_model_name_or_path` | {tiny_model.name} |",
        f"| `--dataset_name` | {tiny_dataset.name} |",
        "| `--learning_rate` | 0.01 |",
        "| `--max_train_steps` | 3 |",
        "| `--train_timestep` | 5 25 |",
        "| `--reward_model` | CLIP |",
        "| `--positive_words` | Natural-lighting Detail Detailed Real |",
        "| `--negative_words` | 'Concept art' Painting Anime Flat Oil |",
        "![Reward curve](reward.png)",
        "(before_after.png)",
        "2509.06942",
        "3 updates",
    ):
        assert line in text
    rewards = logged(trained, "validation_relative", step=3)
    assert f"{rewards[0]:.4f} -> {rewards[-1]:.4f}" in text
    assert "TODO" not in text


def test_the_card_has_no_path_of_this_machine(trained, tiny_model, tiny_dataset, tiny_reward):
    text = (trained / "README.md").read_text()
    for path in (trained, tiny_model, tiny_dataset, tiny_reward):
        assert str(path.parent) not in text
