"""One call of a routed model's forward: the foundation run over the same tokens, once for each stream.

Knows streams, the router's pass and each row's expert. Knows nothing about which strategy asks, or about
losses.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache

from .cache_dylora_moe import kept_experts, row_experts, stream_of
from .experts_dylora_moe import DyloraMoeLinear, use_experts
from .router_dylora_moe import best_expert
from .routing_strategies_dylora_moe import RoutingStrategy


class RoutedPass:
    """One call of the model's forward: the same tokens, run through the foundation once for each stream.

    Args:
        model: the routed model.
        body: what runs the routed streams: the whole foundation, or the foundation without its head.
        strategy: the routing strategy.
        inputs: arguments for the foundation that all streams share (tokens, masks, positions, output flags).
        past_key_values: the cache of all streams, or `None`.
        expert_ids: each row's expert, `[batch]`, where the caller has fixed it.
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
        self.router_logits: torch.Tensor | None = None
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        self.batch_size, self.sequence_length = tokens.shape[:2]
        self.device = tokens.device

    @property
    def token_mask(self) -> torch.Tensor | None:
        """`[batch, sequence]`, true where a token of this call is not padding; `None` if nothing says so."""
        mask = self.inputs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return None
        return mask[:, -self.sequence_length :].bool()

    def run(self, weights: int | torch.Tensor | None, stream: int):
        """The body's output with the experts at `weights`, with the keys and values of `stream`."""
        active = self.model.active_experts(
            weights, self.sequence_length if self.strategy.tokens_differ else None
        )
        inputs, kept = {**self.inputs, **self._cache(stream), "return_dict": True}, None
        head = self.model.get_output_embeddings() if self.has_head else None
        if getattr(active, "tokens", None) and isinstance(head, DyloraMoeLinear):
            kept = inputs.pop("logits_to_keep", None)  # its experts have weights for all tokens
        with use_experts(active):
            outputs = self.body(**inputs)
        if kept is not None:
            outputs.logits = outputs.logits[:, slice(-kept, None) if isinstance(kept, int) else kept].clone()
        return outputs

    def _cache(self, stream: int) -> dict:
        if self.past_key_values is None:
            return {"use_cache": False}
        num_layers = self.model.num_layers_per_stream
        return {
            self.model.cache_argument: stream_of(self.past_key_values, num_layers, stream),
            "use_cache": True,
        }

    def read_router(self, stream: int | None) -> torch.Tensor:
        """Router logits `[batch, sequence, num_experts]` from a pass of the router's own, without gradients
        in the foundation or the experts; `stream=None` for one without keys and values."""
        if self.router_logits is None:
            body = self.model.foundation_body
            names = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids")
            inputs = {name: self.inputs[name] for name in names if self.inputs.get(name) is not None}
            cache = {"use_cache": False} if stream is None else self._cache(stream)
            if stream is None and self.token_mask is not None:
                inputs["attention_mask"] = self.token_mask  # without the tokens in the cache
            with torch.no_grad(), use_experts(self.model.active_experts(self._router_input_weights())):
                outputs = body(**inputs, **cache, return_dict=True)
            self.router_logits = self.model.router(outputs.last_hidden_state)
        return self.router_logits

    def _router_input_weights(self) -> torch.Tensor | None:
        """The experts' weights in the router's own pass: see `DyloraMoeConfig.router_input`."""
        if self.model.config.router_input == "base":
            return None
        return torch.ones(1, 1, self.model.config.num_experts, device=self.device)

    def routing_weights(self, stream: int | None) -> torch.Tensor:
        """The router's weights at every token, `[batch, sequence, num_experts]`."""
        return self.model.router.weights(self.read_router(stream), dense=self.model.routes_densely)

    def best_experts(self) -> torch.Tensor:
        """The router's favourite for every row, `[batch]`, with all tokens of this call as the prompt."""
        return best_expert(self.read_router(stream=None), self.token_mask)

    def row_experts(self, choose: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Each row's expert, `[batch]`: the caller's, else the cache's, else chosen now, and kept with the
        cache."""
        kept = kept_experts(self.past_key_values)
        expert_ids = kept if self.expert_ids is None else self.expert_ids
        if expert_ids is None:
            expert_ids = choose()
        if not torch.compiler.is_compiling():
            self._check(expert_ids, kept)
        if kept is None and self.past_key_values is not None:
            row_experts(self.past_key_values).expert_ids = expert_ids
        return expert_ids.to(self.device)

    def _check(self, expert_ids: torch.Tensor, kept: torch.Tensor | None) -> None:
        if expert_ids.shape != (self.batch_size,):
            raise ValueError(
                f"`expert_ids` is of shape {tuple(expert_ids.shape)}, and the batch has {self.batch_size} rows."
            )
        if self.expert_ids is None or self.expert_ids is kept:
            return  # chosen here, or checked when they were first given
        count = self.model.config.num_experts
        if kept is None and not bool(((expert_ids >= 0) & (expert_ids < count)).all()):
            raise ValueError(
                f"`expert_ids` is {expert_ids.tolist()}; the experts are numbered 0 to {count - 1}."
            )
        if kept is not None and not torch.equal(expert_ids.to(kept.device), kept):
            raise ValueError(
                f"`expert_ids` is {expert_ids.tolist()}, and `past_key_values` was filled under {kept.tolist()}: a row "
                "keeps its expert as long as it keeps its cache."
            )


__all__ = ["RoutedPass"]
