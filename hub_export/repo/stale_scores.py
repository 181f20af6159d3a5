"""Scores that a repo's card states and another router or mode no longer gives: they go, in all three places.

Only what the export wrote goes: rows of its table, entries of `model-index` under its names, and its own files in
`.eval_results`. What a person wrote stays.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from ..errors import DyloraMoeWarning
from ..shown_text import as_markdown_code
from ..sources.text_files import read_text
from .eval_results import FOLDER, results_name
from .model_card import BEGIN, END, RECORD, recorded_metadata, split_readable


ROW = r"^\| [^|\n]* \| {strategy} \| [^|\n]* \| [^|\n]* \|\n"
EMPTY = "## Results\n\n| benchmark | strategy | pass@1 | tasks |\n|---|---|---|---|\n"


def drop_scores(folder: Path, strategies: Collection[str]) -> None:
    """Take the scores of strategies out of a repo's card and `.eval_results`, with a warning if there were any."""
    card = folder / "README.md"
    before = read_text(card, errors="surrogateescape") if card.is_file() else ""
    after = _without_scores(before, strategies)
    if after != before:
        card.write_text(after, encoding="utf-8", errors="surrogateescape")
    stale = [path for strategy in strategies for path in (folder / FOLDER).glob(results_name("*", strategy))]
    for path in stale:
        path.unlink()
    if stale or after != before:
        names = " and ".join(f"`{strategy}`" for strategy in strategies)
        warnings.warn(
            f"the card's scores of {names} were left out: they are of another router or router mode",
            DyloraMoeWarning,
            stacklevel=4,
        )


def _without_scores(card: str, strategies: Collection[str]) -> str:
    fields, text = split_readable(card)
    if _drop_entries(fields, strategies):
        recorded = recorded_metadata(text)
        _drop_entries(recorded, strategies)
        record = json.dumps(recorded, sort_keys=True).replace("--", "-\\u002d")  # no end of a comment
        text = RECORD.sub(lambda _: f"<!-- metadata that was generated, too: {record} -->", text, count=1)
        front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()
        card = f"---\n{front}\n---\n{text}"
    before, begin, rest = card.partition(BEGIN)
    generated, end, after = rest.partition(END)
    for strategy in strategies:
        row = ROW.format(strategy=re.escape(as_markdown_code(strategy)))
        generated = re.sub(row, "", generated, flags=re.MULTILINE)
    return before + begin + generated.replace(f"{EMPTY}\n", "") + end + after


def _drop_entries(fields: dict[str, Any], strategies: Collection[str]) -> bool:
    """Take results of some strategies out of a card's `model-index`, and models without any left; say if it changed.

    A person may have edited the rest of it, in any form.
    """
    names = tuple(f"pass@1 ({strategy}, " for strategy in strategies)
    kept, index = [], _items(fields, "model-index")
    for model in index:
        results = []
        for result in _items(model, "results"):
            metrics = [metric for metric in _items(result, "metrics") if not _name(metric).startswith(names)]
            if metrics == _items(result, "metrics"):
                results.append(result)
            elif metrics:
                results.append({**result, "metrics": metrics})
        if results == _items(model, "results"):
            kept.append(model)
        elif results:
            kept.append({**model, "results": results})
    if kept == index:
        return False
    fields["model-index"] = kept
    if not kept:
        del fields["model-index"]
    return True


def _items(fields: Any, name: str) -> list[Any]:
    found = fields.get(name) if isinstance(fields, dict) else None
    return found if isinstance(found, list) else []


def _name(metric: Any) -> str:
    return str(metric.get("name")) if isinstance(metric, dict) else ""


__all__ = ["drop_scores"]
