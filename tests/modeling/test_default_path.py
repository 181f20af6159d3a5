"""What takes the default path though fast decoding is on, and how it is switched off or left out."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers_graphs import BATCH, GREEDY, default_and_fast
from helpers_models import SIZES, build, llama_config
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, DynamicCache, Phi3Config


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_decoding_dylora_moe as fast
from dylora_moe.modeling.cache_dylora_moe import CACHE
from dylora_moe.modeling.routing_strategies_dylora_moe import (
    ROUTING_STRATEGIES,
    EnsembleStrategy,
    RouterStrategy,
    RoutingStrategy,
    SingleStrategy,
    UniformStrategy,
)


SHIPPED = fast.ON_BY_ITSELF, fast.DEVICES
pytestmark = pytest.mark.usefixtures("fast_on_a_cpu")
CALLS = {
    "switched off": {"fast_decoding": False},
    "beams": {"num_beams": 2},
    "no cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "a cache of the caller's": {CACHE: lambda model: DynamicCache(config=model.config)},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "a prompt in chunks": {"prefill_chunk_size": 4},
    # with an end that no text meets, since transformers 5.10 looks nothing up without one
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "eos_token_id": 10_000},
}


@pytest.mark.parametrize("case", CALLS)
def test_where_it_does_not_apply(steps, case):
    model, one = build(seed=7), {name: rows[:1] for name, rows in BATCH.items()}
    arguments = {name: value(model) if callable(value) else value for name, value in CALLS[case].items()}
    output = model.generate(**one, **{**GREEDY, **arguments})
    assert not steps
    if "num_beams" not in arguments:
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        assert sequences.tolist() == model.generate(**one, **GREEDY).tolist() and steps


def replaced_forward():
    model = build(seed=7)
    model.forward = model.forward
    return model


def recomputing():
    model = build(seed=7)
    model.gradient_checkpointing_enable()
    return model


def experts_on(config, *names):
    return build(config, [{"name": name, "r": 2, "target_modules": list(names)} for name in ("one", "two")])


def inside_peft():
    model = build(seed=7)
    get_peft_model(model, LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    return model.eval()


def of_a_class_of_ones_own():
    model = build(seed=7)
    kind = type(model)

    def forward(self, *args, **kwargs):
        outputs = kind.forward(self, *args, **kwargs)
        outputs.logits = -outputs.logits
        return outputs

    model.__class__ = type("Mine", (kind,), {"forward": functools.wraps(kind.forward)(forward)})
    return model


def with_inputs_of_ones_own():
    model = build(seed=7)
    prepare = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: prepare(
        *args, **{**kwargs, "position_ids": None}
    )
    return model


def with_a_forward_of_ones_own():
    model = build(seed=7)
    mlp = model.foundation.model.layers[1].mlp
    mlp.forward = lambda hidden_states: type(mlp).forward(mlp, hidden_states) * -3
    return model


def with_positions_by_type_of_layer():
    model = build(seed=7)
    model.config.get_text_config().rope_parameters = {"full_attention": DYNAMIC, "sliding_attention": None}
    return model


def with_weights_of_two_tensors():
    """As torchao's are, whose addresses say nothing. This one nobody reads."""
    model = build(seed=7)
    model.get_output_embeddings().register_buffer("scale", TwoTensor(torch.ones(2), torch.ones(2)))
    return model


ATTENTION = "model.layers.0.self_attn."
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
MODELS = {  # reason: a model
    "a module whose forward was replaced": with_a_forward_of_ones_own,
    "the model's forward was replaced": replaced_forward,
    "forward was replaced": of_a_class_of_ones_own,
    "was replaced": with_inputs_of_ones_own,
    "that depend on the length": with_positions_by_type_of_layer,
    "training": lambda: build(seed=7).train(),
    "hooks on modules": recomputing,
    "adapters of PEFT": inside_peft,
    "positions that depend on the length": lambda: build(llama_config(rope_parameters=DYNAMIC)),
    "prepares inputs or masks its own way": lambda: experts_on(Phi3Config(**SIZES), ATTENTION + "qkv_proj"),
    "a quantised model": with_weights_of_two_tensors,
    "quantised": lambda: setattr(model := build(seed=7), "is_quantized", True) or model,
}


@pytest.mark.parametrize("reason", MODELS)
def test_models_that_go_the_default_way(steps, reason):
    model = MODELS[reason]()
    expected, found = default_and_fast(model)
    assert found.tolist() == expected.tolist() and not steps
    told = model._decode_graphs.told - {"Decode steps take the default path: `fast_decoding` is off."}
    assert len(told) == 1 and reason in told.pop()


