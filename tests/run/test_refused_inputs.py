"""The models, datasets and reward models that `train_srpo_wan_t2i.py` refuses, before it touches a file."""

import shutil
from pathlib import Path

import pytest
import torch
from datasets import Array2D, DatasetDict, Features, load_from_disk
from helpers import edit_json
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from train_srpo_wan_t2i import main, parse_args


def test_the_command_that_the_other_tests_spoil_is_accepted(make_flags, monkeypatch):
    class LoadingStarted(Exception):
        pass

    def stop(*args, **kwargs):
        raise LoadingStarted

    monkeypatch.setattr("train_srpo_wan_t2i.make_accelerator", stop)
    with pytest.raises(LoadingStarted):
        main(parse_args(make_flags()))


# ---- The model. -----------------------------------------------------------------------------------------------------


def test_a_model_folder_that_is_not_there(refusal, tmp_path):
    message = refusal("--pretrained_model_name_or_path", tmp_path / "nothing")
    assert message.startswith(f"`--pretrained_model_name_or_path {tmp_path}/nothing` is not a Wan pipeline")


def test_a_folder_that_is_not_a_wan_pipeline(refusal, tiny_reward):
    message = refusal("--pretrained_model_name_or_path", tiny_reward)
    assert message.startswith(f"`--pretrained_model_name_or_path {tiny_reward}` is not a Wan pipeline")


def test_a_model_of_one_expert_with_the_default_subfolder(refusal, tiny_one_expert_model):
    message = refusal("--pretrained_model_name_or_path", tiny_one_expert_model)
    assert "no `transformer_2`, only one expert" in message
    assert message.endswith("`--transformer_subfolder transformer`.")


@pytest.mark.parametrize("name", ["transformer", "transformer_3"])
def test_another_expert_than_the_low_noise_one(refusal, name):
    assert refusal("--transformer_subfolder", name).endswith("`--transformer_subfolder transformer_2`.")


def test_an_index_that_names_an_expert_whose_folder_is_absent(refusal, model_copy):
    shutil.rmtree(model_copy / "transformer_2")
    message = refusal("--pretrained_model_name_or_path", model_copy)
    assert message.startswith(f"`--pretrained_model_name_or_path {model_copy}` lacks the model in `transformer_2`")


def test_an_index_without_the_boundary_of_the_experts(refusal, model_copy):
    edit_json(model_copy / "model_index.json", boundary_ratio=None)
    message = refusal("--pretrained_model_name_or_path", model_copy)
    assert "`--pretrained_model_name_or_path" in message and "`boundary_ratio`" in message


def test_a_model_without_its_text_encoder(refusal, model_copy):
    shutil.rmtree(model_copy / "text_encoder")
    message = refusal("--pretrained_model_name_or_path", model_copy)
    assert message.startswith(f"`--pretrained_model_name_or_path {model_copy}` lacks the text encoder")


# ---- The dataset. ---------------------------------------------------------------------------------------------------


def test_a_dataset_folder_that_is_not_there(refusal, tmp_path):
    message = refusal("--dataset_name", tmp_path / "nothing")
    assert message.startswith(f"`--dataset_name {tmp_path}/nothing` cannot be loaded")
    assert "embed_prompts.py" in message


def save_dataset(folder, **splits):
    DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("split", ["train", "negative"])
def test_a_dataset_without_a_split(refusal, tiny_dataset, tmp_path, split):
    splits = {name: rows for name, rows in load_from_disk(tiny_dataset).items() if name != split}
    message = refusal("--dataset_name", save_dataset(tmp_path / "dataset", **splits))
    assert message.startswith(f"`--dataset_name {tmp_path}/dataset` ") and f"`{split}`" in message


@pytest.mark.parametrize("column", ["caption", "prompt_embeds", "text_encoder_fingerprint", "max_sequence_length"])
def test_a_dataset_without_a_column(refusal, tiny_dataset, tmp_path, column):
    splits = load_from_disk(tiny_dataset)
    spoiled = {"train": splits["train"].remove_columns(column), "negative": splits["negative"]}
    message = refusal("--dataset_name", save_dataset(tmp_path / "dataset", **spoiled))
    assert message.startswith(f"`--dataset_name {tmp_path}/dataset` ") and "`train`" in message


def test_a_dataset_without_rows(refusal, tiny_dataset, tmp_path):
    splits = load_from_disk(tiny_dataset)
    spoiled = {"train": splits["train"].select([]), "negative": splits["negative"]}
    message = refusal("--dataset_name", save_dataset(tmp_path / "dataset", **spoiled))
    assert message.startswith(f"`--dataset_name {tmp_path}/dataset` ") and "embed_prompts.py" in message


def test_a_dataset_of_another_text_encoder_of_the_same_sizes(refusal, model_copy, tiny_dataset):
    file = model_copy / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights["encoder.final_layer_norm.weight"][0] += 1
    save_file(weights, file, {"format": "pt"})
    message = refusal("--pretrained_model_name_or_path", model_copy)
    assert message.startswith(f"`--dataset_name {tiny_dataset}` holds embeddings of the text encoder ")
    assert message.endswith("Embed the captions again for this model.")


