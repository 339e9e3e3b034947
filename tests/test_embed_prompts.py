"""What `embed_prompts.py` promises: the dataset it writes, and what it refuses before it loads or writes anything."""

import csv
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything that reads it is imported

import pytest
import torch
import yaml
from datasets import Dataset, concatenate_datasets, load_from_disk
from safetensors.torch import load_file, save_file
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from diffusers import WanPipeline

import embed_prompts
from embed_prompts import TEXT_ENCODER_LAYER, WAN_NEGATIVE_PROMPT, load_captions, main, parse_args, weights_fingerprint


SCRIPT = Path(embed_prompts.__file__)
MINIATURE = SCRIPT.parent / "tests" / "miniature"
CAPTIONS = ["a red cat", "a blue dog on a boat", "cat", "a boat", "a red boat on a cat"]
WORDS = ["a", "red", "blue", "cat", "dog", "boat", "on"]  # one token each; a prompt ends with one more, </s>
TEXT_DIM = 16


def make_model(folder, seed, vocab_size=10):
    """Save a random text encoder and a tokenizer of `WORDS` where WanPipeline looks for them, and no other part."""
    torch.manual_seed(seed)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    config = UMT5Config(vocab_size=vocab_size, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    text_encoder = UMT5EncoderModel(config)
    for parameter in text_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    text_encoder.save_pretrained(folder / "text_encoder")
    T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(folder / "tokenizer")
    parts = {
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **parts}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture
def model_copy(model, tmp_path_factory):
    """A copy of the model, to be spoiled."""
    return Path(shutil.copytree(model, tmp_path_factory.mktemp("copy") / "model"))


def edit_weights(model, change):
    file = model / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def save_shards(model):
    """Saves the weights of the text encoder in several files instead of one; returns those files."""
    text_encoder = UMT5EncoderModel.from_pretrained(model / "text_encoder")
    (model / "text_encoder" / "model.safetensors").unlink()
    text_encoder.save_pretrained(model / "text_encoder", max_shard_size="2KB")
    return sorted((model / "text_encoder").glob("model-*.safetensors"))


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(CAPTIONS) + "\n")
    return file


def arguments(model, prompts, output_dir, *flags):
    """The command line, with a short --max_sequence_length to be quick unless `flags` say otherwise."""
    paths = ["--pretrained_model_name_or_path", model, "--prompts", prompts, "--output_dir", output_dir]
    return [str(argument) for argument in [*paths, "--max_sequence_length", 16, *flags]]


def embed(model, prompts, output_dir, *flags):
    """Run the script in this process; return the dataset."""
    main(parse_args(arguments(model, prompts, output_dir, *flags)))
    return load_from_disk(output_dir)


def refusal(model, prompts, output_dir, *flags):
    """Run the script on something it must refuse; return its message after checking that it wrote nothing."""
    before = sorted(output_dir.parent.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        embed(model, prompts, output_dir, *flags)
    assert sorted(output_dir.parent.rglob("*")) == before
    assert isinstance(exit_.value.code, str), "a message makes Python exit with 1"
    assert "\n" not in exit_.value.code
    assert exit_.value.code.startswith("error: ")
    return exit_.value.code.removeprefix("error: ")


def bfloat16(row):
    return torch.tensor(row["prompt_embeds"], dtype=torch.int16).view(torch.bfloat16)


def read(prompts, *flags):
    """The captions and the number of duplicates that the script reads from a file or a dataset."""
    args = parse_args(arguments("model", prompts, "out", *flags))
    return load_captions("prompts", args.prompts, args.caption_column, args.dataset_split, args.cache_dir)


# What is read.


def write_captions(file, column="caption"):
    rows = [{column: caption} for caption in CAPTIONS]
    if file.suffix.lower() in (".yaml", ".yml"):
        file.write_text(yaml.safe_dump({"prompts": CAPTIONS}))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8-sig") as stream:  # as a spreadsheet saves it
            writer = csv.DictWriter(stream, [column])
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".YAML", ".json", ".jsonl", ".csv", ".parquet"])
def test_every_file_form_gives_the_captions_in_their_order(tmp_path, suffix):
    write_captions(tmp_path / f"prompts{suffix}")
    assert read(tmp_path / f"prompts{suffix}", "--cache_dir", tmp_path) == (CAPTIONS, 0)


def test_a_text_file_holds_one_caption_per_line(prompts):
    assert read(prompts) == (CAPTIONS, 0)


def test_a_json_file_may_hold_plain_texts(tmp_path):
    (tmp_path / "prompts.json").write_text('["a cat", {"caption": "a dog"}]')
    assert read(tmp_path / "prompts.json") == (["a cat", "a dog"], 0)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_caption_column_names_the_key_or_column(tmp_path, suffix):
    write_captions(tmp_path / f"prompts{suffix}", column="text")
    assert read(tmp_path / f"prompts{suffix}", "--caption_column", "text", "--cache_dir", tmp_path) == (CAPTIONS, 0)


