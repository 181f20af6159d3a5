"""Reading final checkpoints: every quirk of the format, and every way in which one can be incomplete."""

import os
import pickle
import shutil

import pytest
import torch
from helpers_checkpoints import (
    change_json,
    final_checkpoint_tensors,
    save_final_checkpoint,
    save_foundation,
    save_router,
    snapshot,
)

from dylora_moe.hub_export import InputError, detect, export, inspect
from dylora_moe.modeling import DyloraMoeForCausalLM


def export_error(source, tmp_path, **options) -> str:
    """The message of an export that must fail, and must leave neither an output nor a change in the
    source."""
    before = snapshot(source)
    with pytest.raises(InputError) as caught:
        export(source, tmp_path / "out", verify=False, **options)
    assert not list(tmp_path.glob("*out*"))
    assert snapshot(source) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_experts_keep_their_numbers_and_nobody_elses(tmp_path, foundation):
    folder = save_final_checkpoint(tmp_path / "final", foundation, num_experts=12)
    export(folder, tmp_path / "out", verify=False)
    model = DyloraMoeForCausalLM.from_pretrained(tmp_path / "out")
    for index in (1, 10, 11):
        tensors = final_checkpoint_tensors(index, rank=4)
        for module, (matrix_a, matrix_b) in model.expert_weights(index).items():
            assert torch.equal(matrix_a, tensors[f"base_model.model.{module}.lora_A.expert_{index}.weight"])
            assert torch.equal(matrix_b, tensors[f"base_model.model.{module}.lora_B.expert_{index}.weight"])


def test_the_router_is_taken_over_as_training_used_it(checked):
    config = DyloraMoeForCausalLM.from_pretrained(checked[0]).config
    assert (config.router_input, config.router_mode) == ("experts_sum", "auto")
    assert (config.num_experts_per_tok, config.router_temperature) == (1, 2.0)
    assert all(expert["mature"] for expert in config.expert_configs)
    assert [expert["lora_dropout"] for expert in config.expert_configs] == [0.05] * 3


def test_detection_goes_by_tensor_names(damaged):
    change_json(damaged / "config.json", model_type="llama")
    detection = detect(damaged)
    assert detection.format == "final checkpoint"
    assert "lora_A.expert_0.weight" in detection.reason


def test_an_empty_expert_is_an_error_that_names_it(damaged, tmp_path):
    torch.save({}, damaged / "peft_adapters" / "expert_1.pt")
    message = export_error(damaged, tmp_path)
    assert "expert_1.pt is an empty dict" in message
    assert "no checkpoint-* folder" in message


def test_an_empty_expert_names_the_sibling_that_has_it(damaged, checkpoint, tmp_path):
    torch.save({}, damaged / "peft_adapters" / "expert_1.pt")
    for step, keep in ((90, True), (100, True), (200, False)):
        sibling = shutil.copytree(checkpoint, damaged.parent / f"checkpoint-{step}")
        if not keep:
            torch.save({}, sibling / "peft_adapters" / "expert_1.pt")
    assert "checkpoint-100 has expert_1: export that folder instead" in export_error(damaged, tmp_path)
    assert "expert_1" in inspect(damaged).missing[0]


def test_a_file_with_only_another_experts_tensors_counts_as_empty(tmp_path, foundation):
    folder = save_final_checkpoint(tmp_path / "final", foundation, num_experts=11)
    torch.save(final_checkpoint_tensors(10, 4), folder / "peft_adapters" / "expert_1.pt")
    assert "expert_1.pt holds no tensor of expert_1" in export_error(folder, tmp_path)


def test_a_missing_alpha_is_asked_for_and_never_guessed(damaged, tmp_path):
    change_json(damaged / "config.json", _dylora_lora_alpha=None)
    assert "--lora_alpha" in export_error(damaged, tmp_path)
    assert "--lora_alpha" in inspect(damaged).missing[0]
    assert inspect(damaged, lora_alpha=8).missing == []


