"""Subsets of experts, the layout `adapter`, PEFT folders and merged experts."""

import json
from pathlib import Path

import pytest
import torch
from helpers_models import STRATEGIES, PeftLoop, build, left_padded, llama_config, random_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config

from dylora_moe.modeling import DyloraMoeForCausalLM


BATCH = left_padded(random_rows((9, 5), seed=2))


def logits(model, strategy):
    with torch.no_grad():
        return model(**BATCH, routing_strategy=strategy).logits


def same(one, other, strategies=STRATEGIES) -> None:
    for strategy in strategies:
        assert torch.equal(logits(one, strategy), logits(other, strategy)), strategy


@pytest.fixture
def saved(tmp_path):
    """A routed model, its foundation in a folder of its own, and both layouts."""
    model = build()
    PeftLoop(model).peft.unload().save_pretrained(tmp_path / "foundation")
    model.config.base_model_name_or_path = str(tmp_path / "foundation")
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "adapter", layout="adapter")
    return model, tmp_path


def gpt2():
    base = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, pad_token_id=2, bos_token_id=0, eos_token_id=1
    )
    targets = [f"transformer.h.{layer}.attn.c_attn" for layer in range(2)]
    return build(
        base, [{"name": "a", "r": 4, "target_modules": targets}, {"name": "b", "target_modules": targets[1:]}]
    )


# Subsets


@pytest.mark.parametrize("layout", ["full", "adapter"])
@pytest.mark.parametrize(
    "experts", [["first", "second"], ["third", "first"], [1], ["second", "third", "first"]]
)
def test_a_subset_computes_what_it_did_in_the_whole(saved, layout, experts):
    model, folder = saved
    part, information = DyloraMoeForCausalLM.from_pretrained(
        folder / layout, experts=experts, output_loading_info=True
    )
    assert not information["missing_keys"] and not information["unexpected_keys"]
    numbers = [model.config.expert_index(expert) for expert in experts]
    assert part.config.expert_names == [model.config.expert_names[number] for number in numbers]
    for position, number in enumerate(numbers):
        assert torch.equal(logits(part, f"single:{position}"), logits(model, f"single:{number}"))
    assert torch.equal(logits(part, "base"), logits(model, "base"))
    with torch.no_grad():
        whole = model(**BATCH, routing_strategy="router", output_router_logits=True).router_logits
        found = part(**BATCH, routing_strategy="router", output_router_logits=True).router_logits
    torch.testing.assert_close(found, whole[..., numbers], atol=1e-5, rtol=0)


def test_a_subset_loads_by_the_repos_own_code(saved):
    model, folder = saved
    part = AutoModelForCausalLM.from_pretrained(folder / "full", trust_remote_code=True, experts=["third"])
    assert type(part).__module__.startswith("transformers_modules")
    assert torch.equal(logits(part, "single:0"), logits(model, "single:third"))


def test_a_subset_reads_no_other_experts_rows(saved, monkeypatch):
    from dylora_moe.modeling import loading_dylora_moe

    _, folder = saved
    rows = []
    original = loading_dylora_moe._rows

    def counting(stack, layout, numbers):
        rows.append((original(stack, layout, numbers).shape[0], sum(layout[number][0] for number in numbers)))
        return original(stack, layout, numbers)

    monkeypatch.setattr(loading_dylora_moe, "_rows", counting)
    DyloraMoeForCausalLM.from_pretrained(folder / "full", experts=["first"])
    assert rows and all(read == wanted == 4 for read, wanted in rows)


def test_a_single_experts_default_goes_on_meaning_that_expert(saved):
    model, folder = saved
    model.generation_config.routing_strategy = "single:2"
    model.save_pretrained(folder / "single")
    part = DyloraMoeForCausalLM.from_pretrained(folder / "single", experts=["third", "first"])
    assert part.generation_config.routing_strategy == "single:0"
    assert torch.equal(part(**BATCH).logits, logits(model, "single:third"))
    with pytest.raises(ValueError, match="single:third"):
        DyloraMoeForCausalLM.from_pretrained(folder / "single", experts=["first"])


