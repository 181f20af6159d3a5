"""Experts on the gates of mixture-of-experts foundations. What they compute under each strategy, learn, and
how they are kept, the tests of stacked experts show of gates, too."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers_moe import SIZES, moe_model
from helpers_stacked import random_weights
from peft import LoraConfig, get_peft_model
from torch import nn

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM
from dylora_moe.modeling import fast_step_dylora_moe as fast_step
from dylora_moe.modeling.experts_dylora_moe import is_gate, use_experts
from dylora_moe.modeling.stacked_experts_dylora_moe import DyloraMoeFoundationGate


ROWS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
FEW = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def of_config(name, **fields):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return random_weights(model)


# Gates that choose in other ways: by softmax or sigmoid, groups, with a bias, in float32, with further
# arguments, by a hash of the tokens; and Phi's, a linear layer with a forward of its own.
FOUNDATIONS = {
    "mixtral": lambda: moe_model("none: mixtral"),
    "deepseek v3": lambda: moe_model("dense and shared: deepseek v3"),
    "gpt-oss": lambda: of_config("GptOss", **FEW, head_dim=8),
    "ernie": lambda: of_config("Ernie4_5_Moe", **FEW, moe_num_experts=4, moe_k=2, moe_layer_start_index=0),
    "granite": lambda: of_config("GraniteMoe", **FEW),
    "minimax m2": lambda: of_config("MiniMaxM2", **FEW, head_dim=8),
    "lfm2": lambda: of_config("Lfm2Moe", **FEW, num_dense_layers=0, layer_types=["full_attention"] * 2),
    "phi": lambda: of_config("Phimoe", **FEW),
}


def mixture(foundation, **fields):
    """An expert on all gates, and one on the first; without anything else."""
    gates = [name for name, module in foundation.named_modules() if is_gate(module)]
    if not gates:
        pytest.skip("a linear layer in this version of transformers")
    experts = [
        {"name": "all", "r": 2, "lora_alpha": 6, "target_modules": gates, **fields},
        {"name": "first", "r": 3, "lora_alpha": 3, "target_modules": gates[:1], **fields},
    ]
    model = DyloraMoeForCausalLM.from_foundation(foundation, DyloraMoeConfig(expert_configs=experts))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or name.startswith("router."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("kind", FOUNDATIONS)
@torch.no_grad()
def test_it_computes_what_the_foundation_with_the_sum_in_its_weights_computes(kind):
    foundation, model = FOUNDATIONS[kind](), mixture(FOUNDATIONS[kind]())
    base = foundation(ROWS).logits
    assert torch.equal(model(ROWS, routing_strategy="base").logits, base)
    weights = {name: module.weight.clone() for name, module in foundation.named_modules() if is_gate(module)}
    for strategy, shares in {"single:all": (1, 0), "single:first": (0, 1), "uniform": (0.5, 0.5)}.items():
        for name, weight in weights.items():
            foundation.get_submodule(name).weight.copy_(weight)
        for expert, share in enumerate(shares):
            for name, (lora_a, lora_b) in model.expert_weights(expert).items():
                scale = model.config.rank_layouts()[name][expert][1]
                foundation.get_submodule(name).weight += share * scale * lora_b @ lora_a
        expected = foundation(ROWS).logits
        assert not torch.allclose(expected, base, atol=0.05)
        torch.testing.assert_close(
            model(ROWS, routing_strategy=strategy).logits, expected, atol=2e-3, rtol=1e-4
        )


def test_what_the_foundation_reads_of_its_gate_is_still_there():
    foundation = moe_model("dense and shared: deepseek v3")
    gate = next(module for module in foundation.modules() if is_gate(module))
    model = mixture(foundation)
    layer = next(module for module in model.modules() if isinstance(module, DyloraMoeFoundationGate))
    assert layer.e_score_correction_bias is gate.e_score_correction_bias and layer.weight is gate.weight
    assert not hasattr(
        mixture(moe_model("none: mixtral")).foundation.model.layers[0].mlp.gate, "e_score_correction_bias"
    )


class AnotherRouter(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.weight, self.product = nn.Parameter(torch.randn(4, 32)), product

    def forward(self, hidden_states):
        return torch.topk(self.product(hidden_states.reshape(-1, 32), self.weight), 2)


def of_another_gate(product):
    """The layer of an expert on such a gate, and the model, which knows the expert's weights."""
    foundation = moe_model("none: mixtral")
    foundation.model.layers[0].mlp.gate = AnotherRouter(product)
    return mixture(foundation)


