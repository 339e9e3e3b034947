"""
What `train_srpo_wan_t2i.py` refuses: flags, models, datasets, rewards, output folders and checkpoints. It says in one
line what is wrong with which of them, before it loads a model, and leaves the disk as it was.

In the tables, `{model}`, `{reward}`, `{dataset}`, `{checkpoint}` are copies in `{folder}` of what works, made when
they are named; `{tiny}` and so on are the originals. ` ... ` in a message stands for any text.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from datasets import Array2D, DatasetDict, Features, load_from_disk
from helpers import CPU, edit_json, launched, make_transformer, run_launcher
from inputs import edit_weights, renew_checksums, save_in_shards, truncate
from transformers import BertConfig, CLIPTokenizer

from diffusers import AutoencoderKLWan

from train_srpo_wan_t2i import HPSReward, main, parse_args


class Inputs(dict):
    """What the names in the tables stand for. A copy is made when its name is used for the first time."""

    def __init__(self, folder, monkeypatch, **originals):
        super().__init__(folder=folder, output=folder / "output", hps=folder / "hps.pt")
        self.monkeypatch, self.originals = monkeypatch, originals

    def __missing__(self, name):
        original = self.originals[name]
        if callable(original):
            original = original()
        if name in ("model", "reward", "dataset"):
            original = Path(shutil.copytree(original, self["folder"] / name))
        elif name == "checkpoint":
            shutil.copytree(original, self["output"], ignore=shutil.ignore_patterns("transformer_2", "*.png", "*.md"))
            original = self["output"] / "checkpoint-2"
        self[name] = original
        return original

    def fill(self, text):
        """The text with what its names stand for. A flag and its values are words, or a list if some are unusual."""
        words = text.split() if isinstance(text, str) else text
        return [word.format_map(self) for word in words]


@pytest.fixture
def inputs(request, tmp_path, monkeypatch, tiny_model, tiny_reward, tiny_dataset):
    runs = {
        "boundary": lambda: request.getfixturevalue("boundary_dataset"),
        "one_expert": lambda: request.getfixturevalue("tiny_one_expert_model"),
        "checkpoint": lambda: request.getfixturevalue("plain_run"),
    }
    copies = {"model": tiny_model, "reward": tiny_reward, "dataset": tiny_dataset}
    originals = {"tiny": tiny_model, "tiny_reward": tiny_reward, "tiny_dataset": tiny_dataset}
    return Inputs(tmp_path, monkeypatch, **runs, **copies, **originals)


# ---- Flags alone. ---------------------------------------------------------------------------------------------------

COUNTS = """max_sequence_length height width num_inference_steps sampling_steps rollout_batch_size updates_per_rollout
    lora_rank train_batch_size gradient_accumulation_steps max_train_steps max_skipped_updates validation_steps
    validation_size checkpointing_steps checkpoints_total_limit""".split()
POSITIVE = "shift rollout_shift loss_weight_shift lora_alpha adam_epsilon max_grad_norm".split()
FROM_0 = "reward_margin drift_weight learning_rate adam_weight_decay".split()
SHARES = "adam_beta1 adam_beta2 lora_dropout".split()
GUIDANCE = "rollout_guidance_scale validation_guidance_scale".split()
BLANK = """pretrained_model_name_or_path dataset_name reward_model_path reward_processor_path output_dir revision
    variant cache_dir positive_words negative_words validation_prompts lora_target_modules resume_from_checkpoint
    logging_dir hub_model_id""".split()

FLAGS = [
    *((f"--{name} 0", f"argument --{name}: must be at least 1, but is 0") for name in COUNTS),
    *((f"--{name} {v}", f"argument --{name}: must be above 0, but is {v}") for name in POSITIVE for v in ("0", "nan")),
    *((f"--{name} {v}", f"argument --{name}: must be at least 0, but is {v}") for name in FROM_0 for v in (-1, "inf")),
    *(
        (f"--{n} {v}", f"argument --{n}: must be at least 0 and below 1, but is {v}")
        for n in SHARES
        for v in (-0.1, 1)
    ),
    *(
        (f"--{name} {v}", f"argument --{name}: must be at least 1, but is {v}")
        for name in GUIDANCE
        for v in (0.5, "nan")
    ),
    *(([f"--{name}", blank], f" ... --{name} ... must not be blank") for name in BLANK for blank in ("", " ")),
    ("--sampling_steps -3", "argument --sampling_steps: must be at least 1, but is -3"),
    ("--max_train_steps 1.5", "argument --max_train_steps: invalid ... value: '1.5'"),
    ("--max_train_steps nan", "argument --max_train_steps: invalid ... value: 'nan'"),
    ("--learning_rate 5e-6,", "argument --learning_rate: invalid ... value: '5e-6,'"),
    ("--dataloader_num_workers -1", "argument --dataloader_num_workers: must be at least 0, but is -1"),
    ("--lr_warmup_steps -1", "argument --lr_warmup_steps: must be at least 0, but is -1"),
    ("--seed -1", "argument --seed: must be at least 0 and below 4294967296, but is -1"),
    ("--seed 4294967296", "argument --seed: must be at least 0 and below 4294967296, but is 4294967296"),
    (f"--seed {10**400}", "argument --seed: "),
    ("--timestep_length 9", "argument --timestep_length: must be at least 10 and below 10000000, but is 9"),
    ("--groundtruth_ratio 0", "argument --groundtruth_ratio: must be above 0 and below 1, but is 0"),
    ("--groundtruth_ratio 1", "argument --groundtruth_ratio: must be above 0 and below 1, but is 1"),
    ("--discount_pos 0.1 nan", "argument --discount_pos: must be above -1, but is nan"),
    ("--discount_inv -1 0", "argument --discount_inv: must be above -1, but is -1"),
    ("--discount_pos 0.1", "argument --discount_pos: expected 2 arguments"),
    ("--train_timestep -1 25", "argument --train_timestep: must be at least 0, but is -1"),
    ("--train_timestep 25 5", "`--train_timestep 25 5` must "),
    ("--train_timestep 5 5", "`--train_timestep 5 5` must "),
    ("--train_timestep 5 41", "`--train_timestep 5 41` must "),
    ("--num_inference_steps 20", "`--train_timestep 5 25` must "),
    ("--updates_per_rollout 4", "`--checkpointing_steps 10` must be a multiple of `--updates_per_rollout`"),
    ("--updates_per_rollout 5 --max_train_steps 7", "`--max_train_steps 7` must be a multiple of "),
    ("--renew_noise", "`--renew_noise` needs `--updates_per_rollout` above 1"),
    ("--positive_words Real Flat", "`--positive_words Real Flat` ... `--negative_words`"),
    ("--positive_words a --negative_words b A", "`--positive_words a` ... `--negative_words`"),
    ("--lr_scheduler linear --lr_warmup_steps 101", "`--lr_warmup_steps 101` must be at most `--max_train_steps"),
    ("--lr_warmup_steps 5", "`--lr_warmup_steps` needs a `--lr_scheduler` that warms up"),
    ("--loss linear --reward_margin 1", "`--reward_margin` is not for `--loss linear`"),
    ("--branches denoise --discount_inv 0 0", "`--discount_inv` is not for `--branches denoise`"),
    ("--branches inversion --discount_pos 0 0", "`--discount_pos` is not for `--branches inversion`"),
    ("--reward_model HPS --reward_processor_path x", "`--reward_processor_path` is not for HPS"),
    ("--lora_alpha 8", "`--lora_alpha` needs `--lora_rank`"),
    ("--lora_dropout 0", "`--lora_dropout` needs `--lora_rank`"),
    ("--lora_target_modules to_q", "`--lora_target_modules` needs `--lora_rank`"),
    ("--base_weights fp8", "`--base_weights` needs `--lora_rank`"),
    ("--overwrite_output_dir --resume_from_checkpoint latest", "`--overwrite_output_dir` would delete what to resume"),
    ("--allow_changes", "`--allow_changes` needs `--resume_from_checkpoint`"),
    ("--hub_strategy checkpoint", "`--hub_strategy` needs `--push_to_hub`"),
    ("--hub_private_repo", "`--hub_private_repo` needs `--push_to_hub`"),
    ("--logging_dir /elsewhere", " ... --logging_dir"),
    ("--logging_dir ..", " ... --logging_dir"),
    ("--logging_dir .", " ... --logging_dir"),
    ("--report_to wandb", "`--report_to wandb` ... `pip install wandb`"),
    ("--report_to foo", "argument --report_to: invalid choice: 'foo'"),
    ("--optimizer sgd", "argument --optimizer: invalid choice: 'sgd'"),
    ("--transformer_subfolder /abs/path", "argument --transformer_subfolder: invalid choice: '/abs/path'"),
    ("--transformer_subfolder transformer_3", "argument --transformer_subfolder: invalid choice: 'transformer_3'"),
    ("--seed", "argument --seed: expected one argument"),
    ("--max_train 5", "unknown arguments: --max_train. See --help"),
    (
        "--hub_token hf_secret",
        "unknown arguments: --hub_token. See --help; tokens come from `hf auth login` or HF_TOKEN",
    ),
    (
        "--hub_token=hf_secret",
        "unknown arguments: --hub_token. See --help; tokens come from `hf auth login` or HF_TOKEN",
    ),
    ("hf_secret", "unknown arguments: a value without a flag. "),
]

# ---- Flags that the model contradicts. ------------------------------------------------------------------------------

ONE_EXPERT = "--pretrained_model_name_or_path {one_expert} --transformer_subfolder transformer"
FLAGS_FOR_MODEL = [
    ("--train_timestep 4 25", "`--train_timestep 4 25` starts at sigma 0.900, ... 0.875 ... 5 40`"),
    ("--train_timestep 0 25", "`--train_timestep 0 25` starts at sigma 1.000, ... 0.875 ... 5 40`"),
    ("--train_timestep 11 25 --shift 3", "`--train_timestep 11 25` starts at sigma 0.888, ... 12 40`"),
    ("--num_inference_steps 50", "`--train_timestep 5 25` starts at sigma 0.900, ... 7 50`"),
    ("--height 40", "`--height 40` must be a multiple of 16 for this model, for example 32."),
    ("--width 8", "`--width 8` must be a multiple of 16 for this model, for example 16."),
    ("--validation_size 24", "`--validation_size 24` must be a multiple of 16 for this model, for example 32."),
    (
        "--lora_rank 4 --lora_target_modules to_nothing",
        "`--lora_target_modules`: the transformer has no layer `to_nothing`",
    ),
    ("--lora_rank 4 --lora_target_modules norm_q", "`--lora_target_modules` must name linear layers"),
    ("--lora_rank 4 --lora_target_modules attn1", "`--lora_target_modules` must name linear layers"),
    (f"{ONE_EXPERT} --rollout_start boundary", "`--rollout_start boundary` needs a model of two experts"),
    ("--max_sequence_length 32", "`--dataset_name {tiny_dataset}` holds embeddings of length 16, ... needs 32"),
    (["--validation_prompts", "a boat", "a green boat"], "`--validation_prompts`: ... 'a green boat'"),
    ("--rollout_start boundary", "`--dataset_name {tiny_dataset}` has no boundary latents"),
    (
        "--rollout_start boundary --sampling_steps 3 --dataset_name {boundary}",
        "`--dataset_name ... `--sampling_steps 2`, not 3",
    ),
    (
        "--rollout_start boundary --sampling_steps 2 --rollout_shift 2 --dataset_name {boundary}",
        "`--dataset_name ... `--rollout_shift 3.0`, not 2.0",
    ),
]


# ---- Models. --------------------------------------------------------------------------------------------------------


def remove(name):
    """Spoils inputs: removes a file or a folder of theirs, such as "model/vae"."""

    def spoil(inputs):
        path = find(inputs, name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def find(inputs, name):
    key, *parts = name.split("/")
    return Path(inputs[key], *parts)


def write(name, content=""):
    """Spoils inputs: replaces a file of theirs."""

    def spoil(inputs):
        path = find(inputs, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)

    return spoil


def edit(name, **values):
    return lambda inputs: edit_json(find(inputs, name), **values)


def cut_off(name):
    return lambda inputs: truncate(find(inputs, name))


def change(name, tensor, new):
    """Spoils inputs: replaces a tensor in a file of weights by what `new` makes of it, or removes it."""

    def spoil_weights(weights):
        weights[tensor] = new(weights[tensor])
        if weights[tensor] is None:
            del weights[tensor]

    return lambda inputs: edit_weights(find(inputs, name), spoil_weights)


def add_prefix(name):
    def spoil_weights(weights):
        for tensor in list(weights):
            weights[f"model.{tensor}"] = weights.pop(tensor)

    return lambda inputs: edit_weights(find(inputs, name), spoil_weights)


def shards(name, spoil_shard):
    return lambda inputs: spoil_shard(save_in_shards(find(inputs, name))[1])


def pickled(name):
    """Spoils inputs: the weights are there, as a pickle."""

    def spoil(inputs):
        file = find(inputs, name)
        file.rename(file.with_suffix(".bin"))

    return spoil


def add_tensor(name):
    return lambda inputs: edit_weights(find(inputs, name), lambda weights: weights.update(extra=torch.zeros(3)))


def not_whole(name):
    key, path = name.split("/", 1)
    return f"`{{{key}}}/{path}` is not a whole safetensors file"


def video_from_image(inputs):
    """Of a whole model, but one that sees an image beside the noise: twice the channels."""
    transformer = make_transformer(in_channels=8)
    transformer.save_pretrained(inputs["model"] / "transformer_2")


def nothing(inputs):
    pass


EXPERT, VAE = (
    "model/transformer_2/diffusion_pytorch_model.safetensors",
    "model/vae/diffusion_pytorch_model.safetensors",
)
REWARD = "reward/model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 345\n"
MODEL_FLAG, REWARD_FLAG = "--pretrained_model_name_or_path {model}", "--reward_model_path {reward}"
IS_NO_CLIP = f"`{REWARD_FLAG}` is not the folder or Hub id of a CLIPModel"
PARTS = {
    "expert": (EXPERT, "proj_out.bias", MODEL_FLAG, f"`{MODEL_FLAG}` has no whole model in `transformer_2`: "),
    "VAE": (VAE, "decoder.conv_out.bias", MODEL_FLAG, f"`{MODEL_FLAG}` has no whole model in `vae`: "),
    "reward": (REWARD, "visual_projection.weight", REWARD_FLAG, f"{IS_NO_CLIP}: "),
}

WEIGHTS = [
    (f"{part}, {what}", spoil, flags, problem + detail)
    for part, (file, tensor, flags, problem) in PARTS.items()
    for what, spoil, detail in (
        (
            "a tensor is missing",
            change(file, tensor, lambda old: None),
            f"the weights lack 1 tensors, such as `{tensor}`",
        ),
        (
            "a tensor is shorter",
            change(file, tensor, lambda old: old[1:].clone()),
            f"the weights have other shapes of 1 tensors, such as `{tensor}`",
        ),
        ("an unknown tensor", add_tensor(file), "the weights have unknown 1 tensors, such as `extra`"),
        ("another prefix", add_prefix(file), "the weights lack "),
        ("the file is cut off", cut_off(file), not_whole(file)),
        ("the file is empty", write(file), not_whole(file)),
        ("the file is a pointer", write(file, POINTER), not_whole(file)),
        ("the file is missing", remove(file), f" ... {Path(file).name}"),
        ("the file is a pickle", pickled(file), f" ... {Path(file).name}"),
        ("a shard is missing", shards(file, Path.unlink), " ... -00002-of-"),
        ("a shard is cut off", shards(file, truncate), " ... -00002-of-"),
    )
]

MODELS = [
    (
        "not there",
        nothing,
        "--pretrained_model_name_or_path {folder}/none",
        "`--pretrained_model_name_or_path {folder}/none` is not here, and the Hub does not answer",
    ),
    (
        "a file",
        write("folder/file"),
        "--pretrained_model_name_or_path {folder}/file",
        "`--pretrained_model_name_or_path {folder}/file` is not a Wan pipeline",
    ),
    (
        "a CLIP model",
        nothing,
        "--pretrained_model_name_or_path {tiny_reward}",
        "`--pretrained_model_name_or_path {tiny_reward}` is not a Wan pipeline",
    ),
    (
        "index cut off",
        write("model/model_index.json", '{"_class'),
        MODEL_FLAG,
        f"`{MODEL_FLAG}` is not a Wan pipeline",
    ),
    ("index a list", write("model/model_index.json", "[]"), MODEL_FLAG, f"`{MODEL_FLAG}` has no `transformer_2`"),
    (
        "index of no class",
        edit("model/model_index.json", transformer_2=[]),
        MODEL_FLAG,
        f"`{MODEL_FLAG}` is not a Wan",
    ),
    ("no VAE config", remove("model/vae/config.json"), MODEL_FLAG, f"`{MODEL_FLAG}` is not a Wan pipeline"),
    ("no scheduler", remove("model/scheduler"), MODEL_FLAG, f"`{MODEL_FLAG}` is not a Wan pipeline"),
    (
        "one expert",
        nothing,
        "--pretrained_model_name_or_path {one_expert}",
        "`--pretrained_model_name_or_path {one_expert}` has no ... `--transformer_subfolder transformer`",
    ),
    (
        "the other expert",
        nothing,
        "--transformer_subfolder transformer",
        "`--pretrained_model_name_or_path {tiny}` has two experts: ... `--transformer_subfolder transformer_2`.",
    ),
    (
        "no folder of the expert",
        remove("model/transformer_2"),
        MODEL_FLAG,
        f"`{MODEL_FLAG}` lacks the model in `transformer_2`",
    ),
    (
        "config of the expert cut off",
        cut_off("model/transformer_2/config.json"),
        MODEL_FLAG,
        f"`{MODEL_FLAG}` lacks the model in `transformer_2`",
    ),
    (
        "no boundary",
        edit("model/model_index.json", boundary_ratio=None),
        MODEL_FLAG,
        f"`{MODEL_FLAG}` has no `boundary_ratio`",
    ),
    ("no text encoder", remove("model/text_encoder"), MODEL_FLAG, f"`{MODEL_FLAG}` lacks the text encoder"),
    (
        "text encoder cut off",
        cut_off("model/text_encoder/model.safetensors"),
        MODEL_FLAG,
        f"`{MODEL_FLAG}` lacks the text encoder",
    ),
    (
        "another text encoder",
        change("model/text_encoder/model.safetensors", "encoder.final_layer_norm.weight", lambda old: old + 1),
        MODEL_FLAG,
        "`--dataset_name {tiny_dataset}` holds embeddings of the text encoder ... Embed the captions again",
    ),
    ("video from an image", video_from_image, MODEL_FLAG, f"`{MODEL_FLAG}` "),
]

LOADED = [  # what only a look at all weights tells
    (
        f"{part}, {value} in the weights",
        change(file, tensor, lambda old, value=value: old.fill_(value)),
        flags,
        f"`{flags}`: the weights of ... {tensor}` are NaN or infinite",
    )
    for part, (file, tensor, flags, _) in PARTS.items()
    for value in (float("nan"), float("-inf"))
]


# ---- Datasets. ------------------------------------------------------------------------------------------------------


def splits(change):
    """Spoils inputs: writes the dataset again with what `change` makes of the dict of its splits."""

    def spoil(inputs):
        old, new = load_from_disk(inputs["tiny_dataset"]), inputs["folder"] / "new"
        DatasetDict(change(dict(old))).save_to_disk(new)
        inputs["dataset"] = new

    return spoil


def without_column(column):
    return splits(lambda old: {**old, "train": old["train"].remove_columns(column)})


def widen(old):
    features = {**old["train"].features, "prompt_embeds": Array2D(shape=(None, 24), dtype="int16")}
    rows = old["train"].map(lambda row: {"prompt_embeds": [[0] * 24] * 3}, features=Features(features))
    return {**old, "train": rows}


def one_row_of_another_encoder(old):
    hashes = [*old["train"]["text_encoder_fingerprint"][:5], "0123456789abcdef"]
    rows = old["train"].remove_columns("text_encoder_fingerprint").add_column("text_encoder_fingerprint", hashes)
    return {**old, "train": rows}


def cut_off_rows(inputs):
    for file in Path(inputs["dataset"]).rglob("*.arrow"):
        truncate(file)


DATASET = "--dataset_name {dataset}"
DATASETS = [
    (
        "not there",
        nothing,
        "--dataset_name {folder}/none",
        "`--dataset_name {folder}/none` cannot be loaded; make it with embed_prompts.py",
    ),
    (
        "a file",
        write("folder/file", "a cat"),
        "--dataset_name {folder}/file",
        "`--dataset_name {folder}/file` cannot be loaded",
    ),
    (
        "an empty folder",
        lambda inputs: (inputs["folder"] / "empty").mkdir(),
        "--dataset_name {folder}/empty",
        "`--dataset_name {folder}/empty` cannot be loaded",
    ),
    ("rows cut off", cut_off_rows, DATASET, f"`{DATASET}` cannot be loaded"),
    ("rows missing", remove("dataset/train"), DATASET, f"`{DATASET}` cannot be loaded"),
    (
        "no split train",
        splits(lambda old: {"negative": old["negative"]}),
        DATASET,
        f"`{DATASET}` was not made by embed_prompts.py: ... `train`",
    ),
    (
        "no split negative",
        splits(lambda old: {"train": old["train"]}),
        DATASET,
        f"`{DATASET}` was not made by embed_prompts.py: ... `negative`",
    ),
    (
        "no rows",
        splits(lambda old: {**old, "train": old["train"].select([])}),
        DATASET,
        f"`{DATASET}` ... embed_prompts.py",
    ),
    *(
        (
            f"no column {name}",
            without_column(name),
            DATASET,
            f"`{DATASET}` was not made by embed_prompts.py: ... `train`",
        )
        for name in ("caption", "prompt_embeds", "text_encoder_fingerprint", "max_sequence_length")
    ),
    ("another hidden size", splits(widen), DATASET, f"`{DATASET}` holds embeddings of size 24, ... needs 16"),
    (
        "a caption of another text encoder",
        splits(one_row_of_another_encoder),
        DATASET,
        f"`{DATASET}` holds embeddings of the text encoder ... 0123456789abcdef",
    ),
]


# ---- Rewards. -------------------------------------------------------------------------------------------------------


class Evil:
    """What a pickle runs when it is loaded without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def hps(content):
    return lambda inputs: torch.save(content(inputs) if callable(content) else content, inputs["hps"])


