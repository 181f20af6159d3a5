"""Tensors that stay where they are until they are written: copied one at a time, in memory no more than the largest.

    safetensors: 8 bytes, the header's length (little-endian); the header, JSON; the tensors' bytes without gaps
    (https://huggingface.co/docs/safetensors). `safetensors.torch.save_file` wants all tensors of a file at once.

It knows nothing about what any tensor means.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from .errors import InputError
from .tensor_files import SAFETENSORS_DTYPES, TensorFile


DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
INDEX = "model.safetensors.index.json"
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's shape and dtype, and a way to have it. `read` gives a new tensor or a view of a file at every call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_parameters(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_parameters * self.dtype.itemsize

    def to(self, dtype: torch.dtype | None) -> StoredTensor:
        """The same numbers in another dtype, converted when read; None, and tensors of integers, stay as they are."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return StoredTensor(self.shape, dtype, lambda: self.read().to(dtype))

    def transposed(self) -> StoredTensor:
        return StoredTensor(self.shape[::-1], self.dtype, lambda: self.read().T)

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Rows of a matrix."""
        return StoredTensor((stop - start, *self.shape[1:]), self.dtype, lambda: self.read()[start:stop])


@dataclass(frozen=True)
class FileTensor(StoredTensor):
    """A tensor in a file, of which rows can be had without the rest."""

    file: TensorFile | None = None
    key: str = ""

    def rows(self, start: int, stop: int) -> StoredTensor:
        read = lambda: self.file.read_rows(self.key, start, stop)  # noqa: E731
        return StoredTensor((stop - start, *self.shape[1:]), self.dtype, read)


def of_file(file: TensorFile, key: str) -> StoredTensor:
    """One tensor of a file."""
    return FileTensor(file.shape(key), file.dtype(key), lambda: file.read(key), file, key)


def of_tensor(tensor: torch.Tensor) -> StoredTensor:
    """A tensor that is in memory already."""
    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def same_bits(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two tensors are the same bit for bit, looked at a few rows at a time."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    ours, theirs = left.read(), right.read()
    for start in range(0, left.shape[0], ROWS_AT_ONCE):
        pieces = [tensor[start : start + ROWS_AT_ONCE].contiguous().view(torch.uint8) for tensor in (ours, theirs)]
        if not torch.equal(*pieces):
            return False
    return True


def is_finite(tensor: torch.Tensor, part: int = 1 << 20) -> bool:
    """Whether no number is NaN or infinite; looked at in parts, since asking for all at once takes twice the memory."""
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(part))


def write_safetensors(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """One safetensors file, each tensor read, written and forgotten before the next.

    Raises:
        InputError: a tensor is of a type that the format does not have, or is not what was announced.
        OSError: the disk is full, or the file system refuses.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Widest first, as the format's own writer orders them: so every tensor lies at a multiple of its item's size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    position = 0
    for name, tensor in ordered.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise InputError(f"tensor {name} is of type {tensor.dtype}, which a safetensors file cannot hold")
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.num_bytes],
        }
        position += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered.items():
            content = tensor.read().detach()
            if tuple(content.shape) != tensor.shape or content.dtype != tensor.dtype:
                raise InputError(
                    f"tensor {name} was announced as {tensor.dtype} {list(tensor.shape)} and is "
                    f"{content.dtype} {list(content.shape)}"
                )
            file.write(memoryview(content.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))


def write_shards(folder: Path, tensors: dict[str, StoredTensor], max_shard_size: str) -> list[Path]:
    """`model.safetensors`, or with more than `max_shard_size` several files and their index, named as on the Hub.

    Raises:
        InputError: `max_shard_size` is no size such as "5GB".
    """
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
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
