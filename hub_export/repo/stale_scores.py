"""Scores that a repo's card states and another router or mode no longer gives: they go, in all three places.

Only what the export wrote goes: rows of its table, entries of `model-index` as it recorded them, and its own files in
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
from .model_card import RECORD, recorded_metadata, split_card


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
    fields, text = split_card(card)
    recorded = recorded_metadata(text)
    if fields.get("model-index") == recorded.get("model-index") and recorded.get("model-index"):
        kept = _without_entries(recorded["model-index"], strategies)
        for each in (fields, recorded):
            each["model-index"] = kept
            if not kept:
                del each["model-index"]
        record = json.dumps(recorded, sort_keys=True).replace("--", "-\\u002d")  # no end of a comment
        text = RECORD.sub(lambda _: f"<!-- metadata that was generated, too: {record} -->", text, count=1)
        front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()
        card = f"---\n{front}\n---\n{text}"
    for strategy in strategies:
        row = ROW.format(strategy=re.escape(as_markdown_code(strategy)))
        card = re.sub(row, "", card, flags=re.MULTILINE)
    return card.replace(f"{EMPTY}\n", "")


def _without_entries(index: list[dict[str, Any]], strategies: Collection[str]) -> list[dict[str, Any]]:
    """Leave out a `model-index`'s results of some strategies, and models without any left."""
    names = tuple(f"pass@1 ({strategy}, " for strategy in strategies)
    kept = []
    for model in index:
        results = []
        for result in model["results"]:
            metrics = [metric for metric in result["metrics"] if not metric["name"].startswith(names)]
            results += [{**result, "metrics": metrics}] if metrics else []
        kept += [{**model, "results": results}] if results else []
    return kept


__all__ = ["drop_scores"]
