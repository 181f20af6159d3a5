"""The other side of the check after an export: what a source computes, by PEFT's own layers from the raw files.

It opens the files itself and shares no code with the readers or with the model, so that a mistake there cannot hide
here; the foundation is loaded by transformers. Slow and plain: one adapter after the other, and for weights that differ from token to token a hook on each
adapter's `lora_B`, or where that is no module, as in AdaLoRA, on what goes into the adapter.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .foundation import load_foundation, load_foundation_config
from .mixture import FoundationReference


DEFAULT_TOP_K, DEFAULT_TEMPERATURE = 1, 2.0  # of training runs that do not store theirs
WRAPPER = "foundation_model."


class Reference:
    """A source as PEFT computes it: `model` with the adapters `names`, and perhaps a `gate` with its settings."""

    def __init__(self, model: PeftModel, names: list[str], gate: dict[str, Any] | None):
        self.model = model.eval().float()
        self.names = names
        self.gate = gate

    @torch.no_grad()
    def quantities(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits [rows, tokens, vocabulary] under each strategy's name; "router logits" [rows, tokens, experts]."""
        count = len(self.names)
        with self.model.disable_adapter():
            output = self.model(rows, output_hidden_states=True)
        results, hidden = {"base": output.logits}, output.hidden_states[-1]
        for index, name in enumerate(self.names):
            self.model.base_model.set_adapter([name])
            results[f"single:{index}"] = self.model(rows).logits
        self.model.base_model.set_adapter(self.names)
        with self._weighted(torch.full((*rows.shape, count), 1 / count)):
            results["uniform"] = self.model(rows).logits
        if self.gate is not None:
            if self.gate["router_input"] == "experts_sum":
                hidden = self.model(rows, output_hidden_states=True).hidden_states[-1]
            logits = hidden @ self.gate["weight"].float().T + self.gate["bias"].float()
            results["router logits"] = logits
            with self._weighted(self._routing_weights(logits)):
                results["router"] = self.model(rows).logits
            # What training weights by, and what shows the temperature, which sparse weights do without.
            temperature = self.gate["router_temperature"] or DEFAULT_TEMPERATURE
            with self._weighted(torch.softmax(logits / temperature, dim=-1)):
                results["router, dense"] = self.model(rows).logits
        return {name: value.float().contiguous() for name, value in results.items()}

    def _routing_weights(self, logits: torch.Tensor) -> torch.Tensor:
        if self.gate["router_mode"] == "dense":
            return torch.softmax(logits / (self.gate["router_temperature"] or DEFAULT_TEMPERATURE), dim=-1)
        top = logits.topk(self.gate["num_experts_per_tok"], dim=-1)
        masked = torch.full_like(logits, float("-inf")).scatter(-1, top.indices, top.values)
        return torch.softmax(masked, dim=-1)

    @contextmanager
    def _weighted(self, weights: torch.Tensor):
        """All active adapters, adapter i times `weights[..., i]`; weights are [rows, tokens, experts]."""
        handles = []
        for path, module in self.model.named_modules():
            for index, name in enumerate(self.names):
                if path.endswith(f".lora_B.{name}"):
                    handles.append(module.register_forward_hook(_times(weights[..., index])))
                if isinstance(module, AdaLoraLayer) and name in module.lora_A:
                    handles.append(module.lora_dropout[name].register_forward_hook(_times(weights[..., index])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _times(weight: torch.Tensor):
    # some layers see rows and tokens as one dimension
    return lambda module, inputs, output: output * weight.reshape(*output.shape[:-1], 1)


def reference(
    source_format: str,
    folders: list[Path],
    base_model: str | torch.nn.Module,
    base_revision: str | None,
    lora_alpha: float | None,
    router_settings: dict[str, Any],
    dtype: torch.dtype | None,
    round_foundation: bool = True,
) -> Reference:
    """The source as PEFT computes it, in float32.

    Args:
        source_format: the format's name, and `folders` where its files are, one per expert for adapters.
        base_model: folder or Hub id of the foundation, or that itself; of a source that carries it, at most the config is
            read there.
        router_settings: settings of the router that the user chose over the source's.
        dtype: what foundation and adapters are rounded to first, where the user asked for that.
        round_foundation: False for an export that leaves the foundation where it is.
    """
    foundation_dtype = dtype if round_foundation else None
    if source_format not in ("final checkpoint", "PEFT LoRA adapters", "trainer checkpoint", "whole-model state dict"):
        raise ValueError(f"no way to recompute a source of format {source_format!r}")
    gate = None
    if source_format == "whole-model state dict":
        model, names, gate = _whole_model(folders[0], base_model, base_revision, lora_alpha, foundation_dtype)
        _round_adapters(model, dtype)
    else:
        foundation = base_model
        if not isinstance(foundation, torch.nn.Module):
            foundation = load_foundation(FoundationReference(base_model, base_revision), torch.float32)
        _round(foundation, foundation_dtype)
        if source_format == "final checkpoint":
            model, names = _final_checkpoint(foundation, folders[0], lora_alpha)
            _round_adapters(model, dtype)
            gate = _gate(folders[0])
        elif source_format == "trainer checkpoint":
            places = _nested_adapters(folders[0])
            model, names = _adapters(foundation, list(places.values()), list(places), dtype)
            gate = _gate(folders[0])
        else:
            names = [f"adapter_{index}" for index in range(len(folders))]
            model, names = _adapters(foundation, folders, names, dtype)
    if gate is not None:
        gate = {**gate, **router_settings}
    return Reference(model, names, gate)


def _round(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()


def _round_adapters(model: PeftModel, dtype: torch.dtype | None) -> None:
    if dtype is None:
        return
    for module in model.modules():
        if isinstance(module, AdaLoraLayer):
            for name in module.lora_A:  # one factor of an export is A and E together
                module.lora_A[name].data = module.lora_A[name].data * module.lora_E[name].data
                module.lora_E[name].data = torch.ones_like(module.lora_E[name].data)
    for path, parameter in model.named_parameters():
        if ".lora_A." in path or ".lora_B." in path:
            parameter.data = parameter.data.to(dtype).float()


def _adapters(
    foundation: torch.nn.Module, folders: list[Path], names: list[str], dtype: torch.dtype | None
) -> tuple[PeftModel, list[str]]:
    kinds = {
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] for folder in folders
    }
    if len(kinds) > 1:
        return _adapters_of_two_kinds(foundation, folders, names, dtype), names
    model = PeftModel.from_pretrained(foundation, str(folders[0]), adapter_name=names[0], torch_device="cpu")
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name, torch_device="cpu")
    _round_adapters(model, dtype)
    return model, names


def _adapters_of_two_kinds(
    foundation: torch.nn.Module, folders: list[Path], names: list[str], dtype: torch.dtype | None
) -> PeftModel:
    """PEFT holds LoRA and AdaLoRA adapters in no one model; each adapter's own delta, as PEFT gives it, becomes a LoRA
    of full rank, one factor of which is the identity."""
    deltas: dict[str, dict[str, torch.Tensor]] = {}
    for name, folder in zip(names, folders, strict=True):
        alone = PeftModel.from_pretrained(foundation, str(folder), adapter_name=name, torch_device="cpu").float()
        _round_adapters(alone, dtype)
        deltas[name] = {
            path.removeprefix("base_model.model."): _as_linear(module, module.get_delta_weight(name).detach().clone())
            for path, module in alone.named_modules()
            if hasattr(module, "get_delta_weight") and name in module.lora_A
        }
        alone.unload()
    model = None
    for name, layers in deltas.items():
        tensors = {}
        for module, delta in layers.items():
            tensors[f"base_model.model.{module}.lora_A.{name}.weight"] = torch.eye(delta.shape[1])
            tensors[f"base_model.model.{module}.lora_B.{name}.weight"] = delta
        model = _add_adapter(foundation, model, name, tensors, None)
    return model


def _final_checkpoint(
    foundation: torch.nn.Module, folder: Path, lora_alpha: float | None
) -> tuple[PeftModel, list[str]]:
    alpha = _stored_alpha(folder) if lora_alpha is None else lora_alpha
    count = len([path for path in (folder / "peft_adapters").iterdir() if re.fullmatch(r"expert_\d+\.pt", path.name)])
    names = [f"expert_{index}" for index in range(count)]
    model = None
    for name in names:
        tensors = torch.load(folder / "peft_adapters" / f"{name}.pt", map_location="cpu", weights_only=True)
        tensors = {key: value for key, value in tensors.items() if name in key.split(".")}
        model = _add_adapter(foundation, model, name, tensors, alpha)
    return model, names


def _as_linear(module: Any, delta: torch.Tensor) -> torch.Tensor:
    return delta.T.contiguous() if getattr(module, "fan_in_fan_out", False) else delta


def _add_adapter(
    foundation: torch.nn.Module,
    model: PeftModel | None,
    name: str,
    tensors: dict[str, torch.Tensor],
    alpha: float | None,
) -> PeftModel:
    """PEFT's own layers around the foundation, filled with an adapter's tensors. Without `alpha`, the scale is 1."""
    ranks = {
        key.split(".lora_A.")[0].removeprefix("base_model.model."): value.shape[0]
        for key, value in tensors.items()
        if ".lora_A." in key
    }
    patterns = {re.escape(module): rank for module, rank in ranks.items()}
    config = LoraConfig(
        r=next(iter(ranks.values())),
        lora_alpha=1 if alpha is None else alpha,
        target_modules=list(ranks),
        rank_pattern=patterns,
        alpha_pattern=patterns if alpha is None else {},
    )
    if model is None:
        model = PeftModel(foundation, config, adapter_name=name)
    else:
        model.add_adapter(name, config)
    unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"PEFT has no place for {unexpected[0]}")
    return model


