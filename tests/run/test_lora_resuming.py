"""A LoRA goes on from a checkpoint of its own, and from no other."""

import re
import shutil
from pathlib import Path

import pytest
from helpers import LORA, checkpoints, file_hashes, load_history, load_lora, repeatable, same_bits


@pytest.mark.parametrize(
    "flags, mixed_precision",
    [
        pytest.param("", "no", marks=pytest.mark.slow),
        pytest.param("", "bf16", marks=pytest.mark.slow),
        pytest.param("--lora_dropout 0.5", "no", marks=pytest.mark.slow),
        pytest.param("--checkpointing_steps 1 --checkpoints_total_limit 1", "no", marks=pytest.mark.slow),
        ("--base_weights fp8 --gradient_checkpointing --lora_dropout 0.5", "bf16"),
    ],
)
def test_two_updates_and_two_more_are_four_bit_for_bit(train, flags, mixed_precision):
    flags, precision = [*LORA, *flags.split()], {"mixed_precision": mixed_precision}
    whole = train(*flags, "--max_train_steps", 4, **precision)
    output_dir = train(*flags, **precision)
    train(*flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", output_dir=output_dir, **precision)
    assert checkpoints(output_dir) == checkpoints(whole)
    assert same_bits(load_lora(output_dir), load_lora(whole))
    assert repeatable(load_history(output_dir, 4)) == repeatable(load_history(whole, 4))


def test_resuming_a_finished_run_writes_the_same_lora_again(train, quick_lora):
    again = train(*LORA, "--resume_from_checkpoint", quick_lora / "checkpoint-2")
    assert same_bits(load_lora(again), load_lora(quick_lora))


@pytest.mark.parametrize(
    "flags, difference",
    [
        ("--lora_rank 2 --lora_alpha 8", "lora_rank: 4, which is now 2"),
        ("--lora_rank 4 --lora_alpha 4", "lora_alpha: 8.0, which is now 4.0"),
        ("--lora_rank 4 --lora_alpha 8 --lora_target_modules to_q", "lora_target_modules: "),
        ("", "lora_rank: 4, which is now None"),
        ("--lora_rank 4 --lora_alpha 8 --optimizer adamw_8bit", "optimizer: adamw, which is now adamw_8bit"),
    ],
)
def test_a_run_cannot_go_on_with_something_else_to_train(train, lora_run, flags, difference):
    if "8bit" in flags:
        pytest.importorskip("torchao")
    checkpoint, before = lora_run / "checkpoint-2", file_hashes(lora_run)
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", checkpoint]
    with pytest.raises(SystemExit, match=f"error: {checkpoint} .* another (.*; )?{difference}") as caught:
        train(*flags.split(), *more, output_dir=lora_run)
    assert re.fullmatch(r".*start a new run.*", caught.value.code)
    assert file_hashes(lora_run) == before


def test_a_lora_cannot_go_on_from_a_full_run(train, plain_run):
    before = file_hashes(plain_run)
    with pytest.raises(SystemExit, match="was made with another lora_rank: None, which is now 4; "):
        train(*LORA, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", output_dir=plain_run)
    assert file_hashes(plain_run) == before


def test_a_lora_cannot_go_on_with_another_base_model(train, lora_run, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.copytree(model / "transformer", model / "transformer_2", dirs_exist_ok=True)
    before = file_hashes(lora_run)
    with pytest.raises(SystemExit, match="was made with another base_model: "):
        train(*LORA, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", model=model, output_dir=lora_run)
    assert file_hashes(lora_run) == before


# ---- Names that are refused. ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", ["to_nothing", "to_q to_nothing", "attn1", "norm_q"])
def test_names_that_are_no_linear_layers_of_the_transformer(train, no_loading, tmp_path, modules):
    with pytest.raises(SystemExit, match="^error: .*`--lora_target_modules`?.*$") as caught:
        train("--lora_rank", 4, "--lora_target_modules", *modules.split(), output_dir=tmp_path / "output")
    assert "\n" not in caught.value.code
    assert not (tmp_path / "output").exists()
