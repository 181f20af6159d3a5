"""Pictures of a report's tables, each with its data as CSV and JSON beside it, and one for a README.

    figures/<name>.png, .csv, .json    for every table
    overview.png                       scores, categories and one task's code

Every picture says of itself which model it is of, on what, and what the router is worth, as pictures are sent around
alone: below its drawing, and as the file's description. Drawn by matplotlib without a display.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .code_picture import MUTED, code_height, draw_code
from .content import ReportContent
from .expert_tables import describe_experts, verdict_headline, verdict_line
from .loss_tables import describe_loss
from .palette import INK, MEASURE, STRONGEST, hatch, measure_color
from .report_table import ReportTable
from .routed_code import RoutedCode, example
from .routing_tables import describe_routing
from .run_labels import MARKED, describe_runs, one_line_names


if TYPE_CHECKING:
    from matplotlib.axes import Axes


FOLDER = "figures"
OVERVIEW = "overview.png"
DPI = 144
ROW_HEIGHT = 0.3  # inches
CHARACTER_WIDTH = 0.065  # inches, of a row's name
MOST_LABELS = 60
MOST_SLANTED = 16
MOST_CAPTION_LINES = 3
TITLE_HEIGHT = 0.4  # inches, of a line
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": INK["light"],
    "axes.edgecolor": "#c9cdd2",
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": INK["light"],
    "ytick.major.size": 0,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "savefig.dpi": DPI,
}


def write_figures(content: ReportContent, tables: dict[str, ReportTable]) -> list[Path]:
    """Write every table's files, and return their paths."""
    folder = content.folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    code = example(content)
    if code is not None:
        tables = {**tables, "routed_code": code.table()}
    written = []
    for name, table in tables.items():
        for suffix, write in (("csv", table.write_csv), ("json", table.write_json)):
            write(folder / f"{name}.{suffix}")
            written.append(folder / f"{name}.{suffix}")
    with _style():
        for name, table in tables.items():
            if name not in (*DRAWINGS, "routed_code"):
                continue
            text = caption(content, name)
            figure = _figure_of_code(code, text) if name == "routed_code" else _figure(table, text)
            written.append(_save(figure, folder / f"{name}.png", text))
        text = caption(content, "scores")
        written.append(_save(_overview(tables, code, text), content.folder / OVERVIEW, text))
    return written


def caption(content: ReportContent, name: str) -> str:
    """Say in a line which model and tasks a picture is of, and in a second one what the router is worth there."""
    verdict = None if content.experts is None else verdict_line(content.experts)
    if name.startswith("loss"):
        what, verdict = describe_loss(content.loss), verdict_headline(content.loss)
    elif name == "scores" and content.runs:
        what = describe_runs(content.runs)
    elif content.routing is not None and name.startswith(("routing", "gate", "routed")):
        what = describe_routing(content.routing)
    elif content.experts is not None:
        what = describe_experts(content.experts)
    else:
        what = describe_routing(content.routing)
    return what if verdict is None else f"{what}\n{verdict}"


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for what the font lacks
        yield


def _save(figure: Any, path: Path, text: str) -> Path:
    # No date or version in it: the same data give the same file.
    figure.savefig(path, metadata={"Software": None, "Description": text})
    return path


def _new(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _new_with_caption(width: float, height: float, text: str) -> tuple[Any, Any]:
    """Make a figure with the text below, and return it and the part of it to draw in, which has this size."""
    letters = int(width / 0.062)
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, letters)[:MOST_CAPTION_LINES]]
    room = 0.16 * len(lines) + 0.08
    figure = _new(width, height + room)
    drawing, below = figure.subfigures(2, 1, height_ratios=[height, room])
    below.text(0.06 / width, 0.05 / room, "\n".join(lines), fontsize=7.5, color=INK["light"], va="bottom")
    return figure, drawing


