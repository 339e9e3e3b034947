"""
What `train_srpo_wan_t2i.py` refuses: in one clear line that names the flag, before any model is loaded, and without
touching a file.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_simple_launcher_cmd_env
from datasets import Array2D, DatasetDict, Features, load_from_disk
from safetensors.torch import load_file, save_file
from transformers import BertConfig, CLIPModel
from transformers.integrations import unset_hf_deepspeed_config

from diffusers import AutoencoderKLWan, WanTransformer3DModel

from train_srpo_wan_t2i import check_deepspeed, main, parse_args


ROOT = Path(__file__).parent.parent
CPU = "--config_file accelerate_configs/cpu.yaml"
ZERO_2 = "--config_file accelerate_configs/a100x8.yaml --num_processes 1 --main_process_port 0"


@pytest.fixture
def make_flags(tiny_model, tiny_dataset, tiny_reward, tmp_path):
    """Function: flags -> all flags of a run that would work, but for those flags."""
    paths = ["--pretrained_model_name_or_path", tiny_model, "--dataset_name", tiny_dataset]
    reward = ["--reward_model", "CLIP", "--reward_model_path", tiny_reward, "--output_dir", tmp_path / "output"]
    sizes = ["--max_sequence_length", 16, "--height", 32, "--width", 32, "--validation_size", 32]
    return lambda *flags: [str(item) for item in (*paths, *reward, *sizes, *flags)]


@pytest.fixture
def refusal(make_flags, tmp_path, monkeypatch, capsys):
    """
    Function: runs the script with flags that it must refuse, as `accelerate launch` does with those in `launcher`, and
    returns its message. Fails if a model is loaded, if a file in `tmp_path` changes, or if the message is not one
    line.
    """

    def fail(*args, **kwargs):
        pytest.fail("a model was loaded before the input was checked")

    for model_class in (WanTransformer3DModel, AutoencoderKLWan, CLIPModel):
        monkeypatch.setattr(model_class, "from_pretrained", fail)

    def refuse(*flags, launcher=CPU):
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as caught, launched(*launcher.split()):
            main(parse_args(make_flags(*flags)))
        assert snapshot(tmp_path) == before
        if caught.value.code == 2:  # argparse writes the message itself
            return re.search(r"^\S+: error: (.*)\n\Z", capsys.readouterr().err, re.MULTILINE).group(1)
        assert re.fullmatch("error: .*", caught.value.code), "one line, which makes Python exit with 1"
        return caught.value.code.removeprefix("error: ")

    return refuse


@pytest.fixture
def model_copy(tiny_model, tmp_path):
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


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
    assert message.startswith(f"`--reward_model_path {tmp_path}/hps.pt` is not of the architecture ViT-H-14")


def test_a_clip_checkpoint_of_another_architecture(refusal, tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    message = refusal("--reward_model_path", tmp_path / "bert")
    assert message.startswith(f"`--reward_model_path {tmp_path}/bert` is of type `bert`")
    assert "`clip`" in message


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


# ---- The training window. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, sigma, largest",
    [
        ("--train_timestep 4 25", "0.900", "5 40"),
        ("--train_timestep 0 25", "1.000", "5 40"),
        ("--train_timestep 11 25 --shift 3", "0.888", "12 40"),
        ("--num_inference_steps 50", "0.900", "7 50"),
    ],
)
def test_a_window_above_the_boundary(refusal, flags, sigma, largest):
    message = refusal(*flags.split())
    assert f"starts at sigma {sigma}, above the boundary 0.875 of the low-noise expert" in message
    assert message.startswith("`--train_timestep ") and f"`--train_timestep {largest}`" in message


@pytest.mark.parametrize("window", ["25 5", "5 5", "-1 25", "5 41"])
def test_a_window_that_does_not_grow_or_is_outside_the_schedule(refusal, window):
    assert refusal("--train_timestep", *window.split()).startswith(f"`--train_timestep {window}` must be two growing")


# ---- Numbers. -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["height", "width", "validation_size"])
@pytest.mark.parametrize("value, example", [(40, 32), (8, 16), (0, 16), (-16, 16)])
def test_a_size_that_is_not_a_multiple(refusal, name, value, example):
    message = refusal(f"--{name}", value)
    assert message == f"`--{name} {value}` must be a multiple of 16 for this model, for example {example}."


@pytest.mark.parametrize(
    "name",
    [
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "max_sequence_length",
        "sampling_steps",
        "num_inference_steps",
        "validation_steps",
        "checkpointing_steps",
        "updates_per_rollout",
        "rollout_batch_size",
        "checkpoints_total_limit",
    ],
)
@pytest.mark.parametrize("value", [0, -3])
def test_a_count_below_one(refusal, name, value):
    assert refusal(f"--{name}", value) == f"`--{name}` must be at least 1, but is {value}."


@pytest.mark.parametrize("steps", [3, 10])
def test_checkpoints_in_the_middle_of_a_rollout(refusal, steps):
    message = refusal("--updates_per_rollout", 4, "--checkpointing_steps", steps)
    assert message.startswith("`--checkpointing_steps` must be a multiple of `--updates_per_rollout`")


@pytest.mark.parametrize("flags", ["", "--updates_per_rollout 1"])
def test_new_noise_for_rollouts_that_are_used_once(refusal, flags):
    message = refusal("--renew_noise", *flags.split())
    assert message.startswith("`--renew_noise` needs `--updates_per_rollout` above 1")


def test_too_few_noise_levels(refusal):
    assert refusal("--timestep_length", 9) == "`--timestep_length` must be at least 10, but is 9."


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, 1.5])
def test_a_share_of_injected_noise_outside_0_and_1(refusal, ratio):
    assert refusal("--groundtruth_ratio", ratio) == f"`--groundtruth_ratio` must be between 0 and 1, but is {ratio}."


def test_a_negative_seed(refusal):
    assert refusal("--seed", -1) == "`--seed` must be at least 0, but is -1."


def test_a_negative_learning_rate(refusal):
    assert refusal("--learning_rate", -0.5) == "`--learning_rate` must be at least 0, but is -0.5."


@pytest.mark.parametrize("name", ["shift", "rollout_shift", "loss_weight_shift", "max_grad_norm"])
def test_a_shift_or_norm_that_is_not_positive(refusal, name):
    assert refusal(f"--{name}", 0) == f"`--{name}` must be positive, but is 0.0."


def test_an_unknown_tracker(refusal):
    assert "--report_to: invalid choice: 'foo'" in refusal("--report_to", "foo")


# ---- The configurations of Accelerate and DeepSpeed. ----------------------------------------------------------------


@pytest.fixture
def write_yaml(tmp_path):
    """
    Function: top-level fields and fields of `deepspeed_config` -> flags of `accelerate launch` for one process, of
    accelerate_configs/a100x8.yaml with those fields.
    """

    def write(deepspeed=None, **fields):
        config = yaml.safe_load((ROOT / "accelerate_configs/a100x8.yaml").read_text())
        config.update(fields, num_processes=1, main_process_port=0)
        config["deepspeed_config"].update(deepspeed or {})
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return f"--config_file {tmp_path}/config.yaml"

    return write


@pytest.fixture
def write_json(tmp_path):
    """Function: fields -> flags of `accelerate launch` for one process, of ds_configs/zero2.json with those fields."""

    def write(**fields):
        config = json.loads((ROOT / "ds_configs/zero2.json").read_text())
        (tmp_path / "ds.json").write_text(json.dumps({**config, **fields}))
        return f"{ZERO_2} --deepspeed_config_file {tmp_path}/ds.json"

    return write


@pytest.mark.parametrize(
    "field, value",
    [
        ("zero_stage", 3),
        ("gradient_accumulation_steps", 4),
        ("gradient_clipping", 1.0),
        ("offload_optimizer_device", "cpu"),
        ("offload_param_device", "cpu"),
    ],
)
def test_a_yaml_file_that_sets_what_its_deepspeed_file_sets(refusal, write_yaml, field, value):
    message = refusal(launcher=write_yaml({field: value}))
    assert message.startswith("`accelerate launch` and its configuration files ")
    assert f"'{field}'" in message and "remove others config variables" in message


def test_a_yaml_file_with_a_precision_beside_a_deepspeed_file(refusal, write_yaml):
    message = refusal(launcher=write_yaml(mixed_precision="bf16"))
    assert message.startswith("`accelerate launch` and its configuration files ")
    assert "'mixed_precision'" in message and "specify them appropriately in the DeepSpeed config file" in message


def test_a_deepspeed_file_that_is_not_there(refusal, tmp_path):
    message = refusal(launcher=f"{ZERO_2} --deepspeed_config_file {tmp_path}/nothing.json")
    assert message.startswith("`accelerate launch` and its configuration files ")
    assert message.endswith(f"{tmp_path}/nothing.json")


def test_a_deepspeed_file_that_is_not_json(refusal, tmp_path):
    (tmp_path / "ds.json").write_text("zero_optimization: 2")
    message = refusal(launcher=f"{ZERO_2} --deepspeed_config_file {tmp_path}/ds.json")
    assert f"{tmp_path}/ds.json" in message


def test_a_deepspeed_file_without_zero(refusal, tmp_path):
    (tmp_path / "ds.json").write_text('{"bf16": {"enabled": true}}')
    message = refusal(launcher=f"{ZERO_2} --deepspeed_config_file {tmp_path}/ds.json")
    assert message.endswith("Please specify the ZeRO optimization config in the DeepSpeed config.")


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_deepspeed_file_with_an_optimizer_or_a_scheduler_of_its_own(refusal, write_json, section):
    message = refusal(launcher=write_json(**{section: {"type": "AdamW" if section == "optimizer" else "WarmupLR"}}))
    assert "DeepSpeed file" in message and f"`{section}`" in message


def test_a_deepspeed_file_with_another_number_than_the_flag(refusal, write_json):
    assert refusal("--max_grad_norm", 0.5, launcher=write_json(gradient_clipping=1.0)) == (
        "The DeepSpeed file says `gradient_clipping` 1.0, but `--max_grad_norm` and 1 processes make it 0.5. "
        'Write "auto" into the file, or change the flag.'
    )


@pytest.mark.parametrize(
    "field, value, flag, wanted",
    [
        ("train_micro_batch_size_per_gpu", 3, "train_batch_size", 2),
        ("gradient_accumulation_steps", 1, "gradient_accumulation_steps", 4),
        ("gradient_clipping", 1.0, "max_grad_norm", 0.1),
        ("train_batch_size", 8, "train_batch_size", 24),  # would suit one process
        ("train_batch_size", 16, "train_batch_size", 24),  # would suit two
    ],
)
def test_a_number_in_the_deepspeed_file_that_is_not_that_of_the_flags(make_args, field, value, flag, wanted):
    args = make_args("--train_batch_size", 2, "--gradient_accumulation_steps", 4)
    with pytest.raises(ValueError) as caught:
        check_deepspeed(args, {field: value}, num_processes=3)
    assert str(caught.value) == (
        f"The DeepSpeed file says `{field}` {value}, but `--{flag}` and 3 processes make it {wanted}. "
        'Write "auto" into the file, or change the flag.'
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"},
        {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"},
        {"train_micro_batch_size_per_gpu": 2},
        {"gradient_accumulation_steps": 4},
        {"gradient_clipping": 0.1},
        {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
    ],
)
def test_a_deepspeed_file_that_agrees_with_the_flags_is_accepted(make_args, config):
    args = make_args("--train_batch_size", 2, "--gradient_accumulation_steps", 4)
    check_deepspeed(args, config, num_processes=3)


@pytest.mark.parametrize("engine", ["zero2", "zero2_bf16", "zero2_offload", "zero3", "zero3_offload"])
def test_adamw_8bit_with_deepspeed(refusal, engine):
    pytest.importorskip("torchao")
    launcher = f"{ZERO_2} --deepspeed_config_file ds_configs/{engine}.json"
    message = refusal("--optimizer", "adamw_8bit", launcher=launcher)
    assert message.startswith("`--optimizer adamw_8bit` needs a configuration without DeepSpeed, ")


@pytest.mark.parametrize("engine", ["zero2", "zero2_bf16", "zero2_offload", "zero3", "zero3_offload"])
def test_a_base_in_fp8_with_deepspeed(refusal, engine):
    launcher = f"{ZERO_2} --deepspeed_config_file ds_configs/{engine}.json"
    message = refusal("--lora_rank", 4, "--base_weights", "fp8", launcher=launcher)
    assert message.startswith("`--base_weights fp8` needs a configuration without DeepSpeed, ")


@pytest.mark.parametrize("engine", ["zero3", "zero3_offload"])
def test_compiling_under_zero_3(refusal, engine):
    message = refusal("--compile", launcher=f"{ZERO_2} --deepspeed_config_file ds_configs/{engine}.json")
    assert message.startswith("`--compile` needs whole weights; under ZeRO-3 ")


@pytest.mark.parametrize("flags, stage", [("--compile", 2), ("", 3)])
def test_compiling_under_zero_2_and_zero_3_without_it_are_accepted(make_args, flags, stage):
    check_deepspeed(make_args(*flags.split()), {"zero_optimization": {"stage": stage}}, num_processes=3)


def test_fp16_in_a_yaml_file(refusal, tmp_path):
    config = yaml.safe_load((ROOT / "accelerate_configs/cpu.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "mixed_precision": "fp16"}))
    message = refusal(launcher=f"--config_file {tmp_path}/config.yaml")
    assert message == "`mixed_precision: fp16` is too narrow for Wan's transformer. Use bf16."


def test_fp16_in_a_deepspeed_file(refusal, write_json):
    message = refusal(launcher=write_json(fp16={"enabled": True}, bf16={"enabled": False}))
    assert "fp16` is too narrow for Wan's transformer. Use bf16." in message


def test_fp16_for_the_launcher_and_bf16_in_the_deepspeed_file(refusal):
    message = refusal(launcher=f"{ZERO_2} --mixed_precision fp16")
    assert message.startswith("`accelerate launch` and its configuration files ")
    assert "`--mixed_precision` arg cannot be set to `fp16` when `bf16` is set in the DeepSpeed config file" in message


# ---- The Hub. -------------------------------------------------------------------------------------------------------


def test_pushing_at_every_checkpoint_without_pushing(refusal):
    assert refusal("--hub_strategy", "checkpoint") == "`--hub_strategy checkpoint` needs `--push_to_hub`."


def test_pushing_without_a_token(refusal, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert refusal("--push_to_hub") == "`--push_to_hub` needs a token: run `hf auth login` or pass `--hub_token`."


# ---- The output folder. ---------------------------------------------------------------------------------------------


def test_an_output_folder_that_is_not_empty(refusal, tmp_path):
    (tmp_path / "output" / "transformer_2").mkdir(parents=True)
    (tmp_path / "output" / "transformer_2" / "diffusion_pytorch_model.safetensors").write_bytes(b"weeks of work")
    message = refusal()
    assert message.startswith(f"`--output_dir {tmp_path}/output` is not empty.")
    assert "`--resume_from_checkpoint latest`" in message and "`--overwrite_output_dir`" in message


def test_an_output_folder_is_not_overwritten_for_a_run_that_is_refused(refusal, tmp_path):
    (tmp_path / "output" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "output" / "checkpoint-10" / "trainer_state.json").write_text("{}")
    assert "`--height" in refusal("--overwrite_output_dir", "--height", 40)


@pytest.mark.parametrize("flags", ["", "--overwrite_output_dir", "--resume_from_checkpoint latest"])
def test_an_output_folder_that_is_a_file(refusal, tmp_path, flags):
    (tmp_path / "output").write_text("a file")
    assert refusal(*flags.split()) == f"`--output_dir {tmp_path}/output` is a file."


def test_a_checkpoint_that_is_not_there(refusal, tmp_path):
    (tmp_path / "output" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "output" / "checkpoint-10" / "trainer_state.json").write_text("{}")
    message = refusal("--resume_from_checkpoint", tmp_path / "output" / "checkpoint-20")
    assert message.startswith(
        f"`--resume_from_checkpoint {tmp_path}/output/checkpoint-20` is not a complete checkpoint"
    )
    assert message.endswith(f"{tmp_path}/output/checkpoint-10.")


def test_a_checkpoint_that_is_not_complete(refusal, tmp_path):
    folder = tmp_path / "output" / "checkpoint-10.unfinished"
    folder.mkdir(parents=True)
    message = refusal("--resume_from_checkpoint", folder)
    assert message.startswith(f"`--resume_from_checkpoint {folder}` is not a complete checkpoint")
    assert message.endswith("none.")


# ---- The checkpoint to resume from. ---------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(plain_run, tmp_path):
    """A copy of a complete checkpoint in the output folder, to resume from with the flags of `RESUME`, or to spoil."""
    return Path(shutil.copytree(plain_run / "checkpoint-2", tmp_path / "output" / "checkpoint-2"))


RESUME = ["--learning_rate", "1e-3", "--resume_from_checkpoint", "latest"]


def edit_run(checkpoint, **values):
    """Makes a checkpoint look as if its run had been another one."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["run"].keys() >= values.keys()
    edit_json(checkpoint / "trainer_state.json", run={**state["run"], **values})


