"""What `embed_prompts.py` promises: the dataset it writes, and what it refuses before it loads or writes anything."""

import csv
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything that reads it is imported

import pytest
import torch
import yaml
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from diffusers import WanPipeline

from embed_prompts import WAN_NEGATIVE_PROMPT, load_captions, main, parse_args, text_encoder_fingerprint


SCRIPT = Path(__file__).parent.parent / "embed_prompts.py"
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
    return exit_.value.code


def bfloat16(row):
    return torch.tensor(row["prompt_embeds"], dtype=torch.int16).view(torch.bfloat16)


# What is read.


def write_captions(file, column="caption"):
    rows = [{column: caption} for caption in CAPTIONS]
    if file.suffix in (".yaml", ".yml"):
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


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".jsonl", ".csv", ".parquet"])
def test_every_file_form_gives_the_captions_in_their_order(tmp_path, suffix):
    write_captions(tmp_path / f"prompts{suffix}")
    args = parse_args(arguments("model", tmp_path / f"prompts{suffix}", "out", "--cache_dir", tmp_path))
    assert load_captions(args) == (CAPTIONS, 0)


def test_a_text_file_holds_one_caption_per_line(prompts):
    assert load_captions(parse_args(arguments("model", prompts, "out"))) == (CAPTIONS, 0)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_caption_column_names_the_key_or_column(tmp_path, suffix):
    write_captions(tmp_path / f"prompts{suffix}", column="text")
    flags = ["--caption_column", "text", "--cache_dir", tmp_path]
    args = parse_args(arguments("model", tmp_path / f"prompts{suffix}", "out", *flags))
    assert load_captions(args) == (CAPTIONS, 0)


