"""Routers in every layer, made of adapters alone: what is written, kept, checked and refused."""

import json
import shutil

import pytest
import torch
from helpers_checkpoints import save_tokenizer
from helpers_moe import moe_model
from helpers_stacked import write_new_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dylora_moe.hub_export import (
    DyloraMoeWarning,
    FailureError,
    InputError,
    export,
    inspect,
    make_variant,
    verify,
)
from dylora_moe.hub_export.checking import check_arrow
from dylora_moe.hub_export.readers.exported_repo import read
from dylora_moe.hub_export.readers.open_source import open_source
from dylora_moe.hub_export.repo.repo_files import repo_files
from dylora_moe.hub_export.sources.source_folder import open_folder
from dylora_moe.hub_export.sources.source_options import ReadOptions


MIXTRAL = "none: mixtral"
ROWS = torch.tensor([[5, 9, 17, 3, 44, 60], [8, 8, 90, 71, 2, 33]])


def prototypes(repo) -> dict[str, torch.Tensor]:
    """By layer, from either layout's files."""
    full = repo / "model.safetensors"
    tensors = load_file(full if full.exists() else repo / "router.safetensors")
    return {
        name.removeprefix("foundation.").removesuffix(".prototypes"): tensor
        for name, tensor in tensors.items()
        if name.endswith(".prototypes")
    }


def by_svd(sources) -> dict[str, torch.Tensor]:
    """The top right singular vectors of the whole products, zero where an adapter does not adapt a layer."""
    experts = open_source(list(sources)).experts
    found = {}
    for index, expert in enumerate(experts):
        for module in expert.layers:
            lora_a, lora_b = (matrix.double() for matrix in expert.read(module))
            rows = found.setdefault(module, torch.zeros(len(experts), lora_a.shape[1]))
            rows[index] = torch.linalg.svd(lora_b @ lora_a).Vh[0]
    return found


def assert_same_up_to_sign(found, expected):
    assert found.keys() == expected.keys()
    for module, rows in found.items():
        assert rows.dtype == torch.float32
        for row, other in zip(rows, expected[module], strict=True):
            assert min((row - other).norm(), (row + other).norm()) < 1e-6


@pytest.fixture(scope="module")
def arrow(tmp_path_factory, adapters):
    """The repo of the three adapters with a router in every layer."""
    repo = tmp_path_factory.mktemp("arrow") / "mixture"
    return export(adapters, repo, router="arrow", num_experts_per_tok=2, verify=False).output_dir


@pytest.fixture
def copied(arrow, tmp_path):
    return shutil.copytree(arrow, tmp_path / "copied")


# What is written


@pytest.mark.usefixtures("quick_check")
def test_prototypes_are_top_singular_vectors(adapters, tmp_path):
    result = export(adapters, tmp_path / "repo", router="arrow", num_experts_per_tok=2)
    found = prototypes(tmp_path / "repo")
    assert_same_up_to_sign(found, by_svd(adapters))
    assert any(
        not row.any() for rows in found.values() for row in rows
    )  # not every expert adapts every layer
    assert (result.router, result.router_kind, result.routing_strategy) == (True, "arrow", "router")
    assert result.check.passed and result.check.num_routed_layers == len(found)
    assert {"router", "router, dense"} <= {entry.quantity for entry in result.check.comparisons}


def test_defaults_are_those_of_peft_and_settings_are_followed(arrow, adapters, tmp_path):
    export(adapters[:2], tmp_path / "two", router="arrow", verify=False)
    config = json.loads((tmp_path / "two/config.json").read_text())
    fields = ("router_kind", "router_input", "num_experts_per_tok", "router_temperature", "router_mode")
    assert [config[name] for name in fields] == ["arrow", None, 2, 1.0, "auto"]
    config = json.loads((arrow / "config.json").read_text())
    assert [config[name] for name in fields] == ["arrow", None, 2, 1.0, "auto"]
    export(
        adapters, tmp_path / "set", router="arrow", router_temperature=0.5, router_mode="dense", verify=False
    )
    config = json.loads((tmp_path / "set/config.json").read_text())
    assert [config[name] for name in fields] == ["arrow", None, 3, 0.5, "dense"]


@pytest.mark.usefixtures("quick_check")
def test_the_other_layout_holds_the_same(arrow, adapters, tmp_path):
    options = {"router": "arrow", "num_experts_per_tok": 2, "layout": "adapter"}
    assert export(adapters, tmp_path / "light", **options).check.passed
    found, expected = prototypes(tmp_path / "light"), prototypes(arrow)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[module], expected[module]) for module in found)
    assert "router.safetensors" in repo_files(tmp_path / "light").files
    assert verify(tmp_path / "light").passed
    logits = [
        AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, dtype=torch.float32)(ROWS).logits
        for repo in (arrow, tmp_path / "light")
    ]
    torch.testing.assert_close(*logits)


