"""Converts names of adapted layers to the base model's as PEFT does, and explains names that match no layer.

Tried with PEFT 0.21: names of older versions of transformers are converted where PEFT has conversions for a
model type (`language_model.model.…` of Gemma 3, for instance). Names in which a wrapper of training is left
are read by nothing; PEFT loads such an adapter without an error, and without an effect.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from ..errors import InputError
from ..tensors.mixture import AdaptedLayer, Expert
from ..tensors.stored_tensors import of_tensor
from . import weight_conversion
from .stacked_experts import put_together, why_not_whole


PREFIX = "base_model.model."

# parts of names that a wrapper leaves, with what it is and which model to save instead
WRAPPERS = {
    "_orig_mod": ("torch.compile puts around a model", "the model inside, `model._orig_mod`"),
    "_fsdp_wrapped_module": (
        "FSDP puts around modules",
        "the whole state dict, `model.save_pretrained(…, state_dict=accelerator.get_state_dict(model))` of the unwrapped model",
    ),
    "_checkpoint_wrapped_module": (
        "torch's activation checkpointing puts around modules",
        "a model whose checkpointing is on by `gradient_checkpointing_enable()` instead",
    ),
}
DATA_PARALLEL = (
    "DistributedDataParallel, DataParallel and DeepSpeed put around a model",
    "the model inside, `model.module`",
)

ADAPTABLE = (
    "only linear layers, and of a mixture-of-experts layer its stacked experts and its gate, can be adapted. Train without "
    "it, or merge the adapter into its base model with PEFT's merge_and_unload"
)


def why_unreadable(name: str) -> str | None:
    """Say what is wrong with a name in which a wrapper is left, and what to do; None for other names."""
    inside = name.removeprefix(PREFIX)
    for part, (cause, remedy) in WRAPPERS.items():
        if part in name.split("."):
            return _sentence(part, cause, remedy)
    if name.startswith("module.") or inside.startswith("module."):
        return _sentence("module", *DATA_PARALLEL)
    if inside.startswith(PREFIX):
        return (
            f"the name begins with {PREFIX} twice, since the model was a PeftModel already when PEFT wrapped it; no reader "
            f"takes such names. Rename the tensors: in each key, replace {PREFIX * 2!r} by {PREFIX!r}"
        )
    return None


def _sentence(part: str, cause: str, remedy: str) -> str:
    return (
        f"{part!r} in the name is what {cause}; no reader takes such names, and PEFT leaves such an adapter out without an "
        f"error. Save {remedy}, or rename the tensors: in each key, replace '{part}.' by ''"
    )


def with_current_names(expert: Expert, foundation: nn.Module) -> Expert:
    """Rename an expert's layers to the names that the foundation has today, where PEFT does so, too.

    Raises:
        InputError: its alphas go by names that PEFT does not look for, old ones or a gate's without its
            `weight`; or matrices that are one parameter by now cannot be put together.
    """
    modules = dict(foundation.named_modules())
    expert = _renamed(put_together(expert, foundation), foundation, modules)
    for name, layer in expert.layers.items():
        if layer.num_stacked or _is_gate(modules.get(name)):
            _check_peft_reads(expert, name, layer)
    return expert


def _check_peft_reads(expert: Expert, name: str, layer: AdaptedLayer) -> None:
    """Raise InputError where PEFT reads an adapter of stacked experts or of a gate in another way, or not at all."""
    where = f"expert {expert.name} ({expert.origin})"
    if expert.is_adalora:
        raise InputError(
            f"{where} is of AdaLoRA, which PEFT puts on linear layers alone, and adapts {name}, which is none in the "
            "base model; train without it"
        )
    weight = f"{name}.weight"
    if not layer.num_stacked and expert.alpha_of is not None and expert.alpha_of(weight) != layer.lora_alpha:
        raise InputError(
            f"{where}: alpha_pattern of adapter_config.json gives {name} the alpha {layer.lora_alpha}; it is a gate, which "
            f"PEFT adapts by its weight, and for {weight} it takes {expert.alpha_of(weight)}. Put {weight} into "
            "target_parameters in place of its name in target_modules, and write its alpha and rank under that name"
        )


def _renamed(expert: Expert, foundation: nn.Module, modules: dict[str, nn.Module]) -> Expert:
    if all(name in modules or layer.num_stacked for name, layer in expert.layers.items()):
        return expert
    unknown = [name for name, layer in expert.layers.items() if name not in modules and not layer.num_stacked]
    now_called = converted(unknown, foundation)
    old_names: dict[str, str] = {}
    for name in expert.layers:
        now = now_called.get(name, name)
        old_names[now if _is_adaptable(modules.get(now)) and now not in expert.layers else name] = name
    if all(now == name for now, name in old_names.items()):
        return expert
    for now, name in old_names.items():
        if now == name or expert.alpha_of is None:
            continue
        if expert.alpha_of(now) != expert.layers[name].lora_alpha:
            raise InputError(
                f"expert {expert.name} ({expert.origin}): alpha_pattern of adapter_config.json gives {name} an alpha by its "
                f"old name; the layer is {now} by now, where PEFT finds no alpha for it and takes lora_alpha. Write that "
                "name, or its end, into alpha_pattern and rank_pattern"
            )
    layers: dict[str, AdaptedLayer] = {now: expert.layers[name] for now, name in old_names.items()}
    return replace(expert, layers=layers, read=lambda module: expert.read(old_names[module]))


def converted(names: list[str], foundation: nn.Module) -> dict[str, str]:
    """Map names to the layers that PEFT puts their adapters on, where it converts names one by one."""
    from peft import LoraConfig

    # the number of rows tells them apart afterwards
    stored = {
        f"{PREFIX}{name}.lora_A.weight": torch.empty(rows, 1, device="meta")
        for rows, name in enumerate(names, 1)
    }
    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_adapter_state_dict_for_transformers as convert,
        )

        made = convert(foundation, LoraConfig(), stored)
    except Exception:  # a PEFT that converts no names, or in another way
        return {}
    if len(made) != len(names):
        return {}  # some were put together
    return {
        names[len(tensor) - 1]: key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        for key, tensor in made.items()
    }


def why_missing(name: str, layers: Iterable[str], foundation: nn.Module, called: str) -> str:
    """End a sentence on a layer that the foundation, `called` so, does not have: say why, and what to do.

    Args:
        layers: the names of all layers of the adapter.
    """
    unreadable = why_unreadable(f"{PREFIX}{name}")  # PEFT's prefix is off it by now
    if unreadable is not None:
        return f": {unreadable}"
    if weight_conversion.is_part(f"{name}.weight", foundation):
        return (
            f", one matrix of a mixture-of-experts layer. In {called} the matrices of all its experts are one parameter of "
            f"three dimensions, which an adapter can have only as a whole, and {_what_is_missing(name, layers, foundation)}"
        )
    now = converted([name], foundation).get(name, name)
    module = dict(foundation.named_modules()).get(now)
    if module is not None:
        return f", which in {called} is {now}, a {type(module).__name__}; {ADAPTABLE}"
    now = _converted_by_transformers(name, foundation)
    if now is not None:
        return (
            f", which in {called} is {now}; PEFT does not convert this name, and leaves the layer out without an error. "
            f"Rename the tensors: in each key, replace {name!r} by {now!r}"
        )
    return (
        f", which the base model {called} does not have; pass the model it was trained on with --base_model"
    )


def _what_is_missing(name: str, layers: Iterable[str], foundation: nn.Module) -> str:
    modules = dict(foundation.named_modules())
    stacks = weight_conversion.stacks([layer for layer in layers if layer not in modules], foundation)
    for parameter, parts in stacks.items():
        if any(name in names for names in parts.values()):
            return why_not_whole(parameter, parts, foundation)
    return "this one is put together in a way that LoRA cannot follow"


def _converted_by_transformers(name: str, foundation: nn.Module) -> str | None:
    """Find the linear layer or gate whose weight a checkpoint has under this name; None where there is none."""
    found, _ = weight_conversion.by_current_name({f"{name}.weight": of_tensor(torch.empty(0))}, foundation)
    modules = dict(foundation.named_modules())
    layers = [weight.removesuffix(".weight") for weight in found]
    return next((layer for layer in layers if _is_adaptable(modules.get(layer))), None)


def _is_adaptable(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or _is_gate(module)


def _is_gate(module: nn.Module | None) -> bool:
    from dylora_moe.modeling.experts_dylora_moe import is_gate

    return module is not None and is_gate(module)
