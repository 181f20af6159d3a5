"""Matches names of layers with the regular expressions of an adapter's config, for a limited time.

The keys of PEFT's `rank_pattern` and `alpha_pattern` are regular expressions, and an expression such as `(.*)*x`
tries more ways to match a name than there is time for. Python's `re` cannot be stopped; the package `regex` can.
"""

from __future__ import annotations

import time
from typing import Any

import regex

from ..errors import InputError


TIME_LIMIT = 5.0  # seconds, for all layers of an adapter; a thousand layers take some milliseconds


class NamePatterns:
    """Values by expressions, of which the first that matches the end of a layer's name counts, as in PEFT
    (`peft.utils.get_pattern_key`).

    Args:
        values: expression to value, or None for none.
        what: where the expressions stand, for error messages.

    Raises:
        InputError: one is no regular expression.
    """

    def __init__(self, values: dict[str, Any] | None, what: str):
        self._what = what
        self._seconds = TIME_LIMIT
        self._values = [(key, self._compiled(key), value) for key, value in (values or {}).items()]

    def find(self, name: str, otherwise: Any) -> Any:
        """Give the value for a layer's name.

        Raises:
            InputError: matching takes too long.
        """
        for key, expression, value in self._values:
            if self._matches(key, expression, name):
                return value
        return otherwise

    def _compiled(self, key: str) -> regex.Pattern:
        try:
            return regex.compile(rf"(.*\.)?({key})$")
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise InputError(f"{self._what} is no regular expression: {error}") from error

    def _matches(self, key: str, expression: regex.Pattern, name: str) -> bool:
        started = time.monotonic()
        try:
            return expression.match(name, timeout=max(self._seconds, 0.001)) is not None
        except TimeoutError as error:
            raise InputError(
                f"{self._what} is {key[:80]!r}, a regular expression that takes too long on {name[:80]}; simplify it"
            ) from error
        finally:
            self._seconds -= time.monotonic() - started