@pytest.mark.parametrize(
    ("product", "count"),
    [(lambda x, weight: x @ weight.T, 0), (lambda x, weight: F.linear(x, weight) + F.linear(x, weight), 2)],
)
@torch.no_grad()
def test_a_gate_that_multiplies_in_another_way_is_refused(product, count):
    model = of_another_gate(product)
    with pytest.raises(ValueError, match=f"AnotherRouter, in whose forward {count} products were found"):
        model(ROWS, routing_strategy="single:all")


@torch.no_grad()
def test_a_product_by_mm():
    models = [of_another_gate(each) for each in (F.linear, lambda x, weight: torch.mm(x, weight.t()))]
    gates = [model.foundation.model.layers[0].mlp.gate for model in models]
    gates[1].base_layer.weight.copy_(gates[0].base_layer.weight)
    hidden = torch.randn(2, 9, 32)
    with use_experts(models[0].active_experts(1)):
        found, expected = (gate(hidden) for gate in gates)
    torch.testing.assert_close(found, expected)
    with use_experts(None):
        assert not torch.allclose(gates[0](hidden).values, expected.values, atol=0.1)


@torch.no_grad()
def test_dropout_is_on_what_goes_into_an_experts_a():
    model = mixture(moe_model("none: mixtral"), lora_dropout=0.5)
    expected = model(ROWS, routing_strategy="uniform").logits
    model.train()
    torch.manual_seed(0)
    first, second = (model(ROWS, routing_strategy="uniform").logits for _ in range(2))
    assert not torch.allclose(first, second, atol=0.01) and not torch.allclose(first, expected, atol=0.01)
    assert torch.equal(*(model(ROWS, routing_strategy="base").logits for _ in range(2)))


@torch.no_grad()
def test_an_expert_is_added():
    model = mixture(moe_model("none: mixtral"))
    before = model(ROWS, routing_strategy="single:all").logits
    gates = list(model.config.adapted_modules())
    model.add_expert("more", target_modules=[gates[1], "model.layers.0.self_attn.q_proj"], r=4)
    assert torch.equal(model(ROWS, routing_strategy="single:all").logits, before)
    more = model(ROWS, routing_strategy="single:more").logits
    torch.testing.assert_close(more, model(ROWS, routing_strategy="base").logits)
    layer = model.expert_layers()[gates[1]]
    layer.lora_B[layer.rows(2)].normal_()
    assert not torch.allclose(model(ROWS, routing_strategy="single:more").logits, more, atol=0.01)


def test_it_goes_the_default_path_where_nothing_else_would_keep_it_from_another():
    foundation = moe_model("none: mixtral")
    assert type(foundation)._can_compile_fullgraph
    model = mixture(foundation)
    assert fast_step.why_not_kernels(model) and fast_step.ForwardStep.why_not(model) == (
        "experts that adapt stacked experts or gates"
    )
    assert not model._can_compile_fullgraph


@torch.no_grad()
def test_compiled_around_it():
    """A compiled product would be updated once more."""
    torch._dynamo.reset()
    model = mixture(moe_model("none: mixtral"))
    layer, hidden = model.foundation.model.layers[0].mlp, torch.randn(2, 9, 32)
    with use_experts(model.active_experts(torch.rand(2, 9, 2))):
        torch.testing.assert_close(torch.compile(layer, backend="eager")(hidden), layer(hidden))


@pytest.mark.parametrize("merge", [False, True])
@torch.no_grad()
def test_an_adapter_of_peft_on_top_is_taken_off_again(merge):
    model = mixture(moe_model("none: mixtral"))
    before = model(ROWS, routing_strategy="uniform").logits
    config = LoraConfig(
        r=2, target_modules=[], target_parameters=["mlp.gate.weight"], init_lora_weights=False
    )
    peft = get_peft_model(model, config)
    on_top = peft(ROWS, routing_strategy="uniform").logits
    assert not torch.allclose(on_top, before, atol=0.01)
    left = peft.merge_and_unload() if merge else peft.unload()
    assert isinstance(left.foundation.model.layers[0].mlp.gate, DyloraMoeFoundationGate)
    torch.testing.assert_close(
        left(ROWS, routing_strategy="uniform").logits, on_top if merge else before, atol=1e-3, rtol=1e-4
    )
