"""Two processes share a model's matrices (tensor parallelism), and its requests (data parallelism)."""

import pytest
from helpers_models import build
from helpers_serving import (
    FAMILIES,
    check_tokens,
    family_model,
    llama_base,
    mixed_requests,
    run_engine,
    save_repo,
)


# The executor starts a process a rank, and so does the engine itself.
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def models():
    """One key-value head for two processes, each of which has a copy; and two, one for each."""
    yield "Llama", build(llama_base(num_attention_heads=4, num_key_value_heads=1, hidden_size=128))
    yield "Qwen2", family_model("Qwen2", {"num_key_value_heads": 2}, router_input="experts_sum")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel_on_every_base_model(family, tmp_path):
    model = family_model(family, {"num_key_value_heads": 2} if family != "GPT-2" else None)
    requests = mixed_requests()
    served = run_engine(save_repo(model, tmp_path), requests, **TWO)
    check_tokens(model, requests, served.answers)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_tensor_parallel(family, tmp_path):
    model = dict(models())[family]
    requests = mixed_requests()
    served = run_engine(save_repo(model, tmp_path), requests, **TWO)
    check_tokens(model, requests, served.answers)
