"""Norms in one kernel: for whom, for how long, and with the same numbers."""

import copy
import pickle
import threading

import pytest
import torch
from helpers_graphs import GREEDY, record_on_a_cpu
from helpers_models import build, left_padded, random_rows
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm


pytest.importorskip("dylora_moe.modeling.fast_products_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_decoding_dylora_moe as fast
from dylora_moe.modeling import fast_products_dylora_moe as fast_norms


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states) * (1 if gate is None else gate.sigmoid())


class OtherRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate):
        return super().forward(hidden_states) * gate.sigmoid()


class EpsilonOutsideRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        root = hidden_states.float().pow(2).mean(-1, keepdim=True).sqrt()
        return self.weight * (hidden_states.float() / (root + self.variance_epsilon**0.5)).to(
            hidden_states.dtype
        )


@pytest.fixture
def kernels(monkeypatch):
    """How often the one kernel ran."""
    calls = []
    rms_norm = fast_norms.F.rms_norm

    def counted(*args):
        calls.append(args[0].shape)
        return rms_norm(*args)

    monkeypatch.setattr(fast_norms.F, "rms_norm", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_only_norms_with_the_same_numbers_are_taken(dtype):
    norms = [
        LlamaRMSNorm(8),
        GemmaRMSNorm(8),
        GatedRMSNorm(8),
        OtherRMSNorm(8),
        nn.LayerNorm(8),
        nn.RMSNorm(8, eps=1e-6),
    ]
    model = nn.ModuleList(norms).to(dtype)
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
    expected = [norms[0], norms[2], norms[5]]
    if dtype == torch.float64:
        expected = [norms[5]]  # Llama's computes in float32 all the same
    assert fast_norms.FusedNorms(model).norms == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_that_only_look_alike_are_not_taken(dtype):
    model = nn.ModuleList([GemmaRMSNorm(8), EpsilonOutsideRMSNorm(8)]).to(dtype)
    with torch.no_grad():
        model[0].weight.fill_(40.0)  # 41 / 40 is nearly 1 in half precision
    assert fast_norms.FusedNorms(model).norms == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_in_another_thread_meanwhile_has_its_own_norms(copied):
    model, copies = nn.ModuleList([LlamaRMSNorm(8)]), []
    with fast_norms.FusedNorms(model).in_use():
        thread = threading.Thread(target=lambda: copies.append(copied(model)))
        thread.start()
        thread.join()
    hidden_states = torch.randn(2, 3, 8)
    expected = model[0](hidden_states)
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(copies[0][0](hidden_states), expected)


def test_outside_the_context_in_other_threads_and_for_other_inputs_norms_are_as_before(kernels):
    norm, gated = model = nn.ModuleList([LlamaRMSNorm(8), GatedRMSNorm(8)])
    hidden_states, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    expected = norm(hidden_states), gated(hidden_states, gate), norm(hidden_states.double())
    fused = fast_norms.FusedNorms(model)
    kernels.clear()
    with pytest.raises(KeyError), fused.in_use():
        torch.testing.assert_close(norm(hidden_states), expected[0])
        assert len(kernels) == 1
        assert torch.equal(gated(hidden_states, gate), expected[1])
        assert torch.equal(norm(hidden_states.double()), expected[2])
        thread = threading.Thread(target=norm, args=(hidden_states,))
        thread.start()
        thread.join()
        assert len(kernels) == 1
        raise KeyError
    assert torch.equal(norm(hidden_states), expected[0])
    assert len(kernels) == 1
    assert not any("forward" in vars(module) for module in model)


def test_a_norm_that_somebody_else_replaced_stays_replaced():
    model = nn.ModuleList([LlamaRMSNorm(8)])
    fused = fast_norms.FusedNorms(model)
    model[0].forward = theirs = lambda hidden_states: hidden_states
    with fused.in_use():
        assert model[0].forward is theirs
    assert model[0].forward is theirs


def test_prompts_and_recorded_steps_take_one_kernel(kernels, monkeypatch):
    record_on_a_cpu(monkeypatch, fast)
    model = build(seed=7)
    inputs = left_padded(random_rows((9, 5, 7), seed=2))
    expected = model.generate(**inputs, **GREEDY, routing_strategy="router", fast_decoding=False)
    assert not kernels
    found = model.generate(**inputs, **GREEDY, routing_strategy="router")
    assert found.tolist() == expected.tolist()
    norms = len(model._decoding_sessions.norms.norms)
    prompts, steps = (sum(shape[1:2] == (length,) for shape in kernels) for length in (9, 1))
    assert prompts == 2 * norms  # the router's pass and the routed one
    assert steps >= norms
    kernels.clear()
    model.generate(**inputs, **GREEDY, routing_strategy="router", fast_decoding=False)
    assert not kernels
