"""The figure of a task's code, each token in the colour of the expert with the largest weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .palette import INK, STRONGEST, expert_color
from .routed_code import RoutedCode, RoutedToken


if TYPE_CHECKING:
    from matplotlib.axes import Axes


MUTED = "#6b7075"
PROMPT_INK = "#44494f"
FONT = "DejaVu Sans Mono"  # comes with matplotlib


def code_height(code: RoutedCode, width: float) -> float:
    """Compute the height in inches of a task's code at a width, with title and legend."""
    labels = list(code.leading().values())
    legend = 0.2 * math.ceil(len(labels) / _legend_columns(labels, width))
    return 0.8 + legend + len(code.lines()) * _line_height(code, width)


def _legend_columns(labels: list[str], width: float) -> int:
    """Compute how many entries of a legend fit in a row."""
    entry = 0.6 + 0.075 * max(map(len, labels), default=0)
    return max(1, min(8, len(labels), int(width / entry)))


def _line_height(code: RoutedCode, width: float) -> float:
    columns = max(60, *(sum(len(token.text) for token in line) for line in code.lines()))
    return min(0.24, (width - 0.5) / columns / 0.6 * 1.55)


def draw_code(axes: Axes, code: RoutedCode, width: float) -> None:
    """Draw the text of a task, every token on the colour of its expert; numbers say where that changes."""
    lines, height = code.lines(), _line_height(code, width)
    size = height * 72 / 1.55
    columns = (width - 0.5) * 72 / (size * 0.602)  # the width of a character of the font
    axes.set_xlim(0, columns)
    axes.set_ylim(len(lines), 0)
    axes.axis("off")
    before = None
    for row, line in enumerate(lines):
        column = 0
        for token in line:
            text = token.text.rstrip("\n") or ("↵" if token.text else "")
            if text:
                _draw_token(axes, token, text, row, column, size, changes=token.expert != before)
                before = token.expert
            column += len(text)
    for row in code.boundary_rows():
        axes.axhline(row, color=MUTED, linewidth=0.8, linestyle="--")
        axes.text(
            columns, row, "prompt above, completion below", fontsize=6.5, color=MUTED, ha="right", va="bottom"
        )
    _draw_legend(axes, code.leading(), width)
    cut = f", its first {len(lines)} lines" if code.is_cut else ""
    axes.set_title(
        f"{code.task_id}{cut}: which expert leads at every token (stronger: {code.strength_label})"
    )


def _draw_token(
    axes: Axes, token: RoutedToken, text: str, row: int, column: int, size: float, changes: bool
) -> None:
    from matplotlib.patches import Rectangle

    fill = Rectangle(
        (column, row + 0.12),
        len(text),
        0.8,
        facecolor=expert_color(token.expert),
        alpha=STRONGEST["light"] * token.strength,
        linewidth=0,
    )
    axes.add_patch(fill)
    ink = PROMPT_INK if token.in_prompt else INK["light"]
    axes.text(column, row + 0.56, text, family=FONT, fontsize=size, va="center", color=ink)
    if changes:
        axes.text(column, row + 0.15, str(token.expert), fontsize=size * 0.5, va="center", color=MUTED)


def _draw_legend(axes: Axes, leading: dict[int, str], width: float) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=expert_color(index), alpha=STRONGEST["light"], label=label)
        for index, label in leading.items()
    ]
    columns = _legend_columns(list(leading.values()), width)
    axes.figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8)


__all__ = ["code_height", "draw_code"]
