"""What `scripts/estimate_memory.py` measures with tensors without memory is what real tensors take."""

import pytest
import torch
from estimate_memory import MEASURED_LAYERS, Launch, StorageTracker, fake_tensors, make_models, parse_args, run_phases
from helpers import draw
from torch.profiler import profile

from diffusers import AutoencoderKLWan, WanTransformer3DModel

from train_srpo_wan_t2i import (
    ModelInfo,
    Models,
    RewardModel,
    Rollout,
    Solver,
    graded_pass,
    make_recipe,
    make_scheduler,
    plan_update,
    read_model_info,
)


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


def plan_of(args):
    recipe = make_recipe(vars(args))
    return plan_update(recipe, 0, range(args.train_batch_size)), recipe


def euler():
    return Solver(make_scheduler("euler", 1.0), num_steps=1, guidance_scale=3.0)


LAUNCH = Launch("", 1, 1, "NO", "bf16", None)
FP8 = ["--gradient_checkpointing", "--lora_rank", "4", "--base_weights", "fp8"]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(["--drift_weight", "1", "--gradient_checkpointing"], marks=pytest.mark.slow),
        pytest.param(FP8, marks=pytest.mark.slow),
        [*FP8, "--drift_weight", "1"],
    ],
    ids=["autocast", "drift", "fp8", "fp8 and drift"],
)
def test_activations_are_a_line_in_the_layers(tiny_model, flags):
    size = "--height 64 --width 64 --max_sequence_length 16 --validation_prompts".split()
    *_, args = parse_args(["--config_file", "", "--pretrained_model_name_or_path", str(tiny_model), *flags, *size])
    model, (plan, _) = read_model_info(args), plan_of(args)
    peaks = {}
    for layers in (MEASURED_LAYERS, 4):
        solver = euler()
        with fake_tensors():
            models = make_models(args, model, LAUNCH, layers)._replace(reward=PatchReward(), solver=solver)
            peaks[layers], each = run_phases(args, model, models, plan)
    for phase in ("forward", "image", "backward"):
        peaks[MEASURED_LAYERS][phase] += each * (4 - MEASURED_LAYERS)
    assert each > 0
    assert peaks[MEASURED_LAYERS] == peaks[4]


def small_models():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "text_dim": 64, "ffn_dim": 512, "num_layers": 3}
    transformers = [WanTransformer3DModel(**sizes).to(torch.bfloat16) for _ in range(2)]
    vae = AutoencoderKLWan(base_dim=16, num_res_blocks=1).requires_grad_(False).to(torch.bfloat16)
    return transformers[0], transformers[1].requires_grad_(False), vae, PatchReward()


@pytest.mark.parametrize("drift_weight", [0, 1])
def test_tracked_memory_is_that_of_real_tensors(make_args, drift_weight):
    """One graded pass of a small model with fake tensors, and with real ones under PyTorch's profiler."""
    args = make_args("--height", 64, "--width", 64, "--max_sequence_length", 16, "--drift_weight", drift_weight)
    args.validation_prompts = []
    (plan, recipe), solver = plan_of(args), euler()

    def build(embeds):
        transformer, base, vae, reward = small_models()
        return Models(transformer, vae, reward, solver, embeds, base=base), ModelInfo(
            {}, "transformer_2", 0.875, False, 3.0, transformer, vae
        )

    with fake_tensors():
        models, model = build(torch.empty(1, 16, 64, dtype=torch.bfloat16))
        tracked, _ = run_phases(args, model, models, plan)

    models, _ = build(draw(0, 1, 16, 64).bfloat16())
    for parameter in models.transformer.train().parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    noise = draw(1, 1, 16, 1, 8, 8)
    rollout = Rollout(["caption"], models.negative_prompt_embeds, range(1), noise, noise)
    with profile(profile_memory=True) as profiled:
        graded_pass(models, rollout, plan, recipe)[0].backward()
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
