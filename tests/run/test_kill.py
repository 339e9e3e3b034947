"""What tests/kill.py says of runs that were killed; `python tests/kill.py` kills more of them."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import edit_json, load_history, run_command
from inputs import edit_weights


@pytest.mark.slow
def test_runs_that_are_killed_can_be_resumed_and_end_the_same():
    done = run_command(sys.executable, "tests/kill.py", "--kills", 4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills, 4 resumed, all runs ended the same bit for bit" in done.stdout
    for case in ("all weights", "LoRA"):
        kills = re.findall(
            rf"^ +\d+  {case} +run +1  (start|update|checkpoint|images|upload|results) ", done.stdout, re.M
        )
        assert len(kills) == 2


# ---- What it compares. ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compare():
    from kill import compare

    return compare


@pytest.fixture
def copy(plain_run, tmp_path):
    """A copy of a run to harm."""
    return Path(shutil.copytree(plain_run, tmp_path / "copy"))


def test_two_runs_that_ended_the_same(compare, copy, plain_run):
    (copy / "train.log").write_text("another time")
    compare(copy, plain_run)


def leave_something(folder):
    (folder / "checkpoint-1.unfinished").mkdir()


def change_one_bit(folder):
    def change(weights):
        next(iter(weights.values())).view(-1)[0].mul_(1 + 2**-23)

    edit_weights(folder / "transformer_2/diffusion_pytorch_model.safetensors", change)


def change_the_checkpoint(folder):
    edit_weights(folder / "checkpoint-2/model.safetensors", lambda weights: next(iter(weights.values())).zero_())


def forget_an_update(folder):
    history = load_history(folder)
    edit_json(folder / "checkpoint-2/trainer_state.json", history=history[1:])


@pytest.mark.parametrize(
    "harm, problem",
    [
        (leave_something, r"other files: \['checkpoint-1.unfinished'\]"),
        (lambda folder: (folder / "reward.png").unlink(), r"other files: \['reward.png'\]"),
        (lambda folder: (folder / "reward.png").write_bytes(b""), r"other content of \['reward.png'\]"),
        (change_one_bit, "other weights in transformer_2/diffusion_pytorch_model.safetensors"),
        (change_the_checkpoint, "other weights in checkpoint-2/model.safetensors"),
        (forget_an_update, "another history"),
    ],
)
def test_a_run_that_was_harmed_is_not_the_same(compare, copy, plain_run, harm, problem):
    harm(copy)
    with pytest.raises(AssertionError, match=problem):
        compare(copy, plain_run)
