"""Reads back a repo that this package exported, layout `full`, with this package's own classes and never the repo's code.

    config.json              model_type "dylora_moe", base_config, expert_configs, router_*
    model.safetensors        (or shards with model.safetensors.index.json) foundation.<module>.base_layer.weight,
                             foundation.<module>.lora_A [R, in], ….lora_B [R, out], router.gate.weight, router.gate.bias
    generation_config.json   routing_strategy

It knows the names of the model's parameters and nothing about other formats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .errors import InputError, one_line
from .mixture import AdaptedLayer, Expert, FoundationReference, Mixture, ReadOptions, Router
from .tensor_files import TensorFile, read_json


FORMAT = "exported repo"
DESCRIPTION = "config.json with model_type dylora_moe, model.safetensors"

MODEL_TYPE = "dylora_moe"

# Of what an export, or saving the model, leaves in a folder.
REPO_SUFFIXES = (".safetensors", ".json", ".py", ".jinja", ".model", ".tiktoken")
REPO_FILES = ("README.md", "LICENSE", ".gitattributes", "merges.txt", "vocab.txt", "vocab.bpe")
REPO_FOLDERS = ("experts", "__pycache__", "additional_chat_templates")


def recognise(folder: Path) -> str | None:
    """Why this folder is an exported repo, or None. Tensor names decide, `model_type` only where there are none."""
    if not (folder / "config.json").is_file() or not weight_files(folder):
        return None
    for path in weight_files(folder):
        for key in TensorFile(path).keys():  # noqa: SIM118
            if key.startswith("foundation.") and key.endswith(".lora_A"):
                return f"{path.name} holds {key}"
    if is_exported_repo(folder):
        return f"config.json has model_type {MODEL_TYPE}"
    return None


def is_exported_repo(folder: Path) -> bool:
    """Whether `config.json` says that this package wrote the folder. Never raises."""
    try:
        return read_json(folder / "config.json").get("model_type") == MODEL_TYPE
    except InputError:
        return False


def is_replaceable(folder: Path) -> bool:
    """Whether a folder is an exported repo and nothing else, so that replacing it loses nothing.

    Raises:
        InputError: it is one, and holds other things too; names them.
    """
    if not is_exported_repo(folder):
        return False
    others = strangers(folder)
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        raise InputError(
            f"{folder} is an exported repo that holds other things too ({', '.join(others[:4])}{more}), which would be "
            "lost; move them, or choose another output folder"
        )
    return True


def strangers(folder: Path) -> list[str]:
    """What lies in a repo's folder and is nothing that an export writes; whoever replaces the repo would lose it."""
    found = []
    for path in sorted(folder.iterdir()):
        known = path.suffix in REPO_SUFFIXES or path.name in REPO_FILES
        if (path.is_dir() and path.name not in REPO_FOLDERS) or (not path.is_dir() and not known):
            found.append(path.name + ("/" if path.is_dir() else ""))
    return found


def weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards that the index names, in order."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [path for path in [folder / "model.safetensors"] if path.is_file()]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index} has no weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{index} names the shard {name!r}, which is not in {folder}")
    return [folder / name for name in names]


def load_config(folder: Path):
    """The repo's config, as this package's own class.

    Raises:
        InputError: it is another model's config, or not valid.
    """
    from dylora_moe.modeling import DyloraMoeConfig

    if not is_exported_repo(folder):
        raise InputError(f"{folder} is not an exported repo: its config.json does not have model_type {MODEL_TYPE}")
    try:
        return DyloraMoeConfig.from_pretrained(folder)
    except Exception as error:  # any wrong field may make the config class fail in its own way
        raise InputError(f"{folder}/config.json is not a valid config: {one_line(error)}") from error


def stored_routing_strategy(folder: Path, config: Any) -> str:
    """The strategy that the repo starts with, in canonical form (experts by number).

    Raises:
        InputError: `generation_config.json` names one that the repo cannot do.
    """
    from dylora_moe.modeling.routing_strategies_dylora_moe import resolve_routing_strategy

    path = folder / "generation_config.json"
    stored = read_json(path).get("routing_strategy") if path.is_file() else None
    try:
        return str(resolve_routing_strategy(stored, config))
    except ValueError as error:
        raise InputError(f"{path}: {one_line(error, 500)}") from error


