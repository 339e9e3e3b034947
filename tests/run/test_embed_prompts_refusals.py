"""The captions, flags and folders that `embed_prompts.py` refuses before it writes anything, and a push that fails."""

import json
import sys

import pytest
from datasets import Dataset, load_from_disk
from helpers import PROMPTS, embed_flags, embed_refusal, run_command
from helpers import run_embed_prompts as embed
from inputs import write_lines


# ---- Captions. ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", "", "the file is empty."),
        ("p.txt", "\n \n", "the file is empty."),
        ("p.txt", "a cat\n\na dog\n", "line 2 is blank; write a caption or remove it."),
        ("p.txt", b"a cat\n\xff", "'utf-8' codec can't decode"),
        (
            "p.txt",
            "a cat".encode("utf-16"),
            "the file is not text in UTF-8, save it as UTF-8: 'utf-8' codec can't decode",
        ),
        ("p.txt", "a cat\n\u200b\x07\n", "line 2 is blank; write a caption or remove it."),
        ("p.yaml", "captions: [a cat]", "expected a list under the key `prompts`"),
        ("p.yaml", "prompts: a cat", "expected a list under the key `prompts`"),
        ("p.yaml", "prompts: [a cat]\nprompts: [a dog]", "the key `prompts` is there twice; join the two lists."),
        ("p.yaml", "prompts: []", "there are no captions in it."),
        ("p.yaml", "prompts: [a cat, 2]", "prompts[1] is not a text but 2; write it in quotes or remove it."),
        ("p.yaml", "prompts: [a cat, '  ']", "prompts[1] is blank; write a caption or remove it."),
        ("p.yaml", "prompts:\n- a cat\n- [", "line 3, column 4"),
        ("p.json", '{"caption": "a cat"}', "expected a list of objects"),
        ("p.json", '[{"caption": "a cat"}, {"text": "a dog"}]', "item 1 has no `caption`; name"),
        ("p.json", '[["a cat"]]', "item 0 has no `caption`; name the key or column with `--caption_column`."),
        ("p.json", '[{"caption": null}]', "item 0 is not a text but None; write it in quotes or remove it."),
        ("p.json", "[{", "line 1 column 3"),
        ("p.jsonl", '{"caption": "a cat"}\n{"caption"}\n', "line 2 is not JSON"),
        ("p.jsonl", '{"caption": "a cat"}\n{"caption": ""}\n', "line 2 is blank; write a caption or remove it."),
        ("p.jsonl", '{"caption": "a cat"}\n{"text": "a dog"}\n', "line 2 has no `caption`"),
        ("p.csv", "text\na cat\n", "line 2 has no `caption`; name the key or column with `--caption_column`."),
        ("p.csv", "caption,id\na cat,1\n,2\n", "line 3 is blank; write a caption or remove it."),
        ("p.csv", "caption\na cat\na cat, with a hat\n", "line 3 has more cells than columns; put captions"),
        ("p.csv", "caption\n", "there are no captions in it."),
        ("p.parquet", "not parquet", "nor a dataset with such `--dataset_split` and `--caption_column`: "),
        ("p.png", "not text", "not a .yaml, .yml, .json, .jsonl, .txt, .csv file, nor a dataset"),
    ],
)
def test_a_bad_prompts_file_is_refused_by_its_place(text_model, tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = embed_refusal(text_model, file, tmp_path / "out", "--cache_dir", tmp_path.parent / "cache")
    assert error.startswith(f"`--prompts {file}`: ")
    assert message in error


def test_a_column_that_a_dataset_does_not_have_is_refused(text_model, tmp_path):
    Dataset.from_dict({"text": ["a cat"]}).to_parquet(tmp_path / "prompts.parquet")
    error = embed_refusal(
        text_model, tmp_path / "prompts.parquet", tmp_path / "out", "--cache_dir", tmp_path.parent / "cache"
    )
    assert "`--caption_column`" in error and "Current columns in the dataset: ['text']" in error


def test_a_missing_prompts_file_is_refused(text_model, tmp_path):
    error = embed_refusal(text_model, tmp_path / "none.txt", tmp_path / "out")
    assert error == f"`--prompts {tmp_path}/none.txt`: there is no such file."


def test_an_unknown_dataset_is_refused(text_model, tmp_path):
    assert embed_refusal(text_model, "someone/something", tmp_path / "out").startswith(
        "`--prompts someone/something`: not a"
    )


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
