"""Reads back a repo that this package exported, either layout, and never runs the repo's code.

config.json              model_type "dylora_moe", weights_layout, base_config, expert_configs, router_*
model.safetensors        full: (or shards with model.safetensors.index.json) foundation.<module>.base_layer.weight,
                         foundation.<module>.lora_A [R, in], ….lora_B [R, out], router.gate.weight,
                         router.gate.bias, or, of a router of every layer, foundation.<module>.prototypes [N, in];
                         of stacked experts
                         foundation.<module>.updates.<parameter>.lora_A [R, E, in], ….lora_B
experts/<name>/          adapter: adapter_config.json, adapter_model.safetensors, as PEFT writes them
router.safetensors       adapter: gate.weight, gate.bias, or <module>.prototypes
generation_config.json   routing_strategy
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from ..errors import InputError
from ..foundation.weight_conversion import renamed
from ..foundation.weights import skeleton
from ..repo.repo_config import (
    MODEL_TYPE,
    foundation_of,
    is_exported_repo,
    load_config,
    stored_routing_strategy,
)
from ..sources.source_folder import SourceFolder
from ..sources.source_options import ReadOptions
from ..tensors.mixture import AdaptedLayer, ArrowRouter, Expert, Mixture, Router
from ..tensors.stored_tensors import StoredTensor
from ..tensors.tensor_files import TensorFile
from ..tensors.weight_files import stored_tensors, weight_files


FORMAT = "exported repo"
DESCRIPTION = "config.json with model_type dylora_moe, model.safetensors or experts/"

FULL_WEIGHTS = "model.safetensors"  # of layout `full`


def recognise(folder: SourceFolder) -> str | None:
    """Say why this folder is an exported repo, or None.

    Tensor names decide, `model_type` only where there are none.
    """
    if not folder.has("config.json"):
        return None
    files = weight_files(folder, (FULL_WEIGHTS,))
    if not files:
        is_light = is_exported_repo(folder) and folder.has_folder("experts")
        return f"config.json has model_type {MODEL_TYPE}, and there is experts/" if is_light else None
    for path in files:
        for key in TensorFile(path).keys():  # noqa: SIM118
            if key.startswith("foundation.") and key.endswith(".lora_A"):
                return f"{path.name} holds {key}"
    if is_exported_repo(folder):
        return f"config.json has model_type {MODEL_TYPE}"
    return None


def read(folders: list[SourceFolder], options: ReadOptions) -> Mixture:
    """Describe one exported repo; tensors stay on disk.

    Raises:
        InputError: config and weights contradict each other, or a file is damaged.
    """
    if len(folders) > 1:
        raise InputError(
            f"{folders[0]} is an exported repo; give one at a time, and after it adapters to append"
        )
    folder = folders[0]
    if options.lora_alpha is not None:
        raise InputError("an exported repo states its alphas; leave out --lora_alpha")
    config = load_config(folder)
    is_full = config.weights_layout == "full"
    weights = _full_weights(folder, config) if is_full else _adapter_weights(folder, config)
    places = _Places(config)
    _check_nothing_else(folder, config, places, weights)
    experts = [_expert(folder, config, places, index, weights) for index in range(config.num_experts)]
    return Mixture(
        format=FORMAT,
        folders=folders,
        experts=experts,
        router=_router(folder, config, experts, weights),
        foundation=foundation_of(folder, config),
        foundation_config=config.base_config,
        foundation_weights=_foundation(weights, config) if is_full else None,
        has_trained_foundation=getattr(config, "has_trained_foundation", False) is True,
        limits=[str(limit) for limit in _as_list(getattr(config, "limits", None))],
        routing_strategy=stored_routing_strategy(folder, config),
    )


class _Places:
    """What the config says of every adapted place, found once for all experts: there may be thousands.

    Attributes:
        modules: place to the module that holds its stacks.
        stacked: the places that are parameters of stacked experts.
        starts: place to the row of its stacks at which each expert begins, and at the end the number of rows.
    """

    def __init__(self, config: Any):
        self.names = config.expert_names
        self.modules = config.stack_modules()
        self.stacked = set(config.adapted_parameters())
        self.starts = {
            place: list(accumulate((rank for rank, _ in layout), initial=0))
            for place, layout in config.rank_layouts().items()
        }


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _full_weights(folder: SourceFolder, config: Any) -> dict[str, StoredTensor]:
    weights = stored_tensors(weight_files(folder, (FULL_WEIGHTS,)))
    if not weights:
        raise InputError(f"{folder} has a config.json but no model.safetensors")
    return _with_own_names(weights, config)


def _with_own_names(weights: dict[str, StoredTensor], config: Any) -> dict[str, StoredTensor]:
    """Give the stacks the names that the config gives.

    transformers saves a model under a foundation's older names.
    """
    own = {
        f"foundation.{module}.lora_{matrix}" for module in config.stack_modules().values() for matrix in "AB"
    }
    own |= _prototype_keys(config)
    stacks = [key for key in weights if _is_of_experts(key, config)]
    if config.base_config is None or all(key in own for key in stacks):
        return weights
    inside = [key.removeprefix("foundation.") for key in stacks]
    names = renamed(inside, skeleton(config.base_config))
    now = {f"foundation.{before}": f"foundation.{after}" for before, after in names.items()}
    return {now.get(key, key): tensor for key, tensor in weights.items()}


def _check_nothing_else(
    folder: SourceFolder, config: Any, places: _Places, weights: dict[str, StoredTensor]
) -> None:
    """Refuse tensors that are not read here, as what they do is not known.

    Raises:
        InputError: names the first tensor that the config does not speak of.
    """
    known = {"router.gate.weight", "router.gate.bias"} if config.has_gate else _prototype_keys(config)
    is_full = config.weights_layout == "full"
    for index in range(config.num_experts):
        keys = _stored_keys(config, places, index)
        known |= {key.format(matrix) for key in keys.values() for matrix in "AB"}
    for key in weights:
        is_foundations = is_full and key.startswith("foundation.") and not _is_of_experts(key, config)
        if key not in known and not is_foundations:
            raise InputError(f"{folder}: {key} in its weights is nothing that its config.json speaks of")


def _stored_keys(config: Any, places: _Places, index: int) -> dict[str, str]:
    """Map what an expert adapts to the name of its tensors, with {} for A and B.

    In layout `full` they are those of all experts.
    """
    from dylora_moe.modeling.saving_dylora_moe import peft_keys

    keys = peft_keys(config.expert_configs[index])
    if config.weights_layout == "full":
        return {name: f"foundation.{places.modules[name]}.lora_{{}}" for name in keys}
    return {name: f"{places.names[index]}/{key}.lora_{{}}.weight" for name, key in keys.items()}


def _is_of_experts(key: str, config: Any) -> bool:
    """Whether a tensor is a stack, or prototypes of a router of every layer."""
    kinds = ("lora_A", "lora_B", "prototypes") if config.routes_by_layer else ("lora_A", "lora_B")
    return key.rpartition(".")[2] in kinds


def _prototype_keys(config: Any) -> set[str]:
    """Give the names of the prototypes in layout `full`; none where the router is of another kind."""
    modules = config.adapted_modules() if config.routes_by_layer else ()
    return {f"foundation.{module}.prototypes" for module in modules}


def _foundation(weights: dict[str, StoredTensor], config: Any) -> dict[str, StoredTensor]:
    """Give the foundation's tensors by their own names."""
    return {
        key.removeprefix("foundation.").replace(".base_layer.", "."): tensor
        for key, tensor in weights.items()
        if key.startswith("foundation.") and not _is_of_experts(key, config)
    }


