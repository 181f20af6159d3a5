"""`save_pretrained` and back, and what lies in the folder."""

import json

import pytest
import torch
from helpers_models import STRATEGIES, build, left_padded, llama_config, random_rows
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dylora_moe.modeling import DyloraMoeForCausalLM


def same_weights(one, other):
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_exact(tmp_path, tied):
    model = build(llama_config(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    again = DyloraMoeForCausalLM.from_pretrained(tmp_path)
    same_weights(model, again)
    batch = left_padded(random_rows((7, 4)))
    for strategy in STRATEGIES:
        one = model(**batch, routing_strategy=strategy).logits
        assert torch.equal(one, again(**batch, routing_strategy=strategy).logits), strategy
    embeddings, head = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert (embeddings.data_ptr() == head.data_ptr()) == tied


def test_sharded_round_trip(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    same_weights(model, DyloraMoeForCausalLM.from_pretrained(tmp_path))


def test_the_folder_loads_by_its_own_code(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules")
    assert config.expert_configs == model.config.expert_configs
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__module__.startswith("transformers_modules")
    same_weights(model, again)

    batch = left_padded(random_rows((7, 4)))
    headless = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    for strategy in ("router", "best", "single:second", "base"):
        hidden = headless(**batch, routing_strategy=strategy).last_hidden_state
        expected = model(**batch, routing_strategy=strategy, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(hidden, expected)
    with pytest.raises(ValueError, match="no hidden states of its own"):
        headless(**batch, routing_strategy="ensemble")


def test_a_repo_loaded_by_its_own_code_saves_a_complete_repo(tmp_path):
    build().save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "two")
    one, two = ({f.name for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one - {"__init__.py"} == two  # which transformers does not copy to where it imports the code from
    auto_maps = [
        json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in ("one", "two")
    ]
    assert auto_maps[0] == auto_maps[1]
    same_weights(loaded, AutoModel.from_pretrained(tmp_path / "two", trust_remote_code=True))


def test_the_body_alone_saves_its_strategy(tmp_path):
    model = build()
    model.generation_config.routing_strategy = "single:third"
    model.save_pretrained(tmp_path / "one")
    AutoModel.from_pretrained(tmp_path / "one", trust_remote_code=True).save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", trust_remote_code=True)
    assert again.generation_config.routing_strategy == "single:third"


def test_the_strategy_of_generation_config_json_is_the_models(tmp_path):
    model = build()
    model.generation_config.routing_strategy = "single:third"
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["routing_strategy"] == "single:third"
    ids = torch.tensor(random_rows((6,)))
    for model_class in (AutoModelForCausalLM, AutoModel):
        again = model_class.from_pretrained(tmp_path, trust_remote_code=True)
        for one, other in zip(again(ids)[:1], again(ids, routing_strategy="single:2")[:1], strict=True):
            assert torch.equal(one, other)
        assert not torch.equal(again(ids)[0], again(ids, routing_strategy="base")[0])


def test_dtype_applies_to_all_but_the_gate(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        expected = torch.float32 if name.startswith("router.") else torch.bfloat16
        assert parameter.dtype == expected, name
    assert torch.equal(half.router.gate.weight, model.router.gate.weight)


def test_loaded_models_train_experts_and_gate_alone(tmp_path):
    build().save_pretrained(tmp_path)
    again = DyloraMoeForCausalLM.from_pretrained(tmp_path)
    for name, parameter in again.named_parameters():
        trainable = name.endswith((".lora_A", ".lora_B")) or name.startswith("router.")
        assert parameter.requires_grad == trainable, name


def logits(model, strategy):
    with torch.no_grad():
        return model(torch.tensor(random_rows((7, 7), seed=3)), routing_strategy=strategy).logits


def test_router_settings_act_at_once_and_are_what_is_saved(tmp_path):
    model = build(router_mode="dense")
    before = logits(model, "router")
    model.config.router_temperature = 0.2
    assert (logits(model, "router") - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(DyloraMoeForCausalLM.from_pretrained(tmp_path), "router"), logits(model, "router")
    )
    model.config.expert_configs[0]["lora_alpha"] = 99
    with pytest.raises(ValueError, match="changed on a live model"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_modules_that_a_live_config_gained_or_lost_are_not_saved(tmp_path, layout):
    model = build()
    model.config.base_model_name_or_path = "somewhere"
    targets = model.config.expert_configs[0]["target_modules"]
    targets.append("model.layers.0.mlp.gate_proj")
    with pytest.raises(
        ValueError, match=r"gate_proj' computes with ranks and scales of no expert, and the config says"
    ):
        model.save_pretrained(tmp_path / layout, layout=layout)
    targets.pop()
    model.save_pretrained(tmp_path / layout, layout=layout)
    for expert in model.config.expert_configs:
        expert["target_modules"] = [name for name in expert["target_modules"] if "down_proj" not in name]
    with pytest.raises(ValueError, match=r"down_proj' computes with .*, and the config says none"):
        model.save_pretrained(tmp_path / layout, layout=layout)


def test_an_adapter_layout_saves_the_weights_that_it_is_given(tmp_path):
    model = build()
    model.config.base_model_name_or_path = "somewhere"
    given = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", layout="adapter", state_dict=given)
    files = list((tmp_path / "given").rglob("*.safetensors"))
    assert len(files) == 4
    assert not any(tensor.any() for file in files for tensor in load_file(file).values())
    model.save_pretrained(tmp_path / "other", layout="adapter", is_main_process=False)
    assert not list((tmp_path / "other").rglob("*.safetensors"))


def test_no_folder_of_this_machine_is_saved(tmp_path):
    model = build()
    model.config.base_config.name_or_path = "/home/ada/foundation"
    model.save_pretrained(tmp_path)
    assert "home/ada" not in (tmp_path / "config.json").read_text()
