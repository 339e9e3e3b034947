#!/usr/bin/env python
# Copyright 2026 The SRPO for Wan authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
r"""
Embed captions once with the text encoder of Wan, so that training need not load its 5.7 billion parameters.

    accelerate launch embed_prompts.py --pretrained_model_name_or_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --prompts prompts.yaml --output_dir prompt_embeds

All GPUs share the work; `python embed_prompts.py ...` uses one. The result is one dataset: the captions, in the order
of the input, are its split `train`, the negative prompt is its split `negative`, and the prompts of
`--validation_prompts`, if there are any, are its split `validation`. The embeddings are those of
`WanPipeline.encode_prompt` without the zero padding. Columns:

    caption                    string
    prompt_embeds              int16 (tokens, text_dim): the bit pattern of bfloat16, a type that Arrow does not have
    text_encoder               string: the model, and its revision if one was given; for people to read
    text_encoder_fingerprint   string: see `weights_fingerprint`; for programs to compare
    max_sequence_length        int32

`datasets` and `torch` are enough to read an embedding back:

    row = datasets.load_from_disk("prompt_embeds")["train"].with_format("torch")[0]
    prompt_embeds = row["prompt_embeds"].to(torch.int16).view(torch.bfloat16)

With `--boundary_latents K` the high-noise expert, alone and once, paints K images of every caption down to the first
noise level below `boundary_ratio`, where the low-noise expert takes over. Training with `--rollout_start boundary`
goes on from there, so it sees images of both experts and loads one. These columns are added; only `train` fills them:

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
import importlib
import io
import json
import logging
import math
import os
import reprlib
import shlex
import shutil
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import yaml
from safetensors import safe_open
from tqdm.auto import tqdm


# Copied from train_srpo_wan_t2i.LazyModule
class LazyModule:
    """A module that is imported when it is first used, so that `--help` and wrong flags are answered at once."""

    def __init__(self, name):
        self.__name__ = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self.__name__), attribute)


accelerate, datasets, diffusers, torch, transformers = map(
    LazyModule, ("accelerate", "datasets", "diffusers", "torch", "transformers")
)
F = LazyModule("torch.nn.functional")
pipeline_wan = LazyModule("diffusers.pipelines.wan.pipeline_wan")

logger = logging.getLogger(__name__)

# `sample_neg_prompt` in wan/configs/shared_config.py of https://github.com/Wan-Video/Wan2.2
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

TEXT_FILES = (".yaml", ".yml", ".json", ".jsonl", ".txt", ".csv")
VOCABULARY_FILES = ("tokenizer.json", "spiece.model")  # one is enough
TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json")

# First words of the names of files of weights, and the layer by whose weights a text encoder is identified.
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
TEXT_ENCODER_LAYER = "encoder.final_layer_norm.weight"

SPLITS = ("train", "negative", "validation")

# What training must share with boundary latents, by the names of the flags of both scripts.
BOUNDARY_SETTINGS = ("height", "width", "sampling_steps", "rollout_scheduler", "rollout_shift")
# The flags that need `--boundary_latents`. Where training has the same flag, it has the same default.
BOUNDARY_DEFAULTS = {
    "height": 512,
    "width": 512,
    "sampling_steps": 10,
    "rollout_scheduler": "unipc",
    "rollout_shift": None,
    "boundary_guidance_scale": 4.0,
    "seed": 0,
    "group_offload": False,
}
MAX_SEQUENCE_LENGTH = 512  # the default of training, too

DATASET_CARD = """# Captions embedded for Wan

{splits}, embedded with the text encoder of `{text_encoder}` (fingerprint `{text_encoder_fingerprint}`) as
`WanPipeline.encode_prompt` of 🧨 diffusers does with `max_sequence_length={max_sequence_length}`, without the zero
padding. The column `prompt_embeds`, int16 of shape (tokens, {text_dim}), is the bit pattern of bfloat16:

```python
import torch
from datasets import load_dataset

row = load_dataset("{repo_id}", split="train").with_format("torch")[0]
prompt_embeds = row["prompt_embeds"].to(torch.int16).view(torch.bfloat16)
```
"""


# ---- Captions: from a file, a dataset or the command line to a list of texts. ---------------------------------------
def read_text_file(path, caption_column):
    """
    Reads one of the `TEXT_FILES`. Returns a list of pairs (place in the file, row); a row should be an object that has
    a caption under the key `caption_column`. Raises `ValueError`, `yaml.YAMLError` or `csv.Error` for a wrong form.
    """
    if not path.is_file():
        raise ValueError("there is no such file.")
    with input_error("the file is not text in UTF-8, save it as UTF-8"):
        text = path.read_text(encoding="utf-8-sig").rstrip()
    if not text:
        raise ValueError("the file is empty.")
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        content = yaml.safe_load(text)
        if not isinstance(content, dict) or not isinstance(content.get("prompts"), list):
            raise ValueError("expected a list under the key `prompts`, as in `prompts: [a cat, a dog]`.")
        if [key.value for key, _ in yaml.compose(text, yaml.SafeLoader).value].count("prompts") > 1:
            raise ValueError("the key `prompts` is there twice; join the two lists.")
        return [(f"prompts[{i}]", {caption_column: caption}) for i, caption in enumerate(content["prompts"])]
    if suffix == ".json":
        content = json.loads(text)
        if not isinstance(content, list):
            raise ValueError('expected a list of objects, as in `[{"caption": "a cat"}]`, or of texts.')
        rows = [{caption_column: row} if isinstance(row, str) else row for row in content]
        return [(f"item {i}", row) for i, row in enumerate(rows)]
    if suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        return [(f"line {reader.line_num}", row) for row in reader]
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
    if suffix == ".txt":
        return [(place, {caption_column: line}) for place, line in lines]
    rows = []
    for place, line in lines:
        with input_error(f"{place} is not JSON"):
            rows.append((place, json.loads(line)))
    return rows


def read_dataset(name, caption_column, split, cache_dir):
    """Reads a .parquet file, a folder or a dataset from the Hub. Returns what [`read_text_file`] does."""
    source = {"path": "parquet", "data_files": name} if name.endswith(".parquet") else {"path": name}
    kinds = f"{', '.join(TEXT_FILES)} file, nor a dataset with such `--dataset_split` and `--caption_column`"
    with input_error(f"not a {kinds}"):
        dataset = datasets.load_dataset(**source, split=split, cache_dir=cache_dir).select_columns(caption_column)
    return [(f"row {i}", row) for i, row in enumerate(dataset)]


def clean_captions(rows, caption_column):
    """
    The captions of the rows that [`read_text_file`] returns, in their order, without the white space around them and
    without exact duplicates, and the number of duplicates. Raises `ValueError` that names the place.
    """
    if not rows:
        raise ValueError("there are no captions in it.")
    for place, row in rows:
        if not isinstance(row, dict) or caption_column not in row:
            raise ValueError(f"{place} has no `{caption_column}`; name the key or column with `--caption_column`.")
        if None in row:  # where `csv` puts cells beyond the last column
            raise ValueError(f"{place} has more cells than columns; put captions that have commas in quotes.")
        caption = row[caption_column]
        if not isinstance(caption, str):
            raise ValueError(f"{place} is not a text but {reprlib.repr(caption)}; write it in quotes or remove it.")
        if not any(letter.isprintable() and not letter.isspace() for letter in caption):
            raise ValueError(f"{place} is blank; write a caption or remove it.")
    captions = list(dict.fromkeys(row[caption_column].strip() for _, row in rows))
    return captions, len(rows) - len(captions)


def load_captions(flag, source, caption_column, split, cache_dir):
    """
    The captions of a file, a folder or a dataset from the Hub, and the number of duplicates that were dropped; see
    [`clean_captions`]. Raises `ValueError` of one line that names the flag, the source and the place in it.
    """
    with input_error(f"`--{flag} {source}`"):
        if Path(source).suffix.lower() in TEXT_FILES:
            rows = read_text_file(Path(source), caption_column)
        else:
            rows = read_dataset(source, caption_column, split, cache_dir)
        return clean_captions(rows, caption_column)


def load_validation_prompts(prompts, caption_column, cache_dir):
    """Like [`load_captions`]: the prompts themselves, or those of the one file that they name."""
    files = [
        name for name in prompts if Path(name).suffix.lower() in (*TEXT_FILES, ".parquet") or os.path.isfile(name)
    ]
    if len(files) == len(prompts) == 1:
        return load_captions("validation_prompts", files[0], caption_column, "train", cache_dir)
    with input_error("`--validation_prompts`"):
        if files:
            raise ValueError(f"`{files[0]}` is a file; name one file and nothing else, or prompts.")
        rows = [(f"prompt {number}", {caption_column: prompt}) for number, prompt in enumerate(prompts, start=1)]
        return clean_captions(rows, caption_column)


# ---- The text encoder: its files are checked before it is loaded; captions to embeddings. ---------------------------
# Copied from train_srpo_wan_t2i.weight_files
def weight_files(source, subfolder, stem, layer=None):
    """The paths of the safetensors files of a model, downloaded if need be: `{stem}.safetensors` or its shards, or the
    one that holds the tensor `layer`. `source` are the arguments of `from_pretrained` that say where the model is."""
    path, variant = source["pretrained_model_name_or_path"], source.get("variant")
    options = {name: value for name, value in source.items() if name in ("revision", "cache_dir")}
    cached = partial(transformers.utils.cached_file, path, subfolder=subfolder, **options)
    suffix = f".{variant}" if variant else ""
    index = cached(f"{stem}.safetensors.index{suffix}.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        return [cached(f"{stem}{suffix}.safetensors")]
    shards = json.loads(Path(index).read_text())["weight_map"]
    return [cached(shard) for shard in sorted({shards[layer]} if layer else set(shards.values()))]


# Copied from train_srpo_wan_t2i.weights_fingerprint
def weights_fingerprint(source, subfolder, stem, layer):
    """Identifies a model by the weights of one layer, wherever they lie: the first 16 hex digits of the SHA-256 of the
    little-endian bytes of `layer` in bfloat16. Only that tensor is read. See [`weight_files`]."""
    (file,) = weight_files(source, subfolder, stem, layer)
    with safe_open(file, framework="pt") as weights:
        weight = weights.get_tensor(layer)
    return hashlib.sha256(weight.to(torch.bfloat16).view(torch.int16).numpy().tobytes()).hexdigest()[:16]


# Copied from train_srpo_wan_t2i.read_shapes
def read_shapes(files):
    """{name: shape} of the tensors in safetensors files. Only the heads of the files are read."""
    shapes = {}
    for file in files:
        with input_error(f"`{file}` is not a whole safetensors file"), safe_open(file, framework="pt") as head:
            shapes |= {name: tuple(head.get_slice(name).get_shape()) for name in head.keys()}
    return shapes


# Copied from train_srpo_wan_t2i.check_weights
def check_weights(model, found):
    """Compares {name: shape} `found` in files with a model, e.g. on the meta device; `ValueError` if they differ."""
    names = {}  # names of the same tensor: one of them is enough
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [same[0] for same in names.values() if not found.keys() & set(same)]
    other = [name for name in found if name in expected and found[name] != expected[name]]
    unknown = [name for name in found if name not in expected and "position_ids" not in name]
    for what, tensors in (("lack", missing), ("have other shapes of", other), ("have unknown", unknown)):
        if tensors:
            raise ValueError(f"the weights {what} {len(tensors)} tensors, such as `{min(tensors)}`")


def model_flag(source):
    """How messages name the base model; see [`weight_files`] for `source`."""
    return f"`--pretrained_model_name_or_path {source['pretrained_model_name_or_path']}`"


def check_text_encoder(source):
    """
    Refuses a text encoder that is missing, or whose files do not hold exactly the tensors of its config. Returns its
    config and its fingerprint. See [`weight_files`] for `source`.
    """
    with input_error(f"{model_flag(source)} has no whole model in `text_encoder`"):
        config = transformers.AutoConfig.from_pretrained(**source, subfolder="text_encoder")
        with torch.device("meta"):
            text_encoder = transformers.UMT5EncoderModel(config)
        check_weights(text_encoder, read_shapes(weight_files(source, "text_encoder", TRANSFORMERS_STEM)))
        return config, weights_fingerprint(source, "text_encoder", TRANSFORMERS_STEM, TEXT_ENCODER_LAYER)


def load_tokenizer(source):
    """The tokenizer of the text encoder. Without its files transformers would make one that knows hardly any word."""
    path, where = source["pretrained_model_name_or_path"], {key: source[key] for key in ("revision", "cache_dir")}
    with input_error(f"{model_flag(source)} has no tokenizer in `tokenizer`"):
        options = {"subfolder": "tokenizer", "_raise_exceptions_for_missing_entries": False, **where}
        find = partial(transformers.utils.cached_file, path, **options)
        files = {name: Path(file) for name in TOKENIZER_FILES if (file := find(name))}
        if not files.keys() & set(VOCABULARY_FILES):
            raise OSError(f"neither {' nor '.join(VOCABULARY_FILES)} is there.")
        # From its folder, since by the name of a model transformers asks the Hub for files that Wan does not have.
        return transformers.AutoTokenizer.from_pretrained(next(iter(files.values())).parent)


def tokenize(tokenizer, prompts):
    """The token ids of each prompt, the end token included, before any truncation."""
    return tokenizer([pipeline_wan.prompt_clean(prompt) for prompt in prompts], verbose=False).input_ids


def check_tokens(token_ids, prompts, vocab_size):
    """Refuses a tokenizer that has more tokens than the text encoder, or the same tokens for different prompts."""
    seen = {}
    for ids, prompt in zip(token_ids, prompts, strict=True):
        if max(ids) >= vocab_size:
            raise ValueError(
                f"it makes token {max(ids)} of {reprlib.repr(prompt)}, but the text encoder has {vocab_size}."
            )
        other = seen.setdefault(tuple(ids), prompt)
        if pipeline_wan.prompt_clean(other) != pipeline_wan.prompt_clean(prompt):
            pair = f"{reprlib.repr(other)} and {reprlib.repr(prompt)}"
            raise ValueError(f"it makes the same tokens of {pair}. Remove one of them, or download `tokenizer` again.")


def load_pipeline(source, dtype, **parts):
    """A `WanPipeline` without the parts that are given as `None`: they are neither downloaded nor loaded."""
    with input_error(f"{model_flag(source)} cannot be loaded"):
        return diffusers.WanPipeline.from_pretrained(**source, transformer_2=None, vae=None, dtype=dtype, **parts)


def embed(pipe, prompts, max_sequence_length):
    """
    Embeds prompts as `WanPipeline` does, then cuts off its zero padding. Returns for each prompt an int16 array
    (tokens, text_dim), the bit pattern of bfloat16. Raises `ValueError` if an embedding is not finite.
    """
    with torch.no_grad():
        prompt_embeds, _ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
    finite = prompt_embeds.isfinite().all(dim=2).all(dim=1)
    if not finite.all():
        prompt = prompts[finite.tolist().index(False)]
        raise ValueError(
            f"The text encoder makes NaN or infinite numbers of {reprlib.repr(prompt)}. Check its weights."
        )
    bits = prompt_embeds.to("cpu", torch.bfloat16).view(torch.int16).numpy()
    return [row[: len(ids)] for row, ids in zip(bits, tokenize(pipe.tokenizer, prompts), strict=True)]


def embed_share(accelerator, pipe, prompts, batch_size, provenance, folder):
    """
    Embeds this process's share of the prompts into its own Arrow file in `folder`. `provenance` are the values of the
    constant columns. Returns the files of all processes; in this order they hold the prompts in theirs.
    """
    files = [str(folder / f"{i}.arrow") for i in range(accelerator.num_processes)]
    features = datasets.Features(
        caption=datasets.Value("string"),
        prompt_embeds=datasets.Array2D((None, pipe.text_encoder.config.d_model), "int16"),
        text_encoder=datasets.Value("string"),
        text_encoder_fingerprint=datasets.Value("string"),
        max_sequence_length=datasets.Value("int32"),
    )
    file = files[accelerator.process_index]
    # Batches are shared out, not prompts, so that the same prompts meet in a batch, and give the same bits, whatever
    # the number of processes.
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    with (
        accelerator.split_between_processes(batches) as share,
        datasets.arrow_writer.ArrowWriter(path=file, features=features, writer_batch_size=64) as writer,
    ):
        bar = tqdm(share, desc=f"Embedding {folder.name}", unit="batch", disable=not accelerator.is_main_process)
        for batch in bar:
            for caption, row in zip(batch, embed(pipe, batch, provenance["max_sequence_length"]), strict=True):
                writer.write({"caption": caption, "prompt_embeds": row, **provenance})
        writer.finalize()
    accelerator.wait_for_everyone()
    return files


# Copied from train_srpo_wan_t2i.unpack_prompt_embeds
def unpack_prompt_embeds(rows, max_sequence_length, dtype):
    """Stored rows, int16 (tokens, D), the bits of bfloat16 -> (B, max_sequence_length, D) of `dtype`, zero-padded."""
    rows = [torch.as_tensor(np.asarray(row, dtype=np.int16)).view(torch.bfloat16).to(dtype) for row in rows]
    return torch.stack([F.pad(row, (0, 0, 0, max_sequence_length - len(row))) for row in rows])


# ---- Boundary latents: what the high-noise expert leaves to the low-noise one. --------------------------------------
# Copied from train_srpo_wan_t2i.make_scheduler
def make_scheduler(name, shift):
    """Diffusers' scheduler `euler`, or `unipc`, which is nearer to the exact solution; `shift` is `flow_shift`."""
    if name == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