def test_a_dataset_is_read_by_split_and_column(tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": ["a cat"]}).to_parquet(tmp_path / "data" / "train.parquet")
    Dataset.from_dict({"text": ["a dog"]}).to_parquet(tmp_path / "data" / "test.parquet")
    flags = ["--caption_column", "text", "--dataset_split", "test", "--cache_dir", tmp_path / "cache"]
    assert read(tmp_path / "data", *flags) == (["a dog"], 0)
    assert (tmp_path / "cache").is_dir()


# What is written.


def test_embeddings_are_those_of_wan_pipeline_bit_for_bit(model, prompts, tmp_path):
    train = embed(model, prompts, tmp_path / "out", "--max_sequence_length", "512")["train"]
    pipe = WanPipeline.from_pretrained(
        model, transformer=None, transformer_2=None, vae=None, scheduler=None, dtype=torch.bfloat16
    )
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=512)
    for row, embeds in zip(train, expected, strict=True):
        padding = torch.zeros(512 - len(row["prompt_embeds"]), TEXT_DIM, dtype=torch.bfloat16)
        assert torch.equal(torch.cat([bfloat16(row), padding]), embeds)


def test_only_the_real_tokens_are_stored(model, prompts, tmp_path):
    train = embed(model, prompts, tmp_path / "out")["train"]
    assert [len(row["prompt_embeds"]) for row in train] == [4, 7, 2, 3, 7]  # words and </s>


def test_dtype_fp32_runs_the_text_encoder_in_float32(model, prompts, tmp_path):
    train = embed(model, prompts, tmp_path / "out", "--dtype", "fp32")["train"]
    pipe = WanPipeline.from_pretrained(model, transformer=None, transformer_2=None, vae=None, scheduler=None)
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(CAPTIONS[0], do_classifier_free_guidance=False, max_sequence_length=16)
    assert expected.dtype == torch.float32
    assert torch.equal(bfloat16(train[0]), expected[0, :4].bfloat16())


def test_two_processes_write_the_same_dataset_as_one(model, prompts, tmp_path):
    flags = ["--batch_size", "2", "--validation_prompts", "a dog", "a cat"]
    one = embed(model, prompts, tmp_path / "one", *flags)
    # `--cpu --num_processes 2` would start one process unless there is MPI; this way there are two, on the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    script = [str(SCRIPT), *arguments(model, prompts, tmp_path / "two", *flags)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *script], check=True, env=environment, capture_output=True, text=True)
    assert "Num processes = 2" in done.stderr
    two = load_from_disk(tmp_path / "two")
    assert two["train"]["caption"] == CAPTIONS
    assert two["train"].to_dict() == one["train"].to_dict()
    assert two["negative"].to_dict() == one["negative"].to_dict()
    assert two["validation"].to_dict() == one["validation"].to_dict()


def test_the_batch_size_does_not_change_the_rows(model, prompts, tmp_path):
    one = embed(model, prompts, tmp_path / "one", "--batch_size", "1")
    three = embed(model, prompts, tmp_path / "three", "--batch_size", "3")
    assert one["train"]["caption"] == three["train"]["caption"] == CAPTIONS
    for row, other in zip(one["train"], three["train"], strict=True):
        torch.testing.assert_close(bfloat16(row), bfloat16(other))


def test_the_negative_split_holds_wans_own_negative_prompt(model, prompts, tmp_path):
    negative = embed(model, prompts, tmp_path / "out")["negative"]
    assert negative["caption"] == [WAN_NEGATIVE_PROMPT]
    assert WAN_NEGATIVE_PROMPT.startswith("色调艳丽，过曝，") and len(WAN_NEGATIVE_PROMPT) == 137


def test_negative_prompt_is_embedded_like_a_caption(model, prompts, tmp_path):
    dataset = embed(model, prompts, tmp_path / "out", "--negative_prompt", "a red cat", "--batch_size", "1")
    assert dataset["negative"]["caption"] == ["a red cat"]
    assert dataset["negative"][0] == dataset["train"][0]


def test_every_row_says_what_made_it(model, prompts, tmp_path):
    dataset = embed(model, prompts, tmp_path / "out", "--revision", "main")
    weight = UMT5EncoderModel.from_pretrained(model / "text_encoder").encoder.final_layer_norm.weight
    for split in ("train", "negative"):
        assert set(dataset[split]["text_encoder"]) == {f"{model}@main"}
        assert set(dataset[split]["text_encoder_fingerprint"]) == {sha256(weight.detach())}
        assert set(dataset[split]["max_sequence_length"]) == {16}


