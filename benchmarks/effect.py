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

    python benchmarks/effect.py --reuse

What `--updates_per_rollout` costs in effect: the same number of updates with more or fewer rollouts. Writes
`outputs/benchmarks/reuse.json`.
"""

import argparse
import json
import shlex
import shutil

import torch
from measure import DEVICE, FAST, MINIATURE, PLAIN, ROOT, Anatomy, PlainLoop, embed_captions, run_trainer
from safetensors.torch import load_file

from diffusers import WanTransformer3DModel

from demo import TRAINING, judge
from drawings import MAX_SEQUENCE_LENGTH


SHARE, EVERY, LONGEST = 0.85, 4, 48
NO_VALIDATION = ("--validation_prompts",)


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
    times = run_trainer([*flags, *FAST, "--max_train_steps", updates, *output, *NO_VALIDATION])
    for step in range(EVERY, updates + 1, EVERY):
        yield step, sum(times[:step]), load_file(output_dir / f"checkpoint-{step}" / "model.safetensors")


def judge_weights(weights):
    expert = WanTransformer3DModel.from_pretrained(MINIATURE / "model", subfolder="transformer_2")
    expert.load_state_dict(weights)
    return judge(expert)


def prepare(folder):
    """Embeds the captions of the miniature; returns the flags of the demo's training."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = ["--pretrained_model_name_or_path", MINIATURE / "model", "--max_sequence_length", MAX_SEQUENCE_LENGTH]
    data = ["--dataset_name", embed_captions(folder, base), "--reward_model_path", MINIATURE / "reward"]
    return [*base, *data, *shlex.split(TRAINING), "--checkpoints_total_limit", LONGEST]


def compare(output_dir):
    """The plain loop and the trainer at fast settings, each until enough images are in the real style."""
    folder = output_dir / "effect"
    flags = prepare(folder)
    result, table = {"device": str(DEVICE)}, []
    for name, train in (("plain", train_plain), ("fast", train_fast)):
        with Anatomy().watch() as anatomy:
            list(train(flags, folder / f"{name}_counted", EVERY))
        for updates, seconds, weights in train(flags, folder / name):
            verdict = judge_weights(weights)
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


def compare_reuse(output_dir):
    """The same updates with a new rollout for each, every second, fourth and eighth, with old and new noise."""
    folder = output_dir / "reuse"
    flags = prepare(folder)
    table = []
    for reuse, *renewed in ((1,), (2,), (4,), (8,), (4, "--renew_noise"), (8, "--renew_noise")):
        settings = ["--sampling_steps", FAST[1], "--updates_per_rollout", reuse, *renewed, "--max_train_steps", 16]
        output = folder / "-".join(map(str, (reuse, *renewed)))
        times = run_trainer([*flags, *settings, "--checkpointing_steps", 16, "--output_dir", output, *NO_VALIDATION])
        verdict = judge_weights(load_file(output / "checkpoint-16" / "model.safetensors"))
        table.append({"updates_per_rollout": reuse, "renew_noise": bool(renewed), "seconds": sum(times), **verdict})
    print(f"\n{'N':>3}{'noise':>8}{'seconds':>9}{'share':>9}{'captions':>11}    after 16 updates")
    for row in table:
        noise, share = "new" if row["renew_noise"] else "same", row["real_style_share"]
        line = f"{row['updates_per_rollout']:3}{noise:>8}{row['seconds']:9.1f}{share:9.3f}"
        print(f"{line}{row['caption_accuracy']:11.3f}")
    (output_dir / "reuse.json").write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=lambda path: ROOT / path, default=ROOT / "outputs" / "benchmarks")
    parser.add_argument("--reuse", action="store_true", help="Compare numbers of `--updates_per_rollout` instead.")
    args = parser.parse_args()
    torch.set_num_threads(1)  # two threads wait for each other at this size
    (compare_reuse if args.reuse else compare)(args.output_dir)
