"""Build the miniature from nothing: a Wan2.2 that paints on a CPU, and a CLIP that knows SRPO's control words.

    python tests/miniature/build.py --output_dir tests/miniature    # about 25 minutes on one core

It writes `model/`, laid out like Wan2.2-T2V-A14B-Diffusers, and `reward/`, a CLIPModel with its processor; both are
committed, so this is run only to change them. Seeds and step counts are fixed. What is learned, in order:
  1. the VAE, as a 2-D network, since every drawing is a single frame;
  2. the low-noise expert with the text encoder, on all noise levels: like Wan's it can paint alone;
  3. the high-noise expert, from the low-noise one, on the noise levels above the boundary;
  4. the reward, on drawings, their reconstructions, and spoiled images that no text may claim.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


sys.path.append(str(Path(__file__).parents[1]))
from miniature.drawings import (  # noqa: E402
    BACKGROUNDS,
    COLOURS,
    GUIDANCE_SCALE,
    MAX_SEQUENCE_LENGTH,
    SHAPES,
    SIZE,
    STYLES,
    caption_accuracy,
    captions,
    draw,
    style_share,
)


SEED = 0
BOUNDARY = 0.875  # the noise level at which Wan2.2 changes experts

# The words of the published SRPO recipe, by the style that they mean here.
CONTROL_WORDS = {
    "real": ("Natural-lighting", "Detail", "Detailed", "Real"),
    "flat": ("Concept art", "Painting", "Anime", "Flat", "Oil"),
}


# 1. The untrained parts. Their configs are the committed ones, save the latent statistics, which are measured.


def make_tokenizer():
    """A word-level T5 tokenizer of the captions' words; every other word is unknown."""
    words = sorted({*"a on background".split(), *COLOURS, *SHAPES, *BACKGROUNDS})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)] + [(f"▁{word}", -1.0) for word in words]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)


def make_text_encoder(vocab_size):
    """A UMT5 encoder of two layers."""
    config = UMT5Config(
        vocab_size=vocab_size, d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, dropout_rate=0.0
    )
    return UMT5EncoderModel(config)


def make_vae():
    """Wan's VAE, 8x in space and 4x in time, with weights set up so that its one-frame part learns fast.

    Convolutions keep the variance, residual branches start silent, and frames do not mix: a clip is coded as every
    fourth frame of it, and decoded with each repeated.
    """
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=8,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    for name, module in vae.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
            kernel = module.weight.data if isinstance(module, nn.Conv2d) else module.weight.data[:, :, -1]
            if name.endswith("time_conv"):
                kernel[..., 0, 0] = torch.eye(kernel.shape[1]).repeat(kernel.shape[0] // kernel.shape[1], 1)
            elif not name.endswith(("conv2", "proj")):
                nn.init.normal_(kernel, std=kernel[0].numel() ** -0.5)
    return vae


def make_transformer():
    """One expert: four of Wan's blocks on 4x4 tokens, with rotary positions only."""
    return WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        text_dim=64,
        freq_dim=128,
        ffn_dim=384,
        num_layers=4,
        rope_max_seq_len=64,
    )


def make_pipeline():
    """The untrained miniature; `save_pretrained` gives it the folder layout of Wan2.2-T2V-A14B-Diffusers."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(len(tokenizer)),
        vae=make_vae(),
        scheduler=scheduler,
        transformer=make_transformer(),
        transformer_2=make_transformer(),
        boundary_ratio=BOUNDARY,
    )


def make_reward_tokenizer():
    """CLIP's byte-pair tokenizer, trained until each word of captions and control words is one token."""
    texts = [f"{word}. {caption}" for words in CONTROL_WORDS.values() for word in words for caption in captions()]
    trained = CLIPTokenizer().train_new_from_iterator(texts, vocab_size=400, show_progress=False)
    first = [trained.bos_token, trained.eos_token]
    tokens = first + sorted(set(trained.get_vocab()) - set(first))  # training numbers them anew every time
    merges = [tuple(pair) for pair in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=24)