def test_prototypes_are_those_of_what_is_written(adapters, tmp_path):
    """And so are computed again where a repo's experts are converted."""
    export(adapters, tmp_path / "exact", router="arrow", verify=False)
    export(tmp_path / "exact", tmp_path / "rounded", dtype="bfloat16", verify=False)
    repo = read([open_folder(tmp_path / "rounded")], ReadOptions())
    error, _ = check_arrow.prototype_error(repo.experts, repo.router.stored)
    assert error < check_arrow.LARGEST_ERROR


@pytest.mark.usefixtures("quick_check")
def test_gates_of_a_mixture_of_experts_foundation_are_routed(tmp_path):
    moe_model(MIXTRAL).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    adapters = [
        write_new_adapter(tmp_path / name, tmp_path / "base", MIXTRAL, ["gate.weight"], ["q_proj"], seed=seed)
        for seed, name in enumerate(("one", "two"))
    ]
    assert export(adapters, tmp_path / "repo", router="arrow", num_experts_per_tok=1).check.passed


def test_the_gate_of_the_source_is_replaced(checkpoint, tmp_path):
    with pytest.warns(DyloraMoeWarning, match="--router arrow takes the place of the gate"):
        export(checkpoint, tmp_path / "repo", router="arrow", verify=False)
    assert not any(name.startswith("router.") for name in load_file(tmp_path / "repo/model.safetensors"))


# Appended experts


@pytest.mark.usefixtures("quick_check")
@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_appended_experts_get_rows_and_the_others_keep_theirs(adapters, tmp_path, layout):
    export(adapters[:2], tmp_path / "old", router="arrow", layout=layout, verify=False)
    for path in tmp_path.glob("old/*.safetensors"):
        tensors = load_file(path)  # with other signs, which computing them again would not give
        tensors = {name: -tensor if "prototypes" in name else tensor for name, tensor in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt"})
    result = export([tmp_path / "old", adapters[2]], tmp_path / "new", layout=layout)
    assert result.check.passed and result.routing_strategy == "router"
    old, new = prototypes(tmp_path / "old"), prototypes(tmp_path / "new")
    assert all(torch.equal(new[module][:2], rows) for module, rows in old.items())
    assert_same_up_to_sign(new, by_svd(adapters))
    assert new.keys() > old.keys()  # layers that the appended one alone adapts


@pytest.mark.usefixtures("quick_check")
@pytest.mark.parametrize("has_gate", [True, False])
def test_a_repo_gets_routers_with_its_appended_experts(checkpoint, adapters, tmp_path, has_gate):
    options = {} if has_gate else {"router_input": "none"}
    export(checkpoint, tmp_path / "old", verify=False, **options)
    result = export([tmp_path / "old", adapters[0]], tmp_path / "new", router="arrow")
    assert result.check.passed and (result.router_kind, result.routing_strategy) == ("arrow", "router")
    assert "router" in [entry.quantity for entry in result.check.comparisons]
    with safe_open(tmp_path / "new/model.safetensors", "pt") as file:
        assert not any(name.startswith("router.") for name in file.keys())  # noqa: SIM118


# Checked and found


def test_a_wrong_prototype_is_found(adapters, tmp_path, monkeypatch):
    from dylora_moe.modeling import arrow_dylora_moe

    right = arrow_dylora_moe.prototype
    monkeypatch.setattr(
        arrow_dylora_moe,
        "prototype",
        lambda a, b: right(torch.cat([a, a * 0.5]), torch.cat([b, b], 1).flip(1)),
    )
    with pytest.raises(FailureError, match="not the top right singular vector"):
        export(adapters[:2], tmp_path / "repo", router="arrow")
    assert not (tmp_path / "repo").exists()


@pytest.mark.usefixtures("quick_check")
def test_other_weights_are_found(adapters, tmp_path, monkeypatch):
    right = check_arrow._weights
    wrong = lambda scores, num_experts, temperature: right(scores, num_experts, temperature * 1.01)  # noqa: E731
    monkeypatch.setattr(check_arrow, "_weights", wrong)
    with pytest.raises(FailureError, match="the logits of strategy router differ"):
        export(adapters[:2], tmp_path / "repo", router="arrow")


def test_either_of_two_equal_singular_values_is_right():
    """And a turned vector is not, nor one of another length."""
    expert = type("Expert", (), {"name": "one", "layers": {"layer": None}})()
    expert.read = lambda module: (torch.eye(4)[:3], torch.diag(torch.tensor([2.0, 2.0, 1.0])))
    vectors = {
        "right": [0.6, 0.8, 0, 0],
        "turned": [0.8, 0.6 - 1e-4, 1e-4, 0],
        "long": [1.1, 0, 0, 0],
        "third": [0, 0, 1, 0],
    }
    errors = {}
    for name, values in vectors.items():
        stored = type("Stored", (), {"read": lambda self, values=values: torch.tensor([values])})()
        errors[name], where = check_arrow.prototype_error([expert], {"layer": stored})
    assert errors.pop("right") < 1e-7 and min(errors.values()) > 5e-5
    assert where == "layer, expert one"


def test_verify_and_inspect(copied):
    found = {finding.what: finding for finding in verify(copied).findings}
    assert found["prototypes"].passed and found["safetensors"].passed
    router = inspect(copied).router
    assert router["router_kind"] == "arrow" and router["num_layers"] == len(prototypes(copied))
    path = copied / "model.safetensors"
    tensors = load_file(path)
    name = "foundation.model.layers.1.self_attn.q_proj.prototypes"
    tensors[name][1] = tensors[name][0]
    save_file(tensors, path, metadata={"format": "pt"})
    found = {finding.what: finding for finding in verify(copied).findings}
    assert found["prototypes"].passed is False and "q_proj, expert stabilised" in found["prototypes"].detail
    tensors[name][1] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    found = {finding.what: finding for finding in verify(copied).findings}
    assert "error inf on" in found["prototypes"].detail and "NaN" in found["safetensors"].detail
    tensors[name] = tensors[name][:, 1:].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"q_proj.prototypes is \[3, 31\], and the experts ask for \[3, 32\]"
    ):
        inspect(copied)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"q_proj.prototypes is missing"):
        inspect(copied)


