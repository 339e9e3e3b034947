"""What becomes of an output folder that an earlier run wrote to."""

from helpers import read_log


def test_overwrite_output_dir_removes_what_an_earlier_run_wrote_and_nothing_else(train, tmp_path):
    train("--max_train_steps", 3, "--checkpointing_steps", 1, output_dir=tmp_path, prompts=["a boat"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine too")
    train("--overwrite_output_dir", output_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "checkpoint-2",
        "mine",
        "notes.txt",
        "reward.png",
        "train.log",
        "transformer_2",
    ]
    assert read_log(tmp_path).count("***** Running training *****") == 1


def test_a_resumed_run_adds_to_the_log(train, tmp_path):
    train(output_dir=tmp_path)
    train("--max_train_steps", 3, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert read_log(tmp_path).count("***** Running training *****") == 2
