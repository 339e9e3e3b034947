"""
What test files share: random models of real classes at tiny sizes, runs of the training script in this process and in
others, and readers of what they wrote.
"""

import hashlib
import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import NamedTuple


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything that reads it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: they share few cores
# What DeepSpeed and PyTorch compile, for a minute each, and would compile again if another copy used the same folder.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "torch_extensions"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "torch_inductor"))

import psutil
import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_simple_launcher_cmd_env
from datasets import load_from_disk
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel
from transformers.integrations import unset_hf_deepspeed_config

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel


torch.set_num_threads(1)  # tensors are tiny, and results must not depend on the machine

ROOT = Path(__file__).parent.parent
MINIATURE = ROOT / "tests" / "miniature"

# Flags of `accelerate launch`; port 0 is any free one.
CPU = "--config_file accelerate_configs/cpu.yaml"
ZERO_2 = "--config_file accelerate_configs/a100x8.yaml --num_processes 1 --main_process_port 0"
TWO_RANKS = "--config_file accelerate_configs/a100x8.yaml --num_processes 2 --main_process_port 0"
# `--cpu --num_processes 2` would start one process unless there is MPI; this way, with ACCELERATE_USE_CPU, it is two.
TWO_PROCESSES = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --dynamo_backend no"
ENGINES = ["zero2", "zero2_offload", "zero2_bf16", "zero3", "zero3_offload"]  # of ds_configs/

WORDS = ["a", "red", "blue", "cat", "dog", "boat", "on"]  # one token each; a prompt ends with one more, </s>
CAPTIONS = ["a red cat", "a blue dog", "a boat", "a red boat on a blue cat", "a cat on a boat", "a dog"]
PROMPTS = ["a red cat", "a blue dog on a boat", "cat", "a boat", "a red boat on a cat"]  # of 3, 6, 1, 2 and 6 tokens
LATENTS_MEAN, LATENTS_STD = [0.1, -0.2, 0.3, -0.4], [1.5, 0.5, 2.0, 1.25]
MEASURED = {"seconds", "images_per_second", "peak_memory_gb"}  # what no two runs share

# A tiny run of two updates without validation and events; the learning rate is large enough to see.
QUICK = (
    "--height 32 --width 32 --validation_size 32 --sampling_steps 2 --max_train_steps 2 --checkpointing_steps 2 "
    "--learning_rate 1e-3 --report_to none"
).split()

# Three latents of each caption for such a run to start from; each expert has one step.
SMALL = "--height 32 --width 32 --sampling_steps 2".split()
BOUNDARY_FLAGS = [*SMALL, "--boundary_latents", 3, "--seed", 7, "--batch_size", 4]

LORA = ["--lora_rank", 4, "--lora_alpha", 8]  # a scale of 8 / 4 = 2

TRAINING_SCALARS = {
    "loss",
    "score",
    "score_denoise",
    "score_inversion",
    "reward_positive",
    "reward_negative",
    "saturated",
    "grad_norm",
    "lr",
    "sigma",
    "seconds",
    "images_per_second",
    "peak_memory_gb",
}
VALIDATION_SCALARS = {"validation_reward", "validation_relative"}


# ---- Running the scripts. -------------------------------------------------------------------------------------------


@contextmanager
def fresh_state():
    """Accelerate knows nothing of what ran in this process before, and later runs nothing of what runs now."""
    handlers = set(logging.getLogger().handlers)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for handler in set(logging.getLogger().handlers) - handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()


def run_in_process(*flags, mixed_precision="no"):
    """Runs the training script in this process, as `accelerate launch` with accelerate_configs/cpu.yaml would."""
    from train_srpo_wan_t2i import main, parse_args

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("ACCELERATE_MIXED_PRECISION", mixed_precision)
        with fresh_state():
            main(parse_args([str(flag) for flag in flags]))


@contextmanager
def launched(*flags):
    """What `accelerate launch` with these flags prepares for the only process of a run, here for this process."""

    def take_environment(prepare, **rendezvous):
        def launcher(args):
            for name, value in {**prepare(args)[1], **rendezvous}.items():
                patch.setenv(name, value)

        return launcher

    one_process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # configurations name their DeepSpeed files relative to it
        deepspeed_launcher = take_environment(prepare_deepspeed_cmd_env, **one_process)
        patch.setattr("accelerate.commands.launch.deepspeed_launcher", deepspeed_launcher)
        patch.setattr("accelerate.commands.launch.simple_launcher", take_environment(prepare_simple_launcher_cmd_env))
        launch_command(launch_command_parser().parse_args([*map(str, flags), "train_srpo_wan_t2i.py"]))
        with fresh_state():
            try:
                yield
            finally:
                unset_hf_deepspeed_config()
                if torch.distributed.is_initialized():
                    import deepspeed

                    torch.distributed.destroy_process_group()
                    deepspeed.comm.comm.cdb = None