def test_the_checkpoint_that_the_other_tests_spoil_is_accepted(make_flags, checkpoint, monkeypatch):
    class LoadingStarted(Exception):
        pass

    def stop(*args, **kwargs):
        raise LoadingStarted

    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", stop)
    with pytest.raises(LoadingStarted), launched(*CPU.split()):
        main(parse_args(make_flags(*RESUME, "--validation_prompts")))


def test_resuming_on_another_number_of_processes(refusal, checkpoint):
    edit_run(checkpoint, num_processes=8)
    message = refusal(*RESUME)
    assert message.startswith(f"{checkpoint} was made with another num_processes: 8. It cannot go on with 1.")


def test_resuming_without_deepspeed_what_zero_2_made(refusal, checkpoint):
    edit_run(checkpoint, engine="ZeRO-2")
    message = refusal(*RESUME)
    assert message.startswith(f"{checkpoint} was made with another engine: ZeRO-2. It cannot go on with ")
    assert "without DeepSpeed" in message


@pytest.mark.parametrize(
    "engine, name",
    [
        ("zero2", "ZeRO-2"),
        ("zero2_bf16", "ZeRO-2, bf16_master_weights_and_grads"),
        ("zero3_offload", "ZeRO-3, offload_param, offload_optimizer"),
    ],
)
def test_resuming_with_deepspeed_what_was_made_without(refusal, checkpoint, engine, name):
    message = refusal(*RESUME, launcher=f"{ZERO_2} --deepspeed_config_file ds_configs/{engine}.json")
    assert message.startswith(f"{checkpoint} was made with another engine: without DeepSpeed. It cannot go on with ")
    assert name in message


