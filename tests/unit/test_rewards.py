"""Rewards: scores equal those of open_clip and transformers, everything from pixels on has a gradient."""

import json

import numpy as np
import open_clip
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from train_srpo_wan_t2i import HPS_ARCHITECTURE, CLIPReward, HPSReward, preprocess_pixels, srp_score


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP
TEXTS = ["a red cat", "a blue dog on a boat"]
SIZES = [(96, 96), (96, 144), (501, 300)]  # (height, width), smaller and larger than 224


def random_images(height, width, count=2):
    """Smooth random images, as photographs rather than noise: PIL images and the same as (B, 3, H, W) in [0, 1]."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (count, 9, 7, 3), dtype=np.uint8)
    images = [Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR) for image in small]
    return images, torch.stack([TF.to_tensor(image) for image in images])


# ---- Preprocessing. -------------------------------------------------------------------------------------------------


def hpsv2_preprocess(image, size):
    """ToTensor, `ResizeMaxSize` and Normalize of hpsv2/src/open_clip/transform.py: PIL image -> (3, size, size)."""
    pixels = TF.to_tensor(image)
    scale = size / max(image.size)
    height, width = round(image.height * scale), round(image.width * scale)
    pixels = TF.resize(pixels, [height, width], TF.InterpolationMode.BICUBIC, antialias=True)
    pad_h, pad_w = size - height, size - width
    pixels = TF.pad(pixels, [pad_w // 2, pad_h // 2, pad_w - pad_w // 2, pad_h - pad_h // 2], fill=0)
    return TF.normalize(pixels, MEAN, STD)


@pytest.mark.parametrize("size", SIZES)
def test_keeping_borders_is_the_preprocessing_of_hpsv2(size):
    images, pixels = random_images(*size)
    expected = torch.stack([hpsv2_preprocess(image, 224) for image in images])
    torch.testing.assert_close(preprocess_pixels(pixels, 224, MEAN, STD, True), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_cropping_is_the_preprocessing_of_the_clip_processor(tiny_reward, size):
    images, pixels = random_images(*size)
    processor = CLIPProcessor.from_pretrained(tiny_reward).image_processor
    expected = processor(images, return_tensors="pt").pixel_values
    # The processor resizes whole numbers of 0..255 and rounds; one of them is 0.015 here.
    torch.testing.assert_close(preprocess_pixels(pixels, 32, MEAN, STD, False), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("keep_borders", [True, False])
@pytest.mark.parametrize("size", [*SIZES, (20, 300), (224, 224)])
def test_every_image_becomes_a_square(size, keep_borders):
    assert preprocess_pixels(torch.rand(2, 3, *size), 224, MEAN, STD, keep_borders).shape == (2, 3, 224, 224)


def test_padding_is_black_and_centred():
    wide = preprocess_pixels(torch.ones(1, 3, 50, 100), 20, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), True)
    assert wide[0, 0, :, 10].tolist() == pytest.approx([-1] * 5 + [1] * 10 + [-1] * 5)


@pytest.mark.parametrize("keep_borders", [True, False])
def test_preprocessing_is_differentiable(keep_borders):
    pixels = torch.rand(1, 3, 48, 64, requires_grad=True)
    weight = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    (preprocess_pixels(pixels, 24, MEAN, STD, keep_borders) * weight).sum().backward()
    seen = pixels.grad.abs().sum((0, 1, 2)) > 0  # by column
    assert pixels.grad.isfinite().all()
    assert seen.all() == keep_borders
    assert seen[8:56].all()


# ---- HPS. -----------------------------------------------------------------------------------------------------------


ARCHITECTURE = "tiny-ViT-32"


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory):
    """A checkpoint in the form of HPS_v2.1_compressed.pt, of an architecture like ViT-H-14 at tiny size."""
    folder = tmp_path_factory.mktemp("hps")
    vision = {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    for name, width in ((ARCHITECTURE, 32), ("wider-ViT-32", 48)):
        config = {"embed_dim": 16, "vision_cfg": {**vision, "width": width}, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "HPS.pt")
    return folder / "HPS.pt"


@pytest.fixture(scope="module")
def hps(hps_file):
    return HPSReward(hps_file, architecture=ARCHITECTURE)


@pytest.fixture(scope="module")
def open_clip_model(hps_file):
    """The same weights, loaded as open_clip does."""
    model = open_clip.create_model(ARCHITECTURE).eval()
    model.load_state_dict(torch.load(hps_file, weights_only=True)["state_dict"])
    return model


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_hps_score_is_the_cosine_of_open_clip(hps, open_clip_model, size):
    images, pixels = random_images(*size)
    image_features = open_clip_model.encode_image(torch.stack([hpsv2_preprocess(image, 224) for image in images]))
    text_features = open_clip_model.encode_text(open_clip.get_tokenizer(ARCHITECTURE)(TEXTS))
    expected = torch.nn.functional.cosine_similarity(image_features, text_features)
    torch.testing.assert_close(hps(pixels, TEXTS), expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_hps_text_features_equal_those_of_open_clip(hps, open_clip_model):
    """The causal mask is in no checkpoint; without it these differ."""
    texts = [*TEXTS, "a", " ".join(["cat"] * 200)]
    expected = open_clip_model.encode_text(open_clip.get_tokenizer(ARCHITECTURE)(texts), normalize=True)
    torch.testing.assert_close(hps.encode_texts(texts), expected, rtol=0, atol=1e-5)
    assert torch.equal(hps.model.attn_mask, open_clip_model.attn_mask)


def test_hps_gradient_reaches_the_borders_of_an_image_that_is_not_square(hps):
    pixels = random_images(96, 144)[1].requires_grad_()
    hps(pixels, TEXTS).sum().backward()
    assert pixels.grad.isfinite().all()
    for border in (pixels.grad[:, :, 0], pixels.grad[:, :, -1], pixels.grad[:, :, :, 0], pixels.grad[:, :, :, -1]):
        assert (border != 0).float().mean() > 0.9


def test_hps_of_another_architecture_is_refused(hps_file):
    with pytest.raises(RuntimeError, match="size mismatch for visual.conv1.weight"):
        HPSReward(hps_file, architecture="wider-ViT-32")


def test_hps_with_missing_weights_is_refused(hps_file, tmp_path):
    weights = torch.load(hps_file, weights_only=True)["state_dict"]
    del weights["ln_final.bias"]
    torch.save({"state_dict": weights}, tmp_path / "HPS.pt")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "ln_final.bias"'):
        HPSReward(tmp_path / "HPS.pt", architecture=ARCHITECTURE)


def test_hps_checkpoint_that_runs_code_is_refused(tmp_path):
    torch.save({"state_dict": {}, "optimizer": torch.optim.SGD}, tmp_path / "HPS.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        HPSReward.read_weights(tmp_path / "HPS.pt")


def test_hps_loads_all_of_its_tensors(hps):
    assert not any(tensor.is_meta for tensor in (*hps.parameters(), *hps.buffers()))


def test_empty_model_of_hps_costs_no_memory():
    """986,109,441 parameters: open_clip's ViT-H-14."""
    model = HPSReward.empty_model(HPS_ARCHITECTURE)
    assert HPS_ARCHITECTURE == "ViT-H-14"
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441
    assert all(parameter.is_meta for parameter in model.parameters())


