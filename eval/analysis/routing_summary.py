"""What the router did over a set of tasks, from the traces of one task after the other.

Nothing that grows with the number of tokens is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from dylora_moe.modeling.routing_dylora_moe import balance_loss

from .routing_trace import TokenRouting, Trace, entropy, normalized
from .statistics import interval


HISTOGRAM_BINS = 20
# What is remembered of each task's completion.
KEPT = ("num_tokens", "confidence", "entropy", "gate_confidence", "gate_entropy", "switches_per_100_tokens")


class RoutingTotals:
    """Sums over tokens, in float64, of as many parts of texts as are added."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.num_tokens = self.switches = self.steps = 0
        self.weights = torch.zeros(num_experts, dtype=torch.float64)
        self.argmax = torch.zeros(num_experts, dtype=torch.long)
        self.confidence = self.entropy = self.gate_confidence = self.gate_entropy = 0.0
        self.gate_confidence_histogram = torch.zeros(HISTOGRAM_BINS, dtype=torch.long)

    def add(self, routing: TokenRouting) -> RoutingTotals:
        weights, probabilities = routing.weights.double(), routing.probabilities.double()
        self.num_tokens += len(routing)
        self.switches += routing.switches
        self.steps += routing.steps
        self.weights += weights.sum(dim=0)
        self.argmax += torch.bincount(routing.argmax, minlength=self.num_experts)
        sure = probabilities.amax(dim=-1)
        self.confidence += float(weights.amax(dim=-1).sum())
        self.entropy += float(entropy(weights).sum())
        self.gate_confidence += float(sure.sum())
        self.gate_entropy += float(entropy(probabilities).sum())
        bins = (sure * HISTOGRAM_BINS).long().clamp(max=HISTOGRAM_BINS - 1)
        self.gate_confidence_histogram += torch.bincount(bins, minlength=HISTOGRAM_BINS)
        return self

    def figures(self) -> dict[str, Any] | None:
        """Compute means over the tokens; None where there are none.

        `expert_shares`: the mean weights; `argmax_shares`: on which share of the tokens an expert has the
        largest. `confidence`: the largest weight; `entropy`: of the weights, in nats, and as a share of log
        N. The same two of the gate's probabilities, before the top k. `switches_per_100_tokens`: how often,
        from one token to the next, the expert with the largest weight changes.
        """
        if self.num_tokens == 0:
            return None
        return {
            "num_tokens": self.num_tokens,
            "expert_shares": (self.weights / self.num_tokens).tolist(),
            "argmax_shares": (self.argmax / self.num_tokens).tolist(),
            "confidence": self.confidence / self.num_tokens,
            "entropy": self.entropy / self.num_tokens,
            "normalized_entropy": normalized(self.entropy / self.num_tokens, self.num_experts),
            "gate_confidence": self.gate_confidence / self.num_tokens,
            "gate_entropy": self.gate_entropy / self.num_tokens,
            "normalized_gate_entropy": normalized(self.gate_entropy / self.num_tokens, self.num_experts),
            "switches_per_100_tokens": 100 * self.switches / self.steps if self.steps else None,
        }

    def balance(self) -> dict[str, float] | None:
        """Measure how evenly the load lies, over these tokens.

        That is the coefficient of variation of the shares (standard deviation over mean; 0 is even, sqrt(N -
        1) is all on one expert), and the loss that training adds for it.
        """
        if self.num_tokens == 0:
            return None
        shares = self.weights / self.num_tokens
        return {
            "coefficient_of_variation": float(shares.std(correction=0) / shares.mean()),
            "balance_loss": float(balance_loss(shares.expand(1, 1, -1), token_mask=None)),
        }


