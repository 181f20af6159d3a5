"""Routing strategies: how experts are chosen, one small class each, in one registry.

A strategy says how many streams it needs (passes with a KV cache of their own) and which weights the experts
get in each. `RoutedPass` gives it router logits and runs the foundation for it. To add a strategy, write a
class and decorate it with `@register`. One with a `run` of its own also needs steps in `DecodeGraph`, or to be
refused by `why_not`, both in `fast_decoding_dylora_moe`.
"""

import difflib
import math

import torch
import torch.nn.functional as F

from .configuration_dylora_moe import DyloraMoeConfig


ROUTING_STRATEGIES: dict[str, type["RoutingStrategy"]] = {}

WAYS_TO_A_ROUTER = (
    "`dylora-moe fit-router` fits one to texts; `dylora-moe export` makes one of the adapters alone with `--router arrow`, "
    "or of example prompts with `--router_prompts`"
)


def register(strategy_class: type["RoutingStrategy"]) -> type["RoutingStrategy"]:
    """Add a strategy to the registry, under its `name`."""
    ROUTING_STRATEGIES[strategy_class.name] = strategy_class
    return strategy_class


class RoutingStrategy:
    """Base class of all strategies.

    `str(strategy)` is the canonical form, which `resolve_routing_strategy` reads back.

    Attributes:
        name: what users write.
        needs_router: whether the mixture must have a router.
        chooses_row_experts: whether it picks one expert per row, fixed before the first generated token.
        tokens_differ: whether the tokens of a row may get different weights.
        num_streams: the number of passes over the tokens, each with keys and values of its own.
    """

    name: str
    needs_router = False
    chooses_row_experts = False
    tokens_differ = True
    num_streams = 1

    def __init__(self, config: DyloraMoeConfig, argument: str | None = None):
        if argument is not None:
            raise ValueError(f"takes no argument, got {argument!r}")
        self.num_experts = config.num_experts

    @classmethod
    def forms(cls) -> str:
        """Return how the strategy is written, for error messages."""
        return cls.name

    def __str__(self) -> str:
        return self.name

    def expert_weights(self, routed_pass) -> int | torch.Tensor | None:
        """Return the experts' weights.

        `None` switches the experts off, a number selects that expert alone, and a tensor holds weights
        `[batch or 1, sequence or 1, num_experts]`.
        """
        raise NotImplementedError

    def run(self, routed_pass):
        """Return the foundation's output under this strategy."""
        return routed_pass.run(self.expert_weights(routed_pass), stream=0)


@register
class RouterStrategy(RoutingStrategy):
    """The router's weights at every token: a gate reads stream 0, and the routed pass is stream 1.

    Where every layer has a router of its own, one stream is enough.
    """

    name = "router"
    needs_router = True

    def __init__(self, config: DyloraMoeConfig, argument: str | None = None):
        super().__init__(config, argument)
        self.routes_by_layer = config.routes_by_layer
        self.num_streams = 1 if self.routes_by_layer else 2

    def run(self, routed_pass):
        if self.routes_by_layer:
            return routed_pass.run_by_layer(stream=0)
        weights = routed_pass.routing_weights(stream=0)  # [batch, sequence, num_experts]
        return routed_pass.run(weights, stream=1)


@register
class BestStrategy(RoutingStrategy):
    """One expert per row, the router's favourite over the prompt."""

    name = "best"
    needs_router = True
    chooses_row_experts = True
    tokens_differ = False

    def expert_weights(self, routed_pass) -> torch.Tensor:
        return one_hot_rows(routed_pass.row_experts(routed_pass.best_experts), self.num_experts)


@register
class SingleStrategy(RoutingStrategy):
    """One named or numbered expert with weight 1."""

    name = "single"

    def __init__(self, config: DyloraMoeConfig, argument: str | None = None):
        super().__init__(config)
        if argument is None:
            raise ValueError("needs an expert: single:<number or name>")
        self.expert = config.expert_index(argument)

    @classmethod
    def forms(cls) -> str:
        return "single:<number or name of an expert>"

    def __str__(self) -> str:
        return f"single:{self.expert}"

    def expert_weights(self, routed_pass) -> int:
        return self.expert