def _figure(table: ReportTable, text: str = "") -> Any:
    draw = DRAWINGS[table.name]
    rows = 8 if draw is _draw_confidence else min(len(table.rows), MOST_LABELS)
    height = 1.2 + ROW_HEIGHT * max(rows, 4) * (2 if draw is _draw_pairs else 1)
    width = 8.0
    if draw is _draw_scores:
        width = max(width, _score_width(table) + 0.5)
    if draw is _draw_heat:
        start, end = heat_span(table)
        names = _short_names(table.columns[start:end])
        height += {0: 0.0, 35: 0.05, 90: 0.08}[_slant(names)] * max(map(len, names))
        width = max(width, 2.5 + 0.19 * len(names))
    figure, drawing = _new_with_caption(width, height, text)
    draw(drawing.add_subplot(), table)
    return figure


def _overview(tables: dict[str, ReportTable], code: RoutedCode | None, text: str) -> Any:
    """Draw the scores, what each expert is good at or given, and one task's code, as much of it as there is.

    The verdict is its title.
    """
    heat = next(
        (tables[name] for name in ("routing_categories", "expert_categories") if name in tables), None
    )
    upper = [tables[name] for name in ("scores",) if name in tables] + ([heat] if heat is not None else [])
    rows = max((min(len(table.rows), 20) for table in upper), default=0)
    heights = [1.2 + ROW_HEIGHT * rows] if upper else []
    width = max(
        [11.0, *(_score_width(_first(table, 20)) * len(upper) for table in upper if table.name == "scores")]
    )
    if code is not None:
        heights.append(code_height(code, width))
    what, _, verdict = text.partition("\n")
    title = "\n".join(textwrap.wrap(verdict or what, int(width / 0.118)))
    room = TITLE_HEIGHT * len(title.splitlines())
    figure, drawing = _new_with_caption(width, sum(heights) + room, what)
    drawing.suptitle(title, x=0.06 / width, ha="left", fontsize=14, fontweight="bold")
    parts = drawing.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if upper:
        for axes, table in zip(parts[0].subplots(1, len(upper), squeeze=False)[0], upper, strict=True):
            DRAWINGS[table.name](axes, _first(table, 20))
            if table.name == "scores":
                _write_scores(axes, _first(table, 20))
    if code is not None:
        draw_code(parts[-1].add_subplot(), code, width)
    return figure


def _write_scores(axes: Axes, table: ReportTable) -> None:
    """Write each row's pass@1 beside it, of the stricter tests that it has, to be read from afar."""
    for place, record in enumerate(table.records()):
        values = [record[name] for name in ("plus_pass@1", "pass@1") if record.get(name) is not None]
        if values:
            axes.text(
                1.02,
                place,
                f"{values[0]:.1%}",
                transform=axes.get_yaxis_transform(),
                va="center",
                fontsize=13,
                fontweight="bold",
            )


def _score_width(table: ReportTable) -> float:
    """Inches that the scores need: their rows' names, and as much again as a bar takes to be read."""
    return 4.5 + CHARACTER_WIDTH * max(map(len, _score_names(table)))


def _score_names(table: ReportTable) -> list[str]:
    return one_line_names(table.records(), always=("routing strategy",))


def _first(table: ReportTable, count: int) -> ReportTable:
    return replace(table, rows=table.rows[:count])


def _share_axis(axes: Axes, label: str) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(label)
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend(axes: Axes) -> None:
    """Below everything, where it covers nothing."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8)


def _rows(axes: Axes, labels: list[str]) -> range:
    """The table's first row at the top; the labels of very many rows are left out."""
    places = range(len(labels))
    axes.set_yticks(
        places if len(labels) <= MOST_LABELS else [], labels if len(labels) <= MOST_LABELS else []
    )
    axes.set_ylim(len(labels) - 0.5, -0.5)
    return places


def _draw_scores(axes: Axes, table: ReportTable) -> None:
    """A point with its interval for pass@1 of the base tests, and one of base and plus tests."""
    records = table.records()
    _rows(axes, _score_names(table))
    _mark(axes, [record["routing strategy"] for record in records])
    measures = [("pass@1", "base tests", "o", -0.14), ("plus_pass@1", "base and plus tests", "D", 0.14)]
    for index, (name, label, marker, shift) in enumerate(measures):
        points = [
            (place + shift, record[name], record[f"{name} low"], record[f"{name} high"])
            for place, record in enumerate(records)
            if record.get(name) is not None
        ]
        if points:
            _intervals(axes, points, label=label, marker=marker, color=measure_color(index))
    axes.set_xlim(0, 1)
    _share_axis(axes, "pass@1 with 95 % interval")
    axes.set_title(table.title.replace("pass@k", "pass@1"))
    _legend(axes)


