"""What test files share: random models of real classes at tiny sizes, and captions embedded with one of them."""

import logging
import os
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything that reads it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: they share few cores

import pytest
import torch
from accelerate.state import AcceleratorState
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

MINIATURE = Path(__file__).parent / "miniature"
WORDS = ["a", "red", "blue", "cat", "dog", "boat", "on"]  # one token each; a prompt ends with one more, </s>
CAPTIONS = ["a red cat", "a blue dog", "a boat", "a red boat on a blue cat", "a cat on a boat", "a dog"]
LATENTS_MEAN, LATENTS_STD = [0.1, -0.2, 0.3, -0.4], [1.5, 0.5, 2.0, 1.25]


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
