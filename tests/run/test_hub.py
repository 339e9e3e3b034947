"""What `--push_to_hub` brings to the Hub, what can be loaded from there, and what becomes of a push that fails."""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
from accelerate import Accelerator
from helpers import ROOT, file_hashes, load_weights, read_log, same_bits, wrap
from hub import LOST, TOKEN, Hub
from safetensors.torch import load, load_file

from diffusers import WanTransformer3DModel


EXPERT = "transformer_2/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own


@contextmanager
def running_hub():
    hub = Hub()
    Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


@contextmanager
def online(hub):
    """In this process, `hub` is the Hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        patch.setenv("HF_TOKEN", TOKEN)
        yield


def run_online(hub, home, command, **options):
    """Runs a command in a new process, to which nothing but its environment says that `hub` is the Hub."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def push(hub, train, tmp_path):
    """Function: runs the script in this process with `--push_to_hub` and flags; returns the output folder, `fox`."""

    def run(*flags, output_dir=tmp_path / "fox"):
        return train("--push_to_hub", *flags, output_dir=output_dir)

    with online(hub):
        yield run


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited between attempts, without waiting for them."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def content(output_dir):
    """What of an output folder belongs to the Hub: {path: bytes}. `train.log` is still written while it is pushed."""
    files = {str(path.relative_to(output_dir)): path for path in Path(output_dir).rglob("*") if path.is_file()}
    apart = ("checkpoint-", "logs/", "run.json", "train.log")
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(apart)}


def pushed(hub, branch="main"):
    """What the repository holds, but for `train.log`."""
    return {name: content for name, content in hub.files(branch=branch).items() if name != "train.log"}


# ---- What is pushed. ------------------------------------------------------------------------------------------------


def test_a_pushed_repository_holds_the_result_but_no_checkpoints_and_logs(push, hub):
    output_dir = push("--report_to", "tensorboard")
    assert sorted(hub.files()) == [
        "README.md",
        "reward.png",
        "train.log",
        "transformer_2/config.json",
        "transformer_2/diffusion_pytorch_model.safetensors",
    ]
    assert pushed(hub) == content(output_dir)


def test_logs_are_not_pushed_wherever_they_lie(push, hub):
    output_dir = push("--report_to", "tensorboard", "--logging_dir", "events")
    assert any((output_dir / "events").rglob("*tfevents*"))
    assert [name for name in hub.files() if "events" in name] == []


def test_the_repository_is_named_after_the_output_folder_and_public(push, hub):
    output_dir = push()
    assert list(hub.repositories) == ["me/fox"]
    assert not hub.repositories["me/fox"].private
    assert '\ntrained = "me/fox"' in (output_dir / "README.md").read_text()


def test_the_repository_can_be_named_and_private(push, hub):
    push("--hub_model_id", "den/red-fox", "--hub_private_repo")
    assert list(hub.repositories) == ["den/red-fox"]
    assert hub.repositories["den/red-fox"].private
    assert EXPERT in hub.files("den/red-fox")