def test_empty_model_of_hps_has_the_tensors_that_open_clip_expects(open_clip_model):
    found, expected = HPSReward.empty_model(ARCHITECTURE).state_dict(), open_clip_model.state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in expected.items()}


# ---- CLIP and PickScore. --------------------------------------------------------------------------------------------


@pytest.fixture
def clip(tiny_reward):
    return CLIPReward(tiny_reward, tiny_reward)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_clip_score_is_the_logit_of_transformers_over_20(clip, tiny_reward, size):
    _, pixels = random_images(*size)
    model, processor = CLIPModel.from_pretrained(tiny_reward), CLIPProcessor.from_pretrained(tiny_reward)
    tokens = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    logits = model(pixel_values=preprocess_pixels(pixels, 32, MEAN, STD, False), **tokens).logits_per_image
    torch.testing.assert_close(clip(pixels, TEXTS), logits.diagonal() / 20, rtol=0, atol=1e-5)


@torch.no_grad()
def test_clip_truncates_captions_that_are_longer_than_its_context(clip, tiny_reward):
    """48 tokens: the start (1), 46 letters (a is 2, b is 3) and the end (58)."""
    tokens = torch.tensor([[1, *[2, 3] * 23, 58]])
    expected = CLIPModel.from_pretrained(tiny_reward).get_text_features(input_ids=tokens).pooler_output
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(clip.encode_texts(["ab" * 50]), expected, rtol=0, atol=1e-5)