class Boundary(NamedTuple):
    """What is known of boundary latents before the high-noise expert is loaded."""

    settings: dict  # the `BOUNDARY_SETTINGS`
    sigma: float  # `boundary_ratio` of the model
    shape: tuple[int, int, int, int]  # of one latent: (channels, 1, height, width)
    seeds: list[int]  # one for each latent of a caption
    guidance_scale: float


def read_boundary_settings(args, index):
    """
    The [`Boundary`] that the flags and the configs of the base model make; `index` is its model_index.json. Raises
    `ValueError` if the model cannot paint it.
    """
    source = model_source(args)
    if index.get("boundary_ratio") is None:
        raise ValueError("`--boundary_latents` needs a model of two experts; this one has no `boundary_ratio`.")
    with input_error(f"{model_flag(source)} has no whole model in `transformer`"):
        transformer = diffusers.WanTransformer3DModel.load_config(**source, subfolder="transformer")
    with input_error(f"{model_flag(source)} is not a Wan pipeline in the layout of diffusers"):
        scheduler = diffusers.UniPCMultistepScheduler.load_config(**source, subfolder="scheduler")
        config = diffusers.AutoencoderKLWan.load_config(**source, subfolder="vae")
        with torch.device("meta"):  # a model's config has the defaults for what its file leaves out
            vae = diffusers.AutoencoderKLWan.from_config(config)
    if transformer["in_channels"] != vae.config.z_dim:
        raise ValueError("`--boundary_latents` needs a text-to-video model; the expert of this one takes images, too.")
    scale = vae.config.scale_factor_spatial
    for name, patch_size in zip(("height", "width"), transformer["patch_size"][1:], strict=True):
        value, multiple = getattr(args, name), scale * patch_size
        if value % multiple:
            near = max(1, round(value / multiple)) * multiple
            raise ValueError(
                f"`--{name} {value}` must be a multiple of {multiple} for this model, for example {near}."
            )
    settings = {name: getattr(args, name) for name in BOUNDARY_SETTINGS}
    settings["rollout_shift"] = args.rollout_shift or scheduler.get("flow_shift", 1.0)
    schedule = make_scheduler(args.rollout_scheduler, settings["rollout_shift"])
    schedule.set_timesteps(args.sampling_steps)
    if schedule.timesteps[-1] >= 1000 * index["boundary_ratio"]:
        problem = "leaves no noise level below the boundary for the low-noise expert"
        raise ValueError(f"`--sampling_steps {args.sampling_steps}` {problem}; take more.")
    return Boundary(
        settings=settings,
        sigma=index["boundary_ratio"],
        shape=(transformer["in_channels"], 1, args.height // scale, args.width // scale),
        seeds=list(range(args.seed, args.seed + args.boundary_latents)),
        guidance_scale=args.boundary_guidance_scale,
    )


def check_high_noise_expert(source):
    """Refuses a high-noise expert that is missing, or whose files do not hold exactly the tensors of its config."""
    with input_error(f"{model_flag(source)} has no whole model in `transformer`"):
        config = diffusers.WanTransformer3DModel.load_config(**source, subfolder="transformer")
        with torch.device("meta"):
            transformer = diffusers.WanTransformer3DModel.from_config(config)
        check_weights(transformer, read_shapes(weight_files(source, "transformer", DIFFUSERS_STEM)))


def load_high_noise_expert(source, dtype, boundary, device, group_offload):
    """A `WanPipeline` of the high-noise expert alone, with the scheduler of the boundary's settings."""
    scheduler = make_scheduler(boundary.settings["rollout_scheduler"], boundary.settings["rollout_shift"])
    pipe = load_pipeline(source, dtype, text_encoder=None, tokenizer=None, boundary_ratio=None, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    # As in training, latents are float32 between steps whatever the expert computes in.
    pipe.transformer.register_forward_hook(lambda _module, _inputs, outputs: (outputs[0].float(),))
    if group_offload:
        pipe.transformer.enable_group_offload(onload_device=device, offload_type="block_level", num_blocks_per_group=1)
        return pipe
    return pipe.to(device)


def paint_to_boundary(pipe, prompt_embeds, negative_prompt_embeds, noise, boundary):
    """
    Paints with `WanPipeline` until the first noise level below the boundary. `prompt_embeds` and
    `negative_prompt_embeds` (B, L, D), `noise` (B, C, 1, H, W) float32; returns latents of the shape of the noise, on
    the CPU. Raises `ValueError` if they are not finite.
    """

    def stop_at_boundary(pipe, step, _timestep, tensors):
        following = pipe.scheduler.timesteps[step + 1 : step + 2]
        pipe._interrupt = bool((following < 1000 * boundary.sigma).all())
        return tensors

    with torch.no_grad():
        latents = pipe(
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            latents=noise,
            height=boundary.settings["height"],
            width=boundary.settings["width"],
            num_frames=1,
            num_inference_steps=boundary.settings["sampling_steps"],
            guidance_scale=boundary.guidance_scale,
            callback_on_step_end=stop_at_boundary,
            output_type="latent",
        ).frames.cpu()
    if not latents.isfinite().all():
        raise ValueError("The high-noise expert makes NaN or infinite numbers. Check its weights.")
    return latents


def paint_share(accelerator, pipe, file, negative_prompt_embeds, boundary, batch_size):
    """
    Paints the boundary latents of the captions in `file`, which this process wrote, into `{file}.boundary`.
    `negative_prompt_embeds` (1, L, D) bfloat16 are padded.
    """
    draws = [torch.randn(boundary.shape, generator=torch.Generator().manual_seed(seed)) for seed in boundary.seeds]
    features = datasets.Features(
        boundary_latents=datasets.Array5D((len(draws), *boundary.shape), "float32"),
        boundary_seeds=datasets.Sequence(datasets.Value("int64")),
        boundary_settings=datasets.Value("string"),
    )
    constant = {"boundary_seeds": boundary.seeds, "boundary_settings": json.dumps(boundary.settings)}
    length, device = negative_prompt_embeds.shape[1], accelerator.device
    rows = datasets.Dataset.from_file(file).with_format("numpy")
    starts = range(0, len(rows), batch_size)
    with datasets.arrow_writer.ArrowWriter(path=f"{file}.boundary", features=features, writer_batch_size=64) as writer:
        for start in tqdm(starts, desc="Painting", unit="batch", disable=not accelerator.is_main_process):
            batch = rows[start : start + batch_size]["prompt_embeds"]
            embeds = unpack_prompt_embeds(batch, length, torch.bfloat16).to(device)
            negative = negative_prompt_embeds.to(device).expand_as(embeds)
            noises = [draw.expand(len(embeds), *boundary.shape).to(device) for draw in draws]
            painted = [paint_to_boundary(pipe, embeds, negative, noise, boundary) for noise in noises]
            for latents in torch.stack(painted, dim=1).numpy():
                writer.write({"boundary_latents": latents, **constant})
        writer.finalize()
    accelerator.wait_for_everyone()


# ---- The dataset: joined, written, described, uploaded. -------------------------------------------------------------
def join_files(files, with_boundary):
    """What [`embed_share`] and [`paint_share`] wrote, the files of each split -> a `DatasetDict`."""
    read, join = datasets.Dataset.from_file, datasets.concatenate_datasets
    dataset = {split: join([read(name) for name in names]) for split, names in files.items()}
    if with_boundary:
        latents = join([read(f"{name}.boundary") for name in files["train"]])
        dataset["train"] = join([dataset["train"], latents], axis=1)
        features, empty = dataset["train"].features, dict.fromkeys(latents.column_names)
        for split in files.keys() - {"train"}:  # 🤗 Datasets wants the same columns in all splits
            rows = [{**row, **empty} for row in dataset[split].with_format("numpy")]
            dataset[split] = datasets.Dataset.from_list(rows, features=features)
    return datasets.DatasetDict(dataset)


def make_card(dataset, repo_id):
    """The text of the dataset card. All that it tells stands in the rows."""
    row = dataset["train"].with_format("numpy")[0]
    names = {"train": "captions", "negative": "negative prompt", "validation": "validation prompts"}
    return DATASET_CARD.format(
        splits=", ".join(f"{len(rows)} {names[split]} (split `{split}`)" for split, rows in dataset.items()),
        text_dim=row["prompt_embeds"].shape[1],
        repo_id=repo_id,
        **{name: row[name] for name in ("text_encoder", "text_encoder_fingerprint", "max_sequence_length")},
    )


def save_dataset(dataset, card, partial_dir, output_dir):
    """Writes the dataset into `partial_dir`, then moves it to `output_dir`, in place of what was there."""
    complete_dir = partial_dir / "complete"
    dataset.save_to_disk(complete_dir)
    (complete_dir / "README.md").write_text(card, encoding="utf-8")
    if output_dir.exists():
        output_dir.rename(partial_dir / "replaced")
    complete_dir.rename(output_dir)
    shutil.rmtree(partial_dir)


# Copied from train_srpo_wan_t2i.with_retries
def with_retries(request, attempts=5):
    """Repeats a request to the Hub after 1, 2, 4, 8 seconds, unless the Hub answers that the request is wrong."""
    for attempt in range(attempts):
        try:
            return request()
        except Exception as error:
            if getattr(error, "response", None) is None and hasattr(error.__cause__, "response"):
                error = error.__cause__  # huggingface_hub wraps what the storage answers
            status = getattr(getattr(error, "response", None), "status_code", 500)
            wrong = isinstance(error, (ValueError, FileNotFoundError)) or (status < 500 and status not in (408, 429))
            if wrong or attempt == attempts - 1:
                raise error
            logger.warning(f"The Hub failed: {error}\nTrying again in {2**attempt} s.")
            time.sleep(2**attempt)


def push_to_hub(repo_id, output_dir, token, private):
    """Uploads the dataset and its card. Raises `ValueError` that says how to try again; `output_dir` stays whole."""
    private = private or None  # None leaves it to the default of the account or organization
    hub = {"repo_id": repo_id, "token": token}
    create = partial(huggingface_hub.create_repo, repo_type="dataset", private=private, exist_ok=True)
    card = {"path_or_fileobj": Path(output_dir, "README.md"), "path_in_repo": "README.md", "repo_type": "dataset"}
    retry = f"datasets.load_from_disk({output_dir!r}).push_to_hub({repo_id!r}, private={private})"
    command = f'python -c "import datasets; {retry}"'
    # No network, no rights, no space: whatever it is, the work is on the disk.
    with input_error(f"`--push_to_hub` failed. The dataset is in {output_dir}; upload it with `{command}`. The cause"):
        hub["repo_id"] = with_retries(lambda: create(**hub)).repo_id
        with_retries(lambda: huggingface_hub.upload_file(**hub, **card))
        with_retries(lambda: datasets.load_from_disk(output_dir).push_to_hub(**hub, private=private))


# ---- Flags, and what is refused before anything is loaded or written. -----------------------------------------------
# Copied from train_srpo_wan_t2i.input_error
@contextmanager
def input_error(cause):
    """Turns whatever a library says of unreadable input into a `ValueError` of one line that begins with `cause`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{cause}: {' '.join(str(error).split())}") from error


# Copied from train_srpo_wan_t2i.one_line_errors
@contextmanager
def one_line_errors():
    """Ends the program with the message of a `ValueError`, without a traceback."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action):
        has_default = action.default is not None and action.nargs != 0
        return super()._get_help_string(action) if has_default else action.help


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description="Embed captions with the text encoder of Wan, once for all training.",
        usage="accelerate launch %(prog)s --pretrained_model_name_or_path M --prompts P --output_dir O "
        "[options, see --help]",
        formatter_class=HelpFormatter,
    )

    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True,
        help="Path to pretrained model or model identifier from huggingface.co/models, in the layout of diffusers.")
    add("--revision", help="Revision of pretrained model identifier from huggingface.co/models.")
    add("--variant", help="Variant of the model files of the pretrained model identifier, 'e.g.' fp16")
    add("--cache_dir", help="Where the downloaded models and datasets will be stored.")
    add("--dtype", choices=["bf16", "fp32"], default="bf16", help="The dtype to run the models in.")
    add = parser.add_argument_group("captions").add_argument
    add("--prompts", required=True,
        help="The captions: a .yaml file (`prompts: [...]`), a .json file (a list of objects or texts), a .jsonl "
             "file (one object per line), a .txt file (one caption per line), a .csv or .parquet file, or the name of "
             "a dataset (from the HuggingFace hub, or a folder containing files that 🤗 Datasets can understand).")
    add("--caption_column", default="caption",
        help="The column of the dataset, or the key of the objects, containing a caption. Not for .yaml and .txt.")
    add("--dataset_split", default="train", help="The split to read of a dataset.")
    add("--validation_prompts", nargs="+", help="Prompts to paint in training, or one file of them.")
    add("--negative_prompt", default=WAN_NEGATIVE_PROMPT, help="The prompt not to guide the image generation.")
    add("--max_sequence_length", type=int, default=MAX_SEQUENCE_LENGTH,
        help="Maximum sequence length to use with the text encoder. Longer captions are truncated.")
    add("--batch_size", type=int, default=8, help="Batch size (per device), in captions.")
    add = parser.add_argument_group("boundary latents").add_argument
    add("--boundary_latents", type=int, metavar="K",
        help="Also store, for each caption, K latents that the high-noise expert painted down to its boundary.")
    add("--height", type=int, help="The height in pixels of the images to train on.")
    add("--width", type=int, help="The width in pixels of the images to train on.")
    add("--sampling_steps", type=int, help="The number of denoising steps of a rollout, both experts'.")
    add("--rollout_scheduler", choices=["unipc", "euler"], help="The solver of rollouts.")
    add("--rollout_shift", type=float, help="Shift of the rollout's schedule. Default: `flow_shift` of the model.")
    add("--boundary_guidance_scale", type=float, help="Guidance scale of the high-noise expert.")
    add("--seed", type=int, help="The seed of the first latent; the next has the next.")
    add("--group_offload", action="store_true",
        help="Keep the expert in host memory and move one block at a time to the GPU, if it has less than 32 GB.")
    parser.set_defaults(**BOUNDARY_DEFAULTS)  # of the flags of this group
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, help="The directory to write the dataset to.")
    add("--overwrite_output_dir", action="store_true",
        help="Replace the dataset there, once the new one is complete.")
    add("--push_to_hub", action="store_true", help="Whether or not to push the dataset to the Hub.")
    add("--hub_dataset_id", help="The name of the dataset to push to. Default: the name of `output_dir`.")
    add("--hub_token", help="The token to use to push to the Hub.")
    add("--hub_private_repo", action="store_true", help="Whether to create the repository as private.")
    # fmt: on

    return parser.parse_args(input_args)


