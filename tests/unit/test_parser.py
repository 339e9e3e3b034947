"""What the parser and the checks say of flags alone, before anything is read."""

import importlib.util
import re

import pytest

from diffusers.optimization import SchedulerType

from train_srpo_wan_t2i import check_deepspeed, parse_args


# ---- Defaults, choices and the help. --------------------------------------------------------------------------------


def test_rollouts_take_10_steps_by_default(make_args):
    assert make_args().sampling_steps == 10


@pytest.fixture
def help_texts(capsys):
    """{flag: its help, on one line}"""
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    entries = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    entries = [" ".join(entry.split("\n\n")[0].split()) for entry in entries]  # without the heading of the next group
    entries = [re.sub(r"^-h, ", "", entry) for entry in entries]
    return {re.match(r"--(\w+)", entry).group(1): entry for entry in entries}


def test_help_shows_every_default_once(make_args, help_texts):
    defaults = vars(parse_args(["--pretrained_model_name_or_path", "M", "--dataset_name", "D"]))
    assert help_texts.keys() - {"help"} == defaults.keys()
    in_words = {"positive_words": "the published ones", "negative_words": "the published ones"}
    for name, value in defaults.items():
        shown = re.findall(r"[Dd]efault: ", help_texts[name])
        if name in in_words:
            assert len(shown) == 1 and f"Default: {in_words[name]}" in help_texts[name]
        elif name in ("pretrained_model_name_or_path", "dataset_name") or value is False:
            assert shown == []
        elif value is None:
            assert len(shown) <= 1 and "None" not in help_texts[name]
        else:
            assert len(shown) == 1 and help_texts[name].endswith(f"(default: {value})")


@pytest.mark.parametrize(
    "name, default", [("discount_pos", "[0.1, 0.25]"), ("drift_weight", "0.0"), ("lr_warmup_steps", "0")]
)
def test_help_shows_defaults_of_pairs_and_of_zero(help_texts, name, default):
    assert help_texts[name].endswith(f"(default: {default})")


def test_learning_rates_follow_every_schedule_of_diffusers_but_the_one_that_needs_rules(make_args, help_texts):
    choices = re.search(r"--lr_scheduler \{(.*?)\}", help_texts["lr_scheduler"]).group(1).replace(" ", "").split(",")
    assert set(choices) == {kind.value for kind in SchedulerType} - {"piecewise_constant"}
    for choice in choices:
        assert make_args("--lr_scheduler", choice).lr_scheduler == choice


# ---- Flags that the DeepSpeed file repeats. -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value, flag, wanted",
    [
        ("train_micro_batch_size_per_gpu", 3, "train_batch_size", 2),
        ("gradient_accumulation_steps", 1, "gradient_accumulation_steps", 4),
        ("gradient_clipping", 1.0, "max_grad_norm", 0.1),
        ("train_batch_size", 8, "train_batch_size", 24),  # would suit one process
        ("train_batch_size", 16, "train_batch_size", 24),  # would suit two
    ],
)
def test_a_number_in_the_deepspeed_file_that_is_not_that_of_the_flags(make_args, field, value, flag, wanted):
    args = make_args("--train_batch_size", 2, "--gradient_accumulation_steps", 4)
    with pytest.raises(ValueError) as caught:
        check_deepspeed(args, {field: value}, num_processes=3)
    assert str(caught.value) == (
        f"The DeepSpeed file says `{field}` {value}, but `--{flag}` and 3 processes make it {wanted}. "
        'Write "auto" into the file, or change the flag.'
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"},
        {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"},
        {"train_micro_batch_size_per_gpu": 2},
        {"gradient_accumulation_steps": 4},
        {"gradient_clipping": 0.1},
        {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
    ],
)
def test_a_deepspeed_file_that_agrees_with_the_flags_is_accepted(make_args, config):
    args = make_args("--train_batch_size", 2, "--gradient_accumulation_steps", 4)
    check_deepspeed(args, config, num_processes=3)


@pytest.mark.parametrize("flags, stage", [("--compile", 2), ("", 3)])
def test_compiling_under_zero_2_and_zero_3_without_it_are_accepted(make_args, flags, stage):
    check_deepspeed(make_args(*flags.split()), {"zero_optimization": {"stage": stage}}, num_processes=3)


# ---- AdamW of 8 bits. -----------------------------------------------------------------------------------------------


def test_without_torchao_it_is_refused(make_args, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(SystemExit) as caught:
        make_args("--optimizer", "adamw_8bit")
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("error: `--optimizer adamw_8bit` needs `pip install torchao`.\n")
