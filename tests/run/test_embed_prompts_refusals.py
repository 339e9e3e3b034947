"""The captions, flags and folders that `embed_prompts.py` refuses before it writes anything, and a push that fails."""

import json
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


@pytest.mark.parametrize("flag", ["--max_sequence_length", "--batch_size"])
def test_a_count_below_one_is_refused(text_model, prompts, tmp_path, flag):
    assert embed_refusal(text_model, prompts, tmp_path / "out", flag, "0") == f"`{flag}` must be at least 1, but is 0."


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--rollout_shift nan", "`--rollout_shift` must be positive and finite, but is nan."),
        ("--rollout_shift inf", "`--rollout_shift` must be positive and finite, but is inf."),
        ("--boundary_guidance_scale nan", "`--boundary_guidance_scale` must be finite, but is nan."),
        ("--seed -1", "`--seed` must be at least 0 and of 63 bits, but is -1."),
        (f"--seed {2**63 - 1}", f"`--seed` must be at least 0 and of 63 bits, but is {2**63 - 1}."),
    ],
)
def test_numbers_without_meaning_are_refused(text_model, prompts, tmp_path, flags, message):
    assert embed_refusal(text_model, prompts, tmp_path / "out", "--boundary_latents", 1, *flags.split()) == message


@pytest.mark.parametrize(
    "flags",
    ["--height 256", "--width 256", "--sampling_steps 9", "--rollout_scheduler euler", "--rollout_shift 5"]
    + ["--boundary_guidance_scale 1", "--seed 1", "--group_offload"],
)
def test_flags_of_boundary_latents_without_them_are_refused(text_model, prompts, tmp_path, flags):
    error = embed_refusal(text_model, prompts, tmp_path / "out", *flags.split())
    assert error == f"`{flags.split()[0]}` needs `--boundary_latents`; embeddings do not depend on it."


@pytest.mark.slow
def test_the_command_exits_with_1_and_one_line(text_model, tmp_path):
    flags = embed_flags(text_model, tmp_path / "none.txt", tmp_path / "out")
    run = run_command(sys.executable, "embed_prompts.py", *flags)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == f"error: `--prompts {tmp_path}/none.txt`: there is no such file."
    assert "Traceback" not in run.stderr


# ---- The output folder. ---------------------------------------------------------------------------------------------


def test_an_output_dir_with_something_in_it_is_refused(text_model, prompts, tmp_path):
    error = embed_refusal(text_model, prompts, tmp_path)
    assert error == f"`--output_dir {tmp_path}` is not empty; choose another or `--overwrite_output_dir`."


def test_overwrite_output_dir_spares_a_folder_that_is_not_a_dataset(text_model, prompts, tmp_path):
    error = embed_refusal(text_model, prompts, tmp_path, "--overwrite_output_dir")
    assert error == f"`--output_dir {tmp_path}` holds no dataset to overwrite; choose another."


def test_overwrite_output_dir_spares_files_that_are_not_of_a_dataset(text_model, prompts, tmp_path):
    embed(text_model, prompts, tmp_path / "out")
    file = write_lines(tmp_path / "out" / "prompts.txt", "a cat")
    error = embed_refusal(text_model, file, tmp_path / "out", "--overwrite_output_dir")
    assert error == f"`--output_dir {tmp_path}/out` would delete `{file}`; move it, or choose another folder."


@pytest.mark.parametrize("name", ["notes.txt", "replaced"])
def test_what_is_not_of_an_interrupted_run_is_spared_beside_the_output_dir(text_model, prompts, tmp_path, name):
    """`replaced` holds the old dataset for the moment in which the new one takes its place."""
    (tmp_path / "out.partial").mkdir()
    file = write_lines(tmp_path / "out.partial" / name, "mine")
    error = embed_refusal(text_model, prompts, tmp_path / "out")
    assert error == f"`--output_dir {tmp_path}/out` would delete `{file}`; move it, or choose another folder."


def test_an_output_dir_that_is_a_file_is_refused(text_model, prompts):
    assert embed_refusal(text_model, prompts, prompts) == f"`--output_dir {prompts}` is a file; choose a folder."


def test_a_mount_point_is_refused(text_model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    error = embed_refusal(text_model, prompts, tmp_path / "out")
    assert error == f"`--output_dir {tmp_path}/out` is a mount point, which cannot be replaced; choose a folder in it."


def test_an_output_dir_that_cannot_be_made_is_refused(text_model, prompts, tmp_path):
    error = embed_refusal(text_model, prompts, tmp_path / ("x" * 300))
    assert error.startswith(f"`--output_dir {tmp_path}/{'x' * 300}` ")


# ---- The Hub. -------------------------------------------------------------------------------------------------------


def test_push_to_hub_without_a_token_is_refused(text_model, prompts, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    error = embed_refusal(text_model, prompts, tmp_path / "out", "--push_to_hub")
    assert error == "`--push_to_hub` needs a token: run `hf auth login`, set HF_TOKEN or pass `--hub_token`."


@pytest.mark.parametrize("flags, name", [(["--hub_dataset_id", "me/my captions"], "out"), ([], "my out")])
def test_a_name_that_the_hub_does_not_take_is_refused(text_model, prompts, tmp_path, flags, name):
    error = embed_refusal(text_model, prompts, tmp_path / name, "--push_to_hub", "--hub_token", "hf_x", *flags)
    assert error.startswith("`--hub_dataset_id`, by default the name of `--output_dir`, cannot name a dataset: ")


def test_a_failed_upload_leaves_the_dataset_and_says_how_to_upload_it(text_model, prompts, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    flags = ["--push_to_hub", "--hub_token", "hf_x", "--hub_dataset_id", "someone/captions", "--hub_private_repo"]
    with pytest.raises(SystemExit) as exit_:  # HF_HUB_OFFLINE
        embed(text_model, prompts, tmp_path / "out", *flags)
    retry = f"datasets.load_from_disk('{tmp_path}/out').push_to_hub('someone/captions', private=True)"
    assert exit_.value.code.startswith("error: `--push_to_hub` failed.")
    assert f'upload it with `python -c "import datasets; {retry}"`. The cause: ' in exit_.value.code
    assert "\n" not in exit_.value.code
    assert waited == [1, 2, 4, 8]
    assert load_from_disk(tmp_path / "out")["train"]["caption"] == PROMPTS
