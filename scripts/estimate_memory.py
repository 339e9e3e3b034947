#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
r"""
Say how much memory a run of train_srpo_wan_t2i.py will take, before any is spent: no weights are read.

    python scripts/estimate_memory.py --config_file accelerate_configs/a100x8.yaml --gradient_checkpointing

All flags of the training script are understood. Figures are in GB, 1e9 bytes, as `peak_memory_gb` in the logs, but
include the CUDA context. Say `--gpu_memory_gb` and `--host_memory_gb` for another machine than this one.

How it knows:
- Activations are those of the training script's own functions, run on fake tensors that have shapes but no data, with
  every storage counted while it lives. All blocks of the transformer are equal, so 3 and 5 of them tell of any number.
- What Accelerate, DeepSpeed and AdamW hold was read from the sources of DeepSpeed 0.19.8 and PyTorch 2.15; each figure
  says below what it is made of.
Not counted: workspaces of cuDNN, fragmentation, the file cache, what resuming from a checkpoint reads, and a second
copy of the parameters that ZeRO-2 makes at the start where there is room, else on the host.
"""

import argparse
import json
import math
import re
import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import psutil
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, CLIPModel

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.training_utils import cast_training_params


sys.path.insert(0, str(Path(__file__).parent.parent))
import train_srpo_wan_t2i as trainer  # noqa: E402


