"""Tensors that stay on disk: comparing them in pieces, and writing them to a file."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dylora_moe.hub_export import InputError
from dylora_moe.hub_export.tensors import stored_tensors, tensor_files
from dylora_moe.hub_export.tensors.stored_tensors import (
    of_file,
    of_tensor,
    same_bits,
    same_numbers,
    write_safetensors,
)
from dylora_moe.hub_export.tensors.tensor_files import TensorFile


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """A tensor in a file, with itself, changed or not, in a file and in memory."""
    monkeypatch.setattr(stored_tensors, "PIECE", 10)  # three rows at a time

    def make(tensor, change=lambda tensor: tensor):
        save_file({"left": tensor, "right": change(tensor.clone())}, tmp_path / "tensors.safetensors")
        file = TensorFile(tmp_path / "tensors.safetensors")
        left, right = (of_file(file, key) for key in ("left", "right"))
        return [
            (left, right),
            (right, left),
            (left, of_tensor(right.read())),
            (of_tensor(left.read()), right),
        ]

    return make


def change_last(tensor):
    tensor.view(-1)[-1] += 1
    return tensor


@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (2, 2, 5), (0, 3)])
def test_equal_tensors_are_equal_in_pieces(pairs, shape):
    for left, right in pairs(torch.randn(shape)):
        assert same_bits(left, right) and same_numbers(left, right)


@pytest.mark.parametrize("shape", [(), (7, 3), (2, 2, 5)])
def test_a_difference_in_the_last_number_is_found(pairs, shape):
    for left, right in pairs(torch.randn(shape), change_last):
        assert not same_bits(left, right) and not same_numbers(left, right)


def test_numbers_are_compared_in_the_dtype_of_the_first(pairs):
    tensor = torch.randn(7, 3).bfloat16()
    wide = of_tensor(tensor.float() * (1 + 1e-5))
    for left, _ in pairs(tensor):
        assert same_numbers(left, wide) and not same_numbers(wide, left) and not same_bits(left, wide)


@pytest.mark.parametrize(("most", "expected"), [(10**6, 1), (0, 20)])
def test_a_file_is_opened_again_only_once_much_was_read(tmp_path, monkeypatch, most, expected):
    """Opening one takes time by the number of its tensors, so that doing it for each would be quadratic."""
    save_file({str(number): torch.full((3, 2), number) for number in range(20)}, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    opened = []
    monkeypatch.setattr(tensor_files, "MAPPED_AT_ONCE", most)
    monkeypatch.setattr(TensorFile, "_read_of_mapped", 0)
    monkeypatch.setattr(
        tensor_files, "safe_open", lambda *given, **named: opened.append(1) or safe_open(*given, **named)
    )
    for number in range(20):
        assert torch.equal(file.read_rows(str(number), 1, 3), torch.full((2, 2), number))
    assert len(opened) == expected


def test_what_is_written_is_read_again_though_tensors_share_memory(tmp_path):
    tensor = torch.randn(4, 6)
    views = {"whole": tensor, "again": tensor, "rows": tensor[1:3], "transposed": tensor.T}
    write_safetensors(tmp_path / "out.safetensors", {name: of_tensor(view) for name, view in views.items()})
    written = load_file(tmp_path / "out.safetensors")
    assert written.keys() == views.keys()
    assert all(torch.equal(written[name], view) for name, view in views.items())


def test_another_tensor_than_announced_is_refused(tmp_path):
    tensor = stored_tensors.StoredTensor((2, 3), torch.float32, lambda: torch.zeros(3, 2))
    with pytest.raises(
        InputError, match=r"announced as torch.float32 \[2, 3\] and is torch.float32 \[3, 2\]"
    ):
        write_safetensors(tmp_path / "out.safetensors", {"name": tensor})
    with pytest.raises(InputError, match="cannot hold"):
        write_safetensors(
            tmp_path / "out.safetensors", {"name": of_tensor(torch.zeros(2, dtype=torch.complex128))}
        )
