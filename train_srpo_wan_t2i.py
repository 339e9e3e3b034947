#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
r"""
Fine-tune the low-noise expert (`transformer_2`) of Wan2.2-T2V-A14B for text-to-image with SRPO, Semantic Relative
Preference Optimization (https://arxiv.org/abs/2509.06942). Captions come from `embed_prompts.py`.

    accelerate launch --config_file accelerate_configs/a100x8.yaml train_srpo_wan_t2i.py \
        --pretrained_model_name_or_path Wan-AI/Wan2.2-T2V-A14B-Diffusers --dataset_name prompt_embeds \
        --reward_model HPS --reward_model_path HPS_v2.1_compressed.pt --output_dir outputs/srpo

One update, in the order of this file: roll out an image without gradient (`rollout`), put known noise back in and take
one graded step (`direct_align_step`), decode it (`decode_latents`), score it with a preference model relative to a
positive and a negative control word (`srp_score`), and back-propagate (`srpo_loss`).
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import re
import resource
import shlex
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
import transformers
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, gather_object
from matplotlib.figure import Figure
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AutoConfig, CLIPModel, CLIPProcessor
from transformers.utils import cached_file

import diffusers
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, check_min_version


# Will error if the minimal version of diffusers is not installed. Remove at your own risks.
check_min_version("0.40.0")

logger = get_logger(__name__)
TRACKER_NAME = "srpo-wan-t2i"
LOG_FORMAT = "%(asctime)s - %(levelname)s - %(name)s - %(message)s"

# The control words of the published run, fastvideo/SRPO.py of the SRPO repository.
POSITIVE_WORDS = ("Natural-lighting", "Detail", "Detailed", "Real")
NEGATIVE_WORDS = ("Concept art", "Painting", "Anime", "Flat", "Oil")

# The linear layers that diffusers' own scripts for Wan adapt: all of the attention.
LORA_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")

# Positions this close to either end of the training grid are not drawn (fastvideo/SRPO.py).
POSITION_MARGIN = 5

# Where a reward model comes from when `--reward_model_path` is not given.
HPS_REPOSITORY, HPS_FILE, HPS_ARCHITECTURE = "xswu/HPSv2", "HPS_v2.1_compressed.pt", "ViT-H-14"
PICKSCORE_REPOSITORY = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

# The file and the layer by whose weights a model is identified.
BASE_LAYER = "diffusion_pytorch_model", "blocks.0.attn1.to_q.weight"
TEXT_ENCODER_LAYER = "model", "encoder.final_layer_norm.weight"

# What `embed_prompts.py --boundary_latents` adds to the dataset, and the flags that it shares with training.
BOUNDARY_COLUMNS = ("boundary_latents", "boundary_seeds")
BOUNDARY_FLAGS = ("height", "width", "sampling_steps", "rollout_scheduler", "rollout_shift")

# Independent streams of random numbers. The last seeds what libraries draw: dropout, the rounding of adamw_8bit.
SHUFFLE, NOISE, POSITION, VALIDATION, GLOBAL = range(5)


# ---- SRPO: noise levels, the graded step, the relative score. Pure functions, no model. -----------------------------
def shift_sigmas(sigmas, shift):
    """
    Bends noise levels in [0, 1], a float or a tensor of any shape, towards 1 as the schedules of SD3, FLUX and Wan do:
    `shift * sigma / (1 + (shift - 1) * sigma)`. Source: Esser et al. 2024 (https://arxiv.org/abs/2403.03206), eq. 23.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_train_sigmas(num_inference_steps, shift, train_timestep, timestep_length):
    """
    The `timestep_length` noise levels that training draws from, (L,) float32, descending: between the first and the
    last step of `train_timestep`, 0 <= first < last <= steps, of a sampling schedule of `num_inference_steps` steps
    with this `shift`. Source: `sigmas_l` in fastvideo/SRPO.py.
    """
    schedule = shift_sigmas(torch.linspace(1, 0, num_inference_steps + 1), shift)
    first, last = train_timestep
    return torch.linspace(schedule[first], schedule[last], timestep_length)


def branch_sigmas(train_sigmas, position, groundtruth_ratio):
    """
    The noise levels between which each branch takes its step. Both branches recover the image from (nearly) the same
    level: the denoise branch comes from above, the inversion branch from below. `train_sigmas` are those (L,) of
    [`make_train_sigmas`]; 1 <= `position` < L counts from the end of low noise, else a `ValueError` is raised; and
    `groundtruth_ratio` is the share of the window that is injected noise, the rest of which the step spans.

    Returns three pairs: denoise (sigma_from, sigma_to), inversion (sigma_from, sigma_to), and the positions at which
    the denoise and the inversion branch read their discounts. Source: fastvideo/SRPO.py.
    """
    length = len(train_sigmas)
    if not 1 <= position < length:
        raise ValueError(f"`position` must be between 1 and {length - 1}, but is {position}.")
    span = min(int((1 - groundtruth_ratio) * length) + 1, length - position, position)
    below = max(position - span, 1)
    denoise = train_sigmas[length - min(position + span, length)], train_sigmas[length - position]
    inversion = train_sigmas[length - below], train_sigmas[length - min(below + span, length)]
    return denoise, inversion, (position, below)


def direct_align_step(predict_velocity, x0, noise, sigma_from, sigma_to):
    """
    Direct-Align: injects known noise, takes one Euler step, and recovers the clean latents in closed form.
    `predict_velocity` takes latents and `sigma_from`, as given; `x0` and standard normal `noise` are (B, C, T, H, W),
    and no gradient flows through them; noise levels, floats or of shape () or (B,), are in [0, 1] and sigma_to < 1.

    Returns x0_hat, of the shape of `x0`, which it equals if the predicted velocity is exactly `noise - x0`. The slope
    d x0_hat / d velocity = (sigma_to - sigma_from) / (1 - sigma_to) is negative when denoising and positive when
    inverting. Source: the SRPO paper.
    """
    start, end = (
        torch.as_tensor(sigma, dtype=x0.dtype, device=x0.device).reshape(-1, *[1] * (x0.ndim - 1))
        for sigma in (sigma_from, sigma_to)
    )
    x = (start * noise + (1 - start) * x0).detach()
    x = x + (end - start) * predict_velocity(x, sigma_from)
    return (x - end * noise) / (1 - end)


def srp_score(image_features, positive_features, negative_features, discount):
    """
    Semantic relative preference: how much closer an image is to one caption than to another. Features have unit norm
    and shape (B, D); `discount`, a float or of shape () or (B,), is the extra weight of the positive caption. Returns
    <f, (1 + discount) * positive - negative> of shape (B,), `SRP_cfg` in fastvideo/SRPO.py.
    """
    positive = (image_features * positive_features).sum(-1)
    negative = (image_features * negative_features).sum(-1)
    return (1 + discount) * positive - negative


def srpo_loss(score, margin):
    """
    Hinge loss: the mean of relu(margin - score). Images whose score, of shape (B,) from [`srp_score`], reaches the
    margin, 0.7 in the published run, are left alone.
    """
    return F.relu(margin - score).mean()


class Branch(NamedTuple):
    """One way through the graded step. `discount` weighs the caption that the branch is drawn to."""

    name: str  # "denoise" or "inversion"
    sigma_from: float
    sigma_to: float
    discount: float


def make_branches(args, train_sigmas, position):
    """The branches of `--branches` at a position of the training grid: a list of [`Branch`]."""
    *sigmas, positions = branch_sigmas(train_sigmas, position, args.groundtruth_ratio)
    ends = args.discount_pos, args.discount_inv
    discounts = [torch.linspace(*pair, len(train_sigmas))[at] for pair, at in zip(ends, positions, strict=True)]
    rows = zip(("denoise", "inversion"), sigmas, discounts, strict=True)
    branches = [Branch(name, start.item(), end.item(), discount.item()) for name, (start, end), discount in rows]
    return [branch for branch in branches if args.branches in ("both", branch.name)]


# ---- Randomness and data: which sample is which caption, and which noise it starts from. ----------------------------
def make_generator(*key):
    """A CPU `torch.Generator` whose state is a function of the non-negative integers of `key` alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


@dataclass
class SampleSampler:
    """
    Batch sampler of one process. The captions of a run form one endless stream, shuffled anew every epoch, and the
    samples of a rollout are consecutive in it. So every process takes the same number of steps, a resumed run goes on
    with the next caption, and a step sees the same captions on one process as on many.
    """

    dataset_size: int  # number of captions
    seed: int  # decides the shuffles
    rollouts: range  # numbers of the rollouts to yield, counted from the beginning of the run
    batch_size: int  # captions of a rollout on each process
    process_index: int = 0  # which share of each rollout to yield
    num_processes: int = 1

    def samples(self, rollout):
        """The numbers, in the stream, of the samples of one rollout on this process: a `range`."""
        first = (rollout * self.num_processes + self.process_index) * self.batch_size
        return range(first, first + self.batch_size)

    def __iter__(self):
        epoch, order = None, None
        for rollout in self.rollouts:
            batch = []
            for sample in self.samples(rollout):
                if sample // self.dataset_size != epoch:
                    epoch = sample // self.dataset_size
                    order = torch.randperm(self.dataset_size, generator=make_generator(self.seed, SHUFFLE, epoch))
                batch.append(order[sample % self.dataset_size].item())
            yield batch


def noise_generators(args, step, samples, *update):
    """
    The generators of what each sample of a step starts from; `samples` are their numbers in the run. With `--noise
    shared` all have the same noise, which gives gradients of lower variance, says the SRPO paper.
    """
    keys = [step] * len(samples) if args.noise == "shared" else samples
    return [make_generator(args.seed, NOISE, key, *update) for key in keys]


def make_noise(args, step, samples, shape, *update):
    """The noise, (B, C, T, H, W) float32, that samples start from. It is drawn on the CPU, the same for any device."""
    return torch.stack([torch.randn(shape, generator=each) for each in noise_generators(args, step, samples, *update)])


def make_starts(args, step, samples, shape, batch):
    """
    What the images of B samples start from: latents, and the noise in them, each (B, C, 1, H, W) float32. By default
    both are the noise. With `--rollout_start boundary` they are one of the K latents that `embed_prompts.py
    --boundary_latents K` has stored for each caption, and the noise of its seed; see [`collate_fn`] for `batch`.
    """
    if args.rollout_start == "noise":
        return (make_noise(args, step, samples, shape),) * 2
    latents, noise = [], []
    generators = noise_generators(args, step, samples)
    for stored, seeds, generator in zip(batch["boundary_latents"], batch["boundary_seeds"], generators, strict=True):
        pick = torch.randint(len(seeds), (), generator=generator).item()
        latents.append(torch.as_tensor(stored[pick]))
        noise.append(torch.randn(shape, generator=torch.Generator().manual_seed(int(seeds[pick]))))
    return torch.stack(latents), torch.stack(noise)


def load_prompt_dataset(path, cache_dir=None):
    """What `embed_prompts.py` wrote, from a folder or the Hub: a `datasets.DatasetDict` of `train` and `negative`."""
    if Path(path).is_dir() and (Path(path) / "dataset_dict.json").is_file():
        return datasets.load_from_disk(path)
    return datasets.load_dataset(path, cache_dir=cache_dir)


def unpack_prompt_embeds(rows, max_sequence_length, dtype):
    """Stored rows, int16 (tokens, D), the bits of bfloat16 -> (B, max_sequence_length, D) of `dtype`, zero-padded."""
    rows = [torch.as_tensor(np.asarray(row, dtype=np.int16)).view(torch.bfloat16).to(dtype) for row in rows]
    return torch.stack([F.pad(row, (0, 0, 0, max_sequence_length - len(row))) for row in rows])


def collate_fn(examples, max_sequence_length, dtype):
    """
    Rows of the prompt dataset -> {"captions": list of B strings, "prompt_embeds": (B, max_sequence_length, D)}, and
    lists of what they have of `BOUNDARY_COLUMNS`.
    """
    return {
        "captions": [example["caption"] for example in examples],
        "prompt_embeds": unpack_prompt_embeds([e["prompt_embeds"] for e in examples], max_sequence_length, dtype),
        **{name: [e[name] for e in examples] for name in BOUNDARY_COLUMNS if name in examples[0]},
    }


# ---- The transformer: velocity and rollout. -------------------------------------------------------------------------
def predict_velocity(transformer, latents, sigma, prompt_embeds, tokens_per_sample=None):
    """
    One forward pass of a [`WanTransformer3DModel`], bare or prepared by Accelerate: noisy latents (B, C, T, H, W) of
    noise level `sigma` in [0, 1], a float or of shape () or (B,), and text embeddings (B, L, D) in the type that the
    transformer takes -> `noise - x0` as it sees it, float32, of the shape of the latents. Models with
    `expand_timesteps` take a timestep per token, so they need `tokens_per_sample`.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float32).to(latents.device, non_blocking=True)
    timestep = 1000 * sigma.expand(len(latents))
    if tokens_per_sample is not None:
        timestep = timestep[:, None].expand(-1, tokens_per_sample)
    latents = latents.to(prompt_embeds.dtype)
    velocity = transformer(latents, timestep, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
    return velocity.float()


def make_scheduler(name, shift):
    """Diffusers' scheduler `euler`, or `unipc`, which is nearer to the exact solution; `shift` is `flow_shift`."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


@torch.no_grad()
def rollout(
    velocity_fn, scheduler, noise, prompt_embeds, negative_prompt_embeds, num_steps, guidance_scale, boundary=None
):
    """
    Paints clean latents from noise (B, C, T, H, W): what `WanPipeline(..., output_type="latent")` gives with this
    `scheduler` of diffusers in `num_steps`, but with both halves of classifier-free guidance in one batch. A
    `guidance_scale` of 1.0 leaves the negative prompt out and halves the work. `velocity_fn` takes latents, sigma and
    text embeddings (B, L, D), see [`predict_velocity`]. With a `boundary`, a noise level, what is given as noise are
    latents at the first noise level of the schedule below it. Returns x0, float32, of the shape of the noise.
    """
    guided = guidance_scale > 1.0
    if guided:
        prompt_embeds = torch.cat([prompt_embeds, negative_prompt_embeds])
    scheduler.set_timesteps(num_steps)  # on the CPU, where reading a noise level waits for no GPU
    first = 0 if boundary is None else int((scheduler.timesteps >= 1000 * boundary).sum())
    scheduler.set_begin_index(first)
    latents = noise
    for timestep in scheduler.timesteps[first:]:
        velocity = velocity_fn(torch.cat([latents, latents]) if guided else latents, timestep / 1000, prompt_embeds)
        if guided:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


# ---- The VAE: latents to pixels, with a gradient. -------------------------------------------------------------------
class ImageConv(torch.nn.Conv2d):
    """A [`WanCausalConv3d`] for clips of one frame. It takes and gives (B, C, 1, H, W)."""

    def __init__(self, conv):
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size[1:], conv.stride[1:], conv._padding[2::-2]
        like = {"bias": conv.bias is not None, "device": conv.weight.device, "dtype": conv.weight.dtype}
        super().__init__(*sizes, **like)
        self.load_state_dict({**conv.state_dict(), "weight": conv.weight[:, :, -1]})

    def forward(self, x, _cache=None):
        return super().forward(x.squeeze(2)).unsqueeze(2)


def flatten_vae(vae):
    """
    Turns an [`AutoencoderKLWan`] into one for single images, which gives the same: a causal 3-D convolution sees the
    image behind frames of zeros, so of its kernel only the last temporal slice matters, which is a 2-D one.
    """
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, WanCausalConv3d):
                setattr(module, name, ImageConv(child).requires_grad_(child.weight.requires_grad))
    return vae


def decode_latents(vae, latents):
    """
    Latents (B, C, 1, H, W), normalised as the transformer sees them -> pixels (B, 3, s * H, s * W) float32 in [0, 1],
    and the share of values that were clamped, (), which carry no gradient. The same as `vae.decode`, except that the
    decoder's blocks are checkpointed where gradients flow: [`AutoencoderKLWan`] has no gradient checkpointing, and its
    cache of frames, which one frame does not need, would break the recomputation.
    """
    mean, std = (
        torch.tensor(values, dtype=latents.dtype).to(latents.device, non_blocking=True).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    decoder = vae.decoder
    x = decoder.conv_in(vae.post_quant_conv((latents * std + mean).to(vae.dtype)))
    blocks = [decoder.mid_block, *(partial(block, first_chunk=True) for block in decoder.up_blocks)]
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if x.requires_grad else block(x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    if vae.config.patch_size is not None:
        x = unpatchify(x, patch_size=vae.config.patch_size)
    pixels = x[:, :, 0].float()
    saturated = (pixels.detach().abs() > 1).float().mean()
    return pixels.clamp(-1, 1) / 2 + 0.5, saturated


# ---- Rewards: human-preference models that see pixels and captions. -------------------------------------------------
def preprocess_pixels(pixels, image_size, mean, std, keep_borders):
    """
    Differentiable preprocessing for CLIP-like encoders: pixels (B, 3, H, W) in [0, 1] -> (B, 3, size, size),
    normalised by the `mean` and `std` of each channel. With `keep_borders` the longer side is fitted and the rest is
    black, as HPSv2's `ResizeMaxSize` does it; otherwise the centre is cropped, as CLIP's processor does it.
    """
    height, width = pixels.shape[-2:]
    scale = image_size / (max if keep_borders else min)(height, width)
    height, width = round(height * scale), round(width * scale)
    pixels = TF.resize(pixels, [height, width], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    if keep_borders:
        left, top = (image_size - width) // 2, (image_size - height) // 2
        pixels = TF.pad(pixels, [left, top, image_size - width - left, image_size - height - top])
    return TF.normalize(TF.center_crop(pixels, [image_size, image_size]), mean, std)


class RewardModel(torch.nn.Module):
    """
    A frozen model of which images people prefer for a caption: a reward is `scale` times the inner product of features
    of unit norm. Subclasses set `model`, `image_size`, `mean`, `std`, `keep_borders`, `scale`; they give raw features.
    """

    def __init__(self):
        super().__init__()
        self.text_cache = {}

    def freeze(self, device, dtype):
        self.requires_grad_(False).eval().to(device=device, dtype=dtype)
        self.dtype = dtype

    def encode_images(self, pixels):
        """`torch.Tensor` of shape (B, 3, H, W) in [0, 1] -> (B, D) float32 of unit norm, differentiable."""
        pixels = preprocess_pixels(pixels, self.image_size, self.mean, self.std, self.keep_borders)
        return F.normalize(self.image_features(pixels.to(self.dtype)).float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts):
        """
        List of B strings -> (B, D) float32 of unit norm. Every text is encoded once in a run, and alone: in a batch its
        last bits would depend on the others, which after resuming are others.
        """
        for text in dict.fromkeys(texts):
            if text not in self.text_cache:
                self.text_cache[text] = F.normalize(self.text_features([text]).float(), dim=-1)[0]
        return torch.stack([self.text_cache[text] for text in texts])

    def reward(self, image_features, text_features):
        """Features of shape (B, D) each -> (B,): the reward of each image for its text."""
        return self.scale * (image_features * text_features).sum(-1)

    def score(self, pixels, captions):
        """The plain reward of each image for its caption: (B,) float32."""
        return self.reward(self.encode_images(pixels), self.encode_texts(captions))


class HPSReward(RewardModel):
    """
    HPSv2.1 (https://arxiv.org/abs/2306.09341): an open_clip model of the given `architecture` with fine-tuned weights,
    which the file `path` holds under `state_dict`. The score is the cosine.
    """

    keep_borders = True
    scale = 1.0

    def __init__(self, path, device="cpu", dtype=torch.float32, architecture=HPS_ARCHITECTURE):
        super().__init__()
        self.model = self.empty_model(architecture)
        self.model.load_state_dict(self.read_weights(path), assign=True)
        self.tokenizer = open_clip.get_tokenizer(architecture)
        self.image_size = self.model.visual.image_size[0]
        self.mean, self.std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.freeze(device, dtype)

    @staticmethod
    def empty_model(architecture):
        with torch.device("meta"):
            model = open_clip.CLIP(**open_clip.get_model_config(architecture))
        length = model.context_length  # the causal mask is the one buffer that no checkpoint holds
        model.attn_mask = torch.full((length, length), float("-inf")).triu(1)
        return model

    @staticmethod
    def read_weights(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]

    def image_features(self, pixels):
        return self.model.encode_image(pixels)

    def text_features(self, texts):
        return self.model.encode_text(self.tokenizer(texts).to(next(self.model.parameters()).device))


class CLIPReward(RewardModel):
    """
    PickScore (https://arxiv.org/abs/2305.01569) or any other CLIPModel. The score is the scaled cosine divided by 20,
    which is the range of HPS (`CLIP` in fastvideo/SRPO.py). Paths are folders or Hub ids.
    """

    keep_borders = False

    def __init__(self, path, processor_path, device="cpu", dtype=torch.float32):
        super().__init__()
        self.model = CLIPModel.from_pretrained(path, dtype=torch.float32)
        processor = CLIPProcessor.from_pretrained(processor_path)
        self.tokenizer = processor.tokenizer
        self.image_size = self.model.config.vision_config.image_size
        self.mean, self.std = processor.image_processor.image_mean, processor.image_processor.image_std
        self.scale = self.model.logit_scale.exp().item() / 20
        self.freeze(device, dtype)

    def image_features(self, pixels):
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def text_features(self, texts):
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output


def load_reward_model(args, device, dtype):
    """The [`RewardModel`] that `--reward_model` and `--reward_model_path` name, frozen, on `device`."""
    if args.reward_model == "HPS":
        return HPSReward(args.reward_model_path, device, dtype)
    return CLIPReward(args.reward_model_path, args.reward_processor_path, device, dtype)


# ---- One rollout's contribution to an update. -----------------------------------------------------------------------
def graded_pass(velocity_fn, vae, reward_model, x0, noise, prompt_embeds, captions, words, branches, args, weight=1.0):
    """
    Takes the graded step of every [`Branch`] of `branches` as one batch, decodes and scores it. `velocity_fn` is that
    of [`rollout`], `x0` are rolled-out latents and `noise` what they came from, (B, C, 1, H, W); `prompt_embeds` are
    (B, L, D) of the plain captions. Only the reward model sees the B `captions` with a control word in front, the
    positive or the negative one of `words`. `weight` is a factor of the loss, see `--loss_weight_shift`.

    Returns the loss, `torch.Tensor` of shape (), and metrics, a dict of detached tensors of shape ().
    """
    batch, repeats = len(x0), len(branches)
    _, *values = zip(*branches, strict=True)  # from the host without waiting for the GPU
    values = torch.tensor(values).to(x0.device, non_blocking=True)
    sigma_from, sigma_to, discount = values.repeat_interleave(batch, dim=1)
    embeds = prompt_embeds.repeat(repeats, 1, 1)
    x0, noise = (latents.repeat(repeats, 1, 1, 1, 1) for latents in (x0, noise))
    x0_hat = direct_align_step(lambda x, sigma: velocity_fn(x, sigma, embeds), x0, noise, sigma_from, sigma_to)

    pixels, saturated = decode_latents(vae, x0_hat)
    features = reward_model.encode_images(pixels)
    positive, negative = (reward_model.encode_texts([f"{word}. {caption}" for caption in captions]) for word in words)
    # The gradient of the inversion branch has the opposite sign, so its captions are swapped.
    swaps = [branch.name == "inversion" for branch in branches]
    score = reward_model.scale * srp_score(
        features,
        torch.cat([negative if swap else positive for swap in swaps]),
        torch.cat([positive if swap else negative for swap in swaps]),
        discount,
    )
    loss = weight * (srpo_loss(score, args.reward_margin) if args.loss == "hinge" else -score.mean())

    features, score = features.detach(), score.detach().chunk(repeats)
    metrics = {
        "loss": loss.detach(),
        "score": torch.cat(score).mean(),
        **{f"score_{branch.name}": score[index].mean() for index, branch in enumerate(branches)},
        "reward_positive": reward_model.reward(features, positive.repeat(repeats, 1)).mean(),
        "reward_negative": reward_model.reward(features, negative.repeat(repeats, 1)).mean(),
        "saturated": saturated,
    }
    return loss, metrics


# ---- What is trained: all weights, or a LoRA beside them. -----------------------------------------------------------
def add_lora(transformer, args):
    """Freezes the transformer and adds a trainable LoRA to `--lora_target_modules`, which changes nothing yet."""
    transformer.requires_grad_(False)
    options = {"lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, "init_lora_weights": "gaussian"}
    transformer.add_adapter(LoraConfig(r=args.lora_rank, target_modules=args.lora_target_modules, **options))


def partition_weights(accelerator, transformer, dtype):
    """Under ZeRO-3, splits the weights among processes one by one. DeepSpeed would first move all to every GPU."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    if config["zero_optimization"]["stage"] == 3:
        import deepspeed

        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(dtype)
        names = ("bf16", "zero_optimization", "train_micro_batch_size_per_gpu")
        needed = {name: config[name] for name in names if name in config}
        deepspeed.zero.Init(module=transformer, dtype=dtype, config_dict_or_path=needed)


def lora_metadata(transformer):
    """What diffusers reads beside a LoRA's weights, such as its alpha; `None` without a LoRA."""
    config = getattr(transformer, "peft_config", {}).get("default")
    return config and {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}


def make_optimizer(args, parameters):
    """AdamW over the trainable ones of `parameters`. DeepSpeed replaces it by its own if that runs on the CPU."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = partial(torch.optim.AdamW, fused=True)  # one kernel for all weights
    if args.optimizer == "adamw_8bit":
        from torchao.optim import AdamW8bit  # optional

        # An update of 5e-6 is less than half a bf16 unit of most weights: rounded to the nearest, it would be lost.
        optimizer = partial(AdamW8bit, bf16_stochastic_round=True)
    betas = (args.adam_beta1, args.adam_beta2)
    return optimizer(parameters, args.learning_rate, betas, args.adam_epsilon, args.adam_weight_decay)


def forget_powers(optimizer):
    """
    DeepSpeed's AdamW for the CPU multiplies up the powers of its betas, but computes them after loading a checkpoint;
    the last bit differs. Made anew before each step, it always computes them.
    """

    def make_anew(adam, _args, _kwargs):  # with no betas, which like the rate come with each step
        adam.ds_opt_adam.create_adam(adam.opt_id, 0.0, 0.0, 0.0, 0.0, 0.0, adam.adam_w_mode, False)

    if hasattr(optimizer, "ds_opt_adam"):
        optimizer.register_step_pre_hook(make_anew)


def gather_weights(accelerator, transformer, dtype):
    """
    The trained weights on the CPU, {name: `torch.Tensor` of `dtype`}, on the main process; all others get none, but
    call it too. Under ZeRO-3 they are put together one by one, so that no GPU needs room for the whole model.
    """
    weights, whole = {}, nullcontext
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        import deepspeed

        whole = deepspeed.zero.GatheredParameters
    for name, parameter in accelerator.unwrap_model(transformer).named_parameters():
        if parameter.requires_grad:
            with whole([parameter]):
                if accelerator.is_main_process:
                    weights[name] = parameter.detach().to("cpu", dtype, copy=True)
    return weights


# ---- Validation: fixed prompts, fixed noise, diffusers' own pipeline. -----------------------------------------------
class ValidationSet(NamedTuple):
    captions: list[str]
    prompt_embeds: torch.Tensor  # (N, L, D)
    negative_prompt_embeds: torch.Tensor  # (1, L, D)


@torch.no_grad()
def paint_validation(accelerator, pipeline, reward_model, validation, args):
    """
    Paints this process's share of the validation prompts and scores the images: a list of (number of the prompt,
    pixels of shape (H, W, 3) uint8, reward, relative reward). The first reward is for the plain caption, the second
    for that with the positive control words minus that with the negative ones.
    """
    count, processes = len(validation.captions), accelerator.num_processes
    # Under ZeRO-3 all processes call the transformer equally often, so the shares are filled up with repeats.
    mine = [index % count for index in range(accelerator.process_index, -(-count // processes) * processes, processes)]
    size, factor = args.validation_size, pipeline.vae_scale_factor_spatial
    shape = (pipeline.transformer.config.in_channels, 1, size // factor, size // factor)
    painted = []
    for start in range(0, len(mine), args.train_batch_size):
        indices = mine[start : start + args.train_batch_size]
        noise = [torch.randn(shape, generator=make_generator(args.seed, VALIDATION, index)) for index in indices]
        texts = validation.prompt_embeds[indices], validation.negative_prompt_embeds.repeat(len(indices), 1, 1)
        inputs = (tensor.to(accelerator.device) for tensor in (*texts, torch.stack(noise)))
        inputs = dict(zip(("prompt_embeds", "negative_prompt_embeds", "latents"), inputs, strict=True))
        inputs |= {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.validation_guidance_scale}
        images = pipeline(**inputs, height=size, width=size, num_frames=1, output_type="pt").frames[:, 0]
        captions = [validation.captions[index] for index in indices]
        features = reward_model.encode_images(images.float())
        positive, negative = (
            torch.stack([reward_model.encode_texts([f"{word}. {caption}" for caption in captions]) for word in words])
            for words in (args.positive_words, args.negative_words)
        )
        rewards = reward_model.reward(features, reward_model.encode_texts(captions))
        relative = reward_model.scale * srp_score(features, positive.mean(0), negative.mean(0), discount=0.0)
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        painted += zip(indices, pixels, rewards.tolist(), relative.tolist(), strict=True)
    return painted


def log_validation(accelerator, pipeline, reward_model, validation, args, step):
    """
    Paints and scores all validation prompts; images and scores go to the trackers and to `images/step-N/`. Returns the
    means over the images on every process, {"validation_reward": `float`, "validation_relative": `float`}.
    """
    logger.info(f"Running validation at step {step}: {len(validation.captions)} images.")
    painted = gather_object(paint_validation(accelerator, pipeline, reward_model, validation, args))
    results = {index: result for index, *result in painted}  # repeats fall away
    images, rewards, relative = zip(*(results[index] for index in sorted(results)), strict=True)
    if accelerator.is_main_process:
        folder = Path(args.output_dir, "images", f"step-{step}")
        folder.mkdir(parents=True, exist_ok=True)
        slugs = [re.sub(r"\W+", "-", caption.lower()).strip("-")[:48] for caption in validation.captions]
        names = [f"{index:03d}-{slug}.png" for index, slug in enumerate(slugs)]
        for name, image in zip(names, images, strict=True):
            Image.fromarray(image).save(folder / name)
        rows = zip(validation.captions, names, rewards, relative, strict=True)
        scores = [dict(zip(("caption", "image", "reward", "relative"), row, strict=True)) for row in rows]
        (folder / "scores.json").write_text(json.dumps(scores, indent=1))
        for tracker in accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            if hasattr(tracker, "log_images"):
                tracker.log_images({"validation": np.stack(images)}, step=step, **layout)
    accelerator.wait_for_everyone()
    logs = {"validation_reward": np.mean(rewards).item(), "validation_relative": np.mean(relative).item()}
    accelerator.log(logs, step=step)
    return logs


def save_before_after(output_dir, steps, columns=8):
    """`before_after.png`: the first validation images of two steps, one above the other, with their rewards."""
    folders = [Path(output_dir, "images", f"step-{step}") for step in steps]
    scores = [json.loads((folder / "scores.json").read_text())[:columns] for folder in folders]
    figure = Figure(figsize=(2.4 * len(scores[0]), 5.8), layout="tight")
    axes = figure.subplots(2, len(scores[0]), squeeze=False)
    for row, step, folder, images in zip(axes, steps, folders, scores, strict=True):
        for axis, image in zip(row, images):  # noqa: B905  a resumed run may have more or fewer
            axis.imshow(Image.open(folder / image["image"]))
            axis.set_xlabel(f"reward {image['reward']:.3f}\nrelative {image['relative']:+.3f}", fontsize=8)
            axis.set(xticks=[], yticks=[])
            if step == steps[0]:
                title = "\n".join(re.findall(r".{1,26}(?:\s|$)", image["caption"])[:3])
                axis.set_title(title, fontsize=8, parse_math=False)
        row[0].set_ylabel(f"step {step}")
    figure.savefig(Path(output_dir, "before_after.png"), dpi=120)


def save_reward_curve(output_dir, history):
    """`reward.png`: rewards and scores of the training samples by step, and the reward of the validation images."""
    figure = Figure(figsize=(11, 4), layout="tight")
    curves = {
        "Reward": {"reward_positive": "-", "reward_negative": "-", "validation_reward": "ko-"},
        "Relative score": {"score_denoise": "-", "score_inversion": "-", "validation_relative": "ko-"},
    }
    for axis, (title, styles) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        for name, style in styles.items():
            if rows := [(row["step"], row[name]) for row in history if name in row]:
                axis.plot(*zip(*rows, strict=True), style, label=name.replace("_", ", "), alpha=0.8)
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(Path(output_dir, "reward.png"), dpi=120)


# ---- What a run leaves behind: checkpoints, the model, its card. ----------------------------------------------------
def list_checkpoints(output_dir):
    """The complete checkpoints in a folder, in the order in which they were written."""
    states = sorted(Path(output_dir).glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime_ns)
    return [path.parent for path in states if re.fullmatch(r"checkpoint-\d+", path.parent.name)]


def discard(folder):
    """Removes a checkpoint. It is renamed first, so that what is left if that is interrupted does not look whole."""
    shutil.rmtree(folder.rename(f"{folder}.discarded.unfinished"))


def describe_run(accelerator, args):
    """What a checkpoint and the run that continues it must share. Other flags may change."""
    engine, batch = "without DeepSpeed", ("train_batch_size", "gradient_accumulation_steps", "updates_per_rollout")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        zero, masters = config["zero_optimization"], "bf16_master_weights_and_grads"
        options = [name for name in ("offload_param", "offload_optimizer") if name in zero]
        options += [masters] if config.get("bf16", {}).get(masters) else []
        engine = ", ".join([f"ZeRO-{zero['stage']}", *options])
    return {
        "engine": engine,
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        **{name: getattr(args, name) for name in ("transformer_subfolder", "optimizer", *batch)},
        "base model, by a hash of its weights": weights_fingerprint(args, args.transformer_subfolder, *BASE_LAYER),
        "LoRA rank, alpha and modules": [args.lora_rank, args.lora_alpha, args.lora_target_modules],
        "learning rate and schedule": [args.learning_rate, args.lr_scheduler, args.lr_warmup_steps],
        "betas, epsilon and decay": [args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.adam_weight_decay],
    }


def leave_out_frozen(_models, weights, _output_dir):
    """A hook of `Accelerator.save_state`: of the state dicts, of which DeepSpeed has none, it keeps only the LoRA."""
    weights[:] = [{name: tensor for name, tensor in each.items() if "lora_" in name} for each in weights]


def save_checkpoint(accelerator, args, transformer, dtype, run, step, history):
    """
    Writes `checkpoint-N`: the training state, and in `trainer_state.json` the curves and what export_checkpoint.py
    needs. It is written beside and renamed when complete; only then are checkpoints above the limit removed.
    """
    folder = Path(args.output_dir, f"checkpoint-{step}")
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if accelerator.is_main_process:
        for leftover in Path(args.output_dir).glob("checkpoint-*.unfinished"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    # Frozen weights are those of the base model: without DeepSpeed, `leave_out_frozen` leaves them out.
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.save_state(str(unfinished), **({"exclude_frozen_parameters": True} if deepspeed else {}))
    os.sync()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        transformer = accelerator.unwrap_model(transformer)
        state = {"global_step": step, "history": history, "run": run, "expert": args.transformer_subfolder}
        state |= {"config": dict(transformer.config), "lora": lora_metadata(transformer)}
        state["dtype"] = str(dtype).removeprefix("torch.")
        (unfinished / "trainer_state.json").write_text(json.dumps(state))
        if folder.exists():
            discard(folder)
        unfinished.rename(folder)
        if args.checkpoints_total_limit is not None:
            for old in list_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
                discard(old)
        logger.info(f"Saved state to {folder}")
    accelerator.wait_for_everyone()


def find_checkpoint(args, run):
    """
    The checkpoint that `--resume_from_checkpoint` names, or `None`, and what its `trainer_state.json` says.
    `ValueError` if `run`, from [`describe_run`], cannot go on with it.
    """
    folder = args.resume_from_checkpoint
    if folder == "latest":
        folder = (list_checkpoints(args.output_dir) or [None])[-1]
    if folder is None:
        return None, {"global_step": 0, "history": []}
    file = Path(folder, "trainer_state.json")
    with blame(f"`{file}` is damaged or of another version of this script; resume from another checkpoint"):
        state = json.loads(file.read_text())
        state = {name: state[name] for name in ("global_step", "history", "run")}
        compared = {name: (state["run"][name], value) for name, value in run.items()}
    for name, (found, value) in compared.items():
        if found != value:
            problem = f"{folder} was made with another {name}: {found}. It cannot go on with {value}."
            raise ValueError(f"{problem} Use the same, or start a new run.")
    if state["global_step"] > args.max_train_steps:
        raise ValueError(f"{folder} is beyond `--max_train_steps {args.max_train_steps}`.")
    return folder, state


def handle_stop_signals(handler, _worker=None):
    """Sets what this process, the run or one that loads data for it, does when it gets SIGTERM or SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def save_weights(weights, output_dir, expert, config, lora):
    """
    Writes trained weights, {name in the transformer: `torch.Tensor`}, as diffusers reads them, and returns the path: a
    file for a LoRA with the metadata `lora`, otherwise the folder `expert` with the `config` of the transformer.
    """
    if lora is not None:
        layers = {name.replace(".default.", "."): weight for name, weight in weights.items()}
        WanPipeline.save_lora_weights(output_dir, layers, transformer_lora_adapter_metadata=lora)
        return Path(output_dir, LORA_WEIGHT_NAME_SAFE)
    folder = Path(output_dir, expert)
    with torch.device("meta"):
        WanTransformer3DModel.from_config(config).save_config(folder)
    suffix = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    huggingface_hub.save_torch_state_dict(weights, folder, filename_pattern=suffix, max_shard_size="10GB")
    return folder


def save_merged(args, dtype):
    """Writes the base model as it is on the disk, with the LoRA of `output_dir` merged into it."""
    source = {**model_source(args), "subfolder": args.transformer_subfolder}
    transformer = WanTransformer3DModel.from_pretrained(**source, variant=args.variant, dtype=dtype)
    transformer.load_lora_adapter(args.output_dir, weight_name=LORA_WEIGHT_NAME_SAFE, use_safetensors=True)
    transformer.fuse_lora()
    transformer.unload_lora()
    transformer.save_pretrained(Path(args.output_dir, args.transformer_subfolder), max_shard_size="10GB")


MODEL_CARD = """
# SRPO fine-tuning of {base}

{what} of [{base}](https://huggingface.co/{base}), fine-tuned for text-to-image with SRPO on the reward of
{args.reward_model}: {updates} updates{rewards}.

{images}
![Reward curve](reward.png)

## How to use it

```python
import torch
from diffusers import WanPipeline, WanTransformer3DModel

{load_expert}
pipe = WanPipeline.from_pretrained("{base}", {experts}, dtype=torch.bfloat16).to("cuda")
image = pipe(
    "a red fox in the snow", num_frames=1, height={args.validation_size}, width={args.validation_size},
    num_inference_steps={args.num_inference_steps}, guidance_scale={args.validation_guidance_scale},
    max_sequence_length={args.max_sequence_length}, output_type="pil",
).frames[0][0]
image.save("fox.png")
```

## Training settings

| flag | value |
|---|---|
{settings}

Method: Shen et al. 2025, *Directly Aligning the Full Diffusion Trajectory with Fine-Grained Human Preference*,
https://arxiv.org/abs/2509.06942.
"""


def save_model_card(args, repo_id, history, model):
    """Writes the `README.md` of the output folder: what it is, how to use it, how it was made."""
    expert = args.transformer_subfolder
    load = 'expert = WanTransformer3DModel.from_pretrained("{}", subfolder="{}", dtype=torch.bfloat16)'
    load_expert, what = load.format(repo_id, expert), f"`{expert}`"
    if args.lora_rank is not None and not args.save_merged:
        what = f"A LoRA of rank {args.lora_rank} for `{expert}`"
        load_expert = load.format(args.pretrained_model_name_or_path, expert)
        options = f'weight_name="{LORA_WEIGHT_NAME_SAFE}", use_safetensors=True'
        load_expert += f'\nexpert.load_lora_adapter("{repo_id}", {options})'
    validation = [row["validation_relative"] for row in history if "validation_relative" in row]
    settings = {
        name: " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        for name, value in sorted(vars(args).items())
        if value is not None and name not in ("hub_token", "output_dir", "validation_prompts")
    }
    alone = "transformer=None, transformer_2=expert, boundary_ratio=1.0"
    content = MODEL_CARD.format(
        args=args,
        base=args.pretrained_model_name_or_path,
        what=what,
        load_expert=load_expert,
        experts=alone if model.two_experts else f"{expert}=expert",
        updates=max((row["step"] for row in history), default=0),
        rewards=f", relative reward {validation[0]:.4f} -> {validation[-1]:.4f}" if validation else "",
        images="![Validation images before and after training](before_after.png)\n" if validation else "",
        settings="\n".join(f"| `--{name}` | {value} |" for name, value in settings.items()),
    )
    data = huggingface_hub.ModelCardData(
        base_model=None if Path(args.pretrained_model_name_or_path).is_dir() else args.pretrained_model_name_or_path,
        library_name="diffusers",
        license="apache-2.0",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "wan", "srpo", *(["lora"] if args.lora_rank is not None else [])],
    )
    huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n{content}").save(Path(args.output_dir, "README.md"))


def save_results(accelerator, args, transformer, dtype, repo_id, history, model):
    """Writes what users want of a run: the weights, the curves, the pictures and the card; and pushes it."""
    weights = gather_weights(accelerator, transformer, dtype)
    if accelerator.is_main_process:
        bare = accelerator.unwrap_model(transformer)
        expert, config, lora = args.transformer_subfolder, dict(bare.config), lora_metadata(bare)
        logger.info(f"Saved {save_weights(weights, args.output_dir, expert, config, lora)}")
        if args.save_merged:
            save_merged(args, dtype)
        save_reward_curve(args.output_dir, history)
        painted = [row["step"] for row in history if "validation_relative" in row]
        painted = [step for step in painted if Path(args.output_dir, f"images/step-{step}/scores.json").is_file()]
        if painted:
            save_before_after(args.output_dir, (painted[0], painted[-1]))
        save_model_card(args, repo_id, history, model)
        if args.push_to_hub:
            upload(args, repo_id, history)
    accelerator.wait_for_everyone()


def with_retries(request, attempts=5):
    """Repeats a request to the Hub after 1, 2, 4, 8 seconds, unless the Hub answers that the request is wrong."""
    for attempt in range(attempts):
        try:
            return request()
        except Exception as error:
            while getattr(error, "response", None) is None and error.__cause__ is not None:
                error = error.__cause__  # huggingface_hub wraps what the storage answers
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if attempt == attempts - 1 or (status < 500 and status not in (408, 429)):
                raise error
            logger.warning(f"The Hub failed: {error}\nTrying again in {2**attempt} s.")
            time.sleep(2**attempt)


def upload(args, repo_id, history):
    """Uploads the output folder without its checkpoints. If that fails, the folder is whole and a message says how."""
    ignored = ["checkpoint-*", f"{args.logging_dir}/*"]
    message = f"After {history[-1]['step']} updates" if history else "Before training"
    options = {"commit_message": message, "ignore_patterns": [*ignored], "token": args.hub_token}
    try:
        with_retries(lambda: huggingface_hub.upload_folder(repo_id=repo_id, folder_path=args.output_dir, **options))
    except Exception as error:  # whatever it was, the run goes on and its files are safe
        exclude = [word for pattern in ignored for word in ("--exclude", pattern)]
        command = shlex.join(["hf", "upload", repo_id, args.output_dir, ".", *exclude])
        logger.error(f"Upload failed: {error}\nUpload later with: {command}")


# ---- Arguments and inputs. ------------------------------------------------------------------------------------------
def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description="Fine-tune the low-noise expert of Wan2.2 for text-to-image with SRPO.",
        usage="accelerate launch --config_file CONFIG %(prog)s --pretrained_model_name_or_path M --dataset_name D "
        "--reward_model {HPS,PickScore,CLIP} --reward_model_path P --output_dir O [options, see --help]",
    )

    # fmt: off
    add = parser.add_argument_group("model and data").add_argument
    add("--pretrained_model_name_or_path", required=True,
        help="Path to pretrained model or model identifier from huggingface.co/models, in the layout of diffusers.")
    add("--revision", help="Revision of pretrained model identifier from huggingface.co/models.")
    add("--variant", help="Variant of the model files of the pretrained model identifier, 'e.g.' fp16")
    add("--transformer_subfolder", default="transformer_2", help="The expert: `transformer` for models that have one.")
    add("--dataset_name", required=True, help="Folder or Hub id of the dataset that embed_prompts.py wrote.")
    add("--max_sequence_length", type=int, default=512, help="The one that the captions were embedded with.")
    add("--cache_dir", help="Where the downloaded base model and dataset will be stored.")
    add("--dataloader_num_workers", type=int, default=0, help="Number of subprocesses to use for data loading.")
    add("--height", type=int, default=512, help="The height in pixels of the images to train on.")
    add("--width", type=int, default=512, help="The width in pixels of the images to train on.")
    add = parser.add_argument_group("reward").add_argument
    add("--reward_model", choices=["HPS", "PickScore", "CLIP"], default="HPS", help="The human-preference model.")
    add("--reward_model_path",
        help="HPS: the file HPS_v2.1_compressed.pt; otherwise folder or Hub id of a CLIPModel. CLIP has no default.")
    add("--reward_processor_path", help="PickScore, CLIP: folder or Hub id of the processor, if not the usual one.")
    add("--reward_dtype", choices=["fp32", "bf16"], help="Precision of the reward model. Default: that of the run.")
    words = "Control words to move {}, a new one every step. The published ones suit HPS."
    add("--positive_words", nargs="+", default=POSITIVE_WORDS, help=words.format("towards"))
    add("--negative_words", nargs="+", default=NEGATIVE_WORDS, help=words.format("away from"))
    add = parser.add_argument_group("SRPO").add_argument
    add("--branches", choices=["both", "denoise", "inversion"], default="both", help="Branches of the graded step.")
    add("--loss", choices=["hinge", "linear"], default="hinge", help="relu(margin - score), or just -score.")
    add("--reward_margin", type=float, default=0.7, help="The score from which on the hinge loss is zero.")
    add("--loss_weight_shift", type=float,
        help="Weigh the loss at position p by the curve of this shift at p / timestep_length. Default: all the same.")
    add("--train_timestep", type=int, nargs=2, default=[5, 25], metavar=("FIRST", "LAST"),
        help="First and last step of the trained window, of the num_inference_steps of the schedule.")
    add("--timestep_length", type=int, default=1000, help="Number of noise levels in the trained window.")
    add("--groundtruth_ratio", type=float, default=0.9, help="Injected noise, as a share of the window.")
    ends = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    discount = "Extra weight of the {} caption in the {} branch, at the low- and high-noise end."
    add("--discount_pos", **ends, default=[0.1, 0.25], help=discount.format("positive", "denoise"))
    add("--discount_inv", **ends, default=[0.3, 0.01], help=discount.format("negative", "inversion"))
    add("--shift", type=float, default=1.0, help="Shift of the schedule that the window is cut from.")
    add("--num_inference_steps", type=int, default=40, help="Steps of that schedule, and of validation images.")
    add = parser.add_argument_group("rollout").add_argument
    add("--sampling_steps", type=int, default=10, help="The number of denoising steps of a rollout.")
    add("--rollout_scheduler", choices=["unipc", "euler"], default="unipc", help="The solver of rollouts.")
    add("--rollout_start", choices=["noise", "boundary"], default="noise",
        help="boundary: from latents that the high-noise expert painted; see `embed_prompts.py --boundary_latents`.")
    add("--rollout_batch_size", type=int,
        help="Samples to roll out at once (per device); more make weights travel less. Default: train_batch_size.")
    add("--updates_per_rollout", type=int, default=1,
        help="Number of updates, each at a new position with new control words, that a rollout is used for.")
    add("--renew_noise", action="store_true", help="Also inject new noise in further updates on the same rollout.")
    add("--rollout_shift", type=float, help="Shift of the rollout's schedule. Default: `flow_shift` of the model.")
    add("--rollout_guidance_scale", type=float, default=3.0, help="Guidance scale of rollouts. 1.0 halves their cost.")
    add("--noise", choices=["shared", "per_sample"], default="shared", help="One noise for a step, or one per sample.")
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_rank", type=int, help="Train a LoRA of this rank beside the weights. Default: train all weights.")
    add("--lora_alpha", type=float, help="Scale of the LoRA: alpha / rank. Default: the rank.")
    add("--lora_dropout", type=float, help="Dropout probability of the LoRA's input in the graded step. Default: 0.")
    add("--lora_target_modules", nargs="+",
        help=f"Names of the linear layers that get a LoRA. Default: {' '.join(LORA_TARGET_MODULES)}")
    add("--base_weights", choices=["fp8"],
        help="Store frozen linear layers in float8 (e4m3), half of bf16; saves little without gradient checkpointing.")
    add("--save_merged", action="store_true", help="Also write the base model with the LoRA merged into it.")
    add = parser.add_argument_group("optimization").add_argument
    add("--seed", type=int, default=42, help="A seed for reproducible training.")
    add("--train_batch_size", type=int, default=1, help="Batch size (per device) of a rollout, in captions.")
    add("--gradient_accumulation_steps", type=int, default=1,
        help="Number of rollouts to accumulate before performing an update. Each counts once, whatever its branches.")
    add("--max_train_steps", type=int, default=100, help="Total number of updates to perform.")
    add("--learning_rate", type=float, default=5e-6, help="Initial learning rate to use.")
    schedulers = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
    add("--lr_scheduler", choices=schedulers, default="constant", help="The scheduler type to use.")
    add("--lr_warmup_steps", type=int, default=0, help="Number of steps for the warmup in the lr scheduler.")
    add("--optimizer", choices=["adamw", "adamw_8bit"], default="adamw",
        help="adamw_8bit keeps AdamW's states in 8 bits (torchao). Without DeepSpeed it also keeps the weights in the "
             "precision of the run and rounds them stochastically to bf16: 6 bytes per weight instead of 16.")
    add("--adam_beta1", type=float, default=0.9, help="The beta1 parameter for the AdamW optimizer.")
    add("--adam_beta2", type=float, default=0.999, help="The beta2 parameter for the AdamW optimizer.")
    add("--adam_weight_decay", type=float, default=1e-4, help="Weight decay to use.")
    add("--adam_epsilon", type=float, default=1e-8, help="Epsilon value for the AdamW optimizer.")
    add("--max_grad_norm", type=float, default=0.1, help="Max gradient norm.")
    add("--gradient_checkpointing", action="store_true", help="Save memory at the expense of slower backward pass.")
    add("--compile", action="store_true", help="Compile the blocks of the transformer: minutes once, then faster.")
    add("--allow_tf32", action="store_true", help="Whether or not to allow TF32 on Ampere and later GPUs.")
    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompts", nargs="*", help="Prompts to paint, or none. Default: the first four captions.")
    add("--validation_steps", type=int, default=10, help="Run validation every X updates, and at the end.")
    add("--validation_size", type=int, default=1024, help="The side in pixels of validation images.")
    add("--validation_guidance_scale", type=float, default=3.0, help="Guidance scale of validation images.")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="srpo-wan", help="Where the model, checkpoints, images and logs will be written.")
    add("--overwrite_output_dir", action="store_true", help="Delete what an earlier run wrote to `output_dir` first.")
    add("--checkpointing_steps", type=int, default=10, help="Save a checkpoint of the training state every X updates.")
    add("--checkpoints_total_limit", type=int, help="Max number of checkpoints to store.")
    add("--resume_from_checkpoint", help="Path of a checkpoint, or `latest` for the last one in `output_dir`.")
    add("--logging_dir", default="logs", help="The directory for TensorBoard logs, inside `output_dir`.")
    trackers = [*LOGGER_TYPE_TO_CLASS, "all", "none"]
    add("--report_to", choices=trackers, default="tensorboard", help="Where to report results and logs.")
    add("--push_to_hub", action="store_true", help="Whether or not to push the model to the Hub.")
    add("--hub_model_id", help="The name of the repository to push to. Default: the name of `output_dir`.")
    add("--hub_token", help="The token to use to push to the Model Hub.")
    add("--hub_private_repo", action="store_true", help="Whether to create the repository as private.")
    add("--hub_strategy", choices=["end", "checkpoint"], default="end", help="Push at the end, or at checkpoints too.")
    # fmt: on

    args = parser.parse_args(input_args)
    check_values(args, parser.error)
    if args.lora_rank is not None:
        args.lora_alpha, args.lora_dropout = args.lora_alpha or args.lora_rank, args.lora_dropout or 0.0
        args.lora_target_modules = sorted(args.lora_target_modules or LORA_TARGET_MODULES)
    return args


