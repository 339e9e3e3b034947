# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the trainer as a function, a plain implementation of the published loop, and counters."""

import os
import re
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from unittest import mock

import torch
import yaml
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel


ROOT = Path(__file__).resolve().parent.parent
MINIATURE = ROOT / "tests" / "miniature"
sys.path += [str(ROOT), str(ROOT / "tests"), str(MINIATURE)]

import embed_prompts  # noqa: E402
import train_srpo_wan_t2i as trainer  # noqa: E402
from drawings import captions  # noqa: E402


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Flags of the settings that are compared: the published rollout, and what this trainer can do without.
PLAIN = ("--sampling_steps", 25, "--rollout_scheduler", "euler")
FAST = ("--sampling_steps", 8, "--updates_per_rollout", 4)
MIXED_PRECISION = "bf16" if DEVICE.type == "cuda" else "no"


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def embed_captions(folder, source, every=1):
    """Embeds every nth caption of the miniature with the model that the flags `source` name; returns the dataset."""
    (folder / "prompts.yaml").write_text(yaml.safe_dump({"prompts": captions()[::every]}))
    flags = [*source, "--prompts", folder / "prompts.yaml", "--output_dir", folder / "embeddings"]
    embed_prompts.main(embed_prompts.parse_args([str(flag) for flag in flags]))
    return folder / "embeddings"


def run_trainer(flags):
    """Runs the training script in this process, on one device; returns the seconds of each update."""
    args = trainer.parse_args([str(flag) for flag in flags])
    environment = {"ACCELERATE_USE_CPU": str(DEVICE.type == "cpu"), "ACCELERATE_MIXED_PRECISION": MIXED_PRECISION}
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ, environment):
        trainer.main(args)
    log = Path(args.output_dir, "train.log").read_text()
    return [float(seconds) for seconds in re.findall(r"step \d+: .*, seconds ([\d.e+-]+)", log)]


