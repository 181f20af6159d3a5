"""Wrong numbers that could come about silently: each was possible once."""

import copy
import threading

import pytest
import torch
from helpers_models import STRATEGIES, build, random_rows
from safetensors.torch import load_file

from dylora_moe.modeling import DyloraMoeForCausalLM


IDS = torch.tensor(random_rows((7, 7), seed=3))


def logits(model, strategy):
    with torch.no_grad():
        return model(IDS, routing_strategy=strategy).logits


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_layers_compiled_one_by_one_apply_the_experts(strategy):
    torch._dynamo.reset()
    expected = logits(build(), strategy)
    model = build()
    for layer in model.foundation.model.layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(logits(model, strategy), expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single:1", "router", "uniform"])
def test_graph_breaks_and_uncompiled_layers_apply_the_experts(strategy):
    expected = logits(build(), strategy)
    for disturb in ("break", "disable"):
        torch._dynamo.reset()
        model = build()
        layer = model.foundation.model.layers[1]
        forward = layer.forward
        if disturb == "disable":
            layer.forward = torch.compiler.disable(forward)
        else:

            def broken(*args, forward=forward, **kwargs):
                torch._dynamo.graph_break()
                return forward(*args, **kwargs)

            layer.forward = broken
        torch.testing.assert_close(logits(torch.compile(model, backend="eager"), strategy), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_passes_of_two_threads_neither_mix_nor_leave_anything_behind(compiled):
    """The first pass begins, the second begins, the first ends, the second ends."""
    torch._dynamo.reset()
    strategies = ("single:1", "router")
    expected = {strategy: logits(build(), strategy) for strategy in ("base", *strategies)}
    model = build()
    bare = model.foundation.model.layers[0].forward
    second_began, first_ended = threading.Event(), threading.Event()

    def interleaved(*args, **kwargs):
        if threading.current_thread().name == strategies[0]:
            assert second_began.wait(60)
        else:
            second_began.set()
            assert first_ended.wait(60)
        return bare(*args, **kwargs)

    model.foundation.model.layers[0].forward = interleaved
    if compiled:
        model.foundation.model.layers[1].compile(backend="eager")
    found = {}

    def run(strategy):
        found[strategy] = logits(model, strategy)
        first_ended.set()

    threads = [threading.Thread(target=run, args=(strategy,), name=strategy) for strategy in strategies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for strategy in strategies:
        torch.testing.assert_close(found[strategy], expected[strategy])
    model.foundation.model.layers[0].forward = bare
    assert torch.equal(model.foundation(IDS).logits, expected["base"])


def test_guidance_uses_the_calls_strategy():
    model = build()
    arguments = {"guidance_scale": 2.0, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    called = model.generate(IDS[:1], routing_strategy="single:1", **arguments)
    model.generation_config.routing_strategy = "single:1"
    assert called.tolist() == model.generate(IDS[:1], **arguments).tolist()


def test_frozen_experts_stay_frozen_in_a_copy_and_whatever_was_trainable_before():
    for prepare in (copy.deepcopy, lambda model: model):
        model = build()
        model.requires_grad_(False)
        model.freeze_expert(0)
        model.freeze_foundation()
        model = prepare(model)
        model(IDS, labels=IDS, routing_strategy="uniform").loss.backward()
        for layer in model.expert_layers().values():
            for stack in (layer.lora_A, layer.lora_B):
                assert not stack.grad[layer.rows(0)].any()
                assert stack.grad[layer.rows(1)].any() or layer.layout[1][0] == 0


def test_expert_ids_are_checked():
    model = build()
    for strategy in ("best", "round_robin"):
        for wrong in ([7, 0], [-1, 0], [0]):
            with pytest.raises(ValueError, match="expert_ids"):
                model(IDS, routing_strategy=strategy, expert_ids=torch.tensor(wrong))
        cache = model(IDS, routing_strategy=strategy, expert_ids=torch.tensor([0, 1])).past_key_values
        with pytest.raises(ValueError, match="keeps its expert"):
            model(
                IDS[:, :1], routing_strategy=strategy, expert_ids=torch.tensor([2, 1]), past_key_values=cache
            )


def test_router_settings_act_at_once_and_are_what_is_saved(tmp_path):
    model = build(router_mode="dense")
    before = logits(model, "router")
    model.config.router_temperature = 0.2
    assert (logits(model, "router") - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(DyloraMoeForCausalLM.from_pretrained(tmp_path), "router"), logits(model, "router")
    )
    model.config.expert_configs[0]["lora_alpha"] = 99
    with pytest.raises(ValueError, match="changed on a live model"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_modules_that_a_live_config_gained_or_lost_are_not_saved(tmp_path, layout):
    model = build()
    model.config.base_model_name_or_path = "somewhere"
    targets = model.config.expert_configs[0]["target_modules"]
    targets.append("model.layers.0.mlp.gate_proj")
    with pytest.raises(
        ValueError, match=r"gate_proj' computes with ranks and scales of no expert, and the config says"
    ):
        model.save_pretrained(tmp_path / layout, layout=layout)
    targets.pop()
    model.save_pretrained(tmp_path / layout, layout=layout)
    for expert in model.config.expert_configs:
        expert["target_modules"] = [name for name in expert["target_modules"] if "down_proj" not in name]
    with pytest.raises(ValueError, match=r"down_proj' computes with .*, and the config says none"):
        model.save_pretrained(tmp_path / layout, layout=layout)


def test_an_adapter_layout_saves_the_weights_that_it_is_given(tmp_path):
    model = build()
    model.config.base_model_name_or_path = "somewhere"
    given = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", layout="adapter", state_dict=given)
    files = list((tmp_path / "given").rglob("*.safetensors"))
    assert len(files) == 4
    assert not any(tensor.any() for file in files for tensor in load_file(file).values())
    model.save_pretrained(tmp_path / "other", layout="adapter", is_main_process=False)
    assert not list((tmp_path / "other").rglob("*.safetensors"))


def test_no_folder_of_this_machine_is_saved(tmp_path):
    model = build()
    model.config.base_config.name_or_path = "/somebodys/home/foundation"
    model.save_pretrained(tmp_path)
    assert "somebody" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.float16])
def test_a_subset_in_any_spelling_of_a_dtype(tmp_path, dtype):
    build().save_pretrained(tmp_path)
    part = DyloraMoeForCausalLM.from_pretrained(tmp_path, experts=[0], dtype=dtype)
    expected = {"auto": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert part.dtype == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": 0}, "alpha"),
        ({"lora_alpha": float("nan")}, "alpha"),
        ({"alpha_pattern": {"model.layers.0.self_attn.q_proj": -1}}, "alpha"),
        ({"lora_dropout": 7}, "dropout"),
        ({"lora_dropout": "x"}, "dropout"),
    ],
)
def test_nonsense_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build(experts=[{"target_modules": ["model.layers.0.self_attn.q_proj"], **fields}])
    for temperature in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            build(router_temperature=temperature)