def check_values(args, error):
    """Refuses values that no run can use. `error` takes the message and does not return."""
    counts = ["train_batch_size", "gradient_accumulation_steps", "max_train_steps", "max_sequence_length"]
    counts += ["sampling_steps", "num_inference_steps", "validation_steps", "checkpointing_steps"]
    for name in [*counts, "updates_per_rollout", "rollout_batch_size", "checkpoints_total_limit", "lora_rank"]:
        value = getattr(args, name)
        if value is not None and value < 1:
            error(f"`--{name}` must be at least 1, but is {value}.")
    (first, last), steps = args.train_timestep, args.num_inference_steps
    if not 0 <= first < last <= steps:
        error(f"`--train_timestep {first} {last}` must be two growing steps of the {steps} `--num_inference_steps`.")
    if args.checkpointing_steps % args.updates_per_rollout:
        error("`--checkpointing_steps` must be a multiple of `--updates_per_rollout`, to resume with a new rollout.")
    if args.renew_noise and args.updates_per_rollout == 1:
        error("`--renew_noise` needs `--updates_per_rollout` above 1; each rollout has new noise anyway.")
    for name, valid, what in (
        ("timestep_length", args.timestep_length >= 2 * POSITION_MARGIN, f"at least {2 * POSITION_MARGIN}"),
        ("groundtruth_ratio", 0 < args.groundtruth_ratio < 1, "between 0 and 1"),
        ("seed", args.seed >= 0, "at least 0"),
        ("learning_rate", args.learning_rate >= 0, "at least 0"),
        ("lora_dropout", 0 <= (args.lora_dropout or 0) < 1, "at least 0 and below 1"),
    ):
        if not valid:
            error(f"`--{name}` must be {what}, but is {getattr(args, name)}.")
    for name in ("shift", "rollout_shift", "loss_weight_shift", "max_grad_norm", "lora_alpha"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            error(f"`--{name}` must be positive, but is {getattr(args, name)}.")
    for name in ("lora_alpha", "lora_dropout", "lora_target_modules", "base_weights", "save_merged"):
        if args.lora_rank is None and getattr(args, name) is not None and getattr(args, name) is not False:
            error(f"`--{name}` needs `--lora_rank`; without it there is no LoRA and all weights are trained.")
    if args.optimizer == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
        error("`--optimizer adamw_8bit` needs torchao: run `pip install torchao`.")
    if args.hub_strategy == "checkpoint" and not args.push_to_hub:
        error("`--hub_strategy checkpoint` needs `--push_to_hub`.")
    if args.push_to_hub and not (args.hub_token or huggingface_hub.get_token()):
        error("`--push_to_hub` needs a token: run `hf auth login` or pass `--hub_token`.")


@contextmanager
def blame(cause):
    """Turns whatever a library says of unreadable input into a `ValueError` of one line that begins with `cause`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{cause}: {' '.join(str(error).split())}") from error


class ModelInfo(NamedTuple):
    """What the configs of the base model say; see the attributes of the same names in diffusers."""

    two_experts: bool
    boundary_ratio: float | None
    expand_timesteps: bool
    patch_size: tuple[int, int, int]
    in_channels: int
    text_dim: int
    vae_scale_factor: int
    flow_shift: float


def model_source(args):
    """Where to load the base model from: arguments of every `from_pretrained` and `load_config`."""
    return {name: getattr(args, name) for name in ("pretrained_model_name_or_path", "revision", "cache_dir")}


def read_model_info(args):
    """The [`ModelInfo`] of the base model from its configs. `ValueError` if it is not Wan or lacks the expert."""
    path, expert, source = args.pretrained_model_name_or_path, args.transformer_subfolder, model_source(args)
    with blame(f"`--pretrained_model_name_or_path {path}` is not a Wan pipeline in the layout of diffusers"):
        index = WanPipeline.load_config(**source)
        scheduler = UniPCMultistepScheduler.load_config(**source, subfolder="scheduler")
        with torch.device("meta"):
            vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(**source, subfolder="vae"))
    two_experts = index.get("transformer_2", [None, None])[1] is not None
    if two_experts != (expert == "transformer_2"):
        raise ValueError(
            f"`{path}` has {'two experts' if two_experts else 'no `transformer_2`, only one expert'}: train it with "
            f"`--transformer_subfolder {'transformer_2' if two_experts else 'transformer'}`."
        )
    if two_experts and index.get("boundary_ratio") is None:
        raise ValueError(f"`--pretrained_model_name_or_path {path}` has no `boundary_ratio` in its model_index.json.")
    with blame(f"`--pretrained_model_name_or_path {path}` lacks the model in `{expert}`"), torch.device("meta"):
        config = WanTransformer3DModel.load_config(**source, subfolder=expert)
        transformer = WanTransformer3DModel.from_config(config)
    if args.lora_rank is not None:
        for name in args.lora_target_modules:
            if not any(f".{layer}".endswith(f".{name}") for layer, _ in transformer.named_modules()):
                raise ValueError(f"`--lora_target_modules`: the transformer has no layer `{name}`.")
        with blame("`--lora_target_modules` must name linear layers"), torch.device("meta"):
            add_lora(transformer, args)
    return ModelInfo(
        two_experts=two_experts,
        boundary_ratio=index.get("boundary_ratio"),
        expand_timesteps=index.get("expand_timesteps", False),
        patch_size=tuple(transformer.config.patch_size),
        in_channels=transformer.config.in_channels,
        text_dim=transformer.config.text_dim,
        vae_scale_factor=vae.config.scale_factor_spatial,
        flow_shift=scheduler.get("flow_shift", 1.0),
    )


def check_window(args, model):
    """Refuses a training window above the boundary of the low-noise expert and names the largest valid one."""
    if not model.two_experts:
        if args.rollout_start == "boundary":
            raise ValueError("`--rollout_start boundary` needs a model of two experts; this one has no boundary.")
        return
    schedule = shift_sigmas(torch.linspace(1, 0, args.num_inference_steps + 1), args.shift)
    first, last = args.train_timestep
    if schedule[first] > model.boundary_ratio + 1e-6:
        lowest = int((schedule > model.boundary_ratio + 1e-6).sum())
        raise ValueError(
            f"`--train_timestep {first} {last}` starts at sigma {schedule[first]:.3f}, above the boundary "
            f"{model.boundary_ratio} of the low-noise expert, which sees no such noise. The largest valid window of "
            f"this schedule is `--train_timestep {lowest} {args.num_inference_steps}`."
        )


def check_sizes(args, model):
    """Refuses image sizes that the latents cannot have."""
    for name in ("height", "width", "validation_size"):
        multiple = model.vae_scale_factor * model.patch_size[2 if name == "width" else 1]
        if name == "validation_size":
            multiple = np.lcm(multiple, 16).item()  # WanPipeline's own demand
        value = getattr(args, name)
        if value < 1 or value % multiple:
            near = max(1, round(value / multiple)) * multiple
            raise ValueError(
                f"`--{name} {value}` must be a multiple of {multiple} for this model, for example {near}."
            )


def weights_fingerprint(args, subfolder, file, name):
    """
    Identifies a model of the pipeline by the weights of one layer, wherever they lie: the first 16 hex digits of their
    SHA-256 in bfloat16. Only that tensor, `name` in `subfolder/file.safetensors` or its shards, is read.
    """
    source = {"subfolder": subfolder, "revision": args.revision, "cache_dir": args.cache_dir}
    cached = partial(cached_file, args.pretrained_model_name_or_path, **source)
    suffix = f".{args.variant}" if args.variant else ""
    index = cached(f"{file}.safetensors.index{suffix}.json", _raise_exceptions_for_missing_entries=False)
    shard = json.loads(Path(index).read_text())["weight_map"][name] if index else f"{file}{suffix}.safetensors"
    with safe_open(cached(shard), framework="pt") as weights:
        weight = weights.get_tensor(name)
    return hashlib.sha256(weight.to(torch.bfloat16).view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def text_encoder_fingerprint(args):  # the one of `embed_prompts.py`
    return weights_fingerprint(args, "text_encoder", *TEXT_ENCODER_LAYER)


def check_dataset(args, model):
    """Refuses a dataset that `embed_prompts.py` did not write for this model's text encoder; else returns it."""
    name, path = f"`--dataset_name {args.dataset_name}`", args.pretrained_model_name_or_path
    with blame(f"{name} cannot be loaded; make it with embed_prompts.py"):
        dataset = load_prompt_dataset(args.dataset_name, args.cache_dir)
    columns = {"caption", "prompt_embeds", "text_encoder_fingerprint", "max_sequence_length"}
    for split in ("train", "negative"):
        if split not in dataset or not columns <= set(dataset[split].column_names) or len(dataset[split]) == 0:
            raise ValueError(f"{name} was not made by embed_prompts.py: it lacks rows or columns in `{split}`.")
    with blame(f"`--pretrained_model_name_or_path {path}` lacks the text encoder to compare {name} with"):
        fingerprint = text_encoder_fingerprint(args)
    for rows in (dataset["train"], dataset["negative"]):
        for what, found, expected in (
            ("embeddings of size", {np.asarray(rows[0]["prompt_embeds"]).shape[-1]}, model.text_dim),
            ("embeddings of length", set(rows.unique("max_sequence_length")), args.max_sequence_length),
            ("embeddings of the text encoder", set(rows.unique("text_encoder_fingerprint")), fingerprint),
        ):
            if found != {expected}:
                raise ValueError(
                    f"{name} holds {what} {', '.join(map(str, found))}, but `{path}` with `--max_sequence_length "
                    f"{args.max_sequence_length}` needs {expected}. Embed the captions again for this model."
                )
    if args.rollout_start == "boundary":
        lacking = {*BOUNDARY_COLUMNS, "boundary_settings"} - set(dataset["train"].column_names)
        settings = [None] if lacking else dataset["train"].unique("boundary_settings")
        if None in settings:
            raise ValueError(f"{name} has no boundary latents, or rows without; see `embed_prompts.py --help`.")
        wanted = {**vars(args), "rollout_shift": args.rollout_shift or model.flow_shift}
        for found in map(json.loads, settings):
            for flag in BOUNDARY_FLAGS:
                if found[flag] != wanted[flag]:
                    problem = f"{name} has boundary latents of `--{flag} {found[flag]}`, not {wanted[flag]}."
                    raise ValueError(f"{problem} Train with the same, or make others with embed_prompts.py.")
    return dataset


def check_reward(args):
    """
    Fills in the defaults of `--reward_model_path` and `--reward_processor_path` and refuses a checkpoint that is
    missing or of another architecture.
    """
    if args.reward_model == "HPS":
        with blame(f"Without `--reward_model_path`, {HPS_FILE} is needed from the Hub, which failed"):
            path = args.reward_model_path or huggingface_hub.hf_hub_download(HPS_REPOSITORY, HPS_FILE)
        args.reward_model_path = path
        if not Path(path).is_file():
            download = f"hf download {HPS_REPOSITORY} {HPS_FILE} --local-dir ."
            raise ValueError(f"`--reward_model_path {path}` is not a file. Download it with `{download}`.")
        with blame(f"`--reward_model_path {path}` is not a checkpoint with a `state_dict`"):
            found = {name: tensor.shape for name, tensor in HPSReward.read_weights(path).items()}
        model = HPSReward.empty_model(HPS_ARCHITECTURE)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        if different:
            raise ValueError(
                f"`--reward_model_path {path}` is not of the architecture {HPS_ARCHITECTURE}: {len(different)} "
                f"tensors differ, such as `{min(different)}`."
            )
        return
    if args.reward_model == "PickScore":
        args.reward_processor_path = args.reward_processor_path or PICKSCORE_PROCESSOR
        args.reward_model_path = args.reward_model_path or PICKSCORE_REPOSITORY
    path = args.reward_model_path
    if path is None:
        raise ValueError("`--reward_model CLIP` needs `--reward_model_path`, the folder or Hub id of a CLIPModel.")
    args.reward_processor_path = args.reward_processor_path or path
    with blame(f"`--reward_model_path {path}` is not the folder or Hub id of a CLIPModel"):
        kind = AutoConfig.from_pretrained(path).model_type
    if kind != "clip":
        raise ValueError(f"`--reward_model_path {path}` is of type `{kind}`; {args.reward_model} needs type `clip`.")
    with blame(f"`--reward_processor_path {args.reward_processor_path}` is not the folder or Hub id of a processor"):
        CLIPProcessor.from_pretrained(args.reward_processor_path)


def check_output_dir(args):
    """Refuses to write into the output of another run, and a checkpoint to resume from that is not there."""
    folder = args.resume_from_checkpoint
    named = folder not in (None, "latest")
    if named and (Path(folder).suffix == ".unfinished" or not Path(folder, "trainer_state.json").is_file()):
        found = ", ".join(map(str, list_checkpoints(args.output_dir))) or "none"
        advice = f"`output_dir` has {found}."
        raise ValueError(f"`--resume_from_checkpoint {folder}` is not a complete checkpoint; {advice}")
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"`--output_dir {output}` is a file.")
    if output.is_dir() and any(output.iterdir()) and not (folder or args.overwrite_output_dir):
        raise ValueError(
            f"`--output_dir {output}` is not empty. Choose another, continue its run with `--resume_from_checkpoint "
            "latest`, or delete it with `--overwrite_output_dir`."
        )


