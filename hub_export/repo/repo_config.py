"""What an exported repo says of itself: that it is one, its config, its default strategy.

config.json              model_type "dylora_moe"
generation_config.json   routing_strategy
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError, one_line
from ..sources.source_folder import SourceFolder, open_folder
from ..tensors.mixture import MOST_EXPERTS, FoundationReference


MODEL_TYPE = "dylora_moe"
# One for each expert at each place that any of them adapts. 4096 experts on 560 layers have half as many, and 64
# experts on each of the 70,000 matrices of the largest models' own experts no more.
MOST_RANKS = 5_000_000


def is_exported_repo(folder: Path | SourceFolder) -> bool:
    """Whether `config.json` says that this package wrote the folder. Never raises."""
    try:
        return open_folder(folder).read_json("config.json").get("model_type") == MODEL_TYPE
    except InputError:
        return False


def check_is_exported_repo(folder: Path | SourceFolder) -> None:
    """Raise InputError if `config.json` does not say that this package wrote the folder, or is damaged."""
    config = open_folder(folder).read_json("config.json", required=False)
    if config.get("model_type") != MODEL_TYPE:
        raise InputError(
            f"{folder} is not an exported repo: its config.json does not have model_type {MODEL_TYPE}"
        )


def load_config(folder: Path | SourceFolder):
    """Load the repo's config, as this package's own class.

    Raises:
        InputError: it is another model's config, or not valid.
    """
    from dylora_moe.modeling import DyloraMoeConfig

    check_is_exported_repo(folder)
    entries = open_folder(folder).read_json("config.json").get("expert_configs")
    if isinstance(entries, list) and len(entries) > MOST_EXPERTS:
        raise InputError(
            f"{folder}/config.json: expert_configs has {len(entries):,} experts, more than {MOST_EXPERTS:,}; correct it"
        )
    try:
        config = DyloraMoeConfig.from_pretrained(open_folder(folder).path)
        size = len(config.adapted_places()) * config.num_experts
    except Exception as error:  # any wrong field may make the config class fail in its own way
        raise InputError(f"{folder}/config.json is not a valid config: {one_line(error)}") from error
    if size > MOST_RANKS:
        raise InputError(
            f"{folder}/config.json: its experts adapt {len(config.adapted_places()):,} modules, and more than {MOST_RANKS:,} "
            "ranks would be kept for them; correct it"
        )
    return config


def foundation_of(folder: Path | SourceFolder, config: Any) -> FoundationReference:
    """Return the foundation that a repo's config names."""
    return FoundationReference(
        config.base_model_name_or_path, config.base_model_revision, folder / "config.json"
    )


def stored_routing_strategy(folder: Path | SourceFolder, config: Any) -> str:
    """Return the repo's default strategy, in canonical form (experts by number).

    Raises:
        InputError: `generation_config.json` names one that the repo cannot do.
    """
    from dylora_moe.modeling.routing_strategies_dylora_moe import resolve_routing_strategy

    path = open_folder(folder) / "generation_config.json"
    stored = open_folder(folder).read_json(path.name, required=False).get("routing_strategy")
    try:
        return str(resolve_routing_strategy(stored, config))
    except ValueError as error:
        raise InputError(f"{path}: {one_line(error, 500)}") from error
