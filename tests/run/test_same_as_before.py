"""
Four updates are those of the code before its rebuild, where all samples of an update had one noise level.

tests/fixtures/before_the_rebuild.safetensors holds what they changed in some small tensors of the miniature. It was
recorded with commit 3312748 of this repository, on one thread (OMP_NUM_THREADS=1), from the captions that `DRAWINGS`
holds, one a line in captions.txt; below, the flags in braces are those of the second run:

    python embed_prompts.py --pretrained_model_name_or_path tests/miniature/model --max_sequence_length 16 \
        --prompts captions.txt --output_dir embeddings
    accelerate launch --config_file accelerate_configs/cpu.yaml train_srpo_wan_t2i.py \
        --pretrained_model_name_or_path tests/miniature/model --max_sequence_length 16 --dataset_name embeddings \
        --reward_model CLIP --reward_model_path tests/miniature/reward --reward_dtype fp32 --output_dir output \
        --height 64 --width 64 --validation_size 64 --validation_prompts --sampling_steps 4 --max_train_steps 4 \
        --checkpointing_steps 4 --report_to none --adam_epsilon 1e4 --adam_weight_decay 0 --learning_rate 1e4 \
        --train_batch_size 4 { --train_batch_size 2 --gradient_accumulation_steps 2 --noise per_sample
        --updates_per_rollout 2 --renew_noise }

All other settings are the published ones, which are the defaults.
"""

import pytest
import torch
from helpers import MINIATURE, ROOT, gradient_descent, load_weights, logged, run_in_process
from miniature.drawings import captions
from safetensors.torch import load_file

import train_srpo_wan_t2i


DRAWINGS = captions()[::7]

# What `make_generator(42, POSITION, step)` drew for all samples of each of the four updates.
POSITIONS = [932, 470, 90, 300]

RUNS = {
    "published": ["--train_batch_size", 4],
    "accumulated": "--train_batch_size 2 --gradient_accumulation_steps 2 --noise per_sample --updates_per_rollout 2 "
    "--renew_noise".split(),
}

CURVES = {
    "published": {
        "loss": [0.630287, 0.557436, 0.591442, 0.553488],
        "score_denoise": [0.08862, 0.268223, 0.376756, 0.41588],
        "score_inversion": [0.050806, 0.016905, -0.15964, -0.122857],
        "grad_norm": [0.487772, 0.229328, 0.14099, 0.24577],
        "sigma": [0.840966, 0.609735, 0.419545, 0.52465],
    },
    "accumulated": {
        "loss": [0.643031, 0.573054, 0.554163, 0.541528],
        "score_denoise": [0.339284, 0.326107, 0.342865, 0.388521],
        "score_inversion": [-0.225345, -0.072216, -0.051192, -0.071578],
        "grad_norm": [0.536374, 0.502212, 0.258692, 0.277429],
        "sigma": [0.840966, 0.609735, 0.419545, 0.52465],
    },
}


@pytest.fixture(scope="module", params=RUNS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def output_dir(name, embed, tmp_path_factory):
    """Four updates with one position for all samples of each."""
    folder = tmp_path_factory.mktemp("output")
    paths = ["--pretrained_model_name_or_path", MINIATURE / "model", "--max_sequence_length", 16]
    paths += ["--dataset_name", embed(MINIATURE / "model", DRAWINGS), "--output_dir", folder]
    paths += ["--reward_model", "CLIP", "--reward_model_path", MINIATURE / "reward"]
    flags = "--height 64 --width 64 --validation_size 64 --validation_prompts --sampling_steps 4 --max_train_steps 4"
    flags = [*flags.split(), "--checkpointing_steps", 4, "--report_to", "none", *gradient_descent(1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_srpo_wan_t2i, "draw_positions", lambda recipe, step, samples: [POSITIONS[step]] * len(samples)
        )
        run_in_process(*paths, *flags, *RUNS[name])
    return folder


def test_the_weights_change_as_they_did_before(name, output_dir):
    base, weights = load_weights(MINIATURE / "model"), load_weights(output_dir)
    recorded = load_file(ROOT / "tests/fixtures/before_the_rebuild.safetensors")
    expected = {key.removeprefix(f"{name}."): change for key, change in recorded.items() if key.startswith(f"{name}.")}
    assert len(expected) == 8
    found = torch.cat([(weights[key].double() - base[key]).flatten() for key in expected])
    expected = torch.cat([change.double().flatten() for change in expected.values()])
    # The same to the last bit on the machine of the record; without its vector instructions, 3e-6 away.
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_the_curves_are_those_of_before(name, output_dir):
    for curve, values in CURVES[name].items():
        assert logged(output_dir, curve, 4) == pytest.approx(values, abs=1e-5)