def hps_weights(spoil_weights):
    """Spoils inputs: an HPS checkpoint of all tensors, each of them one zero, that is spoilt."""

    def content(inputs):
        shapes = {name: tensor.shape for name, tensor in HPSReward.empty_model().state_dict().items()}
        weights = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
        return {"state_dict": spoil_weights(weights)}

    return hps(content)


def hps_cut_off(inputs):
    hps_weights(dict)(inputs)
    truncate(inputs["hps"])


def without_words(inputs):
    """All but the weights and the config, as after a partial download."""
    for file in Path(inputs["reward"]).iterdir():
        if file.name not in ("config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json"):
            file.unlink()


def without_processor(inputs):
    without_words(inputs)
    for file in Path(inputs["reward"]).glob("*processor_config.json"):
        file.unlink()


def few_words(inputs):
    """A tokenizer to which all control words are unknown."""
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "q</w>", "<|endoftext|>"])}
    special = {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "bos_token": "<s>", "pad_token": "<pad>"}
    CLIPTokenizer(vocab=vocab, merges=[], **special).save_pretrained(inputs["reward"])


HPS = "--reward_model HPS --reward_model_path {hps}"
NO_DICT = "`--reward_model_path {hps}` is not a checkpoint with a `state_dict`"
OTHER = "`--reward_model_path {hps}` is not of the architecture ViT-H-14: the weights "
PROCESSOR = "`--reward_processor_path {reward}` is not the folder or Hub id of a whole processor"
REWARDS = [
    *(
        (
            f"{name} not there",
            nothing,
            f"--reward_model {name} --reward_model_path {{folder}}/none",
            "`--reward_model_path {folder}/none` is not ",
        )
        for name in ("PickScore", "CLIP")
    ),
    (
        "HPS not there",
        nothing,
        HPS,
        "`--reward_model_path {hps}` is not a file. ... `hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir .`",
    ),
    (
        "HPS a folder",
        nothing,
        "--reward_model HPS --reward_model_path {folder}",
        "`--reward_model_path {folder}` is not a file",
    ),
    ("HPS with code", hps(lambda inputs: {"state_dict": Evil(inputs["folder"] / "evil")}), HPS, NO_DICT),
    ("HPS without state_dict", hps({"weights": {}}), HPS, NO_DICT),
    ("HPS a number", hps({"state_dict": 3}), HPS, NO_DICT),
    ("HPS a list", hps([1, 2]), HPS, NO_DICT),
    ("HPS a pointer", write("hps", POINTER), HPS, NO_DICT),
    ("HPS empty", write("hps"), HPS, NO_DICT),
    ("HPS cut off", hps_cut_off, HPS, NO_DICT),
    (
        "HPS small",
        hps({"state_dict": {"logit_scale": torch.ones(()), "visual.proj": torch.ones(4, 2)}}),
        HPS,
        OTHER + "lack ",
    ),
    (
        "HPS lacks a tensor",
        hps_weights(lambda old: {name: old[name] for name in old if name != "text_projection"}),
        HPS,
        OTHER + "lack 1 tensors, such as `text_projection`",
    ),
    (
        "HPS of another shape",
        hps_weights(lambda old: {**old, "text_projection": old["text_projection"][1:]}),
        HPS,
        OTHER + "have other shapes of 1 tensors, such as `text_projection`",
    ),
    (
        "HPS with another prefix",
        hps_weights(lambda old: {f"module.{name}": old[name] for name in old}),
        HPS,
        OTHER + "lack ",
    ),
    (
        "CLIP of another type",
        lambda inputs: BertConfig().save_pretrained(inputs["folder"] / "bert"),
        "--reward_model_path {folder}/bert",
        "`--reward_model_path {folder}/bert` is not the folder ... it is of type `bert`, and CLIP needs type `clip`",
    ),
    ("CLIP without a config", remove("reward/config.json"), REWARD_FLAG, IS_NO_CLIP),
    ("CLIP without a processor", without_processor, REWARD_FLAG, PROCESSOR),
    ("CLIP without a tokenizer", without_words, REWARD_FLAG, f"{PROCESSOR}: it has neither `tokenizer.json` nor "),
    ("CLIP with a tokenizer of few words", few_words, REWARD_FLAG, PROCESSOR),
    (
        "processor not there",
        nothing,
        "--reward_processor_path {folder}/none",
        "`--reward_processor_path {folder}/none` is not the folder or Hub id of a whole processor",
    ),
    (
        "processor of PickScore not there",
        nothing,
        "--reward_model PickScore --reward_processor_path {folder}/none",
        "`--reward_processor_path {folder}/none` is not the folder or Hub id of a whole processor",
    ),
]


