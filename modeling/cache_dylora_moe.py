"""One cache for all streams of a routed model: stream after stream, each a stretch of ordinary cache layers.

A stream is one pass of the foundation over the tokens (the router's, the routed one, or one an expert). Since the
layers are transformers' own objects, reordering, cropping, repeating and selecting rows work as they always do.
Knows nothing about experts' weights or the model.
"""

from copy import deepcopy

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .routing_strategies_dylora_moe import RoutingStrategy


# What transformers calls a cache among arguments and outputs; from 5.24 on, `cache`.
CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RowExpertsLayer(CacheLayerMixin):
    """A last, pseudo layer that keeps each row's expert with the row, for strategies that choose one per row.

    A cache that was filled under one expert can only be continued under the same one, whatever was done to its rows
    in between. `expert_ids` is of shape `[batch]`, or `None` until it is known.
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
    """Give an empty cache the layers of every stream, in place; check one that was filled before.

    Args:
        cache: any `Cache`; its first `num_layers` layers, if it has them already, become the first stream.
        num_layers: layers of one stream.
        strategy: how many streams there are (an unused one would break rolling the cache back) and whether a
            `RowExpertsLayer`; its name is remembered on the cache.

    Raises:
        ValueError: the cache was filled under another strategy.
    """
    filled_by = getattr(cache, "routing_strategy", None)
    if filled_by == str(strategy):
        return
    if cache.get_seq_length() > 0:
        # A cache without the mark was filled by another model, and only the foundation's own can be gone on with.
        if filled_by is not None or str(strategy) != "base" or len(cache.layers) != num_layers:
            raise ValueError(
                f"`past_key_values` was filled under {f'{filled_by!r}' if filled_by else 'another model'} and cannot "
                f"be continued under routing strategy '{strategy}': pass the strategy it was filled under, or no cache."
            )
        return
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(cache.layers) < num_layers:
            cache.layers.append(cache.layer_class_to_replicate())
        cache.layer_class_to_replicate = None
    stream = cache.layers[:num_layers]
    if len(stream) != num_layers:
        raise ValueError(f"`past_key_values` has {len(stream)} layers; the foundation has {num_layers}.")
    copies = [deepcopy(stream) for _ in range(strategy.num_streams - 1)]
    cache.layers[num_layers:] = [layer for copied in copies for layer in copied]
    if strategy.chooses_row_experts:
        cache.layers.append(RowExpertsLayer())
    cache.routing_strategy = str(strategy)


def new_cache(config: PreTrainedConfig, strategy: RoutingStrategy) -> Cache:
    """An empty dynamic cache with the layers of every stream; see `prepare_streams`."""
    cache = DynamicCache(config=config)
    prepare_streams(cache, len(cache.layers), strategy)
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
    """Each row's expert, `[batch]`, that the cache was filled under; a cache that was emptied forgets them."""
    layer = row_experts(cache)
    if layer is None:
        return None
    length = cache.get_seq_length()
    # The length of a static cache is a tensor, which compiled code cannot look at; only `reset` empties such a cache.
    if isinstance(length, int) and length == 0:
        layer.reset()
    return layer.expert_ids


__all__ = ["CACHE", "RowExpertsLayer", "kept_experts", "new_cache", "prepare_streams", "row_experts", "stream_of"]
