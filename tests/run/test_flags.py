"""Every flag has its effect."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import checkpoints, distance, gradient_descent, load_history, load_weights, logged, repeatable, same_bits
from safetensors.torch import load_file


def test_the_same_seed_gives_the_same_bits(train, plain_run):
    again = train()
    assert same_bits(load_weights(again), load_weights(plain_run))
    assert repeatable(load_history(again)) == repeatable(load_history(plain_run))


@pytest.mark.parametrize(
    "flags",
    [
        "--seed 43",
        "--branches denoise",
        "--branches inversion",
        "--loss_weight_shift 3",
        "--train_timestep 10 25",
        "--train_timestep 5 40",
        "--timestep_length 100",
        "--groundtruth_ratio 0.6",
        "--discount_pos 0 0",
        "--discount_inv 0 0",
        "--shift 0.5",
        "--num_inference_steps 30",
        "--positive_words Real",
        "--negative_words Flat",
        "--sampling_steps 3",
        "--rollout_shift 1",
        "--rollout_guidance_scale 1",
        "--height 64",
        "--width 64",
        "--train_batch_size 2",
        "--gradient_accumulation_steps 2",
        "--reward_dtype bf16",
    ],
)
def test_a_flag_changes_the_gradient(train, plain_run, flags):
    assert logged(train(*flags.split()), "grad_norm") != logged(plain_run, "grad_norm")


@pytest.mark.parametrize(
    "flags",
    ["--learning_rate 1e-4", "--lr_scheduler cosine", "--adam_beta1 0.5", "--adam_beta2 0.9", "--adam_epsilon 1"],
)
def test_a_flag_changes_the_update_but_not_the_first_gradient(train, plain_run, flags):
    output_dir = train(*flags.split())
    assert logged(output_dir, "grad_norm")[0] == logged(plain_run, "grad_norm")[0]
    assert not same_bits(load_weights(output_dir), load_weights(plain_run))


@pytest.mark.parametrize("flags", ["--gradient_checkpointing", "--dataloader_num_workers 2"])
def test_a_flag_changes_the_cost_but_not_the_result(train, plain_run, flags):
    torch.testing.assert_close(load_weights(train(*flags.split())), load_weights(plain_run), rtol=0, atol=1e-6)


@pytest.mark.parametrize("branch, other", [("denoise", "inversion"), ("inversion", "denoise")])
def test_one_branch_is_the_whole_score(train, branch, other):
    output_dir = train("--branches", branch)
    assert logged(output_dir, f"score_{branch}") == logged(output_dir, "score")
    assert logged(output_dir, f"score_{other}") == []


def test_both_branches_of_a_step_are_those_of_one_branch(train, plain_run):
    for branch in ("denoise", "inversion"):
        alone, both = (logged(run, f"score_{branch}") for run in (train("--branches", branch), plain_run))
        assert alone[0] == pytest.approx(both[0], abs=1e-6)


def test_hinge_loss_is_the_distance_to_the_margin(train):
    output_dir = train("--reward_margin", 10)
    assert logged(output_dir, "loss") == pytest.approx([10 - score for score in logged(output_dir, "score")])


def test_hinge_loss_leaves_images_above_the_margin_alone(train, tiny_model):
    one_step = ["--max_train_steps", 1, "--discount_pos", 20, 20, "--discount_inv", 20, 20]
    output_dir = train("--reward_margin", 0, "--adam_weight_decay", 0, *one_step)
    assert min(logged(output_dir, f"score_{branch}", 1)[0] for branch in ("denoise", "inversion")) > 1
    assert logged(output_dir, "loss", 1) == logged(output_dir, "grad_norm", 1) == [0]
    assert same_bits(load_weights(output_dir), load_weights(tiny_model))


def test_weight_decay_shrinks_the_weights(train, tiny_model):
    flags = ["--learning_rate", 0.1, "--adam_weight_decay", 0.5]  # a factor of 0.95 each step
    decayed, base = load_weights(train("--max_grad_norm", 1e-30, *flags)), load_weights(tiny_model)
    torch.testing.assert_close(decayed, {name: tensor * 0.9025 for name, tensor in base.items()})


def test_linear_loss_is_minus_the_score(train):
    output_dir = train("--loss", "linear")
    assert logged(output_dir, "loss") == pytest.approx([-score for score in logged(output_dir, "score")])


def test_loss_weight_shift_weighs_the_loss_by_the_position(train):
    output_dir = train("--loss", "linear", "--loss_weight_shift", 3, "--train_timestep", 5, 25)
    for loss, score, sigma in zip(*(logged(output_dir, name) for name in ("loss", "score", "sigma")), strict=True):
        p = 1000 - round((0.875 - sigma) / 0.5 * 999)
        assert loss == pytest.approx(-score * 3 * (p / 1000) / (1 + 2 * (p / 1000)), rel=1e-4)


def test_control_words_take_turns(train):
    still = ["--learning_rate", 0, "--positive_words"]
    both, real, detail = (
        logged(train(*still, *words), "reward_positive") for words in (["Real", "Detail"], ["Real"], ["Detail"])
    )
    assert both == [real[0], detail[1]]
    assert both != real and both != detail


def test_samples_start_from_the_same_noise_or_each_from_its_own(train):
    runs = [train("--train_batch_size", 2, *noise) for noise in ([], ["--noise", "shared"], ["--noise", "per_sample"])]
    scores = [logged(run, "score") for run in runs]
    assert scores[0] == scores[1] != scores[2]


def test_max_grad_norm_scales_the_update(train, tiny_model):
    one_by_one = ["--checkpointing_steps", 1, *gradient_descent(1), "--max_grad_norm"]
    clipped, free = train(*one_by_one, 0.01), train(*one_by_one, 1e9)
    (norm, _), (same_norm, _) = logged(clipped, "grad_norm"), logged(free, "grad_norm")
    assert norm == same_norm > 0.02, "logged before clipping"
    steps = [load_file(run / "checkpoint-1/model.safetensors") for run in (clipped, free)]
    assert distance(steps[0], load_weights(tiny_model)) == pytest.approx(0.01, rel=1e-3)
    assert distance(steps[1], load_weights(tiny_model)) == pytest.approx(norm, rel=1e-3)


def test_the_learning_rate_warms_up_and_decays(train):
    steps = ["--max_train_steps", 4, "--checkpointing_steps", 4]
    output_dir = train(*steps, "--learning_rate", 0.1, "--lr_scheduler", "linear", "--lr_warmup_steps", 2)
    assert logged(output_dir, "lr", step=4) == pytest.approx([0, 0.05, 0.1, 0.05])


def test_the_learning_rate_counts_updates_not_rollouts(train):
    flags = ["--gradient_accumulation_steps", 3, "--lr_scheduler", "linear", "--learning_rate", 0.1]
    assert logged(train(*flags), "lr") == pytest.approx([0.1, 0.05])


def test_reward_in_bf16_is_the_reward_in_fp32_rounded(train, plain_run):
    scores = logged(train("--reward_dtype", "bf16"), "score")
    assert scores[0] == pytest.approx(logged(plain_run, "score")[0], abs=0.02)


def test_mixed_precision_trains_float32_weights_and_saves_bfloat16(train, plain_run):
    output_dir = train(mixed_precision="bf16")
    assert logged(output_dir, "score")[0] == pytest.approx(logged(plain_run, "score")[0], abs=0.02)
    state = load_file(output_dir / "checkpoint-2/model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert same_bits(load_weights(output_dir), {name: tensor.bfloat16() for name, tensor in state.items()})


def test_checkpointing_steps(train):
    output_dir = train("--max_train_steps", 3, "--checkpointing_steps", 1)
    assert checkpoints(output_dir) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_allow_tf32(train):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        train()
        assert [backend.allow_tf32 for backend in backends] == [False, False]
        train("--allow_tf32")
        assert [backend.allow_tf32 for backend in backends] == [True, True]
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def test_variant_chooses_the_weight_files(train, plain_run, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for file in [*model.rglob("*.safetensors")]:
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    output_dir = train("--variant", "fp16", model=model, prompts=["a red cat"])
    assert same_bits(load_weights(output_dir), load_weights(plain_run))


def test_reward_processor_path(train, plain_run, tiny_reward, tmp_path):
    processor = Path(shutil.copytree(tiny_reward, tmp_path / "processor"))
    file = processor / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["image_mean"] = [0.0, 0.0, 0.0]
    file.write_text(json.dumps(config))
    output_dir = train("--reward_processor_path", processor)
    assert logged(output_dir, "reward_positive") != logged(plain_run, "reward_positive")


@pytest.fixture
def any_algorithms():
    """Later runs in this process may use all algorithms again."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_deterministic_allows_deterministic_algorithms_alone_and_trains_with_them(
    train, plain_run, any_algorithms, monkeypatch
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    output_dir = train("--deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    torch.testing.assert_close(load_weights(output_dir), load_weights(plain_run), rtol=0, atol=1e-6)
