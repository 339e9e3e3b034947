"""`scripts/estimate_memory.py`: its figures for the 14B model and the tables they are printed in."""

import re
import shutil
from pathlib import Path

import estimate_memory
import pytest
import torch
import yaml
from estimate_memory import GPU, HOST, Launch, estimate, main, parse_args, read_launch
from helpers import ROOT


MODEL = "tests/fixtures/wan2.2-t2v-a14b"

MODEL_FLAGS = ["--pretrained_model_name_or_path", MODEL]

CHECKPOINTING = (*MODEL_FLAGS, "--gradient_checkpointing")

CARDS = {"RTX 4090": 25.8, "A100-40GB": 42.9, "A100-80GB": 85.9, "H100-80GB": 85.5, "RTX 6000 Pro": 102.6}

DEEPSPEED = Launch("", 1, 1, "DEEPSPEED", "bf16", {})

PLAIN_MEASURE, MEASURED = estimate_memory.measure, {}


def measure(args, launch):
    """The script's `measure`, once for all tests with the same flags and precision."""
    key = str(vars(args)), launch.mixed_precision, launch.deepspeed is None
    if key not in MEASURED:
        MEASURED[key] = PLAIN_MEASURE(args, launch)
    return MEASURED[key]


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the YAML names a JSON from there
    monkeypatch.setattr(estimate_memory, "measure", measure)


def measured(*flags):
    """What the 14B model puts on a GPU under DeepSpeed."""
    *_, args = parse_args(["--config_file", "unread", *CHECKPOINTING, *flags])
    return measure(args, DEEPSPEED)


def gigabytes(config, *flags, accumulation=1, **offloads):
    """
    {phase: {what: GB}} of a run with accelerate_configs/`config`.yaml. What `accumulation` changes is not measured;
    `offloads` are changes to the parts of the DeepSpeed file.
    """
    own, _, args = parse_args(["--config_file", f"accelerate_configs/{config}.yaml", *CHECKPOINTING, *flags])
    launch = read_launch(own.config_file, own.deepspeed_config_file)
    found = measure(args, launch)
    args.gradient_accumulation_steps = accumulation
    for name, changes in offloads.items():
        launch.deepspeed["zero_optimization"][name].update(changes)
    table = estimate(args, launch, found)
    return {phase: {what: size / 1e9 for what, size in parts.items() if size} for phase, parts in table.items()}


def rounded(parts):
    return {what: round(size, 2) for what, size in parts.items()}


def most(table, side):
    """GB in the fullest phase, as the script prints it."""
    return f"{max(sum(table[phase].values()) for phase in side.split()):.1f}"


def test_the_expert_has_14_billion_parameters():
    assert measured().total(1) == 14_288_491_584


def test_activations_of_the_graded_pass():
    peaks = {phase: round(peak / 1e9, 2) for phase, peak in measured().peaks.items()}
    assert peaks == {"rollout": 0.28, "forward": 1.12, "image": 4.52, "backward": 1.98, "validation": 1.42}


def test_zero2_splits_all_but_the_weights():
    assert rounded(gigabytes("a100x8")["step"]) == {
        "parameters": 28.58,
        "optimizer": 21.43,  # 12 bytes x 14.29 billion / 8
        "gradients": 3.57,  # 2 bytes x 14.29 billion / 8
        "engine buffers": 3.57,  # a copy of the gradients in float32, less those in bf16
        "frozen models": 4.04,
        "CUDA context": 0.6,
    }
    assert rounded(gigabytes("a100x8_2nodes")["step"])["optimizer"] == 10.72


def test_accumulating_keeps_gradients_between_rollouts():
    assert "gradients" not in gigabytes("a100x8")["rollout"]
    assert rounded(gigabytes("a100x8", accumulation=4)["rollout"])["gradients"] == 3.57


def test_offload_moves_master_weights_gradients_and_states_to_the_host():
    table = gigabytes("h100")
    assert "optimizer" not in table["step"]
    assert rounded(table["training"]) == {
        "parameters": 28.58,  # a copy in bf16, on its way to the GPU
        "gradients": 57.15,
        "optimizer": 171.46,  # 12 bytes x 14.29 billion
        "processes": 3.0,
    }
    assert most(table, GPU) == "61.8"  # the weights twice: ZeRO-2 with offload cannot start on 40 GB


