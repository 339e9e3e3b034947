"""A run may be stopped or killed at any moment: what it has saved is whole, and it goes on as if nothing had been."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
from helpers import checkpoints, load_history, load_weights, read_log, repeatable, run_in_process, same_bits, wrap

import train_srpo_wan_t2i
from train_srpo_wan_t2i import list_checkpoints


PROCESSES = multiprocessing.get_context("forkserver")  # starts in no time, with the libraries already imported
PROCESSES.set_forkserver_preload(["helpers", "train_srpo_wan_t2i"])

pytestmark = pytest.mark.usefixtures("own_signal_handlers")


def send_when(output_dir, line, number):
    """Sends this process a signal as soon as the log of the run in it has a line."""

    def send():
        while not (Path(output_dir, "train.log").exists() and line in read_log(output_dir)):
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    Thread(target=send, daemon=True).start()


LONG = "--max_train_steps 400 --checkpointing_steps 400 --validation_steps 1".split()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_update_saves_it_and_says_how_to_go_on(train, number, tmp_path, caplog, capfd):
    send_when(tmp_path, "step 2: loss", number)
    with pytest.raises(SystemExit) as stop:
        train(*LONG, output_dir=tmp_path)
    assert stop.value.code == 128 + number
    at_once = rf"\n{number.name}: .*will be finished and saved.*Ctrl-C again.*\n"
    assert len(re.findall(at_once, capfd.readouterr().err)) == 1
    (checkpoint,) = checkpoints(tmp_path)
    step = int(checkpoint.split("-")[1])
    assert 3 <= step < 400
    assert f"Stopped by {number.name} after {step} updates, which are saved." in caplog.text
    assert "Continue with the same command and `--resume_from_checkpoint latest`." in caplog.text
    assert [row["step"] for row in load_history(tmp_path, step)] == [*range(1, step + 1)]


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(train, tmp_path):
    send_when(tmp_path, "step 2: loss", signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(*LONG, output_dir=tmp_path, prompts=["a boat"])
    (checkpoint,) = checkpoints(tmp_path)
    steps = int(checkpoint.split("-")[1]) + 1
    flags = ["--max_train_steps", steps, "--checkpointing_steps", steps, "--validation_steps", 1]
    train(*flags, "--resume_from_checkpoint", "latest", output_dir=tmp_path, prompts=["a boat"])
    straight = train(*flags, prompts=["a boat"])
    assert same_bits(load_weights(tmp_path), load_weights(straight))
    assert repeatable(load_history(tmp_path, steps)) == repeatable(load_history(straight, steps))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_models_are_loaded_ends_the_run_at_once_and_leaves_no_trace(
    train, monkeypatch, tmp_path, number
):
    wrap(monkeypatch, train_srpo_wan_t2i, "load_models", lambda load_models, *args: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop:
        train(output_dir=tmp_path / "output")
    assert stop.value.code == 128 + number
    assert [*tmp_path.iterdir()] == []


def interrupted_twice(output_dir, flags):
    def send():
        while not (Path(output_dir) / "checkpoint-2").exists():
            time.sleep(0.005)
        for _ in range(2):
            time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

    Thread(target=send, daemon=True).start()
    run_in_process(*flags)


def test_a_second_ctrl_c_ends_the_run_at_once_and_it_goes_on_from_its_last_checkpoint(train, command, tmp_path):
    flags = ["--checkpointing_steps", 2, "--gradient_accumulation_steps", 15]  # long enough for two signals
    process = PROCESSES.Process(
        target=interrupted_twice, args=(tmp_path, command(tmp_path, *flags, "--max_train_steps", 400))
    )
    process.start()
    process.join()
    assert process.exitcode == 130
    assert checkpoints(tmp_path) == ["checkpoint-2"], "it neither finished nor saved the update"
    train(*flags, "--max_train_steps", 3, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert f"Resumed from {tmp_path}/checkpoint-2 at step 2" in read_log(tmp_path)


def test_processes_that_load_data_do_not_die_of_the_signal_before_the_update_is_done(train, tmp_path):
    """A terminal and many clusters send a signal to all processes of a run, not only to the first."""
    received = []

    def send():
        while not (tmp_path / "train.log").exists() or "step 1: loss" not in read_log(tmp_path):
            time.sleep(0.005)
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        for process in [*children, os.getpid()]:
            os.kill(int(process), signal.SIGTERM)
            received.append(process)

    Thread(target=send, daemon=True).start()
    accumulate = ["--gradient_accumulation_steps", 4, "--dataloader_num_workers", 1]
    with pytest.raises(SystemExit) as stop:
        train(*LONG, *accumulate, output_dir=tmp_path)
    assert len(received) >= 2, "a process that loads data, and the run"
    assert stop.value.code == 128 + signal.SIGTERM
    assert len(checkpoints(tmp_path)) == 1


def newest(output_dir):
    """The largest step of which a checkpoint has its final name."""
    names = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).iterdir()]
    return max((int(match.group(1)) for match in names if match), default=0)


def last_step(output_dir):
    """The step of the newest complete checkpoint, 0 without one. What it holds must be whole."""
    found = list_checkpoints(output_dir)
    if not found:
        return 0
    state = json.loads((found[-1] / "trainer_state.json").read_text())
    assert found[-1].name == f"checkpoint-{state['global_step']}"
    assert (found[-1] / "model.safetensors").is_file() and (found[-1] / "optimizer.bin").is_file()
    return state["global_step"]


@pytest.mark.parametrize("kills", [3, pytest.param(int(os.environ.get("KILLS", 12)), marks=pytest.mark.slow)])
def test_whenever_a_run_is_killed_it_can_be_resumed_and_ends_the_same(train, command, tmp_path, kills):
    draw, steps = random.Random(0), [0]
    flags = ["--max_train_steps", 8 * kills, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    resume = command(tmp_path, *flags, "--resume_from_checkpoint", "latest")
    for _ in range(kills):
        process = PROCESSES.Process(target=run_in_process, args=resume)
        process.start()
        goal = steps[-1] + draw.randint(0, 6)
        # In the middle of an update, of a checkpoint, of removing an old one, or while it still loads.
        while process.is_alive() and newest(tmp_path) < goal:
            time.sleep(0.002)
        process.join(draw.uniform(0, 0.2))
        assert process.is_alive(), "it failed, or ended before it was killed"
        process.kill()
        process.join()
        steps.append(last_step(tmp_path))
    assert steps == sorted(steps) and steps[-1] > kills, "it made progress and never lost what it had saved"
    process = PROCESSES.Process(target=run_in_process, args=resume)
    process.start()
    process.join()
    assert process.exitcode == 0

    straight = train(*flags)
    print(f"killed {kills} times, at steps {steps[1:]}")
    assert same_bits(load_weights(tmp_path), load_weights(straight))
    last = 8 * kills
    assert repeatable(load_history(tmp_path, last)) == repeatable(load_history(straight, last))
    assert checkpoints(tmp_path) == checkpoints(straight), "nothing unfinished is left"


def test_what_a_kill_leaves_of_a_checkpoint_is_removed_and_never_resumed_from(train, tmp_path):
    train(output_dir=tmp_path)
    for name in ("checkpoint-3.unfinished", "checkpoint-1.discarded.unfinished", "checkpoint-2.mine"):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    train("--max_train_steps", 4, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-2.mine", "checkpoint-4"]


def test_a_checkpoint_of_the_same_step_is_replaced(train, tmp_path):
    train("--max_train_steps", 3, "--checkpointing_steps", 1, output_dir=tmp_path)
    first = torch.load(tmp_path / "checkpoint-3/optimizer.bin")
    shutil.rmtree(tmp_path / "transformer_2")
    earlier = ["--resume_from_checkpoint", tmp_path / "checkpoint-2"]
    train("--max_train_steps", 3, "--checkpointing_steps", 1, *earlier, output_dir=tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    second = torch.load(tmp_path / "checkpoint-3/optimizer.bin")
    assert second["state"][0]["step"] == first["state"][0]["step"] == 3
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-3"
