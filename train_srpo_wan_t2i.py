#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
r"""
Fine-tune the low-noise expert (`transformer_2`) of Wan2.2-T2V-A14B for text-to-image with SRPO, Semantic Relative
Preference Optimization (https://arxiv.org/abs/2509.06942). Captions come from `embed_prompts.py`.

    accelerate launch --config_file accelerate_configs/a100x8.yaml train_srpo_wan_t2i.py \
        --pretrained_model_name_or_path Wan-AI/Wan2.2-T2V-A14B-Diffusers --dataset_name prompt_embeds \
        --reward_model HPS --reward_model_path HPS_v2.1_compressed.pt --output_dir outputs/srpo

This file follows an update: plan it (`plan_update`), paint images without gradient (`make_rollouts`), put known noise
back in and take a graded step (`direct_align_step`), decode (`decode_latents`), score relative to a positive and a
negative control word (`srp_score`), and back-propagate (`graded_pass`, `update`).

Departures from the published code for FLUX (https://github.com/Tencent-Hunyuan/SRPO): both branches are one batch;
`--gradient_accumulation_steps` counts rollouts, not branches; rollouts use classifier-free guidance, as Wan has none
embedded, and 10 steps of UniPC; the default window suits the low-noise expert; random draws depend on seed, sample and
update alone, so runs resume exactly; for images the VAE is an equal 2-D network; HPS sees images that are not square
padded, not cropped; `--drift_weight` holds the expert near the untrained one. Published flags: docs/recipes.md.
"""

import argparse
import copy
import fcntl
import hashlib
import importlib.util
import json
import logging
import math
import os
import pkgutil
import re
import resource
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import ProjectConfiguration, gather_object, patch_environment, set_seed, tqdm
from jinja2 import Template
from PIL import Image
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from tqdm.contrib import DummyTqdmFile


class LazyModule:
    """A module that is imported when it is first used, so that `--help` and wrong flags are answered at once."""

    def __init__(self, name):
        self.__name__ = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self.__name__), attribute)


datasets, deepspeed, diffusers = LazyModule("datasets"), LazyModule("deepspeed"), LazyModule("diffusers")
open_clip, peft, transformers = LazyModule("open_clip"), LazyModule("peft"), LazyModule("transformers")
wan_vae, torchao_optim = LazyModule("diffusers.models.autoencoders.autoencoder_kl_wan"), LazyModule("torchao.optim")
TF, matplotlib_figure = LazyModule("torchvision.transforms.v2.functional"), LazyModule("matplotlib.figure")

logger = get_logger(__name__)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import makes it warn
TRACKER_NAME, LOG_FORMAT = "srpo-wan-t2i", "%(asctime)s - %(levelname)s - %(name)s - %(message)s"
# Of fastvideo/SRPO.py: the control words, and how close to an end of the training grid positions are not drawn.
POSITIVE_WORDS = ("Natural-lighting", "Detail", "Detailed", "Real")
NEGATIVE_WORDS = ("Concept art", "Painting", "Anime", "Flat", "Oil")
POSITION_MARGIN = 5
# Where a reward model comes from when `--reward_model_path` is not given.
HPS_REPOSITORY, HPS_FILE, HPS_ARCHITECTURE = "xswu/HPSv2", "HPS_v2.1_compressed.pt", "ViT-H-14"
PICKSCORE_REPOSITORY, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# The linear layers that diffusers' own scripts for Wan adapt, all of the attention, and its name for the file.
LORA_TARGET_MODULES, LORA_FILE = ("to_q", "to_k", "to_v", "to_out.0"), "pytorch_lora_weights.safetensors"
# In the folder of a run: its mark and lock; the state and the checksums of a checkpoint; what else a run writes.
MARKER, STATE_FILE, CHECKSUMS, SKIPPED_FILE = "run.json", "trainer_state.json", "SHA256SUMS", "skipped.jsonl"
RUN_FILES = f"""README.md reward.png before_after.png train.log {SKIPPED_FILE} {LORA_FILE} images/step-*/*.png
    images/step-*/scores.json */{TRACKER_NAME}/**/events.out.tfevents.* */{TRACKER_NAME}/**/hparams.yml
    transformer*/config.json transformer*/diffusion_pytorch_model*.safetensors*""".split()
EXPERTS = ("transformer", "transformer_2")
# Flags of paths; all flags that do not change what a run computes; and what a checkpoint cannot be loaded without.
PATH_FLAGS = ("pretrained_model_name_or_path", "dataset_name", "reward_model_path", "reward_processor_path")
FREE_FLAGS = """revision variant cache_dir dataloader_num_workers max_train_steps max_skipped_updates validation_steps
    gradient_checkpointing output_dir overwrite_output_dir checkpointing_steps checkpoints_total_limit allow_changes
    resume_from_checkpoint logging_dir report_to push_to_hub hub_model_id hub_private_repo hub_strategy""".split()
PINNED = """engine mixed_precision num_processes base_model transformer_subfolder optimizer updates_per_rollout
    lora_rank lora_alpha lora_target_modules""".split()
DEEPSPEED_CLASSES = """deepspeed.runtime.fp16.loss_scaler:LossScaler deepspeed.runtime.zero.config:ZeroStageEnum
    deepspeed.utils.tensor_fragment:fragment_address""".split()
MODEL_CARD = Template(Path(__file__).with_name("model_card_template.md").read_text())
# First words of the names of files of weights, and the layers by whose weights a model is identified.
DIFFUSERS_STEM, TRANSFORMERS_STEM, REWARD_LAYER = "diffusion_pytorch_model", "model", "text_projection"
TRANSFORMER_LAYER, TEXT_ENCODER_LAYER = "blocks.0.attn1.to_q.weight", "encoder.final_layer_norm.weight"
# What `embed_prompts.py --boundary_latents` adds to the dataset, and the flags that it shares with training.
BOUNDARY_COLUMNS = ("boundary_latents", "boundary_seeds")
BOUNDARY_FLAGS = ("height", "width", "sampling_steps", "rollout_scheduler", "rollout_shift")
# Independent streams of random numbers. The last seeds what libraries draw: dropout, the rounding of adamw_8bit.
SHUFFLE, NOISE, POSITION, VALIDATION, GLOBAL = range(5)


# ---- 2. SRPO: noise levels, the graded step, the relative score, the plan of an update. Pure functions. -------------
def shift_sigmas(sigmas, shift):
    """Bends noise levels in [0, 1], a float or a tensor, towards 1 as the schedules of SD3, FLUX and Wan do:
    `shift * sigma / (1 + (shift - 1) * sigma)`, eq. 23 of Esser et al. 2024 (https://arxiv.org/abs/2403.03206)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_train_sigmas(num_inference_steps, shift, train_timestep, timestep_length):
    """The `timestep_length` noise levels that training draws from, (L,) float32, descending: between the two steps of
    `train_timestep`, 0 <= first < last <= steps, of a sampling schedule. Source: `sigmas_l` in fastvideo/SRPO.py."""
    schedule = shift_sigmas(torch.linspace(1, 0, num_inference_steps + 1), shift)
    first, last = train_timestep
    return torch.linspace(schedule[first], schedule[last], timestep_length)


def branch_sigmas(train_sigmas, position, groundtruth_ratio):
    """The noise levels between which each branch takes its step. Both recover the image from (nearly) the same level:
    the denoise branch comes from above, the inversion branch from below. `train_sigmas` are those (L,) of
    [`make_train_sigmas`]; 1 <= `position` < L counts from the end of low noise, else `ValueError`; and of the window,
    the share `groundtruth_ratio` is injected noise, and the step spans the rest. Returns three pairs: (sigma_from,
    sigma_to) of denoise, those of inversion, and where both read their discounts. Source: fastvideo/SRPO.py."""
    length = len(train_sigmas)
    if not 1 <= position < length:
        raise ValueError(f"`position` must be between 1 and {length - 1}, but is {position}.")
    span = min(int((1 - groundtruth_ratio) * length) + 1, length - position, position)
    below = max(position - span, 1)
    denoise = train_sigmas[length - min(position + span, length)], train_sigmas[length - position]
    inversion = train_sigmas[length - below], train_sigmas[length - min(below + span, length)]
    return denoise, inversion, (position, below)


def direct_align_step(predict_velocity, x0, noise, sigma_from, sigma_to):
    """Direct-Align: injects known noise, takes one Euler step, and recovers the clean latents in closed form.
    `predict_velocity` takes latents and `sigma_from`, as given; `x0` and standard normal `noise` are (B, C, T, H, W),
    and no gradient flows through them; noise levels, floats or of shape () or (B,), are in [0, 1] and sigma_to < 1.
    Returns x0_hat, of the shape of `x0`, and `x0` itself if the velocity is `noise - x0`. Its slope in the velocity,
    (sigma_to - sigma_from) / (1 - sigma_to), is negative when denoising, positive when inverting (the SRPO paper)."""
    levels = (torch.as_tensor(sigma, dtype=x0.dtype, device=x0.device) for sigma in (sigma_from, sigma_to))
    start, end = (level.reshape(-1, *[1] * (x0.ndim - 1)) for level in levels)
    x = (start * noise + (1 - start) * x0).detach()
    x = x + (end - start) * predict_velocity(x, sigma_from)
    return (x - end * noise) / (1 - end)


def srp_score(image_features, positive_features, negative_features, discount):
    """Semantic relative preference: how much closer an image is to one caption than to another. Features have unit
    norm and shape (B, D); `discount`, a float or of shape () or (B,), is the extra weight of the positive caption.
    Returns <f, (1 + discount) * positive - negative> of shape (B,), `SRP_cfg` in fastvideo/SRPO.py."""
    positive = (image_features * positive_features).sum(-1)
    negative = (image_features * negative_features).sum(-1)
    return (1 + discount) * positive - negative


def srpo_loss(score, margin, weight=1.0):
    """Hinge loss: the mean of weight * relu(margin - score), () for scores (B,) of [`srp_score`]. Images whose score
    reaches the margin, 0.7 in the published FLUX run, are left alone. Without a margin (`None`) the loss is linear,
    the mean of weight * -score, as in the Qwen-Image run. `weight` is a float or of shape (B,)."""
    return (weight * (-score if margin is None else F.relu(margin - score))).mean()


def make_generator(*key):
    """A CPU `torch.Generator` whose state is a function of the non-negative integers of `key` alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


# The method's settings, each what the flag of its name says.
SETTINGS = """seed noise num_inference_steps shift train_timestep timestep_length groundtruth_ratio loss drift_weight
    branches discount_pos discount_inv positive_words negative_words reward_margin loss_weight_shift max_grad_norm"""
Recipe = namedtuple("Recipe", SETTINGS)


def make_recipe(flags):
    """The [`Recipe`] of a dict of all flags."""
    return Recipe(**{name: flags[name] for name in Recipe._fields})


class Branch(NamedTuple):
    """One way through the graded step, for B samples."""

    name: str  # "denoise" or "inversion"
    sigma_from: torch.Tensor  # (B,)
    sigma_to: torch.Tensor  # (B,)
    discount: torch.Tensor  # (B,): the extra weight of the caption that the branch is drawn to
    swap: torch.Tensor  # (B,): 1 if that is the negative caption, because the gradient has the opposite sign, else 0


class Plan(NamedTuple):
    """What an update decides about B samples."""

    positive_word: str
    negative_word: str
    branches: list[Branch]
    weight: torch.Tensor  # (B,): factors of the loss


def draw_positions(recipe, step, samples):
    """The position in the training grid of each sample in an update: a list of B integers."""
    last = recipe.timestep_length - POSITION_MARGIN
    generators = (make_generator(recipe.seed, POSITION, sample, step) for sample in samples)
    return [torch.randint(POSITION_MARGIN, last + 1, (), generator=generator).item() for generator in generators]


def plan_update(recipe, step, samples):
    """The [`Plan`] of update number `step` for the samples with these numbers in the run: a pure function. Each sample
    has a noise level of its own, as each process has one in the published code. Control words change by step."""
    length, positions = recipe.timestep_length, draw_positions(recipe, step, samples)
    grid = make_train_sigmas(recipe.num_inference_steps, recipe.shift, recipe.train_timestep, recipe.timestep_length)
    levels = [branch_sigmas(grid, position, recipe.groundtruth_ratio) for position in positions]
    branches = []
    for index, (name, ends) in enumerate((("denoise", recipe.discount_pos), ("inversion", recipe.discount_inv))):
        if recipe.branches in ("both", name):
            sigma_from, sigma_to = torch.tensor([each[index] for each in levels]).unbind(1)
            read_at = [each[2][index] for each in levels]
            discount = torch.linspace(*ends, length)[read_at]
            swap = torch.full_like(discount, name == "inversion")
            branches.append(Branch(name, sigma_from, sigma_to, discount, swap))
    curve = recipe.loss_weight_shift
    weight = torch.ones(len(positions)) if curve is None else shift_sigmas(torch.tensor(positions) / length, curve)
    positive, negative = recipe.positive_words, recipe.negative_words
    return Plan(positive[step % len(positive)], negative[step % len(negative)], branches, weight)


# ---- 3. Data: which sample is which caption, and what its image starts from. ----------------------------------------
class Rollout(NamedTuple):
    """One micro-batch: B samples and their clean latents. Height, width and frames are those of `x0`."""

    captions: list[str]
    prompt_embeds: torch.Tensor  # (B, L, D), of the plain captions
    samples: range  # their numbers in the run
    noise: torch.Tensor  # (B, C, T, H, W) float32, the noise to inject
    x0: torch.Tensor  # (B, C, T, H, W) float32


