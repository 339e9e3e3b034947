"""What both scripts have: each stays self-contained, so functions are copied, and they stay the same."""

import ast
import re

import pytest
from helpers import ROOT, embed_flags

import embed_prompts
import train_srpo_wan_t2i


SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in ("train_srpo_wan_t2i", "embed_prompts")}
MARK = re.compile(r"# Copied from train_srpo_wan_t2i\.(\w+)$", re.MULTILINE)
COPIED = MARK.findall(SOURCES["embed_prompts"])


def definitions(script):
    """{name: (source with decorators, line before it)} of the functions and classes of a script."""
    lines, found = SOURCES[script].splitlines(), {}
    for node in ast.parse(SOURCES[script]).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno]), lines[first - 2]
    return found


def test_there_are_copied_functions_and_each_mark_stands_above_its_function():
    assert len(COPIED) == len(set(COPIED)) > 5
    assert [name for name, (_, before) in definitions("embed_prompts").items() if MARK.match(before)] == COPIED


@pytest.mark.parametrize("name", COPIED)
def test_a_copied_function_has_the_same_source_in_both_scripts(name):
    assert definitions("embed_prompts")[name][0] == definitions("train_srpo_wan_t2i")[name][0]


def test_what_has_the_same_source_in_both_scripts_is_marked_as_copied():
    ours, theirs = definitions("embed_prompts"), definitions("train_srpo_wan_t2i")
    assert {name for name in ours if name in theirs and ours[name][0] == theirs[name][0]} <= set(COPIED)


@pytest.mark.parametrize(
    "name",
    [
        *("height", "width", "sampling_steps", "rollout_scheduler", "rollout_shift", "max_sequence_length"),
        *("revision", "variant", "cache_dir"),
    ],
)
def test_flags_that_mean_the_same_have_the_same_default(make_args, name):
    embedding = embed_prompts.parse_args(embed_flags("model", "prompts.txt", "out")[:-2])  # without a length
    assert getattr(embedding, name) == getattr(make_args(), name)


@pytest.mark.parametrize("name", ["DIFFUSERS_STEM", "TRANSFORMERS_STEM", "TEXT_ENCODER_LAYER"])
def test_constants_of_the_same_name_are_the_same(name):
    assert getattr(embed_prompts, name) == getattr(train_srpo_wan_t2i, name)


def test_the_settings_of_boundary_latents_have_the_same_names():
    assert embed_prompts.BOUNDARY_SETTINGS == train_srpo_wan_t2i.BOUNDARY_FLAGS
