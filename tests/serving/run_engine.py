"""Runs one engine: `python run_engine.py JOB.json`, in an environment of its own. See `helpers_serving.run_engine`."""

import json
import resource
import sys
from pathlib import Path


def main(job: dict) -> dict:
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    results = {"rounds": []}
    for requests in job["rounds"]:
        prompts, params = [], []
        for request in requests:
            extra = (
                {}
                if request["strategy"] is None
                else {"extra_args": {"routing_strategy": request["strategy"]}}
            )
            fields = {"temperature": 0, "ignore_eos": True, "detokenize": False, **(request["params"] or {})}
            params.append(SamplingParams(max_tokens=request["max_tokens"], **extra, **fields))
            prompts.append({"prompt_token_ids": request["prompt"]})
        outputs = llm.generate(prompts, params, use_tqdm=False)
        results["rounds"].append([answer(output) for output in outputs])
    if job["engine"].get("disable_log_stats") is False:
        counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        results["preemptions"] = counts["vllm:num_preemptions"]
    results["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return results


def answer(output) -> dict:
    of_prompt = None
    if output.prompt_logprobs is not None:
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        of_prompt = [found[token].logprob for token, found in pairs]
    return {
        "tokens": list(output.outputs[0].token_ids),
        "cached": output.num_cached_tokens or 0,
        "prompt_logprobs": of_prompt,
    }


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text())
    Path(wanted["results"]).write_text(json.dumps(main(wanted)))