# ---- Output folders. ------------------------------------------------------------------------------------------------


def run_with_results(inputs):
    write("output/run.json", "{}")(inputs)
    write("output/transformer_2/config.json", "{}")(inputs)


def link_to_model(inputs):
    (inputs["folder"] / "link").symlink_to(inputs["model"])


def full_disk(inputs):
    disk = SimpleNamespace(total=10**6, used=0, free=1000)
    inputs.monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)


def move_into_output(name):
    return lambda inputs: inputs.update({name: Path(shutil.copytree(inputs[name], inputs["output"] / "deep" / name))})


LONG = "x" * 300  # more letters than a name may have
LONG_PATHS = """pretrained_model_name_or_path dataset_name reward_model_path reward_processor_path output_dir
    resume_from_checkpoint""".split()
OUTPUT = "`--output_dir {output}`"
FOREIGN = f"{OUTPUT} is not empty, and not the folder of a run. Choose another."
LIES_IN = "` lies in `--output_dir {output}`. Choose another folder to write to."
LATEST = "--resume_from_checkpoint latest"
OUTPUTS = [
    *(
        (f"a file, {flags}", write("output", "a file"), flags, f"{OUTPUT} cannot be used")
        for flags in ("", "--overwrite_output_dir", LATEST)
    ),
    *(
        (f"a folder of the user, {flags}", write("output/thesis.tex"), flags, FOREIGN)
        for flags in ("", "--overwrite_output_dir", LATEST)
    ),
    ("a link to nothing", lambda inputs: inputs["output"].symlink_to("nowhere"), "", f"{OUTPUT} cannot be used"),
    (
        "below a file",
        write("folder/file"),
        "--output_dir {folder}/file/output",
        "`--output_dir {folder}/file/output` cannot be ",
    ),
    ("no permission", nothing, "--output_dir /proc/output", "`--output_dir /proc/output` cannot be written"),
    (
        "results of a run",
        run_with_results,
        "",
        f"{OUTPUT} is not empty. Choose another, ... `--resume_from_checkpoint latest` ... `--overwrite_output_dir`",
    ),
    (
        "results without a checkpoint",
        run_with_results,
        LATEST,
        f"{OUTPUT} has results, but no checkpoint to resume from",
    ),
    (
        "overwriting with a bad flag",
        run_with_results,
        "--overwrite_output_dir --height 40",
        "`--height 40` must be a multiple",
    ),
    (
        "the base model's folder",
        nothing,
        f"{MODEL_FLAG} --output_dir {{model}} --overwrite_output_dir",
        f"`{MODEL_FLAG}` lies in `--output_dir {{model}}`",
    ),
    (
        "a link to the base model's folder",
        link_to_model,
        f"{MODEL_FLAG} --output_dir {{folder}}/link --overwrite_output_dir",
        f"`{MODEL_FLAG}` lies in `--output_dir {{folder}}/link`",
    ),
    (
        "the base model through a link",
        link_to_model,
        "--pretrained_model_name_or_path {folder}/link --output_dir {model}",
        "`--pretrained_model_name_or_path {model}` lies in `--output_dir {model}`",
    ),
    (
        "the base model inside",
        move_into_output("model"),
        f"{MODEL_FLAG} --overwrite_output_dir",
        f"`{MODEL_FLAG}{LIES_IN}",
    ),
    ("the dataset inside", move_into_output("dataset"), f"{DATASET} --overwrite_output_dir", f"`{DATASET}{LIES_IN}"),
    (
        "the reward inside",
        move_into_output("reward"),
        f"{REWARD_FLAG} --overwrite_output_dir",
        f"`{REWARD_FLAG}{LIES_IN}",
    ),
    (
        "the processor inside",
        move_into_output("reward"),
        "--reward_processor_path {reward}",
        f"`--reward_processor_path {{reward}}{LIES_IN}",
    ),
    *((f"{flag} too long", nothing, f"--{flag} {LONG}", f"`--{flag} {LONG}` ") for flag in LONG_PATHS),
    (
        "HPS too long",
        nothing,
        f"--reward_model HPS --reward_model_path {LONG}",
        f"`--reward_model_path {LONG}` is not a file",
    ),
    ("no space", full_disk, "", " ... {output} ... GB ... 1e-06 GB"),
]


