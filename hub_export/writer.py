"""Writes a repo's weights, in either layout, tensor by tensor.

    full       model.safetensors (or shards): foundation.<name>, foundation.<module>.base_layer.<name>,
               foundation.<module>.lora_A [R, in], ….lora_B [R, out], router.gate.weight, router.gate.bias
    adapter    experts/<name>/adapter_config.json, adapter_model.safetensors in PEFT's form; router.safetensors

It knows names and shapes of what it writes, and nothing about where tensors come from.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from .errors import DyloraMoeWarning, InputError
from .mixture import Expert, Mixture, Router
from .stored_tensors import StoredTensor, is_finite, write_safetensors, write_shards


TOO_LARGE = "numbers that are too large for {} (choose another --dtype)"
EXPERT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_full(
    folder: Path,
    mixture: Mixture,
    config: Any,
    foundation: dict[str, StoredTensor],
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> None:
    """Everything in `model.safetensors`, sharded beyond `max_shard_size`.

    Args:
        foundation: its tensors by their own names.
        dtype: what foundation and experts are converted to; None: as they are stored.

    Raises:
        InputError: an expert or the gate holds NaN or infinite numbers, or is not stored as floats; `dtype` cannot hold
            what is converted to it.
        OSError: the disk is full, or the file system refuses.
    """
    adapted = set(config.adapted_modules())
    tensors = {}
    for name, tensor in foundation.items():
        module, _, kind = name.rpartition(".")
        inside = ".base_layer" if module in adapted else ""
        tensors[f"foundation.{module}{inside}.{kind}" if module else f"foundation.{kind}"] = _converted(
            tensor, name, dtype
        )
    tensors.update(_stacks(mixture, config, dtype or finest_dtype(mixture)))
    if mixture.router is not None:
        tensors.update({f"router.{name}": tensor for name, tensor in _gate(mixture.router, mixture).items()})
    write_shards(folder, tensors, max_shard_size)


def write_adapter(
    folder: Path, mixture: Mixture, config: Any, dtype: torch.dtype | None, transposed: frozenset[str]
) -> None:
    """The experts as PEFT folders, and the gate.

    Args:
        transposed: modules whose weight is stored as [in, out] (GPT-2's Conv1D), which PEFT wants to be told.

    Raises:
        As `write_full`.
    """
    from dylora_moe.modeling.layouts_dylora_moe import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ROUTER_WEIGHTS, peft_config

    dtype = dtype or finest_dtype(mixture)
    for index, expert in enumerate(mixture.experts):
        place = folder / "experts" / expert.name
        place.mkdir(parents=True)
        tensors = {}
        for module, layer in expert.layers.items():
            shapes = {"lora_A": (layer.rank, layer.in_features), "lora_B": (layer.out_features, layer.rank)}
            for position, (kind, shape) in enumerate(shapes.items()):
                read = _matrix(expert, module, position, dtype)
                tensors[f"base_model.model.{module}.{kind}.weight"] = StoredTensor(shape, dtype, read)
        write_safetensors(place / ADAPTER_WEIGHTS, tensors)
        fan_in_fan_out = any(module in transposed for module in expert.layers)
        text = json.dumps(peft_config(config, index, fan_in_fan_out), indent=2, sort_keys=True)
        (place / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    if mixture.router is not None:
        write_safetensors(folder / ROUTER_WEIGHTS, _gate(mixture.router, mixture))


def finest_dtype(mixture: Mixture) -> torch.dtype:
    """One dtype for all stacks, in which every expert's numbers are exact."""
    for expert in mixture.experts:
        for name, layer in expert.layers.items():
            if layer.dtype not in EXPERT_DTYPES:
                raise InputError(
                    f"expert {expert.name} ({expert.origin}) is stored as {layer.dtype} on {name}, not as floats"
                )
    return reduce(torch.promote_types, (layer.dtype for expert in mixture.experts for layer in expert.layers.values()))


def _stacks(mixture: Mixture, config: Any, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """lora_A [R, in] and lora_B [R, out] of every adapted layer: the experts' rows, in their order."""
    tensors = {}
    for module in config.adapted_modules():
        holders = [expert for expert in mixture.experts if module in expert.layers]
        total = sum(expert.layers[module].rank for expert in holders)
        sizes = (holders[0].layers[module].in_features, holders[0].layers[module].out_features)
        for position, size in enumerate(sizes):
            read = _stack(holders, module, position, dtype)
            tensors[f"foundation.{module}.lora_{'AB'[position]}"] = StoredTensor((total, size), dtype, read)
    return tensors


def _stack(holders: list[Expert], module: str, position: int, dtype: torch.dtype):
    matrices = [_matrix(expert, module, position, dtype) for expert in holders]
    return lambda: torch.cat([matrix() if position == 0 else matrix().T for matrix in matrices])


def _matrix(expert: Expert, module: str, position: int, dtype: torch.dtype):
    def read() -> torch.Tensor:
        matrix = expert.read(module)[position]
        if not is_finite(matrix):
            raise InputError(f"expert {expert.name} ({expert.origin}) holds NaN or infinite numbers on {module}")
        converted = matrix.to(dtype)
        if not is_finite(converted):
            raise InputError(f"expert {expert.name} ({expert.origin}) holds {TOO_LARGE.format(dtype)} on {module}")
        return converted

    return read


def _gate(router: Router, mixture: Mixture) -> dict[str, StoredTensor]:
    def read(position: int) -> torch.Tensor:
        tensor = router.read()[position].float()
        if not is_finite(tensor):
            raise InputError(f"the router's gate ({mixture.folders[0]}) holds NaN or infinite numbers")
        return tensor

    return {
        "gate.weight": StoredTensor((router.num_experts, router.hidden_size), torch.float32, lambda: read(0)),
        "gate.bias": StoredTensor((router.num_experts,), torch.float32, lambda: read(1)),
    }


def _converted(tensor: StoredTensor, name: str, dtype: torch.dtype | None) -> StoredTensor:
    """In another dtype, or as it is stored. Infinite numbers are the foundation's own affair, and said; those that the
    conversion would make are refused."""
    told = []
    target = tensor.to(dtype).dtype

    def convert(content: torch.Tensor) -> torch.Tensor:
        converted = content.to(target)
        if converted.dtype not in EXPERT_DTYPES or told or is_finite(converted):
            return converted
        if is_finite(content.float()):
            raise InputError(f"the foundation holds {TOO_LARGE.format(target)} in {name}")
        told.append(name)
        warnings.warn(f"the foundation holds NaN or infinite numbers in {name}", DyloraMoeWarning, stacklevel=2)
        return converted

    return replace(tensor.through(convert), dtype=target)
