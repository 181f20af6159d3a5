"""lm-evaluation-harness: its own model class on a mixture, against plain log probabilities of the model."""

import json

import pytest
import torch
from environments import run_python
from transformers import AutoTokenizer

from dylora_moe.modeling import DyloraMoeForCausalLM


# Without blanks at the end of the first, which the harness moves to the second.
PAIRS = [["def add(a, b):", "\n    return a + b\n"], ["x =", " 1"], ["def f(", "y):\n    pass"]]
RUN = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

where, strategy, pairs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = HFLM(pretrained=where, trust_remote_code=True, device="cpu", batch_size=2, routing_strategy=strategy)
requests = [Instance("loglikelihood", {}, tuple(pair), index) for index, pair in enumerate(pairs)]
print("FOUND" + json.dumps([value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]))
"""


@pytest.mark.parametrize("strategy", ["router", "single:1", "ensemble"])
def test_log_likelihoods_are_the_models_own(environment, mixtures, tmp_path, strategy):
    repo = mixtures / "my-mixture"
    output = run_python(
        environment("lm-eval==0.4.13"), RUN, str(repo), strategy, json.dumps(PAIRS), home=tmp_path
    )
    found = json.loads(next(line for line in output.splitlines() if line.startswith("FOUND"))[len("FOUND") :])
    tokenizer, model = AutoTokenizer.from_pretrained(repo), DyloraMoeForCausalLM.from_pretrained(repo)
    for (start, rest), value in zip(PAIRS, found, strict=True):
        prompt, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (start, start + rest))
        with torch.no_grad():
            scores = model(whole[:, :-1], routing_strategy=strategy).logits.log_softmax(-1)
        chosen = scores.gather(-1, whole[:, 1:, None])[0, prompt.shape[1] - 1 :]
        assert abs(chosen.sum().item() - value) < 1e-3
