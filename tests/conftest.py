"""
What test files share: random models of real classes at tiny sizes, captions embedded with one of them, a run of the
training script in this process, and readers of what it wrote.
"""

import hashlib
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything that reads it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: they share few cores

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel


torch.set_num_threads(1)  # tensors are tiny, and results must not depend on the machine

ROOT = Path(__file__).parent.parent
MINIATURE = ROOT / "tests" / "miniature"
TWO_RANKS = "--config_file accelerate_configs/a100x8.yaml --num_processes 2 --main_process_port 0"  # 0: any free one
WORDS = ["a", "red", "blue", "cat", "dog", "boat", "on"]  # one token each; a prompt ends with one more, </s>
CAPTIONS = ["a red cat", "a blue dog", "a boat", "a red boat on a blue cat", "a cat on a boat", "a dog"]
LATENTS_MEAN, LATENTS_STD = [0.1, -0.2, 0.3, -0.4], [1.5, 0.5, 2.0, 1.25]
MEASURED = {"seconds", "images_per_second", "peak_memory_gb"}  # what no two runs share

# A tiny run of two updates without validation and events; the learning rate is large enough to see.
QUICK = (
    "--height 32 --width 32 --validation_size 32 --sampling_steps 2 --max_train_steps 2 --checkpointing_steps 2 "
    "--learning_rate 1e-3 --report_to none"
).split()


def run_in_process(*flags, mixed_precision="no"):
    """Runs the training script in this process, as `accelerate launch` with accelerate_configs/cpu.yaml would."""
    from train_srpo_wan_t2i import main, parse_args

    handlers = list(logging.getLogger().handlers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("ACCELERATE_MIXED_PRECISION", mixed_precision)
        AcceleratorState._reset_state(reset_partial_state=True)  # of whatever ran in this process before
        try:
            main(parse_args([str(flag) for flag in flags]))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            for handler in set(logging.getLogger().handlers) - set(handlers):
                logging.getLogger().removeHandler(handler)
                handler.close()


def gradient_descent(rate):
    """
    Flags that make gradient descent of AdamW: its epsilon is above every gradient. AdamW itself makes of the smallest
    gradient a step of full size, so it would show the last bits of a sum that has another order.
    """
    return ["--adam_epsilon", 1e4, "--learning_rate", 1e4 * rate, "--adam_weight_decay", 0]


def load_weights(output_dir, expert="transformer_2"):
    return load_file(Path(output_dir, expert, "diffusion_pytorch_model.safetensors"))


def checkpoints(output_dir):
    return sorted(path.name for path in Path(output_dir).glob("checkpoint-*"))


def load_history(output_dir, step=2):
    return json.loads(Path(output_dir, f"checkpoint-{step}", "trainer_state.json").read_text())["history"]


def logged(output_dir, name, step=2):
    """The values of a curve, one for each update."""
    return [row[name] for row in load_history(output_dir, step) if name in row]


def repeatable(history):
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in history]


def read_scores(output_dir, step=0, name="reward"):
    """Of every validation image of a step."""
    return [row[name] for row in json.loads(Path(output_dir, f"images/step-{step}/scores.json").read_text())]


