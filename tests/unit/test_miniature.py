"""The miniature is what its builder says, paints what its captions say, and its reward knows SRPO's control words."""

import json

import numpy as np
import pytest
import torch
from helpers import MINIATURE
from miniature.build import CONTROL_WORDS, make_pipeline, make_reward, sample, save_model
from miniature.drawings import (
    BACKGROUNDS,
    COLOURS,
    GUIDANCE_SCALE,
    MAX_SEQUENCE_LENGTH,
    SHAPES,
    STYLES,
    caption_accuracy,
    captions,
    draw,
    judge,
    shape_fidelity,
    style_share,
)
from safetensors import safe_open
from transformers import CLIPModel, CLIPProcessor

from diffusers import AutoencoderKLWan, WanPipeline


@pytest.fixture(scope="module")
def drawings():
    """One fresh drawing of each caption and style: uint8 (N, 64, 64, 3), N captions, N styles."""
    rng = np.random.default_rng(123)
    kinds = [(caption, style) for caption in captions() for style in STYLES]
    texts, styles = zip(*kinds, strict=True)
    return np.stack([draw(caption, style, rng) for caption, style in kinds]), texts, styles


@pytest.fixture(scope="module")
def cosines(drawings):
    """The committed reward as a function: N texts -> the cosine (N,) of each with the drawing of the same position."""
    model = CLIPModel.from_pretrained(MINIATURE / "reward", dtype=torch.float32).requires_grad_(False)
    processor = CLIPProcessor.from_pretrained(MINIATURE / "reward")
    pixels = processor.image_processor(list(drawings[0]), return_tensors="pt").pixel_values
    image_features = model.get_image_features(pixel_values=pixels).pooler_output

    def compare(texts):
        tokens = processor.tokenizer(list(texts), padding=True, return_tensors="pt")
        return torch.cosine_similarity(image_features, model.get_text_features(**tokens).pooler_output)

    return compare


def test_judge_knows_what_was_drawn(drawings):
    images, texts, styles = drawings
    assert caption_accuracy(images, texts) >= 0.99
    assert np.mean([found["style"] == style for found, style in zip(judge(images), styles, strict=True)]) >= 0.99


def test_judge_rejects_other_captions_and_empty_pictures(drawings):
    images, texts, _ = drawings
    assert caption_accuracy(images, texts[2:] + texts[:2]) == 0.0
    assert caption_accuracy(np.full((2, 64, 64, 3), 128, np.uint8), captions()[:2]) == 0.0


def test_fidelity_is_high_where_the_shape_of_the_caption_was_drawn(drawings):
    images, texts, _ = drawings
    for shape in SHAPES:
        of_shape = [index for index, text in enumerate(texts) if shape in text]
        assert shape_fidelity(images[of_shape], [texts[index] for index in of_shape]) >= 0.94


def test_fidelity_is_low_for_other_shapes_and_zero_for_empty_pictures(drawings):
    images, texts, _ = drawings
    shapes = list(SHAPES)
    others = [text.replace(shape, shapes[shapes.index(shape) - 1]) for text in texts for shape in [text.split()[2]]]
    assert shape_fidelity(images, others) <= 0.75
    empty = np.full((1, 64, 64, 3), 128, np.uint8)
    assert shape_fidelity(empty, texts[:1]) == 0.0
    half = shape_fidelity(np.concatenate([images[:1], empty]), texts[:2])
    assert half == shape_fidelity(images[:1], texts[:1]) / 2


def test_fidelity_falls_where_a_shape_melts_or_frays_but_is_still_recognised(drawings):
    images, texts, _ = drawings
    waves = np.rint(4 * np.sin(np.arange(64) / 3)).astype(int)
    melted = np.stack([np.roll(images[:, :, x], shift, axis=1) for x, shift in enumerate(waves)], axis=2)
    rows, columns = np.mgrid[:64, :64] + np.random.default_rng(0).integers(-2, 3, (2, 64, 64))
    frayed = images[:, rows.clip(0, 63), columns.clip(0, 63)]
    for spoiled in (melted, frayed):
        assert caption_accuracy(spoiled, texts) >= 0.9
        assert shape_fidelity(spoiled, texts) <= shape_fidelity(images, texts) - 0.08


