"""What is made of the losses of texts: ratios of sums, intervals, and the verdict in words."""

import json
import math

import numpy as np
import pytest

from dylora_moe.eval.analysis.statistics import RESAMPLES, SEED
from dylora_moe.eval.report.loss_tables import describe_loss, loss_tables, losses_of_groups
from dylora_moe.eval.texts import loss_figures
from dylora_moe.eval.texts.loss_figures import figures, resampled_sums
from dylora_moe.eval.texts.text_losses import TextLosses


NAMES = ["law", "maths"]
STRATEGIES = ["base", "single:0", "single:1", "uniform", "best", "router"]
OF_FILE = {"model_label": "mixture", "dtype": "float32", "expert_names": NAMES}


def made_up(
    router: float = 1.3, num_texts: int = 40, seed: int = 0, groups: tuple[str, ...] = ("laws", "sums")
) -> TextLosses:
    """Texts on which each expert has its own half; the router is at `router` nats a token, more or less."""
    generator = np.random.default_rng(seed)
    num_tokens = generator.integers(20, 200, num_texts)
    is_law = np.arange(num_texts) % 2 == 0
    means = np.array([np.where(is_law, 1.0, 2.0), np.where(is_law, 2.2, 1.1)])
    nats = [np.full(num_texts, 2.5), *means, np.full(num_texts, 1.6), means.min(axis=0) + 0.1]
    nats.append(np.full(num_texts, router))
    nats = np.array(nats).T + generator.normal(0, 0.05, (num_texts, 6))
    return TextLosses(
        strategies=STRATEGIES,
        groups=[groups[number % len(groups)] for number in range(num_texts)],
        num_tokens=num_tokens,
        num_bytes=3 * num_tokens,
        nats=nats * num_tokens[:, None],
        oracle=(means.min(axis=0) - 0.2) * num_tokens,
    )


def only(losses: TextLosses, *strategies: str, oracle: bool = True) -> TextLosses:
    columns = [losses.strategies.index(strategy) for strategy in strategies]
    chosen = {"strategies": list(strategies), "nats": losses.nats[:, columns]}
    return TextLosses(**{**vars(losses), **chosen, "oracle": losses.oracle if oracle else None})


def test_figures_are_ratios_of_sums_over_the_texts_of_a_group():
    losses = made_up()
    found = figures(losses, NAMES)
    assert [group["group"] for group in found["groups"]] == ["laws", "sums"]
    for group, chosen in zip(
        [*found["groups"], found["all"]], [slice(0, None, 2), slice(1, None, 2), slice(None)], strict=True
    ):
        tokens, size = losses.num_tokens[chosen].sum(), losses.num_bytes[chosen].sum()
        assert (group["num_tokens"], group["num_bytes"]) == (tokens, size)
        value = {row["strategy"]: row["nats_per_token"] for row in group["strategies"]}
        for column, strategy in enumerate(STRATEGIES):
            row = group["strategies"][column]
            nats = losses.nats[chosen, column].sum()
            assert row["strategy"] == strategy
            assert row["nats_per_token"] == pytest.approx(nats / tokens)
            assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
            assert row["perplexity"] == pytest.approx(math.exp(nats / tokens))
        assert value["oracle_of_texts"] == pytest.approx(losses.nats[chosen, 1:3].min(axis=1).sum() / tokens)
        assert value["oracle_of_tokens"] == pytest.approx(losses.oracle[chosen].sum() / tokens)
        best = group["best_single"]
        assert best == min(("single:0", "single:1"), key=value.get)
        assert group["best_expert"] == NAMES[int(best[-1])]
        for name, difference in (
            ("router_minus_best_single", value["router"] - value[best]),
            ("best_single_minus_base", value[best] - value["base"]),
            ("oracle_of_texts_minus_best_single", value["oracle_of_texts"] - value[best]),
            ("oracle_of_tokens_minus_best_single", value["oracle_of_tokens"] - value[best]),
        ):
            assert group[name]["value"] == pytest.approx(difference)
        share = (value["uniform"] - value["router"]) / (value["uniform"] - value["oracle_of_tokens"])
        assert group["router_share"]["value"] == pytest.approx(share)
    assert [group["best_single"] for group in found["groups"]] == ["single:0", "single:1"]


