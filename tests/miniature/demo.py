"""
The main job on the miniature, on a CPU: embed captions, train `transformer_2` with SRPO, load the result into
diffusers' own pipeline, and let the judge count what changed. `make demo` runs it.

    python tests/miniature/demo.py --output_dir outputs/demo
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from build import sample

from diffusers import WanPipeline, WanTransformer3DModel

from drawings import GUIDANCE_SCALE, MAX_SEQUENCE_LENGTH, caption_accuracy, captions, shape_fidelity, style_share


HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# The denoise branch alone, drawn to the positive words twice as strongly, keeps the captions best on this model, and
# the drift term keeps the shapes (`benchmarks/effect.py --drift`). All that is not named is the trainer's default, the
# published settings; tests/run/test_method.py trains with those.
TRAINING = f"""
    --reward_model CLIP --height 64 --width 64 --validation_size 64
    --branches denoise --discount_pos 1 1 --reward_margin 1.05 --noise per_sample
    --max_train_steps 32 --train_batch_size 16 --learning_rate 8e-5 --drift_weight 0.1
    --sampling_steps 12 --rollout_guidance_scale {GUIDANCE_SCALE} --validation_guidance_scale {GUIDANCE_SCALE}
    --validation_steps 16 --checkpointing_steps 16 --checkpoints_total_limit 1
"""
IMAGES_PER_CAPTION = 2


def run(*command):
    """Shows a command as a user would type it and runs it from the root of the repository."""
    print("\n$", shlex.join(map(str, command)), flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def judge(transformer_2):
    """What the judge sees in images by an expert alone, painted by diffusers' own pipeline from the same noise."""
    pipeline = WanPipeline.from_pretrained(
        HERE / "model", transformer=None, transformer_2=transformer_2, boundary_ratio=1.0, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    prompts = captions() * IMAGES_PER_CAPTION
    images = sample(pipeline, prompts)
    return {
        "real_style_share": style_share(images, "real"),
        "caption_accuracy": caption_accuracy(images, prompts),
        "shape_fidelity": shape_fidelity(images, prompts),
    }


def main(output_dir):
    data = output_dir.with_name(f"{output_dir.name}_data")  # a run owns its folder
    data.mkdir(parents=True, exist_ok=True)
    prompts, embeddings = data / "prompts.yaml", data / "prompt_embeds"
    prompts.write_text(yaml.safe_dump({"prompts": captions()}))
    base = ["--pretrained_model_name_or_path", HERE / "model", "--max_sequence_length", MAX_SEQUENCE_LENGTH]
    run("embed_prompts.py", *base, "--prompts", prompts, "--output_dir", embeddings, "--overwrite_output_dir")

    launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    launch += ["--num_cpu_threads_per_process", 1]  # two would wait for each other on a busy machine
    paths = ["--dataset_name", embeddings, "--reward_model_path", HERE / "reward"]
    started = time.perf_counter()
    output = ["--output_dir", output_dir, "--overwrite_output_dir"]
    validation = ["--validation_prompts", *captions()[::14]]
    run(*launch, "train_srpo_wan_t2i.py", *base, *paths, *output, *shlex.split(TRAINING), *validation)
    seconds = time.perf_counter() - started

    print("\nJudging the base and the trained model in WanPipeline ...", flush=True)
    experts = {
        "before": WanTransformer3DModel.from_pretrained(HERE / "model", subfolder="transformer_2"),
        "after": WanTransformer3DModel.from_pretrained(output_dir, subfolder="transformer_2"),
    }
    verdicts = {when: judge(expert) for when, expert in experts.items()}
    names = verdicts["before"]
    report = {f"{name}_{when}": verdicts[when][name] for name in names for when in ("before", "after")}
    report["train_seconds"] = round(seconds, 1)
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")

    print(f"\n{'':20}{'before':>8}{'after':>8}")
    for name in names:
        print(f"{name:20}{report[f'{name}_before']:8.3f}{report[f'{name}_after']:8.3f}")
    print(f"{'train_seconds':20}{report['train_seconds']:16.1f}")
    print(f"\nLook at {output_dir / 'before_after.png'} and {output_dir / 'reward.png'}.")
    print(f"The trained expert is in {output_dir / 'transformer_2'}, the figures in {output_dir / 'report.json'}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "demo", help="Where results go.")
    main(parser.parse_args().output_dir.resolve())