def check_values(args):
    """Refuses values that no run can use."""
    for name in ("max_sequence_length", "batch_size", "boundary_latents", "height", "width", "sampling_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, but is {value}.")
    if args.rollout_shift is not None and not 0 < args.rollout_shift < math.inf:
        raise ValueError(f"`--rollout_shift` must be positive and finite, but is {args.rollout_shift}.")
    if not math.isfinite(args.boundary_guidance_scale):
        raise ValueError(f"`--boundary_guidance_scale` must be finite, but is {args.boundary_guidance_scale}.")
    if not 0 <= args.seed < 2**63 - (args.boundary_latents or 0):
        raise ValueError(f"`--seed` must be at least 0 and of 63 bits, but is {args.seed}.")
    for name, default in BOUNDARY_DEFAULTS.items():
        if args.boundary_latents is None and getattr(args, name) != default:
            raise ValueError(f"`--{name}` needs `--boundary_latents`; embeddings do not depend on it.")
    if args.push_to_hub and not (args.hub_token or huggingface_hub.get_token()):
        raise ValueError("`--push_to_hub` needs a token: run `hf auth login`, set HF_TOKEN or pass `--hub_token`.")
    if args.push_to_hub:
        with input_error("`--hub_dataset_id`, by default the name of `--output_dir`, cannot name a dataset"):
            huggingface_hub.utils.validate_repo_id(args.hub_dataset_id or output_dirs(args)[0].name)


