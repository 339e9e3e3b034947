"""`embed_prompts.py --validation_prompts`: a third split, which training paints."""

import logging

import pytest
import torch
from helpers import PROMPTS, bfloat16, embed_refusal
from helpers import run_embed_prompts as embed
from inputs import write_captions, write_lines


def test_validation_prompts_are_a_third_split_of_the_same_columns(text_model, prompts, tmp_path):
    dataset = embed(text_model, prompts, tmp_path / "out", "--validation_prompts", "a dog", "a red cat")
    assert list(dataset) == ["train", "negative", "validation"]
    assert dataset["validation"]["caption"] == ["a dog", "a red cat"]
    assert dataset["validation"].features == dataset["train"].features == dataset["negative"].features
    same, columns = dataset["train"][0], dataset["validation"].column_names
    assert same["caption"] == "a red cat"
    torch.testing.assert_close(bfloat16(dataset["validation"][1]), bfloat16(same))
    assert all(dataset["validation"][1][name] == same[name] for name in columns if name != "prompt_embeds")


def test_without_the_flag_there_is_no_validation_split(text_model, prompts, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert list(embed(text_model, prompts, tmp_path / "out")) == ["train", "negative"]
    assert "validation" not in (tmp_path / "out" / "README.md").read_text()
    assert "validation" not in caplog.text


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".jsonl", ".csv", ".parquet"])
def test_validation_prompts_may_be_a_file_of_any_form(text_model, tmp_path, suffix):
    write_captions(tmp_path / f"validation{suffix}", column="text")
    flags = [*([] if suffix == ".yaml" else ["--caption_column", "text"]), "--cache_dir", tmp_path / "cache"]
    train = write_lines(tmp_path / "prompts.txt", "a dog")
    dataset = embed(
        text_model, train, tmp_path / "out", *flags, "--validation_prompts", tmp_path / f"validation{suffix}"
    )
    assert dataset["train"]["caption"] == ["a dog"]
    assert dataset["validation"]["caption"] == PROMPTS


def test_one_validation_prompt_that_is_no_file_is_a_prompt(text_model, prompts, tmp_path):
    dataset = embed(text_model, prompts, tmp_path / "out", "--validation_prompts", "a cat, on a boat.")
    assert dataset["validation"]["caption"] == ["a cat, on a boat."]


def test_duplicates_of_validation_prompts_are_dropped_and_counted(text_model, prompts, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        dataset = embed(text_model, prompts, tmp_path / "out", "--validation_prompts", "a dog", " a dog ", "a cat")
    assert dataset["validation"]["caption"] == ["a dog", "a cat"]
    assert "Num captions = 5 (0 duplicates dropped)" in caplog.text
    assert "Num validation prompts = 2 (1 duplicates dropped)" in caplog.text


def test_the_card_counts_the_prompts_of_each_split(text_model, prompts, tmp_path):
    embed(text_model, prompts, tmp_path / "out", "--validation_prompts", "a dog", "a cat")
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert (
        "5 captions (split `train`), 1 negative prompt (split `negative`), 2 validation prompts (split `validation`)"
        in card
    )


def test_blank_validation_prompts_are_refused(text_model, prompts, tmp_path):
    error = embed_refusal(text_model, prompts, tmp_path / "out", "--validation_prompts", "a cat", " ")
    assert error == "`--validation_prompts a cat  ` must not be blank."


def test_a_bad_file_of_validation_prompts_is_refused_by_its_place(text_model, prompts, tmp_path):
    file = write_lines(tmp_path / "validation.txt", "a cat", "", "a dog")
    error = embed_refusal(text_model, prompts, tmp_path / "out", "--validation_prompts", file)
    assert error == f"`--validation_prompts {file}`: line 2 is blank; write a caption or remove it."
    error = embed_refusal(text_model, prompts, tmp_path / "out", "--validation_prompts", tmp_path / "none.txt")
    assert error == f"`--validation_prompts {tmp_path}/none.txt`: there is no such file."


@pytest.mark.parametrize("name", ["validation.txt", "validation.tsv"])
def test_a_file_among_validation_prompts_is_refused(text_model, prompts, tmp_path, name):
    file = write_lines(tmp_path / name, "a cat")
    error = embed_refusal(text_model, prompts, tmp_path / "out", "--validation_prompts", "a dog", file)
    assert error == f"`--validation_prompts`: `{file}` is a file; name one file and nothing else, or prompts."


def test_a_file_of_validation_prompts_of_an_unknown_form_is_refused(text_model, prompts, tmp_path):
    file = write_lines(tmp_path / "validation.tsv", "a cat")
    error = embed_refusal(text_model, prompts, tmp_path / "out", "--validation_prompts", file)
    assert error.startswith(f"`--validation_prompts {file}`: the name must end with one of .yaml, ")
