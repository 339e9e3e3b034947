#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Does a long run stay as it began? This trains the miniature for 2,000 updates through `accelerate launch`, with
checkpoints, validation images and TensorBoard, and watches the process from outside: its memory, its time, its open
files and its threads. A table of windows of 100 updates is printed and written to `outputs/benchmarks/soak.json`.

    python benchmarks/soak.py

Memory goes up and down within an update, so a window has a median and a peak. The exit code is 1 if, among the
windows after update 200, either of them varies by more than 5 %, or the CPU time of an update by more than 10 %, from
the least to the most, or if the last window has more files or threads than the first. CPU time is that of all that a
window has to do, checkpoints and validation too; the seconds beside it are the median of those that the run logs. They
are not judged, because they are longer when other programs use the machine.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import psutil
from measure import MINIATURE, ROOT, embed_captions

from drawings import GUIDANCE_SCALE, MAX_SEQUENCE_LENGTH, captions


TOLERANCES = {
    "cpu_seconds": ("the CPU time of an update", 0.10),
    "memory": ("memory", 0.05),
    "peak_memory": ("peak memory", 0.05),
}
INTERVAL = 0.02  # seconds between two looks
LAUNCH = f"{sys.executable} -m accelerate.commands.launch --config_file accelerate_configs/cpu.yaml --quiet"
LAUNCH = [*shlex.split(LAUNCH), "--num_cpu_threads_per_process", "1", "train_srpo_wan_t2i.py"]
# Few steps, so that an update is short; what could grow is there all the same.
SETTINGS = f"""
    --reward_model CLIP --height 64 --width 64 --validation_size 64 --train_batch_size 4 --sampling_steps 2
    --num_inference_steps 4 --train_timestep 1 3 --learning_rate 1e-6 --rollout_guidance_scale {GUIDANCE_SCALE}
    --validation_steps 50 --checkpointing_steps 50 --checkpoints_total_limit 2
""".split()


class Sample(NamedTuple):
    """One look at the process."""

    update: int  # updates that are done
    cpu_seconds: float  # since it started, of all its threads
    memory: int  # resident, in bytes
    files: int  # open
    threads: int


class Log:
    """What a run logs of its updates, read as it comes."""

    def __init__(self, file):
        self.file, self.stream, self.rest, self.seconds = file, None, "", []

    def read(self):
        """Reads on; returns the seconds of all updates that are done."""
        if self.stream is None and self.file.exists():
            self.stream = self.file.open()
        if self.stream is not None:
            *lines, self.rest = (self.rest + self.stream.read()).split("\n")
            found = (re.search(r"step \d+: loss.*, seconds ([\d.e+-]+)", line) for line in lines)
            self.seconds += [float(match.group(1)) for match in found if match]
        return self.seconds


def trainer_process(launcher):
    """The process of the script that a launcher starts, or `None` before it has."""
    for child in psutil.Process(launcher.pid).children():
        if any(word.endswith("train_srpo_wan_t2i.py") for word in child.cmdline()):
            return child


def watch(launcher, log, updates):
    """Looks at a run from its first update to its last, and waits for its end; returns the list of [`Sample`]."""
    samples, process = [], None
    while launcher.poll() is None and len(log.seconds) < updates:
        time.sleep(INTERVAL)
        process = process or trainer_process(launcher)
        if process is not None and log.read():
            with process.oneshot():
                times, memory = process.cpu_times(), process.memory_info().rss
                look = times.user + times.system, memory, process.num_fds(), process.num_threads()
            samples.append(Sample(len(log.seconds), *look))
    if launcher.wait() != 0:
        raise SystemExit(f"error: the run ended with {launcher.returncode}.")
    return samples


def make_windows(samples, seconds, size):
    """A row of the table for every `size` updates. `seconds` are those that the run logged, one for each update."""
    windows = []
    for first in range(0, len(seconds) - size + 1, size):
        inside = [sample for sample in samples if first <= sample.update - 1 < first + size]
        before, *_, after = (sample for sample in samples if first <= sample.update - 1 <= first + size)
        windows.append(
            {
                "update": first + size,
                "cpu_seconds": (after.cpu_seconds - before.cpu_seconds) / (after.update - before.update),
                "seconds": statistics.median(seconds[first : first + size]),
                "memory": statistics.median(sample.memory for sample in inside),
                "peak_memory": max(sample.memory for sample in inside),
                "files": min(sample.files for sample in inside),
                "threads": min(sample.threads for sample in inside),
            }
        )
    return windows


def spread(windows, name):
    """By how much the largest value of windows is above the smallest, as a share."""
    values = [window[name] for window in windows]
    return max(values) / min(values) - 1


def find_problems(windows, warm_up):
    """What has not stayed as it was after `warm_up` updates: a list of sentences."""
    later, problems = [window for window in windows if window["update"] > warm_up], []
    for name, (what, tolerance) in TOLERANCES.items():
        found = spread(later, name)
        print(f"{what} varies by {found:.1%}; {tolerance:.0%} is allowed.")
        if found > tolerance:
            problems.append(f"{what} varies by {found:.1%}")
    for name in ("files", "threads"):
        begin, end = later[0][name], later[-1][name]
        print(f"{begin} {name} at the begin, {end} at the end.")
        if end > begin:
            problems.append(f"{begin} {name} became {end}")
    return problems


def print_table(windows):
    print("\n" + "".join(f"{name:>14}" for name in windows[0]))
    for window in windows:
        memory = f"{window['memory'] / 1e6:11.1f} MB{window['peak_memory'] / 1e6:11.1f} MB"
        times = f"{window['update']:14}{window['cpu_seconds']:14.4f}{window['seconds']:14.4f}"
        print(f"{times}{memory}{window['files']:14}{window['threads']:14}")
    print()


def main(args):
    folder = args.output_dir / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = ["--pretrained_model_name_or_path", MINIATURE / "model", "--max_sequence_length", MAX_SEQUENCE_LENGTH]
    flags = [*base, "--dataset_name", embed_captions(folder, base), "--reward_model_path", MINIATURE / "reward"]
    flags += [*SETTINGS, "--max_train_steps", args.updates, "--output_dir", folder / "run"]
    flags += ["--validation_prompts", *captions()[::30]]
    log = Log(folder / "run" / "train.log")
    with (folder / "console.txt").open("w") as console:
        command, environment = [str(word) for word in (*LAUNCH, *flags)], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        output = {"stdout": console, "stderr": subprocess.STDOUT}
        samples = watch(subprocess.Popen(command, cwd=ROOT, env=environment, **output), log, args.updates)
    windows = make_windows(samples, log.read(), args.window)
    print_table(windows)
    problems = find_problems(windows, args.warm_up)
    (args.output_dir / "soak.json").write_text(json.dumps({"windows": windows, "problems": problems}, indent=2) + "\n")
    if problems:
        raise SystemExit(f"error: {'; '.join(problems)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=lambda path: ROOT / path, default=ROOT / "outputs" / "benchmarks")
    parser.add_argument("--updates", type=int, default=2000, help="Length of the run.")
    parser.add_argument("--window", type=int, default=100, help="Updates of a row of the table.")
    parser.add_argument("--warm_up", type=int, default=200, help="Updates after which nothing may grow.")
    main(parser.parse_args())
