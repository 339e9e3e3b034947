#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
r"""
Say how much memory a run of train_srpo_wan_t2i.py will take, before any is spent: no weights are read.

    python scripts/estimate_memory.py --config_file accelerate_configs/a100x8.yaml --gradient_checkpointing

All flags of the training script are understood. Figures are in GB, 1e9 bytes. Activations are those of the training
script's own functions, run on fake tensors that have shapes but no data, with every storage counted while it lives.
What Accelerate, DeepSpeed and AdamW hold was read from the sources of DeepSpeed 0.19.8 and PyTorch 2.15. Not counted:
workspaces of cuDNN, fragmentation, the file cache, what resuming reads, and a second copy of the parameters that
ZeRO-2 makes at the start where there is room, else on the host.
"""

import argparse
import json
import re
import sys
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import psutil
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


sys.path.insert(0, str(Path(__file__).parent.parent))
import train_srpo_wan_t2i as trainer  # noqa: E402


GB = 1e9
CUDA_CONTEXT = 0.6 * GB  # of each process on its GPU: driver, kernels, NCCL and cuBLAS
PROCESS = 3.0 * GB  # of each process on the host: Python, PyTorch, CUDA
ADAMW_8BIT = 2 * (1 + 4 / 256)  # bytes of both states: 8 bits of each, and a float32 for every block of 256
TIGHT = 0.95  # share of a GPU above which fragmentation may end a run that fits by the figures
MEASURED_LAYERS = 3  # the first block differs from all others
STATE = "computed; not measured on this card yet"