def check_deepspeed(args, config, num_processes):
    """Refuses a DeepSpeed file that contradicts the flags, and flags that DeepSpeed cannot follow."""
    if args.optimizer == "adamw_8bit":
        cause = "joins all weights into one vector, of a size that torchao leaves in float32"
        raise ValueError(f"`--optimizer adamw_8bit` needs a configuration without DeepSpeed, which {cause}.")
    if args.base_weights == "fp8":
        raise ValueError(
            "`--base_weights fp8` needs a configuration without DeepSpeed, which casts all weights alike."
        )
    if args.compile and config["zero_optimization"]["stage"] == 3:
        raise ValueError("`--compile` needs whole weights; under ZeRO-3 they come and go while a block runs.")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(f"The DeepSpeed file has a `{section}`. Remove it: the script has flags for that.")
    rollout = args.train_batch_size * num_processes
    for name, value, flag in (
        ("train_micro_batch_size_per_gpu", args.train_batch_size, "train_batch_size"),
        ("gradient_accumulation_steps", args.gradient_accumulation_steps, "gradient_accumulation_steps"),
        ("train_batch_size", rollout * args.gradient_accumulation_steps, "train_batch_size"),
        ("gradient_clipping", args.max_grad_norm, "max_grad_norm"),
    ):
        if config.get(name, "auto") not in ("auto", value):
            raise ValueError(
                f"The DeepSpeed file says `{name}` {config[name]}, but `--{flag}` and {num_processes} processes make "
                f'it {value}. Write "auto" into the file, or change the flag.'
            )


