"""Reads LoRA adapters as PEFT's `save_pretrained` writes them; each adapter becomes one expert.

    adapter_config.json           peft_type LORA, r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, …
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight [r, in], ….lora_B.weight [out, r]
    (or adapter_model.bin)

An adapter that was trained on a quantised foundation (QLoRA) is such a folder, too; what AdaLoRA (peft_type ADALORA)
stores, adalora makes the same of. Which layers are adapted and with which rank is read from the tensors, so every way of
writing `target_modules` works.
What is more than a plain low-rank sum is refused by name. It knows nothing about other formats or about the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import adalora
from .containment import contained
from .errors import InputError
from .mixture import AdaptedLayer, Expert, FoundationReference, Mixture, ReadOptions, natural_order
from .patterns import LONGEST_NAME, check_pattern
from .tensor_files import TensorFile, read_json
from .training_run import number


FORMAT = "PEFT LoRA adapters"
DESCRIPTION = "adapter_config.json with adapter_model.safetensors or adapter_model.bin, one or more such folders"

# Older versions of PEFT match names by their beginning, so that what they save of expert_1 holds expert_10's, too.
OTHER_ADAPTER = re.compile(r".+\.lora_[ABE]\.expert_\d+(\.weight)?")
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# of the folders that a training run saves its states under
CHECKPOINT = re.compile(r"best_model|checkpoint-\d+")
MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")

# fields that make an adapter more than a low-rank sum, with what to call them
REFUSED_FIELDS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow routing",
    "megatron_config": "Megatron layers",
}
# fields that say how training went or where the adapter sits; they leave what it computes as it is
HARMLESS_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# initialisations that leave the foundation's own weights alone; PiSSA, OLoRA, CorDA, LoftQ and others change them
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def recognise(folder: Path) -> str | None:
    """Why this folder holds LoRA adapters, or None. Tensor names decide, `peft_type` only where there are none."""
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
        path.parent for path in folder.glob("*/adapter_config.json") if not CHECKPOINT.fullmatch(path.parent.name)
    ]
    return sorted(found, key=lambda path: natural_order(path.name))


def weight_file(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def _within(place: Path, folder: Path) -> str:
    return "" if place == folder else f"{place.name}/"


def read(folders: list[Path], names: list[str], reason: str, options: ReadOptions) -> Mixture:
    """Describe one or several adapter folders; tensors stay on disk.

    Args:
        names: what the folders are called, one per folder; a folder of several adapters gives its sub-folders' names.

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
    for field, meaning in REFUSED_FIELDS.items():
        if config.get(field):
            raise InputError(f"{path}: {field} is set: {meaning} is not a plain low-rank sum and cannot be an expert")
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{path}: bias is {config['bias']!r}: trained biases cannot be an expert, only bias 'none' can"
        )
    initialisation = config.get("init_lora_weights", True)
    if initialisation not in PLAIN_INITIALISATIONS:
        raise InputError(
            f"{path}: init_lora_weights is {initialisation!r}, which changes the foundation's own weights; convert the "
            "adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…) first"
        )
    harmless = HARMLESS_FIELDS | adalora.HARMLESS_FIELDS if _is_adalora(config) else HARMLESS_FIELDS
    for field, value in config.items():
        if field not in harmless and field not in REFUSED_FIELDS and value:
            raise InputError(
                f"{path}: {field} is {value!r}, a field that may change what the adapter computes; it is not known"
            )
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
    """What PEFT takes as regular expressions: a text, and of the fields that may be lists only `layers_pattern`'s."""
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
        raise InputError(f"{folder} has adapter_config.json but neither {WEIGHT_FILES[0]} nor {WEIGHT_FILES[1]}")
    file = TensorFile(contained(root or folder, path))
    pattern = adalora.MATRIX if _is_adalora(config) else MATRIX
    keys = _matrix_keys(file, pattern, None if root is None else OTHER_ADAPTER)
    if not keys:
        raise InputError(f"{path} holds no LoRA matrices; the adapter was saved empty")
    if _is_adalora(config):
        return Expert(
            name=name,
            layers=adalora.layers(file, keys, config, folder),
            read=lambda module: adalora.read(file, keys[module]),
            origin=folder,
            lora_dropout=config.get("lora_dropout") or 0.0,
        )
    return Expert(
        name=name,
        layers={module: _layer(file, module, matrices, config, folder) for module, matrices in keys.items()},
        read=lambda module: (file.read(keys[module]["A"]), file.read(keys[module]["B"])),
        origin=folder,
        lora_dropout=config.get("lora_dropout") or 0.0,
        use_rslora=bool(config.get("use_rslora", False)),
    )


def _matrix_keys(file: TensorFile, pattern: re.Pattern, passed_over: re.Pattern | None) -> dict[str, dict[str, str]]:
    """Module to {"A": key, "B": key}, for AdaLoRA also "E"; any other tensor is refused by what it is."""
    names = [key for key in file.keys() if passed_over is None or passed_over.fullmatch(key) is None]  # noqa: SIM118
    strange = [key for key in names if pattern.fullmatch(key) is None]
    if strange:
        # an adapted embedding comes with its whole weight; the former says more
        key = min(strange, key=lambda key: ".lora_" not in key)
        raise InputError(
            f"{file.path}: {key} is {_what_it_is(key)}; only lora_A and lora_B of linear layers can be exported"
        )
    keys: dict[str, dict[str, str]] = {}
    for key in sorted(names, key=natural_order):
        match = pattern.fullmatch(key)
        keys.setdefault(match["module"], {})[match["matrix"]] = key
    return keys


def _what_it_is(key: str) -> str:
    if "lora_embedding_" in key:
        return "LoRA on an embedding"
    if "lora_magnitude_vector" in key:
        return "a DoRA magnitude"
    if key.endswith("lora_B.bias"):
        return "a bias on lora_B"
    if ".lora_" in key:
        return "a LoRA tensor under an unknown name"
    if ".ranknum" in key:
        return "AdaLoRA's ranknum, which PEFT does not store"
    return "a whole weight (modules_to_save, or an embedding saved along)"


def _layer(
    file: TensorFile, module: str, matrices: dict[str, str], config: dict[str, Any], folder: Path
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
    rank = _by_pattern(config.get("rank_pattern") or {}, module, config["r"])
    if shape_a[0] != rank:
        raise InputError(
            f"{file.path}: {module} has rank {shape_a[0]}, {folder}/adapter_config.json says {rank}; "
            "the two do not belong together"
        )
    return AdaptedLayer(
        rank=rank,
        lora_alpha=_by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"]),
        in_features=shape_a[1],
        out_features=shape_b[0],
        dtype=torch.promote_types(file.dtype(matrices["A"]), file.dtype(matrices["B"])),
    )


def _by_pattern(pattern: dict[str, Any], module: str, otherwise: Any) -> Any:
    """A layer's rank or alpha: the first key that, as a regular expression, matches the end of the module's name.

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
