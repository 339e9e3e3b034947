"""`embed_prompts.py --boundary_latents`: what the high-noise expert paints, and what is refused."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict, load_from_disk
from helpers import CAPTIONS, ROOT, SMALL, edit_json, embed_flags, load_weights, run_in_process
from inputs import edit_weights, truncate

from diffusers import WanTransformer3DModel

import embed_prompts
import train_srpo_wan_t2i


# ---- What is written. -----------------------------------------------------------------------------------------------


def test_the_columns_of_the_boundary(boundary_dataset):
    train = load_from_disk(boundary_dataset)["train"]
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


def test_images_that_are_not_square(embed, tiny_model):
    flags = ["--boundary_latents", 1, "--height", 32, "--width", 48, "--sampling_steps", 2, "--rollout_shift", 2]
    (row,) = load_from_disk(embed(tiny_model, ["a cat"], *flags))["train"].with_format("numpy")
    assert row["boundary_latents"].shape == (1, 4, 1, 4, 6)
    settings = json.loads(row["boundary_settings"])
    assert (settings["height"], settings["width"], settings["rollout_shift"]) == (32, 48, 2.0)


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_in_bf16_latents_of_float32_come_near_those_of_fp32(embed, tiny_model, name):
    """As in training, the expert may compute in bf16, but between steps nothing is rounded to it."""
    flags = ["--height", 32, "--width", 32, "--boundary_latents", 1, "--rollout_scheduler", name]
    half, full = (
        load_from_disk(embed(tiny_model, CAPTIONS, *flags, "--dtype", dtype))["train"].with_format("torch")
        for dtype in ("bf16", "fp32")
    )
    half, full = half["boundary_latents"][:], full["boundary_latents"][:]
    assert half.dtype == torch.float32
    assert not torch.equal(half, half.bfloat16().float())
    torch.testing.assert_close(half, full, rtol=0, atol=0.05)


def test_every_caption_and_every_seed_has_latents_of_its_own(boundary_dataset):
    latents = load_from_disk(boundary_dataset)["train"].with_format("numpy")["boundary_latents"][:]
    assert len(np.unique(np.reshape(latents, (18, -1)), axis=0)) == 18


def test_the_next_seeds_go_on_where_the_first_end(boundary_dataset, embed, tiny_model):
    more = embed(tiny_model, CAPTIONS, *SMALL, "--boundary_latents", 1, "--seed", 9, "--batch_size", 4)
    first, second = (load_from_disk(folder)["train"].with_format("numpy") for folder in (boundary_dataset, more))
    for row, other in zip(first, second, strict=True):
        assert other["boundary_seeds"].tolist() == [9]
        assert np.array_equal(row["boundary_latents"][2], other["boundary_latents"][0])


def test_the_other_columns_are_those_without_boundary_latents(boundary_dataset, embed, tiny_model):
    dataset, plain = load_from_disk(boundary_dataset), load_from_disk(embed(tiny_model, CAPTIONS, "--batch_size", 4))
    assert set(dataset["train"].column_names) - set(plain["train"].column_names) == {
        "boundary_latents",
        "boundary_seeds",
        "boundary_settings",
    }
    for split in ("train", "negative"):
        columns = dataset[split].select_columns(plain[split].column_names)
        assert columns.features == plain[split].features
        assert columns.to_dict() == plain[split].to_dict()


def test_the_negative_prompt_has_the_columns_and_nothing_in_them(boundary_dataset):
    dataset = load_from_disk(boundary_dataset)
    assert dataset["negative"].features == dataset["train"].features
    (row,) = dataset["negative"]
    assert row["boundary_latents"] is row["boundary_seeds"] is row["boundary_settings"] is None


def test_validation_prompts_have_the_columns_and_nothing_in_them(embed, tiny_model):
    flags = [*SMALL, "--boundary_latents", 1, "--validation_prompts", "a dog", "a cat on a boat"]
    dataset = load_from_disk(embed(tiny_model, ["a cat"], *flags))
    assert dataset["validation"]["caption"] == ["a dog", "a cat on a boat"]
    assert dataset["validation"].features == dataset["train"].features
    for row in dataset["validation"]:
        assert row["boundary_latents"] is row["boundary_seeds"] is row["boundary_settings"] is None


def test_both_splits_survive_parquet_as_on_the_hub(boundary_dataset, tmp_path):
    dataset = load_from_disk(boundary_dataset)
    for split, rows in dataset.items():
        rows.to_parquet(tmp_path / f"{split}.parquet")
        read = DatasetDict.from_parquet({split: str(tmp_path / f"{split}.parquet")}, cache_dir=str(tmp_path / "cache"))
        assert read[split].features == rows.features
        assert read[split].to_dict() == rows.to_dict()


def test_the_last_message_tells_the_number_of_latents(embed, tiny_model, caplog):
    with caplog.at_level("INFO"):
        embed(tiny_model, ["a cat"], *SMALL, "--boundary_latents", 2)
    assert "Boundary latents = 2 for each caption" in caplog.text


def test_group_offload_paints_the_same(boundary_dataset, embed, tiny_model, monkeypatch):
    calls, enable = [], WanTransformer3DModel.enable_group_offload
    monkeypatch.setattr(
        WanTransformer3DModel, "enable_group_offload", lambda *args, **kwargs: calls.append(enable(*args, **kwargs))
    )
    flags = ["--boundary_latents", 3, "--seed", 7, "--batch_size", 4, "--group_offload"]
    offloaded = load_from_disk(embed(tiny_model, CAPTIONS, *SMALL, *flags))
    assert len(calls) == 1
    assert offloaded["train"].to_dict() == load_from_disk(boundary_dataset)["train"].to_dict()


def test_the_low_noise_expert_is_not_needed(boundary_dataset, embed, tiny_model, tmp_path):
    half = Path(shutil.copytree(tiny_model, tmp_path / "half"))
    shutil.rmtree(half / "transformer_2")
    flags = ["--boundary_latents", 3, "--seed", 7, "--batch_size", 4]
    found = load_from_disk(embed(half, CAPTIONS, *SMALL, *flags))["train"].with_format("numpy")["boundary_latents"]
    expected = load_from_disk(boundary_dataset)["train"].with_format("numpy")["boundary_latents"]
    assert np.array_equal(np.stack(found[:]), np.stack(expected[:]))


# ---- What is refused. -----------------------------------------------------------------------------------------------


@pytest.fixture
def embed_refusal(no_loading, tmp_path):
    """Function: a model and flags that must be refused -> the message: one line, and nothing loaded or written."""

    (tmp_path / "captions.txt").write_text("a cat")

    def refuse(model, *flags):
        command = embed_flags(model, tmp_path / "captions.txt", tmp_path / "output", *flags)
        with pytest.raises(SystemExit) as caught:
            embed_prompts.main(embed_prompts.parse_args(command))
        assert [path.name for path in tmp_path.iterdir()] == ["captions.txt"]
        assert re.fullmatch("error: .+", caught.value.code), "one line, which makes Python exit with 1"
        return caught.value.code.removeprefix("error: ")

    return refuse


@pytest.mark.parametrize("flag", ["--height", "--width"])
def test_a_size_that_the_latents_cannot_have(embed_refusal, tiny_model, flag):
    message = embed_refusal(tiny_model, *SMALL, "--boundary_latents", 1, flag, 40)
    assert message == f"`{flag} 40` must be a multiple of 16 for this model, for example 32."


def test_a_schedule_without_a_step_for_the_low_noise_expert(embed_refusal, tiny_model):
    message = embed_refusal(tiny_model, "--boundary_latents", 1, "--sampling_steps", 1)
    assert message.startswith("`--sampling_steps 1` ")


def test_boundary_latents_of_a_model_of_one_expert(embed_refusal, tiny_one_expert_model):
    message = embed_refusal(tiny_one_expert_model, *SMALL, "--boundary_latents", 1)
    assert message == "`--boundary_latents` needs a model of two experts; this one has no `boundary_ratio`."


def test_boundary_latents_of_a_model_without_the_high_noise_expert(embed_refusal, tiny_model, tmp_path_factory):
    half = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("copy") / "half"))
    shutil.rmtree(half / "transformer")
    message = embed_refusal(half, *SMALL, "--boundary_latents", 1)
    assert message.startswith(f"`--pretrained_model_name_or_path {half}` has no whole model in `transformer`: ")


def lose(file):
    edit_weights(file, lambda weights: weights.pop("proj_out.bias"))


def cut(file):
    edit_weights(file, lambda weights: weights.update({"proj_out.bias": weights["proj_out.bias"][1:]}))


def add(file):
    edit_weights(file, lambda weights: weights.update({"x.bias": weights["proj_out.bias"].clone()}))


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
    embed_refusal, tiny_model, tmp_path_factory, spoil, problem
):
    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("copy") / "model"))
    spoil(model / "transformer" / "diffusion_pytorch_model.safetensors")
    message = embed_refusal(model, *SMALL, "--boundary_latents", 1)
    assert message.startswith(f"`--pretrained_model_name_or_path {model}`")
    assert problem in message


def test_the_high_noise_expert_is_not_needed_for_embeddings_alone(embed, tiny_model, tmp_path):
    half = Path(shutil.copytree(tiny_model, tmp_path / "half"))
    shutil.rmtree(half / "transformer")
    assert len(load_from_disk(embed(half, CAPTIONS))["train"]) == 6


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_of_the_high_noise_expert_that_are_not_finite(embed, tiny_model, tmp_path, value):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    edit_weights(file, lambda weights: weights["proj_out.bias"].fill_(float(value)))
    with pytest.raises(SystemExit) as caught:
        embed(model, ["a cat"], *SMALL, "--boundary_latents", 1)
    flag = f"`--pretrained_model_name_or_path {model}`, `transformer`"
    problem = "the weights of `proj_out.bias` are NaN or infinite. Download them again."
    assert caught.value.code == f"error: {flag}: {problem}"


def test_weights_that_make_latents_that_are_not_finite_end_the_run(embed, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    edit_weights(file, lambda weights: weights["proj_out.weight"].fill_(3e38))
    with pytest.raises(SystemExit) as caught:
        embed(model, ["a cat"], *SMALL, "--boundary_latents", 1)
    assert caught.value.code == "error: The high-noise expert makes NaN or infinite numbers. Check its weights."


def test_an_expert_that_takes_images_too(embed_refusal, tiny_model, tmp_path_factory):
    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("copy") / "model"))
    file = model / "transformer" / "config.json"
    edit_json(file, in_channels=9)
    message = embed_refusal(model, *SMALL, "--boundary_latents", 1)
    assert message.startswith("`--boundary_latents` needs a text-to-video model;")


# ---- The configs of the real model. ---------------------------------------------------------------------------------


def test_the_boundary_of_wan2_2_t2v_a14b():
    folder = ROOT / "tests" / "fixtures" / "wan2.2-t2v-a14b"
    args = embed_prompts.parse_args(
        embed_flags(folder, "captions.txt", "output", "--boundary_latents", 2, "--seed", 7)
    )
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
    assert boundary.seeds == range(7, 9)
    assert boundary.guidance_scale == 4.0


# ---- The command that the last message gives. -----------------------------------------------------------------------


def next_flags(caplog):
    """The flags of the last command that was printed after "Next:"."""
    line = [message for message in caplog.messages if "Next: " in message][-1]
    return shlex.split(line.split("Next: accelerate launch train_srpo_wan_t2i.py")[1])


def test_the_next_command_trains_from_the_boundary(embed, tiny_model, tiny_reward, caplog, tmp_path):
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
        dataset = embed(tiny_model, CAPTIONS, *flags, "--boundary_latents", 1)
    command = next_flags(caplog)
    args = train_srpo_wan_t2i.parse_args(command)
    assert (args.dataset_name, args.rollout_start) == (str(dataset), "boundary")
    assert (args.height, args.width, args.sampling_steps) == (32, 48, 3)
    assert (args.rollout_scheduler, args.rollout_shift) == ("euler", 2.0)
    reward = ["--reward_model", "CLIP", "--reward_model_path", tiny_reward]
    quick = ["--max_train_steps", 1, "--validation_prompts", "--validation_size", 32, "--report_to", "none"]
    run_in_process(*command, *reward, *quick, "--output_dir", tmp_path / "output")
    assert load_weights(tmp_path / "output")


def test_the_next_command_names_the_only_expert(embed, tiny_one_expert_model, caplog):
    with caplog.at_level("INFO"):
        embed(tiny_one_expert_model, ["a cat"])
    args = train_srpo_wan_t2i.parse_args(next_flags(caplog))
    assert args.transformer_subfolder == "transformer"
    assert args.rollout_start == "noise"
