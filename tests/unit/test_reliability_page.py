"""docs/reliability.md names tests that exist."""

import re

import pytest
from helpers import ROOT


ROWS = re.findall(r"^\| (?!fault |---)(.*) \| (.*) \| `(.*)` \|$", (ROOT / "docs/reliability.md").read_text(), re.M)
BAD_INPUTS = (ROOT / "tests/run/test_bad_inputs.py").read_text()


def test_there_are_at_least_60_faults():
    assert len({fault for fault, _, _ in ROWS}) >= 60


@pytest.mark.parametrize("test", sorted({test for _, _, test in ROWS}))
def test_a_named_test_exists(test):
    if case := re.fullmatch(r"bad_inputs\[(.*)\]", test):
        assert f'("{case.group(1)}"' in BAD_INPUTS
    else:
        file, name = test.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)
