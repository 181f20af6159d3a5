"""Reads the state dict of DyLoRA-MoE's training wrapper: foundation, experts and gate in one file.

    model.safetensors         (or pytorch_model.bin, or shards with an index) with the wrapper's own names:
        foundation_model.base_model.model.<module>.base_layer.weight      an adapted layer of the foundation
        foundation_model.base_model.model.<module>.lora_A.expert_<i>.weight, ….lora_B.expert_<i>.weight
        foundation_model.base_model.model.<name>                          everything else of the foundation
        router.gate.weight, router.gate.bias
    config.json               the foundation's own, plus base_model_name_or_path and _dylora_*; it may be missing
    dylo_moe_state/router.pt  top_k, temperature; in the folder, beside it, or nowhere

Every tensor must have a place in the foundation, in an expert or in the gate: what is left over would change
what the model computes.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import InputError
from ..foundation.layer_names import why_unreadable
from ..sources.source_folder import SourceFolder
from ..sources.source_options import ReadOptions
from ..tensors.mixture import Expert, FoundationReference, Mixture, Router, natural_order
from ..tensors.stored_tensors import StoredTensor, of_file
from ..tensors.tensor_files import TensorFile
from ..tensors.weight_files import WEIGHT_NAMES, weight_files, weight_map
from .training_run import (
    PARAMETER,
    count_of_experts,
    foundation_reference,
    hint_other_checkpoint,
    lora_alpha,
    low_rank_layer,
    make_router,
    maturity_note,
    number,
    only_folder,
    read_state,
    settings_or_defaults,
    state_files,
)
from .whole_model_foundation import foundation_config, foundation_weights


FORMAT = "whole-model state dict"
DESCRIPTION = (
    "model.safetensors or pytorch_model.bin with foundation_model.base_model.model.….lora_A.expert_<i>.weight"
)

PREFIX, FOUNDATION_PREFIX = "foundation_model.", "foundation_model.base_model.model."
GATE = {"weight": "router.gate.weight", "bias": "router.gate.bias"}
MATURITY = "router.expert_maturity"
ROUTED_OTHERWISE = (
    "training mixed its experts in another way when it saved whole models, so routed figures differ from training's own "
    "figures; each expert alone, and the base model, are the same"
)


def recognise(folder: SourceFolder) -> str | None:
    """Say why this folder is the training wrapper's state dict, or None. The tensors' names alone decide.

    Raises:
        InputError: it is one, and its names begin with what another wrapper left.
    """
    found = None
    for path in weight_files(folder):
        for key in TensorFile(path).keys():  # noqa: SIM118
            if key.startswith(FOUNDATION_PREFIX):
                found = found or (path, key)
                if ".lora_A." in key:
                    return f"{path.name} holds {key}"
            elif FOUNDATION_PREFIX in key and why_unreadable(key) is not None:
                raise InputError(f"{path} holds {key}: {why_unreadable(key)}")
    return None if found is None else f"{found[0].name} holds {found[1]}"


def read(folders: list[SourceFolder], options: ReadOptions) -> Mixture:
    """Describe one state dict; tensors stay on disk.

    Raises:
        InputError: a file is damaged, a tensor is not understood, or two parts contradict each other. A
            missing alpha and a missing gate are listed in the mixture's `problems` instead.
    """
    folder = only_folder(folders, FORMAT)
    config = folder.read_json("config.json", required=False)
    problems: list[str] = []
    notes = [ROUTED_OTHERWISE]
    tensors = _tensors(folder)
    matrices, gate, rest = _sorted(folder, tensors)
    expert_names = _expert_names(folder, matrices, config)
    experts = _experts(folder, expert_names, matrices, config, options, problems)
    reference = foundation_reference(folder, config)
    stored = foundation_config(folder, config, reference, options, len(tensors))
    weights = foundation_weights(folder, stored, rest, notes)
    _check_modules(folder, experts, rest)
    limits = list(notes)  # up to here, all that is told is of what the model computes
    return Mixture(
        format=FORMAT,
        folders=folders,
        experts=experts,
        router=_router(folder, gate, len(expert_names), options, problems, notes),
        foundation=FoundationReference(reference.name, None, reference.named_in, reference.vocab_size),
        problems=problems,
        notes=notes,
        limits=limits,
        foundation_config=stored,
        foundation_weights=weights,
        has_trained_foundation=len(limits) > 1,
    )


def _tensors(folder: SourceFolder) -> dict[str, StoredTensor]:
    """Describe every tensor of every file.

    Raises:
        InputError: two files hold the same one, or the index promises one that its file does not have.
    """
    found: dict[str, StoredTensor] = {}
    files: dict[str, TensorFile] = {}
    for path in weight_files(folder):
        file = files[path.name] = TensorFile(path)
        for key in file.keys():  # noqa: SIM118
            if key in found:
                raise InputError(f"{path} holds {key}, which another shard of {folder} holds, too")
            found[key] = of_file(file, key)
    for name in WEIGHT_NAMES:
        for key, shard in (weight_map(folder, name) or {}).items():
            if shard in files and key not in files[shard]:
                raise InputError(
                    f"{folder / shard} lacks {key}, which {name}.index.json says it holds; copy it again"
                )
    return found


def _sorted(
    folder: SourceFolder, tensors: dict[str, StoredTensor]
) -> tuple[dict[str, dict[str, dict[str, StoredTensor]]], dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Sort tensors: each expert's by module and matrix, the router's by key, the foundation's by its names.

    Raises:
        InputError: names the first tensor that is none of these.
    """
    experts: dict[str, dict[str, dict[str, StoredTensor]]] = {}
    gate, foundation = {}, {}
    for key in sorted(tensors, key=natural_order):
        match = PARAMETER.fullmatch(key.removeprefix(PREFIX))
        if key.startswith(FOUNDATION_PREFIX) and match is not None:
            layers = experts.setdefault(match["expert"], {})
            layers.setdefault(match["module"], {})[match["matrix"]] = tensors[key]
        elif key in GATE.values() or key == MATURITY:
            gate[key] = tensors[key]
        else:
            foundation[_foundation_name(folder, key)] = tensors[key]
    return experts, gate, foundation


