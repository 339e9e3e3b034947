"""Models with one expert, like Wan2.2-TI2V-5B, are trained, as a whole or with a LoRA, and exported."""

import torch
from export_checkpoint import main as export
from export_checkpoint import parse_args
from helpers import LORA, file_hashes, load_weights
from PIL import Image

from diffusers import WanPipeline, WanTransformer3DModel


def test_a_model_with_one_expert_is_trained(train, tiny_one_expert_model, one_expert_dataset):
    flags = ["--transformer_subfolder", "transformer", "--height", 64, "--width", 64, "--validation_size", 64]
    inputs = {"model": tiny_one_expert_model, "dataset": one_expert_dataset, "prompts": ["a red cat"]}
    output_dir = train(*flags, "--learning_rate", 0.01, **inputs)
    base, trained = load_weights(tiny_one_expert_model, "transformer"), load_weights(output_dir, "transformer")
    assert [name for name in base if torch.equal(base[name], trained[name])] == []
    WanTransformer3DModel.from_pretrained(output_dir, subfolder="transformer")
    assert not (output_dir / "transformer_2").exists()
    assert Image.open(output_dir / "images/step-2/000-a-red-cat.png").size == (64, 64)
    assert '{"transformer": expert}' in (output_dir / "README.md").read_text()


def test_a_lora_of_a_model_with_one_expert_loads_into_its_transformer(
    train, tiny_one_expert_model, one_expert_dataset
):
    flags = ["--transformer_subfolder", "transformer", "--height", 64, "--width", 64, "--validation_size", 64]
    output_dir = train(*LORA, *flags, model=tiny_one_expert_model, dataset=one_expert_dataset)
    pipe = WanPipeline.from_pretrained(tiny_one_expert_model)
    pipe.load_lora_weights(output_dir)
    assert pipe.transformer.blocks[0].attn1.to_q.scaling == {"default_0": 2.0}


def test_the_other_expert_is_exported_under_its_name(train, tiny_one_expert_model, one_expert_dataset, tmp_path):
    flags = ["--transformer_subfolder", "transformer"]
    folder = train(*flags, model=tiny_one_expert_model, dataset=one_expert_dataset)
    export(parse_args([str(folder / "checkpoint-2"), "--output_dir", str(tmp_path)]))
    assert file_hashes(tmp_path / "transformer") == file_hashes(folder / "transformer")
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]
