"""What becomes of an output folder that an earlier run wrote to."""

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


def test_overwrite_output_dir_removes_what_an_earlier_run_wrote_and_nothing_else(train, tmp_path):
    train("--max_train_steps", 3, "--checkpointing_steps", 1, output_dir=tmp_path, prompts=["a boat"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine too")
    train("--overwrite_output_dir", output_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "checkpoint-2",
        "mine",
        "notes.txt",
        "reward.png",
        "train.log",
        "transformer_2",
    ]
    assert read_log(tmp_path).count("***** Running training *****") == 1


def test_a_resumed_run_adds_to_the_log(train, tmp_path):
    train(output_dir=tmp_path)
    train("--max_train_steps", 3, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert read_log(tmp_path).count("***** Running training *****") == 2
