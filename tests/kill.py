"""
Does a run survive being killed? This starts runs of the training script on the miniature, kills them without warning
(SIGKILL) at random moments, continues each with the same command and `--resume_from_checkpoint latest`, and lets it
end. Each must end as a run does that was never killed: the same weights and validation images, bit for bit, and the
same files, in the output folder and on the Hub. Half of the kills are of runs that train all weights, half of a LoRA.

    python tests/kill.py --kills 100

The Hub is that of tests/hub.py. All processes are forked from this one, which has imported the libraries before, so
that a start takes a second. The exit code is 1 if a run could not be continued or ended differently.
"""

import argparse
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parent.parent
MINIATURE = ROOT / "tests" / "miniature"
sys.path += [str(folder) for folder in (ROOT, ROOT / "tests", MINIATURE) if str(folder) not in sys.path]

import datasets  # noqa: E402, F401  what the scripts import when they use it, here once for all runs
import huggingface_hub  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import peft  # noqa: E402, F401
import torchvision.transforms.v2.functional  # noqa: E402, F401
import yaml  # noqa: E402
from helpers import file_hashes, load_history, repeatable, run_in_process, same_bits  # noqa: E402
from hub import TOKEN, Hub  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import CLIPModel, CLIPProcessor, T5TokenizerFast, UMT5EncoderModel  # noqa: E402, F401

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel  # noqa: E402, F401

import embed_prompts  # noqa: E402
import train_srpo_wan_t2i  # noqa: E402, F401
from drawings import MAX_SEQUENCE_LENGTH, captions  # noqa: E402


PROCESSES = multiprocessing.get_context("fork")
CASES = {"all weights": (), "LoRA": ("--lora_rank", 4)}
UPDATES, PAINTED_EVERY, KILLS_OF_A_RUN = 24, 4, 10
MOMENTS = ("start", "update", "update", "checkpoint", "images", "upload")  # in which a kill is meant to fall
MISSED = 6  # updates after which a moment, which should come every few of them, is given up
DELAYS = {"start": 1.5, "update": 0.3, "checkpoint": 0.05, "images": 0.05, "upload": 0.1}  # in seconds, at most
RUN = f"""
    --reward_model CLIP --height 64 --width 64 --validation_size 64 --train_batch_size 4 --sampling_steps 2
    --num_inference_steps 4 --train_timestep 1 3 --learning_rate 1e-3 --max_train_steps {UPDATES}
    --checkpointing_steps 3 --checkpoints_total_limit 2 --validation_steps {PAINTED_EVERY} --report_to none
    --push_to_hub --hub_strategy checkpoint
""".split()
# What a run writes that no two runs share: times, paths and flags; and weights, which are compared on their own.
NOT_COMPARED = re.compile(r"train\.log|run\.json|README\.md|checkpoint-.*|.*\.safetensors")
LONGEST_RUN = 300  # seconds, after which a run is said to hang


class Kill(NamedTuple):
    """Where a run was when it was killed: the moment, and the updates that it had done."""

    case: str
    run: int
    moment: str
    step: int


# ---- Processes: a Hub, runs. ----------------------------------------------------------------------------------------


class WatchedHub(Hub):
    """A Hub that notes when it was last asked for something; clients that are killed are nothing to complain of."""

    def __init__(self, asked):
        super().__init__()
        self.asked = asked

    def process_request(self, request, client_address):
        self.asked.value = time.monotonic()
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        pass


def serve(connection, asked):
    hub = WatchedHub(asked)
    connection.send(hub.url)
    hub.serve_forever(poll_interval=0.01)


def in_child(console, url, function, *arguments):
    """What a process does: calls a function, with this Hub as the Hub and with its output in a file."""
    output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ["HF_TOKEN"] = TOKEN
    huggingface_hub.constants.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_DISABLE_XET = False, True
    huggingface_hub.constants.ENDPOINT = huggingface_hub.hf_api.api.endpoint = url
    function(*arguments)


