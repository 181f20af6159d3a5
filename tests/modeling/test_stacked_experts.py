"""Experts on the stacked experts of mixture-of-experts foundations: what they compute, learn, and how they
are kept."""

import copy
import json

import pytest
import torch
from helpers_moe import moe_model
from helpers_stacked import gpt_oss, nemotron
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM
from dylora_moe.modeling import fast_step_dylora_moe as fast_step
from dylora_moe.modeling.experts_dylora_moe import is_gate, use_experts
from dylora_moe.modeling.stacked_experts_dylora_moe import DyloraMoeStackedExperts


ROWS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[0, 0, 0, *[1] * 6], [1] * 9])


FOUNDATIONS = {
    "mixtral": lambda: moe_model("none: mixtral"),
    "qwen3 moe": lambda: moe_model("dense: qwen3 moe"),
    "gpt-oss": gpt_oss,
    "nemotron": nemotron,
}


def mixture(kind="qwen3 moe", **fields):
    """Three experts: one on both parameters, gates and the attention, one on a parameter and a gate, one on
    the attention."""
    foundation = FOUNDATIONS[kind]()
    stacks = [
        f"{path}.{name}"
        for path, module in foundation.named_modules()
        if path.endswith(".experts")
        for name, parameter in module.named_parameters()
        if parameter.dim() == 3
    ]
    down = [name for name in stacks if name.endswith("down_proj")]
    attention = [path for path, _ in foundation.named_modules() if path.endswith("q_proj")]
    gates = [path for path, _ in foundation.named_modules() if path.endswith((".gate", ".router"))]
    experts = [
        {"name": "both", "r": 2, "lora_alpha": 6, "target_modules": [*attention, *gates], "target_parameters": stacks,
         "rank_pattern": {down[0]: 5}, "alpha_pattern": {stacks[0]: 3}},
        {"name": "down", "r": 3, "lora_alpha": 6, "target_modules": gates[:1], "target_parameters": down,
         "use_rslora": True},
        {"name": "attention", "r": 2, "lora_alpha": 4, "target_modules": attention},
    ]  # fmt: skip
    config = DyloraMoeConfig(expert_configs=experts, **fields)
    model = DyloraMoeForCausalLM.from_foundation(foundation, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or name.startswith("router."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


class OneTokenAtATime(nn.Module):
    """A layer of the foundation, run by its own code for each token with that token's sum of deltas in its
    weights.

    Args:
        deltas: parameter -> (expert, its delta in the parameter's shape), for every expert that adapts it.
        weights: `[tokens, experts]`.
    """

    def __init__(self, layer, deltas, weights):
        super().__init__()
        self.layer, self.deltas, self.token_weights = layer, deltas, weights
        # for foundations of older versions, which choose outside of the gate
        self.e_score_correction_bias = getattr(layer, "e_score_correction_bias", None)

    def forward(self, hidden, *routing):
        shape, hidden = hidden.shape, hidden.flatten(0, -2)
        outputs = []
        for token, weights in enumerate(self.token_weights):
            changed = {
                name: getattr(self.layer, name) + sum(weights[expert] * delta for expert, delta in of_experts)
                for name, of_experts in self.deltas.items()
            }
            inputs = (tensor[token, None] for tensor in (hidden, *routing))
            outputs.append(torch.func.functional_call(self.layer, changed, tuple(inputs)))
        if isinstance(outputs[0], tuple):  # of a gate
            return tuple(map(torch.cat, zip(*outputs, strict=True)))
        return torch.cat(outputs) if is_gate(self.layer) else torch.cat(outputs).view(*shape[:-1], -1)


@torch.no_grad()
def recomputed(model, weights, **inputs):
    """Logits under given weights `[batch, sequence, experts]`, from what `expert_weights` gives."""
    foundation, layers = copy.deepcopy(model.foundation), {}
    foundation.set_experts_implementation("eager")
    for expert, name in enumerate(model.config.expert_names):
        for place, (lora_a, lora_b) in model.expert_weights(name).items():
            _, scale = model.config.rank_layouts()[place][expert]
            if place in model.config.adapted_parameters():
                module, _, parameter = place.rpartition(".")
                experts = foundation.get_submodule(module).base_layer
                count = experts.num_experts
                # as in PEFT's `ParamWrapper.get_delta_weight`
                pair = lora_b.reshape(len(lora_b), -1, count), lora_a.reshape(count, -1, lora_a.shape[1])
                delta = torch.einsum("ore,eri->eio" if experts.is_transposed else "ore,eri->eoi", *pair)
            else:
                module, parameter, delta = place, "weight", lora_b @ lora_a
            layers.setdefault(module, {}).setdefault(parameter, []).append((expert, scale * delta))
    for path, deltas in layers.items():
        layer = OneTokenAtATime(foundation.get_submodule(path).base_layer, deltas, weights.flatten(0, 1))
        parent, _, child = path.rpartition(".")
        setattr(foundation.get_submodule(parent), child, layer)
    return foundation(**inputs).logits


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", FOUNDATIONS)
@torch.no_grad()
def test_weights_that_differ_from_token_to_token(kind):
    model = mixture(kind, router_mode="dense")
    router_logits = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(1)) * 4
    model.router.forward = lambda hidden_states: router_logits
    weights = model.router.weights(router_logits, dense=True)
    inputs = {"input_ids": ROWS, "attention_mask": PADDED}
    expected = recomputed(model, weights, **inputs)
    assert_same(model(**inputs, routing_strategy="router").logits[PADDED.bool()], expected[PADDED.bool()])


@pytest.mark.parametrize("kind", FOUNDATIONS)
@torch.no_grad()
def test_weights_of_the_strategies_that_have_fixed_ones(kind):
    model = mixture(kind)
    one_hot = torch.eye(3)
    rows = {
        "base": torch.zeros(2, 3), "uniform": torch.full((2, 3), 1 / 3), "round_robin": one_hot[[0, 1]],
        **{f"single:{expert}": one_hot[[expert, expert]] for expert in range(3)},
    }  # fmt: skip
    for strategy, weights in rows.items():
        expected = recomputed(model, weights[:, None].expand(2, 9, 3), input_ids=ROWS)
        assert_same(model(ROWS, routing_strategy=strategy).logits, expected)
    best = model(ROWS, routing_strategy="best", expert_ids=torch.tensor([1, 0])).logits
    assert_same(best, recomputed(model, one_hot[[1, 0]][:, None].expand(2, 9, 3), input_ids=ROWS))
    alone = [model(ROWS, routing_strategy=f"single:{expert}").logits.softmax(-1) for expert in range(3)]
    assert_same(model(ROWS, routing_strategy="ensemble").logits, (sum(alone) / 3).log())


@pytest.mark.parametrize("strategy", ["router", "best", "ensemble", "round_robin", "single:down", "uniform"])
@torch.no_grad()
def test_decoding_with_the_cache_gives_what_decoding_without_gives(strategy):
    model = mixture()
    inputs = {"input_ids": ROWS, "attention_mask": PADDED, "routing_strategy": strategy, "do_sample": False}
    tokens = []
    for use_cache in (True, False):
        model.reset_round_robin()
        tokens.append(model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, use_cache=use_cache))
    assert torch.equal(*tokens)


