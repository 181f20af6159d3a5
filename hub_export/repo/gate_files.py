"""Puts another gate into a copy of a repo's files, either layout; every other tensor stays bit for bit.

full       router.gate.weight, router.gate.bias in the file that holds the old gate, else in the last one
adapter    gate.weight, gate.bias in router.safetensors
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ..sources.source_folder import SourceFolder, open_folder
from ..tensors.stored_tensors import INDEX, StoredTensor, of_tensor, write_safetensors
from ..tensors.weight_files import read_index, stored_tensors


ONE_FILE = "model.safetensors"


def gate_holders(folder: Path, layout: str) -> list[str]:
    """List the weight files that `replace_gate` writes, the one that the gate is written to first.

    Args:
        layout: "full" or "adapter".
    """
    from dylora_moe.modeling.saving_dylora_moe import ROUTER_WEIGHTS

    if layout == "adapter":
        return [ROUTER_WEIGHTS]
    places = read_index(open_folder(folder), ONE_FILE)
    if places is None:
        return [ONE_FILE]
    return sorted({file for name, file in places.items() if _is_routers(name)}) or [max(places.values())]


def size_with_gate(folder: SourceFolder, layout: str) -> int:
    """Count the bytes of the weight files that `replace_gate` writes again, as they are now."""
    return sum(
        (folder / name).stat().st_size for name in gate_holders(folder.path, layout) if folder.has(name)
    )


def replace_gate(folder: Path, layout: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Write a gate in place of a repo's router, whatever its kind, if it has one.

    A file that changes is written beside the old one and renamed, so that other names of it (hard links) keep what
    they had.

    Args:
        folder: with the weights of a complete repo.
        layout: "full" or "adapter".
        weight, bias: `[num_experts, hidden_size]` and `[num_experts]`, float32.
    """
    home, *others = gate_holders(folder, layout)
    gate = {"gate.weight": of_tensor(weight), "gate.bias": of_tensor(bias)}
    if layout == "adapter":
        _write(folder / home, gate)
        return
    gate = {f"router.{name}": tensor for name, tensor in gate.items()}
    _write(folder / home, {**_others(folder / home), **gate})
    for file in others:
        _write(folder / file, _others(folder / file))
    places = read_index(open_folder(folder), ONE_FILE)
    if places is not None:
        kept = {name: file for name, file in places.items() if not _is_routers(name)}
        _write_index(folder, {**kept, **dict.fromkeys(gate, home)})


def _others(path: Path) -> dict[str, StoredTensor]:
    """Describe a file's tensors, those of the router left out."""
    return {name: tensor for name, tensor in stored_tensors([path]).items() if not _is_routers(name)}


def _is_routers(name: str) -> bool:
    """Whether a tensor of layout `full` is a gate's, or the prototypes of a router of kind `arrow`."""
    from dylora_moe.modeling.arrow_dylora_moe import PROTOTYPES

    return name.startswith("router.") or name.endswith(f".{PROTOTYPES}")


def _write(path: Path, tensors: dict[str, StoredTensor]) -> None:
    new = path.with_name(f".{path.name}.new")
    write_safetensors(new, tensors)  # the old file is read meanwhile
    os.replace(new, path)


def _write_index(folder: Path, places: dict[str, str]) -> None:
    tensors = stored_tensors([folder / file for file in sorted(set(places.values()))]).values()
    metadata = {
        "total_size": sum(tensor.num_bytes for tensor in tensors),
        "total_parameters": sum(tensor.num_parameters for tensor in tensors),
    }
    text = json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


__all__ = ["gate_holders", "replace_gate", "size_with_gate"]