# Phases of a run. After "forward" through the transformer, "image" is the way to the loss and back to the first
# gradient of a weight, and "backward" the rest. "loading" and later are of the host.
COMPUTE, HELD = "rollout forward image backward validation", ("backward step", "rollout forward image backward step")
TRAINING, HOST_TRAINING = f"{COMPUTE} step", "training saving"
GPU, HOST = f"start {TRAINING}", f"loading {HOST_TRAINING}"
# What DeepSpeed assumes for keys that its file lacks, deepspeed/runtime/zero/config.py.
ZERO_DEFAULTS = dict.fromkeys(("sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 1e9)


# ---- What is launched. ----------------------------------------------------------------------------------------------
class Launch(NamedTuple):
    """What the YAML of `accelerate launch` and the JSON of DeepSpeed say."""

    machine: str  # the first words of the YAML, up to a comma or full stop
    processes: int  # on all machines together
    machines: int
    distributed_type: str
    mixed_precision: str
    deepspeed: dict | None


def read_launch(config_file, deepspeed_config_file=None):
    """
    The [`Launch`] of a YAML of Accelerate and the JSON of DeepSpeed, which it names unless `deepspeed_config_file`
    does. `ValueError` if a file is missing or says what the estimate does not know.
    """
    flag = f"`--config_file {config_file}`"
    with trainer.blame(f"{flag} is not a configuration of Accelerate"):
        config = dict(yaml.safe_load(text := Path(config_file).read_text()))
        processes, machines = (int(config.get(name, 1)) for name in ("num_processes", "num_machines"))
        kind, precision, deepspeed = config["distributed_type"], config.get("mixed_precision", "no"), None
    if processes < 1 or machines < 1 or processes % machines:
        raise ValueError(f"{flag}: `num_processes: {processes}` must be a positive multiple of `num_machines`.")
    if config.get("use_cpu") or kind not in ("NO", "MULTI_GPU", "DEEPSPEED") or precision not in ("no", "bf16"):
        raise ValueError(f"{flag}: the estimate knows GPUs in bf16 or without mixed precision.")
    if kind == "DEEPSPEED":
        path = deepspeed_config_file or (config.get("deepspeed_config") or {}).get("deepspeed_config_file")
        name = "`--deepspeed_config_file" if deepspeed_config_file else "`deepspeed_config_file:"
        with trainer.blame(f"{name} {path}` of {flag} is not a configuration of DeepSpeed that the estimate knows"):
            deepspeed, precision = json.loads(Path(path).read_text()), "bf16"
            zero = deepspeed["zero_optimization"]
            devices = {(zero.get(name) or {}).get("device", "none") for name in ("offload_optimizer", "offload_param")}
            if not (deepspeed["bf16"]["enabled"] and zero["stage"] in (2, 3) and devices <= {"none", "cpu"}):
                raise ValueError("it knows ZeRO-2 and ZeRO-3 with `bf16`, and offload to `cpu`")
    machine = re.split("[.,]", text.lstrip("# "))[0].replace("\n# ", " ")
    return Launch(machine, processes, machines, kind, precision, deepspeed)


def parse_args(input_args=None):
    """The script's own arguments, the rest, and what the training script makes of those. `ValueError` if refused."""
    parser = argparse.ArgumentParser(epilog="And all flags of the training script.", allow_abbrev=False)
    parser.add_argument("--config_file", required=True, help="The file that `accelerate launch` is given.")
    parser.add_argument("--deepspeed_config_file", help="As of `accelerate launch`: instead of the one in the YAML.")
    parser.add_argument("--gpu_memory_gb", type=float, help="Memory of one GPU. Default: that of this machine's.")
    parser.add_argument("--host_memory_gb", type=float, help="Memory of one machine. Default: that of this one.")
    parser.add_argument("--markdown", action="store_true", help="Print a row of the table in README.md.")
    unread = ["--pretrained_model_name_or_path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "--dataset_name", "unread"]

    def refuse(_parser, message):
        raise ValueError(message)  # argparse itself would print the usage as well

    with mock.patch.object(argparse.ArgumentParser, "error", refuse):
        own, flags = parser.parse_known_args(input_args)
        return own, flags, trainer.parse_args([*unread, *flags])


# ---- Activations: the training script's own functions on fake tensors. ----------------------------------------------
class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages while they live, those of fake tensors too. `peaks` holds them by phase."""

    def __init__(self):
        super().__init__()
        self.live, self.known, self.peaks, self.phase = 0, set(), Counter(), None

    def track(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
            self.peaks[self.phase] = max(self.peaks[self.phase], self.live)

    def forget(self, key, size):
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = result if isinstance(result, (tuple, list)) else (result,)
        list(map(self.track, filter(torch.is_tensor, leaves)))
        return result


def assign_data(module, function, recurse=True):
    """`Module._apply` as it acts on real tensors. Fake ones it would swap, which a graph that holds them forbids."""
    for child in module.children():
        child._apply(function)
    for parameter in module.parameters(recurse=False):
        parameter.data = function(parameter.data)
    vars(module)["_buffers"].update({name: function(buffer) for name, buffer in module.named_buffers(recurse=False)})
    return module


def make_transformer(args, launch, layers=MEASURED_LAYERS):
    """The transformer with `layers` blocks, in the types in which script and engine hold it, and its input's type."""
    source, kind = trainer.model_source(args), trainer.WanTransformer3DModel
    transformer = kind.from_config(kind.load_config(**source, subfolder=args.transformer_subfolder), num_layers=layers)
    full_precision = launch.deepspeed is None and args.optimizer == "adamw" and args.lora_rank is None
    dtype = torch.bfloat16 if launch.mixed_precision == "bf16" and not full_precision else torch.float32
    kept = set(transformer._keep_in_fp32_modules if launch.deepspeed is None else [])  # DeepSpeed casts all
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    if args.lora_rank is not None:
        trainer.add_lora(transformer, args)
        trainer.cast_training_params(transformer, torch.float32 if launch.deepspeed is None else torch.bfloat16)
    if args.base_weights == "fp8":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if launch.deepspeed is None and launch.mixed_precision == "bf16":
        transformer.forward = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)(transformer.forward)
    return transformer, dtype


def make_reward_model(args, dtype):
    """The reward model of the flags without its weights and without texts, whose few tokens do not count."""
    kind = trainer.HPSReward if args.reward_model == "HPS" else trainer.CLIPReward
    reward_model = kind.__new__(kind)
    trainer.RewardModel.__init__(reward_model)
    if args.reward_model == "HPS":
        model = kind.empty_model(trainer.HPS_ARCHITECTURE)
        model.load_state_dict({key: torch.empty(meta.shape) for key, meta in model.state_dict().items()}, assign=True)
        reward_model.image_size = model.visual.image_size[0]
    else:
        path = args.reward_model_path or (trainer.PICKSCORE_REPOSITORY if args.reward_model == "PickScore" else None)
        with trainer.blame(f"`--reward_model_path {path}` is not the folder or Hub id of a CLIPModel"):
            model = trainer.CLIPModel(trainer.AutoConfig.from_pretrained(path))
        reward_model.image_size = model.config.vision_config.image_size
    reward_model.model, reward_model.encode_texts = model, lambda texts: torch.zeros(len(texts), 1)
    reward_model.scale, reward_model.mean, reward_model.std = 1.0, [0.5] * 3, [0.5] * 3
    reward_model.freeze("cpu", dtype)
    return reward_model


def run_phases(args, model, transformer, dtype, vae, reward_model, scheduler):
    """
    Takes one step of a rollout, one graded pass and the parts of a validation image, on fake tensors. Returns {phase:
    most bytes beyond weights}, where gradients of weights are dropped as soon as they are made, and the bytes that
    each further block of the transformer keeps from "forward" to "backward".
    """
    branches = [trainer.Branch(n, 0.6, 0.5, 0.0) for n in ("denoise", "inversion") if args.branches in ("both", n)]
    factor, batch, tracker, entered = model.vae_scale_factor, args.train_batch_size, StorageTracker(), []
    for module in (transformer, vae, reward_model):
        list(map(tracker.track, (*module.eval().parameters(), *module.buffers())))
    weights, velocity = tracker.live, partial(trainer.predict_velocity, transformer)

    def leave_transformer(*_):
        tracker.phase = "image" if tracker.phase == "forward" else tracker.phase

    def drop_gradient(parameter):
        tracker.phase, parameter.grad = "backward", None

    def sized(height, width):
        latents = torch.empty(batch, model.in_channels, 1, height // factor, width // factor)
        tokens = latents[0, 0].numel() // (model.patch_size[1] * model.patch_size[2])
        return latents, partial(velocity, tokens_per_sample=tokens if model.expand_timesteps else None)

    transformer.register_forward_hook(leave_transformer)
    for block in transformer.blocks:
        block.register_forward_pre_hook(lambda *_: entered.append(tracker.live))
    for parameter in filter(lambda parameter: parameter.requires_grad, transformer.parameters()):
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    with tracker:
        tracker.phase = "rollout"
        embeds = torch.empty(batch, args.max_sequence_length, model.text_dim, dtype=dtype)
        noise, velocity_fn = sized(args.height, args.width)
        together = min(args.rollout_batch_size or batch, batch * args.gradient_accumulation_steps)
        starts, texts = noise[:1].repeat(together, 1, 1, 1, 1), embeds[:1].expand(together, -1, -1)
        trainer.rollout(velocity_fn, scheduler, starts, texts, texts, 1, args.rollout_guidance_scale)
        x0 = torch.empty_like(noise)
        tracker.phase, entered[:] = "forward", []
        transformer.train()
        inputs = (vae, reward_model, x0, noise, embeds, ["caption"] * batch, ("positive", "negative"), branches, args)
        loss, metrics = trainer.graded_pass(velocity_fn, *inputs)
        loss.backward()
        del loss, metrics, x0, noise, starts, texts, inputs
        if args.validation_prompts != []:
            tracker.phase = "validation"
            with torch.no_grad():  # WanPipeline runs guidance in two passes; its decoder keeps a cache
                latents, velocity_fn = sized(args.validation_size, args.validation_size)
                velocity_fn(latents, 0.5, embeds)
                vae.decode(latents.to(vae.dtype))
    return {phase: peak - weights for phase, peak in tracker.peaks.items() if phase}, entered[2] - entered[1]


class Measured(NamedTuple):
    """What a run puts on its GPU, whatever the engine: bytes but for keys and values of `weights`."""

    weights: Counter  # {(elements, bytes of an element, is trained): number of such parameters of the transformer}
    itemsize: int  # of an element as the transformer is loaded
    frozen: int  # VAE and reward model
    peaks: dict  # {phase: most beyond weights}, as of [`run_phases`], for all layers

    def total(self, each=None, trained=False):
        """Bytes of the parameters, all or only the trained ones, if an element has `each`. Default: those it has."""
        return sum(n * (each or b) * number for (n, b, t), number in self.weights.items() if t or not trained)


def measure(args, launch):
    """[`Measured`] for a run with the flags `args`. `ValueError` if the training script refuses flags or model."""
    model = trainer.read_model_info(args)
    trainer.check_sizes(args, model)
    trainer.check_window(args, model)
    source, weights = trainer.model_source(args), Counter()
    layers = trainer.WanTransformer3DModel.load_config(**source, subfolder=args.transformer_subfolder)["num_layers"]
    vae_config = trainer.AutoencoderKLWan.load_config(**source, subfolder="vae")
    weight_dtype = torch.bfloat16 if launch.mixed_precision == "bf16" else torch.float32
    reward_dtype = {None: weight_dtype, "fp32": torch.float32, "bf16": torch.bfloat16}[args.reward_dtype]
    scheduler = trainer.FlowMatchEulerDiscreteScheduler()  # reads values, which fake tensors lack
    with mock.patch.object(torch.nn.Module, "_apply", assign_data), FakeTensorMode():
        vae = trainer.flatten_vae(trainer.AutoencoderKLWan.from_config(vae_config))
        vae.requires_grad_(False).to(weight_dtype)
        reward_model = make_reward_model(args, reward_dtype)
        frozen = sum(t.nbytes for module in (vae, reward_model) for t in (*module.parameters(), *module.buffers()))
        transformer, dtype = make_transformer(args, launch)
        for name, p in transformer.named_parameters():
            number = 1 if not name.startswith("blocks.") else layers if name.startswith("blocks.0.") else 0
            weights[p.numel(), p.element_size(), p.requires_grad] += number
        peaks, each = run_phases(args, model, transformer, dtype, vae, reward_model, scheduler)
    peaks |= {name: peaks[name] + each * (layers - MEASURED_LAYERS) for name in ("forward", "image", "backward")}
    return Measured(weights, dtype.itemsize, frozen, peaks)


# ---- What the engine holds: rows of (what, bytes, in which phases), on one GPU, and on the host for one process. ----
def plain_engine(args, launch, measured, largest):
    """AdamW of PyTorch, fused, whose step needs no memory, or of torchao, which goes weight by weight."""
    gradients, eight_bit = measured.total(trained=True), args.optimizer == "adamw_8bit"
    return [
        ("parameters", measured.total(), GPU),
        ("optimizer", measured.total(ADAMW_8BIT, trained=True) if eight_bit else 2 * gradients, TRAINING),
        ("gradients", gradients, HELD[args.gradient_accumulation_steps > 1]),
        ("engine buffers", gradients if launch.distributed_type == "MULTI_GPU" else 0, TRAINING),  # buckets of DDP
        ("engine buffers", 16 * largest if eight_bit else 0, "step"),  # both states in float32
    ]


def locked(size, offload):
    """Bytes that PyTorch takes for `size` on the host: page-locked memory, the default, comes in powers of two."""
    return 2 ** (int(size) - 1).bit_length() if offload.get("pin_memory", True) else size


def zero_engine(args, launch, measured, largest):
    """
    ZeRO-2, stage_1_and_2.py: bf16 weights whole on each GPU, and a part of the rest. With offload, the part is cloned
    on the GPU before it goes to the host. Two buckets of gradients are filled in turns, and gathered in a third where
    they go to several processes. The step copies gradients in the type of the master weights.
    ZeRO-3, stage3.py: a part of everything. While the transformer computes, `stage3_max_live_parameters` are gathered,
    or as many as are used again within `stage3_max_reuse_distance`. The step goes by groups of `sub_group_size`.
    Parameters on the host are locked one by one, and copied to a vector that is locked whatever `pin_memory` says.
    """
    zero, bf16 = {**ZERO_DEFAULTS, **launch.deepspeed["zero_optimization"]}, launch.deepspeed["bf16"]
    offload, on_cpu = (zero.get(name) or {} for name in ("offload_optimizer", "offload_param"))
    bucket, moved = 2 * zero.get("reduce_bucket_size", 5e8), offload.get("device") == "cpu"
    part, accumulates = measured.total(1, trained=True) / launch.processes, args.gradient_accumulation_steps > 1
    master = part * (2 if bf16.get("bf16_master_weights_and_grads") else 4)
    states = 2 * master if not moved else part * (4 if bf16.get("bf16_optimizer_states") else 8)
    if zero["stage"] == 2:
        buffers = {"start": 2 * part} if moved else {"step": master - 2 * part}
        buffers["backward"] = bucket * (1 + bool(zero.get("overlap_comm")) + (launch.processes > 1))
        buffers["backward"] += 0 if moved else 2 * part * accumulates
        masters, gradients = locked(master, offload), locked(master, offload) + 2 * part * accumulates
        parameters, copy = (measured.total(2), GPU), locked(2 * part, offload) if moved else 0
    else:
        groups = max(1, part / zero["sub_group_size"])
        live = min(max(zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"]), measured.total(1))
        buffers = {phase: bucket + 2 * live for phase in COMPUTE.split()}
        buffers |= {"backward": 2 * (bucket + live), "step": bucket + (0 if moved else master / groups)}
        masters, gradients = master, locked(2 * part, offload) + groups * locked(master / groups, offload)
        parameters, copy = (measured.total(2) / launch.processes, GPU), 0
        if on_cpu.get("device") == "cpu":  # PyTorch keeps locked memory for later, so the first copy counts
            kept = [w for w in measured.weights.items() if on_cpu.get("pin_memory", True) or not w[0][2]]
            first = sum(locked(2 * n / launch.processes, on_cpu) * number for (n, *_), number in kept)
            parameters, copy = (first, HOST_TRAINING), locked(2 * part, {})
    buffers["backward"] += 12 * largest * moved  # a gradient goes to the host in float32, for its norm in float64
    return [
        *(("engine buffers", size, phase) for phase, size in buffers.items()),
        ("parameters", *parameters),
        ("parameters", copy, HOST_TRAINING),
        ("optimizer", (masters if moved else master) + states, HOST_TRAINING if moved else TRAINING),
        ("gradients", gradients if moved else 2 * part, HOST_TRAINING if moved else HELD[accumulates]),
    ]


# ---- The estimate. --------------------------------------------------------------------------------------------------
def estimate(args, launch, measured):
    """
    {phase: {what: bytes}} of a run with `args`, launched as `launch`, from what [`measure`] found: on the fullest GPU
    in the phases of `GPU`, on the fullest machine in those of `HOST`. `ValueError` if DeepSpeed's file is not clear.
    """
    engine, local = plain_engine if launch.deepspeed is None else zero_engine, launch.processes // launch.machines
    with trainer.blame("The estimate does not know what the DeepSpeed file says"):
        rows = engine(args, launch, measured, max(n for n, _, trained in measured.weights if trained))
    itemsize = 2 if launch.mixed_precision == "bf16" else 4
    saved = measured.total(itemsize, trained=True) + (measured.total(itemsize) if args.save_merged else 0)
    rows += [
        ("frozen models", measured.frozen, GPU),
        ("CUDA context", CUDA_CONTEXT, GPU),
        *(("activations", peak, phase) for phase, peak in measured.peaks.items()),
        ("processes", PROCESS, HOST),
        ("expert, read by each process", measured.total(measured.itemsize), "loading"),
        ("weights, put together by one process", saved / local, "saving"),
    ]
    table = {phase: Counter() for phase in f"{GPU} {HOST}".split()}
    for what, size, phases in rows:
        for phase in phases.split():
            table[phase][what] += size * (local if phase in HOST.split() else 1)
    return table


def report(own, launch, table):
    """What the script prints: what is where in the fullest phase, all phases, and whether it fits."""
    lines, verdicts = [f"{own.config_file}: {launch.processes} processes on {launch.machines} machine(s)."], [""]
    found = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    gpu_memory, host_memory = own.gpu_memory_gb or found / GB, own.host_memory_gb or psutil.virtual_memory().total / GB
    for name, side, memory in (("GPU", GPU, gpu_memory), ("Host", HOST, host_memory)):
        phases = {phase: sum(table[phase].values()) for phase in side.split()}
        phase, need = max(phases.items(), key=lambda pair: pair[1])
        lines.append(f"\nEach {name}, in GB, when it is fullest ({phase}):")
        lines += [f"  {what:<36}{size / GB:8.1f}" for what, size in (*table[phase].items(), ("total", need)) if size]
        lines.append("  by phase: " + ", ".join(f"{key} {size / GB:.1f}" for key, size in phases.items()))
        if not memory:
            verdicts.append(f"{name}: needs {need / GB:.1f} GB; none is here to compare with, see --gpu_memory_gb.")
            continue
        fits = "fits" if need <= TIGHT * memory * GB else "fits barely" if need <= memory * GB else "does not fit"
        verdicts.append(f"{name}: {fits}: {need / GB:.1f} of {memory:.1f} GB.")
    return "\n".join([*lines, *verdicts])


def markdown_row(own, args, flags, launch, table):
    """The row of the table in README.md for this run."""
    use = "full" if args.lora_rank is None else f"LoRA, rank {args.lora_rank}"
    shown = ["--deepspeed_config_file", own.deepspeed_config_file] * bool(own.deepspeed_config_file) + flags
    shown = " ".join(shown).replace(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path} ", "")
    gpu, host = (f"{max(sum(table[phase].values()) for phase in side.split()) / GB:.1f}" for side in (GPU, HOST))
    return f"| {launch.machine} | {use} | `{own.config_file}` | `{shown}` | {gpu} | {host} | {STATE} |"


def main(input_args=None):
    trainer.diffusers.utils.logging.set_verbosity_error()
    with trainer.one_line_errors():
        own, flags, args = parse_args(input_args)
        launch = read_launch(own.config_file, own.deepspeed_config_file)
        if launch.deepspeed is not None:
            trainer.check_deepspeed(args, launch.deepspeed, launch.processes)
        table = estimate(args, launch, measure(args, launch))
        print(markdown_row(own, args, flags, launch, table) if own.markdown else report(own, launch, table))


if __name__ == "__main__":
    main()