@dataclass
class SampleSampler:
    """Batch sampler of one process. The captions of a run form one endless stream, shuffled anew every epoch, and the
    samples of a micro-batch are consecutive in it. So every process takes the same number of steps, a resumed run goes
    on with the next caption, and an update sees the same captions on one process as on many."""

    dataset_size: int  # number of captions
    seed: int  # decides the shuffles
    numbers: range  # of the micro-batches to yield, counted from the beginning of the run
    batch_size: int  # captions of a micro-batch
    process_index: int = 0  # which of the micro-batches with the same number to yield
    num_processes: int = 1

    def samples(self, number):
        """The numbers, in the stream, of the samples of one micro-batch of this process: a `range`."""
        first = (number * self.num_processes + self.process_index) * self.batch_size
        return range(first, first + self.batch_size)

    def __iter__(self):
        @lru_cache(maxsize=1)
        def order(epoch):
            return torch.randperm(self.dataset_size, generator=make_generator(self.seed, SHUFFLE, epoch)).tolist()

        for number in self.numbers:
            places = (divmod(sample, self.dataset_size) for sample in self.samples(number))
            yield [order(epoch)[place] for epoch, place in places]


def noise_generators(recipe, group, samples, *reuse):
    """A generator for each sample's start. One noise for a group lowers the variance, says the SRPO paper."""
    keys = [group] * len(samples) if recipe.noise == "shared" else samples
    return [make_generator(recipe.seed, NOISE, key, *reuse) for key in keys]


def draw_noise(recipe, shape, group, samples, *reuse):
    """The noise, (B, *shape) float32, of the samples with these numbers. `group` counts the rollouts of the run, and
    `reuse` the updates on the same rollout. It is drawn on the CPU, so it is the same for any device."""
    generators = noise_generators(recipe, group, samples, *reuse)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def draw_starts(recipe, shape, group, samples, batch):
    """What the images of B samples start from: latents and the noise in them, each (B, *shape) float32. Both are
    noise, or, if the `batch` of [`collate_fn`] has boundary latents, one of those and the noise of its seed."""
    if "boundary_latents" not in batch:
        return (draw_noise(recipe, shape, group, samples),) * 2
    latents, noise, generators = [], [], noise_generators(recipe, group, samples)
    for stored, seeds, generator in zip(batch["boundary_latents"], batch["boundary_seeds"], generators, strict=True):
        pick = torch.randint(len(seeds), (), generator=generator).item()
        latents.append(torch.as_tensor(stored[pick]))
        noise.append(torch.randn(shape, generator=torch.Generator().manual_seed(int(seeds[pick]))))
    return torch.stack(latents), torch.stack(noise)


def load_prompt_dataset(path, cache_dir=None):
    """The `DatasetDict` that `embed_prompts.py` wrote, from a folder or the Hub."""
    if Path(path).is_dir() and (Path(path) / "dataset_dict.json").is_file():
        return datasets.load_from_disk(path)
    return datasets.load_dataset(path, cache_dir=cache_dir)


def unpack_prompt_embeds(rows, max_sequence_length, dtype):
    """Stored rows, int16 (tokens, D), the bits of bfloat16 -> (B, max_sequence_length, D) of `dtype`, zero-padded."""
    rows = [torch.as_tensor(np.asarray(row, dtype=np.int16)).view(torch.bfloat16).to(dtype) for row in rows]
    return torch.stack([F.pad(row, (0, 0, 0, max_sequence_length - len(row))) for row in rows])


def collate_fn(examples, max_sequence_length, dtype):
    """Rows -> {"captions": list of B, "prompt_embeds": (B, max_sequence_length, D)}, with any `BOUNDARY_COLUMNS`."""
    return {
        "captions": [example["caption"] for example in examples],
        "prompt_embeds": unpack_prompt_embeds([e["prompt_embeds"] for e in examples], max_sequence_length, dtype),
        **{name: [e[name] for e in examples] for name in BOUNDARY_COLUMNS if name in examples[0]},
    }


# ---- 4. The transformer: velocity and solver. -----------------------------------------------------------------------
def transformer_velocity(transformer, latents, sigma, prompt_embeds, token_patch=None):
    """One forward pass of a `WanTransformer3DModel`, bare or prepared by Accelerate: noisy latents (B, C, T, H, W) of
    noise level `sigma` in [0, 1], a float or of shape () or (B,), and text embeddings (B, L, D) in the type that the
    transformer takes -> `noise - x0` as it sees it, float32, of the shape of the latents. Models with
    `expand_timesteps` take a timestep for each token, so they need `token_patch`, the (T, H, W) of a token."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32).to(latents.device, non_blocking=True)
    timestep = 1000 * sigma.expand(len(latents))
    if token_patch is not None:
        tokens = math.prod(size // patch for size, patch in zip(latents.shape[2:], token_patch, strict=True))
        timestep = timestep[:, None].expand(-1, tokens)
    latents = latents.to(prompt_embeds.dtype)
    return transformer(latents, timestep, encoder_hidden_states=prompt_embeds, return_dict=False)[0].float()


def make_scheduler(name, shift):
    """Diffusers' scheduler `euler`, or `unipc`, which is nearer to the exact solution; `shift` is `flow_shift`."""
    if name == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def progress(iterable, what):
    """Iterates with a bar below that of the run, on one process of each machine, if a person looks at it."""
    return tqdm(iterable, desc=what, leave=False, disable=not sys.stderr.isatty())


class Solver(NamedTuple):
    """How clean latents are painted."""

    scheduler: object  # of diffusers, see [`make_scheduler`]
    num_steps: int
    guidance_scale: float  # 1.0 leaves the negative prompt out and halves the work
    boundary: float | None = None  # the noise level from which on stored latents start


@torch.no_grad()
def paint_latents(models, latents, prompt_embeds):
    """Paints clean latents from noise (B, C, T, H, W) with the solver of [`Models`]: what `WanPipeline(...,
    output_type="latent")` gives with the same scheduler of diffusers, but with both halves of classifier-free guidance
    in one batch. `prompt_embeds` are (B, L, D). If the solver has a boundary, the latents are not noise, but those at
    the first noise level of the schedule below it. Returns x0, float32, of the shape of the latents."""
    scheduler, num_steps, guidance_scale, boundary = models.solver
    guided = guidance_scale > 1.0
    if guided:
        prompt_embeds = torch.cat([prompt_embeds, models.negative_prompt_embeds.expand_as(prompt_embeds)])
    scheduler.set_timesteps(num_steps)  # on the CPU, where reading a noise level waits for no GPU
    first = 0 if boundary is None else int((scheduler.timesteps >= 1000 * boundary).sum())
    scheduler.set_begin_index(first)
    for timestep in progress(scheduler.timesteps[first:], "Painting"):
        inputs = torch.cat([latents, latents]) if guided else latents
        velocity = models.velocity(inputs, timestep / 1000, prompt_embeds)
        if guided:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


# ---- 5. The VAE: latents to pixels, with a gradient. ----------------------------------------------------------------
class ImageConv(torch.nn.Conv2d):
    """A `WanCausalConv3d` of diffusers for clips of one frame. It takes and gives (B, C, 1, H, W)."""

    def __init__(self, conv):
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size[1:], conv.stride[1:], conv._padding[2::-2]
        super().__init__(*sizes, bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype)
        self.load_state_dict({**conv.state_dict(), "weight": conv.weight[:, :, -1]})

    def forward(self, x, _cache=None):
        return super().forward(x.squeeze(2)).unsqueeze(2)


def flatten_vae(vae):
    """Turns an `AutoencoderKLWan` into one for single images, which gives the same: a causal 3-D convolution sees the
    image behind frames of zeros, so of its kernel only the last temporal slice matters, which is a 2-D one."""
    for name, module in list(vae.named_modules()):
        if isinstance(module, wan_vae.WanCausalConv3d):
            vae.set_submodule(name, ImageConv(module).requires_grad_(module.weight.requires_grad))
    return vae


