"""What is not served is refused before an engine answers, in one error that says what and why."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers_models import SIZES, build, build_on_latent_attention, llama_experts
from helpers_serving import EngineError, Request, llama_base, run_engine, save_repo
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, Lfm2Config


PROMPT = Request([5, 6, 7, 8], max_tokens=2)


def refused(repo, *requests, **options) -> str:
    """The log of an engine that must not start, or not answer."""
    with pytest.raises(EngineError) as error:
        run_engine(repo, list(requests) or [PROMPT], **options)
    return str(error.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"hf_overrides": {"routing_strategy": "ensemble"}}, "mixes the next-token distributions"),
        ({"hf_overrides": {"routing_strategy": "round_robin"}}, "name an expert in each, as single:<expert>"),
        ({"hf_overrides": {"routing_strategy": "single:7"}}, "Expert 7 is out of range"),
        ({"hf_overrides": {"rope_parameters": {"rope_theta": 5e5}}}, '"base_config": {"rope_parameters"'),
        ({"enable_lora": True}, "adapters on top"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative",
        ),
        ({"quantization": "fp8"}, "quantisation"),
        (
            {"pipeline_parallel_size": 2, "hf_overrides": {"routing_strategy": "single:0"}},
            "Pipeline parallelism is not supported for this model",  # vLLM's own words
        ),
        ({"kv_offloading_size": 1}, "keys and values from elsewhere"),
        ({"kv_sharing_fast_prefill": True}, "a part of the tokens"),
        ({"load_format": "dummy"}, "The experts were not loaded"),
    ],
    ids=[
        "ensemble",
        "round_robin",
        "no such expert",
        "base model's field",
        "adapters",
        "speculative",
        "quantised",
        "pipeline",
        "offloaded",
        "fast prefill",
        "dummy weights",
    ],
)
def test_options_of_an_engine(options, words, llama):
    assert words in refused(llama()[1], **options)


@pytest.mark.parametrize(
    "strategy, words",
    [
        ("ensemble", "is not served"),
        ("single:none", "There is no expert named"),
        ("router", "needs a second KV cache"),
    ],
)
def test_strategies_of_a_request(strategy, words, llama):
    overrides = {"routing_strategy": "single:0"}
    log = refused(llama()[1], Request([5, 6, 7], strategy), hf_overrides=overrides)
    assert words in log and "VLLMValidationError" in log


def test_the_strategies_of_a_router_in_every_layer(tmp_path):
    repo = save_repo(build(llama_base(), router_kind="arrow"), tmp_path)
    assert "'router' is not served: this mixture has a router in every layer" in refused(repo)
    request = Request([5, 6, 7], "best")
    assert "'best' is not served" in refused(repo, request, hf_overrides={"routing_strategy": "uniform"})


def test_log_probabilities_of_a_prompt_whose_expert_is_chosen_later(llama):
    request = Request([5, 6, 7], "best", params={"prompt_logprobs": 0})
    assert "has no `prompt_logprobs`" in refused(llama()[1], request)


def test_an_adapted_head(tmp_path):
    experts = llama_experts()
    experts[0]["target_modules"] = [*experts[0]["target_modules"], "lm_head"]
    repo = save_repo(build(llama_base(), experts), tmp_path)
    assert "Experts adapt lm_head, and vLLM's LlamaForCausalLM has no linear layer for it" in refused(repo)


def test_a_base_model_that_vllm_has_not(tmp_path, llama):
    repo = shutil.copytree(llama()[1], tmp_path / "repo")
    config = json.loads((repo / "config.json").read_text())
    config["base_config"]["architectures"] = ["SomethingForCausalLM"]
    (repo / "config.json").write_text(json.dumps(config))
    assert "The base model is a SomethingForCausalLM, which vLLM" in refused(repo)


def test_a_base_model_of_latent_attention(tmp_path):
    assert "not served with a base model of latent attention" in refused(
        save_repo(build_on_latent_attention(), tmp_path)
    )


def test_a_base_model_with_a_state(tmp_path):
    base = Lfm2Config(**SIZES, layer_types=["conv", "full_attention"], max_position_embeddings=512)
    experts = [{"name": "first", "r": 4, "target_modules": ["model.layers.1.self_attn.q_proj"]}]
    repo = save_repo(build(base, experts), tmp_path)
    assert "is a Lfm2ForCausalLM, which is no decoder with a KV cache alone" in refused(repo)


def damaged(repo, change):
    """Change a copy's weights: `change` gets the tensors by name."""
    tensors = load_file(repo / "model.safetensors")
    change(tensors)
    save_file(tensors, repo / "model.safetensors", metadata={"format": "pt"})
    return repo