def _adapter_weights(folder: SourceFolder, config: Any) -> dict[str, StoredTensor]:
    """Describe the experts' tensors under `<expert>/<key>`, and the router's as in layout `full`."""
    from dylora_moe.modeling.saving_dylora_moe import peft_config

    weights = {}
    for index, entry in enumerate(config.expert_configs):
        name = entry["name"]
        place = f"experts/{name}"
        written = peft_config(config, index, False)
        earlier = {**entry, "target_parameters": entry["target_parameters"] or None}
        _check_adapter_config(folder, f"{place}/adapter_config.json", name, (written, earlier))
        tensors = stored_tensors([folder / f"{place}/adapter_model.safetensors"])
        weights.update({f"{name}/{key}": tensor for key, tensor in tensors.items()})
    if config.has_router:
        tensors = stored_tensors([folder / "router.safetensors"])
        prefix = (ArrowRouter if config.routes_by_layer else Router).prefix
        weights.update({f"{prefix}{key}": tensor for key, tensor in tensors.items()})
    return weights


def _check_adapter_config(
    folder: SourceFolder, path: str, name: str, forms: tuple[dict[str, Any], ...]
) -> None:
    """Check that an expert's file, by which PEFT goes, means the same expert as `config.json`.

    Args:
        forms: the fields as they are written now, and as earlier versions wrote them.

    Raises:
        InputError: it is damaged, or names the field that differs.
    """
    stored = folder.read_json(path)
    fields = (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "target_modules",
        "target_parameters",
    )
    differing = [[field for field in fields if stored.get(field) != form.get(field)] for form in forms]
    if all(differing):
        field, meant = differing[0][0], str(forms[0].get(differing[0][0]))[:80]
        raise InputError(
            f"{folder / path}: {field} is {str(stored.get(field))[:80]}, config.json has {meant} for {name}; one of the two was "
            "changed"
        )