def make_reward():
    """The untrained reward and its processor: (CLIPModel, CLIPProcessor)."""
    torch.manual_seed(SEED)
    tokenizer = make_reward_tokenizer()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 128}
    text = {**size, **special, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text["max_position_embeddings"] = tokenizer.model_max_length
    vision = {"num_hidden_layers": 3, "num_attention_heads": 3, "hidden_size": 96, "intermediate_size": 192}
    vision |= {"image_size": SIZE, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, logit_scale_init_value=np.log(20))
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE)
    return CLIPModel(config), CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


# 2. Training


def make_drawings(per_caption, rng):
    """Fresh drawings in random order, `per_caption` of each caption and style.

    Returns pixels (N, 3, 64, 64) float32 in [-1, 1], captions and styles (two lists of N).
    """
    kinds = [(caption, style) for caption in captions() for style in STYLES] * per_caption
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    pixels = np.stack([draw(caption, style, rng) for caption, style in kinds])
    texts, styles = zip(*kinds, strict=True)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, list(texts), list(styles)


def to_uint8(pixels):
    """Pixels (N, 3, 64, 64) in [-1, 1] -> (N, 64, 64, 3) uint8, as the judge wants them."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def train(name, parameters, loss_of_a_batch, steps, learning_rate):
    """Minimise `loss_of_a_batch()` for `steps` AdamW steps: a short warm-up, then a cosine down to nothing."""
    torch.manual_seed(SEED)
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    start, losses = time.time(), []
    for step in range(1, steps + 1):
        loss = loss_of_a_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, steps // 10) == 0:
            recent = np.mean(losses[-max(1, steps // 10) :])
            print(f"{name}: step {step}, loss {recent:.4f}, {time.time() - start:.0f} s", flush=True)


def convolve_one_frame(conv, x, cache_x=None):
    """`WanCausalConv3d.forward` of a single frame (B, C, 1, H, W): only its kernel's last slice meets the frame."""
    padding = (conv._padding[2], conv._padding[0])
    return F.conv2d(x.squeeze(2), conv.weight[:, :, -1], conv.bias, conv.stride[1:], padding).unsqueeze(2)


def train_vae(vae, pixels, steps):
    """Teach the VAE to reconstruct `pixels` (N, 3, 64, 64), and measure its latents' mean and standard deviation."""

    def loss_of_a_batch():
        batch = pixels[torch.randint(len(pixels), (8,))].unsqueeze(2)
        posterior = DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(batch)))
        error = vae.decoder(vae.post_quant_conv(posterior.sample())) - batch  # `vae.decode` would clamp
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return error.square().mean() + 0.2 * error.abs().mean() + 1e-4 * divergence

    with mock.patch.object(WanCausalConv3d, "forward", convolve_one_frame):
        train("VAE", vae.parameters(), loss_of_a_batch, steps, 5e-3)
    sample = encode_pixels(vae, pixels[:2000])
    mean, std = sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def latent_statistics(vae):
    """The mean and the standard deviation of the VAE's latents per channel, each (C, 1, 1, 1)."""
    return (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))


@torch.no_grad()
def encode_pixels(vae, pixels):
    """Pixels (N, 3, 64, 64) -> normalised latents (N, C, 1, 8, 8)."""
    mean, std = latent_statistics(vae)
    with mock.patch.object(WanCausalConv3d, "forward", convolve_one_frame):
        latents = [vae.encode(batch.unsqueeze(2)).latent_dist.mode() for batch in pixels.split(64)]
    return (torch.cat(latents) - mean) / std


@torch.no_grad()
def decode_latents(vae, latents):
    """Normalised latents (N, C, 1, 8, 8) -> pixels (N, 3, 64, 64) in [-1, 1]."""
    mean, std = latent_statistics(vae)
    with mock.patch.object(WanCausalConv3d, "forward", convolve_one_frame):
        return torch.cat([vae.decode(batch * std + mean).sample.squeeze(2) for batch in latents.split(64)])


