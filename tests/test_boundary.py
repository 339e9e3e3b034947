"""
Two experts, one at a time: `embed_prompts.py --boundary_latents` paints with the high-noise expert what training with
`--rollout_start boundary` goes on from with the low-noise one.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, MINIATURE, ROOT, distance, load_weights, logged, run_in_process
from datasets import DatasetDict, concatenate_datasets, load_from_disk
from miniature.drawings import captions as drawing_captions
from safetensors.torch import load_file, save_file

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

import embed_prompts
import train_srpo_wan_t2i
from train_srpo_wan_t2i import collate_fn, load_prompt_dataset, make_scheduler, make_starts, predict_velocity, rollout


BOUNDARY = 0.875  # of all models here
SMALL = "--height 32 --width 32 --sampling_steps 2".split()  # of each expert one step


def draw(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(model, prompts, output_dir, *flags):
    paths = ["--pretrained_model_name_or_path", model, "--prompts", prompts, "--output_dir", output_dir]
    return [str(argument) for argument in [*paths, "--max_sequence_length", 16, *flags]]


@pytest.fixture(scope="module")
def paint(tmp_path_factory):
    """Function: a model, captions and flags -> the folder of the dataset that `embed_prompts.py` makes of them."""

    def run(model, captions, *flags):
        folder = tmp_path_factory.mktemp("paint")
        (folder / "captions.txt").write_text("\n".join(captions))
        command = arguments(model, folder / "captions.txt", folder / "embeddings", *flags)
        embed_prompts.main(embed_prompts.parse_args(command))
        return folder / "embeddings"

    return run


@pytest.fixture(scope="module")
def small(paint, tiny_model):
    """Folder of the six `CAPTIONS` and three latents each, of the size and the steps of the quick flags."""
    return paint(tiny_model, CAPTIONS, *SMALL, "--boundary_latents", 3, "--seed", 7, "--batch_size", 4)


# ---- Both experts paint what `WanPipeline` paints with them. --------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline():
    """The miniature with both experts."""
    pipeline = WanPipeline.from_pretrained(MINIATURE / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def compare(pipeline, paint):
    """
    Function: the scheduler and flags of `embed_prompts.py` -> what the low-noise expert alone makes of the boundary
    latents of three drawings, and a function: a number of steps -> what the pipeline makes with both experts.
    """

    def run(name, *flags, guidance_scale=4.0, shift=3.0):
        size = ["--height", 64, "--width", 64, "--dtype", "fp32", "--batch_size", 2]
        flags = [*size, "--boundary_latents", 2, "--seed", 5, "--rollout_scheduler", name, *flags]
        dataset = load_prompt_dataset(paint(MINIATURE / "model", drawing_captions()[:81:40], *flags))
        batch, negative = (collate_fn(list(rows.with_format("numpy")), 16, torch.float32) for rows in dataset.values())
        embeds, negative = batch["prompt_embeds"], negative["prompt_embeds"].expand(3, -1, -1)
        second = torch.stack([torch.as_tensor(latents[1]) for latents in batch["boundary_latents"]])
        alone = partial(predict_velocity, pipeline.transformer_2)
        found = rollout(alone, make_scheduler(name, shift), second, embeds, negative, 10, 3.0, boundary=BOUNDARY)

        def both(steps):
            pipeline.scheduler = make_scheduler(name, shift)
            return pipeline(
                prompt_embeds=embeds,
                negative_prompt_embeds=negative,
                latents=draw(6, (8, 1, 8, 8)).expand(3, -1, -1, -1, -1),
                height=64,
                width=64,
                num_frames=1,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                guidance_scale_2=3.0,
                output_type="latent",
            ).frames

        return found, both

    return run


@pytest.mark.parametrize(
    "flags, settings",
    [([], {}), (["--boundary_guidance_scale", 2, "--rollout_shift", 5], {"guidance_scale": 2.0, "shift": 5.0})],
    ids=["default", "other guidance and shift"],
)
def test_the_experts_one_at_a_time_paint_the_latents_of_the_pipeline(compare, flags, settings):
    found, both = compare("euler", *flags, **settings)
    torch.testing.assert_close(found, both(10), rtol=0, atol=1e-4)


def test_with_unipc_they_come_as_near_to_the_exact_solution_as_the_pipeline(compare):
    """The low-noise expert starts anew at first order: UniPC's history is not stored."""
    found, both = compare("unipc")
    expected, exact = both(10), both(100)

    def relative(latents, others):
        return (latents - others).norm() / others.norm()

    assert relative(found, expected) < 0.05
    assert relative(found, exact) < 1.05 * relative(expected, exact)


