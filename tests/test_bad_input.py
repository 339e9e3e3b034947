"""
What `train_srpo_wan_t2i.py` refuses: in one clear line that names the flag, before any model is loaded, and without
touching a file.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import Array2D, DatasetDict, Features, load_from_disk
from safetensors.torch import load_file, save_file
from transformers import BertConfig, CLIPModel

from diffusers import AutoencoderKLWan, WanTransformer3DModel

from train_srpo_wan_t2i import main, parse_args


ROOT = Path(__file__).parent.parent


@pytest.fixture
def command(tiny_model, tiny_dataset, tiny_reward, tmp_path):
    """Function: flags -> the arguments of a run that would work, but for those flags."""
    paths = ["--pretrained_model_name_or_path", tiny_model, "--dataset_name", tiny_dataset]
    reward = ["--reward_model", "CLIP", "--reward_model_path", tiny_reward, "--output_dir", tmp_path / "output"]
    sizes = ["--max_sequence_length", 16, "--height", 32, "--width", 32, "--validation_size", 32]
    return lambda *flags: [str(item) for item in (*paths, *reward, *sizes, *flags)]


@pytest.fixture
def refusal(command, tmp_path, monkeypatch, capsys):
    """
    Function: runs the script with flags that it must refuse, and returns its message. Fails if a model is loaded, if
    a file in `tmp_path` changes, or if the message is not one line.
    """

    def fail(*args, **kwargs):
        pytest.fail("a model was loaded before the input was checked")

    for model_class in (WanTransformer3DModel, AutoencoderKLWan, CLIPModel):
        monkeypatch.setattr(model_class, "from_pretrained", fail)

    def refuse(*flags):
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as caught:
            main(parse_args(command(*flags)))
        assert snapshot(tmp_path) == before
        if caught.value.code == 2:  # argparse writes the message itself
            return re.search(r"^\S+: error: (.*)\n\Z", capsys.readouterr().err, re.MULTILINE).group(1)
        assert re.fullmatch("error: .*", caught.value.code), "one line, which makes Python exit with 1"
        return caught.value.code.removeprefix("error: ")

    return refuse


def snapshot(folder):
    """Every path in a folder, with the hash of what a file holds."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def edit_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def model_copy(tiny_model, tmp_path):
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_the_command_that_the_other_tests_spoil_is_accepted(command, monkeypatch):
    class LoadingStarted(Exception):
        pass

    def stop(*args, **kwargs):
        raise LoadingStarted

    monkeypatch.setattr("train_srpo_wan_t2i.make_accelerator", stop)
    with pytest.raises(LoadingStarted):
        main(parse_args(command()))


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
        "checkpoints_total_limit",
    ],
)
@pytest.mark.parametrize("value", [0, -3])
def test_a_count_below_one(refusal, name, value):
    assert refusal(f"--{name}", value) == f"`--{name}` must be at least 1, but is {value}."


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


# ---- The Hub. -------------------------------------------------------------------------------------------------------


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


# ---- The command line. ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", "--dataset_name"])
def test_a_required_flag_is_missing(command, capsys, flag):
    arguments = command()
    index = arguments.index(flag)
    with pytest.raises(SystemExit) as caught:
        parse_args(arguments[:index] + arguments[index + 2 :])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: the following arguments are required: {flag}\n")


def test_a_real_launch_ends_with_the_message_and_without_a_traceback(command, tmp_path):
    launcher = "-m accelerate.commands.launch --quiet --config_file accelerate_configs/cpu.yaml train_srpo_wan_t2i.py"
    done = subprocess.run(
        [sys.executable, *launcher.split(), *command("--dataset_name", tmp_path / "nothing")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: `--dataset_name {tmp_path}/nothing` cannot be loaded")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "output").exists()
