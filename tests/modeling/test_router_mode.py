"""Dense in training and sparse in evaluation: told where two copies of one model would be compared."""

import pytest
from helpers_models import build, left_padded, random_rows

from dylora_moe.modeling import DyloraMoeForCausalLM


BATCH = left_padded(random_rows((6, 4), seed=2))


def copies(folder, **fields):
    build(router_aux_loss_coef=0.0, **fields).save_pretrained(folder)
    return [DyloraMoeForCausalLM.from_pretrained(folder) for _ in range(2)]


def test_a_policy_and_its_reference_in_mode_auto_are_told_once(tmp_path, messages):
    policy, reference = copies(tmp_path)
    policy.train()
    reference(**BATCH)
    assert messages == []
    policy(**BATCH)
    reference(**BATCH)
    assert len(messages) == 1 and str(tmp_path) in messages[0] and "--router_mode dense" in messages[0]


def test_the_backbone_of_a_policy_is_the_policy(tmp_path, messages):
    policy, reference = copies(tmp_path)
    policy.train().base_model(**BATCH)
    policy.eval().base_model(**BATCH)
    policy(**BATCH)
    assert not any("One copy" in text for text in messages)
    policy.train().base_model(**BATCH)
    reference.base_model(**BATCH)
    assert len([text for text in messages if "One copy" in text]) == 1


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_copies_of_one_mode_agree_and_say_nothing(tmp_path, messages, mode):
    policy, reference = copies(tmp_path, router_mode=mode)
    policy.train()
    assert (policy(**BATCH).logits - reference(**BATCH).logits).abs().max() < 1e-5
    assert messages == []


def test_one_model_that_trains_and_is_evaluated_and_other_strategies_say_nothing(tmp_path, messages):
    model, other = copies(tmp_path)
    for training in (True, False, True):
        model.train(training)(**BATCH)
    other(**BATCH, routing_strategy="single:0")
    assert messages == []
