"""The passes over the tokens that a strategy needs: copies of the base model that differ in their attention alone.

Every stream has attention layers of its own, registered under its own name, so that vLLM gives each a paged KV cache.
All other modules of the further streams are those of the first, the same objects: weights are in memory once, and
what vLLM does to them after loading (packing, for a CPU) is done once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


def make_streams(vllm_config: Any, prefix: str, base_config: Any, num_streams: int) -> list[nn.Module]:
    """Build vLLM's own implementation of the base model once a stream.

    Args:
        base_config: the base model's config.
        num_streams: 1 or more.

    Raises:
        ValueError: the base model cannot be built a second time without memory of its own.
    """

    def build(number: int) -> nn.Module:
        name = maybe_prefix(prefix, f"stream{number}")
        # For what `torch.compile` keeps on disk: streams differ, and their classes do not.
        with set_model_tag(name):
            return init_vllm_registered_model(vllm_config, prefix=name, hf_config=base_config)

    streams = [build(0)]
    for number in range(1, num_streams):
        try:
            with torch.device("meta"):  # takes no memory
                stream = build(number)
        except NotImplementedError as error:
            raise ValueError(
                f"vLLM's {type(streams[0]).__name__} reads its own numbers while it is built (as ALiBi's slopes), which a "
                "further stream has none of. Start the engine with a strategy of one stream: --hf-overrides "
                '\'{"routing_strategy": "best"}\', or another than router.'
            ) from error
        share_modules(streams[0], stream)
        _forget_replaced(vllm_config, maybe_prefix(prefix, f"stream{number}"), stream)
        streams.append(stream)
    return streams


def share_modules(first: nn.Module, stream: nn.Module) -> None:
    """Replace every module of a stream by the first stream's, down to those that contain attention.

    Of attention and of what contains it, parameters, buffers and other tensors are shared.
    """
    for name, child in stream.named_children():
        if any(isinstance(module, AttentionLayerBase) for module in child.modules()):
            share_modules(getattr(first, name), child)
        else:
            setattr(stream, name, getattr(first, name))
    stream._parameters.update(first._parameters)
    stream._buffers.update(first._buffers)
    _share_plain_tensors(first, stream)
    if isinstance(stream, AttentionLayerBase) and hasattr(stream, "impl"):
        _share_plain_tensors(first.impl, stream.impl)


def _share_plain_tensors(first: Any, other: Any) -> None:
    for name, value in vars(other).items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            setattr(other, name, getattr(first, name))


def _forget_replaced(vllm_config: Any, prefix: str, stream: nn.Module) -> None:
    """Take layers that a stream no longer has out of vLLM's register of layers by name."""
    layers = vllm_config.compilation_config.static_forward_context
    kept = set(map(id, stream.modules()))
    for name in [name for name in layers if name.startswith(f"{prefix}.")]:
        if id(layers[name]) not in kept:
            del layers[name]
            moe_layers = vllm_config.compilation_config.static_all_moe_layers
            if name in moe_layers:
                moe_layers.remove(name)


__all__ = ["make_streams", "share_modules"]
