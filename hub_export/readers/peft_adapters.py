"""Reads LoRA adapters as PEFT's `save_pretrained` writes them; each adapter becomes one expert.

    adapter_config.json           peft_type LORA, r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, …
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight [r, in], ….lora_B.weight [out, r]
    (or adapter_model.bin)

An adapter that was trained on a quantised foundation (QLoRA) is such a folder, too; what AdaLoRA (peft_type
ADALORA) stores, adalora makes the same of. Which layers are adapted and with which rank is read from the
tensors, so every way of writing `target_modules` works.
What is more than a plain low-rank sum is refused by name. It knows nothing about other formats or about the
model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..foundation.layer_names import PREFIX, why_unreadable
from ..foundation.stacked_experts import parameters_of
from ..tensors.containment import contained
from ..tensors.mixture import AdaptedLayer, Expert, FoundationReference, Mixture, ReadOptions, natural_order
from ..tensors.stored_tensors import StoredTensor, of_file
from ..tensors.tensor_files import TensorFile, read_json
from . import adalora
from .patterns import LONGEST_NAME, check_pattern
from .peft_fields import check_fields
from .training_run import number


FORMAT = "PEFT LoRA adapters"
DESCRIPTION = (
    "adapter_config.json with adapter_model.safetensors or adapter_model.bin, one or more such folders"
)

# Older versions of PEFT match names by their beginning, so that what they save of expert_1 holds expert_10's,
# too.
OTHER_ADAPTER = re.compile(r".+\.lora_[ABE]\.expert_\d+(\.weight)?")
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# of the folders that a training run saves its states under
CHECKPOINT = re.compile(r"best_model|checkpoint-\d+")
BACKWARD_ALONE = ".lora_velora_embed"  # what VeLoRA's backward pass needs
MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")


def recognise(folder: Path) -> str | None:
    """Why this folder holds LoRA adapters, or None. Tensor names decide, `peft_type` only where there are
    none."""
    for place in adapter_folders(folder):
        weights = weight_file(place)
        if weights is None:
            return f"{_within(place, folder)}adapter_config.json is there"
        key = holds_matrices(contained(folder, weights))
        if key is not None:
            return f"{_within(place, folder)}{weights.name} holds {key}"
        return f"{_within(place, folder)}adapter_config.json lies beside {weights.name}"
    if weight_file(folder) is not None:
        return f"{weight_file(folder).name} is there"
    return None


def holds_matrices(path: Path) -> str | None:
    """The first LoRA tensor of a file, or None."""
    return next((key for key in TensorFile(path).keys() if ".lora_" in key), None)  # noqa: SIM118


def adapter_folders(folder: Path) -> list[Path]:
    """The folder itself if it is an adapter, else those of its direct sub-folders that are.

    The checkpoints of one training run are states of one adapter, not several adapters.
    """
    if (folder / "adapter_config.json").is_file():
        return [folder]
    found = [
        path.parent
        for path in folder.glob("*/adapter_config.json")
        if not CHECKPOINT.fullmatch(path.parent.name)
    ]
    return sorted(found, key=lambda path: natural_order(path.name))


def weight_file(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def _within(place: Path, folder: Path) -> str:
    return "" if place == folder else f"{place.name}/"


def read(folders: list[Path], names: list[str], reason: str, options: ReadOptions) -> Mixture:
    """Describe one or several adapter folders; tensors stay on disk.

    Args:
        names: what the folders are called, one per folder; a folder of several adapters gives its
            sub-folders' names.

    Raises:
        InputError: an adapter is damaged, is of a kind that is refused, or names clash.
    """
    places: list[tuple[str, Path]] = []
    for name, folder in zip(names, folders, strict=True):
        inside = adapter_folders(folder)
        if not inside:
            raise InputError(
                f"{folder} has {weight_file(folder).name} but no adapter_config.json, which holds lora_alpha"
            )
        places += [(name, folder)] if inside == [folder] else [(path.name, path) for path in inside]
    if options.lora_alpha is not None:
        raise InputError("PEFT adapters state their alpha in adapter_config.json; leave out --lora_alpha")
    problems: list[str] = []
    configs = [read_config(path) for _, path in places]
    experts = [read_expert(name, path, config) for (name, path), config in zip(places, configs, strict=True)]
    return Mixture(
        format=FORMAT,
        reason=reason,
        folders=[path for _, path in places],
        experts=experts,
        router=None,
        foundation=same_foundation([path for _, path in places], configs, options, problems),
        problems=problems,
        notes=_notes([path for _, path in places]),
    )


def read_config(folder: Path, root: Path | None = None) -> dict[str, Any]:
    """`adapter_config.json`, once it is certain that it describes a low-rank sum.

    Args:
        root: the folder that files must lie in, where that is not the adapter's own.

    Raises:
        InputError: it is damaged, or names what cannot be an expert.
    """
    path = folder / "adapter_config.json"
    config = read_json(contained(root or folder, path))
    if config.get("peft_type") not in ("LORA", "ADALORA"):
        raise InputError(
            f"{path}: peft_type is {config.get('peft_type')!r}; only LORA and ADALORA adapters can be exported"
        )
    check_fields(path, config)
    number(config.get("lora_dropout") or 0.0, f"{path}: lora_dropout")
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        for pattern in _texts(config.get(field), field):  # not used here, but by PEFT in the check
            check_pattern(pattern, f"{path}: {field}")
    if _is_adalora(config):
        adalora.check_config(path, config)
        return config
    for field in ("r", "lora_alpha"):
        number(config.get(field), f"{path}: {field}")
    for field in ("rank_pattern", "alpha_pattern"):
        for key, value in (config.get(field) or {}).items():
            number(value, f"{path}: {field} of {key}")
            check_pattern(key, f"{path}: a key of {field}", prefixed=True)
    return config


def _texts(value: Any, field: str) -> list[str]:
    """What PEFT takes as regular expressions: a text, and of the fields that may be lists only
    `layers_pattern`'s."""
    if isinstance(value, str):
        return [value]
    return [text for text in value or () if isinstance(text, str)] if field == "layers_pattern" else []


