"""The output folders and the checkpoints to resume from that `train_srpo_wan_t2i.py` refuses."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import CPU, ZERO_2, edit_json, launched

from diffusers import AutoencoderKLWan

from train_srpo_wan_t2i import main, parse_args


# ---- The output folder. ---------------------------------------------------------------------------------------------


def test_an_output_folder_that_is_not_empty(refusal, tmp_path):
    (tmp_path / "output" / "transformer_2").mkdir(parents=True)
    (tmp_path / "output" / "transformer_2" / "diffusion_pytorch_model.safetensors").write_bytes(b"weeks of work")
    message = refusal()
    assert message.startswith(f"`--output_dir {tmp_path}/output` is not empty.")
    assert "`--resume_from_checkpoint latest`" in message and "`--overwrite_output_dir`" in message


def test_an_output_folder_is_not_overwritten_for_a_run_that_is_refused(refusal, tmp_path):
    (tmp_path / "output" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "output" / "checkpoint-10" / "trainer_state.json").write_text("{}")
    assert "`--height" in refusal("--overwrite_output_dir", "--height", 40)


@pytest.mark.parametrize("flags", ["", "--overwrite_output_dir", "--resume_from_checkpoint latest"])
def test_an_output_folder_that_is_a_file(refusal, tmp_path, flags):
    (tmp_path / "output").write_text("a file")
    assert refusal(*flags.split()) == f"`--output_dir {tmp_path}/output` is a file."


def test_a_checkpoint_that_is_not_there(refusal, tmp_path):
    (tmp_path / "output" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "output" / "checkpoint-10" / "trainer_state.json").write_text("{}")
    message = refusal("--resume_from_checkpoint", tmp_path / "output" / "checkpoint-20")
    assert message.startswith(
        f"`--resume_from_checkpoint {tmp_path}/output/checkpoint-20` is not a complete checkpoint"
    )
    assert message.endswith(f"{tmp_path}/output/checkpoint-10.")


def test_a_checkpoint_that_is_not_complete(refusal, tmp_path):
    folder = tmp_path / "output" / "checkpoint-10.unfinished"
    folder.mkdir(parents=True)
    message = refusal("--resume_from_checkpoint", folder)
    assert message.startswith(f"`--resume_from_checkpoint {folder}` is not a complete checkpoint")
    assert message.endswith("none.")


# ---- The checkpoint to resume from. ---------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(plain_run, tmp_path):
    """A copy of a complete checkpoint in the output folder, to resume from with the flags of `RESUME`, or to spoil."""
    return Path(shutil.copytree(plain_run / "checkpoint-2", tmp_path / "output" / "checkpoint-2"))


RESUME = ["--learning_rate", "1e-3", "--resume_from_checkpoint", "latest"]


def edit_run(checkpoint, **values):
    """Makes a checkpoint look as if its run had been another one."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["run"].keys() >= values.keys()
    edit_json(checkpoint / "trainer_state.json", run={**state["run"], **values})


def test_the_checkpoint_that_the_other_tests_spoil_is_accepted(make_flags, checkpoint, monkeypatch):
    class LoadingStarted(Exception):
        pass

    def stop(*args, **kwargs):
        raise LoadingStarted

    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", stop)
    with pytest.raises(LoadingStarted), launched(*CPU.split()):
        main(parse_args(make_flags(*RESUME, "--validation_prompts")))


def test_resuming_on_another_number_of_processes(refusal, checkpoint):
    edit_run(checkpoint, num_processes=8)
    message = refusal(*RESUME)
    assert message.startswith(f"{checkpoint} was made with another num_processes: 8. It cannot go on with 1.")


def test_resuming_without_deepspeed_what_zero_2_made(refusal, checkpoint):
    edit_run(checkpoint, engine="ZeRO-2")
    message = refusal(*RESUME)
    assert message.startswith(f"{checkpoint} was made with another engine: ZeRO-2. It cannot go on with ")
    assert "without DeepSpeed" in message


@pytest.mark.parametrize(
    "engine, name",
    [
        ("zero2", "ZeRO-2"),
        ("zero2_bf16", "ZeRO-2, bf16_master_weights_and_grads"),
        ("zero3_offload", "ZeRO-3, offload_param, offload_optimizer"),
    ],
)
def test_resuming_with_deepspeed_what_was_made_without(refusal, checkpoint, engine, name):
    message = refusal(*RESUME, launcher=f"{ZERO_2} --deepspeed_config_file ds_configs/{engine}.json")
    assert message.startswith(f"{checkpoint} was made with another engine: without DeepSpeed. It cannot go on with ")
    assert name in message


