"""`routing_strategy` as an argument of `from_pretrained`: the loaded model's default."""

import pytest
import torch
from helpers_models import build, random_rows, save_layouts
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from dylora_moe.modeling import DyloraMoeForCausalLM, DyloraMoeModel


IDS = torch.tensor(random_rows((6,)))


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
