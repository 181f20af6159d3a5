"""Another gate in a copy of a repo's weight files: every other tensor stays, and so do other names of the files."""

import hashlib
import json
import os

import pytest
import torch
from helpers_checkpoints import write_tensors
from safetensors.torch import load_file, save_file

from dylora_moe.hub_export.repo.checksums import renewed_checksums
from dylora_moe.hub_export.repo.gate_files import gate_holders, replace_gate


WEIGHT, BIAS = torch.arange(6.0).view(2, 3), torch.tensor([7.0, 8.0])
OTHERS = {
    "foundation.a.lora_A": torch.randn(4, 3).to(torch.bfloat16),
    "foundation.norm.weight": torch.randn(3),
    "foundation.z.base_layer.weight": torch.randn(3, 3),
}
OLD = {
    "no router": {},
    "a gate": {"router.gate.weight": torch.zeros(2, 3), "router.gate.bias": torch.zeros(2)},
    "prototypes": {
        "foundation.a.prototypes": torch.zeros(2, 3),
        "foundation.z.prototypes": torch.zeros(2, 3),
    },
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("old", OLD)
def test_of_layout_full_the_gate_alone_is_another(tmp_path, old, shards):
    source, folder = tmp_path / "source", tmp_path / "copy"
    for place in (source, folder):
        place.mkdir()
    write_tensors(source, {**OTHERS, **OLD[old]}, "model.safetensors", shards)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            os.link(path, folder / path.name)
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    holders = gate_holders(folder, "full")
    replace_gate(folder, "full", WEIGHT, BIAS)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
        assert os.path.samefile(path, source / path.name) == (path.name not in holders)
    expected = {**OTHERS, "router.gate.weight": WEIGHT, "router.gate.bias": BIAS}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    if shards > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert all(name in load_file(folder / file) for name, file in index["weight_map"].items())
        assert index["weight_map"].keys() == expected.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_of_layout_adapter_the_routers_file_is_another(tmp_path):
    replace_gate(tmp_path, "adapter", WEIGHT, BIAS)
    save_file({"a.prototypes": WEIGHT}, tmp_path / "router.safetensors")
    replace_gate(tmp_path, "adapter", WEIGHT, BIAS)
    found = load_file(tmp_path / "router.safetensors")
    assert found.keys() == {"gate.weight", "gate.bias"} and torch.equal(found["gate.weight"], WEIGHT)


def test_checksums_are_renewed_where_they_were_right(tmp_path):
    def digest(text):
        return hashlib.sha256(text.encode()).hexdigest()

    for name in "abc":
        (tmp_path / name).write_text(name)
    old = {"a": digest("a"), "b": digest("something else"), "c": digest("c")}
    (tmp_path / "SHA256SUMS").write_text("".join(f"{value}  {name}\n" for name, value in old.items()))
    with renewed_checksums(tmp_path, ["a", "b", "new"]):
        for name in ("a", "b", "new"):
            (tmp_path / name).write_text("2")
    expected = {**old, "a": digest("2"), "new": digest("2")}
    lines = [f"{value}  {name}" for name, value in expected.items()]
    assert (tmp_path / "SHA256SUMS").read_text().splitlines() == lines
