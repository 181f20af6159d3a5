"""Weights that `from_pretrained` reads: those of the files, and errors where files and config differ."""

import json
import shutil
from unittest import mock

import pytest
import torch
from helpers_models import build, llama_config
from helpers_peft import needs_peft_of_transformers
from peft import IA3Config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM, DyloraMoeModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = build(seed=3)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "sharded", max_shard_size="60KB")
    model.to(torch.bfloat16).save_pretrained(folder / "bfloat16")
    build(experts=[]).save_pretrained(folder / "without_experts")
    return folder


def stored(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a repo's weight files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_holds(model, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    """The model's weights are those of the files, rounded to its dtype, except the gate's."""
    state = model.state_dict()
    assert weights and set(weights) <= set(state)
    for name, tensor in weights.items():
        expected = tensor if name.startswith("router.") else tensor.to(dtype)
        assert state[name].dtype == expected.dtype, name
        assert torch.equal(state[name].cpu(), expected), name
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name or name.startswith("router.")), name


@pytest.mark.parametrize("repo", ["whole", "sharded", "bfloat16"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": torch.float32},
        {"dtype": torch.bfloat16},
        {"dtype": "auto"},
        {"dtype": torch.float16, "device_map": "cpu"},
        {"dtype": torch.float32, "device_map": 0},
        {"dtype": torch.float32, "device_map": {"foundation": "cpu", "router": "cpu"}},
        {"dtype": torch.float32, "disable_mmap": True},
        {"dtype": torch.float32, "key_mapping": {"q_proj.lora_A": "q_proj.lora_A"}},
    ],
    ids=str,
)
def test_the_weights_are_those_of_the_files(saved, repo, arguments):
    if arguments.get("device_map") == 0:
        arguments = {**arguments, "device_map": 0 if torch.cuda.is_available() else torch.device("cpu")}
    loaded, info = DyloraMoeForCausalLM.from_pretrained(saved / repo, output_loading_info=True, **arguments)
    assert not any(info.values())
    of_repo = torch.bfloat16 if repo == "bfloat16" else torch.float32
    assert_holds(
        loaded, stored(saved / repo), of_repo if arguments["dtype"] == "auto" else arguments["dtype"]
    )


def test_a_model_without_a_head_and_one_in_a_subfolder(saved):
    loaded = DyloraMoeModel.from_pretrained(str(saved), subfolder="whole")
    assert_holds(loaded, stored(saved / "whole"))


def test_code_in_the_repo_reads_them_too(saved, caplog):
    model = AutoModelForCausalLM.from_pretrained(saved / "whole", trust_remote_code=True)
    assert type(model) is not DyloraMoeForCausalLM
    assert_holds(model, stored(saved / "whole"))
    assert "not initialized" not in caplog.text and "not used" not in caplog.text


def test_a_model_loaded_in_inference_mode_can_be_trained(saved):
    with torch.inference_mode():
        model = DyloraMoeForCausalLM.from_pretrained(saved / "whole")
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()


def test_no_experts_no_stacks(saved):
    model = DyloraMoeForCausalLM.from_pretrained(saved / "without_experts")
    assert_holds(model, stored(saved / "without_experts"))


