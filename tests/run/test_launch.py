"""What a run of `train_srpo_wan_t2i.py` leaves behind, and what each of its flags does to it."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CAPTIONS,
    TWO_RANKS,
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers import WanPipeline, WanTransformer3DModel

from train_srpo_wan_t2i import (
    NEGATIVE_WORDS,
    POSITIVE_WORDS,
    VALIDATION,
    CLIPReward,
    ModelInfo,
    make_generator,
    save_model_card,
)


TRAINING_SCALARS = {
    "loss",
    "score",
    "score_denoise",
    "score_inversion",
    "reward_positive",
    "reward_negative",
    "saturated",
    "grad_norm",
    "lr",
    "sigma",
    "seconds",
    "images_per_second",
    "peak_memory_gb",
}
VALIDATION_SCALARS = {"validation_reward", "validation_relative"}


def load_events(output_dir):
    (events,) = [
        EventAccumulator(str(path.parent)).Reload()
        for path in Path(output_dir, "logs").rglob("events.out.tfevents.*")
        if path.parent.name == "srpo-wan-t2i"  # its subfolder holds the hyperparameters
    ]
    return events


# ---- One process, through accelerate_configs/cpu.yaml. --------------------------------------------------------------


@pytest.fixture(scope="module")
def cpu_run(launch, tiny_model):
    """Three updates with everything on, and the hashes of the base model's files before them."""
    before = file_hashes(tiny_model)
    flags = "--max_train_steps 3 --checkpointing_steps 1 --checkpoints_total_limit 2 --validation_steps 2"
    flags += " --learning_rate 0.01 --adam_weight_decay 0 --report_to tensorboard --hub_token hf_secret"
    return launch("--config_file accelerate_configs/cpu.yaml", *flags.split(), prompts=None), before


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
    reward_model = CLIPReward(tiny_reward, tiny_reward)
    for row in json.loads((cpu_run[0] / "images/step-3/scores.json").read_text()):
        pixels = np.asarray(Image.open(cpu_run[0] / "images/step-3" / row["image"]))
        pixels = torch.tensor(pixels).permute(2, 0, 1)[None] / 255  # rounded when saved: hence the tolerance
        assert reward_model.score(pixels, [row["caption"]]).item() == pytest.approx(row["reward"], abs=5e-3)
        positive, negative = (
            np.mean([reward_model.score(pixels, [f"{word}. {row['caption']}"]).item() for word in words])
            for words in (POSITIVE_WORDS, NEGATIVE_WORDS)
        )
        assert positive - negative == pytest.approx(row["relative"], abs=5e-3)


def test_events_hold_the_validation_images(cpu_run):
    images = load_events(cpu_run[0]).Images("validation")
    assert sorted({image.step for image in images}) == [0, 2, 3]
    assert {(image.width, image.height) for image in images} == {(4 * 32, 32)}, "side by side"


def test_train_log_tells_what_the_run_did(cpu_run):
    text = read_log(cpu_run[0])
    for line in (
        "***** Running training *****",
        "Num captions = 6",
        "Total train batch size (w. parallel, distributed & accumulation) = 1",
        "Total optimization steps = 3",
        "Trained noise levels = 0.875 to 0.375",
        "Running validation at step 0: 4 images",
        "Saved state to",
    ):
        assert line in text
    assert re.findall(r"(step \d): loss \d", text) == ["step 1", "step 2", "step 3"]


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
    pipe.text_encoder.bfloat16()  # the type that captions are embedded in
    for index, caption in enumerate(CAPTIONS[:4]):
        image = pipe(
            caption,
            negative_prompt=load_from_disk(tiny_dataset)["negative"]["caption"][0],
            latents=torch.randn(1, 4, 1, 4, 4, generator=make_generator(42, VALIDATION, index)),
            num_frames=1,
            height=32,
            width=32,
            num_inference_steps=40,
            guidance_scale=3.0,
            max_sequence_length=16,
        ).frames[0, 0]
        (path,) = (cpu_run[0] / "images/step-3").glob(f"00{index}-*.png")
        assert np.abs(image * 255 - np.asarray(Image.open(path))).max() < 2


