#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
r"""
Turn a checkpoint of a run into what diffusers loads: `transformer_2/`, or a LoRA's `pytorch_lora_weights.safetensors`.
Or merge the LoRA of a checkpoint or of a finished run into the base model that it was trained beside.

    python scripts/export_checkpoint.py outputs/srpo/checkpoint-20 --output_dir exported
    python scripts/export_checkpoint.py outputs/lora --merge --output_dir merged \
        --pretrained_model_name_or_path Wan-AI/Wan2.2-T2V-A14B-Diffusers

It works with every engine of `accelerate_configs/`, whatever number of processes the run had, on one CPU. The shards
of DeepSpeed are put together by DeepSpeed's own `zero_to_fp32`; for the 14B expert that takes 57 GB of memory, its
size in float32. Merging takes the size of the expert in the precision of the run.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_srpo_wan_t2i as trainer  # noqa: E402


class Trained(NamedTuple):
    """Weights and what is known of them."""

    weights: dict  # {name in the transformer: `torch.Tensor`}
    dtype: torch.dtype  # to save them in
    config: dict | None  # of the transformer; that of the base model for the LoRA of a finished run
    lora: dict | None  # its metadata
    expert: str | None  # the subfolder; that of the base model for the LoRA of a finished run
    base: str | None  # a hash of the base model's weights, if known
    what: str  # in words


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Turn a checkpoint of a run into what diffusers loads.")
    add = parser.add_argument
    add("checkpoint", help="Folder checkpoint-N of a run; with --merge also the folder of a finished run.")
    add("--output_dir", required=True, help="Where to write the expert's folder or the LoRA file.")
    add("--merge", action="store_true", help="Write the base model's expert with the LoRA merged into it.")
    add("--pretrained_model_name_or_path", help="--merge: path to the pretrained model or its model identifier.")
    add("--revision", help="--merge: revision of pretrained model identifier from huggingface.co/models.")
    add("--variant", help="--merge: variant of the model files of the pretrained model identifier, 'e.g.' fp16")
    add("--cache_dir", help="--merge: where the downloaded base model will be stored.")
    return parser.parse_args(input_args)


def check_flags(args):
    """Refuses flags that mean nothing together, and an output folder that is in use."""
    if args.merge and args.pretrained_model_name_or_path is None:
        raise ValueError("`--merge` needs `--pretrained_model_name_or_path`, the base model of the run.")
    for name in ("pretrained_model_name_or_path", "revision", "variant", "cache_dir"):
        if getattr(args, name) is not None and not args.merge:
            raise ValueError(f"`--{name}` needs `--merge`; otherwise no base model is read.")
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`--output_dir {output}` is there already. Choose one that is new or empty.")


# ---- What was trained. ----------------------------------------------------------------------------------------------
def read_state(checkpoint):
    """What `trainer_state.json` of a checkpoint says. `ValueError` if the checkpoint is incomplete."""
    problem = f"`{checkpoint}` is not a complete checkpoint of train_srpo_wan_t2i.py; name a folder checkpoint-N"
    with trainer.input_error(problem):
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text())
        kept = {name: state[name] for name in ("global_step", "expert", "config", "lora", "dtype")}
        base = state["run"]["base model, by a hash of its weights"]
        return {**kept, "engine": state["run"]["engine"], "base": base}


def read_checkpoint(checkpoint):
    """The [`Trained`] of a checkpoint, complete, in the precision in which they are saved."""
    state = read_state(checkpoint)
    with trainer.input_error(f"`{checkpoint}` lacks files, or cannot be read"):
        if state["engine"].startswith("ZeRO"):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # takes seconds

            # The tag is the folder that Accelerate lets DeepSpeed write into. Lazy tensors are put together by and by.
            options = {"exclude_frozen_parameters": True, "lazy_mode": True}
            weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint, "pytorch_model", **options)
        else:
            weights = load_file(Path(checkpoint, "model.safetensors"))
    with trainer.input_error(f"`{checkpoint}` is damaged"):
        check_names_and_shapes(weights, state["config"], state["lora"])
    dtype, what = getattr(torch, state["dtype"]), f"the weights after {state['global_step']} updates"
    # Copies, because what is put together may be views of one flat tensor, which a file of weights cannot hold.
    weights = {name: weight.contiguous().detach().to(dtype, copy=True) for name, weight in weights.items()}
    names = ("config", "lora", "expert", "base")
    return Trained(weights, dtype, *(state[name] for name in names), what)


def read_finished_run(folder):
    """The [`Trained`] of the LoRA that a run saved at its end."""
    with trainer.input_error(f"`{folder}` holds a LoRA that cannot be read"):
        options = {"weight_name": trainer.LORA_FILE, "use_safetensors": True, "return_lora_metadata": True}
        layers, metadata = trainer.diffusers.WanPipeline.lora_state_dict(folder, **options)
        lora = {name.removeprefix("transformer."): value for name, value in metadata.items()}
        weights = {name.removeprefix("transformer."): weight for name, weight in layers.items()}
        weights = {name.replace(".weight", ".default.weight"): weight for name, weight in weights.items()}
        (dtype,) = {weight.dtype for weight in weights.values()}
    checkpoints = trainer.list_checkpoints(folder)  # not there if the folder was downloaded
    base = read_state(checkpoints[-1])["base"] if checkpoints else None
    return Trained(weights, dtype, None, lora, None, base, "the weights of a finished run")


def read_trained(source, merge):
    """The [`Trained`] to export, or to `merge`, from the folder of a checkpoint or, for merging, of a finished run."""
    problem = f"`--merge`: `{source}` holds no LoRA, but whole weights, which need no merging"
    if merge and not Path(source, "trainer_state.json").exists():
        if Path(source, trainer.LORA_FILE).exists():
            return read_finished_run(source)
        if any(Path(source, expert, "config.json").exists() for expert in ("transformer", "transformer_2")):
            raise ValueError(f"{problem}: diffusers loads them as they are.")
    trained = read_checkpoint(source)
    if merge and trained.lora is None:
        raise ValueError(f"{problem}. Export them without `--merge`.")
    return trained


def check_names_and_shapes(weights, config, lora):
    """Refuses weights that are not those which a run trains of a transformer with this `config`."""
    with torch.device("meta"):
        transformer = trainer.diffusers.WanTransformer3DModel.from_config(config)
        if lora is not None:
            transformer.add_adapter(trainer.peft.LoraConfig(**lora))
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if lora is not None:  # the weights beside it are those of the base model
        state = transformer.state_dict()
        found |= {name: tuple(weight.shape) for name, weight in state.items() if "lora_" not in name}
    trainer.check_weights(transformer, found)


# ---- Merging. -------------------------------------------------------------------------------------------------------
def read_base_info(args):
    """The `ModelInfo` of the base model, whose expert is the one that a run can train."""
    flag = f"`--pretrained_model_name_or_path {args.pretrained_model_name_or_path}`"
    names = ("pretrained_model_name_or_path", "revision", "variant", "cache_dir")
    source = {name: getattr(args, name) for name in names}
    with trainer.input_error(f"{flag} is not a Wan pipeline in the layout of diffusers"):
        index = trainer.diffusers.WanPipeline.load_config(**source)
    expert = "transformer" if index.get("transformer_2", [None, None])[1] is None else "transformer_2"
    model = trainer.read_model_info(argparse.Namespace(**source, transformer_subfolder=expert))
    with trainer.input_error(f"{flag} has no whole model in `{expert}`"):
        found = trainer.read_shapes(trainer.weight_files(source, expert, trainer.DIFFUSERS_STEM))
        trainer.check_weights(model.transformer, found)
    return model


def merge_lora(args, trained):
    """The [`Trained`] whole weights of the base model as it is on the disk, with a LoRA merged into them."""
    model, flag = read_base_info(args), f"`--pretrained_model_name_or_path {args.pretrained_model_name_or_path}`"
    where = model.source, model.expert, trainer.DIFFUSERS_STEM, trainer.TRANSFORMER_LAYER
    found = trainer.weights_fingerprint(*where)
    if trained.base not in (None, found):
        problem = f"{flag} is not the base model of the run, by a hash of its weights"
        raise ValueError(f"{problem}: it has {found}, the run had {trained.base}.")
    with trainer.input_error(f"{flag} is not the base model of the run"):
        check_names_and_shapes(trained.weights, model.transformer.config, trained.lora)
    load = trainer.diffusers.WanTransformer3DModel.from_pretrained
    transformer = load(**model.source, subfolder=model.expert, dtype=trained.dtype)
    transformer.add_adapter(trainer.peft.LoraConfig(**trained.lora))
    transformer.load_state_dict(trained.weights, strict=False)
    transformer.fuse_lora()
    transformer.unload_lora()
    whole = {"config": dict(transformer.config), "expert": model.expert, "lora": None}
    what = f"{trained.what}, merged into the base model"
    return trained._replace(weights=transformer.state_dict(), **whole, what=what)


def main(args):
    trainer.diffusers.utils.logging.set_verbosity_error()
    with trainer.one_line_errors():
        check_flags(args)
        trained = read_trained(args.checkpoint, args.merge)
        if args.merge:
            trained = merge_lora(args, trained)
    saved = trainer.save_weights(trained.weights, args.output_dir, trained.expert, trained.config, trained.lora)
    print(f"Wrote {saved}, {trained.what}.")


if __name__ == "__main__":
    main(parse_args())
