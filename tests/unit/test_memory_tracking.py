"""What `scripts/estimate_memory.py` measures with tensors without memory is what real tensors take."""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import estimate_memory
import pytest
import torch
from estimate_memory import MEASURED_LAYERS, Launch, StorageTracker, make_transformer, parse_args, run_phases
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from train_srpo_wan_t2i import Branch, ModelInfo, RewardModel, graded_pass, predict_velocity, read_model_info


@contextmanager
def fake_tensors():
    with mock.patch.object(torch.nn.Module, "_apply", estimate_memory.assign_data), FakeTensorMode():
        yield


class PatchReward(RewardModel):
    """Scores an image by one convolution."""

    keep_borders, scale, image_size, mean, std = True, 1.0, 32, (0.5,) * 3, (0.5,) * 3

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Conv2d(3, 8, 32)
        self.freeze("cpu", torch.bfloat16)

    def image_features(self, pixels):
        return self.model(pixels).flatten(1)

    def text_features(self, texts):
        return torch.ones(len(texts), 8)


@pytest.mark.parametrize(
    "mixed_precision, flags",
    [
        ("bf16", []),
        pytest.param(
            "bf16", ["--gradient_checkpointing", "--lora_rank", "4", "--base_weights", "fp8"], marks=pytest.mark.slow
        ),
    ],
    ids=["autocast", "fp8"],
)
def test_activations_are_a_line_in_the_layers(tiny_model, mixed_precision, flags):
    size = "--height 64 --width 64 --max_sequence_length 16 --validation_prompts".split()
    *_, args = parse_args(["--config_file", "", "--pretrained_model_name_or_path", str(tiny_model), *flags, *size])
    launch, model = Launch("", 1, 1, "NO", mixed_precision, None), read_model_info(args)
    scheduler = FlowMatchEulerDiscreteScheduler()
    peaks = {}
    for layers in (MEASURED_LAYERS, 4):
        with fake_tensors():
            transformer, dtype = make_transformer(args, launch, layers)
            vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(tiny_model, subfolder="vae"))
            models = (vae.requires_grad_(False), PatchReward(), scheduler)
            peaks[layers], each = run_phases(args, model, transformer, dtype, *models)
    for phase in ("forward", "image", "backward"):
        peaks[MEASURED_LAYERS][phase] += each * (4 - MEASURED_LAYERS)
    assert peaks[MEASURED_LAYERS] == peaks[4]


def test_tracked_memory_is_that_of_real_tensors(make_args):
    """One graded pass of a small model with fake tensors, and with real ones under PyTorch's profiler."""
    args = make_args("--height", 64, "--width", 64, "--max_sequence_length", 16)
    args.validation_prompts = []
    model = ModelInfo(True, 0.875, False, (1, 2, 2), 16, 64, 8, 3.0)

    def build():
        sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "text_dim": 64, "ffn_dim": 512, "num_layers": 3}
        vae = AutoencoderKLWan(base_dim=16, num_res_blocks=1).requires_grad_(False).to(torch.bfloat16)
        return WanTransformer3DModel(**sizes).to(torch.bfloat16), vae, PatchReward()

    scheduler = FlowMatchEulerDiscreteScheduler()
    with fake_tensors():
        transformer, vae, reward_model = build()
        tracked, _ = run_phases(args, model, transformer, torch.bfloat16, vae, reward_model, scheduler)

    transformer, vae, reward_model = build()
    for parameter in transformer.train().parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    noise, embeds = torch.randn(1, 16, 1, 8, 8), torch.randn(1, 16, 64, dtype=torch.bfloat16)
    branches = [Branch("denoise", 0.6, 0.5, 0.0), Branch("inversion", 0.6, 0.5, 0.0)]
    velocity_fn = partial(predict_velocity, transformer)
    with profile(profile_memory=True) as profiled:
        inputs = (vae, reward_model, noise, noise, embeds, ["caption"], ("positive", "negative"), branches, args)
        graded_pass(velocity_fn, *inputs)[0].backward()
    live = peak = 0
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert max(tracked[phase] for phase in ("forward", "image", "backward")) == pytest.approx(peak, rel=0.03)


def test_a_storage_counts_once_and_while_it_lives():
    tracker = StorageTracker()
    with tracker:
        first = torch.empty(1000)
        view = first[:10]
        del first
        second = torch.empty(500)
        del view
        third = torch.empty(100)
    assert tracker.peaks == {None: 6000}
    assert tracker.live == second.nbytes + third.nbytes
