"""Nothing right is refused, nothing wrong accepted: what the check allows is what rounding does to each
model."""

import copy
import json
import warnings

import pytest
import torch
from helpers_checkpoints import save_adapter, save_final_checkpoint, save_tokenizer, write_json
from helpers_mixtures import CORRUPTIONS, ROWS, random_mixture, repo_side, report, source_side
from helpers_slow import slow_but
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dylora_moe.hub_export import DyloraMoeWarning, FailureError, export, merge, merging, verify
from dylora_moe.hub_export.checking import rounding
from dylora_moe.hub_export.checking.comparison import Comparison, compared


DETECTABLE = 100  # times its rounding that a quantity is off by


def outcomes(
    seed: int, precision: torch.dtype, layers: tuple[int, ...], corruptions: list[str]
) -> dict[str, str]:
    """ "passed", "cannot tell", "caught" or what is wrong with it, for a right repo and for each
    corruption."""
    words, model = random_mixture(seed, layers)
    source = source_side(model, precision)
    right = repo_side(model, precision, source)
    result = report(model, source, right, precision)
    names = {True: "passed", None: "cannot tell", False: "caught"}
    found = {"right": names[result.passed]}
    assert result.passed is not False, f"{words}: {result.describe_failures()}"
    for name in corruptions:
        wrong_model = copy.deepcopy(model)
        CORRUPTIONS[name](wrong_model)
        wrong = repo_side(wrong_model, precision, source)
        shows = any(
            float((wrong[quantity] - right[quantity]).abs().max()) > DETECTABLE * source.rounding[quantity]
            for quantity in wrong
        )
        found[name] = names[report(model, source, wrong, precision).passed] + ("" if shows else ", hidden")
        if shows:
            assert found[name] == "caught", f"{words}: {name} is not caught"
        if name.startswith("alpha"):
            assert not found[name].startswith("passed"), f"{words}: {name} passes"
    return found


@pytest.mark.parametrize("seed", slow_but(0, 1, of=range(8)))
def test_right_repos_pass_and_wrong_ones_do_not(seed):
    found = outcomes(seed, torch.float64, (2, 3, 6), list(CORRUPTIONS))
    assert found.pop("right") == "passed" and set(found.values()) == {"caught"}


@pytest.mark.parametrize("seed", slow_but(8, of=range(8, 12)))
def test_where_there_is_no_memory_for_float64(seed):
    outcomes(seed, torch.float32, (2, 3, 6), ["alpha is twice as large", "alpha is 5 % larger"])


def merged_sum(seed: int, layers: tuple[int, ...]) -> Comparison:
    """What `merge` compares of a random mixture's second expert."""
    _, model = random_mixture(seed, layers)
    merged = model.merge_expert(1)
    values, moved = merging._measure(model, ROWS, 1)
    effect = float((values["expert"] - values["base"]).abs().max())
    return compared("merged", values["expert"], merging._logits(merged, ROWS), moved["expert"], effect)


@pytest.mark.parametrize("seed", slow_but(0, of=range(4)))
def test_right_sums_are_not_refused(seed):
    assert merged_sum(seed, (2, 3, 6)).passed is not False


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_right_sums_of_many_kinds_are_not_refused(seed):
    assert merged_sum(seed, (2, 3, 6, 12, 20, 30)).passed is not False


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(100, 160))
def test_right_repos_pass_and_wrong_ones_do_not_of_many_kinds(seed, precision):
    outcomes(seed, precision, (2, 3, 6, 12, 20, 30), list(CORRUPTIONS))


