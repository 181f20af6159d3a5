"""Reading the training wrapper's whole state dict: foundation, experts and gate from one file, or several."""

import json
import os
import shutil

import pytest
import torch
from helpers_checkpoints import (
    change_json,
    random_gate,
    save_foundation,
    save_router,
    save_whole_model,
    snapshot,
    whole_model_tensors,
    write_tensors,
)
from helpers_reading import assert_same, read, read_error
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dylora_moe.hub_export import InputError, detect, export


INSIDE = "foundation_model.base_model.model."
LAYER = f"{INSIDE}model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def tied_foundation(tmp_path_factory):
    return save_foundation(tmp_path_factory.mktemp("tied") / "tied-llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def saved(tmp_path_factory, foundation):
    return save_whole_model(tmp_path_factory.mktemp("whole") / "wrapper", foundation)


@pytest.fixture
def whole(saved, tmp_path):
    """A copy of the state dict, in a run of its own, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run" / "wrapper")


def change_tensors(whole, change):
    tensors = load_file(whole / "model.safetensors")
    change(tensors)
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})


def test_it_is_recognised_by_its_tensors(saved, whole):
    detection = detect(saved)
    assert detection.format == "whole-model state dict"
    assert detection.reason.startswith(f"model.safetensors holds {INSIDE}model.layers.")
    assert ".lora_A.expert_" in detection.reason
    (whole / "config.json").unlink()
    assert detect(whole).format == "whole-model state dict"


def test_a_plain_model_with_such_a_config_is_not_this_format(foundation, tmp_path):
    merged = shutil.copytree(foundation, tmp_path / "merged")
    change_json(merged / "config.json", base_model_name_or_path="somebody/base", _dylora_num_experts=3)
    detection = detect(merged)
    assert detection.format == "merged model"
    assert "no adapter" in detection.reason and "model_type llama" in detection.reason
    (message,) = read(merged).problems
    assert "needs no export" in message and "benchmark it as it is" in message


def test_a_model_with_an_adapter_of_another_kind_in_it_is_of_no_known_format(foundation, tmp_path):
    other = shutil.copytree(foundation, tmp_path / "other")
    save_file({"model.q_proj.lora_A.weight": torch.zeros(2, 2)}, other / "model.safetensors")
    assert "of no known format" in read_error(other)


LAYOUTS = [
    ("model.safetensors", 1),
    ("model.safetensors", 3),
    ("pytorch_model.bin", 1),
    ("pytorch_model.bin", 3),
]


@pytest.mark.parametrize(("file", "shards"), LAYOUTS)
def test_foundation_experts_and_gate_equal_peft(foundation, tmp_path, file, shards):
    whole = save_whole_model(tmp_path / "wrapper", foundation, rank=3, alpha=7, file=file, shards=shards)
    before = snapshot(whole)
    mixture = read(whole)
    assert [expert.name for expert in mixture.experts] == ["expert_0", "expert_1", "expert_2"]
    assert {(layer.rank, layer.lora_alpha) for layer in mixture.experts[1].layers.values()} == {(3, 7)}
    assert [expert.lora_dropout for expert in mixture.experts] == [0.05] * 3
    assert all(expert.mature for expert in mixture.experts)
    for found, expected in zip(mixture.router.read(), random_gate(3).values(), strict=True):
        assert torch.equal(found, expected)
    assert_same(mixture)
    assert snapshot(whole) == before


def test_the_foundation_is_what_it_was_bit_for_bit(saved, foundation):
    weights = read(saved).foundation_weights
    original = LlamaForCausalLM.from_pretrained(foundation).state_dict()
    assert set(weights) == set(original)
    for name, tensor in original.items():
        assert torch.equal(weights[name].read(), tensor)


def test_the_config_is_the_foundations_own(saved, foundation):
    config = read(saved).foundation_config
    assert config.model_type == "llama" and config.num_hidden_layers == 2
    assert not [
        key for key in config.to_dict() if key.startswith("_dylora") or key == "base_model_name_or_path"
    ]
    assert read(saved).foundation.name == str(foundation)


def test_routed_figures_are_said_to_differ(saved):
    for told in (read(saved).notes, read(saved).limits):
        assert "routed figures differ from training's own figures" in told[0]
    assert read(saved).router.router_input == "experts_sum"


@pytest.mark.parametrize("model_type", [None, "dylora-moe"])
def test_without_a_config_of_its_own_that_of_the_named_foundation_is_read(whole, foundation, model_type):
    if model_type is None:
        (whole / "config.json").unlink()
        assert "--base_model" in read_error(whole, lora_alpha=8)
    else:
        change_json(whole / "config.json", model_type=model_type, base_model_name_or_path=None)
        assert "--base_model" in read_error(whole)
    mixture = read(whole, base_model=str(foundation), lora_alpha=8)
    assert mixture.foundation_config.model_type == "llama"
    assert_same(mixture, foundation, lora_alpha=8)


def test_a_head_that_equals_the_embedding_is_tied_again(tied_foundation, tmp_path):
    mixture = read(save_whole_model(tmp_path / "wrapper", tied_foundation, head="equal"))
    assert mixture.foundation_config.tie_word_embeddings is True
    assert "lm_head.weight" not in mixture.foundation_weights
    assert not any("lm_head" in note for note in mixture.notes)
    assert_same(mixture)


def test_a_trained_head_is_kept_and_serves_every_strategy(tied_foundation, tmp_path):
    whole = save_whole_model(tmp_path / "wrapper", tied_foundation, head="trained")
    assert json.loads((whole / "config.json").read_text())["tie_word_embeddings"] is True
    mixture = read(whole)
    assert mixture.foundation_config.tie_word_embeddings is False
    assert [note for note in mixture.notes if "lm_head.weight was trained" in note]
    assert "base included" in mixture.limits[1]
    stored = load_file(whole / "model.safetensors")
    weights = mixture.foundation_weights
    assert torch.equal(weights["lm_head.weight"].read(), stored[f"{INSIDE}lm_head.weight"])
    assert not torch.equal(weights["lm_head.weight"].read(), weights["model.embed_tokens.weight"].read())
    assert_same(mixture)


def test_one_changed_bit_is_a_trained_head(tied_foundation, tmp_path):
    whole = save_whole_model(tmp_path / "wrapper", tied_foundation, head="equal")

    def change(tensors):
        tensors[f"{INSIDE}lm_head.weight"].view(torch.int32)[-1, -1] ^= 1

    change_tensors(whole, change)
    assert read(whole).foundation_config.tie_word_embeddings is False


def test_a_tied_model_without_its_head_is_whole(tied_foundation, tmp_path):
    whole = save_whole_model(tmp_path / "wrapper", tied_foundation, head="equal")
    change_tensors(whole, lambda tensors: tensors.pop(f"{INSIDE}lm_head.weight"))
    assert_same(read(whole))


def test_a_head_that_experts_adapt_is_tied_again_like_any_other(tied_foundation, tmp_path):
    whole = save_whole_model(tmp_path / "wrapper", tied_foundation, head="equal")

    def adapt(tensors):
        tensors[f"{INSIDE}lm_head.base_layer.weight"] = tensors.pop(f"{INSIDE}lm_head.weight")
        generator = torch.Generator().manual_seed(2)
        for name, shape in (("A", (4, 32)), ("B", (97, 4))):
            tensors[f"{INSIDE}lm_head.lora_{name}.expert_0.weight"] = (
                torch.randn(shape, generator=generator) * 0.2
            )

    change_tensors(whole, adapt)
    mixture = read(whole)
    assert "lm_head" in mixture.experts[0].layers and "lm_head" not in mixture.experts[1].layers
    assert mixture.foundation_config.tie_word_embeddings is True
    assert "lm_head.weight" not in mixture.foundation_weights
    assert_same(mixture)


@pytest.mark.parametrize("place", [".", "..", "../best_model"])
def test_settings_come_from_the_run(whole, place):
    (whole / place).mkdir(exist_ok=True)
    (whole / place / "dylo_moe_state").mkdir()
    save_router(whole / place, 3, top_k=2, temperature=0.7, expert_maturity=torch.tensor([1, 1, 0]))
    mixture = read(whole)
    assert (mixture.router.num_experts_per_tok, mixture.router.router_temperature) == (2, 0.7)
    assert any("expert_maturity [1, 1, 0]" in note for note in mixture.notes)
    assert not any("default" in note for note in mixture.notes)
    chosen = read(whole, num_experts_per_tok=3, router_temperature=4.0).router
    assert (chosen.num_experts_per_tok, chosen.router_temperature) == (3, 4.0)


def test_settings_that_nobody_stored_are_trainings_defaults_and_told(saved):
    mixture = read(saved)
    assert (mixture.router.num_experts_per_tok, mixture.router.router_temperature) == (1, 2.0)
    assert any("top_k 1, temperature 2.0" in note for note in mixture.notes)


def test_alpha_is_stored_or_of_the_best_model_or_asked_for(whole, checkpoint):
    change_json(whole / "config.json", _dylora_lora_alpha=None)
    assert "--lora_alpha" in read(whole).problems[0]
    assert_same(read(whole, lora_alpha=3), lora_alpha=3)
    best = shutil.copytree(checkpoint, whole.parent / "best_model")
    change_json(best / "config.json", _dylora_lora_alpha=12)
    assert {layer.lora_alpha for layer in read(whole).experts[0].layers.values()} == {12}
    assert_same(read(whole))


def test_expert_names_match_as_whole_parts(foundation, tmp_path):
    whole = save_whole_model(tmp_path / "wrapper", foundation, num_experts=12, rank=1)
    stored = load_file(whole / "model.safetensors")
    experts = read(whole).experts
    assert [expert.name for expert in experts] == [f"expert_{index}" for index in range(12)]
    for index in (1, 10, 11):
        for module in experts[index].layers:
            for matrix, found in zip("AB", experts[index].read(module), strict=True):
                assert torch.equal(found, stored[f"{INSIDE}{module}.lora_{matrix}.expert_{index}.weight"])


def test_ranks_are_in_the_shapes(whole):
    def shorten(tensors):
        for key in [key for key in tensors if ".expert_2." in key]:
            cut = tensors[key][:2] if ".lora_A." in key else tensors[key][:, :2]
            tensors[key] = cut.contiguous()

    change_tensors(whole, shorten)
    assert "has rank 2, config.json's _dylora_lora_r is 4" in read_error(whole)
    change_json(whole / "config.json", _dylora_lora_r=None)
    assert {layer.rank for layer in read(whole).experts[2].layers.values()} == {2}
    assert_same(read(whole))


def test_buffers_that_older_versions_stored_are_left_out(whole):
    key = f"{INSIDE}model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(whole, lambda tensors: tensors.update({key: torch.ones(4)}))
    assert not [name for name in read(whole).foundation_weights if "inv_freq" in name]


def drop(key):
    return lambda whole: change_tensors(whole, lambda tensors: tensors.pop(key))


def add(key, *shape):
    return lambda whole: change_tensors(whole, lambda tensors: tensors.update({key: torch.ones(shape)}))


def drop_expert(whole):
    def change(tensors):
        for key in [key for key in tensors if ".expert_1." in key]:
            tensors.pop(key)

    change_tensors(whole, change)


def set_config(**fields):
    return lambda whole: change_json(whole / "config.json", **fields)


def shard(change):
    """Two shards in place of the one file, the index then changed."""

    def apply(whole):
        tensors = load_file(whole / "model.safetensors")
        (whole / "model.safetensors").unlink()
        write_tensors(whole, tensors, "model.safetensors", 2)
        index = json.loads((whole / "model.safetensors.index.json").read_text())
        change(whole, index)
        (whole / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def point_outside(whole, index):
    name = "model-00001-of-00002.safetensors"
    (whole / name).rename(whole.parent / name)
    for key in index["weight_map"]:
        if index["weight_map"][key] == name:
            index["weight_map"][key] = f"../{name}"


def link_outside(whole):
    (whole / "model.safetensors").rename(whole.parent / "model.safetensors")
    (whole / "model.safetensors").symlink_to("../model.safetensors")


def truncate(whole):
    os.truncate(whole / "model.safetensors", (whole / "model.safetensors").stat().st_size // 2)


DAMAGES = {
    "modules_to_save": (add(f"{INSIDE}lm_head.modules_to_save.expert_0.weight", 97, 32), ["modules_to_save"]),
    "a copy of one": (add(f"{INSIDE}lm_head.original_module.weight", 97, 32), ["original_module"]),
    "a bias of an expert": (add(f"{LAYER}.lora_B.expert_0.bias", 32), ["lora_B.expert_0.bias", "bias"]),
    "an embedding": (
        add(f"{INSIDE}model.embed_tokens.lora_embedding_A.expert_0", 4, 97),
        ["LoRA on an embedding"],
    ),
    "DoRA": (add(f"{LAYER}.lora_magnitude_vector.expert_0.weight", 32), ["DoRA"]),
    "an unknown tensor": (
        add(f"{INSIDE}model.layers.0.extra.weight", 2),
        ["model.layers.0.extra.weight", "llama"],
    ),
    "a quantised weight": (add(f"{LAYER}.base_layer.weight.absmax", 2), ["q_proj.weight.absmax"]),
    "another part": (add("skill_library.keys", 2), ["skill_library.keys", "not known"]),
    "more than a gate": (add("router.noise.weight", 2), ["router.noise.weight"]),
    "another adapter": (
        add(f"{LAYER}.lora_A.default.weight", 4, 32),
        ["adapter default", "expert_0 to expert_2"],
    ),
    "half a matrix pair": (drop(f"{LAYER}.lora_B.expert_0.weight"), ["expert_0", "q_proj", "not both"]),
    "no such layer": (drop(f"{LAYER}.base_layer.weight"), ["lacks model.layers.0.self_attn.q_proj.weight"]),
    "no norm": (drop(f"{INSIDE}model.norm.weight"), ["lacks model.norm.weight"]),
    "other shape": (add(f"{INSIDE}model.norm.weight", 33), ["model.norm.weight", "[33]", "[32]"]),
    "gate of other size": (add("router.gate.weight", 2, 32), ["[2, 32]", "3 experts"]),
    "truncated": (truncate, ["model.safetensors", "not a whole safetensors file"]),
    "one expert too many": (set_config(_dylora_num_experts=2), ["expert_2", "2 experts"]),
    "number is a list": (set_config(_dylora_num_experts=[3]), ["_dylora_num_experts is [3]"]),
    "alpha is text": (set_config(_dylora_lora_alpha="8"), ["'8'", "number"]),
    "alpha is not a number": (set_config(_dylora_lora_alpha=float("nan")), ["nan", "finite number"]),
    "other vocabulary": (set_config(vocab_size=98), ["weight of its base model is [97, 32]", "[98, 32]"]),
    "countless layers": (set_config(num_hidden_layers=999), ["999 layers"]),
    "layers are text": (set_config(num_hidden_layers="two"), ["config.json"]),
    "no causal model": (set_config(model_type="clip_vision_model"), ["no causal language model"]),
    "shard elsewhere": (shard(point_outside), ["'../model-00001-of-00002.safetensors'"]),
    "shard gone": (
        shard(lambda whole, index: (whole / "model-00002-of-00002.safetensors").unlink()),
        ["names the shard 'model-00002-of-00002.safetensors'"],
    ),
    "shard incomplete": (
        shard(lambda whole, index: index["weight_map"].update({"lost": "model-00001-of-00002.safetensors"})),
        ["lacks lost"],
    ),
    "index without map": (shard(lambda whole, index: index.pop("weight_map")), ["no weight_map"]),
    "index of numbers": (
        shard(lambda whole, index: index["weight_map"].update({"x": 3})),
        ["model.safetensors.index.json"],
    ),
    "file elsewhere": (link_outside, ["model.safetensors", "leads out of"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_names_it(whole, damage):
    apply, expected = DAMAGES[damage]
    apply(whole)
    message = read_error(whole)
    for part in expected:
        assert part in message


def test_an_expert_that_is_not_there_is_named_with_a_sibling_that_has_it(whole, checkpoint):
    drop_expert(whole)
    assert "holds no tensor of expert_1; no checkpoint-*" in read(whole).problems[0]
    shutil.copytree(checkpoint, whole.parent / "checkpoint-3")
    assert "checkpoint-3 has expert_1" in read(whole).problems[0]


def test_a_missing_gate_is_a_problem(whole):
    drop("router.gate.bias")(whole)
    mixture = read(whole)
    assert mixture.router is None
    assert "router.gate.bias" in mixture.problems[0]


def test_code_that_a_config_names_is_not_run(whole, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (whole / "evil.py").write_text("open('code-was-run', 'w')\nclass Evil: pass\n")
    change_json(
        whole / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    )
    config = read(whole).foundation_config
    assert not hasattr(config, "auto_map")
    change_json(whole / "config.json", model_type="evil", base_model_name_or_path=None)
    assert "--base_model" in read_error(whole)
    assert "cannot be loaded" in read_error(whole, base_model=str(whole))
    assert not (tmp_path / "code-was-run").exists()


def test_a_pickle_with_code_is_not_run(foundation, tmp_path, monkeypatch):
    class RunsCode:
        def __reduce__(self):
            return os.mkdir, ("code-was-run",)

    monkeypatch.chdir(tmp_path)
    whole = save_whole_model(tmp_path / "wrapper", foundation, file="pytorch_model.bin")
    torch.save({"evil": RunsCode()}, whole / "pytorch_model.bin")
    assert "more than tensors" in read_error(whole)
    assert not (tmp_path / "code-was-run").exists()


def test_the_helpers_keys_are_those_of_the_format(foundation):
    """The builder takes its names from PEFT; were they others, every test here would test something else."""
    tensors = whole_model_tensors(foundation, 2, 4, "as it is")
    assert f"{LAYER}.base_layer.weight" in tensors and f"{LAYER}.lora_A.expert_1.weight" in tensors
    assert {"router.gate.weight", "router.gate.bias"} < set(tensors)


def test_a_trained_foundation_is_remembered_by_the_repo(tmp_path):
    foundation = save_foundation(tmp_path / "foundation", tie_word_embeddings=True)
    source = save_whole_model(tmp_path / "run" / "model", foundation, head="trained")
    change_json(source / "config.json", base_model_name_or_path="nobody/small-llama")
    export(source, tmp_path / "full", tokenizer=str(foundation), verify=False)
    with pytest.raises(InputError, match="training changed the source's own base model"):
        export(tmp_path / "full", tmp_path / "light", layout="adapter", verify=False)
    export(tmp_path / "full", tmp_path / "again", verify=False)
    for repo in ("full", "again"):
        limits = (tmp_path / repo / "README.md").read_text().split("## Limits")[1]
        assert "was trained" in limits and "differ" in limits
