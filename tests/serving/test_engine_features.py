"""What an engine does beside single steps: compiled streams, memory, and more than one process for itself."""

import pytest
from helpers_models import build
from helpers_serving import check_tokens, family_model, llama_base, mixed_requests, run_engine, save_repo


def test_compiled_streams(llama):
    """`torch.compile` of every stream, as `enforce_eager=False` asks for."""
    model, repo = llama()
    requests = mixed_requests()
    served = run_engine(repo, requests, requests, enforce_eager=False, timeout=900)
    for answers in served.rounds:
        check_tokens(model, requests, answers)


@pytest.mark.slow
def test_compiled_streams_of_a_mixture_of_experts(tmp_path):
    model = family_model("Mixtral")
    requests = mixed_requests(("router", "single:1"))
    served = run_engine(save_repo(model, tmp_path), requests, enforce_eager=False, timeout=900)
    check_tokens(model, requests, served.answers)


def test_an_engine_in_a_process_of_its_own(llama):
    """As `LLM(...)` and `vllm serve` start it, with the worker's objects apart from the front end's."""
    model, repo = llama("experts_sum")
    requests = mixed_requests()
    served = run_engine(repo, requests, requests, variables={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    for answers in served.rounds:
        check_tokens(model, requests, answers)


def test_samples_of_one_prompt_choose_each(llama):
    """`n` samples of a request share their parameters inside the engine; `best` chooses for each."""
    repo = llama()[1]
    requests = mixed_requests(("best", "router"), count=6)
    for request in requests:
        request.params = {"n": 3, "temperature": 0.8, "seed": 5}
    served = run_engine(repo, requests)
    again = run_engine(repo, requests, variables={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert served.answers == again.answers


def test_weights_are_in_memory_once(tmp_path):
    """Two streams take no more than one, the cache of keys and values aside."""
    base = llama_base(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=6)
    targets = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(6)]
    experts = [{"name": f"expert_{i}", "r": 4, "lora_alpha": 8, "target_modules": targets} for i in range(2)]
    model = build(base, experts)
    weights_mb = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    repo = save_repo(model, tmp_path)
    requests = mixed_requests((None,), count=4, max_tokens=4)
    peaks = []
    for strategy in ("single:0", "router"):
        few = {
            "num_gpu_blocks_override": 32,
            "block_size": 32,
            "hf_overrides": {"routing_strategy": strategy},
        }
        peaks.append(run_engine(repo, requests, **few).details["peak_mb"])
    print(
        f"{weights_mb:.0f} MB of weights; peaks {peaks[0]:.0f} MB with one stream, {peaks[1]:.0f} MB with two"
    )
    assert peaks[1] - peaks[0] < 0.05 * weights_mb
