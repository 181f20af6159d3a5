"""Writes a repo's weights, in either layout, file by file.

full       model.safetensors (or shards): foundation.<name>, foundation.<module>.base_layer.<name>,
           foundation.<module>.lora_A [R, in], ….lora_B [R, out], router.gate.weight, router.gate.bias, or
           of a router of every layer foundation.<module>.prototypes [N, in];
           of stacked experts foundation.<module>.updates.<parameter>.lora_A [R, E, in], ….lora_B [R, E,
           out]
adapter    experts/<name>/adapter_config.json, adapter_model.safetensors in PEFT's form; router.safetensors
"""

from __future__ import annotations

import json
import warnings
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from ..errors import DyloraMoeWarning, InputError, one_line
from ..tensors.mixture import ArrowRouter, Expert, Mixture, Router
from ..tensors.stored_tensors import StoredTensor, is_finite, write_safetensors, write_shards


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
    """Write everything to `model.safetensors`, sharded beyond `max_shard_size`.

    Args:
        foundation: its tensors by their own names.
        dtype: what foundation and experts are converted to; None: as they are stored.

    Raises:
        InputError: an expert or the gate holds NaN or infinite numbers, or is not stored as floats; `dtype`
            cannot hold what is converted to it.
        OSError: the disk is full, or the file system refuses.
    """
    write_shards(folder, _all_tensors(mixture, config, foundation, dtype), max_shard_size)


def size_of_weights(
    mixture: Mixture, config: Any, foundation: dict[str, StoredTensor], dtype: torch.dtype | None
) -> int:
    """Count the bytes of the weights that `write_full` writes; without a foundation's, those of `write_adapter`.

    Raises:
        InputError: an expert is not stored as floats.
    """
    return sum(tensor.num_bytes for tensor in _all_tensors(mixture, config, foundation, dtype).values())


def _all_tensors(
    mixture: Mixture, config: Any, foundation: dict[str, StoredTensor], dtype: torch.dtype | None
) -> dict[str, StoredTensor]:
    """Give everything that layout `full` holds, by its names there; the numbers stay on the disk."""
    from dylora_moe.modeling.experts_dylora_moe import in_base_layer

    wrapped = config.wrapped_modules()
    tensors = {
        f"foundation.{in_base_layer(name, wrapped)}": _converted(tensor, name, dtype)
        for name, tensor in foundation.items()
    }
    tensors.update(_stacks(mixture, config, dtype or finest_dtype(mixture)))
    for name, tensor in _router_tensors(mixture, dtype or finest_dtype(mixture)).items():
        tensors[f"{mixture.router.prefix}{name}"] = tensor
    return tensors