def test_a_missing_alpha_is_given_or_found_in_best_model(quick_check, damaged, checkpoint, tmp_path):
    change_json(damaged / "config.json", _dylora_lora_alpha=None)
    given = export(damaged, tmp_path / "given", lora_alpha=5)
    assert given.check.passed
    best = shutil.copytree(checkpoint, damaged.parent / "best_model")
    change_json(best / "config.json", _dylora_lora_alpha=12)
    found = export(damaged, tmp_path / "found", verify=False)
    alphas = [
        DyloraMoeForCausalLM.from_pretrained(result.output_dir).config.expert_configs[0]["lora_alpha"]
        for result in (given, found)
    ]
    assert alphas == [5, 12]


def break_rank(folder):
    torch.save(final_checkpoint_tensors(2, rank=3), folder / "peft_adapters" / "expert_2.pt")


def break_gate(folder, **changes):
    path = folder / "dylo_moe_state" / "router.pt"
    state = torch.load(path, weights_only=True)
    state["gate_state_dict"].update(changes)
    state["gate_state_dict"] = {k: v for k, v in state["gate_state_dict"].items() if v is not None}
    torch.save(state, path)


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def lose_matrix(folder):
    path = folder / "peft_adapters" / "expert_0.pt"
    tensors = torch.load(path, weights_only=True)
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.expert_0.weight")
    torch.save(tensors, path)


