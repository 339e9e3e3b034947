#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
What an effect costs: seconds and FLOP until 85 % of the miniature's images are in the real style.

    python benchmarks/effect.py

The plain implementation of the published loop and this trainer at fast settings train the miniature as `make demo`
does, with the same draws, and are judged every four updates: `WanPipeline` paints 224 images, and a judge tells style
and caption from their pixels. Only updates count, not judging, loading and saving. Writes
`outputs/benchmarks/effect.json`.
"""

import argparse
import json
import shlex
import shutil

import torch
import yaml
from measure import DEVICE, MINIATURE, ROOT, Anatomy, PlainLoop, run_trainer
from safetensors.torch import load_file

from diffusers import WanTransformer3DModel

import embed_prompts
from demo import TRAINING, judge
from drawings import MAX_SEQUENCE_LENGTH, captions


SHARE, EVERY, LONGEST = 0.85, 4, 48
PLAIN = ("--sampling_steps", 25, "--rollout_scheduler", "euler")
FAST = ("--sampling_steps", 8, "--updates_per_rollout", 4)


def train_plain(flags, output_dir, updates=LONGEST):
    """Trains with the plain loop; yields updates, seconds and weights after every fourth update."""
    loop = PlainLoop([*flags, *PLAIN, "--max_train_steps", updates, "--output_dir", output_dir])
    seconds = 0.0
    for step in range(updates):
        seconds += loop.update(step)
        if (step + 1) % EVERY == 0:
            yield step + 1, seconds, loop.transformer.state_dict()


def train_fast(flags, output_dir, updates=LONGEST):
    """The same with the trainer, which runs to its end first and leaves a checkpoint at each."""
    output = ["--output_dir", output_dir, "--overwrite_output_dir", "--checkpointing_steps", EVERY]
    times = run_trainer([*flags, *FAST, "--max_train_steps", updates, *output, "--validation_prompts"])
    for step in range(EVERY, updates + 1, EVERY):
        yield step, sum(times[:step]), load_file(output_dir / f"checkpoint-{step}" / "model.safetensors")


def main(output_dir):
    folder = output_dir / "effect"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "prompts.yaml").write_text(yaml.safe_dump({"prompts": captions()}))
    base = ["--pretrained_model_name_or_path", MINIATURE / "model", "--max_sequence_length", MAX_SEQUENCE_LENGTH]
    embed = [*base, "--prompts", folder / "prompts.yaml", "--output_dir", folder / "embeddings"]
    embed_prompts.main(embed_prompts.parse_args([str(flag) for flag in embed]))
    data = ["--dataset_name", folder / "embeddings", "--reward_model_path", MINIATURE / "reward"]
    flags = [*base, *data, *shlex.split(TRAINING), "--checkpoints_total_limit", LONGEST]

    result, table = {"device": str(DEVICE)}, []
    for name, train in (("plain", train_plain), ("fast", train_fast)):
        with Anatomy().watch() as anatomy:
            list(train(flags, folder / f"{name}_counted", EVERY))
        for updates, seconds, weights in train(flags, folder / name):
            expert = WanTransformer3DModel.from_pretrained(MINIATURE / "model", subfolder="transformer_2")
            expert.load_state_dict(weights)
            verdict = judge(expert)
            share, accuracy = verdict["real_style_share"], verdict["caption_accuracy"]
            table.append(f"{name:8}{updates:8}{seconds:9.1f}{share:9.3f}{accuracy:11.3f}")
            print(table[-1], flush=True)
            if share >= SHARE:
                break
        else:
            raise SystemExit(f"error: {name} reached a share of {share:.3f} only in {updates} updates.")
        result[f"updates_{name}"], result[f"seconds_{name}"] = updates, seconds
        result[f"flop_{name}"] = anatomy.flop / EVERY * updates
        result[f"real_style_share_{name}"], result[f"caption_accuracy_{name}"] = share, accuracy
    for what in ("seconds", "flop"):
        result[f"{what}_ratio"] = result[f"{what}_plain"] / result[f"{what}_fast"]

    print("\n" + "\n".join([f"{'':8}{'updates':>8}{'seconds':>9}{'share':>9}{'captions':>11}", *table]))
    print(f"plain / fast: {result['seconds_ratio']:.2f} in seconds, {result['flop_ratio']:.2f} in FLOP")
    (output_dir / "effect.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=lambda path: ROOT / path, default=ROOT / "outputs" / "benchmarks")
    torch.set_num_threads(1)  # two threads wait for each other at this size
    main(parser.parse_args().output_dir)
