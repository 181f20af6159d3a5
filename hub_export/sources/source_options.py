"""What a user may say about a source: which part of it is read, and what it does not say itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..unknown_options import NamedOptions


@dataclass
class SourceOptions(NamedOptions):
    """What every command takes that reads a source. None leaves what the source says.

    Every field is annotated with its help; the command line makes its options from these. `revision` and `subfolder`
    are of the first source, where there are several.
    """

    base_model: Annotated[str | None, "The base model: a folder or a Hub id."] = None
    lora_alpha: Annotated[float | None, "Alpha, where it is not stored."] = None
    revision: Annotated[str | None, "The source's revision on the Hub."] = None
    subfolder: Annotated[str | None, "Which checkpoint, where the source holds several."] = None


@dataclass
class ReadOptions(SourceOptions):
    """What a reader takes besides: settings of the router, which some training checkpoints do not store."""

    num_experts_per_tok: Annotated[int | None, "How many experts act on a token, if sparse."] = None
    router_temperature: Annotated[float | None, "Divides the router's logits, if dense, and arrow's."] = None