def damaged(saved, tmp_path, change):
    shutil.copytree(saved / "whole", tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    name = next(name for name in weights if name.endswith("lora_A"))
    change(weights, name)
    save_file(weights, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    return tmp_path / "damaged", name


def test_a_missing_stack_is_reported_and_initialised(saved, tmp_path, caplog):
    folder, name = damaged(saved, tmp_path, lambda weights, name: weights.pop(name))
    model, info = DyloraMoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert name in caplog.text and info["missing_keys"] == {name}
    assert torch.isfinite(dict(model.named_parameters())[name]).all()


def test_a_stack_too_many_is_reported(saved, tmp_path, caplog):
    def add(weights, name):
        weights["foundation.model.layers.9.mlp.up_proj.lora_A"] = weights[name].clone()

    folder, _ = damaged(saved, tmp_path, add)
    DyloraMoeForCausalLM.from_pretrained(folder)
    assert "layers.9.mlp.up_proj.lora_A" in caplog.text


def test_a_stack_twice_in_place_of_another_is_reported(saved, tmp_path, caplog):
    shutil.copytree(saved / "sharded", tmp_path / "damaged")
    index_path = tmp_path / "damaged" / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shards = sorted({file for name, file in index["weight_map"].items() if name.endswith("lora_A")})
    first, last = (load_file(tmp_path / "damaged" / shard) for shard in (shards[0], shards[-1]))
    missing = next(name for name in last if name.endswith("lora_A"))
    twice = next(name for name in first if name.endswith("lora_A"))
    del last[missing], index["weight_map"][missing]
    save_file({**last, twice: first[twice]}, tmp_path / "damaged" / shards[-1], {"format": "pt"})
    index_path.write_text(json.dumps(index))
    DyloraMoeForCausalLM.from_pretrained(tmp_path / "damaged")
    assert missing in caplog.text


def test_a_stack_of_another_shape_is_an_error(saved, tmp_path):
    folder, _ = damaged(
        saved, tmp_path, lambda weights, name: weights.update({name: weights[name][1:].clone()})
    )
    with pytest.raises(RuntimeError, match="mismatch"):
        DyloraMoeForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_the_files_are_those_that_transformers_chose(saved, tmp_path, suffix):
    """`transformers_weights` names one, and another lies beside it."""
    shutil.copytree(saved / "whole", tmp_path / "two")
    weights = {name: tensor + 1 for name, tensor in load_file(tmp_path / "two" / "model.safetensors").items()}
    if suffix == "bin":
        (tmp_path / "two" / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "two" / "pytorch_model.bin")
    else:
        save_file(weights, tmp_path / "two" / "other.safetensors", {"format": "pt"})
        path = tmp_path / "two" / "config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "transformers_weights": "other.safetensors"})
        )
    model = DyloraMoeForCausalLM.from_pretrained(tmp_path / "two")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_experts_on_what_stays_in_float32_with_the_gate(tmp_path):
    """transformers goes by the name, and a module of the foundation may have the gate's."""

    class Block(LlamaForCausalLM):
        def __init__(self, config, trust_remote_code=False):
            super().__init__(config)
            self.model.layers[0].router = torch.nn.Module()
            self.model.layers[0].router.gate = torch.nn.Linear(32, 4)

    module = "model.layers.0.router.gate"
    config = DyloraMoeConfig(base_config=llama_config(), expert_configs=[{"target_modules": [module]}])
    model = DyloraMoeForCausalLM(config, Block(llama_config()))
    model.save_pretrained(tmp_path)
    with mock.patch.object(AutoModelForCausalLM, "from_config", Block):
        loaded = DyloraMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = loaded.expert_layers()[module]
    assert layer.lora_A.dtype == torch.float32
    assert torch.equal(layer.lora_A, model.expert_layers()[module].lora_A)


def test_a_subclass_sees_its_stacks_while_it_is_made(saved):
    class Careful(DyloraMoeForCausalLM):
        def __init__(self, config, *args):
            super().__init__(config, *args)
            self.ranks = sum(layer.lora_A.shape[0] for layer in self.expert_layers().values())
            self.freeze_foundation()
            with torch.device("cpu"):
                object.__setattr__(self, "reference", DyloraMoeForCausalLM(config))
            self.post_init()

    model = Careful.from_pretrained(saved / "whole")
    assert model.ranks > 0
    assert_holds(model, stored(saved / "whole"))
    assert all(layer.lora_A is not None for layer in model.reference.expert_layers().values())


@pytest.mark.parametrize("field", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_a_foundation_that_keeps_layers_in_float32(saved, monkeypatch, field):
    foundation = type(build(llama_config()).foundation)
    monkeypatch.setattr(foundation, field, ["q_proj"])
    model = DyloraMoeForCausalLM.from_pretrained(saved / "whole", dtype=torch.float16)
    for name, layer in model.expert_layers().items():
        kept = name.endswith("q_proj")
        assert layer.lora_A.dtype == (torch.float32 if kept else torch.float16), name


def test_files_that_a_larger_model_left_behind_are_not_read(saved, tmp_path):
    """transformers takes the whole file where there is an index, too."""
    shutil.copytree(saved / "sharded", tmp_path / "both")
    index = json.loads((tmp_path / "both" / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        shard = load_file(tmp_path / "both" / name)
        save_file(
            {key: tensor + 1 for key, tensor in shard.items()}, tmp_path / "both" / name, {"format": "pt"}
        )
    shutil.copy(saved / "whole" / "model.safetensors", tmp_path / "both")
    assert_holds(DyloraMoeForCausalLM.from_pretrained(tmp_path / "both"), stored(saved / "whole"))
    subset = DyloraMoeForCausalLM.from_pretrained(tmp_path / "both", experts=[0])
    whole = DyloraMoeForCausalLM.from_pretrained(saved / "whole", experts=[0])
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in subset.state_dict().items())


@needs_peft_of_transformers
def test_an_adapter_that_peft_loads_onto_a_model_leaves_the_stacks_alone(saved, tmp_path):
    adapted = DyloraMoeForCausalLM.from_pretrained(saved / "whole")
    adapted.add_adapter(IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    adapted.save_pretrained(tmp_path)
    model = DyloraMoeForCausalLM.from_pretrained(saved / "whole")
    before = {
        name: (layer.lora_A.clone(), layer.lora_B.clone()) for name, layer in model.expert_layers().items()
    }
    model.load_adapter(tmp_path)
    for name, layer in model.expert_layers().items():
        assert torch.equal(layer.lora_A, before[name][0]) and torch.equal(layer.lora_B, before[name][1])
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
