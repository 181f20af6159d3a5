"""What a config asks transformers to fetch (code, kernels) has no effect without `--trust_remote_code`."""

import ast
import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers_checkpoints import change_json, save_adapter, save_foundation, save_whole_model
from helpers_slow import slow_but
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations import hub_kernels

from dylora_moe import cli
from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.hub_export import InputError, export, inspect, make_variant, merge, verify
from dylora_moe.modeling import DyloraMoeForCausalLM


ASKING = {
    "attention": {"attn_implementation": "kernels-community/flash-attn2"},
    "attention of a stranger": {"attn_implementation": "eve/attention:forward"},
    "attention by the private name": {"_attn_implementation": "kernels-community/flash-attn2"},
    "attention as it is kept": {"_attn_implementation_internal": "kernels-community/flash-attn2"},
    "attention by parts": {"attn_implementation": {"": "eve/attention", "base_config": "eve/attention"}},
    "a package that is not installed": {"attn_implementation": "flash_attention_2"},
    "experts": {"experts_implementation": "sonicmoe"},
    "experts by the private name": {"_experts_implementation": "deepgemm"},
    "experts as they are kept": {"_experts_implementation_internal": "sonicmoe"},
    "code": {
        "auto_map": {"AutoConfig": "eve/code--config.Config", "AutoModelForCausalLM": "eve/code--model.Model"}
    },
}
NAMES = ("attn_implementation", "experts_implementation", "auto_map")


@pytest.fixture
def fetched(monkeypatch):
    """What was asked of the Hub; nothing comes from it."""
    asked = []

    def refuse(name, *arguments, **keywords):
        asked.append(name)
        raise RuntimeError(f"{name} was fetched")

    from transformers import dynamic_module_utils, modeling_flash_attention_utils, modeling_utils
    from transformers.models.auto import auto_factory, configuration_auto

    for module in (transformers.utils, transformers.utils.import_utils, hub_kernels, modeling_utils):
        monkeypatch.setattr(module, "is_kernels_available", lambda *versions: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", refuse)
    monkeypatch.setattr(hub_kernels, "lazy_load_kernel", refuse)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", refuse)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", refuse)
    for module in (dynamic_module_utils, auto_factory, configuration_auto):
        monkeypatch.setattr(module, "get_class_from_dynamic_module", refuse)
    yield asked
    assert asked == []


def test_transformers_would_fetch_it(foundation, tmp_path, fetched):
    """Else these tests could not fail."""
    shutil.copytree(foundation, tmp_path / "foundation")
    change_json(tmp_path / "foundation" / "config.json", **ASKING["attention"])
    with pytest.raises(RuntimeError, match="flash-attn2 was fetched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "foundation")
    assert fetched == ["kernels-community/flash-attn2"]
    fetched.clear()


def names_code(value) -> bool:
    """Whether JSON names code elsewhere, however deep."""
    if isinstance(value, dict):
        return any(any(name in key for name in NAMES) or names_code(entry) for key, entry in value.items())
    return isinstance(value, list) and any(map(names_code, value))


def check_repo_asks_for_nothing(repo):
    config = json.loads((repo / "config.json").read_text())
    assert all("--" not in entry for entry in config.pop("auto_map").values())
    assert not names_code(config), config


def ask_in_a_repo(repo, asking):
    """In the repo's own config, and in that of its foundation inside it."""
    config = json.loads((repo / "config.json").read_text())
    change_json(repo / "config.json", **{**asking, "base_config": {**config["base_config"], **asking}})


@pytest.mark.parametrize("case", slow_but("attention", "code", of=ASKING))
def test_a_foundations_config(foundation, tmp_path, quick_check, fetched, monkeypatch, case):
    own = shutil.copytree(foundation, tmp_path / "foundation")
    change_json(own / "config.json", **ASKING[case])
    adapter = save_adapter(tmp_path / "source", foundation, seed=2)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(own))
    assert inspect(adapter).missing == []
    for layout in ("full", "adapter"):
        repo = export(adapter, tmp_path / layout, layout=layout).output_dir
        check_repo_asks_for_nothing(repo)
        assert verify(repo).passed
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "cache"))
    find_model(adapter).load(dtype="float32", device="cpu")
    find_model(own).load(dtype="float32", device="cpu", attn_implementation="eager")
    with torch.no_grad():
        DyloraMoeForCausalLM.from_pretrained(tmp_path / "adapter")(torch.arange(3, 9)[None])


@pytest.mark.parametrize("case", slow_but("experts as they are kept", "code", of=ASKING))
def test_a_whole_models_config(foundation, tmp_path, quick_check, fetched, case):
    source = save_whole_model(tmp_path / "source", foundation)
    change_json(source / "config.json", **ASKING[case])
    inspect(source)
    check_repo_asks_for_nothing(export(source, tmp_path / "repo").output_dir)


