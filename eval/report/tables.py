"""The tables of a report as plain rows, each named: what pages, pictures, CSV files and W&B show alike.

Shares are fractions. Knows the fields of what is read; computes nothing but intervals of pass@k for k above
1.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.routing_summary import HISTOGRAM_BINS
from ..sampling.run_record import Run
from .benchmark_table import score_interval
from .content import ReportContent
from .run_labels import run_labels, strategy_label


SEVERAL = "A task may have several categories."


@dataclass(frozen=True)
class ReportTable:
    """`rows` hold a value for each of `columns`: text, numbers, or None. `note` says what a reader must
    know."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""

    def records(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def write_csv(self, path: Path) -> None:
        with open(path, "w", encoding="utf-8", newline="") as file:
            # With its own row ends, those of RFC 4180, a lone carriage return in a cell is put in quotes,
            # too.
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(self.rows)

    def write_json(self, path: Path) -> None:
        content = {"title": self.title, "note": self.note, "rows": self.records()}
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def report_tables(content: ReportContent) -> dict[str, ReportTable]:
    """Every table that the folder has the data for, by name."""
    tables = [scores(content.runs)] if content.runs else []
    if content.experts is not None:
        tables += expert_tables(content.experts)
    if content.routing is not None:
        tables += routing_tables(content.routing)
    return {table.name: table for table in tables}


def expert_label(index: int, expert_names: list[str]) -> str:
    return f"{index} {expert_names[index]}"


def scores(runs: list[Run]) -> ReportTable:
    """A row a run: pass@k of the base tests and, as `plus_pass@k`, of base and plus tests, with 95 %
    intervals."""
    measured = sorted({name for run in runs for name in run.scores}, key=_order)
    columns = ["model", "routing strategy", "benchmark", "tasks", "samples a task", "settings"]
    columns += [f"{name}{end}" for name in measured for end in ("", " low", " high")]
    rows = []
    for run, label in zip(runs, run_labels(runs), strict=True):
        row = list(label.cells())
        for name in measured:
            row += (
                [run.scores[name], *score_interval(run, name)] if name in run.scores else [None, None, None]
            )
        rows.append(row)
    note = (
        "Shares of tasks, with 95 % intervals over tasks. pass counts the samples that pass the base tests, plus_pass (+) "
        "those that pass the base and the plus tests. Settings are those in which these runs differ."
    )
    return ReportTable("scores", "pass@k by routing strategy", columns, rows, note)


def _order(name: str) -> tuple[int, bool]:
    return int(name.partition("@")[2]), name.startswith("plus")


def expert_tables(experts: dict[str, Any]) -> list[ReportTable]:
    """Of the stricter tests there are, as the verdict is."""
    figures, names = experts["tests"][experts["headline_tests"]], experts["expert_names"]
    tables = [_experts(experts, figures, names), _categories(figures, names), _gain(figures)]
    if figures["comparisons"]:
        tables.append(_comparisons(figures, names))
    return tables


def _experts(experts: dict[str, Any], figures: dict[str, Any], names: list[str]) -> ReportTable:
    choices = experts["router_choices"]
    by_strategy = {row["strategy"]: row for row in figures["strategies"]}
    rows = []
    for index, expert in enumerate(figures["only_one_expert"]):
        alone = by_strategy[expert["strategy"]]
        chosen = weight = None
        if choices is not None:
            chosen = choices["counts"][index]
            weight = choices["mean_expert_shares"] and choices["mean_expert_shares"][index]
        rows.append(
            [
                expert_label(index, names),
                alone["pass@1"],
                *alone["interval"],
                expert["num_solved"],
                len(expert["task_ids"]),
                chosen,
                weight,
            ]
        )
    columns = [
        "expert", "pass@1", "low", "high", "tasks solved", "solved by no other", "tasks given by the router", "mean weight"
    ]  # fmt: skip
    note = "A task counts as given to the expert with the largest mean weight over its completion."
    return ReportTable("experts", "Each expert alone, and what the router makes of it", columns, rows, note)


def _categories(figures: dict[str, Any], names: list[str]) -> ReportTable:
    strategies = [row["strategy"] for row in figures["strategies"]]
    rows = [
        [row["category"], row["num_tasks"], *(cell["pass@1"] for cell in row["strategies"]), row["oracle"]]
        for row in figures["categories"]
    ]
    columns = ["category", "tasks", *(strategy_label(strategy, names) for strategy in strategies), "oracle"]
    return ReportTable("expert_categories", "pass@1 by category", columns, rows, SEVERAL)


def _gain(figures: dict[str, Any]) -> ReportTable:
    gain, best = figures["possible_gain"], figures["best_single"]
    defined = gain["note"] is None
    rows = [
        ["oracle: the best expert of every task", gain["oracle"]["pass@1"], 1.0 if defined else None],
        [
            f"best single expert: {best['strategy']} ({best['expert']})",
            best["pass@1"],
            0.0 if defined else None,
        ],
    ]
    labels = {"mean_single": "mean of the experts alone"}
    rows += [
        [labels.get(row["strategy"], row["strategy"]), row["pass@1"], row["share"]] for row in gain["reached"]
    ]
    note = gain["note"] or "Share of the possible gain: (pass@1 - best single) / (oracle - best single)."
    return ReportTable(
        "possible_gain", "How much of the possible gain is reached", ["", "pass@1", "share"], rows, note
    )


def _comparisons(figures: dict[str, Any], names: list[str]) -> ReportTable:
    best = figures["best_single"]["strategy"]
    rows = [
        [
            strategy_label(row["second"], names) + (", best single" if row["second"] == best else ""),
            row["difference"],
            *row["interval"],
            row["first_better"],
            row["second_better"],
            row["p_value"],
            row["p_value_holm"],
        ]
        for row in figures["comparisons"]
    ]
    columns = ["router against", "difference", "low", "high", "only router", "only other", "p", "p (Holm)"]
    note = "Differences of pass@1 over the same tasks; p is exact, and corrected by Holm for all of these together."
    return ReportTable("comparisons", "The router against the others, task by task", columns, rows, note)


def routing_tables(routing: dict[str, Any]) -> list[ReportTable]:
    names = routing["expert_names"]
    labels = [expert_label(index, names) for index in range(len(names))]
    tables = [_load(routing, labels), _confidence(routing), _routing_categories(routing, labels)]
    if routing["agreement"] is not None and routing["agreement"]["num_tasks"]:
        tables.append(_agreement(routing))
    return [*tables, _tasks(routing, labels)]


def _load(routing: dict[str, Any], labels: list[str]) -> ReportTable:
    prompt, completion = routing["tokens"]["prompt"], routing["tokens"]["completion"]

    def of(figures: dict[str, Any] | None, name: str, index: int) -> float | None:
        return None if figures is None else figures[name][index]

    rows = [
        [
            label,
            of(prompt, "expert_shares", index),
            of(completion, "expert_shares", index),
            of(completion, "argmax_shares", index),
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
    note = (
        ""
        if balance is None
        else (
            f"Completions: coefficient of variation {balance['coefficient_of_variation']:.2f} (0 is even), balance loss "
            f"{balance['balance_loss']:.4f}."
        )
    )
    return ReportTable("routing_load", "How the load lies: mean weight of every expert", columns, rows, note)


def _confidence(routing: dict[str, Any]) -> ReportTable:
    counts = routing["gate_confidence_histogram"]
    rows = [[bin / HISTOGRAM_BINS, (bin + 1) / HISTOGRAM_BINS, count] for bin, count in enumerate(counts)]
    note = "The largest of the gate's probabilities at every token of the completions, before the top k."
    return ReportTable("gate_confidence", "How sure the gate is", ["from", "to", "tokens"], rows, note)


def _routing_categories(routing: dict[str, Any], labels: list[str]) -> ReportTable:
    rows = [
        [row["category"], row["num_tasks"], *(row["expert_shares"] or [None] * len(labels))]
        for row in routing["categories"]
    ]
    title = "Mean weight of every expert by category"
    return ReportTable("routing_categories", title, ["category", "tasks", *labels], rows, SEVERAL)


def _agreement(routing: dict[str, Any]) -> ReportTable:
    found = routing["agreement"]
    parts = [{"category": "all", **found}, *found["by_category"]]
    rows = [
        [
            part["category"],
            part["num_tasks"],
            part["chosen"],
            *part["chosen_interval"],
            part["uniform"],
            part["best"],
        ]
        for part in parts
    ]
    columns = [
        "category",
        "tasks",
        "the router's choice",
        "low",
        "high",
        "a choice by lot",
        "the best choice",
    ]
    note = (
        "How often the expert that the router leans on solves the task alone, over the tasks that some experts solve and "
        f"others do not ({routing['tests']} tests); beside it what a choice by lot would give, and the best choice."
    )
    return ReportTable("routing_agreement", "Does the router choose an expert that can?", columns, rows, note)


def _tasks(routing: dict[str, Any], labels: list[str]) -> ReportTable:
    rows = []
    for task in routing["tasks"]:
        experts_passed = task["experts_passed"] or [None] * len(labels)
        rows.append(
            [
                task["task_id"],
                ", ".join(task["categories"]),
                None if task["chosen"] is None else labels[task["chosen"]],
                *(task["expert_shares"] or [None] * len(labels)),
                task["passed"],
                *experts_passed,
                *(
                    task[name]
                    for name in ("gate_confidence", "entropy", "switches_per_100_tokens", "num_tokens")
                ),
            ]
        )
    columns = ["task", "categories", "led by", *(f"weight {label}" for label in labels), "router passes"]
    columns += [f"{label} passes" for label in labels]
    columns += ["gate confidence", "entropy", "switches per 100 tokens", "tokens"]
    return ReportTable(
        "routing_tasks", "Mean weight of every expert over each task's completion", columns, rows
    )


__all__ = ["ReportTable", "expert_label", "report_tables"]