def add_whole_weight(folder):
    path = folder / "peft_adapters" / "expert_0.pt"
    tensors = torch.load(path, weights_only=True)
    torch.save({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, path)


DAMAGES = {
    "rank": (break_rank, ["expert_2", "rank 3", "_dylora_lora_r is 4"]),
    "no bias": (lambda folder: break_gate(folder, bias=None), ["gate_state_dict has no bias"]),
    "gate of other size": (
        lambda folder: break_gate(folder, weight=torch.zeros(2, 32)),
        ["[2, 32]", "3 experts"],
    ),
    "no router": (
        lambda folder: (folder / "dylo_moe_state" / "router.pt").unlink(),
        ["router.pt is missing"],
    ),
    "no top_k": (
        lambda folder: save_router(folder, 3, top_k=None),
        ["has no top_k", "--num_experts_per_tok"],
    ),
    "top_k too large": (lambda folder: save_router(folder, 3, top_k=9), ["num_experts_per_tok", "9"]),
    "input_size": (lambda folder: save_router(folder, 3, input_size=64), ["input_size is 64"]),
    "expert file gone": (lambda folder: (folder / "peft_adapters" / "expert_1.pt").unlink(), ["expert_1.pt"]),
    "one too many": (
        lambda folder: change_json(folder / "config.json", _dylora_num_experts=2),
        ["3 expert files"],
    ),
    "truncated expert": (lambda folder: truncate(folder / "peft_adapters" / "expert_1.pt"), ["expert_1.pt"]),
    "truncated router": (lambda folder: truncate(folder / "dylo_moe_state" / "router.pt"), ["router.pt"]),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ["config.json", "not valid JSON"],
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json does not exist"]),
    "half a matrix pair": (lose_matrix, ["expert_0", "layers.0.self_attn.q_proj", "not both"]),
    "a whole weight": (add_whole_weight, ["lm_head.weight is not a LoRA matrix"]),
    "alpha is text": (
        lambda folder: change_json(folder / "config.json", _dylora_lora_alpha="8"),
        ["'8'", "number"],
    ),
    "no foundation": (
        lambda folder: change_json(folder / "config.json", base_model_name_or_path=None),
        ["--base_model"],
    ),
    "foundation elsewhere": (
        lambda folder: change_json(folder / "config.json", base_model_name_or_path="/nowhere/gemma"),
        ["/nowhere/gemma", "--base_model"],
    ),
    "foundation not cached": (
        lambda folder: change_json(folder / "config.json", base_model_name_or_path="nobody/nothing"),
        ["nobody/nothing", "--base_model"],
    ),
    "other vocabulary": (lambda folder: change_json(folder / "config.json", vocab_size=98), ["98", "97"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_names_it(damaged, tmp_path, damage):
    apply, expected = DAMAGES[damage]
    apply(damaged)
    message = export_error(damaged, tmp_path)
    for part in expected:
        assert part in message


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


@pytest.mark.parametrize("name", ["peft_adapters/expert_0.pt", "dylo_moe_state/router.pt"])
def test_pickled_code_is_not_run(damaged, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (damaged / name).write_bytes(pickle.dumps({"gate_state_dict": RunsCode()}))
    assert name.rsplit("/", 1)[-1] in export_error(damaged, tmp_path)
    torch.save({"gate_state_dict": RunsCode()}, damaged / name)
    assert "more than tensors" in export_error(damaged, tmp_path)
    assert not (tmp_path / "code-was-run").exists()


def test_a_relative_foundation_is_found_from_the_checkpoint(damaged, foundation, tmp_path):
    shutil.copytree(foundation, damaged.parent / "base")
    change_json(damaged / "config.json", base_model_name_or_path="./base")
    assert export(damaged, tmp_path / "out", verify=False).foundation == str(
        (damaged.parent / "base").resolve()
    )


def test_stored_maturity_is_told(damaged, tmp_path):
    save_router(damaged, 3, expert_maturity=torch.tensor([1, 0, 1]))
    with pytest.warns(UserWarning, match=r"expert_maturity \[1, 0, 1\]"):
        export(damaged, tmp_path / "out", verify=False)


@pytest.fixture
def older(damaged):
    """`dylo_moe_state/` beside the checkpoint's folder, as older runs left it."""
    shutil.move(damaged / "dylo_moe_state", damaged.parent / "dylo_moe_state")
    return damaged


def test_a_router_beside_the_folder_is_read_and_told(quick_check, checked, older, tmp_path):
    found = inspect(older)
    assert found.missing == [] and found.router["num_experts"] == 3
    assert any(str(older.parent / "dylo_moe_state" / "router.pt") in note for note in found.notes)
    result = export(older, tmp_path / "out")
    assert result.check.passed and "router" in {c.quantity for c in result.check.comparisons}
    first, second = (
        DyloraMoeForCausalLM.from_pretrained(folder) for folder in (checked[0], tmp_path / "out")
    )
    assert torch.equal(first.router.gate.weight, second.router.gate.weight)
    assert torch.equal(first.router.gate.bias, second.router.gate.bias)


def test_the_folder_s_own_router_comes_first(older, tmp_path):
    (older / "dylo_moe_state").mkdir()
    save_router(older, 3, temperature=0.5)
    found = inspect(older)
    assert found.router["router_temperature"] == 0.5 and not any(
        "has none of its own" in note for note in found.notes
    )


def test_the_end_of_a_run_is_no_router_of_a_step(older, tmp_path):
    """The gate went on being trained after that step."""
    step = older.rename(older.parent / "checkpoint-5")
    message = export_error(step, tmp_path)
    assert "not of this step" in message and str(step / "dylo_moe_state") in message


def test_a_router_beside_the_folder_of_another_number_of_experts(older, tmp_path):
    save_router(older.parent, 4)
    assert "there are 3 experts" in export_error(older, tmp_path)


def test_nan_is_refused_by_name(tmp_path):
    foundation = save_foundation(tmp_path / "foundation")
    checkpoint = save_final_checkpoint(tmp_path / "checkpoint", foundation)
    file = checkpoint / "peft_adapters" / "expert_2.pt"
    tensors = torch.load(file)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    torch.save(tensors, file)
    with pytest.raises(InputError, match=r"expert_2.*NaN.*q_proj"):
        export([checkpoint], tmp_path / "repo", verify=False)
    assert not (tmp_path / "repo").exists()
