"""Recognises an ordinary model, perhaps with an adapter merged into it: there is nothing to export.

config.json           the model's own, perhaps with base_model_name_or_path
model.safetensors     (or pytorch_model.bin, or shards with an index) without any adapter in it
"""

from __future__ import annotations

from ..sources.source_folder import SourceFolder
from ..sources.source_options import ReadOptions
from ..tensors.mixture import FoundationReference, Mixture
from ..tensors.tensor_files import TensorFile
from ..tensors.weight_files import stored_tensors, weight_files


FORMAT = "merged model"
DESCRIPTION = "config.json and model.safetensors of an ordinary model, which needs no export"

ADAPTER_PARTS = (".lora_", ".base_layer.", ".modules_to_save.")


def recognise(folder: SourceFolder) -> str | None:
    """Say why this folder is an ordinary model, or None.

    Any trace of an adapter in the tensors' names speaks against it.
    """
    files = weight_files(folder)
    if not files or not folder.has("config.json"):
        return None
    model_type = folder.read_json("config.json").get("model_type")
    if not isinstance(model_type, str):
        return None
    first = None
    for path in files:
        for key in TensorFile(path).keys():  # noqa: SIM118
            if any(part in f".{key}" for part in ADAPTER_PARTS):
                return None
            first = first or (path.name, key)
    if first is None:
        return None
    return f"{first[0]} holds {first[1]} and no adapter, and config.json has model_type {model_type}"


def read(folders: list[SourceFolder], options: ReadOptions) -> Mixture:
    """Describe the model as it is, without experts; `problems` says that there is nothing to export."""
    folder = folders[0]
    config = folder.read_json("config.json")
    return Mixture(
        format=FORMAT,
        folders=folders,
        experts=[],
        router=None,
        foundation=FoundationReference(
            name=config.get("base_model_name_or_path") or str(folder), named_in=folder / "config.json"
        ),
        problems=[
            f"{folder} is an ordinary model, with its adapters merged or without any ({recognise(folder)}): it needs no "
            "export; load it with AutoModelForCausalLM.from_pretrained, or benchmark it as it is"
        ],
        foundation_weights=stored_tensors(weight_files(folder)),
    )
