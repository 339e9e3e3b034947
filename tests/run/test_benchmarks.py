"""The benchmarks run and write what README.md and benchmarks/RESULTS.md are made of; here at the smallest size."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def step_time(tmp_path_factory):
    """What benchmarks/step_time.py writes."""
    folder = tmp_path_factory.mktemp("benchmarks")
    size = "--num_heads 1 --num_layers 1 --size 64 --train_batch_size 1 --rounds 1".split()
    command = [sys.executable, "benchmarks/step_time.py", "--output_dir", folder, *size]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "step_time.json").read_text())


def test_forwards_of_an_update(step_time):
    """Guidance doubles the steps of a rollout, both branches follow, and four updates share a fast rollout."""
    forwards = {name: step_time[name]["forwards"] for name in ("plain", "default", "fast")}
    assert forwards == {"plain": 25 * 2 + 2, "default": 10 * 2 + 2, "fast": 8 * 2 / 4 + 2}


def test_fewer_flop_than_the_plain_loop(step_time):
    assert step_time["flop_ratio_fast"] > step_time["flop_ratio_default"] > 1.1  # the VAE is most of it at this size
    for name in ("default", "fast"):
        ratio = step_time["plain"]["flop"] / step_time[name]["flop"]
        assert step_time[f"flop_ratio_{name}"] == pytest.approx(ratio)


def test_the_stations_add_up_to_the_step(step_time):
    for name in ("plain", "default", "fast"):
        shares = step_time[name]["shares"]
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares[station] for station in ("rollout", "graded pass", "decode", "reward", "optimizer")) > 0
