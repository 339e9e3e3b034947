"""The benchmarks run and write what README.md and benchmarks/RESULTS.md are made of; here at the smallest size."""

import importlib
import json
import sys

import pytest
import torch
from helpers import MINIATURE, ROOT, distance, gradient_descent, load_weights, run_command


@pytest.fixture(scope="module")
def step_time(tmp_path_factory):
    """What benchmarks/step_time.py writes."""
    folder = tmp_path_factory.mktemp("benchmarks")
    size = "--num_heads 1 --num_layers 1 --size 64 --train_batch_size 1 --rounds 1".split()
    done = run_command(sys.executable, "benchmarks/step_time.py", "--output_dir", folder, *size)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "step_time.json").read_text())


@pytest.mark.slow
def test_forwards_of_an_update(step_time):
    """Guidance doubles the steps of a rollout, both branches follow, and four updates share a fast rollout."""
    forwards = {name: step_time[name]["forwards"] for name in ("plain", "default", "fast")}
    assert forwards == {"plain": 25 * 2 + 2, "default": 10 * 2 + 2, "fast": 8 * 2 / 4 + 2}


@pytest.mark.slow
def test_fewer_flop_than_the_plain_loop(step_time):
    assert step_time["flop_ratio_fast"] > step_time["flop_ratio_default"] > 1.1  # the VAE is most of it at this size
    for name in ("default", "fast"):
        ratio = step_time["plain"]["flop"] / step_time[name]["flop"]
        assert step_time[f"flop_ratio_{name}"] == pytest.approx(ratio)


@pytest.mark.slow
def test_the_stations_add_up_to_the_step(step_time):
    for name in ("plain", "default", "fast"):
        shares = step_time[name]["shares"]
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares[station] for station in ("rollout", "graded pass", "decode", "reward", "optimizer")) > 0


# ---- The loop that the trainer is compared with. --------------------------------------------------------------------


@pytest.fixture
def measure(monkeypatch):
    for folder in (MINIATURE, ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(folder)
    measure = importlib.import_module("measure")
    monkeypatch.setattr(measure, "DEVICE", torch.device("cpu"))
    return measure


ONE_UPDATE = ["--max_train_steps", 1, "--checkpointing_steps", 1, "--train_batch_size", 2]
ONE_UPDATE += ["--rollout_scheduler", "euler", "--sampling_steps", 3, *gradient_descent(10)]


@pytest.mark.parametrize("noise, max_grad_norm", [("shared", 1), ("per_sample", 0.01)], ids=["free", "clipped"])
def test_the_plain_loop_of_the_benchmarks_computes_what_the_trainer_computes(
    measure, train, command, tiny_model, tmp_path, noise, max_grad_norm
):
    flags = [*ONE_UPDATE, "--noise", noise, "--max_grad_norm", max_grad_norm]
    loop = measure.PlainLoop(command(tmp_path, *flags))
    assert loop.update(0) > 0
    weights = load_weights(train(*flags))
    update = distance(weights, load_weights(tiny_model))
    assert update > 0.01
    assert distance(weights, loop.transformer.state_dict()) < 1e-4 * update


def test_the_benchmarks_count_the_same_forwards_for_both_and_more_flop_for_a_3d_vae(measure, train, command, tmp_path):
    with measure.Anatomy().watch() as ours:
        train(*ONE_UPDATE)
    loop = measure.PlainLoop(command(tmp_path, *ONE_UPDATE))
    with measure.Anatomy().watch() as plain:
        loop.update(0)
    assert ours.forwards == plain.forwards == 2 * (2 * 3 + 2), "prompts, steps with guidance, branches"
    assert 0 < ours.flop < plain.flop
    for anatomy in (ours, plain):
        assert anatomy.seconds.keys() == {"rollout", "graded pass", "decode", "reward", "optimizer"}
        assert min(anatomy.seconds.values()) > 0


# ---- Effects are compared at equal shapes. --------------------------------------------------------------------------


@pytest.fixture
def compare_costs(measure):
    return importlib.import_module("effect").compare_costs


def row(updates, seconds, fidelity):
    """What the judge says after so many updates."""
    verdict = {"real_style_share": 0.86, "caption_accuracy": 1.0, "shape_fidelity": fidelity}
    return {"settings": "", "updates": updates, "seconds": seconds, **verdict}


def test_costs_of_an_effect_are_ratios_of_seconds_and_of_flop(compare_costs):
    result = compare_costs(row(12, 60.0, 0.901), row(16, 5.0, 0.897), {"plain": 8e12, "fast": 2e12})
    assert result["seconds_ratio"] == 12.0
    assert result["flop_ratio"] == 12 * 8 / (16 * 2)
    assert (result["shape_fidelity_plain"], result["shape_fidelity_fast"]) == (0.901, 0.897)


@pytest.mark.parametrize("plain, fast", [(0.90, 0.88), (0.88, 0.90)])
def test_an_effect_that_costs_more_of_the_shapes_is_not_compared(compare_costs, plain, fast):
    with pytest.raises(SystemExit, match=rf"not comparable: .* {plain:.3f} and {fast:.3f}"):
        compare_costs(row(12, 60.0, plain), row(16, 5.0, fast), {"plain": 8e12, "fast": 2e12})