@pytest.mark.parametrize("case", slow_but("attention by parts", "code", of=ASKING))
def test_a_repos_config(checkpoint, checked, tmp_path, quick_check, fetched, case):
    export(checkpoint, tmp_path / "adapter", layout="adapter", verify=False)
    for repo in (shutil.copytree(checked[0], tmp_path / "full"), tmp_path / "adapter"):
        ask_in_a_repo(repo, ASKING[case])
        inspect(repo)
        result = {finding.what: finding.passed for finding in verify(repo).findings}
        assert result["safetensors"] is True
        assert result["code"] is ("auto_map" not in ASKING[case])
        check_repo_asks_for_nothing(export(repo, tmp_path / f"{repo.name}-again").output_dir)
        model = find_model(repo).load(dtype="float32", device="cpu", attn_implementation="eager").model
        assert model.config._attn_implementation == "eager"
        assert (
            find_model(repo).load(dtype="float32", device="cpu").model.config._attn_implementation == "sdpa"
        )
        merge(repo, expert=0, output_dir=tmp_path / f"{repo.name}-merged")
        merged = json.loads((tmp_path / f"{repo.name}-merged" / "config.json").read_text())
        assert not names_code(merged)
        make_variant(repo, routing_strategy="base", output_dir=tmp_path / f"{repo.name}-variant")


def test_experts_of_a_mixture_of_experts(tmp_path, fetched):
    """Whose kernels are fetched when they compute."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    folder = tmp_path / "foundation"
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    shutil.copytree(save_foundation(tmp_path / "other"), tmp_path / "other-copy")
    for path in (tmp_path / "other").glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    change_json(folder / "config.json", experts_implementation="sonicmoe")
    model = find_model(folder).load(dtype="float32", device="cpu").model
    assert model.config._experts_implementation != "sonicmoe"
    model(torch.arange(3, 9)[None])


def test_what_is_transformers_own_keeps_its_effect(foundation, tmp_path):
    own = shutil.copytree(foundation, tmp_path / "foundation")
    change_json(own / "config.json", attn_implementation="eager")
    adapter = save_adapter(tmp_path / "adapter", own, seed=2)
    assert find_model(own).load(dtype="float32", device="cpu").model.config._attn_implementation == "eager"
    config = json.loads((own / "config.json").read_text())
    assert config["attn_implementation"] == "eager"
    export(adapter, tmp_path / "repo", verify=False)


@pytest.mark.parametrize("method", ["mxfp4", "mxfp8", "fp8", "eetq"])
def test_kernels_of_a_quantisation_are_not_fetched(foundation, tmp_path, fetched, checked, method):
    asking = {"quant_method": method, "use_kernels": True, **ASKING["attention"], **ASKING["code"]}
    own = shutil.copytree(foundation, tmp_path / "foundation")
    change_json(own / "config.json", quantization_config=asking)
    adapter = save_adapter(tmp_path / "adapter", foundation, seed=2)
    for layout in ("full", "adapter"):
        with pytest.raises(
            InputError, match="is quantised; pass the original model in full precision with --base_model"
        ):
            export(adapter, tmp_path / "repo", base_model=str(own), layout=layout)
    with pytest.raises(
        InputError, match=f"is quantised by {method}, for which transformers downloads kernels"
    ):
        find_model(own).load(dtype="float32", device="cpu")
    repo = shutil.copytree(checked[0], tmp_path / "repo")
    change_json(repo / "config.json", quantization_config=asking)
    for use in (
        lambda: find_model(repo).load(dtype="float32", device="cpu"),
        lambda: merge(repo, expert=0, output_dir=tmp_path / "merged"),
    ):
        with pytest.raises(
            InputError, match=f"is quantised by {method}, for which transformers downloads kernels"
        ):
            use()


def test_a_foundation_that_became_quantised_is_not_loaded_for_layout_adapter(foundation, tmp_path, fetched):
    own = shutil.copytree(foundation, tmp_path / "foundation")
    adapter = save_adapter(tmp_path / "adapter", own, seed=2)
    repo = export(adapter, tmp_path / "repo", layout="adapter", verify=False).output_dir
    change_json(own / "config.json", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(
        ValueError, match=r"is quantised: pass the original model in full precision as `base_model=`"
    ):
        DyloraMoeForCausalLM.from_pretrained(repo)


def test_nothing_asks_at_the_terminal_whether_code_may_run(foundation, checkpoint, tmp_path, monkeypatch):
    """transformers does, where it is not told; a bar or a status hides the question, and it waits for 15 seconds."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    own = shutil.copytree(foundation, tmp_path / "foundation")
    repo = export(checkpoint, tmp_path / "repo", layout="adapter", verify=False).output_dir
    code = {"AutoConfig": "mod.C", "AutoModelForCausalLM": "mod.X"}
    change_json(own / "config.json", model_type="strange", auto_map=code)
    change_json(repo / "config.json", base_model_name_or_path=str(own))
    for given in (["merge", str(repo), "--expert", "0", "-o"], ["export", str(repo), "-o"]):
        with pytest.raises(SystemExit) as caught:
            cli.main([*given, str(tmp_path / "out")])
        assert caught.value.code == 2
    for source in (repo, own):
        with pytest.raises(InputError, match="needs code of its own, which is not run"):
            find_model(source).load(dtype="float32", device="cpu")


def test_every_call_of_an_auto_class_says_whether_code_is_trusted():
    root = Path(__file__).parents[2]
    for file in (
        file
        for room in ("dylora_moe", "eval", "hub_export", "modeling")
        for file in (root / room).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            function = node.func if isinstance(node, ast.Call) else None
            if not isinstance(function, ast.Attribute) or function.attr not in (
                "from_pretrained",
                "from_config",
            ):
                continue
            if isinstance(function.value, ast.Name) and function.value.id.startswith("Auto"):
                assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, (
                    f"{file}:{node.lineno}"
                )