def test_resuming_in_another_precision(refusal, checkpoint):
    message = refusal(*RESUME, launcher=f"{CPU} --mixed_precision bf16")
    assert message.startswith(f"{checkpoint} was made with another mixed_precision: no. It cannot go on with bf16.")


@pytest.mark.parametrize(
    "flags, found, value",
    [
        ("--learning_rate 1e-5", "[0.001, 'constant', 0]", "[1e-05, 'constant', 0]"),
        ("--lr_scheduler cosine", "[0.001, 'constant', 0]", "[0.001, 'cosine', 0]"),
        ("--lr_warmup_steps 5", "[0.001, 'constant', 0]", "[0.001, 'constant', 5]"),
    ],
)
def test_resuming_with_another_learning_rate_or_schedule(refusal, checkpoint, flags, found, value):
    message = refusal(*RESUME, *flags.split())
    problem = f"{checkpoint} was made with another learning rate and schedule: {found}. It cannot go on with {value}."
    assert message.startswith(problem)


@pytest.mark.parametrize(
    "flags, value",
    [
        ("--adam_beta1 0.8", "[0.8, 0.999, 1e-08, 0.0001]"),
        ("--adam_beta2 0.99", "[0.9, 0.99, 1e-08, 0.0001]"),
        ("--adam_epsilon 1e-6", "[0.9, 0.999, 1e-06, 0.0001]"),
        ("--adam_weight_decay 0", "[0.9, 0.999, 1e-08, 0.0]"),
    ],
)
def test_resuming_with_other_settings_of_adamw(refusal, checkpoint, flags, value):
    message = refusal(*RESUME, *flags.split())
    found = "[0.9, 0.999, 1e-08, 0.0001]"
    problem = f"{checkpoint} was made with another betas, epsilon and decay: {found}. It cannot go on with {value}."
    assert message.startswith(problem)


