"""A request that reaches the engine unchecked, and has no strategy that it serves, ends alone."""

import json
import os
import subprocess
import sys

from helpers_models import random_rows
from helpers_serving import ENVIRONMENT, OF_SMALL_MODELS, Request, own_tokens


# The engine is in a process of its own, as a server's is. This one checks nothing, as a front end in another language.
RUN = """
import json, sys
from vllm import LLM, SamplingParams
from dylora_moe.serving import request_routing

options, prompts, strategies = map(json.loads, sys.argv[1:])
llm = LLM(**options)
request_routing.check_requests_with(None)
for _ in range(2):
    params = [
        SamplingParams(
            temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, extra_args={"routing_strategy": strategy}
        )
        for strategy in strategies
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    found = [(output.outputs[0].finish_reason, list(output.outputs[0].token_ids)) for output in outputs]
    print("FOUND" + json.dumps(found))
"""


def test_the_engine_outlives_requests_that_it_does_not_serve(llama):
    model, repo = llama()
    prompts = random_rows((5, 9, 12, 7), seed=2)
    strategies = ["ensemble", "router", 3, "best"]
    options = {**OF_SMALL_MODELS, "model": str(repo)}
    process = subprocess.run(
        [sys.executable, "-c", RUN, *map(json.dumps, (options, prompts, strategies))],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    rounds = [json.loads(line[5:]) for line in process.stdout.splitlines() if line.startswith("FOUND")]
    assert len(rounds) == 2
    for answers in rounds:
        for prompt, strategy, (reason, tokens) in zip(prompts, strategies, answers, strict=True):
            if strategy in ("router", "best"):
                assert tokens == own_tokens(model, Request(prompt, strategy, max_tokens=12), "router")
            else:
                assert (reason, tokens) == ("error", [])
    assert "Routing strategy 'ensemble' is not served" in process.stdout + process.stderr
