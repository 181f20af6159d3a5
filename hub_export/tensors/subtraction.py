"""Subtracts one adapter from experts, exactly: what they all know from what each of them knows.

As in GenKnowSub (https://aclanthology.org/2025.acl-short.54/), but of the products, by appended ranks:

    s_i B_i A_i - s_g B_g A_g  =  s_i [B_i, -(s_g / s_i) B_g] [A_i; A_g]

PEFT's `use_gks` subtracts A_g from A_i and B_g from B_i, each by itself; the product of these differences is
another one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..errors import InputError
from .mixture import AdaptedLayer, Expert


def subtract(experts: list[Expert], general: Expert, dtype: torch.dtype | None) -> tuple[list[Expert], bool]:
    """Subtract an adapter from every expert. Tensors stay on disk.

    Args:
        experts: they and `general` with the foundation's names of layers.
        dtype: what the experts will be converted to; None: as they are stored.

    Returns:
        The experts, and whether no number was rounded.

    Raises:
        InputError: `dtype` would round the products by themselves, so that the difference is not exact.
    """
    is_exact = True
    for expert in experts:
        for name in expert.layers.keys() & general.layers.keys():
            if _keeps_digits(_ratio(expert, general, name), dtype or _dtype(expert, general, name)):
                continue
            is_exact = False
            if dtype in (torch.float16, torch.bfloat16):
                raise InputError(
                    f"--subtract with --dtype {str(dtype).removeprefix('torch.')} would round what is subtracted: on {name} "
                    f"its scale is {_ratio(expert, general, name):g} times that of expert {expert.name}; leave out --dtype"
                )
    return [_without(expert, general) for expert in experts], is_exact


def _without(expert: Expert, general: Expert) -> Expert:
    """Make the expert that is the difference of two."""
    layers = {}
    for name in [*expert.layers, *(name for name in general.layers if name not in expert.layers)]:
        layer = _difference(expert, general, name)
        if layer is not None:
            layers[name] = layer
    return replace(
        expert,
        layers=layers,
        read=lambda name: _matrices(expert, general, name, layers[name].dtype),
        alpha_of=None,
    )


def _difference(expert: Expert, general: Expert, name: str) -> AdaptedLayer | None:
    """Describe the difference on one layer; None where it is zero for the scales."""
    own, other = expert.layers.get(name), general.layers.get(name)
    own_scale, other_scale = _scale(expert, name), _scale(general, name)
    if other is None or (own is not None and other_scale == 0):
        return own
    if other_scale == 0:
        return None
    if own_scale == 0:
        return replace(other, lora_alpha=_alpha(other_scale, other.rank, expert.use_rslora))
    if _shape(own) != _shape(other):
        raise InputError(
            f"--subtract {general.origin} was trained on {name} of another shape than expert {expert.name} ({expert.origin}): "
            "subtract an adapter of the same base model"
        )
    rank = own.rank + other.rank
    alpha = _alpha(own_scale, rank, expert.use_rslora)
    return replace(own, rank=rank, lora_alpha=alpha, dtype=_dtype(expert, general, name))


def _matrices(
    expert: Expert, general: Expert, name: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read A and B of the difference on one layer, as in PEFT."""
    from dylora_moe.modeling.stacked_experts_dylora_moe import as_in_peft, rows_of_stack

    if name not in general.layers or _scale(general, name) == 0:
        return expert.read(name)
    lora_a, lora_b = general.read(name)
    if _scale(expert, name) == 0:
        return lora_a, -lora_b
    factor = -_ratio(expert, general, name)
    count = expert.layers[name].num_stacked
    others = rows_of_stack(lora_a.to(dtype), (lora_b.double() * factor).to(dtype), count)
    own = rows_of_stack(*(matrix.to(dtype) for matrix in expert.read(name)), count)
    return as_in_peft(*(torch.cat(pair) for pair in zip(own, others, strict=True)))


def _scale(expert: Expert, name: str) -> float:
    """Give alpha / rank, or of rsLoRA alpha / sqrt(rank); 0 where the layer is not adapted."""
    layer = expert.layers.get(name)
    return 0.0 if layer is None else layer.lora_alpha / _divisor(layer.rank, expert.use_rslora)


def _alpha(scale: float, rank: int, use_rslora: bool) -> float:
    """Give the alpha by which a layer of this rank has the scale."""
    alpha = scale * _divisor(rank, use_rslora)
    return int(alpha) if alpha.is_integer() else alpha


def _divisor(rank: int, use_rslora: bool) -> float:
    return math.sqrt(rank) if use_rslora else rank


def _ratio(expert: Expert, general: Expert, name: str) -> float:
    """Give s_g / s_i, or 1 where one of them is 0 and no factor is needed."""
    own, other = _scale(expert, name), _scale(general, name)
    return other / own if own and other else 1.0


def _shape(layer: AdaptedLayer) -> tuple[int, int, int]:
    return layer.in_features, layer.out_features, layer.num_stacked


def _dtype(expert: Expert, general: Expert, name: str) -> torch.dtype:
    """Choose the dtype of the difference on a layer that both adapt: float32 where a coarser one would round."""
    dtype = torch.promote_types(expert.layers[name].dtype, general.layers[name].dtype)
    keeps = _keeps_digits(_ratio(expert, general, name), dtype)
    return dtype if keeps else torch.promote_types(dtype, torch.float32)


def _keeps_digits(ratio: float, dtype: torch.dtype) -> bool:
    """Whether numbers times this are exact: times a power of two, unless they may be too small for it (float16)."""
    return abs(ratio) == 1 or (math.frexp(abs(ratio))[0] == 0.5 and dtype != torch.float16)


__all__ = ["subtract"]
