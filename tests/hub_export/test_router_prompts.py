"""Routers made from example prompts, and experts appended to a finished mixture."""

import json
import shutil
import warnings

import pytest
import torch
import yaml
from helpers_checkpoints import (
    save_adapter,
    save_foundation,
    save_tokenizer,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from dylora_moe.hub_export import DyloraMoeWarning, InputError, export
from dylora_moe.hub_export.repo import router_prompts


PROMPTS = {"plain": ["abc", "a"], "stabilised": ["xyzxyz!", "yy", "x"], "everywhere": ["1234567890" * 3]}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text(yaml.safe_dump(PROMPTS))
    return path


def rows_by_hand(foundation, prompts, prepare=lambda model: model):
    """One prompt at a time, unpadded: the mean over tokens, the mean over prompts, length 1."""
    model = prepare(AutoModelForCausalLM.from_pretrained(foundation, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(foundation)
    rows = []
    for texts in prompts:
        means = []
        for text in texts:
            with torch.no_grad():
                output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            means.append(output.hidden_states[-1][0].mean(dim=0))
        row = torch.stack(means).mean(dim=0)
        rows.append(row / row.norm())
    return torch.stack(rows)


def with_all(model, adapters):
    """PEFT's sum of all adapters, each with weight 1."""
    names = [f"a{index}" for index in range(len(adapters))]
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.base_model.set_adapter(names)
    return model.eval()


@pytest.mark.usefixtures("quick_check")
@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_gate_rows_are_normalised_mean_hidden_states(tmp_path, adapters, foundation, prompts, layout):
    result = export(adapters, tmp_path / "repo", router_prompts=prompts, layout=layout)
    assert result.router and result.routing_strategy == "router"
    assert result.check.passed and "router" in [
        comparison.quantity for comparison in result.check.comparisons
    ]
    file, prefix = (
        ("model.safetensors", "router.gate.") if layout == "full" else ("router.safetensors", "gate.")
    )
    weights = load_file(tmp_path / "repo" / file)
    expected = rows_by_hand(foundation, PROMPTS.values())
    torch.testing.assert_close(weights[f"{prefix}weight"], expected, atol=1e-5, rtol=0)
    assert not weights[f"{prefix}bias"].any()
    config = json.loads((tmp_path / "repo" / "config.json").read_text())
    assert config["router_input"] == "base" and config["num_experts_per_tok"] == 1


def test_it_is_deterministic_and_batches_change_nothing(tmp_path, adapters, prompts, monkeypatch):
    gates = []
    for index, size in enumerate((8, 8, 1)):
        monkeypatch.setattr(router_prompts, "BATCH_SIZE", size)
        export(adapters, tmp_path / str(index), router_prompts=prompts, verify=False)
        gates.append(load_file(tmp_path / str(index) / "model.safetensors")["router.gate.weight"])
    assert torch.equal(gates[0], gates[1])
    torch.testing.assert_close(gates[0], gates[2], atol=1e-6, rtol=0)


@pytest.mark.usefixtures("quick_check")
def test_settings_that_were_given_are_followed(tmp_path, adapters, foundation, prompts):
    result = export(
        adapters,
        tmp_path / "repo",
        router_prompts=prompts,
        router_input="experts_sum",
        router_mode="dense",
        router_temperature=0.5,
    )
    assert result.check.passed
    weights = load_file(tmp_path / "repo" / "model.safetensors")
    expected = rows_by_hand(foundation, PROMPTS.values(), lambda model: with_all(model, adapters))
    torch.testing.assert_close(weights["router.gate.weight"], expected, atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "repo" / "config.json").read_text())
    assert (config["router_input"], config["router_mode"], config["router_temperature"]) == (
        "experts_sum",
        "dense",
        0.5,
    )


WRONG = {
    "no mapping": ("- a\n- b\n", "must map each expert"),
    "no texts": ("plain: [1]\nstabilised: [a]\neverywhere: [b]\n", "plain must have a list of prompts"),
    "an expert is missing": ("plain: a\n", "missing: stabilised, everywhere"),
    "an unknown one": ("plain: a\nstabilised: b\neverywhere: c\nother: d\n", "not an expert: other"),
    "no yaml": ("a: [", "cannot be read"),
    "an object": ("plain: !!python/object/apply:os.system [true]\n", "cannot be read"),
}


def test_a_prompt_past_the_last_position_is_refused(tmp_path):
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=24, bos_token_id=0, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    fields = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapters = [save_adapter(tmp_path / name, tmp_path / "gpt2", **fields) for name in ("one", "two")]
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump({"one": ["abc" * 8], "two": ["abc" * 8 + "d"]}))
    with pytest.raises(InputError, match=r"a prompt of 25 tokens, and .*gpt2 has 24 positions"):
        export(adapters, tmp_path / "repo", router_prompts=tmp_path / "prompts.yaml", verify=False)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named(tmp_path, adapters, case):
    text, message = WRONG[case]
    (tmp_path / "prompts.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        export(adapters, tmp_path / "repo", router_prompts=tmp_path / "prompts.yaml")
    assert not (tmp_path / "repo").exists()


def single(repo, expert):
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 13)[None], routing_strategy=f"single:{expert}").logits


