"""
The DeepSpeed engines of `ds_configs/`, each on two processes on the CPU: they compute what one process computes, a run
that was killed goes on as if it had not been, and every checkpoint can be exported.
"""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from export_checkpoint import main as export
from export_checkpoint import parse_args as parse_export_args
from helpers import (
    ENGINES,
    ROOT,
    TWO_RANKS,
    checkpoints,
    gradient_descent,
    kill,
    load_history,
    load_weights,
    logged,
    read_log,
    repeatable,
    same_bits,
    wait_for,
)
from safetensors.torch import load_file

from diffusers import WanTransformer3DModel


RUNS = [
    pytest.param(run, marks=() if run == "zero3_offload" else pytest.mark.slow) for run in [*ENGINES, "zero3 and LoRA"]
]
FOUR_STEPS = "--max_train_steps 4 --checkpointing_steps 2 --validation_steps 2 --lr_scheduler linear".split()


def launcher(engine):
    """Flags of `accelerate launch` for two processes of an engine."""
    return f"{TWO_RANKS} --deepspeed_config_file ds_configs/{engine}.json"


def final_weights(output_dir):
    """The tensors that a run saved last, of the expert or of the LoRA."""
    (file,) = [*Path(output_dir).glob("transformer_2/*.safetensors"), *Path(output_dir).glob("*.safetensors")]
    return load_file(file)


def update(output_dir, model):
    """What training changed, as one vector: of the expert, or the second factors of a LoRA, which begin at zero."""
    base = load_weights(model)
    weights = {name: weight for name, weight in final_weights(output_dir).items() if "lora_A" not in name}
    return torch.cat([(weights[name].double() - base.get(name, 0)).flatten() for name in sorted(weights)])


@pytest.fixture(scope="module", params=RUNS)
def runs(request, launch, start, tmp_path_factory):
    """Of one engine: a run of four updates, and one that was killed after two or three of them and then resumed."""
    engine, *lora = request.param.split(" and ")
    flags = [*FOUR_STEPS, *(["--lora_rank", 4] if lora else [])]
    straight = launch(launcher(engine), *flags, prompts=["a red cat", "a boat", "a dog"])

    resumed = tmp_path_factory.mktemp("killed")
    process = start(launcher(engine).split(), resumed, *flags, prompts=["a red cat", "a boat", "a dog"])
    wait_for(lambda: (resumed / "checkpoint-2").exists(), process)
    kill(process)
    assert not (resumed / "README.md").exists(), "it was killed before its end"
    shutil.rmtree(resumed / "checkpoint-4", ignore_errors=True)
    more = [*flags, "--resume_from_checkpoint", "latest"]
    launch(launcher(engine), *more, output_dir=resumed, prompts=["a red cat", "a boat", "a dog"])
    return SimpleNamespace(engine=engine, lora=bool(lora), straight=straight, resumed=resumed)


def test_a_run_paints_saves_and_ends(runs):
    assert checkpoints(runs.straight) == ["checkpoint-2", "checkpoint-4"]
    assert len([*(runs.straight / "images").rglob("*.png")]) == 9
    assert [row["step"] for row in load_history(runs.straight, 4)] == [0, 1, 2, 2, 3, 4, 4]
    assert json.loads((runs.straight / "run.json").read_text())["num_processes"] == 2


def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(runs):
    assert f"Resumed from {runs.resumed}/checkpoint-2 at step 2" in read_log(runs.resumed)
    assert same_bits(final_weights(runs.resumed), final_weights(runs.straight))
    assert repeatable(load_history(runs.resumed, 4)) == repeatable(load_history(runs.straight, 4))


def test_an_exported_checkpoint_is_what_the_run_saved(runs, tmp_path):
    export(parse_export_args([str(runs.straight / "checkpoint-4"), "--output_dir", str(tmp_path / "exported")]))
    assert same_bits(final_weights(tmp_path / "exported"), final_weights(runs.straight))


def test_an_export_of_an_earlier_checkpoint_has_its_weights(runs, tmp_path):
    export(parse_export_args([str(runs.straight / "checkpoint-2"), "--output_dir", str(tmp_path / "exported")]))
    assert not same_bits(final_weights(tmp_path / "exported"), final_weights(runs.straight))
    if not runs.lora:
        WanTransformer3DModel.from_pretrained(tmp_path / "exported", subfolder="transformer_2")


@pytest.fixture(scope="module")
def one_process(train):
    """Function: flags -> four updates of the same batches on one process, in float32."""
    return lambda *flags: train(*FOUR_STEPS, "--train_batch_size", 2, *flags)


def test_the_result_is_that_of_one_process_up_to_bfloat16(runs, one_process, tiny_model):
    expected = one_process(*(["--lora_rank", 4] if runs.lora else []))
    assert logged(runs.straight, "score", 4) == pytest.approx(logged(expected, "score", 4), abs=0.02)
    similarity = torch.cosine_similarity(update(runs.straight, tiny_model), update(expected, tiny_model), dim=0)
    assert similarity > 0.9, "AdamW makes steps of full size of small gradients, whose signs bfloat16 may change"


@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "zero2_bf16"])
def test_in_float32_the_result_is_that_of_one_process(engine, launch, one_process, tiny_model, tmp_path):
    config = json.loads((ROOT / f"ds_configs/{engine}.json").read_text())
    (tmp_path / "float32.json").write_text(json.dumps({**config, "bf16": {"enabled": False}}))
    in_float32 = f"{TWO_RANKS} --deepspeed_config_file {tmp_path / 'float32.json'}"
    descent = [*gradient_descent(1), "--max_grad_norm", 1]
    expected, output_dir = one_process(*descent), launch(in_float32, *FOUR_STEPS, *descent)
    for name in ("loss", "score", "grad_norm"):
        assert logged(output_dir, name, 4) == pytest.approx(logged(expected, name, 4), abs=1e-5)
    assert update(expected, tiny_model).norm() > 0.1
    assert (update(output_dir, tiny_model) - update(expected, tiny_model)).norm() < 1e-5


@pytest.mark.slow
def test_sigterm_finishes_the_update_saves_it_and_says_how_to_go_on(start, launch, tmp_path):
    flags = ["--max_train_steps", 500, "--checkpointing_steps", 500]
    process = start(launcher("zero2").split(), tmp_path, *flags)
    wait_for(lambda: (tmp_path / "train.log").exists() and "step 2: loss" in read_log(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode != 0
    (checkpoint,) = checkpoints(tmp_path)
    step = int(checkpoint.split("-")[1])
    assert f"Stopped by SIGTERM after {step} updates, which are saved." in output
    assert "--resume_from_checkpoint latest" in output
    more = ["--max_train_steps", step + 1, "--resume_from_checkpoint", "latest"]
    launch(launcher("zero2"), *flags, *more, output_dir=tmp_path)
    assert f"Resumed from {tmp_path}/{checkpoint} at step {step}" in read_log(tmp_path)
