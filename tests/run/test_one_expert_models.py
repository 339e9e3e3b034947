"""Models with one expert, like Wan2.2-TI2V-5B, are trained, as a whole or with a LoRA, and exported."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
from helpers import CAPTIONS, TWO_RANKS, checkpoints, distance, file_hashes, gradient_descent, load_history, load_weights, logged, read_log, read_scores, repeatable, same_bits
from datasets import load_from_disk
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from diffusers import WanPipeline, WanTransformer3DModel
from train_srpo_wan_t2i import NEGATIVE_WORDS, POSITIVE_WORDS, VALIDATION, CLIPReward, ModelInfo, make_generator, save_model_card
from contextlib import contextmanager
from typing import NamedTuple
from helpers import CAPTIONS, checkpoints, distance, file_hashes, gradient_descent, load_history, load_weights, logged, read_log, read_scores, repeatable, same_bits
from torch.nn.modules.module import register_module_forward_hook
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from train_srpo_wan_t2i import VALIDATION, make_generator
import os
from helpers import ROOT, file_hashes, load_weights, same_bits
from export_checkpoint import main, parse_args
from safetensors import safe_open
from helpers import LORA


def test_a_model_with_one_expert_is_trained(train, embed, tiny_one_expert_model):
    dataset = embed(tiny_one_expert_model, CAPTIONS)
    flags = ["--transformer_subfolder", "transformer", "--height", 64, "--width", 64, "--validation_size", 64]
    inputs = {"model": tiny_one_expert_model, "dataset": dataset, "prompts": ["a red cat"]}
    output_dir = train(*flags, "--learning_rate", 0.01, **inputs)
    base, trained = load_weights(tiny_one_expert_model, "transformer"), load_weights(output_dir, "transformer")
    assert [name for name in base if torch.equal(base[name], trained[name])] == []
    WanTransformer3DModel.from_pretrained(output_dir, subfolder="transformer")
    assert not (output_dir / "transformer_2").exists()
    assert Image.open(output_dir / "images/step-2/000-a-red-cat.png").size == (64, 64)
    assert ", transformer=expert, dtype" in (output_dir / "README.md").read_text()


def test_a_lora_of_a_model_with_one_expert_loads_into_its_transformer(train, embed, tiny_one_expert_model):
    flags = ["--transformer_subfolder", "transformer", "--height", 64, "--width", 64, "--validation_size", 64]
    dataset = embed(tiny_one_expert_model, CAPTIONS)
    output_dir = train(*LORA, *flags, model=tiny_one_expert_model, dataset=dataset)
    pipe = WanPipeline.from_pretrained(tiny_one_expert_model)
    pipe.load_lora_weights(output_dir)
    assert pipe.transformer.blocks[0].attn1.to_q.scaling == {"default_0": 2.0}


def test_the_other_expert_is_exported_under_its_name(train, tiny_one_expert_model, embed, tmp_path):
    dataset = embed(tiny_one_expert_model, ["a red cat", "a boat"])
    flags = ["--transformer_subfolder", "transformer"]
    folder = train(*flags, model=tiny_one_expert_model, dataset=dataset)
    export(folder / "checkpoint-2", tmp_path)
    assert file_hashes(tmp_path / "transformer") == file_hashes(folder / "transformer")
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]
