"""Fast decoding in tests: beside the default path, and with a stand-in for CUDA graphs that runs on a CPU.

The stand-in replays the operations that were captured on the very same tensors, so whatever a graph would not
notice (a branch, a number read on the host, another tensor) is not noticed here.
"""

import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers_models import PAD, left_padded, random_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Cache

from dylora_moe.modeling.experts_dylora_moe import use_experts


BATCH = left_padded(random_rows((9, 5, 7), seed=2))
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def default_and_fast(model, inputs=BATCH, seed=0, **arguments) -> list:
    """What `generate` returns without and with fast decoding, greedy if nothing else is said."""
    pytest.importorskip(
        "dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out"
    )
    outputs = []
    for wanted in (False, None):
        model.reset_round_robin()
        torch.manual_seed(seed)
        outputs.append(model.generate(**inputs, **{**GREEDY, "fast_decoding": wanted, **arguments}))
    return outputs


def decode_fast_on_a_cpu(monkeypatch, fast) -> None:
    """Have fast decoding, the module, take over on a CPU, by the base model's forward and without graphs.

    The kernels would take a second a token in Triton's interpreter; what is said against them stays.
    """
    why_not_kernels = fast.why_not_kernels
    monkeypatch.setattr(fast, "DEVICES", ("cpu",))
    monkeypatch.setattr(fast, "ON_BY_ITSELF", True)
    monkeypatch.setattr(fast, "why_not_kernels", lambda model: why_not_kernels(model) or "there is no GPU")


def look_up_on_a_cpu(monkeypatch, fast) -> None:
    """Have the base model's forward run several tokens of a text in a step, as kernels do for prompt lookup."""
    static_layer = sys.modules[fast.ForwardStep.__module__].StaticLayer

    class SeveralTokensStep(fast.ForwardStep):
        def logits(self, run):
            return self._forward(self._model().foundation, run).logits.flatten(0, 1)

        def router_logits(self, run):
            model = self._model()
            return model.router(self._forward(model.foundation_body, run).last_hidden_state).flatten(0, 1)

        def _forward(self, body, run):
            model, new = self._model(), run.length + torch.arange(run.tokens)
            streams = len(run.layers[0][0]) // len(run.input_ids)
            seen = run.visible.bool()[:, None] & (torch.arange(run.capacity) <= new[:, None])
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            weights = None if run.experts is None else run.experts.weights.unflatten(0, (-1, run.tokens))
            with use_experts(model.active_experts(weights)):
                return body(
                    input_ids=run.input_ids.repeat(streams, 1),
                    attention_mask=mask.repeat(streams, 1, 1)[:, None],
                    position_ids=(new + run.offsets[:, None]).repeat(streams, 1),
                    past_key_values=Cache(layers=[static_layer(*both, new) for both in run.layers]),
                    use_cache=True,
                    return_dict=True,
                )

    monkeypatch.setattr(fast, "ForwardStep", SeveralTokensStep)
    monkeypatch.setattr(fast, "KernelStep", SeveralTokensStep)


def count_steps(monkeypatch, fast) -> list:
    """A list that gets the decode graph of every step that is decoded fast."""
    taken = []
    step = fast.DecodeGraph.step
    monkeypatch.setattr(fast.DecodeGraph, "step", lambda graph: (taken.append(graph), step(graph))[1])
    return taken


class CapturedGraph(TorchDispatchMode):
    """In the place of `torch.cuda.CUDAGraph`."""

    replays = 0

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, output))
        return output

    def replay(self):
        CapturedGraph.replays += 1
        for function, args, kwargs, output in self.operations:
            known = {
                leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)
            }
            for old, new in zip(tree_leaves(output), tree_leaves(function(*args, **kwargs)), strict=True):
                # Views, and what was written in place, are the captured tensors already.
                if is_tensor(old) and old.numel() and old.untyped_storage().data_ptr() not in known:
                    old.copy_(new)


def is_tensor(leaf) -> bool:
    return isinstance(leaf, torch.Tensor)


@contextmanager
def capture(graph, pool, stream, capture_error_mode):
    with graph:
        yield


class Stream:
    def wait_stream(self, other):
        pass


def capture_on_a_cpu(monkeypatch, fast) -> None:
    """Have fast decoding, the module, take over on a CPU and capture its steps there."""
    decode_fast_on_a_cpu(monkeypatch, fast)
    monkeypatch.setattr(fast, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(fast, "capture_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CapturedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(CapturedGraph, "replays", 0)


class Streamer:
    """Keeps every token that it is given, and "end" at the end."""

    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.seen.append("end")
