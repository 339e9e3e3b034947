"""The captions, flags and folders that `embed_prompts.py` refuses before it writes anything, and a push that fails."""

import fcntl
import json
import shutil
import sys

import pytest
from datasets import load_from_disk
from helpers import PROMPTS, embed_flags, embed_refusal, run_command
from helpers import run_embed_prompts as embed
from inputs import write_lines


# ---- Captions. ------------------------------------------------------------------------------------------------------


def test_a_bad_prompts_file_is_refused_by_its_place(text_model, tmp_path):
    """One of those in tests/unit/test_captions.py, through the whole script."""
    error = embed_refusal(text_model, write_lines(tmp_path / "p.txt", "a cat", "", "a dog"), tmp_path / "out")
    assert error == f"`--prompts {tmp_path}/p.txt`: line 2 is blank; write a caption or remove it."


def test_what_is_not_a_text_is_shown_in_short(text_model, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([{"caption": list(range(10**5))}]))
    assert len(embed_refusal(text_model, tmp_path / "p.json", tmp_path / "out")) < 1000


# ---- Flags. ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--max_sequence_length 0", "argument --max_sequence_length: must be at least 1, but is 0"),
        ("--max_sequence_length 1.5", "argument --max_sequence_length: invalid whole number value: '1.5'"),
        ("--batch_size 0", "argument --batch_size: must be at least 1, but is 0"),
        ("--batch_size many", "argument --batch_size: invalid whole number value: 'many'"),
        ("--boundary_latents 0", "argument --boundary_latents: must be at least 1, but is 0"),
        ("--boundary_latents 1 --height 0", "argument --height: must be at least 1, but is 0"),
        ("--boundary_latents 1 --width -16", "argument --width: must be at least 1, but is -16"),
        (
            "--boundary_latents 1 --sampling_steps 0",
            "argument --sampling_steps: must be at least 1 and below 1001, but is 0",
        ),
        (
            "--boundary_latents 1 --sampling_steps 1001",
            "argument --sampling_steps: must be at least 1 and below 1001, but is 1001",
        ),
        ("--boundary_latents 1 --rollout_shift 0", "argument --rollout_shift: must be above 0, but is 0.0"),
        ("--boundary_latents 1 --rollout_shift nan", "argument --rollout_shift: must be above 0, but is nan"),
        ("--boundary_latents 1 --rollout_shift inf", "argument --rollout_shift: must be above 0, but is inf"),
        (
            "--boundary_latents 1 --boundary_guidance_scale nan",
            "argument --boundary_guidance_scale: must be at least 1, but is nan",
        ),
        (
            "--boundary_latents 1 --boundary_guidance_scale 0.5",
            "argument --boundary_guidance_scale: must be at least 1, but is 0.5",
        ),
        ("--boundary_latents 1 --seed -1", "argument --seed: must be at least 0 and below 4294967296, but is -1"),
        (
            "--boundary_latents 1 --seed 4294967296",
            "argument --seed: must be at least 0 and below 4294967296, but is 4294967296",
        ),
        ("--height 256", "`--height` needs `--boundary_latents`."),
        ("--width 256", "`--width` needs `--boundary_latents`."),
        ("--sampling_steps 9", "`--sampling_steps` needs `--boundary_latents`."),
        ("--rollout_scheduler euler", "`--rollout_scheduler` needs `--boundary_latents`."),
        ("--rollout_shift 5", "`--rollout_shift` needs `--boundary_latents`."),
        ("--boundary_guidance_scale 1", "`--boundary_guidance_scale` needs `--boundary_latents`."),
        ("--seed 1", "`--seed` needs `--boundary_latents`."),
        ("--group_offload", "`--group_offload` needs `--boundary_latents`."),
        ("--hub_dataset_id me/captions", "`--hub_dataset_id` needs `--push_to_hub`."),
        ("--hub_private_repo", "`--hub_private_repo` needs `--push_to_hub`."),
        ("--dataset_split test", "`--dataset_split` is for datasets; a file has no splits."),
        ("--caption_column text", "`--caption_column` is for files and datasets that have columns or keys."),
        (
            "--hub_token=hf_secret",
            "unknown arguments: --hub_token. See --help; tokens come from `hf auth login` or HF_TOKEN.",
        ),
        (
            "--hub_token hf_secret --promts x",
            "unknown arguments: --hub_token --promts. See --help; tokens come from `hf auth login` or HF_TOKEN.",
        ),
        ("--batch 4", "unknown arguments: --batch. See --help; tokens come from `hf auth login` or HF_TOKEN."),
    ],
)
def test_a_wrong_flag_is_refused_by_its_name_in_one_line(text_model, prompts, tmp_path, flags, message):
    assert embed_refusal(text_model, prompts, tmp_path / "out", *flags.split()) == message