@pytest.mark.usefixtures("quick_check")
def test_verify_against_the_adapters(arrow, adapters):
    result = verify(arrow, against=adapters, router="arrow", num_experts_per_tok=2)
    assert result.passed and {"tensors", "logits"} <= {finding.what for finding in result.findings}


def test_card_and_variant(arrow, tmp_path):
    card = (arrow / "README.md").read_text()
    assert "over the 2 largest scores; while training" in card and "largest mean weight" in card
    make_variant(arrow, output_dir=tmp_path / "dense", routing_strategy="best", router_mode="dense")
    card = (tmp_path / "dense/README.md").read_text()
    assert "/ 1, over all experts' scores." in card and "default here is `best`" in card
    assert all(
        torch.equal(rows, prototypes(arrow)[name]) for name, rows in prototypes(tmp_path / "dense").items()
    )


# What is refused


@pytest.mark.parametrize(
    "options, words",
    [
        ({"router": "Arrow"}, "--router Arrow is not known; it can be arrow"),
        ({"router": "arrow", "router_prompts": "prompts.yaml"}, "leave out --router_prompts"),
        ({"router": "arrow", "router_input": "none"}, "leave out --router_input"),
        ({"router": "arrow", "num_experts_per_tok": 4}, "`num_experts_per_tok` is 4; with 3 experts"),
        ({"router": "arrow", "router_temperature": 0.0}, "`router_temperature` is 0.0"),
    ],
    ids=str,
)
def test_options_that_say_nothing_together(adapters, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        export(adapters, tmp_path / "repo", **options)
    assert not (tmp_path / "repo").exists()


def test_a_gate_setting_for_a_repo_without_a_gate(arrow, tmp_path):
    with pytest.raises(InputError, match="--router_input is what a gate reads"):
        export(arrow, tmp_path / "repo", router_input="base")


def test_one_expert_has_nothing_to_route(adapters, tmp_path):
    with pytest.raises(InputError, match=r"chooses among experts, and .* has one"):
        export(adapters[0], tmp_path / "repo", router="arrow")


def test_stacked_experts_are_not_routed(tmp_path):
    moe_model(MIXTRAL).save_pretrained(tmp_path / "base")
    names = [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)]
    adapters = [
        write_new_adapter(tmp_path / name, tmp_path / "base", MIXTRAL, names, ["q_proj"], seed=seed)
        for seed, name in enumerate(("one", "two"))
    ]
    with pytest.raises(
        InputError, match=r"--router arrow routes linear layers, and expert one .*a parameter of stacked"
    ):
        export(adapters, tmp_path / "repo", router="arrow")
    assert not (tmp_path / "repo").exists()
