"""Which captions `embed_prompts.py` reads from files and datasets, what it refuses, and fingerprints of weights."""

import hashlib
import json
import re

import pytest
import torch
from datasets import Dataset
from helpers import MINIATURE, PROMPTS
from inputs import write_captions
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from embed_prompts import TEXT_ENCODER_LAYER, TRANSFORMERS_STEM, load_captions, weights_fingerprint


def read(source, caption_column="caption", split="train", cache_dir=None):
    """The captions and the number of duplicates that the script reads from a file or a dataset."""
    return load_captions("prompts", str(source), caption_column, split, cache_dir and str(cache_dir))


# ---- What is read. --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix", [".yaml", ".yml", ".YAML", ".json", ".jsonl", ".CSV", ".csv", ".parquet", ".PARQUET"]
)
def test_every_file_form_gives_the_captions_in_their_order(tmp_path, suffix):
    write_captions(tmp_path / f"prompts{suffix}")
    assert read(tmp_path / f"prompts{suffix}", cache_dir=tmp_path) == (PROMPTS, 0)


def test_a_text_file_holds_one_caption_per_line(prompts):
    assert read(prompts) == (PROMPTS, 0)


def test_a_json_file_may_hold_plain_texts(tmp_path):
    (tmp_path / "prompts.json").write_text('["a cat", {"caption": "a dog"}]')
    assert read(tmp_path / "prompts.json") == (["a cat", "a dog"], 0)


def test_a_jsonl_file_may_hold_plain_texts(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('"a cat"\n{"caption": "a dog"}\n')
    assert read(tmp_path / "prompts.jsonl") == (["a cat", "a dog"], 0)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_caption_column_names_the_key_or_column(tmp_path, suffix):
    write_captions(tmp_path / f"prompts{suffix}", column="text")
    assert read(tmp_path / f"prompts{suffix}", "text", cache_dir=tmp_path) == (PROMPTS, 0)


def test_a_dataset_is_read_by_split_and_column(tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": ["a cat"]}).to_parquet(tmp_path / "data" / "train.parquet")
    Dataset.from_dict({"text": ["a dog"]}).to_parquet(tmp_path / "data" / "test.parquet")
    assert read(tmp_path / "data", "text", "test", tmp_path / "cache") == (["a dog"], 0)
    assert (tmp_path / "cache").is_dir()


def test_white_space_around_captions_and_duplicates_are_dropped_and_duplicates_counted(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n  a dog \na cat \na dog\na cat\n")
    assert read(tmp_path / "prompts.txt") == (["a cat", "a dog"], 3)


# ---- What is refused. -----------------------------------------------------------------------------------------------


FORMS = "the name must end with one of .yaml, .yml, .json, .jsonl, .txt, .csv or .parquet. Save it as one of them."


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", "", "the file is empty."),
        ("p.txt", "\n \n", "the file is empty."),
        ("p.txt", "a cat\n\na dog\n", "line 2 is blank; write a caption or remove it."),
        ("p.txt", b"a cat\n\xff", "the file is not text in UTF-8, save it as UTF-8: 'utf-8' codec can't decode"),
        ("p.txt", "ein Kätzchen".encode("latin-1"), "the file is not text in UTF-8, save it as UTF-8: "),
        ("p.csv", "caption\nein Kätzchen".encode("latin-1"), "the file is not text in UTF-8, save it as UTF-8: "),
        ("p.yaml", "prompts: [a cat]".encode("utf-16"), "the file is not text in UTF-8, save it as UTF-8: "),
        ("p.txt", "a cat".encode("utf-16"), "the file is not text in UTF-8, save it as UTF-8: "),
        ("p.txt", "a cat\n\u200b\x07\n", "line 2 is blank; write a caption or remove it."),
        ("p.yaml", "captions: [a cat]", "expected a list under the key `prompts`"),
        ("p.yaml", "prompts: a cat", "expected a list under the key `prompts`"),
        ("p.yaml", "prompts: [a cat]\nprompts: [a dog]", "the key `prompts` is there twice; join the two lists."),
        (
            "p.yaml",
            "prompts: [a cat: in a hat]",
            "prompts[0] is not a text but {'a cat': 'in a hat'}; write it in quotes",
        ),
        ("p.yaml", "prompts: &a [*a]", "prompts[0] is not a text but [["),
        ("p.yaml", "prompts: !!python/object/apply:os.getcwd []", "could not determine a constructor for the tag"),
        ("p.yaml", "prompts: []", "there are no captions in it."),
        ("p.yaml", "prompts: [a cat, 2]", "prompts[1] is not a text but 2; write it in quotes or remove it."),
        ("p.yaml", "prompts: [a cat, '  ']", "prompts[1] is blank; write a caption or remove it."),
        ("p.yaml", "prompts:\n- a cat\n- [", "line 3, column 4"),
        ("p.json", '{"caption": "a cat"}', "expected a list of objects"),
        ("p.json", '[{"caption": "a cat"}, {"text": "a dog"}]', "item 1 has no `caption`; name"),
        ("p.json", '[["a cat"]]', "item 0 has no `caption`; name the key or column with `--caption_column`."),
        ("p.json", '[{"caption": null}]', "item 0 is not a text but None; write it in quotes or remove it."),
        ("p.json", "[{", "line 1 column 3"),
        (
            "p.json",
            '[{"caption": "a cat", "caption": "a dog"}]',
            "an object has the same key twice: [('caption', 'a c",
        ),
        ("p.json", '["a cat", "a \\ud83d"]', "item 1 holds half a character of Unicode: 'a \\ud83d'. Write it again."),
        (
            "p.jsonl",
            '"a cat"\n{"caption": "a", "caption": "b"}',
            "line 2 is not JSON: an object has the same key twice",
        ),
        ("p.jsonl", '{"caption": "a cat"}\n\n{"caption": "a dog"}', "line 2 is not JSON"),
        ("p.jsonl", '{"caption": "a cat"}\n{"caption"}\n', "line 2 is not JSON"),
        ("p.jsonl", '{"caption": "a cat"}\n{"caption": ""}\n', "line 2 is blank; write a caption or remove it."),
        ("p.jsonl", '{"caption": "a cat"}\n{"text": "a dog"}\n', "line 2 has no `caption`"),
        ("p.csv", "text\na cat\n", "line 2 has no `caption`; name the key or column with `--caption_column`."),
        ("p.csv", "caption,id\na cat,1\n,2\n", "line 3 is blank; write a caption or remove it."),
        ("p.csv", "caption\na cat\na cat, with a hat\n", "line 3 has more cells than columns; put captions"),
        ("p.csv", "caption,caption\na cat,a dog\n", "the column `caption` is there twice."),
        ("p.csv", 'caption\n"a cat\na dog\n', "unexpected end of data"),
        ("p.csv", "caption;id\na cat;1\n", "line 2 has no `caption`"),
        ("p.csv", "caption\n", "there are no captions in it."),
        ("p.parquet", "not parquet", "nor a dataset with such `--dataset_split` and `--caption_column`: "),
        ("p.tsv", "caption\na cat", FORMS),
        ("p.png", "not text", FORMS),
        ("prompts", "a cat", FORMS),
    ],
)
def test_a_bad_file_is_refused_by_its_place_in_one_line(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"\A`--prompts {re.escape(str(file))}`: .*{re.escape(message)}.*\Z"):
        read(file, cache_dir=tmp_path / "cache")


def test_a_column_that_a_dataset_does_not_have_is_refused(tmp_path):
    Dataset.from_dict({"text": ["a cat"]}).to_parquet(tmp_path / "prompts.parquet")
    with pytest.raises(ValueError, match=r"`--caption_column`.*Current columns in the dataset: \['text'\]"):
        read(tmp_path / "prompts.parquet", cache_dir=tmp_path / "cache")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "none.txt")
    assert str(caught.value) == f"`--prompts {tmp_path}/none.txt`: there is no such file."


