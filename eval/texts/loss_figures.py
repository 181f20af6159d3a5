"""What the losses of texts say of the experts and of the router.

Every figure is a ratio of sums over texts, so texts count by their tokens. Intervals are the percentile
bootstrap's over texts: a text is drawn with its losses under all strategies, which are compared text by text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..analysis.statistics import RESAMPLES, SEED
from .text_losses import TextLosses


CONFIDENCE = 0.95
# Oracles: the best expert of every text, and of every token; experts alone, not the base model.
OF_TEXTS, OF_TOKENS = "oracle_of_texts", "oracle_of_tokens"
TOKENS, BYTES = "tokens", "bytes"
ROUTER, UNIFORM, BASE = "router", "uniform", "base"
COMPARED = (
    "oracle_of_texts_minus_best_single",
    "oracle_of_tokens_minus_best_single",
    "router_minus_best_single",
    "best_single_minus_base",
    "router_share",
)
HARDLY = 0.01  # the share of its loss below which a gain is called hardly any
HIGHEST = 700.0  # nats of a perplexity that is still a number
DRAWN_AT_A_TIME = 2**22  # texts

# Nats a token of some draws of texts, `[draws]`, by strategy.
Losses = dict[str, np.ndarray]


def figures(losses: TextLosses, expert_names: Sequence[str]) -> dict[str, Any]:
    """Compute all figures, by group and over all texts; `verdict` says them in words."""
    groups = list(dict.fromkeys(losses.groups))
    columns = _columns(losses, len(expert_names))
    table = np.stack([columns[name] for name in columns], axis=1)  # [texts, columns]
    of_group = np.array(losses.groups)
    whole = group_figures("all", table, list(columns), expert_names)
    return {
        "confidence": CONFIDENCE,
        "all": whole,
        "groups": [
            group_figures(group, table[of_group == group], list(columns), expert_names) for group in groups
        ],
        "verdict": verdict(whole, expert_names),
    }


def _columns(losses: TextLosses, num_experts: int) -> dict[str, np.ndarray]:
    """Name the sums of every text: nats under each strategy and oracle, tokens, bytes."""
    columns = dict(zip(losses.strategies, losses.nats.T, strict=True))
    if losses.oracle is not None:
        experts = [columns[f"single:{expert}"] for expert in range(num_experts)]
        columns |= {OF_TEXTS: np.min(experts, axis=0), OF_TOKENS: losses.oracle}
    return columns | {TOKENS: losses.num_tokens, BYTES: losses.num_bytes}


def group_figures(
    group: str, table: np.ndarray, columns: Sequence[str], expert_names: Sequence[str]
) -> dict[str, Any]:
    """Compute the figures of some texts.

    Args:
        table: `[texts, columns]`.
    """
    sums = dict(zip(columns, table.sum(axis=0), strict=True))
    losses = _losses(table.sum(axis=0, keepdims=True), columns)
    drawn = _losses(resampled_sums(table), columns)

    def found(figure: Callable[[Losses], np.ndarray]) -> dict[str, Any] | None:
        """A figure made of losses, with its interval; None where it is not defined."""
        value = float(figure(losses)[0])
        if not math.isfinite(value):
            return None
        return {"value": value, "interval": _interval(figure(drawn), len(table))}

    experts = [name for name in losses if name.startswith("single:")]
    best = min(experts, key=lambda name: sums[name], default=None)  # of equals, the first
    compared: dict[str, Any] = dict.fromkeys(COMPARED)
    if best is not None and OF_TOKENS in losses:
        for oracle in (OF_TEXTS, OF_TOKENS):
            compared[f"{oracle}_minus_best_single"] = found(lambda loss, of=oracle: loss[of] - loss[best])
    if best is not None and ROUTER in losses:
        compared["router_minus_best_single"] = found(lambda loss: loss[ROUTER] - loss[best])
    if best is not None and BASE in losses:
        compared["best_single_minus_base"] = found(lambda loss: loss[best] - loss[BASE])
    if {ROUTER, UNIFORM, OF_TOKENS} <= set(losses):
        compared["router_share"] = found(_share)
    return {
        "group": group,
        "num_texts": len(table),
        "num_tokens": int(sums[TOKENS]),
        "num_bytes": int(sums[BYTES]),
        "strategies": [
            {
                "strategy": name,
                "nats_per_token": float(losses[name][0]),
                "interval": _interval(drawn[name], len(table)),
                "bits_per_byte": float(sums[name] / math.log(2) / sums[BYTES]) if sums[BYTES] else None,
                "perplexity": math.exp(losses[name][0]) if losses[name][0] < HIGHEST else None,
            }
            for name in losses
        ],
        "best_single": best,
        "best_expert": None if best is None else expert_names[int(best.partition(":")[2])],
        **compared,
    }


def _losses(sums: np.ndarray, columns: Sequence[str]) -> Losses:
    """Divide sums `[draws, columns]` by their tokens: nats a token of every draw, by strategy."""
    of = dict(zip(columns, sums.T, strict=True))
    return {name: of[name] / of[TOKENS] for name in columns if name not in (TOKENS, BYTES)}


def _share(loss: Losses) -> np.ndarray:
    """Compute how much of the way from `uniform` to the oracle of tokens the router goes."""
    gap = loss[UNIFORM] - loss[OF_TOKENS]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gap > 0, (loss[UNIFORM] - loss[ROUTER]) / gap, np.nan)


def resampled_sums(table: np.ndarray) -> np.ndarray:
    """Draw as many texts as there are, with replacement, `RESAMPLES` times; sum the columns of each draw.

    Args:
        table: `[texts, columns]`.

    Returns:
        `[RESAMPLES, columns]`; the same for the same table.
    """
    generator, count = np.random.default_rng(SEED), len(table)
    at_a_time = max(1, DRAWN_AT_A_TIME // count)
    sums = []
    for start in range(0, RESAMPLES, at_a_time):
        draws = min(at_a_time, RESAMPLES - start)
        texts = generator.integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
        times = np.bincount(texts.ravel(), minlength=draws * count).reshape(draws, count)
        sums.append(times @ table)
    return np.concatenate(sums)


def _interval(values: np.ndarray, num_texts: int) -> list[float] | None:
    """Return the ends of the interval; `None` for a single text, or where the figure is not always defined."""
    if num_texts < 2 or not np.isfinite(values).all():
        return None
    tail = 100 * (1 - CONFIDENCE) / 2
    return [float(end) for end in np.percentile(values, [tail, 100 - tail])]


def verdict(whole: dict[str, Any], expert_names: Sequence[str]) -> dict[str, Any] | None:
    """Judge in words whether the experts differ, and whether the router knows which to use.

    `router` is "helps", "hurts" or "no evidence": the router against the best single expert, whose loss is the
    lowest over these very texts; `None` without a router, or for a single text, which has no interval.
    """
    best, name = whole["best_single"], whole["best_expert"]
    if best is None:
        return None
    if len(expert_names) == 1:
        found = whole["best_single_minus_base"]
        text = f"There is one expert, {name}, and nothing to choose."
        if found is not None:
            text += f" Against the base model it is at {_nats(found)} nats a token (lower is better)."
        return {"router": None, "experts_differ": None, "text": text}
    if whole["oracle_of_tokens_minus_best_single"] is None:
        return None
    loss = next(row["nats_per_token"] for row in whole["strategies"] if row["strategy"] == best)
    gain = abs(whole["oracle_of_tokens_minus_best_single"]["value"])
    of_texts = abs(whole["oracle_of_texts_minus_best_single"]["value"])
    differ = gain >= HARDLY * loss
    text = (
        f"The experts {'differ' if differ else 'hardly differ'}: the best one for every token (the oracle) predicts "
        f"{gain:.3f} nats a token ({gain / loss:.1%}) better than the best single one, {best} ({name}), and the best one "
        f"for every text {of_texts:.3f}."
    )
    kind, of_router = _of_router(whole)
    return {"router": kind, "experts_differ": differ, "text": f"{text} {of_router}"}


def _of_router(whole: dict[str, Any]) -> tuple[str | None, str]:
    found, share = whole["router_minus_best_single"], whole["router_share"]
    if found is None:
        return None, "No router was measured that could choose among them."
    if found["interval"] is None:
        return None, "One text is too few to judge the router by."
    low, high = found["interval"]
    kind = "helps" if high < 0 else "hurts" if low > 0 else "no evidence"
    text = {
        "helps": "The router knows which to use: it is better than that expert, at",
        "hurts": "The router does not know which to use: it is worse than that expert, at",
        "no evidence": "Whether the router knows which to use is open: against that expert it is at",
    }[kind]
    text += f" {_nats(found)} nats a token"
    if share is not None:
        text += f", and goes {_percent(share)} of the way from uniform to the oracle"
    return kind, f"{text}."


def _nats(found: dict[str, Any]) -> str:
    interval = found["interval"]
    return f"{found['value']:+.3f}" + (f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else "")


def _percent(found: dict[str, Any]) -> str:
    interval = found["interval"]
    return f"{found['value']:.0%}" + (f" ({interval[0]:.0%} to {interval[1]:.0%})" if interval else "")


__all__ = ["CONFIDENCE", "OF_TEXTS", "OF_TOKENS", "figures", "group_figures", "resampled_sums", "verdict"]