# ---- Checkpoints. ---------------------------------------------------------------------------------------------------

STATE, SUMS = "checkpoint/trainer_state.json", "checkpoint/SHA256SUMS"
RESUME = ["--sampling_steps", "2", "--learning_rate", "1e-3", "--validation_prompts"]


def seal(spoil):
    """Spoils a checkpoint and makes the checksums fit again, as whoever means harm would."""

    def spoil_and_seal(inputs):
        spoil(inputs)
        renew_checksums(inputs["checkpoint"])

    return spoil_and_seal


def state(**values):
    return seal(edit(STATE, **values))


def run_was(**values):
    """Spoils inputs: the run of the checkpoint was another one."""

    def spoil(inputs):
        found = json.loads(find(inputs, STATE).read_text())
        assert found["run"].keys() >= values.keys()
        edit_json(find(inputs, STATE), run={**found["run"], **values})

    return seal(spoil)


def flip_a_bit(inputs):
    file = inputs["checkpoint"] / "optimizer.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def another_whole_one(inputs):
    older = shutil.copytree(inputs["checkpoint"], inputs["output"] / "checkpoint-1")
    edit_json(older / "trainer_state.json", global_step=1, saved=1.0)
    inputs["checkpoint"] = older
    seal(nothing)(inputs)
    inputs["checkpoint"] = inputs["output"] / "checkpoint-2"
    flip_a_bit(inputs)