class RoutingSummary:
    """Add every task's trace; then ask for the dict that `routing_analysis.json` holds.

    Args:
        expert_names: in the model's order.
    """

    def __init__(self, expert_names: Sequence[str]):
        self.expert_names = list(expert_names)
        self.totals = {scope: RoutingTotals(len(expert_names)) for scope in ("prompt", "completion", "all")}
        self.tasks: list[dict[str, Any]] = []

    def add(
        self,
        trace: Trace,
        categories: Sequence[str],
        passed: float | None,
        experts_passed: Sequence[float] | None,
    ) -> dict[str, Any]:
        """Count a task in; returns all that is known of it, its tokens apart.

        Args:
            passed: the share of the router's samples that pass; None where they are not scored.
            experts_passed: the same of each expert alone.
        """
        parts = {"prompt": trace.prompt, "completion": trace.completion, "all": trace.whole}
        for scope, routing in parts.items():
            self.totals[scope].add(routing)
        figures = {
            scope: RoutingTotals(len(self.expert_names)).add(parts[scope]).figures()
            for scope in ("prompt", "completion")
        }
        of_completion = figures["completion"] or {}
        shares = of_completion.get("expert_shares")
        task = {
            "task_id": trace.text.name,
            "categories": list(categories),
            "chosen": None if shares is None else max(range(len(shares)), key=shares.__getitem__),
            "expert_shares": shares,
            "passed": passed,
            "experts_passed": None if experts_passed is None else list(experts_passed),
        }
        self.tasks.append({**task, **{name: of_completion.get(name) for name in KEPT}})
        return {**task, **figures}

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_tasks": len(self.tasks),
            "tokens": {name: totals.figures() for name, totals in self.totals.items()},
            "load_balance": {name: totals.balance() for name, totals in self.totals.items()},
            "gate_confidence_histogram": self.totals["completion"].gate_confidence_histogram.tolist(),
            "chosen_counts": self._chosen_counts(self.tasks),
            "categories": self._by_category(),
            "agreement": agreement(self.tasks),
            "tasks": self.tasks,
        }

    def _by_category(self) -> list[dict[str, Any]]:
        """Average expert shares over the tasks of each category, all counting the same; the largest first."""
        rows = []
        for category in categories_of_tasks(self.tasks):
            tasks = [task for task in self.tasks if category in task["categories"] and task["expert_shares"]]
            shares = torch.tensor([task["expert_shares"] for task in tasks], dtype=torch.float64)
            rows.append(
                {
                    "category": category,
                    "num_tasks": len(tasks),
                    "expert_shares": shares.mean(dim=0).tolist() if tasks else None,
                    "chosen_counts": self._chosen_counts(tasks),
                }
            )
        return rows

    def _chosen_counts(self, tasks: Sequence[dict[str, Any]]) -> list[int]:
        counts = Counter(task["chosen"] for task in tasks)
        return [counts[expert] for expert in range(len(self.expert_names))]


def categories_of_tasks(tasks: Sequence[dict[str, Any]]) -> list[str]:
    """List every category that a task has, those with most tasks first."""
    counts = Counter(category for task in tasks for category in task["categories"])
    return sorted(counts, key=lambda category: (-counts[category], category))


def agreement(tasks: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Compare the router's choice with what each expert alone can do; None if that is not known throughout.

    Only tasks count on which it matters whom one asks: those that some experts solve and others do not (with
    several samples a task: on which the experts' shares differ). `chosen` is how often the router's choice
    alone solves them, `uniform` what a random expert would give in expectation, `best` what the best choice
    would give.
    """
    if not tasks or any(task["experts_passed"] is None for task in tasks):
        return None
    matters = [task for task in tasks if task["chosen"] is not None and len(set(task["experts_passed"])) > 1]
    rows = []
    for category in categories_of_tasks(matters):
        of_category = [task for task in matters if category in task["categories"]]
        rows.append({"category": category, **_agreement(of_category)})
    return {**_agreement(matters), "by_category": rows}


def _agreement(tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not tasks:
        return {"num_tasks": 0, "chosen": None, "chosen_interval": None, "uniform": None, "best": None}
    chosen = [task["experts_passed"][task["chosen"]] for task in tasks]
    uniform = [sum(task["experts_passed"]) / len(task["experts_passed"]) for task in tasks]
    best = [max(task["experts_passed"]) for task in tasks]
    return {
        "num_tasks": len(tasks),
        "chosen": sum(chosen) / len(tasks),
        "chosen_interval": list(interval(chosen)),
        "uniform": sum(uniform) / len(tasks),
        "best": sum(best) / len(tasks),
    }


__all__ = ["RoutingSummary", "RoutingTotals", "agreement", "categories_of_tasks"]
