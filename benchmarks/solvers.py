#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
How far rollouts are from the exact solution, by solver and number of steps, on the miniature.

    python benchmarks/solvers.py

Every caption of the miniature is rolled out by `transformer_2` alone from the same noise. The distance is the root
mean square difference of the latents from those of 200 UniPC steps, over the latents' own root mean square. Euler with
200 steps is in the table too: both solvers approach one solution. Writes `outputs/benchmarks/solvers.json`.
"""

import argparse
import json
from pathlib import Path

import torch
from measure import MINIATURE, ROOT

from diffusers import WanPipeline

from drawings import GUIDANCE_SCALE, MAX_SEQUENCE_LENGTH, captions
from train_srpo_wan_t2i import Models, Solver, make_generator, make_scheduler, paint_latents


STEPS = (4, 6, 8, 10, 12, 16, 20, 25, 40)
EXACT_STEPS = 200


@torch.no_grad()
def main(output_dir):
    pipeline = WanPipeline.from_pretrained(MINIATURE / "model", transformer=None, vae=None, dtype=torch.float32)
    prompts = captions()
    prompt_embeds, negative = (
        pipeline.encode_prompt(texts, None, False, max_sequence_length=MAX_SEQUENCE_LENGTH)[0]
        for texts in (prompts, [""])
    )
    models = Models(pipeline.transformer_2, negative_prompt_embeds=negative)
    noise = torch.randn(len(prompts), 8, 1, 8, 8, generator=make_generator(0))
    shift = pipeline.scheduler.config.flow_shift

    def paint(name, steps):
        solver = Solver(make_scheduler(name, shift), steps, GUIDANCE_SCALE)
        return paint_latents(models._replace(solver=solver), noise, prompt_embeds)

    exact = paint("unipc", EXACT_STEPS)
    print(f"{'steps':>6}{'euler':>9}{'unipc':>9}")
    table = {}
    for steps in (*STEPS, EXACT_STEPS):
        table[steps] = {name: ((paint(name, steps) - exact).std() / exact.std()).item() for name in ("euler", "unipc")}
        print(f"{steps:6}{table[steps]['euler']:9.4f}{table[steps]['unipc']:9.4f}", flush=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "solvers.json").write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "benchmarks", help="Where results go.")
    main(parser.parse_args().output_dir)
