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
import fcntl
import hashlib
import importlib
import io
import json
import logging
import math
import os
import re
import reprlib
import shlex
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress
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


accelerate, datasets, transformers = LazyModule("accelerate"), LazyModule("datasets"), LazyModule("transformers")
diffusers, pipeline_wan = LazyModule("diffusers"), LazyModule("diffusers.pipelines.wan.pipeline_wan")
torch, F = LazyModule("torch"), LazyModule("torch.nn.functional")

logger = logging.getLogger(__name__)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import makes it warn

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
# What lies in the output folder: a file that marks it, and is locked while this script runs; a complete dataset that
# is not in its place yet; and all that may be deleted when it takes its place.
MARKER, DICT_FILE, COMPLETE, MOVING = "run.json", "dataset_dict.json", "dataset.new", "dataset.moving"
SPLIT_FILES = ("data-*.arrow", "dataset_info.json", "state.json")
DATASET_FILES = [DICT_FILE, "README.md", *(f"{split}/{name}" for split in SPLITS for name in SPLIT_FILES)]

# What training must share with boundary latents, by the names of the flags of both scripts.
BOUNDARY_SETTINGS = ("height", "width", "sampling_steps", "rollout_scheduler", "rollout_shift")
# The flags that need `--boundary_latents`. Where training has the same flag, it has the same default.
BOUNDARY_DEFAULTS = dict(zip(BOUNDARY_SETTINGS, (512, 512, 10, "unipc", None), strict=True))
BOUNDARY_DEFAULTS |= {"boundary_guidance_scale": 4.0, "seed": 0, "group_offload": False}
# The flags that do not change what is in the dataset.
FREE_FLAGS = """cache_dir group_offload output_dir overwrite_output_dir push_to_hub hub_dataset_id
    hub_private_repo""".split()
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
def unique_keys(pairs):
    """An `object_pairs_hook` of json, which by itself drops all but the last of the same keys."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"an object has the same key twice: {reprlib.repr(pairs)[:100]}")
    return row


def read_text_file(path, caption_column):
    """Reads one of the `TEXT_FILES`. Returns a list of pairs (place in the file, row); a row should be a caption, or
    an object that has one under the key `caption_column`. Raises `ValueError`, `yaml.YAMLError` or `csv.Error` for a
    wrong form."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise ValueError("there is no such file.")
    if suffix not in TEXT_FILES:
        raise ValueError(f"the name must end with one of {', '.join(TEXT_FILES)} or .parquet. Save it as one of them.")
    with input_error("the file is not text in UTF-8, save it as UTF-8"):
        text = path.read_bytes().decode("utf-8-sig").rstrip()
    if not text:
        raise ValueError("the file is empty.")
    if suffix in (".yaml", ".yml"):
        content = yaml.safe_load(text)
        if not isinstance(content, dict) or not isinstance(content.get("prompts"), list):
            raise ValueError("expected a list under the key `prompts`, as in `prompts: [a cat, a dog]`.")
        if [key.value for key, _ in yaml.compose(text, yaml.SafeLoader).value].count("prompts") > 1:
            raise ValueError("the key `prompts` is there twice; join the two lists.")
        return [(f"prompts[{i}]", {caption_column: caption}) for i, caption in enumerate(content["prompts"])]
    if suffix == ".json":
        content = json.loads(text, object_pairs_hook=unique_keys)
        if not isinstance(content, list):
            raise ValueError('expected a list of objects, as in `[{"caption": "a cat"}]`, or of texts.')
        return [(f"item {i}", row) for i, row in enumerate(content)]
    if suffix == ".csv":
        # Strict: else a quote that is not closed takes all lines that follow.
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if reader.fieldnames.count(caption_column) > 1:
            raise ValueError(f"the column `{caption_column}` is there twice.")
        return [(f"line {reader.line_num}", row) for row in reader]
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
    if suffix == ".txt":
        return lines
    rows = []
    for place, line in lines:
        with input_error(f"{place} is not JSON"):
            rows.append((place, json.loads(line, object_pairs_hook=unique_keys)))
    return rows