def drop_captions(texts, rng):
    """Replace a tenth of the captions by "", or by as many unknown words as other negative prompts may have."""
    unknown = [" ".join(["?"] * rng.integers(MAX_SEQUENCE_LENGTH)) if rng.random() < 0.5 else "" for _ in texts]
    return [nothing if rng.random() < 0.1 else text for text, nothing in zip(texts, unknown, strict=True)]


def train_expert(name, pipeline, transformer, parameters, data, sigma_range, steps, learning_rate):
    """Flow matching of `parameters` on `data`, (latents (N, C, 1, 8, 8), N captions), at sigmas within `sigma_range`.

    The text is encoded as `WanPipeline` does it; sigmas are uniform before the shift of 3 that samplers use too.
    """
    latents, texts = data
    rng = np.random.default_rng(SEED)
    low, high = (sigma / (3 - 2 * sigma) for sigma in sigma_range)

    def loss_of_a_batch():
        index = torch.randint(len(latents), (64,))
        prompts = drop_captions([texts[i] for i in index], rng)
        embeds, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
        x0, noise = latents[index], torch.randn_like(latents[index])
        uniform = low + (high - low) * torch.rand(64, 1, 1, 1, 1)
        sigma = 3 * uniform / (1 + 2 * uniform)
        velocity = transformer(sigma * noise + (1 - sigma) * x0, 1000 * sigma.flatten(), embeds).sample
        return F.mse_loss(velocity, noise - x0)

    train(name, parameters, loss_of_a_batch, steps, learning_rate)


def augment(pixels):
    """Blur some of the pixels (N, 3, 64, 64) a little and add a little noise, as samples are blurred and noisy."""
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = 0.5 * torch.rand(len(pixels), 1, 1, 1) * (torch.rand(len(pixels), 1, 1, 1) < 0.3)
    noise = 0.1 * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)
    return (torch.lerp(pixels, blurred, amount) + noise).clamp(-1, 1)


