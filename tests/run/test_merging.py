"""`scripts/export_checkpoint.py --merge`: the base model with a LoRA merged into it, or a refusal in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from export_checkpoint import main, parse_args
from helpers import LORA, distance, edit_json, file_hashes, load_lora, load_weights, snapshot
from safetensors.torch import load_file, save_file

from diffusers import WanTransformer3DModel


ATTENTION = [f"blocks.{block}.attn{kind}.{name}" for block in (0, 1) for kind in (1, 2) for name in
             ("to_q", "to_k", "to_v", "to_out.0")]  # fmt: skip

HASH = "base_model"


@pytest.fixture
def merge(tiny_model, tmp_path):
    """Function: a checkpoint or the folder of a run -> the folder of its LoRA merged into the base model."""

    def run(source, *flags, model=tiny_model, output_dir=tmp_path / "merged"):
        arguments = [source, "--merge", "--pretrained_model_name_or_path", model, "--output_dir", output_dir, *flags]
        main(parse_args([str(argument) for argument in arguments]))
        return output_dir

    return run


def added_weights(output_dir, scale):
    """What a LoRA adds: {name of a weight of the transformer: scale * B @ A}."""
    lora = load_lora(output_dir)
    layers = sorted({re.fullmatch(r"transformer\.(.*)\.lora_[AB]\.weight", name).group(1) for name in lora})
    return {
        f"{layer}.weight": scale
        * (lora[f"transformer.{layer}.lora_B.weight"] @ lora[f"transformer.{layer}.lora_A.weight"])
        for layer in layers
    }


# ---- What is merged. ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8_run(train):
    """Two updates beside a base in float8; far enough to be seen."""
    return train(*LORA, "--learning_rate", 0.05, "--base_weights", "fp8")


@pytest.fixture
def downloaded(fp8_run, tmp_path):
    """What one finds of a run on the Hub."""
    return Path(shutil.copytree(fp8_run, tmp_path / "downloaded", ignore=shutil.ignore_patterns("checkpoint-*")))


def test_the_merged_expert_is_the_base_on_the_disk_plus_the_lora(merge, fp8_run, tiny_model):
    merged, base, added = load_weights(merge(fp8_run)), load_weights(tiny_model), added_weights(fp8_run, scale=2)
    assert merged.keys() == base.keys()
    assert sorted(added) == sorted(f"{layer}.weight" for layer in ATTENTION)
    assert all(torch.equal(merged[name], base[name]) for name in base.keys() - added.keys())
    expected = {name: base[name] + added[name] for name in added}
    torch.testing.assert_close({name: merged[name] for name in added}, expected, rtol=0, atol=1e-6)
    assert min(distance({name: added[name]}, {name: torch.zeros(())}) for name in added) > 0.01


def test_diffusers_loads_the_merged_expert_and_predicts_what_base_and_lora_predict(merge, fp8_run, tiny_model):
    merged, adapted, base = (
        WanTransformer3DModel.from_pretrained(folder, subfolder="transformer_2")
        for folder in (merge(fp8_run), tiny_model, tiny_model)
    )
    adapted.load_lora_adapter(fp8_run, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    generator = torch.Generator().manual_seed(0)
    latents, embeds = (torch.randn(shape, generator=generator) for shape in ((2, 4, 1, 4, 4), (2, 16, 16)))
    with torch.no_grad():
        velocities = [
            model(latents, torch.tensor([400.0, 800.0]), encoder_hidden_states=embeds, return_dict=False)[0]
            for model in (merged, adapted, base)
        ]
    torch.testing.assert_close(velocities[0], velocities[1], rtol=0, atol=1e-5)
    assert (velocities[0] - velocities[2]).abs().max() > 1e-2


def test_a_checkpoint_and_a_download_merge_to_what_the_finished_run_does(merge, fp8_run, downloaded, tmp_path):
    expected = file_hashes(merge(fp8_run))
    assert expected.keys() == {"transformer_2/config.json", "transformer_2/diffusion_pytorch_model.safetensors"}
    for number, source in enumerate((fp8_run / "checkpoint-2", downloaded)):
        assert file_hashes(merge(source, output_dir=tmp_path / str(number))) == expected


def test_merging_leaves_its_source_as_it_is(merge, fp8_run):
    before = file_hashes(fp8_run)
    merge(fp8_run)
    assert file_hashes(fp8_run) == before


def test_a_run_in_bfloat16_is_merged_in_bfloat16(merge, train, tiny_model):
    merged = load_weights(merge(train(*LORA, mixed_precision="bf16")))
    expert = WanTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer_2", dtype=torch.bfloat16)
    expected = {name: weight.dtype for name, weight in expert.state_dict().items()}
    assert {name: weight.dtype for name, weight in merged.items()} == expected
    assert expected["blocks.0.attn1.to_q.weight"] == torch.bfloat16


@pytest.mark.slow
def test_the_only_expert_of_a_model_is_merged_as_transformer(merge, train, tiny_one_expert_model, one_expert_dataset):
    inputs = {"model": tiny_one_expert_model, "dataset": one_expert_dataset}
    run = train(*LORA, "--transformer_subfolder", "transformer", "--learning_rate", 0.05, **inputs)
    merged = load_weights(merge(run, model=tiny_one_expert_model), "transformer")
    base, added = load_weights(tiny_one_expert_model, "transformer"), added_weights(run, scale=2)
    expected = {name: base[name] + added.get(name, 0) for name in base}
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


def test_the_command_says_what_it_wrote(merge, fp8_run, capsys, tmp_path):
    merge(fp8_run / "checkpoint-2")
    said = "the weights after 2 updates, merged into the base model."
    assert capsys.readouterr().out.splitlines()[-1] == f"Wrote {tmp_path}/merged/transformer_2, {said}"


# ---- What is refused. -----------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(merge, tmp_path):
    """Function: what must not be merged -> the message. Fails if it is not one line or a file changes."""

    def refuse(source, *flags, **options):
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as caught:
            merge(source, *flags, **options)
        assert snapshot(tmp_path) == before
        assert re.fullmatch("error: .*", caught.value.code), "one line, which makes Python exit with 1"
        return caught.value.code.removeprefix("error: ")

    return refuse


@pytest.fixture
def other_model(model_copy):
    """Another model of the same architecture."""
    path = model_copy / "transformer_2/diffusion_pytorch_model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(path).items()}, path)
    return model_copy


def test_merging_without_a_base_model(fp8_run, tmp_path):
    with pytest.raises(SystemExit, match="error: `--merge` needs `--pretrained_model_name_or_path`, the base model"):
        main(parse_args([str(fp8_run), "--merge", "--output_dir", str(tmp_path / "merged")]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["", "checkpoint-2"])
def test_another_base_model(refusal, fp8_run, other_model, source):
    message = refusal(fp8_run / source, model=other_model)
    expected = f"`--pretrained_model_name_or_path {other_model}` is not the base model of the run, by a hash of its"
    state = json.loads((fp8_run / "checkpoint-2/trainer_state.json").read_text())
    assert message.startswith(expected)
    assert message.endswith(f"the run had {state['run'][HASH]}.")


def test_a_base_model_with_fewer_layers_than_the_lora(refusal, downloaded, model_copy):
    expert = WanTransformer3DModel.from_pretrained(model_copy, subfolder="transformer_2", num_layers=1)
    expert.save_pretrained(model_copy / "transformer_2")
    message = refusal(downloaded, model=model_copy)
    expected = "is not the base model of the run: the weights have unknown 16 tensors, such as `blocks.1.attn1"
    assert message.startswith(f"`--pretrained_model_name_or_path {model_copy}` {expected}")


def test_a_base_model_that_is_not_there(refusal, fp8_run):
    message = refusal(fp8_run, model="nothing")
    assert message.startswith("`--pretrained_model_name_or_path nothing` is not a Wan pipeline in the layout of")


def test_a_base_model_that_lacks_a_tensor(refusal, fp8_run, model_copy):
    path = model_copy / "transformer_2/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["proj_out.bias"]
    save_file(weights, path)
    message = refusal(fp8_run, model=model_copy)
    expected = "has no whole model in `transformer_2`: the weights lack 1 tensors, such as `proj_out.bias`"
    assert message == f"`--pretrained_model_name_or_path {model_copy}` {expected}"


def test_a_base_model_without_the_variant(refusal, fp8_run, tiny_model):
    message = refusal(fp8_run, "--variant", "fp16")
    assert message.startswith(f"`--pretrained_model_name_or_path {tiny_model}` has no whole model in `transformer_2`")


@pytest.mark.parametrize("source", ["", "checkpoint-2"])
def test_a_run_of_all_weights(refusal, plain_run, source):
    message = refusal(plain_run / source)
    assert message.startswith(f"`--merge`: `{plain_run / source}` holds no LoRA, but whole weights, which need no")


def test_a_folder_of_something_else(refusal, tiny_reward):
    assert refusal(tiny_reward).startswith(f"`{tiny_reward}` is not a complete checkpoint of train_srpo_wan_t2i.py")


def test_a_lora_that_is_cut_off(refusal, downloaded):
    path = downloaded / "pytorch_lora_weights.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert refusal(downloaded).startswith(f"`{downloaded}` holds a LoRA that cannot be read: ")


def test_a_checkpoint_of_a_version_that_did_not_name_the_base_model(refusal, fp8_run, tmp_path):
    checkpoint = Path(shutil.copytree(fp8_run / "checkpoint-2", tmp_path / "checkpoint-2"))
    run = json.loads((checkpoint / "trainer_state.json").read_text())["run"]
    del run[HASH]
    edit_json(checkpoint / "trainer_state.json", run=run)
    assert refusal(checkpoint).endswith(f"'{HASH}'")
