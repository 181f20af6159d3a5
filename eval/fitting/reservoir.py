"""A file with some texts of every group that a mixture has learned, for the next time it grows."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from dylora_moe.hub_export.staging import write_atomically

from ..texts.reading import Text


def line_of(text: Text) -> str:
    """Write a text as a line of a JSONL file, with its group."""
    entry: dict[str, str] = {"group": text.group}
    if text.prompt:
        entry |= {"prompt": text.text[: text.prompt], "completion": text.text[text.prompt :]}
    else:
        entry["text"] = text.text
    for name in ("expert", "task_id"):
        if getattr(text, name) is not None:
            entry[name] = getattr(text, name)
    return json.dumps(entry)


def write_texts(path: Path, texts: Iterable[Text]) -> None:
    """Write texts as a JSONL file."""
    write_atomically(path, "".join(line_of(text) + "\n" for text in texts))


def keep_some(texts: Iterable[Text], most: int, seed: int) -> list[Text]:
    """Keep at most `most` texts of every group, each equally likely to be kept."""
    groups: dict[str, list[Text]] = defaultdict(list)
    for text in texts:
        groups[text.group].append(text)
    kept = []
    for group, members in sorted(groups.items()):
        chosen = set(random.Random(f"{seed} {group}").sample(range(len(members)), min(most, len(members))))
        kept += [text for number, text in enumerate(members) if number in chosen]
    return kept


__all__ = ["keep_some", "line_of", "write_texts"]
