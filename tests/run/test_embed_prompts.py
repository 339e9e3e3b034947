"""What `embed_prompts.py` writes: the embeddings of `WanPipeline`, and what else a dataset needs."""

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from helpers import PROMPTS, make_text_model
from helpers import run_embed_prompts as embed
from transformers import UMT5EncoderModel

from diffusers import WanPipeline

from embed_prompts import WAN_NEGATIVE_PROMPT, text_encoder_fingerprint


def bfloat16(row):
    return torch.tensor(row["prompt_embeds"], dtype=torch.int16).view(torch.bfloat16)


def test_embeddings_are_those_of_wan_pipeline_bit_for_bit(text_model, prompts, tmp_path):
    train = embed(text_model, prompts, tmp_path / "out", "--max_sequence_length", "512")["train"]
    pipe = WanPipeline.from_pretrained(
        text_model, transformer=None, transformer_2=None, vae=None, scheduler=None, dtype=torch.bfloat16
    )
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    for row, embeds in zip(train, expected, strict=True):
        padding = torch.zeros(512 - len(row["prompt_embeds"]), 16, dtype=torch.bfloat16)
        assert torch.equal(torch.cat([bfloat16(row), padding]), embeds)


def test_only_the_real_tokens_are_stored(text_model, prompts, tmp_path):
    train = embed(text_model, prompts, tmp_path / "out")["train"]
    assert [len(row["prompt_embeds"]) for row in train] == [4, 7, 2, 3, 7]  # words and </s>


def test_dtype_fp32_runs_the_text_encoder_in_float32(text_model, prompts, tmp_path):
    train = embed(text_model, prompts, tmp_path / "out", "--dtype", "fp32")["train"]
    pipe = WanPipeline.from_pretrained(text_model, transformer=None, transformer_2=None, vae=None, scheduler=None)
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False, max_sequence_length=16)
    assert expected.dtype == torch.float32
    assert torch.equal(bfloat16(train[0]), expected[0, :4].bfloat16())


def test_the_batch_size_does_not_change_the_rows(text_model, prompts, tmp_path):
    one = embed(text_model, prompts, tmp_path / "one", "--batch_size", "1")
    three = embed(text_model, prompts, tmp_path / "three", "--batch_size", "3")
    assert one["train"]["caption"] == three["train"]["caption"] == PROMPTS
    for row, other in zip(one["train"], three["train"], strict=True):
        torch.testing.assert_close(bfloat16(row), bfloat16(other))


def test_the_negative_split_holds_wans_own_negative_prompt(text_model, prompts, tmp_path):
    negative = embed(text_model, prompts, tmp_path / "out")["negative"]
    assert negative["caption"] == [WAN_NEGATIVE_PROMPT]
    assert WAN_NEGATIVE_PROMPT.startswith("色调艳丽，过曝，") and len(WAN_NEGATIVE_PROMPT) == 137


def test_negative_prompt_is_embedded_like_a_caption(text_model, prompts, tmp_path):
    dataset = embed(text_model, prompts, tmp_path / "out", "--negative_prompt", "a red cat", "--batch_size", "1")
    assert dataset["negative"]["caption"] == ["a red cat"]
    assert dataset["negative"][0] == dataset["train"][0]


def test_every_row_says_what_made_it(text_model, prompts, tmp_path):
    dataset = embed(text_model, prompts, tmp_path / "out", "--revision", "main")
    weight = UMT5EncoderModel.from_pretrained(text_model / "text_encoder").encoder.final_layer_norm.weight
    for split in ("train", "negative"):
        assert set(dataset[split]["text_encoder"]) == {f"{text_model}@main"}
        assert set(dataset[split]["text_encoder_fingerprint"]) == {text_encoder_fingerprint(weight)}
        assert set(dataset[split]["max_sequence_length"]) == {16}


def test_variant_chooses_the_weight_files(text_model, prompts, tmp_path):
    variant = Path(shutil.copytree(text_model, tmp_path / "variant"))
    (variant / "text_encoder/model.safetensors").rename(variant / "text_encoder/model.fp16.safetensors")
    assert len(embed(variant, prompts, tmp_path / "out", "--variant", "fp16")["train"]) == 5


