"""What a checkpoint holds: files that anyone can check, and that run no code when they are loaded."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import LORA, checkpoints, edit_json, load_weights, same_bits
from inputs import renew_checksums
from safetensors.torch import load_file

from train_srpo_wan_t2i import list_checkpoints


@pytest.fixture
def run_copy(plain_run, tmp_path):
    """A copy of a finished run to spoil; its last checkpoint is checkpoint-2."""
    return Path(shutil.copytree(plain_run, tmp_path / "output"))


# ---- What it holds. -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], LORA])
def test_a_checkpoint_holds_weights_the_optimizer_its_state_and_checksums_and_nothing_else(
    plain_run, quick_lora, flags
):
    checkpoint = (quick_lora if flags else plain_run) / "checkpoint-2"
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "SHA256SUMS",
        "model.safetensors",
        "optimizer.bin",
        "trainer_state.json",
    ]
    torch.load(checkpoint / "optimizer.bin", weights_only=True)


def test_the_checkpoint_of_a_lora_holds_the_lora_alone(quick_lora):
    names = load_file(quick_lora / "checkpoint-2/model.safetensors").keys()
    assert len(names) == 32 and all("lora_" in name for name in names)


def test_sha256sum_finds_a_checkpoint_whole_and_names_the_file_that_is_not(run_copy):
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    checkpoint = run_copy / "checkpoint-2"
    done = subprocess.run(check, cwd=checkpoint, capture_output=True, text=True)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["model.safetensors: OK", "optimizer.bin: OK", "trainer_state.json: OK"]
    with (checkpoint / "optimizer.bin").open("ab") as file:
        file.write(b"x")
    done = subprocess.run(check, cwd=checkpoint, capture_output=True, text=True)
    assert done.returncode == 1 and "optimizer.bin: FAILED" in done.stdout


def test_the_state_tells_when_it_was_saved_and_what_the_run_was(plain_run):
    checkpoint = plain_run / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert (state["global_step"], state["skipped"], state["expert"]) == (2, 0, "transformer_2")
    assert state["saved"] == pytest.approx(checkpoint.stat().st_mtime, abs=60)
    hashes = {name: state["run"][name] for name in ("dataset", "reward", "base_model")}
    assert len(set(hashes.values())) == 3 and all(len(value) == 16 for value in hashes.values())


def test_checkpoints_are_listed_as_they_were_saved_and_one_without_a_readable_state_is_the_last(run_copy):
    for step, saved in ((9, 100.0), (12, 300.0), (4, 200.0)):
        folder = shutil.copytree(run_copy / "checkpoint-2", run_copy / f"checkpoint-{step}")
        edit_json(folder / "trainer_state.json", saved=saved)
    shutil.rmtree(run_copy / "checkpoint-2")
    (run_copy / "checkpoint-7").mkdir()
    (run_copy / "checkpoint-7" / "trainer_state.json").write_text("{")
    (run_copy / "checkpoint-8").mkdir()
    names = [folder.name for folder in list_checkpoints(run_copy)]
    assert names == ["checkpoint-9", "checkpoint-4", "checkpoint-12", "checkpoint-7"]


# ---- A damaged one. -------------------------------------------------------------------------------------------------


def test_the_whole_checkpoint_that_is_offered_for_a_damaged_one_can_be_resumed_from(train, tmp_path):
    steps = ["--max_train_steps", 3, "--checkpointing_steps", 1]
    train(*steps, output_dir=tmp_path)
    expected = load_weights(tmp_path)
    for step in (2, 3):
        with (tmp_path / f"checkpoint-{step}/model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")
    with pytest.raises(SystemExit) as caught:
        train(*steps, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert caught.value.code.startswith(f"error: {tmp_path}/checkpoint-3 is damaged")
    assert f"{tmp_path}/checkpoint-1" in caught.value.code and "checkpoint-2" not in caught.value.code
    train(*steps, "--resume_from_checkpoint", tmp_path / "checkpoint-1", output_dir=tmp_path)
    assert same_bits(load_weights(tmp_path), expected)
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


# ---- One that means harm. -------------------------------------------------------------------------------------------


class Evil:
    """What a pickle runs when it is loaded without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


MORE = ["--max_train_steps", 3, "--resume_from_checkpoint", "latest"]


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "random_states_0.pkl", "scheduler.bin", "sampler.bin"])
def test_a_pickle_beside_the_files_of_a_checkpoint_is_not_run(train, run_copy, tmp_path, name):
    checkpoint = run_copy / "checkpoint-2"
    torch.save(Evil(tmp_path / "evil"), checkpoint / name)
    renew_checksums(checkpoint)
    try:
        train(*MORE, output_dir=run_copy)
    except SystemExit as stop:
        assert stop.code.startswith(f"error: {checkpoint} cannot be loaded") and "\n" not in stop.code
    assert not (tmp_path / "evil").exists()


def test_an_optimizer_with_code_in_it_is_refused_and_the_code_does_not_run(train, run_copy, tmp_path):
    checkpoint = run_copy / "checkpoint-2"
    content = torch.load(checkpoint / "optimizer.bin")
    torch.save({**content, "evil": Evil(tmp_path / "evil")}, checkpoint / "optimizer.bin")
    assert zipfile.is_zipfile(checkpoint / "optimizer.bin")
    renew_checksums(checkpoint)
    with pytest.raises(SystemExit) as caught:
        train(*MORE, output_dir=run_copy)
    assert caught.value.code.startswith(f"error: {checkpoint} cannot be loaded: ") and "\n" not in caught.value.code
    assert not (tmp_path / "evil").exists()


def test_weights_that_are_a_pickle_are_not_loaded(train, run_copy, tmp_path):
    checkpoint = run_copy / "checkpoint-2"
    (checkpoint / "model.safetensors").unlink()
    torch.save(Evil(tmp_path / "evil"), checkpoint / "pytorch_model.bin")
    renew_checksums(checkpoint)
    with pytest.raises(SystemExit) as caught:
        train(*MORE, output_dir=run_copy)
    assert caught.value.code.startswith(f"error: {checkpoint} cannot be loaded: ") and "\n" not in caught.value.code
    assert not (tmp_path / "evil").exists()
