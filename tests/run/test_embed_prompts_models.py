"""The text encoders and tokenizers that `embed_prompts.py` takes, and those that it refuses before it loads them."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import PROMPTS, embed_flags, embed_refusal, make_text_model, run_command
from helpers import run_embed_prompts as embed
from inputs import edit_weights, save_in_shards, truncate, write_lines


FILE = "text_encoder/model.safetensors"


# ---- The text encoder. ----------------------------------------------------------------------------------------------


def test_a_text_encoder_that_lacks_a_tensor_is_refused(text_model_copy, prompts, tmp_path):
    edit_weights(text_model_copy / FILE, lambda weights: weights.pop("encoder.block.1.layer.0.SelfAttention.q.weight"))
    assert embed_refusal(text_model_copy, prompts, tmp_path / "out") == (
        f"`--pretrained_model_name_or_path {text_model_copy}` has no whole model in `text_encoder`: "
        "the weights lack 1 tensors, such as `encoder.block.1.layer.0.SelfAttention.q.weight`"
    )


def test_a_text_encoder_with_a_tensor_of_another_shape_is_refused(text_model_copy, prompts, tmp_path):
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    edit_weights(text_model_copy / FILE, lambda weights: weights.update({name: weights[name][:, :-1].contiguous()}))
    error = embed_refusal(text_model_copy, prompts, tmp_path / "out")
    assert error.endswith(f"`text_encoder`: the weights have other shapes of 1 tensors, such as `{name}`")


def test_a_text_encoder_whose_tensors_have_another_prefix_is_refused(text_model_copy, prompts, tmp_path):
    def rename(weights):
        for name in list(weights):
            weights[f"model.{name}"] = weights.pop(name)

    edit_weights(text_model_copy / FILE, rename)
    error = embed_refusal(text_model_copy, prompts, tmp_path / "out")
    assert re.search(r"`text_encoder`: the weights lack \d+ tensors, such as `encoder\.", error)


def test_a_truncated_text_encoder_is_refused(text_model_copy, prompts, tmp_path):
    file = text_model_copy / FILE
    truncate(file)
    error = embed_refusal(text_model_copy, prompts, tmp_path / "out")
    assert f"`text_encoder`: `{file}` is not a whole safetensors file: " in error


@pytest.mark.parametrize("spoil", [Path.unlink, truncate])
def test_a_text_encoder_without_one_of_its_files_is_refused(text_model_copy, prompts, tmp_path, spoil):
    file = save_in_shards(text_model_copy / FILE, "2KB")[1]
    spoil(file)
    error = embed_refusal(text_model_copy, prompts, tmp_path / "out")
    assert error.startswith(f"`--pretrained_model_name_or_path {text_model_copy}`") and file.name in error


def test_a_text_encoder_in_several_files_is_read(text_model, text_model_copy, prompts, tmp_path):
    assert len(save_in_shards(text_model_copy / FILE, "2KB")) > 2
    one, several = embed(text_model, prompts, tmp_path / "one"), embed(text_model_copy, prompts, tmp_path / "several")
    assert one["train"]["prompt_embeds"] == several["train"]["prompt_embeds"]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_text_encoder_with_weights_that_are_not_finite_is_refused(text_model_copy, prompts, tmp_path, value):
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    edit_weights(text_model_copy / FILE, lambda weights: weights[name][0, 0].fill_(float(value)))
    assert embed_refusal(text_model_copy, prompts, tmp_path / "out") == (
        f"`--pretrained_model_name_or_path {text_model_copy}`, `text_encoder`: "
        f"the weights of `{name}` are NaN or infinite. Download them again."
    )


def test_embeddings_that_are_not_finite_are_refused(text_model_copy, prompts, tmp_path):
    norm = "encoder.final_layer_norm.weight"
    edit_weights(text_model_copy / FILE, lambda weights: weights[norm].fill_(3e38))
    assert embed_refusal(text_model_copy, prompts, tmp_path / "out") == (
        "The text encoder makes NaN or infinite numbers of 'a red cat'. Check its weights."
    )


# ---- The tokenizer. -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", '{"version": "1.0"}'])
def test_a_tokenizer_whose_file_is_missing_or_broken_is_refused(text_model_copy, prompts, tmp_path, content):
    file = text_model_copy / "tokenizer" / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    error = embed_refusal(text_model_copy, prompts, tmp_path / "out")
    assert error.startswith(f"`--pretrained_model_name_or_path {text_model_copy}` has no tokenizer in `tokenizer`: ")
    if content is None:
        assert error.endswith(": neither tokenizer.json nor spiece.model is there.")


def test_a_tokenizer_that_does_not_tell_prompts_apart_is_refused(text_model, tmp_path):
    file = write_lines(tmp_path / "prompts.txt", "a cat", "a red zebra", "a red lion")
    error = embed_refusal(text_model, file, tmp_path / "out")
    assert error.startswith(f"`--pretrained_model_name_or_path {text_model}`, `tokenizer`: ")
    assert "the same tokens of 'a red zebra' and 'a red lion'" in error


def test_prompts_that_differ_in_white_space_only_may_have_the_same_tokens(text_model, tmp_path):
    file = write_lines(tmp_path / "prompts.txt", "a  cat", "a cat")
    assert embed(text_model, file, tmp_path / "out")["train"]["caption"] == ["a  cat", "a cat"]


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_refused(prompts, tmp_path, tmp_path_factory):
    text_model = make_text_model(tmp_path_factory.mktemp("few"), seed=0, vocab_size=4)
    error = embed_refusal(text_model, prompts, tmp_path / "out")
    assert error.endswith("`tokenizer`: it makes token 6 of 'a red cat', but the text encoder has 4.")


# ---- The folder, or the Hub. ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_model_folder_without_a_part_is_refused(text_model, prompts, tmp_path, part):
    half = Path(shutil.copytree(text_model, tmp_path / "half"))
    shutil.rmtree(half / part)
    error = embed_refusal(half, prompts, tmp_path / "out")
    assert error == f"`--pretrained_model_name_or_path {half}` is a folder without {part}."


def test_a_folder_that_does_not_exist_is_refused(prompts, tmp_path):
    error = embed_refusal(tmp_path / "none", prompts, tmp_path / "out")
    problem = "is not a Wan pipeline in the layout of diffusers: "
    assert error.startswith(f"`--pretrained_model_name_or_path {tmp_path}/none` {problem}")


def test_a_model_that_is_not_here_is_refused_when_no_network_is_used(prompts, tmp_path):
    error = embed_refusal("someone/something", prompts, tmp_path / "out", "--cache_dir", tmp_path / "none")
    problem = "is not here, and the Hub cannot be reached: "
    assert error.startswith(f"`--pretrained_model_name_or_path someone/something` {problem}")


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "prompts"])
@pytest.mark.slow
def test_without_network_nothing_is_asked_for_again_and_again(text_model, prompts, tmp_path, flag):
    flags = embed_flags(text_model, prompts, tmp_path / "out", f"--{flag}", "someone/something")
    nobody = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    run = run_command(sys.executable, "embed_prompts.py", *flags, **nobody)
    assert run.returncode == 1
    assert "Retrying" not in run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"error: `--{flag} someone/something`") and "the Hub cannot be reached: " in last


def test_a_model_in_the_cache_of_the_hub_is_read_without_network(prompts, tmp_path, tmp_path_factory):
    repository = tmp_path_factory.mktemp("cache") / "models--me--wan"
    make_text_model((repository / "snapshots" / "0123abc"), seed=0)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    train = embed("me/wan", prompts, tmp_path / "out", "--cache_dir", repository.parent)["train"]
    assert train["caption"] == PROMPTS
    assert set(train["text_encoder"]) == {"me/wan"}


def test_the_fingerprint_follows_the_weights_and_not_the_path(text_model, prompts, tmp_path):
    copy = shutil.copytree(text_model, tmp_path / "copy")
    other = make_text_model(tmp_path / "other", seed=1)
    fingerprints = [
        embed(folder, prompts, tmp_path / f"out{i}")["negative"]["text_encoder_fingerprint"][0]
        for i, folder in enumerate([text_model, copy, other])
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
