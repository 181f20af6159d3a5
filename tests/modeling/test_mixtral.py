"""Foundations that are mixtures of experts themselves."""

import torch
from helpers_models import build, labelled_batch, left_padded, random_rows
from transformers import (
    MixtralConfig,
)

from dylora_moe.modeling import DyloraMoeForCausalLM


def mixtral(**fields):
    base = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=2,
        **fields,
    )
    targets = [
        f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")
    ]
    return build(
        base, [{"name": "a", "r": 2, "target_modules": targets}, {"name": "b", "target_modules": targets}]
    )


def test_a_foundation_with_experts_of_its_own_adds_no_loss_of_its_own():
    model = mixtral(output_router_logits=True).train()
    batch = labelled_batch()
    output = model(**batch, output_router_logits=True)
    assert output.router_logits.shape == (2, 9, 2)
    shifted = batch["labels"][:, 1:].reshape(-1)
    entropy = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].reshape(-1, 97), shifted, ignore_index=-100
    )
    torch.testing.assert_close(output.loss, entropy + 0.01 * output.aux_loss)


def test_a_foundation_with_experts_of_its_own_survives_saving(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path)
    again, information = DyloraMoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    batch = left_padded(random_rows((5, 3)))
    assert torch.equal(model(**batch).logits, again(**batch).logits)
