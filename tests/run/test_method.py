"""What SRPO does to a model that can paint: the miniature, trained by the real script, judged from pixels."""

import json
import sys

import pytest
import torch
from helpers import MINIATURE, run_command, run_in_process
from miniature.build import sample
from miniature.drawings import (
    GUIDANCE_SCALE,
    MAX_SEQUENCE_LENGTH,
    caption_accuracy,
    captions,
    shape_fidelity,
    style_share,
)

from diffusers import WanPipeline, WanTransformer3DModel

import train_srpo_wan_t2i
from train_srpo_wan_t2i import NEGATIVE_WORDS, POSITIVE_WORDS


# The published settings are the defaults; learning rate, batch and the length of a rollout are this model's.
TRAINING = (
    "--max_train_steps 16 --train_batch_size 16 --learning_rate 2e-5 --sampling_steps 12 --height 64 --width 64 "
    f"--validation_size 64 --rollout_guidance_scale {GUIDANCE_SCALE} --checkpointing_steps 16 --report_to none"
).split()


@pytest.fixture(scope="module")
def embeddings(embed):
    return embed(MINIATURE / "model", captions())


def judge(expert_folder):
    """Style shares, caption accuracy and shape fidelity of 112 images by an expert alone, from fixed noise."""
    expert = WanTransformer3DModel.from_pretrained(expert_folder, subfolder="transformer_2", dtype=torch.float32)
    pipeline = WanPipeline.from_pretrained(
        MINIATURE / "model", transformer=None, transformer_2=expert, boundary_ratio=1.0, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    images = sample(pipeline, captions())
    return {
        "real": style_share(images, "real"),
        "flat": style_share(images, "flat"),
        "captions": caption_accuracy(images, captions()),
        "shapes": shape_fidelity(images, captions()),
    }


@pytest.fixture(scope="module")
def before():
    return judge(MINIATURE / "model")


@pytest.fixture(scope="module")
def train_and_judge(embeddings, tmp_path_factory):
    """Function: 16 updates with the published settings and flags -> what the judge says of the trained expert."""

    def run(*flags):
        output_dir = tmp_path_factory.mktemp("output")
        paths = ["--pretrained_model_name_or_path", MINIATURE / "model", "--dataset_name", embeddings]
        paths += ["--max_sequence_length", MAX_SEQUENCE_LENGTH, "--output_dir", output_dir]
        paths += ["--reward_model", "CLIP", "--reward_model_path", MINIATURE / "reward"]
        run_in_process(*paths, *TRAINING, *flags, "--validation_prompts")
        return judge(output_dir)

    return run


SEEDS = pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])


@SEEDS
def test_16_published_updates_paint_more_real_drawings_of_the_same_captions(train_and_judge, before, seed):
    after = train_and_judge("--seed", seed)
    assert after["real"] >= before["real"] + 0.2
    assert after["captions"] >= 0.95
    assert after["shapes"] >= before["shapes"] - 0.02


@pytest.mark.slow
@SEEDS
def test_the_drift_term_keeps_shapes_that_too_large_updates_melt(train_and_judge, before, seed):
    too_much = ["--learning_rate", 1e-4, "--seed", seed]
    assert train_and_judge(*too_much)["shapes"] <= before["shapes"] - 0.05
    held = train_and_judge(*too_much, "--drift_weight", 1)
    assert held["shapes"] >= before["shapes"] - 0.02
    assert held["real"] >= before["real"] + 0.15


@pytest.mark.slow
@SEEDS
def test_exchanged_words_paint_more_flat_drawings(train_and_judge, before, seed):
    exchanged = ["--positive_words", *NEGATIVE_WORDS, "--negative_words", *POSITIVE_WORDS]
    assert train_and_judge("--seed", seed, *exchanged)["flat"] >= before["flat"] + 0.15


@pytest.mark.slow
@SEEDS
def test_an_inversion_branch_of_the_wrong_sign_undoes_the_effect(train_and_judge, before, monkeypatch, seed):
    right = train_srpo_wan_t2i.plan_update

    def wrong(*args):
        plan = right(*args)
        return plan._replace(
            branches=[branch._replace(swap=torch.zeros_like(branch.swap)) for branch in plan.branches]
        )

    monkeypatch.setattr(train_srpo_wan_t2i, "plan_update", wrong)
    assert train_and_judge("--seed", seed)["real"] <= before["real"] + 0.05


@pytest.mark.slow
def test_the_demo_makes_drawings_real_and_keeps_captions_and_shapes(tmp_path):
    done = run_command(sys.executable, "tests/miniature/demo.py", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["real_style_share_before"] <= 0.6
    assert report["real_style_share_after"] >= 0.93
    assert report["caption_accuracy_after"] >= report["caption_accuracy_before"] - 0.01
    assert report["shape_fidelity_after"] >= report["shape_fidelity_before"] - 0.006