# ---- What `embed_prompts.py --boundary_latents` writes. -------------------------------------------------------------


def test_the_columns_of_the_boundary(small):
    train = load_from_disk(small)["train"]
    assert train["caption"] == CAPTIONS
    for row in train.with_format("numpy"):
        assert row["boundary_latents"].shape == (3, 4, 1, 4, 4)
        assert row["boundary_latents"].dtype == np.float32
        assert row["boundary_seeds"].tolist() == [7, 8, 9]
        assert row["boundary_seeds"].dtype == np.int64
        assert json.loads(row["boundary_settings"]) == {
            "height": 32,
            "width": 32,
            "sampling_steps": 2,
            "rollout_scheduler": "unipc",
            "rollout_shift": 3.0,
        }


def test_images_that_are_not_square(paint, tiny_model):
    flags = ["--boundary_latents", 1, "--height", 32, "--width", 48, "--sampling_steps", 2, "--rollout_shift", 2]
    (row,) = load_from_disk(paint(tiny_model, ["a cat"], *flags))["train"].with_format("numpy")
    assert row["boundary_latents"].shape == (1, 4, 1, 4, 6)
    settings = json.loads(row["boundary_settings"])
    assert (settings["height"], settings["width"], settings["rollout_shift"]) == (32, 48, 2.0)


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_in_bf16_latents_of_float32_come_near_those_of_fp32(paint, tiny_model, name):
    """As in training, the expert may compute in bf16, but between steps nothing is rounded to it."""
    flags = ["--height", 32, "--width", 32, "--boundary_latents", 1, "--rollout_scheduler", name]
    half, full = (
        load_from_disk(paint(tiny_model, CAPTIONS, *flags, "--dtype", dtype))["train"].with_format("torch")
        for dtype in ("bf16", "fp32")
    )
    half, full = half["boundary_latents"][:], full["boundary_latents"][:]
    assert half.dtype == torch.float32
    assert not torch.equal(half, half.bfloat16().float())
    torch.testing.assert_close(half, full, rtol=0, atol=0.05)


def test_every_caption_and_every_seed_has_latents_of_its_own(small):
    latents = load_from_disk(small)["train"].with_format("numpy")["boundary_latents"][:]
    assert len(np.unique(np.reshape(latents, (18, -1)), axis=0)) == 18


def test_the_next_seeds_go_on_where_the_first_end(small, paint, tiny_model):
    more = paint(tiny_model, CAPTIONS, *SMALL, "--boundary_latents", 1, "--seed", 9, "--batch_size", 4)
    first, second = (load_from_disk(folder)["train"].with_format("numpy") for folder in (small, more))
    for row, other in zip(first, second, strict=True):
        assert other["boundary_seeds"].tolist() == [9]
        assert np.array_equal(row["boundary_latents"][2], other["boundary_latents"][0])


def test_the_other_columns_are_those_without_boundary_latents(small, paint, tiny_model):
    dataset, plain = load_from_disk(small), load_from_disk(paint(tiny_model, CAPTIONS, "--batch_size", 4))
    assert set(dataset["train"].column_names) - set(plain["train"].column_names) == {
        "boundary_latents",
        "boundary_seeds",
        "boundary_settings",
    }
    for split in ("train", "negative"):
        columns = dataset[split].select_columns(plain[split].column_names)
        assert columns.features == plain[split].features
        assert columns.to_dict() == plain[split].to_dict()


def test_the_negative_prompt_has_the_columns_and_nothing_in_them(small):
    dataset = load_from_disk(small)
    assert dataset["negative"].features == dataset["train"].features
    (row,) = dataset["negative"]
    assert row["boundary_latents"] is row["boundary_seeds"] is row["boundary_settings"] is None