def test_the_format_that_the_documentation_gives_reads_an_embedding(text_model, prompts, tmp_path):
    dataset = embed(text_model, prompts, tmp_path / "out")
    row = dataset["train"].with_format("torch")[1]
    prompt_embeds = row["prompt_embeds"].to(torch.int16).view(torch.bfloat16)
    assert prompt_embeds.shape == (7, 16)
    assert torch.equal(prompt_embeds, bfloat16(dataset["train"][1]))
    assert "prompt_embeds" in (tmp_path / "out" / "README.md").read_text()


def test_the_columns_survive_parquet_concatenation_and_filter(text_model, prompts, tmp_path):
    train = embed(text_model, prompts, tmp_path / "out")["train"]
    train.to_parquet(tmp_path / "train.parquet")
    read = Dataset.from_parquet(str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    assert read.features == train.features
    assert read.to_dict() == train.to_dict()
    both = concatenate_datasets([read, train]).filter(lambda row: row["caption"] == "cat")
    assert both.features == train.features
    assert both[0] == both[1] == train[2]


def test_duplicates_are_dropped_and_counted(text_model, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n a cat \na boat\na dog\n")
    with caplog.at_level(logging.INFO):
        dataset = embed(text_model, tmp_path / "prompts.txt", tmp_path / "out")
    assert dataset["train"]["caption"] == ["a cat", "a dog", "a boat"]
    assert "Num captions = 3 (2 duplicates dropped)" in caplog.text


def test_long_captions_are_truncated_as_wan_pipeline_does_and_counted(text_model, prompts, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train = embed(text_model, prompts, tmp_path / "out", "--max_sequence_length", "4")["train"]
    assert [len(row["prompt_embeds"]) for row in train] == [4, 4, 2, 3, 4]
    assert "2 of 6 prompts (the negative one included) will be truncated" in caplog.text
    assert "Num truncated = 2" in caplog.text


def test_the_last_message_says_where_the_dataset_is_and_what_comes_next(text_model, prompts, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        embed(text_model, prompts, tmp_path / "out")
    assert re.search(rf"Dataset = {tmp_path}/out \(\d+\.\d MB\)", caplog.text)
    assert f"--pretrained_model_name_or_path {text_model} --dataset_name {tmp_path}/out" in caplog.text


def test_nothing_else_is_left_behind(text_model, prompts, tmp_path):
    (tmp_path / "out.partial").mkdir()  # of an interrupted run
    (tmp_path / "out.partial" / "0.arrow").write_text("half a file")
    assert len(embed(text_model, prompts, tmp_path / "out")["train"]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.txt"]


def test_overwrite_output_dir_replaces_the_dataset(text_model, prompts, tmp_path):
    embed(text_model, prompts, tmp_path / "out")
    prompts.write_text("a dog\n")
    assert embed(text_model, prompts, tmp_path / "out", "--overwrite_output_dir")["train"]["caption"] == ["a dog"]


def test_a_run_that_breaks_leaves_the_old_dataset_whole(text_model, prompts, tmp_path):
    embed(text_model, prompts, tmp_path / "out")
    broken = make_text_model(
        tmp_path / "broken", seed=0, vocab_size=4
    )  # fewer embeddings than the tokenizer has tokens
    with pytest.raises(IndexError):
        embed(broken, prompts, tmp_path / "out", "--overwrite_output_dir")
    assert load_from_disk(tmp_path / "out")["train"]["caption"] == PROMPTS


def test_the_fingerprint_follows_the_weights_and_not_the_path(text_model, prompts, tmp_path):
    copy = shutil.copytree(text_model, tmp_path / "copy")
    other = make_text_model(tmp_path / "other", seed=1)
    fingerprints = [
        embed(folder, prompts, tmp_path / f"out{i}")["negative"]["text_encoder_fingerprint"][0]
        for i, folder in enumerate([text_model, copy, other])
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