def _nested_adapters(folder: Path) -> dict[str, Path]:
    """`expert_<i>` to the folder of its adapter, in the order of the numbers."""
    found = {}
    for path in folder.glob("peft_adapters/**/adapter_config.json"):
        found[path.parent.name] = path.parent
    return {name: found[name] for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))}


def _whole_model(
    folder: Path,
    base_model: str | None,
    base_revision: str | None,
    lora_alpha: float | None,
    dtype: torch.dtype | None,
) -> tuple[PeftModel, list[str], dict[str, Any]]:
    """The raw state dict, split into the foundation as transformers loads it, PEFT's adapters, and the gate."""
    raw: dict[str, torch.Tensor] = {}
    safetensors = sorted(folder.glob("model*.safetensors"))
    for path in safetensors:
        raw.update(load_file(path))
    for path in [] if safetensors else sorted(folder.glob("pytorch_model*.bin")):
        raw.update(torch.load(path, map_location="cpu", weights_only=True))
    inside = {key.removeprefix(WRAPPER): value for key, value in raw.items() if key.startswith(WRAPPER)}
    adapters = {key: value for key, value in inside.items() if ".lora_A." in key or ".lora_B." in key}
    weights = {
        key.removeprefix("base_model.model.").replace(".base_layer.", "."): value.float()
        for key, value in inside.items()
        if key not in adapters
    }
    stored = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")) if (folder / "config.json").is_file() else {}
    )
    own = "model_type" in stored and stored["model_type"] != "dylora-moe"
    source = str(folder) if own else base_model or stored["base_model_name_or_path"]
    config = load_foundation_config(FoundationReference(source, None if own else base_revision))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    paths = {id(module): f"{path}.weight" for path, module in empty.named_modules()}
    head = weights.get(paths[id(empty.get_output_embeddings())])
    if head is not None and not torch.equal(head, weights[paths[id(empty.get_input_embeddings())]]):
        config.tie_word_embeddings = False
    foundation, info = type(empty).from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"the foundation in {folder} is not whole: {info}")
    _round(foundation, dtype)
    names = sorted({key.split(".")[-2] for key in adapters}, key=lambda name: int(name.rpartition("_")[2]))
    alpha = _stored_alpha(folder) if lora_alpha is None else lora_alpha
    model = None
    for name in names:
        tensors = {key: value for key, value in adapters.items() if key.split(".")[-2] == name}
        model = _add_adapter(foundation, model, name, tensors, alpha)
    gate = {**_settings(folder), "weight": raw["router.gate.weight"], "bias": raw["router.gate.bias"]}
    return model, names, gate


