"""Adapters on the gates of mixture-of-experts foundations, in the forms that PEFT reads."""

import json

import pytest
import torch
import transformers
from helpers_checkpoints import change_json, save_router, save_tokenizer
from helpers_moe import SIZES, moe_model
from helpers_stacked import gpt_oss, random_weights, write_new_adapter, write_old_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dylora_moe.hub_export import InputError, check_source, export, inspect, merge, verify
from dylora_moe.modeling import DyloraMoeForCausalLM


ROWS = torch.arange(3, 15)[None].repeat(2, 1) + torch.arange(2)[:, None] * 40


def granite():
    """Its gates are called `router`."""
    torch.manual_seed(0)
    config = transformers.GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return random_weights(AutoModelForCausalLM.from_config(config))


# What makes a foundation, how its gates are called in files of today, and in old ones.
FOUNDATIONS = {
    "mixtral": (lambda: moe_model("none: mixtral"), "mlp.gate", "block_sparse_moe.gate"),
    "qwen2 moe": (lambda: moe_model("none: qwen2 moe"), "mlp.gate", "mlp.gate"),
    "deepseek v3": (lambda: moe_model("dense and shared: deepseek v3"), "mlp.gate", "mlp.gate"),
    "gpt-oss": (gpt_oss, "mlp.router", "mlp.router"),
    "granite": (granite, "block_sparse_moe.router", None),
}


@pytest.fixture(scope="module", params=FOUNDATIONS)
def kind(request):
    return request.param


def saved(kind, folder):
    FOUNDATIONS[kind][0]().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def foundation(kind, tmp_path_factory):
    return saved(kind, tmp_path_factory.mktemp("moe") / "base")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return saved("mixtral", tmp_path_factory.mktemp("mixtral") / "base")


def gates(kind) -> list[str]:
    return [name for name, _ in FOUNDATIONS[kind][0]().named_modules() if name.endswith(FOUNDATIONS[kind][1])]


def loaded(folder, **how):
    """In float64, which the plain loop over the foundation's experts alone knows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **how)
    getattr(model, "foundation", model).set_experts_implementation("eager")
    return model


@torch.no_grad()
def of_peft(foundation, adapter, **where):
    base = loaded(foundation)
    return PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False, **where).eval()(ROWS).logits


@torch.no_grad()
def of_repo(repo, strategy):
    return loaded(repo, trust_remote_code=True)(ROWS, routing_strategy=strategy).logits


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def new_adapter(folder, foundation, kind, parameters, modules=(), **fields):
    return write_new_adapter(folder, foundation, FOUNDATIONS[kind][0](), parameters, modules, **fields)


@pytest.fixture(scope="module")
def adapters(foundation, kind, tmp_path_factory):
    """Of unequal ranks and scales: on all gates alone, on the last one and the attention, on the attention alone."""
    folder = tmp_path_factory.mktemp("adapters")
    every, last = FOUNDATIONS[kind][1] + ".weight", gates(kind)[-1] + ".weight"
    patterns = {"rank_pattern": {last: 2}, "alpha_pattern": {r".*\.weight": 3}, "use_rslora": True}
    return {
        "gates": new_adapter(folder / "gates", foundation, kind, [every.rpartition("mlp.")[2]], rank=3, **patterns),
        "last": new_adapter(folder / "last", foundation, kind, [last], ["q_proj"], rank=4, seed=1),
        "attention": new_adapter(folder / "attention", foundation, kind, (), ["q_proj", "o_proj"], rank=2, seed=2),
    }


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_every_expert_computes_what_peft_computes(quick_check, adapters, foundation, tmp_path, layout):
    assert inspect(list(adapters.values())).missing == []
    result = export(list(adapters.values()), tmp_path / "out", layout=layout)
    assert result.check.passed and verify(result.output_dir, against=list(adapters.values())).passed
    base = of_repo(result.output_dir, "base")
    for name, adapter in adapters.items():
        expected = of_peft(foundation, adapter)
        assert not torch.allclose(base, expected, atol=0.1)
        assert_same(of_repo(result.output_dir, f"single:{name}"), expected)
        if layout == "adapter":  # as PEFT reads what was written
            assert_same(of_peft(foundation, result.output_dir, subfolder=f"experts/{name}"), expected)
