"""What a user may say about a source: which part of it is read, and what it does not say itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from ..unknown_options import refuse_unknown


@dataclass
class SourceOptions:
    """What every command takes that reads a source. None leaves what the source says.

    Attributes:
        base_model: the base model (a folder or a Hub id), where the source names none or not the right one.
        lora_alpha: alpha of all experts, for training checkpoints that do not store it.
        revision: the source's revision on the Hub; of the first one, where there are several.
        subfolder: which of several checkpoints in the source; in the first one, where there are several.
    """

    base_model: str | None = None
    lora_alpha: float | None = None
    revision: str | None = None
    subfolder: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Make them from what a caller gave by name.

        Raises:
            InputError: a name that is not a field, or a value that is none of those there are.
        """
        refuse_unknown(options, cls.names())
        return cls(**options)

    @classmethod
    def names(cls) -> list[str]:
        """List the names of all options."""
        return [entry.name for entry in fields(cls)]


@dataclass
class ReadOptions(SourceOptions):
    """What a reader takes besides: settings of the router, which some training checkpoints do not store."""

    num_experts_per_tok: int | None = None
    router_temperature: float | None = None
