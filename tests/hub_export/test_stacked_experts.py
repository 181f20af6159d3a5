"""Adapters on the stacked experts of mixture-of-experts foundations, in the forms that PEFT reads."""

import json
import re
import shutil

import pytest
import torch
from helpers_checkpoints import change_json, save_router, save_tokenizer, write_json
from helpers_moe import SIZES, moe_model
from helpers_slow import slow_but
from helpers_stacked import gpt_oss, nemotron, with_old_adapter, write_new_adapter, write_old_adapter
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Llama4TextConfig, MixtralConfig

from dylora_moe.hub_export import InputError, export, inspect, merge, verify
from dylora_moe.hub_export.checking import peft_layers
from dylora_moe.hub_export.checking.check_source import ADAPTERS, reference
from dylora_moe.hub_export.sources.source_folder import open_folder
from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


ROWS = torch.arange(3, 15)[None].repeat(2, 1) + torch.arange(2)[:, None] * 40
BOTH = ("experts.gate_up_proj", "experts.down_proj")


@pytest.fixture(scope="module", params=["none: mixtral", "dense: qwen3 moe"])
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
        assert_same(logits["old"], with_old_adapter(base, adapters["old"], kind)(ROWS).logits)
    return logits


@pytest.mark.parametrize("layout", slow_but("adapter", of=["full", "adapter"]))
def test_every_expert_computes_what_peft_computes(
    quick_check, adapters, foundation, expected, tmp_path, layout
):
    assert inspect(list(adapters.values())).missing == []
    result = export(list(adapters.values()), tmp_path / "out", layout=layout)
    assert result.check.passed and verify(result.output_dir).passed
    assert_same(of_repo(result.output_dir, "base"), expected["base"])
    for name in adapters:
        assert not torch.allclose(expected["base"], expected[name], atol=0.1)
        assert_same(of_repo(result.output_dir, f"single:{name}"), expected[name])
        if layout == "adapter":  # as PEFT reads what was written
            assert_same(of_peft(foundation, result.output_dir, subfolder=f"experts/{name}"), expected[name])


@pytest.mark.parametrize(
    "layouts", slow_but(("full", "adapter"), of=[("full", "adapter"), ("adapter", "full")])
)
def test_a_repo_is_read_again(quick_check, adapters, tmp_path, layouts):
    first = export(list(adapters.values()), tmp_path / "first", layout=layouts[0], verify=False).output_dir
    assert export(first, tmp_path / "again", layout=layouts[1]).check.passed


def test_a_router_from_prompts_over_experts_on_stacked_experts(quick_check, adapters, tmp_path):
    prompts = tmp_path / "prompts.yaml"
    write_json(prompts, {name: [f"{name} one", f"{name} two"] for name in adapters})
    result = export(list(adapters.values()), tmp_path / "out", router_prompts=prompts)
    compared = {entry.quantity for entry in result.check.comparisons}
    assert result.check.passed and {"uniform", "router", "router, dense"} <= compared


@pytest.mark.parametrize("wrong", ["experts.base_layer.", "experts.lora_"])
def test_a_wrong_repo_is_caught(quick_check, adapters, tmp_path, monkeypatch, wrong):
    """Of each of the two parameters."""

    def weaker(*arguments):
        model = added(*arguments)
        for path, parameter in model.named_parameters():
            if wrong in path and ".lora_B." in path:
                parameter.data *= 0.9
        return model

    added = peft_layers.add_adapter
    monkeypatch.setattr(peft_layers, "add_adapter", weaker)
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


# What follows is of names and forms alone, and tried on one foundation.


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral") / "base"
    moe_model("none: mixtral").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("matrices", [(0, 1), (2,)], ids=["w1 and w3", "w2"])