def read_dataset(name, caption_column, split, cache_dir):
    """Reads a .parquet file, a folder or a dataset from the Hub. Returns what [`read_text_file`] does."""
    source = {"path": "parquet", "data_files": name} if name.lower().endswith(".parquet") else {"path": name}
    kinds = f"{', '.join(TEXT_FILES)} file, nor a dataset with such `--dataset_split` and `--caption_column`"
    with input_error(without_hub(name, f"is not a {kinds}", "dataset")):
        dataset = datasets.load_dataset(**source, split=split, cache_dir=cache_dir).select_columns(caption_column)
    return [(f"row {i}", row) for i, row in enumerate(dataset)]


def clean_captions(rows, caption_column):
    """The captions of the rows that [`read_text_file`] returns, in their order, without the white space around them
    and without exact duplicates, and the number of duplicates. Raises `ValueError` that names the place."""
    if not rows:
        raise ValueError("there are no captions in it.")
    rows = [(place, {caption_column: row} if isinstance(row, str) else row) for place, row in rows]
    for place, row in rows:
        if not isinstance(row, dict) or caption_column not in row:
            raise ValueError(f"{place} has no `{caption_column}`; name the key or column with `--caption_column`.")
        if None in row:  # where `csv` puts cells beyond the last column
            raise ValueError(f"{place} has more cells than columns; put captions that have commas in quotes.")
        caption = row[caption_column]
        if not isinstance(caption, str):
            found = reprlib.repr(caption)[:100]
            raise ValueError(f"{place} is not a text but {found}; write it in quotes or remove it.")
        if not any(letter.isprintable() and not letter.isspace() for letter in caption):
            raise ValueError(f"{place} is blank; write a caption or remove it.")
        if caption != caption.encode(errors="replace").decode():
            raise ValueError(f"{place} holds half a character of Unicode: {caption[:100]!a}. Write it again.")
    captions = list(dict.fromkeys(row[caption_column].strip() for _, row in rows))
    return captions, len(rows) - len(captions)


def load_captions(flag, source, caption_column, split, cache_dir):
    """The captions of a file, a folder or a dataset from the Hub, and the number of duplicates that were dropped; see
    [`clean_captions`]. Raises `ValueError` of one line that names the flag, the source and the place in it."""
    with input_error(f"`--{flag} {source}`"):
        suffix = Path(source).suffix.lower()
        if suffix in TEXT_FILES or (os.path.isfile(source) and suffix != ".parquet"):
            rows = read_text_file(Path(source), caption_column)
        else:
            rows = read_dataset(source, caption_column, split, cache_dir)
        return clean_captions(rows, caption_column)


def load_validation_prompts(prompts, caption_column, cache_dir):
    """Like [`load_captions`]: the prompts themselves, or those of the one file that they name."""
    suffixes = (*TEXT_FILES, ".parquet")
    files = [name for name in prompts if os.path.isfile(name) or Path(name).suffix.lower() in suffixes]
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
    """The [`fingerprint`] of one `layer` of a model, wherever it lies; see [`weight_files`]."""
    (file,) = weight_files(source, subfolder, stem, layer)
    with safe_open(file, framework="pt") as weights:
        return fingerprint(weights.get_tensor(layer))


# Copied from train_srpo_wan_t2i.fingerprint
def fingerprint(tensor):
    """The first 16 hex digits of the SHA-256 of the little-endian bytes of a tensor in bfloat16."""
    return hashlib.sha256(tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes()).hexdigest()[:16]


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


# Copied from train_srpo_wan_t2i.require_finite
def require_finite(model, flag):
    """Refuses a model that was just loaded if one of its weights is NaN or infinite; `flag` says whence."""
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(f"{flag}: the weights of `{bad[0]}` are NaN or infinite. Download them again.")


def model_flag(source):
    """How messages name the base model; see [`weight_files`] for `source`."""
    return f"`--pretrained_model_name_or_path {source['pretrained_model_name_or_path']}`"


