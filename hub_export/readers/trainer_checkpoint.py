"""Reads the checkpoints that DyLoRA-MoE's trainer saves during training; adapters are PEFT's own folders.

    config.json                 model_type "dylora-moe", num_experts, checkpoint_type "peft_only"
    router.safetensors          (or a flat router.pt) gate.weight [num_experts, hidden_size], gate.bias [num_experts]
    peft_adapters/expert_<i>/expert_<i>/adapter_config.json, adapter_model.safetensors

The adapters are nested twice because PEFT's save_pretrained gives a named adapter a folder of its own. The
earlier form, with peft_adapters/expert_<i>.pt, is read as a final checkpoint. Optimizer states, training
arguments and random states are never opened.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..sources.source_folder import SourceFolder
from ..sources.source_options import ReadOptions
from ..tensors.mixture import Expert, FoundationReference, Mixture, Router, natural_order
from ..tensors.stored_tensors import StoredTensor, of_file, of_tensor
from ..tensors.tensor_files import TensorFile
from .final_checkpoint import ADAPTERS, adapter_files
from .peft_adapters import holds_matrices, read_config, read_expert, same_foundation, weight_file
from .training_run import (
    best_model_config,
    count_of_experts,
    gate_of_state,
    hint_other_checkpoint,
    make_router,
    maturity_note,
    only_folder,
    own_state,
    read_state,
    settings_or_defaults,
)


FORMAT = "trainer checkpoint"
DESCRIPTION = "config.json, peft_adapters/expert_<i>/expert_<i>/adapter_model.safetensors, router.safetensors or router.pt"

ROUTER_FILES = ("router.safetensors", "router.pt")
GATE = {"weight": "gate.weight", "bias": "gate.bias"}
MOST_TOLD = 8  # missing experts that are looked for in other checkpoints, one by one
# what the router's file may hold beside the gate without computing anything else
ROUTER_SETTINGS = ("expert_maturity", "top_k", "temperature", "num_experts", "input_size")


def recognise(folder: SourceFolder) -> str | None:
    """Say why this folder is a trainer checkpoint, or None.

    Tensor names decide, config fields only where there are none.
    """
    for place in expert_folders(folder).values():
        weights = weight_file(place)
        key = None if weights is None else holds_matrices(weights)
        if key is not None:
            return f"{weights.relative_to(folder.path)} holds {key}"
    if adapter_files(folder):
        return None
    if folder.read_json("config.json", required=False).get("checkpoint_type") == "peft_only":
        return 'config.json has checkpoint_type "peft_only"'
    return None


def expert_folders(folder: SourceFolder) -> dict[int, SourceFolder]:
    """Map expert index to the folder of its adapter, as PEFT nests it or one level up, in the order of the indices."""
    if not folder.has_folder(ADAPTERS):
        return {}
    found = {}
    for place in folder.folder(ADAPTERS).folders("expert_*"):
        match = re.fullmatch(r"expert_(0|[1-9][0-9]*)", place.path.name)
        if match is None:
            continue
        nested = place.folder(place.path.name)
        if _is_adapter(nested):
            found[int(match.group(1))] = nested
        elif _is_adapter(place):
            found[int(match.group(1))] = place
    return dict(sorted(found.items()))


def _is_adapter(place: SourceFolder) -> bool:
    return place.has("adapter_config.json") or weight_file(place) is not None


def read(folders: list[SourceFolder], options: ReadOptions) -> Mixture:
    """Describe one checkpoint folder; tensors stay on disk.

    Raises:
        InputError: a file is damaged or two parts of the checkpoint contradict each other. Experts and a
            router that are missing are listed in the mixture's `problems` instead.
    """
    folder = only_folder(folders, FORMAT)
    if options.lora_alpha is not None:
        raise InputError(
            "the adapters of a trainer checkpoint state their alpha in adapter_config.json; leave out --lora_alpha"
        )
    path = folder / "config.json"
    config = folder.read_json("config.json", required=False)
    problems: list[str] = []
    notes: list[str] = []
    places = expert_folders(folder)
    stated = count_of_experts(config, ("num_experts", "_dylora_num_experts"), path)
    expected = stated[0] if stated is not None else max(places, default=-1) + 1
    surplus = [f"expert_{index}" for index in places if index >= expected]
    if surplus:
        raise InputError(
            f"{folder}/peft_adapters holds {surplus[0]}, but config.json's {stated[1]} is {expected}; "
            "correct whichever is wrong"
        )
    configs: list[tuple[SourceFolder, dict[str, Any]]] = []
    missing = [index for index in range(expected) if index not in places]
    told = sorted([*places, *missing[:MOST_TOLD]])
    experts = [_read_expert(folder, index, places.get(index), configs, problems) for index in told]
    if len(missing) > MOST_TOLD:
        problems.append(f"{folder}/peft_adapters lacks {len(missing) - MOST_TOLD} more experts")
    return Mixture(
        format=FORMAT,
        folders=folders,
        experts=[expert for expert in experts if expert is not None],
        router=_read_router(folder, expected, options, problems, notes),
        foundation=_foundation(folder, config, configs, options, problems),
        problems=problems,
        notes=notes,
    )


def _read_expert(
    folder: SourceFolder,
    index: int,
    place: SourceFolder | None,
    configs: list[tuple[SourceFolder, dict[str, Any]]],
    problems: list[str],
) -> Expert | None:
    """Read an expert and its config; None and a problem where the checkpoint has nothing of it."""
    name = f"expert_{index}"
    if place is None:
        nested = folder / f"{ADAPTERS}/{name}/{name}"
        problems.append(f"{nested} is missing; {hint_other_checkpoint(folder, name)}")
        return None
    weights = weight_file(place)
    what = None
    if weights is None:
        what = f"{place} has no adapter_model.safetensors"
    elif not len(TensorFile(weights)):
        what = f"{weights} holds no tensor"
    if what is not None:
        problems.append(f"{what}, so {name} is empty; {hint_other_checkpoint(folder, name)}")
        return None
    config = read_config(place)
    configs.append((place, config))
    return read_expert(name, place, config, is_nested=True)


def _foundation(
    folder: SourceFolder,
    config: dict[str, Any],
    configs: list[tuple[SourceFolder, dict[str, Any]]],
    options: ReadOptions,
    problems: list[str],
) -> FoundationReference:
    """Give the foundation that the checkpoint's config names, else its adapters, else the run's best model."""
    vocab_size = config.get("vocab_size")
    if config.get("base_model_name_or_path"):
        return FoundationReference(
            config["base_model_name_or_path"], named_in=folder / "config.json", vocab_size=vocab_size
        )
    if configs:
        reference = same_foundation(configs, options, problems)
        if reference.name:
            reference.vocab_size = vocab_size
            return reference
    best, stored = best_model_config(folder)
    name = stored.get("base_model_name_or_path")
    return FoundationReference(
        name or None, named_in=best if name else folder / "config.json", vocab_size=vocab_size
    )


def _read_router(
    folder: SourceFolder, num_experts: int, options: ReadOptions, problems: list[str], notes: list[str]
) -> Router | None:
    path = next((folder / name for name in ROUTER_FILES if folder.has(name)), None)
    if path is None:
        path = own_state(folder, problems, notes, f"{folder} has neither {' nor '.join(ROUTER_FILES)}")
    if path is None:
        return None
    gate, state = _read_gate(path)
    top_k, temperature = settings_or_defaults(folder, (path, state), options, notes)
    notes += maturity_note(path, state)
    return make_router(path, gate, num_experts, top_k, temperature, state)


def _read_gate(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Read the gate, and what else the file says of the router.

    Raises:
        InputError: no whole gate is there, or something that may change what the router does.
    """
    if path.suffix == ".safetensors":
        file = TensorFile(path)
        tensors = {key: of_file(file, key) for key in file.keys()}  # noqa: SIM118
        state = {key: file.read(key) for key in ROUTER_SETTINGS if key in file}
    else:
        state = read_state(path)
        if "gate_state_dict" in state:
            return gate_of_state(path, state), state
        tensors = {key: of_tensor(value) for key, value in state.items() if isinstance(value, torch.Tensor)}
    unknown = sorted(set(tensors) - set(GATE.values()) - set(ROUTER_SETTINGS), key=natural_order)
    if unknown:
        raise InputError(
            f"{path}: {unknown[0]} is no part of the gate ({', '.join(GATE.values())}); what it does is not known"
        )
    for key in GATE.values():
        if key not in tensors:
            raise InputError(f"{path} has no {key}; the file is incomplete, copy it again")
    return {name: tensors[key] for name, key in GATE.items()}, state
