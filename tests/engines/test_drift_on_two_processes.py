"""`--drift_weight` under DeepSpeed: the frozen copy of the expert is split among processes where the expert is."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    LORA,
    TWO_RANKS,
    ZERO_2,
    launched,
    load_history,
    load_lora,
    load_weights,
    logged,
    repeatable,
    same_bits,
    wrap,
)

import train_srpo_wan_t2i
from train_srpo_wan_t2i import main, parse_args


FOUR_STEPS = "--max_train_steps 4 --checkpointing_steps 2 --drift_weight 10".split()

# Far enough for a drift of thousandths: the rounding of velocities to bfloat16 alone is one of 1e-5.
FAR_LORA = [*LORA, "--learning_rate", 0.02]

RUNS = [pytest.param(run, marks=pytest.mark.slow) for run in ("zero2", "zero3_offload", "zero3 and LoRA")]


@pytest.fixture(scope="module", params=RUNS)
def runs(request, launch):
    """Of one engine: four updates on two processes, and the last two of them again, from their checkpoint."""
    engine, *lora = request.param.split(" and ")
    launcher, flags = f"{TWO_RANKS} --deepspeed_config_file ds_configs/{engine}.json", FAR_LORA if lora else []
    straight = launch(launcher, *FOUR_STEPS, *flags)
    resumed = launch(launcher, *FOUR_STEPS, *flags, "--resume_from_checkpoint", straight / "checkpoint-2")
    return SimpleNamespace(flags=flags, straight=straight, resumed=resumed)


def test_the_drift_is_zero_at_the_first_update_alone(runs):
    first, *later = logged(runs.straight, "drift", 4)
    assert first == 0
    assert len(later) == 3 and min(later) > 0


def test_a_resumed_run_repeats_the_straight_one_bit_for_bit(runs):
    load = load_lora if runs.flags else load_weights
    assert same_bits(load(runs.resumed), load(runs.straight))
    assert repeatable(load_history(runs.resumed, 4)) == repeatable(load_history(runs.straight, 4))


def test_the_numbers_are_those_of_one_process_up_to_bfloat16(runs, train):
    expected = train(*FOUR_STEPS, *runs.flags, "--train_batch_size", 2)
    assert logged(runs.straight, "score", 4) == pytest.approx(logged(expected, "score", 4), abs=0.02)
    assert logged(runs.straight, "loss", 4) == pytest.approx(logged(expected, "loss", 4), abs=0.02)
    assert logged(runs.straight, "drift", 4) == pytest.approx(logged(expected, "drift", 4), rel=0.25, abs=3e-5)


def test_zero_3_splits_the_copy_as_it_splits_the_expert(command, own_signal_handlers, monkeypatch, tmp_path):
    copies = []
    # DeepSpeed replaces this function for the rest of the process, and other tests would compute with its own.
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)

    def record(load_base, *args):
        copies.append(load_base(*args))
        return copies[-1]

    wrap(monkeypatch, train_srpo_wan_t2i, "load_base", record)
    flags = command(tmp_path / "output", "--drift_weight", 10, "--max_train_steps", 1, "--checkpointing_steps", 1)
    with launched(*f"{ZERO_2} --deepspeed_config_file ds_configs/zero3.json".split()):
        main(parse_args(flags))
        (copy,) = copies
        for parameter in copy.parameters():
            assert not parameter.requires_grad
            assert parameter.dtype == torch.bfloat16
            assert parameter.shape == (0,) and parameter.ds_numel > 0, "only while a layer runs it is whole"
    assert Path(tmp_path / "output/transformer_2").is_dir()
