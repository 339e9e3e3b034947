#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
What an effect costs, in work and in shapes, measured on the miniature. A judge reads style, caption and shape from the
pixels of 224 images that `WanPipeline` paints. Shape fidelity says what the wanted style has cost: it falls before
captions do, so wherever effect is compared, fidelity stands beside it. Only updates count as seconds and FLOP, not
judging, loading and saving. Tables are printed and written to `outputs/benchmarks/`.

    python benchmarks/effect.py

The published loop, plainly implemented, and this trainer at fast settings, until 85 % of the images are in the real
style: `effect.json`. Both train as `make demo` does and make the same draws, but without the demo's drift term, which
the published loop has not, so at a lower rate. They are judged every four updates, and each is read at the first
judgement that finds enough images. A contender could win by ruining shapes, so the comparison only holds if the
fidelities there differ by 0.01 at most; else it ends with an error and writes no ratio.

    python benchmarks/effect.py --reuse     # what `--updates_per_rollout` costs in effect: reuse.json
    python benchmarks/effect.py --windows   # the default window of noise levels and the published one: windows.json
    python benchmarks/effect.py --drift     # what `--drift_weight` costs in style and saves in shapes: drift.json

Of the published window, the low-noise expert can be trained in the part below the boundary. Windows are compared with
the published settings of all else; the drift term is compared with the settings of `make demo`.
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
from drawings import GUIDANCE_SCALE, MAX_SEQUENCE_LENGTH


SHARE, EVERY, LONGEST = 0.85, 4, 24
LARGEST_DIFFERENCE = 0.01  # of shape fidelity, between two results that are called equal in it
DEMO = shlex.split(TRAINING)
# Without the term that holds the demo's shapes, as in the published loop, updates must be smaller to keep them.
DEMO_WITHOUT_DRIFT = [*DEMO, "--drift_weight", 0, "--learning_rate", 5e-5]
# The published settings are the defaults; learning rate, batch and the length of a rollout are the miniature's.
PUBLISHED = shlex.split(
    "--reward_model CLIP --height 64 --width 64 --validation_size 64 --train_batch_size 16 --sampling_steps 12 "
    f"--rollout_guidance_scale {GUIDANCE_SCALE}"
)
PUBLISHED_WINDOW = shlex.split("--shift 3 --num_inference_steps 50 --train_timestep 15 25")


def train_plain(flags, output_dir, updates):
    """Trains with the plain loop; yields updates, seconds and weights after every fourth update."""
    loop = PlainLoop([*flags, "--max_train_steps", updates, "--output_dir", output_dir])
    seconds = 0.0
    for step in range(updates):
        seconds += loop.update(step)
        if (step + 1) % EVERY == 0:
            yield step + 1, seconds, loop.transformer.state_dict()


def train(flags, output_dir, updates, every=EVERY):
    """The same with the trainer, which runs to its end first and leaves a checkpoint at each."""
    output = ["--output_dir", output_dir, "--checkpointing_steps", every, "--checkpoints_total_limit", updates]
    times = run_trainer([*flags, *output, "--max_train_steps", updates, "--validation_prompts"])
    for step in range(every, updates + 1, every):
        yield step, sum(times[:step]), load_file(output_dir / f"checkpoint-{step}" / "model.safetensors")


def judge_run(settings, run):
    """Judges what [`train`] yields; prints and yields a row of the table for each."""
    for updates, seconds, weights in run:
        expert = WanTransformer3DModel.from_pretrained(MINIATURE / "model", subfolder="transformer_2")
        expert.load_state_dict(weights)
        row = {"settings": settings, "updates": updates, "seconds": seconds, **judge(expert)}
        print(table_line(row), flush=True)
        yield row


def table_line(row):
    line = f"{row['settings']:36}{row['updates']:8}{row['seconds']:9.1f}{row['real_style_share']:12.3f}"
    return f"{line}{row['caption_accuracy']:10.3f}{row['shape_fidelity']:10.3f}"


def print_table(rows):
    header = f"{'':36}{'updates':>8}{'seconds':>9}{'real style':>12}{'captions':>10}{'fidelity':>10}"
    print("\n".join(["", header, *map(table_line, rows)]))


