"""Regular expressions out of a file that somebody else wrote: only those that surely end soon are used.

PEFT takes keys of `rank_pattern` and `alpha_pattern`, and `target_modules`, as regular expressions. Python
tries the ways in which one can match one after the other, and `(a+)+$` has more of them than anybody can wait
for. So the ways are counted first, from above; the patterns that people write have few.
"""

from __future__ import annotations

import re
from math import comb, inf
from typing import Any

from ..errors import InputError


try:
    from re import _parser as parser
except ImportError:  # before Python 3.11
    import sre_parse as parser

LONGEST_NAME = 100  # of a module, in characters
MOST_WAYS = 1e8
LONGEST_PATTERN = 20_000
ONE_CHARACTER = ("LITERAL", "NOT_LITERAL", "IN", "ANY")


def check_pattern(pattern: str, what: str, prefixed: bool = False) -> None:
    """Refuse what may take forever on names of up to `LONGEST_NAME` characters.

    Args:
        what: where it stands.
        prefixed: whether anything may stand before it, as in PEFT's `rank_pattern`.

    Raises:
        InputError: it is no regular expression, or one of too many ways.
    """
    try:
        steps, runs = _ways(parser.parse(pattern)) if len(pattern) <= LONGEST_PATTERN else (inf, 0)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{what} is no regular expression: {error}") from error
    runs += prefixed
    if (
        steps * comb(LONGEST_NAME + runs, runs) > MOST_WAYS
    ):  # where the runs end is a choice of places in order
        raise InputError(
            f"{what} is {pattern[:80]!r}, a regular expression that may take forever; simplify it"
        )


def _ways(tokens: Any) -> tuple[float, int]:
    """How many ways there are at most apart from the lengths of runs such as `.*`, and how many of these
    follow each other."""
    steps, runs = 1.0, 0
    for kind, value in tokens:
        more, further = _ways_of(str(kind), value)
        steps, runs = steps * more, runs + further
    return steps, runs


def _ways_of(kind: str, value: Any) -> tuple[float, int]:
    if kind in (*ONE_CHARACTER, "AT"):
        return 1, 0
    if kind == "SUBPATTERN":
        return _ways(value[-1])
    if kind == "BRANCH":
        parts = [_ways(branch) for branch in value[1]]
        return _alternatives(value[1], [steps for steps, _ in parts]), max(runs for _, runs in parts)
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        _, most, inside = value
        steps, runs = _ways(inside)
        if most <= 1:
            return 1 + steps, runs
        if len(inside) == 1 and str(inside[0][0]) in ONE_CHARACTER:
            return 1, 1
    if kind in ("ASSERT", "ASSERT_NOT"):
        return _ways(value[1])
    return inf, 0  # a repeated group, a reference back


def _alternatives(branches: list[Any], steps: list[float]) -> float:
    """Of alternatives that start with different characters, one at most can match."""
    by_start: dict[Any, float] = {}
    for branch, count in zip(branches, steps, strict=True):
        literal = len(branch) > 0 and str(branch[0][0]) == "LITERAL"
        start = (
            tuple(token[1] for token in branch) if _is_text(branch) else (branch[0][1],) if literal else ()
        )
        by_start[start] = by_start.get(start, 0) + count
    # texts that another one is the beginning of can both match
    return max(
        sum(count for other, count in by_start.items() if start[: len(other)] == other) for start in by_start
    )


def _is_text(branch: Any) -> bool:
    return len(branch) > 0 and all(str(kind) == "LITERAL" for kind, _ in branch)