@pytest.mark.parametrize("layout", slow_but("full", of=["full", "adapter"]))
def test_one_of_the_two_parameters_by_old_names(quick_check, mixtral, tmp_path, matrices, layout):
    """PEFT reads w1 and w3 only beside w2, and leaves them out without an error where they are alone."""
    adapter = write_old_adapter(
        tmp_path / "old", mixtral, "none: mixtral", matrices=matrices, lora_dropout=0.1
    )
    result = export(adapter, tmp_path / "out", layout=layout)
    assert result.check.passed
    with torch.no_grad():
        model = with_old_adapter(AutoModelForCausalLM.from_pretrained(mixtral), adapter, "none: mixtral")
        assert_same(of_repo(result.output_dir, "single:0"), model(ROWS).logits)
    if layout == "adapter":
        assert_same(of_peft(mixtral, result.output_dir, subfolder="experts/old"), model(ROWS).logits)


def assert_old_names_are_read(tmp_path, kind, **fields):
    """An adapter with the matrices of stacked experts one by one: the repo, and PEFT on it, compute what they
    say."""
    folder = tmp_path / "base"
    moe_model(kind).save_pretrained(folder)
    save_tokenizer(folder)
    adapter = write_old_adapter(tmp_path / "old", folder, kind, **fields)
    result = export(adapter, tmp_path / "out", layout="adapter")
    assert result.check.passed
    with torch.no_grad():
        expected = with_old_adapter(AutoModelForCausalLM.from_pretrained(folder), adapter, kind)(ROWS).logits
    assert_same(of_repo(result.output_dir, "single:0"), expected)
    assert_same(of_peft(folder, result.output_dir, subfolder="experts/old"), expected)


def test_dense_and_stacked_layers_under_the_same_old_names(quick_check, tmp_path):
    kind, names = "dense: qwen3 moe", ("q_proj", "gate_proj", "up_proj", "down_proj")
    assert_old_names_are_read(tmp_path, kind, also=names)


def test_a_type_whose_old_names_peft_does_not_convert(quick_check, tmp_path):
    """It leaves the experts' matrices out without an error, and reads what is written here."""
    assert_old_names_are_read(tmp_path, "none: qwen2 moe")


def test_what_peft_saves_of_an_adapter_that_it_converted(quick_check, mixtral, tmp_path):
    """Its targets are the parameters' names alone, without a module's."""
    old = write_old_adapter(tmp_path / "old", mixtral, "none: mixtral", also=["q_proj"])
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(mixtral), old).save_pretrained(
        tmp_path / "new"
    )
    fields = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert set(fields["target_parameters"]) == {"gate_up_proj", "down_proj"}
    result = export([old, tmp_path / "new"], tmp_path / "out")
    assert result.check.passed
    assert torch.equal(*(of_repo(result.output_dir, f"single:{name}") for name in ("old", "new")))


def test_ranks_and_alphas_by_pattern(quick_check, mixtral, tmp_path):
    patterns = {
        "rank_pattern": {"experts.gate_up_proj": 5, "layers.1.mlp.experts.down_proj": 2},
        "alpha_pattern": {r".*\.down_proj": 3},
    }
    adapter = write_new_adapter(
        tmp_path / "new", mixtral, "none: mixtral", BOTH, ["v_proj"], use_rslora=True, **patterns
    )
    result = export(adapter, tmp_path / "out", layout="adapter")
    assert result.check.passed
    assert_same(of_repo(result.output_dir, "single:0"), of_peft(mixtral, adapter))
    (expert,) = inspect(adapter).experts
    assert (expert.rank, expert.lora_alpha) == ((2, 5), (3, 8))
    # E experts, in, out and ranks of two layers: gate_up 32 -> 96, down 48 -> 32, and of the values 32 -> 16
    assert expert.num_parameters == 4 * (2 * 5 * (32 + 96) + (4 + 2) * (48 + 32)) + 2 * 4 * (32 + 16)


def test_beside_an_adapter_of_adalora(quick_check, mixtral, tmp_path):
    """PEFT holds the two kinds in no one model."""
    adapters = [
        write_new_adapter(tmp_path / "new", mixtral, "none: mixtral", BOTH, ["q_proj"]),
        write_old_adapter(tmp_path / "old", mixtral, "none: mixtral"),
    ]
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(mixtral),
        AdaLoraConfig(init_r=3, target_modules=["v_proj"], total_step=10),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)
    model.peft_config["default"].base_model_name_or_path = str(mixtral)
    model.save_pretrained(tmp_path / "ada")
    assert export([tmp_path / "ada", *adapters], tmp_path / "out").check.passed


