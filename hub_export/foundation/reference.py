"""Finds and loads the frozen model that experts were trained on, and checks that they fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..sources.hub_and_folders import is_hub_id
from ..sources.json_files import check_model_config
from ..sources.source_folder import SourceFolder, exists, is_forbidden, open_folder
from ..tensors.mixture import AdaptedLayer, Expert, FoundationReference, Router
from ..tensors.weight_files import has_all_weights, weight_files
from .layer_names import ADAPTABLE, why_missing
from .stacked_experts import has_exchanged_sizes, shape_in


def resolve_foundation(
    reference: FoundationReference, base_model: str | None, revision: str | None
) -> FoundationReference:
    """Find where the foundation is: `base_model` if given, else what the source names.

    Local folders become absolute paths.

    A relative path is looked for from the working directory, then from the folder of the file that names it
    and from that one's parent.

    Raises:
        InputError: nothing is named, or a path that does not exist.
    """
    name = base_model if base_model is not None else reference.name
    if revision is None and base_model is None:
        revision = reference.revision
    if not name:
        raise InputError(
            f"{reference.named_in or 'the source'} names no base model; pass it with --base_model"
        )
    if not isinstance(name, str):
        raise InputError(
            f"{reference.named_in} names {name!r} as the base model, which is no folder or Hub id"
        )
    named_in = reference.named_in if base_model is None else None
    path = _local_folder(name, named_in)
    if path is not None:
        return FoundationReference(
            str(path),
            None,
            named_in,
            reference.vocab_size,
            comes_with_source=named_in is not None and _comes_with(path, name, named_in),
        )
    if not is_hub_id(name):
        where = "--base_model" if base_model is not None else f"named in {named_in}"
        why = (
            "may not be read by this user (permission denied)"
            if is_forbidden(name)
            else "does not exist here"
        )
        raise InputError(
            f"the base model {name} ({where}) {why}; pass its folder or Hub id with --base_model"
        )
    return FoundationReference(name, revision, named_in, reference.vocab_size)


def _local_folder(name: str, named_in: Path | None) -> Path | None:
    starts = [Path.cwd()]
    if named_in is not None:
        starts += [named_in.resolve().parent, named_in.resolve().parent.parent]
    for start in starts:
        try:
            folder = start / Path(name).expanduser()
            if (folder / "config.json").is_file():
                return folder.resolve()
        except (OSError, RuntimeError, ValueError):
            return None  # no path at all: too long, a null byte, an unknown user's home
    return None


def _comes_with(path: Path, name: str, named_in: Path) -> bool:
    """Whether a foundation's folder may belong to the source that names it: it lies in it, or its name is relative.

    Even one that is found from the working directory may have been downloaded with the source.
    """
    return named_in.resolve().parent in path.parents or not Path(name).expanduser().is_absolute()


def open_foundation(reference: FoundationReference) -> SourceFolder:
    """Open a foundation's folder.

    One of this machine may consist of links to another disk; one that comes with the source may not.

    Raises:
        InputError: it is gone, or this user may not look into it.
    """
    try:
        return open_folder(
            reference.name,
            may_link_out=not reference.comes_with_source,
            remedy="copy it there, or pass the folder with --base_model if you trust it",
        )
    except InputError as error:
        raise InputError(not_loaded(reference, error)) from error


def is_local(reference: FoundationReference) -> bool:
    return reference.name is not None and Path(reference.name).is_absolute()


def is_available(reference: FoundationReference) -> bool:
    """Whether the foundation's weights are on this machine, in a folder or in the Hub's cache."""
    return is_local(reference) or (reference.name is not None and in_hub_cache(reference) is not None)


def in_hub_cache(reference: FoundationReference) -> SourceFolder | None:
    """Open the folder in the Hub's cache that holds config and all weights; None where it does not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(reference.name, "config.json", revision=reference.revision or "main")
    except (HFValidationError, ValueError):
        return None
    if not isinstance(config, str):  # it is not there, or known not to be on the Hub either
        return None
    folder = open_folder(Path(config).parent)
    return folder if has_all_weights(folder) else None


def local_folder(reference: FoundationReference) -> SourceFolder | None:
    """Open the foundation's folder on this machine, its own or that in the Hub's cache; None where there is none."""
    if reference.name is None:
        return None
    if not is_local(reference):
        return in_hub_cache(reference)
    return open_foundation(reference) if exists(reference.name) else None


def load_foundation_config(reference: FoundationReference) -> Any:
    """Load the foundation's transformers config.

    Raises:
        InputError: it cannot be had, or needs code that transformers does not have.
    """
    from transformers import PreTrainedConfig

    from dylora_moe.modeling.configuration_dylora_moe import read_config

    if is_local(reference):
        folder = open_foundation(reference)
        try:
            folder.read_json("config.json", required=False)  # it may be of any size, or a link
        except InputError as error:
            raise InputError(f"{error}; pass another folder or Hub id with --base_model") from error
    try:
        stored, _ = PreTrainedConfig.get_config_dict(reference.name, revision=reference.revision)
        check_model_config(f"{reference.name}/config.json", stored)
        is_mixture = stored.get("model_type") == "dylora_moe"
        if not is_mixture:
            return read_config(reference.name, revision=reference.revision)
    except InputError:
        raise
    except Exception as error:  # any wrong field may make the config class fail in its own way
        raise InputError(not_loaded(reference, error)) from error
    raise InputError(
        f"{reference.name} is itself an exported mixture; pass the plain base model with --base_model"
    )


