"""Whenever saving fails, on a full disk or by a kill, nothing whole is lost and the run can go on."""

import errno
import hashlib
import json
import os
import shutil
import signal
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import accelerate.utils.other
import pytest
import safetensors.torch
import torch
from helpers import checkpoints, load_history, load_state, load_weights, repeatable, run_in_process, same_bits
from matplotlib.figure import Figure
from PIL import Image
from test_interruption import PROCESSES

from train_srpo_wan_t2i import list_checkpoints, written


pytestmark = pytest.mark.usefixtures("own_signal_handlers")

# What a run does to files: any of these may fail.
OPERATIONS = [
    *((Path, name) for name in ("mkdir", "rename", "replace", "unlink", "write_text")),
    (os, "fsync"),
    (shutil, "rmtree"),
    (torch, "save"),
    (safetensors.torch, "save_file"),
    (accelerate.utils.other, "safe_save_file"),
    (Image.Image, "save"),
    (Figure, "savefig"),
]
FLAGS = "--max_train_steps 3 --checkpointing_steps 1 --checkpoints_total_limit 1 --validation_steps 3".split()
RUN = partial(lambda train, *flags, **options: train(*FLAGS, *flags, prompts=["a boat"], **options))


def is_whole(checkpoint):
    """Whether all files of a checkpoint have their checksums, as `sha256sum -c` checks them."""
    lines = (checkpoint / "SHA256SUMS").read_text().splitlines()
    return all(hashlib.sha256((checkpoint / line[66:]).read_bytes()).hexdigest() == line[:64] for line in lines)


def newest(output_dir):
    """The step of the newest whole checkpoint, 0 without one."""
    whole = [folder for folder in list_checkpoints(output_dir) if is_whole(folder)]
    return max((int(folder.name.split("-")[1]) for folder in whole), default=0)


@contextmanager
def watch_files(output_dir, fail_at=None, fail=None):
    """
    A list that grows by the name of every operation on files in a folder, before it is done. Instead of number
    `fail_at`, and of none after it, `fail` is called with that list.
    """
    done = []

    def is_inside(value):
        return isinstance(value, str | Path) and str(output_dir) in str(value)

    def watch(operation, name, *args, **kwargs):
        values = [getattr(value, "name", value) for value in (*args, *kwargs.values())]
        if any(is_inside(value) for value in (*args, *values)):
            done.append(name)
            if len(done) - 1 == fail_at:
                fail(done)
        return operation(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in OPERATIONS:
            operation = getattr(owner, name)
            # A function, so that it is bound like the method that it replaces.
            patch.setattr(owner, name, lambda *args, _f=operation, _n=name, **kwargs: watch(_f, _n, *args, **kwargs))
        yield done


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """A run without faults, and the names of what it does to files."""
    output_dir = tmp_path_factory.mktemp("straight") / "output"
    with watch_files(output_dir) as done:
        RUN(train, output_dir=output_dir)
    return namedtuple("Straight", "output_dir operations")(output_dir, done)


def assert_goes_on(train, output_dir, straight):
    RUN(train, "--resume_from_checkpoint", "latest", output_dir=output_dir)
    assert same_bits(load_weights(output_dir), load_weights(straight.output_dir))
    assert same_bits(load_state(output_dir, 3), load_state(straight.output_dir, 3))
    assert repeatable(load_history(output_dir, 3)) == repeatable(load_history(straight.output_dir, 3))
    assert [*output_dir.rglob("*.unfinished")] == []
    names = [
        sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (output_dir, straight.output_dir)
    ]
    assert names[0] == names[1]


POINTS = 20  # among all operations, evenly
QUICK = [0, 3, 6, 9, 12, 15, 19]
EVENLY = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in range(POINTS)]


def test_a_run_has_enough_operations_to_fail_at(straight):
    assert len(straight.operations) > 3 * POINTS
    assert {"mkdir", "fsync", "replace", "rename", "rmtree", "save", "save_file", "safe_save_file", "savefig"} <= {
        *straight.operations
    }


