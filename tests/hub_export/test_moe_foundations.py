"""Adapters on the dense and shared layers of mixture-of-experts foundations, which PEFT moves onto the
stacked experts."""

import json
import shutil

import pytest
import torch
from helpers_checkpoints import change_json, save_router, save_tokenizer, write_json
from helpers_moe import linear_layers, moe_model
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from dylora_moe.hub_export import InputError, export, inspect


NAMES = ["dense: qwen3 moe", "dense and shared: glm4 moe"]
ROWS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module", params=NAMES)
def foundation(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "base"
    moe_model(request.param).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def matrices(foundation, rank=4, seed=0, only=""):
    generator = torch.Generator().manual_seed(seed)
    layers = linear_layers(AutoModelForCausalLM.from_pretrained(foundation))
    return {
        f"{name}.lora_{matrix}": torch.randn(shape, generator=generator) * 0.2
        for name, (inputs, outputs) in layers.items()
        if name.endswith(("q_proj", "gate_proj", "up_proj", "down_proj")) and only in name
        for matrix, shape in (("A", (rank, inputs)), ("B", (outputs, rank)))
    }


def write_adapter(folder, foundation, target_modules, **how):
    """An adapter as an older PEFT saved it: `target_modules` are names, which are read in another way
    today."""
    folder.mkdir()
    tensors = {f"base_model.model.{key}.weight": value for key, value in matrices(foundation, **how).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": target_modules,
    }
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": str(foundation)})
    return folder


@pytest.fixture
def adapters(foundation, tmp_path):
    short = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    other = {"target_modules": r".*\.gate_proj", "seed": 1, "only": "gate_proj"}
    return [
        write_adapter(tmp_path / "mixed", foundation, short),
        write_adapter(tmp_path / "gates", foundation, **other),
    ]


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_an_adapter_that_peft_would_leave_out_in_part(quick_check, adapters, tmp_path, layout):
    assert inspect(adapters).missing == []
    assert export(adapters, tmp_path / "out", layout=layout).check.passed


def test_the_check_catches_a_wrong_repo_here_too(quick_check, adapters, tmp_path, monkeypatch):
    from dylora_moe.hub_export.checking import peft_layers

    def weaker(*arguments):
        model = added(*arguments)
        for path, parameter in model.named_parameters():
            if "mlp" in path and ".lora_B." in path:
                parameter.data *= 0.9
        return model

    added = peft_layers.add_by_names
    monkeypatch.setattr(peft_layers, "add_by_names", weaker)
    with pytest.raises(Exception, match="does not compute what"):
        export(adapters[0], tmp_path / "out")


def test_what_layout_adapter_writes_peft_reads_right(adapters, foundation, tmp_path):
    repo = export(adapters, tmp_path / "out", layout="adapter", verify=False).output_dir
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    with torch.no_grad():
        for name in model.config.expert_names:
            expected = model(ROWS, routing_strategy=f"single:{name}").logits
            base = AutoModelForCausalLM.from_pretrained(foundation)
            assert not torch.allclose(base(ROWS).logits, expected, atol=0.1)
            peft = PeftModel.from_pretrained(base, repo, subfolder=f"experts/{name}").eval()
            assert torch.allclose(peft(ROWS).logits, expected, atol=1e-3)


def test_what_layout_adapter_writes_is_read_again(quick_check, adapters, tmp_path):
    repo = export(adapters, tmp_path / "out", layout="adapter", verify=False).output_dir
    assert export(repo, tmp_path / "again", layout="adapter").check.passed
    folders = [repo / "experts" / "mixed", repo / "experts" / "gates"]
    assert export([folders[0], adapters[1]], tmp_path / "as adapters").check.passed
    change_json(folders[0] / "adapter_config.json", target_parameters=["model.layers.0.mlp.down_proj.weight"])
    with pytest.raises(InputError, match="target_parameters is"):
        export(repo, tmp_path / "changed", verify=False)


def test_a_repo_of_an_earlier_version_names_layers_as_modules(quick_check, adapters, tmp_path):
    repo = export(adapters, tmp_path / "out", layout="adapter", verify=False).output_dir
    for name in ("mixed", "gates"):
        path = repo / "experts" / name / "adapter_config.json"
        fields = json.loads(path.read_text())
        moved = [key.removesuffix(".weight") for key in fields["target_parameters"]]
        change_json(path, target_modules=sorted([*fields["target_modules"], *moved]), target_parameters=None)
    assert export(repo, tmp_path / "again").check.passed


def test_a_final_checkpoint(quick_check, foundation, tmp_path):
    checkpoint = tmp_path / "final"
    (checkpoint / "peft_adapters").mkdir(parents=True)
    (checkpoint / "dylo_moe_state").mkdir()
    fields = {"model_type": "dylora-moe", "base_model_name_or_path": str(foundation), "_dylora_lora_alpha": 8}
    write_json(checkpoint / "config.json", {**fields, "_dylora_num_experts": 2})
    for index in range(2):
        tensors = matrices(foundation, seed=index)
        named = {f"base_model.model.{key}.expert_{index}.weight": value for key, value in tensors.items()}
        torch.save(named, checkpoint / "peft_adapters" / f"expert_{index}.pt")
    save_router(checkpoint, 2)
    shutil.copytree(foundation, checkpoint / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    assert export(checkpoint, tmp_path / "out").check.passed
