"""The faults of tests/planted.py can still be planted: it would be found out too late that it plants nothing."""

import re

import planted
import pytest
from helpers import ROOT


@pytest.mark.parametrize("fault", planted.FAULTS, ids=lambda fault: fault.what)
def test_the_line_of_a_fault_is_in_its_file_exactly_once(fault):
    _, found = fault.lines(ROOT)
    assert len(found) == 1
    assert fault.new not in (fault.old, "")


@pytest.mark.parametrize("fault", planted.FAULTS, ids=lambda fault: fault.what)
def test_the_tests_that_should_see_a_fault_are_there(fault):
    assert fault.tests
    for test in fault.tests:
        file, name = test.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)


def test_there_are_twelve_faults():
    assert len({fault.new for fault in planted.FAULTS}) == 12
