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
from contextlib import contextmanager
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
    with trainer.input_error(f"{flag} is not a configuration of Accelerate"):
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
        with trainer.input_error(f"{name} {path}` of {flag} is not a DeepSpeed configuration that the estimate knows"):
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
    parser.add_argument("--markdown", action="store_true", help="Print a row of the table in docs/hardware.md.")
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


def make_transformer(config, dtype, launch, layers):
    """A transformer with `layers` blocks, in the types in which `from_pretrained` and then the engine hold it."""
    transformer = trainer.diffusers.WanTransformer3DModel.from_config(config, num_layers=layers)
    kept = set(transformer._keep_in_fp32_modules if launch.deepspeed is None else ())  # DeepSpeed casts all
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    if launch.deepspeed is None and launch.mixed_precision == "bf16":
        transformer.forward = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)(transformer.forward)
    return transformer


def make_reward(args, empty):
    """The reward model of the flags, from an `empty` one on the meta device. Texts, few tokens, do not count."""
    reward = object.__new__(trainer.HPSReward if args.reward_model == "HPS" else trainer.CLIPReward)
    trainer.RewardModel.__init__(reward)
    fake = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in empty.state_dict().items()}
    empty.load_state_dict(fake, assign=True)
    size = empty.visual.image_size[0] if args.reward_model == "HPS" else empty.config.vision_config.image_size
    reward.model, reward.image_size, reward.encode_texts = empty, size, lambda texts: torch.zeros(len(texts), 1)
    reward.scale, reward.mean, reward.std = 1.0, [0.5] * 3, [0.5] * 3
    reward.freeze("cpu", torch.bfloat16 if args.reward_dtype == "bf16" else torch.float32)
    return reward


def empty_reward(args):
    """The network of the reward model of the flags on the meta device. `ValueError` if it is not known."""
    if args.reward_model == "HPS":
        return trainer.HPSReward.empty_model()
    path = args.reward_model_path or (trainer.PICKSCORE_REPOSITORY if args.reward_model == "PickScore" else None)
    with trainer.input_error(f"`--reward_model_path {path}` is not the folder or Hub id of a CLIPModel"):
        config = trainer.transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            return trainer.transformers.CLIPModel(config)


def make_models(args, model, launch, layers=MEASURED_LAYERS):
    """The `Models` of the training script as its `load_models` and the engine make them, but with `layers` blocks, and
    without reward and solver."""
    choice = launch.mixed_precision, args.optimizer, args.lora_rank, launch.deepspeed is not None
    weight_dtype, dtype = trainer.choose_dtypes(*choice)
    config, base = model.transformer.config, None
    transformer = make_transformer(config, dtype, launch, layers)
    # A compiled block has no fake tensors, and takes about the memory of one that is not.
    trainer.set_up_transformer(transformer, argparse.Namespace(**{**vars(args), "compile": False}))
    if launch.deepspeed is not None:
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)  # a LoRA too
    if args.drift_weight and args.lora_rank is None:
        base = make_transformer(config, weight_dtype, launch, layers).requires_grad_(False).eval()
    vae = trainer.flatten_vae(trainer.diffusers.AutoencoderKLWan.from_config(model.vae.config))
    return trainer.Models(
        transformer=transformer,
        vae=vae.requires_grad_(False).eval().to(weight_dtype),
        negative_prompt_embeds=torch.empty(1, args.max_sequence_length, config.text_dim, dtype=dtype),
        token_patch=config.patch_size if model.expand_timesteps else None,
        base=base,
    )


def paint(models, shape, guidance_scale):
    """Paints latents of `shape`, (B, C, T, H, W), in one step, both halves of guidance in one batch."""
    solver = models.solver._replace(guidance_scale=guidance_scale)
    prompt_embeds = models.negative_prompt_embeds.repeat(shape[0], 1, 1)
    return trainer.paint_latents(models._replace(solver=solver), torch.empty(shape), prompt_embeds)


