"""What an exported repo says of itself: that it is one, its config, its default strategy.

config.json              model_type "dylora_moe"
generation_config.json   routing_strategy
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError, one_line
from ..tensors.containment import contained
from ..tensors.mixture import FoundationReference
from ..tensors.tensor_files import read_json


MODEL_TYPE = "dylora_moe"


def is_exported_repo(folder: Path) -> bool:
    """Whether `config.json` says that this package wrote the folder. Never raises."""
    try:
        return read_json(folder / "config.json").get("model_type") == MODEL_TYPE
    except InputError:
        return False


def check_is_exported_repo(folder: Path) -> None:
    """Raises InputError: `config.json` does not say that this package wrote the folder, or is damaged."""
    path = folder / "config.json"
    if not path.is_file() or read_json(path).get("model_type") != MODEL_TYPE:
        raise InputError(
            f"{folder} is not an exported repo: its config.json does not have model_type {MODEL_TYPE}"
        )


def load_config(folder: Path):
    """The repo's config, as this package's own class.

    Raises:
        InputError: it is another model's config, or not valid.
    """
    from dylora_moe.modeling import DyloraMoeConfig

    check_is_exported_repo(folder)
    contained(folder, folder / "config.json")
    try:
        return DyloraMoeConfig.from_pretrained(folder)
    except Exception as error:  # any wrong field may make the config class fail in its own way
        raise InputError(f"{folder}/config.json is not a valid config: {one_line(error)}") from error


def foundation_of(folder: Path, config: Any) -> FoundationReference:
    """The foundation that a repo's config names."""
    return FoundationReference(
        config.base_model_name_or_path, config.base_model_revision, folder / "config.json"
    )


def stored_routing_strategy(folder: Path, config: Any) -> str:
    """The strategy that the repo starts with, in canonical form (experts by number).

    Raises:
        InputError: `generation_config.json` names one that the repo cannot do.
    """
    from dylora_moe.modeling.routing_strategies_dylora_moe import resolve_routing_strategy

    path = folder / "generation_config.json"
    stored = read_json(contained(folder, path)).get("routing_strategy") if path.is_file() else None
    try:
        return str(resolve_routing_strategy(stored, config))
    except ValueError as error:
        raise InputError(f"{path}: {one_line(error, 500)}") from error
