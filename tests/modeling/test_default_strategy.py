"""Where a call's strategy comes from: its arguments, a generation config, `from_pretrained`, the model's default."""

import pytest
import torch
from helpers_models import build, random_rows, save_layouts
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
)

from dylora_moe.modeling import DyloraMoeForCausalLM, DyloraMoeModel
from dylora_moe.modeling.routing_strategies_dylora_moe import resolve_routing_strategy


IDS = torch.tensor(random_rows((6,)))
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model and the folder of both layouts, whose default is `best`."""
    folder, model = tmp_path_factory.mktemp("default"), build()
    model.generation_config.routing_strategy = "best"
    save_layouts(model, folder)
    return model, folder


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_it_is_the_default_from_then_on(saved, tmp_path, kind, layout):
    _, folder = saved
    loaded = kind.from_pretrained(folder / layout, trust_remote_code=True, routing_strategy="single:second")
    assert loaded.generation_config.routing_strategy == "single:1"
    own = DyloraMoeForCausalLM if kind is AutoModelForCausalLM else DyloraMoeModel
    with torch.no_grad():
        expected = own.from_pretrained(folder / "full")(IDS, routing_strategy="single:1")[0]
        assert torch.equal(loaded(IDS)[0], expected)
    loaded.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.generation_config.routing_strategy == "single:1"
    assert (
        kind.from_pretrained(folder / layout, trust_remote_code=True).generation_config.routing_strategy
        == "best"
    )


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_beside_other_arguments(saved, layout):
    model, folder = saved
    some = DyloraMoeForCausalLM.from_pretrained(
        folder / layout, experts=["third", "first"], routing_strategy="single:0"
    )
    with torch.no_grad():
        assert torch.equal(some(IDS).logits, model(IDS, routing_strategy="single:2").logits)
    given = GenerationConfig(max_new_tokens=3)
    loaded, _ = DyloraMoeForCausalLM.from_pretrained(
        folder / layout, routing_strategy="base", generation_config=given, output_loading_info=True
    )
    assert (
        loaded.generation_config.routing_strategy == "base" and loaded.generation_config.max_new_tokens == 3
    )
    assert getattr(given, "routing_strategy", None) is None


def test_without_a_generation_config(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    for kind in (DyloraMoeForCausalLM, DyloraMoeModel):
        loaded = kind.from_pretrained(tmp_path, routing_strategy="uniform")
        assert str(loaded.routing_strategy()) == "uniform"


@pytest.mark.parametrize("wrong", ["nope", "single", "single:7", "single:fourth", "base:1"])
@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_a_wrong_one_is_refused_before_weights_are_read(saved, monkeypatch, layout, wrong):
    _, folder = saved
    monkeypatch.setattr(DyloraMoeForCausalLM, "__init__", None)
    with pytest.raises(ValueError, match=r"Valid: .*Experts: 0 \(first\)"):
        DyloraMoeForCausalLM.from_pretrained(folder / layout, routing_strategy=wrong)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("routr", r"'routr' is not known \(did you mean router\?\)"),
        ("round-robin", r"is not known \(did you mean round_robin\?\)"),
        ("xyz", r"'xyz' is not known\. Valid"),
        ("single:frst", r"named 'frst' \(did you mean first\?\)"),
        ("single:xyz", r"named 'xyz'; this model has"),
    ],
)
def test_the_nearest_name_is_said(saved, wrong, hint):
    with pytest.raises(ValueError, match=hint):
        resolve_routing_strategy(wrong, saved[0].config)


def test_a_repo_default_that_the_loaded_experts_leave_out_may_be_replaced(saved, tmp_path):
    model, _ = saved
    model.generation_config.routing_strategy = "single:1"
    model.save_pretrained(tmp_path)
    model.generation_config.routing_strategy = "best"
    with pytest.raises(ValueError, match="leaves that expert out"):
        DyloraMoeForCausalLM.from_pretrained(tmp_path, experts=["first"])
    loaded = DyloraMoeForCausalLM.from_pretrained(tmp_path, experts=["first"], routing_strategy="single:0")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS, routing_strategy="single:0").logits)


def test_the_strategy_is_the_arguments_then_a_handed_configs_then_the_models():
    model = build()
    ids = torch.tensor(random_rows((6,)))

    def tokens(**arguments):
        return model.generate(ids, max_new_tokens=6, **arguments)[0].tolist()

    expected = {
        s: tokens(routing_strategy=s, **GREEDY) for s in ("router", "single:0", "single:1", "single:2")
    }
    assert len({tuple(value) for value in expected.values()}) == 4
    assert tokens(**GREEDY) == expected["router"]  # the default
    model.generation_config.routing_strategy = "single:0"
    handed = GenerationConfig(routing_strategy="single:1", max_new_tokens=6, **GREEDY)
    assert tokens(**GREEDY) == expected["single:0"]
    assert model.generate(ids, generation_config=handed)[0].tolist() == expected["single:1"]
    chosen = model.generate(ids, generation_config=handed, routing_strategy="single:2")
    assert chosen[0].tolist() == expected["single:2"]
    assert tokens(routing_strategy="single:2", **GREEDY) == expected["single:2"]
    assert torch.equal(model(ids).logits, model(ids, routing_strategy="single:first").logits)


@pytest.mark.parametrize(
    "wrong", ["nope", "single", "single:", "single:7", "single:other", "router:1", "single:-1", ""]
)
def test_a_wrong_strategy_lists_the_valid_ones_and_the_experts(wrong):
    model = build()
    ids = torch.tensor(random_rows((4,)))
    for call in (model.generate, model.forward):
        with pytest.raises(ValueError) as raised:
            call(ids, routing_strategy=wrong)
        message = str(raised.value)
        assert "\n" not in message
        for part in (
            "router",
            "best",
            "single:",
            "ensemble",
            "round_robin",
            "base",
            "uniform",
            "first",
            "third",
        ):
            assert part in message


def test_defaults_without_a_router_and_with_one_expert():
    experts = build().config.expert_configs
    assert str(build().routing_strategy()) == "router"
    assert str(build(router_input=None).routing_strategy()) == "uniform"
    assert str(build(experts=experts[:1]).routing_strategy()) == "single:0"
    with pytest.raises(ValueError, match=r"needs a router.*fit-router.*--router arrow.*--router_prompts"):
        build(router_input=None).routing_strategy("best")