def output_dirs(args):
    """The folder to write, and the one beside it for what is not complete yet. A link is followed."""
    output_dir = Path(args.output_dir).resolve()
    return output_dir, output_dir.with_name(f"{output_dir.name}.partial")


def check_output_dir(args):
    """Refuses to write over files that this script did not write."""
    output_dir, partial_dir = output_dirs(args)
    name = f"`--output_dir {args.output_dir}`"
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise ValueError(f"{name} is a file; choose a folder.")
    if os.path.ismount(output_dir):
        raise ValueError(f"{name} is a mount point, which cannot be replaced; choose a folder in it.")
    found = {path.name for path in output_dir.iterdir()} if os.path.isdir(output_dir) else set()
    if found and not args.overwrite_output_dir:
        raise ValueError(f"{name} is not empty; choose another or `--overwrite_output_dir`.")
    if found and "dataset_dict.json" not in found:
        raise ValueError(f"{name} holds no dataset to overwrite; choose another.")
    # Not `replaced` of the other folder: a run that was interrupted at the wrong moment left its only copy there.
    for folder, own in ((output_dir, {"dataset_dict.json", "README.md"}), (partial_dir, {"complete"})):
        for path in folder.iterdir() if os.path.isdir(folder) else ():
            if path.name not in own | set(SPLITS):
                raise ValueError(f"{name} would delete `{path}`; move it, or choose another folder.")