def renamed(name):
    return lambda inputs: inputs.update(checkpoint=inputs["checkpoint"].rename(inputs["output"] / name))


def other_base(inputs):
    shutil.copytree(inputs["model"] / "transformer", inputs["model"] / "transformer_2", dirs_exist_ok=True)


CAPTIONS_TURNED = splits(lambda old: {**old, "train": old["train"].select(range(5, -1, -1))})
OTHER_REWARD = change(REWARD, "text_projection.weight", lambda old: old + 1)
DAMAGED = "{checkpoint} is damaged"
ODD = "`{checkpoint}/trainer_state.json` is damaged or of another version of this script"
NAMED = "--resume_from_checkpoint {checkpoint}"
INCOMPLETE = f"`{NAMED}` is not a complete checkpoint"
OTHER_RUN, CHANGE, NEW = ("{checkpoint} ... another ... ", "`--allow_changes`", "start a new run")

CHECKPOINTS = [
    ("another seed", nothing, f"{LATEST} --seed 43", f"{OTHER_RUN}seed: 42, which is now 43 ... {CHANGE}"),
    (
        "other words",
        nothing,
        f"{LATEST} --positive_words Real",
        f"{OTHER_RUN}positive_words: ['Natural-lighting', ... 'Real'], which is now ['Real'] ... {CHANGE}",
    ),
    ("another loss", nothing, f"{LATEST} --loss linear", f"{OTHER_RUN}loss: hinge, which is now linear ... {CHANGE}"),
    ("another size", nothing, f"{LATEST} --height 48", f"{OTHER_RUN}height: 32, which is now 48 ... {CHANGE}"),
    (
        "another batch size",
        nothing,
        f"{LATEST} --train_batch_size 4",
        f"{OTHER_RUN}train_batch_size: 1, which is now 4 ... {CHANGE}",
    ),
    (
        "more accumulation",
        nothing,
        f"{LATEST} --gradient_accumulation_steps 2",
        f"{OTHER_RUN}gradient_accumulation_steps: 1, which is now 2 ... {CHANGE}",
    ),
    (
        "another rate",
        nothing,
        f"{LATEST} --learning_rate 1e-5",
        f"{OTHER_RUN}learning_rate: 0.001, which is now 1e-05 ... {CHANGE}",
    ),
    (
        "another schedule",
        nothing,
        f"{LATEST} --lr_scheduler cosine",
        f"{OTHER_RUN}lr_scheduler: constant, which is now cosine ... {CHANGE}",
    ),
    (
        "other betas",
        nothing,
        f"{LATEST} --adam_beta1 0.8 --adam_beta2 0.9",
        f"{OTHER_RUN}adam_beta1: 0.9, which is now 0.8; adam_beta2: 0.999, which is now 0.9 ... {CHANGE}",
    ),
    (
        "another epsilon and decay",
        nothing,
        f"{LATEST} --adam_epsilon 1e-6 --adam_weight_decay 0",
        f"{OTHER_RUN}adam_weight_decay: 0.0001, which is now 0.0 ... {CHANGE}",
    ),
    (
        "rollouts used longer",
        nothing,
        f"{LATEST} --updates_per_rollout 2",
        f"{OTHER_RUN}updates_per_rollout: 1, which is now 2 ... {NEW}",
    ),
    (
        "other validation prompts",
        nothing,
        [*LATEST.split(), "--validation_prompts", "a boat"],
        f"{OTHER_RUN}validation_prompts: [], which is now ['a boat'] ... {CHANGE}",
    ),
    ("another dataset", CAPTIONS_TURNED, f"{LATEST} {DATASET}", f"{OTHER_RUN}dataset: ... {CHANGE}"),
    ("another reward", OTHER_REWARD, f"{LATEST} {REWARD_FLAG}", f"{OTHER_RUN}reward: ... {CHANGE}"),
    (
        "all differences",
        CAPTIONS_TURNED,
        f"{LATEST} {DATASET} --seed 43 --noise per_sample",
        f"{OTHER_RUN}dataset: ... noise: shared, which is now per_sample; seed: 42, which is now 43 ... {CHANGE}",
    ),
    ("another base model", other_base, f"{LATEST} --allow_changes {MODEL_FLAG}", f"{OTHER_RUN}base_model: ... {NEW}"),
    (
        "a LoRA",
        nothing,
        f"{LATEST} --allow_changes --lora_rank 4",
        f"{OTHER_RUN}lora_rank: None, which is now 4 ... {NEW}",
    ),
    (
        "another optimizer",
        nothing,
        f"{LATEST} --allow_changes --optimizer adamw_8bit",
        f"{OTHER_RUN}optimizer: adamw, which is now adamw_8bit ... {NEW}",
    ),
    (
        "more processes",
        run_was(num_processes=8),
        f"{LATEST} --allow_changes",
        f"{OTHER_RUN}num_processes: 8, which is now 1 ... {NEW}",
    ),
    (
        "another engine",
        run_was(engine="ZeRO-2"),
        f"{LATEST} --allow_changes",
        f"{OTHER_RUN}engine: ZeRO-2, which is now without DeepSpeed ... {NEW}",
    ),
    (
        "another precision",
        run_was(mixed_precision="bf16"),
        f"{LATEST} --allow_changes",
        f"{OTHER_RUN}mixed_precision: bf16, which is now no ... {NEW}",
    ),
    (
        "in another folder",
        run_was(num_processes=8),
        f"{NAMED} --output_dir {{folder}}/other",
        f"{OTHER_RUN}num_processes: 8",
    ),
    ("a bit flipped", flip_a_bit, LATEST, DAMAGED),
    ("a bit flipped, named", flip_a_bit, NAMED, DAMAGED),
    (
        "a bit flipped, another whole",
        another_whole_one,
        LATEST,
        "{checkpoint} is damaged ... The newest whole one ... {output}/checkpoint-1",
    ),
    ("weights cut off", cut_off("checkpoint/model.safetensors"), LATEST, DAMAGED),
    ("weights missing", remove("checkpoint/model.safetensors"), LATEST, DAMAGED),
    ("a file too many", write("checkpoint/custom_checkpoint_0.pkl"), LATEST, DAMAGED),
    ("no checksums", remove(SUMS), LATEST, DAMAGED),
    ("checksums not text", write(SUMS, b"\xff\xfe\x00"), LATEST, DAMAGED),
    ("no state", remove(STATE), NAMED, INCOMPLETE),
    (
        "not there",
        nothing,
        "--resume_from_checkpoint {output}/checkpoint-20",
        "`--resume_from_checkpoint {output}/checkpoint-20` is not a complete checkpoint; `output_dir` has ",
    ),
    ("still being written", renamed("checkpoint-2.unfinished"), NAMED, INCOMPLETE),
    ("still being removed", renamed("checkpoint-2.discarded.unfinished"), NAMED, INCOMPLETE),
    (
        "still being removed, with a slash",
        renamed("checkpoint-2.discarded.unfinished"),
        f"{NAMED}/",
        f"`{NAMED}/` is not a complete checkpoint",
    ),
    ("state of an older version", seal(write(STATE, '{"global_step": 2, "history": []}')), LATEST, ODD),
    ("state a list", seal(write(STATE, "[]")), LATEST, ODD),
    ("state empty", seal(write(STATE)), NAMED, ODD),
    ("state cut off", seal(cut_off(STATE)), NAMED, ODD),
    ("a step that is a path", state(history=[{"step": "../../x", "validation_reward": 1.0}]), LATEST, ODD),
    ("a step that is a number in words", state(global_step="2"), LATEST, ODD),
    ("an expert that is a path", state(expert="../../transformer_2"), LATEST, ODD),
    ("history of words", state(history=[{"step": 1, "loss": "low"}]), LATEST, ODD),
    ("beyond the last update", nothing, f"{LATEST} --max_train_steps 1", "{checkpoint} ... `--max_train_steps 1`"),
]