class Workplace:
    """A temporary folder, a Hub, and the dataset that all runs train on."""

    def __init__(self, folder):
        self.folder, self.asked = Path(folder), PROCESSES.Value("d", 0.0)
        ours, theirs = PROCESSES.Pipe()
        self.hub = PROCESSES.Process(target=serve, args=(theirs, self.asked), daemon=True)
        self.hub.start()
        self.url = ours.recv()
        base = ["--pretrained_model_name_or_path", MINIATURE / "model", "--max_sequence_length", MAX_SEQUENCE_LENGTH]
        self.flags = [*base, "--dataset_name", self.folder / "embeddings", *RUN]
        self.flags += ["--reward_model_path", MINIATURE / "reward", "--validation_prompts", *captions()[:20:10]]
        (self.folder / "prompts.yaml").write_text(yaml.safe_dump({"prompts": captions()[::10]}))
        embed = [*base, "--prompts", self.folder / "prompts.yaml", "--output_dir", self.folder / "embeddings"]
        self.finish(self.start(lambda: embed_prompts.main(embed_prompts.parse_args([str(flag) for flag in embed]))))

    def start(self, function, *arguments):
        arguments = (self.folder / "console.txt", self.url, function, *arguments)
        process = PROCESSES.Process(target=in_child, args=arguments)
        process.start()
        return process

    def train(self, case, output_dir, resume):
        """Starts a run; `resume` continues what is there, be it nothing yet."""
        log = output_dir / "train.log"
        self.logged = log.stat().st_size if log.exists() else 0
        flags = [*CASES[case], "--output_dir", output_dir, "--hub_model_id", f"me/{output_dir.name}"]
        flags += ["--resume_from_checkpoint", "latest"] if resume else []
        return self.start(run_in_process, *self.flags, *flags)

    def finish(self, process):
        """Waits for the end of a process, which must be a good one."""
        process.join(LONGEST_RUN)
        if process.exitcode != 0:
            process.kill()
            ended = "hangs" if process.exitcode is None else f"ended with {process.exitcode}"
            raise AssertionError(f"it {ended}:\n{(self.folder / 'console.txt').read_text()}")

    def moment(self, output_dir, now):
        """Where a run stands, as its folder, its log and the Hub tell: (one of `MOMENTS`, updates that are done)."""
        log = output_dir / "train.log"
        lines = log.read_bytes()[self.logged :].decode(errors="replace").splitlines() if log.exists() else []
        steps = re.findall(r"^.*\bstep (\d+): loss", "\n".join(lines), re.MULTILINE)  # since this start
        step = int(steps[-1]) if steps else newest_checkpoint(output_dir)
        unfinished = [*output_dir.glob("*.unfinished"), *output_dir.glob("images/*.unfinished")]
        unfinished = {path.name.split("-")[0] for path in unfinished}
        if not steps:  # what is unfinished may be of the run that was killed before
            return "start", step
        if "checkpoint" in unfinished:
            return "checkpoint", step
        if "upload" in unfinished or now - self.asked.value < 0.02:
            return "upload", step
        painting = step % PAINTED_EVERY == 0 and f"step {step}: loss" in lines[-1]  # which is what follows
        if painting or "step" in unfinished or "Running validation" in lines[-1]:
            return "images", step
        return "results" if unfinished else "update", step

    def close(self):
        self.hub.kill()
        self.hub.join()


def newest_checkpoint(output_dir):
    steps = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*")]
    return max((int(match.group(1)) for match in steps if match), default=0)


# ---- Killing runs, and comparing them with one that was not killed. -------------------------------------------------


def kill_at(workplace, process, output_dir, wanted, goal, delay):
    """
    Kills a run in the moment that is `wanted`, when `goal` updates are done, and after a delay in seconds; if that
    moment does not come or is missed, later. Returns the moment that it became and the updates that were done, or
    `None` if the run ended before.
    """
    started = time.monotonic()
    while process.is_alive() and time.monotonic() - started < LONGEST_RUN:
        moment, step = workplace.moment(output_dir, time.monotonic())
        if wanted == "start" or (moment == wanted and step >= goal) or step > goal + MISSED:
            break
        time.sleep(0.001)
    process.join(delay)
    if not process.is_alive():
        return None
    if time.monotonic() - started > LONGEST_RUN:
        process.kill()
        raise AssertionError(f"it hangs, {wanted} has not come for {LONGEST_RUN} seconds")
    now = time.monotonic()
    process.kill()
    process.join()
    return workplace.moment(output_dir, now)


