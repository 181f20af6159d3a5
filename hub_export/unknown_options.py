"""Refuses unknown options, and names the known one that each is nearest to."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Self

from .errors import InputError


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that are not known, and say which known one each is nearest to.

    Raises:
        InputError: one of `given` is not among `known`.
    """
    known = sorted(set(known))
    unknown = sorted(set(given) - set(known))
    if not unknown:
        return
    hints = [did_you_mean(name, known) for name in unknown]
    named = [f"{name}{hint}" for name, hint in zip(unknown, hints, strict=True)]
    text = f"unknown option{'s' if len(unknown) > 1 else ''} {', '.join(named)}"
    if not all(hints):
        text += f"; there are {', '.join(known)}"
    raise InputError(text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean router?)` for the known name that is nearest, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def parameter_names(*functions: Callable) -> list[str]:
    """List the parameters of functions by name, without `self` and without `*args` and `**kwargs`."""
    gather = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [
        entry for function in functions for entry in inspect.signature(function).parameters.values()
    ]
    return [entry.name for entry in parameters if entry.kind not in gather and entry.name != "self"]


class NamedOptions:
    """Options of a function as the fields of a dataclass, made from what a caller gave by name."""

    @classmethod
    def of(cls, options: Mapping[str, Any], *functions: Callable) -> Self:
        """Make them from what a caller gave by name, of `functions` beside their own parameters.

        Raises:
            InputError: a name that neither has, or a value that is none of those there are.
        """
        cls.check_names(options, *functions)
        return cls(**options)

    @classmethod
    def check_names(cls, options: Mapping[str, Any], *functions: Callable) -> None:
        """Raise InputError for a name that neither these options nor the parameters of `functions` have."""
        refuse_unknown(options, cls.names() + parameter_names(*functions))

    @classmethod
    def names(cls) -> list[str]:
        """List the names of all options."""
        return [entry.name for entry in fields(cls)]
