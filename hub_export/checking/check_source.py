"""A source's side of the check: the adapters, the gate and the foundation, read from the raw files.

It opens the files itself and shares no code with the readers or with the model, so that a mistake there cannot
hide here; the foundation is loaded by transformers. `peft_layers` puts the adapters on it, and `peft_reference`
computes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ..foundation.reference import load_foundation, load_foundation_config
from ..sources.source_folder import SourceFolder, open_folder
from ..tensors.mixture import FoundationReference
from ..tensors.pickle_limits import check_size
from . import rounding
from .peft_layers import add_adapter, add_by_names, load_adapters, round_adapters, unwrap_idle_gates
from .peft_reference import DEFAULT_TEMPERATURE, Reference


DEFAULT_TOP_K = 1  # of training runs that do not store theirs
FINAL, TRAINER = "final checkpoint", "trainer checkpoint"
WHOLE_MODEL, ADAPTERS = "whole-model state dict", "PEFT LoRA adapters"
WRAPPER = "foundation_model."
SUBTRACTED = "subtracted"  # the name of that adapter


def reference(
    source_format: str,
    folders: Sequence[Path | SourceFolder],
    base_model: str | torch.nn.Module,
    base_revision: str | None,
    lora_alpha: float | None,
    router_settings: dict[str, Any],
    dtype: torch.dtype | None,
    round_foundation: bool = True,
    gate: dict[str, Any] | None = None,
    precision: torch.dtype = torch.float32,
    subtracted: SourceFolder | None = None,
) -> Reference:
    """Load a source as PEFT computes it.

    Args:
        source_format: the format's name, and `folders` where its files are, one per expert for adapters.
        base_model: folder or Hub id of the foundation, or that itself; of a source that carries it, at most
            the config is read there.
        router_settings: settings of the router that the user chose over the source's.
        dtype: what foundation and adapters are rounded to first, where the user asked for that.
        round_foundation: False for an export that leaves the foundation where it is.
        gate: another gate than the source's, with all its settings.
        precision: the dtype to compute in, float32 or float64.
        subtracted: the folder of an adapter that is subtracted from every expert.
    """
    if source_format not in (FINAL, TRAINER, WHOLE_MODEL, ADAPTERS):
        raise ValueError(f"no way to recompute a source of format {source_format!r}")
    folders = [open_folder(folder) for folder in folders]
    if source_format == WHOLE_MODEL:
        model, names, own_gate = _whole_model(folders[0], base_model, base_revision, lora_alpha, precision)
        round_adapters(model, dtype)
    else:
        foundation = base_model
        if not isinstance(foundation, torch.nn.Module):
            foundation = load_foundation(FoundationReference(base_model, base_revision), precision)
        rounding.convert(foundation, precision)  # before the adapters, which PEFT keeps in its dtype
        own_gate = None if source_format == ADAPTERS else _gate(folders[0])
        if source_format == FINAL:
            model, names = _final_checkpoint(foundation, folders[0], lora_alpha)
            round_adapters(model, dtype)
        elif source_format == TRAINER:
            places = _nested_adapters(folders[0])
            names = list(places)
            model = load_adapters(foundation, list(places.values()), names, dtype)
        else:
            names = [f"adapter_{index}" for index in range(len(folders))]
            adapters = dict(zip(names, folders, strict=True))
            if subtracted is not None:
                adapters[SUBTRACTED] = subtracted
            model = load_adapters(foundation, list(adapters.values()), list(adapters), dtype)
    if subtracted is not None and source_format != ADAPTERS:
        add_by_names(model.get_base_model(), model, SUBTRACTED, subtracted)
        round_adapters(model, dtype, SUBTRACTED)
    unwrap_idle_gates(model)
    if round_foundation:
        _round_foundation(model, dtype)
    if own_gate is not None:
        own_gate = {**own_gate, **router_settings}
    return Reference(model, names, gate or own_gate, precision, None if subtracted is None else SUBTRACTED)


def _round_foundation(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Round the foundation's own parameters under the adapters."""
    if dtype is None:
        return
    for path, parameter in model.named_parameters():
        if ".lora_" not in path:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _final_checkpoint(
    foundation: torch.nn.Module, folder: SourceFolder, lora_alpha: float | None
) -> tuple[PeftModel, list[str]]:
    alpha = _stored_alpha(folder) if lora_alpha is None else lora_alpha
    place = folder.folder("peft_adapters")
    files = [name for name in place.names() if re.fullmatch(r"expert_\d+\.pt", name)]
    names = [f"expert_{index}" for index in range(len(files))]
    model = None
    for name in names:
        tensors = _torch_file(place / f"{name}.pt")
        tensors = {key: value for key, value in tensors.items() if name in key.split(".")}
        model = add_adapter(foundation, model, name, tensors, alpha)
    return model, names


def _nested_adapters(folder: SourceFolder) -> dict[str, SourceFolder]:
    """Map each `expert_<i>` to the folder of its adapter, in the order of the numbers."""
    adapters = folder.folder("peft_adapters")
    places = [
        PurePath(file).parent for file in adapters.files() if PurePath(file).name == "adapter_config.json"
    ]
    return {
        place.name: adapters.folder(place) for place in sorted(places, key=lambda place: _number(place.name))
    }


