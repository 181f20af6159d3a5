"""The mixture as a model of vLLM's: one stream of the base model for each pass that the engine's strategy needs.

A forward pass takes the tokens of all requests of a batch in one row. In an engine of `router` it runs stream 0 for
what the gate reads, wherever a request asks for the router, then stream 1 with each token's weights. All
other strategies run in the last stream alone, with weights that are known before (`request_routing`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.sequence import IntermediateTensors

from dylora_moe.modeling.arrow_dylora_moe import PROTOTYPES
from dylora_moe.modeling.routing_dylora_moe import DyloraMoeRouter, routes_densely
from dylora_moe.modeling.saving_dylora_moe import ADAPTER_WEIGHTS, ROUTER_WEIGHTS

from .engine_config import check_engine
from .expert_weights import (
    Edges,
    Stacks,
    check_finite,
    check_stacks,
    place_experts,
    read_adapters,
)
from .request_routing import RequestRouting, routing_of_new_model
from .strategies import EngineStrategies
from .streams import make_streams


class DyloraMoeForCausalLM(nn.Module):
    """A mixture of LoRA experts on vLLM's own implementation of its base model.

    Raises:
        ValueError: experts adapt what cannot be served.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        check_engine(vllm_config)
        self.requests: RequestRouting = routing_of_new_model()
        self.is_loaded = False
        self.vllm_config = vllm_config
        self.config = config = vllm_config.model_config.hf_config
        _refuse_stacked_experts(config)
        strategies = EngineStrategies(config)
        self.streams = nn.ModuleList(
            make_streams(vllm_config, prefix, config.base_config, strategies.num_streams)
        )
        self.router = DyloraMoeRouter(config) if config.has_gate else None
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.weights = torch.zeros(max_tokens, config.num_experts, dtype=torch.float32)  # see `RoutedLinear`
        if config.weights_layout == "adapter":
            # vLLM reads something of the repo itself in any case; the experts' files are read by `read_adapters`.
            self.allow_patterns_overrides = [ROUTER_WEIGHTS, f"experts/*/{ADAPTER_WEIGHTS}"]
            self.secondary_weights = [
                DefaultModelLoader.Source(
                    config.base_model_name_or_path, config.base_model_revision, prefix="foundation."
                )
            ]

    # A pass

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute the last hidden states of a batch, `[tokens, hidden_size]`."""
        if not self.is_loaded:
            raise RuntimeError("The experts were not loaded: use --load-format auto or safetensors.")
        inputs = (input_ids, positions, intermediate_tensors, inputs_embeds)
        num_tokens = positions.shape[-1]
        rows = self._rows_of_tokens(num_tokens, positions.device)
        weights = self.requests.weights[rows]  # [tokens, num_experts]
        # While vLLM measures memory there are no requests, and every pass is run.
        if len(self.streams) > 1 and (self.requests.any_routed or not self.requests.rows):
            self.weights[:num_tokens] = float(self.config.router_input == "experts_sum")
            router_logits = self.router(self.streams[0](*inputs))
            routed = self.router.weights(router_logits, dense=routes_densely(self.config, training=False))
            weights = torch.where(self.requests.is_routed[rows].unsqueeze(-1), routed, weights)
        self.weights[:num_tokens] = weights
        hidden_states = self.streams[-1](*inputs)
        if self.requests.any_choosing:
            self.requests.note_choices(rows, positions, self.router(hidden_states))
        return hidden_states

    def _rows_of_tokens(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Give every token's row of the batch, `[tokens]`.

        Raises:
            RuntimeError: the attention backend does not say where rows begin.
        """
        metadata = get_forward_context().attn_metadata
        if metadata is None or not self.requests.rows:
            return torch.full((num_tokens,), len(self.requests.weights) - 1, device=device)
        of_layer = next(iter(metadata.values()))
        starts = getattr(of_layer, "query_start_loc", None)
        if starts is None or len(starts) <= len(self.requests.rows):
            raise RuntimeError(
                f"{type(of_layer).__name__} does not say where each request's tokens begin, so they would have no "
                "strategy: choose another --attention-backend (FLASH_ATTN, TRITON_ATTN)."
            )
        return self.requests.rows_of_tokens(starts, num_tokens)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.streams[-1].embed_input_ids(input_ids)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.streams[-1].compute_logits(hidden_states)

    # Loading

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the base model into its streams, and place the experts.

        Raises:
            ValueError: what the files hold is not what the config says; names the tensor.
            RuntimeError: weights were loaded before.
        """
        if self.is_loaded:
            raise RuntimeError(
                "A mixture's weights are loaded once: start another engine to load them again."
            )
        stacks: dict[str, dict[str, torch.Tensor]] = {}
        gate: dict[str, torch.Tensor] = {}
        edges: dict[str, Edges] = {}
        self._load_base_model(self._split(weights, stacks, gate, edges))
        if self.config.weights_layout == "adapter":
            model = self.vllm_config.model_config
            pairs, gate = read_adapters(model.model, model.revision, self.config)
        else:
            pairs = _pairs(stacks)
        check_stacks(pairs, self.config)
        self._load_gate(gate)
        # The pass that the gate reads has no experts if its input is the base model's.
        with_experts = list(self.streams)
        if len(self.streams) > 1 and self.config.router_input == "base":
            with_experts = with_experts[1:]
        dtype = self.vllm_config.model_config.dtype
        place_experts(with_experts, pairs, self.config, self.weights, dtype, edges)
        self.is_loaded = True
        return {name for name, _ in self.named_parameters()}

    def _load_base_model(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the base model, and make sure that nothing of it is left as it was allocated.

        vLLM's own check goes by names, and a fused matrix has one for several of the base model's.
        """
        parameters = dict(self.streams[0].named_parameters())
        for parameter in parameters.values():
            if parameter.is_floating_point():
                parameter.data.fill_(torch.nan)
        self.streams[0].load_weights(weights)
        for name, parameter in parameters.items():
            check_finite(f"The base model's {name}", parameter)

    def _split(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        stacks: dict[str, dict[str, torch.Tensor]],
        gate: dict[str, torch.Tensor],
        edges: dict[str, Edges],
    ) -> Iterable[tuple[str, torch.Tensor]]:
        """Yield the base model's weights by its own names, and keep stacks, gate and edges of adapted weights."""
        adapted = set(self.config.adapted_modules())
        for name, tensor in weights:
            if not name.startswith("foundation."):
                if name.startswith("router.gate."):
                    gate[name.removeprefix("router.gate.")] = tensor
                continue
            name = name.removeprefix("foundation.")
            place, _, kind = name.rpartition(".")
            if kind in ("lora_A", "lora_B"):
                stacks.setdefault(place, {})[kind] = tensor
                continue
            if kind == PROTOTYPES and place in adapted:
                continue  # of a router in every layer, whose strategies are not served
            name = name.replace(".base_layer.", ".")
            if tensor.dim() == 2 and name.removesuffix(".weight") in adapted:
                edges[name.removesuffix(".weight")] = (tensor[:, 0].cpu().clone(), tensor[0].cpu().clone())
            yield name, tensor

    def _load_gate(self, gate: dict[str, torch.Tensor]) -> None:
        if self.router is None:
            return
        for name, parameter in self.router.gate.named_parameters():
            found = gate.get(name)
            if found is None or found.shape != parameter.shape:
                shape = "missing" if found is None else list(found.shape)
                raise ValueError(
                    f"The router's gate.{name} is {shape}, and should be {list(parameter.shape)}."
                )
            check_finite(f"gate.{name}", found)
            parameter.data.copy_(found)
            parameter.requires_grad_(False)


def _pairs(stacks: dict[str, dict[str, torch.Tensor]]) -> Stacks:
    pairs = {}
    for place, kinds in stacks.items():
        missing = {"lora_A", "lora_B"} - set(kinds)
        if missing:
            raise ValueError(f"The weights lack {place}.{missing.pop()}.")
        pairs[place] = (kinds["lora_A"], kinds["lora_B"])
    return pairs


def _refuse_stacked_experts(config: Any) -> None:
    """Raise ValueError where experts adapt the base model's own experts, whose layers are fused kernels."""
    places = config.adapted_parameters()
    if places:
        raise ValueError(
            f"Experts adapt {places[0]}, the base model's own stacked experts, which are not served; experts on its "
            "attention are."
        )


__all__ = ["DyloraMoeForCausalLM"]
