"""Fast decoding with plain calls in place of graphs, against the ordinary path; what graphs do is in `test_gpu.py`."""

import copy
import pickle

import pytest
import torch
from helpers_models import PAD, STRATEGIES, build, left_padded, llama_config, llama_experts, random_rows
from transformers import DynamicCache, GPT2Config, MaxLengthCriteria, Qwen2Config, StoppingCriteria, TextStreamer

import dylora_moe.modeling


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_decoding_dylora_moe as fast  # noqa: E402


BATCH = left_padded(random_rows((9, 5, 7), seed=2))
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(fast, "DEVICES", ("cpu",))


@pytest.fixture
def steps(monkeypatch):
    """How many steps were decoded fast."""
    taken = []
    step = fast.Session.step
    monkeypatch.setattr(fast.Session, "step", lambda session: (taken.append(session), step(session))[1])
    return taken


def both(model, inputs=BATCH, seed=0, **arguments):
    """The same call without and with fast decoding."""
    outputs = []
    for wanted in (False, None):
        model.reset_round_robin()
        torch.manual_seed(seed)
        outputs.append(model.generate(**inputs, **{**GREEDY, "fast_decoding": wanted, **arguments}))
    return outputs


SAMPLED = {"do_sample": True, "num_return_sequences": 2, "top_k": 20}


@pytest.mark.parametrize("arguments", [{}, SAMPLED, {"repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "single:0", "single:2"])
def test_tokens_equal_those_of_the_ordinary_path(steps, strategy, arguments):
    model = build(seed=7)
    for seed in range(2):  # the second call runs in the first one's buffers, with the layers' A in one product
        inputs = left_padded(random_rows((9, 5, 7), seed=seed))
        ordinary, found = both(model, inputs, seed, routing_strategy=strategy, **arguments)
        assert found.tolist() == ordinary.tolist()
    assert len(steps) == 2 * (GREEDY["max_new_tokens"] - 1)
    assert len(set(map(id, steps))) == 1