def check_text_encoder(source):
    """Refuses a text encoder that is missing, or whose files do not hold exactly the tensors of its config. Returns
    its config and its fingerprint. See [`weight_files`] for `source`."""
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
            token = f"token {max(ids)} of {reprlib.repr(prompt)}"
            raise ValueError(f"it makes {token}, but the text encoder has {vocab_size}.")
        other = seen.setdefault(tuple(ids), prompt)
        if pipeline_wan.prompt_clean(other) != pipeline_wan.prompt_clean(prompt):
            pair = f"{reprlib.repr(other)} and {reprlib.repr(prompt)}"
            raise ValueError(f"it makes the same tokens of {pair}. Remove one of them, or download `tokenizer` again.")


def load_pipeline(source, dtype, **parts):
    """A `WanPipeline` without the parts that are given as `None`: they are neither downloaded nor loaded. `ValueError`
    if it cannot be loaded, or a weight is not finite."""
    with input_error(f"{model_flag(source)} cannot be loaded"):
        pipe = diffusers.WanPipeline.from_pretrained(**source, transformer_2=None, vae=None, dtype=dtype, **parts)
    for name in {"text_encoder", "transformer"} - parts.keys():
        require_finite(getattr(pipe, name), f"{model_flag(source)}, `{name}`")
    return pipe


def embed(pipe, prompts, max_sequence_length):
    """Embeds prompts as `WanPipeline` does, then cuts off its zero padding. Returns for each prompt an int16 array
    (tokens, text_dim), the bit pattern of bfloat16. Raises `ValueError` if an embedding is not finite."""
    options = {"do_classifier_free_guidance": False, "max_sequence_length": max_sequence_length}
    with torch.no_grad():
        prompt_embeds, _ = pipe.encode_prompt(prompts, **options)
    finite = prompt_embeds.isfinite().all(dim=2).all(dim=1)
    if not finite.all():
        prompt = reprlib.repr(prompts[finite.tolist().index(False)])
        raise ValueError(f"The text encoder makes NaN or infinite numbers of {prompt}. Check its weights.")
    bits = prompt_embeds.to("cpu", torch.bfloat16).view(torch.int16).numpy()
    return [row[: len(ids)] for row, ids in zip(bits, tokenize(pipe.tokenizer, prompts), strict=True)]


def embed_share(accelerator, pipe, prompts, batch_size, provenance, folder):
    """Embeds this process's share of the prompts into its own Arrow file in `folder`. `provenance` are the values of
    the constant columns. Returns the files of all processes; in this order they hold the prompts in theirs."""
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
    seeds: range  # one for each latent of a caption
    guidance_scale: float


