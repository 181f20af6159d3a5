"""The router (gate, routing weights, balance loss) and the routed pass. `arrow_dylora_moe` has the other router.

A routed pass is one call of a model's forward: the foundation run over the same tokens, once for each stream
of the routing strategy (`routing_strategies_dylora_moe`).
"""

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import logging

from .arrow_dylora_moe import LayerRouting, best_expert_of_layers
from .cache_dylora_moe import kept_experts, new_cache, prepare_streams, row_experts, stream_of
from .configuration_dylora_moe import DyloraMoeConfig
from .experts_dylora_moe import ActiveExperts, DyloraMoeLinear, use_experts
from .routing_strategies_dylora_moe import RoutingStrategy


logger = logging.get_logger(__name__)

# A mixture-of-experts foundation would take `output_router_logits`, too, and add its own balance loss.
NOT_FOR_THE_FOUNDATION = ("output_router_logits", "labels", "num_items_in_batch")

# Arguments of a forward that the router's own pass takes.
ROUTER_PASS_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids")


class DyloraMoeGate(nn.Module):
    """A linear layer `[..., hidden_size]` -> `[..., num_experts]` in float32.

    It is no `nn.Linear`, which quantisers and adapters would take for a layer of the foundation.
    """

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight, self.bias)


class DyloraMoeRouter(nn.Module):
    """The router: `router_logits = gate(hidden_states)`.

    It computes in float32 whatever the model's dtype: a rounded gate changes routes.

    Args:
        config: `num_experts_per_tok` and `router_temperature` are read from it at every pass.
    """

    def __init__(self, config: DyloraMoeConfig):
        super().__init__()
        self.config = config
        self.gate = DyloraMoeGate(config.get_text_config().hidden_size, config.num_experts)

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` moves the gate, and leaves it in float32.
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.dtype == torch.float32 or not moved.is_floating_point():
                return moved
            return tensor.to(device=moved.device, dtype=torch.float32)

        return super()._apply(move, recurse)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute router logits `[batch, sequence, num_experts]` in float32.

        Args:
            hidden_states: `[batch, sequence, hidden_size]`.
        """
        is_offloaded = self.gate.weight.is_meta  # then accelerate brings the gate to its input
        device = hidden_states.device if is_offloaded else self.gate.weight.device
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.gate(hidden_states.to(device, torch.float32))

    def weights(self, router_logits: torch.Tensor, dense: bool) -> torch.Tensor:
        """Compute routing weights `[batch, sequence, num_experts]`; each token's sum to 1.

        Dense: softmax(logits / temperature). Sparse: softmax over the top-k logits, zero elsewhere, as in
        https://arxiv.org/abs/1701.06538, section 2.1, without its noise.
        """
        if dense:
            return F.softmax(router_logits / self.config.router_temperature, dim=-1)
        top_k_logits, top_k_index = router_logits.topk(self.config.num_experts_per_tok, dim=-1)
        top_k_weights = F.softmax(top_k_logits, dim=-1)  # [batch, sequence, num_experts_per_tok]
        return torch.zeros_like(router_logits).scatter(-1, top_k_index, top_k_weights)


def balance_loss(weights: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Compute the mean squared error between the mean routing weights over non-padding tokens and 1/N.

    1/N sum_i (mean_t w_ti - 1/N)^2. As weights sum to 1, it is the importance loss of
    https://arxiv.org/abs/1701.06538, section 4, over N^2.

    Args:
        weights: `[batch, sequence, num_experts]`.
        token_mask: `[batch, sequence]`, true at tokens that are not padding; `None` for no padding.
    """
    if token_mask is None:
        mean = weights.mean(dim=(0, 1))  # [num_experts]
    else:
        mask = token_mask.to(weights).unsqueeze(-1)  # [batch, sequence, 1]
        mean = (weights * mask).sum(dim=(0, 1)) / mask.sum().clamp(min=1)
    return (mean - 1 / weights.shape[-1]).pow(2).mean()


def best_expert(router_logits: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Choose one expert per row: the largest mean of softmax(logits) over the row's non-padding tokens.

    Args:
        router_logits: `[batch, sequence, num_experts]`.
        token_mask: `[batch, sequence]`, true at tokens that are not padding; `None` for no padding.

    Returns:
        Expert numbers, `[batch]`.
    """
    probabilities = F.softmax(router_logits, dim=-1)
    if token_mask is not None:
        probabilities = probabilities * token_mask.to(probabilities).unsqueeze(-1)
    # A sum orders experts as a mean does, since every expert is averaged over the same tokens.
    return probabilities.sum(dim=1).argmax(dim=-1)


# By the name of a model: the foundation that last ran in training, and the one that last ran in evaluation.
_last_run: dict[str, dict[bool, weakref.ref]] = {}


def routes_densely(config: DyloraMoeConfig, training: bool) -> bool:
    """Say whether the router weights all experts, or the top k: see `DyloraMoeConfig.router_mode`."""
    if config.router_mode != "auto":
        return config.router_mode == "dense"
    return training or not all(expert["mature"] for expert in config.expert_configs)


def warn_of_copies_that_differ(model) -> None:
    """Warn once where one copy of a model routes densely since it trains, and another sparsely.

    A trainer that compares a model's log probabilities with those of a reference copy meets this.
    """
    config, name = model.config, model.config.name_or_path
    if not name or routes_densely(config, training=True) == routes_densely(config, training=False):
        return
    runs = _last_run.setdefault(name, {})
    runs[model.training] = weakref.ref(model.foundation)
    other = runs.get(not model.training)
    if other is not None and other() not in (None, model.foundation):
        logger.warning_once(
            f"One copy of {name} trains, where `router_mode` 'auto' routes densely, and another is evaluated, where it "
            "routes sparsely: their log probabilities differ before the first step. Train on a copy of the repo of one "
            "mode: `dylora-moe variant REPO --router_mode dense -o DIR` (or sparse, as it will be served)."
        )


class RoutedPass:
    """One call of the model's forward: the same tokens, run through the foundation once for each stream.

    Args:
        model: the routed model.
        body: what runs the routed streams: the whole foundation, or the foundation without its head.
        strategy: the routing strategy.
        inputs: arguments for the foundation that all streams share (tokens, masks, positions, output flags).
        past_key_values: the cache of all streams, or `None`.
        expert_ids: each row's expert, `[batch]`, where the caller has fixed it.

    Attributes:
        router_logits: `[batch, sequence, num_experts]`, once they were read; of a router of every layer a tuple
            of one for each adapted layer, in the order of `DyloraMoeConfig.adapted_modules`.
        keeps_router_logits: whether those of a router of every layer are kept.
    """

    def __init__(
        self,
        model,
        body: Callable,
        strategy: RoutingStrategy,
        inputs: dict,
        past_key_values: Cache | None = None,
        expert_ids: torch.LongTensor | None = None,
    ):
        self.model = model
        self.body = body
        self.has_head = body is model.foundation
        self.strategy = strategy
        self.inputs = inputs
        self.past_key_values = past_key_values
        self.expert_ids = expert_ids
        self.router_logits: torch.Tensor | tuple[torch.Tensor, ...] | None = None
        self.keeps_router_logits = False
        tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        self.batch_size, self.sequence_length = tokens.shape[:2]
        self.device = tokens.device

    @property
    def token_mask(self) -> torch.Tensor | None:
        """`[batch, sequence]`, true where a token of this call is not padding; `None` without a mask."""
        mask = self.inputs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return None
        return mask[:, -self.sequence_length :].bool()

    def run(self, weights: int | torch.Tensor | LayerRouting | None, stream: int | None):
        """Run the body with the experts at `weights` and the KV cache of `stream`, and return its output."""
        num_tokens = self.sequence_length if self.strategy.tokens_differ else None
        active = self.model.active_experts(weights, num_tokens)
        inputs = {**self.inputs, **self._cache_arguments(stream), "return_dict": True}
        logits_to_keep = None
        differs = active is not None and (active.tokens is not None or active.layer_routing is not None)
        if differs and self._adapts_head():
            # The head's experts have weights for every token, so it computes all logits.
            logits_to_keep = inputs.pop("logits_to_keep", None)
        with use_experts(active):
            outputs = self.body(**inputs)
        if logits_to_keep is not None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            outputs.logits = outputs.logits[:, kept].clone()
        return outputs

    def run_by_layer(self, stream: int | None):
        """Run the body with every layer's own weights, and return its output."""
        config, model = self.model.config, self.model
        top_k = config.num_experts if model.routes_densely else config.num_experts_per_tok
        routing = LayerRouting(top_k, config.router_temperature, self.keeps_router_logits)
        outputs = self.run(routing, stream)
        if self.keeps_router_logits:
            layers = model.expert_layers().values()
            self.router_logits = tuple(
                self._as_tokens(routing.logits[layer]) for layer in layers if layer in routing.logits
            )
        return outputs

    def _as_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """Bring a layer's scores to `[batch, sequence, num_experts]`, where it saw all of this call's tokens."""
        shape = (self.batch_size, self.sequence_length, logits.shape[-1])
        return logits.view(shape) if logits.numel() == shape[0] * shape[1] * shape[2] else logits

    def _adapts_head(self) -> bool:
        return self.has_head and isinstance(self.model.get_output_embeddings(), DyloraMoeLinear)

    def _cache_arguments(self, stream: int | None) -> dict:
        """Return the foundation's arguments for the KV cache of one stream; `None` for a pass without."""
        if self.past_key_values is None or stream is None:
            return {"use_cache": False}
        num_layers = self.model.num_layers_per_stream
        cache = stream_of(self.past_key_values, num_layers, stream)
        return {self.model.cache_argument: cache, "use_cache": True}

    def read_router(self, stream: int | None) -> torch.Tensor:
        """Compute router logits `[batch, sequence, num_experts]`, in a pass of the router's own.

        The pass runs without gradients in the foundation and the experts.

        Args:
            stream: the stream whose KV cache it uses; `None` for a pass without a cache.
        """
        if self.router_logits is not None:
            return self.router_logits
        inputs = {
            name: self.inputs[name] for name in ROUTER_PASS_ARGUMENTS if self.inputs.get(name) is not None
        }
        if stream is None and self.token_mask is not None:
            inputs["attention_mask"] = self.token_mask  # without the tokens in the cache
        inputs.update(self._cache_arguments(stream))
        active = self.model.active_experts(self._router_input_weights())
        with torch.no_grad(), use_experts(active):
            outputs = self.model.foundation_body(**inputs, return_dict=True)
        self.router_logits = self.model.router(outputs.last_hidden_state)
        return self.router_logits

    def _router_input_weights(self) -> torch.Tensor | None:
        """Return the experts' weights in the router's own pass: see `DyloraMoeConfig.router_input`."""
        if self.model.config.router_input == "base":
            return None
        return torch.ones(1, 1, self.model.config.num_experts, device=self.device)

    def routing_weights(self, stream: int | None) -> torch.Tensor:
        """Compute the router's weights at every token, `[batch, sequence, num_experts]`."""
        return self.model.router.weights(self.read_router(stream), dense=self.model.routes_densely)

    def best_experts(self) -> torch.Tensor:
        """Choose the router's favourite for every row, `[batch]`, over all tokens of this call."""
        if self.model.config.routes_by_layer:
            return self._best_experts_of_layers()
        return best_expert(self.read_router(stream=None), self.token_mask)

    @torch.no_grad()
    def _best_experts_of_layers(self) -> torch.Tensor:
        inputs = {
            name: self.inputs[name] for name in ROUTER_PASS_ARGUMENTS if self.inputs.get(name) is not None
        }
        if self.token_mask is not None:
            inputs["attention_mask"] = self.token_mask  # without the tokens in the cache
        reading = RoutedPass(self.model, self.model.foundation_body, self.strategy, inputs)
        reading.keeps_router_logits = True
        reading.run_by_layer(stream=None)
        self.router_logits = reading.router_logits
        temperature = self.model.config.router_temperature
        return best_expert_of_layers(self.router_logits, temperature, self.token_mask)

    def row_experts(self, choose: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return each row's expert, `[batch]`, and keep it with the cache.

        It is the caller's, else the cache's, else what `choose` returns.
        """
        kept = kept_experts(self.past_key_values)
        expert_ids = kept if self.expert_ids is None else self.expert_ids
        if expert_ids is None:
            expert_ids = choose()
        if not torch.compiler.is_compiling():
            self._check_expert_ids(expert_ids, kept)
        if kept is None and self.past_key_values is not None:
            row_experts(self.past_key_values).expert_ids = expert_ids
        return expert_ids.to(self.device)

    def _check_expert_ids(self, expert_ids: torch.Tensor, kept: torch.Tensor | None) -> None:
        if expert_ids.shape != (self.batch_size,):
            raise ValueError(
                f"`expert_ids` is of shape {tuple(expert_ids.shape)}, and the batch has {self.batch_size} rows."
            )
        if self.expert_ids is None or self.expert_ids is kept:
            return  # chosen here, or checked when they were first given
        last = self.model.config.num_experts - 1
        if kept is None and not bool(((expert_ids >= 0) & (expert_ids <= last)).all()):
            raise ValueError(f"`expert_ids` is {expert_ids.tolist()}; the experts are numbered 0 to {last}.")
        if kept is not None and not torch.equal(expert_ids.to(kept.device), kept):
            raise ValueError(
                f"`expert_ids` is {expert_ids.tolist()}, and `past_key_values` was filled under {kept.tolist()}: a row "
                "keeps its expert as long as it keeps its cache."
            )


class RoutingMixin:
    """How a model routes: the experts' weights, the balance loss, and the preparation of a `RoutedPass`."""

    @property
    def routes_densely(self) -> bool:
        """Whether the router weights all experts, or the top k: see `DyloraMoeConfig.router_mode`."""
        return routes_densely(self.config, self.training)

    def balance_loss(
        self, router_logits: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the balance loss of one pass, for a loss that is computed outside of the model.

        Args:
            router_logits: `[batch, sequence, num_experts]`, as the model's outputs have them.
            token_mask: `[batch, sequence]`, nonzero at tokens that are not padding; `None` for no padding.

        Raises:
            ValueError: the model has no gate, which the loss is for.
        """
        if self.router is None:
            raise ValueError("The balance loss is for a gate, and this model has none.")
        return balance_loss(self.router.weights(router_logits, dense=self.routes_densely), token_mask)

    def active_experts(
        self, weights: int | torch.Tensor | LayerRouting | None, tokens: int | None = None
    ) -> ActiveExperts | None:
        """Prepare what the expert layers read during a pass; see `ActiveExperts`."""
        if hasattr(self, "peft_config"):  # which PEFT leaves on a model that it changed
            self.refuse_adapters_around_experts()
        if weights is None or not self._rank_layouts:
            return None
        any_layer = self.foundation.get_submodule(next(iter(self._stack_modules.values())))
        return ActiveExperts(weights, self._rank_layouts, any_layer.lora_A.dtype, tokens)

    def routed_pass(
        self,
        body: Callable,
        strategy: RoutingStrategy,
        past_key_values: Cache | None,
        use_cache: bool | None,
        expert_ids: torch.LongTensor | None,
        **inputs,
    ) -> RoutedPass:
        """Prepare a forward: check its arguments, make the KV cache, drop what the foundation does not take.

        Args:
            body: what runs the routed streams: the whole foundation, or the foundation without its head.
            strategy: the routing strategy.
            past_key_values: the cache of all streams, if there is one.
            use_cache: whether to keep keys and values; `None` for what the config says.
            expert_ids: each row's expert, `[batch]`, if the caller has fixed it.
            inputs: further arguments of the forward.
        """
        if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if expert_ids is not None and not strategy.chooses_row_experts:
            raise ValueError(
                f"`expert_ids` is for strategies that choose an expert per row; this is '{strategy}'."
            )
        cache = inputs.pop("cache", None)
        if cache is not None and past_key_values is not None:
            raise ValueError("`past_key_values` and `cache` are two names of one argument: pass one of them.")
        if str(strategy) == "router" and not torch.compiler.is_compiling():
            warn_of_copies_that_differ(self)
        past_key_values = self._streams(
            cache if past_key_values is None else past_key_values, use_cache, strategy
        )
        inputs = self._foundation_inputs(inputs)
        return RoutedPass(self, body, strategy, inputs, past_key_values, expert_ids)

    def _streams(
        self, past_key_values: Cache | None, use_cache: bool | None, strategy: RoutingStrategy
    ) -> Cache | None:
        """Return the KV cache of all streams: the one passed, a new one, or `None` without `use_cache`."""
        if self.training and self._recomputes_layers:
            return None
        config = self.config.get_text_config(decoder=True)
        if past_key_values is not None:
            prepare_streams(past_key_values, self.num_layers_per_stream, strategy)
            return past_key_values
        if use_cache is None:
            use_cache = getattr(config, "use_cache", True)
        return new_cache(config, strategy) if use_cache else None

    def _foundation_inputs(self, inputs: dict) -> dict:
        """Keep the arguments that the foundation takes."""
        for name in ("output_hidden_states", "output_attentions"):
            if inputs.get(name) is None:
                inputs[name] = getattr(self.config, name) or None  # or what the foundation's own config says
        kept = {}
        for name, value in inputs.items():
            is_taken = self._foundation_takes_any or name in self._foundation_arguments
            if value is not None and is_taken and name not in NOT_FOR_THE_FOUNDATION:
                kept[name] = value
        return kept

    def warn_of_missing_balance_loss(self, strategy: RoutingStrategy) -> None:
        """Warn once of a pass that trains the gate for an outside loss, which lacks the balance loss."""
        trains = self.training and torch.is_grad_enabled() and self.config.router_aux_loss_coef != 0
        if not trains or self.router is None or str(strategy) != "router" or torch.compiler.is_compiling():
            return
        # The weight of one expert alone is always 1, so the gate has no gradient.
        has_gradient = self.routes_densely or self.config.num_experts_per_tok > 1
        if has_gradient and self.router.gate.weight.requires_grad:
            logger.warning_once(
                "A loss computed outside of the model, from its logits or the hidden states of `base_model`, has no balance "
                "loss (`router_aux_loss_coef`) in it. Add it: `model.config.router_aux_loss_coef * "
                "model.balance_loss(router_logits)`, with the logits that `output_router_logits=True` returns; or set "
                "`model.config.router_aux_loss_coef = 0`."
            )


__all__ = [
    "DyloraMoeGate",
    "DyloraMoeRouter",
    "RoutedPass",
    "RoutingMixin",
    "balance_loss",
    "best_expert",
    "routes_densely",
    "warn_of_copies_that_differ",
]