@pytest.mark.parametrize("experts", [["fourth"], ["first", "first"], [], [3]])
def test_a_wrong_subset_is_refused(saved, experts):
    with pytest.raises(ValueError, match="first"):
        DyloraMoeForCausalLM.from_pretrained(saved[1] / "full", experts=experts)


# Layout `adapter`


def test_one_layout_to_the_other_and_back_is_bit_exact(saved):
    model, folder = saved
    adapter = DyloraMoeForCausalLM.from_pretrained(folder / "adapter")
    same(model, adapter)
    adapter.save_pretrained(folder / "full again", layout="full")
    full = DyloraMoeForCausalLM.from_pretrained(folder / "full again")
    assert full.config.weights_layout == "full" and adapter.config.weights_layout == "adapter"
    full.save_pretrained(folder / "adapter again", layout="adapter")
    same(model, DyloraMoeForCausalLM.from_pretrained(folder / "adapter again"))
    state = full.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_repo_holds_no_foundation_and_loads_by_its_own_code(saved):
    model, folder = saved
    names = {path.name for path in (folder / "adapter").rglob("*.safetensors")}
    assert names == {"adapter_model.safetensors", "router.safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / "adapter", trust_remote_code=True, device_map="cpu"
    )
    assert type(loaded).__module__.startswith("transformers_modules")
    assert loaded.name_or_path == str(folder / "adapter")
    same(model, loaded)
    half = AutoModelForCausalLM.from_pretrained(
        folder / "adapter", trust_remote_code=True, dtype=torch.bfloat16
    )
    assert half.dtype == torch.bfloat16 and half.router.gate.weight.dtype == torch.float32


def test_expert_folders_load_with_peft_as_they_stand(saved):
    model, folder = saved
    for name in model.config.expert_names:
        base = AutoModelForCausalLM.from_pretrained(folder / "foundation")
        peft = PeftModel.from_pretrained(base, str(folder / "adapter"), subfolder=f"experts/{name}").eval()
        with torch.no_grad():
            found = peft(**BATCH).logits
        torch.testing.assert_close(found, logits(model, f"single:{name}"), atol=1e-4, rtol=0)


def test_base_model_overrides_and_a_foundation_of_other_shapes_is_refused(saved):
    model, folder = saved
    (folder / "foundation").rename(folder / "moved")
    with pytest.raises(
        OSError, match=r"The base model '.*foundation', which .* no such folder .*`base_model=`"
    ):
        DyloraMoeForCausalLM.from_pretrained(folder / "adapter")
    same(model, DyloraMoeForCausalLM.from_pretrained(folder / "adapter", base_model=str(folder / "moved")))
    other = AutoModelForCausalLM.from_config(llama_config(vocab_size=101))
    other.save_pretrained(folder / "other")
    with pytest.raises(ValueError, match=r"embed_tokens.*\(101, 32\).*\(97, 32\)"):
        DyloraMoeForCausalLM.from_pretrained(folder / "adapter", base_model=str(folder / "other"))
    with pytest.raises(ValueError, match="holds its own base model"):
        DyloraMoeForCausalLM.from_pretrained(folder / "full", base_model=str(folder / "moved"))


def test_an_overriding_foundation_stays_the_models(saved):
    _, folder = saved
    other = AutoModelForCausalLM.from_pretrained(folder / "foundation")
    other.model.layers[0].mlp.up_proj.weight.data.mul_(3)
    other.save_pretrained(folder / "other")
    loaded = DyloraMoeForCausalLM.from_pretrained(folder / "adapter", base_model=str(folder / "other"))
    assert loaded.config.base_model_name_or_path == str(folder / "other")
    assert loaded.config.base_model_revision is None
    loaded.save_pretrained(folder / "again", layout="adapter")
    same(loaded, DyloraMoeForCausalLM.from_pretrained(folder / "again"), ["base", "router"])


