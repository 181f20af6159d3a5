"""The files of an exported repo beside its weights: config and code, generation config, permissions.

It knows nothing about weights or sources.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import InputError, one_line


def write_config_and_code(folder: Path, config: Any) -> None:
    """`config.json`, and the files of `modeling/` that it points to.

    Raises:
        InputError: the config cannot be saved.
    """
    from dylora_moe.modeling.saving_dylora_moe import AUTO_MAP, save_code

    config.auto_map = dict(AUTO_MAP)
    try:
        config.save_pretrained(folder)
    except (ValueError, TypeError) as error:
        raise InputError(f"the config cannot be saved: {one_line(error)}") from error
    save_code(folder)


def write_generation_config(folder: Path, fields: dict[str, Any], strategy: str | None) -> None:
    """`generation_config.json`: what the foundation's held, and the routing strategy; None: no such field.

    The mark that it was derived from a model config must go: with it, transformers drops unknown fields on reading.
    """
    fields = {name: value for name, value in fields.items() if not name.startswith("_") and name != "routing_strategy"}
    if strategy is not None:
        fields["routing_strategy"] = strategy
    text = json.dumps(fields, indent=2, sort_keys=True)
    (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")


def make_readable(folder: Path) -> None:
    """Every file with the permissions that a new file gets here: some libraries make theirs for the owner alone."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
