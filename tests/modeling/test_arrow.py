"""Arrow: a router of every layer, from the experts' own weights."""

import copy
import json

import pytest
import torch
from helpers_models import (
    SIZES,
    VOCABULARY,
    build,
    build_on_latent_attention,
    labelled_batch,
    left_padded,
    llama_config,
    llama_experts,
    random_rows,
    save_layouts,
)
from peft import LoraConfig, create_arrow_model, get_peft_model
from peft.tuners.lora.config import ArrowConfig
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, Trainer, TrainingArguments

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM
from dylora_moe.modeling.arrow_dylora_moe import LayerRouting, prototype
from dylora_moe.modeling.experts_dylora_moe import DyloraMoeLinear


BATCH = left_padded(random_rows((9, 5, 7), seed=2))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
SETTINGS = {"router_kind": "arrow", "num_experts_per_tok": 2, "router_temperature": 0.7}


def build_arrow(base_config=None, experts=None, seed=3, **settings) -> DyloraMoeForCausalLM:
    """A model with random experts of unequal ranks and targets, whose prototypes are theirs."""
    model = build(base_config, experts, seed, **{**SETTINGS, **settings})
    model.update_prototypes()
    return model


def naive_weights(scores: list[float], top_k: int, temperature: float) -> list[float]:
    """Softmax over the largest scores; `None` in the place of an expert without one."""
    order = sorted((i for i, score in enumerate(scores) if score is not None), key=lambda i: -scores[i])
    chosen = order[:top_k]
    exponentials = {i: torch.tensor(scores[i] / temperature).exp().item() for i in chosen}
    total = sum(exponentials.values())
    return [exponentials.get(i, 0.0) / total for i in range(len(scores))]


class NaiveLayer(torch.nn.Module):
    """An expert layer token by token and expert by expert, with singular vectors of the whole product."""

    def __init__(self, layer: DyloraMoeLinear, top_k: int, temperature: float):
        super().__init__()
        self.base_layer, self.top_k, self.temperature = layer.base_layer, top_k, temperature
        self.experts, self.scores = [], []
        for expert, (rank, scale) in enumerate(layer.layout):
            rows = layer.rows(expert)
            product = layer.lora_B[rows].detach().T @ layer.lora_A[rows].detach() if rank else None
            vector = None if product is None else torch.linalg.svd(product).Vh[0]
            self.experts.append((product, scale, vector))

    def forward(self, hidden_states):
        result = self.base_layer(hidden_states)
        tokens, outputs = hidden_states.flatten(0, -2), result.flatten(0, -2).clone()
        for position, token in enumerate(tokens):
            scores = [None if v is None else (token @ v).abs().item() for _, _, v in self.experts]
            self.scores.append(scores)
            weights = naive_weights(scores, self.top_k, self.temperature)
            for weight, (product, scale, _) in zip(weights, self.experts, strict=True):
                if weight:
                    outputs[position] += weight * scale * (product @ token)
        return outputs.view_as(result)


def naive_logits(model: DyloraMoeForCausalLM, top_k: int, **inputs) -> torch.Tensor:
    """The foundation's own forward over naive layers, in float64."""
    foundation = copy.deepcopy(model.foundation).double()
    for name in model.expert_layers():
        parent, _, child = name.rpartition(".")
        layer = foundation.get_submodule(name)
        setattr(
            foundation.get_submodule(parent), child, NaiveLayer(layer, top_k, model.config.router_temperature)
        )
    with torch.no_grad():
        return foundation(**inputs).logits.float()


# Prototypes


@pytest.mark.parametrize("rank, size", [(1, 8), (4, 16), (12, 8), (3, 40)])
def test_a_prototype_is_the_top_right_singular_vector(rank, size):
    generator = torch.Generator().manual_seed(rank)
    lora_A, lora_B = torch.randn(rank, size, generator=generator), torch.randn(24, rank, generator=generator)
    expected = torch.linalg.svd((lora_B @ lora_A).double()).Vh[0].float()
    found = prototype(lora_A, lora_B)
    assert found.dtype == torch.float32 and found.abs().max() == found.max()
    torch.testing.assert_close(found, expected * (expected @ found).sign(), atol=1e-6, rtol=0)


