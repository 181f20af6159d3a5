"""Prints an expert analysis as tables. Knows the fields of `expert_analysis.json`, computes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from .run_labels import benchmark_label, sampling_label


MOST_COLUMNS = 8
KINDS = {"base": "base tests", "plus": "base and plus tests"}

if TYPE_CHECKING:
    from rich.console import Console

    from ..analysis.expert_analysis import ExpertAnalysis


def print_expert_analysis(analysis: ExpertAnalysis, console: Console) -> None:
    """Every figure of the analysis, the verdict last. Those by category and below are of the stricter tests
    there are."""
    summary = analysis.summary
    figures = summary["tests"][summary["headline_tests"]]
    kind = KINDS[summary["headline_tests"]]
    console.print(_what(summary), markup=False)
    console.print(_strategies(summary))
    console.print(_experts(summary, figures, kind))
    console.print(_categories(summary, figures, kind))
    console.print(_gain(figures, kind))
    if figures["possible_gain"]["note"]:
        console.print(figures["possible_gain"]["note"], markup=False)
    if summary["has_router"]:
        console.print(_comparisons(figures, kind))
        console.print(figures["verdict"]["text"], markup=False)
    else:
        console.print("no router: there is nothing to judge")


def _what(summary: dict[str, Any]) -> str:
    benchmark = benchmark_label(summary["benchmark"], summary["mini"], summary["dataset_file"])
    parts = [f"{summary['model_label']} on {benchmark}"]
    parts.append(summary["subset"] or f"all {summary['num_tasks']} tasks")
    parts.append(sampling_label(summary["n_samples"], summary["temperature"]))
    return ", ".join(parts)


def _strategies(summary: dict[str, Any]) -> Table:
    table = _table("pass@1 and its 95 % interval over tasks", "strategy", *map(KINDS.get, summary["tests"]))
    columns = [figures["strategies"] for figures in summary["tests"].values()]
    for cells in zip(*columns, strict=True):
        table.add_row(_named(cells[0]["strategy"], summary), *map(_with_interval, cells))
    return table


def _experts(summary: dict[str, Any], figures: dict[str, Any], kind: str) -> Table:
    table = _table(f"Experts ({kind})", "expert", "solves", "alone of all", "the router's choice", "weight")
    choices = summary["router_choices"]
    for index, expert in enumerate(figures["only_one_expert"]):
        chosen = weight = "-"
        if choices is not None:
            chosen = _of(choices["counts"][index], summary["num_tasks"])
            weight = _percent(choices["mean_expert_shares"][index]) if choices["mean_expert_shares"] else "-"
        only = len(expert["task_ids"])
        table.add_row(
            _named(expert["strategy"], summary), str(expert["num_solved"]), str(only), chosen, weight
        )
    by_none, by_all = figures["solved_by"][0], figures["solved_by"][-1]
    caption = f"of {summary['num_tasks']} tasks, no expert solves {by_none} and every expert solves {by_all}"
    if figures["only_router"] is not None:
        caption += (
            f"; the router solves {len(figures['only_router'])} that no expert solves alone, and misses "
            f"{len(figures['not_router'])} that some expert solves"
        )
    if summary["has_router"] and choices is None:
        caption += "; what the router chose is not known, as no routing-analysis of these samples is there"
    table.caption = caption
    return table


def _categories(summary: dict[str, Any], figures: dict[str, Any], kind: str) -> Table:
    """A column for each expert, or one for the best of them where they are many."""
    num_experts = len(summary["expert_names"])
    strategies = [row["strategy"] for row in figures["strategies"]]
    experts = strategies[:num_experts] if num_experts <= MOST_COLUMNS else ["best of the experts"]
    title = f"pass@1 by category ({kind}); a task may have several; * best of the experts"
    table = _table(title, "category", "tasks", *experts, *strategies[num_experts:], "oracle")
    for row in figures["categories"]:
        alone, others = row["strategies"][:num_experts], row["strategies"][num_experts:]
        best = row["best_singles"]
        if num_experts <= MOST_COLUMNS:
            marked = best if len(best) < num_experts else []
            cells = [_percent(cell["pass@1"]) + ("*" if cell["strategy"] in marked else "") for cell in alone]
        else:
            name = best[0] if len(best) == 1 else f"{len(best)} of them"
            cells = [f"{_percent(max(cell['pass@1'] for cell in alone))} ({name})"]
        cells += [_percent(cell["pass@1"]) for cell in others]
        table.add_row(row["category"], str(row["num_tasks"]), *cells, _percent(row["oracle"]))
    return table


def _gain(figures: dict[str, Any], kind: str) -> Table:
    gain, best = figures["possible_gain"], figures["best_single"]
    title = f"Share of the possible gain: (pass@1 - best single) / (oracle - best single) ({kind})"
    table = _table(title, "", "pass@1", "share")
    table.add_row(
        "oracle: the best expert of every task",
        _percent(gain["oracle"]["pass@1"]),
        "-" if gain["note"] else "100%",
    )
    name = f"best single: {', '.join([best['strategy'], *best['equals']])}, chosen on {best['chosen_on']}"
    table.add_row(name, _percent(best["pass@1"]), "-" if gain["note"] else "0%")
    for row in gain["reached"]:
        share = "-" if row["share"] is None else f"{row['share']:.0%}"
        label = {"mean_single": "mean of the experts alone"}.get(row["strategy"], row["strategy"])
        table.add_row(label, _percent(row["pass@1"]), share)
    return table


def _comparisons(figures: dict[str, Any], kind: str) -> Table:
    best = figures["best_single"]["strategy"]
    title = f"The router against the others, task by task ({kind})"
    table = _table(
        title,
        "router against",
        "difference",
        "95 % interval",
        "router better",
        "other better",
        "p",
        "p (Holm)",
    )
    for row in figures["comparisons"]:
        low, high = row["interval"]
        table.add_row(
            row["second"] + (" (best single)" if row["second"] == best else ""),
            _points(row["difference"]),
            f"{_points(low)} to {_points(high)}",
            str(row["first_better"]),
            str(row["second_better"]),
            f"{row['p_value']:.2g}",
            f"{row['p_value_holm']:.2g}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _named(strategy: str, summary: dict[str, Any]) -> str:
    from rich.markup import escape

    kind, _, index = strategy.partition(":")
    return escape(f"{strategy} {summary['expert_names'][int(index)]}") if kind == "single" else strategy


def _with_interval(cell: dict[str, Any]) -> str:
    low, high = cell["interval"]
    return f"{_percent(cell['pass@1'])} ({_percent(low)} to {_percent(high)})"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _of(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})"


__all__ = ["print_expert_analysis"]