def check_can_be_had(reference: FoundationReference) -> None:
    """Check that a foundation is there, or can be fetched, without fetching its weights.

    Raises:
        InputError: it is not; names it, says why, and what to do.
    """
    load_foundation_config(reference)
    folder = local_folder(reference)
    if folder is None:
        _ask_the_hub(reference)
        return
    try:
        there = weight_files(folder) or folder.names("*.safetensors") or folder.names("*.bin")
    except InputError as error:  # a shard is missing
        raise InputError(f"{error}; pass another folder or Hub id with --base_model") from error
    if not there:
        raise InputError(not_loaded(reference, OSError(f"{folder} holds no weights")))


def _ask_the_hub(reference: FoundationReference) -> None:
    from huggingface_hub import HfApi, constants, errors

    network_errors = getattr(errors, "HTTPError", OSError)
    try:
        if constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE")
        HfApi().model_info(reference.name, revision=reference.revision)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, network_errors) as error:
        raise InputError(not_loaded(reference, error)) from error


def load_foundation(reference: FoundationReference, dtype: torch.dtype | str = "auto") -> nn.Module:
    """Load the foundation as a causal LM in evaluation mode, in `dtype` ("auto": as it is stored).

    Raises:
        InputError: it cannot be had, is no causal language model of transformers, or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    from dylora_moe.modeling.loading_dylora_moe import NO_FOLDER

    config = load_foundation_config(reference)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            reference.name,
            revision=reference.revision,
            config=config,
            adapter_kwargs={"subfolder": NO_FOLDER},
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # damaged files and wrong fields make transformers fail in many ways
        raise InputError(not_loaded(reference, error)) from error
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise InputError(
            f"the base model {reference.name} has no weights for {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; pass a complete one with --base_model"
        )
    return model.eval()


def not_loaded(reference: FoundationReference, error: Exception) -> str:
    """Say that a foundation cannot be loaded, why, and what to do."""
    from dylora_moe.modeling.loading_dylora_moe import FoundationError, why_not_loaded

    why = error.why if isinstance(error, FoundationError) else why_not_loaded(reference.name, error)
    at = f" at revision {reference.revision}" if reference.revision else ""
    named = f" (named in {reference.named_in})" if reference.named_in else ""
    return (
        f"the base model {reference.name}{at}{named} cannot be loaded: {why}; "
        "pass another folder or Hub id with --base_model"
    )


def check_experts_fit(experts: list[Expert], foundation: nn.Module, name: str) -> None:
    """Check that every adapted layer is in the foundation, can be adapted, and has the adapter's shape.

    Raises:
        InputError: names expert, layer and both shapes.
    """
    modules = dict(foundation.named_modules())
    for expert in experts:
        for layer_name, layer in expert.layers.items():
            if layer.num_stacked:
                _check_stack_fits(expert, layer_name, layer, foundation, name)
                continue
            if layer_name not in modules:
                why = why_missing(layer_name, expert.layers, foundation, name)
                raise InputError(f"expert {expert.name} ({expert.origin}) adapts {layer_name}{why}")
            shape = _linear_shape(modules[layer_name])
            if shape is None:
                kind = type(modules[layer_name]).__name__
                raise InputError(
                    f"expert {expert.name} ({expert.origin}) adapts {layer_name}, a {kind} in {name}; {ADAPTABLE}"
                )
            if shape != (layer.in_features, layer.out_features):
                raise InputError(
                    f"expert {expert.name} ({expert.origin}) was trained on {layer_name} with {layer.in_features} inputs and "
                    f"{layer.out_features} outputs (lora_A [{layer.rank}, {layer.in_features}], lora_B "
                    f"[{layer.out_features}, {layer.rank}]), but in {name} this layer has {shape[0]} inputs and {shape[1]} "
                    "outputs; pass the model it was trained on with --base_model"
                )


def _check_stack_fits(
    expert: Expert, parameter: str, layer: AdaptedLayer, foundation: nn.Module, name: str
) -> None:
    where = f"expert {expert.name} ({expert.origin})"
    try:
        shape = shape_in(foundation, parameter)
    except ValueError as error:
        raise InputError(f"{where} adapts {parameter} in {name}. {error}") from error
    if shape is None:
        raise InputError(
            f"{where} adapts {parameter}, which the base model {name} does not have; pass the model it was trained on with "
            "--base_model"
        )
    found = (layer.num_stacked, layer.in_features, layer.out_features)
    is_square = shape[1] == shape[2]
    if (found == (shape[0], shape[2], shape[1]) and not is_square) or (
        is_square and has_exchanged_sizes(expert.peft_version, parameter, foundation)
    ):
        raise InputError(
            f"{where} adapts {parameter} with its inputs taken for its outputs, as PEFT before 0.19.1 did; newer ones do not "
            "read what it saved. Train it again"
        )
    if found == shape:
        return
    raise InputError(
        f"{where} was trained on {parameter} with {found[0]} stacked experts of {found[1]} inputs and {found[2]} outputs "
        f"(rank {layer.rank}), but in {name} it has {shape[0]} of {shape[1]} inputs and {shape[2]} outputs; pass the "
        "model it was trained on with --base_model"
    )


def check_router_fits(router: Router, config: Any, name: str) -> None:
    """Check that the gate reads hidden states of the foundation's size.

    Raises:
        InputError: names both sizes.
    """
    hidden_size = config.get_text_config().hidden_size
    if router.hidden_size != hidden_size:
        raise InputError(
            f"the router's gate reads hidden states of size {router.hidden_size}, those of {name} have {hidden_size}; "
            "pass the model it was trained on with --base_model"
        )


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    from dylora_moe.modeling.experts_dylora_moe import linear_shape

    try:
        return linear_shape(module)
    except ValueError:
        return None
