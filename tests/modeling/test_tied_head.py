"""Experts on a head that is tied to the embeddings: they act on its output alone, and the two stay one
tensor."""

import pytest
import torch
from helpers_models import PeftLoop, build, llama_config, random_rows, save_layouts
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from dylora_moe.modeling import DyloraMoeForCausalLM


HEAD = "lm_head"
EXPERTS = [
    {"name": "head", "r": 4, "lora_alpha": 6, "target_modules": [HEAD]},
    {"name": "both", "r": 3, "lora_alpha": 5, "target_modules": [HEAD, "model.layers.0.self_attn.q_proj"]},
    {"name": "body", "r": 2, "lora_alpha": 4, "target_modules": ["model.layers.1.self_attn.v_proj"]},
]
ROW = random_rows((9,))[0]


@pytest.fixture(scope="module")
def model() -> DyloraMoeForCausalLM:
    return build(llama_config(tie_word_embeddings=True), EXPERTS, router_input="experts_sum")


def is_tied(model) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def logits(model, **arguments) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ROW]), **arguments).logits[0]


@pytest.mark.parametrize(
    "strategy", ["router", "single:0", "single:1", "single:2", "base", "uniform", "ensemble"]
)
def test_strategies_equal_peft(model, strategy):
    assert is_tied(model)
    loop = PeftLoop(model)
    assert torch.allclose(
        logits(model, routing_strategy=strategy), loop.logits(ROW, strategy, len(ROW), 0), atol=1e-4
    )
    ids = torch.tensor([ROW])
    found = model.generate(
        ids, routing_strategy=strategy, max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert found[0, len(ROW) :].tolist() == loop.greedy(ROW, strategy, 0, 6)


def test_the_expert_on_the_head_leaves_the_embeddings_alone(model):
    """An expert on the weight itself would change what the layers below read."""
    alone = logits(model, routing_strategy="single:head") - logits(model, routing_strategy="base")
    hidden = model.foundation_body(torch.tensor([ROW])).last_hidden_state[0]
    lora_a, lora_b = model.expert_weights("head")[HEAD]
    assert alone.abs().max() > 1
    assert torch.allclose(alone, 6 / 4 * hidden @ lora_a.T @ lora_b.T, atol=1e-4)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_saved_loaded_and_saved_again(model, layout, tmp_path):
    save_layouts(model, tmp_path)
    for again in range(2):
        folder = tmp_path / layout if again == 0 else tmp_path / "again"
        loaded, info = DyloraMoeForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert is_tied(loaded)
        for strategy in ("router", "single:1", "base"):
            assert torch.equal(
                logits(loaded, routing_strategy=strategy), logits(model, routing_strategy=strategy)
            )
        loaded.save_pretrained(tmp_path / "again", layout=layout)


@pytest.mark.parametrize("experts", [["head"], ["body"], ["both", "body"]])
def test_some_experts_of_a_repo(model, experts, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DyloraMoeForCausalLM.from_pretrained(tmp_path, experts=experts)
    assert is_tied(loaded)
    for name in experts:
        assert torch.equal(
            logits(loaded, routing_strategy=f"single:{name}"),
            logits(model, routing_strategy=f"single:{name}"),
        )


@pytest.mark.parametrize("expert", ["head", "both", "body"])
def test_merging_into_the_head_unties_it(model, expert, tmp_path):
    merged = model.merge_expert(expert)
    assert is_tied(merged) == (expert == "body") == merged.config.tie_word_embeddings
    assert torch.equal(merged.get_input_embeddings().weight, model.get_input_embeddings().weight)
    expected = logits(model, routing_strategy=f"single:{expert}")
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert is_tied(loaded) == is_tied(merged)
    assert torch.allclose(logits(loaded), expected, atol=1e-4)
    assert is_tied(model)


def test_an_expert_that_is_added_to_a_live_model(tmp_path):
    grown = build(llama_config(tie_word_embeddings=True), EXPERTS[2:])
    before = logits(grown, routing_strategy="single:body")
    grown.add_expert("head", target_modules=[HEAD], r=4)
    with torch.no_grad():
        grown.expert_layers()[HEAD].lora_B.normal_()
    grown.tie_weights()
    assert is_tied(grown)
    assert torch.equal(logits(grown, routing_strategy="single:body"), before)
    assert not torch.equal(
        logits(grown, routing_strategy="single:head"), logits(grown, routing_strategy="base")
    )
    grown.save_pretrained(tmp_path)
    loaded = DyloraMoeForCausalLM.from_pretrained(tmp_path)
    assert is_tied(loaded)
    assert torch.equal(
        logits(loaded, routing_strategy="single:head"), logits(grown, routing_strategy="single:head")
    )


def test_a_head_with_a_trained_embedding_stays_one_tensor(model, tmp_path):
    """Training the embeddings of a tied model trains the head as well, adapted or not."""
    model.save_pretrained(tmp_path)
    trained = DyloraMoeForCausalLM.from_pretrained(tmp_path)
    embeddings = trained.get_input_embeddings().weight.requires_grad_(True)
    trained(torch.tensor([ROW]), labels=torch.tensor([ROW]), routing_strategy="single:head").loss.backward()
    assert embeddings.grad is not None and embeddings.grad[ROW[0]].abs().max() > 0
    assert trained.get_output_embeddings().weight is embeddings


OTHERS = {
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1),
    "gemma2, soft-capped": Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_foundations_that_tie(name, tmp_path):
    model = build(OTHERS[name], EXPERTS[:1])
    expected = PeftLoop(model).logits(ROW, "single:0", len(ROW), 0)
    assert torch.allclose(logits(model, routing_strategy="single:0"), expected, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = DyloraMoeForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert is_tied(loaded)
    assert torch.equal(
        logits(loaded, routing_strategy="single:0"), logits(model, routing_strategy="single:0")
    )
