"""Prints a routing analysis as tables. Knows the fields of `routing_analysis.json`, computes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from .run_labels import benchmark_label


if TYPE_CHECKING:
    from rich.console import Console

    from ..analysis.routing_analysis import RoutingAnalysis


def print_routing_analysis(analysis: RoutingAnalysis, console: Console) -> None:
    """The set's figures; those of every task are in the files and the report."""
    summary = analysis.summary
    console.print(_what(summary), markup=False)
    console.print(_figures(summary))
    console.print(_load(summary))
    console.print(_categories(summary))
    if summary["agreement"] is None:
        console.print(
            "agreement: unknown, since not every expert alone was scored on these tasks (expert-analysis)"
        )
    elif summary["agreement"]["num_tasks"] == 0:
        console.print("agreement: every expert solves the same tasks, so no choice matters")
    else:
        console.print(_agreement(summary))


def _what(summary: dict[str, Any]) -> str:
    routing = summary["routing"]
    how = "all experts" if routing["mode"] == "dense" else f"top {routing['num_experts_per_tok']}"
    tasks = summary["subset"] or f"all {summary['num_tasks']} tasks"
    benchmark = benchmark_label(summary["benchmark"], summary["mini"], summary["dataset_file"])
    return f"{summary['model_label']} on {benchmark}, {tasks}; routing: {routing['mode']}, {how}"


def _figures(summary: dict[str, Any]) -> Table:
    table = Table("mean over the tokens of", title="What the router does", title_justify="left")
    for column in ("tokens", "largest weight", "entropy (nats)", "of log N", "gate's largest probability", "gate's entropy",
                   "switches per 100 tokens"):  # fmt: skip
        table.add_column(column, justify="right")
    for name, label in (("prompt", "prompts"), ("completion", "completions"), ("all", "both")):
        figures = summary["tokens"][name]
        if figures is None:
            continue
        table.add_row(
            label,
            f"{figures['num_tokens']:,}",
            f"{figures['confidence']:.3f}",
            f"{figures['entropy']:.3f}",
            f"{figures['normalized_entropy']:.1%}",
            f"{figures['gate_confidence']:.3f}",
            f"{figures['gate_entropy']:.3f}",
            "-"
            if figures["switches_per_100_tokens"] is None
            else f"{figures['switches_per_100_tokens']:.1f}",
        )
    return table


def _load(summary: dict[str, Any]) -> Table:
    prompt, completion = summary["tokens"]["prompt"], summary["tokens"]["completion"]
    table = Table("expert", title="Load: mean weight of every expert", title_justify="left")
    for column in ("prompts", "completions", "tokens it leads", "tasks it leads"):
        table.add_column(column, justify="right")
    for index, name in enumerate(summary["expert_names"]):
        table.add_row(
            escape(f"{index} {name}"),
            _share(prompt, "expert_shares", index),
            _share(completion, "expert_shares", index),
            _share(completion, "argmax_shares", index),
            str(summary["chosen_counts"][index]),
        )
    balance = summary["load_balance"]["completion"]
    if balance is not None:
        table.caption = (
            f"completions: coefficient of variation {balance['coefficient_of_variation']:.2f} (0 is even), balance loss "
            f"{balance['balance_loss']:.4f}"
        )
    return table


def _categories(summary: dict[str, Any]) -> Table:
    title = "Mean weight of every expert by category; a task may have several"
    table = Table("category", title=title, title_justify="left")
    for column in ("tasks", *summary["expert_names"]):
        table.add_column(escape(column), justify="right")
    for row in summary["categories"]:
        shares = row["expert_shares"] or [None] * len(summary["expert_names"])
        cells = ["-" if share is None else f"{share:.1%}" for share in shares]
        table.add_row(row["category"], str(row["num_tasks"]), *cells)
    return table


def _agreement(summary: dict[str, Any]) -> Table:
    agreement = summary["agreement"]
    title = (
        f"Tasks that some experts solve alone and others do not ({summary['tests']} tests): who solves them"
    )
    table = Table("category", title=title, title_justify="left")
    for column in ("tasks", "the router's choice", "a choice by lot", "the best choice"):
        table.add_column(column, justify="right")
    for row in [{"category": "all", **agreement}, *agreement["by_category"]]:
        low, high = row["chosen_interval"]
        chosen = f"{row['chosen']:.1%} ({low:.1%} to {high:.1%})"
        table.add_row(
            row["category"], str(row["num_tasks"]), chosen, f"{row['uniform']:.1%}", f"{row['best']:.1%}"
        )
    return table


def _share(figures: dict[str, Any] | None, name: str, index: int) -> str:
    return "-" if figures is None else f"{figures[name][index]:.1%}"


__all__ = ["print_routing_analysis"]