@pytest.mark.parametrize(
    "flag", ["revision", "variant", "cache_dir", "caption_column", "negative_prompt", "output_dir", "prompts"]
)
def test_a_blank_value_is_refused(text_model, prompts, tmp_path, flag):
    error = embed_refusal(text_model, prompts, tmp_path / "out", f"--{flag}", "  ")
    assert error == f"`--{flag}   ` must not be blank."


def test_a_negative_prompt_may_be_empty(text_model, prompts, tmp_path):
    negative = embed(text_model, prompts, tmp_path / "out", "--negative_prompt", "")["negative"]
    assert negative["caption"] == [""]
    assert len(negative[0]["prompt_embeds"]) == 1  # </s>


@pytest.mark.slow
def test_the_command_exits_with_1_and_one_line(text_model, tmp_path):
    flags = embed_flags(text_model, tmp_path / "none.txt", tmp_path / "out")
    run = run_command(sys.executable, "embed_prompts.py", *flags)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == f"error: `--prompts {tmp_path}/none.txt`: there is no such file."
    assert "Traceback" not in run.stderr


# ---- The output folder. ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"]])
@pytest.mark.parametrize("files", [["notes.txt"], ["dataset_dict.json"], ["run.json", "notes.txt"]])
def test_a_folder_that_holds_no_dataset_of_this_script_is_refused(text_model, prompts, tmp_path, files, flags):
    (tmp_path / "out").mkdir()
    for name in files:
        write_lines(tmp_path / "out" / name, "mine")
    error = embed_refusal(text_model, prompts, tmp_path / "out", *flags)
    problem = "is not empty, and not the folder of a dataset of this script. Choose another."
    assert error == f"`--output_dir {tmp_path}/out` {problem}"


def test_the_folder_of_a_run_of_training_is_refused(text_model, prompts, plain_run):
    error = embed_refusal(text_model, prompts, plain_run, "--overwrite_output_dir")
    assert error.startswith(f"`--output_dir {plain_run}` is not empty, and not the folder of a dataset")


def test_a_dataset_is_only_overwritten_with_overwrite_output_dir(text_model, prompts, tmp_path):
    embed(text_model, prompts, tmp_path / "out")
    error = embed_refusal(text_model, prompts, tmp_path / "out")
    advice = "Choose another, or replace its dataset with `--overwrite_output_dir`."
    assert error == f"`--output_dir {tmp_path}/out` is not empty. {advice}"


@pytest.mark.parametrize("flag", ["prompts", "validation_prompts", "pretrained_model_name_or_path"])
def test_an_input_in_the_output_dir_is_refused(text_model_copy, prompts, tmp_path, flag):
    embed(text_model_copy, prompts, tmp_path / "out")
    if flag == "pretrained_model_name_or_path":
        path = text_model_copy.rename(tmp_path / "out" / "model")
        arguments = [path, prompts]
    else:
        path = write_lines(tmp_path / "out" / "prompts.txt", "a cat")
        arguments = [text_model_copy, prompts]
    error = embed_refusal(*arguments, tmp_path / "out", "--overwrite_output_dir", f"--{flag}", path)
    assert error == f"`--{flag} {path}` lies in `--output_dir {tmp_path}/out`. Choose another folder to write to."


def test_an_output_dir_that_is_a_file_is_refused(text_model, prompts):
    error = embed_refusal(text_model, prompts, prompts)
    assert error.startswith(f"`--output_dir {prompts}` cannot be used: [Errno 20]")