def test_another_run_can_push_to_the_same_repository(push, hub):
    push()
    push("--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert hub.messages() == ["After 2 updates", "After 3 updates"]


def test_the_token_comes_with_every_request_and_lies_in_no_file(push, hub):
    output_dir = push()
    tokens = {token for kind, token in hub.requests if kind != "put"}  # which goes to a storage that needs none
    assert tokens == {"hf_secret"}
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    assert len(files) > 5 and [path for path in files if b"hf_secret" in path.read_bytes()] == []


# ---- When it is pushed. ---------------------------------------------------------------------------------------------


def test_a_run_pushes_once_when_it_ends(push, hub):
    push("--max_train_steps", 2, "--checkpointing_steps", 1)
    assert hub.messages() == ["After 2 updates"]


def test_hub_strategy_checkpoint_pushes_after_each_checkpoint_and_at_the_end(push, hub):
    push("--hub_strategy", "checkpoint", "--max_train_steps", 3, "--checkpointing_steps", 2)
    assert hub.messages() == ["After 2 updates", "After 3 updates"]


def test_a_last_checkpoint_is_not_pushed_twice(push, hub):
    push("--hub_strategy", "checkpoint", "--max_train_steps", 2, "--checkpointing_steps", 1)
    assert hub.messages() == ["After 1 updates", "After 2 updates"]


EACH_STEP = "--max_train_steps 3 --checkpointing_steps 1 --hub_strategy".split()


def test_hub_strategy_branch_pushes_each_checkpoint_to_a_branch_and_the_end_to_main(push, hub):
    output_dir = push(*EACH_STEP, "branch")
    assert sorted(hub.repositories["me/fox"].branches) == ["main", "step-1", "step-2"]
    for step in (1, 2):
        assert hub.messages(branch=f"step-{step}") == [f"After {step} updates"]
        expert = load(pushed(hub, f"step-{step}")[EXPERT])
        assert same_bits(expert, load_file(output_dir / f"checkpoint-{step}/model.safetensors"))
    assert hub.messages() == ["After 3 updates"]
    assert pushed(hub) == content(output_dir)


def test_a_branch_that_is_there_already_gets_another_commit(push, hub):
    push(*EACH_STEP, "branch", "--max_train_steps", 2)
    push(*EACH_STEP, "branch", "--max_train_steps", 2, "--overwrite_output_dir")
    assert hub.messages(branch="step-1") == ["After 1 updates", "After 1 updates"]


def hold_until(condition, held):
    """A failure of a request that is none, but comes only when something is true; then `held` gets `True`."""
    for _ in range(1200):
        if condition():
            break
        time.sleep(0.05)
    held.append(condition())
    yield None


def test_the_run_goes_on_while_a_push_does(push, hub, tmp_path):
    held = []
    hub.failures["commit"] = hold_until(lambda: "step 3: loss" in read_log(tmp_path / "fox"), held)
    output_dir = push(*EACH_STEP, "checkpoint")
    assert held == [True]
    assert hub.messages() == ["After 1 updates", "After 2 updates", "After 3 updates"], "one after the other"
    for step, commit in enumerate(hub.repositories["me/fox"].commits[1:], start=1):
        assert same_bits(load(commit.files[EXPERT]), load_file(output_dir / f"checkpoint-{step}/model.safetensors"))
    assert [*output_dir.glob("*.unfinished")] == []


def test_the_end_waits_for_the_pushes_after_it_has_let_other_processes_go(push, hub, monkeypatch):
    held, ended = [], []

    def end(end_training, *args):
        end_training(*args)
        ended.append(True)

    wrap(monkeypatch, Accelerator, "end_training", end)
    hub.failures["commit"] = hold_until(lambda: ended == [True], held)
    push()
    assert held == [True]
    assert hub.messages() == ["After 2 updates"]


def test_a_pushed_lora_is_one_file(push, hub):
    push("--lora_rank", 4)
    assert sorted(hub.files()) == ["README.md", LORA, "reward.png", "train.log"]


# ---- What plain diffusers loads from the Hub, in a process of its own. ----------------------------------------------

LOAD = """
import sys
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from diffusers import WanPipeline, WanTransformer3DModel

base, *revisions = sys.argv[1:]
snapshot_download("me/fox", local_dir="fox")
for revision in revisions:
    expert = WanTransformer3DModel.from_pretrained("me/fox", subfolder="transformer_2", revision=revision)
    save_file(expert.state_dict(), f"{revision}.safetensors")
pipe = WanPipeline.from_pretrained(base)
pipe.load_lora_weights("me/lora", load_into_transformer_2=True)
save_file(pipe.transformer_2.state_dict(), "pipeline.safetensors")
expert = WanTransformer3DModel.from_pretrained(base, subfolder="transformer_2")
expert.load_lora_adapter("me/lora", weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
save_file(expert.state_dict(), "expert.safetensors")
"""


@pytest.fixture(scope="module")
def loaded(command, train, tiny_model, tmp_path_factory):
    """
    Folder of the outputs `fox/`, of a launched run that pushed after either of its two updates, and `lora/`; and of
    what `LOAD` made of their repositories: `loaded/`, where weights are called after the revision or the way.
    """
    folder = tmp_path_factory.mktemp("pushed")
    (folder / "loaded").mkdir()
    with running_hub() as hub:
        launcher = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "train_srpo_wan_t2i.py"]
        flags = [
            "--push_to_hub",
            "--hub_model_id",
            "me/fox",
            "--hub_strategy",
            "checkpoint",
            "--checkpointing_steps",
            1,
        ]
        run_online(hub, folder / "home", [*launcher, *command(folder / "fox", *flags)], cwd=ROOT)
        with online(hub):
            train("--lora_rank", 4, "--push_to_hub", output_dir=folder / "lora")
        revisions = [commit.oid for commit in hub.repositories["me/fox"].commits[1:]]
        load = [sys.executable, "-c", LOAD, tiny_model, *revisions]
        run_online(hub, folder / "home", load, cwd=folder / "loaded")
    return folder


@pytest.mark.slow
def test_the_repository_of_a_launched_run_is_its_output_folder(loaded):
    shutil.rmtree(loaded / "loaded/fox/.cache")  # of the download
    assert content(loaded / "loaded/fox") == content(loaded / "fox")
    log = (loaded / "loaded/fox/train.log").read_text()
    assert "step 2: loss" in log and read_log(loaded / "fox").startswith(log)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_every_push_holds_the_expert_of_its_checkpoint(loaded, step):
    weights = load_file(loaded / f"loaded/{step:040x}.safetensors")
    assert same_bits(weights, load_file(loaded / f"fox/checkpoint-{step}/model.safetensors"))


