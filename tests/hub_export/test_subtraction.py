"""An adapter that is subtracted from every expert: W + s_i B_i A_i - s_g B_g A_g, whatever ranks, scales and targets."""

import json

import pytest
import torch
from helpers_checkpoints import save_adalora_adapter, save_adapter, save_tokenizer
from helpers_moe import moe_model
from helpers_stacked import write_new_adapter
from transformers import AutoModelForCausalLM

from dylora_moe.hub_export import FailureError, InputError, export
from dylora_moe.hub_export.readers.exported_repo import read
from dylora_moe.hub_export.readers.open_source import open_source
from dylora_moe.hub_export.sources.source_folder import open_folder
from dylora_moe.hub_export.sources.source_options import ReadOptions
from dylora_moe.hub_export.tensors import subtraction
from dylora_moe.modeling import DyloraMoeForCausalLM


ROWS = torch.tensor([[5, 9, 17, 3, 44, 60], [8, 8, 90, 71, 2, 33]])


@pytest.fixture(scope="module")
def general(tmp_path_factory, foundation):
    """Of other targets, rank and scale than any expert."""
    folder = tmp_path_factory.mktemp("general") / "common"
    targets = ["q_proj", "down_proj", "o_proj"]
    return save_adapter(folder, foundation, seed=9, r=2, lora_alpha=3, target_modules=targets)


def update(source, module) -> torch.Tensor:
    """s B A of an adapter on a layer, in float64; 0 where it does not adapt it."""
    (expert,) = open_source(source).experts
    if module not in expert.layers:
        return torch.zeros((), dtype=torch.float64)
    layer = expert.layers[module]
    lora_a, lora_b = (matrix.double() for matrix in expert.read(module))
    return layer.lora_alpha / (layer.rank**0.5 if expert.use_rslora else layer.rank) * lora_b @ lora_a


@torch.no_grad()
def by_hand(foundation, adapter, general) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(foundation, dtype=torch.float64)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight += update(adapter, name) - update(general, name)
    return model(ROWS).logits


@torch.no_grad()
def of_repo(repo, index) -> torch.Tensor:
    model = DyloraMoeForCausalLM.from_pretrained(repo, dtype=torch.float64)
    return model(ROWS, routing_strategy=f"single:{index}").logits


@pytest.mark.usefixtures("quick_check")
@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_each_expert_is_the_difference(adapters, foundation, general, tmp_path, layout):
    """With scales of which one is no power of two times the other: the factor is rounded to float32."""
    result = export(adapters, tmp_path / "repo", subtract=str(general), layout=layout)
    assert result.check.passed and result.check.precision == "float32"
    for index, adapter in enumerate(adapters):
        expected = by_hand(foundation, adapter, general)
        assert (expected - by_hand(foundation, adapter, adapter)).abs().max() > 0.1
        torch.testing.assert_close(of_repo(tmp_path / "repo", index), expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("quick_check")
def test_scales_of_a_power_of_two_lose_nothing(adapters, foundation, tmp_path):
    """In bfloat16, and in float64 to its rounding."""
    one, two = (
        save_adapter(tmp_path / name, foundation, seed=seed, dtype=torch.bfloat16, r=4, lora_alpha=alpha)
        for seed, (name, alpha) in enumerate([("one", 8), ("two", 2)])
    )
    fields = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "o_proj"], "dtype": torch.bfloat16}
    general = save_adapter(tmp_path / "common", foundation, seed=5, **fields)
    result = export([one, two], tmp_path / "repo", subtract=str(general), router="arrow")
    assert result.check.passed and result.check.precision == "float64"
    repo = read([open_folder(tmp_path / "repo")], ReadOptions())
    layer = repo.experts[0].layers["model.layers.0.self_attn.q_proj"]
    assert (layer.rank, layer.lora_alpha, layer.dtype) == (6, 12, torch.bfloat16)
    layer = repo.experts[0].layers["model.layers.0.self_attn.o_proj"]
    assert (layer.rank, layer.lora_alpha) == (2, 2)
    for index, adapter in enumerate((one, two)):
        expected = by_hand(foundation, adapter, general)
        torch.testing.assert_close(of_repo(tmp_path / "repo", index), expected, atol=1e-12, rtol=0)