def test_variant_chooses_the_weight_files(model, prompts, tmp_path):
    variant = Path(shutil.copytree(model, tmp_path / "variant"))
    (variant / "text_encoder/model.safetensors").rename(variant / "text_encoder/model.fp16.safetensors")
    assert len(embed(variant, prompts, tmp_path / "out", "--variant", "fp16")["train"]) == 5


def test_the_format_that_the_documentation_gives_reads_an_embedding(model, prompts, tmp_path):
    dataset = embed(model, prompts, tmp_path / "out")
    row = dataset["train"].with_format("torch")[1]
    prompt_embeds = row["prompt_embeds"].to(torch.int16).view(torch.bfloat16)
    assert prompt_embeds.shape == (7, 16)
    assert torch.equal(prompt_embeds, bfloat16(dataset["train"][1]))
    assert "prompt_embeds" in (tmp_path / "out" / "README.md").read_text()


def test_the_columns_survive_parquet_concatenation_and_filter(model, prompts, tmp_path):
    train = embed(model, prompts, tmp_path / "out")["train"]
    train.to_parquet(tmp_path / "train.parquet")
    read = Dataset.from_parquet(str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    assert read.features == train.features
    assert read.to_dict() == train.to_dict()
    both = concatenate_datasets([read, train]).filter(lambda row: row["caption"] == "cat")
    assert both.features == train.features
    assert both[0] == both[1] == train[2]


def test_duplicates_are_dropped_and_counted(model, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n a cat \na boat\na dog\n")
    with caplog.at_level(logging.INFO):
        dataset = embed(model, tmp_path / "prompts.txt", tmp_path / "out")
    assert dataset["train"]["caption"] == ["a cat", "a dog", "a boat"]
    assert "Num captions = 3 (2 duplicates dropped)" in caplog.text


def test_long_captions_are_truncated_as_wan_pipeline_does_and_counted(model, prompts, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train = embed(model, prompts, tmp_path / "out", "--max_sequence_length", "4")["train"]
    assert [len(row["prompt_embeds"]) for row in train] == [4, 4, 2, 3, 4]
    assert "2 of 6 prompts (all splits), such as 'a blue dog on a boat', will be truncated" in caplog.text
    assert "Num truncated = 2" in caplog.text


def test_the_last_message_says_where_the_dataset_is_and_what_comes_next(model, prompts, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        embed(model, prompts, tmp_path / "out")
    assert re.search(rf"Dataset = {tmp_path}/out \(\d+\.\d\d MB\)", caplog.text)
    assert f"--pretrained_model_name_or_path {model} --dataset_name {tmp_path}/out" in caplog.text


def test_nothing_else_is_left_behind(model, prompts, tmp_path):
    (tmp_path / "out.partial" / "train").mkdir(parents=True)  # of an interrupted run
    (tmp_path / "out.partial" / "train" / "0.arrow").write_text("half a file")
    assert len(embed(model, prompts, tmp_path / "out")["train"]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.txt"]


def test_overwrite_output_dir_replaces_the_dataset(model, prompts, tmp_path):
    embed(model, prompts, tmp_path / "out")
    prompts.write_text("a dog\n")
    assert embed(model, prompts, tmp_path / "out", "--overwrite_output_dir")["train"]["caption"] == ["a dog"]


def test_a_run_that_breaks_leaves_the_old_dataset_whole(model, model_copy, prompts, tmp_path):
    embed(model, prompts, tmp_path / "out")
    edit_weights(model_copy, lambda weights: weights["shared.weight"][WORDS.index("dog") + 3].fill_(float("nan")))
    with pytest.raises(SystemExit) as exit_:
        embed(model_copy, prompts, tmp_path / "out", "--overwrite_output_dir", "--batch_size", 5)
    message = "error: The text encoder makes NaN or infinite numbers of 'a blue dog on a boat'. Check its weights."
    assert exit_.value.code == message
    assert load_from_disk(tmp_path / "out")["train"]["caption"] == CAPTIONS


# What `--validation_prompts` adds.


def write_lines(file, *lines):
    file.write_text("\n".join(lines))
    return file


def test_validation_prompts_are_a_third_split_of_the_same_columns(model, prompts, tmp_path):
    dataset = embed(model, prompts, tmp_path / "out", "--validation_prompts", "a dog", "a red cat")
    assert list(dataset) == ["train", "negative", "validation"]
    assert dataset["validation"]["caption"] == ["a dog", "a red cat"]
    assert dataset["validation"].features == dataset["train"].features == dataset["negative"].features
    same, columns = dataset["train"][0], dataset["validation"].column_names
    assert same["caption"] == "a red cat"
    torch.testing.assert_close(bfloat16(dataset["validation"][1]), bfloat16(same))
    assert all(dataset["validation"][1][name] == same[name] for name in columns if name != "prompt_embeds")


def test_without_the_flag_there_is_no_validation_split(model, prompts, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert list(embed(model, prompts, tmp_path / "out")) == ["train", "negative"]
    assert "validation" not in (tmp_path / "out" / "README.md").read_text()
    assert "validation" not in caplog.text


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".jsonl", ".csv", ".parquet"])
def test_validation_prompts_may_be_a_file_of_any_form(model, tmp_path, suffix):
    write_captions(tmp_path / f"validation{suffix}", column="text")
    flags = ["--caption_column", "text", "--cache_dir", tmp_path / "cache"]
    train = write_lines(tmp_path / "prompts.txt", "a dog")
    dataset = embed(model, train, tmp_path / "out", *flags, "--validation_prompts", tmp_path / f"validation{suffix}")
    assert dataset["train"]["caption"] == ["a dog"]
    assert dataset["validation"]["caption"] == CAPTIONS


def test_one_validation_prompt_that_is_no_file_is_a_prompt(model, prompts, tmp_path):
    dataset = embed(model, prompts, tmp_path / "out", "--validation_prompts", "a cat, on a boat.")
    assert dataset["validation"]["caption"] == ["a cat, on a boat."]


def test_duplicates_of_validation_prompts_are_dropped_and_counted(model, prompts, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        dataset = embed(model, prompts, tmp_path / "out", "--validation_prompts", "a dog", " a dog ", "a cat")
    assert dataset["validation"]["caption"] == ["a dog", "a cat"]
    assert "Num captions = 5 (0 duplicates dropped)" in caplog.text
    assert "Num validation prompts = 2 (1 duplicates dropped)" in caplog.text


def test_the_card_counts_the_prompts_of_each_split(model, prompts, tmp_path):
    embed(model, prompts, tmp_path / "out", "--validation_prompts", "a dog", "a cat")
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert (
        "5 captions (split `train`), 1 negative prompt (split `negative`), 2 validation prompts (split `validation`)"
        in card
    )


def test_blank_validation_prompts_are_refused(model, prompts, tmp_path):
    error = refusal(model, prompts, tmp_path / "out", "--validation_prompts", "a cat", " ")
    assert error == "`--validation_prompts`: prompt 2 is blank; write a caption or remove it."


def test_a_bad_file_of_validation_prompts_is_refused_by_its_place(model, prompts, tmp_path):
    file = write_lines(tmp_path / "validation.txt", "a cat", "", "a dog")
    error = refusal(model, prompts, tmp_path / "out", "--validation_prompts", file)
    assert error == f"`--validation_prompts {file}`: line 2 is blank; write a caption or remove it."
    error = refusal(model, prompts, tmp_path / "out", "--validation_prompts", tmp_path / "none.txt")
    assert error == f"`--validation_prompts {tmp_path}/none.txt`: there is no such file."


@pytest.mark.parametrize("name", ["validation.txt", "validation.tsv"])
def test_a_file_among_validation_prompts_is_refused(model, prompts, tmp_path, name):
    file = write_lines(tmp_path / name, "a cat")
    error = refusal(model, prompts, tmp_path / "out", "--validation_prompts", "a dog", file)
    assert error == f"`--validation_prompts`: `{file}` is a file; name one file and nothing else, or prompts."


def test_a_file_of_validation_prompts_of_an_unknown_form_is_refused(model, prompts, tmp_path):
    file = write_lines(tmp_path / "validation.tsv", "a cat")
    error = refusal(
        model, prompts, tmp_path / "out", "--cache_dir", tmp_path.parent / "cache", "--validation_prompts", file
    )
    assert error.startswith(f"`--validation_prompts {file}`: not a .yaml, .yml, .json, .jsonl, .txt, .csv file, nor")


# The command that the last message gives.


def printed_command(caplog, model, prompts, output_dir, *flags):
    """The flags of the command after "Next:", once the launcher and the script are taken off."""
    with caplog.at_level(logging.INFO):
        embed(model, prompts, output_dir, *flags)
    (line,) = (message for message in caplog.messages if "Next: " in message)
    launcher, launch, script, *words = shlex.split(line.split("Next: ")[1])
    assert (launcher, launch, script) == ("accelerate", "launch", "train_srpo_wan_t2i.py")
    return words


def test_the_next_command_follows_the_flags_that_differ_from_the_defaults(
    model, model_copy, prompts, tmp_path, caplog
):
    from train_srpo_wan_t2i import parse_args as parse_training_args

    spaced = model_copy.rename(model_copy.with_name("my model"))
    flags = ["--revision", "main", "--cache_dir", tmp_path / "my cache"]
    words = printed_command(caplog, spaced, prompts, tmp_path / "my out", *flags)
    args = parse_training_args(words)
    assert args.pretrained_model_name_or_path == str(spaced)
    assert args.dataset_name == str(tmp_path / "my out")
    assert (args.revision, args.variant, args.cache_dir) == ("main", None, str(tmp_path / "my cache"))
    assert (args.max_sequence_length, args.transformer_subfolder, args.rollout_start) == (16, "transformer_2", "noise")


def test_the_next_command_leaves_defaults_out(model, prompts, tmp_path, caplog):
    words = printed_command(caplog, model, prompts, tmp_path / "out", "--max_sequence_length", 512)
    flags = ["--pretrained_model_name_or_path", "--dataset_name", "--output_dir"]
    assert [word for word in words if word.startswith("--")] == flags


def test_flags_of_both_scripts_have_the_same_defaults():
    from train_srpo_wan_t2i import parse_args as parse_training_args

    ours = vars(parse_args(arguments("model", "prompts", "out")[:-2]))
    training = vars(parse_training_args(["--pretrained_model_name_or_path", "model", "--dataset_name", "dataset"]))
    shared = (*embed_prompts.BOUNDARY_SETTINGS, "max_sequence_length", "revision", "variant", "cache_dir")
    assert {name: ours[name] for name in shared} == {name: training[name] for name in shared}
    assert (ours["height"], ours["sampling_steps"], ours["rollout_scheduler"]) == (512, 10, "unipc")


# The help.


@pytest.mark.parametrize("flag, code", [("--help", 0), ("--promts", 2)])
def test_help_and_wrong_flags_are_answered_without_the_imports_that_take_seconds(flag, code):
    command = [sys.executable, "-X", "importtime", str(SCRIPT), flag]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == code
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "diffusers", "datasets", "accelerate"}


def test_help_shows_every_default_once(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    defaults = parse_args(arguments("model", "prompts", "out")[:-2])
    flags = re.split(r"\n  --", text)[1:]
    assert len(flags) == len(vars(defaults))
    for flag in flags:
        name, shown = flag.split()[0], re.findall(r"[Dd]efault:\s+([^)]+)", flag)
        value = getattr(defaults, name)
        assert len(shown) <= 1
        if value not in (None, False) and name not in ("pretrained_model_name_or_path", "prompts", "output_dir"):
            assert "".join(shown[0].split()) == str(value)  # the help breaks its lines anywhere in Chinese
        assert "None" not in shown and "False" not in shown


# The fingerprint of the text encoder.


def sha256(weight):
    return hashlib.sha256(weight.to(torch.bfloat16).view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def fingerprint(model):
    return weights_fingerprint({"pretrained_model_name_or_path": model}, "text_encoder", "model", TEXT_ENCODER_LAYER)


def save_layer(folder, values, dtype=torch.float32):
    (folder / "text_encoder").mkdir(parents=True)
    save_file({TEXT_ENCODER_LAYER: torch.tensor(values, dtype=dtype)}, folder / "text_encoder" / "model.safetensors")
    return folder


def test_the_fingerprint_of_known_weights(tmp_path):
    expected = hashlib.sha256(b"\x80\x3f\x00\xc0\x00\x3f").hexdigest()[:16]  # bfloat16: 3f80 c000 3f00, little-endian
    assert fingerprint(save_layer(tmp_path, [1.0, -2.0, 0.5])) == expected


def test_the_fingerprint_of_the_miniature_is_the_one_of_datasets_made_before():
    assert fingerprint(MINIATURE / "model") == "e06122bacaaf3878"


def test_the_fingerprint_does_not_depend_on_the_dtype(tmp_path):
    half = save_layer(tmp_path / "half", [1.0, -2.0, 0.1], torch.bfloat16)
    weights = load_file(half / "text_encoder" / "model.safetensors")[TEXT_ENCODER_LAYER].float().tolist()
    assert fingerprint(half) == fingerprint(save_layer(tmp_path / "full", weights))


def test_the_fingerprint_does_not_depend_on_the_files(model, model_copy):
    save_shards(model_copy)
    assert fingerprint(model_copy) == fingerprint(model)


def test_the_fingerprint_follows_the_weights_and_not_the_path(model, prompts, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    other = make_model(tmp_path / "other", seed=1)
    fingerprints = [
        embed(folder, prompts, tmp_path / f"out{i}")["negative"]["text_encoder_fingerprint"][0]
        for i, folder in enumerate([model, copy, other])
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_model_in_the_cache_of_the_hub_is_read_without_network(prompts, tmp_path, tmp_path_factory):
    repository = tmp_path_factory.mktemp("cache") / "models--me--wan"
    make_model((repository / "snapshots" / "0123abc"), seed=0)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    train = embed("me/wan", prompts, tmp_path / "out", "--cache_dir", repository.parent)["train"]
    assert train["caption"] == CAPTIONS
    assert set(train["text_encoder"]) == {"me/wan"}


# What is refused.


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", "", "the file is empty."),
        ("p.txt", "\n \n", "the file is empty."),
        ("p.txt", "a cat\n\na dog\n", "line 2 is blank; write a caption or remove it."),
        ("p.txt", b"a cat\n\xff", "'utf-8' codec can't decode"),
        (
            "p.txt",
            "a cat".encode("utf-16"),
            "the file is not text in UTF-8, save it as UTF-8: 'utf-8' codec can't decode",
        ),
        ("p.txt", "a cat\n\u200b\x07\n", "line 2 is blank; write a caption or remove it."),
        ("p.yaml", "captions: [a cat]", "expected a list under the key `prompts`"),
        ("p.yaml", "prompts: a cat", "expected a list under the key `prompts`"),
        ("p.yaml", "prompts: [a cat]\nprompts: [a dog]", "the key `prompts` is there twice; join the two lists."),
        ("p.yaml", "prompts: []", "there are no captions in it."),
        ("p.yaml", "prompts: [a cat, 2]", "prompts[1] is not a text but 2; write it in quotes or remove it."),
        ("p.yaml", "prompts: [a cat, '  ']", "prompts[1] is blank; write a caption or remove it."),
        ("p.yaml", "prompts:\n- a cat\n- [", "line 3, column 4"),
        ("p.json", '{"caption": "a cat"}', "expected a list of objects"),
        ("p.json", '[{"caption": "a cat"}, {"text": "a dog"}]', "item 1 has no `caption`; name"),
        ("p.json", '[["a cat"]]', "item 0 has no `caption`; name the key or column with `--caption_column`."),
        ("p.json", '[{"caption": null}]', "item 0 is not a text but None; write it in quotes or remove it."),
        ("p.json", "[{", "line 1 column 3"),
        ("p.jsonl", '{"caption": "a cat"}\n{"caption"}\n', "line 2 is not JSON"),
        ("p.jsonl", '{"caption": "a cat"}\n{"caption": ""}\n', "line 2 is blank; write a caption or remove it."),
        ("p.jsonl", '{"caption": "a cat"}\n{"text": "a dog"}\n', "line 2 has no `caption`"),
        ("p.csv", "text\na cat\n", "line 2 has no `caption`; name the key or column with `--caption_column`."),
        ("p.csv", "caption,id\na cat,1\n,2\n", "line 3 is blank; write a caption or remove it."),
        ("p.csv", "caption\na cat\na cat, with a hat\n", "line 3 has more cells than columns; put captions"),
        ("p.csv", "caption\n", "there are no captions in it."),
        ("p.parquet", "not parquet", "nor a dataset with such `--dataset_split` and `--caption_column`: "),
        ("p.png", "not text", "not a .yaml, .yml, .json, .jsonl, .txt, .csv file, nor a dataset"),
    ],
)
def test_a_bad_prompts_file_is_refused_by_its_place(model, tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refusal(model, file, tmp_path / "out", "--cache_dir", tmp_path.parent / "cache")
    assert error.startswith(f"`--prompts {file}`: ")
    assert message in error


def test_a_column_that_a_dataset_does_not_have_is_refused(model, tmp_path):
    Dataset.from_dict({"text": ["a cat"]}).to_parquet(tmp_path / "prompts.parquet")
    error = refusal(model, tmp_path / "prompts.parquet", tmp_path / "out", "--cache_dir", tmp_path.parent / "cache")
    assert "`--caption_column`" in error and "Current columns in the dataset: ['text']" in error


def test_a_missing_prompts_file_is_refused(model, tmp_path):
    error = refusal(model, tmp_path / "none.txt", tmp_path / "out")
    assert error == f"`--prompts {tmp_path}/none.txt`: there is no such file."


def test_an_unknown_dataset_is_refused(model, tmp_path):
    assert refusal(model, "someone/something", tmp_path / "out").startswith("`--prompts someone/something`: not a")


@pytest.mark.parametrize("flag", ["--max_sequence_length", "--batch_size"])
def test_a_count_below_one_is_refused(model, prompts, tmp_path, flag):
    assert refusal(model, prompts, tmp_path / "out", flag, "0") == f"`{flag}` must be at least 1, but is 0."


def test_an_output_dir_with_something_in_it_is_refused(model, prompts, tmp_path):
    error = refusal(model, prompts, tmp_path)
    assert error == f"`--output_dir {tmp_path}` is not empty; choose another or `--overwrite_output_dir`."


def test_overwrite_output_dir_spares_a_folder_that_is_not_a_dataset(model, prompts, tmp_path):
    error = refusal(model, prompts, tmp_path, "--overwrite_output_dir")
    assert error == f"`--output_dir {tmp_path}` holds no dataset to overwrite; choose another."


def test_an_output_dir_that_is_a_file_is_refused(model, prompts):
    assert refusal(model, prompts, prompts) == f"`--output_dir {prompts}` is a file; choose a folder."


def test_what_is_not_a_text_is_shown_in_short(model, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([{"caption": list(range(10**5))}]))
    assert len(refusal(model, tmp_path / "p.json", tmp_path / "out")) < 1000


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--rollout_shift nan", "`--rollout_shift` must be positive and finite, but is nan."),
        ("--rollout_shift inf", "`--rollout_shift` must be positive and finite, but is inf."),
        ("--boundary_guidance_scale nan", "`--boundary_guidance_scale` must be finite, but is nan."),
        ("--seed -1", "`--seed` must be at least 0 and of 63 bits, but is -1."),
        (f"--seed {2**63 - 1}", f"`--seed` must be at least 0 and of 63 bits, but is {2**63 - 1}."),
    ],
)
def test_numbers_without_meaning_are_refused(model, prompts, tmp_path, flags, message):
    assert refusal(model, prompts, tmp_path / "out", "--boundary_latents", 1, *flags.split()) == message


@pytest.mark.parametrize(
    "flags",
    ["--height 256", "--width 256", "--sampling_steps 9", "--rollout_scheduler euler", "--rollout_shift 5"]
    + ["--boundary_guidance_scale 1", "--seed 1", "--group_offload"],
)
def test_flags_of_boundary_latents_without_them_are_refused(model, prompts, tmp_path, flags):
    error = refusal(model, prompts, tmp_path / "out", *flags.split())
    assert error == f"`{flags.split()[0]}` needs `--boundary_latents`; embeddings do not depend on it."


def test_overwrite_output_dir_spares_files_that_are_not_of_a_dataset(model, prompts, tmp_path):
    embed(model, prompts, tmp_path / "out")
    file = write_lines(tmp_path / "out" / "prompts.txt", "a cat")
    error = refusal(model, file, tmp_path / "out", "--overwrite_output_dir")
    assert error == f"`--output_dir {tmp_path}/out` would delete `{file}`; move it, or choose another folder."


@pytest.mark.parametrize("name", ["notes.txt", "replaced"])
def test_what_is_not_of_an_interrupted_run_is_spared_beside_the_output_dir(model, prompts, tmp_path, name):
    """`replaced` holds the old dataset for the moment in which the new one takes its place."""
    (tmp_path / "out.partial").mkdir()
    file = write_lines(tmp_path / "out.partial" / name, "mine")
    error = refusal(model, prompts, tmp_path / "out")
    assert error == f"`--output_dir {tmp_path}/out` would delete `{file}`; move it, or choose another folder."


def test_a_link_to_a_folder_stays_a_link(model, prompts, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert len(embed(model, prompts, tmp_path / "out")["train"]) == 5
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "dataset_dict.json").is_file()


def test_a_mount_point_is_refused(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    error = refusal(model, prompts, tmp_path / "out")
    assert error == f"`--output_dir {tmp_path}/out` is a mount point, which cannot be replaced; choose a folder in it."


def test_an_output_dir_that_cannot_be_made_is_refused(model, prompts, tmp_path):
    error = refusal(model, prompts, tmp_path / ("x" * 300))
    assert error.startswith(f"`--output_dir {tmp_path}/{'x' * 300}` ")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def test_a_text_encoder_that_lacks_a_tensor_is_refused(model_copy, prompts, tmp_path):
    edit_weights(model_copy, lambda weights: weights.pop("encoder.block.1.layer.0.SelfAttention.q.weight"))
    assert refusal(model_copy, prompts, tmp_path / "out") == (
        f"`--pretrained_model_name_or_path {model_copy}` has no whole model in `text_encoder`: the weights lack 1 "
        "tensors, such as `encoder.block.1.layer.0.SelfAttention.q.weight`"
    )


def test_a_text_encoder_with_a_tensor_of_another_shape_is_refused(model_copy, prompts, tmp_path):
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    edit_weights(model_copy, lambda weights: weights.update({name: weights[name][:, :-1].contiguous()}))
    error = refusal(model_copy, prompts, tmp_path / "out")
    assert error.endswith(f"`text_encoder`: the weights have other shapes of 1 tensors, such as `{name}`")


def test_a_text_encoder_whose_tensors_have_another_prefix_is_refused(model_copy, prompts, tmp_path):
    def rename(weights):
        for name in list(weights):
            weights[f"model.{name}"] = weights.pop(name)

    edit_weights(model_copy, rename)
    error = refusal(model_copy, prompts, tmp_path / "out")
    assert re.search(r"`text_encoder`: the weights lack \d+ tensors, such as `encoder\.", error)


def test_a_truncated_text_encoder_is_refused(model_copy, prompts, tmp_path):
    file = model_copy / "text_encoder" / "model.safetensors"
    truncate(file)
    error = refusal(model_copy, prompts, tmp_path / "out")
    assert f"`text_encoder`: `{file}` is not a whole safetensors file: " in error


@pytest.mark.parametrize("spoil", [Path.unlink, truncate])
def test_a_text_encoder_without_one_of_its_files_is_refused(model_copy, prompts, tmp_path, spoil):
    file = save_shards(model_copy)[1]
    spoil(file)
    error = refusal(model_copy, prompts, tmp_path / "out")
    assert error.startswith(f"`--pretrained_model_name_or_path {model_copy}`") and file.name in error


def test_a_text_encoder_in_several_files_is_read(model, model_copy, prompts, tmp_path):
    assert len(save_shards(model_copy)) > 2
    one, several = embed(model, prompts, tmp_path / "one"), embed(model_copy, prompts, tmp_path / "several")
    assert one["train"]["prompt_embeds"] == several["train"]["prompt_embeds"]


@pytest.mark.parametrize("content", [None, "", '{"version": "1.0"}'])
def test_a_tokenizer_whose_file_is_missing_or_broken_is_refused(model_copy, prompts, tmp_path, content):
    file = model_copy / "tokenizer" / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    error = refusal(model_copy, prompts, tmp_path / "out")
    assert error.startswith(f"`--pretrained_model_name_or_path {model_copy}` has no tokenizer in `tokenizer`: ")
    if content is None:
        assert error.endswith(": neither tokenizer.json nor spiece.model is there.")


def test_a_tokenizer_that_does_not_tell_prompts_apart_is_refused(model, tmp_path):
    file = write_lines(tmp_path / "prompts.txt", "a cat", "a red zebra", "a red lion")
    error = refusal(model, file, tmp_path / "out")
    assert error.startswith(f"`--pretrained_model_name_or_path {model}`, `tokenizer`: ")
    assert "the same tokens of 'a red zebra' and 'a red lion'" in error


def test_prompts_that_differ_in_white_space_only_may_have_the_same_tokens(model, tmp_path):
    file = write_lines(tmp_path / "prompts.txt", "a  cat", "a cat")
    assert embed(model, file, tmp_path / "out")["train"]["caption"] == ["a  cat", "a cat"]


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_refused(prompts, tmp_path, tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("few"), seed=0, vocab_size=4)
    error = refusal(model, prompts, tmp_path / "out")
    assert error.endswith("`tokenizer`: it makes token 6 of 'a red cat', but the text encoder has 4.")


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_model_folder_without_a_part_is_refused(model, prompts, tmp_path, part):
    half = Path(shutil.copytree(model, tmp_path / "half"))
    shutil.rmtree(half / part)
    error = refusal(half, prompts, tmp_path / "out")
    assert error == f"`--pretrained_model_name_or_path {half}` is a folder without {part}."


def test_a_model_that_does_not_exist_is_refused(prompts, tmp_path):
    error = refusal(tmp_path / "none", prompts, tmp_path / "out")
    problem = "is not a Wan pipeline in the layout of diffusers: "
    assert error.startswith(f"`--pretrained_model_name_or_path {tmp_path}/none` {problem}")


def test_the_command_exits_with_1_and_one_line(model, tmp_path):
    script = [sys.executable, str(SCRIPT)]
    run = subprocess.run(
        [*script, *arguments(model, tmp_path / "none.txt", tmp_path / "out")], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == f"error: `--prompts {tmp_path}/none.txt`: there is no such file."
    assert "Traceback" not in run.stderr


# The Hub.


def test_push_to_hub_without_a_token_is_refused(model, prompts, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    error = refusal(model, prompts, tmp_path / "out", "--push_to_hub")
    assert error == "`--push_to_hub` needs a token: run `hf auth login`, set HF_TOKEN or pass `--hub_token`."


@pytest.mark.parametrize("flags, name", [(["--hub_dataset_id", "me/my captions"], "out"), ([], "my out")])
def test_a_name_that_the_hub_does_not_take_is_refused(model, prompts, tmp_path, flags, name):
    error = refusal(model, prompts, tmp_path / name, "--push_to_hub", "--hub_token", "hf_x", *flags)
    assert error.startswith("`--hub_dataset_id`, by default the name of `--output_dir`, cannot name a dataset: ")


def test_a_failed_upload_leaves_the_dataset_and_says_how_to_upload_it(model, prompts, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    flags = ["--push_to_hub", "--hub_token", "hf_x", "--hub_dataset_id", "someone/captions", "--hub_private_repo"]
    with pytest.raises(SystemExit) as exit_:  # HF_HUB_OFFLINE
        embed(model, prompts, tmp_path / "out", *flags)
    retry = f"datasets.load_from_disk('{tmp_path}/out').push_to_hub('someone/captions', private=True)"
    assert exit_.value.code.startswith("error: `--push_to_hub` failed.")
    assert f'upload it with `python -c "import datasets; {retry}"`. The cause: ' in exit_.value.code
    assert "\n" not in exit_.value.code
    assert waited == [1, 2, 4, 8]
    assert load_from_disk(tmp_path / "out")["train"]["caption"] == CAPTIONS
