"""Latents to pixels: `decode_latents` is `AutoencoderKLWan.decode` for single images, with a gradient that fits."""

import copy

import pytest
import torch
from helpers import ROOT, draw
from torch.utils.flop_counter import FlopCounterMode

from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from train_srpo_wan_t2i import ImageConv, decode_latents, flatten_vae


KINDS = {"Wan2.1 and Wan2.2-A14B": ("tiny_model", 8), "Wan2.2-5B": ("tiny_one_expert_model", 16)}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def vae_and_scale(request):
    """A random VAE of each kind, frozen, and the number of pixels to a latent."""
    fixture, scale = request.param
    folder = request.getfixturevalue(fixture)
    return AutoencoderKLWan.from_pretrained(folder, subfolder="vae").requires_grad_(False), scale


@pytest.fixture
def vae(vae_and_scale):
    return vae_and_scale[0]


def latents(requires_grad=False):
    """Normalised latents (2, 4, 1, 4, 6), not square."""
    return torch.randn(2, 4, 1, 4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_(requires_grad)


def reference_pixels(vae, latents):
    """What `WanPipeline` does after its last step, image by image: (B, 3, H, W) in [0, 1]."""
    mean, std = torch.tensor([0.1, -0.2, 0.3, -0.4]), torch.tensor([1.5, 0.5, 2.0, 1.25])
    images = [
        vae.decode(sample[None] * std.view(1, 4, 1, 1, 1) + mean.view(1, 4, 1, 1, 1)).sample for sample in latents
    ]
    return torch.cat(images)[:, :, 0] / 2 + 0.5


def widen(vae, factor):
    """Makes the random decoder, whose output is small, reach beyond [-1, 1]."""
    vae.decoder.conv_out.weight.data *= factor
    return vae


def test_pixels_equal_those_of_the_vae(vae):
    pixels, _ = decode_latents(vae, latents())
    torch.testing.assert_close(pixels, reference_pixels(vae, latents()), rtol=0, atol=1e-5)


def test_gradient_equals_that_of_the_vae(vae):
    ours, theirs = latents(requires_grad=True), latents(requires_grad=True)
    weight = torch.randn(decode_latents(vae, latents())[0].shape, generator=torch.Generator().manual_seed(1))
    (decode_latents(vae, ours)[0] * weight).sum().backward()
    (reference_pixels(vae, theirs) * weight).sum().backward()
    assert theirs.grad.abs().max() > 1e-2
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_shape_and_type_of_pixels(vae_and_scale):
    vae, scale = vae_and_scale
    pixels, _ = decode_latents(vae.to(torch.bfloat16), latents())
    assert pixels.shape == (2, 3, 4 * scale, 6 * scale)
    assert pixels.dtype == torch.float32


@pytest.mark.parametrize("factor", [1, 1000])
def test_pixels_lie_between_0_and_1(vae, factor):
    pixels, _ = decode_latents(widen(vae, factor), latents())
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_nothing_is_saturated_inside_the_range(vae):
    assert decode_latents(vae, latents())[1] == 0


def test_saturated_is_the_share_of_clamped_values(vae):
    widen(vae, 20)
    pixels, saturated = decode_latents(vae, latents())
    clamped = (reference_pixels(vae, latents()) == 0) | (reference_pixels(vae, latents()) == 1)
    assert 0.05 < saturated < 0.95
    assert saturated.item() == pytest.approx(clamped.float().mean().item(), abs=1e-3)
    assert ((pixels == 0) | (pixels == 1)).float().mean().item() == pytest.approx(saturated.item())


def test_saturated_pixels_carry_no_gradient(vae):
    widen(vae, 1e9)
    noisy = latents(requires_grad=True)
    pixels, saturated = decode_latents(vae, noisy)
    pixels.sum().backward()
    assert saturated == 1
    assert noisy.grad.abs().max() == 0


@pytest.mark.parametrize("requires_grad, calls", [(True, 2), (False, 1)], ids=["with gradient", "without gradient"])
def test_decoder_blocks_are_recomputed_only_where_gradients_flow(vae, requires_grad, calls):
    blocks = [vae.decoder.mid_block, *vae.decoder.up_blocks]
    counts = [0] * len(blocks)

    def count(index):
        def hook(*_):
            counts[index] += 1

        return hook

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(count(index))
    pixels, _ = decode_latents(vae, latents(requires_grad))
    assert counts == [1] * 5
    if requires_grad:
        pixels.sum().backward()
    assert counts == [calls] * 5


def test_checkpointing_keeps_the_gradient(vae):
    """Nothing that the decoder remembers between calls may leak into the recomputation."""
    first, second = latents(requires_grad=True), latents(requires_grad=True)
    decode_latents(vae, first)[0].sum().backward()
    vae.decode(torch.randn(1, 4, 1, 4, 4))
    decode_latents(vae, second)[0].sum().backward()
    assert torch.equal(first.grad, second.grad)


# ---- The flattened VAE. ---------------------------------------------------------------------------------------------


# The published configs, 12 times as narrow or more.
WAN_2_1 = {"base_dim": 8}
WAN_2_2_5B = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 48,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}
DEEP = {"Wan2.1 at full depth": (WAN_2_1, 8), "Wan2.2-5B at full depth": (WAN_2_2_5B, 16)}