def test_validation_prompts_have_the_columns_and_nothing_in_them(paint, tiny_model):
    flags = [*SMALL, "--boundary_latents", 1, "--validation_prompts", "a dog", "a cat on a boat"]
    dataset = load_from_disk(paint(tiny_model, ["a cat"], *flags))
    assert dataset["validation"]["caption"] == ["a dog", "a cat on a boat"]
    assert dataset["validation"].features == dataset["train"].features
    for row in dataset["validation"]:
        assert row["boundary_latents"] is row["boundary_seeds"] is row["boundary_settings"] is None


def test_both_splits_survive_parquet_as_on_the_hub(small, tmp_path):
    dataset = load_from_disk(small)
    for split, rows in dataset.items():
        rows.to_parquet(tmp_path / f"{split}.parquet")
        read = DatasetDict.from_parquet({split: str(tmp_path / f"{split}.parquet")}, cache_dir=str(tmp_path / "cache"))
        assert read[split].features == rows.features
        assert read[split].to_dict() == rows.to_dict()


def test_the_last_message_tells_the_number_of_latents(paint, tiny_model, caplog):
    with caplog.at_level("INFO"):
        paint(tiny_model, ["a cat"], *SMALL, "--boundary_latents", 2)
    assert "Boundary latents = 2 for each caption" in caplog.text


def test_group_offload_paints_the_same(small, paint, tiny_model, monkeypatch):
    calls, enable = [], WanTransformer3DModel.enable_group_offload
    monkeypatch.setattr(
        WanTransformer3DModel, "enable_group_offload", lambda *args, **kwargs: calls.append(enable(*args, **kwargs))
    )
    flags = ["--boundary_latents", 3, "--seed", 7, "--batch_size", 4, "--group_offload"]
    offloaded = load_from_disk(paint(tiny_model, CAPTIONS, *SMALL, *flags))
    assert len(calls) == 1
    assert offloaded["train"].to_dict() == load_from_disk(small)["train"].to_dict()


def test_the_low_noise_expert_is_not_needed(small, paint, tiny_model, tmp_path):
    half = Path(shutil.copytree(tiny_model, tmp_path / "half"))
    shutil.rmtree(half / "transformer_2")
    flags = ["--boundary_latents", 3, "--seed", 7, "--batch_size", 4]
    found = load_from_disk(paint(half, CAPTIONS, *SMALL, *flags))["train"].with_format("numpy")["boundary_latents"]
    expected = load_from_disk(small)["train"].with_format("numpy")["boundary_latents"]
    assert np.array_equal(np.stack(found[:]), np.stack(expected[:]))


def test_two_processes_write_the_same_dataset_as_one(small, tiny_model, tmp_path):
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    flags = [*SMALL, "--boundary_latents", 3, "--seed", 7, "--batch_size", 4]
    # `--cpu --num_processes 2` would start one process unless there is MPI; this way there are two, on the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    script = [ROOT / "embed_prompts.py", *arguments(tiny_model, tmp_path / "captions.txt", tmp_path / "two", *flags)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Num processes = 2" in done.stderr
    two, one = load_from_disk(tmp_path / "two"), load_from_disk(small)
    assert two["train"].to_dict() == one["train"].to_dict()
    assert two["negative"].to_dict() == one["negative"].to_dict()


# ---- What `embed_prompts.py` refuses. -------------------------------------------------------------------------------


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """Function: a model and flags that must be refused -> the message: one line, and nothing loaded or written."""

    def fail(*args, **kwargs):
        pytest.fail("a model was loaded before the input was checked")

    monkeypatch.setattr(WanPipeline, "from_pretrained", fail)
    (tmp_path / "captions.txt").write_text("a cat")

    def refuse(model, *flags):
        command = arguments(model, tmp_path / "captions.txt", tmp_path / "output", *flags)
        with pytest.raises(SystemExit) as caught:
            embed_prompts.main(embed_prompts.parse_args(command))
        assert [path.name for path in tmp_path.iterdir()] == ["captions.txt"]
        assert re.fullmatch("error: .+", caught.value.code), "one line, which makes Python exit with 1"
        return caught.value.code.removeprefix("error: ")

    return refuse


@pytest.mark.parametrize("flag", ["--boundary_latents", "--height", "--width", "--sampling_steps"])
def test_a_count_below_one(refusal, tiny_model, flag):
    assert refusal(tiny_model, "--boundary_latents", 1, flag, 0) == f"`{flag}` must be at least 1, but is 0."


