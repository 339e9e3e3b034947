"""Which captions `embed_prompts.py` reads from files and datasets, and the fingerprint of a text encoder."""

import csv
import hashlib
import json

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import PROMPTS, embed_flags

from embed_prompts import load_captions, parse_args, text_encoder_fingerprint


# ---- Captions. ------------------------------------------------------------------------------------------------------


def write_captions(file, column="caption"):
    rows = [{column: caption} for caption in PROMPTS]
    if file.suffix in (".yaml", ".yml"):
        file.write_text(yaml.safe_dump({"prompts": PROMPTS}))
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
    args = parse_args(embed_flags("model", tmp_path / f"prompts{suffix}", "out", "--cache_dir", tmp_path))
    assert load_captions(args) == (PROMPTS, 0)


def test_a_text_file_holds_one_caption_per_line(prompts):
    assert load_captions(parse_args(embed_flags("model", prompts, "out"))) == (PROMPTS, 0)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_caption_column_names_the_key_or_column(tmp_path, suffix):
    write_captions(tmp_path / f"prompts{suffix}", column="text")
    flags = ["--caption_column", "text", "--cache_dir", tmp_path]
    args = parse_args(embed_flags("model", tmp_path / f"prompts{suffix}", "out", *flags))
    assert load_captions(args) == (PROMPTS, 0)


def test_a_dataset_is_read_by_split_and_column(tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": ["a cat"]}).to_parquet(tmp_path / "data" / "train.parquet")
    Dataset.from_dict({"text": ["a dog"]}).to_parquet(tmp_path / "data" / "test.parquet")
    flags = ["--caption_column", "text", "--dataset_split", "test", "--cache_dir", tmp_path / "cache"]
    assert load_captions(parse_args(embed_flags("model", tmp_path / "data", "out", *flags))) == (["a dog"], 0)
    assert (tmp_path / "cache").is_dir()


# ---- The fingerprint of the text encoder. ---------------------------------------------------------------------------


def test_the_fingerprint_of_known_weights():
    weight = torch.tensor([1.0, -2.0, 0.5])  # bfloat16: 3f80 c000 3f00, little-endian
    assert text_encoder_fingerprint(weight) == hashlib.sha256(b"\x80\x3f\x00\xc0\x00\x3f").hexdigest()[:16]


def test_the_fingerprint_does_not_depend_on_the_dtype():
    weight = torch.tensor([1.0, -2.0, 0.1]).bfloat16()
    assert text_encoder_fingerprint(weight) == text_encoder_fingerprint(weight.float())