def test_resuming_with_another_number_of_updates_per_rollout(refusal, checkpoint):
    message = refusal(*RESUME, "--updates_per_rollout", 2)
    problem = f"{checkpoint} was made with another updates_per_rollout: 1. It cannot go on with 2."
    assert message.startswith(problem)


def test_resuming_with_another_optimizer(refusal, checkpoint):
    pytest.importorskip("torchao")
    message = refusal(*RESUME, "--optimizer", "adamw_8bit")
    assert message.startswith(f"{checkpoint} was made with another optimizer: adamw. It cannot go on with adamw_8bit.")


def test_resuming_from_another_base_model(refusal, checkpoint, model_copy):
    shutil.copytree(model_copy / "transformer", model_copy / "transformer_2", dirs_exist_ok=True)
    message = refusal(*RESUME, "--pretrained_model_name_or_path", model_copy)
    assert message.startswith(f"{checkpoint} was made with another base model, by a hash of its weights: ")


def test_a_run_that_cannot_be_resumed_in_another_folder_makes_no_folder(refusal, checkpoint, tmp_path):
    edit_run(checkpoint, num_processes=8)
    more = ["--resume_from_checkpoint", checkpoint, "--output_dir", tmp_path / "other"]
    assert refusal(*RESUME, *more).startswith(f"{checkpoint} was made with another num_processes")


