"""Experts that do nothing, in every format: one warning that names them, and no error."""

import json

import pytest
import torch
from helpers_checkpoints import (
    save_adalora_adapter,
    save_adapter,
    save_final_checkpoint,
    save_trainer_checkpoint,
    save_whole_model,
)
from safetensors.torch import load_file, save_file

from dylora_moe.hub_export import DyloraMoeWarning, export, inspect


def empty(path, belongs, matrix):
    """Set the matrices of one expert to zero."""
    is_safetensors = path.suffix == ".safetensors"
    tensors = load_file(path) if is_safetensors else torch.load(path)
    for key, value in tensors.items():
        if belongs in key and f".lora_{matrix}" in key:
            tensors[key] = torch.zeros_like(value)
    (save_file if is_safetensors else torch.save)(tensors, path)


def adapters(folder, foundation, matrix):
    folders = [
        save_adapter(folder / name, foundation, seed=seed) for seed, name in enumerate(("first", "second"))
    ]
    empty(folders[1] / "adapter_model.safetensors", "", matrix)
    return folders, "second"


def adalora(folder, foundation, matrix):
    folders = [
        save_adalora_adapter(folder / name, foundation, seed=seed)
        for seed, name in enumerate(("first", "second"))
    ]
    empty(folders[1] / "adapter_model.safetensors", "", matrix)
    return folders, "second"


def final_checkpoint(folder, foundation, matrix):
    checkpoint = save_final_checkpoint(folder / "final", foundation)
    empty(checkpoint / "peft_adapters" / "expert_1.pt", "expert_1.", matrix)
    return checkpoint, "expert_1"


def trainer_checkpoint(folder, foundation, matrix):
    checkpoint = save_trainer_checkpoint(folder / "checkpoint-5", foundation)
    empty(checkpoint / "peft_adapters/expert_1/expert_1/adapter_model.safetensors", "", matrix)
    return checkpoint, "expert_1"


def whole_model(folder, foundation, matrix):
    whole = save_whole_model(folder / "whole", foundation)
    empty(whole / "model.safetensors", "expert_1.", matrix)
    return whole, "expert_1"


def exported_repo(folder, foundation, matrix):
    return export(adapters(folder, foundation, matrix)[0], folder / "repo", verify=False).output_dir, "second"


FORMATS = (adapters, adalora, final_checkpoint, trainer_checkpoint, whole_model, exported_repo)


def told(caught) -> list[str]:
    return [str(warning.message) for warning in caught if "does nothing" in str(warning.message)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", FORMATS)
@pytest.mark.parametrize("matrix", "BA")
def test_an_expert_of_zeros_is_named(foundation, tmp_path, make, matrix):
    source, name = make(tmp_path, foundation, matrix)
    with pytest.warns(DyloraMoeWarning) as caught:
        export(source, tmp_path / "out", verify=False)
    assert len(told(caught)) == 1 and f"expert {name} does nothing" in told(caught)[0]
    assert told_by_inspect(source) == told(caught)


def told_by_inspect(source) -> list[str]:
    return [note for note in inspect(source).notes if "nothing" in note]


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_adalora_that_is_pruned_to_nothing(quick_check, foundation, tmp_path, layout):
    pruned = save_adalora_adapter(tmp_path / "pruned", foundation)
    config = pruned / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields["rank_pattern"] = {key: [False] * len(kept) for key, kept in fields["rank_pattern"].items()}
    config.write_text(json.dumps(fields))
    tensors = load_file(pruned / "adapter_model.safetensors")
    cut = {key: value[:, :0] if key.endswith("lora_B") else value[:0] for key, value in tensors.items()}
    save_file({key: value.contiguous() for key, value in cut.items()}, pruned / "adapter_model.safetensors")
    other = save_adalora_adapter(tmp_path / "other", foundation, seed=1)
    with pytest.warns(DyloraMoeWarning, match="expert pruned does nothing"):
        result = export([pruned, other], tmp_path / "out", layout=layout)
    assert result.check.passed
    assert "expert pruned does nothing" in "\n".join(told_by_inspect([pruned, other]))


def test_an_untrained_adapter_alone(quick_check, foundation, tmp_path):
    source, _ = adapters(tmp_path, foundation, "B")
    with pytest.warns(DyloraMoeWarning, match="expert second does nothing"):
        assert export(source[1], tmp_path / "out").check.passed


def test_several_are_named_together(foundation, tmp_path):
    checkpoint, _ = final_checkpoint(tmp_path, foundation, "B")
    empty(checkpoint / "peft_adapters" / "expert_2.pt", "expert_2.", "B")
    assert told_by_inspect(checkpoint)[0].startswith("experts expert_1, expert_2 do nothing")


def test_one_layer_of_zeros_is_no_idle_expert(foundation, tmp_path):
    folder = save_adapter(tmp_path / "partly", foundation)
    empty(folder / "adapter_model.safetensors", "layers.0.", "B")
    assert told_by_inspect(folder) == []
