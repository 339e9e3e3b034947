"""What becomes of the output folder of `embed_prompts.py`: overwriting, links, interruptions at any moment."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from datasets import load_dataset, load_from_disk
from helpers import PROMPTS, embed_flags, run_command, snapshot
from helpers import run_embed_prompts as embed
from inputs import write_lines

import embed_prompts


OVERWRITE = "--overwrite_output_dir"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- What is written, and what stays. -------------------------------------------------------------------------------


def test_the_folder_holds_the_dataset_and_the_flags_that_decide_it(text_model, prompts, tmp_path):
    embed(text_model, prompts, tmp_path / "out", "--batch_size", 2)
    assert names(tmp_path / "out") == ["README.md", "dataset_dict.json", "negative", "run.json", "train"]
    assert names(tmp_path) == ["out", "prompts.txt"]
    flags = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (flags["prompts"], flags["batch_size"], flags["max_sequence_length"]) == (str(prompts), 2, 16)
    assert not {"output_dir", "overwrite_output_dir", "cache_dir", "hub_dataset_id"} & flags.keys()


def test_other_programs_read_the_folder_as_before(text_model, prompts, tmp_path):
    embed(text_model, prompts, tmp_path / "out")
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["caption"] == PROMPTS


def test_overwriting_replaces_the_dataset_and_spares_other_files(text_model, prompts, tmp_path):
    embed(text_model, prompts, tmp_path / "out", "--validation_prompts", "a dog")
    for name in ("notes.txt", "train/notes.txt", "mine/data-00000-of-00001.arrow"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / "out" / name, "mine")
    (tmp_path / "out.partial").mkdir()
    prompts.write_text("a dog\n")
    dataset = embed(text_model, prompts, tmp_path / "out", OVERWRITE)
    assert list(dataset) == ["train", "negative"]
    assert dataset["train"]["caption"] == ["a dog"]
    assert names(tmp_path / "out") == "README.md dataset_dict.json mine negative notes.txt run.json train".split()
    assert (tmp_path / "out" / "train" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "mine" / "data-00000-of-00001.arrow").read_text() == "mine"
    assert names(tmp_path) == ["out", "out.partial", "prompts.txt"]


def test_files_of_more_shards_than_the_new_dataset_has_are_removed(text_model, prompts, tmp_path):
    train = embed(text_model, prompts, tmp_path / "out")["train"]
    train.save_to_disk(tmp_path / "shards", num_shards=3)
    for file in (tmp_path / "shards").glob("data-*.arrow"):
        file.rename(tmp_path / "out" / "train" / file.name)
    embed(text_model, prompts, tmp_path / "out", OVERWRITE)
    files = ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"]
    assert names(tmp_path / "out" / "train") == files


@pytest.mark.parametrize("flags", [[], [OVERWRITE]])
def test_an_empty_folder_is_written_to_with_and_without_overwriting(text_model, prompts, tmp_path, flags):
    (tmp_path / "out").mkdir()
    assert embed(text_model, prompts, tmp_path / "out", *flags)["train"]["caption"] == PROMPTS


def test_a_link_to_a_folder_is_written_through(text_model, prompts, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    embed(text_model, prompts, tmp_path / "out")
    prompts.write_text("a dog\n")
    assert embed(text_model, prompts, tmp_path / "out", OVERWRITE)["train"]["caption"] == ["a dog"]
    assert (tmp_path / "out").is_symlink()
    assert load_from_disk(tmp_path / "disk")["train"]["caption"] == ["a dog"]


def test_the_folder_itself_is_never_replaced_as_a_mount_point_demands(text_model, prompts, tmp_path):
    (tmp_path / "out").mkdir()
    before = (tmp_path / "out").stat().st_ino
    embed(text_model, prompts, tmp_path / "out")
    embed(text_model, prompts, tmp_path / "out", OVERWRITE)
    assert (tmp_path / "out").stat().st_ino == before


# ---- Failures. ------------------------------------------------------------------------------------------------------


def end_in(monkeypatch, error):
    """Makes a run end in the middle, once captions are embedded."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(embed_prompts, "join_files", fail)


@pytest.mark.parametrize("error", [ValueError("wrong"), RuntimeError("wrong"), KeyboardInterrupt(), SystemExit(143)])
def test_a_run_that_breaks_leaves_no_trace(text_model, prompts, tmp_path, monkeypatch, error):
    end_in(monkeypatch, error)
    before = snapshot(tmp_path)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        embed(text_model, prompts, tmp_path / "new" / "out")
    assert snapshot(tmp_path) == before


def test_a_run_that_breaks_leaves_the_old_dataset_whole(text_model, prompts, tmp_path, monkeypatch):
    embed(text_model, prompts, tmp_path / "out")
    before = snapshot(tmp_path)
    end_in(monkeypatch, ValueError("wrong"))
    with pytest.raises(SystemExit):
        embed(text_model, prompts, tmp_path / "out", OVERWRITE)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_as_a_failure_does(
    text_model, prompts, tmp_path, own_signal_handlers, monkeypatch, number
):
    monkeypatch.setattr(embed_prompts, "join_files", lambda *args, **kwargs: os.kill(os.getpid(), number))
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as caught:
        embed(text_model, prompts, tmp_path / "out")
    assert caught.value.code == 128 + number
    assert snapshot(tmp_path) == before