def _whole_model(
    folder: SourceFolder,
    base_model: str | None,
    base_revision: str | None,
    lora_alpha: float | None,
    precision: torch.dtype,
) -> tuple[PeftModel, list[str], dict[str, Any]]:
    """Split the raw state dict into the foundation, PEFT's adapters, and the gate."""
    raw = _raw_state_dict(folder)
    inside = {key.removeprefix(WRAPPER): value for key, value in raw.items() if key.startswith(WRAPPER)}
    adapters = {key: value for key, value in inside.items() if ".lora_A." in key or ".lora_B." in key}
    weights = {
        key.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for key, value in inside.items()
        if key not in adapters
    }
    foundation = _carried_foundation(folder, weights, base_model, base_revision, precision)
    names = sorted({key.split(".")[-2] for key in adapters}, key=_number)
    alpha = _stored_alpha(folder) if lora_alpha is None else lora_alpha
    model = None
    for name in names:
        tensors = {key: value for key, value in adapters.items() if key.split(".")[-2] == name}
        model = add_adapter(foundation, model, name, tensors, alpha)
    gate = {**_settings(folder), "weight": raw["router.gate.weight"], "bias": raw["router.gate.bias"]}
    return model, names, gate


def _raw_state_dict(folder: SourceFolder) -> dict[str, torch.Tensor]:
    raw: dict[str, torch.Tensor] = {}
    for name in folder.names("model*.safetensors"):
        raw.update(load_file(folder / name))
    if raw:
        return raw
    for name in folder.names("pytorch_model*.bin"):
        raw.update(_torch_file(folder / name))
    return raw


def _carried_foundation(
    folder: SourceFolder,
    weights: dict[str, torch.Tensor],
    base_model: str | None,
    base_revision: str | None,
    precision: torch.dtype,
) -> torch.nn.Module:
    """Load a source's own foundation by transformers, its head tied where that equals the embeddings."""
    stored = folder.read_json("config.json", required=False)
    if stored.get("model_type", "dylora-moe") != "dylora-moe":  # the config is the foundation's own
        named = FoundationReference(str(folder))
    else:
        named = FoundationReference(base_model or stored["base_model_name_or_path"], base_revision)
    config = load_foundation_config(named)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    paths = {id(module): f"{path}.weight" for path, module in empty.named_modules()}
    head = weights.get(paths[id(empty.get_output_embeddings())])
    if head is not None and not torch.equal(head, weights[paths[id(empty.get_input_embeddings())]]):
        config.tie_word_embeddings = False
    foundation, info = type(empty).from_pretrained(
        None, config=config, state_dict=weights, dtype=precision, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"the base model in {folder} is not whole: {info}")
    rounding.convert(foundation, precision)
    return foundation


def _torch_file(path: Path) -> Any:
    check_size(path)  # it may be one that the readers left unread
    return torch.load(path, map_location="cpu", weights_only=True)


def _number(name: str) -> int:
    """Return the number of `expert_<number>`."""
    return int(name.rpartition("_")[2])


def _stored_alpha(folder: SourceFolder) -> float:
    for place, name in ((folder, "config.json"), (folder.parent(), "best_model/config.json")):
        alpha = place.read_json(name, required=False).get("_dylora_lora_alpha")
        if alpha is not None:
            return alpha
    raise ValueError(f"{folder} stores no alpha")


def _gate(folder: SourceFolder) -> dict[str, Any]:
    """Read the gate where a checkpoint keeps it, or the run beside it, and how its logits become weights."""
    state = folder / "dylo_moe_state/router.pt"
    if not state.is_file():
        state = folder.parent() / "dylo_moe_state/router.pt"
    flat = folder / "router.pt"
    if folder.has("router.safetensors"):
        tensors = load_file(folder / "router.safetensors")
    elif flat.is_file() or not state.is_file():
        tensors = _torch_file(flat)
    else:
        tensors = _torch_file(state)
    if "gate_state_dict" in tensors:
        tensors = {**tensors, **{f"gate.{key}": value for key, value in tensors["gate_state_dict"].items()}}
    settings = _settings(folder)
    if tensors.get("top_k") is not None:
        settings["num_experts_per_tok"] = int(tensors["top_k"])
    if tensors.get("temperature") is not None:
        settings["router_temperature"] = float(tensors["temperature"])
    return {**settings, "weight": tensors["gate.weight"], "bias": tensors["gate.bias"]}


def _settings(folder: SourceFolder) -> dict[str, Any]:
    """Read top_k and temperature as a `dylo_moe_state` of the run has them, else training's defaults."""
    run = folder.parent()
    top_k = temperature = None
    for place in (folder, run, run.folder("best_model")):
        path = place / "dylo_moe_state/router.pt"
        if path.is_file():
            state = _torch_file(path)
            top_k = state.get("top_k") if top_k is None else top_k
            temperature = state.get("temperature") if temperature is None else temperature
    return {
        "router_input": "experts_sum",
        "router_mode": "sparse",  # what "auto" comes to when all experts are mature
        "num_experts_per_tok": DEFAULT_TOP_K if top_k is None else int(top_k),
        "router_temperature": DEFAULT_TEMPERATURE if temperature is None else float(temperature),
    }
