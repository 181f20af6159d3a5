"""`Mixture`: the in-memory form of a checkpoint, which readers make and the exporter writes.

A description in memory; tensors are read when they are asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import InputError
from ..sources.source_folder import SourceFolder
from .stored_tensors import StoredTensor


# More experts than this are a damaged number, not a mixture.
MOST_EXPERTS = 4096


@dataclass
class AdaptedLayer:
    """One expert on one layer. `lora_A` is [rank, in_features], `lora_B` [out_features, rank], as in PEFT.

    On a parameter of stacked experts, of which there are `num_stacked`, they are [num_stacked * rank,
    in_features] and [out_features, rank * num_stacked].
    """

    rank: int
    lora_alpha: float | None  # None: the source does not say
    in_features: int
    out_features: int
    dtype: torch.dtype
    num_stacked: int = 0  # 0: a linear layer

    @property
    def num_rows(self) -> int:
        """Of `lora_A`."""
        return self.rank * (self.num_stacked or 1)

    @property
    def num_parameters(self) -> int:
        return self.num_rows * (self.in_features + self.out_features)


@dataclass
class Expert:
    """One LoRA adapter.

    Attributes:
        name: what `single:<name>` calls it.
        layers: name of a module inside the foundation (`model.layers.0.self_attn.q_proj`), or of a parameter
            of stacked experts (`model.layers.0.mlp.experts.down_proj`), to its ranks and shapes.
        read: such a name to the pair (`lora_A`, `lora_B`), in the dtype they are stored in.
        origin: the file or folder it was read from, for error messages.
        copied_weights: copies of the foundation's tensors in the adapter's file, by their names there. An
            export leaves them out, after checking that they equal the foundation's own.
        alpha_of: the alpha that the source's settings give a layer of a name, where they go by names.
        peft_version: of the PEFT that saved it, where that is known.
        is_adalora: whether it is of that kind, which PEFT puts on linear layers alone.
    """

    name: str
    layers: dict[str, AdaptedLayer]
    read: Callable[[str], tuple[torch.Tensor, torch.Tensor]]
    origin: Path
    lora_dropout: float = 0.0
    use_rslora: bool = False
    mature: bool = True
    copied_weights: dict[str, StoredTensor] = field(default_factory=dict)
    alpha_of: Callable[[str], float] | None = None
    peft_version: str = ""
    is_adalora: bool = False

    @property
    def does_nothing(self) -> bool:
        """Whether A or B is zero on every layer, as before training.

        No layer is read after the first that does something.
        """
        return bool(self.layers) and not any(
            all(bool(matrix.any()) for matrix in self.read(module)) for module in self.layers
        )

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers.values())

    def config(self) -> dict[str, Any]:
        """Make this expert's entry of the model config's `expert_configs`.

        The most frequent rank and alpha become `r` and `lora_alpha`; layers that differ are listed, by full
        module name, in `rank_pattern` and `alpha_pattern`.
        """
        rank = _most_common(self.layers[name].rank for name in sorted(self.layers))
        alpha = _most_common(self.layers[name].lora_alpha for name in sorted(self.layers))
        return {
            "name": self.name,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: layer.rank for name, layer in self.layers.items() if layer.rank != rank},
            "alpha_pattern": {
                name: layer.lora_alpha for name, layer in self.layers.items() if layer.lora_alpha != alpha
            },
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "target_modules": sorted(name for name, layer in self.layers.items() if not layer.num_stacked),
            "target_parameters": sorted(name for name, layer in self.layers.items() if layer.num_stacked),
            "mature": self.mature,
        }


@dataclass
class Router:
    """The gate and how its logits become weights.

    Attributes:
        read: gives (weight [num_experts, hidden_size], bias [num_experts]).
        fitting: how it was fitted to texts, where it was (see `eval.fitting`).
    """

    prefix: ClassVar[str] = "router."  # of its tensors' names in layout `full`

    read: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    num_experts: int
    hidden_size: int
    router_input: str  # "base" or "experts_sum": which hidden states the gate was trained on
    num_experts_per_tok: int = 1
    router_temperature: float = 2.0
    router_mode: str = "auto"
    router_aux_loss_coef: float | None = None  # None: the source does not say
    fitting: dict[str, Any] | None = None

    def config_fields(self) -> dict[str, Any]:
        """Give the router's fields of the config; what the source does not say is left to the config's default."""
        fields = {
            "router_input": self.router_input,
            "router_mode": self.router_mode,
            "num_experts_per_tok": self.num_experts_per_tok,
            "router_temperature": self.router_temperature,
            "router_aux_loss_coef": self.router_aux_loss_coef,
            "router_fitting": self.fitting,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def shapes(self, experts: list[Expert]) -> dict[str, tuple[int, ...]]:
        """Give the shapes of its tensors, by their names in `router.safetensors`."""
        return {"gate.weight": (self.num_experts, self.hidden_size), "gate.bias": (self.num_experts,)}


@dataclass
class ArrowRouter:
    """A router in every adapted layer, made of the experts' own weights: see `modeling/arrow_dylora_moe`.

    Attributes:
        stored: the prototypes that a repo holds, [num_stored, in_features] by layer. Those of further experts,
            and of layers that are not among them, are computed when a repo is written.
        num_stored: how many experts they are of, the first.
    """

    prefix: ClassVar[str] = "foundation."

    stored: dict[str, StoredTensor] = field(default_factory=dict)
    num_stored: int = 0
    num_experts_per_tok: int = 3  # these two as in PEFT's `ArrowConfig`
    router_temperature: float = 1.0
    router_mode: str = "auto"

    def config_fields(self) -> dict[str, Any]:
        """Give the router's fields of the config."""
        return {
            "router_kind": "arrow",
            "router_input": None,
            "router_mode": self.router_mode,
            "num_experts_per_tok": self.num_experts_per_tok,
            "router_temperature": self.router_temperature,
        }

    def shapes(self, experts: list[Expert]) -> dict[str, tuple[int, ...]]:
        """Give the shapes of its tensors, by their names in `router.safetensors`."""
        return {
            f"{module}.prototypes": (len(experts), layer.in_features)
            for expert in experts
            for module, layer in expert.layers.items()
        }