@pytest.mark.slow
def test_the_last_push_holds_the_expert_of_the_output_folder(loaded):
    assert same_bits(load_file(loaded / f"loaded/{2:040x}.safetensors"), load_weights(loaded / "fox"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pipeline", "expert"])
def test_a_pushed_lora_loads_into_a_pipeline_and_into_an_expert(loaded, tiny_model, way):
    weights, lora = load_file(loaded / f"loaded/{way}.safetensors"), load_file(loaded / "lora" / LORA)
    base = {name: weight for name, weight in weights.items() if "lora_" not in name}
    layers = {re.sub(r"\.[^.]+\.weight$", ".weight", n): w for n, w in weights.items() if "lora_" in n}
    assert same_bits({f"transformer.{name}": weight for name, weight in layers.items()}, lora)
    assert same_bits(
        {name.replace(".base_layer", ""): weight for name, weight in base.items()}, load_weights(tiny_model)
    )


# ---- A Hub that fails and recovers. ---------------------------------------------------------------------------------


QUICK_FAILURES = {
    "create": LOST,
    "validate": 503,
    "preupload": 503,
    "batch": 503,
    "put": LOST,
    "verify": 503,
    "commit": LOST,
}
FAILURES = [
    pytest.param(kind, failure, marks=() if failure == quick else pytest.mark.slow)
    for kind, quick in QUICK_FAILURES.items()
    for failure in (503, LOST)
]


@pytest.mark.parametrize("kind, failure", FAILURES)
def test_a_push_survives_a_failure_of_any_request(push, hub, waits, kind, failure):
    hub.failures[kind] = iter([failure])
    output_dir = push()
    assert pushed(hub) == content(output_dir)
    assert waits == [1]


def test_a_push_waits_when_the_hub_says_that_there_are_too_many(push, hub, waits):
    hub.failures["commit"] = iter([429, 429])
    output_dir = push()
    assert pushed(hub) == content(output_dir)
    assert waits == [1, 2]


def test_a_push_survives_a_failure_of_its_second_large_file(push, hub, waits):
    hub.failures["put"] = iter([None, 503])
    output_dir = push()
    assert hub.count("put") == 3
    assert pushed(hub) == content(output_dir)


def test_large_files_that_arrived_are_not_sent_again(push, hub, waits):
    hub.failures["commit"] = iter([503])
    push()
    assert hub.count("commit") == 2
    assert hub.count("put") == 2  # the expert and the curve


def test_a_push_that_failed_is_made_up_for_by_the_next_one(push, hub):
    hub.failures["commit"] = iter([403])
    output_dir = push("--hub_strategy", "checkpoint", "--max_train_steps", 3, "--checkpointing_steps", 2)
    assert hub.messages() == ["After 3 updates"]
    assert pushed(hub) == content(output_dir)


# ---- A Hub that does not recover. -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["preupload", "put", "commit"])
def test_what_the_hub_refuses_is_not_tried_again(push, hub, waits, kind):
    hub.failures[kind] = repeat(403)
    output_dir = push()
    assert hub.count("preupload") == 1  # with which every attempt begins
    assert waits == []
    assert "Upload failed" in read_log(output_dir) and "Storage is full" in read_log(output_dir)


@pytest.mark.parametrize("status", [403, 500])
def test_a_failed_push_leaves_a_whole_folder(push, hub, waits, plain_run, status):
    hub.failures["commit"] = repeat(status)
    output_dir = push()
    assert sorted(file_hashes(output_dir)) == sorted(file_hashes(plain_run))
    expert = WanTransformer3DModel.from_pretrained(output_dir, subfolder="transformer_2")
    assert same_bits(expert.state_dict(), load_weights(plain_run))


def test_a_hub_that_keeps_failing_is_asked_five_times(push, hub, waits):
    hub.failures["commit"] = repeat(500)
    push()
    assert hub.count("commit") == 5
    assert waits == [1, 2, 4, 8]


def test_the_log_holds_the_command_that_uploads_the_folder_later(push, hub, waits):
    hub.failures["commit"] = repeat(500)
    output_dir = push()
    (command,) = re.findall("hf upload .*", read_log(output_dir))
    excluded = "--exclude 'checkpoint-*' --exclude '*.unfinished' --exclude run.json --exclude 'logs/*'"
    assert command == f"hf upload me/fox {output_dir} . {excluded}"


def test_the_command_in_the_log_completes_the_repository(push, hub, waits, tmp_path):
    hub.failures["put"] = repeat(500)
    output_dir = push("--report_to", "tensorboard", output_dir=tmp_path / "my runs/fox")
    assert hub.files() == {}
    hub.failures.clear()
    (command,) = re.findall("hf upload .*", read_log(output_dir))
    run_online(hub, tmp_path / "home", command, shell=True)
    assert pushed(hub) == content(output_dir)


# ---- A Hub that refuses the repository. -----------------------------------------------------------------------------


def test_a_wrong_token_ends_the_run_in_one_line(push, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SystemExit) as stopped:
        push()
    message = str(stopped.value)
    assert message.startswith(
        "error: `--push_to_hub` cannot create `fox`; see `--hub_model_id`, and `hf auth whoami`: "
    )
    assert "401 Unauthorized" in message and "Invalid username or password" in message
    assert "\n" not in message and "hf_wrong" not in message
    assert hub.count("create") == 1
    assert not (tmp_path / "fox").exists()


def test_a_run_can_start_again_with_the_right_token(push, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SystemExit):
        push()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push()
    assert hub.messages() == ["After 2 updates"]
