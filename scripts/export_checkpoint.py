#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
r"""
Turn a checkpoint of a run into what diffusers loads: `transformer_2/`, or a LoRA's `pytorch_lora_weights.safetensors`.
Or merge the LoRA of a checkpoint or of a finished run into the base model that it was trained beside. Or write any of
these, or a finished run, for ComfyUI: one file with the names of the original Wan models (docs/comfyui.md).

    python scripts/export_checkpoint.py outputs/srpo/checkpoint-20 --output_dir exported
    python scripts/export_checkpoint.py outputs/srpo --format comfyui --output_dir exported
    python scripts/export_checkpoint.py outputs/lora --merge --output_dir merged \
        --pretrained_model_name_or_path Wan-AI/Wan2.2-T2V-A14B-Diffusers

It works with every engine of `accelerate_configs/`, whatever number of processes the run had, on one CPU. The shards
of DeepSpeed are put together by DeepSpeed's own `zero_to_fp32`; for the 14B expert that takes 57 GB of memory, its
size in float32. Merging takes the size of the expert in the precision of the run.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_srpo_wan_t2i as trainer  # noqa: E402


# Names in diffusers and in the original models of layers, or tensors of no layer: of a block, and outside the blocks.
ATTENTION_NAMES = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
BLOCK_NAMES = {f"attn1.{name}": f"self_attn.{original}" for name, original in ATTENTION_NAMES.items()}
BLOCK_NAMES |= {f"attn2.{name}": f"cross_attn.{original}" for name, original in ATTENTION_NAMES.items()}
BLOCK_NAMES |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3", "scale_shift_table": "modulation"}
OUTER_NAMES = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}


class Trained(NamedTuple):
    """Weights and what is known of them."""

    weights: dict  # {name in the transformer: `torch.Tensor`}
    dtype: torch.dtype | None  # to save them in; `None`: as they are
    config: dict | None  # of the transformer; that of the base model for the LoRA of a finished run
    lora: dict | None  # its metadata
    expert: str | None  # the subfolder, if known
    base: str | None  # a hash of the base model's weights, if known
    what: str  # in words


def parse_args(input_args=None):
    description = "Turn a checkpoint of a run into what diffusers or ComfyUI loads."
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    source = "Folder checkpoint-N of a run; with --merge or --format comfyui also the folder of a finished run."
    add("checkpoint", help=source)
    add("--output_dir", required=True, help="Where to write the expert's folder or the LoRA file.")
    formats = "What reads it: diffusers, or ComfyUI, whose single file has the names of the original Wan models."
    add("--format", choices=["diffusers", "comfyui"], default="diffusers", help=formats)
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
def read_checkpoint(checkpoint):
    """The [`Trained`] of a checkpoint, in the precision in which a run saves it. `ValueError` if it is not whole."""
    with trainer.input_error(
        f"`{checkpoint}` is not a complete checkpoint of train_srpo_wan_t2i.py; name a folder checkpoint-N"
    ):
        state = trainer.read_state(checkpoint)
        uses_deepspeed, base = state["run"]["engine"].startswith("ZeRO"), state["run"]["base_model"]
    if damage := trainer.find_damage(PartialState(cpu=True), checkpoint):
        raise ValueError(f"`{checkpoint}` is damaged: `{damage}` is not what was saved. Take another checkpoint.")
    with trainer.input_error(f"`{checkpoint}` cannot be read"), trainer.safe_loading(uses_deepspeed):
        if uses_deepspeed:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # takes seconds

            # The tag is the folder that Accelerate lets DeepSpeed write into. Lazy tensors are put together by and by.
            options = {"exclude_frozen_parameters": True, "lazy_mode": True}
            weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint, "pytorch_model", **options)
        else:
            weights = load_file(Path(checkpoint, "model.safetensors"))
        check_names_and_shapes(weights, state["config"], state["lora"])
        dtype, what = getattr(torch, state["dtype"]), f"the weights after {state['global_step']} updates"
        # Copies, because what is put together may be views of one flat tensor, which a file of weights cannot hold.
        weights = {name: weight.contiguous().detach().to(dtype, copy=True) for name, weight in weights.items()}
    return Trained(weights, dtype, state["config"], state["lora"], state["expert"], base, what)


def read_card(folder):
    """The expert, a subfolder, that the model card of a run says was trained; `None` if there is no such card."""
    card, line = Path(folder, "README.md"), r"^\| `--transformer_subfolder` \| (transformer(?:_2)?) \|$"
    found = re.search(line, card.read_text(), re.MULTILINE) if card.is_file() else None
    return found and found.group(1)


def read_finished_lora(folder):
    """The [`Trained`] of the LoRA that a run saved at its end."""
    with trainer.input_error(f"`{folder}` holds a LoRA that cannot be read"):
        options = {"weight_name": trainer.LORA_FILE, "use_safetensors": True, "return_lora_metadata": True}
        layers, metadata = trainer.diffusers.WanPipeline.lora_state_dict(folder, **options)
        lora = {name.removeprefix("transformer."): value for name, value in metadata.items()}
        weights = {name.removeprefix("transformer."): weight for name, weight in layers.items()}
        weights = {name.replace(".weight", ".default.weight"): weight for name, weight in weights.items()}
        (dtype,) = {weight.dtype for weight in weights.values()}
        trainer.peft.LoraConfig(**lora)
    checkpoints = trainer.list_checkpoints(folder)  # not there if the folder was downloaded
    state = trainer.read_state(checkpoints[-1]) if checkpoints else {"expert": read_card(folder), "run": {}}
    base = state["run"].get("base_model")
    return Trained(weights, dtype, None, lora, state["expert"], base, "the weights of a finished run")


def read_finished_expert(folder, expert):
    """The [`Trained`] of all weights of an expert that a run saved at its end. They stay on the disk until used."""
    with trainer.input_error(f"`{folder}` holds no whole model in `{expert}`"):
        config = trainer.diffusers.WanTransformer3DModel.load_config(folder, subfolder=expert)
        files = trainer.weight_files({"pretrained_model_name_or_path": folder}, expert, trainer.DIFFUSERS_STEM)
        weights = {name: weight for file in files for name, weight in load_file(file).items()}
        check_names_and_shapes(weights, config, None)
    return Trained(weights, None, config, None, expert, None, "the weights of a finished run")


def read_trained(source, merge, output_format):
    """The [`Trained`] to export, or to `merge`, from the folder of a checkpoint or, if that can be, a finished run."""
    whole = f"`--merge`: `{source}` holds no LoRA, but whole weights, which need no merging"
    if not Path(source, trainer.STATE_FILE).exists():
        lora = Path(source, trainer.LORA_FILE).exists()
        experts = [name for name in trainer.EXPERTS if Path(source, name, "config.json").exists()]
        if merge and experts and not lora:
            raise ValueError(f"{whole}: diffusers loads them as they are.")
        if (lora or len(experts) == 1) and not merge and output_format == "diffusers":
            problem = f"`{source}` is a finished run, which diffusers loads as it is"
            raise ValueError(f"{problem}. Name one of its checkpoints, or see `--merge` and `--format`.")
        if lora:
            return read_finished_lora(source)
        if len(experts) == 1:
            return read_finished_expert(source, *experts)
    trained = read_checkpoint(source)
    if merge and trained.lora is None:
        raise ValueError(f"{whole}. Export them without `--merge`.")
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


# ---- ComfyUI. -------------------------------------------------------------------------------------------------------
def original_name(name):
    """The name in the original Wan models of a tensor or a layer of a `WanTransformer3DModel`, the inverse of what
    `convert_wan_transformer_to_diffusers` of diffusers does. `ValueError` if text-to-video models have none."""
    block, layer, parameter = re.fullmatch(r"(blocks\.\d+\.|)(.*?)(\.weight|\.bias|)", name).groups()
    names = BLOCK_NAMES if block else OUTER_NAMES
    if layer not in names:
        raise ValueError(f"`--format comfyui`: the original Wan models have no name for `{name}`.")
    return f"{block}{names[layer]}{parameter}"


def make_alpha(config, layer, matrix):
    """The alpha of one layer of a LoRA with this `peft.LoraConfig`, a tensor () in float32. ComfyUI multiplies by
    alpha / rank, where the rank is that of `matrix`, (rank, inputs), so this makes it scale as peft does."""
    get_key = trainer.peft.utils.other.get_pattern_key
    rank = config.rank_pattern.get(get_key(config.rank_pattern, layer), config.r)
    alpha = config.alpha_pattern.get(get_key(config.alpha_pattern, layer), config.lora_alpha)
    if rank != len(matrix):
        raise ValueError(f"The LoRA of `{layer}` is of rank {len(matrix)}, but its metadata say {rank}.")
    return torch.tensor(float(alpha) * (rank**0.5 if config.use_rslora else 1.0), dtype=torch.float32)


def convert_lora(weights, lora):
    """A LoRA with the metadata `lora` as ComfyUI reads it: {original name: tensor}, and an alpha for each layer."""
    config, converted = trainer.peft.LoraConfig(**lora), {}
    for name, weight in weights.items():
        layer, _, matrix = name.removesuffix(".default.weight").rpartition(".")
        if matrix not in ("lora_A", "lora_B"):
            raise ValueError(f"`--format comfyui`: `{name}` is not of a plain LoRA, which has `lora_A` and `lora_B`.")
        original = f"diffusion_model.{original_name(layer)}"
        converted[f"{original}.{matrix}.weight"] = weight
        if matrix == "lora_A":
            converted[f"{original}.alpha"] = make_alpha(config, layer, weight)
    return converted


def save_for_comfyui(trained, output_dir):
    """Writes a [`Trained`] as a safetensors file with original names and the expert in its own; returns the path."""
    if trained.expert is None:
        problem = "which expert the LoRA is for is not known: the run's checkpoints and its README.md are missing"
        raise ValueError(f"`--format comfyui`: {problem}.")
    if trained.lora is None:
        kind, weights = "", {original_name(name): weight for name, weight in trained.weights.items()}
    else:
        kind, weights = "_lora", convert_lora(trained.weights, trained.lora)
    name = f"srpo_wan2.2_t2v{kind}_low_noise" if trained.expert == "transformer_2" else f"srpo_wan{kind}"
    path = Path(output_dir, f"{name}.safetensors")
    with trainer.written(path, sum(weight.nbytes for weight in weights.values())) as file:
        save_file(weights, file, metadata={"format": "pt"})
    return path


def main(args):
    trainer.diffusers.utils.logging.set_verbosity_error()
    with trainer.one_line_errors():
        check_flags(args)
        trained = read_trained(args.checkpoint, args.merge, args.format)
        if args.merge:
            trained = merge_lora(args, trained)
        if bad := [name for name, weight in trained.weights.items() if not weight.isfinite().all()]:
            raise ValueError(f"`{args.checkpoint}`: the weights of `{bad[0]}` are NaN or infinite.")
        if args.format == "comfyui":
            saved = save_for_comfyui(trained, args.output_dir)
        else:
            names = trained.expert, trained.config, trained.lora
            saved = trainer.save_weights(trained.weights, args.output_dir, *names)
    print(f"Wrote {saved}, {trained.what}.")


if __name__ == "__main__":
    main(parse_args())
