"""`scripts/estimate_memory.py`: its figures for the 14B model, the tables they are printed in, and real memory."""

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from estimate_memory import (
    MEASURED_LAYERS,
    Launch,
    StorageTracker,
    estimate,
    extrapolate,
    fake_tensors,
    main,
    make_transformer,
    measure,
    parse_args,
    read_launch,
    run_phases,
)
from torch.profiler import profile

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from train_srpo_wan_t2i import Branch, ModelInfo, RewardModel, graded_pass, predict_velocity, read_model_info


ROOT = Path(__file__).parent.parent
MODEL = "tests/fixtures/wan2.2-t2v-a14b"
MODEL_FLAGS = ["--pretrained_model_name_or_path", MODEL]
CHECKPOINTING = (*MODEL_FLAGS, "--gradient_checkpointing")
CARDS = {"RTX 4090": 25.8, "A100-40GB": 42.9, "A100-80GB": 85.9, "H100-80GB": 85.5, "RTX 6000 Pro": 102.6}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the YAML names a JSON from there


def estimated(config, *flags, accumulation=1):
    """[`Estimate`] for a run with accelerate_configs/`config`.yaml; what `accumulation` changes is not measured."""
    own, rest, args = parse_args(["--config_file", f"accelerate_configs/{config}.yaml", *CHECKPOINTING, *flags])
    args.gradient_accumulation_steps = accumulation
    launch = read_launch(own.config_file, own.deepspeed_config_file)
    return estimate(args, launch, measure(tuple(rest), launch.mixed_precision, launch.deepspeed is not None))


def gigabytes(config, *flags):
    """What a run needs: ({phase: GB} of a GPU, the same of a host)."""
    sides = estimated(config, *flags)
    return tuple({phase: round(sum(parts.values()) / 1e9, 1) for phase, parts in side.items()} for side in sides)


def components(config, phase, *flags, **options):
    """{what: GB} on a GPU in one phase."""
    return {name: round(size / 1e9, 2) for name, size in estimated(config, *flags, **options).gpu[phase].items()}


def test_the_expert_has_14_billion_parameters():
    measured = measure(CHECKPOINTING, "bf16", True)
    assert sum(count * number for (count, _, _), number in measured.weights.items()) == 14_288_491_584


def test_activations_of_the_graded_pass():
    peaks = {phase: round(peak / 1e9, 2) for phase, peak in measure(CHECKPOINTING, "bf16", True).peaks.items()}
    assert peaks == {"rollout": 0.28, "forward": 1.12, "image": 5.53, "backward": 1.97, "validation": 3.63}


def test_zero2_splits_all_but_the_weights():
    assert components("a100x8", "step") == {
        "parameters": 28.58,
        "optimizer": 21.43,  # 12 bytes x 14.29 billion / 8
        "gradients": 3.57,  # 2 bytes x 14.29 billion / 8
        "engine buffers": 10.72,  # a copy of the gradients and of a state, in float32
        "frozen models": 2.23,
        "CUDA context": 0.6,
    }
    assert components("a100x8_2nodes", "step")["optimizer"] == 10.72


def test_accumulating_keeps_gradients_between_rollouts():
    assert components("a100x8", "rollout")["gradients"] == 0
    assert components("a100x8", "rollout", accumulation=4)["gradients"] == 3.57


def test_offload_moves_master_weights_gradients_and_states_to_the_host():
    assert components("h100", "step")["optimizer"] == 0
    gpu, host = gigabytes("h100")
    # Page-locked: 57.2 GB of master weights in 68.7, 57.2 of gradients in 68.7, 28.6 of weights in 34.4.
    assert host["training"] == round(3.0 + 68.72 + 68.72 + 34.36 + 114.31, 1)
    assert gpu["start"] == 60.0  # the weights twice: ZeRO-2 with offload cannot start on 40 GB


def test_adamw_8bit_and_fp8_save_what_they_promise():
    parts = components("rtx6000pro", "step", "--optimizer", "adamw_8bit")
    assert parts["optimizer"] == 29.02  # 2 bytes of states and 8 / 256 of scales x 14.29 billion
    assert parts["gradients"] == 28.64  # bf16, but float32 where diffusers keeps weights in float32
    assert components("rtx4090_lora", "rollout", "--lora_rank", "32", "--base_weights", "fp8")["parameters"] == 15.0


def readme_rows():
    section = (ROOT / "README.md").read_text().split("## Hardware, time and memory")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|") and "computed" in line]


def test_the_rows_of_the_readme_are_what_the_script_prints(capsys):
    rows = readme_rows()
    assert len(rows) == 12
    for row in rows:
        _, machine, _, config, flags, gpu, _, _, _ = (cell.strip(" `") for cell in row.split("|"))
        main(["--config_file", config, *MODEL_FLAGS, *flags.split(), "--markdown"])
        assert capsys.readouterr().out.strip() == row
        memory = next(size for card, size in CARDS.items() if card in machine)
        starts_too_large = config.endswith("rtx4090.yaml")  # see WHOLE_AT_START
        assert (float(gpu) <= memory) is not starts_too_large