@dataclass
class FoundationReference:
    """Which frozen model the experts are for.

    Attributes:
        named_in: the file that says so; relative paths start there.
        vocab_size: as the source's own config has it, to compare.
        comes_with_source: it is a folder of the source, whose links may not lead out of it.
    """

    name: str | None
    revision: str | None = None
    named_in: Path | None = None
    vocab_size: int | None = None
    comes_with_source: bool = False


@dataclass
class Subtracted:
    """What is subtracted from every expert.

    Attributes:
        name: what it is called in the card.
        folder: where it was read from.
        is_exact: whether no number of it was rounded; false where s_g / s_i is no power of two, and it is
            stored in float32.
    """

    name: str
    expert: Expert
    folder: SourceFolder
    is_exact: bool = True


@dataclass
class Mixture:
    """Everything a source holds.

    Attributes:
        format: the reader's name for what it found.
        folders: the folders it was read from, in the order of the experts where there is one per expert.
        problems: what keeps it from being exported as it is, one line each; `inspect` lists them, `export`
            raises.
        notes: what a user should know and may ignore.
        limits: what those who load the repo should know; stands in its card.
        foundation_config: the foundation's transformers config, where the source carries the foundation.
        foundation_weights: its tensors by their names in the foundation's own state dict, tied ones left out;
            None where the foundation is apart.
        has_trained_foundation: whether some of those tensors are known to be other than the named
            foundation's.
        routing_strategy: the default strategy the source already has, if it has one.
        parts: where experts were appended to a mixture: that mixture, and what was appended.
        reason: by what the format was recognised.
        sources: the folders that were opened, one per source.
        subtracted: what is subtracted from every expert, once the names of the foundation's layers are known.
    """

    format: str
    folders: list[SourceFolder]
    experts: list[Expert]
    router: Router | ArrowRouter | None
    foundation: FoundationReference
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    foundation_config: Any = None
    foundation_weights: dict[str, StoredTensor] | None = None
    has_trained_foundation: bool = False
    routing_strategy: str | None = None
    parts: list[Mixture] = field(default_factory=list)
    reason: str = ""
    sources: list[SourceFolder] = field(default_factory=list)
    subtracted: Subtracted | None = None


def idle_experts(mixture: Mixture) -> str | None:
    """Say which experts do nothing; None where every one does something."""
    names = [expert.name for expert in mixture.experts if expert.does_nothing]
    if not names:
        return None
    which = f"expert {names[0]} does" if len(names) == 1 else f"experts {', '.join(names)} do"
    return (
        f"{which} nothing: A or B is zero on every layer, as in an adapter that was saved before training or pruned away; "
        "with such an expert alone, the mixture computes what its base model does"
    )


def _most_common(values):
    return Counter(values).most_common(1)[0][0]


def natural_order(name: str) -> list:
    """Make a sort key that puts `expert_2` before `expert_10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def is_expert_name(name: str) -> bool:
    """Say whether a name can be used in `single:<name>` and as a folder's name."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name) is not None and not name.isdigit()


def check_expert_names(names: list[str], origins: list[Path]) -> None:
    """Check that names can be used in `single:<name>` and as a folder's name, and differ.

    Raises:
        InputError: names the expert, or for a clash both places.
    """
    seen: dict[str, Path] = {}
    for name, origin in zip(names, origins, strict=True):
        if not is_expert_name(name):
            raise InputError(
                f"{name!r} (from {origin}) cannot be an expert's name: letters, digits, '_', '.', '+' and '-', not digits "
                "alone; rename the folder, or name the experts with --expert_names of export"
            )
        if name.casefold() in seen:  # folders of their names must differ on every file system
            raise InputError(
                f"two experts are named {name!r} ({seen[name.casefold()]} and {origin}); rename one, or name them with "
                "--expert_names of export"
            )
        seen[name.casefold()] = origin
