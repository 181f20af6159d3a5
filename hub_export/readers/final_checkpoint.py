"""Reads the final checkpoint that DyLoRA-MoE's training code leaves behind.

    config.json                    model_type "dylora-moe", base_model_name_or_path, _dylora_num_experts, _dylora_lora_r,
                                   _dylora_lora_alpha, _dylora_lora_dropout, the rest copied from the
                                   foundation
    peft_adapters/expert_<i>.pt    dict of full parameter names to tensors, for instance
                                   base_model.model.model.layers.0.self_attn.q_proj.lora_A.expert_0.weight
    dylo_moe_state/router.pt       (in the folder, or in the one it lies in) dict of gate_state_dict (weight, bias), num_experts, input_size, top_k, temperature

Training matched names by substring and kept only what required a gradient. So `expert_1.pt` may also hold the
tensors of expert_10 to expert_19, and a file may be an empty dict. The earlier form of the trainer's
checkpoints (config.json with num_experts and checkpoint_type "peft_only", no alpha) has the same files and is
read here, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..sources.source_folder import SourceFolder
from ..sources.source_options import ReadOptions
from ..tensors.mixture import Expert, Mixture, Router, natural_order
from ..tensors.stored_tensors import of_file
from ..tensors.tensor_files import TensorFile
from .training_run import (
    PARAMETER,
    STATE,
    count_of_experts,
    foundation_reference,
    gate_of_state,
    hint_other_checkpoint,
    lora_alpha,
    low_rank_layer,
    make_router,
    maturity_note,
    number,
    only_folder,
    own_state,
    read_state,
    stored_setting,
)


FORMAT = "final checkpoint"
ADAPTERS = "peft_adapters"
DESCRIPTION = "config.json, peft_adapters/expert_<i>.pt, dylo_moe_state/router.pt"


def recognise(folder: SourceFolder) -> str | None:
    """Say why this folder is a final checkpoint, or None.

    Tensor names decide, `model_type` only where there are none.
    """
    files = adapter_files(folder)
    for path in files.values():
        for key in TensorFile(path).keys():  # noqa: SIM118
            if PARAMETER.fullmatch(key):
                return f"{ADAPTERS}/{path.name} holds {key}"
    # A run's own folder may hold dylo_moe_state/ as well, beside the checkpoints that it belongs to.
    is_checkpoint = folder.has_folder(ADAPTERS) or folder.has("config.json")
    if is_checkpoint and folder.has(STATE) and "gate_state_dict" in read_state(folder / STATE):
        return f"{STATE} holds gate_state_dict"
    if files and folder.read_json("config.json", required=False).get("model_type") == "dylora-moe":
        return "config.json has model_type dylora-moe, and there is peft_adapters/expert_<i>.pt"
    return None


def adapter_files(folder: SourceFolder) -> dict[int, Path]:
    """Map expert index to file, for every `peft_adapters/expert_<i>.pt`, in the order of the indices."""
    if not folder.has_folder(ADAPTERS):
        return {}
    found = {}
    for name in folder.folder(ADAPTERS).names("expert_*.pt"):
        match = re.fullmatch(r"expert_(0|[1-9][0-9]*)\.pt", name)
        if match:
            found[int(match.group(1))] = folder / f"{ADAPTERS}/{name}"
    return dict(sorted(found.items()))


def read(folders: list[SourceFolder], options: ReadOptions) -> Mixture:
    """Describe one checkpoint folder; tensors stay on disk.

    Raises:
        InputError: a file is damaged or two parts of the checkpoint contradict each other. What is merely
            missing (alpha, an expert's tensors) is listed in the mixture's `problems` instead.
    """
    folder = only_folder(folders, FORMAT)
    config = folder.read_json("config.json")
    problems: list[str] = []
    notes: list[str] = []
    alpha = lora_alpha(folder, config, options, problems)
    experts = [
        _read_expert(folder, index, path, config, alpha, problems)
        for index, path in _complete(folder, config).items()
    ]
    return Mixture(
        format=FORMAT,
        folders=folders,
        experts=experts,
        router=_read_router(folder, len(experts), options, problems, notes),
        foundation=foundation_reference(folder, config),
        problems=problems,
        notes=notes,
    )


def _complete(folder: SourceFolder, config: dict[str, Any]) -> dict[int, Path]:
    files = adapter_files(folder)
    # In a final checkpoint, num_experts can only be a field copied from a foundation that has experts of its
    # own.
    fields = (
        "_dylora_num_experts",
        *(("num_experts",) if config.get("checkpoint_type") == "peft_only" else ()),
    )
    stated = count_of_experts(config, fields, folder / "config.json")
    expected, field = stated or (len(files), fields[-1])
    missing = [f"expert_{index}.pt" for index in range(expected) if index not in files]
    if missing:
        raise InputError(
            f"{folder}/peft_adapters lacks {', '.join(missing)}; config.json's {field} is {expected}; "
            f"{hint_other_checkpoint(folder, missing[0].removesuffix('.pt'))}"
        )
    if len(files) != expected:
        raise InputError(
            f"{folder}/peft_adapters holds {len(files)} expert files, config.json's {field} is {expected}; "
            "correct whichever is wrong"
        )
    return files


def _read_expert(
    folder: SourceFolder,
    index: int,
    path: Path,
    config: dict[str, Any],
    alpha: float | None,
    problems: list[str],
) -> Expert:
    name = f"expert_{index}"
    file = TensorFile(path)
    keys = _own_keys(file, name)
    if not keys:
        problems.append(_empty_expert(folder, name, file))
    layers = {}
    for module, matrices in keys.items():
        stored = {matrix: of_file(file, key) for matrix, key in matrices.items()}
        layers[module] = low_rank_layer(path, name, module, stored, alpha, config.get("_dylora_lora_r"))
    return Expert(
        name=name,
        layers=layers,
        read=lambda module: (file.read(keys[module]["A"]), file.read(keys[module]["B"])),
        origin=path,
        lora_dropout=number(
            config.get("_dylora_lora_dropout") or 0.0, f"{folder}/config.json: _dylora_lora_dropout"
        ),
    )


def _own_keys(file: TensorFile, name: str) -> dict[str, dict[str, str]]:
    """Map module to {"A": key, "B": key} of this expert's tensors; the whole name part must match."""
    own: dict[str, dict[str, str]] = {}
    for key in file.keys():  # noqa: SIM118
        match = PARAMETER.fullmatch(key)
        if match is None:
            raise InputError(
                f"{file.path}: {key} is not a LoRA matrix (…lora_A.{name}.weight); what it does cannot be exported"
            )
        if match["expert"] == name:
            own.setdefault(match["module"], {})[match["matrix"]] = key
    return dict(sorted(own.items(), key=lambda item: natural_order(item[0])))


def _empty_expert(folder: SourceFolder, name: str, file: TensorFile) -> str:
    what = "is an empty dict" if not len(file) else f"holds no tensor of {name}"
    return f"{file.path} {what}: training kept only what required a gradient; {hint_other_checkpoint(folder, name)}"


def _read_router(
    folder: SourceFolder, num_experts: int, options: ReadOptions, problems: list[str], notes: list[str]
) -> Router | None:
    path = own_state(folder, problems, notes, f"{folder / STATE} is missing")
    if path is None:
        return None
    state = read_state(path)
    notes += maturity_note(path, state)
    top_k = _setting(state, "top_k", options.num_experts_per_tok, path, problems)
    temperature = _setting(state, "temperature", options.router_temperature, path, problems)
    return make_router(path, gate_of_state(path, state), num_experts, top_k, temperature, state)


def _setting(state: dict, key: str, given: float | None, path: Path, problems: list[str]) -> float | None:
    value = given if given is not None else stored_setting(state, key, path)
    if value is None:
        option = {"top_k": "--num_experts_per_tok", "temperature": "--router_temperature"}[key]
        problems.append(f"{path} has no {key}; pass {option}")
    return value
