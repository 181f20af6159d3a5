"""Text that comes from files, as it is shown: on a terminal, in an error or a warning, in a Markdown card.

A name in a checkpoint may hold what a terminal obeys (escape sequences that erase the line above), what makes a
text read otherwise than it is stored (bidirectional and invisible characters), Markdown, HTML, or a million
letters. Errors, warnings, findings and the command line's consoles pass everything through `one_printable_line`
or `printable`, so that no reader of files has to.
"""

from __future__ import annotations

import re
import textwrap


LONGEST_LINE = 4000  # characters; the longest of this package's own lists of names are half of it
LONGEST_IN_CARD = 300
NO_BREAK = "\N{NO-BREAK SPACE}"  # a space at which `wrapped` does not break

# What is Markdown or HTML anywhere in a line; underscores at a word's end; what begins a list or a rule.
MARKDOWN = re.compile(r"[\\`*\[\]<>&|~$#]|(?<!\w)_+|_+(?!\w)|\A(?:[-+=]|\d+(?=[.)](?:\s|\Z)))")
# Renderers make links of these even where no character of them is Markdown; a space before the last one keeps
# them from it.
ADDRESS = re.compile(r"(?<=:)//|(?<=www)\.|@", re.IGNORECASE)
ENDS_CODE = re.compile(r"[`|<>]")  # inside backticks, in a table or beside a comment of HTML


def printable(text: str, keep: str = "") -> str:
    r"""Write what a terminal obeys or does not show as `repr` writes it: `\x1b`, `\u202e`, `\n`.

    Args:
        keep: characters that stay, such as line breaks.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else _escaped(character)
        for character in text
    )


def one_printable_line(text: str, longest: int = LONGEST_LINE) -> str:
    """Make a text one printable line; of a long one the middle is left out, and the line says so."""
    return printable(shortened(text, longest))


def shortened(text: str, longest: int) -> str:
    """Leave out the middle of a long text: what is wrong stands first in an error, and what to do last."""
    if len(text) <= longest:
        return text
    head, tail = longest * 3 // 4, longest // 4
    return f"{text[:head]} […{len(text) - head - tail:,} characters…] {text[-tail:]}"


def wrapped(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    """Break a text into lines at its spaces alone: a word is never cut, and has a line of its own if need be.

    Args:
        first, others: what the first line and the others begin with.
    """
    lines = textwrap.wrap(
        text,
        max(width, 1),
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(NO_BREAK, " ") for line in lines]


def as_markdown(text: str) -> str:
    """Write a text so that Markdown shows it as it is: no link, picture, heading, table, code or HTML."""
    text = one_printable_line(" ".join(text.split()), LONGEST_IN_CARD)
    text = ADDRESS.sub(r" \g<0>", text)
    return MARKDOWN.sub(lambda match: "".join(f"&#{ord(character)};" for character in match[0]), text)


def as_markdown_code(text: str) -> str:
    """Write a name in backticks; characters that would end them, or a table's cell, are written as in `repr`."""
    text = one_printable_line(text, LONGEST_IN_CARD)
    return f"`{ENDS_CODE.sub(lambda match: _escaped(match[0]), text)}`"


def _escaped(character: str) -> str:
    escaped = character.encode("unicode_escape").decode("ascii")
    return escaped if escaped != character else f"\\x{ord(character):02x}"
