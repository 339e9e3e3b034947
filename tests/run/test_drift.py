"""`--drift_weight`: the loss also counts how far the velocity has moved from that of the untrained expert."""

import pytest
import torch
from helpers import LORA, distance, load_history, load_lora, load_state, load_weights, logged, repeatable, same_bits


FOUR_STEPS = "--max_train_steps 4 --learning_rate 0.01 --adam_weight_decay 0".split()

KINDS = pytest.mark.parametrize("kind", [[], LORA], ids=["all weights", "LoRA"])


@pytest.fixture(scope="module")
def run(train):
    """Function: what is trained and the weight of the drift -> the output folder of four updates, run once."""
    done = {}

    def four_updates(kind, weight):
        key = len(kind), weight
        done[key] = done.get(key) or train(*FOUR_STEPS, *kind, *(["--drift_weight", weight] if weight else []))
        return done[key]

    return four_updates


@KINDS
def test_the_drift_is_zero_at_the_first_update_and_grows(run, kind):
    first, *later = logged(run(kind, 1e-9), "drift", 4)
    assert first == 0
    assert 0 < later[0] < later[-1]


@KINDS
def test_the_drift_counts_in_the_loss(train, run, kind):
    history = load_history(train(*FOUR_STEPS, *kind, "--drift_weight", 2, "--loss", "linear"), 4)
    for row in history:
        assert row["loss"] == pytest.approx(2 * row["drift"] - row["score"], abs=1e-6)


@KINDS
def test_without_the_flag_no_drift_is_logged_and_the_run_is_that_of_a_tiny_weight(run, kind):
    plain, tiny = run(kind, 0), run(kind, 1e-9)
    assert logged(plain, "drift", 4) == []
    assert logged(tiny, "score", 4) == pytest.approx(logged(plain, "score", 4), abs=1e-4)


def moved(output_dir, kind, tiny_model):
    """How far the weights are from the base: all of them, or what the LoRA adds to them."""
    if not kind:
        return distance(load_weights(output_dir), load_weights(tiny_model))
    lora = load_lora(output_dir)
    added = [lora[name] @ lora[name.replace("lora_B", "lora_A")] for name in lora if "lora_B" in name]
    return torch.cat([matrix.flatten() for matrix in added]).norm().item()


@KINDS
def test_the_drift_term_keeps_the_weights_nearer_to_the_base(run, tiny_model, kind):
    free, held = run(kind, 0), run(kind, 1000)
    assert moved(held, kind, tiny_model) < moved(free, kind, tiny_model)
    assert logged(held, "drift", 4)[-1] < 0.5 * logged(run(kind, 1e-9), "drift", 4)[-1]


@pytest.mark.parametrize(
    "kind, mixed_precision",
    [([], "no"), pytest.param(LORA, "no", marks=pytest.mark.slow), pytest.param([], "bf16", marks=pytest.mark.slow)],
    ids=["all weights", "LoRA", "all weights in bf16"],
)
def test_two_updates_and_two_more_are_four_bit_for_bit(train, kind, mixed_precision):
    """A resumed run compares with the base model, too, not with the weights that it goes on from."""
    flags = [*FOUR_STEPS, *kind, "--drift_weight", 10]
    whole = train(*flags, mixed_precision=mixed_precision)
    resume = ["--resume_from_checkpoint", whole / "checkpoint-2"]
    resumed = train(*flags, *resume, mixed_precision=mixed_precision)
    assert same_bits(load_state(resumed, 4), load_state(whole, 4))
    assert repeatable(load_history(resumed, 4)) == repeatable(load_history(whole, 4))


def test_the_copy_of_the_base_is_in_no_checkpoint(run):
    plain, held = run([], 0) / "checkpoint-4", run([], 1000) / "checkpoint-4"
    sizes = [{path.name: path.stat().st_size for path in folder.glob("*.safetensors")} for folder in (plain, held)]
    assert sizes[0] == sizes[1] and list(sizes[0]) == ["model.safetensors"]
