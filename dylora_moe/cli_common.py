"""What the commands share: consoles, options, how results and progress are shown."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from dylora_moe.hub_export.shown_text import (
    LONGEST_LINE,
    NO_BREAK,
    one_printable_line,
    printable,
    shortened,
    wrapped,
)
from dylora_moe.hub_export.sources.hub_and_folders import check_source


# option names are written with `_`, as config fields are; `-` is understood as well
CONTEXT_SETTINGS = {
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
}


class PlainConsole(Console):
    """Shows every text as it is stored: no markup in it, no character that the terminal obeys, no endless line.

    A text is one line, whatever it holds; tables, bars and rich's own control codes are as ever.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; on a terminal a long line is wrapped between words, and its other lines are indented."""
        text = objects[0] if len(objects) == 1 else None
        if not self.is_terminal or not isinstance(text, str) or "soft_wrap" in options:
            super().print(*objects, **options)
            return
        for line in wrapped(one_printable_line(text), self.width, others=" " * 2) or [""]:
            super().print(line, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Filter a line or a table's cell before its width is measured."""
        return super().render_str(one_printable_line(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Filter whatever else becomes text: a bar's label, a status."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, keep="\n"))


# A table in a file or a pipe has a width of its own, unless COLUMNS says another.
out = PlainConsole(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 160)
err = PlainConsole(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an exported repo, atomically.")]


def takes_options_of(
    holder: type,
    names: Collection[str] | None = None,
    help: str | None = None,
    groups: Mapping[str, str] | None = None,
) -> Callable[[Callable], Callable]:
    """Give a command the fields of a dataclass as options, in place of its `**options`.

    A field's annotation is `Annotated[type, help]` or, where values are to be chosen from, `Annotated[type, help,
    choices]`; its name and default are the option's.

    Args:
        names: which fields; all unless given.
        help: of all of these options, in place of their own.
        groups: of the help, by name; else as `cli_help` has them.
    """
    hints = get_type_hints(holder, include_extras=True)
    parameters = []
    for field in dataclasses.fields(holder):
        if names is not None and field.name not in names:
            continue
        kind, text, *choices = get_args(hints[field.name])
        option = typer.Option(
            f"--{field.name}",
            help=help or text,
            rich_help_panel=(groups or {}).get(field.name),
            **chosen_from(*choices),
        )
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if field.default is dataclasses.MISSING else field.default,
                annotation=Annotated[kind, option],
            )
        )

    def with_options(command: Callable) -> Callable:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        command.__signature__ = inspect.Signature([*own, *parameters])
        return command

    return with_options


def chosen_from(choices: Sequence[str | None] = ()) -> dict[str, Any]:
    """Return what shows an option's values in the help and completes them in a shell."""
    if not choices:
        return {}
    names = [choice for choice in choices if choice is not None]
    return {"metavar": f"<{'|'.join(names)}>", "autocompletion": lambda: names}


def given(options: dict[str, Any], holder: type | None = None) -> dict[str, Any]:
    """Return the options that have a value, as the package's functions take them.

    Args:
        holder: a dataclass that checks its fields; so a wrong value is refused before anything long is imported.
    """
    values = {name: value for name, value in options.items() if value is not None and value != []}
    if "lora_alpha" in values:
        values["lora_alpha"] = whole(values["lora_alpha"])
    if "expert_names" in values:
        values["expert_names"] = split(values["expert_names"])
    if holder is not None:
        holder(**values)
    return values


def whole(number: float | None) -> float | int | None:
    """Return a whole number as an integer (16, not 16.0), as a config has it."""
    if number is None:
        return None
    if not math.isfinite(number) or number <= 0:
        raise typer.BadParameter(f"{number} is not a number greater than 0", param_hint="--lora_alpha")
    return int(number) if number == int(number) else number


def split(names: list[str] | None) -> list[str] | None:
    """Split `a,b` into `a` and `b`: for names, never for paths, which may contain a comma."""
    return [part for name in names for part in name.split(",")] if names else None


def check_places(sources: Sequence[str]) -> None:
    """Refuse a folder that is not there before anything long is imported.

    Raises:
        InputError: one of them is no folder, and nothing that could be fetched.
    """
    for source in sources:
        check_source(source)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done: one changing line on a terminal, else a line for each step."""
    if err.is_terminal:
        with err.status("starting") as status:
            yield lambda message: status.update(Text(one_printable_line(message)))
    else:
        yield lambda message: err.print(message)


class PlainRecord(logging.LogRecord):
    """What any library logs, names from files among it, as printable text."""

    def getMessage(self) -> str:
        return printable(shortened(super().getMessage(), LONGEST_LINE), keep="\n")


@contextmanager
def plain_logging() -> Iterator[None]:
    """Make every record that is logged meanwhile a `PlainRecord`."""
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(PlainRecord)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


def print_lines(console: Console, text: str, indent: str = "") -> None:
    """Print a text of several lines; all but the first are indented, so that none passes for a line of ours."""
    first, *others = text.split("\n")
    for line in [first, *(f"{indent}{other}" for other in others)]:
        console.print(line)


def print_next(*steps: tuple[list[str], str]) -> None:
    """Say on stderr, beside the result, which commands may come next, ready to be copied.

    Args:
        steps: the words of a command, and what it does, which is left out where the line would be too long.
    """
    for number, (words, what) in enumerate(steps):
        lead = "next: " if number == 0 else "      "
        command = " ".join(shlex.quote(word).replace(" ", NO_BREAK) for word in words)
        line = f"{lead}{command}  # {what}".replace(NO_BREAK, " ")
        if not err.is_terminal or len(line) <= err.width:
            err.print(line, soft_wrap=True)
            continue
        first, *others = wrapped(command, err.width - len(" \\"), lead, " " * 8)
        for part in [first, *others]:
            err.print(f"{part} \\" if others and part is not others[-1] else part, soft_wrap=True)


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2, default=str))


def span(values: tuple[float, float] | None) -> str:
    if values is None:
        return "unknown"
    return f"{values[0]:g}" if values[0] == values[1] else f"{values[0]:g} to {values[1]:g}"


def size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
