"""What becomes of an output folder: whose it is, what a run deletes in it, and that two runs never share it."""

import json
import multiprocessing
import re
import shutil
import time
from pathlib import Path

import pytest
from helpers import file_hashes, load_weights, read_log, run_in_process, same_bits, snapshot, wrap

import train_srpo_wan_t2i


OWN = ["README.md", "checkpoint-2", "reward.png", "run.json", "train.log", "transformer_2"]  # what a plain run writes


# ---- Overwriting. ---------------------------------------------------------------------------------------------------


def test_overwrite_output_dir_removes_what_an_earlier_run_wrote_and_nothing_else(train, tmp_path):
    steps = ["--max_train_steps", 3, "--checkpointing_steps", 1, "--report_to", "tensorboard"]
    train(*steps, output_dir=tmp_path, prompts=["a boat"])
    mine = "mine/a.txt notes.txt images/holiday.png images/step-0/a.txt checkpoint-mine/a.txt checkpoint-9/a.txt"
    mine = [*mine.split(), "logs/a.txt", "README.txt", "run-2.json", "upload.unfinished.txt"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    train("--overwrite_output_dir", output_dir=tmp_path)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    written = {name for name in found if name.split("/")[0] in OWN and name not in mine}
    assert found == written | {*mine}
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == [
        "checkpoint-2",
        "checkpoint-9",
        "checkpoint-mine",
    ]
    assert re.findall(r"step (\d): loss", read_log(tmp_path)) == ["1", "2"]


def test_a_run_that_is_overwritten_is_the_run_in_a_new_folder(train, plain_run, tmp_path):
    train("--lora_rank", 4, "--max_train_steps", 3, output_dir=tmp_path)
    train("--overwrite_output_dir", output_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == OWN
    assert same_bits(load_weights(tmp_path), load_weights(plain_run))
    assert (tmp_path / "run.json").read_bytes() == (plain_run / "run.json").read_bytes()


def test_overwriting_asks_for_no_more_than_the_files_of_runs_in_a_folder_of_a_run(train, plain_run, tmp_path):
    output_dir = Path(shutil.copytree(plain_run, tmp_path / "output"))
    (output_dir / "run.json").unlink()
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit, match="is not empty, and not the folder of a run. Choose another"):
        train("--overwrite_output_dir", output_dir=output_dir)
    assert snapshot(tmp_path) == before


def test_a_link_to_a_folder_stays_a_link(train, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "output").symlink_to("disk")
    train(output_dir=tmp_path / "output")
    train("--overwrite_output_dir", output_dir=tmp_path / "output")
    assert (tmp_path / "output").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == OWN


# ---- Resuming. ------------------------------------------------------------------------------------------------------


def test_a_resumed_run_adds_to_the_log(train, tmp_path):
    train(output_dir=tmp_path)
    train("--max_train_steps", 3, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert re.findall(r"step (\d): loss", read_log(tmp_path)) == ["1", "2", "3"]


def test_run_json_holds_the_identity_that_checkpoints_hold(plain_run):
    identity = json.loads((plain_run / "run.json").read_text())
    assert identity == json.loads((plain_run / "checkpoint-2/trainer_state.json").read_text())["run"]
    assert identity["learning_rate"] == 1e-3 and identity["engine"] == "without DeepSpeed"
    assert not {"output_dir", "max_train_steps", "pretrained_model_name_or_path"} & identity.keys()


def test_what_a_killed_run_left_unfinished_is_removed_when_the_next_one_starts(train, tmp_path):
    train(output_dir=tmp_path, prompts=["a boat"])
    left = ["checkpoint-3", "checkpoint-1.discarded", "transformer_2", "images/step-3", "upload-2"]
    for name in [f"{each}.unfinished" for each in left]:
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    (tmp_path / "README.md.unfinished").write_text("half")
    more = ["--max_train_steps", 3, "--resume_from_checkpoint", "latest"]
    train(*more, output_dir=tmp_path, prompts=["a boat"])
    assert [*tmp_path.rglob("*.unfinished")] == []


# ---- A start that fails. --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"]])
def test_a_start_that_fails_while_it_loads_leaves_no_trace(train, plain_run, tmp_path, monkeypatch, flags):
    output_dir = tmp_path / "new" / "output"
    if flags:
        shutil.copytree(plain_run, output_dir)

    def fail(load_models, *args):
        assert (output_dir / "run.json").is_file(), "it holds the folder while it loads"
        raise RuntimeError("the GPU fell off the bus")

    wrap(monkeypatch, train_srpo_wan_t2i, "load_models", fail)
    before = snapshot(tmp_path)
    with pytest.raises(RuntimeError, match="fell off the bus"):
        train(*flags, output_dir=output_dir)
    assert snapshot(tmp_path) == before


def test_after_a_start_that_failed_the_same_command_starts(train, plain_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        wrap(patch, train_srpo_wan_t2i, "load_models", lambda load_models, *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(output_dir=tmp_path / "output")
    train(output_dir=tmp_path / "output")
    assert same_bits(load_weights(tmp_path / "output"), load_weights(plain_run))


# ---- Two runs. ------------------------------------------------------------------------------------------------------

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["helpers", "train_srpo_wan_t2i"])


def test_a_second_run_in_the_folder_of_one_that_goes_on_is_refused(train, command, plain_run, tmp_path):
    output_dir = Path(shutil.copytree(plain_run, tmp_path / "output"))
    more = ["--max_train_steps", 1000, "--checkpointing_steps", 1000, "--resume_from_checkpoint", "latest"]
    first = PROCESSES.Process(target=run_in_process, args=command(output_dir, *more))
    first.start()
    while first.is_alive() and "step 3: loss" not in read_log(output_dir):
        time.sleep(0.01)
    messages = []
    for flags in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
        with pytest.raises(SystemExit) as caught:
            train(*flags, output_dir=output_dir)
        messages.append(caught.value.code)
    assert first.is_alive()
    first.kill()
    first.join()
    assert all(re.fullmatch(f"error: `--output_dir {output_dir}` .*another run.*", message) for message in messages)
    apart = {"train.log": None}
    assert {**file_hashes(output_dir), **apart} == {**file_hashes(plain_run), **apart}


def test_a_run_that_was_killed_holds_its_folder_no_longer(train, command, tmp_path):
    flags = ["--max_train_steps", 1000, "--checkpointing_steps", 1]
    first = PROCESSES.Process(target=run_in_process, args=command(tmp_path / "output", *flags))
    first.start()
    while first.is_alive() and not (tmp_path / "output/checkpoint-2").is_dir():
        time.sleep(0.01)
    first.kill()
    first.join()
    last = int(train_srpo_wan_t2i.list_checkpoints(tmp_path / "output")[-1].name.split("-")[1])
    more = ["--max_train_steps", last + 1, "--resume_from_checkpoint", "latest"]
    train(*more, output_dir=tmp_path / "output")
    assert f"Resumed from {tmp_path}/output/checkpoint-{last} " in read_log(tmp_path / "output")