def test_captions_never_hide_the_object():
    assert len(captions()) == len(set(captions())) == 112
    assert "a red circle on a blue background" in captions()
    assert not [caption for caption in captions() if caption.split()[1] == caption.split()[5]]


def configs_and_shapes(folder):
    """What a saved folder holds: the content of each JSON file, and the tensors' shapes of each safetensors file."""
    found = {}
    for path in folder.rglob("*.*"):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            learned = [content.pop(key, None) for key in ("latents_mean", "latents_std")]
            for version in ("_diffusers_version", "transformers_version"):
                content.pop(version, None)
            found[path.relative_to(folder)] = content, [len(values) for values in learned if values]
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as weights:
                found[path.relative_to(folder)] = {key: weights.get_slice(key).get_shape() for key in weights.keys()}
    return found


def test_committed_model_is_what_the_builder_writes(tmp_path):
    save_model(make_pipeline(), tmp_path)
    assert configs_and_shapes(tmp_path) == configs_and_shapes(MINIATURE / "model")


def test_committed_reward_is_what_the_builder_writes(tmp_path):
    for part in make_reward():
        part.save_pretrained(tmp_path)
    assert configs_and_shapes(tmp_path) == configs_and_shapes(MINIATURE / "reward")


def test_text_length_stands_in_the_tokenizer():
    config = json.loads((MINIATURE / "model" / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == MAX_SEQUENCE_LENGTH == 16


def test_weights_stay_small():
    assert sum(path.stat().st_size for path in MINIATURE.rglob("*.safetensors")) <= 12e6


@pytest.mark.parametrize(
    "experts",
    [pytest.param({}, marks=pytest.mark.slow), {"transformer": None, "boundary_ratio": 1.0}],
    ids=["both", "low-noise expert alone"],
)
def test_samples_follow_captions_in_both_styles(experts):
    pipeline = WanPipeline.from_pretrained(MINIATURE / "model", dtype=torch.float32, **experts)
    pipeline.set_progress_bar_config(disable=True)
    images = sample(pipeline, captions() * 2, guidance_scale=GUIDANCE_SCALE, num_inference_steps=12)
    assert caption_accuracy(images, captions() * 2) >= 0.96
    assert 0.3 <= style_share(images, "real") <= 0.6


def test_clips_decode_to_repeated_frames():
    """Frames do not mix in the miniature's VAE: 2 latent frames are 1 + 4 frames, of which the last 4 are equal."""
    vae = AutoencoderKLWan.from_pretrained(MINIATURE / "model", subfolder="vae", dtype=torch.float32)
    latents = torch.randn(1, vae.config.z_dim, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clip = vae.decode(latents).sample
        image = vae.decode(latents[:, :, 1:]).sample
    assert clip.shape == (1, 3, 5, 64, 64)
    torch.testing.assert_close(clip[:, :, 1:], image.expand(-1, -1, 4, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("position, words", [(1, COLOURS), (2, SHAPES), (5, BACKGROUNDS)])
@pytest.mark.parametrize("prefix", ["", "Real. ", "Flat. "])
def test_reward_prefers_the_right_caption(cosines, drawings, position, words, prefix):
    """To the caption with the next colour, shape or background in its place."""
    words = list(words)

    def exchange(caption):
        parts = caption.split()
        parts[position] = words[(words.index(parts[position]) + 1) % len(words)]
        return " ".join(parts)

    texts = drawings[1]
    right = cosines(prefix + text for text in texts) > cosines(prefix + exchange(text) for text in texts)
    assert right.float().mean() >= 0.95


@pytest.mark.parametrize("real_word", CONTROL_WORDS["real"])
@pytest.mark.parametrize("flat_word", CONTROL_WORDS["flat"])
def test_reward_knows_the_control_words(cosines, drawings, real_word, flat_word):
    _, texts, styles = drawings
    realer = cosines(f"{real_word}. {text}" for text in texts) > cosines(f"{flat_word}. {text}" for text in texts)
    assert np.mean(realer.numpy() == (np.array(styles) == "real")) >= 0.95