@pytest.fixture(scope="module")
def steep(tmp_path_factory):
    """Sources on a foundation whose weights are so large that float32 is 6e-4 from float64: every format,
    three experts."""
    folder = tmp_path_factory.mktemp("steep")
    torch.manual_seed(0)
    sizes = {"vocab_size": 800, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    foundation = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.3))
    foundation.save_pretrained(folder / "foundation")
    save_tokenizer(folder / "foundation")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = PeftModel(foundation, config, adapter_name="expert_0")
    for name in ("expert_1", "expert_2"):
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.3)
    gate = {"weight": torch.randn(3, 64), "bias": torch.randn(3)}
    _write_final_checkpoint(folder / "final", model, gate)
    _write_trainer_checkpoint(folder / "trainer", model, gate)
    _write_whole_model(folder / "whole", model, gate)
    for name in model.peft_config:
        model.save_pretrained(folder / "adapters", selected_adapters=[name])
    return folder


def _stored_config(folder, **fields):
    common = {"base_model_name_or_path": str(folder.parent / "foundation"), "_dylora_num_experts": 3}
    return {"model_type": "dylora-moe", **common, "_dylora_lora_r": 4, "_dylora_lora_alpha": 8, **fields}


def _write_final_checkpoint(folder, model, gate):
    (folder / "peft_adapters").mkdir(parents=True)
    (folder / "dylo_moe_state").mkdir()
    write_json(folder / "config.json", _stored_config(folder, vocab_size=800, hidden_size=64))
    for name in model.peft_config:
        tensors = {key: value for key, value in model.state_dict().items() if f".{name}." in key}
        torch.save(tensors, folder / "peft_adapters" / f"{name}.pt")
    state = {"gate_state_dict": gate, "num_experts": 3, "input_size": 64, "top_k": 1, "temperature": 2.0}
    torch.save(state, folder / "dylo_moe_state" / "router.pt")


def _write_trainer_checkpoint(folder, model, gate):
    folder.mkdir()
    write_json(
        folder / "config.json", {"model_type": "dylora-moe", "num_experts": 3, "checkpoint_type": "peft_only"}
    )
    for name in model.peft_config:
        model.save_pretrained(folder / "peft_adapters" / name, selected_adapters=[name])
    save_file({f"gate.{key}": value for key, value in gate.items()}, folder / "router.safetensors")
    write_json(folder / "trainer_state.json", {"global_step": 10, "best_model_checkpoint": None})


def _write_whole_model(folder, model, gate):
    folder.mkdir()
    own = json.loads((folder.parent / "foundation" / "config.json").read_text())
    write_json(folder / "config.json", {**_stored_config(folder), **own})
    tensors = {f"foundation_model.{key}": value for key, value in model.state_dict().items()}
    tensors.update({f"router.gate.{key}": value for key, value in gate.items()})
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "model.safetensors")


FORMATS = {
    "final checkpoint": ("final",),
    "trainer checkpoint": ("trainer",),
    "whole-model state dict": ("whole",),
    "PEFT LoRA adapters": ("adapters/expert_0", "adapters/expert_1", "adapters/expert_2"),
}


@pytest.mark.parametrize("layout", slow_but("full", of=["full", "adapter"]))
@pytest.mark.parametrize("source_format", FORMATS)
def test_a_steep_foundation_is_exported_from_every_format(
    quick_check, steep, tmp_path, source_format, layout
):
    sources = [steep / place for place in FORMATS[source_format]]
    named = source_format in ("final checkpoint", "whole-model state dict")
    options = {
        "base_model": None if named else str(steep / "foundation"),
        "tokenizer": str(steep / "foundation"),
    }
    result = export(sources, tmp_path / "repo", layout=layout, **options)
    assert (
        result.format == source_format and result.check.passed is True and result.check.precision == "float64"
    )
    assert all(comparison.rounding > 0 for comparison in result.check.comparisons)


def test_a_steep_repo_is_exported_again_verified_and_merged(quick_check, steep, tmp_path):
    repo = export(steep / "final", tmp_path / "repo", router_input="experts_sum").output_dir
    assert export(repo, tmp_path / "again").check.passed is True
    (logits,) = [
        finding for finding in verify(repo, against=steep / "final").findings if finding.what == "logits"
    ]
    assert logits.passed and "in float64 (rounding allows " in logits.detail
    merged = merge(repo, expert=1, output_dir=tmp_path / "merged")
    assert merged.passed and merged.difference <= merged.allowed