@register
class EnsembleStrategy(RoutingStrategy):
    """Every expert's own next-token distribution, mixed with equal weights (a linear opinion pool).

    `logits` are the log of the mixture: log(1/N sum_i softmax(logits_i)). Hidden states and attentions of the
    experts are concatenated along the batch dimension.
    """

    name = "ensemble"
    tokens_differ = False

    def __init__(self, config: DyloraMoeConfig, argument: str | None = None):
        super().__init__(config, argument)
        self.num_streams = config.num_experts

    def run(self, routed_pass):
        if not routed_pass.has_head:
            raise ValueError(
                "Routing strategy 'ensemble' mixes next-token distributions, so it has no hidden states of its own: "
                "load the model with AutoModelForCausalLM, or choose another strategy."
            )
        outputs = [routed_pass.run(expert, stream=expert) for expert in range(self.num_experts)]
        log_probabilities = [F.log_softmax(output.logits, dim=-1, dtype=torch.float32) for output in outputs]
        mixed = outputs[0]
        mixed.logits = torch.stack(log_probabilities).logsumexp(dim=0) - math.log(self.num_experts)
        for name in ("hidden_states", "attentions"):
            if mixed.get(name) is not None:
                mixed[name] = _concatenated([output[name] for output in outputs])
        return mixed


def _concatenated(of_experts: list[tuple[torch.Tensor | None, ...]]) -> tuple[torch.Tensor | None, ...]:
    """Concatenate every layer's tensors along the batch; a layer without attention has `None`."""
    layers = []
    for tensors in zip(*of_experts, strict=True):
        layers.append(None if tensors[0] is None else torch.cat(tensors))
    return tuple(layers)


@register
class RoundRobinStrategy(RoutingStrategy):
    """Each new sequence gets the next expert; a bare forward gives row i expert i mod N."""

    name = "round_robin"
    chooses_row_experts = True
    tokens_differ = False

    def expert_weights(self, routed_pass) -> torch.Tensor:
        def take_turns() -> torch.Tensor:
            return torch.arange(routed_pass.batch_size, device=routed_pass.device) % self.num_experts

        return one_hot_rows(routed_pass.row_experts(take_turns), self.num_experts)


@register
class BaseStrategy(RoutingStrategy):
    """No expert: the foundation alone."""

    name = "base"

    def expert_weights(self, routed_pass) -> None:
        return None


@register
class UniformStrategy(RoutingStrategy):
    """All experts with weight 1/N."""

    name = "uniform"
    tokens_differ = False

    def expert_weights(self, routed_pass) -> torch.Tensor:
        shape = (1, 1, self.num_experts)
        return torch.full(shape, 1 / self.num_experts, dtype=torch.float32, device=routed_pass.device)


def one_hot_rows(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Turn expert numbers `[batch]` into weights `[batch, 1, num_experts]`."""
    return torch.eye(num_experts, dtype=torch.float32, device=expert_ids.device)[expert_ids].unsqueeze(1)


def default_routing_strategy(config: DyloraMoeConfig) -> str:
    """Return the strategy of a model whose generation config names none."""
    if config.num_experts == 0:
        return "base"
    if config.num_experts == 1:
        return "single:0"
    return "router" if config.has_router else "uniform"


def resolve_routing_strategy(
    strategy: "str | RoutingStrategy | None", config: DyloraMoeConfig
) -> RoutingStrategy:
    """Return the strategy that a user's text names; `None` is the default.

    Raises:
        ValueError: not a valid form; the message lists the valid forms and the experts' names.
    """
    if isinstance(strategy, RoutingStrategy):
        return strategy
    text = default_routing_strategy(config) if strategy is None else str(strategy)
    name, separator, argument = text.partition(":")
    strategy_class = ROUTING_STRATEGIES.get(name)
    if strategy_class is None:
        near = difflib.get_close_matches(name, ROUTING_STRATEGIES, n=1)
        problem = f"is not known (did you mean {near[0]}?)" if near else "is not known"
    elif strategy_class.needs_router and not config.has_router:
        problem = f"needs a router, which this model does not have ({WAYS_TO_A_ROUTER})"
    elif config.num_experts == 0 and name != "base":
        problem = "needs experts, which this model does not have"
    else:
        try:
            return strategy_class(config, argument if separator else None)
        except ValueError as error:
            problem = f"is not valid: {str(error).rstrip('.')}"
    raise ValueError(f"Routing strategy {text!r} {problem}. {_valid_forms(config)}")


def _valid_forms(config: DyloraMoeConfig) -> str:
    known = ROUTING_STRATEGIES.values()
    forms = [strategy.forms() for strategy in known if config.has_router or not strategy.needs_router]
    experts = [f"{index} ({name})" for index, name in enumerate(config.expert_names)]
    return f"Valid: {', '.join(forms)}. Experts: {', '.join(experts) or 'none'}."


__all__ = [
    "ROUTING_STRATEGIES",
    "WAYS_TO_A_ROUTER",
    "RoutingStrategy",
    "default_routing_strategy",
    "resolve_routing_strategy",
]