class PlainLoop:
    """
    The published training loop on Wan, as plainly as it can be written: prompt by prompt and branch by branch, rollout
    by Euler steps with two forward passes for guidance, the stock VAE, AdamW as it comes. It takes the trainer's flags
    and makes the same draws. Source of the formulas: the SRPO paper and fastvideo/SRPO.py of its repository.
    """

    def __init__(self, flags):
        self.args = args = trainer.parse_args([str(flag) for flag in flags])
        trainer.check_reward(args)
        self.model = trainer.read_model_info(args)
        self.recipe = trainer.make_recipe(vars(args))
        dataset = trainer.load_prompt_dataset(args.dataset_name)
        dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
        source = self.model.source
        self.transformer = WanTransformer3DModel.from_pretrained(**source, subfolder=self.model.expert).to(DEVICE)
        self.vae = AutoencoderKLWan.from_pretrained(**source, subfolder="vae", dtype=dtype).to(DEVICE)
        self.vae.requires_grad_(False)
        self.reward = trainer.CLIPReward(args.reward_model_path, args.reward_processor_path, DEVICE)
        self.optimizer = torch.optim.AdamW(
            self.transformer.parameters(),
            args.learning_rate,
            (args.adam_beta1, args.adam_beta2),
            args.adam_epsilon,
            args.adam_weight_decay,
        )
        collate = partial(
            trainer.collate_fn, max_sequence_length=args.max_sequence_length, dtype=self.transformer.dtype
        )
        rows, numbers = dataset["train"], range(args.max_train_steps)
        sampler = trainer.SampleSampler(len(rows), args.seed, numbers, args.train_batch_size)
        self.samples = sampler.samples
        self.batches = (collate([rows[index] for index in batch]) for batch in sampler)
        self.negative = collate([dataset["negative"][0]])["prompt_embeds"].to(DEVICE)

    def velocity(self, latents, sigma, prompt_embeds):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            return trainer.transformer_velocity(self.transformer, latents, sigma, prompt_embeds)

    @torch.no_grad()
    def rollout(self, latents, prompt_embeds):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=self.args.rollout_shift or self.model.flow_shift)
        scheduler.set_timesteps(self.args.sampling_steps, device=DEVICE)
        for timestep in scheduler.timesteps:
            velocity = self.velocity(latents, timestep / 1000, prompt_embeds)
            negative = self.velocity(latents, timestep / 1000, self.negative)
            velocity = negative + self.args.rollout_guidance_scale * (velocity - negative)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents

    def decode(self, latents):
        mean, std = (
            torch.tensor(values, device=DEVICE).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return self.vae.decode((latents * std + mean).to(self.vae.dtype)).sample[:, :, 0].float() / 2 + 0.5

    def branch_loss(self, branch, x0, noise, prompt_embeds, texts):
        """The loss of one sample in one branch; `texts` are its captions with the positive and the negative word."""
        x0_hat = trainer.direct_align_step(
            lambda x, sigma: self.velocity(x, sigma, prompt_embeds), x0, noise, branch.sigma_from, branch.sigma_to
        )
        features = self.reward.encode_images(self.decode(x0_hat))
        towards, away = (self.reward.encode_texts([text]) for text in (texts[::-1] if branch.swap else texts))
        score = self.reward.scale * trainer.srp_score(features, towards, away, branch.discount.to(DEVICE))
        return trainer.srpo_loss(score, self.args.reward_margin)

    def update(self, step):
        """One update; returns its seconds."""
        args = self.args
        synchronize()
        started = time.perf_counter()
        batch, samples = next(self.batches), self.samples(step)
        shape = self.model.latent_shape(args.height, args.width)
        noises = trainer.draw_noise(self.recipe, shape, step, samples).to(DEVICE)
        rows = zip(samples, batch["captions"], batch["prompt_embeds"], noises, strict=True)
        for sample, caption, prompt_embeds, noise in rows:
            plan = trainer.plan_update(self.recipe, step, [sample])
            prompt_embeds, noise = prompt_embeds[None].to(DEVICE), noise[None]
            x0 = self.rollout(noise, prompt_embeds)
            texts = [f"{word}. {caption}" for word in (plan.positive_word, plan.negative_word)]
            for branch in plan.branches:
                loss = self.branch_loss(branch, x0, noise, prompt_embeds, texts)
                (loss / (len(plan.branches) * len(samples))).backward()
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize()
        return time.perf_counter() - started


class Anatomy:
    """What a run spends where: seconds by station, forwards of the transformer in samples, and FLOP."""

    def __init__(self):
        self.seconds, self.forwards, self.flop = Counter(), 0, 0
        self.last = 0.0

    def lap(self, station):
        synchronize()
        now = time.perf_counter()
        self.seconds[station] += now - self.last
        self.last = now

    def timed(self, station, function):
        @wraps(function)
        def call(*args, **kwargs):
            synchronize()
            self.last = time.perf_counter()
            result = function(*args, **kwargs)
            self.lap(station)
            return result

        return call

    def decoded(self, function):
        """Decoding in the graded pass also marks where, in the backward pass, one station hands over to the next."""

        @wraps(function)
        def call(*args, **kwargs):
            latents = args[-1]
            result = function(*args, **kwargs)
            if latents.requires_grad:
                pixels = result[0] if isinstance(result, tuple) else result
                pixels.register_hook(lambda _: self.lap("reward"))
                latents.register_hook(lambda _: self.lap("decode"))
            return result

        return call

    def counted(self, function):
        @wraps(function)
        def call(model, hidden_states, *args, **kwargs):
            self.forwards += len(hidden_states)
            return function(model, hidden_states, *args, **kwargs)

        return call

    @contextmanager
    def watch(self):
        """Within it, everything that the trainer or the plain loop does is counted."""
        stations = [
            (trainer, "paint_latents", "rollout"),
            (PlainLoop, "rollout", "rollout"),
            (trainer, "direct_align_step", "graded pass"),
            (trainer, "decode_latents", "decode"),
            (PlainLoop, "decode", "decode"),
            (trainer.RewardModel, "encode_images", "reward"),
            (trainer.RewardModel, "encode_texts", "reward"),
            (torch.Tensor, "backward", "graded pass"),
            (torch.optim.AdamW, "step", "optimizer"),
        ]
        with ExitStack() as stack:
            for owner, name, station in stations:
                function = self.timed(station, getattr(owner, name))
                function = self.decoded(function) if station == "decode" else function
                stack.enter_context(mock.patch.object(owner, name, function))
            forward = self.counted(WanTransformer3DModel.forward)
            stack.enter_context(mock.patch.object(WanTransformer3DModel, "forward", forward))
            counter = stack.enter_context(FlopCounterMode(display=False))
            yield self
        self.flop = counter.get_total_flops()


def matrix_product_rate():
    """FLOP per second of a large matrix product on this device, in the precision of the run."""
    size, dtype = (8192, torch.bfloat16) if DEVICE.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        synchronize()
        started = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
