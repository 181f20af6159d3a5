"""The check after an export catches what it is there to catch, and says which expert is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_checkpoints import (
    change_json,
    final_checkpoint_tensors,
    save_final_checkpoint,
    snapshot,
)
from safetensors.torch import load_file, save_file

from dylora_moe.hub_export import FailureError, export, exporter
from dylora_moe.hub_export.checking import check as check_module
from dylora_moe.hub_export.checking.check import check_tensors, compare_logits
from dylora_moe.hub_export.checking.comparison import Computed, compare
from dylora_moe.hub_export.readers.open_source import open_source
from dylora_moe.hub_export.repo.options import ExportOptions
from dylora_moe.hub_export.repo.plan import make_plan
from dylora_moe.hub_export.sources.json_files import read_json


def check(repo, checkpoint):
    """The logits alone: they must show by themselves what comparing tensors would show sooner."""
    options = ExportOptions()
    mixture = open_source(checkpoint, options)
    return compare_logits(repo, mixture, make_plan(mixture, options), options)


def differing_tensor(repo, checkpoint):
    with pytest.raises(FailureError) as error:
        check_tensors(repo, open_source(checkpoint, ExportOptions()), None)
    return str(error.value)


def failed(report):
    return {comparison.quantity for comparison in report.comparisons if not comparison.passed}


def change_tensors(repo, change):
    tensors = load_file(repo / "model.safetensors")
    change(tensors)
    save_file(tensors, repo / "model.safetensors", metadata={"format": "pt"})


def test_a_right_export_passes_with_every_quantity_compared(checked):
    report = checked[1].check
    assert report.passed
    assert report.precision == "float64" and report.largest_difference < 1e-12
    assert all(0 < comparison.rounding < 1e-12 < comparison.effect for comparison in report.comparisons)
    names = [comparison.quantity for comparison in report.comparisons]
    assert names == [
        "base",
        "single:0",
        "single:1",
        "single:2",
        "uniform",
        "router logits",
        "router",
        "router, dense",
    ]
    assert all(comparison.positions == 24 for comparison in report.comparisons)


def test_a_corrupted_alpha_is_caught(quick_check, repo, checkpoint):
    experts = read_json(repo / "config.json")["expert_configs"]
    experts[1]["lora_alpha"] *= 1.01
    change_json(repo / "config.json", expert_configs=experts)
    report = check(repo, checkpoint)
    assert {"single:1", "uniform", "router logits"} <= failed(report)
    assert not {"base", "single:0", "single:2"} & failed(report)
    assert "the logits of expert 1 (expert_1) differ by" in report.describe_failures()
    assert "the settings of expert expert_1" in differing_tensor(repo, checkpoint)


def test_two_swapped_experts_are_caught(quick_check, repo, checkpoint):
    def swap(tensors):
        for name in tensors:
            if name.endswith((".lora_A", ".lora_B")):  # three experts of rank 4
                tensors[name] = torch.cat([tensors[name][4:8], tensors[name][:4], tensors[name][8:]])

    change_tensors(repo, swap)
    report = check(repo, checkpoint)
    # the sums over all experts, and so what the gate reads, are the same; each of the two is the other
    assert {"single:0", "single:1", "router"} <= failed(report)
    assert not {"base", "single:2", "uniform"} & failed(report)
    assert "lora_A of expert expert_0" in differing_tensor(repo, checkpoint)


def test_a_gate_whose_bias_is_zero_is_caught(quick_check, repo, checkpoint):
    change_tensors(repo, lambda tensors: tensors["router.gate.bias"].zero_())
    report = check(repo, checkpoint)
    assert "router logits" in failed(report)
    assert not {"base", "single:0", "single:1", "single:2", "uniform"} & failed(report)
    assert "the gate's logits differ by" in report.describe_failures()
    assert "the gate's bias" in differing_tensor(repo, checkpoint)


@pytest.mark.slow
def test_a_gate_without_its_bias_is_caught(repo, checkpoint):
    change_tensors(repo, lambda tensors: tensors.pop("router.gate.bias"))
    with pytest.raises(FailureError, match=r"missing keys when loading: router\.gate\.bias"):
        check(repo, checkpoint)


def test_a_failed_check_leaves_nothing_behind(monkeypatch, quick_check, checkpoint, tmp_path):
    write = exporter._write

    def write_wrongly(folder, *arguments):
        write(folder, *arguments)
        change_tensors(folder, lambda tensors: tensors["router.gate.weight"].mul_(1.5))

    monkeypatch.setattr(exporter, "_write", write_wrongly)
    with pytest.raises(FailureError, match="the gate's weight is not the source's"):
        export(checkpoint, tmp_path / "out")
    monkeypatch.setattr(check_module, "check_tensors", lambda *arguments: 0)
    with pytest.raises(FailureError, match=r"does not compute what .* does: the gate's logits"):
        export(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_temperature_is_caught(quick_check, repo, checkpoint):
    """Sparse routing does without it, and training does not."""
    change_json(repo / "config.json", router_temperature=0.5)
    assert failed(check(repo, checkpoint)) == {"router, dense"}


def test_a_repo_that_needs_this_package_fails(repo, checkpoint):
    with open(repo / "modeling_dylora_moe.py", "a") as file:
        file.write("\nimport dylora_moe\n")
    with pytest.raises(FailureError, match="needs dylora_moe, which those who load it need not have"):
        check(repo, checkpoint)


def test_the_check_leaves_nothing_in_the_repo(checkpoint, checked):
    assert not [name for name in snapshot(checked[0]) if "cache" in name and not name.endswith(".py")]


def test_not_a_number_never_passes():
    values = {"base": torch.tensor([[[1.0, float("nan")]]])}
    (comparison,) = compare(Computed(values, {"base": 1.0}), values)
    assert not comparison.passed


def test_a_quantity_that_one_side_lacks_never_passes():
    (comparison,) = compare(Computed({}, {}), {"router": torch.zeros(1, 1, 2)})
    assert comparison.passed is False


def test_dense_and_top_2_routers_are_checked_with_the_settings_given(quick_check, checkpoint, tmp_path):
    dense = export(
        checkpoint, tmp_path / "dense", router_mode="dense", router_temperature=0.5, router_input="base"
    )
    assert dense.check.passed
    assert read_json(tmp_path / "dense" / "config.json")["router_input"] == "base"
    pairs = export(checkpoint, tmp_path / "pairs", num_experts_per_tok=2)
    assert pairs.check.passed


def test_a_checkpoint_of_eleven_experts_with_unequal_ranks_passes(quick_check, tmp_path, foundation):
    """expert_1.pt also holds expert_10's tensors, and ranks are in the shapes where the config has none."""
    folder = save_final_checkpoint(tmp_path / "final", foundation, num_experts=11)
    change_json(folder / "config.json", _dylora_lora_r=None)
    for index, rank in ((3, 2), (10, 7)):
        torch.save(final_checkpoint_tensors(index, rank), folder / "peft_adapters" / f"expert_{index}.pt")
    result = export(folder, tmp_path / "out")
    assert result.check.passed
    ranks = [expert["r"] for expert in read_json(tmp_path / "out" / "config.json")["expert_configs"]]
    assert ranks == [4, 4, 4, 2, 4, 4, 4, 4, 4, 4, 7]


@pytest.mark.slow
def test_the_check_works_where_torch_is_on_the_python_path(checkpoint, tmp_path):
    """As with packages of a user or a cluster: the repo's side is another process, which must find them too."""
    site = Path(torch.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "dylora_moe", "export", str(checkpoint), "-o", str(tmp_path / "repo")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "checked" in done.stdout
