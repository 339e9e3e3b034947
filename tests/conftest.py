"""Fixtures that test files share: tiny models, a dataset, runs of the scripts, and what they refuse."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    BOUNDARY_FLAGS,
    CAPTIONS,
    CPU,
    LORA,
    PROMPTS,
    QUICK,
    ROOT,
    launched,
    make_scheduler,
    make_text_encoder,
    make_text_model,
    make_transformer,
    make_vae,
    run_embed_prompts,
    run_in_process,
    snapshot,
)
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, UMT5EncoderModel

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel


# ---- Models and datasets. -------------------------------------------------------------------------------------------


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


@pytest.fixture
def model_copy(tiny_model, tmp_path):
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="session")
def low_noise_model(tiny_model, tmp_path_factory):
    """The tiny model without its high-noise expert."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("copy") / "model"))
    shutil.rmtree(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    """Folder of a model of which there is only the text encoder and its tokenizer."""
    return make_text_model(tmp_path_factory.mktemp("text_model"), seed=0)


@pytest.fixture
def text_model_copy(text_model, tmp_path_factory):
    """A copy of it to spoil."""
    return Path(shutil.copytree(text_model, tmp_path_factory.mktemp("copy") / "model"))


@pytest.fixture
def prompts(tmp_path):
    """A file of the captions `PROMPTS`."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


@pytest.fixture(scope="session")
def embed(tmp_path_factory):
    """Function: a model, captions and flags -> the folder of the dataset that `embed_prompts.py` makes of them."""

    def run(model, captions, *flags):
        folder = tmp_path_factory.mktemp("embed")
        (folder / "captions.txt").write_text("\n".join(captions))
        run_embed_prompts(model, folder / "captions.txt", folder / "embeddings", *flags)
        return folder / "embeddings"

    return run


@pytest.fixture(scope="session")
def tiny_dataset(embed, tiny_model):
    """Folder that `embed_prompts.py` wrote: the six `CAPTIONS`, embedded by `tiny_model` with 16 tokens at most."""
    return embed(tiny_model, CAPTIONS)


@pytest.fixture(scope="session")
def validation_dataset(embed, tiny_model):
    """The same, and the split `validation` of two prompts, the first of which is a caption, too."""
    return embed(tiny_model, CAPTIONS, "--validation_prompts", "a boat", "a blue boat, red")


@pytest.fixture(scope="session")
def one_expert_dataset(embed, tiny_one_expert_model):
    """The same by `tiny_one_expert_model`."""
    return embed(tiny_one_expert_model, CAPTIONS)


@pytest.fixture(scope="session")
def boundary_dataset(embed, tiny_model):
    """The same by `tiny_model`, and three latents of each caption, of the size and the steps of the quick flags."""
    return embed(tiny_model, CAPTIONS, *BOUNDARY_FLAGS)


# ---- Runs of the training script. -----------------------------------------------------------------------------------


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
def lora_run(train):
    """Two updates of a LoRA, far enough to be seen, with a checkpoint and a validation image after each."""
    flags = ["--learning_rate", 0.05, "--adam_weight_decay", 0, "--checkpointing_steps", 1, "--validation_steps", 1]
    return train(*LORA, *flags, prompts=["a red cat"])


@pytest.fixture(scope="session")
def quick_lora(train):
    """Two updates of a LoRA with none but the quick flags."""
    return train(*LORA)


@pytest.fixture(scope="session")
def start(command):
    """Function: starts the script through `accelerate launch`, writing to a folder; returns the `subprocess.Popen`."""

    def run(launcher_flags, output_dir, *flags, environment=None, **inputs):
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *map(str, launcher_flags)]
        return subprocess.Popen(
            [*launcher, "train_srpo_wan_t2i.py", *command(output_dir, *flags, **inputs)],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **(environment or {})},
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


@pytest.fixture
def own_signal_handlers():
    """Whatever a run in this process does when it gets a signal, others do not."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- What is refused. -----------------------------------------------------------------------------------------------


def forbid_loading(monkeypatch):
    """A test fails as soon as a model is loaded."""

    def fail(*args, **kwargs):
        pytest.fail("a model was loaded before the input was checked")

    for model_class in (WanPipeline, WanTransformer3DModel, AutoencoderKLWan, CLIPModel, UMT5EncoderModel):
        monkeypatch.setattr(model_class, "from_pretrained", fail)


@pytest.fixture
def no_loading(monkeypatch):
    forbid_loading(monkeypatch)


@pytest.fixture
def make_flags(tiny_model, tiny_dataset, tiny_reward, tmp_path):
    """Function: flags -> all flags of a run that would work, but for those flags."""
    paths = ["--pretrained_model_name_or_path", tiny_model, "--dataset_name", tiny_dataset]
    reward = ["--reward_model", "CLIP", "--reward_model_path", tiny_reward, "--output_dir", tmp_path / "output"]
    sizes = ["--max_sequence_length", 16, "--height", 32, "--width", 32, "--validation_size", 32]
    return lambda *flags: [str(item) for item in (*paths, *reward, *sizes, *flags)]


@pytest.fixture
def refusal(make_flags, tmp_path, capsys):
    """
    Function: runs the script with flags that it must refuse, as `accelerate launch` does with those in `launcher`, and
    returns its message. Fails if a model is loaded, unless it `loads`; if a file in `tmp_path` changes; or if the
    message is not one line.
    """
    from train_srpo_wan_t2i import main, parse_args

    def refuse(*flags, launcher=CPU, loads=False):
        before = snapshot(tmp_path)
        with pytest.MonkeyPatch.context() as patch, launched(*launcher.split()):
            if not loads:
                forbid_loading(patch)
            with pytest.raises(SystemExit) as caught:
                main(parse_args(make_flags(*flags)))
        assert snapshot(tmp_path) == before
        if caught.value.code == 2:  # argparse writes the message itself
            return re.search(r"^\S+: error: (.*)\n\Z", capsys.readouterr().err, re.MULTILINE).group(1)
        assert re.fullmatch("error: .*", caught.value.code), "one line, which makes Python exit with 1"
        return caught.value.code.removeprefix("error: ")

    return refuse