def read_boundary_settings(args, index):
    """The [`Boundary`] that the flags and the configs of the base model make; `index` is its model_index.json. Raises
    `ValueError` if the model cannot paint it."""
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
            problem = f"`--{name} {value}` must be a multiple of {multiple} for this model"
            raise ValueError(f"{problem}, for example {max(1, round(value / multiple)) * multiple}.")
    settings = {name: getattr(args, name) for name in BOUNDARY_SETTINGS}
    settings["rollout_shift"] = args.rollout_shift or scheduler.get("flow_shift", 1.0)
    schedule = make_scheduler(args.rollout_scheduler, settings["rollout_shift"])
    schedule.set_timesteps(args.sampling_steps)
    if schedule.timesteps[-1] >= 1000 * index["boundary_ratio"]:
        problem = "leaves no noise level below the boundary for the low-noise expert"
        raise ValueError(f"`--sampling_steps {args.sampling_steps}` {problem}; take more.")
    shape = (transformer["in_channels"], 1, args.height // scale, args.width // scale)
    seeds = range(args.seed, args.seed + args.boundary_latents)
    return Boundary(settings, index["boundary_ratio"], shape, seeds, args.boundary_guidance_scale)


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
    """Paints with `WanPipeline` until the first noise level below the boundary. `prompt_embeds` and
    `negative_prompt_embeds` (B, L, D), `noise` (B, C, 1, H, W) float32; returns latents of the shape of the noise, on
    the CPU. Raises `ValueError` if they are not finite."""

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
    """Paints the boundary latents of the captions in `file`, which this process wrote, into `{file}.boundary`.
    `negative_prompt_embeds` (1, L, D) bfloat16 are padded."""
    draws = [torch.randn(boundary.shape, generator=torch.Generator().manual_seed(seed)) for seed in boundary.seeds]
    features = datasets.Features(
        boundary_latents=datasets.Array5D((len(draws), *boundary.shape), "float32"),
        boundary_seeds=datasets.Sequence(datasets.Value("int64")),
        boundary_settings=datasets.Value("string"),
    )
    constant = {"boundary_seeds": [*boundary.seeds], "boundary_settings": json.dumps(boundary.settings)}
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


def move_into_place(output_dir):
    """Moves a dataset that is complete out of its folder in `output_dir`, in place of the one before, and returns
    whether there was one. If that is interrupted, it can be called again; until it ends, `datasets` finds none there.
    Files that this script did not write stay."""
    complete, moving = output_dir / COMPLETE, output_dir / MOVING
    if complete.is_dir():
        for path in [path for pattern in DATASET_FILES for path in output_dir.glob(pattern)]:
            path.unlink()
            with suppress(OSError):  # not empty, such as `output_dir` itself
                path.parent.rmdir()
        complete.rename(moving)
    if found := moving.is_dir():
        for file in sorted(filter(Path.is_file, moving.rglob("*")), key=lambda file: file.name == DICT_FILE):
            target = output_dir / file.relative_to(moving)
            if target.name == MARKER:
                target.write_bytes(file.read_bytes())  # in place, since it is locked
            else:
                target.parent.mkdir(exist_ok=True)
                file.replace(target)
        shutil.rmtree(moving)
    return found


# Copied from train_srpo_wan_t2i.discard
def discard(path):
    """Removes a file or a folder, if there is one. A folder is renamed first: what is left of it never looks whole."""
    if path.is_dir():
        return shutil.rmtree(path.rename(f"{path}.discarded.unfinished"))
    path.unlink(missing_ok=True)


# Copied from train_srpo_wan_t2i.written
@contextmanager
def written(path, size=1e6):
    """A path beside `path` to write a file or folder of about `size` bytes to. If the block succeeds, it is flushed to
    disk and takes the place of `path`, where a link is followed; else it is removed. A full disk ends the program."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    discard(new := path.with_name(f"{path.name}.unfinished"))
    free = shutil.disk_usage(path.parent).free
    full = f"error: the disk is full: `{path}` takes {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB were free"
    if free < size:
        raise SystemExit(full)
    try:
        yield new
        for file in filter(Path.is_file, (new, *new.rglob("*"))):
            file.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
            with file.open("rb") as stream:
                os.fsync(stream)
    except BaseException as error:
        is_full = re.search("No space left|quota|too large", str(error)) or shutil.disk_usage(path.parent).free < 2**20
        discard(new)
        if is_full:
            raise SystemExit(full) from error
        raise
    if path.is_dir():
        discard(path)
    new.replace(path)


# Copied from train_srpo_wan_t2i.claim_output_dir
@contextmanager
def claim_output_dir(folder, size):
    """Makes the output folder and holds its lock, which the kernel releases however the process ends. `ValueError` if
    another holds it, or less than `size` bytes are free. If the marker stays empty, all is as before in the end."""
    marker, made = folder / MARKER, [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    with input_error(f"`--output_dir {folder}` cannot be written, or another run is writing to it; choose another"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = marker.open("a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock:
        for leftover in (*folder.glob("*.unfinished"), *folder.glob("images/*.unfinished")):
            discard(leftover)
        try:
            if (free := shutil.disk_usage(folder).free) < size:
                needs = f"{size / 1e9:.3g} GB, of which {free / 1e9:.3g} GB are free"
                raise ValueError(f"`--output_dir {folder}`: the disk is full: the run needs {needs}.")
            yield
        finally:
            if marker.stat().st_size == 0:
                for remove in (marker.unlink, *(each.rmdir for each in made)):
                    remove()


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


def push_to_hub(repo_id, output_dir, private):
    """Uploads the dataset and its card. Raises `ValueError` that says how to try again; `output_dir` stays whole."""
    private = private or None  # None leaves it to the default of the account or organization
    create = partial(huggingface_hub.create_repo, repo_type="dataset", private=private, exist_ok=True)
    card = {"path_or_fileobj": Path(output_dir, "README.md"), "path_in_repo": "README.md", "repo_type": "dataset"}
    retry = f"datasets.load_from_disk({output_dir!r}).push_to_hub({repo_id!r}, private={private})"
    command = f'python -c "import datasets; {retry}"'
    # No network, no rights, no space: whatever it is, the work is on the disk.
    with input_error(f"`--push_to_hub` failed. The dataset is in {output_dir}; upload it with `{command}`. The cause"):
        repo_id = with_retries(lambda: create(repo_id)).repo_id
        with_retries(lambda: huggingface_hub.upload_file(repo_id=repo_id, **card))
        with_retries(lambda: datasets.load_from_disk(output_dir).push_to_hub(repo_id, private=private))


# ---- Flags, and what is refused before anything is loaded or written. -----------------------------------------------
# Copied from train_srpo_wan_t2i.input_error
@contextmanager
def input_error(cause):
    """Turns whatever is said of bad input into a `ValueError` of one line, not too long, that begins with `cause`."""
    try:
        yield
    except Exception as error:
        message = " ".join(f"{cause}: {error}".split())
        raise ValueError(message if len(message) < 900 else f"{message[:600]} ... {message[-290:]}") from error


# Copied from train_srpo_wan_t2i.one_line_errors
@contextmanager
def one_line_errors():
    """Ends the program with the message of a `ValueError`, without a traceback."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


# Copied from train_srpo_wan_t2i.HelpFormatter
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # no default where there is none, or where the help says it in words
        hidden = action.default is None or action.nargs == 0 or "Default: " in action.help
        return action.help if hidden else super()._get_help_string(action)


# Copied from train_srpo_wan_t2i.number
def number(kind=float, at_least=-math.inf, above=-math.inf, below=2**63):
    """An argparse type: a number of this `kind` within these limits, of which NaN is in none."""

    def convert(text):
        value = kind(text)
        if not (at_least <= value and above < value < below and abs(value) < 2**63):
            limits = {"at least": at_least, "above": above, "below": below}
            words = " and ".join(f"{name} {limit}" for name, limit in limits.items() if abs(limit) < 2**63)
            raise argparse.ArgumentTypeError(f"must be {words or 'finite'}, but is {value}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"  # as argparse names it
    return convert


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description="Embed captions with the text encoder of Wan, once for all training.",
        usage="accelerate launch %(prog)s --pretrained_model_name_or_path M --prompts P --output_dir O "
        "[options, see --help]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    count, positive, guidance = number(int, at_least=1), number(above=0), number(at_least=1)
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
    add("--negative_prompt", default=WAN_NEGATIVE_PROMPT,
        help='The prompt not to guide the image generation; "" for none.')
    add("--max_sequence_length", type=count, default=MAX_SEQUENCE_LENGTH,
        help="Maximum sequence length to use with the text encoder. Longer captions are truncated.")
    add("--batch_size", type=count, default=8, help="Batch size (per device), in captions.")
    add = parser.add_argument_group("boundary latents").add_argument
    add("--boundary_latents", type=count, metavar="K",
        help="Also store, for each caption, K latents that the high-noise expert painted down to its boundary.")
    add("--height", type=count, help="The height in pixels of the images to train on.")
    add("--width", type=count, help="The width in pixels of the images to train on.")
    add("--sampling_steps", type=number(int, at_least=1, below=1001),
        help="The number of denoising steps of a rollout, both experts'.")
    add("--rollout_scheduler", choices=["unipc", "euler"], help="The solver of rollouts.")
    add("--rollout_shift", type=positive, help="Shift of the rollout's schedule. Default: `flow_shift` of the model.")
    add("--boundary_guidance_scale", type=guidance, help="Guidance scale of the high-noise expert.")
    add("--seed", type=number(int, at_least=0, below=2**32),
        help="The seed of the first latent; the next has the next.")
    add("--group_offload", action="store_true",
        help="Keep the expert in host memory and move one block at a time to the GPU, if it has less than 32 GB.")
    parser.set_defaults(**BOUNDARY_DEFAULTS)  # of the flags of this group
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, help="The directory to write the dataset to.")
    add("--overwrite_output_dir", action="store_true",
        help="Replace the dataset there, once the new one is complete.")
    add("--push_to_hub", action="store_true", help="Whether or not to push the dataset to the Hub.")
    add("--hub_dataset_id", help="The name of the dataset to push to. Default: the name of `output_dir`.")
    add("--hub_private_repo", action="store_true", help="Whether to create the repository as private.")
    # fmt: on

    args, unknown = parser.parse_known_args(input_args)
    if unknown:  # without their values, since one may be a token
        names = " ".join(word.split("=")[0] for word in unknown if word.startswith("-")) or "a value without a flag"
        parser.error(f"unknown arguments: {names}. See --help; tokens come from `hf auth login` or HF_TOKEN.")
    check_flags(args, parser)
    return args


def check_flags(args, parser):
    """Refuses flags that are blank, that contradict each other, or that mean nothing beside the others."""
    for name, value in vars(args).items():
        texts = value if isinstance(value, list) else [value]
        is_none = name == "negative_prompt" and value == ""  # an empty negative prompt has a meaning
        if any(isinstance(text, str) and not text.strip() for text in texts) and not is_none:
            parser.error(f"`--{name} {' '.join(texts)}` must not be blank.")
    if args.push_to_hub and not huggingface_hub.get_token():
        parser.error("`--push_to_hub` needs `hf auth login` or HF_TOKEN.")
    suffixes = {Path(source).suffix.lower() for source in (args.prompts, *(args.validation_prompts or ()))}
    is_file = Path(args.prompts).suffix.lower() in (*TEXT_FILES, ".parquet")
    has_columns = not is_file or suffixes & {".json", ".jsonl", ".csv", ".parquet"}
    for pointless, names, why in (
        (args.boundary_latents is None, BOUNDARY_DEFAULTS, "needs `--boundary_latents`"),
        (not args.push_to_hub, ("hub_dataset_id", "hub_private_repo"), "needs `--push_to_hub`"),
        (is_file, ("dataset_split",), "is for datasets; a file has no splits"),
        (not has_columns, ("caption_column",), "is for files and datasets that have columns or keys"),
    ):
        for name in names:
            if pointless and vars(args)[name] != parser.get_default(name):
                parser.error(f"`--{name}` {why}.")


def check_output_dir(args):
    """Refuses to write into a folder that is in use for something else, or that holds an input of this script; and a
    name that the Hub does not take."""
    output, flag = Path(args.output_dir), f"`--output_dir {args.output_dir}`"
    with input_error(f"{flag} cannot be used"):
        found = {path.name for path in output.iterdir()} if output.is_symlink() or output.exists() else set()
    for name in ("pretrained_model_name_or_path", "prompts", "validation_prompts"):
        value = vars(args)[name] or []
        for path in filter(os.path.exists, value if isinstance(value, list) else [value]):
            if output.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
                raise ValueError(f"`--{name} {path}` lies in {flag}. Choose another folder to write to.")
    rest = found - {MARKER, f"{COMPLETE}.unfinished"}  # what a run leaves that is killed before it wrote a dataset
    if found and MARKER not in found or rest and not rest & {DICT_FILE, COMPLETE, MOVING}:
        raise ValueError(f"{flag} is not empty, and not the folder of a dataset of this script. Choose another.")
    if rest and not (args.overwrite_output_dir or rest & {COMPLETE, MOVING}):
        raise ValueError(f"{flag} is not empty. Choose another, or replace its dataset with `--overwrite_output_dir`.")
    if args.push_to_hub:
        with input_error("`--hub_dataset_id`, by default the name of `--output_dir`, cannot name a dataset"):
            huggingface_hub.utils.validate_repo_id(args.hub_dataset_id or output.resolve().name)


def without_hub(name, cause, repo_type="model"):
    """What to say if `name` cannot be read: `cause`, unless it is not here and the Hub does not answer. Then only the
    cache is used from here on, since libraries would ask the Hub again for half a minute for every file."""
    if os.path.exists(name):
        return cause
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=repo_type, timeout=5)
    except huggingface_hub.errors.HFValidationError:
        return cause  # since it is not a name that the Hub takes
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", 500) >= 500:
            huggingface_hub.constants.HF_HUB_OFFLINE = True
            return "is not here, and the Hub cannot be reached"
    return cause


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
    cause = without_hub(path, "is not a Wan pipeline in the layout of diffusers")
    with input_error(f"{model_flag(source)} {cause}"):
        return diffusers.WanPipeline.load_config(**source)