def test_a_dataset_in_which_one_caption_is_of_another_text_encoder(refusal, tiny_dataset, tmp_path):
    splits = load_from_disk(tiny_dataset)
    rows = splits["train"].map(
        lambda row, index: {"text_encoder_fingerprint": "0123456789abcdef"} if index == 5 else row, with_indices=True
    )
    message = refusal("--dataset_name", save_dataset(tmp_path / "dataset", train=rows, negative=splits["negative"]))
    assert "holds embeddings of the text encoder" in message and "0123456789abcdef" in message


def test_a_dataset_of_another_length(refusal, tiny_dataset):
    message = refusal("--max_sequence_length", 32)
    assert message.startswith(f"`--dataset_name {tiny_dataset}` holds embeddings of length 16, ")
    assert "`--max_sequence_length 32` needs 32" in message


def test_a_dataset_of_another_hidden_size(refusal, tiny_dataset, tmp_path):
    splits = load_from_disk(tiny_dataset)
    features = {**splits["train"].features, "prompt_embeds": Array2D(shape=(None, 24), dtype="int16")}
    wide = splits["train"].map(lambda row: {"prompt_embeds": [[0] * 24] * 3}, features=Features(features))
    message = refusal("--dataset_name", save_dataset(tmp_path / "dataset", train=wide, negative=splits["negative"]))
    assert message.startswith(f"`--dataset_name {tmp_path}/dataset` holds embeddings of size 24, ")
    assert "needs 16" in message


# ---- The reward model. ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward_model", ["HPS", "PickScore", "CLIP"])
def test_a_reward_checkpoint_that_is_not_there(refusal, tmp_path, reward_model):
    message = refusal("--reward_model", reward_model, "--reward_model_path", tmp_path / "nothing")
    assert message.startswith(f"`--reward_model_path {tmp_path}/nothing` is not ")


def test_hps_says_how_to_download_its_checkpoint(refusal, tmp_path):
    message = refusal("--reward_model", "HPS", "--reward_model_path", tmp_path / "nothing")
    assert "`hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir .`" in message


class Evil:
    """What a pickle runs when it is loaded without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_an_hps_checkpoint_that_runs_code_is_not_run(refusal, tmp_path):
    torch.save({"state_dict": Evil(tmp_path / "evil")}, tmp_path / "hps.pt")
    message = refusal("--reward_model", "HPS", "--reward_model_path", tmp_path / "hps.pt")
    assert message.startswith(f"`--reward_model_path {tmp_path}/hps.pt` is not a checkpoint with a `state_dict`")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", [{"weights": {}}, {"state_dict": 3}, [1, 2]])
def test_an_hps_checkpoint_without_a_state_dict(refusal, tmp_path, content):
    torch.save(content, tmp_path / "hps.pt")
    message = refusal("--reward_model", "HPS", "--reward_model_path", tmp_path / "hps.pt")
    assert message.startswith(f"`--reward_model_path {tmp_path}/hps.pt` is not a checkpoint with a `state_dict`")


def test_an_hps_checkpoint_that_is_text(refusal, tmp_path):
    (tmp_path / "hps.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    message = refusal("--reward_model", "HPS", "--reward_model_path", tmp_path / "hps.pt")
    assert message.startswith(f"`--reward_model_path {tmp_path}/hps.pt` is not a checkpoint with a `state_dict`")


def test_an_hps_checkpoint_of_another_architecture(refusal, tmp_path):
    torch.save({"state_dict": {"logit_scale": torch.ones(()), "visual.proj": torch.ones(4, 2)}}, tmp_path / "hps.pt")
    message = refusal("--reward_model", "HPS", "--reward_model_path", tmp_path / "hps.pt")
    problem = f"`--reward_model_path {tmp_path}/hps.pt` is not of the architecture ViT-H-14: the weights lack "
    assert message.startswith(problem)


def test_a_clip_checkpoint_of_another_architecture(refusal, tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    message = refusal("--reward_model_path", tmp_path / "bert")
    assert message == (
        f"`--reward_model_path {tmp_path}/bert` is not the folder or Hub id of a CLIPModel: "
        "it is of type `bert`, and CLIP needs type `clip`"
    )


def test_clip_without_a_path(tiny_model, tiny_dataset, tmp_path):
    paths = ["--pretrained_model_name_or_path", tiny_model, "--dataset_name", tiny_dataset]
    flags = [*paths, "--output_dir", tmp_path / "output", "--max_sequence_length", 16, "--reward_model", "CLIP"]
    with pytest.raises(SystemExit, match="`--reward_model CLIP` needs `--reward_model_path`"):
        main(parse_args([str(flag) for flag in flags]))
    assert not (tmp_path / "output").exists()


def test_a_clip_folder_without_a_processor(refusal, tiny_reward, tmp_path):
    folder = Path(shutil.copytree(tiny_reward, tmp_path / "reward"))
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    assert "`--reward_processor_path" in refusal("--reward_model_path", folder)