@pytest.mark.parametrize(
    "theirs", [EnsembleStrategy, RouterStrategy, SingleStrategy, UniformStrategy], ids=str
)
def test_a_strategy_of_ones_own_under_a_known_name(steps, monkeypatch, theirs):
    """Its own weights count: all for expert 1, whatever it is called."""
    model = build(seed=7)
    expected, _ = default_and_fast(model, routing_strategy="single:1")
    steps.clear()
    own = type(
        "Own", (RoutingStrategy,), {"name": theirs.name, "expert_weights": lambda self, routed_pass: 1}
    )
    monkeypatch.setitem(ROUTING_STRATEGIES, theirs.name, own)
    expected, found = default_and_fast(model, routing_strategy=theirs.name)
    assert found.tolist() == expected.tolist() == expected.tolist()
    assert not steps


def test_what_makes_a_step_is_replaced_on_the_class(steps, monkeypatch):
    model = build(seed=7)
    expected, _ = default_and_fast(model)
    forward = type(model).forward

    def negated(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = -outputs.logits
        return outputs

    steps.clear()
    monkeypatch.setattr(type(model), "forward", functools.wraps(forward)(negated))
    negative, found = default_and_fast(model)
    assert found.tolist() == negative.tolist() != expected.tolist() and not steps


def test_prompts_that_peft_learns(steps):
    model = build(seed=7)
    sizes = {"num_virtual_tokens": 4, "token_dim": 32, "num_layers": 2, "num_attention_heads": 4}
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", **sizes))
    prompted.eval()
    expected, found = default_and_fast(prompted)
    assert found.tolist() == expected.tolist() and not steps


class ByLength(RoutingStrategy):
    name = "by_length"

    def expert_weights(self, routed_pass):
        cache = routed_pass.past_key_values
        return (0 if cache is None else int(cache.get_seq_length())) % self.num_experts


class ByPosition(RoutingStrategy):
    name = "by_position"

    def expert_weights(self, routed_pass):
        return F.one_hot(routed_pass.inputs["position_ids"] % self.num_experts, self.num_experts).float()


class InTurn(UniformStrategy):
    name = "in_turn"
    steps = 0

    def expert_weights(self, routed_pass):
        type(self).steps += 1
        return type(self).steps % self.num_experts


@pytest.mark.parametrize("own", [ByLength, ByPosition, InTurn])
def test_a_strategy_of_ones_own_reads_what_it_likes(steps, monkeypatch, own):
    monkeypatch.setitem(ROUTING_STRATEGIES, own.name, own)
    model, found = build(seed=7), []
    for wanted in (False, None):
        InTurn.steps = 0
        found.append(
            model.generate(**BATCH, **GREEDY, routing_strategy=own.name, fast_decoding=wanted).tolist()
        )
    assert found[0] == found[1] and not steps


def test_hooks_on_all_modules_are_called(steps):
    model, seen = build(seed=7), []
    model.generate(**BATCH, **GREEDY)
    assert len(steps) == 11
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(module)
    )
    try:
        model.generate(**BATCH, **GREEDY)
    finally:
        handle.remove()
    assert len(steps) == 11 and seen.count(model.foundation.model.norm) == 2 * 12  # the router's passes, too
    model.generate(**BATCH, **GREEDY)
    assert len(steps) == 22


def test_it_is_shipped_switched_on_for_cuda():
    assert SHIPPED == (True, ("cuda",))


def test_it_is_off_unless_it_is_asked_for(steps, monkeypatch):
    monkeypatch.setattr(fast, "ON_BY_ITSELF", False)
    model = build(seed=7)
    model.generate(**BATCH, **GREEDY)
    assert not steps
    model.generate(**BATCH, **GREEDY, fast_decoding=True)
    assert steps


def test_what_else_goes_the_default_way(steps):
    model = build(seed=7)
    model.generation_config.fast_decoding = False
    model.generate(**BATCH, **GREEDY)
    model.generation_config.fast_decoding = None
    seen = []
    hook = model.foundation.get_submodule("model.layers.0").register_forward_hook(
        lambda *args: seen.append(1)
    )
    model.generate(**BATCH, **GREEDY)
    assert len(seen) == 2 * GREEDY["max_new_tokens"] and not steps  # a hook sees every pass
    hook.remove()
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(**BATCH, **GREEDY)
    assert not steps


@pytest.mark.parametrize("left_out", ["fast_*.py", "fast_kernels_*.py"])
def test_a_repo_of_a_package_without_optional_files_loads(tmp_path, left_out):
    model = build(seed=7)
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob(left_out):
        file.write_text("")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert "FastDecodingMixin" in {base.__name__ for base in type(loaded).__mro__}
    assert loaded.generate(**BATCH, **GREEDY).tolist() == default_and_fast(model)[0].tolist()
    assert hasattr(loaded, "_decode_graphs") == (left_out == "fast_kernels_*.py")
    if left_out == "fast_kernels_*.py":
        step = sys.modules[type(loaded).__module__.replace("modeling_dylora_moe", "fast_step_dylora_moe")]
        assert step.why_not_kernels(loaded) == "Triton is not installed"
