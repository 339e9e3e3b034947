"""An update whose loss or gradient is NaN or infinite changes nothing and is told; no such weights are saved."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import checkpoints, load_history, load_state, load_weights, poison, read_log, same_bits, wrap

import train_srpo_wan_t2i
from train_srpo_wan_t2i import plan_update


STEPS = "--max_train_steps 6 --checkpointing_steps 1".split()  # each of the six captions once
NAN, INFINITY = 0x7FC0, 0x7F80  # the bits of bfloat16


@pytest.fixture(scope="module", params=[NAN, pytest.param(INFINITY, marks=pytest.mark.slow)], ids=["NaN", "infinity"])
def poisoned(request, tiny_dataset, tmp_path_factory):
    """The dataset, in which the embedding of "a red cat" holds a number that is none."""
    return poison(tiny_dataset, "a red cat", tmp_path_factory.mktemp("poisoned") / "dataset", request.param)


@pytest.fixture(scope="module")
def skipping_run(train, poisoned):
    return train(*STEPS, dataset=poisoned)


def read_skipped(output_dir):
    return [json.loads(line) for line in (output_dir / "skipped.jsonl").read_text().splitlines()]


def read_counts(output_dir):
    states = [json.loads((output_dir / f"checkpoint-{step}/trainer_state.json").read_text()) for step in range(1, 7)]
    return [state["skipped"] for state in states]


# ---- One update. ----------------------------------------------------------------------------------------------------


def test_a_skipped_update_leaves_weights_and_optimizer_as_they_were(skipping_run):
    (row,) = read_skipped(skipping_run)
    assert 2 <= row["step"] <= 6, "so that there is a checkpoint before it"
    before, after = (skipping_run / f"checkpoint-{row['step'] - number}" for number in (1, 0))
    assert (before / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()
    old, new = (torch.load(folder / "optimizer.bin")["state"] for folder in (before, after))
    assert old.keys() == new.keys() and all(same_bits(old[number], new[number]) for number in old)


def test_the_other_updates_are_done(skipping_run):
    (row,) = read_skipped(skipping_run)
    for step in {2, 3, 4, 5, 6} - {row["step"]}:
        assert not same_bits(load_state(skipping_run, step), load_state(skipping_run, step - 1))
    assert all(weight.isfinite().all() for weight in load_weights(skipping_run).values())


def test_a_skipped_update_is_counted_and_has_no_row_in_the_history(skipping_run):
    (row,) = read_skipped(skipping_run)
    assert read_counts(skipping_run) == [int(step >= row["step"]) for step in range(1, 7)]
    assert [each["step"] for each in load_history(skipping_run, 6)] == [s for s in range(1, 7) if s != row["step"]]
    assert all(math.isfinite(value) for each in load_history(skipping_run, 6) for value in each.values())
    assert "Finished: 6 updates, 1 of them skipped." in read_log(skipping_run)


def test_captions_and_noise_levels_of_a_skipped_update_are_told(skipping_run, make_args):
    from train_srpo_wan_t2i import make_recipe

    (row,) = read_skipped(skipping_run)
    assert row["captions"] == ["a red cat"]
    sample = row["step"] - 1
    plan = plan_update(make_recipe(vars(make_args())), sample, range(sample, sample + 1))
    for branch in plan.branches:
        assert row[branch.name] == [branch.sigma_from.tolist(), branch.sigma_to.tolist()]
    log = read_log(skipping_run)
    assert re.search(rf"WARNING - .* update {row['step']} .*skipped.jsonl", log)
    assert json.dumps(row) in log


def test_a_resumed_run_skips_the_same_update(train, skipping_run, poisoned):
    resumed = train(*STEPS, "--resume_from_checkpoint", skipping_run / "checkpoint-1", dataset=poisoned)
    assert read_skipped(resumed) == read_skipped(skipping_run)
    assert same_bits(load_weights(resumed), load_weights(skipping_run))


def test_one_bad_caption_skips_the_whole_update_of_several(train, poisoned):
    flags = ["--train_batch_size", 2, "--gradient_accumulation_steps", 3, "--max_train_steps", 2]
    output_dir = train(*flags, "--checkpointing_steps", 1, dataset=poisoned)
    rows = read_skipped(output_dir)
    assert [row["step"] for row in rows] == [1, 1, 1, 2, 2, 2] and {len(row["captions"]) for row in rows} == {2}
    assert sorted(sum((row["captions"] for row in rows[:3]), [])).count("a red cat") == 1
    assert not (output_dir / "checkpoint-1/optimizer.bin").read_bytes().count(b"exp_avg")


# ---- Too many. ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, updates", [(1, 0), (2, 6)])
def test_after_max_skipped_updates_the_run_ends_and_names_the_last_good_state(
    train, poisoned, tmp_path, number, updates
):
    flags = ["--max_skipped_updates", number, "--max_train_steps", 20, "--checkpointing_steps", 2]
    with pytest.raises(SystemExit) as caught:
        train(*flags, dataset=poisoned, output_dir=tmp_path)
    rows = read_skipped(tmp_path)
    assert len(rows) == number
    last = (rows[-1]["step"] - 1) // 2 * 2
    good = f"{tmp_path}/checkpoint-{last}" if last else "the base model"
    assert re.fullmatch(f"error: update {rows[-1]['step']} is skipped: .*", caught.value.code)
    assert f"{tmp_path}/skipped.jsonl" in caught.value.code and "`--max_skipped_updates`" in caught.value.code
    assert caught.value.code.endswith(f"The last good state is {good}.")
    assert checkpoints(tmp_path) == sorted(f"checkpoint-{step}" for step in range(2, last + 1, 2))
    assert not (tmp_path / "transformer_2").exists()


def test_the_count_goes_on_in_a_resumed_run(train, poisoned, tmp_path):
    train(*STEPS, dataset=poisoned, output_dir=tmp_path)
    more = ["--max_train_steps", 20, "--checkpointing_steps", 20, "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit, match="`--max_skipped_updates`"):
        train(*more, dataset=poisoned, output_dir=tmp_path)
    first, *others = [row["step"] for row in read_skipped(tmp_path)]
    assert first <= 6 and [(step - 1) // 6 for step in others] == [1, 2], "one in each epoch"


# ---- Weights. -------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_at(monkeypatch):
    """Function: from then on, after the update with this number a weight is infinite, though all figures are not."""

    def break_weight(number, update, accelerator, models, *rest):
        metrics = update(accelerator, models, *rest)
        if rest[-1] + 1 == number:
            next(models.transformer.parameters()).data.view(-1)[0] = math.inf
        return metrics

    return lambda number: wrap(monkeypatch, train_srpo_wan_t2i, "update", partial(break_weight, number))


def test_weights_that_are_not_finite_are_in_no_checkpoint_and_in_no_result(train, tmp_path, broken_at):
    broken_at(2)
    with pytest.raises(SystemExit) as caught:
        train(output_dir=tmp_path)
    assert re.fullmatch("error: weights .* not saved.* the base model.", caught.value.code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "train.log"]


def test_what_was_saved_before_weights_became_infinite_stays_and_is_named(train, tmp_path, broken_at):
    broken_at(3)
    with pytest.raises(SystemExit) as caught:
        flags = ["--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1]
        train(*flags, output_dir=tmp_path)
    assert re.fullmatch(f"error: weights .* not saved.* {tmp_path}/checkpoint-2.", caught.value.code)
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert all(weight.isfinite().all() for weight in load_state(tmp_path).values())
    assert not (tmp_path / "transformer_2").exists()


@pytest.mark.parametrize("flags", [["--lora_rank", 4], ["--drift_weight", 1]])
def test_a_lora_and_a_drift_skip_updates_too(train, poisoned, flags):
    output_dir = Path(train(*flags, *STEPS, dataset=poisoned))
    (row,) = read_skipped(output_dir)
    assert same_bits(load_state(output_dir, row["step"]), load_state(output_dir, row["step"] - 1))
