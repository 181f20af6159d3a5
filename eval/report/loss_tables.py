"""The tables of a measured loss, from `loss.json`, and what the command prints of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .report_table import DECIMALS, DIFFERENCE, WHOLE_PERCENT, ReportTable
from .run_labels import strategy_label


if TYPE_CHECKING:
    from rich.console import Console


MOST_GROUPS = 6  # that have columns of their own
NATS = "nats a token"
TEXTS_MINUS_BEST = "oracle of texts - best single"
TOKENS_MINUS_BEST = "oracle of tokens - best single"
MINUS_BEST = "router - best single"
SHARE = "of uniform to oracle"
ORACLES = {
    "oracle_of_texts": "oracle: best expert of a text",
    "oracle_of_tokens": "oracle: best expert of a token",
}


def loss_tables(loss: dict[str, Any]) -> list[ReportTable]:
    """Make the table of losses and, where there are several experts, that of the groups."""
    tables = [_losses(loss)]
    if len(loss["expert_names"]) > 1 and loss["all"]["best_single"] is not None:
        tables.append(_groups(loss))
    return tables


def print_loss(loss: dict[str, Any], console: Console) -> None:
    """Print every table, the verdict last."""
    console.print(describe_loss(loss), markup=False)
    for table in loss_tables(loss):
        table.print(console)
    if loss["verdict"] is not None:
        console.print(loss["verdict"]["text"], markup=False)


def describe_loss(loss: dict[str, Any]) -> str:
    """Say in a line what was measured."""
    whole = loss["all"]
    groups = len(loss["groups"])
    return (
        f"{loss['model_label']} on {whole['num_texts']:,} text{'s' * (whole['num_texts'] > 1)} of {groups} "
        f"group{'s' * (groups > 1)}: {whole['num_tokens']:,} tokens, {whole['num_bytes']:,} bytes; {loss['dtype']}"
    )


def losses_of_groups(loss: dict[str, Any]) -> ReportTable:
    """Make the table with a row for each group and strategy; the group of all texts is called `all`."""
    columns = ["group", "texts", "tokens", "bytes", "routing strategy"]
    columns += [NATS, f"{NATS} low", f"{NATS} high", "bits a byte", "perplexity"]
    rows = [
        [group["group"], group["num_texts"], group["num_tokens"], group["num_bytes"], row["strategy"]]
        + [row["nats_per_token"], *_ends(row), row["bits_per_byte"], row["perplexity"]]
        for group in [*loss["groups"], loss["all"]]
        for row in group["strategies"]
    ]
    return ReportTable("loss_by_group", "Loss by group of texts", columns, rows)


def _losses(loss: dict[str, Any]) -> ReportTable:
    shown = loss["groups"] if 1 < len(loss["groups"]) <= MOST_GROUPS else []
    names = [f"{group['group']}: nats" for group in shown]
    rows = []
    places = enumerate(loss["all"]["strategies"])
    for place, row in sorted(
        places, key=lambda found: (found[1]["strategy"] in ORACLES, found[1]["nats_per_token"])
    ):
        label = ORACLES.get(row["strategy"]) or strategy_label(row["strategy"], loss["expert_names"])
        figures = [row["nats_per_token"], *_ends(row), row["bits_per_byte"], row["perplexity"]]
        rows.append([label, *figures, *(group["strategies"][place]["nats_per_token"] for group in shown)])
    note = f"Over all texts, by tokens; lower is better, and the best comes first. {100 * loss['confidence']:g} % intervals by bootstrap over texts."
    if any(row["strategy"] in ORACLES for row in loss["all"]["strategies"]):
        note += " Oracles choose among the experts alone, with hindsight."
    if any(row["strategy"] == "best" for row in loss["all"]["strategies"]):
        note += " best reads a text's prompt, and without one the text that it then predicts."
    if len(loss["groups"]) > MOST_GROUPS:
        note += f" {len(loss['groups'])} groups are in loss.csv."
    columns = ["routing strategy", NATS, f"{NATS} low", f"{NATS} high", "bits a byte", "perplexity", *names]
    formats = dict.fromkeys([NATS, "bits a byte", "perplexity", *names], DECIMALS)
    return ReportTable("loss", "Loss of held-out texts by routing strategy", columns, rows, note, formats)


def _groups(loss: dict[str, Any]) -> ReportTable:
    columns = ["group", "texts", "tokens", "best single", TEXTS_MINUS_BEST, TOKENS_MINUS_BEST]
    has_router = loss["all"]["router_minus_best_single"] is not None
    if has_router:
        columns += [MINUS_BEST, f"{MINUS_BEST} low", f"{MINUS_BEST} high"]
        columns += [SHARE, f"{SHARE} low", f"{SHARE} high"]
    rows = []
    for group in [*loss["groups"], loss["all"]]:
        row = [group["group"], group["num_texts"], group["num_tokens"]]
        row += [strategy_label(group["best_single"], loss["expert_names"])]
        row += [_value(group[f"{oracle}_minus_best_single"]) for oracle in ORACLES]
        if has_router:
            for found in (group["router_minus_best_single"], group["router_share"]):
                row += [_value(found), *_ends(found)]
        rows.append(row)
    note = (
        "Differences in nats a token; below 0 is better. The best single expert is the one with the lowest loss on the "
        "very texts of a group."
    )
    if has_router:
        note += " Of the way from uniform to the oracle of tokens the router goes (uniform - router) / (uniform - oracle)."
    formats = {
        TEXTS_MINUS_BEST: DIFFERENCE,
        TOKENS_MINUS_BEST: DIFFERENCE,
        MINUS_BEST: DIFFERENCE,
        SHARE: WHOLE_PERCENT,
    }
    title = "What there is to choose, and what the router makes of it"
    return ReportTable("loss_groups", title, columns, rows, note, formats)


def _value(found: dict[str, Any] | None) -> float | None:
    return None if found is None else found["value"]


def _ends(found: dict[str, Any] | None) -> list[float | None]:
    if found is None or found["interval"] is None:
        return [None, None]
    return list(found["interval"])


__all__ = ["describe_loss", "loss_tables", "losses_of_groups", "print_loss"]