def test_an_unknown_dataset_is_refused():
    with pytest.raises(
        ValueError, match=r"\A`--prompts someone/something`: is not here, and the Hub cannot be reached: "
    ):
        read("someone/something")


def test_what_is_not_a_text_is_shown_in_short(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([{"caption": list(range(10**5))}]))
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "p.json")
    assert len(str(caught.value)) < 300


def test_a_bomb_of_yaml_aliases_is_shown_in_short(tmp_path):
    lists = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (tmp_path / "p.yaml").write_text("\n".join(["a0: &a0 [lol]", *lists, "prompts: *a8"]))
    with pytest.raises(ValueError, match=r"prompts\[0\] is not a text but \[\[\[") as caught:
        read(tmp_path / "p.yaml")
    assert len(str(caught.value)) < 300


# ---- The fingerprint of the text encoder. ---------------------------------------------------------------------------


def fingerprint(model):
    source = {"pretrained_model_name_or_path": model}
    return weights_fingerprint(source, "text_encoder", TRANSFORMERS_STEM, TEXT_ENCODER_LAYER)


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


def test_the_fingerprint_does_not_depend_on_the_files(text_model, tmp_path):
    text_encoder = UMT5EncoderModel.from_pretrained(text_model / "text_encoder")
    text_encoder.save_pretrained(tmp_path / "text_encoder", max_shard_size="2KB")
    assert len(list((tmp_path / "text_encoder").glob("model-*.safetensors"))) > 2
    assert fingerprint(tmp_path) == fingerprint(text_model)
