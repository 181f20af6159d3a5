"""The foundation's tensors by the names that transformers gives them, left on disk until they are written.

Files whose tensors transformers would rename or reshape on loading (mixture-of-experts models, mostly) are loaded whole
by transformers instead. It knows nothing about experts or repos.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import InputError, one_line
from .foundation import is_local, load_foundation
from .mixture import FoundationReference
from .stored_tensors import StoredTensor, of_file, of_tensor
from .tensor_files import TensorFile, read_json


WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json")
PICKLED = ("*.bin", "*.bin.index.json")


def skeleton(base_config: Any) -> nn.Module:
    """The foundation without any weights: names, shapes and kinds of its modules.

    Raises:
        InputError: transformers has no causal language model for this config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(base_config, trust_remote_code=False)
    except Exception as error:  # any wrong field may make the model class fail in its own way
        raise InputError(
            f"transformers has no causal language model for a config of type {base_config.model_type!r}: "
            f"{one_line(error, 200)}"
        ) from error


def foundation_weights(reference: FoundationReference, model: nn.Module) -> dict[str, StoredTensor]:
    """Every tensor that a saved copy of the foundation holds; tied ones once.

    Args:
        model: its skeleton.

    Raises:
        InputError: its files cannot be had, are damaged, or lack weights.
    """
    stored = _by_model_name(_stored(_folder(reference)), model)
    if stored is not None:
        return stored
    loaded = load_foundation(reference)
    tied = tied_names(loaded)
    return {name: of_tensor(tensor) for name, tensor in loaded.state_dict().items() if name not in tied}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another one, with that one's name."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return {}
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _folder(reference: FoundationReference) -> Path:
    if is_local(reference):
        return Path(reference.name)
    from huggingface_hub import errors, snapshot_download

    network_errors = getattr(errors, "HTTPError", OSError)
    try:
        folder = Path(snapshot_download(reference.name, revision=reference.revision, allow_patterns=list(PATTERNS)))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(reference.name, revision=reference.revision, allow_patterns=list(PICKLED))
        return folder
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, network_errors) as error:
        raise InputError(
            f"the weights of the foundation {reference.name} cannot be downloaded: {one_line(error)}; "
            "pass another folder or Hub id with --base_model"
        ) from error


def _stored(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of the folder's weight files by their names there; none where there are no such files."""
    for name in WEIGHT_NAMES:
        files = weight_files(folder, name)
        if files:
            return {key: of_file(file, key) for path in files for file in [TensorFile(path)] for key in file.keys()}  # noqa: SIM118
    return {}


def weight_files(folder: Path, name: str) -> list[Path]:
    """One file of weights, or the shards that its index names, in order; none where neither is there.

    Raises:
        InputError: an index names what is not a file of this folder.
    """
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [folder / name] if (folder / name).is_file() else []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map")
    shards = set(weight_map.values())
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not (folder / shard).is_file():
            raise InputError(f"{index} names the shard {shard!r}, which is not in {folder}")
    return [folder / shard for shard in sorted(shards)]


def _by_model_name(stored: dict[str, StoredTensor], model: nn.Module) -> dict[str, StoredTensor] | None:
    """The tensors under the model's own names, or None where files and model do not match one to one."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    found: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        name = next((name for name in (key, prefix + key, key.removeprefix(prefix)) if name in expected), None)
        if name is None:
            if any(pattern.search(key) for pattern in ignored):
                continue
            return None
        if name in found or tensor.shape != expected[name]:
            return None
        found[name] = tensor
    tied = tied_names(model)
    if any(name not in found and name not in tied for name in expected):
        return None
    for name, source in tied.items():
        if source not in found:
            return None
        # Both in the file: transformers decides which one counts if they differ.
        if name in found and not torch.equal(found.pop(name).read(), found[source].read()):
            return None
    return found