def test_clip_gradient_reaches_the_pixels(clip):
    pixels = random_images(96, 96)[1].requires_grad_()
    clip(pixels, TEXTS).sum().backward()
    assert pixels.grad.isfinite().all()
    assert (pixels.grad != 0).float().mean() > 0.9


# ---- Both. ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["HPS", "CLIP"])
def make_reward(request, hps_file, tiny_reward):
    """Function: dtype -> a reward model."""
    if request.param == "HPS":
        return lambda dtype=torch.float32: HPSReward(hps_file, dtype=dtype, architecture=ARCHITECTURE)
    return lambda dtype=torch.float32: CLIPReward(tiny_reward, tiny_reward, dtype=dtype)


@torch.no_grad()
def test_features_have_unit_norm(make_reward):
    reward = make_reward()
    for features in (reward.encode_images(random_images(96, 144)[1]), reward.encode_texts(TEXTS)):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))


@torch.no_grad()
def test_bfloat16_comes_close_to_float32(make_reward):
    _, pixels = random_images(96, 144)
    full, half = make_reward(), make_reward(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    score = half(pixels, TEXTS)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, full(pixels, TEXTS), rtol=0, atol=0.02)


def test_a_text_is_encoded_once(make_reward):
    reward, encoded = make_reward(), []
    text_features = reward.text_features

    def counted(texts):
        encoded.extend(texts)
        return text_features(texts)

    reward.text_features = counted
    first = reward.encode_texts(["a cat", "a dog", "a cat"])
    second = reward.encode_texts(["a dog", "a boat"])
    assert encoded == ["a cat", "a dog", "a boat"]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], second[0])


def test_text_features_do_not_depend_on_what_is_encoded_together(make_reward):
    """Bit for bit, since a resumed run encodes other texts together."""
    texts = ["a longer caption that pads the others", "a cat", *(f"{n} dogs on a boat" for n in range(9))]
    together, alone = make_reward().encode_texts(texts), make_reward()
    for text, features in zip(texts[::-1], together.flip(0), strict=True):
        assert torch.equal(alone.encode_texts([text])[0], features)
        assert torch.equal(make_reward().encode_texts([text])[0], features)


@torch.no_grad()
def test_rewards_for_several_lists_of_texts_are_those_of_each_list(make_reward):
    reward, (_, pixels) = make_reward(), random_images(96, 144)
    rewards = reward.rewards(pixels, [TEXTS, TEXTS[::-1], ["a boat", "a boat"]])
    assert rewards.shape == (3, 2)
    for row, texts in zip(rewards, [TEXTS, TEXTS[::-1], ["a boat", "a boat"]], strict=True):
        assert torch.equal(row, reward(pixels, texts))


def test_compare_is_the_scaled_relative_score_and_exchanges_the_texts_where_it_is_told(make_reward):
    reward, (_, pixels) = make_reward(), random_images(96, 144)
    positive, negative, discount = ["a boat", "a cat"], ["a dog", "a boat"], torch.tensor([0.1, 0.3])
    pixels.requires_grad_()
    score, *rewards = reward.compare(pixels, positive, negative, discount, torch.tensor([False, True]))
    image, towards, away = (
        reward.encode_images(pixels),
        reward.encode_texts(["a boat", "a boat"]),
        reward.encode_texts(["a dog", "a cat"]),
    )
    torch.testing.assert_close(score, reward.scale * srp_score(image, towards, away, discount), rtol=0, atol=1e-6)
    for found, texts in zip(rewards, (positive, negative), strict=True):
        torch.testing.assert_close(found, reward(pixels, texts).detach(), rtol=0, atol=1e-6)
    assert score.requires_grad and not any(found.requires_grad for found in rewards)


def test_reward_model_is_frozen(make_reward):
    reward = make_reward()
    assert not reward.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not reward.encode_texts(TEXTS).requires_grad
