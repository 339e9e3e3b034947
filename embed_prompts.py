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

The last three columns are constant on purpose: columns survive `push_to_hub`, `concatenate_datasets` and `filter`,
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
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Array2D, Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import create_repo, get_token, upload_file
from tqdm.auto import tqdm

from diffusers import WanPipeline
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
    parser.add_argument("--batch_size", type=int, default=8, help="Batch size (per device) for the text encoder.")
    parser.add_argument(
        "--dtype", type=str, default="bf16", choices=["bf16", "fp32"], help="The dtype to run the text encoder in."
    )
    parser.add_argument("--cache_dir", type=str, default=None, help="Where downloaded models and datasets are stored.")
    parser.add_argument("--push_to_hub", action="store_true", help="Whether or not to push the dataset to the Hub.")
    parser.add_argument("--hub_token", type=str, default=None, help="The token to use to push to the Hub.")
    parser.add_argument(
        "--hub_dataset_id", type=str, default=None, help="The dataset to push to. Default: the name of `--output_dir`."
    )
    parser.add_argument("--hub_private_repo", action="store_true", help="Create the dataset on the Hub as private.")
    return parser.parse_args(input_args)


def check_args(args):
    """Refuse, before anything is loaded or written, what could not succeed. Raises SystemExit with one line."""
    for flag in ("max_sequence_length", "batch_size"):
        if getattr(args, flag) < 1:
            raise SystemExit(f"`--{flag}` must be at least 1, not {getattr(args, flag)}.")

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


def load_text_encoder(args):
    """Load a WanPipeline of a tokenizer and a text encoder; its other parts are neither downloaded nor loaded."""
    try:
        return WanPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            transformer=None,
            transformer_2=None,
            vae=None,
            scheduler=None,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            dtype=torch.float32 if args.dtype == "fp32" else torch.bfloat16,
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

    accelerator = Accelerator()
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)

    # 1. The text encoder, and what every row says about it.
    pipe = load_text_encoder(args).to(accelerator.device)
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
    accelerator.wait_for_everyone()

    # 4. The main process joins the files, which lie in the order of the captions, and moves the result in place.
    if accelerator.is_main_process:
        (negative,) = embed(pipe, [args.negative_prompt], args.max_sequence_length)
        negative = {"caption": args.negative_prompt, "prompt_embeds": negative, **provenance}
        dataset = DatasetDict(
            train=concatenate_datasets([Dataset.from_file(shard) for shard in shards]),
            negative=Dataset.from_list([negative], features=features),
        )
        repo_id = args.hub_dataset_id or output_dir.name
        card = DATASET_CARD.format(num_captions=len(captions), text_dim=text_dim, repo_id=repo_id, **provenance)
        save_dataset(dataset, card, partial_dir, output_dir)

        size = sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())
        logger.info("***** Embedded prompts *****")
        logger.info(f"  Num captions = {len(captions)} ({num_duplicates} duplicates dropped)")
        logger.info(f"  Num processes = {accelerator.num_processes}")
        logger.info(f"  Num truncated = {num_truncated}")
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