def _stored_alpha(folder: Path) -> float:
    for path in (folder / "config.json", folder.resolve().parent / "best_model" / "config.json"):
        if path.is_file():
            alpha = json.loads(path.read_text(encoding="utf-8")).get("_dylora_lora_alpha")
            if alpha is not None:
                return alpha
    raise ValueError(f"{folder} stores no alpha")


def _gate(folder: Path) -> dict[str, Any]:
    """The gate where a checkpoint keeps it, and how its logits become weights."""
    state = folder / "dylo_moe_state" / "router.pt"
    flat = folder / "router.pt"
    if (folder / "router.safetensors").is_file():
        tensors = load_file(folder / "router.safetensors")
    elif flat.is_file() or not state.is_file():
        tensors = torch.load(flat, map_location="cpu", weights_only=True)
    else:
        tensors = torch.load(state, map_location="cpu", weights_only=True)
    if "gate_state_dict" in tensors:
        tensors = {**tensors, **{f"gate.{key}": value for key, value in tensors["gate_state_dict"].items()}}
    settings = _settings(folder)
    for key, name, kind in (("top_k", "num_experts_per_tok", int), ("temperature", "router_temperature", float)):
        if tensors.get(key) is not None:
            settings[name] = kind(tensors[key])
    return {**settings, "weight": tensors["gate.weight"], "bias": tensors["gate.bias"]}


def _settings(folder: Path) -> dict[str, Any]:
    """top_k and temperature as a `dylo_moe_state` of the run has them, else training's defaults."""
    run = folder.resolve().parent
    top_k = temperature = None
    for place in (folder, run, run / "best_model"):
        path = place / "dylo_moe_state" / "router.pt"
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            top_k = state.get("top_k") if top_k is None else top_k
            temperature = state.get("temperature") if temperature is None else temperature
    return {
        "router_input": "experts_sum",
        "router_mode": "sparse",  # what "auto" comes to when all experts are mature
        "num_experts_per_tok": DEFAULT_TOP_K if top_k is None else int(top_k),
        "router_temperature": DEFAULT_TEMPERATURE if temperature is None else float(temperature),
    }