def test_a_named_checkpoint_without_its_state(refusal, checkpoint):
    (checkpoint / "trainer_state.json").unlink()
    message = refusal(*RESUME, "--resume_from_checkpoint", checkpoint)
    assert message.startswith(f"`--resume_from_checkpoint {checkpoint}` is not a complete checkpoint")
    assert message.endswith("none.")


@pytest.mark.parametrize("left_over", ["checkpoint-2.unfinished", "checkpoint-2.discarded.unfinished"])
def test_a_named_folder_that_was_still_being_written_or_removed(refusal, checkpoint, left_over):
    folder = checkpoint.rename(checkpoint.with_name(left_over))
    message = refusal(*RESUME, "--resume_from_checkpoint", folder)
    assert message.startswith(f"`--resume_from_checkpoint {folder}` is not a complete checkpoint")


@pytest.mark.parametrize("name", ["latest", "checkpoint-2"])
@pytest.mark.parametrize(
    "content",
    ['{"global_step": 2, "history": []}', '{"history": [], "run": {}}', "[]", "", '{"global_step": 2, "histo'],
    ids=["of an older version", "without a step", "not a dictionary", "empty", "cut off"],
)
def test_a_checkpoint_with_a_state_that_says_too_little(refusal, checkpoint, name, content):
    (checkpoint / "trainer_state.json").write_text(content)
    message = refusal(*RESUME, "--resume_from_checkpoint", checkpoint if name == checkpoint.name else name)
    assert message.startswith(f"`{checkpoint}/trainer_state.json` is damaged or of another version of this script")
    assert "resume from another checkpoint" in message


