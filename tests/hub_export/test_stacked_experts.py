"""Adapters on the stacked experts of mixture-of-experts foundations, in the forms that PEFT reads."""

import pytest
import torch
from helpers_checkpoints import save_tokenizer, write_json
from helpers_moe import moe_model
from helpers_stacked import OLD_NAMES, with_old_adapter, write_new_adapter, write_old_adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dylora_moe.hub_export import check_source, export, inspect, merge, verify


ROWS = torch.arange(3, 15)[None].repeat(2, 1) + torch.arange(2)[:, None] * 40
BOTH = ("experts.gate_up_proj", "experts.down_proj")
# PEFT knows what the matrices of a single expert became only for some types
CONVERTED_BY_PEFT = ("none: mixtral", "dense: qwen3 moe")


@pytest.fixture(scope="module", params=OLD_NAMES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def foundation(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "base"
    moe_model(kind).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@torch.no_grad()
def of_peft(foundation, adapter, **where):
    base = AutoModelForCausalLM.from_pretrained(foundation)
    return PeftModel.from_pretrained(base, adapter, **where).eval()(ROWS).logits


@torch.no_grad()
def of_repo(repo, strategy):
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    return model(ROWS, routing_strategy=strategy).logits


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.fixture(scope="module")
def adapters(foundation, kind, tmp_path_factory):
    """Of unequal ranks, in both forms, on one and on several places."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "old": write_old_adapter(folder / "old", foundation, kind),
        "new": write_new_adapter(folder / "new", foundation, kind, BOTH, rank=3, seed=1),
        "down": write_new_adapter(folder / "down", foundation, kind, BOTH[1:], ["q_proj"], rank=2, seed=2),
        "attention": write_old_adapter(folder / "attention", foundation, kind, matrices=(), also=["q_proj"]),
    }


@pytest.fixture(scope="module")
def expected(adapters, foundation, kind):
    logits = {name: of_peft(foundation, adapter) for name, adapter in adapters.items()}
    base = AutoModelForCausalLM.from_pretrained(foundation)
    with torch.no_grad():
        logits["base"] = base(ROWS).logits
        by_hand = with_old_adapter(base, adapters["old"], kind)(ROWS).logits
    if kind in CONVERTED_BY_PEFT:
        assert_same(logits["old"], by_hand)
    return {**logits, "old": by_hand}


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_every_expert_computes_what_peft_computes(quick_check, adapters, foundation, expected, tmp_path, layout):
    inspection = inspect(list(adapters.values()))
    assert inspection.missing == []
    result = export(list(adapters.values()), tmp_path / "out", layout=layout)
    assert result.check.passed
    assert_same(of_repo(result.output_dir, "base"), expected["base"])
    for name in adapters:
        assert not torch.allclose(expected["base"], expected[name], atol=0.1)
        assert_same(of_repo(result.output_dir, f"single:{name}"), expected[name])
    assert verify(result.output_dir).passed
    again = export(result.output_dir, tmp_path / "again", layout="adapter")
    assert again.check.passed
    for name in adapters:  # as PEFT reads what was written
        assert_same(of_peft(foundation, again.output_dir, subfolder=f"experts/{name}"), expected[name])


def test_a_router_from_prompts_over_experts_on_stacked_experts(quick_check, adapters, tmp_path):
    prompts = tmp_path / "prompts.yaml"
    write_json(prompts, {name: [f"{name} one", f"{name} two"] for name in adapters})
    result = export(list(adapters.values()), tmp_path / "out", router_prompts=prompts)
    compared = {entry.quantity for entry in result.check.comparisons}
    assert result.check.passed and {"uniform", "router", "router, dense"} <= compared


def test_a_wrong_repo_is_caught(quick_check, adapters, tmp_path, monkeypatch):
    """Each of the two parameters, alone and in mixtures."""

    def weaker(*arguments):
        model = added(*arguments)
        for path, parameter in model.named_parameters():
            if wrong in path and ".lora_B." in path:
                parameter.data *= 0.9
        return model

    added = check_source._add_adapter
    monkeypatch.setattr(check_source, "_add_adapter", weaker)
    for wrong in ("experts.base_layer.", "experts.lora_"):
        with pytest.raises(Exception, match="does not compute what"):
            export(adapters["new"], tmp_path / "out")


def test_merged_into_the_foundation(adapters, expected, tmp_path):
    repo = export(list(adapters.values()), tmp_path / "out", verify=False).output_dir
    for name in ("old", "down"):
        result = merge(repo, expert=name, output_dir=tmp_path / name)
        assert result.passed
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            assert_same(model(ROWS).logits, expected[name])