def test_full_is_what_is_saved_unless_asked_otherwise(saved):
    model, folder = saved
    loaded = DyloraMoeForCausalLM.from_pretrained(folder / "adapter")
    loaded.save_pretrained(folder / "again")
    assert json.loads((folder / "again" / "config.json").read_text())["weights_layout"] == "full"
    (folder / "foundation").rename(folder / "gone")
    same(model, DyloraMoeForCausalLM.from_pretrained(folder / "again"), ["router"])


def test_a_subset_of_layout_adapter_reads_no_other_experts_files(saved, monkeypatch):
    from dylora_moe.modeling import loading_dylora_moe

    read = []
    original = loading_dylora_moe._open_safetensors
    monkeypatch.setattr(
        loading_dylora_moe, "_open_safetensors", lambda path: read.append(Path(path)) or original(path)
    )
    DyloraMoeForCausalLM.from_pretrained(saved[1] / "adapter", experts=["third"])
    assert [path.parent.name for path in read] == ["third", "adapter"]  # its file and the router's


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_a_subset_of_a_variant(tmp_path, shards):
    model = build()
    model.save_pretrained(tmp_path)
    model.half().save_pretrained(tmp_path, variant="fp16", **shards)
    part = DyloraMoeForCausalLM.from_pretrained(tmp_path, variant="fp16", experts=["second"], dtype="auto")
    assert part.dtype == torch.float16
    same(part, DyloraMoeForCausalLM.from_pretrained(tmp_path, variant="fp16", dtype="auto"), ["base"])
    with pytest.raises(OSError):
        DyloraMoeForCausalLM.from_pretrained(tmp_path, variant="other", experts=["second"])


def test_a_resized_model_is_saved_whole(saved):
    model, folder = saved
    model.resize_token_embeddings(103, mean_resizing=False)
    with pytest.raises(ValueError, match="resized"):
        model.save_pretrained(folder / "again", layout="adapter")
    model.save_pretrained(folder / "again")
    same(model, DyloraMoeForCausalLM.from_pretrained(folder / "again"), ["router"])


def test_layout_adapter_needs_the_foundations_name(tmp_path):
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        build().save_pretrained(tmp_path, layout="adapter")


# PEFT folders and merged experts


@pytest.mark.parametrize("make", [build, gpt2])
def test_save_adapters_is_bit_exact(tmp_path, make):
    model = make()
    folders = model.save_adapters(tmp_path / "adapters")
    assert [folder.name for folder in folders] == model.config.expert_names
    for index, folder in enumerate(folders):
        base = PeftLoop(model).peft.unload()
        peft = PeftModel.from_pretrained(base, str(folder)).eval()
        for name, (lora_a, lora_b) in model.expert_weights(index).items():
            layer = peft.base_model.model.get_submodule(name)
            assert torch.equal(layer.lora_A["default"].weight, lora_a)
            assert torch.equal(layer.lora_B["default"].weight, lora_b)
            rank, scale = model.config.rank_layouts()[name][index]
            assert layer.r["default"] == rank and layer.scaling["default"] == pytest.approx(scale)
        with torch.no_grad():
            found = peft(**BATCH).logits
        torch.testing.assert_close(found, logits(model, f"single:{index}"), atol=1e-4, rtol=0)
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_merged_expert_ends_and_samples_as_the_mixture_does(tmp_path):
    model = build()
    model.generation_config.eos_token_id = [1, 5]
    model.generation_config.routing_strategy = "best"
    model.merge_expert(0).save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert found.eos_token_id == [1, 5] and not hasattr(found, "routing_strategy")
    assert model.generation_config.routing_strategy == "best"


@pytest.mark.parametrize("make", [build, gpt2])
def test_a_merged_expert_is_an_ordinary_model(tmp_path, make):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index in range(model.config.num_experts):
        merged = model.merge_expert(index)
        assert type(merged) is type(model.foundation)
        assert not [name for name, _ in merged.named_modules() if "base_layer" in name]
        merged.save_pretrained(tmp_path / str(index))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(index))
        with torch.no_grad():
            found = loaded(**BATCH).logits
        torch.testing.assert_close(found, logits(model, f"single:{index}"), atol=1e-4, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
