"""Weights that do not fit the config of their model are refused before anything is loaded or written."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from inputs import edit_weights, save_in_shards, truncate

from train_srpo_wan_t2i import HPSReward, main, parse_args


PARTS = {  # folder, stem of the file, a tensor in it
    "expert": ("transformer_2", "diffusion_pytorch_model", "proj_out.bias"),
    "VAE": ("vae", "diffusion_pytorch_model", "decoder.conv_out.bias"),
    "reward": (".", "model", "visual_projection.weight"),
}


@pytest.fixture(params=PARTS)
def part(request, model_copy, tiny_reward, tmp_path):
    """One of the models that a run loads, to spoil: its file, a tensor in it, flags, and how a message begins."""
    subfolder, stem, tensor = PARTS[request.param]
    if request.param == "reward":
        flags = ["--reward_model_path", shutil.copytree(tiny_reward, tmp_path / "reward")]
        problem = f"`--reward_model_path {tmp_path}/reward` is not the folder or Hub id of a CLIPModel: "
    else:
        flags = ["--pretrained_model_name_or_path", model_copy]
        problem = f"`--pretrained_model_name_or_path {model_copy}` has no whole model in `{subfolder}`: "
    file = Path(flags[1], subfolder, f"{stem}.safetensors")
    return SimpleNamespace(file=file, tensor=tensor, flags=flags, problem=problem)


def is_accepted(flags, monkeypatch):
    """Whether a run gets as far as the first thing that it makes after all checks of models."""

    class Accepted(Exception):
        pass

    def accept(*args, **kwargs):
        raise Accepted

    monkeypatch.setattr("train_srpo_wan_t2i.make_accelerator", accept)
    with pytest.raises(Accepted):
        main(parse_args(flags))
    return True


def test_weights_that_lack_a_tensor(refusal, part):
    edit_weights(part.file, lambda weights: weights.pop(part.tensor))
    assert refusal(*part.flags) == f"{part.problem}the weights lack 1 tensors, such as `{part.tensor}`"


def test_weights_with_a_tensor_of_another_shape(refusal, part):
    edit_weights(part.file, lambda weights: weights.update({part.tensor: weights[part.tensor][1:].clone()}))
    assert refusal(*part.flags) == f"{part.problem}the weights have other shapes of 1 tensors, such as `{part.tensor}`"


def test_weights_with_a_tensor_that_the_model_does_not_have(refusal, part):
    edit_weights(part.file, lambda weights: weights.update({"extra.bias": torch.zeros(3)}))
    assert refusal(*part.flags) == f"{part.problem}the weights have unknown 1 tensors, such as `extra.bias`"


def test_weights_whose_names_have_another_prefix(refusal, part):
    def rename(weights):
        for name in list(weights):
            weights[f"model.{name}"] = weights.pop(name)

    edit_weights(part.file, rename)
    assert re.fullmatch(
        re.escape(part.problem) + r"the weights lack \d+ tensors, such as `[^ ]+`", refusal(*part.flags)
    )


def test_a_file_that_is_cut_off(refusal, part):
    truncate(part.file)
    assert refusal(*part.flags).startswith(f"{part.problem}`{part.file}` is not a whole safetensors file: ")


def test_a_file_that_is_a_pointer_of_git_lfs(refusal, part):
    part.file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 345\n")
    assert refusal(*part.flags).startswith(f"{part.problem}`{part.file}` is not a whole safetensors file: ")


def test_a_file_that_is_not_there(refusal, part):
    part.file.unlink()
    message = refusal(*part.flags)
    assert message.startswith(part.problem) and part.file.name in message


@pytest.mark.parametrize("spoil", [Path.unlink, truncate])
def test_a_shard_that_is_missing_or_cut_off(refusal, part, spoil):
    shard = save_in_shards(part.file)[1]
    spoil(shard)
    message = refusal(*part.flags)
    assert message.startswith(part.problem) and shard.name in message


def test_whole_weights_in_several_files_are_accepted(make_flags, part, monkeypatch):
    assert len(save_in_shards(part.file)) > 2
    assert is_accepted(make_flags(*part.flags), monkeypatch)


# ---- HPS, whose checkpoint is a pickle. -----------------------------------------------------------------------------


@pytest.fixture
def hps(tmp_path):
    """The tensors of an HPS checkpoint, all of them one zero, its file to write, and flags that name it."""
    shapes = {name: tensor.shape for name, tensor in HPSReward.empty_model().state_dict().items()}
    weights = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    flags = ["--reward_model", "HPS", "--reward_model_path", tmp_path / "hps.pt"]
    return SimpleNamespace(weights=weights, file=tmp_path / "hps.pt", flags=flags)


def save(hps):
    torch.save({"state_dict": hps.weights}, hps.file)


def test_an_hps_checkpoint_with_all_tensors_is_accepted(make_flags, hps, monkeypatch):
    save(hps)
    assert is_accepted(make_flags(*hps.flags), monkeypatch)


def lose(weights):
    weights.pop("text_projection")


def cut(weights):
    weights["text_projection"] = weights["text_projection"][1:]


def rename(weights):
    for name in list(weights):
        weights[f"module.{name}"] = weights.pop(name)


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lose, r"the weights lack 1 tensors, such as `text_projection`"),
        (cut, r"the weights have other shapes of 1 tensors, such as `text_projection`"),
        (rename, r"the weights lack \d\d\d tensors, such as `[^ ]+`"),
    ],
)
def test_an_hps_checkpoint_of_other_tensors(refusal, hps, spoil, problem):
    spoil(hps.weights)
    save(hps)
    start = re.escape(f"`--reward_model_path {hps.file}` is not of the architecture ViT-H-14: ")
    assert re.fullmatch(start + problem, refusal(*hps.flags))


def test_an_hps_checkpoint_that_is_cut_off(refusal, hps):
    save(hps)
    truncate(hps.file)
    message = refusal(*hps.flags)
    assert message.startswith(f"`--reward_model_path {hps.file}` is not a checkpoint with a `state_dict`: ")
