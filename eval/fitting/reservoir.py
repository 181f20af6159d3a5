"""A file with some texts of every group that a mixture has learned, for the next time it grows."""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.staging import write_atomically

from ..texts.reading import Text


def check_reservoir(path: Path, repos: Sequence[Path]) -> None:
    """Check that the file can be written, before hours of work.

    Args:
        repos: folders that it may not lie in.

    Raises:
        InputError: it cannot, or it would be read as one text the next time.
    """
    if path.suffix.lower() != ".jsonl":
        raise InputError(
            f"--reservoir {path} is to hold an object a line; give it a name that ends in .jsonl"
        )
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"--reservoir {path} cannot be written; name a file in a folder that there is")
    for repo in repos:
        if repo.resolve() in (folder, *folder.parents):
            raise InputError(f"--reservoir {path} lies in the repo {repo}; keep it beside")


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


__all__ = ["check_reservoir", "keep_some", "line_of", "write_texts"]
