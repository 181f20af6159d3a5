"""Reads the final checkpoint that DyLoRA-MoE's training code leaves behind.

    config.json                    model_type "dylora-moe", base_model_name_or_path, _dylora_num_experts, _dylora_lora_r,
                                   _dylora_lora_alpha, _dylora_lora_dropout, the rest copied from the foundation
    peft_adapters/expert_<i>.pt    dict of full parameter names to tensors, for instance
                                   base_model.model.model.layers.0.self_attn.q_proj.lora_A.expert_0.weight
    dylo_moe_state/router.pt       dict of gate_state_dict (weight, bias), num_experts, input_size, top_k, temperature

Training matched names by substring and kept only what required a gradient. So `expert_1.pt` may also hold the tensors
of expert_10 to expert_19, and a file may be an empty dict. It knows nothing about other formats or about the model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from .errors import InputError
from .mixture import AdaptedLayer, Expert, FoundationReference, Mixture, ReadOptions, Router, natural_order
from .tensor_files import TensorFile, load_torch_file, read_json


FORMAT = "final checkpoint"
DESCRIPTION = "config.json, peft_adapters/expert_<i>.pt, dylo_moe_state/router.pt"

PARAMETER = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<matrix>[AB])\.(?P<expert>[^.]+)\.weight")


def recognise(folder: Path) -> str | None:
    """Why this folder is a final checkpoint, or None. Tensor names decide, `model_type` only where there are none."""
    for path in adapter_files(folder).values():
        for key in TensorFile(path).keys():  # noqa: SIM118
            if PARAMETER.fullmatch(key):
                return f"peft_adapters/{path.name} holds {key}"
    router = folder / "dylo_moe_state" / "router.pt"
    if router.is_file() and "gate_state_dict" in _as_dict(load_torch_file(router), router):
        return "dylo_moe_state/router.pt holds gate_state_dict"
    config = folder / "config.json"
    if adapter_files(folder) and config.is_file() and read_json(config).get("model_type") == "dylora-moe":
        return "config.json has model_type dylora-moe, and there is peft_adapters/expert_<i>.pt"
    return None


def adapter_files(folder: Path) -> dict[int, Path]:
    """Expert index to file, for every `peft_adapters/expert_<i>.pt`, in the order of the indices."""
    found = {}
    for path in (folder / "peft_adapters").glob("expert_*.pt"):
        match = re.fullmatch(r"expert_(\d+)\.pt", path.name)
        if match:
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def read(folders: list[Path], names: list[str], reason: str, options: ReadOptions) -> Mixture:
    """Describe one checkpoint folder; tensors stay on disk.

    Raises:
        InputError: a file is damaged or two parts of the checkpoint contradict each other. What is merely missing
            (alpha, an expert's tensors) is listed in the mixture's `problems` instead.
    """
    if len(folders) > 1:
        raise InputError(f"{folders[0]} is a final checkpoint, which holds all its experts; export one at a time")
    folder = folders[0]
    config = read_json(folder / "config.json")
    problems: list[str] = []
    alpha = _lora_alpha(folder, config, options, problems)
    experts = [
        _read_expert(folder, index, path, config, alpha, problems) for index, path in _complete(folder, config).items()
    ]
    return Mixture(
        format=FORMAT,
        reason=reason,
        folders=folders,
        experts=experts,
        router=_read_router(folder, len(experts), options, problems),
        foundation=FoundationReference(
            name=config.get("base_model_name_or_path"),
            named_in=folder / "config.json",
            vocab_size=config.get("vocab_size"),
        ),
        problems=problems,
        notes=_notes(folder),
    )


def _complete(folder: Path, config: dict[str, Any]) -> dict[int, Path]:
    files = adapter_files(folder)
    expected = config.get("_dylora_num_experts", len(files))
    if not isinstance(expected, int) or expected < 1:
        raise InputError(f"{folder}/config.json: _dylora_num_experts is {expected!r}, expected a positive number")
    missing = [f"expert_{index}.pt" for index in range(expected) if index not in files]
    if missing:
        raise InputError(
            f"{folder}/peft_adapters lacks {', '.join(missing)}; config.json's _dylora_num_experts is {expected}"
        )
    if len(files) != expected:
        raise InputError(
            f"{folder}/peft_adapters holds {len(files)} expert files, config.json's _dylora_num_experts is {expected}; "
            "correct whichever is wrong"
        )
    return files


def _lora_alpha(folder: Path, config: dict[str, Any], options: ReadOptions, problems: list[str]) -> float | None:
    """Alpha as given, as stored, or as a sibling `best_model` of the same training run stored it. Never guessed."""
    if options.lora_alpha is not None:
        return options.lora_alpha
    places = [folder / "config.json", folder.resolve().parent / "best_model" / "config.json"]
    for path in places:
        stored = (config if path == places[0] else read_json(path) if path.is_file() else {}).get("_dylora_lora_alpha")
        if stored is None:
            continue
        if isinstance(stored, bool) or not isinstance(stored, int | float):
            raise InputError(f"{path}: _dylora_lora_alpha is {stored!r}, expected a number")
        return stored
    problems.append(
        f"{folder}/config.json has no _dylora_lora_alpha, so the experts' strength is unknown; "
        "pass the alpha of the training run with --lora_alpha"
    )
    return None


def _read_expert(
    folder: Path, index: int, path: Path, config: dict[str, Any], alpha: float | None, problems: list[str]
) -> Expert:
    name = f"expert_{index}"
    file = TensorFile(path)
    keys = _own_keys(file, name)
    if not keys:
        problems.append(_empty_expert(folder, name, file))
    layers = {}
    for module, matrices in keys.items():
        if set(matrices) != {"A", "B"}:
            raise InputError(f"{path}: {name} has lora_{'/'.join(matrices)} but not both matrices on {module}")
        layers[module] = _layer(file, name, module, matrices, alpha, config.get("_dylora_lora_r"))
    return Expert(
        name=name,
        layers=layers,
        read=lambda module: (file.read(keys[module]["A"]), file.read(keys[module]["B"])),
        origin=path,
        lora_dropout=config.get("_dylora_lora_dropout", 0.0),
    )


def _own_keys(file: TensorFile, name: str) -> dict[str, dict[str, str]]:
    """Module to {"A": key, "B": key} of the tensors of this expert alone: the whole name part must match."""
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


def _layer(
    file: TensorFile, name: str, module: str, matrices: dict[str, str], alpha: float | None, config_rank: int | None
) -> AdaptedLayer:
    shape_a, shape_b = file.shape(matrices["A"]), file.shape(matrices["B"])
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
        raise InputError(
            f"{file.path}: {name} on {module} has lora_A {list(shape_a)} and lora_B {list(shape_b)}, "
            "expected [rank, in] and [out, rank] of one rank"
        )
    if config_rank is not None and shape_a[0] != config_rank:
        raise InputError(
            f"{file.path}: {name} on {module} has rank {shape_a[0]}, config.json's _dylora_lora_r is {config_rank}; "
            "alpha / rank would be wrong, so one of them has to be corrected"
        )
    return AdaptedLayer(
        rank=shape_a[0],
        lora_alpha=alpha,
        in_features=shape_a[1],
        out_features=shape_b[0],
        dtype=torch.promote_types(file.dtype(matrices["A"]), file.dtype(matrices["B"])),
    )


def _empty_expert(folder: Path, name: str, file: TensorFile) -> str:
    what = "is an empty dict" if not len(file) else f"holds no tensor of {name}"
    reason = f"{file.path} {what}: training kept only what required a gradient"
    siblings = [sibling for sibling in _sibling_checkpoints(folder) if _holds(sibling, name)]
    if siblings:
        return f"{reason}; {siblings[0]} has {name}: export that folder instead"
    return f"{reason}; no checkpoint-* folder beside {folder} has {name}, so it cannot be exported"


def _sibling_checkpoints(folder: Path) -> list[Path]:
    """The run's `checkpoint-<step>` folders beside or inside this one, the latest first."""
    found = [*folder.resolve().parent.glob("checkpoint-*"), *folder.resolve().glob("checkpoint-*")]
    return sorted(
        (path for path in found if path != folder.resolve()), key=lambda path: natural_order(path.name), reverse=True
    )


def _holds(checkpoint: Path, name: str) -> bool:
    for path in [
        checkpoint / "peft_adapters" / f"{name}.pt",
        checkpoint / "peft_adapters" / name / name / "adapter_model.safetensors",
    ]:
        if not path.is_file():
            continue
        try:
            file = TensorFile(path)
        except InputError:
            continue
        matches = [PARAMETER.fullmatch(key) for key in file.keys()]  # noqa: SIM118
        if path.suffix == ".safetensors" or any(match is not None and match["expert"] == name for match in matches):
            return len(file) > 0
    return False


def _as_dict(content: Any, path: Path) -> dict:
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a dict with gate_state_dict")
    return content


def _read_router(folder: Path, num_experts: int, options: ReadOptions, problems: list[str]) -> Router | None:
    path = folder / "dylo_moe_state" / "router.pt"
    if not path.is_file():
        problems.append(f"{path} is missing, so there is no router; copy it from the training run's output")
        return None
    state = _as_dict(load_torch_file(path), path)
    gate = state.get("gate_state_dict")
    if not isinstance(gate, dict) or not isinstance(gate.get("weight"), torch.Tensor) or gate["weight"].dim() != 2:
        raise InputError(f"{path} has no gate_state_dict with a weight of shape [num_experts, hidden_size]")
    weight, bias = gate["weight"], gate.get("bias")
    if not isinstance(bias, torch.Tensor):
        raise InputError(f"{path}: gate_state_dict has no bias; the gate of a final checkpoint always has one")
    if weight.shape[0] != num_experts or tuple(bias.shape) != (weight.shape[0],):
        raise InputError(
            f"{path}: the gate's weight is {list(weight.shape)} and its bias {list(bias.shape)}, "
            f"but there are {num_experts} experts"
        )
    for key, value in (("num_experts", weight.shape[0]), ("input_size", weight.shape[1])):
        if state.get(key, value) != value:
            raise InputError(f"{path}: {key} is {state[key]!r}, the gate's weight is {list(weight.shape)}")
    return Router(
        read=lambda: (weight, bias),
        num_experts=weight.shape[0],
        hidden_size=weight.shape[1],
        # what the training code has fed its router: all experts on, each with weight 1
        router_input="experts_sum",
        num_experts_per_tok=_stored(state, "top_k", int, options.num_experts_per_tok, path, problems),
        router_temperature=_stored(state, "temperature", float, options.router_temperature, path, problems),
    )


def _stored(state: dict, key: str, kind: type, given: float | None, path: Path, problems: list[str]):
    if given is not None:
        return given
    option = {"top_k": "--num_experts_per_tok", "temperature": "--router_temperature"}[key]
    value = state.get(key)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if value is None:
        problems.append(f"{path} has no {key}; pass {option}")
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or kind(value) != value:
        raise InputError(f"{path}: {key} is {value!r}, expected a positive number")
    return kind(value)


def _notes(folder: Path) -> list[str]:
    path = folder / "dylo_moe_state" / "router.pt"
    if not path.is_file():
        return []
    maturity = load_torch_file(path).get("expert_maturity")
    if maturity is None:
        return []
    stored = maturity.tolist() if isinstance(maturity, torch.Tensor) else maturity
    return [
        f"router.pt stores expert_maturity {stored}; all experts are exported as mature, as training's own loader does"
    ]