# ---- The test. ------------------------------------------------------------------------------------------------------


def group(name, cases, **options):
    return [pytest.param(*case, options, id=f"{name}: {what}") for what, *case in cases]


CASES = [
    *group("flags", [(str(flags)[:60], nothing, flags, message) for flags, message in FLAGS]),
    *group("flags and model", [(str(flags)[:60], nothing, flags, message) for flags, message in FLAGS_FOR_MODEL]),
    *group("model", MODELS),
    *group("weights", WEIGHTS),
    *group("weights", LOADED, loads=True),
    *group("dataset", DATASETS),
    *group("reward", REWARDS),
    *group("output folder", OUTPUTS),
    *group("checkpoint", CHECKPOINTS, resumes=True),
]


@pytest.mark.parametrize("spoil, flags, message, options", CASES)
def test_what_cannot_succeed_is_refused_in_one_line_and_leaves_no_trace(
    refusal, inputs, spoil, flags, message, options
):
    resumed = [inputs["checkpoint"], *RESUME][1:] if options.get("resumes") else []
    spoil(inputs)
    answer = refusal(*resumed, *inputs.fill(flags), loads=options.get("loads", False))
    parts = [re.escape(part.format_map(inputs)) for part in message.split(" ... ")]
    assert re.match(".*".join(parts), answer), answer
    assert "hf_secret" not in answer