STACK = "foundation.model.layers.0.self_attn.q_proj.lora_B"


def _nan(name):
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[3] = torch.nan

    return change


def _wider(name):
    def change(tensors):
        tensors[name] = torch.nn.functional.pad(tensors[name], (0, 8))

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensors: tensors.pop(STACK), "The weights lack model.layers.0.self_attn.q_proj.lora_B"),
        (lambda tensors: tensors.pop("router.gate.bias"), "The router's gate.bias is missing"),
        (_nan(STACK), "q_proj.lora_B holds NaN"),
        (_nan("router.gate.weight"), "gate.weight holds NaN"),
        (_nan("foundation.model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.gate_up_proj.weight holds NaN"),
        (
            lambda tensors: tensors.pop("foundation.model.layers.1.mlp.up_proj.weight"),
            "layers.1.mlp.gate_up_proj.weight holds NaN or infinity: its file is damaged or lacks a part of it",
        ),
        (lambda tensors: tensors.pop("foundation.model.norm.weight"), "model.norm.weight holds NaN"),
        (_wider("foundation.model.layers.0.self_attn.v_proj.lora_B"), "and 40 outputs, and the base model's"),
        (_wider("foundation.model.layers.0.self_attn.q_proj.lora_A"), "are of 72 inputs and"),
    ],
    ids=[
        "no stack",
        "no gate",
        "NaN in a stack",
        "NaN in the gate",
        "NaN in the base model",
        "no matrix of two in one",
        "no norm",
        "too many outputs",
        "too many inputs",
    ],
)
def test_damaged_weights(change, words, tmp_path, llama):
    repo = damaged(shutil.copytree(llama()[1], tmp_path / "repo"), change)
    assert words in refused(repo)


def test_a_config_that_lies_about_ranks(tmp_path, llama):
    repo = shutil.copytree(llama()[1], tmp_path / "repo")
    config = json.loads((repo / "config.json").read_text())
    config["expert_configs"][0]["r"] = 5
    (repo / "config.json").write_text(json.dumps(config))
    assert "by the ranks in config.json it has 16 rows" in refused(repo)


def test_an_expert_with_more_than_the_config_says(tmp_path):
    repo = save_repo(build(llama_base()), tmp_path, "adapter")
    file = repo / "experts" / "first" / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    save_file({**load_file(file), key: torch.zeros(4, 64)}, file)
    assert f"adapter_model.safetensors holds {key}" in refused(repo)


def test_a_layer_whose_outputs_vllm_reorders(tmp_path):
    """BLOOM's files have queries, keys and values head by head, and vLLM's layer has all queries first."""
    repo = bloom_repo(tmp_path, "query_key_value", ["first"])
    assert "whose outputs vLLM has in another order than the files" in refused(repo)


def test_a_base_model_that_has_no_second_stream(tmp_path):
    repo = bloom_repo(tmp_path, "dense", ["first", "second"])
    assert "BloomForCausalLM reads its own numbers while it is built" in refused(repo)


def bloom_repo(folder, layer, experts):
    base = BloomConfig(vocab_size=SIZES["vocab_size"], hidden_size=64, n_layer=2, n_head=2)
    names = [f"transformer.h.{number}.self_attention.{layer}" for number in range(2)]
    entries = [{"name": name, "r": 4, "target_modules": names} for name in experts]
    return save_repo(build(base, entries), folder)


def test_an_engine_that_did_not_take_what_routing_needs():
    """As with a vLLM that no longer asks for an architecture's changes of its config."""
    from dylora_moe.serving.engine_config import REQUEST_ROUTING, SCHEDULER, check_engine

    def engine(scheduler, processors):
        model_config = SimpleNamespace(logits_processors=processors)
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(scheduler_cls=scheduler), model_config=model_config
        )

    check_engine(engine(SCHEDULER, [REQUEST_ROUTING]))
    for changed in (engine(None, [REQUEST_ROUTING]), engine(SCHEDULER, None), engine(SCHEDULER, [])):
        with pytest.raises(RuntimeError, match="has changed an interface that routing needs"):
            check_engine(changed)