def test_the_foundation_computes_where_no_expert_of_the_pass_adapts_its_experts(monkeypatch):
    model = mixture()
    calls = []
    for _, module in model.named_modules():
        if isinstance(module, DyloraMoeStackedExperts):
            module.base_layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for strategy, expected in (("base", 1), ("single:attention", 1), ("single:down", 0)):
        calls.clear()
        model(ROWS, routing_strategy=strategy)
        assert len(calls) == expected


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("strategy", ["router", "single:both", "uniform"])
def test_gradients_reach_the_stacks_and_checkpointing_does_not_change_them(strategy):
    found = []
    for checkpointing in (False, True):
        model = mixture().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ROWS, labels=ROWS, routing_strategy=strategy).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert all(".lora_" in name or name.startswith("router.") for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-3)
    stacks = [gradient for name, gradient in found[0].items() if ".updates." in name]
    assert len(stacks) == 4 and all(gradient.abs().max() > 1e-6 for gradient in stacks)


def a_layer(model):
    return next(module for module in model.modules() if isinstance(module, DyloraMoeStackedExperts))


@pytest.mark.parametrize("single", [None, 0])
def test_gradients_are_those_of_finite_differences(single):
    model = mixture().double()
    layer = a_layer(model)
    hidden, routing = torch.randn(6, 32, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    weights = single if single is not None else torch.rand(2, 3, 3, dtype=torch.float64)
    active = model.active_experts(weights)

    def compute(*stacks):
        for stack, parameter in zip(stacks, layer.updates.parameters(), strict=True):
            assert stack is parameter or stack.data_ptr() == parameter.data_ptr()
        with use_experts(active):
            return layer(hidden, index, routing)

    assert torch.autograd.gradcheck(compute, tuple(layer.updates.parameters()), fast_mode=True)


def test_dropout_is_on_the_inputs_of_each_expert_while_training():
    model = mixture()
    for layer in model.expert_layers().values():
        layer.dropouts[0].p = 0.5
    for strategy, changes in (("single:both", True), ("single:down", False), ("uniform", True)):
        model.train()
        found = [model(ROWS, routing_strategy=strategy).logits for _ in range(2)]
        assert torch.equal(*found) is not changes
        model.eval()
        assert torch.equal(*(model(ROWS, routing_strategy=strategy).logits for _ in range(2)))


def test_a_frozen_expert_keeps_its_rows():
    model = mixture().train()
    model.freeze_expert("down")
    model(ROWS, labels=ROWS, routing_strategy="uniform").loss.backward()
    for name, layer in model.expert_layers().items():
        rows = layer.rows(1)
        others = torch.ones(len(layer.lora_A), dtype=torch.bool)
        others[rows] = False
        assert not layer.lora_B.grad[rows].any() and (layer.lora_B.grad[others].any() or not others.any()), (
            name
        )


@torch.no_grad()
def test_an_expert_is_added_and_the_others_stay_what_they_are():
    model = mixture()
    strategies = [f"single:{expert}" for expert in range(3)]
    before = [model(ROWS, routing_strategy=strategy).logits for strategy in strategies]
    gate_up = next(name for name in model.config.adapted_parameters() if name.endswith("gate_up_proj"))
    model.add_expert("more", target_modules=[], target_parameters=[gate_up], r=4, lora_alpha=4)
    model.add_expert("as the last")
    assert model.config.expert_configs[4]["target_parameters"] == [gate_up]
    for strategy, logits in zip(strategies, before, strict=True):
        assert torch.equal(model(ROWS, routing_strategy=strategy).logits, logits)
    base = model(ROWS, routing_strategy="base").logits
    assert_same(model(ROWS, routing_strategy="single:more").logits, base)
    lora_a, lora_b = model.expert_weights("more")[gate_up]
    bound = lora_a.shape[1] ** -0.5
    assert 0.9 * bound < lora_a.abs().max() <= bound and not lora_b.any()
    weights = {gate_up: (lora_a, torch.randn_like(lora_b))}
    model.set_expert_weights("more", weights)
    assert all(
        torch.equal(*pair)
        for pair in zip(weights[gate_up], model.expert_weights("more")[gate_up], strict=True)
    )
    assert not torch.allclose(model(ROWS, routing_strategy="single:more").logits, base, atol=0.1)
    names = model.config.expert_names
    with pytest.raises(ValueError, match="`target_parameters` names"):
        model.add_expert("wrong", target_modules=[], target_parameters=[gate_up.replace("gate_up", "up")])
    assert model.config.expert_names == names


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("layout", ["full", "adapter"])
@torch.no_grad()
def test_saved_and_loaded_again(kind, layout, tmp_path):
    model = mixture(kind)
    FOUNDATIONS[kind]().save_pretrained(tmp_path / "base")
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved", layout=layout)
    again = DyloraMoeForCausalLM.from_pretrained(tmp_path / "saved")
    for strategy in ("router", "single:both", "uniform"):
        found, expected = (each(ROWS, routing_strategy=strategy).logits for each in (again, model))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    if layout == "adapter":
        for expert in ("both", "down"):  # as PEFT reads what was written
            peft = PeftModel.from_pretrained(
                FOUNDATIONS[kind](), tmp_path / "saved", subfolder=f"experts/{expert}", torch_device="cpu"
            )
            assert_same(peft.eval()(ROWS).logits, model(ROWS, routing_strategy=f"single:{expert}").logits)
    again.save_pretrained(tmp_path / "twice", layout="full")
    for experts in (["down"], ["attention", "both"], ["attention"]):
        for folder in (tmp_path / "saved", tmp_path / "twice"):
            some = DyloraMoeForCausalLM.from_pretrained(folder, experts=experts)
            for expert in experts:
                found, expected = (
                    each(ROWS, routing_strategy=f"single:{expert}").logits for each in (some, model)
                )
                assert torch.equal(found, expected)


@torch.no_grad()
def test_offloaded(tmp_path):
    model = mixture()
    model.save_pretrained(tmp_path / "saved")
    inside = ("self_attn", "mlp.gate", "mlp.experts", "input_layernorm", "post_attention_layernorm")
    names = ["embed_tokens", "norm", "rotary_emb", "layers.0", *(f"layers.1.{name}" for name in inside)]
    device_map = dict.fromkeys([f"foundation.model.{name}" for name in names], "cpu")
    device_map |= {
        "foundation.lm_head": "cpu",
        "router": "cpu",
        "foundation.model.layers.1.mlp.experts": "disk",
    }
    loaded = DyloraMoeForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert all(parameter.is_meta for parameter in a_layer(loaded).parameters())
    for strategy in ("base", "single:both", "single:attention", "uniform", "router"):
        found, expected = (each(ROWS, routing_strategy=strategy).logits for each in (loaded, model))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_quantised_stacks_are_refused():
    model = mixture()
    base = a_layer(model).base_layer
    base.gate_up_proj = nn.Parameter(base.gate_up_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="are quantised"):
        model(ROWS, routing_strategy="single:both")


@pytest.mark.parametrize("kind", FOUNDATIONS)
@torch.no_grad()
def test_merged(kind):
    model = mixture(kind)
    for expert in ("both", "down"):
        merged = model.merge_expert(expert)
        assert type(merged) is type(model.foundation)
        assert not any("base_layer" in name for name, _ in merged.named_modules())
        assert_same(merged(ROWS).logits, model(ROWS, routing_strategy=f"single:{expert}").logits)


@torch.no_grad()
def test_in_bfloat16_it_is_near_what_it_is_in_float32():
    expected = mixture()(ROWS, routing_strategy="uniform").logits
    found = mixture().to(torch.bfloat16)(ROWS, routing_strategy="uniform").logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_fast_decoding_leaves_them_to_the_default_path():
    model = mixture()
    assert fast_step.why_not_kernels(model) and fast_step.ForwardStep.why_not(model) == (
        "experts that adapt stacked experts or gates"
    )


def test_what_cannot_be_adapted_is_named():
    foundation = moe_model("dense: qwen3 moe")
    for names in (
        ["model.layers.1.self_attn.q_proj.weight"],
        ["model.layers.1.mlp.experts"],
        [None],
        "down_proj",
    ):
        with pytest.raises(ValueError, match=r"`target_parameters`; .* end in gate_up_proj"):
            DyloraMoeConfig(expert_configs=[{"name": "a", "target_parameters": names}])
    for name, expected in (
        ("model.layers.1.mlp.experts.up_proj", "Qwen3MoeExperts"),
        ("model.layers.0.mlp.up_proj", "Qwen3MoeMLP"),
        ("model.layers.7.mlp.experts.down_proj", "7"),
        ("experts.down_proj", "experts"),
    ):
        config = DyloraMoeConfig(expert_configs=[{"name": "a", "target_parameters": [name]}])
        with pytest.raises(ValueError, match=f"`target_parameters` names '{name}'.*{expected}"):
            DyloraMoeForCausalLM.from_foundation(foundation, config)


def test_tokens_that_cannot_be_told_apart_are_refused():
    model = mixture()
    active = model.active_experts(torch.rand(2, 9, 3))
    with use_experts(active), pytest.raises(ValueError, match="a selection of the tokens"):
        a_layer(model)(torch.rand(7, 32), torch.zeros(7, 2, dtype=torch.long), torch.rand(7, 2))


@pytest.mark.parametrize("merge", [False, True])
@torch.no_grad()
def test_an_adapter_of_peft_on_top_is_taken_off_again(merge, tmp_path):
    model = mixture(base_model_name_or_path="somewhere")
    before = model(ROWS, routing_strategy="uniform").logits
    targets = model.peft_target_modules(["q_proj", "v_proj"])
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    on_top = peft(ROWS, routing_strategy="uniform").logits
    left = peft.merge_and_unload() if merge else peft.unload()
    assert isinstance(a_layer(left), DyloraMoeStackedExperts) and not torch.allclose(on_top, before, atol=0.1)
    assert_same(left(ROWS, routing_strategy="uniform").logits, on_top if merge else before)
    if merge:
        with pytest.raises(ValueError, match="merged into the base model"):
            left.save_pretrained(tmp_path / "saved", layout="adapter")


@torch.no_grad()
def test_an_adapter_of_peft_around_the_stacks_is_refused():
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    model = get_peft_model(mixture(), config)
    with pytest.raises(ValueError, match="A ParamWrapper stands in the place of stacked experts"):
        model(ROWS, routing_strategy="uniform")


def test_experts_whose_ranks_are_not_those_of_the_files_are_refused(tmp_path):
    """Their rows would be another expert's."""
    model = mixture("mixtral")
    FOUNDATIONS["mixtral"]().save_pretrained(tmp_path / "base")
    model.config.base_model_name_or_path = str(tmp_path / "base")
    for layout in ("full", "adapter"):
        model.save_pretrained(tmp_path / layout, layout=layout)
        path = tmp_path / layout / "config.json"
        fields = json.loads(path.read_text())
        fields["expert_configs"][1]["r"] = 2
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=r"ranks in the config sum up|gives it rank"):
            DyloraMoeForCausalLM.from_pretrained(tmp_path / layout, experts=["down"])