def _mark(axes: Axes, strategies: list[str]) -> None:
    """Set the rows of the router and of `best` in bold."""
    for label, strategy in zip(
        axes.get_yticklabels(), strategies, strict=False
    ):  # without labels, if very many
        if strategy in MARKED:
            label.set_fontweight("bold")


def _intervals(axes: Axes, points: list[tuple], **how: Any) -> None:
    places, values, lows, highs = zip(*points, strict=True)
    errors = [
        [max(0.0, value - low) for value, low in zip(values, lows, strict=True)],
        [max(0.0, high - value) for value, high in zip(values, highs, strict=True)],
    ]
    axes.errorbar(
        values, places, xerr=errors, linestyle="none", markersize=5, linewidth=1.4, capsize=2.5, **how
    )


def _draw_comparisons(axes: Axes, table: ReportTable) -> None:
    _rows(axes, [row[0] for row in table.rows])
    _intervals(
        axes, [(place, *row[1:4]) for place, row in enumerate(table.rows)], marker="o", color=measure_color()
    )
    axes.axvline(0, color=MUTED, linewidth=1, linestyle="--")
    _share_axis(axes, "pass@1 of the router minus that of the other, 95 % interval")
    axes.set_title(table.title)


def _draw_loss(axes: Axes, table: ReportTable) -> None:
    """A point with its interval for every strategy and oracle."""
    _rows(axes, [row[0] for row in table.rows])
    _mark(axes, [row[0] for row in table.rows])
    points = [
        (place, row[1], *(row[1] if end is None else end for end in row[2:4]))
        for place, row in enumerate(table.rows)
    ]
    _intervals(axes, points, marker="o", color=measure_color())
    axes.set_xlabel(table.columns[1])
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.7)
    axes.set_title(table.title)


def _draw_gain(axes: Axes, table: ReportTable) -> None:
    places = _rows(axes, [row[0] for row in table.rows])
    _mark(axes, [row[0] for row in table.rows])
    axes.barh(places, [row[1] for row in table.rows], height=0.55, color=measure_color())
    for value, label in ((table.rows[1][1], "best single"), (table.rows[0][1], "oracle")):
        axes.axvline(value, color=MUTED, linewidth=1, linestyle="--")
        axes.annotate(
            label,
            (value, -0.5),
            xytext=(2, 2),
            textcoords="offset points",
            fontsize=7.5,
            color=MUTED,
            ha="left",
        )
    axes.set_xlim(0, 1.08)
    _share_axis(axes, "pass@1")
    axes.set_title(table.title, pad=14)


def _draw_pairs(axes: Axes, table: ReportTable) -> None:
    """Several figures side by side for every row, as bars with patterns."""
    wanted = PAIRS[table.name]
    records = table.records()
    first = table.columns[0]
    _rows(axes, [_with_count(record, first) for record in records])
    height = 0.8 / len(wanted)
    for index, name in enumerate(wanted):
        places = [place - 0.4 + height * (index + 0.5) for place in range(len(records))]
        values = [record[name] or 0 for record in records]
        look = {"color": measure_color(index), "hatch": hatch(index), "edgecolor": "white", "linewidth": 0}
        axes.barh(places, values, height=height * 0.92, label=name, **look)
    if table.name == "routing_load":
        axes.axvline(1 / len(records), color=MUTED, linewidth=1, linestyle="--", label="all equal")
    if table.name == "experts":
        axes.set_xlabel("tasks")
    else:
        _share_axis(axes, "")
    axes.set_title(table.title)
    _legend(axes)


def _with_count(record: dict[str, Any], first: str) -> str:
    return f"{record[first]} ({record['tasks']})" if "tasks" in record else str(record[first])


