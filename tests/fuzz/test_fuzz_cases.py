"""What fuzzing found, once more: each kept input ends well, or with an error that is written for the user."""

from pathlib import Path

import pytest

from fuzz.targets import EVERY_KIND, TARGETS, run_input


CASES = sorted(Path(__file__).with_name("cases").iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kept_input_ends_well(case):
    assert run_input(case.read_bytes(), EVERY_KIND) is not None


def test_every_target_has_its_share():
    assert sum(target.share for target in TARGETS.values()) == 1000
    assert min(target.share for target in TARGETS.values()) >= 50
