"""A linear layer of vLLM's with the experts' low-rank updates beside it, for a flat batch of tokens.

    sum_i w_i s_i B_i A_i x  =  B ((A x) * g)        g = (w * s), each entry repeated over its expert's rank

The same formula as `modeling/experts_dylora_moe.py`. What differs is vLLM's: a layer may hold several of a base model's
(queries, keys and values; gate and up), and, under tensor parallelism, one process's share of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear


# What code of base models reads of a layer. Not `quant_method`, by which vLLM finds the layers whose weights it packs.
OF_BASE_LAYER = ("weight", "bias", "input_size", "output_size", "output_sizes", "tp_size", "tp_rank")

RankLayout = tuple[tuple[int, float], ...]  # rank and scale of every expert at one place


@dataclass
class Part:
    """The stacks of one of the base model's layers inside a layer of vLLM's.

    Attributes:
        index: which of the layer's outputs; None where the layer is that one alone, or all of them in one matrix.
        layout: rank and scale of every expert.
        lora_A, lora_B: `[R, in_features]` and `[R, out_features]`, whole.
    """

    index: int | None
    layout: RankLayout
    lora_A: torch.Tensor
    lora_B: torch.Tensor


class RoutedLinear(nn.Module):
    """vLLM's layer plus the experts' updates.

    Args:
        base_layer: one of vLLM's linear layers.
        parts: what experts adapt of it, at least one.
        weights: `[max_tokens, num_experts]` float32, written before each pass: the experts' weights of every token.
        dtype: of the experts' products.
    """

    def __init__(self, base_layer: nn.Module, parts: list[Part], weights: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.base_layer = base_layer
        device = weights.device
        self.register_buffer("weights", weights, persistent=False)
        rows = [_own_inputs(base_layer, part.lora_A) for part in parts]
        self.lora_A = nn.Parameter(torch.cat(rows).to(device, dtype), requires_grad=False)  # [all R, in]
        spread = torch.cat([_spread(part.layout) for part in parts], dim=1)
        self.register_buffer("spread", spread.to(device), persistent=False)  # [num_experts, all R]
        self.lora_B = nn.ParameterList()
        self.places: list[tuple[slice, int, int]] = []  # rows of all R, first output and number of outputs
        start = 0
        for part in parts:
            row_slice = slice(start, start + len(part.lora_A))
            start = row_slice.stop
            for first, columns in own_outputs(base_layer, part.index, part.lora_B):
                self.places.append((row_slice, first, columns.shape[1]))
                self.lora_B.append(nn.Parameter(columns.to(device, dtype).contiguous(), requires_grad=False))
        self.sums_over_processes = (
            isinstance(base_layer, RowParallelLinear) and base_layer.tp_size > 1 and base_layer.reduce_results
        )

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        output = self.base_layer(hidden_states, *args, **kwargs)
        result = output[0] if isinstance(output, tuple) else output
        if isinstance(self.base_layer, RowParallelLinear) and not self.base_layer.input_is_parallel:
            hidden_states = _own_inputs(self.base_layer, hidden_states)
        ranks = F.linear(hidden_states.to(self.lora_A.dtype), self.lora_A)  # [..., tokens, all R]
        if self.sums_over_processes:
            ranks = tensor_model_parallel_all_reduce(ranks)
        scale = self.weights[: ranks.shape[-2]] @ self.spread  # [tokens, all R]
        ranks = ranks * scale.to(ranks.dtype)
        for (rows, first, size), lora_b in zip(self.places, self.lora_B, strict=True):
            result.narrow(-1, first, size).add_((ranks[..., rows] @ lora_b).to(result.dtype))
        return output

    def __getattr__(self, name: str):
        if name in OF_BASE_LAYER:
            return getattr(super().__getattr__("base_layer"), name)
        return super().__getattr__(name)


def _spread(layout: RankLayout) -> torch.Tensor:
    """Make the matrix that turns weights into g of the formula above: `[num_experts, R]`."""
    ranks = [rank for rank, _ in layout]
    spread = torch.zeros(len(layout), sum(ranks))
    start = 0
    for expert, (rank, scale) in enumerate(layout):
        spread[expert, start : start + rank] = scale
        start += rank
    return spread


def _own_inputs(layer: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """Select this process's inputs of a layer, of the last dimension of a tensor."""
    if not isinstance(layer, RowParallelLinear):
        return tensor
    size = layer.input_size_per_partition
    return tensor[..., layer.tp_rank * size : (layer.tp_rank + 1) * size]


def own_outputs(layer: nn.Module, index: int | None, lora_b: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Select this process's outputs of a layer's part: where they begin in its output, and their columns.

    Args:
        index: which of the layer's outputs the columns are; None: all of them.
        lora_b: `[R, out_features]`.
    """
    if not isinstance(layer, ColumnParallelLinear) or layer.gather_output:
        return [(0, lora_b)]
    sizes, replicas = layer.output_partition_sizes, _replicas(layer)
    wholes = whole_outputs(layer)
    parts = [lora_b] if index is not None else lora_b.split(wholes, dim=1)
    indices = [index] if index is not None else range(len(sizes))
    selected = []
    for place, columns in zip(indices, parts, strict=True):
        share = layer.tp_rank // replicas[place]
        own = columns[:, share * sizes[place] : (share + 1) * sizes[place]]
        selected.append((sum(sizes[:place]), own))
    return selected


def whole_outputs(layer: nn.Module) -> list[int]:
    """Give the sizes of a layer's outputs over all processes: one, or one for each of the base model's layers in it."""
    if not isinstance(layer, ColumnParallelLinear) or layer.gather_output:
        return [layer.output_size]
    sizes = zip(layer.output_partition_sizes, _replicas(layer), strict=True)
    return [size * layer.tp_size // copies for size, copies in sizes]


def _replicas(layer: nn.Module) -> list[int]:
    """Say how many processes hold the same piece of each output: several where there are fewer heads than processes."""
    if isinstance(layer, QKVParallelLinear):
        return [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas]
    return [1] * len(layer.output_partition_sizes)


__all__ = ["Part", "RoutedLinear", "own_outputs", "whole_outputs"]