def model_source(args):
    """Where to load the base model from: arguments of every `from_pretrained`, `load_config` and [`weight_files`]."""
    names = ("pretrained_model_name_or_path", "revision", "variant", "cache_dir")
    return {name: getattr(args, name) for name in names}


def read_index(source):
    """The model_index.json of the base model. Raises `ValueError` if there is none, or not the parts to embed with."""
    path = source["pretrained_model_name_or_path"]
    missing = [part for part in ("model_index.json", "tokenizer", "text_encoder") if not Path(path, part).exists()]
    if Path(path).is_dir() and missing:
        raise ValueError(f"{model_flag(source)} is a folder without {', '.join(missing)}.")
    with input_error(f"{model_flag(source)} is not a Wan pipeline in the layout of diffusers"):
        return diffusers.WanPipeline.load_config(**source)


class Inputs(NamedTuple):
    """What the checks read, before anything is loaded or written."""

    prompts: dict[str, list[str]]  # what to embed, by split
    duplicates: dict[str, int]  # how many were dropped, by split
    truncated: list[str]  # the prompts of more than `--max_sequence_length` tokens
    provenance: dict  # the columns that are constant
    boundary: Boundary | None
    two_experts: bool


def check_inputs(args):
    """The [`Inputs`] that the flags name. Raises `ValueError` of one line if anything could not succeed with them."""
    check_values(args)
    check_output_dir(args)
    prompts, duplicates = {}, {}
    prompts["train"], duplicates["train"] = load_captions(
        "prompts", args.prompts, args.caption_column, args.dataset_split, args.cache_dir
    )
    prompts["negative"] = [args.negative_prompt]
    if args.validation_prompts:
        prompts["validation"], duplicates["validation"] = load_validation_prompts(
            args.validation_prompts, args.caption_column, args.cache_dir
        )

    # Will error if the minimal version of diffusers is not installed. Remove at your own risks.
    diffusers.utils.check_min_version("0.40.0")
    source = model_source(args)
    index = read_index(source)
    boundary = read_boundary_settings(args, index) if args.boundary_latents else None
    config, fingerprint = check_text_encoder(source)
    texts = sum(prompts.values(), [])
    token_ids = tokenize(load_tokenizer(source), texts)
    with input_error(f"{model_flag(source)}, `tokenizer`"):
        check_tokens(token_ids, texts, config.vocab_size)
    if boundary:
        check_high_noise_expert(source)
    return Inputs(
        prompts=prompts,
        duplicates=duplicates,
        truncated=[text for text, ids in zip(texts, token_ids, strict=True) if len(ids) > args.max_sequence_length],
        provenance={
            "text_encoder": "@".join(filter(None, [args.pretrained_model_name_or_path, args.revision])),
            "text_encoder_fingerprint": fingerprint,
            "max_sequence_length": args.max_sequence_length,
        },
        boundary=boundary,
        two_experts=index.get("transformer_2", [None, None])[1] is not None,
    )