def test_an_output_dir_that_is_a_broken_link_is_refused(text_model, prompts, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    error = embed_refusal(text_model, prompts, tmp_path / "out")
    assert error.startswith(f"`--output_dir {tmp_path}/out` cannot be used: [Errno 2]")


def test_an_output_dir_that_cannot_be_made_is_refused(text_model, prompts, tmp_path):
    error = embed_refusal(text_model, prompts, tmp_path / ("x" * 300))
    assert error.startswith(f"`--output_dir {tmp_path}/{'x' * 300}` cannot be ")


def test_a_folder_that_another_process_writes_to_is_refused(text_model, prompts, tmp_path):
    embed(text_model, prompts, tmp_path / "out")
    with (tmp_path / "out" / "run.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = embed_refusal(text_model, prompts, tmp_path / "out", "--overwrite_output_dir")
    problem = "cannot be written, or another run is writing to it; choose another: "
    assert error.startswith(f"`--output_dir {tmp_path}/out` {problem}")


# ---- Space. ---------------------------------------------------------------------------------------------------------


def leave_space(monkeypatch, free):
    """From here on, the disk has `free` bytes."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=free))


# 22 tokens of the captions and 1 of the negative prompt, 16 numbers of 2 bytes each, twice.
SIZE = 2 * 2 * 16 * (4 + 7 + 2 + 3 + 7 + 3)


def test_a_dataset_that_does_not_fit_is_refused_before_anything_is_loaded(
    text_model, prompts, tmp_path, no_loading, monkeypatch
):
    leave_space(monkeypatch, SIZE - 1)
    error = embed_refusal(text_model, prompts, tmp_path / "out", "--negative_prompt", "a cat")
    sizes = "the run needs 1.66e-06 GB, of which 1.66e-06 GB are free"
    assert error == f"`--output_dir {tmp_path}/out`: the disk is full: {sizes}."


def test_boundary_latents_take_space(tiny_model, prompts, tmp_path, no_loading, monkeypatch):
    leave_space(monkeypatch, SIZE + 2 * 5 * 3 * 4 * 4 * 4 * 4 - 1)  # captions, latents, their shape, bytes
    flags = ["--negative_prompt", "a cat", "--boundary_latents", 3, "--height", 32, "--width", 32]
    assert "needs 9.34e-06 GB" in embed_refusal(tiny_model, prompts, tmp_path / "out", *flags)


def test_a_dataset_that_fits_is_written(text_model, prompts, tmp_path, monkeypatch):
    leave_space(monkeypatch, SIZE)
    dataset = embed(text_model, prompts, tmp_path / "out", "--negative_prompt", "a cat")
    assert dataset["train"]["caption"] == PROMPTS


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_is_full_in_the_end_leaves_what_was_there(text_model, prompts, tmp_path, monkeypatch, overwrite):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if overwrite:
        embed(text_model, prompts, tmp_path / "out")
    monkeypatch.setattr("datasets.DatasetDict.save_to_disk", fail)
    flags = ["--overwrite_output_dir"] if overwrite else []
    error = embed_refusal(text_model, prompts, tmp_path / "out", *flags)
    assert error.startswith(f"the disk is full: `{tmp_path}/out/dataset.new` takes ")


# ---- The Hub. -------------------------------------------------------------------------------------------------------


def test_push_to_hub_without_a_token_is_refused(text_model, prompts, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    error = embed_refusal(text_model, prompts, tmp_path / "out", "--push_to_hub")
    assert error == "`--push_to_hub` needs `hf auth login` or HF_TOKEN."


@pytest.mark.parametrize("flags, name", [(["--hub_dataset_id", "me/my captions"], "out"), ([], "my out")])
def test_a_name_that_the_hub_does_not_take_is_refused(text_model, prompts, tmp_path, monkeypatch, flags, name):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    error = embed_refusal(text_model, prompts, tmp_path / name, "--push_to_hub", *flags)
    assert error.startswith("`--hub_dataset_id`, by default the name of `--output_dir`, cannot name a dataset: ")


def test_a_failed_upload_leaves_the_dataset_and_says_how_to_upload_it(text_model, prompts, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    flags = ["--push_to_hub", "--hub_dataset_id", "someone/captions", "--hub_private_repo"]
    with pytest.raises(SystemExit) as exit_:  # HF_HUB_OFFLINE
        embed(text_model, prompts, tmp_path / "out", *flags)
    retry = f"datasets.load_from_disk('{tmp_path}/out').push_to_hub('someone/captions', private=True)"
    assert exit_.value.code.startswith("error: `--push_to_hub` failed.")
    assert f'upload it with `python -c "import datasets; {retry}"`. The cause: ' in exit_.value.code
    assert "\n" not in exit_.value.code
    assert waited == [1, 2, 4, 8]
    assert load_from_disk(tmp_path / "out")["train"]["caption"] == PROMPTS
