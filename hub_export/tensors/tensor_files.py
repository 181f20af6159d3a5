"""Files of named tensors, read one tensor at a time: safetensors, and torch's `.pt` and `.bin` files.

Pickled code is never run: `.pt` and `.bin` are opened with `torch.load(weights_only=True)` only, memory-mapped
where the file allows it.
"""

from __future__ import annotations

import pickle
import weakref
import zipfile
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open

from ..errors import InputError, one_line
from ..sources.json_files import why_unreadable
from .pickle_limits import check_size, check_unfolded


# the names safetensors headers use (https://huggingface.co/docs/safetensors)
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Bytes. What was read of a file that is mapped into memory takes memory for as long as the file is mapped;
# mapping it again takes time: of a safetensors file by the number of its tensors, of a small `.pt` more than many that
# are read in turn, such as experts, are worth.
MAPPED_AT_ONCE = 64 * 1024**2
SMALL_FILE = 32 * 1024**2
# Bytes, for 150,000 tensors, twice those of 64 experts on 560 layers; safetensors itself reads up to 100 MB.
MOST_HEADER = 24 * 1024**2


def load_torch_file(path: Path) -> Any:
    """Load the object in a `.pt` or `.bin` file; its tensors stay on disk until they are used.

    Raises:
        InputError: the file is missing, damaged, or holds more than plain tensors and containers.
    """
    try:
        check_size(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            # files in torch's format from before 1.6 cannot be mapped
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            why_unreadable(path)
            or f"{path} holds more than tensors, or is damaged ({one_line(error, 120)}); "
            "it was not opened, because pickled code could run"
        ) from error
    except Exception as error:  # of a damaged pickle, torch raises AssertionError, struct.error and others
        raise InputError(
            why_unreadable(path)
            or f"{path} cannot be read: {one_line(error)}; the file is damaged or incomplete, copy it again"
        ) from error
    check_unfolded(path, _check_plain(path, content))
    return content


def _check_plain(path: Path, content: Any, depth: int = 2) -> int:
    """Count the bytes of all tensors, as their shapes have them.

    Raises:
        InputError: one is sparse or quantised.
    """
    size = 0
    for key, value in content.items() if isinstance(content, dict) and depth else ():
        size += _check_plain(path, value, depth - 1)
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized:
                raise InputError(f"{path}: {key} is stored sparse or quantised, expected a plain tensor")
            size += value.nbytes
    return size


class TensorFile:
    """Named tensors in one file. Shapes and dtypes are known at once, `read` fetches one tensor.

    Args:
        path: a file ending in `.safetensors`, `.pt`, `.bin` or `.pth`.

    Raises:
        InputError: the file is missing, damaged, or not a flat dict of tensors.
    """

    _mapped: ClassVar[weakref.WeakSet[TensorFile]] = weakref.WeakSet()
    _read_of_mapped: ClassVar[float] = 0

    def __init__(self, path: Path):
        self.path = path
        self._mapped_tensors: Any = None  # a dict of them, or an open safetensors file
        if self._is_safetensors:
            self._layout = self._read_header()
            self._is_let_go = True
        else:
            self._mapped_tensors = tensors = self._load()
            self._layout = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
            # Only torch's zip format is mapped into memory.
            self._is_let_go = path.stat().st_size > SMALL_FILE and zipfile.is_zipfile(path)

    @property
    def _is_safetensors(self) -> bool:
        return self.path.suffix == ".safetensors"

    def _open(self):
        try:
            self._check_header()
            return safe_open(self.path, framework="pt")
        except InputError:
            raise
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                why_unreadable(self.path)
                or f"{self.path} is not a whole safetensors file: {one_line(error)}; copy it again"
            ) from error

    def _check_header(self) -> None:
        with open(self.path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if MOST_HEADER < size < self.path.stat().st_size:
            raise InputError(
                f"{self.path} is not a whole safetensors file: its header has {size:,} bytes, and those of honest files have "
                f"no more than {MOST_HEADER:,}; copy it again"
            )

    def _read_header(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        layout = {}
        with self._open() as file:
            for key in file.keys():  # noqa: SIM118 (an open safetensors file is not a dict)
                part = file.get_slice(key)
                dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise InputError(f"{self.path}: tensor {key} has the unknown type {part.get_dtype()}")
                layout[key] = (tuple(part.get_shape()), dtype)
        return layout

    def _load(self) -> dict[str, torch.Tensor]:
        content = load_torch_file(self.path)
        if not isinstance(content, dict):
            raise InputError(
                f"{self.path} holds a {type(content).__name__}, expected a dict of names to tensors"
            )
        for key, value in content.items():
            if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                raise InputError(
                    f"{self.path}: entry {key!r} is a {type(value).__name__}, expected a dict of names to tensors"
                )
        return content

    def keys(self) -> list[str]:
        return list(self._layout)

    def __contains__(self, key: str) -> bool:
        return key in self._layout

    def __len__(self) -> int:
        return len(self._layout)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._layout[key][0]

    def dtype(self, key: str) -> torch.dtype:
        return self._layout[key][1]

    def read(self, key: str) -> torch.Tensor:
        tensors = self._map(key)
        return tensors.get_tensor(key) if self._is_safetensors else tensors[key]

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Read rows `start` to `stop` of a tensor; a safetensors file reads only these."""
        tensors = self._map(key, (stop - start) / max(1, self.shape(key)[0]))
        return (tensors.get_slice(key) if self._is_safetensors else tensors[key])[start:stop]

    def _map(self, key: str, share: float = 1.0) -> Any:
        """Give the file's tensors, of one of which a share is about to be read.

        Once much was read of all files together, they are let go, and mapped again when needed.
        """
        if TensorFile._read_of_mapped > MAPPED_AT_ONCE:
            for file in TensorFile._mapped:
                file._mapped_tensors = None
            TensorFile._mapped, TensorFile._read_of_mapped = weakref.WeakSet(), 0
        if self._mapped_tensors is None:
            self._mapped_tensors = self._open() if self._is_safetensors else self._load()
        if self._is_let_go:
            TensorFile._mapped.add(self)
            shape, dtype = self._layout[key]
            TensorFile._read_of_mapped += share * prod(shape) * dtype.itemsize
        return self._mapped_tensors
