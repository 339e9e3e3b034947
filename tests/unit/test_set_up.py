"""Set-up: what is loaded and trained for which flags, in which precision, and whether files hold a whole model."""

import pytest
import torch
from accelerate import Accelerator
from helpers import fresh_state, make_text_encoder, make_transformer
from safetensors.torch import save_file

from train_srpo_wan_t2i import (
    CLIPReward,
    check_weights,
    choose_dtypes,
    load_models,
    read_model_info,
    read_shapes,
    set_up_transformer,
)


BF16, FP32 = torch.bfloat16, torch.float32


# ---- Precision. -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixed_precision, optimizer, lora_rank, deepspeed, expected",
    [
        ("no", "adamw", None, False, (FP32, FP32)),
        ("no", "adamw", 4, False, (FP32, FP32)),
        ("no", "adamw_8bit", None, False, (FP32, FP32)),
        ("no", "adamw", None, True, (FP32, FP32)),
        ("bf16", "adamw", None, False, (BF16, FP32)),  # the one case in which autocast needs float32 weights
        ("bf16", "adamw", 4, False, (BF16, BF16)),
        ("bf16", "adamw_8bit", None, False, (BF16, BF16)),
        ("bf16", "adamw_8bit", 4, False, (BF16, BF16)),
        ("bf16", "adamw", None, True, (BF16, BF16)),
        ("bf16", "adamw", 4, True, (BF16, BF16)),
    ],
)
def test_types_of_the_frozen_weights_and_of_the_transformer(
    mixed_precision, optimizer, lora_rank, deepspeed, expected
):
    assert choose_dtypes(mixed_precision, optimizer, lora_rank, deepspeed) == expected


# ---- What is trained. -----------------------------------------------------------------------------------------------


def trained(transformer):
    return {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def test_without_a_lora_all_weights_are_trained(make_args):
    transformer = set_up_transformer(make_transformer(), make_args())
    assert trained(transformer) == set(dict(transformer.named_parameters()))
    assert not transformer.training


def test_with_a_lora_only_its_float32_weights_are_trained(make_args):
    transformer = set_up_transformer(make_transformer().to(BF16), make_args("--lora_rank", 4))
    lora = {name for name, _ in transformer.named_parameters() if "lora_" in name}
    assert trained(transformer) == lora and len(lora) == 2 * 2 * 2 * 4  # A and B of 4 layers of 2 attentions, 2 blocks
    assert {parameter.dtype for name, parameter in transformer.named_parameters() if name in lora} == {FP32}
    assert {parameter.dtype for name, parameter in transformer.named_parameters() if name not in lora} == {BF16}


@pytest.mark.parametrize("kind", ["PickScore", "CLIP"])
@pytest.mark.parametrize("name, dtype", [("bf16", BF16), ("fp32", FP32)])
def test_flags_choose_the_clip_reward_its_processor_and_its_precision(
    make_args, tiny_model, tiny_reward, kind, name, dtype
):
    paths = ["--pretrained_model_name_or_path", tiny_model, "--reward_model_path", tiny_reward]
    paths += ["--reward_processor_path", tiny_reward]
    args = make_args("--reward_model", kind, "--reward_dtype", name, *paths)
    with fresh_state():
        models = load_models(Accelerator(cpu=True), args, read_model_info(args), (FP32, FP32), None)
    assert isinstance(models.reward, CLIPReward)
    assert models.reward.dtype == dtype
    assert {parameter.dtype for parameter in models.reward.parameters()} == {dtype}
    assert models.reward.encode_texts(["a cat"]).shape == (1, 8)
    assert trained(models.transformer) and not trained(models.vae) and not trained(models.reward)


# ---- Files of weights. ----------------------------------------------------------------------------------------------


@pytest.fixture
def transformer():
    """On the meta device, as the checks of a run have it."""
    with torch.device("meta"):
        return make_transformer()


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_files_that_hold_exactly_the_tensors_of_a_model_are_accepted(transformer):
    check_weights(transformer, shapes(transformer))


def lack(found):
    del found["proj_out.bias"], found["blocks.1.norm2.bias"]


def reshape(found):
    found["proj_out.bias"] = (17,)


def add(found):
    found["blocks.2.norm2.bias"] = (24,)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lack, "the weights lack 2 tensors, such as `blocks.1.norm2.bias`"),
        (reshape, "the weights have other shapes of 1 tensors, such as `proj_out.bias`"),
        (add, "the weights have unknown 1 tensors, such as `blocks.2.norm2.bias`"),
    ],
)
def test_tensors_that_are_missing_of_another_shape_or_unknown_are_named(transformer, spoil, message):
    found = shapes(transformer)
    spoil(found)
    with pytest.raises(ValueError) as caught:
        check_weights(transformer, found)
    assert str(caught.value) == message


def test_of_two_names_of_one_tensor_either_is_enough():
    text_encoder = make_text_encoder()["text_encoder"]
    names = ["shared.weight", "encoder.embed_tokens.weight"]
    assert shapes(text_encoder)[names[0]] == shapes(text_encoder)[names[1]] == (10, 16)
    for name in names:
        check_weights(text_encoder, {other: shape for other, shape in shapes(text_encoder).items() if other != name})
    with pytest.raises(ValueError, match="the weights lack 1 tensors, such as `shared.weight`"):
        check_weights(text_encoder, {name: shape for name, shape in shapes(text_encoder).items() if name not in names})


def test_shapes_are_read_from_several_files(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(())}, tmp_path / "1.safetensors")
    save_file({"c": torch.zeros(4, dtype=BF16)}, tmp_path / "2.safetensors")
    found = read_shapes([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert found == {"a": (2, 3), "b": (), "c": (4,)}


def test_a_truncated_file_is_named(tmp_path):
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    save_file({"a": torch.zeros(100)}, whole)
    half.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"^`{half}` is not a whole safetensors file: "):
        read_shapes([whole, half])