def test_appended_to_a_repo_and_in_another_dtype(quick_check, mixtral, tmp_path):
    old = write_old_adapter(tmp_path / "old", mixtral, "none: mixtral")
    new = write_new_adapter(tmp_path / "new", mixtral, "none: mixtral", BOTH[:1], rank=2)
    repo = export(old, tmp_path / "one").output_dir
    assert export([repo, new], tmp_path / "two", layout="adapter").check.passed
    result = export([old, new], tmp_path / "three", dtype="bfloat16", verify=False)
    tensors = load_file(result.output_dir / "model.safetensors")
    stack = tensors["foundation.model.layers.0.mlp.experts.updates.gate_up_proj.lora_B"]
    assert stack.dtype == torch.bfloat16 and stack.shape == (2 * 4 + 2, 4, 96)


def test_training_checkpoints(quick_check, mixtral, tmp_path):
    kind = "none: mixtral"
    old = [write_old_adapter(tmp_path / f"old {i}", mixtral, kind, seed=i, also=["q_proj"]) for i in range(2)]
    new = [write_new_adapter(tmp_path / f"new {i}", mixtral, kind, BOTH, seed=i) for i in range(2)]
    trainer = tmp_path / "trainer"
    for index, adapter in enumerate([old[0], new[1]]):
        shutil.copytree(adapter, trainer / "peft_adapters" / f"expert_{index}" / f"expert_{index}")
    fields = {"num_experts": 2, "checkpoint_type": "peft_only"}
    write_json(
        trainer / "config.json",
        {"model_type": "dylora-moe", "base_model_name_or_path": str(mixtral), **fields},
    )
    (trainer / "dylo_moe_state").mkdir()
    save_router(trainer, 2)
    assert export(trainer, tmp_path / "of trainer").check.passed
    assert export(final_checkpoint(tmp_path / "final", mixtral, old), tmp_path / "of final").check.passed
    with pytest.raises(InputError, match=r"stacked experts, and such a checkpoint does not say which"):
        export(final_checkpoint(tmp_path / "of new", mixtral, new), tmp_path / "refused", verify=False)


def final_checkpoint(folder, foundation, adapters):
    (folder / "peft_adapters").mkdir(parents=True)
    (folder / "dylo_moe_state").mkdir()
    fields = {"model_type": "dylora-moe", "base_model_name_or_path": str(foundation), "_dylora_lora_alpha": 8}
    write_json(folder / "config.json", fields)
    for index, adapter in enumerate(adapters):
        tensors = load_file(adapter / "adapter_model.safetensors")
        named = {key.replace(".weight", f".expert_{index}.weight"): value for key, value in tensors.items()}
        torch.save(named, folder / "peft_adapters" / f"expert_{index}.pt")
    save_router(folder, len(adapters))
    return folder