def test_the_report_says_what_is_allowed_and_why(checked):
    found = checked[1].check.to_dict()
    assert found["precision"] == "float64" and found["passed"] is True
    assert found["allowed_from"].startswith(
        "20 times how far a quantity moves when each weight of the source moves"
    )
    for entry in found["quantities"]:
        assert entry["allowed"] == 20 * entry["rounding"] > entry["difference"] and entry["passed"] is True


def without_memory(monkeypatch):
    monkeypatch.setattr(rounding, "free_memory", lambda: 1000)


def test_without_memory_for_float64_the_check_says_so(monkeypatch, quick_check, checkpoint, tmp_path):
    without_memory(monkeypatch)
    report = export(checkpoint, tmp_path / "repo").check
    assert report.passed is True and report.precision == "float32" and "float32" in report.describe()
    assert all(1e-9 < comparison.rounding < 1e-3 for comparison in report.comparisons)


def test_experts_too_small_to_be_told_from_rounding_are_said_to_be(
    monkeypatch, quick_check, foundation, tmp_path
):
    """An error in them would not show: neither passed nor failed."""
    without_memory(monkeypatch)
    adapters = [
        save_adapter(tmp_path / name, foundation, seed=seed) for seed, name in enumerate(("large", "small"))
    ]
    _rescale(adapters[1], 1e-4)
    with pytest.warns(
        DyloraMoeWarning, match=r"the logits of expert 1 \(small\) cannot be told from wrong ones"
    ):
        result = export(adapters, tmp_path / "repo")
    assert result.check.passed is None
    outcome = {comparison.quantity: comparison.passed for comparison in result.check.comparisons}
    assert outcome == {"base": True, "single:0": True, "single:1": None, "uniform": True}
    verification = verify(result.output_dir, against=adapters)
    (logits,) = [finding for finding in verification.findings if finding.what == "logits"]
    assert (
        logits.passed is None and "expert 1 (small) cannot be told" in logits.detail and verification.passed
    )
    with pytest.warns(DyloraMoeWarning, match="expert small makes no more than"):
        assert merge(result.output_dir, expert="small", output_dir=tmp_path / "merged").passed is None


def _rescale(adapter, factor):
    from safetensors.torch import load_file

    path = adapter / "adapter_model.safetensors"
    save_file({key: value * factor for key, value in load_file(path).items()}, path)


def test_an_expert_that_does_nothing_is_no_unclear_one(quick_check, foundation, tmp_path):
    adapter = save_adapter(tmp_path / "nothing", foundation)
    _rescale(adapter, 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be told")
        assert export(adapter, tmp_path / "repo").check.passed is True


@pytest.mark.parametrize("gate", ["zero", "nearly tied"])
def test_the_router_is_compared_where_its_gate_cannot_choose(
    monkeypatch, quick_check, foundation, tmp_path, gate
):
    checkpoint = save_final_checkpoint(tmp_path / "final", foundation)
    path = checkpoint / "dylo_moe_state" / "router.pt"
    state = torch.load(path)
    state["gate_state_dict"] = {"weight": torch.zeros(3, 32), "bias": torch.zeros(3)}
    if gate == "nearly tied":
        row = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
        state["gate_state_dict"]["weight"] = row * torch.tensor([[1.0], [1 + 2**-23], [1 - 2**-23]])
    torch.save(state, path)
    compared = {entry.quantity: entry for entry in export(checkpoint, tmp_path / "repo").check.comparisons}
    assert (
        compared["router"].passed is True
        and compared["router"].positions == 24
        and compared["router"].effect > 0.1
    )

    from dylora_moe.modeling import routing_dylora_moe

    def reversed_weights(router, logits, dense):
        return weights(router, logits, dense) if dense else weights(router, logits, dense).roll(1, -1)

    weights = routing_dylora_moe.DyloraMoeRouter.weights
    monkeypatch.setattr(routing_dylora_moe.DyloraMoeRouter, "weights", reversed_weights)
    with pytest.raises(FailureError, match="the logits of strategy router differ by"):
        export(checkpoint, tmp_path / "wrong")


def test_a_wrong_scale_is_caught_by_merge(checked, tmp_path, monkeypatch):
    from dylora_moe.modeling import DyloraMoeForCausalLM

    merge_expert = DyloraMoeForCausalLM.merge_expert

    def wrongly(model, expert):
        merged = merge_expert(model, expert)
        merged.get_submodule("model.layers.0.self_attn.q_proj").weight.data *= 1.001
        return merged

    monkeypatch.setattr(DyloraMoeForCausalLM, "merge_expert", wrongly)
    with pytest.raises(
        FailureError, match="the merged model's logits differ from those of the expert expert_1 by"
    ):
        merge(checked[0], expert=1, output_dir=tmp_path / "merged")


def test_what_merge_writes_is_what_it_computed(checked, tmp_path, monkeypatch):
    save = LlamaForCausalLM.save_pretrained

    def save_wrongly(model, folder, **options):
        model.model.norm.weight.data[0] *= 2
        save(model, folder, **options)
        model.model.norm.weight.data[0] /= 2

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_wrongly)
    with pytest.raises(FailureError, match=r"model\.norm\.weight was not written as the merged model has it"):
        merge(checked[0], expert=1, output_dir=tmp_path / "merged", dtype="bfloat16")


