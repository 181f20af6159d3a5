"""What fuzzing found, once more; and that it begins with folders that are read, so that it changes more than refusals."""

import time
from pathlib import Path

import pytest

from fuzz.inputs import unpack
from fuzz.targets import EVERY_KIND, TARGETS, run_input


CASES = sorted(Path(__file__).with_name("cases").iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kept_input_ends_well(case):
    """It is read, or refused by an error that is written for the user, each time in less than five seconds."""
    run_input(case.read_bytes(), [1])  # makes the target's folder
    started = time.process_time()
    assert run_input(case.read_bytes(), EVERY_KIND) is not None
    assert time.process_time() - started < 5


def test_every_target_has_its_share():
    assert sum(target.share for target in TARGETS.values()) == 1000
    assert min(target.share for target in TARGETS.values()) >= 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_the_first_inputs_are_read(name):
    """None is refused."""
    for data in TARGETS[name].first_inputs():
        for number in (0, *EVERY_KIND):
            TARGETS[name].run(unpack(data)[1], number)
