"""`--optimizer adamw_8bit`: AdamW with states of 8 bits, and bfloat16 weights that are rounded stochastically."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import distance, load_history, load_state, load_weights, logged, make_transformer, repeatable, same_bits


EIGHT_BIT = ["--optimizer", "adamw_8bit"]


@pytest.fixture(scope="module")
def wide_model(tiny_model, tmp_path_factory):
    """The tiny model with a wider expert: torchao keeps the states of tensors below 4096 elements in full."""
    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("wide") / "model"))
    torch.manual_seed(3)
    transformer = make_transformer(num_attention_heads=4, attention_head_dim=16, ffn_dim=128)
    transformer.save_pretrained(model / "transformer_2")
    return model


@pytest.fixture(scope="module")
def train_wide(train, wide_model):
    """Function: runs the script on the wide model, without the minute that torchao's compiling takes."""
    pytest.importorskip("torchao")

    def run(*flags, **inputs):
        with torch.compiler.set_stance("force_eager"):
            return train(*flags, model=wide_model, **inputs)

    return run


@pytest.fixture(scope="module")
def eight_bit_run(train_wide):
    return train_wide(*EIGHT_BIT, "--max_train_steps", 4)


@pytest.fixture(scope="module")
def full_run(train_wide):
    return train_wide("--max_train_steps", 4)


def load_states(output_dir, step=2):
    """The state of the optimizer, by parameter."""
    return torch.load(Path(output_dir, f"checkpoint-{step}", "optimizer.bin"), weights_only=False)["state"]


def join(weights, names):
    """All weights as one vector, in the order of `names`."""
    return torch.cat([weights[name].double().flatten() for name in names])


def test_the_states_of_large_weights_have_8_bits(eight_bit_run):
    states = load_states(eight_bit_run).values()
    large = [state for state in states if state["exp_avg"].numel() >= 4096]
    assert len(large) == 2 * 10 + 3, "all layers of the blocks, and three that embed timesteps and captions"
    for state in large:
        assert state["exp_avg"].codes.dtype == state["exp_avg_sq"].codes.dtype == torch.uint8


def test_every_weight_is_trained(eight_bit_run, wide_model):
    base, trained = load_weights(wide_model), load_weights(eight_bit_run)
    assert [name for name in base if torch.equal(base[name], trained[name])] == []


def test_the_result_is_close_to_that_of_adamw(eight_bit_run, full_run, wide_model):
    base, weights, expected = (load_weights(folder) for folder in (wide_model, eight_bit_run, full_run))
    # The first update is the same but for rounding: states are rounded after they are used.
    assert logged(eight_bit_run, "loss", 4)[:2] == pytest.approx(logged(full_run, "loss", 4)[:2], abs=1e-6)
    assert logged(eight_bit_run, "loss", 4) == pytest.approx(logged(full_run, "loss", 4), abs=1e-4)
    assert 0 < distance(weights, expected) < 0.03 * distance(expected, base)


def test_the_learning_rate_follows_its_schedule(train_wide, wide_model):
    flags = ["--checkpointing_steps", 1, "--lr_scheduler", "linear", "--lr_warmup_steps", 1, "--learning_rate", 0.01]
    base, updates = load_weights(wide_model), []
    for optimizer in (EIGHT_BIT, []):
        output_dir = train_wide(*optimizer, *flags, "--max_train_steps", 3)
        assert logged(output_dir, "lr", step=3) == pytest.approx([0, 0.01, 0.005])
        weights = [base, *(load_state(output_dir, step) for step in (1, 2, 3))]
        updates.append([distance(new, old) for old, new in zip(weights[:-1], weights[1:], strict=True)])
    assert updates[0][0] == updates[1][0] == 0
    assert updates[0] == pytest.approx(updates[1], rel=0.02)


@pytest.mark.parametrize("name, value", [("adam_beta1", 0.5), ("adam_beta2", 0.9), ("adam_epsilon", 1)])
def test_flags_of_adam_reach_it(train_wide, eight_bit_run, name, value):
    output_dir = train_wide(*EIGHT_BIT, f"--{name}", value)
    assert not same_bits(load_state(output_dir), load_state(eight_bit_run))


