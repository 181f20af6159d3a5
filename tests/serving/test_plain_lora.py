"""vLLM's own LoRA serving: the expert folders of a repo of layout `adapter` as adapters of its base model."""

import json
import os
import subprocess
import sys

from helpers_models import build, random_rows
from helpers_serving import ENVIRONMENT, OF_SMALL_MODELS, Request, llama_base, own_tokens, save_repo


RUN = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

options, prompts, adapters = map(json.loads, sys.argv[1:])
llm = LLM(enable_lora=True, max_lora_rank=8, max_loras=len(adapters), **options)
params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
# The base model's in a batch of their own: in one with adapters, vLLM 0.32.0 on a CPU gives them the last adapter's.
outputs = llm.generate(prompts, params, use_tqdm=False)
loras = [LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters.items(), 1) for _ in prompts]
outputs += llm.generate(prompts * len(adapters), params, lora_request=loras, use_tqdm=False)
print("FOUND" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def test_each_expert_folder_is_an_adapter_of_the_base_model(tmp_path):
    """Experts of unequal ranks and targets, one with rsLoRA and patterns of ranks and scales."""
    model = build(llama_base())
    repo = save_repo(model, tmp_path, "adapter")
    prompts = random_rows((5, 9, 30, 17), seed=4)
    adapters = {entry["name"]: str(repo / "experts" / entry["name"]) for entry in model.config.expert_configs}
    options = {**OF_SMALL_MODELS, "model": str(tmp_path / "foundation")}
    process = subprocess.run(
        [sys.executable, "-c", RUN, *map(json.dumps, (options, prompts, adapters))],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    found = json.loads(next(line[5:] for line in process.stdout.splitlines() if line.startswith("FOUND")))
    strategies = ["base", *(f"single:{name}" for name in adapters)]
    expected = [
        own_tokens(model, Request(prompt, strategy, max_tokens=16), "base")
        for strategy in strategies
        for prompt in prompts
    ]
    assert found == expected
    assert len(set(map(tuple, found))) == len(found)