def test_config_and_card_name_it(adapters, general, tmp_path):
    export(adapters[:2], tmp_path / "repo", subtract=str(general), verify=False)
    words = "the adapter common was subtracted from every expert"
    assert words in json.loads((tmp_path / "repo/config.json").read_text())["limits"][0]
    assert words[4:] in (tmp_path / "repo/README.md").read_text()


@pytest.mark.usefixtures("quick_check")
def test_the_gate_of_a_checkpoint_reads_the_differences(checkpoint, general, tmp_path):
    result = export(checkpoint, tmp_path / "repo", subtract=str(general))
    compared = {entry.quantity for entry in result.check.comparisons}
    assert result.check.passed and {"uniform", "router", "router logits", "router, dense"} <= compared


@pytest.mark.usefixtures("quick_check")
@pytest.mark.parametrize("rank", [4, 2])
def test_stacked_experts(tmp_path, rank):
    """Whose ranks lie one stacked expert after the other in A, and the other way around in B."""
    kind, names = "none: mixtral", ["experts.gate_up_proj", "experts.down_proj"]
    moe_model(kind).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    adapters = [
        write_new_adapter(tmp_path / name, tmp_path / "base", kind, names[: seed + 1], ["q_proj"], seed=seed)
        for seed, name in enumerate(("one", "two"))
    ]
    general = write_new_adapter(tmp_path / "common", tmp_path / "base", kind, names, rank=rank, seed=7)
    result = export(adapters, tmp_path / "repo", subtract=str(general))
    assert result.check.passed


def test_zero_scales_add_nothing(foundation, tmp_path):
    idle, other = (
        open_source(save_adapter(tmp_path / name, foundation, seed=seed, lora_alpha=alpha)).experts[0]
        for seed, (name, alpha) in enumerate([("idle", 0), ("other", 8)])
    )
    module = "model.layers.0.self_attn.q_proj"
    (left,), _ = subtraction.subtract([idle], other, None)
    assert (left.layers[module].rank, left.layers[module].lora_alpha) == (4, 8)
    for found, matrix, sign in zip(left.read(module), other.read(module), (1, -1), strict=True):
        assert torch.equal(found, sign * matrix)
    (left,), _ = subtraction.subtract([other], idle, None)
    assert left.layers == other.layers
    assert all(torch.equal(a, b) for a, b in zip(left.read(module), other.read(module), strict=True))


@pytest.mark.usefixtures("quick_check")
def test_what_is_not_the_difference_is_found(adapters, general, tmp_path, monkeypatch):
    """As the difference of the factors, each by itself, would be."""
    monkeypatch.setattr(subtraction, "_ratio", lambda expert, general, name: -1.0)
    with pytest.raises(FailureError, match=r"the logits of expert 0 \(plain\) differ"):
        export(adapters[:2], tmp_path / "repo", subtract=str(general))


def test_what_cannot_be_subtracted(adapters, foundation, general, checkpoint, tmp_path):
    repo = export(checkpoint, tmp_path / "old", verify=False).output_dir

    def refused(words, *sources, **options):
        with pytest.raises(InputError, match=words):
            export(list(sources), tmp_path / "repo", **options)
        assert not (tmp_path / "repo").exists()

    refused("is a repo; export its adapters again", repo, adapters[0], subtract=str(general))
    refused("is not one LoRA adapter", *adapters, subtract=str(repo))
    refused("is not one LoRA adapter", *adapters, subtract=str(adapters[0].parent))
    refused(
        "--dtype bfloat16 would round what is subtracted", *adapters, subtract=str(general), dtype="bfloat16"
    )
    adalora = save_adalora_adapter(tmp_path / "adalora", foundation)
    refused("is not one LoRA adapter", *adapters, subtract=str(adalora))
