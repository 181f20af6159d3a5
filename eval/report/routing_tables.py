"""The tables of a routing analysis, from `routing_analysis.json`, and what the command prints of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..analysis.routing_summary import HISTOGRAM_BINS
from .report_table import DECIMALS, ONE_DECIMAL, ReportTable
from .run_labels import SEVERAL_CATEGORIES, analysis_label, expert_label, sampling_label


if TYPE_CHECKING:
    from rich.console import Console

    from ..analysis.routing_analysis import RoutingAnalysis


PRINTED = ("routing_load", "routing_categories", "routing_agreement")  # the others are long: see the report


def routing_tables(routing: dict[str, Any]) -> list[ReportTable]:
    """Make the tables of a routing analysis."""
    names = routing["expert_names"]
    labels = [expert_label(index, names) for index in range(len(names))]
    tables = [_load(routing, labels), _confidence(routing), _categories(routing, labels)]
    if why_no_agreement(routing) is None:
        tables.append(_agreement(routing))
    return [*tables, _tasks(routing, labels)]


def print_routing_analysis(analysis: RoutingAnalysis, console: Console) -> None:
    """Print the set's figures; those of every task are in the files and the report."""
    summary = analysis.summary
    console.print(describe_routing(summary), markup=False)
    tables = [table for table in routing_tables(summary) if table.name in PRINTED]
    for table in [_tokens(summary), *tables]:
        table.print(console)
    reason = why_no_agreement(summary)
    if reason is not None:
        console.print(reason, markup=False)


def describe_routing(routing: dict[str, Any]) -> str:
    """Say in a line what was analysed, and how its router mixes experts."""
    how = routing["routing"]
    experts = "all experts" if how["mode"] == "dense" else f"top {how['num_experts_per_tok']}"
    what = f"{analysis_label(routing)}; routing: {how['mode']}, {experts} at every token"
    if "temperature" in routing:
        what += f"; {sampling_label(routing['n_samples'], routing['temperature'])}"
    return what


def why_no_agreement(routing: dict[str, Any]) -> str | None:
    """Say why nothing is known of whether the router chooses well, or return None."""
    if routing["agreement"] is None:
        return "agreement: unknown, since not every expert alone was scored on these tasks (expert-analysis does that)"
    if routing["agreement"]["num_tasks"] == 0:
        return "agreement: every expert solves the same of these tasks, so no choice matters"
    return None


def _tokens(routing: dict[str, Any]) -> ReportTable:
    columns = [
        "mean over the tokens of",
        "tokens",
        "largest weight",
        "entropy (nats)",
        "of log N",
        "gate's largest probability",
        "gate's entropy",
        "switches per 100 tokens",
    ]
    rows = []
    for name, label in (("prompt", "prompts"), ("completion", "completions"), ("all", "both")):
        figures = routing["tokens"][name]
        if figures is None:
            continue
        rows.append(
            [
                label,
                figures["num_tokens"],
                figures["confidence"],
                figures["entropy"],
                figures["normalized_entropy"],
                figures["gate_confidence"],
                figures["gate_entropy"],
                figures["switches_per_100_tokens"],
            ]
        )
    formats = {
        "largest weight": DECIMALS,
        "entropy (nats)": DECIMALS,
        "gate's largest probability": DECIMALS,
        "gate's entropy": DECIMALS,
        "switches per 100 tokens": ONE_DECIMAL,
    }
    return ReportTable("routing_tokens", "What the router does", columns, rows, formats=formats)


def _load(routing: dict[str, Any], labels: list[str]) -> ReportTable:
    unknown = [None] * len(labels)
    none = {"expert_shares": unknown, "argmax_shares": unknown}
    prompt = routing["tokens"]["prompt"] or none
    completion = routing["tokens"]["completion"] or none
    rows = [
        [
            label,
            prompt["expert_shares"][index],
            completion["expert_shares"][index],
            completion["argmax_shares"][index],
            routing["chosen_counts"][index],
        ]
        for index, label in enumerate(labels)
    ]
    columns = [
        "expert",
        "weight, prompts",
        "weight, completions",
        "tokens it leads, completions",
        "tasks it leads",
    ]
    balance = routing["load_balance"]["completion"]
    note = ""
    if balance is not None:
        note = (
            f"Completions: coefficient of variation {balance['coefficient_of_variation']:.2f} (0 is even), balance loss "
            f"{balance['balance_loss']:.4f}."
        )
    return ReportTable("routing_load", "Load: mean weight of every expert", columns, rows, note)


def _confidence(routing: dict[str, Any]) -> ReportTable:
    counts = routing["gate_confidence_histogram"]
    rows = [[bin / HISTOGRAM_BINS, (bin + 1) / HISTOGRAM_BINS, count] for bin, count in enumerate(counts)]
    note = "The largest of the gate's probabilities at every token of the completions, before the top k."
    return ReportTable("gate_confidence", "How sure the gate is", ["from", "to", "tokens"], rows, note)


def _categories(routing: dict[str, Any], labels: list[str]) -> ReportTable:
    unknown = [None] * len(labels)
    rows = [
        [row["category"], row["num_tasks"], *(row["expert_shares"] or unknown)]
        for row in routing["categories"]
    ]
    return ReportTable(
        "routing_categories",
        "Mean weight of every expert by category",
        ["category", "tasks", *labels],
        rows,
        SEVERAL_CATEGORIES,
    )


def _agreement(routing: dict[str, Any]) -> ReportTable:
    agreement = routing["agreement"]
    rows = [
        [
            part["category"],
            part["num_tasks"],
            part["chosen"],
            *part["chosen_interval"],
            part["uniform"],
            part["best"],
        ]
        for part in [{"category": "all", **agreement}, *agreement["by_category"]]
    ]
    columns = [
        "category",
        "tasks",
        "the router's choice",
        "low",
        "high",
        "a random expert",
        "the best choice",
    ]
    note = (
        "How often the expert that the router leans on solves the task alone, over the tasks that some experts solve and "
        f"others do not ({routing['tests']} tests); beside it what a random expert would give, and the best choice."
    )
    return ReportTable("routing_agreement", "Does the router choose an expert that can?", columns, rows, note)


def _tasks(routing: dict[str, Any], labels: list[str]) -> ReportTable:
    unknown = [None] * len(labels)
    rows = []
    for task in routing["tasks"]:
        rows.append(
            [
                task["task_id"],
                ", ".join(task["categories"]),
                None if task["chosen"] is None else labels[task["chosen"]],
                *(task["expert_shares"] or unknown),
                task["passed"],
                *(task["experts_passed"] or unknown),
                task["gate_confidence"],
                task["entropy"],
                task["switches_per_100_tokens"],
                task["num_tokens"],
            ]
        )
    columns = ["task", "categories", "led by"]
    columns += [f"weight {label}" for label in labels]
    columns += ["router passes"]
    columns += [f"{label} passes" for label in labels]
    columns += ["gate confidence", "entropy", "switches per 100 tokens", "tokens"]
    title = "Mean weight of every expert over each task's completion"
    return ReportTable("routing_tasks", title, columns, rows)


__all__ = ["describe_routing", "print_routing_analysis", "routing_tables", "why_no_agreement"]