# ---- The run. -------------------------------------------------------------------------------------------------------
def next_command(args, two_experts):
    """The command that trains on the dataset, with every flag in which it must follow `args`."""
    options = {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "dataset_name": args.output_dir,
        "revision": args.revision,
        "variant": args.variant,
        "cache_dir": args.cache_dir,
        "max_sequence_length": args.max_sequence_length,
        "transformer_subfolder": None if two_experts else "transformer",
    }
    if args.boundary_latents:
        options |= {"rollout_start": "boundary", **{name: getattr(args, name) for name in BOUNDARY_SETTINGS}}
    defaults = {"max_sequence_length": MAX_SEQUENCE_LENGTH, **BOUNDARY_DEFAULTS}
    given = {name: value for name, value in options.items() if value != defaults.get(name)}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return shlex.join(["accelerate", "launch", "train_srpo_wan_t2i.py", *words, "--output_dir", "srpo-wan"])


def log_summary(args, inputs, num_processes):
    """Says what was written, and what to do next."""
    size = sum(file.stat().st_size for file in Path(args.output_dir).rglob("*") if file.is_file())
    logger.info("***** Embedded prompts *****")
    logger.info(f"  Num captions = {len(inputs.prompts['train'])} ({inputs.duplicates['train']} duplicates dropped)")
    if "validation" in inputs.prompts:
        dropped = f"({inputs.duplicates['validation']} duplicates dropped)"
        logger.info(f"  Num validation prompts = {len(inputs.prompts['validation'])} {dropped}")
    logger.info(f"  Num processes = {num_processes}")
    logger.info(f"  Num truncated = {len(inputs.truncated)}")
    if args.boundary_latents:
        logger.info(f"  Boundary latents = {args.boundary_latents} for each caption")
    logger.info(f"  Dataset = {args.output_dir} ({size / 1e6:.2f} MB)")
    logger.info(f"  Next: {next_command(args, inputs.two_experts)}")