@pytest.mark.parametrize("flag", ["--height", "--width"])
def test_a_size_that_the_latents_cannot_have(refusal, tiny_model, flag):
    message = refusal(tiny_model, *SMALL, "--boundary_latents", 1, flag, 40)
    assert message == f"`{flag} 40` must be a multiple of 16 for this model, for example 32."


def test_a_shift_of_zero(refusal, tiny_model):
    message = refusal(tiny_model, "--boundary_latents", 1, "--rollout_shift", 0)
    assert message == "`--rollout_shift` must be positive and finite, but is 0.0."


def test_a_schedule_without_a_step_for_the_low_noise_expert(refusal, tiny_model):
    message = refusal(tiny_model, "--boundary_latents", 1, "--sampling_steps", 1)
    assert message.startswith("`--sampling_steps 1` ")


def test_boundary_latents_of_a_model_of_one_expert(refusal, tiny_one_expert_model):
    message = refusal(tiny_one_expert_model, *SMALL, "--boundary_latents", 1)
    assert message == "`--boundary_latents` needs a model of two experts; this one has no `boundary_ratio`."


def test_boundary_latents_of_a_model_without_the_high_noise_expert(refusal, tiny_model, tmp_path_factory):
    half = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("copy") / "half"))
    shutil.rmtree(half / "transformer")
    message = refusal(half, *SMALL, "--boundary_latents", 1)
    assert message.startswith(f"`--pretrained_model_name_or_path {half}` has no whole model in `transformer`: ")


def edit_weights(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def lose(file):
    edit_weights(file, lambda weights: weights.pop("proj_out.bias"))


def cut(file):
    edit_weights(file, lambda weights: weights.update({"proj_out.bias": weights["proj_out.bias"][1:]}))


def add(file):
    edit_weights(file, lambda weights: weights.update({"x.bias": weights["proj_out.bias"].clone()}))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (Path.unlink, "` has no whole model in `transformer`: "),
        (truncate, "diffusion_pytorch_model.safetensors` is not a whole safetensors file: "),
        (lose, "` has no whole model in `transformer`: the weights lack 1 tensors, such as `proj_out.bias`"),
        (cut, "in `transformer`: the weights have other shapes of 1 tensors, such as `proj_out.bias`"),
        (add, "` has no whole model in `transformer`: the weights have unknown 1 tensors, such as `x.bias`"),
    ],
)
def test_weights_of_the_high_noise_expert_that_are_missing_or_wrong(
    refusal, tiny_model, tmp_path_factory, spoil, problem
):
    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("copy") / "model"))
    spoil(model / "transformer" / "diffusion_pytorch_model.safetensors")
    message = refusal(model, *SMALL, "--boundary_latents", 1)
    assert message.startswith(f"`--pretrained_model_name_or_path {model}`")
    assert problem in message


def test_the_high_noise_expert_is_not_needed_for_embeddings_alone(paint, tiny_model, tmp_path):
    half = Path(shutil.copytree(tiny_model, tmp_path / "half"))
    shutil.rmtree(half / "transformer")
    assert len(load_from_disk(paint(half, CAPTIONS))["train"]) == 6


def test_weights_that_make_nan_end_the_run(paint, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    edit_weights(file, lambda weights: weights["proj_out.bias"].fill_(float("nan")))
    with pytest.raises(SystemExit) as caught:
        paint(model, ["a cat"], *SMALL, "--boundary_latents", 1)
    assert caught.value.code == "error: The high-noise expert makes NaN or infinite numbers. Check its weights."


def test_an_expert_that_takes_images_too(refusal, tiny_model, tmp_path_factory):
    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("copy") / "model"))
    file = model / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 9}))
    message = refusal(model, *SMALL, "--boundary_latents", 1)
    assert message.startswith("`--boundary_latents` needs a text-to-video model;")


# ---- The configs of the real model. ---------------------------------------------------------------------------------


def test_the_boundary_of_wan2_2_t2v_a14b():
    folder = ROOT / "tests" / "fixtures" / "wan2.2-t2v-a14b"
    args = embed_prompts.parse_args(arguments(folder, "captions.txt", "output", "--boundary_latents", 2, "--seed", 7))
    boundary = embed_prompts.read_boundary_settings(args, json.loads((folder / "model_index.json").read_text()))
    assert boundary.settings == {
        "height": 512,
        "width": 512,
        "sampling_steps": 10,
        "rollout_scheduler": "unipc",
        "rollout_shift": 3.0,
    }
    assert boundary.sigma == 0.875
    assert boundary.shape == (16, 1, 64, 64)
    assert boundary.seeds == [7, 8]
    assert boundary.guidance_scale == 4.0


