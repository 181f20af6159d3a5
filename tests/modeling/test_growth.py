"""Adding experts to a live model, maturity, and freezing single experts."""

import pytest
import torch
from helpers_models import STRATEGIES, PeftLoop, build, left_padded, llama_config, random_rows

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


def batch():
    rows = left_padded(random_rows((9, 6), seed=6))
    return {**rows, "labels": rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)}


def train(model, steps: int = 3, **arguments) -> None:
    """A new optimiser without weight decay on experts."""
    model.train()
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    for _ in range(steps):
        model(**batch(), **arguments).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


def outputs(model, strategies):
    rows = left_padded(random_rows((8, 5), seed=7))
    with torch.no_grad():
        return {strategy: model(**rows, routing_strategy=strategy).logits for strategy in strategies}


def test_a_new_expert_changes_nothing_of_the_others():
    model = build()
    singles = ["base", "single:0", "single:1", "single:2"]
    before = outputs(model, singles)
    logits = model(**batch(), output_router_logits=True).router_logits
    number = model.add_expert(
        "fourth", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"], r=5
    )
    assert number == 3 and model.config.expert_names == ["first", "second", "third", "fourth"]
    after = outputs(model, singles)
    assert all(torch.equal(before[strategy], after[strategy]) for strategy in singles)
    assert torch.equal(outputs(model, ["single:fourth"])["single:fourth"], before["base"])
    found = model(**batch(), output_router_logits=True).router_logits
    torch.testing.assert_close(found[..., :3], logits)
    assert model.routes_densely
    model.mark_mature("fourth")
    assert not model.routes_densely


def test_a_grown_model_is_as_a_whole_in_evaluation_or_in_training():
    for training in (False, True):
        model = build().train(training)
        model.add_expert("fourth", r=2, lora_dropout=0.5)
        assert {module.training for module in model.modules()} == {training}


def test_a_grown_model_equals_a_peft_loop_and_survives_saving(tmp_path):
    model = build()
    model.add_expert(
        "fourth", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"], r=5, lora_alpha=10
    )
    with torch.no_grad():
        for layer in model.expert_layers().values():
            layer.lora_B[layer.rows(3)].normal_(std=0.3)
    model.mark_mature("fourth")
    loop = PeftLoop(model)
    rows = random_rows((9, 4, 7))
    for strategy in (*STRATEGIES, "single:fourth"):
        logits = model(**left_padded(rows), routing_strategy=strategy).logits
        for turn, row in enumerate(rows):
            expected = loop.logits(row, strategy.replace("fourth", "3"), len(row), turn)
            torch.testing.assert_close(logits[turn, -len(row) :], expected, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    again = DyloraMoeForCausalLM.from_pretrained(tmp_path)
    for strategy, expected in outputs(model, STRATEGIES).items():
        assert torch.equal(outputs(again, [strategy])[strategy], expected)


def test_skill_a_stays_bit_for_bit_while_skill_b_is_learnt():
    targets = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
    model = DyloraMoeForCausalLM(
        DyloraMoeConfig(
            llama_config(), [{"name": "a", "r": 4, "target_modules": targets}], router_input="base"
        )
    )
    model.freeze_foundation()
    train(model, routing_strategy="single:a")
    skill_a = outputs(model, ["single:a"])["single:a"]
    model.add_expert("b", r=6)
    model.freeze_expert("a")
    train(model, routing_strategy="router")
    found = outputs(model, ["single:a", "single:b", "base"])
    assert torch.equal(found["single:a"], skill_a)
    assert not torch.equal(found["single:b"], found["base"])
    model.unfreeze_expert("a")
    train(model, routing_strategy="router")
    assert not torch.equal(outputs(model, ["single:a"])["single:a"], skill_a)


def test_growing_a_model_with_a_frozen_expert_keeps_it_frozen():
    model = build()
    model.freeze_expert("second")
    model.add_expert("fourth", r=2)
    assert [model.expert_is_frozen(expert) for expert in range(4)] == [False, True, False, False]
    before = outputs(model, ["single:1"])["single:1"]
    train(model, routing_strategy="router")
    assert torch.equal(outputs(model, ["single:1"])["single:1"], before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "first"}, "more than once"),
        ({"name": "new", "target_modules": ["model.layers.9.self_attn.q_proj"]}, "does not have"),
        ({"name": "new", "target_modules": ["model.embed_tokens"]}, "linear layers"),
        ({"name": "new", "target_modules": ["k_proj", "mlp"]}, "'model.layers.0.mlp' by 'mlp'"),
        ({"name": "new", "target_modules": "k_proj"}, "Ends of names go into a list"),
        ({"name": "new", "target_modules": ["k_proj"], "rank_pattern": {"q_proj": 2}}, "'q_proj' in its"),
        ({"name": "new", "r": 0}, "whole number"),
        ({"name": "new", "rank": 4}, "unknown fields"),
    ],
)
def test_a_failed_growth_changes_nothing(arguments, message):
    model = build()
    before, config = outputs(model, STRATEGIES), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.add_expert(**arguments)
    assert model.config.to_dict() == config
    for strategy, expected in outputs(model, STRATEGIES).items():
        assert torch.equal(expected, before[strategy])


def test_modules_may_come_from_an_iterator():
    model = build()
    name = "model.layers.1.mlp.gate_proj"
    model.add_expert("new", target_modules=iter([name]))
    assert model.config.expert_configs[-1]["target_modules"] == [name]
    assert model.expert_layers()[name].layout[-1][0] == 8
    for output in outputs(model, STRATEGIES).values():
        assert torch.isfinite(output).all()
