"""What the experts count for where a token was predicted, read from the forward that predicted it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


LAYER_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Routing:
    """The experts' part in one predicted token, in float32 on the CPU.

    Attributes:
        weights: `[num_experts]`. They sum to 1, or are all 0 where no expert acts. With a router in every layer
            the mean of its layers.
        confidence: 0 to 1, how strong the colour of the leading expert is: its weight, or, where the gate gives
            one expert all of it, the gate's probability.
        layers: by the number of a layer, of a router that has one in each, the mean of its modules'
            `[num_experts]`.
    """

    weights: torch.Tensor
    confidence: float
    layers: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def leader(self) -> int | None:
        """The expert with the largest weight; None where none leads: no expert acts, or all do equally."""
        largest = float(self.weights.max())
        none_leads = largest == 0 or (len(self.weights) > 1 and largest == float(self.weights.min()))
        return None if none_leads else int(self.weights.argmax())


class RoutingReader:
    """Reads the routing at the last position of a model's forward.

    Args:
        model: a `DyloraMoeForCausalLM`.
        strategy: the routing strategy that it generates with.

    Attributes:
        needs_logits: whether the forward has to return router logits.

    Raises:
        ValueError: an unknown strategy; lists the valid ones.
    """

    def __init__(self, model: Any, strategy: str):
        self.model, self.num_experts = model, model.config.num_experts
        name, _, expert = str(model.routing_strategy(strategy)).partition(":")
        self.needs_logits = name == "router"
        self._fixed = None  # the same at every token
        if name == "single":
            self._fixed = self._alone(int(expert))
        elif name == "base":
            self._fixed = Routing(torch.zeros(self.num_experts), 0.0)
        elif name in ("uniform", "ensemble"):
            self._fixed = Routing(torch.full((self.num_experts,), 1 / self.num_experts), 0.0)

    def read(self, arguments: Mapping[str, Any], output: Any) -> Routing:
        """Read the routing of the token that a forward predicts.

        Args:
            arguments: the forward's own; `expert_ids` of strategies that choose an expert for the whole text.
            output: what it returned.
        """
        if self._fixed is not None:
            return self._fixed
        if not self.needs_logits:
            return self._alone(int(arguments["expert_ids"][0]))
        if isinstance(output.router_logits, tuple):
            return self._of_layers(output.router_logits)
        logits = output.router_logits[0, -1].float()  # [num_experts]
        weights = self.model.router.weights(logits, dense=self.model.routes_densely).cpu()
        largest = float(weights.max())
        return Routing(weights, largest if largest < 1 else float(logits.softmax(dim=-1).max()))

    def _alone(self, expert: int) -> Routing:
        return Routing(torch.eye(self.num_experts)[expert], 1.0)

    def _of_layers(self, logits: tuple[torch.Tensor, ...]) -> Routing:
        """Average over the modules that an expert shares with another: alone, it has nothing to win.

        Args:
            logits: every adapted module's scores, `[batch, sequence, num_experts]`, -inf for an expert that does
                not adapt it.
        """
        last = [scores.reshape(-1, self.num_experts)[-1].float().to(logits[0].device) for scores in logits]
        scores = torch.stack(last).cpu()  # [modules, num_experts]
        weights = layer_weights(scores, self.model)
        shared = scores.isfinite().sum(dim=-1) > 1
        if not shared.any():
            shared = torch.ones_like(shared)
        mean = weights[shared].mean(dim=0)
        names = list(self.model.expert_layers())
        if len(names) != len(weights):  # some took no part, such as those of a vision tower
            return Routing(mean, float(mean.max()))
        layers: dict[str, list[torch.Tensor]] = {}
        for name, of_module, is_shared in zip(names, weights, shared, strict=True):
            if is_shared:
                layers.setdefault(layer_label(name), []).append(of_module)
        means = {label: torch.stack(modules).mean(dim=0) for label, modules in layers.items()}
        return Routing(mean, float(mean.max()), means)


def layer_weights(scores: torch.Tensor, model: Any) -> torch.Tensor:
    """Compute the experts' weights at every adapted module: softmax over the top k of scores / temperature.

    Args:
        scores: `[modules, num_experts]`, -inf for an expert that does not adapt a module.
    """
    config = model.config
    top_k = config.num_experts if model.routes_densely else config.num_experts_per_tok
    top_k_scores, top_k_index = scores.topk(top_k, dim=-1)
    weights = (top_k_scores / config.router_temperature).softmax(dim=-1)  # 0 where a score is -inf
    return torch.zeros_like(scores).scatter(-1, top_k_index, weights)


def layer_label(name: str) -> str:
    """Say which layer a module is in: the layer's number, or the module's name where it has none."""
    found = LAYER_NUMBER.search(name)
    return name if found is None else found[1]


__all__ = ["Routing", "RoutingReader", "layer_label", "layer_weights"]
