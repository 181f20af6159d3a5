"""Writes the demo's trained parts as DyLoRA-MoE's training leaves them (a *final checkpoint*).

The foundation lies beside the checkpoint, as an ordinary model with its tokenizer, and the checkpoint names
it by its path.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


TOP_K = 1
TEMPERATURE = 2.0


def save_foundation(
    foundation: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> Path:
    """Write the foundation and its tokenizer by `save_pretrained`; `foundation` must carry no adapters."""
    folder = Path(folder).resolve()
    foundation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_final_checkpoint(
    peft_model: PeftModel,
    gate: nn.Linear,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapters: Sequence[str],
    foundation_folder: str | Path,
    folder: str | Path,
) -> Path:
    """Write `folder`, which must not exist: config.json, peft_adapters/, dylo_moe_state/ and the tokenizer.

    `adapters` are the experts' names in the order of the gate's rows [experts, hidden].
    """
    folder = Path(folder)
    (folder / "peft_adapters").mkdir(parents=True)
    (folder / "dylo_moe_state").mkdir()
    config = checkpoint_config(peft_model, adapters, foundation_folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for adapter in adapters:
        torch.save(adapter_parameters(peft_model, adapter), folder / "peft_adapters" / f"{adapter}.pt")
    torch.save(router_state(gate), folder / "dylo_moe_state" / "router.pt")
    tokenizer.save_pretrained(folder)
    return folder


def checkpoint_config(peft_model: PeftModel, adapters: Sequence[str], foundation_folder: str | Path) -> dict:
    """Make the checkpoint's config: the foundation's, with the training project's model type and fields."""
    lora = peft_model.peft_config[adapters[0]]
    config = json.loads(peft_model.base_model.model.config.to_json_string(use_diff=False))
    return {
        **config,
        "model_type": "dylora-moe",
        "base_model_name_or_path": str(Path(foundation_folder).resolve()),
        "_dylora_num_experts": len(adapters),
        "_dylora_lora_r": lora.r,
        "_dylora_lora_alpha": lora.lora_alpha,
        "_dylora_lora_dropout": lora.lora_dropout,
    }


def adapter_parameters(peft_model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """Return one expert's LoRA matrices by their full parameter names, which hold the adapter's name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in peft_model.named_parameters()
        if adapter in name.split(".")
    }


def router_state(gate: nn.Linear) -> dict:
    """Make the content of the training project's router file: the gate's weights and how it routes."""
    return {
        "gate_state_dict": {name: tensor.detach().clone() for name, tensor in gate.state_dict().items()},
        "num_experts": gate.out_features,
        "input_size": gate.in_features,
        "top_k": TOP_K,
        "temperature": TEMPERATURE,
    }