# ---- Kills, of which a run hears nothing. ---------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a function at once, as a kill would end the process."""


def count_down(monkeypatch, steps):
    """After so many changes of names in the file system, the next one kills."""
    left = [steps]

    def step(change):
        def changed(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return change(*args, **kwargs)

        return changed

    for owner, name in ((Path, "unlink"), (Path, "rmdir"), (Path, "rename"), (Path, "replace"), (Path, "write_bytes")):
        monkeypatch.setattr(owner, name, step(getattr(owner, name)))


@pytest.mark.parametrize("steps", range(26))
def test_a_dataset_that_is_half_in_place_is_not_read_and_is_finished_later(
    text_model, prompts, tmp_path, monkeypatch, steps
):
    """26 changes: 8 files removed, each with its folder if that is empty; 1 folder renamed; 9 files put in place."""
    old, new = tmp_path / "out", tmp_path / "new"
    embed(text_model, prompts, old)
    prompts.write_text("a dog\n")
    embed(text_model, prompts, new)
    new.rename(old / "dataset.new")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        count_down(patch, steps)
        embed_prompts.move_into_place(old)
    if steps:
        with pytest.raises(FileNotFoundError):
            load_from_disk(old)
    assert embed_prompts.move_into_place(old)
    assert load_from_disk(old)["train"]["caption"] == ["a dog"]
    assert names(old) == ["README.md", "dataset_dict.json", "negative", "run.json", "train"]
    assert json.loads((old / "run.json").read_text())["prompts"] == str(prompts)


def test_a_complete_dataset_of_a_killed_run_is_put_in_place_by_the_next_start(text_model, prompts, tmp_path):
    embed(text_model, prompts, tmp_path / "new")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").touch()
    (tmp_path / "new").rename(tmp_path / "out" / "dataset.new")
    with pytest.raises(SystemExit) as caught:
        embed(text_model, prompts, tmp_path / "out")
    problem = f"error: `--output_dir {tmp_path}/out` held the complete dataset of a run that was killed."
    assert caught.value.code == f"{problem} It is in its place now; to replace it, use `--overwrite_output_dir`."
    assert load_from_disk(tmp_path / "out")["train"]["caption"] == PROMPTS
    prompts.write_text("a dog\n")
    assert embed(text_model, prompts, tmp_path / "out", OVERWRITE)["train"]["caption"] == ["a dog"]


def test_what_a_run_leaves_that_was_killed_before_is_removed(text_model, prompts, tmp_path):
    (tmp_path / "out" / "dataset.new.unfinished" / "shares" / "train").mkdir(parents=True)
    (tmp_path / "out" / "run.json").touch()
    assert embed(text_model, prompts, tmp_path / "out")["train"]["caption"] == PROMPTS
    assert names(tmp_path / "out") == ["README.md", "dataset_dict.json", "negative", "run.json", "train"]


# Overwrites the dataset of a command line (without output folder: the first argument) 20 times in a copy of itself,
# which it kills at a random moment. Prints the captions that are then found, after what the next start does first.
KILLS = """
import json, os, random, signal, sys, threading, time
from pathlib import Path
import accelerate, datasets, transformers, tqdm
from diffusers import WanPipeline
import embed_prompts

output_dir, prompts, *flags = sys.argv[1:]
tqdm.tqdm.set_lock(threading.RLock())  # the usual one is shared by the copies, and a kill would never open it
moments, seconds = random.Random(0), None
for number in range(21):
    Path(prompts).write_text("a " * number + "cat")
    started, child = time.perf_counter(), os.fork()
    if not child:
        embed_prompts.main(embed_prompts.parse_args(flags))
        os._exit(0)
    if seconds is None:  # the first one may finish, and tells how long it takes
        os.waitpid(child, 0)
        seconds = time.perf_counter() - started
    else:
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    embed_prompts.move_into_place(Path(output_dir))
    print(json.dumps({split: rows["caption"][:] for split, rows in datasets.load_from_disk(output_dir).items()}))
"""


@pytest.mark.slow
def test_20_kills_at_random_moments_leave_the_old_or_the_new_dataset(text_model, prompts, tmp_path):
    flags = embed_flags(text_model, prompts, tmp_path / "out", OVERWRITE, "--negative_prompt", "a dog")
    run = run_command(sys.executable, "-c", KILLS, tmp_path / "out", prompts, *flags)
    assert run.returncode == 0, run.stderr
    old, *found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert old == {"train": ["cat"], "negative": ["a dog"]}
    assert len(found) == 20
    for number, each in enumerate(found, start=1):
        new = {"train": ["a " * number + "cat"], "negative": ["a dog"]}
        assert each in (old, new)
        old = each
    prompts.write_text("a dog\n")
    assert embed(text_model, prompts, tmp_path / "out", OVERWRITE)["train"]["caption"] == ["a dog"]
    assert names(tmp_path / "out") == ["README.md", "dataset_dict.json", "negative", "run.json", "train"]


# ---- What is printed. -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_says_nothing_of_long_captions_but_its_own_line(text_model, tmp_path):
    file = write_lines(tmp_path / "prompts.txt", "a cat", " ".join(["a red cat on a boat"] * 200))
    run = run_command(sys.executable, "embed_prompts.py", *embed_flags(text_model, file, tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    assert "will be truncated to `--max_sequence_length 16` tokens." in run.stderr
    assert "Token indices sequence length" not in run.stderr