GB = 1e9
CUDA_CONTEXT = 0.6 * GB  # of each process on its GPU: driver, kernels, NCCL and cuBLAS. Half a GB without NCCL.
PROCESS = 3.0 * GB  # of each process on the host: Python, PyTorch and the host's side of CUDA
ADAMW_8BIT = 2 * (1 + 4 / 256)  # bytes of both states: 8 bits of each, and a float32 for every block of 256
TIGHT = 0.95  # share of a GPU above which fragmentation may end a run that fits by the figures
WHOLE_AT_START = True  # DeepSpeed moves the transformer to the GPU before ZeRO-3, unless `deepspeed.zero.Init` made it
MEASURED_LAYERS = (3, 5)  # from 3 on, every phase is a line
STATE = "computed; not measured on this card yet"


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
    Reads a YAML of Accelerate and the JSON of DeepSpeed, which it names unless `deepspeed_config_file` does.

    Returns:
        [`Launch`]. `ValueError` if a file is missing or says what the estimate does not know.
    """
    flag = f"`--config_file {config_file}`"
    with trainer.blame(f"{flag} is not a configuration of Accelerate"):
        text = Path(config_file).read_text()
        config = dict(yaml.safe_load(text))
    processes, machines = config.get("num_processes", 1), config.get("num_machines", 1)
    if processes < 1 or machines < 1 or processes % machines:
        raise ValueError(f"{flag}: `num_processes` is {processes}; it must be a positive multiple of `num_machines`.")
    kind, precision, deepspeed = str(config.get("distributed_type")), str(config.get("mixed_precision", "no")), None
    if config.get("use_cpu") or kind not in ("NO", "MULTI_GPU", "DEEPSPEED") or precision not in ("no", "bf16"):
        raise ValueError(
            f"{flag}: the estimate knows GPUs, with or without DeepSpeed, and bf16 or no mixed precision."
        )
    if kind == "DEEPSPEED":
        path = deepspeed_config_file or config.get("deepspeed_config", {}).get("deepspeed_config_file")
        name = "--deepspeed_config_file" if deepspeed_config_file else "deepspeed_config_file"
        if path is None or not Path(path).is_file():
            raise ValueError(f"`{name}: {path}` of {flag} is not a file; run this from the folder that it starts at.")
        with trainer.blame(f"`{name} {path}` is not a configuration of DeepSpeed"):
            deepspeed = json.loads(Path(path).read_text())
        if not deepspeed.get("bf16", {}).get("enabled") or deepspeed["zero_optimization"]["stage"] not in (2, 3):
            raise ValueError(f"`{name} {path}`: the estimate knows ZeRO-2 and ZeRO-3 with `bf16` enabled.")
        precision = "bf16"
    elif deepspeed_config_file:
        raise ValueError(f"`--deepspeed_config_file` needs `distributed_type: DEEPSPEED`, but {flag} says {kind}.")
    machine = re.split("[.,]", text.lstrip("# "))[0].replace("\n# ", " ")
    return Launch(machine, processes, machines, kind, precision, deepspeed)


def parse_args(input_args=None):
    """The script's own arguments, the rest of the flags, and what the training script makes of those."""
    parser = argparse.ArgumentParser(
        description="Estimate the memory of a training run.", allow_abbrev=False, epilog="And all flags of training."
    )
    parser.add_argument("--config_file", required=True, help="The file that `accelerate launch` is given.")
    parser.add_argument("--deepspeed_config_file", help="As of `accelerate launch`: instead of the one in the YAML.")
    parser.add_argument("--gpu_memory_gb", type=float, help="Memory of one GPU. Default: that of this machine's.")
    parser.add_argument("--host_memory_gb", type=float, help="Memory of one machine. Default: that of this one.")
    parser.add_argument("--markdown", action="store_true", help="Print a row of the table in README.md.")
    own, flags = parser.parse_known_args(input_args)
    unread = ["--pretrained_model_name_or_path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "--dataset_name", "unread"]
    return own, flags, trainer.parse_args([*unread, *flags])


# ---- Activations: the training script's own functions on fake tensors. ----------------------------------------------
class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages while they live, those of fake tensors too. `peaks` holds them by phase."""

    def __init__(self):
        super().__init__()
        self.live, self.known, self.peaks, self.phase = 0, set(), {}, None

    def track(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            weakref.finalize(storage, self.forget, key, size)
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)

    def forget(self, key, size):
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.track(leaf)
        return result


def assign_data(module, function, recurse=True):
    """`Module._apply` as it acts on real tensors. Fake ones it would swap, which a graph that holds them forbids."""
    for child in module.children():
        child._apply(function)
    for parameter in module.parameters(recurse=False):
        parameter.data = function(parameter.data)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, function(buffer))
    return module


@contextmanager
def fake_tensors():
    with mock.patch.object(torch.nn.Module, "_apply", assign_data), FakeTensorMode():
        yield


def make_transformer(args, launch, layers):
    """The transformer with `layers` blocks, in the types in which script and engine hold it, and its input's type."""
    source = {**trainer.model_source(args), "subfolder": args.transformer_subfolder}
    transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(**source), num_layers=layers)
    full_precision = launch.deepspeed is None and args.optimizer == "adamw" and args.lora_rank is None
    dtype = torch.bfloat16 if launch.mixed_precision == "bf16" and not full_precision else torch.float32
    kept = transformer._keep_in_fp32_modules  # from_pretrained does, DeepSpeed does not
    for name, parameter in transformer.named_parameters():
        if launch.deepspeed is not None or not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    if args.lora_rank is not None:
        trainer.add_lora(transformer, args)
        cast_training_params(transformer, torch.bfloat16 if launch.deepspeed is not None else torch.float32)
    if args.base_weights == "fp8":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if launch.deepspeed is None and launch.mixed_precision == "bf16":
        transformer.forward = torch.autocast("cpu", torch.bfloat16)(transformer.forward)
    return transformer, dtype


class UnreadHPS(trainer.HPSReward):
    """HPSv2.1 without its weights and without texts, whose few tokens do not count."""

    @staticmethod
    def read_weights(path):
        shapes = trainer.HPSReward.empty_model(trainer.HPS_ARCHITECTURE).state_dict()
        return {name: torch.empty(tensor.shape) for name, tensor in shapes.items()}

    def text_features(self, texts):
        return torch.zeros(len(texts), self.model.text_projection.shape[1])


class UnreadCLIP(trainer.CLIPReward):
    """A CLIPModel without its weights and without texts."""

    def __init__(self, path, dtype):
        trainer.RewardModel.__init__(self)
        self.model = CLIPModel(AutoConfig.from_pretrained(path))
        self.image_size = self.model.config.vision_config.image_size
        self.mean = self.std = (0.5, 0.5, 0.5)
        self.freeze("cpu", dtype)

    def text_features(self, texts):
        return torch.zeros(len(texts), self.model.config.projection_dim)


def make_reward_model(args, dtype):
    """The reward model of `--reward_model` from its configuration. `ValueError` if that cannot be loaded."""
    if args.reward_model == "HPS":
        return UnreadHPS("unread", dtype=dtype)
    path = args.reward_model_path or (trainer.PICKSCORE_REPOSITORY if args.reward_model == "PickScore" else None)
    with trainer.blame(f"`--reward_model_path {path}` is not the folder or Hub id of a CLIPModel"):
        return UnreadCLIP(path, dtype)