@pytest.mark.parametrize("point", EVENLY)
def test_on_a_full_disk_nothing_whole_is_lost_and_the_run_goes_on_when_there_is_room(train, straight, tmp_path, point):
    output_dir, steps = tmp_path / "output", []

    def fill_the_disk(done):
        steps.append(newest(output_dir))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fail_at = round(point * (len(straight.operations) - 1) / (POINTS - 1))
    with watch_files(output_dir, fail_at, fill_the_disk) as done, pytest.raises((SystemExit, OSError)) as caught:
        RUN(train, output_dir=output_dir)
    assert len(steps) == 1, f"it failed at {done[-1]}"
    if isinstance(caught.value, SystemExit):
        assert "\n" not in caught.value.code and str(tmp_path) in caught.value.code
    assert newest(output_dir) >= steps[0]
    assert_goes_on(train, output_dir, straight)


def killed_run(output_dir, fail_at, flags):
    with watch_files(output_dir, fail_at, lambda done: os.kill(os.getpid(), signal.SIGKILL)):
        run_in_process(*flags)


@pytest.mark.parametrize("point", [pytest.param(n, marks=() if n in (5, 14) else pytest.mark.slow) for n in range(20)])
def test_a_run_that_is_killed_while_it_saves_goes_on(train, command, straight, tmp_path, point):
    output_dir = tmp_path / "output"
    fail_at = round(point * (len(straight.operations) - 1) / (POINTS - 1))
    flags = command(output_dir, *FLAGS, prompts=["a boat"])
    process = PROCESSES.Process(target=killed_run, args=(output_dir, fail_at, flags))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert_goes_on(train, output_dir, straight)


# ---- What is written at once, or not at all. ------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch):
    """Function: sets the bytes that are free on every disk."""
    usage = namedtuple("usage", "total used free")
    return lambda size: monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, size))


def test_a_file_appears_when_it_is_complete(tmp_path):
    (tmp_path / "file").write_text("old")
    with written(tmp_path / "file") as new:
        new.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with written(tmp_path / "folder") as new:
        new.mkdir()
        (new / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_what_could_not_be_written_leaves_the_old_one_and_nothing_unfinished(tmp_path, error):
    (tmp_path / "file").write_text("old")
    with pytest.raises(error), written(tmp_path / "file") as new:
        new.write_text("half")
        raise error
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_takes_more_than_is_free_is_not_begun(tmp_path, free):
    free(10**9)
    with pytest.raises(SystemExit) as caught, written(tmp_path / "folder", size=3e9):
        pytest.fail("it was begun")
    assert caught.value.code.startswith(f"error: the disk is full: `{tmp_path}/folder` takes 3 GB, and 1 GB ")
    assert [*tmp_path.iterdir()] == []


def test_a_disk_that_becomes_full_meanwhile_ends_the_program_in_one_line(tmp_path, free):
    free(10**9)
    with pytest.raises(SystemExit) as caught, written(tmp_path / "folder", size=2e6) as new:
        new.mkdir()
        (new / "half").write_text("half")
        free(1000)
        raise RuntimeError("unexpected pos 7543360 vs 7543252")  # as torch says it
    assert caught.value.code.startswith(f"error: the disk is full: `{tmp_path}/folder` takes 0.002 GB")
    assert [*tmp_path.iterdir()] == []


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "file").symlink_to("disk/file")
    with written(tmp_path / "file") as new:
        new.write_text("new")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "disk/file").read_text() == "new"


# ---- A limit of the kernel, instead of a full disk. -----------------------------------------------------------------


def limited_run(flags):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # the optimizer takes more
    run_in_process(*flags)


def test_a_checkpoint_that_the_kernel_does_not_let_grow_leaves_nothing(train, command, straight, tmp_path):
    output_dir = tmp_path / "output"
    process = PROCESSES.Process(target=limited_run, args=[command(output_dir, *FLAGS, prompts=["a boat"])])
    process.start()
    process.join()
    assert process.exitcode == 1
    assert checkpoints(output_dir) == []
    assert [*output_dir.rglob("*.unfinished")] == []
    assert json.loads((output_dir / "run.json").read_text())["seed"] == 42
    assert_goes_on(train, output_dir, straight)