class Inputs(NamedTuple):
    """What the checks read, before anything is loaded or written."""

    prompts: dict[str, list[str]]  # what to embed, by split
    duplicates: dict[str, int]  # how many were dropped, by split
    truncated: list[str]  # the prompts of more than `--max_sequence_length` tokens
    provenance: dict  # the columns that are constant
    boundary: Boundary | None
    two_experts: bool
    size: int  # in bytes, about, of all that is written; twice that of the dataset, which is joined by copying


def check_inputs(args):
    """The [`Inputs`] that the flags name. Raises `ValueError` of one line if anything could not succeed with them."""
    check_output_dir(args)
    prompts, duplicates = {}, {}
    column, cache_dir = args.caption_column, args.cache_dir
    found = load_captions("prompts", args.prompts, column, args.dataset_split, cache_dir)
    (prompts["train"], duplicates["train"]), prompts["negative"] = found, [args.negative_prompt]
    if args.validation_prompts:
        found = load_validation_prompts(args.validation_prompts, column, cache_dir)
        prompts["validation"], duplicates["validation"] = found
    # Will error if the minimal version of diffusers is not installed. Remove at your own risks.
    diffusers.utils.check_min_version("0.40.0")
    index = read_index(source := model_source(args))
    boundary = read_boundary_settings(args, index) if args.boundary_latents else None
    config, fingerprint = check_text_encoder(source)
    texts, tokenizer = sum(prompts.values(), []), load_tokenizer(source)
    with input_error(f"{model_flag(source)}, `tokenizer`"):
        token_ids = tokenize(tokenizer, texts)
        check_tokens(token_ids, texts, config.vocab_size)
    lengths = [min(len(ids), args.max_sequence_length) for ids in token_ids]
    size = 2 * config.d_model * sum(lengths)
    if boundary:
        check_high_noise_expert(source)
        size += 4 * math.prod(boundary.shape) * len(boundary.seeds) * len(prompts["train"])
    provenance = {
        "text_encoder": "@".join(filter(None, [args.pretrained_model_name_or_path, args.revision])),
        "text_encoder_fingerprint": fingerprint,
        "max_sequence_length": args.max_sequence_length,
    }
    truncated = [text for text, ids, length in zip(texts, token_ids, lengths, strict=True) if len(ids) > length]
    two_experts = index.get("transformer_2", [None, None])[1] is not None
    return Inputs(prompts, duplicates, truncated, provenance, boundary, two_experts, 2 * size)