class Measured(NamedTuple):
    """What a run puts on its GPU, whatever the engine."""

    weights: dict  # {(elements, bytes of an element, is trained): number of such parameters of the transformer}
    frozen: int  # bytes of VAE and reward model
    peaks: dict  # {phase: most bytes beyond weights}; gradients of weights are dropped as soon as they are made


def run_phases(args, model, transformer, dtype, vae, reward_model, scheduler):
    """
    Takes one step of a rollout, one graded pass and the parts of a validation image, on fake tensors.

    Returns:
        {phase: most bytes beyond weights}. After "forward" through the transformer, "image" is the way to the loss and
        back to the first gradient of a weight, and "backward" the rest.
    """
    names = ("denoise", "inversion") if args.branches == "both" else (args.branches,)
    branches = [trainer.Branch(name, sigma_from=0.6, sigma_to=0.5, discount=0.0) for name in names]  # any noise level
    factor, batch, tracker = model.vae_scale_factor, args.train_batch_size, StorageTracker()
    for module in (transformer, vae, reward_model):
        for tensor in (*module.eval().parameters(), *module.buffers()):
            tracker.track(tensor)
    weights = tracker.live

    def forward_done(*_):
        tracker.phase = "image" if tracker.phase == "forward" else tracker.phase

    def drop_gradient(parameter):
        tracker.phase, parameter.grad = "backward", None

    def tokens(height, width):
        area = height // factor // model.patch_size[1] * (width // factor // model.patch_size[2])
        return area if model.expand_timesteps else None

    transformer.register_forward_hook(forward_done)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    velocity_fn = partial(trainer.predict_velocity, transformer, tokens_per_sample=tokens(args.height, args.width))
    with tracker:
        tracker.phase = "rollout"
        embeds = torch.empty(batch, args.max_sequence_length, model.text_dim, dtype=dtype)
        noise = torch.empty(batch, model.in_channels, 1, args.height // factor, args.width // factor)
        x0 = trainer.rollout(velocity_fn, scheduler, noise, embeds, embeds, 1, args.rollout_guidance_scale)
        tracker.phase = "forward"
        transformer.train()
        captions, words = ["caption"] * batch, ("positive", "negative")
        inputs = (velocity_fn, vae, reward_model, x0, noise, embeds, captions, words, branches, args)
        loss, metrics = trainer.graded_pass(*inputs)
        loss.backward()
        transformer.eval()
        del loss, metrics, x0, noise, inputs
        if args.validation_prompts != []:
            tracker.phase = "validation"
            side = args.validation_size
            with torch.no_grad():  # WanPipeline runs guidance in two passes; its decoder keeps a cache
                latents = torch.empty(batch, model.in_channels, 1, side // factor, side // factor)
                trainer.predict_velocity(transformer, latents, 0.5, embeds, tokens(side, side))
                vae.decode(latents.to(vae.dtype))
    return {phase: peak - weights for phase, peak in tracker.peaks.items() if phase}


def extrapolate(values, layers):
    """{name: value} at each of `MEASURED_LAYERS` -> {name: `int`} at `layers`, along a line."""
    (few, more), (low, high) = values, MEASURED_LAYERS
    return {name: round(few[name] + (layers - low) / (high - low) * (more[name] - few[name])) for name in few}


@lru_cache
def measure(flags, mixed_precision, with_deepspeed):
    """[`Measured`] for a run with `flags`, a tuple of those of training. `ValueError` as the training script's."""
    *_, args = parse_args(["--config_file", "unread", *flags])
    launch = Launch("", 1, 1, "", mixed_precision, {} if with_deepspeed else None)
    model = trainer.read_model_info(args)
    trainer.check_sizes(args, model)
    source = trainer.model_source(args)
    layers = WanTransformer3DModel.load_config(**source, subfolder=args.transformer_subfolder)["num_layers"]
    vae_config = AutoencoderKLWan.load_config(**source, subfolder="vae")
    weight_dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    reward_dtype = {None: weight_dtype, "fp32": torch.float32, "bf16": torch.bfloat16}[args.reward_dtype]
    weights, peaks, scheduler = [], [], FlowMatchEulerDiscreteScheduler()  # reads values, which fake tensors lack
    with fake_tensors():
        vae = AutoencoderKLWan.from_config(vae_config).requires_grad_(False).to(weight_dtype)
        reward_model = make_reward_model(args, reward_dtype)
        frozen = sum(t.nbytes for module in (vae, reward_model) for t in (*module.parameters(), *module.buffers()))
        for count in MEASURED_LAYERS:
            transformer, dtype = make_transformer(args, launch, count)
            kinds = ((p.numel(), p.element_size(), p.requires_grad) for p in transformer.parameters())
            weights.append(Counter(kinds))
            peaks.append(run_phases(args, model, transformer, dtype, vae, reward_model, scheduler))
    return Measured(extrapolate(weights, layers), frozen, extrapolate(peaks, layers))


# ---- What the engine holds: bytes on one GPU, and on the host for one process. --------------------------------------
class Engine(NamedTuple):
    parameters: float  # of the transformer, frozen ones too
    optimizer: float  # states, and master weights where there are any
    gradients: float  # when all are made
    start: float = 0  # beyond parameters, before training
    buffers: float = 0  # all the time
    gathered: float = 0  # while the transformer computes
    backward: float = 0  # while gradients are made
    step: float = 0  # beyond gradients, during the optimizer step
    host: dict = {}  # {what: bytes} while training


def plain_engine(args, launch, weights):
    """AdamW of PyTorch, whose step makes a copy of one state, or of torchao, which goes weight by weight."""
    gradients = sum(n * size * count for (n, size, trained), count in weights.items() if trained)
    elements = sum(n * count for (n, _, trained), count in weights.items() if trained)
    eight_bit = args.optimizer == "adamw_8bit"
    return Engine(
        parameters=sum(n * size * count for (n, size, _), count in weights.items()),
        optimizer=elements * ADAMW_8BIT if eight_bit else 2 * gradients,
        gradients=gradients,
        buffers=gradients if launch.distributed_type == "MULTI_GPU" else 0,  # buckets of DistributedDataParallel
        step=16 * max(n for n, _, trained in weights if trained) if eight_bit else gradients,  # both in float32
    )


def page_locked(size, offload):
    """Bytes that PyTorch takes for `size` of them: page-locked ones are rounded up to a power of two."""
    return 2 ** math.ceil(math.log2(size)) if offload.pin_memory else size


def offloads(target):
    """Whether `offload_optimizer` or `offload_param` of a DeepSpeed file moves anything to the host."""
    device = target.device if target is not None else "none"
    if device == "nvme":
        raise ValueError("The estimate does not know offloading to NVMe; use `cpu`.")
    return device == "cpu"


def optimizer_bytes(bf16, on_host):
    """Bytes of an element of the master weights, and of both of AdamW's states."""
    master = 2 if bf16.get("bf16_master_weights_and_grads") else 4
    return master, (4 if bf16.get("bf16_optimizer_states") else 8) if on_host else 2 * master


def zero2_engine(args, launch, zero, bf16, weights):
    """
    ZeRO-2, stage_1_and_2.py: bf16 weights whole on each GPU, and a part of the rest. At the start the part is cloned
    on the GPU before it goes to master weights, wherever those are. Two buckets of gradients are filled in turns, and
    gathered in a third where they go to several processes. The step makes a second copy of the gradients and of a
    state, in the type of the master weights.
    """
    trained = sum(n * count for (n, _, is_trained), count in weights.items() if is_trained)
    part, largest = trained / launch.processes, max(n for n, _, is_trained in weights if is_trained)
    parameters = 2 * sum(n * count for (n, *_), count in weights.items())
    on_host = offloads(zero.offload_optimizer)
    master, states = optimizer_bytes(bf16, on_host)
    buckets = 2 * zero.reduce_bucket_size * (1 + bool(zero.overlap_comm) + (launch.processes > 1))
    accumulates = args.gradient_accumulation_steps > 1
    if not on_host:
        start, backward = (2 + master) * part, buckets + 2 * part * accumulates
        return Engine(
            parameters, (master + states) * part, 2 * part, start, backward=backward, step=2 * (master - 1) * part
        )
    pin = partial(page_locked, offload=zero.offload_optimizer)
    gradients = pin(master * part)
    if accumulates and master == 4:
        parts = (pin(2 * n) * count for (n, _, is_trained), count in weights.items() if is_trained)
        gradients += sum(parts) / launch.processes
    return Engine(
        parameters,
        optimizer=0,
        gradients=0,
        start=2 * part,
        buffers=2 * largest,
        backward=buckets + 12 * largest,  # a gradient in float32 to send, and in float64 for its norm
        host={"parameters": pin(2 * part), "gradients": gradients, "optimizer": pin(master * part) + states * part},
    )


def zero3_engine(args, launch, zero, bf16, weights):
    """
    ZeRO-3, stage3.py: a part of everything. While the transformer computes, `stage3_max_live_parameters` are gathered,
    or as many as are used again within `stage3_max_reuse_distance`. The step goes by groups of `sub_group_size`.
    Parameters on the host are page-locked one by one first, and PyTorch keeps that memory for later.
    """
    processes, persistent = launch.processes, zero.param_persistence_threshold
    kinds = [(n, count, is_trained) for (n, _, is_trained), count in weights.items()]
    total, largest = sum(n * count for n, count, _ in kinds), max(n for n, *_ in kinds)
    trained = sum(n * count for n, count, is_trained in kinds if is_trained)
    part, small = trained / processes, sum(n * count for n, count, _ in kinds if n <= persistent)
    on_host = offloads(zero.offload_optimizer)
    master, states = optimizer_bytes(bf16, on_host)
    group = min(zero.sub_group_size, part)
    gathered = min(total, max(zero.max_live_parameters, zero.max_reuse_distance) + largest)
    host = {}
    if offloads(zero.offload_param):
        pin = partial(page_locked, offload=zero.offload_param)
        single = sum(pin(2 * n / processes) * count for n, count, _ in kinds if n > persistent)
        host["parameters"] = single + 2 ** math.ceil(math.log2(2 * part))
        parameters = 2 * small
    else:
        parameters = 2 * (total / processes + small)
    if on_host:
        pin = partial(page_locked, offload=zero.offload_optimizer)
        host["gradients"] = pin(2 * part) + pin(master * group) * math.ceil(part / group)
        host["optimizer"] = (master + states) * part
    return Engine(
        parameters,
        optimizer=0 if on_host else (master + states) * part,
        gradients=0 if on_host else 2 * part,
        start=2 * total - parameters if WHOLE_AT_START else 4 * largest,
        buffers=2 * zero.reduce_bucket_size,
        gathered=2 * gathered,
        backward=2 * zero.reduce_bucket_size + (12 * largest / processes if on_host else 0),
        step=0 if on_host else 2 * master * group,
        host=host,
    )


def make_engine(args, launch, weights):
    """The [`Engine`] of a launch. `ValueError` if DeepSpeed would refuse its file."""
    if launch.deepspeed is None:
        return plain_engine(args, launch, weights)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # slow, so only where needed

    with trainer.blame("The DeepSpeed file has a `zero_optimization` that DeepSpeed refuses"):
        zero = DeepSpeedZeroConfig(**launch.deepspeed["zero_optimization"])
    make = zero2_engine if zero.stage == 2 else zero3_engine
    return make(args, launch, zero, launch.deepspeed["bf16"], weights)


# ---- The estimate. --------------------------------------------------------------------------------------------------
class Estimate(NamedTuple):
    gpu: dict  # {phase: {what: bytes}} on the fullest GPU
    host: dict  # {phase: {what: bytes}} on the fullest machine

    @staticmethod
    def peak(phases):
        """The phase that takes most, and its bytes."""
        phase = max(phases, key=lambda name: sum(phases[name].values()))
        return phase, sum(phases[phase].values())


def estimate(args, launch, measured):
    """[`Estimate`] of a run with `args`, launched as `launch`, from what [`measure`] found."""
    engine = make_engine(args, launch, measured.weights)
    resident = {
        "parameters": engine.parameters,
        "optimizer": engine.optimizer,
        "frozen models": measured.frozen,
        "engine buffers": engine.buffers,
        "CUDA context": CUDA_CONTEXT,
    }
    gpu = {"start": {**resident, "optimizer": 0, "engine buffers": engine.start}}
    carried = engine.gradients if args.gradient_accumulation_steps > 1 else 0
    for phase, peak in measured.peaks.items():
        gradients = {"backward": engine.gradients, "validation": 0}.get(phase, carried)
        buffers = engine.buffers + engine.gathered + (engine.backward if phase == "backward" else 0)
        gpu[phase] = {**resident, "engine buffers": buffers, "gradients": gradients, "activations": peak}
    gpu["step"] = {**resident, "gradients": engine.gradients, "engine buffers": engine.buffers + engine.step}

    processes = launch.processes // launch.machines
    host_resident = {name: processes * size for name, size in (*engine.host.items(), ("processes", PROCESS))}
    itemsize = 2 if launch.mixed_precision == "bf16" else 4
    trained = sum(n * count for (n, _, is_trained), count in measured.weights.items() if is_trained)
    total = sum(n * count for (n, *_), count in measured.weights.items())
    full_precision = launch.deepspeed is None and args.optimizer == "adamw" and args.lora_rank is None
    loading = processes * total * (4 if full_precision else itemsize)
    saving = itemsize * (trained + (total if args.save_merged else 0))
    host = {
        "loading": {"processes": processes * PROCESS, "expert, read by each process": loading},
        "training": host_resident,
        "saving": {**host_resident, "weights, put together": saving},
    }
    return Estimate(gpu, host)


def verdict(name, need, memory):
    """One line on whether `need` bytes fit into `memory` GB, `None` if that is unknown."""
    if memory is None:
        return f"{name}: {need / GB:.1f} GB needed; there is none here, so say `--gpu_memory_gb`."
    fits = "does not fit" if need > memory * GB else "fits" if need <= TIGHT * memory * GB else "fits barely"
    return f"{name}: {fits}: {need / GB:.1f} of {memory:.1f} GB."


def report(own, args, launch, result):
    """What the script prints: what is where in the fullest phase, all phases, and whether it fits."""
    (gpu_phase, gpu_need), (host_phase, host_need) = map(result.peak, result)
    lines = [f"{own.config_file}: {launch.processes} processes on {launch.machines} machine(s)."]
    for name, phases, phase, need in (
        ("Each GPU", result.gpu, gpu_phase, gpu_need),
        ("Each machine", result.host, host_phase, host_need),
    ):
        lines.append(f"\n{name}, in GB, when it is fullest ({phase}):")
        lines += [f"  {what:<30}{size / GB:8.1f}" for what, size in phases[phase].items() if size]
        lines.append(f"  {'total':<30}{need / GB:8.1f}")
        lines.append("  by phase: " + ", ".join(f"{key} {sum(phases[key].values()) / GB:.1f}" for key in phases))
    gpu_memory, host_memory = own.gpu_memory_gb, own.host_memory_gb
    if gpu_memory is None and torch.cuda.is_available():
        gpu_memory = torch.cuda.get_device_properties(0).total_memory / GB
    host_memory = host_memory or psutil.virtual_memory().total / GB
    return "\n".join([*lines, "", verdict("GPU", gpu_need, gpu_memory), verdict("Host", host_need, host_memory)])


def markdown_row(own, args, flags, launch, result):
    """The row of the table in README.md for this run."""
    use = "full" if args.lora_rank is None else f"LoRA, rank {args.lora_rank}"
    model = (
        flags.index("--pretrained_model_name_or_path") if "--pretrained_model_name_or_path" in flags else len(flags)
    )
    shown = flags[:model] + flags[model + 2 :]
    if own.deepspeed_config_file:
        shown = ["--deepspeed_config_file", own.deepspeed_config_file, *shown]
    gpu, host = (f"{result.peak(phases)[1] / GB:.1f}" for phases in result)
    shown = f"`{' '.join(shown)}`" if shown else ""
    return f"| {launch.machine} | {use} | `{own.config_file}` | {shown} | {gpu} | {host} | {STATE} |"


def main(input_args=None):
    with trainer.one_line_errors():
        own, flags, args = parse_args(input_args)
        launch = read_launch(own.config_file, own.deepspeed_config_file)
        if launch.deepspeed is not None:
            trainer.check_deepspeed(args, launch.deepspeed, launch.processes)
        measured = measure(tuple(flags), launch.mixed_precision, launch.deepspeed is not None)
        result = estimate(args, launch, measured)
        row = markdown_row(own, args, flags, launch, result)
        print(row if own.markdown else report(own, args, launch, result))


if __name__ == "__main__":
    main()
