"""The tables of an expert analysis, from `expert_analysis.json`, and what the command prints of it.

Figures by category and below are of the stricter tests there are, as the verdict is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .report_table import P_VALUE, POINTS, WHOLE_PERCENT, ReportTable
from .run_labels import SEVERAL_CATEGORIES, analysis_label, expert_label, sampling_label, strategy_label


if TYPE_CHECKING:
    from rich.console import Console

    from ..analysis.expert_analysis import ExpertAnalysis


MOST_COLUMNS = 8  # for experts, on a terminal
KINDS = {"base": "base tests", "plus": "base and plus tests"}
# Sign and headline of every verdict, of an expert analysis and of a loss.
VERDICTS = {
    "helps": ("▲", "The router helps"),
    "hurts": ("▼", "The router hurts"),
    "no evidence": ("■", "No evidence that the router helps or hurts"),
}


def expert_tables(experts: dict[str, Any], most_experts: int | None = None) -> list[ReportTable]:
    """Make the tables of an expert analysis.

    Args:
        most_experts: if there are more, the table of categories shows the best of them instead of each.
    """
    figures, names = experts["tests"][experts["headline_tests"]], experts["expert_names"]
    in_short = most_experts is not None and len(names) > most_experts
    tables = [
        _experts(experts, figures, names),
        _best_by_category(figures, names) if in_short else _categories(figures, names),
        _gain(figures),
    ]
    if figures["comparisons"]:
        tables.append(_comparisons(figures, names))
    return tables


def print_expert_analysis(analysis: ExpertAnalysis, console: Console) -> None:
    """Print every figure of the analysis, the verdict last."""
    summary = analysis.summary
    console.print(describe_experts(summary), markup=False)
    for table in [_strategies(summary), *expert_tables(summary, MOST_COLUMNS)]:
        table.print(console)
    if summary["has_router"]:
        console.print(summary["verdict"]["text"], markup=False)
    else:
        console.print("no router: there is nothing to judge")


def describe_experts(experts: dict[str, Any]) -> str:
    """Say in a line what was analysed."""
    sampling = sampling_label(experts["n_samples"], experts["temperature"])
    return f"{analysis_label(experts)}, {sampling}; {KINDS[experts['headline_tests']]}"


def verdict_headline(measured: dict[str, Any]) -> str | None:
    """Return sign and headline of the verdict of an expert analysis or a loss, or None if there is none."""
    verdict = measured["verdict"]
    if verdict is None or verdict["router"] is None:
        return None
    return " ".join(VERDICTS[verdict["router"]])


def verdict_line(experts: dict[str, Any]) -> str | None:
    """Say the verdict of an expert analysis in a line, with the difference that it rests on."""
    headline = verdict_headline(experts)
    if headline is None:
        return None
    figures = experts["tests"][experts["headline_tests"]]
    best = figures["best_single"]["strategy"]
    row = next(row for row in figures["comparisons"] if row["second"] == best)
    low, high = row["interval"]
    return (
        f"{headline}: {100 * row['difference']:+.1f} points against the best single expert "
        f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    )


def _strategies(experts: dict[str, Any]) -> ReportTable:
    columns = ["routing strategy"]
    for kind in experts["tests"]:
        columns += [KINDS[kind], f"{KINDS[kind]} low", f"{KINDS[kind]} high"]
    rows = []
    for of_strategy in zip(*(figures["strategies"] for figures in experts["tests"].values()), strict=True):
        row = [strategy_label(of_strategy[0]["strategy"], experts["expert_names"])]
        for figures in of_strategy:
            row += [figures["pass@1"], *figures["interval"]]
        rows.append(row)
    return ReportTable("strategies", "pass@1 and its 95 % interval over tasks", columns, rows)


def _experts(experts: dict[str, Any], figures: dict[str, Any], names: list[str]) -> ReportTable:
    choices = experts["router_choices"]
    counts = shares = [None] * len(names)
    if choices is not None:
        counts = choices["counts"]
        shares = choices["mean_expert_shares"] or shares
    by_strategy = {row["strategy"]: row for row in figures["strategies"]}
    rows = []
    for index, expert in enumerate(figures["only_one_expert"]):
        alone = by_strategy[expert["strategy"]]
        rows.append(
            [
                expert_label(index, names),
                alone["pass@1"],
                *alone["interval"],
                expert["num_solved"],
                len(expert["task_ids"]),
                counts[index],
                shares[index],
            ]
        )
    columns = [
        "expert",
        "pass@1",
        "low",
        "high",
        "tasks solved",
        "solved by no other",
        "tasks given by the router",
        "mean weight",
    ]
    title = "Each expert alone, and what the router makes of it"
    return ReportTable("experts", title, columns, rows, _note_on_experts(experts, figures))


def _note_on_experts(experts: dict[str, Any], figures: dict[str, Any]) -> str:
    by_none, by_all = figures["solved_by"][0], figures["solved_by"][-1]
    note = f"Of {experts['num_tasks']} tasks, no expert solves {by_none} and every expert solves {by_all}"
    if figures["only_router"] is not None:
        note += (
            f"; the router solves {len(figures['only_router'])} that no expert solves alone, and misses "
            f"{len(figures['not_router'])} that some expert solves"
        )
    note += ". "
    if experts["router_choices"] is not None:
        note += "A task counts as given to the expert with the largest mean weight over its completion."
    elif experts["has_router"]:
        note += "What the router chose is not known, as no routing-analysis of these samples is there."
    return note.strip()


def _categories(figures: dict[str, Any], names: list[str]) -> ReportTable:
    strategies = [row["strategy"] for row in figures["strategies"]]
    columns = ["category", "tasks", *(strategy_label(strategy, names) for strategy in strategies), "oracle"]
    rows = []
    for row in figures["categories"]:
        shares = [cell["pass@1"] for cell in row["strategies"]]
        rows.append([row["category"], row["num_tasks"], *shares, row["oracle"]])
    return ReportTable("expert_categories", "pass@1 by category", columns, rows, SEVERAL_CATEGORIES)


def _best_by_category(figures: dict[str, Any], names: list[str]) -> ReportTable:
    """Make the table of categories with the best expert of each in place of all."""
    others = [row["strategy"] for row in figures["strategies"][len(names) :]]
    columns = ["category", "tasks", "best of the experts", *others, "oracle"]
    rows = []
    for row in figures["categories"]:
        shares = [cell["pass@1"] for cell in row["strategies"]]
        best = row["best_singles"]
        which = best[0] if len(best) == 1 else f"{len(best)} of them"
        best_share = f"{max(shares[: len(names)]):.1%} ({which})"
        rows.append([row["category"], row["num_tasks"], best_share, *shares[len(names) :], row["oracle"]])
    return ReportTable("expert_categories", "pass@1 by category", columns, rows, SEVERAL_CATEGORIES)


def _gain(figures: dict[str, Any]) -> ReportTable:
    gain, best = figures["possible_gain"], figures["best_single"]
    defined = gain["note"] is None
    best_name = f"best single expert: {best['strategy']} ({best['expert']})"
    note = gain["note"] or "Share of the possible gain: (pass@1 - best single) / (oracle - best single)"
    note += f". The best single expert was chosen on {best['chosen_on']}"
    note += f"; {', '.join(best['equals'])} did as well." if best["equals"] else "."
    rows = [
        ["oracle: the best expert of every task", gain["oracle"]["pass@1"], 1.0 if defined else None],
        [best_name, best["pass@1"], 0.0 if defined else None],
    ]
    for row in sorted(gain["reached"], key=lambda row: row["pass@1"], reverse=True):
        name = "mean of the experts alone" if row["strategy"] == "mean_single" else row["strategy"]
        rows.append([name, row["pass@1"], row["share"]])
    return ReportTable(
        "possible_gain",
        "How much of the possible gain is reached",
        ["choice of experts", "pass@1", "share of the gain"],
        rows,
        note,
        formats={"share of the gain": WHOLE_PERCENT},
    )


def _comparisons(figures: dict[str, Any], names: list[str]) -> ReportTable:
    best = figures["best_single"]["strategy"]
    rows = []
    for row in figures["comparisons"]:
        other = strategy_label(row["second"], names)
        rows.append(
            [
                f"{other}, best single" if row["second"] == best else other,
                row["difference"],
                *row["interval"],
                row["first_better"],
                row["second_better"],
                row["p_value"],
                row["p_value_holm"],
            ]
        )
    return ReportTable(
        "comparisons",
        "The router against the others, task by task",
        ["router against", "difference", "low", "high", "only router", "only other", "p", "p (Holm)"],
        rows,
        "Differences of pass@1 over the same tasks, in points, with 95 % intervals; p is exact, and corrected by Holm "
        "for all of these together.",
        formats={"difference": POINTS, "p": P_VALUE, "p (Holm)": P_VALUE},
    )


__all__ = [
    "VERDICTS",
    "describe_experts",
    "expert_tables",
    "print_expert_analysis",
    "verdict_headline",
    "verdict_line",
]