# ---- The command that the last message gives. -----------------------------------------------------------------------


def next_flags(caplog):
    """The flags of the last command that was printed after "Next:"."""
    line = [message for message in caplog.messages if "Next: " in message][-1]
    return shlex.split(line.split("Next: accelerate launch train_srpo_wan_t2i.py")[1])


def test_the_next_command_trains_from_the_boundary(paint, tiny_model, tiny_reward, caplog, tmp_path):
    flags = [
        "--height",
        32,
        "--width",
        48,
        "--sampling_steps",
        3,
        "--rollout_scheduler",
        "euler",
        "--rollout_shift",
        2,
    ]
    with caplog.at_level("INFO"):
        dataset = paint(tiny_model, CAPTIONS, *flags, "--boundary_latents", 1)
    command = next_flags(caplog)
    args = train_srpo_wan_t2i.parse_args(command)
    assert (args.dataset_name, args.rollout_start) == (str(dataset), "boundary")
    assert (args.height, args.width, args.sampling_steps) == (32, 48, 3)
    assert (args.rollout_scheduler, args.rollout_shift) == ("euler", 2.0)
    reward = ["--reward_model", "CLIP", "--reward_model_path", tiny_reward]
    quick = ["--max_train_steps", 1, "--validation_prompts", "--validation_size", 32, "--report_to", "none"]
    run_in_process(*command, *reward, *quick, "--output_dir", tmp_path / "output")
    assert load_weights(tmp_path / "output")


def test_the_next_command_names_the_only_expert(paint, tiny_one_expert_model, caplog):
    with caplog.at_level("INFO"):
        paint(tiny_one_expert_model, ["a cat"])
    args = train_srpo_wan_t2i.parse_args(next_flags(caplog))
    assert args.transformer_subfolder == "transformer"
    assert args.rollout_start == "noise"


# ---- What training starts from. -------------------------------------------------------------------------------------


SHAPE = 4, 1, 4, 6
SEEDS = np.arange(100, 150)
# The latents of each seed are full of it, plus a thousand for every caption: one sees where they come from.
STORED = [np.broadcast_to(SEEDS[:, None, None, None, None] + 1000 * i, (50, *SHAPE)) for i in range(4)]
BATCH = {"boundary_latents": [latents.astype(np.float32) for latents in STORED], "boundary_seeds": [SEEDS] * 4}


def picked_seeds(latents, noise):
    """The seeds of what `make_starts` gave for `BATCH`, after checking that latents and noise belong to them."""
    assert latents.shape == noise.shape == (4, *SHAPE)
    assert latents.dtype == noise.dtype == torch.float32
    seeds = [int(sample.mean()) - 1000 * i for i, sample in enumerate(latents)]
    for i, seed in enumerate(seeds):
        assert torch.equal(latents[i], torch.full(SHAPE, 1000.0 * i + seed))
        assert torch.equal(noise[i], draw(seed, SHAPE))
    return seeds


def starts(args, step=3, samples=(12, 13, 14, 15)):
    return picked_seeds(*make_starts(args, step, samples, SHAPE, BATCH))


def test_shared_noise_picks_one_seed_for_all_samples(make_args):
    args = make_args("--rollout_start", "boundary", "--noise", "shared")
    assert len(set(starts(args))) == 1
    assert starts(args) == starts(args, samples=(0, 1, 2, 3))
    assert starts(args) != starts(args, step=4)


def test_per_sample_noise_picks_a_seed_for_every_sample(make_args):
    args = make_args("--rollout_start", "boundary", "--noise", "per_sample")
    assert len(set(starts(args))) > 1
    assert starts(args, samples=(14, 15, 12, 13)) == [*starts(args)[2:], *starts(args)[:2]]
    assert starts(args) == starts(args, step=4)  # the number of a sample is its own in the run


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
def test_what_a_step_starts_from_repeats_and_depends_on_the_seed(make_args, noise):
    args = make_args("--rollout_start", "boundary", "--noise", noise)
    other = make_args("--rollout_start", "boundary", "--noise", noise, "--seed", 1)
    torch.randn(5)  # the global generator has no part in it
    assert starts(args) == starts(args)
    assert starts(args) != starts(other)


