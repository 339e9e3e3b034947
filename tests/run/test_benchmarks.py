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


# ---- A long run stays as it began. ----------------------------------------------------------------------------------


@pytest.fixture
def soak(measure):
    return importlib.import_module("soak")


def test_a_window_is_what_was_seen_during_its_updates(soak):
    """The process takes 0.5 s of CPU time for each of four updates, and is looked at twice during each."""
    looks = [(1, 10.0, 100), (1, 10.2, 300), (2, 10.5, 100), (2, 10.7, 310), (3, 11.0, 120), (4, 11.5, 140)]
    samples = [soak.Sample(update, cpu, memory, files=4, threads=7) for update, cpu, memory in looks]
    first, second = soak.make_windows(samples, [1.0, 2.0, 3.0, 5.0], size=2)
    assert first["update"] == 2 and second["update"] == 4
    assert first["cpu_seconds"] == second["cpu_seconds"] == pytest.approx(0.5)
    assert (first["seconds"], second["seconds"]) == (1.5, 4.0)
    assert (first["memory"], first["peak_memory"]) == (200, 310)
    assert (second["memory"], second["peak_memory"]) == (130, 140)


def soak_windows(**changes):
    """Three windows that are alike, but for the last one's `changes`."""
    window = {"cpu_seconds": 0.2, "memory": 1e9, "peak_memory": 1.1e9, "files": 4, "threads": 7}
    return [{"update": 100, **window}, {"update": 200, **window}, {"update": 300, **window, **changes}]


@pytest.mark.parametrize("within", [{"memory": 1.04e9}, {"peak_memory": 1.14e9}, {"cpu_seconds": 0.215}, {"files": 3}])
def test_a_run_that_stays_as_it_was_has_no_problem(soak, within):
    assert soak.find_problems(soak_windows(**within), warm_up=100) == []


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"memory": 1.06e9}, "memory varies by 6.0%"),
        ({"peak_memory": 1.21e9}, "peak memory varies by 10.0%"),
        ({"cpu_seconds": 0.23}, "the CPU time of an update varies by 15.0%"),
        ({"files": 5}, "4 files became 5"),
        ({"threads": 9}, "7 threads became 9"),
    ],
)
def test_what_grows_in_a_run_is_a_problem(soak, changes, problem):
    assert soak.find_problems(soak_windows(**changes), warm_up=100) == [problem]


def test_what_grows_while_a_run_warms_up_is_none(soak):
    assert soak.find_problems(soak_windows(memory=2e9), warm_up=200) == []


@pytest.mark.slow
def test_a_run_is_watched_from_outside(tmp_path):
    """At this length nothing is settled yet, so it may find problems."""
    sizes = "--updates 20 --window 10 --warm_up 0".split()
    done = run_command(sys.executable, "benchmarks/soak.py", "--output_dir", tmp_path, *sizes)
    result = json.loads((tmp_path / "soak.json").read_text())
    assert (done.returncode == 0) == (result["problems"] == []), done.stderr
    for window, update in zip(result["windows"], (10, 20), strict=True):
        assert window["update"] == update
        assert 0 < window["cpu_seconds"] < 10 and 0 < window["seconds"] < 60
        assert 1e8 < window["memory"] <= window["peak_memory"] < 1e10
        assert window["files"] >= 3 and window["threads"] >= 1