def run_launched(answer, launcher, flags):
    """Runs the training script, in a process of its own, as `accelerate launch` does with the flags in `launcher`, and
    sends what it ended with: `None`, or the message or number of a `SystemExit`."""
    from train_srpo_wan_t2i import main, parse_args

    try:
        with launched(*launcher.split()):
            main(parse_args(flags))
        answer.send(None)
    except SystemExit as stop:
        answer.send(stop.code)


def run_command(*command, cwd=ROOT, **environment):
    """Runs a command in a new process, without a GPU and without what a launcher says of other processes."""
    rendezvous = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    inherited = {name: value for name, value in os.environ.items() if name not in rendezvous}
    environment = {**inherited, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)


def run_launcher(*flags, **options):
    """Runs a script through `accelerate launch` with flags of the launcher, the script and its own flags."""
    return run_command(sys.executable, "-m", "accelerate.commands.launch", *flags, **options)


def wait_for(condition, process, seconds=180):
    """Waits until something is true of a run that must not end before."""
    for _ in range(10 * seconds):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise TimeoutError(f"not after {seconds} seconds")


def kill(process):
    """Kills a launcher and the processes that it started, all of them at once and without warning."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    process.communicate()


def embed_flags(model, prompts, output_dir, *flags):
    """The command line of `embed_prompts.py`, with a short `--max_sequence_length` unless `flags` say otherwise."""
    paths = ["--pretrained_model_name_or_path", model, "--prompts", prompts, "--output_dir", output_dir]
    return [str(argument) for argument in [*paths, "--max_sequence_length", 16, *flags]]


def run_embed_prompts(*arguments):
    """Runs `embed_prompts.py` in this process with what `embed_flags` takes; returns the dataset."""
    import embed_prompts

    arguments = embed_flags(*arguments)
    embed_prompts.main(embed_prompts.parse_args(arguments))
    return load_from_disk(arguments[arguments.index("--output_dir") + 1])


def embed_refusal(model, prompts, output_dir, *flags):
    """Runs `embed_prompts.py` on what it must refuse; returns the message, one line. Fails if it wrote anything."""
    before, printed = snapshot(output_dir.parent), io.StringIO()
    with pytest.raises(SystemExit) as caught, redirect_stderr(printed):
        run_embed_prompts(model, prompts, output_dir, *flags)
    assert snapshot(output_dir.parent) == before
    if caught.value.code == 2:  # argparse writes the message itself
        return re.search(r"^\S+: error: (.*)\n\Z", printed.getvalue(), re.MULTILINE).group(1)
    assert re.fullmatch("error: .*", caught.value.code), "one line, which makes Python exit with 1"
    return caught.value.code.removeprefix("error: ")


def poison(dataset, caption, folder, bits=0x7FC0):
    """Writes a dataset to `folder` in which the embedding of a caption begins with these bits of bfloat16, NaN unless
    they are others; returns `folder`."""
    splits = load_from_disk(dataset)

    def spoil(row):
        embeds = [[bits, *row["prompt_embeds"][0][1:]], *row["prompt_embeds"][1:]]
        return {"prompt_embeds": embeds} if row["caption"] == caption else row

    splits["train"] = splits["train"].map(spoil)
    splits.save_to_disk(folder)
    return folder


def draw(seed, *shape, dtype=torch.float32):
    """Standard normal numbers, always the same for a seed and a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradient_descent(rate):
    """
    Flags that make gradient descent of AdamW: its epsilon is above every gradient. AdamW itself makes of the smallest
    gradient a step of full size, so it would show the last bits of a sum that has another order.
    """
    return ["--adam_epsilon", 1e4, "--learning_rate", 1e4 * rate, "--adam_weight_decay", 0]


# ---- Reading what they wrote. ---------------------------------------------------------------------------------------


def load_weights(output_dir, expert="transformer_2"):
    return load_file(Path(output_dir, expert, "diffusion_pytorch_model.safetensors"))


def load_lora(output_dir):
    return load_file(Path(output_dir, "pytorch_lora_weights.safetensors"))


def load_state(output_dir, step=2):
    """The weights in a checkpoint, in the precision that they are trained in."""
    return load_file(Path(output_dir, f"checkpoint-{step}", "model.safetensors"))


def checkpoints(output_dir):
    return sorted(path.name for path in Path(output_dir).glob("checkpoint-*"))


def load_history(output_dir, step=2):
    return json.loads(Path(output_dir, f"checkpoint-{step}", "trainer_state.json").read_text())["history"]


def logged(output_dir, name, step=2):
    """The values of a curve, one for each update."""
    return [row[name] for row in load_history(output_dir, step) if name in row]