def test_page_locked_memory_comes_in_powers_of_two():
    plain = gigabytes("h100")["training"]
    locked = gigabytes("h100", offload_optimizer={"pin_memory": True})["training"]
    assert locked["gradients"] == 2**36 / 1e9
    assert sum(locked.values()) - sum(plain.values()) == pytest.approx(28.9, abs=0.1)


def test_under_zero3_the_vector_of_weights_is_page_locked_in_any_case():
    assert gigabytes("rtx4090", offload_param={"pin_memory": False})["training"]["parameters"] == 2**35 / 1e9
    assert gigabytes("rtx4090")["training"]["parameters"] == pytest.approx(2**35 / 1e9 + 43.7, abs=0.1)


@pytest.mark.slow
def test_adamw_8bit_and_fp8_save_what_they_promise():
    parts = rounded(gigabytes("rtx6000pro", "--optimizer", "adamw_8bit")["step"])
    assert parts["optimizer"] == 29.02  # 2 bytes of states and 8 / 256 of scales x 14.29 billion
    assert parts["gradients"] == 28.64  # bf16, but float32 where diffusers keeps weights in float32
    table = gigabytes("rtx4090_lora", "--lora_rank", "32", "--base_weights", "fp8")
    assert rounded(table["rollout"])["parameters"] == 15.0


COPY = "frozen copy for the drift"


def copies(config, *flags):
    """{phase: GB of the frozen copy} where there is one."""
    table = gigabytes(config, "--drift_weight", "0.1", *flags)
    return {phase: round(parts[COPY], 1) for phase, parts in table.items() if COPY in parts}


TRAINED = estimate_memory.TRAINING.split()


def test_without_deepspeed_the_copy_for_the_drift_is_on_the_gpu():
    on_gpu = dict.fromkeys(TRAINED, 28.6)
    assert copies("rtx6000pro", "--optimizer", "adamw_8bit") == {**on_gpu, "training": 28.6}


def test_under_zero2_each_gpu_holds_the_copy_for_the_drift():
    assert copies("a100x8") == {**dict.fromkeys(TRAINED, 28.6), "training": 228.6}


def test_with_offload_under_zero2_the_copy_comes_to_the_gpu_after_the_start():
    found = copies("h100")
    assert found == {**dict.fromkeys(TRAINED, 28.6), "training": 28.6}
    assert "start" not in found


def test_under_zero3_the_copy_for_the_drift_is_split():
    found = copies("a100x8", "--deepspeed_config_file", "ds_configs/zero3.json")
    assert found == {**dict.fromkeys(TRAINED, 3.6), "training": 228.6}


def test_with_offload_under_zero3_the_copy_for_the_drift_stays_on_the_host_page_locked():
    assert copies("rtx4090") == {"training": 43.7, "saving": 43.7}


def test_a_lora_needs_no_copy_for_the_drift():
    assert copies("rtx4090_lora", "--lora_rank", "32", "--base_weights", "fp8") == {}


def hardware_rows():
    lines = (ROOT / "docs/hardware.md").read_text().splitlines()
    return [line for line in lines if line.startswith("|") and "accelerate_configs/" in line]


@pytest.mark.slow
def test_the_rows_of_the_table_are_what_the_script_prints(capsys):
    rows = hardware_rows()
    assert len(rows) == 12
    for row in rows:
        _, machine, _, config, flags, gpu, *_ = (cell.strip(" `") for cell in row.split("|"))
        main(["--config_file", config, *MODEL_FLAGS, *flags.split(), "--markdown"])
        assert capsys.readouterr().out.strip() == row
        memory = next(size for card, size in CARDS.items() if card in machine)
        assert float(gpu) <= memory


MEASURED_APART = ("a100_40gb", "rtx4090_lora", "rtx6000pro")  # with other flags than all others, which takes a while
CONFIGURATIONS = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in MEASURED_APART else ())
    for path in sorted(ROOT.glob("accelerate_configs/*[!u].yaml"))
]


