"""Greedy tokens of the engine are those of the model's own `generate`, in float32, for every strategy."""

import pytest
import torch
from helpers_models import build, random_rows
from helpers_serving import (
    FAMILIES,
    STRATEGIES,
    Request,
    check_tokens,
    family_model,
    llama_base,
    mixed_requests,
    run_engine,
    save_repo,
)


SETTINGS = {
    "prefix caching": {"enable_prefix_caching": True, "block_size": 32},
    "no prefix caching": {"enable_prefix_caching": False},
    "chunks of 32": {"max_num_batched_tokens": 32, "enable_chunked_prefill": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("router_input", ["base", "experts_sum"])
def test_all_strategies_in_one_batch(router_input, setting, llama):
    model, repo = llama(router_input)
    requests = mixed_requests()
    served = run_engine(repo, requests, requests, **SETTINGS[setting])
    for answers in served.rounds:
        check_tokens(model, requests, answers)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_of_the_whole_engine(strategy, setting, llama):
    model, repo = llama()
    requests = mixed_requests((None,))
    overrides = {"routing_strategy": strategy}
    served = run_engine(repo, requests, hf_overrides=overrides, **SETTINGS[setting])
    check_tokens(model, requests, served.answers, strategy)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_the_other_strategies_of_a_router_in_every_layer(layout, tmp_path):
    model = build(llama_base(), router_kind="arrow")
    model.update_prototypes()
    requests = mixed_requests((None, "single:0", "base"), count=6)
    repo = save_repo(model, tmp_path, layout)
    served = run_engine(repo, requests, hf_overrides={"routing_strategy": "uniform"})
    check_tokens(model, requests, served.answers, "uniform")


@pytest.mark.parametrize("family", FAMILIES)
def test_other_base_models(family, tmp_path):
    model = family_model(family)
    requests = mixed_requests(("router", "single:1", "base"))
    served = run_engine(save_repo(model, tmp_path), requests)
    check_tokens(model, requests, served.answers)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["full", "adapter"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_strategies_on_other_base_models(family, setting, layout, tmp_path):
    model = family_model(family, router_input="experts_sum" if layout == "full" else "base")
    requests = mixed_requests()
    served = run_engine(save_repo(model, tmp_path, layout), requests, requests, **SETTINGS[setting])
    for answers in served.rounds:
        check_tokens(model, requests, answers)


@pytest.mark.parametrize(
    "fields",
    [
        {"router_mode": "dense", "router_temperature": 0.7},
        {"router_mode": "sparse", "num_experts_per_tok": 2},
        {"router_input": None},
    ],
    ids=["dense", "top 2", "no router"],
)
def test_ways_to_route(fields, tmp_path):
    model = build(llama_base(), **fields)
    strategies = STRATEGIES if model.router is not None else ("single:0", "uniform", "base")
    requests = mixed_requests(strategies)
    served = run_engine(save_repo(model, tmp_path), requests)
    check_tokens(model, requests, served.answers)


@pytest.mark.parametrize("router_input", ["base", "experts_sum"])
def test_layout_adapter(router_input, tmp_path):
    model = build(llama_base(tie_word_embeddings=True, attention_bias=True), router_input=router_input)
    repo = save_repo(model, tmp_path, "adapter")
    requests = mixed_requests()
    check_tokens(model, requests, run_engine(repo, requests).answers)


def test_experts_stored_in_less_precision_than_the_engine_s(tmp_path):
    """They are multiplied in the engine's, as the model's own loading does."""
    model = build(llama_base())
    for layer in model.expert_layers().values():
        for stack in (layer.lora_A, layer.lora_B):
            stack.data = stack.data.bfloat16()
    repo = save_repo(model, tmp_path)
    requests = mixed_requests()
    served = run_engine(repo, requests)
    check_tokens(type(model).from_pretrained(repo, dtype=torch.float32).eval(), requests, served.answers)


def test_equal_prompts_under_different_strategies_share_no_blocks(llama):
    """Keys of a token depend on the experts that acted on it, for `best` on the chosen one."""
    model, repo = llama()
    prompts = random_rows((70, 70), seed=8)
    requests = [Request(prompt, strategy) for prompt in prompts for strategy in STRATEGIES]
    served = run_engine(repo, requests, requests, enable_prefix_caching=True, block_size=32)
    for answers in served.rounds:
        check_tokens(model, requests, answers)
    # Nothing is there to share in the first round, but for `best` with the expert that it chose.
    for request, answer in zip(requests, served.answers, strict=True):
        assert answer.cached == 0 or request.strategy == "best"
    assert all(answer.cached == 64 for answer in served.rounds[1])


def test_preempted_requests(llama):
    """So few blocks that requests are put back, first passes of `best` among them."""
    model, repo = llama()
    requests = mixed_requests(("best", "router", "single:1"), count=16, max_tokens=60)
    few = {"block_size": 32, "num_gpu_blocks_override": 14, "disable_log_stats": False}
    served = run_engine(repo, requests, **few)
    check_tokens(model, requests, served.answers)
    first_passes = sum(request.strategy == "best" for request in requests)
    assert served.details["preemptions"] > first_passes
