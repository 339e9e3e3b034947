"""What a run through `accelerate launch` leaves behind: files, images, events, the log, checkpoints and the expert."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import (
    CAPTIONS,
    CPU,
    TRAINING_SCALARS,
    VALIDATION_SCALARS,
    checkpoints,
    file_hashes,
    load_events,
    load_history,
    load_weights,
    logged,
    paint_published,
    read_log,
    read_scores,
    same_bits,
)
from PIL import Image

from diffusers import WanPipeline, WanTransformer3DModel

from train_srpo_wan_t2i import NEGATIVE_WORDS, POSITIVE_WORDS, CLIPReward


@pytest.fixture(scope="module")
def launched_run(start, tiny_model, tmp_path_factory):
    """Three updates with everything on, the hashes of the base model's files before them, and what the console saw."""
    before, output_dir = file_hashes(tiny_model), tmp_path_factory.mktemp("output")
    flags = "--max_train_steps 3 --checkpointing_steps 1 --checkpoints_total_limit 2 --validation_steps 2"
    flags += " --learning_rate 0.01 --adam_weight_decay 0 --report_to tensorboard"
    process = start(CPU.split(), output_dir, *flags.split(), prompts=None)
    console, _ = process.communicate()
    assert process.returncode == 0, console
    return output_dir, before, console


@pytest.fixture(scope="module")
def cpu_run(launched_run):
    return launched_run[:2]


@pytest.fixture(scope="module")
def console(launched_run):
    return launched_run[2]


