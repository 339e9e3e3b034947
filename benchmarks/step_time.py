#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
What an update costs: a plain implementation of the published loop beside this trainer, in one process and in turns.

    python benchmarks/step_time.py

The model is random and has the proportions of Wan2.2-T2V-A14B at 512 x 512, scaled down: by `--num_heads`,
`--num_layers` and the number of tokens, with as many text tokens and as costly a VAE and reward model relative to them
as the real one. The settings that are compared:

    plain     25 Euler steps with guidance, prompt by prompt, branch by branch, stock VAE
    default   this trainer without flags of speed
    fast      this trainer with the flags of `FAST`

Prints seconds, forwards of the transformer and FLOP per update, and each station's share of the time. Writes
`outputs/benchmarks/step_time.json`.
"""

import argparse
import json
import platform
import shutil
import statistics

import torch
from measure import (
    DEVICE,
    FAST,
    MINIATURE,
    PLAIN,
    ROOT,
    Anatomy,
    PlainLoop,
    embed_captions,
    matrix_product_rate,
    run_trainer,
)
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, UMT5Config, UMT5EncoderModel

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from train_srpo_wan_t2i import make_scheduler


STATIONS = ("rollout", "graded pass", "decode", "reward", "optimizer", "other")


def make_model(folder, num_heads, num_layers, size, vae_base_dim):
    """A random model with the real one's proportions, a reward model and 28 embedded captions; returns their flags."""
    torch.manual_seed(0)
    base = WanPipeline.from_pretrained(MINIATURE / "model", transformer=None, transformer_2=None, vae=None)
    dim, tokens = 128 * num_heads, (size // 16) ** 2
    text_dim, max_sequence_length = dim * 4 // 5 // 8 * 8, tokens // 2
    sizes = {"d_model": text_dim, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 32}
    transformer = WanTransformer3DModel(
        num_attention_heads=num_heads, num_layers=num_layers, ffn_dim=dim * 27 // 10, text_dim=text_dim
    )
    vae = AutoencoderKLWan(base_dim=vae_base_dim)
    pipeline = WanPipeline(
        tokenizer=base.tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(base.tokenizer), **sizes)),
        vae=vae,
        scheduler=make_scheduler("unipc", 3.0),
        transformer=WanTransformer3DModel(num_layers=1, num_attention_heads=1, ffn_dim=8, text_dim=text_dim),
        transformer_2=transformer,
        boundary_ratio=0.875,
    )
    for parameter in transformer.parameters():  # diffusers starts the last layer at 0, through which nothing is learnt
        if parameter.std() == 0:
            torch.nn.init.normal_(parameter, std=0.02)
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder / "model")
    config = CLIPConfig.from_pretrained(MINIATURE / "reward")
    config.vision_config.update({"patch_size": 4, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4})
    CLIPModel(config).save_pretrained(folder / "reward")
    CLIPProcessor.from_pretrained(MINIATURE / "reward").save_pretrained(folder / "reward")
    source = ["--pretrained_model_name_or_path", folder / "model", "--max_sequence_length", max_sequence_length]
    embeddings = embed_captions(folder, source, every=4)
    return [*source, "--dataset_name", embeddings, "--reward_model", "CLIP"] + [
        *("--reward_model_path", folder / "reward", "--height", size, "--width", size)
    ]


def main(args):
    folder = args.output_dir / "step_time"
    flags = make_model(folder, args.num_heads, args.num_layers, args.size, args.vae_base_dim)
    flags += ["--train_batch_size", args.train_batch_size, "--output_dir", folder / "run", "--overwrite_output_dir"]
    flags += ["--report_to", "none", "--validation_size", args.size, "--checkpointing_steps", 1000]

    def plain(updates):
        loop = PlainLoop([*flags, *PLAIN, "--max_train_steps", updates])
        return [loop.update(step) for step in range(updates)]

    def train(updates, *settings):
        return run_trainer([*flags, *settings, "--max_train_steps", updates, "--validation_prompts"])

    runs = {
        "plain": (1, plain),
        "default": (1, train),
        "fast": (FAST[-1], lambda updates: train(updates, *FAST)),  # as many updates as a rollout is used for
    }
    result = {"device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()}
    rate = matrix_product_rate()
    for name, (updates, run) in runs.items():
        with Anatomy().watch() as anatomy:
            total = sum(run(updates))
        anatomy.seconds["other"] = total - sum(anatomy.seconds.values())
        shares = {station: anatomy.seconds[station] / total for station in STATIONS}
        result[name] = {"forwards": anatomy.forwards / updates, "flop": anatomy.flop / updates, "shares": shares}
    seconds = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, (updates, run) in runs.items():
            seconds[name].append(statistics.mean(run(updates)))

    print(f"\n{'':10}{'seconds':>9}{'forwards':>10}{'TFLOP':>8}{'of a matmul':>13}", end="")
    print("".join(f"{station:>13}" for station in STATIONS))
    for name in runs:
        row = result[name]
        row["seconds"] = statistics.median(seconds[name])
        row["mfu"] = row["flop"] / row["seconds"] / rate
        print(
            f"{name:10}{row['seconds']:9.3f}{row['forwards']:10.1f}{row['flop'] / 1e12:8.3f}{row['mfu']:13.1%}", end=""
        )
        print("".join(f"{row['shares'][station]:13.1%}" for station in STATIONS))
    for name in ("default", "fast"):
        # Each turn is compared with its neighbours; the machine may be slower in another.
        turns = [a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)]
        result[f"ratio_{name}"] = statistics.median(turns)
        result[f"flop_ratio_{name}"] = result["plain"]["flop"] / result[name]["flop"]
        print(
            f"plain / {name}: {result[f'ratio_{name}']:.2f} in seconds ({min(turns):.2f} to {max(turns):.2f} in "
            f"{args.rounds} turns), {result[f'flop_ratio_{name}']:.2f} in FLOP"
        )
    (args.output_dir / "step_time.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=lambda path: ROOT / path, default=ROOT / "outputs" / "benchmarks")
    parser.add_argument("--rounds", type=int, default=3, help="Turns of each setting.")
    parser.add_argument("--train_batch_size", type=int, default=2, help="Prompts of an update.")
    parser.add_argument("--num_heads", type=int, default=4, help="Attention heads of 128; the real model has 40.")
    parser.add_argument("--num_layers", type=int, default=8, help="Blocks of the transformer; the real model has 40.")
    parser.add_argument("--size", type=int, default=256, help="Side of the images in pixels.")
    parser.add_argument("--vae_base_dim", type=int, default=4, help="Channels of the VAE; the real model's is 96.")
    main(parser.parse_args())