# ---- The command line. ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", "--dataset_name"])
def test_a_required_flag_is_missing(make_flags, capsys, flag):
    arguments = make_flags()
    index = arguments.index(flag)
    with pytest.raises(SystemExit) as caught:
        parse_args(arguments[:index] + arguments[index + 2 :])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: the following arguments are required: {flag}\n")


def test_a_real_launch_ends_with_the_message_and_without_a_traceback(make_flags, tmp_path):
    launcher = "-m accelerate.commands.launch --quiet --config_file accelerate_configs/cpu.yaml train_srpo_wan_t2i.py"
    done = subprocess.run(
        [sys.executable, *launcher.split(), *make_flags("--dataset_name", tmp_path / "nothing")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: `--dataset_name {tmp_path}/nothing` cannot be loaded")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "output").exists()


def test_a_real_launch_of_two_processes_says_what_is_wrong_with_the_deepspeed_file(make_flags, write_json, tmp_path):
    launcher = f"{write_json(train_batch_size=8)} --num_processes 2"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *launcher.split(),
            "train_srpo_wan_t2i.py",
            *make_flags(),
        ],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    message = (
        "error: The DeepSpeed file says `train_batch_size` 8, but `--train_batch_size` and 2 processes make it 2."
    )
    assert 1 <= done.stderr.count(message) <= 2, done.stderr
    assert 'File "train_srpo_wan_t2i.py"' not in done.stderr and f'File "{ROOT}/train' not in done.stderr
    assert not (tmp_path / "output").exists()
