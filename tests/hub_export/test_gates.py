"""Adapters on the gates of mixture-of-experts foundations, in the forms that PEFT reads."""

import pytest
import torch
import transformers
from helpers_checkpoints import change_json, save_router, save_tokenizer, write_json
from helpers_moe import SIZES, moe_model
from helpers_slow import slow_but
from helpers_stacked import gpt_oss, random_weights, write_new_adapter, write_old_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dylora_moe.hub_export import InputError, export, inspect, merge, verify
from dylora_moe.hub_export.checking import peft_layers
from dylora_moe.modeling import DyloraMoeForCausalLM
from dylora_moe.modeling.experts_dylora_moe import is_gate


ROWS = torch.arange(3, 15)[None].repeat(2, 1) + torch.arange(2)[:, None] * 40


def granite():
    """Its gates are called `router`."""
    torch.manual_seed(0)
    config = transformers.GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return random_weights(AutoModelForCausalLM.from_config(config))


# What makes a foundation, and how its gates are called.
FOUNDATIONS = {
    "mixtral": (lambda: moe_model("none: mixtral"), "mlp.gate"),
    "qwen2 moe": (lambda: moe_model("none: qwen2 moe"), "mlp.gate"),
    "deepseek v3": (lambda: moe_model("dense and shared: deepseek v3"), "mlp.gate"),
    "gpt-oss": (gpt_oss, "mlp.router"),
    "granite": (granite, "block_sparse_moe.router"),
}


@pytest.fixture(scope="module", params=FOUNDATIONS)
def kind(request):
    return request.param


def saved(kind, folder):
    """Older versions of transformers have linear layers as gates, and some that PEFT cannot run, for choosing
    outside."""
    foundation = FOUNDATIONS[kind][0]()
    chooses_outside = any(hasattr(module, "route_tokens_to_experts") for module in foundation.modules())
    if chooses_outside or not any(map(is_gate, foundation.modules())):
        pytest.skip("PEFT does not adapt the gate of this version of transformers")
    foundation.save_pretrained(folder)
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
    """Of unequal ranks and scales: on all gates alone, on the last one and the attention, on the attention
    alone."""
    folder = tmp_path_factory.mktemp("adapters")
    every, last = FOUNDATIONS[kind][1] + ".weight", gates(kind)[-1] + ".weight"
    patterns = {"rank_pattern": {last: 2}, "alpha_pattern": {r".*\.weight": 3}, "use_rslora": True}
    return {
        "gates": new_adapter(
            folder / "gates", foundation, kind, [every.rpartition("mlp.")[2]], rank=3, **patterns
        ),
        "last": new_adapter(folder / "last", foundation, kind, [last], ["q_proj"], rank=4, seed=1),
        "attention": new_adapter(
            folder / "attention", foundation, kind, (), ["q_proj", "o_proj"], rank=2, seed=2
        ),
    }


@pytest.mark.parametrize("layout", slow_but("adapter", of=["full", "adapter"]))
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


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"], indirect=True)
@pytest.mark.parametrize(
    "layouts", slow_but(("full", "adapter"), of=[("full", "adapter"), ("adapter", "full")])
)
def test_a_repo_is_read_again(quick_check, adapters, tmp_path, layouts):
    first = export(list(adapters.values()), tmp_path / "first", layout=layouts[0], verify=False).output_dir
    assert export(first, tmp_path / "again", layout=layouts[1]).check.passed


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"], indirect=True)
@torch.no_grad()
def test_an_expert_merged_into_the_foundation(adapters, foundation, tmp_path):
    repo = export(list(adapters.values()), tmp_path / "repo", verify=False).output_dir
    assert merge(repo, expert="gates", output_dir=tmp_path / "merged").passed
    assert_same(loaded(tmp_path / "merged")(ROWS).logits, of_peft(foundation, adapters["gates"]))


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"], indirect=True)
@torch.no_grad()
def test_experts_are_saved_as_folders_that_peft_reads(adapters, foundation, tmp_path):
    repo = export(list(adapters.values()), tmp_path / "repo", verify=False).output_dir
    model = DyloraMoeForCausalLM.from_pretrained(repo, experts=["last", "gates"])
    for name, folder in zip(["last", "gates"], model.save_adapters(tmp_path / "saved"), strict=True):
        assert_same(of_peft(foundation, folder), of_peft(foundation, adapters[name]))
    model.save_pretrained(tmp_path / "again")
    assert_same(of_repo(tmp_path / "again", "single:gates"), of_peft(foundation, adapters["gates"]))


