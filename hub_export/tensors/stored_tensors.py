"""Tensors that stay on disk until they are needed, and safetensors files that are made of them.

An export reads and writes one file's tensors at a time. Two tensors are compared in pieces: an embedding alone,
or a stack of a mixture-of-experts model's own experts, may be larger than all LoRA experts together.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import FailureError, InputError, one_line
from .tensor_files import SAFETENSORS_DTYPES, TensorFile


INDEX = "model.safetensors.index.json"
PIECE = 4 * 1024**2  # numbers


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's shape and dtype, and a way to have it.

    Attributes:
        read: gives a new tensor or a view of a file at every call.
        read_rows: gives the rows `start` to `stop` without reading the rest; None where there is no way to.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    read_rows: Callable[[int, int], torch.Tensor] | None = None

    @property
    def num_parameters(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_parameters * self.dtype.itemsize

    def to(self, dtype: torch.dtype | None) -> StoredTensor:
        """Convert to another dtype when read; None, and tensors of integers, stay as they are."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return StoredTensor(self.shape, dtype, lambda: self.read().to(dtype))

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Take some rows of a matrix."""
        read_rows = self.read_rows or (lambda start, stop: self.read()[start:stop])
        return StoredTensor((stop - start, *self.shape[1:]), self.dtype, lambda: read_rows(start, stop))


def of_file(file: TensorFile, key: str) -> StoredTensor:
    """Describe one tensor of a file."""
    return StoredTensor(
        file.shape(key), file.dtype(key), partial(file.read, key), partial(file.read_rows, key)
    )


def of_tensor(tensor: torch.Tensor) -> StoredTensor:
    """Describe a tensor that is in memory already."""
    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def same_bits(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two tensors are the same bit for bit."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    pairs = zip(_pieces(left), _pieces(right), strict=True)
    return all(torch.equal(_bytes(piece), _bytes(other)) for piece, other in pairs)


def same_numbers(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether the second tensor, in the dtype of the first, is equal to it."""
    if left.shape != right.shape:
        return False
    pairs = zip(_pieces(left), _pieces(right), strict=True)
    return all(torch.equal(piece, other.to(piece.dtype)) for piece, other in pairs)


def _pieces(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    """Read a tensor in order, a few million numbers at a time where that is possible."""
    if not tensor.shape:
        yield tensor.read()
        return
    num_rows = tensor.shape[0]
    step = max(1, PIECE * num_rows // max(1, tensor.num_parameters))
    if tensor.read_rows is None:
        yield from tensor.read().split(step)
        return
    for start in range(0, max(1, num_rows), step):
        yield tensor.read_rows(start, min(start + step, num_rows))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def is_finite(tensor: torch.Tensor, part: int = 1 << 20) -> bool:
    """Whether no number is NaN or infinite.

    It looks at parts, since asking for all at once takes twice the memory.
    """
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(part))


def write_safetensors(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Write one safetensors file; all its tensors are in memory, or mapped from their own files, meanwhile.

    Raises:
        InputError: a tensor is of a type that the format does not have, or is not what was announced.
        OSError: the disk is full, or the file system refuses.
    """
    content: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_DTYPES.values():
            raise InputError(f"tensor {name} is of type {tensor.dtype}, which a safetensors file cannot hold")
        read = tensor.read().detach().cpu().contiguous()
        if (tuple(read.shape), read.dtype) != (tensor.shape, tensor.dtype):
            raise InputError(
                f"tensor {name} was announced as {tensor.dtype} {list(tensor.shape)} and is {read.dtype} {list(read.shape)}"
            )
        if read.untyped_storage().data_ptr() in storages:
            read = read.clone()  # safetensors refuses tensors that share memory
        storages.add(read.untyped_storage().data_ptr())
        content[name] = read
    try:
        save_file(content, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise _os_error(error, path) from error


def _os_error(error: SafetensorError, path: Path) -> Exception:
    """Turn safetensors' words for a system error back into an `OSError`."""
    found = re.search(r"os error (\d+)", str(error))
    if found is None:
        return FailureError(f"{path.name} cannot be written: {one_line(error)}")
    return OSError(int(found[1]), os.strerror(int(found[1])))


def write_shards(folder: Path, tensors: dict[str, StoredTensor], max_shard_size: str) -> list[Path]:
    """Write `model.safetensors`, or, beyond `max_shard_size`, shards and their index, named as on the Hub.

    Raises:
        InputError: `max_shard_size` is no size such as "5GB".
    """
    shapes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()
    }
    try:
        split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    except ValueError as error:
        raise InputError(f"--max_shard_size {max_shard_size}: {error}") from error
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        total = sum(tensor.num_parameters for tensor in tensors.values())
        metadata = {**split.metadata, "total_parameters": total}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [folder / file for file in split.filename_to_tensors]
