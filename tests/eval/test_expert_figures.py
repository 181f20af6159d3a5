"""Figures, comparisons and verdict from shares with known answers, and what must hold for any shares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_moe.eval.analysis.expert_statistics import (
    comparisons,
    figures,
    possible_gain,
    strategies_of,
    verdict,
)
from dylora_moe.eval.analysis.statistics import difference_interval, holm, interval, paired_test


def shares_of(solved, num_tasks):
    """From the numbers of the tasks that each strategy solves."""
    return {
        strategy: [float(task in tasks) for task in range(num_tasks)] for strategy, tasks in solved.items()
    }


def figures_of(shares, expert_names=("one", "two"), categories=None, n_samples=1):
    task_ids = [f"T/{number}" for number in range(len(shares["base"]))]
    categories = categories or {task_id: ["lists"] for task_id in task_ids}
    return figures(
        shares, task_ids=task_ids, categories=categories, expert_names=expert_names, n_samples=n_samples
    )


def test_the_strategies_and_their_order():
    assert strategies_of(2, True) == ["single:0", "single:1", "base", "uniform", "ensemble", "router", "best"]
    assert strategies_of(1, False) == ["single:0", "base", "uniform", "ensemble"]


# 10 tasks: expert 0 solves 0 to 5, expert 1 solves 4 to 7; nobody alone solves 8, and the router does
SOLVED = {
    "single:0": {0, 1, 2, 3, 4, 5},
    "single:1": {4, 5, 6, 7},
    "base": {0},
    "uniform": {0, 1, 2, 3},
    "ensemble": set(),
    "router": {0, 1, 2, 3, 4, 6, 8},
    "best": {0, 1, 2, 3, 4, 5, 6},
}


def test_who_solves_what():
    found = figures_of(shares_of(SOLVED, 10))
    assert found["solved_by"] == [2, 6, 2]
    assert [
        (expert["expert"], expert["num_solved"], expert["task_ids"]) for expert in found["only_one_expert"]
    ] == [
        ("one", 6, ["T/0", "T/1", "T/2", "T/3"]),
        ("two", 4, ["T/6", "T/7"]),
    ]
    assert found["only_router"] == ["T/8"]
    assert found["not_router"] == ["T/5", "T/7"]


def test_pass_at_1_best_single_and_intervals():
    found = figures_of(shares_of(SOLVED, 10))
    by_strategy = {row["strategy"]: row for row in found["strategies"]}
    assert {strategy: row["pass@1"] for strategy, row in by_strategy.items()} == {
        strategy: len(tasks) / 10 for strategy, tasks in SOLVED.items()
    }
    assert by_strategy["router"]["interval"] == list(interval([1.0] * 7 + [0.0] * 3))
    best = found["best_single"]
    assert (best["strategy"], best["expert"], best["pass@1"], best["equals"]) == ("single:0", "one", 0.6, [])
    assert best["chosen_on"] == "the tasks it is scored on"


def test_the_share_of_the_possible_gain():
    """Oracle 8 of 10, best single 6: the router's 7 are half of the gain, the experts' mean of 5 is -0.5."""
    gain = figures_of(shares_of(SOLVED, 10))["possible_gain"]
    assert gain["oracle"]["pass@1"] == 0.8
    assert gain["gain"] == pytest.approx(0.2)
    assert gain["note"] is None
    reached = {row["strategy"]: (row["pass@1"], row["share"]) for row in gain["reached"]}
    assert reached == {
        "mean_single": (0.5, pytest.approx(-0.5)),
        "base": (0.1, pytest.approx(-2.5)),
        "uniform": (0.4, pytest.approx(-1.0)),
        "ensemble": (0.0, pytest.approx(-3.0)),
        "router": (0.7, pytest.approx(0.5)),
        "best": (0.7, pytest.approx(0.5)),
    }


def test_the_share_is_undefined_where_no_expert_adds_to_the_best_one():
    solved = {**SOLVED, "single:1": {4, 5}}
    gain = figures_of(shares_of(solved, 10))["possible_gain"]
    assert gain["gain"] == 0.0
    assert all(row["share"] is None for row in gain["reached"])
    assert "no share is defined" in gain["note"]


def test_equally_good_experts_are_named():
    solved = {**SOLVED, "single:1": {4, 5, 6, 7, 8, 9}}
    best = figures_of(shares_of(solved, 10))["best_single"]
    assert (best["strategy"], best["equals"]) == ("single:0", ["single:1"])


def test_equal_means_of_shares_are_equal_whatever_their_order():
    """0.1 + 0.2 + ... in another order is another number in floating point."""
    first = [0.1, 0.2, 0.3, 0.7, 0.6, 0.1] * 3
    shares = {
        "single:0": first,
        "single:1": sorted(first),
        "base": first,
        "uniform": first,
        "ensemble": first,
    }
    found = figures_of(shares, n_samples=10)
    assert found["best_single"]["equals"] == ["single:1"]
    same = {**shares, "single:1": first}
    assert figures_of(same, n_samples=10)["possible_gain"]["gain"] == 0.0


def test_categories():
    categories = {f"T/{number}": ["sorting", "lists"] if number < 6 else ["strings"] for number in range(10)}
    found = figures_of(shares_of(SOLVED, 10), categories=categories)["categories"]
    assert [(row["category"], row["num_tasks"], row["best_singles"], row["oracle"]) for row in found] == [
        ("strings", 4, ["single:1"], 0.5),
        ("lists", 6, ["single:0"], 1.0),
        ("sorting", 6, ["single:0"], 1.0),
    ]
    strings = {row["strategy"]: row["pass@1"] for row in found[0]["strategies"]}
    assert strings == {
        "single:0": 0.0, "single:1": 0.5, "base": 0.0, "uniform": 0.0, "ensemble": 0.0, "router": 0.5, "best": 0.25,
    }  # fmt: skip
    assert found[0]["strategies"][1]["interval"] == list(interval([0.0, 0.0, 1.0, 1.0]))


def test_comparisons_are_mcnemars_and_corrected_together():
    shares = shares_of(SOLVED, 10)
    rows = {row["second"]: row for row in figures_of(shares)["comparisons"]}
    assert list(rows) == ["single:0", "single:1", "base", "uniform", "ensemble", "best"]
    best = rows["single:0"]
    assert (best["first_better"], best["second_better"], best["method"]) == (2, 1, "mcnemar")
    assert best["difference"] == pytest.approx(0.1)
    # router against base: 6 tasks to 0, p = 2 / 2^6; ensemble: 7 to 0, 2 / 2^7; uniform: 3 to 0, 2 / 2^3
    assert [rows[other]["p_value"] for other in ("base", "ensemble", "uniform")] == [1 / 32, 1 / 64, 0.25]
    assert rows["ensemble"]["p_value_holm"] == pytest.approx(6 / 64)
    assert rows["base"]["p_value_holm"] == pytest.approx(5 / 32)
    assert rows["single:0"]["p_value_holm"] == 1.0
    assert best["interval"] == list(difference_interval(shares["router"], shares["single:0"]))


def large(router_only, best_only, both=20, num_tasks=100):
    """The router and expert 0 share tasks, and each solves some of its own; the others solve nothing."""
    first = set(range(both)) | set(range(both, both + best_only))
    router = set(range(both)) | set(range(both + best_only, both + best_only + router_only))
    nothing = {strategy: set() for strategy in ("single:1", "base", "uniform", "ensemble", "best")}
    return shares_of({"single:0": first, **nothing, "router": router}, num_tasks)


@pytest.mark.parametrize(
    ("router_only", "best_only", "expected", "words"),
    [
        (15, 1, "helps", "The router helps: its pass@1 is 35.0%, that of the best single expert, single:0"),
        (1, 15, "hurts", "The router hurts: its pass@1 is 21.0%"),
        (6, 4, "no evidence", "No evidence that the router helps or hurts"),
        (0, 0, "no evidence", "The difference is +0.0 points"),
    ],
)
def test_the_verdict_each_way(router_only, best_only, expected, words):
    found = figures_of(large(router_only, best_only))
    row = next(row for row in found["comparisons"] if row["second"] == "single:0")
    assert found["verdict"]["router"] == found["verdict"]["against"]["best_single"] == expected
    assert found["verdict"]["significance_level"] == 0.05
    assert words in found["verdict"]["text"]
    assert "chosen on these same tasks" in found["verdict"]["text"]
    assert (row["p_value_holm"] < 0.05) == (expected != "no evidence")


def test_the_uncorrected_p_value_does_not_decide():
    """7 tasks to 0 against either expert, p = 2 / 2^7; four comparisons more that show nothing: 6 p =
    0.094."""
    shares = large(7, 0)
    shares |= dict.fromkeys(("base", "uniform", "ensemble", "best"), shares["router"])
    shares["single:1"] = shares["single:0"]
    found = figures_of(shares)
    row = next(row for row in found["comparisons"] if row["second"] == "single:0")
    assert row["p_value"] == 1 / 64
    assert row["p_value_holm"] == 6 / 64
    assert found["verdict"]["router"] == "no evidence"


def test_the_verdict_says_how_it_stands_with_uniform_and_base():
    shares = large(6, 4)
    shares["uniform"] = [1.0] * 100
    found = figures_of(shares)["verdict"]
    assert found["against"] == {"best_single": "no evidence", "uniform": "hurts", "base": "helps"}
    assert "Against uniform it hurts (-74.0 points" in found["text"]
    assert "against base it helps (+26.0 points" in found["text"]


def test_without_a_router_there_is_no_verdict():
    shares = {
        strategy: of_task
        for strategy, of_task in shares_of(SOLVED, 10).items()
        if strategy not in ("router", "best")
    }
    found = figures_of(shares)
    assert (found["verdict"], found["comparisons"], found["only_router"]) == (None, [], None)


def test_several_samples_use_the_sign_flip_test_and_the_mean_of_the_best_shares():
    generator = np.random.default_rng(1)
    shares = {strategy: list(generator.integers(0, 6, 30) / 5) for strategy in SOLVED}
    found = figures_of(shares, n_samples=5)
    row = found["comparisons"][0]
    expected = paired_test(shares["router"], shares["single:0"], n_samples=5)
    assert (row["method"], row["p_value"]) == ("sign_flip", expected.p_value)
    best_of_each = np.maximum(shares["single:0"], shares["single:1"])
    assert found["possible_gain"]["oracle"]["pass@1"] == pytest.approx(best_of_each.mean())
    assert "sign-flip" in found["verdict"]["text"]


some_shares = st.integers(1, 12).flatmap(
    lambda count: st.fixed_dictionaries(
        {
            strategy: st.lists(st.sampled_from([0.0, 1.0]), min_size=count, max_size=count)
            for strategy in SOLVED
        }
    )
)


@settings(deadline=None, max_examples=60)
@given(some_shares)
def test_what_holds_for_any_results(shares):
    experts = ["single:0", "single:1"]
    best = max(experts, key=lambda expert: sum(shares[expert]))
    gain = possible_gain(shares, experts, best)
    count = len(shares["base"])
    assert gain["oracle"]["pass@1"] == pytest.approx(
        sum(map(max, zip(*map(shares.get, experts), strict=True))) / count
    )
    assert gain["gain"] >= 0
    for row in gain["reached"]:
        assert row["pass@1"] == pytest.approx(
            np.mean([shares[expert] for expert in experts])
            if row["strategy"] == "mean_single"
            else np.mean(shares[row["strategy"]])
        )
        if row["share"] is not None:
            assert row["share"] * gain["gain"] == pytest.approx(row["pass@1"] - np.mean(shares[best]))
    assert (gain["note"] is not None) == all(row["share"] is None for row in gain["reached"])
    rows = comparisons(shares, experts, 1)
    assert [row["p_value_holm"] for row in rows] == holm([row["p_value"] for row in rows])
    for row in rows:
        assert row["difference"] == pytest.approx((row["first_better"] - row["second_better"]) / count)
    decided = verdict(rows, best, shares)
    # few tasks cannot show anything: 6 comparisons need p < 0.0083, 8 tasks on one side at least
    if count < 8:
        assert decided["router"] == "no evidence"


@settings(deadline=None, max_examples=40)
@given(some_shares)
def test_each_task_is_counted_once(shares):
    found = figures_of(shares)
    assert sum(found["solved_by"]) == len(shares["base"])
    assert sum(len(expert["task_ids"]) for expert in found["only_one_expert"]) == found["solved_by"][1]
    solved = sum(found["solved_by"][1:])
    assert found["possible_gain"]["oracle"]["pass@1"] == pytest.approx(solved / len(shares["base"]))
    both = sum(map(bool, shares["router"])) - len(found["only_router"])
    assert both == solved - len(found["not_router"])