def same_bits(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def distance(weights, others):
    return math.sqrt(sum((weights[name].double() - others[name].double()).square().sum() for name in weights))


def read_log(output_dir):
    return Path(output_dir, "train.log").read_text()


def file_hashes(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_text_encoder():
    """A random UMT5 encoder, text_dim 16, and a tokenizer of `WORDS`."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    config = UMT5Config(vocab_size=len(vocab), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    text_encoder = UMT5EncoderModel(config)
    for parameter in text_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # not the ones of a new layer norm, by which it is identified
    return {"text_encoder": text_encoder, "tokenizer": T5Tokenizer(vocab=vocab, extra_ids=0)}


def make_transformer():
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )


def make_vae(**config):
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
        **config,
    )


def make_scheduler(flow_shift):
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random pipeline with two experts, in the layout of Wan2.2-T2V-A14B: 8 pixels to a latent."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_model")
    WanPipeline(
        **make_text_encoder(),
        vae=make_vae(),
        scheduler=make_scheduler(flow_shift=3.0),
        transformer=make_transformer(),
        transformer_2=make_transformer(),
        boundary_ratio=0.875,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_one_expert_model(tmp_path_factory):
    """Folder of a random pipeline with one expert, in the layout of Wan2.2-TI2V-5B: 16 pixels to a latent."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny_one_expert_model")
    WanPipeline(
        **make_text_encoder(),
        vae=make_vae(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16),
        scheduler=make_scheduler(flow_shift=5.0),
        transformer=make_transformer(),
        expand_timesteps=True,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward(tmp_path_factory):
    """Folder of a random CLIPModel that takes images of 32 x 32, and its processor, which reads letter by letter."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("tiny_reward")
    letters = [*"abcdefghijklmnopqrstuvwxyz.-"]
    # The end has the largest number, as in CLIP itself: at 2, transformers would pool at the largest number instead.
    tokens = ["<pad>", "<s>", *letters, *(f"{letter}</w>" for letter in letters), "<|endoftext|>"]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": len(tokens) - 1}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["initializer_factor"] = 3.0  # else all texts, and all images, look nearly the same to it
    text = {**sizes, **special, "vocab_size": len(tokens), "max_position_embeddings": 48}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        unk_token="<|endoftext|>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        model_max_length=48,
    )
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embed(tmp_path_factory):
    """Function: a model and captions -> the folder of the dataset that `embed_prompts.py` makes of them."""
    import embed_prompts

    def run(model, captions):
        folder = tmp_path_factory.mktemp("embed")
        (folder / "captions.txt").write_text("\n".join(captions))
        paths = ["--pretrained_model_name_or_path", model, "--prompts", folder / "captions.txt"]
        flags = [*paths, "--output_dir", folder / "embeddings", "--max_sequence_length", "16"]
        embed_prompts.main(embed_prompts.parse_args([str(flag) for flag in flags]))
        return folder / "embeddings"

    return run


@pytest.fixture(scope="session")
def tiny_dataset(embed, tiny_model):
    """Folder that `embed_prompts.py` wrote: the six `CAPTIONS`, embedded by `tiny_model` with 16 tokens at most."""
    return embed(tiny_model, CAPTIONS)


@pytest.fixture(scope="session")
def make_args():
    """Function: flags -> the arguments of the training script, its required paths filled in."""
    from train_srpo_wan_t2i import parse_args

    paths = ["--pretrained_model_name_or_path", "model", "--dataset_name", "dataset", "--output_dir", "output"]
    return lambda *flags: parse_args([*paths, *map(str, flags)])


@pytest.fixture(scope="session")
def command(tiny_model, tiny_dataset, tiny_reward):
    """
    Function: an output folder and flags -> the arguments of the script. Flags override the quick ones; `prompts` are
    `--validation_prompts`, and `None` leaves that flag out.
    """

    def make_command(output_dir, *flags, prompts=(), model=tiny_model, dataset=tiny_dataset):
        paths = ["--pretrained_model_name_or_path", model, "--dataset_name", dataset, "--max_sequence_length", 16]
        paths += ["--reward_model", "CLIP", "--reward_model_path", tiny_reward, "--output_dir", output_dir]
        validation = [] if prompts is None else ["--validation_prompts", *prompts]
        return [str(item) for item in (*paths, *QUICK, *flags, *validation)]

    return make_command


@pytest.fixture(scope="session")
def train(command, tmp_path_factory):
    """Function: runs the script in this process with flags and returns the output folder, a new one by default."""

    def run(*flags, output_dir=None, mixed_precision="no", **inputs):
        output_dir = Path(output_dir or tmp_path_factory.mktemp("output"))
        run_in_process(*command(output_dir, *flags, **inputs), mixed_precision=mixed_precision)
        return output_dir

    return run


@pytest.fixture(scope="session")
def plain_run(train):
    """What two updates with none but the quick flags write: what runs with other flags are compared with."""
    return train()


@pytest.fixture(scope="session")
def start(command):
    """Function: starts the script through `accelerate launch`, writing to a folder; returns the `subprocess.Popen`."""

    def run(launcher_flags, output_dir, *flags, environment=None, **inputs):
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *map(str, launcher_flags)]
        return subprocess.Popen(
            [*launcher, "train_srpo_wan_t2i.py", *command(output_dir, *flags, **inputs)],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return run


@pytest.fixture(scope="session")
def launch(start, tmp_path_factory):
    """Function: runs the script through `accelerate launch` and returns the output folder, a new one by default."""

    def run(launcher_flags, *flags, output_dir=None, **inputs):
        output_dir = Path(output_dir or tmp_path_factory.mktemp("output"))
        process = start(launcher_flags.split(), output_dir, *flags, **inputs)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output_dir

    return run
