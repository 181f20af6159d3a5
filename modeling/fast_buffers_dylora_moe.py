"""The static KV cache of fast decoding: buffers at fixed addresses, for all calls of `generate`. Optional.

Prefill writes to them from the front, and decode steps continue behind it.
"""

import math
from collections.abc import Callable

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


BUCKET = 256  # a buffer holds a multiple of this in tokens, or of half of it where a text ends before


class Buffers:
    """Memory for the keys and values of every layer of a foundation, reused by every call of `generate`.

    A call gets views of it in the shape that it needs.

    Args:
        on_growth: called before memory is replaced by more of it, since graphs hold its address.
    """

    def __init__(self, on_growth: Callable[[], None]):
        self.on_growth = on_growth
        self.stretches: dict[tuple[int, int], torch.Tensor] = {}

    def get(self, layer: int, kind: int, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """A buffer `[rows, heads, capacity, size]` for the keys (kind 0) or values (kind 1) of a layer."""
        stretch, size = self.stretches.get((layer, kind)), math.prod(shape)
        if stretch is None or stretch.numel() < size or stretch.dtype != like.dtype:
            self.on_growth()
            with torch.inference_mode(False):
                stretch = self.stretches[layer, kind] = torch.empty(
                    size, dtype=like.dtype, device=like.device
                )
        return stretch[:size].view(shape)

    def grown(self, layers: list, length: int) -> list[tuple[torch.Tensor, ...]]:
        """Make buffers of twice the capacity with the first `length` tokens; empties `layers` meanwhile."""
        return [
            tuple(self._grown(index, kind, buffer, length) for kind, buffer in enumerate(layers.pop(0)))
            for index in range(len(layers))
        ]

    def _grown(self, index: int, kind: int, buffer: torch.Tensor, length: int) -> torch.Tensor:
        kept = buffer[:, :, :length].clone()  # the larger buffer may lie over this one
        rows, heads, capacity, size = buffer.shape
        larger = self.get(index, kind, (rows, heads, 2 * capacity, size), kept)
        write(larger, kept)
        return larger


def write(buffer: torch.Tensor, states: torch.Tensor, copies: int = 1, first: int = 0) -> None:
    """Write `states` to `buffer` from token `first` on.

    Args:
        states: `[rows / copies, heads, length, size]`.
        buffer: `[rows, heads, capacity, size]`.
    """
    last = first + states.shape[2]
    buffer[:, :, first:last].unflatten(0, (-1, copies)).copy_(states.unsqueeze(1))
    buffer[:, :, :first].zero_()  # what lies behind a closed mask must be finite
    buffer[:, :, last:].zero_()


def capacity(length: int, max_length: int | None) -> int:
    """Return the capacity of a new buffer, for a prompt of `length` tokens and a text of `max_length`."""
    usual = _round_up(length + 1, BUCKET)
    return usual if max_length is None else min(usual, _round_up(max(length + 1, max_length), BUCKET // 2))


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


class PromptLayer(DynamicLayer):
    """A cache layer of one stream during prefill, which writes to the buffers of the decode steps.

    Args:
        memory: the buffers.
        index: the layer of the foundation.
        rows: the number of rows of all streams.
        first: the first row of these prompts.
        copies: the number of rows that each prompt needs.
        cut: the number of padding tokens left out at the left.
        max_length: the largest number of tokens of a text.
    """

    def __init__(
        self,
        memory: Buffers,
        index: int,
        rows: int,
        first: int,
        copies: int,
        cut: int,
        max_length: int | None,
    ):
        super().__init__()
        self.memory, self.index, self.rows, self.first = memory, index, rows, first
        self.copies, self.cut, self.max_length = copies, cut, max_length
        self.buffers: tuple[torch.Tensor, ...] = ()  # of keys and values, `[rows, heads, capacity, size]`

    def update(self, key_states, value_states, *args, **kwargs):
        if self.buffers:
            raise RuntimeError(
                "The base model runs a layer twice for a prompt: generate with `fast_decoding=False`."
            )
        length = self.cut + key_states.shape[2]
        self.written = slice(self.first, self.first + len(key_states) * self.copies)
        for kind, states in enumerate((key_states, value_states)):
            shape = (self.rows, states.shape[1], capacity(length, self.max_length), states.shape[3])
            buffer = self.memory.get(self.index, kind, shape, states)
            write(buffer[self.written], states, self.copies, self.cut)
            self.buffers += (buffer,)
        self.keys, self.values = (buffer[self.written, :, self.cut : length] for buffer in self.buffers)
        self.is_initialized = True
        return key_states, value_states

    def show(self, length: int) -> None:
        """Expose keys and values including left padding."""
        self.keys, self.values = (buffer[self.written, :, :length] for buffer in self.buffers)


class PromptLayers(DynamicLayer):
    """The layers of several streams, for a pass that runs them as one batch."""

    def __init__(self, layers: list[PromptLayer]):
        super().__init__()
        self.layers = layers

    def update(self, key_states, value_states, *args, **kwargs):
        count = len(self.layers)
        for layer, keys, values in zip(
            self.layers, key_states.chunk(count), value_states.chunk(count), strict=True
        ):
            layer.update(keys, values)
        return key_states, value_states


class BufferLayer(CacheLayerMixin):
    """A cache layer of a decode step: it writes to its buffers at the one position that a tensor tells."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, index: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.index = keys, values, index
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        raise TypeError("The buffers are made before the first step.")

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.index, key_states)
        self.values.index_copy_(2, self.index, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> torch.Tensor:
        return self.index

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # its name before transformers 5.12


__all__ = ["BufferLayer", "Buffers", "PromptLayer", "PromptLayers"]


def trial(*shape: int, like: torch.Tensor, start: int = 1) -> torch.Tensor:
    """Numbers to try functions with; no random ones, since sampling would draw others afterwards."""
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count, device=like.device).sin().view(shape).to(like.dtype)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    tolerance = 4 * torch.finfo(other.dtype).eps
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance)
