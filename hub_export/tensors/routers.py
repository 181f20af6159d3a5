"""What weights the experts of a mixture: a gate, or a router in every adapted layer.

Both say which fields they are in a repo's config, and which tensors they are in its files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from .stored_tensors import StoredTensor


if TYPE_CHECKING:
    import torch

    from .mixture import Expert


@dataclass
class Router:
    """The gate and how its logits become weights.

    Attributes:
        read: gives (weight [num_experts, hidden_size], bias [num_experts]).
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

    def config_fields(self) -> dict[str, Any]:
        """Give the router's fields of the config; what the source does not say is left to the config's default."""
        fields = {
            "router_input": self.router_input,
            "router_mode": self.router_mode,
            "num_experts_per_tok": self.num_experts_per_tok,
            "router_temperature": self.router_temperature,
            "router_aux_loss_coef": self.router_aux_loss_coef,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def shapes(self, experts: Iterable[Expert]) -> dict[str, tuple[int, ...]]:
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

    def shapes(self, experts: Iterable[Expert]) -> dict[str, tuple[int, ...]]:
        """Give the shapes of its tensors, by their names in `router.safetensors`."""
        experts = list(experts)
        return {
            f"{module}.prototypes": (len(experts), layer.in_features)
            for expert in experts
            for module, layer in expert.layers.items()
        }


__all__ = ["ArrowRouter", "Router"]