def write_adapter(
    folder: Path, mixture: Mixture, config: Any, dtype: torch.dtype | None, transposed: frozenset[str]
) -> None:
    """Write the experts as PEFT folders, and the router.

    Args:
        transposed: modules whose weight is stored as [in, out] (GPT-2's Conv1D), which PEFT wants to be told.

    Raises:
        As `write_full`.
    """
    from dylora_moe.modeling.saving_dylora_moe import (
        ADAPTER_CONFIG,
        ADAPTER_WEIGHTS,
        ROUTER_WEIGHTS,
        peft_config,
        peft_keys,
    )

    dtype = dtype or finest_dtype(mixture)
    for index, expert in enumerate(mixture.experts):
        place = folder / "experts" / expert.name
        place.mkdir(parents=True)
        tensors = {}
        for name, key in peft_keys(config.expert_configs[index]).items():
            layer = expert.layers[name]
            shapes = {
                "lora_A": (layer.num_rows, layer.in_features),
                "lora_B": (layer.out_features, layer.num_rows),
            }
            for position, (kind, shape) in enumerate(shapes.items()):
                tensors[f"{key}.{kind}.weight"] = StoredTensor(
                    shape, dtype, _matrix(expert, name, position, dtype)
                )
        write_safetensors(place / ADAPTER_WEIGHTS, tensors)
        fan_in_fan_out = any(module in transposed for module in expert.layers)
        text = json.dumps(peft_config(config, index, fan_in_fan_out), indent=2, sort_keys=True)
        (place / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    if mixture.router is not None:
        write_safetensors(folder / ROUTER_WEIGHTS, _router_tensors(mixture, dtype))


def finest_dtype(mixture: Mixture) -> torch.dtype:
    """Find one dtype for all stacks, in which every expert's numbers are exact."""
    for expert in mixture.experts:
        for name, layer in expert.layers.items():
            if layer.dtype not in EXPERT_DTYPES:
                raise InputError(
                    f"expert {expert.name} ({expert.origin}) is stored as {layer.dtype} on {name}, not as floats"
                )
    return reduce(
        torch.promote_types, (layer.dtype for expert in mixture.experts for layer in expert.layers.values())
    )


def _stacks(mixture: Mixture, config: Any, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Stack the experts' rows, in their order.

    lora_A [R, in] and lora_B [R, out] of every adapted layer, [R, E, in] and [R, E, out] of stacked experts.
    """
    tensors = {}
    for name, module in config.stack_modules().items():
        holders = [expert for expert in mixture.experts if name in expert.layers]
        total = sum(expert.layers[name].rank for expert in holders)
        layer = holders[0].layers[name]
        for position, size in enumerate((layer.in_features, layer.out_features)):
            shape = (total, layer.num_stacked, size) if layer.num_stacked else (total, size)
            read = _stack(holders, name, position, dtype)
            tensors[f"foundation.{module}.lora_{'AB'[position]}"] = StoredTensor(shape, dtype, read)
    return tensors


def _stack(holders: list[Expert], name: str, position: int, dtype: torch.dtype):
    from dylora_moe.modeling.stacked_experts_dylora_moe import rows_of_a, rows_of_b

    rows = (rows_of_a, rows_of_b)[position]
    matrices = [
        (_matrix(expert, name, position, dtype), expert.layers[name].num_stacked) for expert in holders
    ]
    return lambda: torch.cat([rows(matrix(), num_stacked) for matrix, num_stacked in matrices])


def _matrix(expert: Expert, module: str, position: int, dtype: torch.dtype):
    def read() -> torch.Tensor:
        matrix = expert.read(module)[position]
        if not is_finite(matrix):
            raise InputError(
                f"expert {expert.name} ({expert.origin}) holds NaN or infinite numbers on {module}"
            )
        converted = matrix.to(dtype)
        if not is_finite(converted):
            raise InputError(
                f"expert {expert.name} ({expert.origin}) holds {TOO_LARGE.format(dtype)} on {module}"
            )
        return converted

    return read


def _router_tensors(mixture: Mixture, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Give the router's tensors by their names in `router.safetensors`; none without a router.

    Args:
        dtype: what the experts are written in, of which prototypes are made.
    """
    if mixture.router is None:
        return {}
    if isinstance(mixture.router, ArrowRouter):
        return _prototypes(mixture.router, mixture.experts, dtype)
    return _gate(mixture.router, mixture)


def _prototypes(router: ArrowRouter, experts: list[Expert], dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Give the prototypes of all layers, [num_experts, in_features] each: those that are stored, and new ones.

    One expert's matrices on one layer are in memory at a time.
    """
    from dylora_moe.modeling.arrow_dylora_moe import prototype

    def read(module: str, shape: tuple[int, ...]) -> torch.Tensor:
        rows = torch.zeros(shape)
        stored = router.stored.get(module)
        num_stored = 0 if stored is None else router.num_stored
        if stored is not None:
            rows[:num_stored] = stored.read()
        for index, expert in enumerate(experts[num_stored:], start=num_stored):
            if module in expert.layers:
                lora_a, lora_b = (_matrix(expert, module, position, dtype)() for position in (0, 1))
                rows[index] = prototype(lora_a, lora_b)
        return rows

    return {
        name: StoredTensor(shape, torch.float32, partial(read, name.removesuffix(".prototypes"), shape))
        for name, shape in router.shapes(experts).items()
    }


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
    """Convert to another dtype, or leave as it is stored.

    The foundation's own infinite numbers are a warning; those that the conversion would make are refused.
    """
    told = []
    target = tensor.to(dtype).dtype

    def convert(content: torch.Tensor) -> torch.Tensor:
        converted = content.to(target)
        if converted.dtype not in EXPERT_DTYPES or told or is_finite(converted):
            return converted
        if is_finite(content.float()):
            raise InputError(f"the base model holds {TOO_LARGE.format(target)} in {name}")
        told.append(name)
        warnings.warn(
            f"the base model holds NaN or infinite numbers in {name}", DyloraMoeWarning, stacklevel=2
        )
        return converted

    return StoredTensor(tensor.shape, target, lambda: convert(tensor.read()))


def write_config_and_code(folder: Path, config: Any) -> None:
    """Write `config.json`, and the files of `modeling/` that it points to.

    Raises:
        InputError: the config cannot be saved.
    """
    from dylora_moe.modeling.saving_dylora_moe import AUTO_MAP, save_code

    config.auto_map = dict(AUTO_MAP)
    try:
        config.save_pretrained(folder)
    except (ValueError, TypeError) as error:
        raise InputError(f"the config cannot be saved: {one_line(error)}") from error
    save_code(folder)


def write_generation_config(folder: Path, fields: dict[str, Any], strategy: str | None) -> None:
    """Write `generation_config.json`: what the foundation's held, and the routing strategy unless it is None.

    The mark that it was derived from a model config must go: with it, transformers drops unknown fields on
    reading.
    """
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    fields.pop("routing_strategy", None)
    if strategy is not None:
        fields["routing_strategy"] = strategy
    text = json.dumps(fields, indent=2, sort_keys=True)
    (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")


def make_readable(folder: Path) -> None:
    """Give every file the permissions of a new file: some libraries make theirs for the owner alone."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