def read(folders: list[Path], names: list[str], reason: str, options: ReadOptions) -> Mixture:
    """Describe one exported repo; tensors stay on disk.

    Raises:
        InputError: config and weights contradict each other, or a file is damaged.
    """
    if len(folders) > 1:
        raise InputError(f"{folders[0]} is an exported repo; export one at a time")
    folder = folders[0]
    if options.lora_alpha is not None:
        raise InputError("an exported repo states its alphas; leave out --lora_alpha")
    if options.base_model is not None:
        raise InputError("an exported repo carries its foundation; leave out --base_model")
    config = load_config(folder)
    if config.weights_layout != "full":
        raise InputError(f"{folder}/config.json: weights_layout is {config.weights_layout!r}; only 'full' can be read")
    weights = {key: file for path in weight_files(folder) for file in [TensorFile(path)] for key in file.keys()}  # noqa: SIM118
    if not weights:
        raise InputError(f"{folder} has a config.json but no model.safetensors")
    return Mixture(
        format=FORMAT,
        reason=reason,
        folders=folders,
        experts=[_expert(folder, config, index, weights) for index in range(config.num_experts)],
        router=_router(folder, config, weights),
        foundation=FoundationReference(
            name=config.base_model_name_or_path,
            revision=config.base_model_revision,
            named_in=folder / "config.json",
        ),
        load_model=lambda dtype: load_model(folder, dtype),
        routing_strategy=stored_routing_strategy(folder, config),
    )


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The whole model, in `dtype`, or every tensor as it is stored.

    Raises:
        InputError: tensors are missing, unknown or of other shapes than the config says.
    """
    from dylora_moe.modeling import DyloraMoeForCausalLM

    try:
        model, info = DyloraMoeForCausalLM.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    except Exception as error:  # transformers raises many kinds for a damaged folder
        raise InputError(f"{folder} cannot be loaded: {one_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise InputError(f"{folder}: {kind.replace('_', ' ')} in its weights: {sorted(map(str, info[kind]))[:3]}")
    if dtype is None:
        _restore_stored_dtypes(model, folder)
    return model


def _restore_stored_dtypes(model: Any, folder: Path) -> None:
    """transformers casts everything to one dtype; experts stored in a finer one than the foundation get it back."""
    parameters = dict(model.named_parameters())
    for path in weight_files(folder):
        file = TensorFile(path)
        for key in file.keys():  # noqa: SIM118
            if key in parameters and parameters[key].dtype != file.dtype(key):
                parameters[key].data = file.read(key)


def _expert(folder: Path, config: Any, index: int, weights: dict[str, TensorFile]) -> Expert:
    entry = config.expert_configs[index]
    layers, rows = {}, {}
    for module in entry["target_modules"]:
        layout = config.rank_layout(module)
        start = sum(rank for rank, _ in layout[:index])
        rows[module] = (start, start + layout[index][0])
        layers[module] = _layer(folder, entry, module, sum(rank for rank, _ in layout), weights)

    def read_matrices(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        stack_a, stack_b = (f"foundation.{module}.lora_{matrix}" for matrix in "AB")
        matrix_a = weights[stack_a].read_rows(stack_a, *rows[module])
        return matrix_a, weights[stack_b].read_rows(stack_b, *rows[module]).T

    return Expert(
        name=entry["name"],
        layers=layers,
        read=read_matrices,
        origin=folder,
        lora_dropout=entry["lora_dropout"],
        use_rslora=entry["use_rslora"],
        mature=entry["mature"],
    )


def _layer(folder: Path, entry: dict, module: str, total_rank: int, weights: dict[str, TensorFile]) -> AdaptedLayer:
    shapes = []
    for matrix in "AB":
        key = f"foundation.{module}.lora_{matrix}"
        if key not in weights:
            raise InputError(
                f"{folder}: config.json says that expert {entry['name']} adapts {module}, but {key} is missing"
            )
        shapes.append(weights[key].shape(key))
        if len(shapes[-1]) != 2 or shapes[-1][0] != total_rank:
            raise InputError(
                f"{folder}: {key} is {list(shapes[-1])}, but the ranks in config.json sum up to {total_rank} there"
            )
    return AdaptedLayer(
        rank=entry["rank_pattern"].get(module, entry["r"]),
        lora_alpha=entry["alpha_pattern"].get(module, entry["lora_alpha"]),
        in_features=shapes[0][1],
        out_features=shapes[1][1],
        dtype=weights[f"foundation.{module}.lora_A"].dtype(f"foundation.{module}.lora_A"),
    )


def _router(folder: Path, config: Any, weights: dict[str, TensorFile]) -> Router | None:
    if config.router_input is None:
        return None
    keys = ("router.gate.weight", "router.gate.bias")
    for key in keys:
        if key not in weights:
            raise InputError(f"{folder}: config.json says there is a router (router_input), but {key} is missing")
    shape = weights[keys[0]].shape(keys[0])
    if len(shape) != 2 or shape[0] != config.num_experts:
        raise InputError(f"{folder}: {keys[0]} is {list(shape)}, but config.json has {config.num_experts} experts")
    return Router(
        read=lambda: (weights[keys[0]].read(keys[0]), weights[keys[1]].read(keys[1])),
        num_experts=shape[0],
        hidden_size=shape[1],
        router_input=config.router_input,
        num_experts_per_tok=config.num_experts_per_tok,
        router_temperature=config.router_temperature,
        router_mode=config.router_mode,
        router_aux_loss_coef=config.router_aux_loss_coef,
    )