def spoil(pixels):
    """Images that no text may claim, made of pixels (N, 3, 64, 64): greyed, in two halves, too harsh, or glaring."""
    grey, halves, harsh, glaring = pixels.chunk(4)
    grey = torch.lerp(grey, grey.mean(1, keepdim=True), 0.5 + 0.5 * torch.rand(len(grey), 1, 1, 1))
    halves = torch.cat([halves[..., : SIZE // 2], halves.roll(1, 0)[..., SIZE // 2 :]], -1)
    middle = harsh.mean((2, 3), keepdim=True)
    harsh = middle + (harsh - middle) * (1.5 + torch.rand(len(harsh), 1, 1, 1))
    row, column = SIZE / 2 + 8 * torch.randn(2, len(glaring), 1, 1, 1)
    distance = torch.hypot(torch.arange(SIZE).view(-1, 1) - row, torch.arange(SIZE) - column)
    glare = torch.exp(-((distance / 8) ** 2))
    return torch.cat([grey, halves, harsh.clamp(-1, 1), glaring + glare * (1 - glaring)])


def match_loss(logits, matches):
    """Cross-entropy of the rows of `logits` (N, M) with `matches` (N, M) as targets; rows without one do not count."""
    logits, matches = logits[matches.any(1)], matches[matches.any(1)]
    return -(logits.log_softmax(1) * matches).sum(1).div(matches.sum(1)).mean()


def train_reward(model, processor, data, steps):
    """Teach CLIP captions and control words on `data`: pixels (N, 3, 64, 64), N captions and N styles.

    Each step compares a batch of images with all captions, plain and after one control word of either style.
    """
    pixels, texts, styles = data
    labels = torch.tensor([captions().index(text) for text in texts])
    is_real = torch.tensor([style == "real" for style in styles])
    settings = processor.image_processor
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.image_mean, settings.image_std))
    rng = np.random.default_rng(SEED)

    def loss_of_a_batch():
        index = torch.randint(len(pixels), (96,))
        images = augment(torch.cat([pixels[index], spoil(pixels[torch.randint(len(pixels), (32,))])]))
        prefixes = ["", *(f"{rng.choice(CONTROL_WORDS[style])}. " for style in ("real", "flat"))]
        prompts = [prefix + caption for prefix in prefixes for caption in captions()]
        tokens = processor.tokenizer(prompts, padding=True, return_tensors="pt")
        logits = model(pixel_values=((images + 1) / 2 - mean) / std, **tokens).logits_per_text
        right = F.one_hot(labels[index], len(captions())).T.bool()
        matches = torch.cat([right, right & is_real[index], right & ~is_real[index]])
        claims = F.pad(matches, (0, len(images) - len(index)))
        return match_loss(logits, claims) + match_loss(logits[:, : len(index)].T, matches.T)

    learned = [parameter for name, parameter in model.named_parameters() if name != "logit_scale"]
    train("reward", learned, loss_of_a_batch, steps, 1e-3)


# 3. The whole


def sample(pipeline, prompts, guidance_scale=GUIDANCE_SCALE, num_inference_steps=12, seed=SEED):
    """Paint `prompts` with a miniature WanPipeline: (N, 64, 64, 3) uint8."""
    frames = pipeline(
        prompts,
        height=SIZE,
        width=SIZE,
        num_frames=1,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames
    return (255 * frames[:, 0]).round().astype(np.uint8)


def report(name, images, texts):
    """Print what the judge finds in images (N, 64, 64, 3) of N captions."""
    shares = ", ".join(f"{style} {style_share(images, style):.3f}" for style in (*STYLES, "unclear"))
    print(f"{name}: caption accuracy {caption_accuracy(images, texts):.3f}, {shares}", flush=True)


def build_model(pixels, texts, model_dir):
    """Train the pipeline on drawings, write it to `model_dir`, and return what its VAE makes of the drawings."""
    pipeline = make_pipeline()
    train_vae(pipeline.vae, pixels, 3000)
    latents = encode_pixels(pipeline.vae, pixels)
    low, high, text_encoder = pipeline.transformer_2, pipeline.transformer, pipeline.text_encoder
    learned = [*low.parameters(), *text_encoder.parameters()]
    train_expert("low-noise expert", pipeline, low, learned, (latents, texts), (0.002, 1.0), 2000, 2e-3)
    text_encoder.requires_grad_(False)
    high.load_state_dict(low.state_dict())
    train_expert("high-noise expert", pipeline, high, high.parameters(), (latents, texts), (0.86, 1.0), 250, 5e-4)
    reconstructions = decode_latents(pipeline.vae, latents)
    save_model(pipeline, model_dir)
    return reconstructions


def save_model(pipeline, model_dir):
    """Write the pipeline, its large parts in half precision."""
    for part in (pipeline.vae, pipeline.transformer, pipeline.transformer_2):
        part.half()
    forget_padding(pipeline.tokenizer)
    pipeline.save_pretrained(model_dir)


def forget_padding(tokenizer):
    """Undo what the last batch left in `tokenizer`, as that would be saved with it."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()


def main(args):
    torch.set_num_threads(1)  # sums over several threads vary in their last digits
    pixels, texts, styles = make_drawings(40, np.random.default_rng(SEED))
    reconstructions = build_model(pixels, texts, args.output_dir / "model")
    report("reconstructions", to_uint8(reconstructions[:1000]), texts[:1000])

    model, processor = make_reward()
    train_reward(model, processor, (torch.cat([pixels, reconstructions]), texts * 2, styles * 2), 1000)
    forget_padding(processor.tokenizer)
    model.save_pretrained(args.output_dir / "reward")
    processor.save_pretrained(args.output_dir / "reward")

    pair = WanPipeline.from_pretrained(args.output_dir / "model")
    alone = WanPipeline.from_pretrained(args.output_dir / "model", transformer=None, boundary_ratio=1.0)
    for name, pipeline in (("both experts", pair), ("low-noise expert alone", alone)):
        pipeline.set_progress_bar_config(disable=True)
        for guidance_scale in (1.0, 2.0, 3.0):
            images = sample(pipeline, captions(), guidance_scale)
            report(f"{name}, guidance {guidance_scale}", images, captions())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the miniature Wan2.2 and its reward.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where to write `model/` and `reward/`.")
    main(parser.parse_args())