@contextmanager
def one_line_errors():
    """Ends the run with the message of a `ValueError`, without a traceback."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


# ---- The run. -------------------------------------------------------------------------------------------------------
def make_accelerator(args):
    """The [`Accelerator`] of the run, with DeepSpeed's settings filled in from the script's flags."""
    on_cpu = not torch.accelerator.is_available()
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    # The others wait while one process downloads or writes a model. On CPUs DeepSpeed must not look for NCCL.
    process_group = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    if on_cpu and uses_deepspeed:
        process_group.backend = "gloo"
    logging_dir = str(Path(args.output_dir, args.logging_dir))
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    with blame(f"`accelerate launch` and its configuration files (DeepSpeed: `{file}`) cannot be used together"):
        accelerator = Accelerator(
            cpu=on_cpu and not uses_deepspeed,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, logging_dir=logging_dir),
            step_scheduler_with_optimizer=False,  # the learning rate follows updates, not updates times processes
            kwargs_handlers=[process_group],
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError("`mixed_precision: fp16` is too narrow for Wan's transformer. Use bf16.")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        check_deepspeed(args, config, accelerator.num_processes)
        # "auto" in the JSON would become 1.0, whatever `--max_grad_norm` says, and DeepSpeed does the clipping.
        config["gradient_clipping"] = args.max_grad_norm
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        # Under ZeRO-3 transformers would partition the reward model as it loads it; frozen models stay whole.
        transformers.integrations.unset_hf_deepspeed_config()
    return accelerator


def prepare_output_dir(accelerator, args):
    """Clears what an earlier run left if `--overwrite_output_dir`, and starts logging, details to `train.log` only."""
    logging.basicConfig(format=LOG_FORMAT, datefmt="%m/%d/%Y %H:%M:%S")
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.INFO)
    logger.setLevel(logging.DEBUG)
    output = Path(args.output_dir)
    if accelerator.is_main_process:
        if args.overwrite_output_dir and not args.resume_from_checkpoint:
            events = Path(args.logging_dir, TRACKER_NAME)
            for folder in [args.transformer_subfolder, "images", events, *output.glob("checkpoint-*")]:
                shutil.rmtree(output / folder, ignore_errors=True)
            for name in ("README.md", "train.log", "reward.png", "before_after.png", LORA_WEIGHT_NAME_SAFE):
                (output / name).unlink(missing_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(output / "train.log")
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logging.getLogger().addHandler(handler)
    accelerator.wait_for_everyone()


def make_validation_set(accelerator, args, dataset, dtype):
    """
    The [`ValidationSet`] of `--validation_prompts`, or `None` without any. Prompts that are not in the dataset are
    encoded by the main process with the model's text encoder, which is freed again.
    """
    rows = dataset["train"]
    row_of = {caption: index for index, caption in enumerate(rows["caption"])}
    captions = list(row_of)[:4] if args.validation_prompts is None else args.validation_prompts
    if not captions:
        return None
    missing = [caption for caption in captions if caption not in row_of]
    encoded = [None]
    if missing and accelerator.is_main_process:
        logger.info(f"Encoding {len(missing)} validation prompts that are not in the dataset.")
        options = {"variant": args.variant, "dtype": torch.bfloat16, "vae": None, "transformer": None}
        pipeline = WanPipeline.from_pretrained(**model_source(args), **options, transformer_2=None)
        encode_prompt = pipeline.to(accelerator.device).encode_prompt
        with torch.no_grad():
            encoded[0] = encode_prompt(missing, None, False, max_sequence_length=args.max_sequence_length)[0].cpu()
        del pipeline
    broadcast_object_list(encoded)
    embeds = dict(zip(missing, encoded[0].to(dtype), strict=True)) if missing else {}
    for caption in set(captions) - set(missing):
        embeds[caption] = collate_fn([rows[row_of[caption]]], args.max_sequence_length, dtype)["prompt_embeds"][0]
    negative = collate_fn([dataset["negative"][0]], args.max_sequence_length, dtype)["prompt_embeds"]
    return ValidationSet(captions, torch.stack([embeds[caption] for caption in captions]), negative)


def main(args):
    repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
    # Refuse what cannot succeed before any model is loaded.
    with one_line_errors():
        check_output_dir(args)
        model = read_model_info(args)
        check_sizes(args, model)
        check_window(args, model)
        dataset = check_dataset(args, model)
        check_reward(args)
        accelerator = make_accelerator(args)
        run = describe_run(accelerator, args)
        checkpoint, state = find_checkpoint(args, run)
        if args.push_to_hub and accelerator.is_main_process:
            options = {"private": args.hub_private_repo, "token": args.hub_token, "exist_ok": True}
            with blame(f"`--push_to_hub` cannot create `{repo_id}`; see `--hub_model_id` and `--hub_token`"):
                repo_id = with_retries(lambda: huggingface_hub.create_repo(repo_id, **options)).repo_id
        prepare_output_dir(accelerator, args)
    first_step, history = state["global_step"], state["history"]
    if args.resume_from_checkpoint and checkpoint is None:
        logger.warning(f"`{args.output_dir}` holds no checkpoint yet: training starts at step 0.")
    logger.info(accelerator.state, main_process_only=False)
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    transformers.set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    # Precision: AdamW under autocast needs the weights themselves in float32. DeepSpeed keeps float32 master weights
    # of its own, adamw_8bit rounds stochastically, and the base of a LoRA is not trained.
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    weight_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    full_precision = not deepspeed and args.optimizer == "adamw" and args.lora_rank is None
    transformer_dtype = torch.float32 if full_precision else weight_dtype
    reward_dtype = {None: weight_dtype, "fp32": torch.float32, "bf16": torch.bfloat16}[args.reward_dtype]

    # Load models. Captions were encoded before, so the text encoder stays on disk.
    validation = make_validation_set(accelerator, args, dataset, transformer_dtype)
    source = model_source(args)
    weights = {**source, "variant": args.variant}
    vae = AutoencoderKLWan.from_pretrained(**weights, subfolder="vae", dtype=weight_dtype)
    flatten_vae(vae).requires_grad_(False).eval().to(accelerator.device)
    reward_model = load_reward_model(args, accelerator.device, reward_dtype)
    expert = {"subfolder": args.transformer_subfolder, "dtype": transformer_dtype}
    transformer = WanTransformer3DModel.from_pretrained(**weights, **expert).requires_grad_(True)
    if args.lora_rank is not None:
        torch.manual_seed(args.seed)  # all processes make the same LoRA
        add_lora(transformer, args)
        cast_training_params(transformer, torch.float32)
    if args.base_weights == "fp8":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer_dtype)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile_repeated_blocks()
    transformer.eval()  # a new LoRA, too: its dropout belongs to the graded step
    if deepspeed:
        partition_weights(accelerator, transformer, transformer_dtype)
    scheduler = make_scheduler(args.rollout_scheduler, args.rollout_shift or model.flow_shift)

    optimizer = make_optimizer(args, transformer.parameters())
    rotary_tables = [table.clone() for table in transformer.rope.buffers()]
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    # With offload, DeepSpeed's AdamW for the CPU replaces the optimizer; the schedule must set the rate of that one.
    adam = optimizer.optimizer.optimizer if deepspeed else optimizer.optimizer
    forget_powers(adam)
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    lr_scheduler = get_scheduler(args.lr_scheduler, adam, **steps)
    accelerator.register_for_checkpointing(lr_scheduler)
    if args.lora_rank is not None:
        accelerator.register_save_state_pre_hook(leave_out_frozen)
    # DeepSpeed casts a whole module to bfloat16, and three digits of a cosine are too few for a position.
    for buffer, table in zip(accelerator.unwrap_model(transformer).rope.buffers(), rotary_tables, strict=True):
        buffer.data = table.to(accelerator.device)

    # One expert paints validation images alone, from noise to image, so the pipeline needs no boundary.
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "expand_timesteps": model.expand_timesteps}
    parts["scheduler"] = UniPCMultistepScheduler.from_pretrained(**source, subfolder="scheduler")
    pipeline = WanPipeline(**parts, transformer=accelerator.unwrap_model(transformer))
    pipeline.set_progress_bar_config(disable=True)
    validate = partial(log_validation, accelerator, pipeline, reward_model, validation, args)

    config = {name: str(value) for name, value in vars(args).items() if name != "hub_token"}
    accelerator.init_trackers(TRACKER_NAME, config=config)
    save = partial(save_checkpoint, accelerator, args, transformer, weight_dtype, run)
    publish = partial(save_results, accelerator, args, transformer, weight_dtype, repo_id, model=model)

    def validate_if_due(step):
        due = step % args.validation_steps == 0 or step == args.max_train_steps
        done = any(row["step"] == step and "validation_reward" in row for row in history)
        if validation is not None and due and not done:
            history.append({"step": step, **validate(step)})

    if checkpoint is not None:
        if validation is not None and not Path(args.output_dir, "images/step-0/scores.json").is_file():
            validate(0)  # the base model, to compare with
        lenient = {} if args.lora_rank is None else {"load_module_strict" if deepspeed else "strict": False}
        accelerator.load_state(str(checkpoint), **lenient)  # the frozen weights under a LoRA are there already
        logger.info(f"Resumed from {checkpoint} at step {first_step}")
    validate_if_due(first_step)

    accumulation, reuse = args.gradient_accumulation_steps, args.updates_per_rollout
    rollouts = range(first_step // reuse * accumulation, -(-args.max_train_steps // reuse) * accumulation)
    share = args.train_batch_size, accelerator.process_index, accelerator.num_processes
    sampler = SampleSampler(len(dataset["train"]), args.seed, rollouts, *share)
    boundary = model.boundary_ratio if args.rollout_start == "boundary" else None
    columns = ["caption", "prompt_embeds", *(BOUNDARY_COLUMNS if boundary is not None else ())]
    dataloader = torch.utils.data.DataLoader(
        dataset["train"].select_columns(columns).with_format("numpy"),
        batch_sampler=sampler,
        collate_fn=partial(collate_fn, max_sequence_length=args.max_sequence_length, dtype=transformer_dtype),
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=partial(handle_stop_signals, signal.SIG_IGN),
    )
    batches = iter(dataloader)
    negative = collate_fn([dataset["negative"][0]], args.max_sequence_length, transformer_dtype)["prompt_embeds"]
    negative = negative.to(accelerator.device)

    train_sigmas = make_train_sigmas(args.num_inference_steps, args.shift, args.train_timestep, args.timestep_length)
    latent_shape = (model.in_channels, 1, args.height // model.vae_scale_factor, args.width // model.vae_scale_factor)
    tokens = latent_shape[2] // model.patch_size[1] * (latent_shape[3] // model.patch_size[2])
    velocity_fn = partial(predict_velocity, transformer, tokens_per_sample=tokens if model.expand_timesteps else None)

    def roll_out(start, embeds):
        solver = {"num_steps": args.sampling_steps, "guidance_scale": args.rollout_guidance_scale}
        return rollout(velocity_fn, scheduler, start, embeds, negative.expand_as(embeds), **solver, boundary=boundary)

    size = args.rollout_batch_size or args.train_batch_size
    samples_per_step = args.train_batch_size * accelerator.num_processes * accumulation
    logger.info("***** Running training *****")
    logger.info(f"  Num captions = {len(dataset['train'])}")
    logger.info(f"  Total train batch size (w. parallel, distributed & accumulation) = {samples_per_step}")
    logger.info(f"  Total optimization steps = {args.max_train_steps}")
    logger.info(f"  Trained noise levels = {train_sigmas[0]:.3f} to {train_sigmas[-1]:.3f}")
    bar = {"desc": "Steps", "disable": not accelerator.is_local_main_process}  # one on each machine
    progress_bar = tqdm(total=args.max_train_steps, initial=first_step, **bar)
    # A signal is remembered, so that the update at hand is finished and saved before the run ends.
    signals, stopped_by = [0], 0
    handle_stop_signals(lambda number, _frame: signals.append(number))

    for step in range(first_step, args.max_train_steps):
        started = time.perf_counter()
        # 1. What the whole step shares: the position in the training grid and the control words.
        last_position, generator = args.timestep_length - POSITION_MARGIN, make_generator(args.seed, POSITION, step)
        position = torch.randint(POSITION_MARGIN, last_position + 1, (), generator=generator).item()
        branches = make_branches(args, train_sigmas, position)
        words = [words[step % len(words)] for words in (args.positive_words, args.negative_words)]
        curve = args.loss_weight_shift
        weight = 1.0 if curve is None else shift_sigmas(position / args.timestep_length, curve)
        torch.manual_seed(make_generator(args.seed, GLOBAL, step, accelerator.process_index).initial_seed())

        # 2. Captions and what their images start from, then clean latents, rolled out without gradient. Updates may
        # share them: SRPO wants known images, which need not be of the newest weights.
        group, update = divmod(step, reuse)
        if update == 0:
            numbers = range(group * accumulation, (group + 1) * accumulation)
            shares = [(next(batches), sampler.samples(number)) for number in numbers]
            starts = [make_starts(args, group, samples, latent_shape, batch) for batch, samples in shares]
            embeds = [batch["prompt_embeds"].to(accelerator.device, non_blocking=True) for batch, _ in shares]
            embeds, latents, noise = (torch.cat(tensors) for tensors in (embeds, *zip(*starts, strict=True)))
            latents, noise = (tensor.to(accelerator.device, non_blocking=True) for tensor in (latents, noise))
            x0 = torch.cat([roll_out(*part) for part in zip(latents.split(size), embeds.split(size), strict=True)])
        elif args.renew_noise:
            noise = [make_noise(args, group, samples, latent_shape, update) for _, samples in shares]
            noise = torch.cat(noise).to(accelerator.device, non_blocking=True)

        step_metrics = []
        parts = (tensor.split(args.train_batch_size) for tensor in (x0, noise, embeds))
        for (batch, _), *part in zip(shares, *parts, strict=True):
            with accelerator.accumulate(transformer):
                # 3. Inject noise, step, recover, decode, score.
                transformer.train()
                loss, metrics = graded_pass(
                    velocity_fn, vae, reward_model, *part, batch["captions"], words, branches, args, weight
                )
                # 4. Back-propagate and update.
                accelerator.backward(loss)
                transformer.eval()
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(transformer.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                step_metrics.append(torch.stack(list(metrics.values())))

        # 5. Log. Here alone the update waits for the GPU, but for what UniPC and DeepSpeed do themselves.
        received = torch.tensor([float(signals[-1])], device=accelerator.device)
        gathered = accelerator.gather(torch.cat([torch.stack(step_metrics).mean(0), received])[None])
        *means, received = torch.cat([gathered.mean(0)[:-1], gathered.max(0).values[-1:]]).tolist()
        means = {**dict(zip(metrics, means, strict=True)), "grad_norm": float(grad_norm)}
        stopped_by = int(received) if (step + 1) % reuse == 0 else 0  # a rollout is not saved, so it is used up first
        if not np.isfinite(list(means.values())).all():
            raise SystemExit(f"error: not finite at step {step + 1}: {means}")
        seconds = time.perf_counter() - started
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if accelerator.device.type == "cuda" else host
        logs = {**means, "lr": float(lr_scheduler.get_last_lr()[0]), "sigma": branches[0].sigma_to}
        logs |= {"seconds": seconds, "images_per_second": samples_per_step / seconds, "peak_memory_gb": peak / 1e9}
        lr_scheduler.step()
        history.append({"step": (done := step + 1), **logs})
        accelerator.log(logs, step=done)
        progress_bar.update(1)
        progress_bar.set_postfix(loss=f"{logs['loss']:.4f}", reward=f"{logs['reward_positive']:.4f}")
        logger.debug(f"step {done}: " + ", ".join(f"{name} {value:.5g}" for name, value in logs.items()))

        # 6. Images and checkpoints.
        if not stopped_by:
            validate_if_due(done)
        if done % args.checkpointing_steps == 0 or stopped_by:
            save(done, history)
        if stopped_by:
            break
        if args.hub_strategy == "checkpoint" and done % args.checkpointing_steps == 0 and done < args.max_train_steps:
            publish(history)

    progress_bar.close()
    if not stopped_by:
        publish(history)
    accelerator.end_training()
    if stopped_by:
        how = "Continue with the same command and `--resume_from_checkpoint latest`."
        logger.warning(f"Stopped by {signal.Signals(stopped_by).name} after {done} updates, which are saved. {how}")
        raise SystemExit(128 + stopped_by)


if __name__ == "__main__":
    main(parse_args())