def test_a_model_that_was_saved_under_older_names(quick_check, tmp_path):
    """transformers gives the foundation's parameters the names of its checkpoints, and with them the
    stacks."""
    down = "model.layers.1.mlp.experts.down_proj"
    experts = [{"name": "a", "target_parameters": [down]}, {"name": "b", "target_modules": ["lm_head"]}]
    config = DyloraMoeConfig(expert_configs=experts)
    model = DyloraMoeForCausalLM.from_foundation(moe_model("none: mixtral"), config)
    with torch.no_grad():
        for layer in model.expert_layers().values():
            layer.lora_B.normal_()
    model.save_pretrained(tmp_path / "saved")
    save_tokenizer(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert any(".block_sparse_moe.experts.updates.down_proj.lora_A" in name for name in stored)
    assert not [finding for finding in verify(tmp_path / "saved").findings if finding.passed is False]
    assert export(tmp_path / "saved", tmp_path / "again", layout="full").check.passed
    some = DyloraMoeForCausalLM.from_pretrained(tmp_path / "saved", experts=["a"])
    with torch.no_grad():
        assert torch.equal(
            some(ROWS, routing_strategy="single:a").logits, model(ROWS, routing_strategy="single:a").logits
        )


REFUSED = {
    "a matrix of two": ({"matrices": (0,)}, {}, r"0 of the 4 that are called .*w3.* add the missing ones"),
    "rank-stabilised": ({"use_rslora": True}, {}, r"lora_alpha \* r \*\* 0.5"),
    "an alpha of one matrix": ({"alpha_pattern": {"w1": 4}}, {}, "lora_alpha of .*w1 is 4, of .*w3 8"),
    "alphas by old names": (
        {"alpha_pattern": {"w1": 4, "w3": 4}},
        {},
        "alpha 4 by .* for which PEFT takes 8",
    ),
    "alphas by all names": (
        {"alpha_pattern": {"w1": 4, "w3": 4, "gate_up_proj": 4}},
        {},
        "alpha 4 by .* for which PEFT takes 8",
    ),
    "without an expert": ({}, {".experts.2.": None}, "3 of the 4"),
    "another foundation": (
        {},
        {".experts.3.": ".experts.4."},
        r"matrices of expert 4, .* has 4 .*--base_model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_matrices_that_peft_does_not_put_together(mixtral, tmp_path, name):
    how, replaced, message = REFUSED[name]
    adapter = write_old_adapter(tmp_path / "old", mixtral, "none: mixtral", **how)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for part, by in replaced.items():
        tensors = {
            key.replace(part, by or part): value for key, value in tensors.items() if by or part not in key
        }
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        export(adapter, tmp_path / "out", verify=False)
    assert re.search(message, inspect(adapter).missing[0])


def test_inputs_taken_for_outputs_by_an_older_peft(mixtral, tmp_path):
    adapter = write_new_adapter(tmp_path / "new", mixtral, "none: mixtral", BOTH)
    tensors = load_file(adapter / "adapter_model.safetensors")
    exchanged = {}
    for key, value in tensors.items():
        other = key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("lora_B", "lora_A")
        exchanged[other] = value.T.contiguous()
    save_file(exchanged, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"inputs taken for its outputs, as PEFT before 0\.19\.1 did"):
        export(adapter, tmp_path / "out", verify=False)


@pytest.mark.parametrize(("version", "refused"), [("0.18.1", True), ("0.19.1", False), (None, False)])
def test_where_inputs_are_as_many_as_outputs_the_version_of_peft_tells(tmp_path, version, refused):
    config = MixtralConfig(**{**SIZES, "intermediate_size": 32}, num_local_experts=2)
    foundation = AutoModelForCausalLM.from_config(config)
    foundation.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    model = get_peft_model(
        foundation, LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    )
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "new")
    change_json(tmp_path / "new" / "adapter_config.json", peft_version=version)
    if refused:
        with pytest.raises(InputError, match="Train it again"):
            export(tmp_path / "new", tmp_path / "out", verify=False)
    else:
        export(tmp_path / "new", tmp_path / "out", verify=False)


@pytest.mark.parametrize(("foundation", "first"), [(gpt_oss, "gate_up_proj"), (nemotron, "up_proj")])
def test_stacks_in_other_forms(quick_check, tmp_path, foundation, first):
    """As [in, out], with biases and the gate's columns between the others'; without a gate."""
    foundation().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    targets = [f"experts.{first}", "experts.down_proj"]
    adapter = write_new_adapter(tmp_path / "new", tmp_path / "base", foundation(), targets, ["o_proj"])
    result = export(adapter, tmp_path / "out", layout="adapter")
    assert result.check.passed
    expected = of_peft(tmp_path / "base", adapter)
    assert_same(of_repo(result.output_dir, "single:0"), expected)
    assert_same(of_peft(tmp_path / "base", result.output_dir, subfolder="experts/new"), expected)


def test_the_check_leaves_gates_alone_that_no_expert_adapts(tmp_path):
    """Of which the layers of some foundations read more than PEFT's own layer around a gate has."""
    nemotron().save_pretrained(tmp_path / "base")
    targets = ["experts.up_proj", "experts.down_proj"]
    adapter = write_new_adapter(tmp_path / "new", tmp_path / "base", nemotron(), targets)
    source = reference(ADAPTERS, [open_folder(adapter)], str(tmp_path / "base"), None, None, {}, None)
    layer = source.model.get_submodule("base_model.model.model.layers.1.mixer")
    assert hasattr(layer.gate, "e_score_correction_bias") and isinstance(layer.experts, ParamWrapper)


def test_a_parameter_of_the_same_name_as_a_linear_layer(quick_check, tmp_path):
    kind = "none: qwen2 moe"
    moe_model(kind).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    modules = ["shared_expert.down_proj", "q_proj"]
    adapter = write_new_adapter(tmp_path / "new", tmp_path / "base", kind, ["down_proj"], modules, rank=3)
    result = export(adapter, tmp_path / "out")
    assert result.check.passed
    assert_same(of_repo(result.output_dir, "single:0"), of_peft(tmp_path / "base", adapter))


def test_experts_of_another_kind_are_refused(tmp_path):
    config = Llama4TextConfig(
        **SIZES, num_local_experts=2, head_dim=8, intermediate_size_mlp=48, interleave_moe_layer_step=1
    )
    foundation = AutoModelForCausalLM.from_config(config)
    foundation.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    model = get_peft_model(
        foundation, LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    )
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "new")
    with pytest.raises(InputError, match="'down_proj' of this Llama4TextExperts is none of these"):
        export(tmp_path / "new", tmp_path / "out", verify=False)


def test_a_layer_too_many_or_too_few_is_told(mixtral, tmp_path):
    adapter = write_new_adapter(tmp_path / "new", mixtral, "none: mixtral", BOTH)
    change_json(adapter / "adapter_config.json", target_parameters=["experts.down_proj"])
    with pytest.raises(
        InputError, match=r"2 layers on model\..*\.experts, and target_parameters .* names down"
    ):
        inspect(adapter)


def test_parameters_without_a_module_beside_the_weight_of_a_linear_layer(quick_check, mixtral, tmp_path):
    """As PEFT saves what it converted, with a linear layer that is named by its weight."""
    targets = ["gate_up_proj", "down_proj", "q_proj.weight"]
    adapter = write_new_adapter(tmp_path / "new", mixtral, "none: mixtral", targets)
    assert inspect(adapter).missing == []
    result = export(adapter, tmp_path / "out")
    assert result.check.passed
    assert_same(of_repo(result.output_dir, "single:0"), of_peft(mixtral, adapter))


@pytest.mark.parametrize("fields", [{"r": 0}, {"rank_pattern": {"experts.down_proj": 0}}])
def test_a_rank_of_zero_is_told(mixtral, tmp_path, fields):
    adapter = write_new_adapter(tmp_path / "new", mixtral, "none: mixtral", BOTH)
    change_json(adapter / "adapter_config.json", **fields)
    with pytest.raises(InputError, match=r"_proj has rank 16, .* says 0"):
        inspect(adapter)


def test_a_parameter_in_both_forms_is_refused(mixtral, tmp_path):
    """One of the two would be left out."""
    adapter = write_old_adapter(tmp_path / "old", mixtral, "none: mixtral")
    other = write_new_adapter(tmp_path / "new", mixtral, "none: mixtral", BOTH[1:])
    tensors = load_file(adapter / "adapter_model.safetensors") | load_file(
        other / "adapter_model.safetensors"
    )
    save_file(tensors, adapter / "adapter_model.safetensors")
    change_json(adapter / "adapter_config.json", target_parameters=list(BOTH[1:]))
    with pytest.raises(
        InputError,
        match=r"adapts model\.layers\.0\.mlp\.experts\.down_proj twice: .*experts\.0\.w2; take one",
    ):
        export(adapter, tmp_path / "out", verify=False)


def test_a_layer_of_one_stacked_expert(quick_check, tmp_path):
    foundation = AutoModelForCausalLM.from_config(
        MixtralConfig(**SIZES, num_local_experts=1, num_experts_per_tok=1)
    )
    foundation.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    adapter = write_new_adapter(tmp_path / "new", tmp_path / "base", foundation, BOTH, ["q_proj"])
    result = export(adapter, tmp_path / "out")
    assert result.check.passed
    assert_same(of_repo(result.output_dir, "single:0"), of_peft(tmp_path / "base", adapter))
