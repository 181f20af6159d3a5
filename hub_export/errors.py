"""User errors (exit 2) and failures (exit 1), and the warning that stops nothing.

An error's text is one printable line: what is wrong, where (file, key, layer), and what to do about it. Names in
it may come from any file, and Python itself writes an exception or a warning to the terminal: so both are filtered
where they are made.
"""

from __future__ import annotations

from collections.abc import Sequence

from .shown_text import one_printable_line


class DyloraMoeError(Exception):
    """Base of the errors that are written for the user. `exit_code` is what the command line ends with."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(one_printable_line(" ".join(str(message).split())))


class InputError(DyloraMoeError, ValueError):
    """What was given cannot be used: a wrong option, a damaged or unknown folder. Exit code 2."""

    exit_code = 2


class FailureError(DyloraMoeError, RuntimeError):
    """The input was right, and the work failed: a full disk, a check that found a difference. Exit code 1."""

    exit_code = 1


class DyloraMoeWarning(UserWarning):
    """Something the user should know that does not stop the work."""

    def __init__(self, message: str):
        super().__init__(one_printable_line(" ".join(str(message).split())))


def one_line(error: BaseException, limit: int = 300) -> str:
    """Shorten another library's error to its first line, for use inside one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.endswith(":") and len(lines) > 1:  # and what it announces
        text = f"{text} {lines[1]}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def few(names: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """Join names for a message: the first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