def prepare(folder):
    """Embeds the captions of the miniature; returns the flags that name it and what training starts from."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = ["--pretrained_model_name_or_path", MINIATURE / "model", "--max_sequence_length", MAX_SEQUENCE_LENGTH]
    data = ["--dataset_name", embed_captions(folder, base), "--reward_model_path", MINIATURE / "reward"]
    return [*base, *data, "--report_to", "none"]


def compare_costs(plain, fast, flop):
    """
    The result of two rows that each reached the share, and the FLOP of one update of both: how many times as much the
    first one cost. Ends the program if their shape fidelities are not equal.
    """
    result = {"device": str(DEVICE)}
    for name, row in (("plain", plain), ("fast", fast)):
        result |= {f"{what}_{name}": value for what, value in row.items() if what != "settings"}
        result[f"flop_{name}"] = flop[name] * row["updates"]
    difference = abs(plain["shape_fidelity"] - fast["shape_fidelity"])
    if difference > LARGEST_DIFFERENCE:
        raise SystemExit(
            f"error: not comparable: at a share of {SHARE} the shape fidelities are {plain['shape_fidelity']:.3f} and "
            f"{fast['shape_fidelity']:.3f}, which is more than {LARGEST_DIFFERENCE} apart."
        )
    return result | {f"{what}_ratio": result[f"{what}_plain"] / result[f"{what}_fast"] for what in ("seconds", "flop")}


def compare(output_dir):
    """The plain loop and the trainer at fast settings, each until enough images are in the real style."""
    folder = output_dir / "effect"
    flags = [*prepare(folder), *DEMO_WITHOUT_DRIFT]
    rows, reached, flop = [], [], {}
    for name, run, settings in (("plain", train_plain, PLAIN), ("fast", train, FAST)):
        print(f"Counting the FLOP of {EVERY} updates: {name}", flush=True)
        with Anatomy().watch() as anatomy:
            list(run([*flags, *settings], folder / f"{name}_counted", EVERY))
        flop[name] = anatomy.flop / EVERY
        for row in judge_run(name, run([*flags, *settings], folder / name, LONGEST)):
            rows.append(row)
            if row["real_style_share"] >= SHARE:
                reached.append(row)
                break
        else:
            raise SystemExit(f"error: {name} reached a share of {row['real_style_share']:.3f} only.")
    print_table(rows)
    result = compare_costs(*reached, flop)
    print(f"plain / fast: {result['seconds_ratio']:.2f} in seconds, {result['flop_ratio']:.2f} in FLOP")
    (output_dir / "effect.json").write_text(json.dumps(result, indent=2) + "\n")


def compare_settings(output_dir, name, settings, updates, every):
    """Trains with each of {row of the table: flags} and judges it after `every` so many updates."""
    folder, rows = output_dir / name, []
    common = prepare(folder)
    for number, (label, flags) in enumerate(settings.items()):
        rows += judge_run(label, train([*common, *flags], folder / str(number), updates, every))
    print_table(rows)
    (output_dir / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")


def compare_reuse(output_dir):
    """The same updates with a new rollout for each, every second, fourth and eighth, with old and new noise."""
    common, reuse = [*DEMO_WITHOUT_DRIFT, *FAST[:2]], "--updates_per_rollout"
    settings = {f"{number}, same noise": [*common, reuse, number] for number in (1, 2, 4, 8)}
    settings |= {f"{number}, new noise": [*common, reuse, number, "--renew_noise"] for number in (4, 8)}
    compare_settings(output_dir, "reuse", settings, 16, every=16)


def compare_windows(output_dir):
    """Both windows at the learning rate of the tests, and at one that trains too much."""
    windows = {"sigma 0.875 to 0.375": [], "sigma 0.875 to 0.750": PUBLISHED_WINDOW}
    settings = {
        f"{window}, rate {rate}": [*PUBLISHED, *flags, "--learning_rate", rate]
        for rate in ("2e-5", "5e-5")
        for window, flags in windows.items()
    }
    compare_settings(output_dir, "windows", settings, 32, every=16)


def compare_drift(output_dir):
    """The training of `make demo` with other weights of the drift term."""
    settings = {f"weight {weight}": [*DEMO, "--drift_weight", weight] for weight in (0, 0.03, 0.1, 0.3, 1)}
    compare_settings(output_dir, "drift", settings, 32, every=32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=lambda path: ROOT / path, default=ROOT / "outputs" / "benchmarks")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--reuse", action="store_const", dest="mode", const=compare_reuse, default=compare)
    modes.add_argument("--windows", action="store_const", dest="mode", const=compare_windows)
    modes.add_argument("--drift", action="store_const", dest="mode", const=compare_drift)
    args = parser.parse_args()
    torch.set_num_threads(1)  # two threads wait for each other at this size
    args.mode(args.output_dir)