@pytest.mark.parametrize("path", sorted(ROOT.glob("accelerate_configs/*[!u].yaml")), ids=lambda path: path.stem)
def test_the_comments_of_the_configurations_are_true(path):
    lines = path.read_text().splitlines()
    comment = " ".join(line[2:] for line in lines if line.startswith("# "))
    figures = re.findall(r"`([^`]*)` needs ([\d.]+) GB of each GPU and ([\d.]+) GB of each host", comment)
    assert figures
    for flags, *expected in figures:
        flags = [flag for flag in flags.split() if flag != "--gradient_checkpointing"]
        assert [str(max(side.values())) for side in gigabytes(path.stem, *flags)] == expected


@pytest.mark.parametrize(
    "mixed_precision, flags",
    [("bf16", []), ("bf16", ["--gradient_checkpointing", "--lora_rank", "4", "--base_weights", "fp8"])],
    ids=["autocast", "fp8"],
)
def test_activations_are_a_line_in_the_layers(tiny_model, mixed_precision, flags):
    size = "--height 64 --width 64 --max_sequence_length 16 --validation_prompts".split()
    *_, args = parse_args(["--config_file", "", "--pretrained_model_name_or_path", str(tiny_model), *flags, *size])
    launch, model = Launch("", 1, 1, "NO", mixed_precision, None), read_model_info(args)
    scheduler = FlowMatchEulerDiscreteScheduler()
    peaks = {}
    for layers in (*MEASURED_LAYERS, 6):
        with fake_tensors():
            transformer, dtype = make_transformer(args, launch, layers)
            vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(tiny_model, subfolder="vae"))
            models = (vae.requires_grad_(False), PatchReward(), scheduler)
            peaks[layers] = run_phases(args, model, transformer, dtype, *models)
    *measured, whole = peaks.values()
    assert extrapolate(measured, 6) == whole


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
        tracked = run_phases(args, model, transformer, torch.bfloat16, vae, reward_model, scheduler)

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


@pytest.mark.parametrize(
    "changes, flags, message",
    [
        (None, [], "error: `--config_file run.yaml` is not a configuration of Accelerate: [Errno 2]"),
        ({"num_processes": 0}, [], "error: `--config_file run.yaml`: `num_processes` is 0; it must be a positive"),
        ({"use_cpu": True}, [], "error: `--config_file run.yaml`: the estimate knows GPUs, with or without DeepSpeed"),
        (
            {"deepspeed_config": {"deepspeed_config_file": "gone.json"}},
            [],
            "error: `deepspeed_config_file: gone.json` of `--config_file run.yaml` is not a file",
        ),
        (
            {},
            ["--deepspeed_config_file", "gone.json"],
            "error: `--deepspeed_config_file: gone.json` of `--config_file",
        ),
        (
            {},
            ["--pretrained_model_name_or_path", "gone"],
            "error: `--pretrained_model_name_or_path gone` is not a Wan pipeline",
        ),
        ({}, ["--height", "100"], "error: `--height 100` must be a multiple of 16"),
        ({}, ["--optimizer", "adamw_8bit"], "error: `--optimizer adamw_8bit` needs a configuration without DeepSpeed"),
        ({}, ["--reward_model", "CLIP", "--reward_model_path", "gone"], "error: `--reward_model_path gone` is not"),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, monkeypatch, changes, flags, message):
    shutil.copytree(ROOT / MODEL, tmp_path / MODEL)
    shutil.copytree(ROOT / "ds_configs", tmp_path / "ds_configs")
    monkeypatch.chdir(tmp_path)
    if changes is not None:
        config = yaml.safe_load((ROOT / "accelerate_configs/h100.yaml").read_text())
        Path("run.yaml").write_text(yaml.safe_dump({**config, **changes}))
    with pytest.raises(SystemExit) as error:
        main(["--config_file", "run.yaml", *CHECKPOINTING, *flags])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_report_says_what_is_where_and_whether_it_fits(capsys):
    flags = ["--config_file", "accelerate_configs/a100x8.yaml", *CHECKPOINTING]
    main([*flags, "--gpu_memory_gb", "85.9", "--host_memory_gb", "200"])
    report = capsys.readouterr().out
    assert "Each GPU, in GB, when it is fullest (step):" in report
    assert re.search(r"parameters +28\.6\n +optimizer +21\.4\n", report)
    assert "GPU: fits: 67.1 of 85.9 GB." in report
    assert "Host: does not fit: 252.6 of 200.0 GB." in report
    main([*flags, "--gpu_memory_gb", "68", "--host_memory_gb", "1000"])
    assert "GPU: fits barely: 67.1 of 68.0 GB." in capsys.readouterr().out