def test_weight_decay_shrinks_the_weights(train_wide, wide_model):
    flags = ["--max_grad_norm", 1e-30, "--learning_rate", 0.1, "--adam_weight_decay", 0.5]  # 0.95 in each step
    decayed, base = load_weights(train_wide(*EIGHT_BIT, *flags)), load_weights(wide_model)
    torch.testing.assert_close(decayed, {name: tensor * 0.9025 for name, tensor in base.items()})


@pytest.mark.parametrize(
    "flags, mixed_precision",
    [
        pytest.param("", "no", marks=pytest.mark.slow),
        ("", "bf16"),
        pytest.param("--lora_rank 64 --lora_dropout 0.5", "no", marks=pytest.mark.slow),
        pytest.param("--lora_rank 64 --lora_dropout 0.5", "bf16", marks=pytest.mark.slow),
    ],
)
def test_two_updates_and_two_more_are_four_bit_for_bit(train_wide, flags, mixed_precision):
    flags, precision = [*EIGHT_BIT, *flags.split()], {"mixed_precision": mixed_precision}
    whole = train_wide(*flags, "--max_train_steps", 4, **precision)
    output_dir = train_wide(*flags, **precision)
    more = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    train_wide(*flags, *more, output_dir=output_dir, **precision)
    assert same_bits(load_state(output_dir, 4), load_state(whole, 4))
    assert repeatable(load_history(output_dir, 4)) == repeatable(load_history(whole, 4))


@pytest.fixture(scope="module")
def small_steps(train_wide, wide_model):
    """
    Two updates with a learning rate of 5e-6 from weights in bfloat16, as vectors of all weights that are not 0:
    the weights before, the update that AdamW makes of them in float32, and the one that adamw_8bit makes in bfloat16.
    """
    flags = ["--learning_rate", 5e-6, "--adam_weight_decay", 0]
    exact, rounded = (train_wide(*flags, *more, mixed_precision="bf16") for more in ([], EIGHT_BIT))
    assert load_state(rounded)["blocks.0.ffn.net.0.proj.weight"].dtype == torch.bfloat16
    base = load_weights(wide_model)
    names = [name for name, tensor in load_state(rounded).items() if tensor.dtype == torch.bfloat16]
    before = join(base, names)
    start = before.bfloat16().double()
    kept = start != 0  # biases begin at 0, where every step counts
    return (
        start[kept],
        (join(load_state(exact), names) - before)[kept],
        (join(load_state(rounded), names) - start)[kept],
    )


def test_small_updates_of_bfloat16_weights_are_not_lost_on_average(small_steps):
    _, expected, update = small_steps
    assert (update @ expected) / (expected @ expected) == pytest.approx(1, abs=0.1)
    assert 0.05 < (update != 0).double().mean() < 0.2, "a tenth of the weights moves, by a hundred times as much"


def test_rounding_to_the_nearest_would_lose_them(small_steps):
    start, expected, _ = small_steps
    update = (start + expected).bfloat16().double() - start
    assert (update @ expected) / (expected @ expected) < 0.06
    assert (update != 0).double().mean() < 0.04


def test_mixed_precision_keeps_the_states_and_the_weights_small(train_wide):
    output_dir = train_wide(*EIGHT_BIT, mixed_precision="bf16")
    state = load_state(output_dir)
    layers = [name for name in state if re.search(r"^blocks\..*\.(to_[qkv]|to_out\.0|proj|net\.2)\.", name)]
    assert len(layers) == 2 * 10 * 2, "blocks, layers, weights and biases"
    assert {state[name].dtype for name in layers} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_weights(output_dir).values()} == {torch.bfloat16}


@pytest.mark.parametrize("mixed_precision", [pytest.param("no", marks=pytest.mark.slow), "bf16"])
def test_a_lora_is_trained_in_float32(train_wide, mixed_precision):
    runs = [train_wide("--lora_rank", 64, *flags, mixed_precision=mixed_precision) for flags in (EIGHT_BIT, [])]
    eight_bit, full = (load_state(run) for run in runs)
    assert {tensor.dtype for tensor in eight_bit.values()} == {torch.float32}
    states = load_states(runs[0]).values()
    assert {state["exp_avg"].codes.dtype for state in states} == {torch.uint8}
    b = [name for name in full if "lora_B" in name]  # it begins at 0
    assert (join(eight_bit, b) - join(full, b)).norm() < 0.05 * join(full, b).norm()
