"""Log-probabilities of a prompt's tokens are those of the model's own forward pass."""

import torch
from helpers_serving import STRATEGIES, mixed_requests, run_engine


WITHIN = 1e-4  # nats, in float32


def test_of_the_prompt(llama):
    model, repo = llama()
    strategies = [strategy for strategy in STRATEGIES if strategy != "best"]
    requests = mixed_requests(strategies, count=18, max_tokens=1)
    for request in requests:
        request.params = {"prompt_logprobs": 0}
    served = run_engine(repo, requests, max_num_batched_tokens=32)
    for request, answer in zip(requests, served.answers, strict=True):
        tokens = torch.tensor([request.prompt])
        with torch.no_grad():
            logits = model(input_ids=tokens, routing_strategy=request.strategy).logits
        own = logits[0, :-1].log_softmax(dim=-1).gather(1, tokens[0, 1:, None]).squeeze(1)
        assert len(answer.prompt_logprobs) == len(request.prompt) - 1
        torch.testing.assert_close(torch.tensor(answer.prompt_logprobs), own, atol=WITHIN, rtol=0)
