"""Fast decoding in tests: beside the ordinary path, and with a stand-in for CUDA graphs that runs on a CPU.

The stand-in replays what was recorded on the very same tensors, so whatever a graph would not notice (a
branch, a number read on the host, another tensor) is not noticed here.
"""

import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers_models import PAD, left_padded, random_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


BATCH = left_padded(random_rows((9, 5, 7), seed=2))
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def ordinary_and_fast(model, inputs=BATCH, seed=0, **arguments) -> list:
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
    """Have fast decoding, the module, take over on a CPU, with plain steps in place of graphs."""
    monkeypatch.setattr(fast, "DEVICES", ("cpu",))
    monkeypatch.setattr(fast, "ON_BY_ITSELF", True)


def count_steps(monkeypatch, fast) -> list:
    """A list that gets the session of every step that is decoded fast."""
    taken = []
    step = fast.Session.step
    monkeypatch.setattr(fast.Session, "step", lambda session: (taken.append(session), step(session))[1])
    return taken


class RecordedGraph(TorchDispatchMode):
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
        RecordedGraph.replays += 1
        for function, args, kwargs, output in self.operations:
            known = {
                leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)
            }
            for old, new in zip(tree_leaves(output), tree_leaves(function(*args, **kwargs)), strict=True):
                # Views, and what was written in place, are the recorded tensors already.
                if is_tensor(old) and old.numel() and old.untyped_storage().data_ptr() not in known:
                    old.copy_(new)


def is_tensor(leaf) -> bool:
    return isinstance(leaf, torch.Tensor)


@contextmanager
def record(graph, pool, stream, capture_error_mode):
    with graph:
        yield


class Stream:
    def wait_stream(self, other):
        pass


def record_on_a_cpu(monkeypatch, fast) -> None:
    """Have fast decoding, the module, take over on a CPU and record its steps there."""
    decode_fast_on_a_cpu(monkeypatch, fast)
    sessions = sys.modules[fast.SessionStore.__module__]
    monkeypatch.setattr(sessions, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(sessions, "fused_functions", lambda *args: nullcontext())
    monkeypatch.setattr(sessions, "GraphPool", partial(SimpleNamespace, handle=None, stream=Stream()))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(RecordedGraph, "replays", 0)
