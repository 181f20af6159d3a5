"""What a user may say about a source: which part of it is read, and what it does not say itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Self

from ..unknown_options import parameter_names, refuse_unknown


@dataclass
class SourceOptions:
    """What every command takes that reads a source. None leaves what the source says.

    Every field is annotated with its help; the command line makes its options from these. `revision` and `subfolder`
    are of the first source, where there are several.
    """

    base_model: Annotated[str | None, "The base model: a folder or a Hub id."] = None
    lora_alpha: Annotated[float | None, "Alpha, where it is not stored."] = None
    revision: Annotated[str | None, "The source's revision on the Hub."] = None
    subfolder: Annotated[str | None, "Which checkpoint, where the source holds several."] = None

    @classmethod
    def of(cls, options: Mapping[str, Any], *functions: Callable) -> Self:
        """Make them from what a caller gave by name, of `functions` beside their own parameters.

        Raises:
            InputError: a name that neither has, or a value that is none of those there are.
        """
        cls.check_names(options, *functions)
        return cls(**options)

    @classmethod
    def check_names(cls, options: Mapping[str, Any], *functions: Callable) -> None:
        """Raise InputError for a name that neither these options nor the parameters of `functions` have."""
        refuse_unknown(options, cls.names() + parameter_names(*functions))

    @classmethod
    def names(cls) -> list[str]:
        """List the names of all options."""
        return [entry.name for entry in fields(cls)]


@dataclass
class ReadOptions(SourceOptions):
    """What a reader takes besides: settings of the router, which some training checkpoints do not store."""

    num_experts_per_tok: Annotated[int | None, "How many experts act on a token, if sparse."] = None
    router_temperature: Annotated[float | None, "Divides the router's logits, if dense, and arrow's."] = None