def _is_adalora(config: dict[str, Any]) -> bool:
    return config["peft_type"] == "ADALORA"


def read_expert(name: str, folder: Path, config: dict[str, Any], root: Path | None = None) -> Expert:
    """One adapter folder as an expert; tensors stay on disk.

    Args:
        config: what `read_config` gave.
        root: the folder that files must lie in, where that is not the adapter's own.

    Raises:
        InputError: the tensors are damaged, no plain low-rank sum, or not those of the config.
    """
    path = weight_file(folder)
    if path is None:
        raise InputError(
            f"{folder} has adapter_config.json but neither {WEIGHT_FILES[0]} nor {WEIGHT_FILES[1]}"
        )
    file = TensorFile(contained(root or folder, path))
    pattern = adalora.MATRIX if _is_adalora(config) else MATRIX
    keys, whole = _sorted(file, pattern, None if root is None else OTHER_ADAPTER)
    if not keys:
        raise InputError(f"{path} holds no LoRA matrices; the adapter was saved empty")
    if _is_adalora(config):
        return Expert(
            name=name,
            layers=adalora.layers(file, keys, config, folder),
            read=lambda module: adalora.read(file, keys[module]),
            origin=folder,
            lora_dropout=config.get("lora_dropout") or 0.0,
            whole_weights=whole,
            is_adalora=True,
        )
    parameters = _parameters(file, keys, config)
    keys = {parameters.get(module, module): matrices for module, matrices in keys.items()}
    stacked = set(parameters.values())
    return Expert(
        name=name,
        layers={
            module: _layer(file, module, matrices, config, folder, module in stacked)
            for module, matrices in keys.items()
        },
        read=lambda module: (file.read(keys[module]["A"]), file.read(keys[module]["B"])),
        origin=folder,
        lora_dropout=config.get("lora_dropout") or 0.0,
        use_rslora=bool(config.get("use_rslora", False)),
        whole_weights=whole,
        alpha_of=partial(_alpha, config),
        peft_version=str(config.get("peft_version") or ""),
    )


