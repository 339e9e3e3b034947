"""What `embed_prompts.py` refuses before it loads or writes anything, and an upload that fails."""

import shutil
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk
from helpers import PROMPTS, embed_flags, run_command
from helpers import run_embed_prompts as embed


def refusal(model, prompts, output_dir, *flags):
    """Run the script on something it must refuse; return its message after checking that it wrote nothing."""
    before = sorted(output_dir.parent.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        embed(model, prompts, output_dir, *flags)
    assert sorted(output_dir.parent.rglob("*")) == before
    assert isinstance(exit_.value.code, str), "a message makes Python exit with 1"
    assert "\n" not in exit_.value.code
    return exit_.value.code


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", "", "the file is empty."),
        ("p.txt", "\n \n", "the file is empty."),
        ("p.txt", "a cat\n\na dog\n", "line 2 is blank; write a caption or remove it."),
        ("p.txt", b"a cat\n\xff", "'utf-8' codec can't decode"),
        ("p.yaml", "captions: [a cat]", "expected a list under the key `prompts`"),
        ("p.yaml", "prompts: a cat", "expected a list under the key `prompts`"),
        ("p.yaml", "prompts: []", "there are no captions in it."),
        ("p.yaml", "prompts: [a cat, 2]", "prompts[1] is not a text but 2; write it in quotes or remove it."),
        ("p.yaml", "prompts: [a cat, '  ']", "prompts[1] is blank; write a caption or remove it."),
        ("p.yaml", "prompts:\n- a cat\n- [", "line 3, column 4"),
        ("p.json", '{"caption": "a cat"}', "expected a list of objects"),
        ("p.json", '[{"caption": "a cat"}, {"text": "a dog"}]', "item 1 has no `caption`; name"),
        ("p.json", '["a cat"]', "item 0 has no `caption`; name the key or column with `--caption_column`."),
        ("p.json", '[{"caption": null}]', "item 0 is not a text but None; write it in quotes or remove it."),
        ("p.json", "[{", "line 1 column 3"),
        ("p.jsonl", '{"caption": "a cat"}\n{"caption"}\n', "line 2 is not JSON"),
        ("p.jsonl", '{"caption": "a cat"}\n{"caption": ""}\n', "line 2 is blank; write a caption or remove it."),
        ("p.jsonl", '{"caption": "a cat"}\n{"text": "a dog"}\n', "line 2 has no `caption`"),
        ("p.csv", "text\na cat\n", "line 2 has no `caption`; name the key or column with `--caption_column`."),
        ("p.csv", "caption,id\na cat,1\n,2\n", "line 3 is blank; write a caption or remove it."),
        ("p.csv", "caption\n", "there are no captions in it."),
        ("p.parquet", "not parquet", "nor a dataset with such `--dataset_split` and `--caption_column`: "),
        ("p.png", "not text", "not a .yaml, .yml, .json, .jsonl, .txt, .csv file, nor a dataset"),
    ],
)
def test_a_bad_prompts_file_is_refused_by_its_place(text_model, tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refusal(text_model, file, tmp_path / "out", "--cache_dir", tmp_path.parent / "cache")
    assert error.startswith(f"`--prompts` {file}: ")
    assert message in error


def test_a_column_that_a_dataset_does_not_have_is_refused(text_model, tmp_path):
    Dataset.from_dict({"text": ["a cat"]}).to_parquet(tmp_path / "prompts.parquet")
    error = refusal(
        text_model, tmp_path / "prompts.parquet", tmp_path / "out", "--cache_dir", tmp_path.parent / "cache"
    )
    assert "`--caption_column`" in error and "Current columns in the dataset: ['text']" in error


def test_a_missing_prompts_file_is_refused(text_model, tmp_path):
    error = refusal(text_model, tmp_path / "none.txt", tmp_path / "out")
    assert error == f"`--prompts` {tmp_path}/none.txt: there is no such file."


def test_an_unknown_dataset_is_refused(text_model, tmp_path):
    assert refusal(text_model, "someone/something", tmp_path / "out").startswith(
        "`--prompts` someone/something: not a"
    )


@pytest.mark.parametrize("flag", ["--max_sequence_length", "--batch_size"])
def test_a_count_below_one_is_refused(text_model, prompts, tmp_path, flag):
    assert refusal(text_model, prompts, tmp_path / "out", flag, "0") == f"`{flag}` must be at least 1, not 0."


def test_an_output_dir_with_something_in_it_is_refused(text_model, prompts, tmp_path):
    error = refusal(text_model, prompts, tmp_path)
    assert error == f"`--output_dir` {tmp_path} is not empty; choose another or `--overwrite_output_dir`."


def test_overwrite_output_dir_spares_a_folder_that_is_not_a_dataset(text_model, prompts, tmp_path):
    error = refusal(text_model, prompts, tmp_path, "--overwrite_output_dir")
    assert error == f"`--output_dir` {tmp_path} holds no dataset to overwrite; choose another."


def test_an_output_dir_that_is_a_file_is_refused(text_model, prompts):
    assert refusal(text_model, prompts, prompts) == f"`--output_dir` {prompts} is a file; choose a folder."


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_model_folder_without_a_part_is_refused(text_model, prompts, tmp_path, part):
    half = Path(shutil.copytree(text_model, tmp_path / "half"))
    shutil.rmtree(half / part)
    error = refusal(half, prompts, tmp_path / "out")
    assert error == f"`--pretrained_model_name_or_path` {half} is a folder without {part}."


def test_a_model_that_does_not_exist_is_refused(prompts, tmp_path):
    error = refusal(tmp_path / "none", prompts, tmp_path / "out")
    assert error.startswith(f"`--pretrained_model_name_or_path` {tmp_path}/none could not be loaded: ")


@pytest.mark.slow
def test_the_command_exits_with_1_and_one_line(text_model, tmp_path):
    flags = embed_flags(text_model, tmp_path / "none.txt", tmp_path / "out")
    run = run_command(sys.executable, "embed_prompts.py", *flags)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == f"`--prompts` {tmp_path}/none.txt: there is no such file."
    assert "Traceback" not in run.stderr


def test_push_to_hub_without_a_token_is_refused(text_model, prompts, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    error = refusal(text_model, prompts, tmp_path / "out", "--push_to_hub")
    assert error == "`--push_to_hub` needs a token; run `hf auth login`, set HF_TOKEN or pass `--hub_token`."


def test_a_failed_upload_leaves_the_dataset_and_says_how_to_upload_it(text_model, prompts, tmp_path):
    flags = ["--push_to_hub", "--hub_token", "hf_x", "--hub_dataset_id", "someone/captions", "--hub_private_repo"]
    with pytest.raises(SystemExit) as exit_:  # HF_HUB_OFFLINE
        embed(text_model, prompts, tmp_path / "out", *flags)
    retry = f"datasets.load_from_disk('{tmp_path}/out').push_to_hub('someone/captions', private=True)"
    assert exit_.value.code.endswith(f'python -c "import datasets; {retry}"')
    assert load_from_disk(tmp_path / "out")["train"]["caption"] == PROMPTS
