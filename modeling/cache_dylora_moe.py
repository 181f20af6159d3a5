"""The KV cache of a routed model: one `Cache` with the layers of all streams, one stream after the other.

A stream is one pass of the foundation over the tokens: the router's, the routed one, or one per expert of
`ensemble`. Under `router`, layers 0 to L-1 are those of the router's pass, and L to 2L-1 those of the routed
pass (`prepare_streams` adds them, `stream_of` selects them). The layers are transformers' own objects, so
reordering, cropping, repeating and selecting rows need no code here.
"""

from copy import deepcopy

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import logging

from .routing_strategies_dylora_moe import RoutingStrategy


logger = logging.get_logger(__name__)

# The name of the cache among arguments and outputs; from transformers 5.24 on, `cache`.
CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RowExpertsLayer(CacheLayerMixin):
    """A last layer without keys and values, which keeps each row's expert with the row.

    For strategies that choose one expert per row: a row whose cache was filled under one expert can only be
    continued under the same one, also after rows were reordered, repeated or selected.

    Attributes:
        expert_ids: each row's expert, `[batch]`; `None` until it is known.
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
        """Do nothing: there are no keys and values to move."""

    prefetch = offload

    def crop(self, *args) -> None:
        """Do nothing: a row keeps its expert as long as it has a token left; see `kept_experts`."""

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
    """Add the layers of every stream to a cache, in place, and check a cache that was filled before.

    A cache that was filled outside of this model (by PEFT's prefix tuning) is the same past for every stream.

    Args:
        cache: any `Cache`; its first `num_layers` layers, if it has them already, become the first stream.
        num_layers: layers of one stream.
        strategy: says how many streams there are (an unused one would break rolling the cache back) and
            whether there is a `RowExpertsLayer`; its name is remembered on the cache.

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
            f"`past_key_values` has {len(cache.layers)} layers; the base model has {num_layers}."
        )
    if strategy.num_streams > 1 or strategy.chooses_row_experts:
        _check_can_grow(cache, strategy)
    if filled_by is None:
        _warn_of_foreign_cache(cache, strategy)
    _add_streams(cache, num_layers, strategy)


def _check_can_grow(cache: Cache, strategy: RoutingStrategy) -> None:
    """Refuse a cache that works for a single pass alone, where the strategy keeps more than that.

    Raises:
        ValueError: the buffers are those of an exported program, or the class works on all layers at once.
    """
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
                f"{type(cache).__name__} has its own `{name}`, which takes all layers for those of one pass"
            )
    if reason is not None:
        raise ValueError(
            f"Routing strategy {str(strategy)!r} keeps more with `past_key_values` than the keys and values of one pass, and "
            f"{reason}: choose 'single:<expert>', 'uniform' or 'base', or pass another cache."
        )


def _warn_of_foreign_cache(cache: Cache, strategy: RoutingStrategy) -> None:
    """Warn once of a cache that was filled outside of this model."""
    if str(strategy) != "base" and not torch.compiler.is_compiling() and cache.get_seq_length() > 0:
        logger.warning_once(
            "`past_key_values` was filled outside of this model. It is taken as it is, as the past of every pass: right "
            "for prefix tuning; a prompt that the base model was run over lacks the experts' part."
        )


def _add_streams(cache: Cache, num_layers: int, strategy: RoutingStrategy) -> None:
    first_stream = cache.layers[:num_layers]
    cache.layers[num_layers:] = []
    for _ in range(strategy.num_streams - 1):
        cache.layers.extend(_copied(layer) for layer in first_stream)
    if strategy.chooses_row_experts:
        cache.layers.append(RowExpertsLayer())
    cache.routing_strategy = str(strategy)


def _copied(layer: CacheLayerMixin) -> CacheLayerMixin:
    """Copy a layer; clones of its keys and values pass gradients on, which `deepcopy` alone refuses."""
    clones = {}
    for value in vars(layer).values():
        if isinstance(value, torch.Tensor) and not value.is_leaf:
            clones[id(value)] = value.clone()
    return deepcopy(layer, clones)


def new_cache(config: PreTrainedConfig, strategy: RoutingStrategy) -> Cache:
    """Make an empty dynamic cache with the layers of every stream; see `prepare_streams`."""
    cache = DynamicCache(config=config)
    _add_streams(cache, len(cache.layers), strategy)
    return cache


def stream_of(cache: Cache, num_layers: int, index: int) -> Cache:
    """Return the cache of one stream: a `Cache` of the same layer objects."""
    if len(cache.layers) == num_layers:
        return cache
    view = Cache(layers=cache.layers[index * num_layers : (index + 1) * num_layers])
    for name in ("offloading", "only_non_sliding", "prefetch_stream"):
        if hasattr(cache, name):
            setattr(view, name, getattr(cache, name))
    return view


def row_experts(cache: Cache | None) -> RowExpertsLayer | None:
    """Return the layer that keeps the rows' experts, if the cache has one."""
    if cache is not None and cache.layers and isinstance(cache.layers[-1], RowExpertsLayer):
        return cache.layers[-1]
    return None


def kept_experts(cache: Cache | None) -> torch.LongTensor | None:
    """Return the expert that each row was filled under, `[batch]`; a cache that was emptied forgets them."""
    layer = row_experts(cache)
    if layer is None:
        return None
    length = cache.get_seq_length()
    # The length of a static cache is a tensor, which compiled code cannot read; only `reset` empties it.
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
