#!/usr/bin/env python
# Copyright 2026 The SRPO-Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Embed captions once with Wan's text encoder, so that training need not load its 5.7 billion parameters.

    python embed_prompts.py --pretrained_model_name_or_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --prompts prompts.yaml --output_dir embeddings

`accelerate launch embed_prompts.py ...` shares the captions out among all GPUs. Either way the result is one dataset
with a row per caption, in the order of the input, in the split `train`, and the negative prompt in the split
`negative`. The embeddings are those of `WanPipeline.encode_prompt` without the zero padding. Columns of both:

    caption                    string
    prompt_embeds              int16 (tokens, text_dim): the bit pattern of bfloat16, a type that Arrow does not have
    text_encoder               string: the model, and its revision if one was given; for people to read
    text_encoder_fingerprint   string: see `text_encoder_fingerprint`; for programs to compare
    max_sequence_length        int32

`datasets` and `torch` are enough to read an embedding back:

    row = datasets.load_from_disk("embeddings")["train"].with_format("torch")[0]
    prompt_embeds = row["prompt_embeds"].to(torch.int16).view(torch.bfloat16)

With `--boundary_latents K` the high-noise expert, alone and once, paints K images of every caption down to the first
noise level below `boundary_ratio`, where the low-noise expert takes over. Training with `--rollout_start boundary`
goes on from there, so it sees images of both experts and loads one. These columns are added to `train`:

    boundary_latents           float32 (K, channels, 1, height, width)
    boundary_seeds             list of K int64: `torch.Generator().manual_seed(seed)` draws the noise of each
    boundary_settings          string: JSON of the size and the schedule, which training must share

The columns that are constant are so on purpose: columns survive `push_to_hub`, `concatenate_datasets` and `filter`,
`DatasetInfo` does not. `Array2D` reads 50 x 4096 values in 0.5 ms; nested lists take 0.8 ms, and raw bytes 0.06 ms,
but nothing would then tell their shape.
"""

import argparse
import csv
import hashlib
import io
import json
import logging
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import (
    Array2D,
    Array5D,
    Dataset,
    DatasetDict,
    Features,
    Sequence,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import create_repo, get_token, upload_file
from tqdm.auto import tqdm

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import check_min_version


# Will error if the minimal version of diffusers is not installed. Remove at your own risks.
check_min_version("0.40.0")

logger = get_logger(__name__)

# `sample_neg_prompt` in wan/configs/shared_config.py of https://github.com/Wan-Video/Wan2.2
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

TEXT_FILES = (".yaml", ".yml", ".json", ".jsonl", ".txt", ".csv")

DATASET_CARD = """# Captions embedded for Wan

{num_captions} captions (split `train`) and the negative prompt (split `negative`), embedded with the text encoder of
`{text_encoder}` (fingerprint `{text_encoder_fingerprint}`) as `WanPipeline.encode_prompt` of 🧨 diffusers does with
`max_sequence_length={max_sequence_length}`, without the zero padding. The column `prompt_embeds`, int16 of shape
(tokens, {text_dim}), is the bit pattern of bfloat16:

```python
import torch
from datasets import load_dataset

row = load_dataset("{repo_id}", split="train").with_format("torch")[0]
prompt_embeds = row["prompt_embeds"].to(torch.int16).view(torch.bfloat16)
```
"""


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description="Embed captions with the text encoder of Wan, once for all training.")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        type=str,
        required=True,
        help="Path to pretrained model or model identifier from huggingface.co/models.",
    )
    parser.add_argument("--revision", type=str, default=None, help="Revision of pretrained model identifier.")
    parser.add_argument("--variant", type=str, default=None, help="Variant of the model files, 'e.g.' fp16")
    parser.add_argument(
        "--prompts",
        type=str,
        required=True,
        help=(
            "The captions: a .yaml file (`prompts: [...]`), a .json file (a list of objects), a .jsonl file (one"
            " object per line), a .txt file (one caption per line), a .csv or .parquet file, or the name of a dataset"
            " (from the HuggingFace hub, or a folder containing files that 🤗 Datasets can understand)."
        ),
    )
    parser.add_argument(
        "--caption_column",
        type=str,
        default="caption",
        help="The column of the dataset, or the key of the objects, containing a caption. Not for .yaml and .txt.",
    )
    parser.add_argument("--dataset_split", type=str, default="train", help="The split to read of a dataset.")
    parser.add_argument("--output_dir", type=str, required=True, help="The directory to write the dataset to.")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Replace the dataset there, once the new one is complete."
    )
    parser.add_argument(
        "--negative_prompt",
        type=str,
        default=WAN_NEGATIVE_PROMPT,
        help="The prompt not to guide the image generation. Defaults to the one that Wan was published with.",
    )
    parser.add_argument(
        "--max_sequence_length",
        type=int,
        default=512,
        help="Maximum sequence length to use with the text encoder. Longer captions are truncated.",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Batch size (per device), in captions.")
    parser.add_argument(
        "--dtype", type=str, default="bf16", choices=["bf16", "fp32"], help="The dtype to run the models in."
    )
    parser.add_argument("--cache_dir", type=str, default=None, help="Where downloaded models and datasets are stored.")
    boundary = parser.add_argument_group("boundary latents")
    boundary.add_argument(
        "--boundary_latents",
        type=int,
        default=None,
        metavar="K",
        help="Also store, for each caption, K latents that the high-noise expert painted down to its boundary.",
    )
    boundary.add_argument("--height", type=int, default=512, help="The height in pixels of the images to train on.")
    boundary.add_argument("--width", type=int, default=512, help="The width in pixels of the images to train on.")
    boundary.add_argument(
        "--sampling_steps", type=int, default=10, help="The number of denoising steps of a rollout, both experts'."
    )
    boundary.add_argument(
        "--rollout_scheduler", type=str, default="unipc", choices=["unipc", "euler"], help="The solver of rollouts."
    )
    boundary.add_argument(
        "--rollout_shift", type=float, default=None, help="Shift of the schedule. Default: `flow_shift` of the model."
    )
    boundary.add_argument(
        "--boundary_guidance_scale", type=float, default=4.0, help="Guidance scale of the high-noise expert."
    )
    boundary.add_argument("--seed", type=int, default=0, help="The seed of the first latent; the next has the next.")
    boundary.add_argument(
        "--group_offload",
        action="store_true",
        help="Keep the expert in host memory and move one block at a time to the GPU, if it has less than 32 GB.",
    )
    parser.add_argument("--push_to_hub", action="store_true", help="Whether or not to push the dataset to the Hub.")
    parser.add_argument("--hub_token", type=str, default=None, help="The token to use to push to the Hub.")
    parser.add_argument(
        "--hub_dataset_id", type=str, default=None, help="The dataset to push to. Default: the name of `--output_dir`."
    )
    parser.add_argument("--hub_private_repo", action="store_true", help="Create the dataset on the Hub as private.")
    return parser.parse_args(input_args)


def check_args(args):
    """Refuse, before anything is loaded or written, what could not succeed. Raises SystemExit with one line."""
    for flag in ("max_sequence_length", "batch_size", "boundary_latents", "height", "width", "sampling_steps"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise SystemExit(f"`--{flag}` must be at least 1, not {getattr(args, flag)}.")
    if args.rollout_shift is not None and args.rollout_shift <= 0:
        raise SystemExit(f"`--rollout_shift` must be positive, not {args.rollout_shift}.")

    output_dir = Path(args.output_dir)
    if output_dir.is_file():
        raise SystemExit(f"`--output_dir` {output_dir} is a file; choose a folder.")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not args.overwrite_output_dir:
            raise SystemExit(f"`--output_dir` {output_dir} is not empty; choose another or `--overwrite_output_dir`.")
        if not (output_dir / "dataset_dict.json").is_file():
            raise SystemExit(f"`--output_dir` {output_dir} holds no dataset to overwrite; choose another.")

    model_dir = Path(args.pretrained_model_name_or_path)
    missing = [name for name in ("model_index.json", "tokenizer", "text_encoder") if not (model_dir / name).exists()]
    if model_dir.is_dir() and missing:
        raise SystemExit(f"`--pretrained_model_name_or_path` {model_dir} is a folder without {', '.join(missing)}.")

    if args.push_to_hub and not (args.hub_token or get_token()):
        raise SystemExit("`--push_to_hub` needs a token; run `hf auth login`, set HF_TOKEN or pass `--hub_token`.")


def read_text_file(path, caption_column):
    """
    Read one of the `TEXT_FILES`. Returns a list of pairs (place in the file, row); a row should be an object that has
    a caption under the key `caption_column`. Raises ValueError, yaml.YAMLError or csv.Error if the form is wrong.
    """
    if not path.is_file():
        raise ValueError("there is no such file.")
    text = path.read_text(encoding="utf-8-sig").rstrip()
    if not text:
        raise ValueError("the file is empty.")
    if path.suffix in (".yaml", ".yml"):
        content = yaml.safe_load(text)
        if not isinstance(content, dict) or not isinstance(content.get("prompts"), list):
            raise ValueError("expected a list under the key `prompts`, as in `prompts: [a cat, a dog]`.")
        return [(f"prompts[{i}]", {caption_column: caption}) for i, caption in enumerate(content["prompts"])]
    if path.suffix == ".json":
        content = json.loads(text)
        if not isinstance(content, list):
            raise ValueError('expected a list of objects, as in `[{"caption": "a cat"}]`.')
        return [(f"item {i}", row) for i, row in enumerate(content)]
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        return [(f"line {reader.line_num}", row) for row in reader]
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
    if path.suffix == ".txt":
        return [(place, {caption_column: line}) for place, line in lines]
    rows = []
    for place, line in lines:
        try:
            rows.append((place, json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is not JSON: {error}.") from error
    return rows


def read_dataset(name, caption_column, split, cache_dir):
    """Read a .parquet file, a folder or a dataset from the Hub. Returns what `read_text_file` does."""
    source = {"path": "parquet", "data_files": name} if name.endswith(".parquet") else {"path": name}
    try:
        dataset = load_dataset(**source, split=split, cache_dir=cache_dir).select_columns(caption_column)
    except Exception as error:  # 🤗 Datasets raises many kinds
        kinds = f"{', '.join(TEXT_FILES)} file, nor a dataset with such `--dataset_split` and `--caption_column`"
        raise ValueError(f"not a {kinds}: {error}") from error
    return [(f"row {i}", row) for i, row in enumerate(dataset)]


def load_captions(args):
    """
    Read and check the captions of `--prompts`. Returns the captions in the order of the input, without the white space
    around them and without exact duplicates, and the number of duplicates. Raises SystemExit with one line.
    """
    path, column = Path(args.prompts), args.caption_column
    try:
        if path.suffix in TEXT_FILES:
            rows = read_text_file(path, column)
        else:
            rows = read_dataset(args.prompts, column, args.dataset_split, args.cache_dir)
        if not rows:
            raise ValueError("there are no captions in it.")
        for place, row in rows:
            if not isinstance(row, dict) or column not in row:
                raise ValueError(f"{place} has no `{column}`; name the key or column with `--caption_column`.")
            if not isinstance(row[column], str):
                raise ValueError(f"{place} is not a text but {row[column]!r}; write it in quotes or remove it.")
            if not row[column].strip():
                raise ValueError(f"{place} is blank; write a caption or remove it.")
    except (OSError, ValueError, yaml.YAMLError, csv.Error) as error:
        raise SystemExit(f"`--prompts` {args.prompts}: {' '.join(str(error).split())}") from error
    captions = list(dict.fromkeys(row[column].strip() for _, row in rows))
    return captions, len(rows) - len(captions)


def load_pipeline(args, **parts):
    """Load a WanPipeline without the parts that are given as `None`: they are neither downloaded nor loaded."""
    try:
        return WanPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            transformer_2=None,
            vae=None,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            dtype=torch.float32 if args.dtype == "fp32" else torch.bfloat16,
            **parts,
        )
    except (OSError, ValueError) as error:
        message = f"{args.pretrained_model_name_or_path} could not be loaded: {' '.join(str(error).split())}"
        raise SystemExit(f"`--pretrained_model_name_or_path` {message}") from error


def text_encoder_fingerprint(weight):
    """
    Identify a text encoder by its weights, whatever its path and the dtype it was loaded in: the first 16 hex digits
    of the sha256 of `encoder.final_layer_norm.weight`, (text_dim,), as the little-endian bytes of bfloat16.
    """
    bits = weight.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy()
    return hashlib.sha256(bits.astype("<i2").tobytes()).hexdigest()[:16]


def token_counts(tokenizer, prompts):
    """Count the tokens of each prompt, the end token included, before any truncation."""
    return [len(ids) for ids in tokenizer([prompt_clean(prompt) for prompt in prompts]).input_ids]


@torch.no_grad()
def embed(pipe, prompts, max_sequence_length):
    """
    Embed prompts as `WanPipeline` does, then cut off its zero padding. Returns for each prompt an int16 array
    (tokens, text_dim), the bit pattern of bfloat16.
    """
    prompt_embeds, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    bits = prompt_embeds.to("cpu", torch.bfloat16).view(torch.int16).numpy()
    return [b[: min(n, max_sequence_length)] for b, n in zip(bits, token_counts(pipe.tokenizer, prompts), strict=True)]


def make_scheduler(settings):
    """The flow-matching scheduler that the trainer uses with these settings."""
    if settings["rollout_scheduler"] == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=settings["rollout_shift"])
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return UniPCMultistepScheduler(**flow, flow_shift=settings["rollout_shift"])


def read_boundary_settings(args):
    """
    What is known of the latents before the expert is loaded: the settings that training must share, as a dict, the
    boundary, and the shape of the latents (channels, 1, height, width). Raises SystemExit with one line.
    """
    source = {name: getattr(args, name) for name in ("pretrained_model_name_or_path", "revision", "cache_dir")}
    try:
        index = WanPipeline.load_config(**source)
        scheduler = UniPCMultistepScheduler.load_config(**source, subfolder="scheduler")
        with torch.device("meta"):  # whose config has the defaults for what the file leaves out
            vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(**source, subfolder="vae")).config
        transformer = WanTransformer3DModel.load_config(**source, subfolder="transformer")
    except (OSError, ValueError) as error:
        message = f"{args.pretrained_model_name_or_path} could not be read: {' '.join(str(error).split())}"
        raise SystemExit(f"`--pretrained_model_name_or_path` {message}") from error
    if index.get("boundary_ratio") is None:
        raise SystemExit("`--boundary_latents` needs a model of two experts; this one has no `boundary_ratio`.")
    scale = vae["scale_factor_spatial"]
    for flag, multiple in (
        ("height", scale * transformer["patch_size"][1]),
        ("width", scale * transformer["patch_size"][2]),
    ):
        if getattr(args, flag) % multiple:
            raise SystemExit(f"`--{flag}` {getattr(args, flag)} must be a multiple of {multiple} for this model.")
    settings = {name: getattr(args, name) for name in ("height", "width", "sampling_steps", "rollout_scheduler")}
    settings["rollout_shift"] = args.rollout_shift or scheduler.get("flow_shift", 1.0)
    schedule = make_scheduler(settings)
    schedule.set_timesteps(args.sampling_steps)
    if schedule.timesteps[-1] >= 1000 * index["boundary_ratio"]:
        problem = "leaves no noise level below the boundary for the low-noise expert"
        raise SystemExit(f"`--sampling_steps` {args.sampling_steps} {problem}; take more.")
    shape = transformer["in_channels"], 1, args.height // scale, args.width // scale
    return settings, index["boundary_ratio"], shape


def load_high_noise_expert(args, settings, device):
    """Load a WanPipeline of the high-noise expert alone, with the scheduler of the settings."""
    scheduler = make_scheduler(settings)
    pipe = load_pipeline(args, text_encoder=None, tokenizer=None, boundary_ratio=None, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    # As in training, latents are float32 between steps whatever the expert computes in.
    pipe.transformer.register_forward_hook(lambda _module, _inputs, outputs: (outputs[0].float(),))
    if args.group_offload:
        pipe.transformer.enable_group_offload(onload_device=device, offload_type="block_level", num_blocks_per_group=1)
        return pipe
    return pipe.to(device)


@torch.no_grad()
def paint_to_boundary(pipe, prompt_embeds, negative_prompt_embeds, noise, boundary, settings, guidance_scale):
    """
    Paint with `WanPipeline` until the first noise level below the boundary. `prompt_embeds` (B, L, D), `noise`
    (B, C, 1, H, W) float32; returns latents of the shape of the noise, on the CPU.
    """

    def stop_at_boundary(pipe, step, _timestep, tensors):
        following = pipe.scheduler.timesteps[step + 1 : step + 2]
        pipe._interrupt = bool((following < 1000 * boundary).all())
        return tensors

    return pipe(
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        latents=noise,
        height=settings["height"],
        width=settings["width"],
        num_frames=1,
        num_inference_steps=settings["sampling_steps"],
        guidance_scale=guidance_scale,
        callback_on_step_end=stop_at_boundary,
        output_type="latent",
    ).frames.cpu()


def paint_share(accelerator, args, shard, negative, settings, boundary, shape):
    """
    Paint the boundary latents of the captions in `shard`, a file of this process, into the file `{shard}.boundary`.
    `negative` is the embedding of the negative prompt; see `read_boundary_settings` for the rest.
    """
    pipe = load_high_noise_expert(args, settings, accelerator.device)
    seeds = list(range(args.seed, args.seed + args.boundary_latents))
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    features = Features(
        boundary_latents=Array5D((len(seeds), *shape), "float32"),
        boundary_seeds=Sequence(Value("int64")),
        boundary_settings=Value("string"),
    )
    constant = {"boundary_seeds": seeds, "boundary_settings": json.dumps(settings)}
    rows = Dataset.from_file(shard).with_format("numpy") if Path(shard).stat().st_size else []

    def pad(embeds):
        rows = [torch.as_tensor(bits).to(torch.int16).view(torch.bfloat16) for bits in embeds]
        rows = [F.pad(row, (0, 0, 0, args.max_sequence_length - len(row))) for row in rows]
        return torch.stack(rows).to(accelerator.device)

    starts = range(0, len(rows), args.batch_size)
    with ArrowWriter(path=f"{shard}.boundary", features=features, writer_batch_size=64) as writer:
        for start in tqdm(starts, desc="Painting", unit="batch", disable=not accelerator.is_main_process):
            embeds = pad(rows[start : start + args.batch_size]["prompt_embeds"])
            prompts = embeds, pad([negative]).expand_as(embeds)
            painted = [
                paint_to_boundary(
                    pipe,
                    *prompts,
                    draw.expand(len(embeds), *shape).to(accelerator.device),
                    boundary,
                    settings,
                    args.boundary_guidance_scale,
                )
                for draw in draws
            ]
            for latents in torch.stack(painted, dim=1).numpy():
                writer.write({"boundary_latents": latents, **constant})
        writer.finalize()
    accelerator.wait_for_everyone()


def save_dataset(dataset, card, partial_dir, output_dir):
    """Write the dataset into `partial_dir`, then move it to `output_dir`, in place of what was there."""
    complete_dir = partial_dir / "complete"
    dataset.save_to_disk(complete_dir)
    (complete_dir / "README.md").write_text(card, encoding="utf-8")
    if output_dir.exists():
        output_dir.rename(partial_dir / "replaced")
    complete_dir.rename(output_dir)
    shutil.rmtree(partial_dir)


def push_to_hub(repo_id, args):
    """Upload the dataset and its card. Raises SystemExit that says how to try again; `--output_dir` stays whole."""
    private = args.hub_private_repo or None  # None leaves it to the default of the account or organization
    hub = {"repo_id": repo_id, "token": args.hub_token}
    try:
        hub["repo_id"] = create_repo(**hub, repo_type="dataset", private=private, exist_ok=True).repo_id
        card = Path(args.output_dir) / "README.md"
        upload_file(**hub, repo_type="dataset", path_or_fileobj=card, path_in_repo="README.md")
        load_from_disk(args.output_dir).push_to_hub(**hub, private=private)
    except Exception as error:  # no network, no rights, no space: whatever it was, the work is on disk
        retry = f"datasets.load_from_disk({args.output_dir!r}).push_to_hub({repo_id!r}, private={private})"
        raise SystemExit(
            f"`--push_to_hub` failed: {error}\n"
            f'The dataset is complete in {args.output_dir}; upload it with\npython -c "import datasets; {retry}"'
        ) from error


def main(args):
    check_args(args)
    captions, num_duplicates = load_captions(args)

    settings, boundary, latent_shape = read_boundary_settings(args) if args.boundary_latents else (None,) * 3

    accelerator = Accelerator()
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)

    # 1. The text encoder, and what every row says about it.
    pipe = load_pipeline(args, transformer=None, scheduler=None).to(accelerator.device)
    text_dim = pipe.text_encoder.config.d_model
    provenance = {
        "text_encoder": "@".join(filter(None, [args.pretrained_model_name_or_path, args.revision])),
        "text_encoder_fingerprint": text_encoder_fingerprint(pipe.text_encoder.encoder.final_layer_norm.weight),
        "max_sequence_length": args.max_sequence_length,
    }
    features = Features(
        caption=Value("string"),
        prompt_embeds=Array2D((None, text_dim), "int16"),
        text_encoder=Value("string"),
        text_encoder_fingerprint=Value("string"),
        max_sequence_length=Value("int32"),
    )
    counts = token_counts(pipe.tokenizer, [*captions, args.negative_prompt])
    num_truncated = sum(count > args.max_sequence_length for count in counts)
    if num_truncated:
        of_all = f"{num_truncated} of {len(counts)} prompts (the negative one included)"
        logger.warning(f"{of_all} will be truncated to `--max_sequence_length` {args.max_sequence_length} tokens.")

    # 2. An empty folder beside the output, for what is not complete yet. What an interrupted run left there goes.
    output_dir = Path(args.output_dir).absolute()
    partial_dir = output_dir.with_name(output_dir.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial_dir, ignore_errors=True)
        partial_dir.mkdir(parents=True)
    accelerator.wait_for_everyone()

    # 3. Every process embeds its share and writes it to its own file. Batches are shared out, not captions, so that
    # the same captions meet in a batch, and give the same bits, whatever the number of processes.
    batches = [captions[i : i + args.batch_size] for i in range(0, len(captions), args.batch_size)]
    shards = [str(partial_dir / f"{i}.arrow") for i in range(accelerator.num_processes)]
    with (
        accelerator.split_between_processes(batches) as share,
        ArrowWriter(path=shards[accelerator.process_index], features=features, writer_batch_size=64) as writer,
    ):
        for batch in tqdm(share, desc="Embedding", unit="batch", disable=not accelerator.is_main_process):
            for caption, prompt_embeds in zip(batch, embed(pipe, batch, args.max_sequence_length), strict=True):
                writer.write({"caption": caption, "prompt_embeds": prompt_embeds, **provenance})
        writer.finalize()
    (negative,) = embed(pipe, [args.negative_prompt], args.max_sequence_length)
    accelerator.wait_for_everyone()

    # 4. The same share again: the high-noise expert, in the place of the text encoder, paints to its boundary.
    if args.boundary_latents:
        del pipe
        paint_share(accelerator, args, shards[accelerator.process_index], negative, settings, boundary, latent_shape)

    # 5. The main process joins the files, which lie in the order of the captions, and moves the result in place.
    if accelerator.is_main_process:
        negative = {"caption": args.negative_prompt, "prompt_embeds": negative, **provenance}
        train = concatenate_datasets([Dataset.from_file(shard) for shard in shards])
        if args.boundary_latents:
            latents = concatenate_datasets([Dataset.from_file(f"{shard}.boundary") for shard in shards])
            train = concatenate_datasets([train, latents], axis=1)
            # The negative prompt has none, but 🤗 Datasets wants the same columns in both splits.
            negative.update(dict.fromkeys(latents.column_names))
        dataset = DatasetDict(train=train, negative=Dataset.from_list([negative], features=train.features))
        repo_id = args.hub_dataset_id or output_dir.name
        card = DATASET_CARD.format(num_captions=len(captions), text_dim=text_dim, repo_id=repo_id, **provenance)
        save_dataset(dataset, card, partial_dir, output_dir)

        size = sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())
        logger.info("***** Embedded prompts *****")
        logger.info(f"  Num captions = {len(captions)} ({num_duplicates} duplicates dropped)")
        logger.info(f"  Num processes = {accelerator.num_processes}")
        logger.info(f"  Num truncated = {num_truncated}")
        if args.boundary_latents:
            logger.info(f"  Boundary latents = {args.boundary_latents} for each caption")
        logger.info(f"  Dataset = {args.output_dir} ({size / 1e6:.1f} MB)")
        logger.info(
            "  Next: accelerate launch train_srpo_wan_t2i.py"
            f" --pretrained_model_name_or_path {args.pretrained_model_name_or_path} --dataset_name {args.output_dir}"
            " --reward_model HPS --reward_model_path HPS_v2.1_compressed.pt --output_dir srpo-wan"
        )
        if args.push_to_hub:
            push_to_hub(repo_id, args)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