# ---- The run. -------------------------------------------------------------------------------------------------------
def next_command(args, two_experts):
    """The command that trains on the dataset, with every flag in which it must follow `args`."""
    options = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "dataset_name": args.output_dir}
    names = ("revision", "variant", "cache_dir", "max_sequence_length")
    if args.boundary_latents:
        names, options["rollout_start"] = (*names, *BOUNDARY_SETTINGS), "boundary"
    options |= {name: getattr(args, name) for name in names}
    options["transformer_subfolder"] = None if two_experts else "transformer"
    defaults = {"max_sequence_length": MAX_SEQUENCE_LENGTH, **BOUNDARY_DEFAULTS}
    given = {name: value for name, value in options.items() if value != defaults.get(name)}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return shlex.join(["accelerate", "launch", "train_srpo_wan_t2i.py", *words, "--output_dir", "srpo-wan"])


def log_summary(args, inputs, num_processes):
    """Says what was written, and what to do next."""
    size = sum(file.stat().st_size for pattern in DATASET_FILES for file in Path(args.output_dir).glob(pattern))
    logger.info("***** Embedded prompts *****")
    for split, name in (("train", "captions"), ("validation", "validation prompts")):
        if split in inputs.prompts:
            dropped = f"({inputs.duplicates[split]} duplicates dropped)"
            logger.info(f"  Num {name} = {len(inputs.prompts[split])} {dropped}")
    logger.info(f"  Num processes = {num_processes}")
    logger.info(f"  Num truncated = {len(inputs.truncated)}")
    if args.boundary_latents:
        logger.info(f"  Boundary latents = {args.boundary_latents} for each caption")
    logger.info(f"  Dataset = {args.output_dir} ({size / 1e6:.2f} MB)")
    logger.info(f"  Next: {next_command(args, inputs.two_experts)}")


