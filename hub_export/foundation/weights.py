"""The foundation's tensors by the names that transformers gives them, left on disk until they are written.

Tensors that transformers renames or puts together on loading (mixture-of-experts models, mostly) are put
together one at a time.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import DyloraMoeWarning, InputError, one_line
from ..sources.source_folder import SourceFolder, open_folder
from ..tensors.mixture import FoundationReference
from ..tensors.stored_tensors import StoredTensor, of_tensor, same_bits
from ..tensors.weight_files import stored_tensors, weight_files
from .reference import is_local, load_foundation, not_loaded, open_foundation
from .weight_conversion import UnknownConversion, by_current_name, by_model_name


PATTERNS = ("*.safetensors", "*.json")
PICKLED = ("*.bin",)
NOT_READ = ("*/*", "consolidated*")  # the same weights once more, in the form of those who made the model
# A model of 61 layers with 256 experts each, every one a module with three in it, has 64,000; transformers puts those
# of the largest models together. Each takes 0.04 ms and 3 KB.
MOST_MODULES = 65_536
COMPLETE = "pass a complete one with --base_model"


@contextmanager
def limited_modules() -> Iterator[None]:
    """Stop building a model that has more modules than any, whichever fields of its config ask for them.

    Raises:
        InputError: it has.
    """
    built = 0

    def count(module: nn.Module, name: str, submodule: nn.Module) -> None:
        nonlocal built
        built += 1
        if built > MOST_MODULES:
            raise InputError(
                f"the config asks for a model of more than {MOST_MODULES:,} modules, and no model has as many; correct its "
                "numbers of layers and experts"
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def skeleton(base_config: Any) -> nn.Module:
    """Build the foundation on the meta device: names, shapes and kinds of its modules.

    Raises:
        InputError: transformers has no causal language model for this config, or it is one of too many modules.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), limited_modules():
            return AutoModelForCausalLM.from_config(base_config, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # any wrong field may make the model class fail in its own way
        raise InputError(
            f"transformers has no causal language model for a config of type {base_config.model_type!r}: "
            f"{one_line(error, 200)}"
        ) from error


def foundation_weights(reference: FoundationReference, model: nn.Module) -> dict[str, StoredTensor]:
    """Describe every tensor that a saved copy of the foundation holds; tied ones once.

    Args:
        model: its skeleton.

    Raises:
        InputError: its files cannot be had, are damaged, or lack weights.
    """
    stored = stored_tensors(weight_files(_folder(reference)))
    if not stored:
        return _loaded_whole(reference, None)  # whatever transformers finds there, or its error
    try:
        found, _ = by_model_name(stored, model)
    except UnknownConversion as error:
        return _loaded_whole(
            reference, f"how transformers converts its tensors cannot be found out ({error})"
        )
    _check_shapes(found, model, reference)
    _leave_out_tied(found, tied_names(model))
    missing = [name for name in model.state_dict() if name not in found and name not in tied_names(model)]
    made_up = [
        re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    ]
    for name in missing:
        if not any(pattern.search(name) for pattern in made_up):
            raise InputError(f"the base model {reference.name} has no weights for {name}; {COMPLETE}")
    return (
        _loaded_whole(reference, f"transformers makes up {missing[0]}, which it lacks") if missing else found
    )


def carried_weights(
    carried: dict[str, StoredTensor], model: nn.Module, folder: SourceFolder
) -> dict[str, StoredTensor]:
    """Give the foundation that a source brings, by the model's own names.

    Raises:
        InputError: a tensor is missing, unknown, or of another shape than the model's.
    """
    found, unknown = by_current_name(carried, model)
    if unknown:
        raise InputError(
            f"{folder} holds {unknown[0]}, which its base model, a {model.config.model_type}, does not have"
        )
    tied = tied_names(model)
    for name, tensor in model.state_dict().items():
        if name not in found and name not in tied:
            raise InputError(f"{folder} lacks {name} of its base model; copy it again")
        if name in found and found[name].shape != tuple(tensor.shape):
            raise InputError(
                f"{folder}: {name} of its base model is {list(found[name].shape)}, its config says {list(tensor.shape)}"
            )
    return found


def _loaded_whole(reference: FoundationReference, why: str | None) -> dict[str, StoredTensor]:
    """Load the model and give its tensors, with a warning that this takes memory, and why it has to."""
    if why is not None:
        message = f"the base model {reference.name} is loaded whole, which takes as much memory as it is large: {why}"
        warnings.warn(message, DyloraMoeWarning, stacklevel=2)
    loaded = load_foundation(reference)
    tied = tied_names(loaded)
    return {name: of_tensor(tensor) for name, tensor in loaded.state_dict().items() if name not in tied}


def _check_shapes(found: dict[str, StoredTensor], model: nn.Module, reference: FoundationReference) -> None:
    for name, expected in model.state_dict().items():
        if name in found and found[name].shape != tuple(expected.shape):
            raise InputError(
                f"the base model {reference.name} stores {name} as {list(found[name].shape)}, its config says "
                f"{list(expected.shape)}; {COMPLETE}"
            )


def _leave_out_tied(found: dict[str, StoredTensor], tied: dict[str, str]) -> None:
    """Keep tied tensors once, by the name of the one that the others are tied to.

    Both stay where they differ, as transformers then does not tie them.
    """
    for name, source in tied.items():
        if name in found and source not in found:
            found[source] = found.pop(name)
        elif name in found and same_bits(found[name], found[source]):
            del found[name]


def tied_names(model: nn.Module) -> dict[str, str]:
    """Map names of parameters that are another one to that one's name."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return {}
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tied_head(model: nn.Module) -> str | None:
    """Name the layer that makes the logits, where its weight is the embeddings' own; else None."""
    return next((name.rpartition(".")[0] for name in tied_names(model)), None)


def _folder(reference: FoundationReference) -> SourceFolder:
    if is_local(reference):
        return open_foundation(reference)
    from huggingface_hub import errors, snapshot_download

    network_errors = getattr(errors, "HTTPError", OSError)
    try:
        fetch = partial(
            snapshot_download, reference.name, revision=reference.revision, ignore_patterns=list(NOT_READ)
        )
        folder = open_folder(fetch(allow_patterns=list(PATTERNS)))
        if not folder.names("*.safetensors"):
            fetch(allow_patterns=list(PICKLED))
        return folder
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, network_errors) as error:
        raise InputError(not_loaded(reference, error)) from error
