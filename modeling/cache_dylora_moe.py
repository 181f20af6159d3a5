"""One cache for all streams of a routed model: stream after stream, each a stretch of ordinary cache layers.

A stream is one pass of the foundation over the tokens (the router's, the routed one, or one an expert). Since
the layers are transformers' own objects, reordering, cropping, repeating and selecting rows work as they
always do. Knows nothing about experts' weights or the model.
"""

from copy import deepcopy

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import logging

from .routing_strategies_dylora_moe import RoutingStrategy


logger = logging.get_logger(__name__)

# What transformers calls a cache among arguments and outputs; from 5.24 on, `cache`.
CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RowExpertsLayer(CacheLayerMixin):
    """A last, pseudo layer that keeps each row's expert with the row, for strategies that choose one per row.

    A cache that was filled under one expert can only be continued under the same one, whatever was done to
    its rows in between. `expert_ids` is of shape `[batch]`, or `None` until it is known.
    """

    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.expert_ids: torch.Tensor | None = None

    def lazy_initialization(self, key_states, value_states):
        raise TypeError("The layer that keeps the rows' experts holds no keys and values.")

    update = lazy_initialization

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.12

    def offload(self) -> None:
        """Nothing worth moving."""

    prefetch = offload

    def crop(self, *args) -> None:
        """A row keeps its expert as long as there is a token of it left; see `kept_experts`."""

    def reset(self) -> None:
        self.expert_ids = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(lambda ids: ids.index_select(0, beam_idx.to(ids.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda ids: ids.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda ids: ids[indices])

    def _select(self, function) -> None:
        if self.expert_ids is not None:
            self.expert_ids = function(self.expert_ids)


def prepare_streams(cache: Cache, num_layers: int, strategy: RoutingStrategy) -> None:
    """Give a cache the layers of every stream, in place; check one that was filled before.

    A cache that was filled outside of this model (PEFT's prefix tuning fills one) is the same past for every
    stream.

    Args:
        cache: any `Cache`; its first `num_layers` layers, if it has them already, become the first stream.
        num_layers: layers of one stream.
        strategy: how many streams there are (an unused one would break rolling the cache back) and whether a
            `RowExpertsLayer`; its name is remembered on the cache.

    Raises:
        ValueError: the cache was filled under another strategy, has layers for another model, or cannot hold
            what the strategy needs.
    """
    filled_by = getattr(cache, "routing_strategy", None)
    if filled_by == str(strategy):
        return
    if not hasattr(cache, "layers"):
        raise ValueError(
            f"`past_key_values` is a {type(cache).__name__}; pass a `Cache` of layers (`DynamicCache`)."
        )
    if filled_by is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"`past_key_values` was filled under {filled_by!r} and cannot be continued under routing strategy "
            f"'{strategy}': pass the strategy it was filled under, or no cache."
        )
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(cache.layers) < num_layers:
            cache.layers.append(cache.layer_class_to_replicate())
        cache.layer_class_to_replicate = None
    if len(cache.layers) < num_layers or (filled_by is None and len(cache.layers) > num_layers):
        raise ValueError(
            f"`past_key_values` has {len(cache.layers)} layers; the foundation has {num_layers}."
        )
    if strategy.num_streams > 1 or strategy.chooses_row_experts:
        _check_room(cache, strategy)
    if filled_by is None:
        _warn_of_foreign_past(cache, strategy)
    _add_streams(cache, num_layers, strategy)


def _check_room(cache: Cache, strategy: RoutingStrategy) -> None:
    """Raises ValueError: the cache works for a single pass alone, and the strategy keeps more than that with
    it."""
    reason = None
    if (
        torch.compiler.is_exporting()
        and cache.is_compileable
        and any(layer.is_initialized for layer in cache.layers)
    ):
        reason = "the cache is a fixed set of buffers of an exported program (as for ExecuTorch)"
    for name in ("update", "get_seq_length", "get_mask_sizes"):
        if getattr(type(cache), name) is not getattr(Cache, name):
            reason = (
                f"{type(cache).__name__} has its own `{name}`, which works on all layers as those of one pass"
            )
    if reason is not None:
        raise ValueError(
            f"Routing strategy {str(strategy)!r} keeps more with `past_key_values` than the keys and values of one pass, and "
            f"{reason}: choose 'single:<expert>', 'uniform' or 'base', or pass another cache."
        )


def _warn_of_foreign_past(cache: Cache, strategy: RoutingStrategy) -> None:
    if str(strategy) != "base" and not torch.compiler.is_compiling() and cache.get_seq_length() > 0:
        logger.warning_once(
            "`past_key_values` was filled outside of this model. It is taken as it is, as the past of every pass: right "
            "for prefix tuning; a prompt that the foundation was run over lacks the experts' part."
        )


def _add_streams(cache: Cache, num_layers: int, strategy: RoutingStrategy) -> None:
    copies = [_copied(layer) for _ in range(strategy.num_streams - 1) for layer in cache.layers[:num_layers]]
    cache.layers[num_layers:] = copies
    if strategy.chooses_row_experts:
        cache.layers.append(RowExpertsLayer())
    cache.routing_strategy = str(strategy)


def _copied(layer: CacheLayerMixin) -> CacheLayerMixin:
    """A layer with the same keys and values, through which gradients go on to where they came from."""
    tensors = [
        value for value in vars(layer).values() if isinstance(value, torch.Tensor) and not value.is_leaf
    ]
    return deepcopy(layer, {id(tensor): tensor.clone() for tensor in tensors})


def new_cache(config: PreTrainedConfig, strategy: RoutingStrategy) -> Cache:
    """An empty dynamic cache with the layers of every stream; see `prepare_streams`."""
    cache = DynamicCache(config=config)
    _add_streams(cache, len(cache.layers), strategy)
    return cache


def stream_of(cache: Cache, num_layers: int, index: int) -> Cache:
    """The cache of one stream: a `Cache` of the same layer objects."""
    if len(cache.layers) == num_layers:
        return cache
    view = Cache(layers=cache.layers[index * num_layers : (index + 1) * num_layers])
    for name in ("offloading", "only_non_sliding", "prefetch_stream"):
        if hasattr(cache, name):
            setattr(view, name, getattr(cache, name))
    return view


def row_experts(cache: Cache | None) -> RowExpertsLayer | None:
    """The layer that keeps the rows' experts, if the cache has one."""
    if cache is not None and cache.layers and isinstance(cache.layers[-1], RowExpertsLayer):
        return cache.layers[-1]
    return None


def kept_experts(cache: Cache | None) -> torch.LongTensor | None:
    """Each row's expert, `[batch]`, that the cache was filled under; a cache that was emptied forgets
    them."""
    layer = row_experts(cache)
    if layer is None:
        return None
    length = cache.get_seq_length()
    # The length of a static cache is a tensor, which compiled code cannot look at; only `reset` empties such
    # a cache.
    if isinstance(length, int) and length == 0:
        layer.reset()
    return layer.expert_ids


__all__ = [
    "CACHE",
    "RowExpertsLayer",
    "kept_experts",
    "new_cache",
    "prepare_streams",
    "row_experts",
    "stream_of",
]