@pytest.mark.usefixtures("quick_check")
@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_experts_are_appended_and_the_router_left_out(tmp_path, checked, adapters, layout):
    with pytest.warns(DyloraMoeWarning, match="knows 3 of 5 experts and is left out"):
        result = export([checked[0], *adapters[:2]], tmp_path / "repo", layout=layout)
    assert result.experts == ["expert_0", "expert_1", "expert_2", "plain", "stabilised"]
    assert not result.router and result.routing_strategy == "uniform"
    quantities = [comparison.quantity for comparison in result.check.comparisons]
    assert result.check.passed and quantities == ["base", *(f"single:{index}" for index in range(5))]
    export(adapters[1], tmp_path / "alone", verify=False)
    torch.testing.assert_close(single(tmp_path / "repo", 4), single(tmp_path / "alone", 0), atol=1e-5, rtol=0)
    assert torch.equal(single(tmp_path / "repo", 1), single(checked[0], 1))


@pytest.mark.usefixtures("quick_check")
def test_a_kept_router_gets_rows_from_prompts(tmp_path, checked, adapters, foundation):
    """The mixture's gate reads all experts at once, so that its new rows do, too."""
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump({"plain": PROMPTS["plain"]}))
    result = export([checked[0], adapters[0]], tmp_path / "repo", router_prompts=tmp_path / "prompts.yaml")
    assert result.router and result.check.passed and result.check.num_tensors == 4 * 6 * 2 + 2
    old = load_file(checked[0] / "model.safetensors")
    new = load_file(tmp_path / "repo" / "model.safetensors")
    assert torch.equal(new["router.gate.weight"][:3], old["router.gate.weight"])
    assert (
        torch.equal(new["router.gate.bias"][:3], old["router.gate.bias"]) and new["router.gate.bias"][3] == 0
    )
    torch.testing.assert_close(new["router.gate.weight"][3].norm(), torch.tensor(1.0))
    config = json.loads((tmp_path / "repo" / "config.json").read_text())
    assert config["router_input"] == "experts_sum"

    export(tmp_path / "repo", tmp_path / "light", layout="adapter", verify=False)
    experts = sorted((tmp_path / "light" / "experts").iterdir())
    expected = rows_by_hand(foundation, [PROMPTS["plain"]], lambda model: with_all(model, experts))
    torch.testing.assert_close(new["router.gate.weight"][3:], expected, atol=1e-5, rtol=0)


def test_prompts_for_all_experts_make_a_new_router(tmp_path, checked, adapters):
    names = ["expert_0", "expert_1", "expert_2", "plain"]
    (tmp_path / "prompts.yaml").write_text(
        yaml.safe_dump({name: ["ab" * (i + 1)] for i, name in enumerate(names)})
    )
    export(
        [checked[0], adapters[0]], tmp_path / "repo", router_prompts=tmp_path / "prompts.yaml", verify=False
    )
    weights = load_file(tmp_path / "repo" / "model.safetensors")
    torch.testing.assert_close(weights["router.gate.weight"].norm(dim=1), torch.ones(4))
    assert json.loads((tmp_path / "repo" / "config.json").read_text())["router_input"] == "base"


@pytest.mark.usefixtures("quick_check")
def test_a_repo_gets_another_router(checked, adapters, tmp_path):
    """Of prompts alone, in place of its gate, or of its routers in every layer."""
    names = ["expert_0", "expert_1", "expert_2"]
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump({name: ["ab", name[-1]] for name in names}))
    export(checked[0], tmp_path / "arrow", router="arrow", verify=False)
    gates = []
    for source in (checked[0], tmp_path / "arrow"):
        result = export(source, tmp_path / "repo", router_prompts=tmp_path / "prompts.yaml", overwrite=True)
        assert result.check.passed and (result.router_kind, result.routing_strategy) == ("hidden", "router")
        gates.append(load_file(tmp_path / "repo/model.safetensors")["router.gate.weight"])
    assert torch.equal(*gates)


def test_what_cannot_be_appended(tmp_path, checked, checkpoint, adapters):
    with pytest.raises(InputError, match="router of its own"):
        export([checked[0], checkpoint], tmp_path / "out")
    with pytest.raises(InputError, match="different formats"):
        export([adapters[0], checked[0]], tmp_path / "out")
    twin = shutil.copytree(adapters[0], tmp_path / "expert_1")
    with pytest.raises(InputError, match="two experts are named 'expert_1'"):
        export([checked[0], twin], tmp_path / "out")
    wide = save_adapter(tmp_path / "wide", _wide(tmp_path))
    with pytest.raises(InputError, match="was trained on"):
        export([checked[0], wide], tmp_path / "out")


def _wide(tmp_path):
    from helpers_checkpoints import save_foundation

    return save_foundation(tmp_path / "wide_foundation", hidden_size=64)


@pytest.mark.slow
def test_adapters_of_another_foundation_are_not_appended(tmp_path, checked):
    other = save_foundation(tmp_path / "other")
    adapter = save_adapter(tmp_path / "adapter", other)
    with pytest.raises(InputError, match=r"was trained on .*other"):
        export([checked[0], adapter], tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DyloraMoeWarning)
        result = export(
            [checked[0], adapter], tmp_path / "out", base_model=str(other)
        )  # bit for bit the same
    assert result.check.passed and result.foundation == str(other)
