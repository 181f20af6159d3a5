"""Reads LoRA adapters as PEFT's `save_pretrained` writes them; each adapter becomes one expert.

    adapter_config.json           peft_type LORA, r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, …
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight [r, in], ….lora_B.weight [out, r]
    (or adapter_model.bin)

An adapter that was trained on a quantised foundation (QLoRA) is such a folder, too; `adalora` converts what
AdaLoRA (peft_type ADALORA) stores. Which layers are adapted and with which rank is read from the tensors, so
every way of writing `target_modules` works. What is more than a plain low-rank sum is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..foundation.layer_names import PREFIX, why_unreadable
from ..foundation.stacked_experts import parameters_of
from ..sources.source_folder import SourceFolder
from ..sources.source_options import ReadOptions
from ..tensors.mixture import AdaptedLayer, Expert, FoundationReference, Mixture, natural_order
from ..tensors.stored_tensors import StoredTensor, of_file
from ..tensors.tensor_files import TensorFile
from . import adalora
from .peft_fields import NamePatterns, check_expression, check_fields
from .training_run import number, pair_shapes


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


def recognise(folder: SourceFolder) -> str | None:
    """Say why this folder holds LoRA adapters, or None.

    Tensor names decide, `peft_type` only where there are none.
    """
    places = adapter_folders(folder)
    if not places:
        weights = weight_file(folder)
        return None if weights is None else f"{weights.name} is there"
    first = places[0]
    within = "" if first is folder else f"{first.path.name}/"
    weights = weight_file(first)
    if weights is None:
        return f"{within}adapter_config.json is there"
    key = holds_matrices(weights)
    if key is None:
        return f"{within}adapter_config.json lies beside {weights.name}"
    return f"{within}{weights.name} holds {key}"


def holds_matrices(path: Path) -> str | None:
    """Give the first LoRA tensor of a file, or None."""
    return next((key for key in TensorFile(path).keys() if ".lora_" in key), None)  # noqa: SIM118


def adapter_folders(folder: SourceFolder) -> list[SourceFolder]:
    """Find the adapters: the folder itself if it is one, else those of its direct sub-folders that are.

    The checkpoints of one training run are states of one adapter, not several adapters.
    """
    if folder.has("adapter_config.json"):
        return [folder]
    found = [
        place
        for place in folder.folders(holding="adapter_config.json")
        if not CHECKPOINT.fullmatch(place.path.name)
    ]
    return sorted(found, key=lambda place: natural_order(place.path.name))


def weight_file(folder: SourceFolder) -> Path | None:
    """Give the file of an adapter's tensors; None where there is none."""
    return next((folder / name for name in WEIGHT_FILES if folder.has(name)), None)


def read(folders: list[SourceFolder], options: ReadOptions) -> Mixture:
    """Describe one or several adapter folders, or folders of several adapters; tensors stay on disk.

    Raises:
        InputError: an adapter is damaged, or is of a kind that is refused.
    """
    places: list[SourceFolder] = []
    for folder in folders:
        inside = adapter_folders(folder)
        if not inside:
            raise InputError(
                f"{folder} has {weight_file(folder).name} but no adapter_config.json, which holds lora_alpha"
            )
        places += inside
    if options.lora_alpha is not None:
        raise InputError("PEFT adapters state their alpha in adapter_config.json; leave out --lora_alpha")
    problems: list[str] = []
    configs = [(place, read_config(place)) for place in places]
    experts = [read_expert(place.name, place, config) for place, config in configs]
    return Mixture(
        format=FORMAT,
        folders=places,
        experts=experts,
        router=None,
        foundation=same_foundation(configs, options, problems),
        problems=problems,
        notes=_notes(places),
    )


