"""`embed_prompts.py` writes on two processes what it writes on one."""

import pytest
from datasets import load_from_disk
from helpers import BOUNDARY_FLAGS, CAPTIONS, PROMPTS, TWO_PROCESSES, embed_flags, run_embed_prompts, run_launcher


@pytest.fixture
def embed_on_two_processes(tmp_path):
    """Function: what `embed_flags` takes, without the output folder -> the dataset that two processes write."""

    def run(model, prompts, *flags):
        script = ["embed_prompts.py", *embed_flags(model, prompts, tmp_path / "two", *flags)]
        done = run_launcher(*TWO_PROCESSES.split(), "--mixed_precision", "no", *script, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        assert "Num processes = 2" in done.stderr
        return load_from_disk(tmp_path / "two")

    return run


@pytest.mark.slow
def test_two_processes_write_the_same_dataset_as_one(embed_on_two_processes, text_model, prompts, tmp_path):
    flags = ["--batch_size", "2", "--validation_prompts", "a dog", "a cat"]
    one = run_embed_prompts(text_model, prompts, tmp_path / "one", *flags)
    two = embed_on_two_processes(text_model, prompts, *flags)
    assert two["train"]["caption"] == PROMPTS
    assert two["train"].to_dict() == one["train"].to_dict()
    assert two["negative"].to_dict() == one["negative"].to_dict()
    assert two["validation"].to_dict() == one["validation"].to_dict()


def test_two_processes_write_the_same_boundary_latents_as_one(
    embed_on_two_processes, tiny_model, boundary_dataset, tmp_path
):
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    two = embed_on_two_processes(tiny_model, tmp_path / "captions.txt", *BOUNDARY_FLAGS)
    one = load_from_disk(boundary_dataset)
    assert two["train"].to_dict() == one["train"].to_dict()
    assert two["negative"].to_dict() == one["negative"].to_dict()