def decode_latents(vae, latents):
    """Latents (B, C, 1, H, W), normalised as the transformer sees them -> pixels (B, 3, s * H, s * W) in [0, 1], and
    the share of values that were clamped, (), which carry no gradient; float32. The same as `vae.decode`, but blocks
    are checkpointed where gradients flow, and there is no cache of frames, which would break the recomputation."""
    statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=latents.dtype)
    mean, std = statistics.to(latents.device, non_blocking=True).view(2, 1, -1, 1, 1, 1)
    decoder = vae.decoder
    x = decoder.conv_in(vae.post_quant_conv((latents * std + mean).to(vae.dtype)))
    for block in (decoder.mid_block, *(partial(up_block, first_chunk=True) for up_block in decoder.up_blocks)):
        x = checkpoint(block, x, use_reentrant=False) if x.requires_grad else block(x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    if vae.config.patch_size is not None:
        x = wan_vae.unpatchify(x, patch_size=vae.config.patch_size)
    pixels = x[:, :, 0].float()
    return pixels.clamp(-1, 1) / 2 + 0.5, (pixels.detach().abs() > 1).float().mean()


# ---- 6. Rewards: human-preference models that see pixels and captions. ----------------------------------------------
@cache
def resize_matrix(size, new_size, device):
    """The (new_size, size) float32 matrix that resizes columns of `size` values with antialiased bicubic weights."""
    unit = torch.eye(size)[None]
    return TF.resize(unit, [new_size, size], TF.InterpolationMode.BICUBIC, antialias=True)[0].to(device)


def preprocess_pixels(pixels, image_size, mean, std, keep_borders):
    """Differentiable preprocessing for CLIP-like encoders: pixels (B, 3, H, W) in [0, 1] -> (B, 3, size, size),
    normalised by the `mean` and `std` of each channel. With `keep_borders` the longer side is fitted and the rest is
    black, as HPSv2's `ResizeMaxSize` does it; otherwise the centre is cropped, as CLIP's processor does it. Two
    products of matrices resize, because torch's own bicubic resizing has no deterministic gradient on GPUs."""
    scale = image_size / (max if keep_borders else min)(pixels.shape[-2:])
    columns, rows = (resize_matrix(size, round(size * scale), pixels.device) for size in pixels.shape[-2:])
    return TF.normalize(TF.center_crop(columns @ pixels @ rows.T, [image_size, image_size]), mean, std)


class RewardModel(torch.nn.Module):
    """A frozen model of which images people prefer for a caption: `reward(pixels, captions)`. This one encodes image
    and text apart, and the reward is `scale` times the inner product of their features of unit norm. Subclasses set
    `model`, `image_size`, `mean`, `std`, `keep_borders`, `scale`, and give raw features."""

    def freeze(self, device, dtype):
        self.dtype, self.text_cache = dtype, {}
        self.requires_grad_(False).eval().to(device=device, dtype=dtype)

    def encode_images(self, pixels):
        """`torch.Tensor` of shape (B, 3, H, W) in [0, 1] -> (B, D) float32 of unit norm, differentiable."""
        pixels = preprocess_pixels(pixels, self.image_size, self.mean, self.std, self.keep_borders)
        return F.normalize(self.image_features(pixels.to(self.dtype)).float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts):
        """List of B strings -> (B, D) float32 of unit norm. Every text is encoded once in a run, and alone: in a batch
        its last bits would depend on the others, which after resuming are others."""
        for text in texts:
            if text not in self.text_cache:
                self.text_cache[text] = F.normalize(self.text_features([text]).float(), dim=-1)[0]
        return torch.stack([self.text_cache[text] for text in texts])

    def rewards(self, pixels, texts):
        """Images (B, 3, H, W) in [0, 1] and N lists of B strings -> (N, B): their rewards for each list."""
        features = self.encode_images(pixels)
        return self.scale * torch.stack([(features * self.encode_texts(each)).sum(-1) for each in texts])

    def forward(self, pixels, captions):
        """Images (B, 3, H, W) in [0, 1] and a list of B strings -> (B,): the reward of each image for its caption."""
        return self.rewards(pixels, [captions])[0]

    def compare(self, pixels, positive, negative, discount, swap):
        """[`srp_score`] of images (B, 3, H, W) in [0, 1] for two lists of B strings, exchanged where `swap` (B,) is
        true: (B,) with a gradient; and the rewards for the positive and for the negative texts, (B,) without."""
        features, texts = self.encode_images(pixels), torch.stack([*map(self.encode_texts, (positive, negative))])
        towards, away = torch.where(swap[:, None], texts.flip(0), texts)
        rewards = self.scale * (features.detach() * texts).sum(-1)
        return self.scale * srp_score(features, towards, away, discount), *rewards


class HPSReward(RewardModel):
    """HPSv2.1 (https://arxiv.org/abs/2306.09341): an open_clip model of the given `architecture` with fine-tuned
    weights, which the file `path` holds under `state_dict`. The reward is the cosine."""

    keep_borders, scale = True, 1.0
    image_features = property(lambda self: self.model.encode_image)

    def __init__(self, path, device="cpu", dtype=torch.float32, architecture=HPS_ARCHITECTURE):
        super().__init__()
        self.model = self.empty_model(architecture)
        self.model.load_state_dict(self.read_weights(path), assign=True)
        self.tokenizer = open_clip.get_tokenizer(architecture)
        self.image_size = self.model.visual.image_size[0]
        self.mean, self.std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.freeze(device, dtype)

    @staticmethod
    def empty_model(architecture=HPS_ARCHITECTURE):
        with torch.device("meta"):
            model = open_clip.CLIP(**open_clip.get_model_config(architecture))
        model.attn_mask = torch.full([model.context_length] * 2, -math.inf).triu(1)  # causal; it is in no checkpoint
        return model

    @staticmethod
    def read_weights(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]

    def text_features(self, texts):
        return self.model.encode_text(self.tokenizer(texts).to(next(self.model.parameters()).device))


class CLIPReward(RewardModel):
    """PickScore (https://arxiv.org/abs/2305.01569) or any other CLIPModel. The reward is the scaled cosine divided by
    20, which is the range of HPS (`CLIP` in fastvideo/SRPO.py). Paths are folders or Hub ids."""

    keep_borders = False

    def __init__(self, path, processor_path, device="cpu", dtype=torch.float32):
        super().__init__()
        self.model = transformers.CLIPModel.from_pretrained(path, dtype=torch.float32)
        processor = transformers.CLIPProcessor.from_pretrained(processor_path)
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


# ---- 7. An update: rollouts, the graded pass, the step of the optimizer. --------------------------------------------
class Models(NamedTuple):
    """What does the work. Only the transformer is trained."""

    transformer: torch.nn.Module
    vae: torch.nn.Module | None = None
    reward: RewardModel | None = None
    solver: Solver | None = None  # of rollouts
    negative_prompt_embeds: torch.Tensor | None = None  # (1, L, D)
    token_patch: tuple[int, int, int] | None = None  # see [`transformer_velocity`]
    base: torch.nn.Module | None = None  # a frozen copy of the transformer; a LoRA needs none

    def velocity(self, latents, sigma, prompt_embeds):
        return transformer_velocity(self.transformer, latents, sigma, prompt_embeds, self.token_patch)

    @torch.no_grad()
    def base_velocity(self, latents, sigma, prompt_embeds):
        """The velocity of the untrained expert: of the frozen copy, or of the same weights with the LoRA off."""
        if self.base is not None:
            return transformer_velocity(self.base, latents, sigma, prompt_embeds, self.token_patch)
        bare = getattr(self.transformer, "module", self.transformer)  # without what Accelerate wraps around it
        bare.disable_adapters()
        velocity = self.velocity(latents, sigma, prompt_embeds)
        bare.enable_adapters()
        return velocity


def make_rollouts(models, batches, recipe, shape, group, batch_size):
    """A [`Rollout`] for each of `batches`, pairs of the numbers of B samples and what [`collate_fn`] made of them,
    with latents of (C, T, H, W) `shape`, painted without gradient, `batch_size` at once. `group` counts the rollouts
    of the run. Several updates may use one: SRPO wants known images, which need not be of the newest weights."""
    rollouts, device = [], models.negative_prompt_embeds.device
    for samples, batch in batches:
        tensors = batch["prompt_embeds"], *draw_starts(recipe, shape, group, samples, batch)
        prompt_embeds, latents, noise = (tensor.to(device, non_blocking=True) for tensor in tensors)
        rollouts.append(Rollout(batch["captions"], prompt_embeds, samples, noise, x0=latents))
    latents = torch.cat([rollout.x0 for rollout in rollouts]).split(batch_size)
    prompt_embeds = torch.cat([rollout.prompt_embeds for rollout in rollouts]).split(batch_size)
    x0 = torch.cat([paint_latents(models, *part) for part in zip(latents, prompt_embeds, strict=True)])
    return [rollout._replace(x0=part) for rollout, part in zip(rollouts, x0.chunk(len(rollouts)), strict=True)]


def graded_pass(models, rollout, plan, recipe):
    """Takes the graded step of all branches of a [`Plan`] from the x0 of a [`Rollout`] as one batch, decodes and
    scores it. Returns the loss, `torch.Tensor` of shape (), and metrics, a dict of detached tensors of shape ()."""
    count, drifts = len(plan.branches), []
    x0, noise, prompt_embeds = (torch.cat([t] * count) for t in (rollout.x0, rollout.noise, rollout.prompt_embeds))
    rows = [torch.stack([b.sigma_from, b.sigma_to, b.discount, b.swap, plan.weight]) for b in plan.branches]
    sigma_from, sigma_to, discount, swap, weight = torch.cat(rows, dim=1).to(x0.device, non_blocking=True)

    def velocity(x, sigma):
        if not recipe.drift_weight:
            return models.velocity(x, sigma, prompt_embeds)
        base, trained = models.base_velocity(x, sigma, prompt_embeds), models.velocity(x, sigma, prompt_embeds)
        drifts.append((trained - base).square().mean())
        return trained

    x0_hat = direct_align_step(velocity, x0, noise, sigma_from, sigma_to)
    pixels, saturated = decode_latents(models.vae, x0_hat)
    positive = [f"{plan.positive_word}. {caption}" for caption in rollout.captions] * count
    negative = [f"{plan.negative_word}. {caption}" for caption in rollout.captions] * count
    score, *rewards = models.reward.compare(pixels, positive, negative, discount, swap.bool())
    loss = srpo_loss(score, recipe.reward_margin if recipe.loss == "hinge" else None, weight)
    loss = loss + recipe.drift_weight * drifts[0] if drifts else loss
    metrics = {"loss": loss.detach(), "score": score.detach().mean(), "saturated": saturated}
    for branch, scores in zip(plan.branches, score.detach().chunk(count), strict=True):
        metrics[f"score_{branch.name}"] = scores.mean()
    metrics |= {"reward_positive": rewards[0].mean(), "reward_negative": rewards[1].mean()}
    metrics["sigma"] = sigma_to.chunk(count)[0].mean()
    return loss, metrics | ({"drift": drifts[0].detach()} if drifts else {})


def update(accelerator, models, optimizer, rollouts, recipe, step):
    """Takes update number `step` on the rollouts of this process. Returns {name: tensor of shape ()}: means of what
    [`graded_pass`] measures, and `grad_norm`, before clipping. If it or a loss is not finite, nothing is updated."""
    transformer, measured = models.transformer, []
    torch.manual_seed(make_generator(recipe.seed, GLOBAL, step, accelerator.process_index).initial_seed())
    transformer.train()  # the dropout of a LoRA belongs to the graded step alone
    for rollout in progress(rollouts, "Graded step"):
        with accelerator.accumulate(transformer):
            plan = plan_update(recipe, step, rollout.samples)
            loss, metrics = graded_pass(models, rollout, plan, recipe)
            # A loss that is not finite makes all gradients NaN, on all processes, which the next lines look at.
            accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(transformer.parameters(), recipe.max_grad_norm)
                grad_norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=loss.device)
                if grad_norm.isfinite():  # otherwise DeepSpeed has left the step out itself
                    optimizer.step()
            optimizer.zero_grad()
            measured.append(metrics)
    transformer.eval()
    means = {name: torch.stack([metrics[name] for metrics in measured]).mean() for name in metrics}
    return means | {"grad_norm": grad_norm}


