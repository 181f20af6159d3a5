"""Experts saved as PEFT folders, read back by PEFT itself on foundations where it takes names for other
layers."""

import json

import pytest
import torch
from helpers_models import build
from helpers_moe import MOE_FOUNDATIONS, linear_layers, moe_config, moe_model
from peft import PeftModel

from dylora_moe.modeling import DyloraMoeForCausalLM


ROWS = torch.arange(3, 15)[None]


def feed_forward(name: str) -> bool:
    return name.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj")


def routed(name: str, use_rslora: bool = False) -> DyloraMoeForCausalLM:
    """Experts on all linear layers, on one kind of those that PEFT moves, and on none of them."""
    layers = list(linear_layers(moe_model(name)))
    moved = [layer for layer in layers if feed_forward(layer)] or layers[:1]
    experts = [
        {
            "name": "all", "r": 4, "lora_alpha": 8, "use_rslora": use_rslora, "lora_dropout": 0.1, "target_modules": layers,
            "rank_pattern": {moved[-1]: 3}, "alpha_pattern": {moved[0]: 5},
        },
        {"name": "some", "r": 3, "lora_alpha": 4, "target_modules": [layer for layer in moved if "gate" in layer] or moved},
        {"name": "others", "r": 2, "target_modules": [layer for layer in layers if not feed_forward(layer)]},
    ]  # fmt: skip
    return build(moe_config(name), experts)


def foundation_of(model: DyloraMoeForCausalLM, name: str):
    state = {key.replace(".base_layer.", "."): value for key, value in model.foundation.state_dict().items()}
    foundation = moe_model(name)
    foundation.load_state_dict({key: value for key, value in state.items() if "lora_" not in key})
    return foundation


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", MOE_FOUNDATIONS)
def test_peft_computes_what_the_expert_does(name, use_rslora, tmp_path):
    model = routed(name, use_rslora)
    folders = model.save_adapters(tmp_path)
    with torch.no_grad():
        base = model(ROWS, routing_strategy="base").logits
        for index, folder in enumerate(folders):
            expected = model(ROWS, routing_strategy=f"single:{index}").logits
            peft = PeftModel.from_pretrained(foundation_of(model, name), folder).eval()
            assert (expected - base).abs().max() > 0.1
            assert torch.allclose(peft(ROWS).logits, expected, atol=1e-3)


def test_layers_that_peft_does_not_move_are_named_as_ever(tmp_path):
    """The plain form is what other readers of adapters know."""
    folders = routed("dense: qwen3 moe").save_adapters(tmp_path)
    fields = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    assert "target_parameters" not in fields[2] and fields[2]["target_modules"]
    assert (
        fields[0]["lora_dropout"] == 0
        and "model.layers.0.mlp.down_proj.weight" in fields[0]["target_parameters"]
    )
    folders = build().save_adapters(tmp_path / "llama")
    assert all("target_parameters" not in (folder / "adapter_config.json").read_text() for folder in folders)


def test_layout_adapter_saved_loaded_and_saved_again(tmp_path):
    name = "dense and shared: glm4 moe"
    model = routed(name)
    foundation_of(model, name).save_pretrained(tmp_path / "foundation")
    model.config.base_model_name_or_path = str(tmp_path / "foundation")
    for again in range(2):
        model.save_pretrained(tmp_path / str(again), layout="adapter")
        loaded = DyloraMoeForCausalLM.from_pretrained(tmp_path / str(again))
        assert loaded.config.expert_configs == model.config.expert_configs
        with torch.no_grad():
            for index in range(3):
                expected = model(ROWS, routing_strategy=f"single:{index}").logits
                assert torch.equal(loaded(ROWS, routing_strategy=f"single:{index}").logits, expected)
        model = loaded