def load_events(output_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = [
        EventAccumulator(str(path.parent)).Reload()
        for path in Path(output_dir, "logs").rglob("events.out.tfevents.*")
        if path.parent.name == "srpo-wan-t2i"  # its subfolder holds the hyperparameters
    ]
    return events


def repeatable(history):
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in history]


def paint_published(pipeline, caption, index, dataset):
    """Validation image number `index` of a run, (32, 32, 3) in [0, 1], painted as its users do: by a `WanPipeline`."""
    from train_srpo_wan_t2i import VALIDATION, make_generator

    pipeline.text_encoder.bfloat16()  # the type that captions are embedded in
    return pipeline(
        caption,
        negative_prompt=load_from_disk(dataset)["negative"]["caption"][0],
        latents=torch.randn(1, 4, 1, 4, 4, generator=make_generator(42, VALIDATION, index)),
        num_frames=1,
        height=32,
        width=32,
        num_inference_steps=40,
        guidance_scale=3.0,
        max_sequence_length=16,
    ).frames[0, 0]


def read_scores(output_dir, step=0, name="reward"):
    """Of every validation image of a step."""
    return [row[name] for row in json.loads(Path(output_dir, f"images/step-{step}/scores.json").read_text())]


def same_bits(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def distance(weights, others):
    return math.sqrt(sum((weights[name].double() - others[name].double()).square().sum() for name in weights))


def assert_same_update(output_dir, other, base):
    """Of two runs of gradient descent: up to the rounding of weights in float32."""
    update = distance(load_weights(other), load_weights(base))
    assert update > 0.01
    assert distance(load_weights(output_dir), load_weights(other)) < 1e-4 * update


def read_log(output_dir):
    return Path(output_dir, "train.log").read_text()


def file_hashes(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def use_card(output_dir, base, folder, monkeypatch):
    """Runs the code of the card of a run, on the CPU and in `folder`, with the paths of the base model and of the
    output folder in place of their names; returns its variables."""
    from huggingface_hub import ModelCard

    code = re.search(r"```python\n(.*?)```", ModelCard.load(output_dir / "README.md").text, re.DOTALL).group(1)
    monkeypatch.chdir(folder)
    variables = {}
    for name, path in (("base", base), ("trained", output_dir)):
        assert code.count(line := f'{name} = "{path.name}"') == 1
        code = code.replace(line, f'{name} = "{path}"')
    exec(compile(code.replace('.to("cuda")', '.to("cpu")'), "README.md", "exec"), variables)
    return variables


def snapshot(folder):
    """Every path in a folder, with the hash of what a file holds."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def bfloat16(row):
    """The embedding in a row of a dataset."""
    return torch.tensor(row["prompt_embeds"], dtype=torch.int16).view(torch.bfloat16)


def edit_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ---- Watching a run in this process. --------------------------------------------------------------------------------


class Pass(NamedTuple):
    """One forward pass of the transformer."""

    graded: bool  # with a gradient
    training: bool  # some layer is in the mode that drops out
    velocity: torch.Tensor
    transformer: WanTransformer3DModel
    dtypes: dict[str, torch.dtype]  # of the parameters, right after it


@contextmanager
def watch_transformer():
    """A list that grows by a [`Pass`] with every forward pass of a transformer."""
    passes = []

    def watch(module, inputs, output):
        if isinstance(module, WanTransformer3DModel):
            dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
            training = any(layer.training for layer in module.modules())
            passes.append(Pass(torch.is_grad_enabled(), training, output[0].detach().clone(), module, dtypes))

    handle = register_module_forward_hook(watch)
    try:
        yield passes
    finally:
        handle.remove()


def wrap(monkeypatch, owner, name, wrapper):
    """Replaces a function by one that calls `wrapper` with it and with its arguments."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: wrapper(function, *args, **kwargs))


# ---- Tiny models. ---------------------------------------------------------------------------------------------------


def make_text_encoder(vocab_size=10):
    """A random UMT5 encoder, text_dim 16, and a tokenizer of `WORDS`."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    config = UMT5Config(vocab_size=vocab_size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    text_encoder = UMT5EncoderModel(config)
    for parameter in text_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # not the ones of a new layer norm, by which it is identified
    return {"text_encoder": text_encoder, "tokenizer": T5Tokenizer(vocab=vocab, extra_ids=0)}


def make_transformer(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, in_channels=4):
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=num_attention_heads,
        attention_head_dim=attention_head_dim,
        in_channels=in_channels,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=ffn_dim,
        num_layers=2,
    )


def make_vae(**config):
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
        **config,
    )


def make_scheduler(flow_shift):
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def make_text_model(folder, seed, vocab_size=10):
    """Saves a random text encoder and its tokenizer where `WanPipeline` looks for them, and no other part."""
    torch.manual_seed(seed)
    for name, part in make_text_encoder(vocab_size).items():
        part.save_pretrained(folder / name)
    parts = {
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **parts}))
    return folder
