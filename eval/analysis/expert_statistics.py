"""What results of several strategies on the same tasks say of the experts and of the router.

Everything is computed from shares: of every task, in one order, the share of a strategy's samples that pass
(0.0 to 1.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .statistics import difference_interval, holm, interval, paired_test
from .task_categories import CATEGORIES


CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
ROUTER = "router"
NOT_SINGLE = ("base", "uniform", "ensemble")
WITH_ROUTER = (ROUTER, "best")

Shares = Mapping[str, Sequence[float]]


def strategies_of(num_experts: int, has_router: bool) -> list[str]:
    """List the strategies that are compared, in canonical form and in the order of the tables."""
    return [*map(single, range(num_experts)), *NOT_SINGLE, *(WITH_ROUTER if has_router else ())]


def single(expert: int) -> str:
    return f"single:{expert}"


def figures(
    shares: Shares,
    *,
    task_ids: Sequence[str],
    categories: Mapping[str, Sequence[str]],
    expert_names: Sequence[str],
    n_samples: int = 1,
) -> dict[str, Any]:
    """Compute what one kind of tests (base or plus) says; `docs/report-files.md` describes the fields.

    Args:
        shares: of every strategy of `strategies_of`, in the order of `task_ids`.
        categories: of every task.
        n_samples: a task, of which the shares are.
    """
    experts = [single(expert) for expert in range(len(expert_names))]
    best = max(experts, key=lambda strategy: _mean(shares[strategy]))  # of equals, the first
    compared = comparisons(shares, experts, n_samples) if ROUTER in shares else []
    return {
        "strategies": [{"strategy": strategy, **_pass_at_1(shares[strategy])} for strategy in shares],
        "best_single": {
            "strategy": best,
            "expert": expert_names[experts.index(best)],
            "chosen_on": "the tasks it is scored on",
            "equals": [
                other for other in experts if other != best and _mean(shares[other]) == _mean(shares[best])
            ],
            **_pass_at_1(shares[best]),
        },
        "possible_gain": possible_gain(shares, experts, best),
        **_who_solves_what(shares, experts, task_ids, expert_names),
        "categories": [
            _category(category, shares, experts, [categories[task_id] for task_id in task_ids])
            for category in CATEGORIES
            if any(category in categories[task_id] for task_id in task_ids)
        ],
        "comparisons": compared,
        "verdict": verdict(compared, best, shares) if compared else None,
    }


def possible_gain(shares: Shares, experts: Sequence[str], best: str) -> dict[str, Any]:
    """Compute how much of what perfect choice among the experts would add each way of combining them adds.

    The oracle takes the best expert of every task: with one sample a task, it solves what any expert alone
    solves. The share is (pass@1 - best single) / (oracle - best single): 0 is as good as the best single
    expert, 1 as good as the oracle, negative worse than the best single one. It is None where oracle and best
    single are equal, and then `note` says so.
    """
    table = np.array([shares[expert] for expert in experts])
    oracle, floor = _mean(table.max(axis=0)), _mean(shares[best])
    reached = {"mean_single": _mean(table.mean(axis=0))}
    reached |= {strategy: _mean(shares[strategy]) for strategy in shares if strategy not in experts}
    gain = oracle - floor
    defined = gain > 0
    note = "no task is solved by another expert and not by the best one, so no share is defined"
    return {
        "oracle": _pass_at_1(table.max(axis=0)),
        "gain": gain,
        "reached": [
            {"strategy": strategy, "pass@1": value, "share": (value - floor) / gain if defined else None}
            for strategy, value in reached.items()
        ],
        "note": None if defined else note,
    }


def comparisons(shares: Shares, experts: Sequence[str], n_samples: int) -> list[dict[str, Any]]:
    """Compare the router with every other strategy, paired by task; `p_value_holm` is corrected for all.

    Every expert alone is among them, so that picking out the best one afterwards needs no further correction.
    """
    others = [strategy for strategy in shares if strategy != ROUTER]
    rows = []
    for other in others:
        test = paired_test(shares[ROUTER], shares[other], n_samples)
        rows.append(
            {
                "first": ROUTER,
                "second": other,
                "difference": _mean(shares[ROUTER]) - _mean(shares[other]),
                "interval": list(difference_interval(shares[ROUTER], shares[other], CONFIDENCE)),
                "first_better": test.first_better,
                "second_better": test.second_better,
                "p_value": test.p_value,
                "method": test.method,
            }
        )
    corrected = holm([row["p_value"] for row in rows])
    return [{**row, "p_value_holm": p_value} for row, p_value in zip(rows, corrected, strict=True)]


def verdict(compared: Sequence[Mapping[str, Any]], best: str, shares: Shares) -> dict[str, Any]:
    """Judge whether the router is worth having: "helps", "hurts" or "no evidence".

    That is its comparison with the best single expert; the same is said against `uniform` and `base`.

    It helps if it solves more and the Holm-corrected p-value is below `SIGNIFICANCE`, hurts if it solves
    fewer and that is so; otherwise there is no evidence, which does not mean that there is no difference:
    `text` gives the interval.
    """
    rows = {row["second"]: row for row in compared}
    found = {
        name: _finding(rows[other])
        for name, other in (("best_single", best), ("uniform", "uniform"), ("base", "base"))
    }
    row = rows[best]
    headline = {
        "helps": "The router helps",
        "hurts": "The router hurts",
        "no evidence": "No evidence that the router helps or hurts",
    }[found["best_single"]]
    method = "exact McNemar test" if row["method"] == "mcnemar" else "exact sign-flip test"
    low, high = row["interval"]
    text = (
        f"{headline}: its pass@1 is {_mean(shares[ROUTER]):.1%}, that of the best single expert, {best}, chosen on these "
        f"same tasks, {_mean(shares[best]):.1%}. The difference is {100 * row['difference']:+.1f} points (95 % interval "
        f"{100 * low:+.1f} to {100 * high:+.1f}; {method}, p = {_p(row['p_value_holm'])} corrected by Holm for "
        f"{len(rows)} comparisons). Against uniform it {_words(found['uniform'])} "
        f"({100 * rows['uniform']['difference']:+.1f} points, p = {_p(rows['uniform']['p_value_holm'])}), against base it "
        f"{_words(found['base'])} ({100 * rows['base']['difference']:+.1f} points, "
        f"p = {_p(rows['base']['p_value_holm'])})."
    )
    return {
        "router": found["best_single"],
        "against": found,
        "significance_level": SIGNIFICANCE,
        "text": text,
    }


def _finding(row: Mapping[str, Any]) -> str:
    if row["p_value_holm"] >= SIGNIFICANCE:
        return "no evidence"
    return "helps" if row["difference"] > 0 else "hurts"


def _words(finding: str) -> str:
    return {"helps": "helps", "hurts": "hurts", "no evidence": "shows no evidence of a difference"}[finding]


def _p(p_value: float) -> str:
    return f"{p_value:.2g}" if p_value >= 0.0001 else "less than 0.0001"


def _who_solves_what(
    shares: Shares, experts: Sequence[str], task_ids: Sequence[str], expert_names: Sequence[str]
) -> dict[str, Any]:
    """Count the tasks by who solves them. A task counts as solved if any of its samples passes."""
    solved = np.array([shares[expert] for expert in experts]) > 0
    by_how_many = solved.sum(axis=0)
    result: dict[str, Any] = {
        "solved_by": np.bincount(by_how_many, minlength=len(experts) + 1).tolist(),
        "only_one_expert": [
            {
                "strategy": strategy,
                "expert": name,
                "num_solved": int(of_expert.sum()),
                "task_ids": _chosen(task_ids, of_expert & (by_how_many == 1)),
            }
            for strategy, name, of_expert in zip(experts, expert_names, solved, strict=True)
        ],
        "only_router": None,
        "not_router": None,
    }
    if ROUTER in shares:
        by_router = np.array(shares[ROUTER]) > 0
        result["only_router"] = _chosen(task_ids, by_router & (by_how_many == 0))
        result["not_router"] = _chosen(task_ids, ~by_router & (by_how_many > 0))
    return result


def _category(
    category: str, shares: Shares, experts: Sequence[str], categories: Sequence[Sequence[str]]
) -> dict[str, Any]:
    places = [place for place, of_task in enumerate(categories) if category in of_task]
    inside = {strategy: [of_strategy[place] for place in places] for strategy, of_strategy in shares.items()}
    most = max(_mean(inside[expert]) for expert in experts)
    return {
        "category": category,
        "num_tasks": len(places),
        "strategies": [{"strategy": strategy, **_pass_at_1(inside[strategy])} for strategy in inside],
        "best_singles": [expert for expert in experts if _mean(inside[expert]) == most],
        "oracle": _mean(np.array([inside[expert] for expert in experts]).max(axis=0)),
    }


def _pass_at_1(shares: Sequence[float]) -> dict[str, Any]:
    return {"pass@1": _mean(shares), "interval": list(interval(shares, CONFIDENCE))}


def _mean(shares: Sequence[float]) -> float:
    """Compute a mean, rounded beyond floating-point error, so that equal figures are equal."""
    return round(float(np.mean(shares)), 12)


def _chosen(task_ids: Sequence[str], which: np.ndarray) -> list[str]:
    return [task_id for task_id, this in zip(task_ids, which, strict=True) if this]
