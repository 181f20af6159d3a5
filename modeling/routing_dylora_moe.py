"""Routing: the router's gate with the weights and the balance loss that follow from its logits, and one
routed pass.

A routed pass is one call of a model's forward: the foundation run over the same tokens, once for each stream.
Which streams there are says the strategy (`routing_strategies_dylora_moe`).
"""

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cache_dylora_moe import kept_experts, row_experts, stream_of
from .configuration_dylora_moe import DyloraMoeConfig
from .experts_dylora_moe import DyloraMoeLinear, use_experts
from .routing_strategies_dylora_moe import RoutingStrategy


class DyloraMoeGate(nn.Module):
    """A linear layer `[..., hidden_size]` -> `[..., num_experts]` in float32.

    No `nn.Linear`, so that nothing that looks for those (quantisers, adapters) takes it for a layer of the
    foundation.
    """

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight, self.bias)


class DyloraMoeRouter(nn.Module):
    """`router_logits = gate(hidden_states)`, in float32 whatever the model's dtype: a rounded gate changes
    routes.

    Args:
        config: `num_experts_per_tok` and `router_temperature` are read from it at every pass.
    """

    def __init__(self, config: DyloraMoeConfig):
        super().__init__()
        self.config = config
        self.gate = DyloraMoeGate(config.get_text_config().hidden_size, config.num_experts)

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` and the like move the gate, and leave it in float32.
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.dtype == torch.float32 or not moved.is_floating_point():
                return moved
            return tensor.to(device=moved.device, dtype=torch.float32)

        return super()._apply(move, recurse)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence, hidden]` -> router logits `[batch, sequence, num_experts]`, float32."""
        home = (
            hidden_states if self.gate.weight.is_meta else self.gate.weight
        )  # an offloaded gate comes to its input
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.gate(hidden_states.to(home.device, torch.float32))

    def weights(self, router_logits: torch.Tensor, dense: bool) -> torch.Tensor:
        """Routing weights `[batch, sequence, num_experts]`, each token's summing to 1.

        Dense: softmax(logits / temperature). Sparse: softmax over the top-k logits, zero elsewhere, as in
        https://arxiv.org/abs/1701.06538, section 2.1, without its noise.
        """
        if dense:
            return F.softmax(router_logits / self.config.router_temperature, dim=-1)
        top_logits, top_experts = router_logits.topk(self.config.num_experts_per_tok, dim=-1)
        return torch.zeros_like(router_logits).scatter(-1, top_experts, F.softmax(top_logits, dim=-1))


def balance_loss(weights: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean squared error between the mean routing weights over non-padding tokens and 1/N: 1/N sum_i (mean_t
    w_ti - 1/N)^2. As weights sum to 1, it is the importance loss of https://arxiv.org/abs/1701.06538, section
    4, over N^2.

    Args:
        weights: `[batch, sequence, num_experts]`.
        token_mask: `[batch, sequence]`, true at tokens that are not padding; `None` for no padding.
    """
    if token_mask is None:
        mean = weights.mean(dim=(0, 1))
    else:
        mask = token_mask.to(weights).unsqueeze(-1)
        mean = (weights * mask).sum(dim=(0, 1)) / mask.sum().clamp(min=1)
    return (mean - 1 / weights.shape[-1]).pow(2).mean()


def best_expert(router_logits: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """One expert per row: the largest mean of softmax(logits) over the row's non-padding tokens.

    Args:
        router_logits: `[batch, sequence, num_experts]`.
        token_mask: `[batch, sequence]`, true at tokens that are not padding; `None` for no padding.

    Returns:
        Expert numbers, `[batch]`.
    """
    probabilities = F.softmax(router_logits, dim=-1)
    if token_mask is not None:
        # A sum orders experts as a mean does, since every expert is averaged over the same tokens.
        probabilities = probabilities * token_mask.to(probabilities).unsqueeze(-1)
    return probabilities.sum(dim=1).argmax(dim=-1)


logger = logging.get_logger(__name__)

# By the name they were loaded under: the foundation that last ran in training and the one that last ran in
# evaluation.
_last_run: dict[str, dict[bool, weakref.ref]] = {}


def routes_densely(config, training: bool) -> bool:
    """Whether the router weights all experts, rather than the top k: see `DyloraMoeConfig.router_mode`."""
    if config.router_mode != "auto":
        return config.router_mode == "dense"
    return training or not all(expert["mature"] for expert in config.expert_configs)


def warn_of_copies_that_differ(model) -> None:
    """Warn once where one model routes densely since it trains, and another of the same name sparsely."""
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


__all__ = [
    "DyloraMoeGate",
    "DyloraMoeRouter",
    "RoutedPass",
    "balance_loss",
    "best_expert",
    "routes_densely",
    "warn_of_copies_that_differ",
]
