"""AdaLoRA, as a plain low-rank sum: its diagonal and PEFT's scale are folded into what any LoRA adapter has.

    base_model.model.<module>.lora_A [r, in], ….lora_B [out, r], ….lora_E [r, 1]
    adapter_config.json: init_r, lora_alpha, and rank_pattern: "<module>.lora_E" to a list of init_r booleans

PEFT adds lora_alpha / (init_r + 1e-5) · B (A · E) x, whatever rank r a layer ended with, and leaves `r`,
`use_rslora` and `alpha_pattern` unread. `ranknum`, which holds init_r, is not stored. Tried with PEFT 0.21.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..tensors.mixture import AdaptedLayer
from ..tensors.tensor_files import TensorFile
from .training_run import number


MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[ABE])")

MOST_RANKS = 1 << 20


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Check the fields that the scale is made of, and the ranks that were kept.

    Raises:
        InputError: the fields that the scale is made of, or the ranks that were kept, are not what PEFT writes.
    """
    init_r = config.get("init_r")
    if isinstance(init_r, bool) or not isinstance(init_r, int) or not 0 < init_r <= MOST_RANKS:
        raise InputError(f"{path}: peft_type is ADALORA and init_r is {init_r!r}, expected a positive number")
    if number(config.get("lora_alpha"), f"{path}: lora_alpha") <= 0:
        raise InputError(
            f"{path}: lora_alpha is {config['lora_alpha']!r}; AdaLoRA scales by it only where it is positive"
        )
    pattern = config.get("rank_pattern")
    if pattern is not None and not isinstance(pattern, dict):
        raise InputError(f"{path}: rank_pattern is a {type(pattern).__name__}, expected an object")
    for key, kept in (pattern or {}).items():
        if (
            not isinstance(kept, list)
            or len(kept) != init_r
            or not all(isinstance(value, bool) for value in kept)
        ):
            raise InputError(f"{path}: rank_pattern of {key} is not a list of init_r ({init_r}) booleans")


def ranks(config: dict[str, Any]) -> dict[str, int]:
    """Map each module to the rank it was pruned to. In older files the names end with the adapter's name."""
    found = {}
    for key, kept in (config.get("rank_pattern") or {}).items():
        module = key.rsplit(".lora_E", 1)[0]
        found[module] = sum(kept)
    return found


def layers(
    file: TensorFile, keys: dict[str, dict[str, str]], config: dict[str, Any], folder: Path
) -> dict[str, AdaptedLayer]:
    """Describe the layers that kept any rank; where none did, all with rank 1.

    A layer that was pruned away computes nothing.

    Raises:
        InputError: a matrix is missing, or shapes do not fit each other or the config.
    """
    pruned = ranks(config)
    unknown = sorted(set(pruned) - set(keys))
    if unknown:
        raise InputError(
            f"{folder}/adapter_config.json: rank_pattern names {unknown[0]}, {file.path} does not"
        )
    all_layers = {
        module: _layer(file, module, matrices, config, pruned.get(module, config["init_r"]), folder)
        for module, matrices in keys.items()
    }
    found = {module: layer for module, layer in all_layers.items() if layer.rank}
    if not found:
        # A model has no expert without layers; one of rank 1 whose matrices are zero does nothing, either.
        return {module: replace(layer, rank=1, lora_alpha=1.0) for module, layer in all_layers.items()}
    return found


def _layer(
    file: TensorFile, module: str, matrices: dict[str, str], config: dict[str, Any], rank: int, folder: Path
) -> AdaptedLayer:
    missing = sorted(set("ABE") - set(matrices))
    if missing:
        raise InputError(
            f"{file.path}: {module} has no lora_{missing[0]}; AdaLoRA has lora_A, lora_B and lora_E"
        )
    shape_a, shape_b, shape_e = (file.shape(matrices[matrix]) for matrix in "ABE")
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or shape_e != (shape_a[0], 1):
        raise InputError(
            f"{file.path}: {module} has lora_A {list(shape_a)}, lora_B {list(shape_b)} and lora_E {list(shape_e)}, "
            "expected [rank, in], [out, rank] and [rank, 1] of one rank"
        )
    if shape_a[0] != rank:
        raise InputError(
            f"{file.path}: {module} has rank {shape_a[0]}, {folder}/adapter_config.json says {rank}; "
            "the two do not belong together"
        )
    return AdaptedLayer(
        rank=rank,
        # so that lora_alpha / rank is PEFT's scale
        lora_alpha=rank * config["lora_alpha"] / (config["init_r"] + 1e-5),
        in_features=shape_a[1],
        out_features=shape_b[0],
        dtype=torch.promote_types(_product_dtype(file, matrices), file.dtype(matrices["B"])),
    )


def read(file: TensorFile, matrices: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read A · E and B; of a layer of rank 0, zeros of rank 1.

    The product is taken, and kept, in float32, as PEFT computes it; rounding it would change it.
    """
    dtype = _product_dtype(file, matrices)
    product = file.read(matrices["A"]).to(dtype) * file.read(matrices["E"]).to(dtype)
    matrix_b = file.read(matrices["B"])
    both = torch.promote_types(dtype, matrix_b.dtype)
    if not len(product):
        return (
            product.new_zeros(1, product.shape[1], dtype=both),
            matrix_b.new_zeros(len(matrix_b), 1, dtype=both),
        )
    return product.to(both), matrix_b.to(both)


def _product_dtype(file: TensorFile, matrices: dict[str, str]) -> torch.dtype:
    dtypes = [file.dtype(matrices[matrix]) for matrix in "AE"]
    for dtype in (*dtypes, file.dtype(matrices["B"])):
        if not dtype.is_floating_point:
            raise InputError(
                f"{file.path}: {matrices['A']} and its partners are stored as {dtype}, not as floats"
            )
    return torch.promote_types(torch.promote_types(*dtypes), torch.float32)