def read_config(folder: SourceFolder) -> dict[str, Any]:
    """Read `adapter_config.json`, and make certain that it describes a low-rank sum.

    Raises:
        InputError: it is damaged, or names what cannot be an expert.
    """
    path = folder / "adapter_config.json"
    config = folder.read_json(path.name)
    if config.get("peft_type") not in ("LORA", "ADALORA"):
        raise InputError(
            f"{path}: peft_type is {config.get('peft_type')!r}; only LORA and ADALORA adapters can be exported"
        )
    check_fields(path, config)
    number(config.get("lora_dropout") or 0.0, f"{path}: lora_dropout")
    if config.get("use_rslora") not in (
        None,
        True,
        False,
    ):  # PEFT takes any text for true, "false" among them
        raise InputError(f"{path}: use_rslora is {str(config['use_rslora'])[:80]!r}, expected true or false")
    if _is_adalora(config):
        adalora.check_config(path, config)
        return config
    for field in ("r", "lora_alpha"):
        number(config.get(field), f"{path}: {field}")
    for field in ("rank_pattern", "alpha_pattern"):
        for key, value in (config.get(field) or {}).items():
            number(value, f"{path}: {field} of {key}")
    return config


def _is_adalora(config: dict[str, Any]) -> bool:
    return config["peft_type"] == "ADALORA"


def read_expert(name: str, folder: SourceFolder, config: dict[str, Any], is_nested: bool = False) -> Expert:
    """Describe one adapter folder as an expert; tensors stay on disk.

    Args:
        config: what `read_config` gave.
        is_nested: whether it is one of a trainer's checkpoint, whose files may hold other experts' tensors, too.

    Raises:
        InputError: the tensors are damaged, no plain low-rank sum, or not those of the config.
    """
    path = weight_file(folder)
    if path is None:
        raise InputError(
            f"{folder} has adapter_config.json but neither {WEIGHT_FILES[0]} nor {WEIGHT_FILES[1]}"
        )
    file = TensorFile(path)
    pattern = adalora.MATRIX if _is_adalora(config) else MATRIX
    keys, copied = _sorted(file, pattern, OTHER_ADAPTER if is_nested else None)
    if not keys:
        raise InputError(f"{path} holds no LoRA matrices; the adapter was saved empty")
    if _is_adalora(config):
        return Expert(
            name=name,
            layers=adalora.layers(file, keys, config, folder.path),
            read=lambda module: adalora.read(file, keys[module]),
            origin=folder.path,
            lora_dropout=config.get("lora_dropout") or 0.0,
            copied_weights=copied,
            is_adalora=True,
        )
    scales = _Scales(folder, config)
    parameters = _parameters(file, keys, config, scales)
    keys = {parameters.get(module, module): matrices for module, matrices in keys.items()}
    stacked = set(parameters.values())
    return Expert(
        name=name,
        layers={
            module: _layer(file, module, matrices, scales, module in stacked)
            for module, matrices in keys.items()
        },
        read=lambda module: (file.read(keys[module]["A"]), file.read(keys[module]["B"])),
        origin=folder.path,
        lora_dropout=config.get("lora_dropout") or 0.0,
        use_rslora=bool(config.get("use_rslora", False)),
        copied_weights=copied,
        alpha_of=scales.alpha,
        peft_version=str(config.get("peft_version") or ""),
    )


