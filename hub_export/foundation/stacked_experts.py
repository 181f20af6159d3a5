"""LoRA on the stacked experts of a mixture-of-experts foundation, in the two forms that PEFT (0.21) reads.

On a parameter (`target_parameters`): PEFT puts one layer around the module for each parameter, one in the
other, so that the names in an adapter's file say how deep a layer lies, and not which parameter it is for.

    base_model.model.<module>.base_layer.lora_A.weight     [E * r, in]       gate_up_proj, the inner layer
    base_model.model.<module>.lora_A.weight                                  down_proj, the outer one, or whichever is alone

On the matrices as older versions of transformers had them, one layer for each expert (`experts.0.w1`,
`experts.0.gate_proj`): those that are one parameter by now become one pair of stacks. A_e has their ranks one
below the other, B_e is block-diagonal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial, reduce
from itertools import chain

import torch
from torch import nn

from ..errors import InputError
from ..tensors.mixture import AdaptedLayer, Expert
from . import weight_conversion


INSIDE = ".base_layer"


def parameters_of(
    modules: Iterable[str], targets: Iterable[str], is_linear: Callable[[str], bool]
) -> dict[str, str]:
    """Map layers in an adapter's file to the parameters that PEFT puts them on; leave out those on modules.

    Args:
        modules: the names in the file, without PEFT's prefix and `.lora_A.weight`.
        targets: the config's `target_parameters`.
        is_linear: whether a layer has the rank that the config gives a module of its name. A target need not
            name the module, so that this alone may tell the layers of parameters from others.

    Raises:
        InputError: there are more or fewer layers on a module than targets.
    """
    from dylora_moe.modeling.configuration_dylora_moe import STACKED_PARAMETERS

    levels: dict[str, list[str]] = {}
    for name in modules:
        levels.setdefault(name.replace(INSIDE, ""), []).append(name)
    found: dict[str, str] = {}
    for module, names in levels.items():
        named = [name for name in STACKED_PARAMETERS if _is_target(f"{module}.{name}", targets)]
        with_module = [target for target in targets if "." in target]
        sure = len(names) > 1 or any(_is_target(f"{module}.{name}", with_module) for name in named)
        if not named or (not sure and is_linear(names[0])):
            continue
        names = sorted(names, key=len, reverse=True)  # the inmost first
        if [name.count(INSIDE) for name in names] != list(range(len(named)))[::-1]:
            raise InputError(
                f"the adapter has {len(names)} layers on {module}, and target_parameters of adapter_config.json names "
                f"{', '.join(named)} there; take those out that the base model does not have"
            )
        found |= {name: f"{module}.{parameter}" for name, parameter in zip(names, named, strict=True)}
    return found


def _is_target(parameter: str, targets: Iterable[str]) -> bool:
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)


def shape_in(foundation: nn.Module, name: str) -> tuple[int, int, int] | None:
    """Return (experts, in, out) of a parameter of stacked experts; None without a module for it.

    Raises:
        ValueError: the module has none of that name, or computes something else.
    """
    from dylora_moe.modeling.stacked_experts_dylora_moe import stack_shape

    module, _, parameter = name.rpartition(".")
    found = dict(foundation.named_modules()).get(module)
    return None if found is None else stack_shape(found, parameter)


def has_exchanged_sizes(peft_version: str, parameter: str, foundation: nn.Module) -> bool:
    """Say whether that PEFT took the inputs of such a parameter for its outputs.

    Where both are as many, no shape shows it.
    """
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", peft_version)
    if version is None:
        return False
    numbers = tuple(map(int, version.groups()))
    is_transposed = foundation.get_submodule(parameter.rpartition(".")[0]).is_transposed
    return numbers == (0, 19, 0) if is_transposed else numbers < (0, 19, 1)


def put_together(expert: Expert, foundation: nn.Module) -> Expert:
    """Put the matrices of single experts together where they are one parameter of the foundation.

    Matrices of which others are missing are left as they are.

    Raises:
        InputError: their ranks or alphas differ, or rank-stabilised scales, which PEFT changes by putting
            them together; or the adapter has the parameter itself, too.
    """
    modules = dict(foundation.named_modules())
    unknown = [name for name in expert.layers if name not in modules and not expert.layers[name].num_stacked]
    if not unknown:
        return expert
    layers, members = dict(expert.layers), {}
    for parameter, parts in weight_conversion.stacks(unknown, foundation).items():
        if why_not_whole(parameter, parts, foundation) is not None:
            continue
        if parameter in layers:
            raise InputError(
                f"expert {expert.name} ({expert.origin}) adapts {parameter} twice: as a parameter, and by matrices of single "
                f"experts such as {next(chain(*parts.values()))}; take one of the two out"
            )
        members[parameter] = list(parts.values())
        layers[parameter] = _one_layer(expert, parameter, members[parameter])
        for name in chain(*parts.values()):
            del layers[name]
    if not members:
        return expert
    return replace(expert, layers=layers, read=partial(_read, expert, members), peft_version="")


def why_not_whole(parameter: str, parts: dict[str, list[str]], foundation: nn.Module) -> str | None:
    """Say what is missing of a parameter, and what to do; None where nothing is.

    Args:
        parts: for each matrix of a single expert, those of all experts that the adapter has; see
            `weight_conversion.stacks`.
    """
    try:
        count, *_ = shape_in(foundation, parameter)
    except ValueError as error:
        return str(error)
    if parameter.endswith(".up_proj"):
        return f"PEFT does not put those of {parameter} together; train with target_parameters"
    for pattern, names in parts.items():
        numbers = [int(number) for name in names for number in re.findall(r"\.(\d+)\.", name)[-1:]]
        others = [number for number in numbers if number >= count]
        if others:
            return (
                f"the adapter has matrices of expert {others[0]}, and {parameter} has {count} experts, from 0 on; pass the model "
                "it was trained on with --base_model"
            )
        if numbers != list(range(count)):
            kind = pattern.removesuffix(".weight")
            return (
                f"the adapter has {len(numbers)} of the {count} that are called {kind} in {parameter}. PEFT does not read it "
                "either; add the missing ones with a lora_B of zeros"
            )
    return None


def _one_layer(expert: Expert, parameter: str, parts: list[list[str]]) -> AdaptedLayer:
    names = list(chain(*parts))
    layers = [expert.layers[name] for name in names]
    first = layers[0]
    where = f"expert {expert.name} ({expert.origin})"
    for name, layer in zip(names, layers, strict=True):
        for field in ("rank", "lora_alpha", "in_features", "out_features"):
            if getattr(layer, field) != getattr(first, field):
                raise InputError(
                    f"{where}: {field} of {names[0]} is {getattr(first, field)}, of {name} {getattr(layer, field)}; both "
                    f"are matrices of {parameter} in the base model, and PEFT puts them together only where all are equal"
                )
    if expert.use_rslora and len(parts) > 1:
        raise InputError(
            f"{where}: use_rslora is set, and {len(parts)} matrices of each expert are {parameter} in the base model: PEFT "
            f"puts them together with a scale that is {len(parts)} ** 0.5 times that of training. Set use_rslora to false "
            "and lora_alpha to lora_alpha * r ** 0.5, which is the same"
        )
    if expert.alpha_of is not None:
        # of several matrices that become one, PEFT looks at no pattern at all
        for name in (parameter, *(("",) if len(parts) > 1 else ())):
            if expert.alpha_of(name) != first.lora_alpha:
                raise InputError(
                    f"{where}: {names[0]} has the alpha {first.lora_alpha} by alpha_pattern of adapter_config.json; it is part "
                    f"of {parameter} by now, for which PEFT takes {expert.alpha_of(name)}. Take it out of alpha_pattern, and "
                    "multiply its lora_B by the quotient of the two"
                )
    return AdaptedLayer(
        rank=len(parts) * first.rank,
        lora_alpha=None if first.lora_alpha is None else len(parts) * first.lora_alpha,
        in_features=first.in_features,
        out_features=len(parts) * first.out_features,
        dtype=reduce(torch.promote_types, (layer.dtype for layer in layers)),
        num_stacked=len(parts[0]),
    )


def _read(
    expert: Expert, members: dict[str, list[list[str]]], name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if name not in members:
        return expert.read(name)
    kinds = [[expert.read(part) for part in parts] for parts in members[name]]
    lora_a = torch.stack([torch.cat([lora_a for lora_a, _ in pairs]) for pairs in zip(*kinds, strict=True)])
    lora_b = torch.stack(
        [torch.block_diag(*(lora_b for _, lora_b in pairs)) for pairs in zip(*kinds, strict=True)]
    )
    # [E, rank, in] and [E, out, rank], which PEFT flattens in different orders
    return lora_a.flatten(0, 1), lora_b.permute(1, 2, 0).flatten(1)
