"""`embed_prompts.py --boundary_latents`: what the high-noise expert paints, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict, load_from_disk
from helpers import CAPTIONS, SMALL, embed_flags

from diffusers import WanTransformer3DModel

import embed_prompts


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
def refusal(no_loading, tmp_path):
    """Function: a model and flags that must be refused -> the message: one line, and nothing loaded or written."""

    (tmp_path / "captions.txt").write_text("a cat")

    def refuse(model, *flags):
        command = embed_flags(model, tmp_path / "captions.txt", tmp_path / "output", *flags)
        with pytest.raises(SystemExit) as caught:
            embed_prompts.main(embed_prompts.parse_args(command))
        assert [path.name for path in tmp_path.iterdir()] == ["captions.txt"]
        assert re.fullmatch(".+", caught.value.code), "one line, which makes Python exit with 1"
        return caught.value.code

    return refuse


@pytest.mark.parametrize("flag", ["--boundary_latents", "--height", "--width", "--sampling_steps"])
def test_a_count_below_one(refusal, tiny_model, flag):
    assert refusal(tiny_model, "--boundary_latents", 1, flag, 0) == f"`{flag}` must be at least 1, not 0."


@pytest.mark.parametrize("flag", ["--height", "--width"])
def test_a_size_that_the_latents_cannot_have(refusal, tiny_model, flag):
    message = refusal(tiny_model, *SMALL, "--boundary_latents", 1, flag, 40)
    assert message == f"`{flag}` 40 must be a multiple of 16 for this model."


def test_a_shift_of_zero(refusal, tiny_model):
    message = refusal(tiny_model, "--boundary_latents", 1, "--rollout_shift", 0)
    assert message == "`--rollout_shift` must be positive, not 0.0."


def test_a_schedule_without_a_step_for_the_low_noise_expert(refusal, tiny_model):
    message = refusal(tiny_model, "--boundary_latents", 1, "--sampling_steps", 1)
    assert message.startswith("`--sampling_steps` 1 ")


def test_boundary_latents_of_a_model_of_one_expert(refusal, tiny_one_expert_model):
    message = refusal(tiny_one_expert_model, *SMALL, "--boundary_latents", 1)
    assert message == "`--boundary_latents` needs a model of two experts; this one has no `boundary_ratio`."


def test_boundary_latents_of_a_model_without_the_high_noise_expert(refusal, tiny_model, tmp_path_factory):
    half = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("copy") / "half"))
    shutil.rmtree(half / "transformer")
    message = refusal(half, *SMALL, "--boundary_latents", 1)
    assert message.startswith(f"`--pretrained_model_name_or_path` {half} could not be read: ")


def test_weights_of_the_high_noise_expert_that_are_missing(embed, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(SystemExit) as caught:
        embed(model, ["a cat"], *SMALL, "--boundary_latents", 1)
    assert caught.value.code.startswith(f"`--pretrained_model_name_or_path` {model} could not be loaded: ")
    assert "\n" not in caught.value.code