def _draw_confidence(axes: Axes, table: ReportTable) -> None:
    low, high = table.rows[0][0], table.rows[0][1]
    axes.bar(
        [row[0] for row in table.rows],
        [row[2] for row in table.rows],
        width=(high - low) * 0.94,
        align="edge",
        color=measure_color(),
    )
    axes.set_ylabel("tokens")
    axes.set_xlim(0, 1)
    axes.set_xlabel("the gate's largest probability")
    axes.set_title(table.title)


def _draw_heat(axes: Axes, table: ReportTable) -> None:
    """Shades with their figures: categories or tasks against experts or strategies."""
    start, end = heat_span(table)
    columns = table.columns[start:end]
    rows = table.rows
    if table.name == "routing_tasks" and len(rows) > MOST_LABELS:
        led_by = table.columns.index("led by")
        rows = sorted(rows, key=lambda row: (str(row[led_by]), [-(share or 0) for share in row[start:end]]))
    values = [[float("nan") if cell is None else cell for cell in row[start:end]] for row in rows]
    axes.imshow(values, cmap=_shades(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    records = replace(table, rows=rows).records()
    _rows(axes, [_with_count(record, table.columns[0]) for record in records])
    short = _short_names(columns)
    slant = _slant(short)
    room = 72 * axes.bbox.width / axes.figure.dpi
    axes.set_xticks(
        range(len(columns)),
        short,
        rotation=slant,
        ha="left" if slant else "center",
        va="center" if slant == 90 else "baseline",
        rotation_mode="anchor",
        fontsize=min(9.0, 0.85 * room / len(columns)) if slant == 90 else 9.0,
    )
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    if len(rows) <= MOST_LABELS and len(columns) <= 16:
        for row, cells in enumerate(values):
            for column, cell in enumerate(cells):
                if cell == cell:
                    axes.text(column, row, f"{cell:.0%}", ha="center", va="center", fontsize=8)
    axes.set_title(table.title)


def heat_span(table: ReportTable) -> tuple[int, int]:
    """Return from which column up to which the shares of a table stand."""
    before, behind = HEAT_COLUMNS[table.name]
    start = table.columns.index(before) + 1
    return start, len(table.columns) if behind is None else table.columns.index(behind)


def _short_names(columns: list[str]) -> list[str]:
    return [name.removeprefix("weight ") for name in columns]


def _slant(names: list[str]) -> int:
    """In degrees, so that names of columns do not lie over each other."""
    if len(names) > MOST_SLANTED:
        return 90
    return 35 if sum(map(len, names)) > 70 else 0


def _shades() -> Any:
    """From white to as dark as black text allows."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    darkest = [1 - STRONGEST["light"] * (1 - part) for part in to_rgb(MEASURE["light"])]
    return LinearSegmentedColormap.from_list("shades", [(1, 1, 1), darkest])


def _figure_of_code(code: RoutedCode, text: str) -> Any:
    figure, drawing = _new_with_caption(9.0, code_height(code, 9.0), text)
    draw_code(drawing.add_subplot(), code, 9.0)
    return figure


# Columns that `_draw_pairs` shows of a table.
PAIRS = {
    "experts": ["tasks solved", "solved by no other", "tasks given by the router"],
    "routing_load": ["weight, prompts", "weight, completions", "tokens it leads, completions"],
    "routing_agreement": ["the router's choice", "a random expert", "the best choice"],
}
# The columns between which `_draw_heat` finds a table's shares; None: they go on to its last column.
HEAT_COLUMNS = {
    "expert_categories": ("tasks", None),
    "routing_categories": ("tasks", None),
    "routing_tasks": ("led by", "router passes"),
}
DRAWINGS: dict[str, Callable[[Any, ReportTable], None]] = {
    "scores": _draw_scores,
    "comparisons": _draw_comparisons,
    "possible_gain": _draw_gain,
    "gate_confidence": _draw_confidence,
    "loss": _draw_loss,
    **dict.fromkeys(PAIRS, _draw_pairs),
    **dict.fromkeys(HEAT_COLUMNS, _draw_heat),
}

__all__ = ["write_figures"]