def test_an_expert_that_changes_nothing_has_no_prototype():
    assert not prototype(torch.randn(4, 16), torch.zeros(8, 4)).any()


# Against a loop, and against PEFT


@pytest.mark.parametrize(
    "base", [None, GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)], ids=["llama", "gpt2"]
)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_logits_equal_a_loop_over_tokens_and_experts(base, top_k):
    experts = None
    if base is not None:
        kinds = {
            "one": ("attn.c_attn", "mlp.c_fc"),
            "two": ("mlp.c_fc",),
            "three": ("mlp.c_fc", "mlp.c_proj"),
        }
        experts = [
            {
                "name": name,
                "r": 2 + len(parts),
                "target_modules": [f"transformer.h.{i}.{part}" for i in range(2) for part in parts],
            }
            for name, parts in kinds.items()
        ]
    model = build_arrow(base, experts, num_experts_per_tok=top_k)
    layouts = set(map(len, ({rank for rank, _ in layout} for layout in model.config.rank_layouts().values())))
    assert max(layouts) > 1  # unequal ranks or targets
    with torch.no_grad():
        found = model(**BATCH, routing_strategy="router").logits
    real = BATCH["attention_mask"].bool()
    torch.testing.assert_close(found[real], naive_logits(model, top_k, **BATCH)[real], atol=2e-5, rtol=1e-4)


def test_dense_mode_takes_every_expert():
    model = build_arrow(num_experts_per_tok=1, router_mode="dense")
    with torch.no_grad():
        found = model(**BATCH, routing_strategy="router").logits
    real = BATCH["attention_mask"].bool()
    torch.testing.assert_close(found[real], naive_logits(model, 3, **BATCH)[real], atol=2e-5, rtol=1e-4)


