"""Where a folder's weights lie: in one file, or in the shards that an index names.

model.safetensors                  (or pytorch_model.bin) every tensor
model.safetensors.index.json       (or pytorch_model.bin.index.json) weight_map: tensor -> file, where there are shards
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError
from ..sources.source_folder import SourceFolder
from .stored_tensors import StoredTensor, of_file
from .tensor_files import TensorFile


WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")


def weight_files(folder: SourceFolder, names: Iterable[str] = WEIGHT_NAMES) -> list[Path]:
    """List the files of a folder's weights, in order: none where there are none.

    Args:
        names: what the weights may be called, the first that is there being taken.

    Raises:
        InputError: an index is malformed, or names what is no file of this folder.
    """
    for name in names:
        index = weight_map(folder, name)
        if index is not None:
            return [folder / shard for shard in sorted(set(index.values()))]
        if folder.has(name):
            return [folder / name]
    return []


def read_index(folder: SourceFolder, name: str) -> dict[str, str] | None:
    """Read the index of sharded weights: the file of each tensor. None where there is no index.

    Args:
        name: of the weights as one file, such as "model.safetensors".

    Raises:
        InputError: it is malformed.
    """
    path = folder / f"{name}.index.json"
    if not path.is_file():
        return None
    weight_map = folder.read_json(path.name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map of names to files")
    return {key: str(shard) for key, shard in weight_map.items()}


def weight_map(folder: SourceFolder, name: str) -> dict[str, str] | None:
    """Read the index of sharded weights as `read_index` does, and look for the shards.

    Raises:
        InputError: it is malformed, or names what is no file of this folder.
    """
    found = read_index(folder, name)
    path = folder / f"{name}.index.json"
    for shard in set((found or {}).values()):
        is_a_name = Path(shard).name == shard and shard != ".." and "\0" not in shard
        if not is_a_name or not folder.has(shard):
            raise InputError(f"{path} names the shard {shard!r}, which is not in {folder}")
    return found


def has_all_weights(folder: SourceFolder) -> bool:
    """Whether the weights are there. Loading a model fetches some of a Hub repo's files only."""
    try:
        return bool(weight_files(folder))
    except InputError:  # a shard is missing
        return False


def stored_tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Describe the tensors of several files by their names; their numbers stay on the disk.

    Raises:
        InputError: a file is damaged.
    """
    files = [TensorFile(path) for path in paths]
    return {key: of_file(file, key) for file in files for key in file.keys()}  # noqa: SIM118