@pytest.fixture(scope="module", params=[*KINDS.values(), *DEEP.values()], ids=[*KINDS, *DEEP])
def twins(request):
    """A random VAE of each kind, frozen, a flattened copy of it, and the number of pixels to a latent."""
    source, scale = request.param
    if isinstance(source, str):
        stock = AutoencoderKLWan.from_pretrained(request.getfixturevalue(source), subfolder="vae")
    else:
        torch.manual_seed(0)
        stock = AutoencoderKLWan(**source).eval()
    stock.requires_grad_(False)
    return stock, flatten_vae(copy.deepcopy(stock)), scale


def relative_difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def encode(vae, images):
    return vae.encode(images).latent_dist.parameters


def decode(vae, latents):
    return vae.decode(latents).sample


@pytest.mark.parametrize("way", [encode, decode])
def test_a_flattened_vae_gives_the_values_and_gradients_of_the_stock_one(twins, way):
    stock, flat, scale = twins
    shape = (2, 3, 1, 4 * scale, 6 * scale) if way is encode else (2, stock.config.z_dim, 1, 4, 6)
    values, gradients = [], []
    for vae in (flat, stock):
        given = draw(0, *shape).requires_grad_()
        values.append(way(vae, given))
        (values[-1] * draw(1, *values[-1].shape)).sum().backward()
        gradients.append(given.grad)
    assert values[1].shape[-2:] == ((4, 6) if way is encode else (4 * scale, 6 * scale))
    assert relative_difference(*values) < 1e-5
    assert relative_difference(*gradients) < 1e-5


def test_decode_latents_gives_the_same_with_a_flattened_vae(twins):
    stock, flat, _ = twins
    pixels, gradients = [], []
    for vae in (flat, stock):
        given = draw(0, 2, stock.config.z_dim, 1, 4, 6).requires_grad_()
        pixels.append(decode_latents(vae, given)[0])
        (pixels[-1] * draw(1, *pixels[-1].shape)).sum().backward()
        gradients.append(given.grad)
    assert relative_difference(*pixels) < 1e-5
    assert relative_difference(*gradients) < 1e-5


def test_a_flattened_vae_has_no_causal_convolution_left(twins):
    stock, flat, _ = twins
    causal = [name for name, module in stock.named_modules() if isinstance(module, WanCausalConv3d)]
    assert causal == [name for name, module in flat.named_modules() if isinstance(module, ImageConv)]
    assert not any(isinstance(module, torch.nn.Conv3d) for module in flat.modules())


def test_flattening_turns_the_vae_itself(vae):
    assert flatten_vae(vae) is vae
    assert isinstance(vae.decoder.conv_in, ImageConv)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_weights_stay_frozen_when_flattened(vae, frozen):
    vae.requires_grad_(not frozen)
    vae.encoder.requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in vae.named_parameters()}
    assert {name: weight.requires_grad for name, weight in flatten_vae(vae).named_parameters()} == before


def test_a_flattened_vae_keeps_its_dtype(vae):
    flat = flatten_vae(vae.to(torch.bfloat16))
    assert {weight.dtype for weight in flat.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_flattened_vae_refuses_clips(twins, batch):
    _, flat, scale = twins
    clips = draw(0, batch, 3, 5, 2 * scale, 2 * scale), draw(0, batch, flat.config.z_dim, 2, 2, 2)
    for way, clip in zip((encode, decode), clips, strict=True):
        with pytest.raises(RuntimeError, match="conv2d"):
            way(flat, clip)


def test_the_vae_of_the_14b_model_needs_less_than_half_the_flop_as_a_2d_one():
    folder = ROOT / "tests/fixtures/wan2.2-t2v-a14b"
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder, subfolder="vae")).requires_grad_(False)
        latents, counts = torch.empty(1, 16, 1, 64, 64), []
        for model in (vae, flatten_vae(copy.deepcopy(vae))):
            with FlopCounterMode(display=False) as counter:
                model.decode(latents)
            counts.append(counter.get_total_flops())
    assert counts[1] / counts[0] == pytest.approx(0.387, abs=0.001)
