"""
`scripts/export_checkpoint.py`, without DeepSpeed: an exported checkpoint is what the run saved, bit for bit; what is
incomplete or in the way is refused in one line, and nothing is written.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from export_checkpoint import main, parse_args
from helpers import LORA, ROOT, TWO_PROCESSES, edit_json, file_hashes, load_weights, run_command, same_bits
from inputs import renew_checksums
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers import WanPipeline, WanTransformer3DModel


def export(checkpoint, output_dir, *flags):
    main(parse_args([str(argument) for argument in (checkpoint, "--output_dir", output_dir, *flags)]))
    return output_dir


def read_result(output_dir):
    """
    What was trained, {path: content}, of the files of the expert or of the LoRA. The content of tensors is their
    metadata, dtypes, shapes and bits; safetensors writes metadata in any order.
    """
    content = {}
    for path in sorted([*Path(output_dir).glob("transformer_2/*"), *Path(output_dir).glob("pytorch_lora*")]):
        name = str(path.relative_to(output_dir))
        if path.suffix != ".safetensors":
            content[name] = path.read_text()
            continue
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            content[name] = file.metadata(), {key: (t.dtype, t.shape, t.tolist()) for key, t in tensors.items()}
    return content


# ---- What is exported. ----------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        "one process",
        pytest.param("one process, bf16", marks=pytest.mark.slow),
        pytest.param("one process, bf16, --optimizer adamw_8bit", marks=pytest.mark.slow),
        pytest.param("one process, --lora_rank 4 --lora_alpha 8", marks=pytest.mark.slow),
        "one process, bf16, --lora_rank 4 --lora_alpha 8",
        pytest.param("two processes", marks=pytest.mark.slow),
        pytest.param("two processes, bf16, --lora_rank 4 --lora_alpha 8", marks=pytest.mark.slow),
    ],
)
def run(request, train, launch):
    """The output folder of a run of two updates with a checkpoint after each."""
    processes, *more = request.param.split(", ")
    precision = "bf16" if "bf16" in more else "no"
    flags = ["--checkpointing_steps", 1, *(flag for part in more if part != "bf16" for flag in part.split())]
    if "adamw_8bit" in flags:
        pytest.importorskip("torchao")
    if processes == "one process":
        folder = train(*flags, mixed_precision=precision)
    else:
        launcher = f"{TWO_PROCESSES} --mixed_precision {precision}"
        folder = launch(launcher, *flags, environment={"ACCELERATE_USE_CPU": "true"})
    return folder


def test_an_exported_checkpoint_is_what_the_run_saved_bit_for_bit(run, tmp_path):
    exported = export(run / "checkpoint-2", tmp_path / "exported")
    assert read_result(exported) == read_result(run) != {}
    assert file_hashes(exported).keys() == read_result(run).keys(), "and nothing else"


def test_an_earlier_checkpoint_has_other_weights(run, tmp_path):
    (earlier,) = export(run / "checkpoint-1", tmp_path / "earlier").rglob("*.safetensors")
    (last,) = export(run / "checkpoint-2", tmp_path / "last").rglob("*.safetensors")
    assert load_file(earlier).keys() == load_file(last).keys()
    assert not same_bits(load_file(earlier), load_file(last))


def test_a_checkpoint_is_left_as_it_is(run, tmp_path):
    before = file_hashes(run)
    export(run / "checkpoint-2", tmp_path / "exported")
    assert file_hashes(run) == before


def test_diffusers_loads_an_exported_expert(plain_run, tmp_path):
    export(plain_run / "checkpoint-2", tmp_path)
    expert = WanTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer_2")
    assert same_bits(expert.state_dict(), load_weights(plain_run))


def test_diffusers_loads_an_exported_lora(train, tiny_model, tmp_path):
    folder = train(*LORA)
    pipe = WanPipeline.from_pretrained(tiny_model)
    pipe.load_lora_weights(export(folder / "checkpoint-2", tmp_path), load_into_transformer_2=True)
    config = pipe.transformer_2.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (4, 8)
    loaded = {name: weight for name, weight in pipe.transformer_2.state_dict().items() if "lora_" in name}
    loaded = {f"transformer.{name.replace('.default_0.', '.')}": weight for name, weight in loaded.items()}
    assert same_bits(loaded, load_file(folder / "pytorch_lora_weights.safetensors"))


def test_a_run_in_bf16_is_exported_in_bf16(train, tmp_path):
    folder = train(mixed_precision="bf16")
    trained = load_file(folder / "checkpoint-2/model.safetensors")
    export(folder / "checkpoint-2", tmp_path)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert {weight.dtype for weight in load_weights(tmp_path).values()} == {torch.bfloat16}


# ---- As a command. --------------------------------------------------------------------------------------------------


SCRIPT = [sys.executable, ROOT / "scripts/export_checkpoint.py"]


def test_the_command_works_in_any_folder_and_says_what_it_wrote(plain_run, tmp_path):
    shutil.copytree(plain_run / "checkpoint-2", tmp_path / "checkpoint-2")
    done = run_command(*SCRIPT, "checkpoint-2", "--output_dir", "exported", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Wrote exported/transformer_2, the weights after 2 updates."
    assert read_result(tmp_path / "exported") == read_result(plain_run)


@pytest.mark.slow
def test_the_command_ends_with_the_message_and_without_a_traceback(tmp_path):
    done = run_command(*SCRIPT, "nothing", "--output_dir", "exported", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: `nothing` is not a complete checkpoint")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- What is refused. -----------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(plain_run, tmp_path):
    """A copy of a complete checkpoint to change or spoil."""
    return Path(shutil.copytree(plain_run / "checkpoint-2", tmp_path / "checkpoint-2"))


@pytest.fixture
def refusal(tmp_path):
    """Function: a checkpoint that must be refused -> the message. Fails if it is not one line or a file changes."""

    def refuse(checkpoint, output_dir=tmp_path / "exported", flags=()):
        before = file_hashes(tmp_path), sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as caught:
            export(checkpoint, output_dir, *flags)
        assert (file_hashes(tmp_path), sorted(tmp_path.rglob("*"))) == before
        assert re.fullmatch("error: .*", caught.value.code), "one line, which makes Python exit with 1"
        return caught.value.code.removeprefix("error: ")

    return refuse


def assert_names_the_incomplete(message, checkpoint):
    problem = "is not a complete checkpoint of train_srpo_wan_t2i.py; name a folder checkpoint-N: "
    assert message.startswith(f"`{checkpoint}` {problem}")


def test_a_checkpoint_without_its_state(refusal, checkpoint):
    (checkpoint / "trainer_state.json").unlink()
    assert_names_the_incomplete(refusal(checkpoint), checkpoint)


def test_a_checkpoint_whose_state_is_cut_off(refusal, checkpoint):
    state = (checkpoint / "trainer_state.json").read_text()
    (checkpoint / "trainer_state.json").write_text(state[: len(state) // 2])
    assert_names_the_incomplete(refusal(checkpoint), checkpoint)


@pytest.mark.parametrize("name", ["global_step", "run", "expert", "config", "lora", "dtype"])
def test_a_checkpoint_of_a_version_that_wrote_less(refusal, checkpoint, name):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state[name]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    message = refusal(checkpoint)
    assert_names_the_incomplete(message, checkpoint)
    assert message.endswith(f"'{name}'")


def set_engine(checkpoint, engine):
    run = json.loads((checkpoint / "trainer_state.json").read_text())["run"]
    edit_json(checkpoint / "trainer_state.json", run={**run, "engine": engine})
    renew_checksums(checkpoint)


def test_a_checkpoint_that_does_not_say_its_engine(refusal, checkpoint):
    edit_json(checkpoint / "trainer_state.json", run={})
    assert_names_the_incomplete(refusal(checkpoint), checkpoint)


def test_a_checkpoint_without_its_weights(refusal, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    expected = "is damaged: `model.safetensors` is not what was saved. Take another checkpoint."
    assert refusal(checkpoint) == f"`{checkpoint}` {expected}"


def test_a_checkpoint_whose_weights_are_cut_off(refusal, checkpoint):
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    expected = "is damaged: `model.safetensors` is not what was saved. Take another checkpoint."
    assert refusal(checkpoint) == f"`{checkpoint}` {expected}"


def edit_weights(checkpoint, edit):
    weights = load_file(checkpoint / "model.safetensors")
    edit(weights)
    save_file(weights, checkpoint / "model.safetensors")
    renew_checksums(checkpoint)


def test_a_checkpoint_that_lacks_a_tensor(refusal, checkpoint):
    edit_weights(checkpoint, lambda weights: weights.pop("blocks.1.attn1.to_q.weight"))
    expected = "cannot be read: the weights lack 1 tensors, such as `blocks.1.attn1.to_q.weight`"
    assert refusal(checkpoint) == f"`{checkpoint}` {expected}"


def test_a_checkpoint_with_a_tensor_of_another_shape(refusal, checkpoint):
    edit_weights(checkpoint, lambda weights: weights.update({"proj_out.bias": torch.zeros(3)}))
    expected = "cannot be read: the weights have other shapes of 1 tensors, such as `proj_out.bias`"
    assert refusal(checkpoint) == f"`{checkpoint}` {expected}"


def test_a_checkpoint_of_a_lora_that_lacks_a_tensor(refusal, quick_lora, tmp_path):
    checkpoint = Path(shutil.copytree(quick_lora / "checkpoint-2", tmp_path / "checkpoint-2"))
    edit_weights(checkpoint, lambda weights: weights.pop("blocks.0.attn2.to_v.lora_B.default.weight"))
    expected = "cannot be read: the weights lack 1 tensors, such as `blocks.0.attn2.to_v.lora_B.default.weight`"
    assert refusal(checkpoint) == f"`{checkpoint}` {expected}"


def test_a_checkpoint_of_zero_without_any_shard(refusal, checkpoint):
    set_engine(checkpoint, "ZeRO-2")
    assert refusal(checkpoint).startswith(f"`{checkpoint}` cannot be read: ")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_zero_without_the_shard_of_one_process(refusal, checkpoint, stage):
    set_engine(checkpoint, f"ZeRO-{stage}")
    (checkpoint / "pytorch_model").mkdir()
    model = {"buffer_names": [], "module": {}, "param_shapes": [], "shared_params": {}}
    torch.save(model, checkpoint / "pytorch_model/zero_pp_rank_0_mp_rank_00_model_states.pt")
    shard = {"optimizer_state_dict": {"zero_stage": stage, "partition_count": 2}}  # of two, but there is one
    torch.save(shard, checkpoint / "pytorch_model/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    renew_checksums(checkpoint)
    message = refusal(checkpoint)
    assert message.startswith(f"`{checkpoint}` cannot be read: Expected 2 of '*_optim_states.pt' under")


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "revision", "variant", "cache_dir"])
def test_flags_of_merging_without_merging(refusal, checkpoint, flag):
    expected = f"`--{flag}` needs `--merge`; otherwise no base model is read."
    assert refusal(checkpoint, flags=[f"--{flag}", "x"]) == expected


def test_an_output_folder_that_is_not_empty(refusal, checkpoint, tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "notes.txt").write_text("weeks of work")
    expected = f"`--output_dir {tmp_path}/exported` is there already. Choose one that is new or empty."
    assert refusal(checkpoint) == expected


def test_an_output_folder_that_is_a_file(refusal, checkpoint, tmp_path):
    (tmp_path / "exported").write_text("a file")
    expected = f"`--output_dir {tmp_path}/exported` is there already. Choose one that is new or empty."
    assert refusal(checkpoint) == expected


def test_the_checkpoint_itself_as_the_output_folder(refusal, checkpoint):
    message = refusal(checkpoint, output_dir=checkpoint)
    assert message == f"`--output_dir {checkpoint}` is there already. Choose one that is new or empty."


def test_an_empty_output_folder_is_used(checkpoint, plain_run, tmp_path):
    (tmp_path / "exported").mkdir()
    assert read_result(export(checkpoint, tmp_path / "exported")) == read_result(plain_run)