def test_logits_equal_those_of_peft(tmp_path, capsys):
    """With the exact prototypes in PEFT's layers: its own come from 15 steps of power iteration."""
    torch.manual_seed(0)
    foundation = AutoModelForCausalLM.from_config(llama_config()).eval()
    peft_targets = ["q_proj", "v_proj", "down_proj"]
    paths = []
    for index in range(4):
        peft_model = get_peft_model(
            copy.deepcopy(foundation), LoraConfig(r=4, lora_alpha=8, target_modules=peft_targets)
        )
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3)
        paths.append(str(tmp_path / f"adapter_{index}"))
        peft_model.save_pretrained(paths[-1])
    arrow = ArrowConfig(top_k=2, router_temperature=0.8, rng_seed=1)
    theirs = create_arrow_model(copy.deepcopy(foundation), paths, arrow).eval()

    names = [name for name, _ in foundation.named_modules() if name.endswith(tuple(peft_targets))]
    experts = [{"name": f"e{index}", "r": 4, "lora_alpha": 8, "target_modules": names} for index in range(4)]
    settings = {"router_kind": "arrow", "num_experts_per_tok": 2, "router_temperature": 0.8}
    config = DyloraMoeConfig(base_config=foundation.config, expert_configs=experts, **settings)
    ours = DyloraMoeForCausalLM.from_foundation(copy.deepcopy(foundation), config)
    for index, path in enumerate(paths):
        alone = copy.deepcopy(foundation)
        alone.load_adapter(path)
        weights = {}
        for name in names:
            layer = alone.get_submodule(name)
            weights[name] = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        ours.set_expert_weights(index, weights)
    with torch.no_grad():
        theirs(**BATCH)  # makes PEFT's prototypes
        distances = []
        for name in names:
            layer = theirs.base_model.model.get_submodule(name)
            of_peft = layer.lora_arrow["arrow_router"]
            exact = ours.expert_layers()[name].prototypes
            distances += (1 - (of_peft.prototypes * exact).sum(dim=1).abs()).tolist()
            of_peft.prototypes = exact.clone()
        expected = theirs(**BATCH).logits
        found = ours(**BATCH, routing_strategy="router").logits
    with capsys.disabled():
        print(f"\nPEFT's prototypes: 1 - |cosine| to the exact ones is {max(distances):.2e} at most")
    real = BATCH["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


# Outputs


def test_router_logits_are_those_of_every_layer():
    model = build_arrow()
    with torch.no_grad():
        outputs = model(
            **BATCH, routing_strategy="router", output_router_logits=True, labels=BATCH["input_ids"]
        )
    names = model.config.adapted_modules()
    assert len(outputs.router_logits) == len(names) and outputs.aux_loss is None
    for name, logits in zip(names, outputs.router_logits, strict=True):
        assert logits.shape == (3, 9, 3)
        adapts = torch.tensor([rank > 0 for rank, _ in model.expert_layers()[name].layout])
        assert torch.equal(logits[0, 0] > float("-inf"), adapts)
    with torch.no_grad():
        assert model(**BATCH, routing_strategy="router").router_logits is None


def test_best_is_the_largest_mean_over_shared_layers_and_tokens():
    model = build_arrow()
    with torch.no_grad():
        logits = model(**BATCH, routing_strategy="router", output_router_logits=True).router_logits
        found = model(**BATCH, routing_strategy="best", output_router_logits=True)
        best = []
        for row in range(3):
            sums, counts = [0.0] * 3, [0] * 3
            for layer in logits:
                adapts = [expert for expert in range(3) if layer[0, 0, expert] > float("-inf")]
                if len(adapts) < 2:
                    continue
                for position in range(9):
                    if BATCH["attention_mask"][row, position]:
                        shares = torch.softmax(layer[row, position, adapts] / 0.7, dim=0).tolist()
                        for expert, share in zip(adapts, shares, strict=True):
                            sums[expert] += share
                            counts[expert] += 1
            best.append(max(range(3), key=lambda expert: sums[expert] / max(1, counts[expert])))
        single = [
            model(**BATCH, routing_strategy=f"single:{expert}").logits[row] for row, expert in enumerate(best)
        ]
    torch.testing.assert_close(found.logits, torch.stack(single))
    assert len(found.router_logits) == len(logits)


def test_generate_returns_router_logits_of_every_layer():
    model = build_arrow()
    wanted = {"return_dict_in_generate": True, "output_router_logits": True, "routing_strategy": "router"}
    outputs = model.generate(**BATCH, **GREEDY, **wanted)
    beams = model.generate(**BATCH, **GREEDY, **wanted, num_beams=2)
    assert len(outputs.router_logits) == len(beams.router_logits) == len(model.config.adapted_modules())
    assert all(logits.shape == (3, 8, 3) for logits in (*outputs.router_logits, *beams.router_logits))
    mask = torch.cat([BATCH["attention_mask"], torch.ones(3, 8, dtype=torch.long)], dim=1)
    with torch.no_grad():
        whole = model(outputs.sequences, mask, routing_strategy="router", output_router_logits=True)
    for steps, layer in zip(outputs.router_logits, whole.router_logits, strict=True):
        torch.testing.assert_close(steps, layer[:, 8:-1], atol=1e-4, rtol=1e-4)


# Generation and caches


@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_changes_nothing(arguments, cache):
    model = build_arrow()
    found = []
    for use_cache in (False, True):
        torch.manual_seed(0)
        given = {"cache_implementation": cache, "disable_compile": True} if use_cache else {}
        given |= {**GREEDY, **arguments, "use_cache": use_cache, "routing_strategy": "router"}
        found.append(model.generate(**BATCH, **given).tolist())
    assert found[0] == found[1]


def test_one_stream_is_enough():
    model = build_arrow()
    with torch.no_grad():
        cache = model(**BATCH, routing_strategy="router", use_cache=True).past_key_values
    assert len(cache.layers) == 2


def test_a_layer_that_every_step_runs_over_all_past_tokens_is_no_trouble():
    """Its weights come from its own input, so those of past tokens need not be kept."""
    model = build_on_latent_attention()
    fields = {**model.config.to_dict(), **SETTINGS}
    fields.pop("text_config")
    base = model.config.base_config
    model = build_arrow(base, model.config.expert_configs)
    outputs = [
        model.generate(**BATCH, **GREEDY, use_cache=use_cache, routing_strategy="router").tolist()
        for use_cache in (False, True)
    ]
    assert outputs[0] == outputs[1]


def test_fast_decoding_leaves_it_to_the_default_path(monkeypatch):
    fast = pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe")
    from helpers_graphs import decode_fast_on_a_cpu, default_and_fast

    decode_fast_on_a_cpu(monkeypatch, fast)
    model = build_arrow()
    for strategy in ("router", "best", "single:1"):
        expected, found = default_and_fast(model, BATCH, routing_strategy=strategy)
        assert found.tolist() == expected.tolist()
    assert "Decode steps take the default path: a router of every layer (arrow)." in model._decode_graphs.told


# Training


def test_gradients_equal_those_of_plain_formulas():
    model = build_arrow().train()
    model.config.router_mode = "sparse"
    layer = next(iter(model.expert_layers().values()))
    hidden = torch.randn(2, 5, layer.lora_A.shape[1], requires_grad=True)
    routing = LayerRouting(2, 0.7)
    weights = routing.weights(layer, hidden)
    scores = torch.stack([(hidden @ vector).abs() for vector in layer.prototypes], dim=-1)
    kept = scores >= scores.topk(2, dim=-1).values[..., -1:]
    expected = torch.softmax(torch.where(kept, scores, float("-inf")) / 0.7, dim=-1)
    torch.testing.assert_close(weights, expected)
    probe = torch.randn_like(weights)
    (found,) = torch.autograd.grad((weights * probe).sum(), hidden, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected * probe).sum(), hidden)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = build_arrow().train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        before = {name: layer.prototypes.clone() for name, layer in model.expert_layers().items()}
        outputs = model(**labelled_batch(), routing_strategy="router", output_router_logits=True)
        assert outputs.aux_loss is None and len(outputs.router_logits) == len(before)
        outputs.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert all(
            torch.equal(before[name], layer.prototypes) for name, layer in model.expert_layers().items()
        )
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) >= 4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_training_leaves_prototypes_until_they_are_asked_for():
    model = build_arrow().train()
    layer = next(iter(model.expert_layers().values()))
    before = layer.prototypes.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**labelled_batch(), routing_strategy="router").loss.backward()
    optimizer.step()
    assert torch.equal(layer.prototypes, before) and not layer.prototypes.requires_grad
    model.update_prototypes()
    assert not torch.equal(layer.prototypes, before)