def test_a_dtype_that_cannot_hold_the_merged_weights_is_refused(checked, tmp_path, monkeypatch):
    from dylora_moe.modeling import DyloraMoeForCausalLM

    merge_expert = DyloraMoeForCausalLM.merge_expert

    def with_a_large_weight(model, expert):
        merged = merge_expert(model, expert)
        merged.lm_head.weight.data[0, 0] = 1e5
        model.get_output_embeddings().weight.data[0, 0] = 1e5
        return merged

    monkeypatch.setattr(DyloraMoeForCausalLM, "merge_expert", with_a_large_weight)
    with pytest.raises(FailureError, match=r"in float16, the merged model's logits are no numbers"):
        merge(checked[0], expert=1, output_dir=tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()
    assert merge(checked[0], expert=1, output_dir=tmp_path / "merged", dtype="bfloat16").passed


def test_float64_reaches_what_a_model_computes_in_float32_of_its_own_accord():
    number = torch.tensor([1 + 2**-40], dtype=torch.float64)
    with rounding.computing_in(torch.float64):
        for found in (
            number.float(),
            number.to(torch.float32),
            torch.softmax(number, 0, dtype=torch.float32) * number,
        ):
            assert found.dtype == torch.float64 and found.item() == number.item()
    assert torch.zeros(1).dtype == torch.float32 and number.float().item() == 1


def test_weights_move_by_their_last_bits():
    for dtype in (torch.float32, torch.float64):
        for shape in ((50,), (20, 30), (3, 5, 7)):
            before = torch.randn(shape, dtype=dtype)
            after = before.clone()
            rounding.move_last_bits([after], 0)
            moved = ((after - before) / before).abs() / torch.finfo(dtype).eps
            assert moved.mean() > 0.3 and moved.max() < len(shape) + 1


def test_memory_decides_about_float64(monkeypatch):
    monkeypatch.setattr(rounding, "free_memory", lambda: 16 * 10**9)
    assert rounding.finest_precision(10**9) == torch.float64
    assert rounding.finest_precision(10**9 + 1) == torch.float32
    monkeypatch.undo()
    assert 0 < rounding.free_memory() < 2**50


@pytest.mark.parametrize(
    "difference, allowed, effect, passed",
    [
        (0.1, 0.2, 21, True),
        (0.1, 0.2, 19, None),
        (0.3, 0.2, 19, False),
        (0.0, 0.2, 0, True),
        (float("nan"), 1, 1, False),
    ],
)
def test_three_outcomes(difference, allowed, effect, passed):
    assert Comparison("base", difference, allowed / 20, allowed, effect, 24).passed is passed