def main(args):
    with one_line_errors():
        inputs = check_inputs(args)

    accelerator = accelerate.Accelerator()
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    source, dtype = model_source(args), torch.float32 if args.dtype == "fp32" else torch.bfloat16
    output_dir, partial_dir = output_dirs(args)
    if inputs.truncated and accelerator.is_main_process:
        of_all = f"{len(inputs.truncated)} of {sum(map(len, inputs.prompts.values()))} prompts (all splits)"
        first, length = reprlib.repr(inputs.truncated[0]), f"`--max_sequence_length {args.max_sequence_length}`"
        logger.warning(f"{of_all}, such as {first}, will be truncated to {length} tokens.")

    with one_line_errors():
        # 1. Empty folders beside the output for what is not complete yet. What an interrupted run left there goes.
        if accelerator.is_main_process:
            with input_error(f"`--output_dir {args.output_dir}` cannot be written; choose another"):
                shutil.rmtree(partial_dir, ignore_errors=True)
                for split in inputs.prompts:
                    (partial_dir / split).mkdir(parents=True)
        accelerator.wait_for_everyone()

        # 2. The text encoder: every process embeds its share of each split.
        pipe = load_pipeline(source, dtype, transformer=None, scheduler=None).to(accelerator.device)
        files = {}
        for split, prompts in inputs.prompts.items():
            folder, provenance = partial_dir / split, inputs.provenance
            files[split] = embed_share(accelerator, pipe, prompts, args.batch_size, provenance, folder)

        # 3. The high-noise expert, in the place of the text encoder, paints the same share of the captions.
        if inputs.boundary:
            del pipe
            pipe = load_high_noise_expert(source, dtype, inputs.boundary, accelerator.device, args.group_offload)
            negative = datasets.Dataset.from_file(files["negative"][0]).with_format("numpy")["prompt_embeds"]
            negative = unpack_prompt_embeds(negative, args.max_sequence_length, torch.bfloat16)
            file = files["train"][accelerator.process_index]
            paint_share(accelerator, pipe, file, negative, inputs.boundary, args.batch_size)

        # 4. The main process joins the files, moves the result in place and uploads it.
        if accelerator.is_main_process:
            repo_id = args.hub_dataset_id or output_dir.name
            dataset = join_files(files, with_boundary=inputs.boundary is not None)
            save_dataset(dataset, make_card(dataset, repo_id), partial_dir, output_dir)
            log_summary(args, inputs, accelerator.num_processes)
            if args.push_to_hub:
                push_to_hub(repo_id, args.output_dir, args.hub_token, args.hub_private_repo)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