def test_all_latents_of_a_caption_are_used(make_args):
    args = make_args("--rollout_start", "boundary")
    few = {name: [values[:3] for values in column] for name, column in BATCH.items()}
    picked = [picked_seeds(*make_starts(args, step, range(4), SHAPE, few))[0] for step in range(30)]
    assert set(picked) == {100, 101, 102}


def test_from_noise_latents_and_noise_are_the_same(make_args):
    latents, noise = make_starts(make_args(), 3, (12, 13), SHAPE, {})
    assert torch.equal(latents, noise)
    assert latents.std() == pytest.approx(1, abs=0.2)


def test_collate_passes_the_boundary_on_where_there_is_one(small):
    rows = list(load_from_disk(small)["train"].with_format("numpy").select([4, 1]))
    batch = collate_fn(rows, 16, torch.float32)
    assert batch["captions"] == [CAPTIONS[4], CAPTIONS[1]]
    for row, latents, seeds in zip(rows, batch["boundary_latents"], batch["boundary_seeds"], strict=True):
        assert np.array_equal(latents, row["boundary_latents"])
        assert seeds.tolist() == [7, 8, 9]
    for row in rows:
        del row["boundary_latents"], row["boundary_seeds"], row["boundary_settings"]
    assert collate_fn(rows, 16, torch.float32).keys() == {"captions", "prompt_embeds"}