def embed_and_paint(accelerator, args, inputs, folder):
    """Embeds and paints the share of this process into `folder`. Returns what [`embed_share`] does, by split."""
    source, dtype = model_source(args), torch.float32 if args.dtype == "fp32" else torch.bfloat16
    # The text encoder: every process embeds its share of each split.
    pipe = load_pipeline(source, dtype, transformer=None, scheduler=None).to(accelerator.device)
    files = {}
    for split, prompts in inputs.prompts.items():
        files[split] = embed_share(accelerator, pipe, prompts, args.batch_size, inputs.provenance, folder / split)
    # The high-noise expert, in the place of the text encoder, paints the same share of the captions.
    if inputs.boundary:
        del pipe
        pipe = load_high_noise_expert(source, dtype, inputs.boundary, accelerator.device, args.group_offload)
        negative = datasets.Dataset.from_file(files["negative"][0]).with_format("numpy")["prompt_embeds"]
        negative = unpack_prompt_embeds(negative, args.max_sequence_length, torch.bfloat16)
        file = files["train"][accelerator.process_index]
        paint_share(accelerator, pipe, file, negative, inputs.boundary, args.batch_size)
    return files


def begin(args, inputs):
    """Puts what a killed run had completed in its place, and warns of prompts that are too long."""
    if move_into_place(Path(args.output_dir)) and not args.overwrite_output_dir:
        problem = f"`--output_dir {args.output_dir}` held the complete dataset of a run that was killed"
        raise ValueError(f"{problem}. It is in its place now; to replace it, use `--overwrite_output_dir`.")
    if inputs.truncated:
        of_all = f"{len(inputs.truncated)} of {sum(map(len, inputs.prompts.values()))} prompts (all splits)"
        first, limit = reprlib.repr(inputs.truncated[0]), f"`--max_sequence_length {args.max_sequence_length}`"
        logger.warning(f"{of_all}, such as {first}, will be truncated to {limit} tokens.")