def run_phases(args, model, models, plan):
    """Takes one step of a rollout, one graded pass, back and forth, and paints validation images in one step, all on
    fake tensors. Returns {phase: most bytes beyond weights}, where gradients of weights are dropped as soon as they
    are made, and the bytes that each further block of the transformer keeps from "forward" to "backward"."""
    recipe = trainer.make_recipe(vars(args))
    batch = args.train_batch_size
    transformer, tracker, entered = models.transformer, StorageTracker(), []
    for module in filter(None, (transformer, models.base, models.vae, models.reward)):
        list(map(tracker.track, (*module.parameters(), *module.buffers())))
    weights = tracker.live

    def enter_block(*_):
        if torch.is_grad_enabled():  # not in the pass of a LoRA's base
            entered.append(tracker.live)

    def leave_transformer(*_):
        if torch.is_grad_enabled() and tracker.phase == "forward":
            tracker.phase = "image"

    def drop_gradient(parameter):
        tracker.phase, parameter.grad = "backward", None

    transformer.register_forward_hook(leave_transformer)
    for block in transformer.blocks:
        block.register_forward_pre_hook(enter_block)
    for parameter in filter(lambda parameter: parameter.requires_grad, transformer.parameters()):
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    with tracker:
        tracker.phase = "rollout"
        together = min(args.rollout_batch_size or batch, batch * args.gradient_accumulation_steps)
        shape = model.latent_shape(args.height, args.width)
        paint(models, (together, *shape), args.rollout_guidance_scale)
        tracker.phase = "forward"
        noise, x0 = torch.empty(2, batch, *shape)
        prompt_embeds = models.negative_prompt_embeds.repeat(batch, 1, 1)
        rollout = trainer.Rollout(["caption"] * batch, prompt_embeds, range(batch), noise, x0)
        transformer.train()
        loss, metrics = trainer.graded_pass(models, rollout, plan, recipe)
        loss.backward()
        transformer.eval()
        del loss, metrics, noise, x0, prompt_embeds, rollout
        if args.validation_prompts != []:
            tracker.phase = "validation"
            count = min(batch, len(args.validation_prompts or range(batch)))
            shape = count, *model.latent_shape(args.validation_size, args.validation_size)
            with torch.no_grad():  # as `paint_validation` does it: the VAE is the flat one here too
                x0 = paint(models, shape, args.validation_guidance_scale)
                pixels, _ = trainer.decode_latents(models.vae, x0)
                models.reward(pixels, ["caption"] * count)
    return {phase: peak - weights for phase, peak in tracker.peaks.items() if phase}, entered[2] - entered[1]


class Measured(NamedTuple):
    """What a run puts on its GPU, whatever the engine: bytes but for keys and values of `weights` and `base`."""

    weights: Counter  # {(elements, bytes of an element, is trained): number of such parameters of the transformer}
    base: Counter  # the same of the frozen copy for the drift
    itemsize: int  # of an element as the transformer is loaded
    frozen: int  # VAE and reward model
    peaks: dict  # {phase: most beyond weights}, as of [`run_phases`], for all layers

    def total(self, each=None, trained=False):
        """Bytes of the parameters, all or only the trained ones, if an element has `each`. Default: those it has."""
        return sum(n * (each or b) * number for (n, b, t), number in self.weights.items() if t or not trained)


def count_weights(transformer, layers):
    """The `weights` of [`Measured`] if the transformer had so many `layers`, of which all but the first are alike."""
    weights = Counter()
    for name, p in transformer.named_parameters():
        number = 1 if not name.startswith("blocks.") else layers if name.startswith("blocks.0.") else 0
        weights[p.numel(), p.element_size(), p.requires_grad] += number
    return weights


