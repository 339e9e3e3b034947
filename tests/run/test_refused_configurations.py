"""The configurations of Accelerate and DeepSpeed that `train_srpo_wan_t2i.py` refuses."""

import json
import re

import pytest
import yaml
from helpers import ENGINES, ROOT, ZERO_2, run_launcher


@pytest.fixture
def write_yaml(tmp_path):
    """
    Function: top-level fields and fields of `deepspeed_config` -> flags of `accelerate launch` for one process, of
    accelerate_configs/a100x8.yaml with those fields.
    """

    def write(deepspeed=None, **fields):
        config = yaml.safe_load((ROOT / "accelerate_configs/a100x8.yaml").read_text())
        config.update(fields, num_processes=1, main_process_port=0)
        config["deepspeed_config"].update(deepspeed or {})
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return f"--config_file {tmp_path}/config.yaml"

    return write


@pytest.fixture
def write_json(tmp_path):
    """Function: fields -> flags of `accelerate launch` for one process, of ds_configs/zero2.json with those fields."""

    def write(**fields):
        config = json.loads((ROOT / "ds_configs/zero2.json").read_text())
        (tmp_path / "ds.json").write_text(json.dumps({**config, **fields}))
        return f"{ZERO_2} --deepspeed_config_file {tmp_path}/ds.json"

    return write


@pytest.mark.parametrize(
    "field, value",
    [
        ("zero_stage", 3),
        ("gradient_accumulation_steps", 4),
        ("gradient_clipping", 1.0),
        ("offload_optimizer_device", "cpu"),
        ("offload_param_device", "cpu"),
    ],
)
def test_a_yaml_file_that_sets_what_its_deepspeed_file_sets(refusal, write_yaml, field, value):
    message = refusal(launcher=write_yaml({field: value}))
    assert message.startswith("`accelerate launch` and its configuration files ")
    assert f"'{field}'" in message and "remove others config variables" in message


def test_a_yaml_file_with_a_precision_beside_a_deepspeed_file(refusal, write_yaml):
    message = refusal(launcher=write_yaml(mixed_precision="bf16"))
    assert message.startswith("`accelerate launch` and its configuration files ")
    assert "'mixed_precision'" in message and "specify them appropriately in the DeepSpeed config file" in message


def test_a_deepspeed_file_that_is_not_there(refusal, tmp_path):
    message = refusal(launcher=f"{ZERO_2} --deepspeed_config_file {tmp_path}/nothing.json")
    assert message.startswith("`accelerate launch` and its configuration files ")
    assert message.endswith(f"{tmp_path}/nothing.json")


def test_a_deepspeed_file_that_is_not_json(refusal, tmp_path):
    (tmp_path / "ds.json").write_text("zero_optimization: 2")
    message = refusal(launcher=f"{ZERO_2} --deepspeed_config_file {tmp_path}/ds.json")
    assert f"{tmp_path}/ds.json" in message


def test_a_deepspeed_file_without_zero(refusal, tmp_path):
    (tmp_path / "ds.json").write_text('{"bf16": {"enabled": true}}')
    message = refusal(launcher=f"{ZERO_2} --deepspeed_config_file {tmp_path}/ds.json")
    assert message.endswith("Please specify the ZeRO optimization config in the DeepSpeed config.")


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_deepspeed_file_with_an_optimizer_or_a_scheduler_of_its_own(refusal, write_json, section):
    message = refusal(launcher=write_json(**{section: {"type": "AdamW" if section == "optimizer" else "WarmupLR"}}))
    assert "DeepSpeed file" in message and f"`{section}`" in message


def test_a_deepspeed_file_with_another_number_than_the_flag(refusal, write_json):
    assert refusal("--max_grad_norm", 0.5, launcher=write_json(gradient_clipping=1.0)) == (
        "The DeepSpeed file says `gradient_clipping` 1.0, but `--max_grad_norm` and 1 processes make it 0.5. "
        'Write "auto" into the file, or change the flag.'
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_adamw_8bit_with_deepspeed(refusal, engine):
    pytest.importorskip("torchao")
    launcher = f"{ZERO_2} --deepspeed_config_file ds_configs/{engine}.json"
    message = refusal("--optimizer", "adamw_8bit", launcher=launcher)
    assert re.match("`--optimizer adamw_8bit` .*without DeepSpeed", message)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_base_in_fp8_with_deepspeed(refusal, engine):
    launcher = f"{ZERO_2} --deepspeed_config_file ds_configs/{engine}.json"
    message = refusal("--lora_rank", 4, "--base_weights", "fp8", launcher=launcher)
    assert re.match(".*`--base_weights fp8` .*without DeepSpeed", message)


@pytest.mark.parametrize("engine", ["zero3", "zero3_offload"])
def test_compiling_under_zero_3(refusal, engine):
    message = refusal("--compile", launcher=f"{ZERO_2} --deepspeed_config_file ds_configs/{engine}.json")
    assert message.startswith("`--compile` needs whole weights; under ZeRO-3 ")


def test_fp16_in_a_yaml_file(refusal, tmp_path):
    config = yaml.safe_load((ROOT / "accelerate_configs/cpu.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "mixed_precision": "fp16"}))
    message = refusal(launcher=f"--config_file {tmp_path}/config.yaml")
    assert message == "`mixed_precision: fp16` is too narrow for Wan's transformer. Use bf16."


def test_fp16_in_a_deepspeed_file(refusal, write_json):
    message = refusal(launcher=write_json(fp16={"enabled": True}, bf16={"enabled": False}))
    assert "fp16` is too narrow for Wan's transformer. Use bf16." in message


def test_fp16_for_the_launcher_and_bf16_in_the_deepspeed_file(refusal):
    message = refusal(launcher=f"{ZERO_2} --mixed_precision fp16")
    assert message.startswith("`accelerate launch` and its configuration files ")
    assert "`--mixed_precision` arg cannot be set to `fp16` when `bf16` is set in the DeepSpeed config file" in message


@pytest.mark.slow
def test_a_real_launch_of_two_processes_says_what_is_wrong_with_the_deepspeed_file(make_flags, write_json, tmp_path):
    launcher = f"{write_json(train_batch_size=8)} --num_processes 2"
    done = run_launcher(*launcher.split(), "train_srpo_wan_t2i.py", *make_flags())
    assert done.returncode != 0
    message = (
        "error: The DeepSpeed file says `train_batch_size` 8, but `--train_batch_size` and 2 processes make it 2."
    )
    assert 1 <= done.stderr.count(message) <= 2, done.stderr
    assert 'File "train_srpo_wan_t2i.py"' not in done.stderr and f'File "{ROOT}/train' not in done.stderr
    assert not (tmp_path / "output").exists()