# ---- Training from the boundary. ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def low_noise_model(tiny_model, tmp_path_factory):
    """The tiny model without its high-noise expert."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("copy") / "model"))
    shutil.rmtree(folder / "transformer")
    return folder


@pytest.mark.parametrize("flags", [[], ["--lora_rank", 2]], ids=["all weights", "LoRA"])
def test_training_from_the_boundary_needs_the_low_noise_expert_alone(train, small, low_noise_model, flags):
    output = train("--rollout_start", "boundary", *flags, dataset=small, model=low_noise_model, prompts=["a dog"])
    rewards = logged(output, "reward_positive")
    assert len(rewards) == 2
    if not flags:
        assert distance(load_weights(output), load_weights(low_noise_model)) > 0


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
def test_a_run_goes_on_from_stored_latents_and_injects_their_noise(train, small, low_noise_model, monkeypatch, noise):
    rolled, graded = [], []
    roll, grade = train_srpo_wan_t2i.rollout, train_srpo_wan_t2i.graded_pass

    def record_rollout(velocity_fn, scheduler, start, *args, boundary, **kwargs):
        x0 = roll(velocity_fn, scheduler, start, *args, boundary=boundary, **kwargs)
        rolled.append((start, boundary, x0))
        return x0

    def record_graded_pass(velocity_fn, vae, reward_model, x0, noise, embeds, captions, *args):
        graded.append((x0, noise, captions))
        return grade(velocity_fn, vae, reward_model, x0, noise, embeds, captions, *args)

    monkeypatch.setattr(train_srpo_wan_t2i, "rollout", record_rollout)
    monkeypatch.setattr(train_srpo_wan_t2i, "graded_pass", record_graded_pass)
    flags = ["--rollout_start", "boundary", "--noise", noise, "--train_batch_size", 3]
    train(*flags, dataset=small, model=low_noise_model)

    stored = {row["caption"]: row["boundary_latents"] for row in load_from_disk(small)["train"].with_format("torch")}
    assert len(rolled) == len(graded) == 2
    for (start, boundary, rolled_x0), (x0, injected, captions) in zip(rolled, graded, strict=True):
        assert boundary == BOUNDARY
        assert torch.equal(rolled_x0, x0)
        for latents, each, caption in zip(start, injected, captions, strict=True):
            (seed,) = (seed for seed in (7, 8, 9) if torch.equal(each, draw(seed, (4, 1, 4, 4))))
            assert torch.equal(latents, stored[caption][seed - 7])


# ---- What training refuses. -----------------------------------------------------------------------------------------


@pytest.fixture
def train_refusal(command, tmp_path, monkeypatch):
    """Function: flags and inputs that must be refused -> the message: one line, and nothing loaded or written."""

    def fail(*args, **kwargs):
        pytest.fail("a model was loaded before the input was checked")

    for model_class in (WanTransformer3DModel, AutoencoderKLWan):
        monkeypatch.setattr(model_class, "from_pretrained", fail)

    def refuse(*flags, **inputs):
        with pytest.raises(SystemExit) as caught:
            run_in_process(*command(tmp_path / "output", "--rollout_start", "boundary", *flags, **inputs))
        assert not (tmp_path / "output").exists()
        assert re.fullmatch("error: .+", caught.value.code), "one line, which makes Python exit with 1"
        return caught.value.code.removeprefix("error: ")

    return refuse


def test_a_dataset_without_boundary_latents(train_refusal, tiny_dataset):
    message = train_refusal()
    advice = "has no boundary latents, or rows without; see `embed_prompts.py --help`."
    assert message == f"`--dataset_name {tiny_dataset}` {advice}"


def test_rows_without_boundary_latents_among_others(train_refusal, small, tiny_dataset, tmp_path):
    dataset, plain = load_from_disk(small), load_from_disk(tiny_dataset)
    dataset["train"] = concatenate_datasets([dataset["train"], plain["train"]])
    dataset.save_to_disk(tmp_path / "mixed")
    message = train_refusal(dataset=tmp_path / "mixed")
    assert message.startswith(f"`--dataset_name {tmp_path}/mixed` has ") and "no boundary latents" in message


@pytest.fixture(scope="module")
def small_of_shift_5(paint, tiny_model):
    return paint(tiny_model, ["a cat"], *SMALL, "--boundary_latents", 3, "--rollout_shift", 5)


def test_rows_of_other_settings_among_others(train_refusal, small, small_of_shift_5, tmp_path):
    dataset, other = load_from_disk(small), load_from_disk(small_of_shift_5)
    dataset["train"] = concatenate_datasets([dataset["train"], other["train"]])
    dataset.save_to_disk(tmp_path / "mixed")
    message = train_refusal(dataset=tmp_path / "mixed")
    assert "has boundary latents of `--rollout_shift 5.0`, not 3.0." in message


@pytest.mark.parametrize("column", ["boundary_latents", "boundary_seeds", "boundary_settings"])
def test_boundary_latents_that_lack_a_column(train_refusal, small, tmp_path, column):
    load_from_disk(small).remove_columns(column).save_to_disk(tmp_path / "less")
    assert "has no boundary latents" in train_refusal(dataset=tmp_path / "less")


@pytest.mark.parametrize(
    "flag, value, found, wanted",
    [
        ("--height", 64, 32, "64"),
        ("--width", 64, 32, "64"),
        ("--sampling_steps", 3, 2, "3"),
        ("--rollout_scheduler", "euler", "unipc", "euler"),
        ("--rollout_shift", 5, 3.0, "5.0"),
    ],
)
def test_latents_of_other_settings(train_refusal, small, flag, value, found, wanted):
    message = train_refusal(flag, value, dataset=small)
    assert message.startswith(f"`--dataset_name {small}` has boundary latents of `{flag} {found}`, not {wanted}. ")


def test_latents_of_another_shift_than_the_models(train_refusal, small, low_noise_model, tmp_path):
    model = Path(shutil.copytree(low_noise_model, tmp_path / "model"))
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "flow_shift": 5.0}))
    message = train_refusal(dataset=small, model=model)
    assert "has boundary latents of `--rollout_shift 3.0`, not 5.0." in message


def test_the_shift_of_the_latents_may_be_given(command, small, tmp_path, monkeypatch):
    class Accepted(Exception):
        pass

    def accept(*args, **kwargs):
        raise Accepted

    monkeypatch.setattr(train_srpo_wan_t2i, "make_accelerator", accept)
    flags = ["--rollout_start", "boundary", "--rollout_shift", 3]
    with pytest.raises(Accepted):
        run_in_process(*command(tmp_path / "output", *flags, dataset=small))


def test_the_boundary_of_a_model_of_one_expert(train_refusal, tiny_one_expert_model, small):
    flags = ["--transformer_subfolder", "transformer"]
    message = train_refusal(*flags, model=tiny_one_expert_model, dataset=small)
    assert message == "`--rollout_start boundary` needs a model of two experts; this one has no boundary."