# Saving, loading, growing


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_prototypes_are_saved(tmp_path, layout):
    model = build_arrow()
    for layer in model.expert_layers().values():
        layer.prototypes.mul_(1.5)  # so that computing them again would not give the same
    save_layouts(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / layout, trust_remote_code=True)
    narrow = AutoModelForCausalLM.from_pretrained(
        tmp_path / layout, trust_remote_code=True, dtype=torch.bfloat16
    )
    for name, layer in model.expert_layers().items():
        assert torch.equal(loaded.expert_layers()[name].prototypes, layer.prototypes)
        assert torch.equal(narrow.expert_layers()[name].prototypes, layer.prototypes)
        assert narrow.expert_layers()[name].lora_A.dtype == torch.bfloat16
    assert loaded.config.router_kind == "arrow" and loaded.router is None
    with torch.no_grad():
        found = loaded(**BATCH).logits  # the default strategy is the router
        assert torch.equal(found, model(**BATCH, routing_strategy="router").logits)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_some_experts_are_loaded_with_their_prototypes(tmp_path, layout):
    model = build_arrow(num_experts_per_tok=1)
    save_layouts(model, tmp_path)
    names = model.config.expert_names
    loaded = DyloraMoeForCausalLM.from_pretrained(tmp_path / layout, experts=[names[2], names[0]])
    for name, layer in loaded.expert_layers().items():
        assert torch.equal(layer.prototypes, model.expert_layers()[name].prototypes[[2, 0]])


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_a_layer_that_no_loaded_expert_adapts_has_no_prototypes(tmp_path, layout):
    model = build_arrow(num_experts_per_tok=1)
    save_layouts(model, tmp_path)
    for expert in model.config.expert_names:
        loaded, report = DyloraMoeForCausalLM.from_pretrained(
            tmp_path / layout, experts=[expert], output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        adapted = set(loaded.config.adapted_modules())
        assert adapted < set(model.config.adapted_modules())
        found = {name for name, _ in loaded.foundation.named_buffers() if name.endswith(".prototypes")}
        assert found == {f"{name}.prototypes" for name in adapted}


def test_prototypes_stay_in_float32():
    model = build_arrow()
    layer = next(iter(model.expert_layers().values()))
    before = layer.prototypes.clone()
    model.to(torch.bfloat16)
    assert layer.lora_A.dtype == torch.bfloat16 and torch.equal(layer.prototypes, before)
    model(**BATCH, routing_strategy="router")


def test_a_new_expert_gets_a_prototype_once_it_does_something():
    model = build_arrow()
    with torch.no_grad():
        before = model(**BATCH, routing_strategy="single:0").logits
    number = model.add_expert(
        "fourth", ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"], r=3
    )
    layers = model.expert_layers()
    for name in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"):
        assert layers[name].prototypes.shape == (4, 32) and not layers[name].prototypes[number].any()
    shapes = {name: [part.shape for part in pair] for name, pair in model.expert_weights("fourth").items()}
    model.set_expert_weights("fourth", {n: (torch.randn(a), torch.randn(b)) for n, (a, b) in shapes.items()})
    assert all(layers[name].prototypes[number].any() for name in shapes)
    with torch.no_grad():
        assert torch.equal(model(**BATCH, routing_strategy="single:0").logits, before)
        found = model(**BATCH, routing_strategy="router").logits
    real = BATCH["attention_mask"].bool()
    model.config.router_mode = "sparse"
    with torch.no_grad():
        found = model(**BATCH, routing_strategy="router").logits
    torch.testing.assert_close(found[real], naive_logits(model, 2, **BATCH)[real], atol=2e-5, rtol=1e-4)


def test_an_adapter_of_peft_on_top_trains_under_the_router():
    model = build_arrow()
    with torch.no_grad():
        before = model(**BATCH, routing_strategy="router").logits
    names = model.peft_target_modules(["q_proj"])
    on_top = get_peft_model(model, LoraConfig(r=2, target_modules=names))
    with torch.no_grad():
        assert torch.equal(on_top(**BATCH, routing_strategy="router").logits, before)
    on_top(**labelled_batch(), routing_strategy="router").loss.backward()
    assert any(p.grad is not None for name, p in on_top.named_parameters() if "lora_B.default" in name)


def test_trainer_trains_experts_under_the_router(tmp_path):
    model = build_arrow()
    before = {name: layer.lora_B.detach().clone() for name, layer in model.expert_layers().items()}
    prototypes = {name: layer.prototypes.clone() for name, layer in model.expert_layers().items()}
    rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in random_rows((8,) * 4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    layers = model.expert_layers()
    assert any(not torch.equal(before[name], layers[name].lora_B) for name in before)
    assert all(torch.equal(prototypes[name], layers[name].prototypes) for name in prototypes)


# What is refused


def test_what_arrow_cannot_route_is_refused():
    with pytest.raises(ValueError, match="'arrow' routes linear layers, and experts adapt"):
        DyloraMoeConfig(
            base_config=MixtralConfig(**SIZES),
            expert_configs=[{"name": "one", "target_parameters": ["model.layers.0.mlp.experts.down_proj"]}],
            router_kind="arrow",
        )
    with pytest.raises(ValueError, match="'Arrow'; it must be one of"):
        DyloraMoeConfig(base_config=llama_config(), expert_configs=llama_experts(), router_kind="Arrow")
    with pytest.raises(ValueError, match="balance loss is for a gate"):
        build_arrow().balance_loss(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="'hidden'; prototypes are those of 'arrow'"):
        build().update_prototypes()


def test_config_says_the_kind_of_router(tmp_path):
    build_arrow().config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["router_kind"] == "arrow"
    config = DyloraMoeConfig.from_pretrained(tmp_path)
    assert config.has_router and config.routes_by_layer and not config.has_gate