@contextmanager
def fake_tensors():
    """Makes tensors that have shapes but no data."""

    def resize_matrix(size, new_size, device):  # the trainer makes it once and keeps it, so it must not be a fake one
        return torch.empty(new_size, size, device=device)

    patches = (
        mock.patch.object(torch.nn.Module, "_apply", assign_data),
        mock.patch.object(trainer, "resize_matrix", resize_matrix),
    )
    # Noise levels were computed before, and have some.
    with patches[0], patches[1], FakeTensorMode(allow_non_fake_inputs=True):
        yield


def measure(args, launch):
    """[`Measured`] for a run with the flags `args`. `ValueError` if the training script refuses flags or model."""
    model = trainer.read_model_info(args)
    trainer.check_flags_for_model(args, model)
    layers, empty = model.transformer.config.num_layers, empty_reward(args)
    # Plan and scheduler compute with the values of tensors, which fake ones lack.
    recipe, scheduler = trainer.make_recipe(vars(args)), trainer.make_scheduler("euler", shift=1.0)
    solver = trainer.Solver(scheduler, num_steps=1, guidance_scale=args.rollout_guidance_scale)
    plan = trainer.plan_update(recipe, step=0, samples=range(args.train_batch_size))
    with fake_tensors():
        models = make_models(args, model, launch)._replace(reward=make_reward(args, empty), solver=solver)
        modules = models.vae, models.reward
        frozen = sum(t.nbytes for module in modules for t in (*module.parameters(), *module.buffers()))
        weights = count_weights(models.transformer, layers)
        base = Counter() if models.base is None else count_weights(models.base, layers)
        peaks, each = run_phases(args, model, models, plan)
    peaks |= {name: peaks[name] + each * (layers - MEASURED_LAYERS) for name in ("forward", "image", "backward")}
    itemsize = models.negative_prompt_embeds.itemsize
    return Measured(weights, base, itemsize, frozen, peaks)


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


def frozen_copy(launch, measured):
    """The untrained weights that `--drift_weight` holds the velocity near. When the engine has taken its memory, each
    process reads them whole; then they go to the GPU, or where its part of the parameters is under ZeRO-3."""
    name, size = "frozen copy for the drift", sum(n * b * number for (n, b, _), number in measured.base.items())
    zero = {} if launch.deepspeed is None else launch.deepspeed["zero_optimization"]
    on_cpu, part = zero.get("offload_param") or {}, 1 / launch.processes if zero.get("stage") == 3 else 1
    if on_cpu.get("device") != "cpu":
        return [(name, size * part, TRAINING), (name, size, "training")]
    kept = sum(locked(n * b * part, on_cpu) * number for (n, b, _), number in measured.base.items())
    return [(name, max(size, kept), "training"), (name, kept, "saving")]


# ---- The estimate. --------------------------------------------------------------------------------------------------
def estimate(args, launch, measured):
    """
    {phase: {what: bytes}} of a run with `args`, launched as `launch`, from what [`measure`] found: on the fullest GPU
    in the phases of `GPU`, on the fullest machine in those of `HOST`. `ValueError` if DeepSpeed's file is not clear.
    """
    engine, local = plain_engine if launch.deepspeed is None else zero_engine, launch.processes // launch.machines
    with trainer.input_error("The estimate does not know what the DeepSpeed file says"):
        rows = engine(args, launch, measured, max(n for n, _, trained in measured.weights if trained))
    itemsize = 2 if launch.mixed_precision == "bf16" else 4
    saved = measured.total(itemsize, trained=True)
    rows += frozen_copy(launch, measured)
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
    """The row of the table in docs/hardware.md for this run."""
    use = "full" if args.lora_rank is None else f"LoRA, rank {args.lora_rank}"
    shown = ["--deepspeed_config_file", own.deepspeed_config_file] * bool(own.deepspeed_config_file) + flags
    shown = " ".join(shown).replace(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path} ", "")
    gpu, host = (f"{max(sum(table[phase].values()) for phase in side.split()) / GB:.1f}" for side in (GPU, HOST))
    return f"| {launch.machine} | {use} | `{own.config_file}` | `{shown}` | {gpu} | {host} |"


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