def test_resuming_in_another_precision(refusal, checkpoint):
    message = refusal(*RESUME, launcher=f"{CPU} --mixed_precision bf16")
    assert message.startswith(f"{checkpoint} was made with another mixed_precision: no. It cannot go on with bf16.")


@pytest.mark.parametrize(
    "flags, found, value",
    [
        ("--learning_rate 1e-5", "[0.001, 'constant', 0]", "[1e-05, 'constant', 0]"),
        ("--lr_scheduler cosine", "[0.001, 'constant', 0]", "[0.001, 'cosine', 0]"),
        ("--lr_warmup_steps 5", "[0.001, 'constant', 0]", "[0.001, 'constant', 5]"),
    ],
)
def test_resuming_with_another_learning_rate_or_schedule(refusal, checkpoint, flags, found, value):
    message = refusal(*RESUME, *flags.split())
    problem = f"{checkpoint} was made with another learning rate and schedule: {found}. It cannot go on with {value}."
    assert message.startswith(problem)


@pytest.mark.parametrize(
    "flags, value",
    [
        ("--adam_beta1 0.8", "[0.8, 0.999, 1e-08, 0.0001]"),
        ("--adam_beta2 0.99", "[0.9, 0.99, 1e-08, 0.0001]"),
        ("--adam_epsilon 1e-6", "[0.9, 0.999, 1e-06, 0.0001]"),
        ("--adam_weight_decay 0", "[0.9, 0.999, 1e-08, 0.0]"),
    ],
)
def test_resuming_with_other_settings_of_adamw(refusal, checkpoint, flags, value):
    message = refusal(*RESUME, *flags.split())
    found = "[0.9, 0.999, 1e-08, 0.0001]"
    problem = f"{checkpoint} was made with another betas, epsilon and decay: {found}. It cannot go on with {value}."
    assert message.startswith(problem)


def test_resuming_with_another_number_of_updates_per_rollout(refusal, checkpoint):
    message = refusal(*RESUME, "--updates_per_rollout", 2)
    problem = f"{checkpoint} was made with another updates_per_rollout: 1. It cannot go on with 2."
    assert message.startswith(problem)


def test_resuming_with_another_optimizer(refusal, checkpoint):
    pytest.importorskip("torchao")
    message = refusal(*RESUME, "--optimizer", "adamw_8bit")
    assert message.startswith(f"{checkpoint} was made with another optimizer: adamw. It cannot go on with adamw_8bit.")


def test_resuming_from_another_base_model(refusal, checkpoint, model_copy):
    shutil.copytree(model_copy / "transformer", model_copy / "transformer_2", dirs_exist_ok=True)
    message = refusal(*RESUME, "--pretrained_model_name_or_path", model_copy)
    assert message.startswith(f"{checkpoint} was made with another base model, by a hash of its weights: ")


def test_a_run_that_cannot_be_resumed_in_another_folder_makes_no_folder(refusal, checkpoint, tmp_path):
    edit_run(checkpoint, num_processes=8)
    more = ["--resume_from_checkpoint", checkpoint, "--output_dir", tmp_path / "other"]
    assert refusal(*RESUME, *more).startswith(f"{checkpoint} was made with another num_processes")


def test_a_named_checkpoint_without_its_state(refusal, checkpoint):
    (checkpoint / "trainer_state.json").unlink()
    message = refusal(*RESUME, "--resume_from_checkpoint", checkpoint)
    assert message.startswith(f"`--resume_from_checkpoint {checkpoint}` is not a complete checkpoint")
    assert message.endswith("none.")


@pytest.mark.parametrize("left_over", ["checkpoint-2.unfinished", "checkpoint-2.discarded.unfinished"])
def test_a_named_folder_that_was_still_being_written_or_removed(refusal, checkpoint, left_over):
    folder = checkpoint.rename(checkpoint.with_name(left_over))
    message = refusal(*RESUME, "--resume_from_checkpoint", folder)
    assert message.startswith(f"`--resume_from_checkpoint {folder}` is not a complete checkpoint")


@pytest.mark.parametrize("name", ["latest", "checkpoint-2"])
@pytest.mark.parametrize(
    "content",
    ['{"global_step": 2, "history": []}', '{"history": [], "run": {}}', "[]", "", '{"global_step": 2, "histo'],
    ids=["of an older version", "without a step", "not a dictionary", "empty", "cut off"],
)
def test_a_checkpoint_with_a_state_that_says_too_little(refusal, checkpoint, name, content):
    (checkpoint / "trainer_state.json").write_text(content)
    message = refusal(*RESUME, "--resume_from_checkpoint", checkpoint if name == checkpoint.name else name)
    assert message.startswith(f"`{checkpoint}/trainer_state.json` is damaged or of another version of this script")
    assert "resume from another checkpoint" in message
