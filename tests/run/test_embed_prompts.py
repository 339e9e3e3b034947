"""What `embed_prompts.py` writes: the embeddings of `WanPipeline`, and what else a dataset needs; its command line."""

import hashlib
import logging
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import PROMPTS, bfloat16, embed_flags, run_command
from helpers import run_embed_prompts as embed
from transformers import UMT5EncoderModel

from diffusers import WanPipeline

import embed_prompts
import train_srpo_wan_t2i
from embed_prompts import WAN_NEGATIVE_PROMPT, parse_args


def sha256(weight):
    return hashlib.sha256(weight.to(torch.bfloat16).view(torch.int16).numpy().tobytes()).hexdigest()[:16]


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
        assert set(dataset[split]["text_encoder_fingerprint"]) == {sha256(weight.detach())}
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
    assert "2 of 6 prompts (all splits), such as 'a blue dog on a boat', will be truncated" in caplog.text
    assert "Num truncated = 2" in caplog.text


def test_the_last_message_says_where_the_dataset_is_and_what_comes_next(text_model, prompts, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        embed(text_model, prompts, tmp_path / "out")
    assert re.search(rf"Dataset = {tmp_path}/out \(\d+\.\d\d MB\)", caplog.text)
    assert f"--pretrained_model_name_or_path {text_model} --dataset_name {tmp_path}/out" in caplog.text


# ---- The command line. ----------------------------------------------------------------------------------------------


def printed_command(caplog, text_model, prompts, output_dir, *flags):
    """The flags of the command after "Next:", once the launcher and the script are taken off."""
    with caplog.at_level(logging.INFO):
        embed(text_model, prompts, output_dir, *flags)
    (line,) = (message for message in caplog.messages if "Next: " in message)
    launcher, launch, script, *words = shlex.split(line.split("Next: ")[1])
    assert (launcher, launch, script) == ("accelerate", "launch", "train_srpo_wan_t2i.py")
    return words


def test_the_next_command_follows_the_flags_that_differ_from_the_defaults(
    text_model, text_model_copy, prompts, tmp_path, caplog
):
    spaced = text_model_copy.rename(text_model_copy.with_name("my model"))
    flags = ["--revision", "main", "--cache_dir", tmp_path / "my cache"]
    words = printed_command(caplog, spaced, prompts, tmp_path / "my out", *flags)
    args = train_srpo_wan_t2i.parse_args(words)
    assert args.pretrained_model_name_or_path == str(spaced)
    assert args.dataset_name == str(tmp_path / "my out")
    assert (args.revision, args.variant, args.cache_dir) == ("main", None, str(tmp_path / "my cache"))
    assert (args.max_sequence_length, args.transformer_subfolder, args.rollout_start) == (16, "transformer_2", "noise")


def test_the_next_command_leaves_defaults_out(text_model, prompts, tmp_path, caplog):
    words = printed_command(caplog, text_model, prompts, tmp_path / "out", "--max_sequence_length", 512)
    flags = ["--pretrained_model_name_or_path", "--dataset_name", "--output_dir"]
    assert [word for word in words if word.startswith("--")] == flags


def test_flags_of_both_scripts_have_the_same_defaults():
    ours = vars(parse_args(embed_flags("model", "prompts", "out")[:-2]))
    training = vars(
        train_srpo_wan_t2i.parse_args(["--pretrained_model_name_or_path", "model", "--dataset_name", "dataset"])
    )
    shared = (*embed_prompts.BOUNDARY_SETTINGS, "max_sequence_length", "revision", "variant", "cache_dir")
    assert {name: ours[name] for name in shared} == {name: training[name] for name in shared}
    assert (ours["height"], ours["sampling_steps"], ours["rollout_scheduler"]) == (512, 10, "unipc")


@pytest.mark.parametrize("flag, code", [("--help", 0), ("--promts", 2)])
def test_help_and_wrong_flags_are_answered_without_the_imports_that_take_seconds(flag, code):
    run = run_command(sys.executable, "-X", "importtime", "embed_prompts.py", flag)
    assert run.returncode == code
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "diffusers", "datasets", "accelerate"}


def test_help_shows_every_default_once(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    defaults = parse_args(embed_flags("model", "prompts", "out")[:-2])
    flags = re.split(r"\n  --", text)[1:]
    assert len(flags) == len(vars(defaults))
    for flag in flags:
        name, shown = flag.split()[0], re.findall(r"[Dd]efault:\s+([^)]+)", flag)
        value = getattr(defaults, name)
        assert len(shown) <= 1
        if value not in (None, False) and name not in ("pretrained_model_name_or_path", "prompts", "output_dir"):
            assert "".join(shown[0].split()) == str(value)  # the help breaks its lines anywhere in Chinese
        assert "None" not in shown and "False" not in shown