def write_gates(folder, foundation, places, target_modules, tensors=(), **fields):
    """An adapter as an older PEFT saved it, on gates by their names, beside other `tensors`."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    tensors = dict(tensors)
    for place in places:
        tensors[f"base_model.model.{place}.lora_A.weight"] = torch.randn(4, 32, generator=generator) * 0.3
        tensors[f"base_model.model.{place}.lora_B.weight"] = torch.randn(4, 4, generator=generator) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": target_modules,
    }
    write_json(
        folder / "adapter_config.json", {**config, "base_model_name_or_path": str(foundation), **fields}
    )
    return folder


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate", "w1", "w2", "w3"]])
def test_all_layers_of_an_old_mixtral(quick_check, mixtral, tmp_path, targets):
    """All were linear once; by now the experts are stacked, and the gate is none."""
    others = write_old_adapter(tmp_path / "old", mixtral, "none: mixtral", also=["q_proj"])
    places = [name.replace("mlp", "block_sparse_moe") for name in gates("mixtral")]
    old = write_gates(others, mixtral, places, targets, load_file(others / "adapter_model.safetensors"))
    assert inspect(old).missing == []
    result = export(old, tmp_path / "out")
    assert result.check.passed
    assert_same(of_repo(result.output_dir, "single:0"), of_peft(mixtral, old))


@pytest.mark.parametrize("kind", ["mixtral", "deepseek v3"], indirect=True)
@pytest.mark.parametrize("targets", [["gate", "o_proj"], r".*\.gate"])
def test_gates_that_are_targeted_as_modules(quick_check, kind, foundation, tmp_path, targets):
    old = write_gates(tmp_path / "old", foundation, gates(kind), targets)
    result = export(old, tmp_path / "out")
    assert result.check.passed
    assert_same(of_repo(result.output_dir, "single:0"), of_peft(foundation, old))


@torch.no_grad()
def test_a_type_whose_gate_peft_does_not_convert(quick_check, tmp_path):
    """It refuses Qwen2-MoE's gate as a module, and reads what is written here."""
    base = saved("qwen2 moe", tmp_path / "base")
    old = write_gates(tmp_path / "old", base, gates("qwen2 moe"), ["gate", "q_proj"])
    with pytest.raises(ValueError, match="is not supported"):
        of_peft(base, old)
    repo = export(old, tmp_path / "out", layout="adapter").output_dir
    assert_same(of_repo(repo, "single:0"), of_peft(base, repo, subfolder="experts/old"))


def test_an_alpha_by_the_gates_name_as_a_module(quick_check, mixtral, tmp_path):
    """PEFT looks for that of the gate's weight."""
    places = gates("mixtral")
    old = write_gates(tmp_path / "old", mixtral, places, ["gate"], alpha_pattern={"gate": 4})
    with pytest.raises(
        InputError, match=r"alpha 4.*for .*mlp\.gate\.weight it takes 8.*Put .*gate\.weight into"
    ):
        export(old, tmp_path / "refused", verify=False)
    remedy = {"target_modules": [], "target_parameters": ["gate.weight"], "alpha_pattern": {"gate.weight": 4}}
    result = export(write_gates(tmp_path / "new", mixtral, places, **remedy), tmp_path / "out")
    assert result.check.passed
    assert_same(of_repo(result.output_dir, "single:0"), of_peft(mixtral, tmp_path / "new"))


def test_training_checkpoints(quick_check, mixtral, tmp_path):
    places = [name.replace("mlp", "block_sparse_moe") for name in gates("mixtral")]
    trainer, final = tmp_path / "trainer", tmp_path / "final"
    for index in range(2):
        (trainer / "peft_adapters" / f"expert_{index}").mkdir(parents=True)
        (final / "peft_adapters").mkdir(parents=True, exist_ok=True)
        place = trainer / "peft_adapters" / f"expert_{index}" / f"expert_{index}"
        write_gates(place, mixtral, places[index:], ["gate"])
        tensors = load_file(place / "adapter_model.safetensors")
        named = {key.replace(".weight", f".expert_{index}.weight"): value for key, value in tensors.items()}
        torch.save(named, final / "peft_adapters" / f"expert_{index}.pt")
    for folder, fields in ((trainer, {"checkpoint_type": "peft_only"}), (final, {"_dylora_lora_alpha": 8})):
        known = {"model_type": "dylora-moe", "base_model_name_or_path": str(mixtral), "num_experts": 2}
        write_json(folder / "config.json", {**known, **fields})
        (folder / "dylo_moe_state").mkdir()
        save_router(folder, 2)
        assert export(folder, tmp_path / f"of {folder.name}").check.passed


def test_the_check_catches_a_wrong_gate(quick_check, mixtral, tmp_path, monkeypatch):
    def weaker(*arguments):
        model = added(*arguments)
        for path, parameter in model.named_parameters():
            if "mlp.gate" in path and ".lora_B." in path:
                parameter.data *= 0.9
        return model

    old = write_gates(tmp_path / "old", mixtral, gates("mixtral"), ["gate"])
    added = peft_layers.add_by_names
    monkeypatch.setattr(peft_layers, "add_by_names", weaker)
    with pytest.raises(Exception, match="does not compute what"):
        export(old, tmp_path / "out")


def test_a_gate_of_another_foundation_is_refused(mixtral, tmp_path):
    old = write_gates(tmp_path / "old", mixtral, gates("mixtral"), ["gate"])
    tensors = load_file(old / "adapter_model.safetensors")
    save_file(
        {key: value[:3] if "lora_B" in key else value for key, value in tensors.items()},
        old / "adapter_model.safetensors",
    )
    with pytest.raises(
        InputError, match=r"mlp\.gate with 32 inputs and 3 outputs .* has 32 inputs and 4 outputs"
    ):
        export(old, tmp_path / "out", verify=False)


@pytest.mark.parametrize("place", ["gate", "experts"])
def test_adalora_where_no_layer_is_linear_is_refused(mixtral, tmp_path, place):
    """PEFT does not put it there."""
    old = tmp_path / "old"
    if place == "gate":
        write_gates(old, mixtral, gates("mixtral"), ["gate"])
    else:
        write_old_adapter(old, mixtral, "none: mixtral")
    tensors = load_file(old / "adapter_model.safetensors")
    ranks = {key.replace("lora_A.weight", "lora_E"): torch.ones(4, 1) for key in tensors if "lora_A" in key}
    tensors = {key.removesuffix(".weight"): value for key, value in tensors.items()} | ranks
    save_file(tensors, old / "adapter_model.safetensors")
    change_json(old / "adapter_config.json", peft_type="ADALORA", init_r=4, target_r=4, total_step=10)
    with pytest.raises(
        InputError, match=rf"AdaLoRA, which PEFT puts on linear layers alone, and adapts .*mlp\.{place}"
    ):
        export(old, tmp_path / "out", verify=False)
