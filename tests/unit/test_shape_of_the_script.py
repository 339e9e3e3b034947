"""
The shape of the scripts: one file that is read in one sitting, in the order of an update, of short functions, of which
few know the flags. Whoever goes beyond a limit shortens something else.
"""

import ast
import re

import pytest
from helpers import ROOT


TRAINER = ROOT / "train_srpo_wan_t2i.py"
SCRIPTS = [TRAINER, ROOT / "embed_prompts.py", *sorted((ROOT / "scripts").glob("*.py"))]
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef

LINES = 1850
LINES_OF_1_TO_7 = 820
LINES_OF_SECTIONS = {8: 130, 9: 140, 10: 300, 11: 420, 12: 320}
FUNCTIONS_THAT_KNOW_ALL_FLAGS = 12


def functions(path):
    """The functions and methods in a script, those inside others too."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, FUNCTION)]


def length(node):
    """In lines, without decorators."""
    return node.end_lineno - node.lineno + 1


def parameters(function):
    """The names of the parameters, without `self`."""
    given = function.args
    all_of_them = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [each.arg for each in all_of_them if each is not None and each.arg not in ("self", "cls")]


def function(name):
    """A function of the trainer."""
    (found,) = (each for each in functions(TRAINER) if each.name == name)
    return found


def sections():
    """{number: (first line, first line of the next)} of the trainer. The first, up to heading 2, has no heading."""
    lines = TRAINER.read_text().splitlines()
    starts = {1: 1}
    for number, line in enumerate(lines, start=1):
        if line.startswith("# ----"):
            starts[int(re.fullmatch(r"# ---- (\d+)\. \S.*\S -+", line).group(1))] = number
    ends = [*list(starts.values())[1:], len(lines) + 1]
    return {section: (start, end) for (section, start), end in zip(starts.items(), ends, strict=True)}


# ---- The trainer. ---------------------------------------------------------------------------------------------------


def test_the_trainer_has_at_most_1850_lines():
    assert len(TRAINER.read_text().splitlines()) <= LINES


def test_sections_are_numbered_from_1_to_12_and_follow_each_other():
    assert list(sections()) == list(range(1, 13))


def test_headings_are_as_wide_as_a_line():
    headings = [line for line in TRAINER.read_text().splitlines() if line.startswith("# ----")]
    assert {len(line) for line in headings} == {119}


def test_the_method_in_sections_1_to_7_is_short():
    assert sections()[8][0] - 1 <= LINES_OF_1_TO_7


@pytest.mark.parametrize("number, limit", LINES_OF_SECTIONS.items())
def test_a_section_keeps_its_size(number, limit):
    start, end = sections()[number]
    assert end - start <= limit


def test_only_few_functions_and_only_of_the_last_two_sections_know_all_flags():
    know = {each.name: each.lineno for each in functions(TRAINER) if "args" in parameters(each)}
    assert {name for name, line in know.items() if line < sections()[11][0]} == set()
    assert len(know) <= FUNCTIONS_THAT_KNOW_ALL_FLAGS


def test_main_has_at_most_120_lines():
    assert length(function("main")) <= 120


def test_the_body_of_the_loop_has_at_most_40_lines():
    loop = max((node for node in ast.walk(function("main")) if isinstance(node, ast.For)), key=length)
    assert loop.body[-1].end_lineno - loop.lineno <= 40


def test_the_graded_pass_has_at_most_4_parameters():
    assert len(parameters(function("graded_pass"))) <= 4


def test_main_unpacks_no_zip():
    calls = [node for node in ast.walk(function("main")) if isinstance(node, ast.Call)]
    unpacked = [
        ast.unparse(call)
        for call in calls
        if getattr(call.func, "id", None) == "zip" and any(isinstance(each, ast.Starred) for each in call.args)
    ]
    assert unpacked == []


# ---- All scripts. ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_functions_have_at_most_50_lines_but_for_the_list_of_flags(path):
    long = {each.name: length(each) for each in functions(path) if each.name != "parse_args" and length(each) > 50}
    if path == TRAINER:
        long.pop("main", None)  # see above
    assert long == {}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_functions_have_at_most_6_parameters(path):
    assert {each.name: parameters(each) for each in functions(path) if len(parameters(each)) > 6} == {}
