"""Adapters on the stacked experts of mixture-of-experts foundations, in the forms that PEFT reads."""

import pytest
import torch
from helpers_checkpoints import save_tokenizer
from helpers_moe import moe_model
from helpers_stacked import OLD_NAMES, write_new_adapter, write_old_adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dylora_moe.hub_export import export, inspect


ROWS = torch.arange(3, 15)[None].repeat(2, 1) + torch.arange(2)[:, None] * 40
BOTH = ("experts.gate_up_proj", "experts.down_proj")


@pytest.fixture(scope="module", params=OLD_NAMES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def foundation(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "base"
    moe_model(kind).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def of_peft(foundation, adapter):
    base = AutoModelForCausalLM.from_pretrained(foundation)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, adapter).eval()(ROWS).logits


@torch.no_grad()
def of_repo(repo, strategy):
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    return model(ROWS, routing_strategy=strategy).logits


@pytest.fixture(scope="module")
def adapters(foundation, kind, tmp_path_factory):
    """Of unequal ranks, in both forms, on one and on several places."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "old": write_old_adapter(folder / "old", foundation, kind, rank=4),
        "new": write_new_adapter(folder / "new", foundation, kind, BOTH, rank=3, seed=1),
        "down": write_new_adapter(folder / "down", foundation, kind, BOTH[1:], ["q_proj"], rank=2, seed=2),
        "attention": write_old_adapter(folder / "attention", foundation, kind, matrices=(), also=["q_proj"]),
    }


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_every_expert_computes_what_peft_computes(quick_check, adapters, foundation, tmp_path, layout):
    assert inspect(list(adapters.values())).missing == []
    result = export(list(adapters.values()), tmp_path / "out", layout=layout)
    assert result.check.passed
    base = of_repo(result.output_dir, "base")
    for name, adapter in adapters.items():
        expected = of_peft(foundation, adapter)
        assert not torch.allclose(base, expected, atol=0.1)
        torch.testing.assert_close(of_repo(result.output_dir, f"single:{name}"), expected, atol=1e-3, rtol=1e-4)
