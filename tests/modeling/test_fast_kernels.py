"""How shared functions are replaced while steps are recorded. The kernels themselves need a GPU:
`test_gpu.py`."""

import importlib.util
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from helpers_models import build
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama


norms = pytest.importorskip(
    "dylora_moe.modeling.fast_products_dylora_moe", reason="the optional file was taken out"
)


@pytest.fixture
def copies(monkeypatch):
    """Two copies of the file, as the Hub's loader makes one for each repo, with a stand-in for Triton."""
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.jit, triton.language, language.constexpr = lambda function: function, language, int
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    modules = []
    for number in (1, 2):
        file = Path(norms.__file__).with_name("fast_kernels_dylora_moe.py")
        name = f"{norms.__package__}.copy_{number}_of_fast_kernels"
        spec = importlib.util.spec_from_file_location(name, file)
        modules.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(modules[-1])
        monkeypatch.setattr(modules[-1], "_rotates_halves", lambda *args: True)
    return modules


def functions() -> tuple:
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attention, modeling_llama.eager_attention_forward, modeling_llama.apply_rotary_pos_emb


def test_functions_are_put_back_however_two_threads_overlap(copies):
    before, foundation, index = functions(), build(seed=7).foundation, torch.zeros(1)
    first, second = (copy.fused_functions(foundation, index) for copy in copies)
    entered, leave = threading.Event(), threading.Event()

    def record(context):
        with context:
            entered.set()
            leave.wait(0.2)  # time for the other one to come in between, if it could

    threads = [threading.Thread(target=record, args=(context,)) for context in (first, second)]
    for thread in threads:
        thread.start()
    entered.wait()
    assert all(now is not then for now, then in zip(functions(), before, strict=True))
    for thread in threads:
        thread.join()
    assert functions() == before


def test_what_is_registered_later_counts(copies, monkeypatch):
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    with pytest.raises(KeyError), copies[0].fused_functions(build(seed=7).foundation, torch.zeros(1)):
        raise KeyError
    AttentionInterface.register("sdpa", other := lambda *args, **kwargs: None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other


def test_what_was_set_for_one_interface_stays(copies):
    mine = lambda *args, **kwargs: None  # noqa: E731
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
    try:
        with copies[0].fused_functions(build(seed=7).foundation, torch.zeros(1)):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not mine
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