# ---- What no table holds. -------------------------------------------------------------------------------------------


def is_accepted(flags, monkeypatch):
    """Whether a run gets as far as its first model."""

    class LoadingStarted(Exception):
        pass

    def stop(*args, **kwargs):
        raise LoadingStarted

    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", stop)
    with pytest.raises(LoadingStarted), launched(*CPU.split()):
        main(parse_args(flags))
    return True


@pytest.mark.parametrize(
    "spoil, flags",
    [
        (nothing, f"{MODEL_FLAG} {DATASET} {REWARD_FLAG}"),
        (nothing, f"{LATEST} {NAMED}"),
        (seal(nothing), LATEST),
        (shards(EXPERT, lambda shard: None), MODEL_FLAG),
        (shards(VAE, lambda shard: None), MODEL_FLAG),
        (shards(REWARD, lambda shard: None), REWARD_FLAG),
        (hps_weights(dict), HPS),
        (write("output/run.json", "{}"), LATEST),
    ],
)
def test_what_the_tables_spoil_is_accepted_as_long_as_it_is_whole(make_flags, inputs, monkeypatch, spoil, flags):
    spoil(inputs)
    assert is_accepted(make_flags(*(RESUME if "resume" in flags else []), *inputs.fill(flags)), monkeypatch)


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", "--dataset_name"])
def test_a_required_flag_is_missing(make_flags, capsys, flag):
    arguments = make_flags()
    index = arguments.index(flag)
    with pytest.raises(SystemExit) as caught:
        parse_args(arguments[:index] + arguments[index + 2 :])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: the following arguments are required: {flag}\n")


def test_clip_without_a_path(make_flags, tmp_path):
    arguments = make_flags()
    index = arguments.index("--reward_model_path")
    with pytest.raises(SystemExit, match="^error: `--reward_model CLIP` needs `--reward_model_path`"):
        main(parse_args(arguments[:index] + arguments[index + 2 :]))
    assert not (tmp_path / "output").exists()


def test_pushing_without_a_token(refusal, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert re.match("`--push_to_hub.* needs `hf auth login` or HF_TOKEN.", refusal("--push_to_hub"))


def test_a_real_launch_ends_with_the_message_and_without_a_traceback(make_flags, tmp_path):
    flags = make_flags("--dataset_name", tmp_path / "nothing")
    done = run_launcher("--quiet", *CPU.split(), "train_srpo_wan_t2i.py", *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: `--dataset_name {tmp_path}/nothing` cannot be loaded")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "output").exists()