def _foundation_name(folder: SourceFolder, key: str) -> str:
    name = key.removeprefix(FOUNDATION_PREFIX)
    if not key.startswith(FOUNDATION_PREFIX):
        raise InputError(
            f"{folder}: {key} belongs to neither the base model, an expert nor the gate; it is not known"
        )
    for part, meaning in (
        ("lora_embedding_", "LoRA on an embedding"),
        ("lora_magnitude_vector", "a DoRA magnitude"),
        ("lora_", "a LoRA tensor that is no plain matrix, such as a bias"),
        ("modules_to_save", "a fully trained module (modules_to_save)"),
        ("original_module", "the base model's own copy of a fully trained module (modules_to_save)"),
    ):
        if any(piece.startswith(part) for piece in name.split(".")):
            raise InputError(
                f"{folder}: {key} is {meaning}, which is not a plain low-rank sum and cannot be exported"
            )
    return re.sub(r"\.base_layer(?=\.)", "", name)


def _expert_names(folder: SourceFolder, matrices: dict[str, Any], config: dict[str, Any]) -> list[str]:
    stated = count_of_experts(config, ("_dylora_num_experts",), folder / "config.json")
    expected = stated[0] if stated is not None else len(matrices)
    names = [f"expert_{index}" for index in range(expected)]
    for name in matrices:
        if name not in names:
            raise InputError(
                f"{folder} holds an adapter {name}; expected are {expected} experts, expert_0 to expert_{expected - 1}"
            )
    if not matrices:
        raise InputError(
            f"{folder} holds the training wrapper's base model, but no expert (….lora_A.expert_<i>.weight)"
        )
    return names


def _experts(
    folder: SourceFolder,
    names: list[str],
    matrices: dict[str, dict[str, dict[str, StoredTensor]]],
    config: dict[str, Any],
    options: ReadOptions,
    problems: list[str],
) -> list[Expert]:
    problems += [
        f"{folder} holds no tensor of {name}; {hint_other_checkpoint(folder, name)}"
        for name in names
        if name not in matrices
    ]
    alpha = lora_alpha(folder, config, options, problems)
    dropout = number(config.get("_dylora_lora_dropout") or 0.0, f"{folder}/config.json: _dylora_lora_dropout")
    return [
        _expert(folder, name, matrices[name], alpha, config.get("_dylora_lora_r"), dropout)
        for name in names
        if name in matrices
    ]


def _expert(
    folder: SourceFolder,
    name: str,
    matrices: dict[str, dict[str, StoredTensor]],
    alpha: float | None,
    config_rank: Any,
    dropout: float,
) -> Expert:
    return Expert(
        name=name,
        layers={
            module: low_rank_layer(folder, name, module, pair, alpha, config_rank)
            for module, pair in matrices.items()
        },
        read=lambda module: (matrices[module]["A"].read(), matrices[module]["B"].read()),
        origin=folder.path,
        lora_dropout=dropout,
    )


def _check_modules(folder: SourceFolder, experts: list[Expert], foundation: dict[str, StoredTensor]) -> None:
    for expert in experts:
        for module in expert.layers:
            if f"{module}.weight" not in foundation:
                raise InputError(f"{folder}: {expert.name} adapts {module}, whose own weight is not there")


def _router(
    folder: SourceFolder,
    gate: dict[str, StoredTensor],
    num_experts: int,
    options: ReadOptions,
    problems: list[str],
    notes: list[str],
) -> Router | None:
    missing = [key for key in GATE.values() if key not in gate]
    if missing:
        problems.append(
            f"{folder} has no {missing[0]}, so there is no router; export the checkpoint that has one"
        )
        return None
    top_k, temperature = settings_or_defaults(folder, None, options, notes)
    if MATURITY in gate:
        notes += maturity_note(folder, {"expert_maturity": gate[MATURITY].read()})
    else:
        for path in state_files(folder)[:1]:
            notes += maturity_note(path, read_state(path))
    return make_router(
        folder, {name: gate[key] for name, key in GATE.items()}, num_experts, top_k, temperature
    )