def test_hub_token_is_written_nowhere(cpu_run):
    files = [path for path in cpu_run[0].rglob("*") if path.is_file()]
    assert [path for path in files if b"hf_secret" in path.read_bytes()] == []


# ---- The model card. ------------------------------------------------------------------------------------------------


def test_the_header_of_the_card_names_no_folder_as_base_model(cpu_run):
    data = ModelCard.load(cpu_run[0] / "README.md").data
    assert data.base_model is None
    assert data.library_name == "diffusers"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-to-image"
    assert data.tags == ["text-to-image", "diffusers", "wan", "srpo"]


def test_the_header_of_the_card_names_a_base_model_of_the_hub(make_args, tmp_path):
    model = ModelInfo(True, 0.875, False, (1, 2, 2), 16, 4096, 8, 3.0)
    args = make_args("--output_dir", tmp_path, "--pretrained_model_name_or_path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    save_model_card(args, "me/fox", [], model)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"


def test_the_card_says_how_to_use_the_expert(cpu_run, tiny_model):
    text = ModelCard.load(cpu_run[0] / "README.md").text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    compile(code, "README.md", "exec")
    assert f'WanTransformer3DModel.from_pretrained("{cpu_run[0].name}", subfolder="transformer_2"' in code
    assert f'"{tiny_model}", transformer=None, transformer_2=expert, boundary_ratio=1.0' in code
    for setting in ("num_frames=1", "height=32", "num_inference_steps=40", "guidance_scale=3.0"):
        assert setting in code


def test_the_card_names_settings_results_and_sources(cpu_run):
    output_dir, _ = cpu_run
    text = (output_dir / "README.md").read_text()
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
    rewards = logged(output_dir, "validation_relative", step=3)
    assert f"{rewards[0]:.4f} -> {rewards[-1]:.4f}" in text
    assert "TODO" not in text and "hub_token" not in text


# ---- Two processes. -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zero2_run(launch):
    """Two updates of gradient descent, learning rate 250, on gradients that are clipped to a norm of 0.002."""
    flags = "--checkpointing_steps 1 --report_to tensorboard --max_grad_norm 0.002"
    return launch(TWO_RANKS, *gradient_descent(250), *flags.split(), prompts=["a red cat"])


def test_zero2_writes_what_one_process_writes(zero2_run):
    assert sorted(path.name for path in zero2_run.iterdir()) == [
        "README.md",
        "before_after.png",
        "checkpoint-1",
        "checkpoint-2",
        "images",
        "logs",
        "reward.png",
        "train.log",
        "transformer_2",
    ]
    assert set(load_events(zero2_run).Tags()["scalars"]) == TRAINING_SCALARS | VALIDATION_SCALARS
    assert "Total train batch size (w. parallel, distributed & accumulation) = 2" in read_log(zero2_run)
    assert [row["step"] for row in load_history(zero2_run)] == [0, 1, 2, 2]


def test_zero2_saves_an_expert_in_bfloat16_that_diffusers_loads(zero2_run, tiny_model):
    assert {tensor.dtype for tensor in load_weights(zero2_run).values()} == {torch.bfloat16}
    expert = WanTransformer3DModel.from_pretrained(zero2_run, subfolder="transformer_2", dtype=torch.bfloat16)
    base = WanTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer_2", dtype=torch.bfloat16)
    assert expert.config.num_layers == base.config.num_layers == 2
    assert distance(expert.state_dict(), base.state_dict()) > 0.1


def test_zero2_clips_gradients_to_max_grad_norm(zero2_run, tiny_model):
    assert all(norm > 0.004 for norm in logged(zero2_run, "grad_norm")), "logged before clipping"
    base = {name: tensor.bfloat16() for name, tensor in load_weights(tiny_model).items()}
    # Two steps of 250 * 0.002, not in quite the same direction.
    assert 0.5 < distance(load_weights(zero2_run), base) < 1.05


EQUAL_BATCHES = [*gradient_descent(1), "--max_grad_norm", 1, "--lr_scheduler", "linear"]


@pytest.fixture(scope="module")
def batch_of_4(train):
    return {
        noise: train("--train_batch_size", 4, "--noise", noise, *EQUAL_BATCHES) for noise in ("shared", "per_sample")
    }


def assert_same_step(output_dir, other, tiny_model):
    assert distance(load_weights(other), load_weights(tiny_model)) > 0.01
    torch.testing.assert_close(load_weights(output_dir), load_weights(other), rtol=0, atol=1e-6)
    for name in ("loss", "score", "score_denoise", "reward_positive", "grad_norm", "lr", "sigma"):
        assert logged(output_dir, name) == pytest.approx(logged(other, name), abs=1e-5)


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
def test_a_batch_of_4_is_a_batch_of_2_accumulated_twice(train, batch_of_4, tiny_model, noise):
    accumulated = train("--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--noise", noise, *EQUAL_BATCHES)
    assert_same_step(accumulated, batch_of_4[noise], tiny_model)


def test_a_batch_of_4_is_one_caption_accumulated_twice_on_two_processes(launch, batch_of_4, tiny_model):
    # `--cpu --num_processes 2` would start one process unless there is MPI; this way there are two, on the CPU.
    launcher = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launcher += " --main_process_port 0"
    flags = ["--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--noise", "per_sample"]
    two = launch(launcher, *flags, *EQUAL_BATCHES, environment={"ACCELERATE_USE_CPU": "true"})
    assert "DistributedType.MULTI_CPU" in read_log(two) and "Num processes: 2" in read_log(two)
    assert_same_step(two, batch_of_4["per_sample"], tiny_model)


# ---- Resuming. ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_steps(train):
    return train("--max_train_steps", 4, "--train_batch_size", 2, "--validation_steps", 2, prompts=["a red cat"])


def test_two_steps_and_two_more_are_four_steps_bit_for_bit(train, four_steps):
    flags = ["--train_batch_size", 2, "--validation_steps", 2]
    output_dir = train(*flags, prompts=["a red cat"])
    assert checkpoints(output_dir) == ["checkpoint-2"]
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    train(*flags, *more, prompts=["a red cat"], output_dir=output_dir)
    assert same_bits(load_weights(output_dir), load_weights(four_steps))
    assert repeatable(load_history(output_dir, 4)) == repeatable(load_history(four_steps, 4))
    assert [row["step"] for row in load_history(output_dir, 4)] == [0, 1, 2, 2, 3, 4, 4]


def test_a_checkpoint_can_be_named_and_the_learning_rate_goes_on(train):
    schedule = ["--max_train_steps", 4, "--lr_scheduler", "cosine", "--lr_warmup_steps", 1]
    whole = train(*schedule)
    resumed = train(*schedule, "--resume_from_checkpoint", whole / "checkpoint-2")
    assert same_bits(load_weights(resumed), load_weights(whole))
    assert repeatable(load_history(resumed, 4)) == repeatable(load_history(whole, 4))
    assert checkpoints(resumed) == ["checkpoint-4"]


def test_an_unfinished_checkpoint_is_not_the_latest(train, four_steps, tmp_path):
    output_dir = tmp_path / "output"
    shutil.copytree(four_steps / "checkpoint-2", output_dir / "checkpoint-2")
    (output_dir / "checkpoint-9.unfinished").mkdir()
    more = ["--max_train_steps", 4, "--train_batch_size", 2, "--resume_from_checkpoint", "latest"]
    train(*more, output_dir=output_dir)
    assert f"Resumed from {output_dir}/checkpoint-2 at step 2" in read_log(output_dir)
    assert same_bits(load_weights(output_dir), load_weights(four_steps))


def test_latest_in_an_empty_folder_starts_at_step_0_with_a_warning(train, plain_run, tmp_path):
    output_dir = train("--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert re.search(r"WARNING .* holds no checkpoint yet: training starts at step 0", read_log(output_dir))
    assert same_bits(load_weights(output_dir), load_weights(plain_run))


@pytest.mark.parametrize("name, value", [("train_batch_size", 4), ("gradient_accumulation_steps", 2)])
def test_a_run_cannot_go_on_with_other_batches(train, four_steps, tmp_path, name, value):
    more = ["--max_train_steps", 4, "--train_batch_size", 2, "--resume_from_checkpoint", four_steps / "checkpoint-2"]
    was = {"train_batch_size": 2, "gradient_accumulation_steps": 1}[name]
    message = f"error: {four_steps}/checkpoint-2 was made with another {name}: {was}. It cannot go on with {value}."
    with pytest.raises(SystemExit, match=re.escape(message)):
        train(*more, f"--{name}", value, output_dir=tmp_path)


def test_a_run_cannot_go_back_behind_its_checkpoint(train, four_steps, tmp_path):
    more = ["--train_batch_size", 2, "--max_train_steps", 3, "--resume_from_checkpoint", four_steps / "checkpoint-4"]
    with pytest.raises(SystemExit, match="is beyond `--max_train_steps 3`"):
        train(*more, output_dir=tmp_path)


def test_going_on_from_an_older_checkpoint_makes_it_the_latest_and_keeps_the_new_ones(train, tmp_path):
    steps = ["--max_train_steps", 4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    train(*steps, "--checkpoints_total_limit", 4, output_dir=tmp_path)
    again = ["--max_train_steps", 2, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    train(*again, "--resume_from_checkpoint", tmp_path / "checkpoint-1", output_dir=tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    train(*steps, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert f"Resumed from {tmp_path}/checkpoint-2 at step 2" in read_log(tmp_path)


def test_other_prompts_after_resuming_still_end_in_a_card_and_a_picture(train, tmp_path):
    train(output_dir=tmp_path, prompts=["a boat", "a dog"])
    more = ["--max_train_steps", 3, "--resume_from_checkpoint", "latest"]
    train(*more, output_dir=tmp_path, prompts=["a boat that costs $5 {or $6"])
    Image.open(tmp_path / "before_after.png").verify()
    assert "3 updates" in (tmp_path / "README.md").read_text()


def test_a_run_stopped_before_its_first_checkpoint_still_logs_the_images_of_step_0(train, tmp_path):
    train("--max_train_steps", 1, output_dir=tmp_path, prompts=["a boat"])
    assert checkpoints(tmp_path) == []
    train("--resume_from_checkpoint", "latest", output_dir=tmp_path, prompts=["a boat"])
    assert [row["step"] for row in load_history(tmp_path) if "validation_reward" in row] == [0, 2]


def test_a_run_that_is_not_finite_ends_before_it_saves(train, tmp_path):
    with pytest.raises(SystemExit, match="error: not finite at step 2"):
        train("--learning_rate", 1e30, "--checkpointing_steps", 1, output_dir=tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-1"]


def test_resuming_a_finished_run_writes_its_result_again(train, four_steps):
    more = ["--max_train_steps", 4, "--train_batch_size", 2]
    again = train(*more, "--resume_from_checkpoint", four_steps / "checkpoint-4")
    assert same_bits(load_weights(again), load_weights(four_steps))
    assert (again / "README.md").is_file()


# ---- Models with one expert. ----------------------------------------------------------------------------------------


def test_a_model_with_one_expert_is_trained(train, embed, tiny_one_expert_model):
    dataset = embed(tiny_one_expert_model, CAPTIONS)
    flags = ["--transformer_subfolder", "transformer", "--height", 64, "--width", 64, "--validation_size", 64]
    inputs = {"model": tiny_one_expert_model, "dataset": dataset, "prompts": ["a red cat"]}
    output_dir = train(*flags, "--learning_rate", 0.01, **inputs)
    base, trained = load_weights(tiny_one_expert_model, "transformer"), load_weights(output_dir, "transformer")
    assert [name for name in base if torch.equal(base[name], trained[name])] == []
    WanTransformer3DModel.from_pretrained(output_dir, subfolder="transformer")
    assert not (output_dir / "transformer_2").exists()
    assert Image.open(output_dir / "images/step-2/000-a-red-cat.png").size == (64, 64)
    assert ", transformer=expert, dtype" in (output_dir / "README.md").read_text()


# ---- Every flag has its effect. -------------------------------------------------------------------------------------


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
    output_dir = train("--reward_margin", -10, "--adam_weight_decay", 0)
    assert logged(output_dir, "loss") == logged(output_dir, "grad_norm") == [0, 0]
    assert same_bits(load_weights(output_dir), load_weights(tiny_model))


def test_weight_decay_shrinks_the_weights(train, tiny_model):
    flags = ["--learning_rate", 0.1, "--adam_weight_decay", 0.5]  # a factor of 0.95 each step
    decayed, base = load_weights(train("--reward_margin", -10, *flags)), load_weights(tiny_model)
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
    both, real, flat = (
        logged(train(*still, *words), "reward_positive") for words in (["Real", "Flat"], ["Real"], ["Flat"])
    )
    assert both == [real[0], flat[1]]
    assert both != real and both != flat


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
    output_dir = train("--variant", "fp16", model=model, prompts=["a red dog"])
    assert same_bits(load_weights(output_dir), load_weights(plain_run))


def test_reward_processor_path(train, plain_run, tiny_reward, tmp_path):
    processor = Path(shutil.copytree(tiny_reward, tmp_path / "processor"))
    file = processor / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["image_mean"] = [0.0, 0.0, 0.0]
    file.write_text(json.dumps(config))
    output_dir = train("--reward_processor_path", processor)
    assert logged(output_dir, "reward_positive") != logged(plain_run, "reward_positive")


# ---- Validation and logging. ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_images(train):
    """A run that paints one caption of the dataset and one prompt that is not in it."""
    return train("--logging_dir", "events", "--report_to", "tensorboard", prompts=["a boat", "a blue boat, red"])


def test_prompts_that_are_not_captions_are_painted(two_images):
    names = sorted(path.name for path in (two_images / "images/step-2").glob("*.png"))
    assert names == ["000-a-boat.png", "001-a-blue-boat-red.png"]
    assert len(set(read_scores(two_images))) == 2


def test_a_prompt_encoded_at_the_start_paints_what_its_caption_paints(train, embed, tiny_model, two_images):
    without_it = embed(tiny_model, ["a red cat", "a blue dog"])
    output_dir = train(prompts=["a boat"], dataset=without_it)
    image, expected = (Image.open(run / "images/step-0/000-a-boat.png") for run in (output_dir, two_images))
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected)).max() <= 1


def test_the_first_images_are_painted_before_any_update(train, two_images):
    prompts = ["a boat", "a blue boat, red"]
    assert read_scores(train("--learning_rate", 1, prompts=prompts)) == read_scores(two_images)


def test_no_validation_prompts_turn_validation_off(plain_run):
    assert not (plain_run / "images").exists() and not (plain_run / "before_after.png").exists()
    assert logged(plain_run, "validation_reward") == []
    assert "before_after.png" not in (plain_run / "README.md").read_text()
    assert (plain_run / "reward.png").is_file()


def test_validation_does_not_change_training(two_images, plain_run):
    assert same_bits(load_weights(two_images), load_weights(plain_run))


def test_validation_size_is_the_side_of_the_images(train):
    output_dir = train("--validation_size", 48, prompts=["a boat"])
    assert Image.open(output_dir / "images/step-0/000-a-boat.png").size == (48, 48)


def test_validation_guidance_scale_changes_the_images_and_not_training(train, two_images, plain_run):
    output_dir = train("--validation_guidance_scale", 1, prompts=["a boat", "a blue boat, red"])
    assert read_scores(output_dir) != read_scores(two_images)
    assert same_bits(load_weights(output_dir), load_weights(plain_run))


def test_logging_dir_is_where_events_lie(two_images):
    assert list((two_images / "events").rglob("events.out.tfevents.*"))
    assert not (two_images / "logs").exists()


def test_report_to_none_writes_no_events(plain_run):
    assert [path for path in plain_run.rglob("*") if "tfevents" in path.name] == []


# ---- The output folder. ---------------------------------------------------------------------------------------------


def test_overwrite_output_dir_removes_what_an_earlier_run_wrote_and_nothing_else(train, tmp_path):
    train("--max_train_steps", 3, "--checkpointing_steps", 1, output_dir=tmp_path, prompts=["a boat"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine too")
    train("--overwrite_output_dir", output_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "checkpoint-2",
        "mine",
        "notes.txt",
        "reward.png",
        "train.log",
        "transformer_2",
    ]
    assert read_log(tmp_path).count("***** Running training *****") == 1


def test_a_resumed_run_adds_to_the_log(train, tmp_path):
    train(output_dir=tmp_path)
    train("--max_train_steps", 3, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert read_log(tmp_path).count("***** Running training *****") == 2
