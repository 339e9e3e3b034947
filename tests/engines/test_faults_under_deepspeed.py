"""With DeepSpeed, too, updates that are not finite change nothing, and checkpoints run no code."""

import json
import multiprocessing
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ENGINES, TWO_PROCESSES, TWO_RANKS, ZERO_2, poison, read_log, run_launched, same_bits
from inputs import renew_checksums


STEPS = "--max_train_steps 4 --checkpointing_steps 1 --max_skipped_updates 9".split()


@pytest.fixture(scope="module")
def poisoned(tiny_dataset, tmp_path_factory):
    return poison(tiny_dataset, "a red cat", tmp_path_factory.mktemp("poisoned") / "dataset")


PROCESSES = multiprocessing.get_context("forkserver")  # starts in no time, with the libraries already imported
PROCESSES.set_forkserver_preload(["helpers", "train_srpo_wan_t2i"])


@pytest.fixture(scope="module")
def run(command):
    """Function: an engine, an output folder and flags -> what a run of one process of that engine ended with."""

    def train(engine, output_dir, *flags, **inputs):
        launcher = f"{ZERO_2} --deepspeed_config_file ds_configs/{engine}.json"
        answer, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(
            target=run_launched, args=(sender, launcher, command(output_dir, *flags, **inputs))
        )
        process.start()
        sender.close()
        process.join()
        return answer.recv()  # fails if the process did

    return train


def tensors(content):
    """All tensors in what torch saved, in the order in which they lie there."""
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else []
    return [tensor for part in parts for tensor in tensors(part)]


def load_all(checkpoint):
    """{name: tensor} of what a checkpoint holds, of the model and of the optimizer."""
    found = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.suffix in (".pt", ".bin")):
        for number, tensor in enumerate(tensors(torch.load(file, weights_only=False))):
            found[f"{file.name} {number}"] = tensor.detach()
    return found


def skipped_steps(output_dir):
    return [json.loads(line)["step"] for line in (output_dir / "skipped.jsonl").read_text().splitlines()]


def assert_update_was_skipped(output_dir):
    (step,) = set(skipped_steps(output_dir))
    assert 2 <= step <= 4
    folders = [output_dir / f"checkpoint-{number}" for number in range(1, 5)]
    counts = [json.loads((folder / "trainer_state.json").read_text())["skipped"] for folder in folders]
    assert counts == [int(number >= step) for number in range(1, 5)]
    assert len(load_all(folders[0])) > 50
    for number in range(1, 4):
        same = same_bits(load_all(folders[number - 1]), load_all(folders[number]))
        assert same == (number + 1 == step), f"{number} and {number + 1}"
    assert re.search(f"update {step} is skipped", read_log(output_dir))
    assert (output_dir / "transformer_2").is_dir(), "its end is reached"


@pytest.fixture(
    scope="module", params=[pytest.param(e, marks=() if e == "zero2" else pytest.mark.slow) for e in ENGINES]
)
def skipping_run(request, run, poisoned, tmp_path_factory):
    """The engine, and the output folder of a run on the poisoned captions."""
    output_dir = tmp_path_factory.mktemp("skipping") / "output"
    assert run(request.param, output_dir, *STEPS, dataset=poisoned) is None
    return request.param, output_dir


def test_an_update_that_is_not_finite_changes_nothing(skipping_run):
    assert_update_was_skipped(skipping_run[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [TWO_PROCESSES, TWO_RANKS, f"{TWO_RANKS} --deepspeed_config_file ds_configs/zero3.json"]
)
def test_an_update_that_is_not_finite_on_one_of_two_processes_changes_nothing_on_both(
    start, poisoned, tmp_path, launcher
):
    environment = {"ACCELERATE_USE_CPU": "true"} if launcher == TWO_PROCESSES else {}
    process = start(launcher.split(), tmp_path / "output", *STEPS, dataset=poisoned, environment=environment)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_update_was_skipped(tmp_path / "output")


# ---- Checkpoints that mean harm. ------------------------------------------------------------------------------------


class Evil:
    """What a pickle runs when it is loaded without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("what", ["optim_states", pytest.param("model_states", marks=pytest.mark.slow)])
def test_a_checkpoint_of_deepspeed_with_code_in_it_is_refused_and_the_code_does_not_run(
    run, skipping_run, poisoned, tmp_path, what
):
    engine, straight = skipping_run
    output_dir = Path(shutil.copytree(straight, tmp_path / "output"))
    checkpoint = output_dir / "checkpoint-4"
    (file,) = checkpoint.rglob(f"*{what}.pt")
    torch.save({**torch.load(file, weights_only=False), "evil": Evil(tmp_path / "evil")}, file)
    renew_checksums(checkpoint)
    more = ["--max_train_steps", 5, "--resume_from_checkpoint", "latest"]
    message = run(engine, output_dir, *STEPS, *more, dataset=poisoned)
    assert not (tmp_path / "evil").exists()
    assert re.fullmatch(f"error: {checkpoint} cannot be loaded: .*", message)
