"""Tensors that stay where they are until they are written: copied one at a time, in memory no more than the
largest, and of tensors that lie in files no more than a piece.

    safetensors: 8 bytes, the header's length (little-endian); the header, JSON; the tensors' bytes without
        gaps
    (https://huggingface.co/docs/safetensors). `safetensors.torch.save_file` wants all tensors of a file at
    once.

It knows nothing about what any tensor means.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from ..errors import InputError
from .tensor_files import SAFETENSORS_DTYPES, TensorFile


DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
INDEX = "model.safetensors.index.json"
PIECE = 16 * 1024**2  # bytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's shape and dtype, and a way to have it.

    Attributes:
        read: gives a new tensor or a view of a file at every call.
        read_rows: gives the rows `start` to `stop` without the rest; None where there is no way to.
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
        """The same numbers in another dtype, converted when read; None, and tensors of integers, stay as they
        are."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self.through(lambda content: content.to(dtype)), dtype=dtype)

    def through(self, change: Callable[[torch.Tensor], torch.Tensor]) -> StoredTensor:
        """What `change` makes of it when it is read; of some rows or of all, which must come to the same."""
        rows = self.read_rows
        read_rows = None if rows is None else lambda start, stop: change(rows(start, stop))
        return StoredTensor(self.shape, self.dtype, lambda: change(self.read()), read_rows)

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Rows of a matrix."""
        read_rows = self.read_rows or (lambda start, stop: self.read()[start:stop])
        return StoredTensor((stop - start, *self.shape[1:]), self.dtype, lambda: read_rows(start, stop))

    def pieces(self, rows: int | None = None) -> Iterator[torch.Tensor]:
        """All of it in order, `rows` rows at a time: as many as make up 16 MB, if left out."""
        if not self.shape:
            yield self.read()
            return
        rows = rows or max(1, PIECE * self.shape[0] // max(1, self.num_bytes))
        if self.read_rows is None:
            yield from self.read().split(rows)
            return
        for start in range(0, self.shape[0], rows):
            yield self.read_rows(start, min(start + rows, self.shape[0]))


def of_file(file: TensorFile, key: str) -> StoredTensor:
    """One tensor of a file."""
    return StoredTensor(
        file.shape(key), file.dtype(key), partial(file.read, key), partial(file.read_rows, key)
    )


def of_tensor(tensor: torch.Tensor) -> StoredTensor:
    """A tensor that is in memory already."""
    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def same_bits(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two tensors are the same bit for bit, looked at a piece at a time."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    pieces = zip(left.pieces(), right.pieces(), strict=True)
    return all(torch.equal(*(piece.contiguous().view(torch.uint8) for piece in pair)) for pair in pieces)


def same_numbers(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether the second tensor, in the dtype of the first, is equal to it; looked at a piece at a time."""
    if left.shape != right.shape:
        return False
    rows = max(1, PIECE * left.shape[0] // max(1, left.num_bytes)) if left.shape else None
    pieces = zip(left.pieces(rows), right.to(left.dtype).pieces(rows), strict=True)
    return all(torch.equal(*pair) for pair in pieces)


def is_finite(tensor: torch.Tensor, part: int = 1 << 20) -> bool:
    """Whether no number is NaN or infinite; looked at in parts, since asking for all at once takes twice the
    memory."""
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(part))


def write_safetensors(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """One safetensors file, each tensor read, written and forgotten before the next, piece by piece where it
    can be.

    Raises:
        InputError: a tensor is of a type that the format does not have, or is not what was announced.
        OSError: the disk is full, or the file system refuses.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Widest first, as the format's own writer orders them: so every tensor lies at a multiple of its item's
    # size.
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
            written = 0
            for content in tensor.pieces():
                if tuple(content.shape[1:]) != tensor.shape[1:] or content.dtype != tensor.dtype:
                    raise _not_as_announced(name, tensor, content)
                part = content.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                written += file.write(memoryview(part.numpy()))
            if written != tensor.num_bytes:
                raise _not_as_announced(name, tensor, content)


def _not_as_announced(name: str, tensor: StoredTensor, content: torch.Tensor) -> InputError:
    return InputError(
        f"tensor {name} was announced as {tensor.dtype} {list(tensor.shape)} and is {content.dtype} {list(content.shape)}"
    )


def write_shards(folder: Path, tensors: dict[str, StoredTensor], max_shard_size: str) -> list[Path]:
    """`model.safetensors`, or with more than `max_shard_size` several files and their index, named as on the
    Hub.

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
