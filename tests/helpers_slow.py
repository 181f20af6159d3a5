"""Matrices of cases of which `make test` runs a few, and `make test-slow` all the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(*quick: Any, of: Iterable[Any]) -> list[Any]:
    """Return all cases as parameters, marked slow but for the quick ones, which must be among them."""
    cases = list(of)
    missing = [case for case in quick if case not in cases]
    assert not missing, f"{missing} are no cases of {cases}"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