def test_intervals_are_a_bootstrap_over_texts_with_all_their_losses(monkeypatch):
    monkeypatch.setattr(loss_figures, "DRAWN_AT_A_TIME", 40 * 300)  # in several pieces, the last one short
    losses = made_up()
    found = figures(losses, NAMES)["all"]
    generator = np.random.default_rng(SEED)
    draws = []
    for _ in range(RESAMPLES // 300):
        draws.append(generator.integers(40, size=(300, 40)))
    draws.append(generator.integers(40, size=(RESAMPLES % 300, 40)))
    draws = np.concatenate(draws)
    assert len(draws) == RESAMPLES

    def interval(statistic):
        values = [statistic(draw) for draw in draws]
        return [pytest.approx(end) for end in np.percentile(values, [2.5, 97.5])]

    of = dict(zip(STRATEGIES, losses.nats.T, strict=True))
    best = of[found["best_single"]]
    assert found["strategies"][5]["interval"] == interval(
        lambda draw: of["router"][draw].sum() / losses.num_tokens[draw].sum()
    )
    assert found["router_minus_best_single"]["interval"] == interval(
        lambda draw: (of["router"][draw] - best[draw]).sum() / losses.num_tokens[draw].sum()
    )
    assert found["router_share"]["interval"] == interval(
        lambda draw: (
            (of["uniform"][draw] - of["router"][draw]).sum()
            / (of["uniform"][draw] - losses.oracle[draw]).sum()
        )
    )


def test_the_interval_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(1).normal(5, 2, 400)
    sums = resampled_sums(np.stack([values, np.ones(400)], axis=1))
    assert sums.shape == (RESAMPLES, 2) and (sums[:, 1] == 400).all()
    assert (sums[:, 0] / 400).std() == pytest.approx(values.std() / 20, rel=0.03)


@pytest.mark.parametrize(
    ("router", "kind", "words"),
    [
        (1.1, "helps", "The router knows which to use: it is better than that expert, at -0."),
        (2.4, "hurts", "The router does not know which to use: it is worse than that expert, at +"),
        (1.5, "no evidence", "Whether the router knows which to use is open"),
    ],
)
def test_the_verdict_says_whether_the_router_knows(router, kind, words):
    found = figures(made_up(router), NAMES)
    assert found["verdict"]["router"] == kind and found["verdict"]["experts_differ"]
    text = found["verdict"]["text"]
    whole = found["all"]
    assert text.startswith("The experts differ: the best one for every token (the oracle) predicts ")
    assert words in text
    assert f"{whole['router_share']['value']:.0%} (" in text
    assert f"{-whole['oracle_of_tokens_minus_best_single']['value']:.3f} nats a token" in text


def test_experts_that_are_the_same_hardly_differ():
    losses = made_up()
    nats = losses.nats.copy()
    nats[:, 2] = nats[:, 3] = nats[:, 1]
    found = figures(TextLosses(**{**vars(losses), "nats": nats, "oracle": nats[:, 1]}), NAMES)
    assert found["verdict"]["experts_differ"] is False
    assert found["verdict"]["text"].startswith("The experts hardly differ")
    assert found["all"]["router_share"] is None  # of nothing
    json.dumps(found, allow_nan=False)


def test_what_cannot_be_said_is_left_out():
    losses = made_up()
    without_router = figures(only(losses, "base", "single:0", "single:1", "uniform"), NAMES)
    assert without_router["verdict"]["router"] is None
    assert "No router was measured" in without_router["verdict"]["text"]
    _, groups = loss_tables({**OF_FILE, **without_router})
    assert not [name for name in groups.columns if "router" in name]
    some = figures(only(losses, "single:0", "router", oracle=False), NAMES)
    assert some["verdict"] is None and some["all"]["router_minus_best_single"] is not None
    one = figures(only(losses, "base", "single:0", oracle=False), NAMES[:1])
    assert one["verdict"]["text"].startswith(
        "There is one expert, law, and nothing to choose. Against the base"
    )
    assert len(loss_tables({**OF_FILE, **one, "expert_names": NAMES[:1]})) == 1
    base = figures(only(losses, "base", oracle=False), [])
    assert base["verdict"] is None and base["all"]["best_single"] is None


def test_one_text_has_no_interval():
    found = figures(made_up(num_texts=1), NAMES)
    assert found["all"]["strategies"][0]["interval"] is None
    assert found["verdict"]["router"] is None and "One text is too few" in found["verdict"]["text"]
    for table in loss_tables({**OF_FILE, **found}):
        for row in table.rows:
            assert not any(table.cell(row, column).interval for column in table.shown_columns())
    assert describe_loss({**OF_FILE, **found}).startswith("mixture on 1 text of 1 group: ")


def test_many_groups_are_lines_of_the_file_and_no_columns():
    """Names of groups that end like the columns of intervals do are shown, too."""
    few = {**OF_FILE, **figures(made_up(groups=("yellow", "high")), NAMES)}
    shown = [column.heading for column in loss_tables(few)[0].shown_columns()]
    assert shown == [
        "routing strategy",
        "nats a token",
        "bits a byte",
        "perplexity",
        "yellow: nats",
        "high: nats",
    ]
    many = {**OF_FILE, **figures(made_up(groups=tuple("abcdefg")), NAMES)}
    table = loss_tables(many)[0]
    assert [column.heading for column in table.shown_columns()] == shown[:4]
    assert "7 groups are in loss.csv" in table.note
    assert len(losses_of_groups(many).rows) == 8 * 8