@pytest.mark.parametrize("path", CONFIGURATIONS)
def test_the_comments_of_the_configurations_are_true(path):
    machine, need, *others = path.read_text().splitlines()
    assert machine.startswith("# ") and not any(line.startswith("#") for line in others), "two lines"
    flags, *expected = re.fullmatch(
        r"# `(.*)` at 512x512: ([\d.]+) GB of each GPU, ([\d.]+) GB of each host\.", need
    ).groups()
    flags = [flag for flag in flags.split() if flag != "--gradient_checkpointing"]
    table = gigabytes(path.stem, *flags)
    assert [most(table, side) for side in (GPU, HOST)] == expected


@pytest.mark.parametrize(
    "changes, flags, message",
    [
        (None, [], "error: `--config_file run.yaml` is not a configuration of Accelerate: [Errno 2]"),
        (
            {"num_processes": 0},
            [],
            "error: `--config_file run.yaml`: `num_processes: 0` must be a positive multiple of `num_machines`",
        ),
        ({"num_machines": 2}, [], "error: `--config_file run.yaml`: `num_processes: 1` must be a positive multiple"),
        (
            {"num_processes": "many"},
            [],
            "error: `--config_file run.yaml` is not a configuration of Accelerate: invalid",
        ),
        ({"use_cpu": True}, [], "error: `--config_file run.yaml`: the estimate knows GPUs in bf16"),
        (
            {"deepspeed_config": {"deepspeed_config_file": "gone.json"}},
            [],
            "error: `deepspeed_config_file: gone.json` of `--config_file run.yaml` is not a DeepSpeed configuration",
        ),
        ({}, ["--deepspeed_config_file", "gone.json"], "error: `--deepspeed_config_file gone.json` of `--config_file"),
        (
            {},
            ["--pretrained_model_name_or_path", "gone"],
            "error: `--pretrained_model_name_or_path gone` is not here, and the Hub does not answer",
        ),
        ({}, ["--height", "tall"], "error: argument --height: invalid whole number value: 'tall'"),
        ({}, ["--tallness", "100"], "error: unknown arguments: --tallness. See --help"),
        ({}, ["--train_batch_size", "0"], "error: argument --train_batch_size: must be at least 1, but is 0"),
        ({}, ["--train_timestep", "1", "25"], "error: `--train_timestep 1 25` starts at sigma 0.975, above"),
        ({}, ["--height", "100"], "error: `--height 100` must be a multiple of 16"),
        (
            {},
            ["--optimizer", "adamw_8bit"],
            "error: `--optimizer adamw_8bit` and `--base_weights fp8` need a configuration without DeepSpeed",
        ),
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
    main([*flags, "--gpu_memory_gb", "85.9", "--host_memory_gb", "300"])
    report = capsys.readouterr().out
    assert "Each GPU, in GB, when it is fullest (backward):" in report
    assert re.search(r"parameters +28\.6\n", report)
    assert re.search(r"optimizer +21\.4\n", report)
    assert report.endswith("GPU: fits: 63.2 of 85.9 GB.\nHost: fits: 252.6 of 300.0 GB.\n")
    main([*flags, "--gpu_memory_gb", "64", "--host_memory_gb", "1000"])
    assert "GPU: fits barely: 63.2 of 64.0 GB." in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_report_says_what_is_needed(capsys):
    main(["--config_file", "accelerate_configs/rtx4090.yaml", *CHECKPOINTING])
    assert "GPU: needs 11.6 GB; none is here to compare with, see --gpu_memory_gb.\n" in capsys.readouterr().out


def test_a_4090_fits_where_its_host_has_the_memory(capsys):
    flags = ["--config_file", "accelerate_configs/rtx4090.yaml", *CHECKPOINTING, "--gpu_memory_gb", "25.8"]
    main([*flags, "--host_memory_gb", "64"])
    assert capsys.readouterr().out.endswith("GPU: fits: 11.6 of 25.8 GB.\nHost: does not fit: 376.8 of 64.0 GB.\n")
    main([*flags, "--host_memory_gb", "512"])
    assert capsys.readouterr().out.endswith("Host: fits: 376.8 of 512.0 GB.\n")