# ---- 8. Weights: the files they come from; what is trained, all of them or a LoRA beside them. ----------------------
def weight_files(source, subfolder, stem, layer=None):
    """The paths of the safetensors files of a model, downloaded if need be: `{stem}.safetensors` or its shards, or the
    one that holds the tensor `layer`. `source` are the arguments of `from_pretrained` that say where the model is."""
    path, variant = source["pretrained_model_name_or_path"], source.get("variant")
    options = {name: value for name, value in source.items() if name in ("revision", "cache_dir")}
    cached = partial(transformers.utils.cached_file, path, subfolder=subfolder, **options)
    suffix = f".{variant}" if variant else ""
    index = cached(f"{stem}.safetensors.index{suffix}.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        return [cached(f"{stem}{suffix}.safetensors")]
    shards = json.loads(Path(index).read_text())["weight_map"]
    return [cached(shard) for shard in sorted({shards[layer]} if layer else set(shards.values()))]


def weights_fingerprint(source, subfolder, stem, layer):
    """The [`fingerprint`] of one `layer` of a model, wherever it lies; see [`weight_files`]."""
    (file,) = weight_files(source, subfolder, stem, layer)
    with safe_open(file, framework="pt") as weights:
        return fingerprint(weights.get_tensor(layer))


def fingerprint(tensor):
    """The first 16 hex digits of the SHA-256 of the little-endian bytes of a tensor in bfloat16."""
    return hashlib.sha256(tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def read_shapes(files):
    """{name: shape} of the tensors in safetensors files. Only the heads of the files are read."""
    shapes = {}
    for file in files:
        with input_error(f"`{file}` is not a whole safetensors file"), safe_open(file, framework="pt") as head:
            shapes |= {name: tuple(head.get_slice(name).get_shape()) for name in head.keys()}
    return shapes


def check_weights(model, found):
    """Compares {name: shape} `found` in files with a model, e.g. on the meta device; `ValueError` if they differ."""
    names = {}  # names of the same tensor: one of them is enough
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [same[0] for same in names.values() if not found.keys() & set(same)]
    other = [name for name in found if name in expected and found[name] != expected[name]]
    unknown = [name for name in found if name not in expected and "position_ids" not in name]
    for what, tensors in (("lack", missing), ("have other shapes of", other), ("have unknown", unknown)):
        if tensors:
            raise ValueError(f"the weights {what} {len(tensors)} tensors, such as `{min(tensors)}`")


def require_finite(model, flag):
    """Refuses a model that was just loaded if one of its weights is NaN or infinite; `flag` says whence."""
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(f"{flag}: the weights of `{bad[0]}` are NaN or infinite. Download them again.")


def choose_dtypes(mixed_precision, optimizer, lora_rank, deepspeed):
    """The type of frozen and saved weights, and that of the transformer. AdamW under autocast needs float32 weights;
    DeepSpeed has float32 copies, adamw_8bit rounds stochastically, and the base of a LoRA is not trained."""
    weight_dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    full = not deepspeed and optimizer == "adamw" and lora_rank is None
    return weight_dtype, torch.float32 if full else weight_dtype


def lora_metadata(transformer):
    """What diffusers reads beside a LoRA's weights, such as its alpha; `None` without a LoRA."""
    config = getattr(transformer, "peft_config", {}).get("default")
    return config and {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}


def keep_rotary_tables(transformer, device):
    """Keeps the rotary tables out of the buffers, which DeepSpeed casts to bfloat16: too few digits for a position."""
    for name, table in list(transformer.rope.named_buffers()):
        delattr(transformer.rope, name)
        setattr(transformer.rope, name, table.to(device))


def partition_weights(accelerator, transformer, dtype):
    """Under ZeRO-3, splits the weights among processes, and returns `True`. DeepSpeed would first move all to each."""
    config = accelerator.deepspeed_plugin.deepspeed_config if accelerator.deepspeed_plugin else {}
    if config.get("zero_optimization", {}).get("stage") != 3:
        return False
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    names = ("bf16", "zero_optimization", "train_micro_batch_size_per_gpu")
    needed = {name: config[name] for name in names if name in config}
    deepspeed.zero.Init(module=transformer, dtype=dtype, config_dict_or_path=needed)
    return True


def load_base(accelerator, model, dtype):
    """A frozen copy of the transformer that computes as the prepared one does: in the same precision, and under ZeRO-3
    with its weights split among processes. `Accelerator.prepare` fills in DeepSpeed's configuration first."""
    base = diffusers.WanTransformer3DModel.from_pretrained(**model.source, subfolder=model.expert, dtype=dtype)
    keep_rotary_tables(base.requires_grad_(False).eval(), accelerator.device)
    if accelerator.deepspeed_plugin is None:
        base.to(accelerator.device).forward = accelerator.autocast()(base.forward)
        return base
    if not partition_weights(accelerator, base, dtype):
        return base.to(accelerator.device, dtype)
    return deepspeed.initialize(model=base, config=accelerator.deepspeed_plugin.deepspeed_config)[0]


def recompute_bias_correction(optimizer):
    """DeepSpeed's AdamW for the CPU multiplies the powers of its betas up from step to step, but computes them after
    loading a checkpoint, which differs in the last bit. Made anew before each step, it always computes them."""

    def make_anew(adam, _args, _kwargs):  # with no betas, which like the rate come with each step
        adam.ds_opt_adam.create_adam(adam.opt_id, 0.0, 0.0, 0.0, 0.0, 0.0, adam.adam_w_mode, False)

    if hasattr(optimizer, "ds_opt_adam"):
        optimizer.register_step_pre_hook(make_anew)


def gather_weights(accelerator, transformer, dtype):
    """The trained weights on the CPU, {name: `torch.Tensor` of `dtype`}, on the main process, and {} on the others,
    which must call it too. Under ZeRO-3 they are put together one by one: no GPU needs room for the whole model."""
    weights = {}
    whole = deepspeed.zero.GatheredParameters if accelerator.deepspeed_plugin else nullcontext
    for name, parameter in accelerator.unwrap_model(transformer).named_parameters():
        if parameter.requires_grad:
            with whole([parameter]):
                if accelerator.is_main_process:
                    weights[name] = parameter.detach().to("cpu", dtype, copy=True)
    return weights


# ---- 9. Validation: fixed prompts and fixed noise, painted and scored. ----------------------------------------------
@dataclass
class RunState:
    step: int = 0  # updates that are done
    skipped: int = 0  # how many of them were left out, because they were not finite
    history: list = field(default_factory=list)  # a dict for each update and each validation
    uploads: list = field(default_factory=list)  # those that go on in the background


# What to paint: N captions, their (N, L, D) embeddings, the [`Solver`], the (C, T, H, W) of latents, how
# many at once on a process, the folder they go to, the updates between two validations, the last update.
Validation = namedtuple("Validation", "captions prompt_embeds solver shape batch_size folder every last")


@torch.no_grad()
def paint_validation(accelerator, models, recipe, validation):
    """Paints this process's share of the validation prompts. Returns a list of (number of the prompt, pixels (H, W, 3)
    uint8, reward for the plain caption, its reward with the positive minus that with the negative control words)."""
    count, processes, painted = len(validation.captions), accelerator.num_processes, []
    models = models._replace(solver=validation.solver)
    # Under ZeRO-3 all processes call the transformer equally often, so the shares are filled up with repeats.
    mine = [index % count for index in range(accelerator.process_index, -(-count // processes) * processes, processes)]
    for start in progress(range(0, len(mine), validation.batch_size), "Validation"):
        indices = mine[start : start + validation.batch_size]
        generators = [make_generator(recipe.seed, VALIDATION, index) for index in indices]
        noise = torch.stack([torch.randn(validation.shape, generator=generator) for generator in generators])
        inputs = (tensor.to(accelerator.device) for tensor in (noise, validation.prompt_embeds[indices]))
        pixels, _ = decode_latents(models.vae, paint_latents(models, *inputs))
        captions = [validation.captions[index] for index in indices]
        words = *recipe.positive_words, *recipe.negative_words
        texts = [[f"{word}. {caption}" for caption in captions] for word in words]
        rewards = models.reward.rewards(pixels, [captions, *texts])
        plain, positive, negative = rewards.tensor_split([1, 1 + len(recipe.positive_words)])
        relative = positive.mean(0) - negative.mean(0)
        images = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        painted += zip(indices, images, plain[0].tolist(), relative.tolist(), strict=True)
    return painted


def validate(accelerator, models, recipe, validation, state):
    """If it is time, paints and scores all prompts, into trackers, `images/step-N/` and the history of the run."""
    due = validation is not None and (state.step % validation.every == 0 or state.step == validation.last)
    if not due or any(row["step"] == state.step and "validation_reward" in row for row in state.history):
        return
    painted = {index: row for index, *row in gather_object(paint_validation(accelerator, models, recipe, validation))}
    images, rewards, relative = zip(*(painted[index] for index in sorted(painted)), strict=True)
    means = {"validation_reward": np.mean(rewards).item(), "validation_relative": np.mean(relative).item()}
    if accelerator.is_main_process:
        with written(validation.folder / f"step-{state.step}", size=sum(image.nbytes for image in images)) as folder:
            folder.mkdir()
            scores = []
            for index, caption in enumerate(validation.captions):
                slug = re.sub(r"\W+", "-", caption.lower()).strip("-")[:48]
                scores.append({"caption": caption, "image": f"{index:03d}-{slug}.png"})
                scores[-1] |= {"reward": rewards[index], "relative": relative[index]}
                Image.fromarray(images[index]).save(folder / scores[-1]["image"])
            (folder / "scores.json").write_text(json.dumps(scores, indent=1))
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": np.stack(images)}, step=state.step, **layout)
    accelerator.wait_for_everyone()
    accelerator.log(means, step=state.step)
    state.history.append({"step": state.step, **means})
    summary = "reward {validation_reward:.4f}, relative {validation_relative:.4f}".format(**means)
    logger.info(f"Validation at step {state.step}: {summary}, {len(images)} images")


def save_before_after(folder, steps, output, columns=8):
    """Draws the first validation images of two steps, one above the other, with their rewards, as a PNG."""
    scores = [json.loads((folder / f"step-{step}/scores.json").read_text())[:columns] for step in steps]
    figure = matplotlib_figure.Figure(figsize=(2.4 * len(scores[0]), 5.8), layout="tight")
    axes = figure.subplots(2, len(scores[0]), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for row, step, images in zip(axes, steps, scores, strict=True):
        for axis, image in zip(row, images):  # noqa: B905  a resumed run may have more or fewer
            axis.imshow(Image.open(folder / f"step-{step}" / image["image"]))
            axis.set_xlabel(f"reward {image['reward']:.3f}\nrelative {image['relative']:+.3f}", fontsize=8)
            title = "\n".join(textwrap.wrap(image["caption"], 26)[:3]) if step == steps[0] else ""
            axis.set_title(title, fontsize=8, parse_math=False)
        row[0].set_ylabel(f"step {step}")
    with written(output) as file:
        figure.savefig(file, format="png", dpi=120)


def save_reward_curve(history, output):
    """Draws rewards and scores of the training samples and of the validation images by update, as a PNG."""
    figure = matplotlib_figure.Figure(figsize=(11, 4), layout="tight")
    rewards = "reward_positive", "reward_negative", "validation_reward"
    scores = "score_denoise", "score_inversion", "validation_relative"
    for axis, names in zip(figure.subplots(1, 2), (rewards, scores), strict=True):
        for name in names:
            if rows := [(row["step"], row[name]) for row in history if name in row]:
                style = "ko-" if name.startswith("validation") else "-"
                axis.plot(*np.transpose(rows), style, label=name.replace("_", ", "), alpha=0.8)
        axis.set(title="Reward" if names is rewards else "Relative score", xlabel="update")
        axis.grid(alpha=0.3)
        axis.legend()
    with written(output) as file:
        figure.savefig(file, format="png", dpi=120)


# ---- 10. What a run leaves behind: checkpoints, the model, its card. ------------------------------------------------
# What a run is: its folder, all flags, the subfolder of the transformer, the type of saved weights, what decides the
# result (a checkpoint and the run that continues it share it), the bytes of a checkpoint, the repository on the Hub.
Run = namedtuple("Run", "output_dir flags expert dtype identity checkpoint_size repo_id")


def discard(path):
    """Removes a file or a folder, if there is one. A folder is renamed first: what is left of it never looks whole."""
    if path.is_dir():
        return shutil.rmtree(path.rename(f"{path}.discarded.unfinished"))
    path.unlink(missing_ok=True)


@contextmanager
def written(path, size=1e6):
    """A path beside `path` to write a file or folder of about `size` bytes to. If the block succeeds, it is flushed to
    disk and takes the place of `path`, where a link is followed; else it is removed. A full disk ends the program."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    discard(new := path.with_name(f"{path.name}.unfinished"))
    free = shutil.disk_usage(path.parent).free
    full = f"error: the disk is full: `{path}` takes {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB were free"
    if free < size:
        raise SystemExit(full)
    try:
        yield new
        for file in filter(Path.is_file, (new, *new.rglob("*"))):
            file.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
            with file.open("rb") as stream:
                os.fsync(stream)
    except BaseException as error:
        is_full = re.search("No space left|quota|too large", str(error)) or shutil.disk_usage(path.parent).free < 2**20
        discard(new)
        if is_full:
            raise SystemExit(full) from error
        raise
    if path.is_dir():
        discard(path)
    new.replace(path)


@contextmanager
def claim_output_dir(folder, size):
    """Makes the output folder and holds its lock, which the kernel releases however the process ends. `ValueError` if
    another holds it, or less than `size` bytes are free. If the marker stays empty, all is as before in the end."""
    marker, made = folder / MARKER, [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    with input_error(f"`--output_dir {folder}` cannot be written, or another run is writing to it; choose another"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = marker.open("a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock:
        for leftover in (*folder.glob("*.unfinished"), *folder.glob("images/*.unfinished")):
            discard(leftover)
        try:
            if (free := shutil.disk_usage(folder).free) < size:
                needs = f"{size / 1e9:.3g} GB, of which {free / 1e9:.3g} GB are free"
                raise ValueError(f"`--output_dir {folder}`: the disk is full: the run needs {needs}.")
            yield
        finally:
            if marker.stat().st_size == 0:
                for remove in (marker.unlink, *(each.rmdir for each in made)):
                    remove()


def begin_output(run):
    """Marks the output folder as that of the run, without what an earlier one left there, and begins `train.log`."""
    old = [path for pattern in RUN_FILES for path in run.output_dir.glob(pattern)] + list_checkpoints(run.output_dir)
    for path in old if run.flags["overwrite_output_dir"] else ():
        discard(path)
        with suppress(OSError):  # stops at a folder that is not empty
            os.removedirs(path.parent)
    (run.output_dir / MARKER).write_text(json.dumps(run.identity, indent=1))  # in place, since it is locked
    handler = logging.FileHandler(run.output_dir / "train.log")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.getLogger().addHandler(handler)


def list_checkpoints(output_dir):
    """The checkpoints in a folder, in the order in which they were saved; one that cannot be read is the last."""

    def saved(folder):
        with suppress(OSError, ValueError, TypeError, LookupError):
            return float(json.loads((folder / STATE_FILE).read_text())["saved"])
        return math.inf

    folders = (path.parent for path in Path(output_dir).glob(f"checkpoint-*/{STATE_FILE}"))
    return sorted((folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name)), key=saved)


def list_checksums(accelerator, folder):
    """The SHA-256 and the name of each file in a folder, as `sha256sum` writes them. Each process reads a share."""

    def line(file):
        with file.open("rb") as stream:
            return f"{huggingface_hub.utils.sha.sha_fileobj(stream).hex()}  {file.relative_to(folder)}"

    files = sorted(file for file in Path(folder).rglob("*") if file.is_file() and file.name != CHECKSUMS)
    with ThreadPoolExecutor() as threads:
        lines = threads.map(line, files[accelerator.process_index :: accelerator.num_processes])
    return gather_object([*lines])


def find_damage(accelerator, folder):
    """The name of a file in a checkpoint that is not what was saved, or `None`. All processes must call it."""
    file = Path(folder, CHECKSUMS)
    listed = file.read_text(errors="replace").splitlines() if file.is_file() else [CHECKSUMS]
    return min((line.split("  ")[-1] for line in {*listed} ^ {*list_checksums(accelerator, folder)}), default=None)


def keep_lora_only(_models, weights, _output_dir):
    """A hook of `Accelerator.save_state`: of the state dicts, of which DeepSpeed has none, it keeps only the LoRA."""
    weights[:] = [{name: tensor for name, tensor in each.items() if "lora_" in name} for each in weights]


def save_checkpoint(accelerator, transformer, run, state):
    """Writes `checkpoint-N`: the training state, in `trainer_state.json` the curves and what export_checkpoint.py
    needs, and checksums; then removes those above the limit. Ends the program if the weights are not finite."""
    shares = [getattr(each, "ds_tensor", each) for each in transformer.parameters() if each.requires_grad]
    if not min(gather_object([all(share.isfinite().all() for share in shares)])):
        last = (list_checkpoints(run.output_dir) or ["the base model"])[-1]
        raise SystemExit(f"error: weights became NaN or infinite, and are not saved. The last good state is {last}.")
    folder, main = run.output_dir / f"checkpoint-{state.step}", accelerator.is_main_process
    with written(folder, run.checkpoint_size) if main else nullcontext(Path(f"{folder.resolve()}.unfinished")) as new:
        if main:
            bare, dtype = accelerator.unwrap_model(transformer), str(run.dtype).removeprefix("torch.")
            content = {"saved": time.time(), "global_step": state.step, "skipped": state.skipped, "dtype": dtype}
            content |= {"history": state.history, "run": run.identity, "expert": run.expert}
            content |= {"config": dict(bare.config), "lora": lora_metadata(bare)}
            new.mkdir()
            (new / STATE_FILE).write_text(json.dumps(content))
        accelerator.wait_for_everyone()
        # Frozen weights are those of the base model: without DeepSpeed, `keep_lora_only` leaves them out.
        lora_only = {"exclude_frozen_parameters": True} if accelerator.deepspeed_plugin else {}
        accelerator.save_state(str(new), **lora_only)
        # Every draw is a function of the seed, so the pickled states of generators are of no use.
        (new / f"random_states_{accelerator.process_index}.pkl").unlink()
        accelerator.wait_for_everyone()
        checksums = list_checksums(accelerator, new)
        if main:
            (new / CHECKSUMS).write_text("".join(f"{line}\n" for line in checksums))
    if main:
        for old in list_checkpoints(run.output_dir)[: -(run.flags["checkpoints_total_limit"] or sys.maxsize)]:
            discard(old)
    logger.info(f"Saved state to {folder}")
    accelerator.wait_for_everyone()


def read_state(folder):
    """What `trainer_state.json` of a checkpoint says. `ValueError` if it is not what [`save_checkpoint`] writes."""
    file = Path(folder, STATE_FILE)
    with input_error(f"`{file}` is damaged or of another version of this script; take another checkpoint"):
        content = json.loads(file.read_text())
        history, last, expert = content["history"], content["global_step"], content["expert"]
        steps, numbers = [content["skipped"], last], [value for row in history for value in row.values()]
        steps += [row["step"] for row in history]
        if {*map(type, steps)} != {int} or not 0 <= min(steps) <= max(steps) <= last or expert not in EXPERTS:
            raise ValueError("its steps or its expert are not those of a run")
        if type(history) is not list or not {*map(type, numbers)} <= {int, float} or "engine" not in content["run"]:
            raise ValueError("its curves or its settings are not those of a run")
        return {name: content[name] for name in "global_step skipped history run expert config lora dtype".split()}


def find_checkpoint(accelerator, run):
    """The checkpoint to resume from, or `None`, and its [`RunState`]. `ValueError` if the run cannot go on with it."""
    saved, flags, folder = list_checkpoints(run.output_dir), run.flags, run.flags["resume_from_checkpoint"]
    folder = (saved or [None])[-1] if folder == "latest" else folder
    if folder is None:
        return None, RunState()
    if damage := find_damage(accelerator, folder):
        whole = next((each for each in saved[::-1] if find_damage(accelerator, each) is None), "none")
        raise ValueError(f"{folder} is damaged: `{damage}` is not what was saved. The newest whole one is {whole}.")
    content, new = read_state(folder), json.loads(json.dumps(run.identity))
    old, step = content["run"], content["global_step"]
    changed = [name for name in new if old.get(name) != new[name]]
    with input_error(f"{folder} cannot be continued"):
        if changed and ({*changed} & {*PINNED} or not flags["allow_changes"]):
            advice = "start a new run" if {*changed} & {*PINNED} else "add `--allow_changes`"
            changes = "; ".join(f"{name}: {old.get(name)}, which is now {new[name]}" for name in changed)
            raise ValueError(f"it was made with another {changes}. Use the same, or {advice}.")
        if step > flags["max_train_steps"]:
            raise ValueError(f"it is beyond `--max_train_steps {flags['max_train_steps']}`.")
    return folder, RunState(step, content["skipped"], content["history"])


@contextmanager
def safe_loading(uses_deepspeed):
    """DeepSpeed reads its checkpoints as pickles, which could run any code. Here what torch loads may hold tensors and
    plain values, and some classes of DeepSpeed, and nothing else."""
    classes = [pkgutil.resolve_name(name) for name in DEEPSPEED_CLASSES if uses_deepspeed]
    with patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD=1), torch.serialization.safe_globals(classes):
        yield


def load_checkpoint(accelerator, adam, folder, is_lora):
    """Loads what [`save_checkpoint`] saved; `adam` keeps the settings that it was made with."""
    uses_deepspeed = accelerator.deepspeed_plugin is not None
    strict = "load_module_strict" if uses_deepspeed else "strict"  # the frozen weights under a LoRA are there already
    with input_error(f"{folder} cannot be loaded"), safe_loading(uses_deepspeed):
        accelerator.load_state(str(folder), **({strict: False} if is_lora else {}))
    for group in adam.param_groups:
        group |= {name: adam.defaults[name] for name in ("betas", "eps", "weight_decay")}
        group["initial_lr"] = float(adam.defaults["lr"])


def save_weights(weights, output_dir, expert, config, lora):
    """Writes trained weights, {name in the transformer: `torch.Tensor`}, as diffusers reads them: a file for a LoRA,
    which has the metadata `lora`, else the folder `expert` with the transformer's `config`. Returns the path."""
    path = Path(output_dir, expert if lora is None else LORA_FILE)
    with written(path, sum(weight.nbytes for weight in weights.values())) as new:
        if lora is not None:
            layers = {name.replace(".default.", "."): weight for name, weight in weights.items()}
            names = {"weight_name": new.name, "transformer_lora_adapter_metadata": lora}
            diffusers.WanPipeline.save_lora_weights(new.parent, layers, **names)
            return path
        with torch.device("meta"):
            diffusers.WanTransformer3DModel.from_config(config).save_config(new)
        for file in {*path.glob("*")} - {*path.glob("config.json"), *path.glob(f"{DIFFUSERS_STEM}*")}:  # not a run's
            (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
        pattern = f"{DIFFUSERS_STEM}{{suffix}}.safetensors"
        huggingface_hub.save_torch_state_dict(weights, new, filename_pattern=pattern, max_shard_size="10GB")
    return path


def save_model_card(run, history):
    """Writes the `README.md` of the output folder. Of paths on this machine, it has the last part only."""
    flags, base = dict(run.flags), "pretrained_model_name_or_path"
    for name, value in flags.items():
        if isinstance(value, list | tuple):
            flags[name] = shlex.join(map(str, value))
        elif name in PATH_FLAGS and value and Path(value).exists():
            flags[name] = Path(value).resolve().name
    scores, images = [row for row in history if "validation_reward" in row], []
    if scores and (painted := run.output_dir / f"images/step-{scores[-1]['step']}/scores.json").is_file():
        url = painted.relative_to(run.output_dir).parent
        images = [{**row, "url": f"{url}/{row['image']}"} for row in json.loads(painted.read_text())]
    facts = {"run": run, "flags": flags, "history": history, "scores": scores, "images": images}
    on_hub, rank = not Path(run.flags[base]).exists(), flags["lora_rank"]
    card = huggingface_hub.ModelCard(MODEL_CARD.render(**facts, base=flags[base], on_hub=on_hub, rank=rank))
    with written(run.output_dir / "README.md") as file:
        card.save(file)


def save_results(accelerator, transformer, run, state):
    """Writes what users want of a run: the weights, the curves, the pictures and the card; and begins to upload it."""
    weights = gather_weights(accelerator, transformer, run.dtype)
    if accelerator.is_main_process:
        bare, output, images = accelerator.unwrap_model(transformer), run.output_dir, run.output_dir / "images"
        logger.info(f"Saved {save_weights(weights, output, run.expert, dict(bare.config), lora_metadata(bare))}")
        save_reward_curve(state.history, output / "reward.png")
        painted = [row["step"] for row in state.history if (images / f"step-{row['step']}/scores.json").is_file()]
        if painted:
            save_before_after(images, (painted[0], painted[-1]), output / "before_after.png")
        save_model_card(run, state.history)
        if run.flags["push_to_hub"]:
            state.uploads.append(start_upload(run, state.step))
    accelerator.wait_for_everyone()


def with_retries(request, attempts=5):
    """Repeats a request to the Hub after 1, 2, 4, 8 seconds, unless the Hub answers that the request is wrong."""
    for attempt in range(attempts):
        try:
            return request()
        except Exception as error:
            if getattr(error, "response", None) is None and hasattr(error.__cause__, "response"):
                error = error.__cause__  # huggingface_hub wraps what the storage answers
            status = getattr(getattr(error, "response", None), "status_code", 500)
            wrong = isinstance(error, (ValueError, FileNotFoundError)) or (status < 500 and status not in (408, 429))
            if wrong or attempt == attempts - 1:
                raise error
            logger.warning(f"The Hub failed: {error}\nTrying again in {2**attempt} s.")
            time.sleep(2**attempt)


def start_upload(run, step):
    """Uploads the output folder without its checkpoints in the background, one upload after the other. Returns a
    `Future`. If it fails, the folder is whole and a message says how to repeat it."""
    ignored, logs = ["checkpoint-*", "*.unfinished", MARKER], run.flags["logging_dir"]
    apart = run.flags["hub_strategy"] == "branch" and step < run.flags["max_train_steps"]
    discard(frozen := run.output_dir / f"upload-{step}.unfinished")

    def copy(source, target):  # the run replaces files of weights by new ones, so a link keeps the old
        (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)

    def upload():
        hub, message = {"repo_id": run.repo_id, "revision": f"step-{step}" if apart else None}, f"After {step} updates"
        try:
            if apart:
                with_retries(lambda: huggingface_hub.create_branch(run.repo_id, branch=hub["revision"], exist_ok=True))
            with_retries(partial(huggingface_hub.upload_folder, **hub, folder_path=frozen, commit_message=message))
        except Exception as error:  # whatever it was, the run goes on and its files are safe
            exclude = [word for pattern in (*ignored, f"{logs}/*") for word in ("--exclude", pattern)]
            command = shlex.join(["hf", "upload", run.repo_id, str(run.output_dir), ".", *exclude])
            logger.error(f"Upload failed: {error}\nUpload later with: {command}")
        discard(frozen)

    shutil.copytree(run.output_dir, frozen, copy_function=copy, ignore=shutil.ignore_patterns(*ignored, logs))
    return huggingface_hub.HfApi().run_as_future(upload)


# ---- 11. Flags and checks: what cannot succeed is refused before any model is loaded. -------------------------------
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # no default where there is none, or where the help says it in words
        hidden = action.default is None or action.nargs == 0 or "Default: " in action.help
        return action.help if hidden else super()._get_help_string(action)


def number(kind=float, at_least=-math.inf, above=-math.inf, below=2**63):
    """An argparse type: a number of this `kind` within these limits, of which NaN is in none."""

    def convert(text):
        value = kind(text)
        if not (at_least <= value and above < value < below and abs(value) < 2**63):
            limits = {"at least": at_least, "above": above, "below": below}
            words = " and ".join(f"{name} {limit}" for name, limit in limits.items() if abs(limit) < 2**63)
            raise argparse.ArgumentTypeError(f"must be {words or 'finite'}, but is {value}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"  # as argparse names it
    return convert


def parse_args(input_args=None):
    usage = "accelerate launch --config_file F %(prog)s --pretrained_model_name_or_path M --dataset_name D [...]"
    parser = argparse.ArgumentParser(usage=usage, formatter_class=HelpFormatter, allow_abbrev=False)
    count, positive, guidance = number(int, at_least=1), number(above=0), number(at_least=1)
    from_0, share, index = number(at_least=0), number(at_least=0, below=1), number(int, at_least=0)
    grid = number(int, at_least=2 * POSITION_MARGIN, below=10**7)
    ratio, extra = number(above=0, below=1), number(above=-1)
    add = parser.add_argument_group("model and data").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Path to pretrained model or model identifier.")
    add("--revision", help="Revision of pretrained model identifier from huggingface.co/models.")
    add("--variant", help="Variant of the model files of the pretrained model identifier, 'e.g.' fp16")
    add("--transformer_subfolder", choices=EXPERTS, default="transformer_2", help="The expert to train.")
    add("--dataset_name", required=True, help="Folder or Hub id of the dataset that embed_prompts.py wrote.")
    add("--max_sequence_length", type=count, default=512, help="The one that the captions were embedded with.")
    add("--cache_dir", help="Where the downloaded base model and dataset will be stored.")
    add("--dataloader_num_workers", type=index, default=0, help="Number of subprocesses to use for data loading.")
    add("--height", type=count, default=512, help="The height in pixels of the images to train on.")
    add("--width", type=count, default=512, help="The width in pixels of the images to train on.")
    add = parser.add_argument_group("reward").add_argument
    add("--reward_model", choices=["HPS", "PickScore", "CLIP"], default="HPS", help="The human-preference model.")
    add("--reward_model_path", help="HPS: the file HPS_v2.1_compressed.pt; else folder or Hub id of a CLIPModel.")
    add("--reward_processor_path", help="PickScore, CLIP: folder or Hub id of the processor, if not the usual one.")
    add("--reward_dtype", choices=["fp32", "bf16"], default="fp32", help="Precision of the reward model's weights.")
    words = "Control words to move {}, a new one every step. Default: the published ones, which suit HPS."
    add("--positive_words", nargs="+", default=POSITIVE_WORDS, help=words.format("towards"))
    add("--negative_words", nargs="+", default=NEGATIVE_WORDS, help=words.format("away from"))
    add = parser.add_argument_group("SRPO").add_argument
    add("--branches", choices=["both", "denoise", "inversion"], default="both", help="Branches of the graded step.")
    add("--loss", choices=["hinge", "linear"], default="hinge", help="relu(margin - score), or just -score.")
    add("--reward_margin", type=from_0, default=0.7, help="The score from which on the hinge loss is zero.")
    add("--loss_weight_shift", type=positive, help="Weigh the loss at position p by this shift's curve at p / length.")
    add("--drift_weight", type=from_0, default=0.0, help="Weight in the loss of (velocity - untrained velocity)^2.")
    add("--train_timestep", type=index, nargs=2, default=[5, 25], help="The trained steps of the num_inference_steps.")
    add("--timestep_length", type=grid, default=1000, help="Number of noise levels in the trained window.")
    add("--groundtruth_ratio", type=ratio, default=0.9, help="Injected noise, as a share of the window.")
    discount = {"type": extra, "nargs": 2, "help": "Extra weight of the favoured caption, at low and at high noise."}
    add("--discount_pos", **discount, default=[0.1, 0.25])
    add("--discount_inv", **discount, default=[0.3, 0.01])
    add("--shift", type=positive, default=1.0, help="Shift of the schedule that the window is cut from.")
    add("--num_inference_steps", type=count, default=40, help="Steps of that schedule, and of validation images.")
    add = parser.add_argument_group("rollout").add_argument
    add("--sampling_steps", type=count, default=10, help="The number of denoising steps of a rollout.")
    add("--rollout_scheduler", choices=["unipc", "euler"], default="unipc", help="The solver of rollouts.")
    add("--rollout_start", choices=["noise", "boundary"], default="noise", help="boundary: from stored latents.")
    add("--rollout_batch_size", type=count, help="Samples to roll out at once. Default: the train_batch_size.")
    add("--updates_per_rollout", type=count, default=1, help="Number of updates that a rollout is used for.")
    add("--renew_noise", action="store_true", help="Also inject new noise in further updates on the same rollout.")
    add("--rollout_shift", type=positive, help="Shift of the rollout's schedule. Default: `flow_shift` of the model.")
    add("--rollout_guidance_scale", type=guidance, default=3.0, help="Guidance scale of rollouts; 1: half the cost.")
    add("--noise", choices=["shared", "per_sample"], default="shared", help="One noise for a step, or one per sample.")
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_rank", type=count, help="Train a LoRA of this rank beside the weights. Default: train all weights.")
    add("--lora_alpha", type=positive, help="Scale of the LoRA: alpha / rank. Default: the rank.")
    add("--lora_dropout", type=share, help="Dropout probability of the LoRA's input in the graded step. Default: 0.")
    add("--lora_target_modules", nargs="+", help="Names of the layers that get a LoRA. Default: those of attention.")
    add("--base_weights", choices=["fp8"], help="Store frozen linear layers in float8 (e4m3), half of bf16.")
    add = parser.add_argument_group("optimization").add_argument
    add("--seed", type=number(int, at_least=0, below=2**32), default=42, help="A seed for reproducible training.")
    add("--train_batch_size", type=count, default=1, help="Batch size (per device) of a rollout, in captions.")
    add("--gradient_accumulation_steps", type=count, default=1, help="Number of rollouts to accumulate for an update.")
    add("--max_train_steps", type=count, default=100, help="Total number of updates to perform.")
    add("--learning_rate", type=from_0, default=5e-6, help="Initial learning rate to use.")
    schedulers = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    add("--lr_scheduler", choices=schedulers, default="constant", help="The scheduler type to use.")
    add("--lr_warmup_steps", type=index, default=0, help="Number of steps for the warmup in the lr scheduler.")
    add("--optimizer", choices=["adamw", "adamw_8bit"], default="adamw", help="adamw_8bit: 6 bytes a weight, not 16.")
    add("--adam_beta1", type=share, default=0.9, help="The beta1 parameter for the AdamW optimizer.")
    add("--adam_beta2", type=share, default=0.999, help="The beta2 parameter for the AdamW optimizer.")
    add("--adam_weight_decay", type=from_0, default=1e-4, help="Weight decay to use.")
    add("--adam_epsilon", type=positive, default=1e-8, help="Epsilon value for the AdamW optimizer.")
    add("--max_grad_norm", type=positive, default=0.1, help="Max gradient norm.")
    add("--max_skipped_updates", type=count, default=3, help="End after this many updates of NaN or infinity.")
    add("--gradient_checkpointing", action="store_true", help="Save memory at the expense of slower backward pass.")
    add("--compile", action="store_true", help="Compile the blocks of the transformer: minutes once, then faster.")
    add("--allow_tf32", action="store_true", help="Whether or not to allow TF32 on Ampere and later GPUs.")
    add("--deterministic", action="store_true", help="Only deterministic algorithms: the same bits on the same GPUs.")
    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompts", nargs="*", help="Prompts of the dataset. Default: split `validation`, or the first 4.")
    add("--validation_steps", type=count, default=10, help="Run validation every X updates, and at the end.")
    add("--validation_size", type=count, default=1024, help="The side in pixels of validation images.")
    add("--validation_guidance_scale", type=guidance, default=3.0, help="Guidance scale of validation images.")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="srpo-wan", help="Where the model, checkpoints, images and logs will be written.")
    add("--overwrite_output_dir", action="store_true", help="Delete what an earlier run wrote to `output_dir` first.")
    add("--checkpointing_steps", type=count, default=10, help="Save the state every X updates, and at the end.")
    add("--checkpoints_total_limit", type=count, help="Max number of checkpoints to store. Default: no limit.")
    add("--resume_from_checkpoint", help="Path of a checkpoint, or `latest` for the last one in `output_dir`.")
    add("--allow_changes", action="store_true", help="Resume although flags or data that change the result differ.")
    add("--logging_dir", default="logs", help="The folder in `output_dir` for TensorBoard logs.")
    trackers = [*LOGGER_TYPE_TO_CLASS, "all", "none"]
    add("--report_to", choices=trackers, default="tensorboard", help="Where to report results and logs.")
    add("--push_to_hub", action="store_true", help="Whether or not to push the model to the Hub.")
    add("--hub_model_id", help="The name of the repository to push to. Default: the name of `output_dir`.")
    add("--hub_private_repo", action="store_true", help="Whether to create the repository as private.")
    strategies = {"choices": ["end", "checkpoint", "branch"], "default": "end"}
    add("--hub_strategy", **strategies, help="Push at the end, or at checkpoints too, or those to branches `step-N`.")
    args, unknown = parser.parse_known_args(input_args)
    if unknown:  # without their values, since one may be a token
        names = " ".join(word.split("=")[0] for word in unknown if word.startswith("-")) or "a value without a flag"
        parser.error(f"unknown arguments: {names}. See --help; tokens come from `hf auth login` or HF_TOKEN.")
    # Flags that contradict each other, or that mean nothing beside the others.
    (first, last), reuses, steps = args.train_timestep, args.updates_per_rollout, args.max_train_steps
    towards, away = ({w.strip().lower() for w in words} for words in (args.positive_words, args.negative_words))
    installed = ["all", "none", *map(str, get_available_trackers())]
    no_torchao, multiple = importlib.util.find_spec("torchao") is None, "must be a multiple of `--updates_per_rollout`"
    texts = {n: [*map(str, v)] if isinstance(v, list | tuple) else [str(v)] for n, v in vars(args).items()}
    blank = [n for n, each in texts.items() if not all(any(map(str.isprintable, "".join(v.split()))) for v in each)]
    for wrong, name, why in (
        (blank, (blank or [None])[0], "must not be blank"),
        (not first < last <= args.num_inference_steps, "train_timestep", "must grow, up to `--num_inference_steps`"),
        (args.checkpointing_steps % reuses, "checkpointing_steps", multiple),
        (steps % reuses, "max_train_steps", multiple),
        (towards & away, "positive_words", "has a word of `--negative_words`, which has no meaning"),
        (args.lr_warmup_steps > steps, "lr_warmup_steps", f"must be at most `--max_train_steps {steps}`"),
        (args.logging_dir == ".." or Path(args.logging_dir).name != args.logging_dir, "logging_dir", "is not a name"),
        (args.report_to not in installed, "report_to", f"needs `pip install {args.report_to}`"),
        (args.optimizer == "adamw_8bit" and no_torchao, "optimizer", "needs `pip install torchao`"),
        (args.push_to_hub and not huggingface_hub.get_token(), "push_to_hub", "needs `hf auth login` or HF_TOKEN"),
    ):
        if wrong:
            parser.error(f"`--{name} {' '.join(texts[name])}` {why}.")
    for pointless, names, why in (
        (args.lora_rank is None, "lora_alpha lora_dropout lora_target_modules base_weights", "needs `--lora_rank`"),
        (reuses == 1, "renew_noise", "needs `--updates_per_rollout` above 1"),
        (args.reward_model == "HPS", "reward_processor_path", "is not for HPS, which has no processor"),
        (args.loss == "linear", "reward_margin", "is not for `--loss linear`, which has no margin"),
        (args.branches == "denoise", "discount_inv", "is not for `--branches denoise`"),
        (args.branches == "inversion", "discount_pos", "is not for `--branches inversion`"),
        (args.lr_scheduler == "constant", "lr_warmup_steps", "needs a `--lr_scheduler` that warms up"),
        (args.resume_from_checkpoint is not None, "overwrite_output_dir", "would delete what to resume from"),
        (args.resume_from_checkpoint is None, "allow_changes", "needs `--resume_from_checkpoint`"),
        (not args.push_to_hub, "hub_strategy hub_private_repo", "needs `--push_to_hub`"),
    ):
        for name in names.split():
            if pointless and vars(args)[name] != parser.get_default(name):
                parser.error(f"`--{name}` {why}.")
    if args.lora_rank is not None:
        args.lora_alpha, args.lora_dropout = args.lora_alpha or args.lora_rank, args.lora_dropout or 0.0
        args.lora_target_modules = sorted(args.lora_target_modules or LORA_TARGET_MODULES)
    return args


@contextmanager
def input_error(cause):
    """Turns whatever is said of bad input into a `ValueError` of one line, not too long, that begins with `cause`."""
    try:
        yield
    except Exception as error:
        message = " ".join(f"{cause}: {error}".split())
        raise ValueError(message if len(message) < 900 else f"{message[:600]} ... {message[-290:]}") from error


@contextmanager
def one_line_errors():
    """Ends the program with the message of a `ValueError`, without a traceback."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


class ModelInfo(NamedTuple):
    """What the configs of the base model say; see the attributes of the same names in diffusers."""

    source: dict  # the arguments of `from_pretrained` that say where it is
    expert: str  # the subfolder of the transformer to train
    boundary_ratio: float | None  # `None` where there is one expert
    expand_timesteps: bool
    flow_shift: float
    transformer: torch.nn.Module  # on the meta device: shapes, no weights
    vae: torch.nn.Module  # likewise

    def latent_shape(self, height, width):
        """The (C, T, H, W) of the latents of one image, whose size is in pixels."""
        scale = self.vae.config.scale_factor_spatial
        return self.transformer.config.in_channels, 1, height // scale, width // scale


def read_model_info(args):
    """The [`ModelInfo`] of the base model from its configs. `ValueError` if it is not Wan or lacks the expert."""
    path, expert = args.pretrained_model_name_or_path, args.transformer_subfolder
    names, flag = ("revision", "variant", "cache_dir"), f"`--pretrained_model_name_or_path {path}`"
    source = {"pretrained_model_name_or_path": path, **{name: getattr(args, name) for name in names}}
    try:
        _ = os.path.exists(path) or huggingface_hub.HfApi().model_info(path, timeout=5)
    except Exception as error:  # libraries would ask for half a minute; without an answer they shall use the cache
        huggingface_hub.constants.HF_HUB_OFFLINE |= getattr(error, "response", None) is None
    is_away = huggingface_hub.constants.HF_HUB_OFFLINE and not os.path.exists(path)
    problem = "is not here, and the Hub does not answer" if is_away else "is not a Wan pipeline of diffusers"
    with input_error(f"{flag} {problem}"), torch.device("meta"):
        index = dict(diffusers.WanPipeline.load_config(**source))
        scheduler = diffusers.UniPCMultistepScheduler.load_config(**source, subfolder="scheduler")
        vae = diffusers.AutoencoderKLWan.from_config(diffusers.AutoencoderKLWan.load_config(**source, subfolder="vae"))
        two_experts = index.get("transformer_2", [None, None])[1] is not None
    boundary_ratio = index.get("boundary_ratio")
    if expert != EXPERTS[two_experts]:
        found = "two experts" if two_experts else "no `transformer_2`, only one expert"
        raise ValueError(f"{flag} has {found}: train it with `--transformer_subfolder {EXPERTS[two_experts]}`.")
    if two_experts and not isinstance(boundary_ratio, float | int):
        raise ValueError(f"{flag} has no `boundary_ratio` in its model_index.json.")
    with input_error(f"{flag} lacks the model in `{expert}`"), torch.device("meta"):
        config = diffusers.WanTransformer3DModel.load_config(**source, subfolder=expert)
        transformer = diffusers.WanTransformer3DModel.from_config(config)
    if (channels := transformer.config.in_channels) != vae.config.z_dim:
        problem = f"is not for text to video: `{expert}` takes {channels} channels"
        raise ValueError(f"{flag} {problem}, and the VAE makes {vae.config.z_dim}.")
    settings = index.get("expand_timesteps", False), scheduler.get("flow_shift", 1.0)
    return ModelInfo(source, expert, boundary_ratio if two_experts else None, *settings, transformer, vae)


def check_flags_for_model(args, model):
    """Refuses window, sizes and LoRA layers that the base model cannot have. Returns how many weights are trained."""
    steps, (first, last), boundary = args.num_inference_steps, args.train_timestep, model.boundary_ratio
    schedule = shift_sigmas(torch.linspace(1, 0, steps + 1), args.shift)
    if boundary is not None and schedule[first] > boundary + 1e-6:
        problem = f"`--train_timestep {first} {last}` starts at sigma {schedule[first]:.3f}, above {boundary}"
        largest = f"`--train_timestep {int((schedule > boundary + 1e-6).sum())} {steps}`"
        raise ValueError(f"{problem}, the boundary of this expert. The largest valid window is {largest}.")
    if args.rollout_start == "boundary" and boundary is None:
        raise ValueError("`--rollout_start boundary` needs a model of two experts; this one has no boundary.")
    scale, (_, *patch) = model.vae.config.scale_factor_spatial, model.transformer.config.patch_size
    validation = np.lcm(scale * patch[0], 16).item()  # what WanPipeline demands of who paints the same
    for name, multiple in (("height", scale * patch[0]), ("width", scale * patch[1]), ("validation_size", validation)):
        if (value := getattr(args, name)) % multiple:
            problem = f"`--{name} {value}` must be a multiple of {multiple} for this model"
            raise ValueError(f"{problem}, for example {max(1, round(value / multiple)) * multiple}.")
    for name in args.lora_target_modules if args.lora_rank is not None else ():
        if not any(f".{layer}".endswith(f".{name}") for layer, _ in model.transformer.named_modules()):
            raise ValueError(f"`--lora_target_modules`: the transformer has no layer `{name}`.")
    with input_error("`--lora_target_modules` must name linear layers"), torch.device("meta"):
        weights = set_up_transformer(copy.deepcopy(model.transformer), args).parameters()
    return sum(weight.numel() for weight in weights if weight.requires_grad)


def check_model_files(model):
    """Refuses weights that their configs do not fit. Returns the [`fingerprint`] of a layer of the expert."""
    for subfolder, empty in ((model.expert, model.transformer), ("vae", model.vae)):
        path = f"`--pretrained_model_name_or_path {model.source['pretrained_model_name_or_path']}`"
        with input_error(f"{path} has no whole model in `{subfolder}`"):
            check_weights(empty, read_shapes(weight_files(model.source, subfolder, DIFFUSERS_STEM)))
    return weights_fingerprint(model.source, model.expert, DIFFUSERS_STEM, TRANSFORMER_LAYER)


def check_dataset(args, model):
    """Refuses a dataset that `embed_prompts.py` did not write for this model's text encoder; else returns it."""
    name, path = f"`--dataset_name {args.dataset_name}`", args.pretrained_model_name_or_path
    with input_error(f"{name} cannot be loaded; make it with embed_prompts.py"):
        dataset = load_prompt_dataset(args.dataset_name, args.cache_dir)
    columns = {"caption", "prompt_embeds", "text_encoder_fingerprint", "max_sequence_length"}
    for split in {"train", "negative", *dataset}:
        if split not in dataset or not columns <= set(dataset[split].column_names) or len(dataset[split]) == 0:
            raise ValueError(f"{name} was not made by embed_prompts.py: it lacks rows or columns in `{split}`.")
    with input_error(f"`--pretrained_model_name_or_path {path}` lacks the text encoder to compare {name} with"):
        encoder = weights_fingerprint(model.source, "text_encoder", TRANSFORMERS_STEM, TEXT_ENCODER_LAYER)
    model_of = f"`{path}` with `--max_sequence_length {args.max_sequence_length}`"
    for rows in dataset.values():
        for what, found, expected in (
            ("size", {np.shape(rows[0]["prompt_embeds"])[-1]}, model.transformer.config.text_dim),
            ("length", set(rows.unique("max_sequence_length")), args.max_sequence_length),
            ("the text encoder", set(rows.unique("text_encoder_fingerprint")), encoder),
        ):
            if found != {expected}:
                problem = f"{name} holds embeddings of {what} {', '.join(map(str, found))}, but {model_of}"
                raise ValueError(f"{problem} needs {expected}. Embed the captions again for this model.")
    captions = {caption for rows in dataset.values() for caption in rows["caption"]}
    for prompt in args.validation_prompts or ():
        if prompt not in captions:
            raise ValueError(f"`--validation_prompts`: {name} has no {prompt!r}. Embed it with embed_prompts.py.")
    if args.rollout_start == "boundary":
        rows, wanted = dataset["train"], {**vars(args), "rollout_shift": args.rollout_shift or model.flow_shift}
        lacking = {*BOUNDARY_COLUMNS, "boundary_settings"} - set(rows.column_names)
        settings = [None] if lacking else rows.unique("boundary_settings")
        if None in settings:
            raise ValueError(f"{name} has no boundary latents, or rows without; see `embed_prompts.py --help`.")
        for flag, found in ((flag, json.loads(each)[flag]) for each in settings for flag in BOUNDARY_FLAGS):
            if found != wanted[flag]:
                problem = f"{name} has boundary latents of `--{flag} {found}`, not {wanted[flag]}"
                raise ValueError(f"{problem}. Train with the same, or make others with embed_prompts.py.")
    return dataset


def check_reward(args):
    """Fills in the reward's paths and refuses what is not its model. Returns the [`fingerprint`] of a layer."""
    if args.reward_model == "HPS":
        with input_error(f"Without `--reward_model_path`, {HPS_FILE} is needed from the Hub, which failed"):
            path = args.reward_model_path or huggingface_hub.hf_hub_download(HPS_REPOSITORY, HPS_FILE)
        args.reward_model_path, flag = path, f"`--reward_model_path {path}`"
        if not os.path.isfile(path):
            raise ValueError(f"{flag} is not a file. Run `hf download {HPS_REPOSITORY} {HPS_FILE} --local-dir .`")
        with input_error(f"{flag} is not a checkpoint with a `state_dict`"):
            weights = HPSReward.read_weights(path)
            shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        with input_error(f"{flag} is not of the architecture {HPS_ARCHITECTURE}"):
            check_weights(HPSReward.empty_model(), shapes)
        return fingerprint(weights[REWARD_LAYER])
    if args.reward_model == "PickScore":
        args.reward_processor_path = args.reward_processor_path or PICKSCORE_PROCESSOR
        args.reward_model_path = args.reward_model_path or PICKSCORE_REPOSITORY
    if (path := args.reward_model_path) is None:
        raise ValueError("`--reward_model CLIP` needs `--reward_model_path`, the folder or Hub id of a CLIPModel.")
    args.reward_processor_path = processor = args.reward_processor_path or path
    with input_error(f"`--reward_model_path {path}` is not the folder or Hub id of a CLIPModel"):
        config = transformers.AutoConfig.from_pretrained(path)
        if config.model_type != "clip":
            raise ValueError(f"it is of type `{config.model_type}`, and {args.reward_model} needs type `clip`")
        where = {"pretrained_model_name_or_path": path}, "", TRANSFORMERS_STEM
        with torch.device("meta"):
            check_weights(transformers.CLIPModel(config), read_shapes(weight_files(*where)))
    with input_error(f"`--reward_processor_path {processor}` is not the folder or Hub id of a whole processor"):
        # Without these files transformers makes a tokenizer of its own, which knows no words.
        find = partial(transformers.utils.cached_file, processor, _raise_exceptions_for_missing_entries=False)
        if not (find("tokenizer.json") or (find("vocab.json") and find("merges.txt"))):
            raise ValueError("it has neither `tokenizer.json` nor `vocab.json` and `merges.txt`")
        words = {*args.positive_words, *args.negative_words}
        tokens = transformers.CLIPProcessor.from_pretrained(processor).tokenizer([*words]).input_ids
        if len({*map(tuple, tokens)}) < len(words) or max(map(max, tokens)) >= config.text_config.vocab_size:
            raise ValueError("its tokenizer is not the model's, or makes the same of different control words")
    return weights_fingerprint(*where, f"{REWARD_LAYER}.weight")


def check_output_dir(output, resume_from, overwrite, inputs):
    """Refuses a folder that is something else or holds an input of the run, and a checkpoint that is not there."""
    flag = f"`--output_dir {output}`"
    with input_error(f"{flag} cannot be used"):
        found = {path.name for path in output.iterdir()} if os.path.lexists(output) else set()
        saved, is_named = list_checkpoints(output), resume_from not in (None, "latest")
    for name, path in inputs.items():
        path = Path(path or os.devnull).resolve()
        if os.path.exists(path) and output.resolve() in (path, *path.parents):
            raise ValueError(f"`--{name} {path}` lies in {flag}. Choose another folder to write to.")
    if is_named and (Path(resume_from).suffix == ".unfinished" or not os.path.isfile(Path(resume_from, STATE_FILE))):
        has = f"`output_dir` has {', '.join(map(str, saved)) or 'none'}"
        raise ValueError(f"`--resume_from_checkpoint {resume_from}` is not a complete checkpoint; {has}.")
    if found and (MARKER not in found or "dataset_dict.json" in found):
        raise ValueError(f"{flag} is not empty, and not the folder of a run. Choose another.")
    if resume_from == "latest" and not saved and found & {*EXPERTS, LORA_FILE}:
        raise ValueError(f"{flag} has results, but no checkpoint to resume from. Choose another.")
    if found - {MARKER} and not (resume_from or overwrite):
        advice = "continue its run with `--resume_from_checkpoint latest`, or delete it with `--overwrite_output_dir`"
        raise ValueError(f"{flag} is not empty. Choose another, {advice}.")


def check_deepspeed(args, config, num_processes):
    """Refuses a DeepSpeed file that contradicts the flags, and flags that DeepSpeed cannot follow."""
    if args.optimizer == "adamw_8bit" or args.base_weights == "fp8":
        raise ValueError("`--optimizer adamw_8bit` and `--base_weights fp8` need a configuration without DeepSpeed.")
    if args.compile and config["zero_optimization"]["stage"] == 3:
        raise ValueError("`--compile` needs whole weights; under ZeRO-3 they come and go while a block runs.")
    if section := {"optimizer", "scheduler"} & config.keys():
        raise ValueError(f"The DeepSpeed file has a `{min(section)}`. Remove it: the script has flags for that.")
    batch, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    for name, value, flag in (
        ("train_micro_batch_size_per_gpu", batch, "train_batch_size"),
        ("gradient_accumulation_steps", accumulation, "gradient_accumulation_steps"),
        ("train_batch_size", batch * num_processes * accumulation, "train_batch_size"),
        ("gradient_clipping", args.max_grad_norm, "max_grad_norm"),
    ):
        if config.get(name, "auto") not in ("auto", value):
            problem = f"The DeepSpeed file says `{name}` {config[name]}, but `--{flag}` and {num_processes} processes"
            raise ValueError(f'{problem} make it {value}. Write "auto" into the file, or change the flag.')


# ---- 12. Set-up, and the run. ---------------------------------------------------------------------------------------
def make_accelerator(args):
    """The [`Accelerator`] of the run, with DeepSpeed's settings filled in from the flags. Sets up libraries, too."""
    diffusers.utils.check_min_version("0.40.0")
    console = logging.StreamHandler(DummyTqdmFile(sys.stderr))  # above the bars
    console.setLevel(logging.INFO)
    logging.basicConfig(format=LOG_FORMAT, datefmt="%m/%d/%Y %H:%M:%S", handlers=[console])
    logger.setLevel(logging.DEBUG)
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # attention whose gradient is not deterministic
        torch.backends.cuda.enable_cudnn_sdp(False)
    on_cpu, uses_deepspeed = not torch.accelerator.is_available(), os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    os.environ |= {"DS_ACCELERATOR": "cpu"} if on_cpu else {}  # DeepSpeed would warn that it chose it
    # The others wait while one process downloads or writes a model. On CPUs DeepSpeed must not look for NCCL.
    group = {"timeout": timedelta(hours=2), **({"backend": "gloo"} if on_cpu and uses_deepspeed else {})}
    options = {"cpu": on_cpu and not uses_deepspeed, "kwargs_handlers": [InitProcessGroupKwargs(**group)]}
    options["project_config"] = ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir)))
    options["log_with"] = None if args.report_to == "none" else args.report_to
    options["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    options["step_scheduler_with_optimizer"] = False  # the rate follows updates, not updates times processes
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    with input_error(f"`accelerate launch` and its configuration files (DeepSpeed: `{file}`) cannot be used together"):
        accelerator = Accelerator(**options)
    if accelerator.mixed_precision == "fp16":
        raise ValueError("`mixed_precision: fp16` is too narrow for Wan's transformer. Use bf16.")
    if accelerator.deepspeed_plugin:
        config = accelerator.deepspeed_plugin.deepspeed_config
        check_deepspeed(args, config, accelerator.num_processes)
        # "auto" in the JSON would become 1.0, whatever `--max_grad_norm` says, and DeepSpeed does the clipping.
        config |= {"gradient_clipping": args.max_grad_norm, "train_micro_batch_size_per_gpu": args.train_batch_size}
        # Under ZeRO-3 transformers would partition the reward model as it loads it; frozen models stay whole.
        transformers.integrations.unset_hf_deepspeed_config()
    return accelerator


def make_run(accelerator, args, dtype, trained, dataset, hashes):
    """The [`Run`] of `trained` weights. Flags, captions, and models by their `hashes` decide its result."""
    engine, bytes_per_weight = "without DeepSpeed", 4.1 if args.optimizer == "adamw_8bit" else 12
    if accelerator.deepspeed_plugin:
        config, masters = accelerator.deepspeed_plugin.deepspeed_config, "bf16_master_weights_and_grads"
        zero, masters = config["zero_optimization"], [masters] if config.get("bf16", {}).get(masters) else []
        offloads = [name for name in ("offload_param", "offload_optimizer") if name in zero]
        engine, bytes_per_weight = ", ".join([f"ZeRO-{zero['stage']}", *offloads, *masters]), 8 if masters else 14
    captions = json.dumps([list(rows["caption"]) for rows in dataset.values()]).encode()
    identity = {"engine": engine, "mixed_precision": accelerator.mixed_precision, **hashes}
    identity |= {"num_processes": accelerator.num_processes, "dataset": hashlib.sha256(captions).hexdigest()[:16]}
    identity |= {name: value for name, value in vars(args).items() if name not in (*FREE_FLAGS, *PATH_FLAGS)}
    if not args.lr_scheduler.startswith("constant"):
        identity["max_train_steps"] = args.max_train_steps
    repo_id, size = args.hub_model_id or Path(args.output_dir).resolve().name, bytes_per_weight * trained
    if args.push_to_hub and accelerator.is_main_process:
        options = {"repo_id": repo_id, "private": args.hub_private_repo, "exist_ok": True}
        with input_error(f"`--push_to_hub` cannot create `{repo_id}`; see `--hub_model_id`, and `hf auth whoami`"):
            repo_id = with_retries(lambda: huggingface_hub.create_repo(**options)).repo_id
    return Run(Path(args.output_dir), vars(args), args.transformer_subfolder, dtype, identity, size, repo_id)


def catch_signals(handler, _worker=None):
    """Sets what this process, the run or one that loads data for it, does when it gets SIGTERM or Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def remember_signal(received, speaks, number, _frame):
    """What a signal does. Before the first update, when `received` is empty, it ends the run; later the update at hand
    is finished and saved first, except that a second Ctrl-C ends the run at once, as if it were killed."""
    again = number == signal.SIGINT in received
    what = "the run ends" if again or not received else "this update will be finished and saved; Ctrl-C again ends now"
    message = f"\n{signal.Signals(number).name}: {what}.\n"
    if speaks:
        os.write(sys.stderr.fileno(), message.encode())  # a handler must not print
    if again or not received:
        (os._exit if again else sys.exit)(128 + number)
    received.append(number)


def set_up_transformer(transformer, args):
    """Decides what of a transformer is trained, and how it is stored and computed. Returns it, without dropout yet."""
    transformer.requires_grad_(args.lora_rank is None)
    dtype = transformer.dtype
    if args.lora_rank is not None:
        options = {"lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, "init_lora_weights": "gaussian"}
        transformer.add_adapter(peft.LoraConfig(r=args.lora_rank, target_modules=args.lora_target_modules, **options))
        diffusers.training_utils.cast_training_params(transformer, torch.float32)
    if args.base_weights == "fp8":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile_repeated_blocks()
    return transformer.eval()


def load_models(accelerator, args, model, dtypes, negative_prompt_embeds):
    """The [`Models`] of the flags; see [`choose_dtypes`] for `dtypes`."""
    device, (weight_dtype, transformer_dtype) = accelerator.device, dtypes
    vae = diffusers.AutoencoderKLWan.from_pretrained(**model.source, subfolder="vae", dtype=weight_dtype)
    expert = {**model.source, "subfolder": model.expert, "dtype": transformer_dtype}
    transformer = diffusers.WanTransformer3DModel.from_pretrained(**expert)
    options = {"device": device, "dtype": torch.bfloat16 if args.reward_dtype == "bf16" else torch.float32}
    kind = HPSReward if args.reward_model == "HPS" else partial(CLIPReward, processor_path=args.reward_processor_path)
    reward = kind(args.reward_model_path, **options)
    for name, module in {PATH_FLAGS[0]: torch.nn.ModuleList([vae, transformer]), "reward_model_path": reward}.items():
        require_finite(module, f"`--{name} {vars(args)[name]}`")
    flatten_vae(vae).requires_grad_(False).eval().to(device)
    torch.manual_seed(args.seed)  # all processes make the same LoRA
    keep_rotary_tables(set_up_transformer(transformer, args), device)
    scheduler = make_scheduler(args.rollout_scheduler, args.rollout_shift or model.flow_shift)
    boundary = model.boundary_ratio if args.rollout_start == "boundary" else None
    solver = Solver(scheduler, args.sampling_steps, args.rollout_guidance_scale, boundary)
    token_patch = model.transformer.config.patch_size if model.expand_timesteps else None
    return Models(transformer, vae, reward, solver, negative_prompt_embeds, token_patch)


def make_optimizer(args, parameters):
    """AdamW over the trainable ones of `parameters`. DeepSpeed replaces it by its own if that runs on the CPU."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = partial(torch.optim.AdamW, fused=True)  # one kernel for all weights
    if args.optimizer == "adamw_8bit":
        # An update of 5e-6 is less than half a bf16 unit of most weights: rounded to the nearest, it would be lost.
        optimizer = partial(torchao_optim.AdamW8bit, bf16_stochastic_round=True)
    adam = (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.adam_weight_decay
    return optimizer(parameters, args.learning_rate, *adam)


def make_validation(args, dataset, collate, model):
    """The [`Validation`] of the flags, or `None` if nothing is to be painted. It needs no text encoder."""
    train = list(dataset["train"]["caption"])
    rows = {row["caption"]: row for row in dataset.get("validation", ())}
    captions = list(rows) or list(dict.fromkeys(train))[:4]
    captions = captions if args.validation_prompts is None else args.validation_prompts
    if not captions:
        return None
    rows = [rows.get(caption) or dataset["train"][train.index(caption)] for caption in captions]
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(**model.source, subfolder="scheduler")
    solver = Solver(scheduler, args.num_inference_steps, args.validation_guidance_scale)
    shape, folder = model.latent_shape(args.validation_size, args.validation_size), Path(args.output_dir, "images")
    settings = args.train_batch_size, folder, args.validation_steps, args.max_train_steps
    return Validation(captions, collate(rows)["prompt_embeds"], solver, shape, *settings)


def skip_update(accelerator, recipe, rollouts, run, state):
    """Tells captions and noise levels of an update that was left out as not finite. Too many of them end the run."""
    state.skipped, rows, file = state.skipped + 1, [], run.output_dir / SKIPPED_FILE
    for rollout in rollouts:
        branches = plan_update(recipe, state.step - 1, rollout.samples).branches
        levels = {each.name: [each.sigma_from.tolist(), each.sigma_to.tolist()] for each in branches}
        rows.append(json.dumps({"step": state.step, "captions": rollout.captions, **levels}) + "\n")
    lines, problem = "".join(gather_object(rows)), f"update {state.step} is skipped: loss or gradient is not finite"
    logger.warning(f"{problem}. See {file}.")
    logger.debug(lines)
    if accelerator.is_main_process:
        with file.open("a") as stream:
            stream.write(lines)
    if state.skipped >= run.flags["max_skipped_updates"]:
        last = (list_checkpoints(run.output_dir) or ["the base model"])[-1]
        raise SystemExit(f"error: {problem}. See {file}, and `--max_skipped_updates`. The last good state is {last}.")


def gather_means(accelerator, metrics, received):
    """The means of {name: tensor ()} over all processes, as floats, and a signal that one of them `received`, or 0."""
    received = torch.tensor(float(received), device=accelerator.device)
    gathered = accelerator.gather(torch.stack([*metrics.values(), received])[None])
    *means, received = torch.cat([gathered.mean(0)[:-1], gathered.max(0).values[-1:]]).tolist()
    return dict(zip(metrics, means, strict=True)), int(received)


def load_batches(sampler, rows, collate, device, num_workers):
    """Yields, of each micro-batch of a process, the numbers of its samples and what `collate` makes of their rows."""
    options = {"batch_sampler": sampler, "collate_fn": collate, "pin_memory": device.type == "cuda"}
    options["worker_init_fn"] = partial(catch_signals, signal.SIG_IGN)
    loader = torch.utils.data.DataLoader(rows, num_workers=num_workers, **options)
    yield from zip(map(sampler.samples, sampler.numbers), loader, strict=True)


def main(args):
    signals, stopped_by = [], 0
    catch_signals(partial(remember_signal, signals, int(os.environ.get("RANK", 0)) == 0))
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    with ExitStack() as held:
        # 1. Refuse what cannot succeed before any model is loaded, and hold the output folder until the end.
        with one_line_errors():
            inputs = {name: vars(args)[name] for name in PATH_FLAGS}
            check_output_dir(Path(args.output_dir), args.resume_from_checkpoint, args.overwrite_output_dir, inputs)
            model = read_model_info(args)
            trained = check_flags_for_model(args, model)
            dataset = check_dataset(args, model)
            hashes = {"reward": check_reward(args), "base_model": check_model_files(model)}
            accelerator = make_accelerator(args)
            device, uses_deepspeed = accelerator.device, accelerator.deepspeed_plugin is not None
            dtypes = choose_dtypes(accelerator.mixed_precision, args.optimizer, args.lora_rank, uses_deepspeed)
            run = make_run(accelerator, args, dtypes[0], trained, dataset, hashes)
            checkpoint, state = find_checkpoint(accelerator, run)
            if accelerator.is_main_process:
                size = 0 if args.overwrite_output_dir else run.checkpoint_size  # overwriting makes room
                held.enter_context(claim_output_dir(run.output_dir, size))
            accelerator.wait_for_everyone()
            # 2. Load models and data. Captions were encoded before, so the text encoder stays on disk.
            collate = partial(collate_fn, max_sequence_length=args.max_sequence_length, dtype=dtypes[1])
            negative = collate([dataset["negative"][0]])["prompt_embeds"].to(device)
            models = load_models(accelerator, args, model, dtypes, negative)
        recipe, validation = make_recipe(vars(args)), make_validation(args, dataset, collate, model)
        partition_weights(accelerator, models.transformer, dtypes[0])
        optimizer = make_optimizer(args, models.transformer.parameters())
        transformer, optimizer = accelerator.prepare(models.transformer, optimizer)
        base = load_base(accelerator, model, dtypes[0]) if args.drift_weight and args.lora_rank is None else None
        models = models._replace(transformer=transformer, base=base)
        # With offload, DeepSpeed's AdamW for the CPU replaces the optimizer; the schedule sets the rate of that one.
        adam = optimizer.optimizer.optimizer if uses_deepspeed else optimizer.optimizer
        recompute_bias_correction(adam)
        if args.lora_rank is not None:
            accelerator.register_save_state_pre_hook(keep_lora_only)
        if accelerator.is_main_process:
            begin_output(run)
        accelerator.wait_for_everyone()
        accelerator.init_trackers(TRACKER_NAME, config={name: str(value) for name, value in vars(args).items()})
        # 3. Paint what the base model paints, and go on where a checkpoint stands.
        if checkpoint is not None:
            if validation is not None and not (validation.folder / "step-0" / "scores.json").is_file():
                validate(accelerator, models, recipe, validation, RunState())
            with one_line_errors():
                load_checkpoint(accelerator, adam, checkpoint, is_lora=args.lora_rank is not None)
            logger.info(f"Resumed from {checkpoint} at step {state.step}")
        schedule = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
        schedule["last_epoch"] = state.step - 1  # the rate is a function of the step, so no checkpoint holds it
        lr_scheduler = diffusers.optimization.get_scheduler(args.lr_scheduler, adam, **schedule)
        validate(accelerator, models, recipe, validation, state)
        # 4. What an update is made of.
        shape = model.latent_shape(args.height, args.width)
        accumulation, reuses = args.gradient_accumulation_steps, args.updates_per_rollout
        numbers = range(state.step // reuses * accumulation, args.max_train_steps // reuses * accumulation)
        share = args.train_batch_size, accelerator.process_index, accelerator.num_processes
        sampler = SampleSampler(len(dataset["train"]), args.seed, numbers, *share)
        columns = ["caption", "prompt_embeds", *(BOUNDARY_COLUMNS if args.rollout_start == "boundary" else ())]
        rows = dataset["train"].select_columns(columns).with_format("numpy")
        batches = load_batches(sampler, rows, collate, device, args.dataloader_num_workers)
        held.callback(batches.close)  # ends the processes that load data, which ignore all signals
        samples_per_update = args.train_batch_size * accelerator.num_processes * accumulation
        logger.info(f"Training to update {args.max_train_steps}, each on {samples_per_update} of {len(rows)} captions")
        progress_bar = tqdm(total=args.max_train_steps, initial=state.step, desc="Steps")
        signals.append(0)  # from now on a signal lets the update at hand be finished and saved
        for step in range(state.step, args.max_train_steps):
            started = time.perf_counter()
            group, reuse = divmod(step, reuses)
            # 5. Clean latents, rolled out without gradient. Several updates may share them.
            if reuse == 0:
                batch_size = args.rollout_batch_size or args.train_batch_size
                rollouts = make_rollouts(models, islice(batches, accumulation), recipe, shape, group, batch_size)
            elif args.renew_noise:
                new = (draw_noise(recipe, shape, group, rollout.samples, reuse) for rollout in rollouts)
                rollouts = [each._replace(noise=next(new).to(device, non_blocking=True)) for each in rollouts]
            # 6. Inject noise, step, recover, decode, score, back-propagate, update; and log.
            metrics = update(accelerator, models, optimizer, rollouts, recipe, step)
            logs, received = gather_means(accelerator, metrics, signals[-1])
            seconds, host = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else host
            logs |= {"lr": float(lr_scheduler.get_last_lr()[0]), "seconds": seconds}
            logs |= {"images_per_second": samples_per_update / seconds, "peak_memory_gb": peak / 1e9}
            lr_scheduler.step()
            state.step += 1
            if np.isfinite(list(logs.values())).all():
                state.history.append({"step": state.step, **logs})
                accelerator.log(logs, step=state.step)
                logger.debug(f"step {state.step}: " + ", ".join(f"{name} {logs[name]:.5g}" for name in logs))
                progress_bar.set_postfix(loss=f"{logs['loss']:.4f}", reward=f"{logs['reward_positive']:.4f}")
            else:
                skip_update(accelerator, recipe, rollouts, run, state)
            progress_bar.update(1)
            # 7. Images and checkpoints. A rollout is not saved, so it is used up before the run stops.
            stopped_by = received if reuse == reuses - 1 else 0
            if not stopped_by:
                validate(accelerator, models, recipe, validation, state)
            if state.step % args.checkpointing_steps == 0 or stopped_by or state.step == args.max_train_steps:
                save_checkpoint(accelerator, transformer, run, state)
                if args.hub_strategy != "end" and not stopped_by and state.step < args.max_train_steps:
                    save_results(accelerator, transformer, run, state)
            if stopped_by:
                break
        progress_bar.close()
        if not stopped_by:
            save_results(accelerator, transformer, run, state)
        accelerator.end_training()  # the other processes may go, while uploads take as long as they take
        for upload in state.uploads:
            upload.result()
    if stopped_by:
        what = f"Stopped by {signal.Signals(stopped_by).name} after {state.step} updates, which are saved."
        logger.warning(f"{what} Continue with the same command and `--resume_from_checkpoint latest`.")
        raise SystemExit(128 + stopped_by)
    scores = [f"{row['validation_relative']:.4f}" for row in state.history if "validation_relative" in row]
    change = f", relative reward {scores[0]} -> {scores[-1]}" if scores else ""
    logger.info(f"Finished: {state.step} updates, {state.skipped} of them skipped{change}. See {run.output_dir}")


if __name__ == "__main__":
    main(parse_args())
