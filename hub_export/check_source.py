"""The other side of the check after an export: what a source computes, by PEFT's own layers from the raw files.

It opens the files itself and shares no code with the readers or with the model, so that a mistake there cannot hide
here. Slow and plain: one adapter after the other, and for weights that differ from token to token a hook on each
adapter's `lora_B`.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM


DEFAULT_TEMPERATURE = 2.0  # of training runs that do not store theirs


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
    base_model: str,
    base_revision: str | None,
    lora_alpha: float | None,
    router_settings: dict[str, Any],
    dtype: torch.dtype | None,
) -> Reference:
    """The source as PEFT computes it, in float32.

    Args:
        source_format: "final checkpoint" or "PEFT LoRA adapters".
        router_settings: settings of the router that the user chose over the source's.
        dtype: what foundation and adapters are rounded to first, where the user asked for that.
    """
    foundation = AutoModelForCausalLM.from_pretrained(
        base_model, revision=base_revision, dtype=dtype or "auto", trust_remote_code=False
    ).float()
    if source_format == "final checkpoint":
        model, names = _final_checkpoint(foundation, folders[0], lora_alpha)
        gate = {**_gate(folders[0]), **router_settings}
    elif source_format == "PEFT LoRA adapters":
        model, names = _adapters(foundation, folders)
        gate = None
    else:
        raise ValueError(f"no way to recompute a source of format {source_format!r}")
    if dtype is not None:
        for path, parameter in model.named_parameters():
            if ".lora_A." in path or ".lora_B." in path:
                parameter.data = parameter.data.to(dtype).float()
    return Reference(model, names, gate)


def _adapters(foundation: torch.nn.Module, folders: list[Path]) -> tuple[PeftModel, list[str]]:
    names = [f"adapter_{index}" for index in range(len(folders))]
    model = PeftModel.from_pretrained(foundation, str(folders[0]), adapter_name=names[0], torch_device="cpu")
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name, torch_device="cpu")
    return model, names


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
        ranks = {
            key.split(".lora_A.")[0].removeprefix("base_model.model."): value.shape[0]
            for key, value in tensors.items()
            if ".lora_A." in key
        }
        config = LoraConfig(
            r=next(iter(ranks.values())),
            lora_alpha=alpha,
            target_modules=list(ranks),
            rank_pattern={re.escape(module): rank for module, rank in ranks.items()},
        )
        if model is None:
            model = PeftModel(foundation, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"PEFT has no place for {unexpected[0]} of {folder}")
    return model, names


def _stored_alpha(folder: Path) -> float:
    for path in (folder / "config.json", folder.resolve().parent / "best_model" / "config.json"):
        if path.is_file():
            alpha = json.loads(path.read_text(encoding="utf-8")).get("_dylora_lora_alpha")
            if alpha is not None:
                return alpha
    raise ValueError(f"{folder} stores no alpha")


def _gate(folder: Path) -> dict[str, Any]:
    state = torch.load(folder / "dylo_moe_state" / "router.pt", map_location="cpu", weights_only=True)
    return {
        "weight": state["gate_state_dict"]["weight"],
        "bias": state["gate_state_dict"]["bias"],
        "router_input": "experts_sum",
        "router_mode": "sparse",  # what "auto" comes to when all experts are mature
        "num_experts_per_tok": int(state["top_k"]) if "top_k" in state else None,
        "router_temperature": float(state["temperature"]) if "temperature" in state else None,
    }