def _sorted(
    file: TensorFile, pattern: re.Pattern, passed_over: re.Pattern | None
) -> tuple[dict[str, dict[str, str]], dict[str, StoredTensor]]:
    """Module to {"A": key, "B": key}, for AdaLoRA also "E", and the foundation's own tensors that lie beside
    them.

    PEFT saves an adapted head whole, and with `save_embedding_layers` the embeddings. Only the foundation can
    tell whether they were trained.

    Raises:
        InputError: names the first tensor that is neither.
    """
    keys: dict[str, dict[str, str]] = {}
    whole, strange = {}, []
    for key in sorted(file.keys(), key=natural_order):
        if (passed_over is not None and passed_over.fullmatch(key)) or key.endswith(BACKWARD_ALONE):
            continue
        if why_unreadable(key) is not None:
            raise InputError(f"{file.path}: {key} cannot be read: {why_unreadable(key)}")
        match = pattern.fullmatch(key)
        if match is not None:
            keys.setdefault(match["module"], {})[match["matrix"]] = key
        elif key.startswith(PREFIX) and ".lora_" not in key and not key.endswith(".ranknum"):
            whole[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = of_file(file, key)
        else:
            strange.append(key)
    if strange:
        raise InputError(
            f"{file.path}: {strange[0]} is {_what_it_is(strange[0])}; only lora_A and lora_B of linear layers can be exported"
        )
    return keys, whole


def _parameters(file: TensorFile, keys: dict[str, dict[str, str]], config: dict[str, Any]) -> dict[str, str]:
    """Names of layers on stacked experts, as the keys have them, and the parameters that they are for."""

    def is_linear(name: str) -> bool:
        matrices = keys[name]
        return "A" in matrices and file.shape(matrices["A"])[:1] == (_rank(config, name),)

    targets = config.get("target_parameters") or ()
    try:
        return parameters_of(keys, targets, is_linear) if targets else {}
    except InputError as error:
        raise InputError(f"{file.path}: {error}") from None


def _what_it_is(key: str) -> str:
    if "lora_embedding_" in key:
        return "LoRA on an embedding"
    if "lora_magnitude_vector" in key:
        return "a DoRA magnitude"
    if key.endswith("lora_B.bias"):
        return "a bias on lora_B"
    if not key.startswith(PREFIX):
        return (
            f"a tensor whose name lacks PEFT's {PREFIX!r} (rename the tensors by putting it before each key)"
        )
    if ".lora_" in key:
        return "a LoRA tensor under an unknown name"
    return "AdaLoRA's ranknum, which PEFT does not store"


def _layer(
    file: TensorFile,
    module: str,
    matrices: dict[str, str],
    config: dict[str, Any],
    folder: Path,
    is_stacked: bool,
) -> AdaptedLayer:
    if set(matrices) != {"A", "B"}:
        raise InputError(f"{file.path}: {module} has lora_{'/'.join(matrices)} but not both matrices")
    shape_a, shape_b = file.shape(matrices["A"]), file.shape(matrices["B"])
    if len(shape_a) > 2 or len(shape_b) > 2:
        raise InputError(
            f"{file.path}: {module} is a convolution (lora_A {list(shape_a)}); only linear layers can be exported"
        )
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or not shape_a[0]:
        raise InputError(
            f"{file.path}: {module} has lora_A {list(shape_a)} and lora_B {list(shape_b)}, "
            "expected [rank, in] and [out, rank] of one rank"
        )
    rank = _rank(config, module)
    if shape_a[0] != rank and not (is_stacked and rank > 0 and shape_a[0] % rank == 0):
        raise InputError(
            f"{file.path}: {module} has rank {shape_a[0]}, {folder}/adapter_config.json says {rank}; "
            "the two do not belong together"
        )
    return AdaptedLayer(
        rank=rank,
        lora_alpha=_alpha(config, module),
        in_features=shape_a[1],
        out_features=shape_b[0],
        dtype=torch.promote_types(file.dtype(matrices["A"]), file.dtype(matrices["B"])),
        num_stacked=shape_a[0] // rank if is_stacked else 0,
    )


def _rank(config: dict[str, Any], module: str) -> int:
    target = _target(module, config.get("target_parameters") or ())
    return _by_pattern(config.get("rank_pattern") or {}, target, config["r"])


def _alpha(config: dict[str, Any], module: str) -> float:
    target = _target(module, config.get("target_parameters") or ())
    return _by_pattern(config.get("alpha_pattern") or {}, target, config["lora_alpha"])


def _target(module: str, parameters: Iterable[str]) -> str:
    """What PEFT looks up in `rank_pattern` and `alpha_pattern`: the layer, or its weight where that is what
    it adapts."""
    weight = f"{module}.weight"
    return weight if any(weight == name or weight.endswith(f".{name}") for name in parameters) else module


def _by_pattern(pattern: dict[str, Any], module: str, otherwise: Any) -> Any:
    """A layer's rank or alpha: the first key that, as a regular expression, matches the end of the module's
    name.

    That is how PEFT reads `rank_pattern` and `alpha_pattern` (`peft.utils.get_pattern_key`).
    """
    if pattern and len(module) > LONGEST_NAME:
        raise InputError(f"{module[:LONGEST_NAME]}… is too long a name for rank_pattern and alpha_pattern")
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def same_foundation(
    folders: list[Path], configs: list[dict[str, Any]], options: ReadOptions, problems: list[str]
) -> FoundationReference:
    """The foundation that the adapters name; a problem where they name several."""
    named = {
        folder: (config.get("base_model_name_or_path"), config.get("revision"))
        for folder, config in zip(folders, configs, strict=True)
    }
    first = folders[0]
    for folder, reference in named.items():
        if reference != named[first] and options.base_model is None:
            problems.append(
                f"the adapters name different foundations: {_called(named[first])} in {first}, {_called(reference)} in "
                f"{folder}; if they are the same model, say which with --base_model"
            )
            break
    name, revision = named[first]
    return FoundationReference(name=name or None, revision=revision, named_in=first / "adapter_config.json")


def _called(reference: tuple[str | None, str | None]) -> str:
    name, revision = reference
    return f"{name!r}" if revision is None else f"{name!r} at revision {revision!r}"


def _notes(folders: Iterable[Path]) -> list[str]:
    notes = []
    for folder in folders:
        others = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        if others:
            notes.append(
                f"{folder} has further adapters in {', '.join(others)}; give those folders as sources to include them"
            )
    return notes