def _expert(
    folder: SourceFolder, config: Any, places: _Places, index: int, weights: dict[str, StoredTensor]
) -> Expert:
    entry = config.expert_configs[index]
    stored = {
        name: _matrices(folder, config, places, index, (name, key), weights)
        for name, key in _stored_keys(config, places, index).items()
    }
    ranks = {name: places.starts[name][index + 1] - places.starts[name][index] for name in stored}
    return Expert(
        name=entry["name"],
        layers={name: _layer(entry, name, ranks[name], pair) for name, pair in stored.items()},
        read=lambda module: tuple(matrix.read() for matrix in stored[module]),
        origin=folder.path,
        lora_dropout=entry["lora_dropout"],
        use_rslora=entry["use_rslora"],
        mature=entry["mature"],
    )


def _matrices(
    folder: SourceFolder,
    config: Any,
    places: _Places,
    index: int,
    place: tuple[str, str],
    weights: dict[str, StoredTensor],
) -> tuple[StoredTensor, StoredTensor]:
    """Give A and B of one expert on one layer, as in PEFT, from either layout.

    Args:
        place: what is adapted, and the name of its tensors with {} for A and B.
    """
    from dylora_moe.modeling.stacked_experts_dylora_moe import a_as_in_peft, b_as_in_peft

    start, stop = places.starts[place[0]][index : index + 2]
    rank, name = stop - start, places.names[index]
    is_full, is_stacked = config.weights_layout == "full", place[0] in places.stacked
    rows = places.starts[place[0]][-1] if is_full else rank
    found = []
    for matrix, as_in_peft in (("A", a_as_in_peft), ("B", b_as_in_peft)):
        key = place[1].format(matrix)
        if key not in weights:
            raise InputError(
                f"{folder}: config.json says that expert {name} adapts {place[0]}, but {key} is missing"
            )
        tensor = weights[key]
        size = tensor.shape[1 if matrix == "B" and not is_full else 0] if tensor.shape else 0
        fits = size == rows or (is_stacked and not is_full and size and size % rows == 0)
        if len(tensor.shape) != (3 if is_full and is_stacked else 2) or not fits:
            raise InputError(
                f"{folder}: {key} is {list(tensor.shape)}, but the ranks in config.json sum up to {rows} there"
            )
        if is_full:
            tensor = _changed(tensor.rows(start, stop), as_in_peft)
        found.append(tensor)
    return tuple(found)


def _changed(tensor: StoredTensor, change: Callable[[torch.Tensor], torch.Tensor]) -> StoredTensor:
    shape = tuple(change(torch.empty(tensor.shape, device="meta")).shape)
    return StoredTensor(shape, tensor.dtype, lambda: change(tensor.read()))


def _layer(entry: dict, name: str, rank: int, matrices: tuple[StoredTensor, StoredTensor]) -> AdaptedLayer:
    lora_a, lora_b = matrices
    return AdaptedLayer(
        rank=rank,
        lora_alpha=entry["alpha_pattern"].get(name, entry["lora_alpha"]),
        in_features=lora_a.shape[1],
        out_features=lora_b.shape[0],
        dtype=torch.promote_types(lora_a.dtype, lora_b.dtype),
        num_stacked=lora_a.shape[0] // rank if name in entry["target_parameters"] else 0,
    )


def _router(
    folder: SourceFolder, config: Any, experts: list[Expert], weights: dict[str, StoredTensor]
) -> Router | ArrowRouter | None:
    if not config.has_router:
        return None
    if config.routes_by_layer:
        return _arrow(folder, config, experts, weights)
    keys = ("router.gate.weight", "router.gate.bias")
    for key in keys:
        if key not in weights:
            raise InputError(
                f"{folder}: config.json says there is a router (router_input), but {key} is missing"
            )
    shape = weights[keys[0]].shape
    if len(shape) != 2 or shape[0] != config.num_experts:
        raise InputError(
            f"{folder}: {keys[0]} is {list(shape)}, but config.json has {config.num_experts} experts"
        )
    fitting = getattr(config, "router_fitting", None)
    return Router(
        read=lambda: (weights[keys[0]].read(), weights[keys[1]].read()),
        num_experts=shape[0],
        hidden_size=shape[1],
        router_input=config.router_input,
        num_experts_per_tok=config.num_experts_per_tok,
        router_temperature=config.router_temperature,
        router_mode=config.router_mode,
        router_aux_loss_coef=config.router_aux_loss_coef,
        fitting=fitting if isinstance(fitting, dict) else None,
    )


def _arrow(
    folder: SourceFolder, config: Any, experts: list[Expert], weights: dict[str, StoredTensor]
) -> ArrowRouter:
    router = ArrowRouter(
        num_stored=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        router_temperature=config.router_temperature,
        router_mode=config.router_mode,
    )
    for name, shape in router.shapes(experts).items():
        key = f"{router.prefix}{name}"
        if key not in weights:
            raise InputError(
                f"{folder}: config.json says that the router is of kind arrow, but {key} is missing"
            )
        if weights[key].shape != shape:
            raise InputError(
                f"{folder}: {key} is {list(weights[key].shape)}, and the experts ask for {list(shape)}"
            )
        router.stored[name.removesuffix(".prototypes")] = weights[key]
    return router