def weight_files(output_dir):
    """The files of weights in an output folder, {path in it: path}, those of checkpoints too."""
    return {str(path.relative_to(output_dir)): path for path in output_dir.rglob("*.safetensors")}


def compare(output_dir, reference):
    """Fails unless a run has left what the reference has. Of weights, tensors are compared, not the order in files."""
    paths = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (output_dir, reference)]
    assert paths[0] == paths[1], f"other files: {sorted(paths[0] ^ paths[1])}"
    for name, path in weight_files(reference).items():
        assert same_bits(load_file(output_dir / name), load_file(path)), f"other weights in {name}"
    found, expected = file_hashes(output_dir), file_hashes(reference)
    other = [name for name in expected if not NOT_COMPARED.fullmatch(name) and found[name] != expected[name]]
    assert not other, f"other content of {other}"
    last = newest_checkpoint(reference)
    assert repeatable(load_history(output_dir, last)) == repeatable(load_history(reference, last)), "another history"


def compare_with_hub(workplace, output_dir):
    """Fails unless the Hub has the weights of a run."""
    for name, path in weight_files(output_dir).items():
        if not name.startswith("checkpoint-"):
            request = urllib.request.Request(f"{workplace.url}/me/{output_dir.name}/resolve/main/{name}")
            request.add_header("Authorization", f"Bearer {TOKEN}")
            with urllib.request.urlopen(request) as answer:
                assert answer.read() == path.read_bytes(), f"another {name} on the Hub"


def kill_runs(workplace, case, kills, draw):
    """Kills runs of a case so many times in all; returns the list of [`Kill`]. `AssertionError` if one is harmed."""
    reference = workplace.folder / f"{case.split()[-1]}-reference"
    workplace.finish(workplace.train(case, reference, resume=False))
    done, run, moments = [], 0, []
    while len(done) < kills:
        run += 1
        output_dir, of_this_run = reference.with_name(f"{case.split()[-1]}-{run}"), 0
        while of_this_run < min(KILLS_OF_A_RUN, kills) and len(done) < kills:
            moments = moments or draw.sample(MOMENTS, len(MOMENTS))
            wanted, goal = moments.pop(), newest_checkpoint(output_dir) + draw.randint(0, 5)
            process = workplace.train(case, output_dir, resume=of_this_run > 0)
            delay = draw.uniform(0, DELAYS[wanted])
            found = kill_at(workplace, process, output_dir, wanted, goal, delay)
            if found is None:
                break
            of_this_run += 1
            done.append(Kill(case, run, *found))
            print(f"{len(done):4}  {case:12} run {run:2}  {found[0]:10} after {found[1]:2} updates", flush=True)
        workplace.finish(workplace.train(case, output_dir, resume=True) if found else process)
        compare(output_dir, reference)
        compare_with_hub(workplace, output_dir)
        print(f"      {case:12} run {run:2}  killed {of_this_run} times, ended the same, bit for bit", flush=True)
    return done


def print_table(kills):
    counts = Counter((kill.case, kill.moment) for kill in kills)
    moments = [*dict.fromkeys(MOMENTS), "results"]
    print("\n" + " " * 14 + "".join(f"{moment:>12}" for moment in [*moments, "kills"]))
    for case in CASES:
        numbers = [counts[case, moment] for moment in moments]
        print(f"{case:14}" + "".join(f"{number:12}" for number in [*numbers, sum(numbers)]))


def main(kills, seed, folder):
    """Kills half of the runs of each case; returns the kills. Ends the program with 1 if a run is harmed."""
    started, done, workplace = time.monotonic(), [], Workplace(folder)
    try:
        for case, count in zip(CASES, (kills - kills // 2, kills // 2), strict=True):
            done += kill_runs(workplace, case, count, random.Random(f"{seed} {case}"))
    except AssertionError as problem:
        sys.exit(f"error: a run was harmed: {problem}")
    finally:
        workplace.close()
    print_table(done)
    minutes = (time.monotonic() - started) / 60
    print(f"\n{len(done)} kills, {len(done)} resumed, all runs ended the same bit for bit; {minutes:.1f} minutes")
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="How many times runs are killed, in all.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random moments.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(args.kills, args.seed, temporary)