def test_a_dataset_is_read_by_split_and_column(tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": ["a cat"]}).to_parquet(tmp_path / "data" / "train.parquet")
    Dataset.from_dict({"text": ["a dog"]}).to_parquet(tmp_path / "data" / "test.parquet")
    flags = ["--caption_column", "text", "--dataset_split", "test", "--cache_dir", tmp_path / "cache"]
    assert load_captions(parse_args(arguments("model", tmp_path / "data", "out", *flags))) == (["a dog"], 0)
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
    flags = ["--batch_size", "2"]
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
        assert set(dataset[split]["text_encoder_fingerprint"]) == {text_encoder_fingerprint(weight)}
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
    assert "2 of 6 prompts (the negative one included) will be truncated" in caplog.text
    assert "Num truncated = 2" in caplog.text


def test_the_last_message_says_where_the_dataset_is_and_what_comes_next(model, prompts, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        embed(model, prompts, tmp_path / "out")
    assert re.search(rf"Dataset = {tmp_path}/out \(\d+\.\d MB\)", caplog.text)
    assert f"--pretrained_model_name_or_path {model} --dataset_name {tmp_path}/out" in caplog.text


def test_nothing_else_is_left_behind(model, prompts, tmp_path):
    (tmp_path / "out.partial").mkdir()  # of an interrupted run
    (tmp_path / "out.partial" / "0.arrow").write_text("half a file")
    assert len(embed(model, prompts, tmp_path / "out")["train"]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.txt"]


def test_overwrite_output_dir_replaces_the_dataset(model, prompts, tmp_path):
    embed(model, prompts, tmp_path / "out")
    prompts.write_text("a dog\n")
    assert embed(model, prompts, tmp_path / "out", "--overwrite_output_dir")["train"]["caption"] == ["a dog"]


def test_a_run_that_breaks_leaves_the_old_dataset_whole(model, prompts, tmp_path):
    embed(model, prompts, tmp_path / "out")
    broken = make_model(tmp_path / "broken", seed=0, vocab_size=4)  # fewer embeddings than the tokenizer has tokens
    with pytest.raises(IndexError):
        embed(broken, prompts, tmp_path / "out", "--overwrite_output_dir")
    assert load_from_disk(tmp_path / "out")["train"]["caption"] == CAPTIONS


# The fingerprint of the text encoder.


def test_the_fingerprint_of_known_weights():
    weight = torch.tensor([1.0, -2.0, 0.5])  # bfloat16: 3f80 c000 3f00, little-endian
    assert text_encoder_fingerprint(weight) == hashlib.sha256(b"\x80\x3f\x00\xc0\x00\x3f").hexdigest()[:16]


def test_the_fingerprint_does_not_depend_on_the_dtype():
    weight = torch.tensor([1.0, -2.0, 0.1]).bfloat16()
    assert text_encoder_fingerprint(weight) == text_encoder_fingerprint(weight.float())


def test_the_fingerprint_follows_the_weights_and_not_the_path(model, prompts, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    other = make_model(tmp_path / "other", seed=1)
    fingerprints = [
        embed(folder, prompts, tmp_path / f"out{i}")["negative"]["text_encoder_fingerprint"][0]
        for i, folder in enumerate([model, copy, other])
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


# What is refused.


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", "", "the file is empty."),
        ("p.txt", "\n \n", "the file is empty."),
        ("p.txt", "a cat\n\na dog\n", "line 2 is blank; write a caption or remove it."),
        ("p.txt", b"a cat\n\xff", "'utf-8' codec can't decode"),
        ("p.yaml", "captions: [a cat]", "expected a list under the key `prompts`"),
        ("p.yaml", "prompts: a cat", "expected a list under the key `prompts`"),
        ("p.yaml", "prompts: []", "there are no captions in it."),
        ("p.yaml", "prompts: [a cat, 2]", "prompts[1] is not a text but 2; write it in quotes or remove it."),
        ("p.yaml", "prompts: [a cat, '  ']", "prompts[1] is blank; write a caption or remove it."),
        ("p.yaml", "prompts:\n- a cat\n- [", "line 3, column 4"),
        ("p.json", '{"caption": "a cat"}', "expected a list of objects"),
        ("p.json", '[{"caption": "a cat"}, {"text": "a dog"}]', "item 1 has no `caption`; name"),
        ("p.json", '["a cat"]', "item 0 has no `caption`; name the key or column with `--caption_column`."),
        ("p.json", '[{"caption": null}]', "item 0 is not a text but None; write it in quotes or remove it."),
        ("p.json", "[{", "line 1 column 3"),
        ("p.jsonl", '{"caption": "a cat"}\n{"caption"}\n', "line 2 is not JSON"),
        ("p.jsonl", '{"caption": "a cat"}\n{"caption": ""}\n', "line 2 is blank; write a caption or remove it."),
        ("p.jsonl", '{"caption": "a cat"}\n{"text": "a dog"}\n', "line 2 has no `caption`"),
        ("p.csv", "text\na cat\n", "line 2 has no `caption`; name the key or column with `--caption_column`."),
        ("p.csv", "caption,id\na cat,1\n,2\n", "line 3 is blank; write a caption or remove it."),
        ("p.csv", "caption\n", "there are no captions in it."),
        ("p.parquet", "not parquet", "nor a dataset with such `--dataset_split` and `--caption_column`: "),
        ("p.png", "not text", "not a .yaml, .yml, .json, .jsonl, .txt, .csv file, nor a dataset"),
    ],
)
def test_a_bad_prompts_file_is_refused_by_its_place(model, tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refusal(model, file, tmp_path / "out", "--cache_dir", tmp_path.parent / "cache")
    assert error.startswith(f"`--prompts` {file}: ")
    assert message in error


def test_a_column_that_a_dataset_does_not_have_is_refused(model, tmp_path):
    Dataset.from_dict({"text": ["a cat"]}).to_parquet(tmp_path / "prompts.parquet")
    error = refusal(model, tmp_path / "prompts.parquet", tmp_path / "out", "--cache_dir", tmp_path.parent / "cache")
    assert "`--caption_column`" in error and "Current columns in the dataset: ['text']" in error


def test_a_missing_prompts_file_is_refused(model, tmp_path):
    error = refusal(model, tmp_path / "none.txt", tmp_path / "out")
    assert error == f"`--prompts` {tmp_path}/none.txt: there is no such file."


def test_an_unknown_dataset_is_refused(model, tmp_path):
    assert refusal(model, "someone/something", tmp_path / "out").startswith("`--prompts` someone/something: not a")


@pytest.mark.parametrize("flag", ["--max_sequence_length", "--batch_size"])
def test_a_count_below_one_is_refused(model, prompts, tmp_path, flag):
    assert refusal(model, prompts, tmp_path / "out", flag, "0") == f"`{flag}` must be at least 1, not 0."


def test_an_output_dir_with_something_in_it_is_refused(model, prompts, tmp_path):
    error = refusal(model, prompts, tmp_path)
    assert error == f"`--output_dir` {tmp_path} is not empty; choose another or `--overwrite_output_dir`."


def test_overwrite_output_dir_spares_a_folder_that_is_not_a_dataset(model, prompts, tmp_path):
    error = refusal(model, prompts, tmp_path, "--overwrite_output_dir")
    assert error == f"`--output_dir` {tmp_path} holds no dataset to overwrite; choose another."


def test_an_output_dir_that_is_a_file_is_refused(model, prompts):
    assert refusal(model, prompts, prompts) == f"`--output_dir` {prompts} is a file; choose a folder."


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_model_folder_without_a_part_is_refused(model, prompts, tmp_path, part):
    half = Path(shutil.copytree(model, tmp_path / "half"))
    shutil.rmtree(half / part)
    error = refusal(half, prompts, tmp_path / "out")
    assert error == f"`--pretrained_model_name_or_path` {half} is a folder without {part}."


def test_a_model_that_does_not_exist_is_refused(prompts, tmp_path):
    error = refusal(tmp_path / "none", prompts, tmp_path / "out")
    assert error.startswith(f"`--pretrained_model_name_or_path` {tmp_path}/none could not be loaded: ")


def test_the_command_exits_with_1_and_one_line(model, tmp_path):
    script = [sys.executable, str(SCRIPT)]
    run = subprocess.run(
        [*script, *arguments(model, tmp_path / "none.txt", tmp_path / "out")], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == f"`--prompts` {tmp_path}/none.txt: there is no such file."
    assert "Traceback" not in run.stderr


# The Hub.


def test_push_to_hub_without_a_token_is_refused(model, prompts, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    error = refusal(model, prompts, tmp_path / "out", "--push_to_hub")
    assert error == "`--push_to_hub` needs a token; run `hf auth login`, set HF_TOKEN or pass `--hub_token`."


def test_a_failed_upload_leaves_the_dataset_and_says_how_to_upload_it(model, prompts, tmp_path):
    flags = ["--push_to_hub", "--hub_token", "hf_x", "--hub_dataset_id", "someone/captions", "--hub_private_repo"]
    with pytest.raises(SystemExit) as exit_:  # HF_HUB_OFFLINE
        embed(model, prompts, tmp_path / "out", *flags)
    retry = f"datasets.load_from_disk('{tmp_path}/out').push_to_hub('someone/captions', private=True)"
    assert exit_.value.code.endswith(f'python -c "import datasets; {retry}"')
    assert load_from_disk(tmp_path / "out")["train"]["caption"] == CAPTIONS
