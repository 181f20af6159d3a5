"""New models: initial values of experts, a loaded foundation that is wrapped, the meta device."""

import pytest
import torch
from helpers_models import build, llama_config, random_rows
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


def test_new_experts_start_as_in_peft():
    model = DyloraMoeForCausalLM(build().config)
    for layer in model.expert_layers().values():
        bound = 1 / layer.lora_A.shape[1] ** 0.5  # kaiming_uniform with a = sqrt(5)
        assert 0.5 * bound < layer.lora_A.abs().max() <= bound
        assert not layer.lora_B.any()


def test_experts_missing_from_a_file_are_initialised_too(tmp_path):
    build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "lora_" not in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    model = DyloraMoeForCausalLM.from_pretrained(tmp_path)
    for layer in model.expert_layers().values():
        bound = 1 / layer.lora_A.shape[1] ** 0.5
        assert 0.5 * bound < layer.lora_A.abs().max() <= bound
        assert not layer.lora_B.any()


def test_building_on_the_meta_device():
    with torch.device("meta"):
        model = DyloraMoeForCausalLM(build().config)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_wrapping_a_loaded_foundation_keeps_its_weights():
    foundation = AutoModelForCausalLM.from_config(llama_config())
    foundation.lm_head = torch.nn.Linear(32, 97, bias=False)  # a module that transformers has not initialised
    before = {name: tensor.clone() for name, tensor in foundation.state_dict().items()}
    model = DyloraMoeForCausalLM.from_foundation(foundation, build().config)
    after = {
        k.replace(".base_layer.", "."): v
        for k, v in model.foundation.state_dict().items()
        if "lora_" not in k
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_wrapping_a_loaded_foundation_leaves_its_attention_as_it_was():
    foundation = AutoModelForCausalLM.from_config(llama_config(), attn_implementation="sdpa").eval()
    ids = torch.tensor(random_rows((6,)))
    before = foundation(ids).logits
    config = DyloraMoeConfig(base_config=foundation.config, expert_configs=build().config.expert_configs)
    assert foundation.config._attn_implementation == "sdpa"
    model = DyloraMoeForCausalLM.from_foundation(foundation, config)
    assert model.foundation.config is model.config.base_config
    assert model.foundation.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids, routing_strategy="base").logits, before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attn_implementation_reaches_the_foundation(tmp_path, implementation):
    build().save_pretrained(tmp_path)
    model = DyloraMoeForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert model.foundation.config._attn_implementation == implementation
    assert model.foundation.model.config._attn_implementation == implementation
    model.set_attn_implementation("eager")
    assert model.foundation.config._attn_implementation == "eager"