def test_a_run_writes_the_expert_its_card_and_its_curves(cpu_run):
    output_dir, _ = cpu_run
    assert sorted(path.name for path in output_dir.iterdir()) == [
        "README.md",
        "before_after.png",
        "checkpoint-2",
        "checkpoint-3",
        "images",
        "logs",
        "reward.png",
        "run.json",
        "train.log",
        "transformer_2",
    ]
    assert sorted(path.name for path in (output_dir / "transformer_2").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    for name in ("reward.png", "before_after.png"):
        Image.open(output_dir / name).verify()


def test_validation_images_lie_in_a_folder_for_each_step(cpu_run):
    output_dir, _ = cpu_run
    assert sorted(path.name for path in (output_dir / "images").iterdir()) == ["step-0", "step-2", "step-3"]
    for folder in (output_dir / "images").iterdir():
        assert sorted(path.name for path in folder.iterdir()) == [
            "000-a-red-cat.png",
            "001-a-blue-dog.png",
            "002-a-boat.png",
            "003-a-red-boat-on-a-blue-cat.png",
            "scores.json",
        ]
        assert [Image.open(path).size for path in folder.glob("*.png")] == [(32, 32)] * 4
        scores = json.loads((folder / "scores.json").read_text())
        assert [row["caption"] for row in scores] == CAPTIONS[:4]
        assert [row["image"] for row in scores] == sorted(path.name for path in folder.glob("*.png"))
        assert all(math.isfinite(row["reward"]) and math.isfinite(row["relative"]) for row in scores)


def test_events_hold_every_scalar_of_every_update(cpu_run):
    events = load_events(cpu_run[0])
    assert set(events.Tags()["scalars"]) == TRAINING_SCALARS | VALIDATION_SCALARS
    for name in TRAINING_SCALARS:
        rows = events.Scalars(name)
        assert [row.step for row in rows] == [1, 2, 3]
        assert all(math.isfinite(row.value) for row in rows)
    assert [row.step for row in events.Scalars("validation_reward")] == [0, 2, 3]


def test_logged_values_are_what_their_names_say(cpu_run):
    rows = [row for row in load_history(cpu_run[0], step=3) if "loss" in row]
    for row in rows:
        assert row["score"] == pytest.approx((row["score_denoise"] + row["score_inversion"]) / 2, abs=1e-6)
        assert 0 <= row["saturated"] <= 1
        assert 0.375 <= row["sigma"] <= 0.875
        assert row["lr"] == 0.01
        assert row["grad_norm"] > 0
        assert row["images_per_second"] == pytest.approx(1 / row["seconds"])
        assert 0.1 < row["peak_memory_gb"] < 10


def test_validation_scalars_are_the_means_of_the_scores(cpu_run):
    output_dir, _ = cpu_run
    for scalar, name in (("validation_reward", "reward"), ("validation_relative", "relative")):
        means = [np.mean(read_scores(output_dir, step, name)) for step in (0, 2, 3)]
        assert [row.value for row in load_events(output_dir).Scalars(scalar)] == pytest.approx(means)
        assert logged(output_dir, scalar, step=3) == pytest.approx(means)


def test_scores_are_the_rewards_of_the_saved_images(cpu_run, tiny_reward):
    reward_model, images = CLIPReward(tiny_reward, tiny_reward), cpu_run[0] / "images"
    rows = [
        (images / step, row)
        for step in ("step-0", "step-2")
        for row in json.loads((images / step / "scores.json").read_text())
    ]
    for folder, row in rows:
        pixels = np.asarray(Image.open(folder / row["image"]))
        pixels = torch.tensor(pixels).permute(2, 0, 1)[None] / 255  # rounded when saved: hence the tolerance
        assert reward_model(pixels, [row["caption"]]).item() == pytest.approx(row["reward"], abs=5e-3)
        positive, negative = (
            np.mean([reward_model(pixels, [f"{word}. {row['caption']}"]).item() for word in words])
            for words in (POSITIVE_WORDS, NEGATIVE_WORDS)
        )
        assert positive - negative == pytest.approx(row["relative"], abs=5e-3)


def test_events_hold_the_validation_images(cpu_run):
    images = load_events(cpu_run[0]).Images("validation")
    assert sorted({image.step for image in images}) == [0, 2, 3]
    assert {(image.width, image.height) for image in images} == {(4 * 32, 32)}, "side by side"


def test_train_log_tells_what_the_run_did(cpu_run):
    text = read_log(cpu_run[0])
    assert "6 captions" in text, "how many there are"
    assert "Saved state to" in text
    assert re.findall(r"(step \d): loss \d", text) == ["step 1", "step 2", "step 3"]


def test_the_console_and_train_log_tell_the_scores_and_what_came_of_the_run(cpu_run, console):
    output_dir, _ = cpu_run
    relative = logged(output_dir, "validation_relative", step=3)
    scores = zip((0, 2, 3), logged(output_dir, "validation_reward", step=3), relative, strict=True)
    lines = [f"Validation at step {step}: reward {a:.4f}, relative {b:.4f}, 4 images\n" for step, a, b in scores]
    change = f"relative reward {relative[0]:.4f} -> {relative[-1]:.4f}"
    lines += [f"Finished: 3 updates, 0 of them skipped, {change}. See {output_dir}"]
    for line in lines:
        assert console.count(line) == 1 and read_log(output_dir).count(line) == 1


def test_checkpoints_total_limit_keeps_the_newest(cpu_run):
    output_dir, _ = cpu_run
    assert checkpoints(output_dir) == ["checkpoint-2", "checkpoint-3"]
    states = [json.loads((output_dir / f"checkpoint-{step}/trainer_state.json").read_text()) for step in (2, 3)]
    assert [state["global_step"] for state in states] == [2, 3]
    assert [row["step"] for row in states[0]["history"]] == [0, 1, 2, 2]


def test_every_parameter_of_the_expert_is_trained(cpu_run, tiny_model):
    base, trained = load_weights(tiny_model), load_weights(cpu_run[0])
    assert base.keys() == trained.keys()
    assert [name for name in base if torch.equal(base[name], trained[name])] == []


def test_the_base_model_is_left_as_it_was(cpu_run, tiny_model):
    output_dir, before = cpu_run
    assert file_hashes(tiny_model) == before
    assert not (output_dir / "transformer").exists()


def test_the_expert_is_saved_as_diffusers_saves_it(cpu_run, tiny_model, tmp_path):
    expert = WanTransformer3DModel.from_pretrained(cpu_run[0], subfolder="transformer_2")
    expert.save_pretrained(tmp_path)
    assert same_bits(load_weights(tmp_path, "."), load_weights(cpu_run[0]))
    configs = [json.loads((folder / "transformer_2/config.json").read_text()) for folder in (tiny_model, cpu_run[0])]
    assert {**configs[0], "_name_or_path": None} == {**configs[1], "_name_or_path": None}


PLAIN_DIFFUSERS = """
import sys
import torch
from diffusers import WanPipeline, WanTransformer3DModel

base, output_dir = sys.argv[1:]
images = []
for folder in (base, output_dir):
    expert = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer_2")
    pipe = WanPipeline.from_pretrained(base, transformer=None, transformer_2=expert, boundary_ratio=1.0)
    noise = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    output = pipe("a red cat", latents=noise, num_frames=1, height=32, width=32, num_inference_steps=4)
    images.append(output.frames[0, 0])
assert "train_srpo_wan_t2i" not in sys.modules
print(images[0].shape, float(abs(images[0] - images[1]).mean()))
"""


@pytest.mark.slow
def test_plain_diffusers_loads_the_expert_and_paints_other_pixels(cpu_run, tiny_model, tmp_path):
    script = [sys.executable, "-c", PLAIN_DIFFUSERS, str(tiny_model), str(cpu_run[0])]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, difference = re.fullmatch(r"(\(.*\)) (.*)", done.stdout.strip()).groups()
    assert shape == "(32, 32, 3)"
    assert 0.001 < float(difference) < 1


def test_the_published_use_paints_the_validation_images(cpu_run, tiny_model, tiny_dataset):
    expert = WanTransformer3DModel.from_pretrained(cpu_run[0], subfolder="transformer_2")
    pipe = WanPipeline.from_pretrained(tiny_model, transformer=None, transformer_2=expert, boundary_ratio=1.0)
    pipe.set_progress_bar_config(disable=True)
    for index, caption in enumerate(CAPTIONS[:4]):
        image = paint_published(pipe, caption, index, tiny_dataset)
        (path,) = (cpu_run[0] / "images/step-3").glob(f"00{index}-*.png")
        assert np.abs(image * 255 - np.asarray(Image.open(path))).max() < 2
