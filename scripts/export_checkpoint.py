#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Turn a checkpoint of a run into what diffusers loads: `transformer_2/`, or a LoRA's `pytorch_lora_weights.safetensors`.

    python scripts/export_checkpoint.py outputs/srpo/checkpoint-20 --output_dir exported

It works with every engine of `accelerate_configs/`, whatever number of processes the run had, on one CPU. The shards
of DeepSpeed are put together by DeepSpeed's own `zero_to_fp32`; for the 14B expert that takes 57 GB of memory, its
size in float32.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_srpo_wan_t2i import blame, one_line_errors, save_weights


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Turn a checkpoint of a run into what diffusers loads.")
    parser.add_argument("checkpoint", help="Folder checkpoint-N of a run.")
    parser.add_argument("--output_dir", required=True, help="Where to write the expert's folder or the LoRA file.")
    return parser.parse_args(input_args)


def read_state(checkpoint):
    """What `trainer_state.json` of a checkpoint says. `ValueError` if the checkpoint is incomplete."""
    with blame(f"`{checkpoint}` is not a complete checkpoint of train_srpo_wan_t2i.py; name a folder checkpoint-N"):
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text())
        names = ("global_step", "expert", "config", "lora", "dtype")
        return {"engine": state["run"]["engine"], **{name: state[name] for name in names}}


def read_weights(checkpoint, engine):
    """The trained weights of a checkpoint as {name: `torch.Tensor`}, in the precision in which they were trained."""
    with blame(f"`{checkpoint}` lacks files, or cannot be read"):
        if engine.startswith("ZeRO"):
            # The tag is the folder that Accelerate lets DeepSpeed write into. Lazy tensors are put together by and by.
            options = {"exclude_frozen_parameters": True, "lazy_mode": True}
            return get_fp32_state_dict_from_zero_checkpoint(checkpoint, "pytorch_model", **options)
        return load_file(Path(checkpoint, "model.safetensors"))


def main(args):
    with one_line_errors():
        state = read_state(args.checkpoint)
        output = Path(args.output_dir)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"`--output_dir {output}` is there already. Choose one that is new or empty.")
        weights = read_weights(args.checkpoint, state["engine"])
    dtype = getattr(torch, state["dtype"])
    # Copies, because what is put together may be views of one flat tensor, which a file of weights cannot hold.
    weights = {name: weight.contiguous().detach().to(dtype, copy=True) for name, weight in weights.items()}
    saved = save_weights(weights, output, state["expert"], state["config"], state["lora"])
    print(f"Wrote {saved}, the weights after {state['global_step']} updates.")


if __name__ == "__main__":
    main(parse_args())
