"""Sampling and beam sampling against a naive recomputation: the same draws, the same scores."""

import pytest
import torch
from helpers_models import STRATEGIES, PeftLoop, build, left_padded, random_rows


PROMPT = random_rows((7,), seed=4)[0]
TEMPERATURE, TOP_K, NEW = 1.7, 20, 5
WARPED = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "top_p": 1.0, "eos_token_id": None}


@pytest.fixture(scope="module")
def mixture():
    return build(seed=7)


@pytest.fixture(scope="module")
def loop(mixture):
    return PeftLoop(mixture)


def naive_scores(loop, row: list[int], strategy: str, turn: int, top_k: int) -> torch.Tensor:
    """Log-probabilities of the next token over the temperature, all but the `top_k` largest at minus
    infinity."""
    scores = loop.logits(row, strategy, len(PROMPT), turn)[-1].log_softmax(dim=-1) / TEMPERATURE
    return scores.masked_fill(scores < scores.topk(top_k).values[-1], float("-inf"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sampling_draws_what_a_naive_recomputation_draws(mixture, loop, strategy):
    mixture.reset_round_robin()
    torch.manual_seed(5)
    arguments = {**WARPED, "max_new_tokens": NEW, "num_return_sequences": 3}
    found = mixture.generate(torch.tensor([PROMPT]), routing_strategy=strategy, **arguments)
    torch.manual_seed(5)
    rows = [list(PROMPT) for _ in range(3)]
    for _ in range(NEW):
        scores = [naive_scores(loop, row, strategy, turn, TOP_K) for turn, row in enumerate(rows)]
        for row, token in zip(rows, torch.multinomial(torch.stack(scores).softmax(dim=-1), 1), strict=True):
            row.append(int(token))
    assert found.tolist() == rows


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_beam_sampling_scores_its_sequences_as_a_naive_recomputation_does(mixture, loop, strategy):
    mixture.reset_round_robin()
    torch.manual_seed(6)
    arguments = {**WARPED, "top_k": 0, "max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2}
    output = mixture.generate(
        torch.tensor([PROMPT]),
        routing_strategy=strategy,
        output_scores=True,
        return_dict_in_generate=True,
        **arguments,
    )
    found = mixture.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    for sequence, scores in zip(output.sequences.tolist(), found, strict=True):
        for step, score in enumerate(scores.tolist()):
            row = sequence[: len(PROMPT) + step]
            expected = naive_scores(loop, row, strategy, 0, 97)[sequence[len(PROMPT) + step]]
            assert score == pytest.approx(float(expected), abs=1e-3)


def test_the_beams_of_a_prompt_share_its_expert_in_turn(mixture):
    rows = [PROMPT, PROMPT[:4], PROMPT[2:]]
    arguments = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": NEW, "do_sample": False}
    arguments["eos_token_id"] = None
    mixture.reset_round_robin()
    found = mixture.generate(**left_padded(rows), routing_strategy="round_robin", **arguments)[
        :, len(PROMPT) :
    ]
    for turn, row in enumerate(rows):
        alone = mixture.generate(torch.tensor([row]), routing_strategy=f"single:{turn}", **arguments)
        assert found[2 * turn : 2 * turn + 2].tolist() == alone[:, len(row) :].tolist()
    assert mixture._next_round_robin == 3