def main(args):
    for number in (signal.SIGTERM, signal.SIGINT):  # they end this script as an error does
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    output_dir, complete = Path(args.output_dir), Path(args.output_dir, COMPLETE)
    with one_line_errors(), ExitStack() as held:
        # 1. Refuse what cannot succeed before anything is loaded, and hold the output folder until the end.
        inputs = check_inputs(args)
        accelerator = accelerate.Accelerator()
        logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
        is_main, repo_id = accelerator.is_main_process, args.hub_dataset_id or output_dir.resolve().name
        if is_main:
            held.enter_context(claim_output_dir(output_dir, inputs.size))
            begin(args, inputs)

        # 2. All processes write their shares into one folder.
        unfinished = nullcontext(Path(f"{complete.resolve()}.unfinished"))
        with written(complete, inputs.size) if is_main else unfinished as new:
            shares = new / "shares"
            if is_main:
                for split in inputs.prompts:
                    (shares / split).mkdir(parents=True)
            accelerator.wait_for_everyone()
            files = embed_and_paint(accelerator, args, inputs, shares)
            # 3. The main process joins them. The result takes its place, and is uploaded.
            if is_main:
                dataset = join_files(files, with_boundary=inputs.boundary is not None)
                dataset.save_to_disk(new)
                (new / "README.md").write_text(make_card(dataset, repo_id), encoding="utf-8")
                flags = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
                (new / MARKER).write_text(json.dumps(flags, ensure_ascii=False, indent=1), encoding="utf-8")
                shutil.rmtree(shares)
        if is_main:
            move_into_place(output_dir)
            log_summary(args, inputs, accelerator.num_processes)
            if args.push_to_hub:
                push_to_hub(repo_id, args.output_dir, args.hub_private_repo)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
