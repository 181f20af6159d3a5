"""Which models a benchmark finds, what it calls them, and that it holds one at a time."""

import gc
import json
import shutil
import weakref

import pytest
from helpers_benchmark import SMALL, files
from helpers_text import save_text_checkpoint, save_text_tokenizer
from transformers import AutoModelForCausalLM

from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.sampling.loading import FoundModel, _label, distinct_labels, find_model
from dylora_moe.hub_export.errors import InputError


pytestmark = pytest.mark.usefixtures("problems")


@pytest.mark.slow
def test_an_alpha_that_the_runs_best_model_knows_counts_for_the_cached_export(tmp_path):
    checkpoint = save_text_checkpoint(tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["_dylora_lora_alpha"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    best = tmp_path / "best_model"
    best.mkdir()
    for alpha in (8, 24):
        (best / "config.json").write_text(json.dumps({"_dylora_lora_alpha": alpha}))
        experts = find_model(checkpoint).config.expert_configs
        assert {expert["lora_alpha"] for expert in experts} == {alpha}


def test_models_of_one_name_are_told_apart(repo, tmp_path):
    folders = [tmp_path / name / "best_model" for name in ("run_a", "run_b")]
    for folder in folders:
        shutil.copytree(repo, folder)
    runs = benchmark([*folders, folders[0]], strategies="base", output_dir=tmp_path / "out", **SMALL).runs
    assert [run.model_label for run in runs] == ["run_a--best_model", "run_b--best_model"]


@pytest.mark.slow
def test_checkpoints_that_hold_the_same_are_scored_each_and_names_that_come_to_be_the_same_are_refused(
    tmp_path,
):
    folders = [tmp_path / name for name in ("a/best_model", "b/best_model", "a--best_model", "checkpoint-9")]
    checkpoint = save_text_checkpoint(tmp_path / "text", length=10)
    for folder in folders:
        shutil.copytree(checkpoint, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "cache"))
        found = [find_model(folder) for folder in folders]
    assert [model.label for model in distinct_labels([found[0], found[3], found[0]])] == [
        "best_model",
        "checkpoint-9",
    ]
    with pytest.raises(InputError, match=r"a/best_model and .*a--best_model have the same name"):
        distinct_labels(found)


def test_many_adapters_have_a_short_label():
    names = [f"an_adapter_for_the_language_number_{number}" for number in range(20)]
    labels = {_label(names[:count], names[:count]) for count in (18, 19, 20)}
    assert len(labels) == 3 and max(map(len, labels)) <= 120


def test_an_ordinary_model_without_all_its_weights_is_refused(repo, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(repo.parent / "foundation")
    weights = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    save_text_tokenizer(tmp_path / "model")
    with pytest.raises(InputError, match=r"lacks weights .*layers\.1\.mlp\.up_proj"):
        benchmark(tmp_path / "model", output_dir=tmp_path / "out", **SMALL)


def test_an_ordinary_model_with_weights_of_another_shape_is_refused(repo, tmp_path):
    folder = shutil.copytree(repo.parent / "foundation", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    rows = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows + 7}))
    with pytest.raises(
        InputError, match=rf"weight of .*model is \[{rows}, .*its config asks for \[{rows + 7}, "
    ):
        find_model(folder).load(dtype="float32", device="cpu")


def test_an_ordinary_model_is_run_once_as_base(repo, tmp_path):
    """Its samples are those of strategy `base` of a mixture on it."""
    options = {**SMALL, "force_base_prompt": True}  # the foundation has a chat template, the mixture none
    foundation = repo.parent / "foundation"
    ordinary = benchmark(foundation, output_dir=tmp_path, **options)
    base = benchmark(repo, strategies="base", output_dir=tmp_path, **options)
    assert [run.routing_strategy for run in ordinary.runs] == ["base"]
    assert files(ordinary) == files(base)
    with pytest.raises(InputError, match="ordinary model"):
        benchmark(foundation, strategies=["router"], output_dir=tmp_path, **options)
    both = benchmark([repo, foundation], strategies=["router", "base"], output_dir=tmp_path, **options).runs
    assert [run.routing_strategy for run in both] == ["router", "base", "base"]
    assert both[2].samples_path == ordinary.runs[0].samples_path


def test_a_model_is_loaded_once_and_forgotten_before_the_next(repo, tmp_path, monkeypatch):
    loaded = []
    load = FoundModel.load

    def watched(self, **arguments):
        gc.collect()
        assert all(model() is None for model in loaded)
        result = load(self, **arguments)
        loaded.append(weakref.ref(result.model))
        return result

    monkeypatch.setattr(FoundModel, "load", watched)
    several = {"strategies": ["router", "single:1"], **SMALL}
    benchmark([repo, repo.parent / "foundation"], output_dir=tmp_path, **several)
    assert len(loaded) == 2