def _sorted(
    file: TensorFile, pattern: re.Pattern, passed_over: re.Pattern | None
) -> tuple[dict[str, dict[str, str]], dict[str, StoredTensor]]:
    """Map module to {"A": key, "B": key}, for AdaLoRA also "E"; and give the foundation's own tensors.

    PEFT saves an adapted head whole, and with `save_embedding_layers` the embeddings. Only the foundation can
    tell whether they were trained.

    Raises:
        InputError: names the first tensor that is neither.
    """
    keys: dict[str, dict[str, str]] = {}
    copied, unknown = {}, []
    for key in sorted(file.keys(), key=natural_order):
        if (passed_over is not None and passed_over.fullmatch(key)) or key.endswith(BACKWARD_ALONE):
            continue
        if why_unreadable(key) is not None:
            raise InputError(f"{file.path}: {key} cannot be read: {why_unreadable(key)}")
        match = pattern.fullmatch(key)
        if match is not None:
            keys.setdefault(match["module"], {})[match["matrix"]] = key
        elif key.startswith(PREFIX) and ".lora_" not in key and not key.endswith(".ranknum"):
            copied[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = of_file(file, key)
        else:
            unknown.append(key)
    if unknown:
        raise InputError(
            f"{file.path}: {unknown[0]} is {_what_it_is(unknown[0])}; only lora_A and lora_B of linear layers can be exported"
        )
    return keys, copied


def _parameters(
    file: TensorFile, keys: dict[str, dict[str, str]], config: dict[str, Any], scales: _Scales
) -> dict[str, str]:
    """Map names of layers on stacked experts, as the keys have them, to the parameters that they are for."""

    def is_linear(name: str) -> bool:
        matrices = keys[name]
        return "A" in matrices and file.shape(matrices["A"])[:1] == (scales.rank(name),)

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
    scales: _Scales,
    is_stacked: bool,
) -> AdaptedLayer:
    stored = {matrix: of_file(file, key) for matrix, key in matrices.items()}
    for tensor in stored.values():
        if len(tensor.shape) > 2:
            raise InputError(
                f"{file.path}: {module} is a convolution ({list(tensor.shape)}); only linear layers can be exported"
            )
    shape_a, shape_b = pair_shapes(f"{file.path}: {module}", stored)
    rank = scales.rank(module)
    if shape_a[0] != rank and not (is_stacked and rank > 0 and shape_a[0] % rank == 0):
        raise InputError(
            f"{file.path}: {module} has rank {shape_a[0]}, {scales.path} says {rank}; "
            "the two do not belong together"
        )
    return AdaptedLayer(
        rank=rank,
        lora_alpha=scales.alpha(module),
        in_features=shape_a[1],
        out_features=shape_b[0],
        dtype=torch.promote_types(file.dtype(matrices["A"]), file.dtype(matrices["B"])),
        num_stacked=shape_a[0] // rank if is_stacked else 0,
    )


class _Scales:
    """Ranks and alphas of one adapter's layers, by `rank_pattern` and `alpha_pattern` as PEFT reads them."""

    def __init__(self, folder: SourceFolder, config: dict[str, Any]):
        self.path = folder / "adapter_config.json"
        self._config = config
        self._parameters = set(config.get("target_parameters") or ())
        if isinstance(config.get("target_modules"), str):
            check_expression(config["target_modules"], f"{self.path}: target_modules")
        self._ranks = NamePatterns(config.get("rank_pattern"), f"{self.path}: a key of rank_pattern")
        self._alphas = NamePatterns(config.get("alpha_pattern"), f"{self.path}: a key of alpha_pattern")

    def rank(self, module: str) -> int:
        """Give the rank of a layer."""
        return self._ranks.find(self._target(module), self._config["r"])

    def alpha(self, module: str) -> float:
        """Give the alpha of a layer."""
        return self._alphas.find(self._target(module), self._config["lora_alpha"])

    def _target(self, module: str) -> str:
        """Give what PEFT looks up: the layer, or its weight where that is what it adapts."""
        parts = f"{module}.weight".split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        return f"{module}.weight" if any(end in self._parameters for end in ends) else module


def same_foundation(
    configs: list[tuple[SourceFolder, dict[str, Any]]], options: ReadOptions, problems: list[str]
) -> FoundationReference:
    """Give the foundation that the adapters name; a problem where they name several.

    Args:
        configs: of each adapter its folder and `adapter_config.json`.
    """
    named = [
        (folder, (config.get("base_model_name_or_path"), config.get("revision")))
        for folder, config in configs
    ]
    first, (name, revision) = named[0]
    for folder, reference in named:
        if reference != (name, revision) and options.base_model is None:
            problems.append(
                f"the adapters name different base models: {_called((name, revision))} in {first}, {_called(reference)} in "
                f"{folder}; if they are the same model, say which with --base_model"
            )
            break
    return FoundationReference(name=name or None, revision=revision, named_in=first / "adapter_config.json")


def _called(reference: tuple[str | None, str | None]) -> str:
    name, revision = reference
    return f"{name!r}" if revision is None else f"{name!r} at revision {revision!r}"


def _notes(folders: Iterable[SourceFolder]) -> list[str]:
    notes = []
    for folder in folders:
        others = [place.path.name for place in folder.folders(holding="adapter_config.json")]
        if others:
            notes.append(
                f"{folder} has further adapters in {', '.join(others)}; give those folders as sources to include them"
            )
    return notes
