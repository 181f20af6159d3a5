"""The options of `explore`: name, type, default and help, each said here alone.

The command line makes its own options from these fields, so this file imports nothing that takes long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.sources.source_options import SourceOptions

from ..options import DTYPES, AttnImplementation, DeviceMap, TrustRemoteCode, known_dtype


OF_A_SPACE = ("revision", "dtype", "trust_remote_code")  # the others say how a page on this machine is served
HIGHEST_PORT = 65535


@dataclass
class ExploreOptions(SourceOptions):
    """What the page shows, and where. Every field is annotated with what it means.

    Raises:
        InputError: a value that cannot be used.
    """

    dtype: Annotated[str | None, "What is computed in; else bfloat16 on a GPU, float32 without.", DTYPES] = (
        None
    )
    device_map: DeviceMap = None
    attn_implementation: AttnImplementation = None
    trust_remote_code: TrustRemoteCode = False
    port: Annotated[int | None, "Of the page; else the first free one from 7860 on."] = None
    share: Annotated[bool, "Also serve it to everyone, at an address of Gradio's servers."] = False

    def __post_init__(self) -> None:
        if self.dtype is not None:
            self.dtype = known_dtype(self.dtype)
        if self.port is not None and not 1 <= self.port <= HIGHEST_PORT:
            raise InputError(f"--port is {self.port}; it must be between 1 and {HIGHEST_PORT}")

    @property
    def of_source(self) -> dict[str, Any]:
        """Those that say where the model is, and what its source does not say itself."""
        return {name: getattr(self, name) for name in (*SourceOptions.names(), "trust_remote_code")}

    def check_for_space(self) -> None:
        """Raise InputError for what a Space cannot obey."""
        for name, default in vars(ExploreOptions()).items():
            if name not in OF_A_SPACE and getattr(self, name) != default:
                raise InputError(f"--{name} is for a page on this machine; leave it out with --space")


__all__ = ["ExploreOptions"]
