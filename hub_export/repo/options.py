"""What a user may choose about an export, and what an export says it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import InputError
from ..sources.source_options import ReadOptions
from .choices import check_strategy, long_dtype


if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("full", "adapter")
# For the help; the config refuses any other. `none` is for `export` alone.
ROUTER_MODES = ("auto", "dense", "sparse")
ROUTER_INPUTS = ("base", "experts_sum", "none")


@dataclass
class ExportOptions(ReadOptions):
    """The options of `export`, those of `SourceOptions` included; None leaves the source's, or the default.

    Raises:
        InputError: a value that is none of those there are.
    """

    base_revision: Annotated[str | None, "The base model's revision."] = None
    layout: Annotated[str, "adapter: the base model stays where it is.", LAYOUTS] = "full"
    routing_strategy: Annotated[str | None, "The repo's default strategy."] = None
    router_mode: Annotated[
        str | None, "sparse: the top k experts; dense: all; auto: dense in training.", ROUTER_MODES
    ] = None
    router_input: Annotated[
        str | None, "What the gate reads: no expert, or all; none: no router.", ROUTER_INPUTS
    ] = None
    router_prompts: Annotated[Path | None, "YAML, expert to prompts: a router without training."] = None
    router: Annotated[str | None, "A router in every layer, of the experts' own weights.", ("arrow",)] = None
    subtract: Annotated[
        str | None, "An adapter to subtract from each expert: the products, not A and B as in PEFT."
    ] = None
    expert_names: Annotated[list[str] | None, "Names for the experts: one,two or the option repeated."] = None
    tokenizer: Annotated[str | None, "A folder or a Hub id."] = None
    dtype: Annotated[
        str | None, "What is stored; else as in the source. bf16, fp16, fp32 do, too.", DTYPES
    ] = None
    max_shard_size: Annotated[str, "Split weights beyond this size."] = "5GB"
    results: Annotated[list[str] | None, "STRATEGY=FILE of EvalPlus's results, for the card; repeatable."] = (
        field(default_factory=list)
    )
    overwrite: Annotated[bool, "Replace an exported repo, atomically."] = False
    verify: Annotated[bool, "Check the repo against the source."] = True
    trust_remote_code: Annotated[bool, "Let a tokenizer run code of its own."] = False

    def __post_init__(self):
        self.dtype = long_dtype(self.dtype)
        if self.routing_strategy is not None:
            check_strategy(self.routing_strategy)
        if self.dtype not in (None, "auto", *DTYPES):
            raise InputError(f"--dtype {self.dtype} is not known; it can be auto, {', '.join(DTYPES)}")
        if self.layout not in LAYOUTS:
            raise InputError(f"--layout {self.layout} is not known; it can be {' or '.join(LAYOUTS)}")
        for name, known in (("router_mode", ROUTER_MODES), ("router_input", ROUTER_INPUTS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InputError(f"--{name} {value} is not known; it can be {', '.join(known)}")
        if self.router not in (None, "arrow"):
            raise InputError(
                f"--router {self.router} is not known; it can be arrow (and --router_input none: no router)"
            )
        for name in ("router_prompts", "router_input"):
            if self.router is not None and getattr(self, name) is not None:
                raise InputError(f"--router {self.router} makes a router without a gate; leave out --{name}")
        others = (self.router_mode, self.num_experts_per_tok, self.router_temperature, self.router_prompts)
        if self.drops_router and any(value is not None for value in others):
            raise InputError(
                "--router_input none leaves the router out; leave out the other settings of a router, too"
            )

    @property
    def router_settings(self) -> dict[str, Any]:
        """The router's settings that were given, by the names of the config's fields."""
        names = ("router_mode", "router_input", "num_experts_per_tok", "router_temperature")
        if self.drops_router:
            return {}
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def drops_router(self) -> bool:
        """`--router_input none`: the mixture shall have no router, whatever the source has."""
        return self.router_input == "none"

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return torch_dtype(self.dtype)


def torch_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of one of the names `DTYPES`; None for any other."""
    import torch  # not above: the command line reads the options without it

    return getattr(torch, name) if name in DTYPES else None


@dataclass
class ExportResult:
    """What was written. `check` is None where it was not asked for; `router_kind` is the config's."""

    output_dir: Path
    format: str
    reason: str
    layout: str
    foundation: str | None
    experts: list[str]
    router: bool
    router_kind: str
    routing_strategy: str
    tokenizer: str | None
    check: Any = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        result = {**self.__dict__, "output_dir": str(self.output_dir)}
        result["check"] = None if self.check is None else self.check.to_dict()
        return result
