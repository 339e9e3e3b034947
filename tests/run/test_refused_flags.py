"""The flags that `train_srpo_wan_t2i.py` refuses, in one line, before it loads a model or touches a file."""

import huggingface_hub
import pytest
from helpers import CPU, run_launcher

from train_srpo_wan_t2i import parse_args


# ---- The training window. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, sigma, largest",
    [
        ("--train_timestep 4 25", "0.900", "5 40"),
        ("--train_timestep 0 25", "1.000", "5 40"),
        ("--train_timestep 11 25 --shift 3", "0.888", "12 40"),
        ("--num_inference_steps 50", "0.900", "7 50"),
    ],
)
def test_a_window_above_the_boundary(refusal, flags, sigma, largest):
    message = refusal(*flags.split())
    assert f"starts at sigma {sigma}, above the boundary 0.875 of the low-noise expert" in message
    assert message.startswith("`--train_timestep ") and f"`--train_timestep {largest}`" in message


@pytest.mark.parametrize("window", ["25 5", "5 5", "-1 25", "5 41"])
def test_a_window_that_does_not_grow_or_is_outside_the_schedule(refusal, window):
    assert refusal("--train_timestep", *window.split()).startswith(f"`--train_timestep {window}` must be two growing")


# ---- Numbers. -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["height", "width", "validation_size"])
@pytest.mark.parametrize("value, example", [(40, 32), (8, 16), (0, 16), (-16, 16)])
def test_a_size_that_is_not_a_multiple(refusal, name, value, example):
    message = refusal(f"--{name}", value)
    assert message == f"`--{name} {value}` must be a multiple of 16 for this model, for example {example}."


@pytest.mark.parametrize(
    "name",
    [
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "max_sequence_length",
        "sampling_steps",
        "num_inference_steps",
        "validation_steps",
        "checkpointing_steps",
        "updates_per_rollout",
        "rollout_batch_size",
        "checkpoints_total_limit",
    ],
)
@pytest.mark.parametrize("value", [0, -3])
def test_a_count_below_one(refusal, name, value):
    assert refusal(f"--{name}", value) == f"`--{name}` must be at least 1, but is {value}."


@pytest.mark.parametrize("steps", [3, 10])
def test_checkpoints_in_the_middle_of_a_rollout(refusal, steps):
    message = refusal("--updates_per_rollout", 4, "--checkpointing_steps", steps)
    assert message.startswith("`--checkpointing_steps` must be a multiple of `--updates_per_rollout`")


@pytest.mark.parametrize("flags", ["", "--updates_per_rollout 1"])
def test_new_noise_for_rollouts_that_are_used_once(refusal, flags):
    message = refusal("--renew_noise", *flags.split())
    assert message.startswith("`--renew_noise` needs `--updates_per_rollout` above 1")


def test_too_few_noise_levels(refusal):
    assert refusal("--timestep_length", 9) == "`--timestep_length` must be at least 10, but is 9."


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, 1.5])
def test_a_share_of_injected_noise_outside_0_and_1(refusal, ratio):
    assert refusal("--groundtruth_ratio", ratio) == f"`--groundtruth_ratio` must be between 0 and 1, but is {ratio}."


def test_a_negative_seed(refusal):
    assert refusal("--seed", -1) == "`--seed` must be at least 0, but is -1."


@pytest.mark.parametrize("name", ["learning_rate", "drift_weight"])
def test_a_negative_learning_rate_or_weight(refusal, name):
    assert refusal(f"--{name}", -0.5) == f"`--{name}` must be at least 0, but is -0.5."


@pytest.mark.parametrize("name", ["shift", "rollout_shift", "loss_weight_shift", "max_grad_norm"])
def test_a_shift_or_norm_that_is_not_positive(refusal, name):
    assert refusal(f"--{name}", 0) == f"`--{name}` must be positive, but is 0.0."


def test_an_unknown_tracker(refusal):
    assert "--report_to: invalid choice: 'foo'" in refusal("--report_to", "foo")


# ---- The Hub. -------------------------------------------------------------------------------------------------------


def test_pushing_at_every_checkpoint_without_pushing(refusal):
    assert refusal("--hub_strategy", "checkpoint") == "`--hub_strategy checkpoint` needs `--push_to_hub`."


def test_pushing_without_a_token(refusal, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert refusal("--push_to_hub") == "`--push_to_hub` needs a token: run `hf auth login` or pass `--hub_token`."


# ---- The command line. ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", "--dataset_name"])
def test_a_required_flag_is_missing(make_flags, capsys, flag):
    arguments = make_flags()
    index = arguments.index(flag)
    with pytest.raises(SystemExit) as caught:
        parse_args(arguments[:index] + arguments[index + 2 :])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: the following arguments are required: {flag}\n")


def test_a_real_launch_ends_with_the_message_and_without_a_traceback(make_flags, tmp_path):
    flags = make_flags("--dataset_name", tmp_path / "nothing")
    done = run_launcher("--quiet", *CPU.split(), "train_srpo_wan_t2i.py", *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: `--dataset_name {tmp_path}/nothing` cannot be loaded")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "output").exists()
