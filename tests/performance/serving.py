"""Does vLLM give the tokens of `benchmark`'s own decoding, and how fast is each?

    python tests/performance/serving.py REPO --json serving.json

For an environment with vLLM. HumanEval+'s first prompts, greedily, in float32, in one process: tokens a second of both,
one request at a time and 16, and every sample that differs, with the gap between the two best logits of the
model's own forward pass where it first does.
"""

import argparse
import os
import time


os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_CPU_OMP_THREADS_BIND="nobind"
)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import torch
from vllm import LLM, SamplingParams
from workbench import report

from dylora_moe.eval.evalplus_bridge.data import load_benchmark
from dylora_moe.eval.evalplus_bridge.decoder import ask
from dylora_moe.eval.sampling.batch_decoding import Row, decode_rows
from dylora_moe.eval.sampling.loading import find_model


def own_decoding(
    loaded, questions: list, batch_size: int, tokens: int, strategy: str
) -> dict[str, list[int]]:
    made = {}

    def finished(row: Row, new_tokens: list[int], _: str) -> None:
        made[row.task_id] = new_tokens

    rows = [Row(question.task_id, 0, question.input_ids) for question in questions]
    decode_rows(
        loaded.model,
        loaded.tokenizer,
        rows,
        finished,
        stop_strings=[],
        batch_size=batch_size,
        seed=0,
        do_sample=False,
        max_new_tokens=tokens,
        routing_strategy=strategy,
    )
    return made


def engine_decoding(
    llm: LLM, questions: list, batch_size: int, tokens: int, strategy: str
) -> dict[str, list[int]]:
    params = SamplingParams(
        temperature=0, max_tokens=tokens, detokenize=False, extra_args={"routing_strategy": strategy}
    )
    made = {}
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        prompts = [{"prompt_token_ids": question.input_ids} for question in batch]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for question, output in zip(batch, outputs, strict=True):
            made[question.task_id] = list(output.outputs[0].token_ids)
    return made


@torch.no_grad()
def gap(model, prompt: list[int], tokens: list[int], strategy: str) -> float:
    """The two best logits' distance after a prompt and some tokens."""
    logits = model(input_ids=torch.tensor([prompt + tokens]), routing_strategy=strategy).logits[0, -1]
    best, second = logits.float().topk(2).values.tolist()
    return best - second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repo")
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--strategy", default="router")
    with report("Serving", parser) as (options, rows):
        found = find_model(options.repo)
        loaded = found.load(dtype="float32")
        questions, _ = ask(
            load_benchmark("humaneval", limit=options.tasks),
            loaded.tokenizer,
            temperature=0.0,
            max_new_tokens=options.tokens,
            force_base_prompt=False,
        )
        longest = max(len(question.input_ids) for question in questions) + options.tokens
        llm = LLM(
            str(found.folder),
            dtype="float32",
            max_model_len=longest,
            max_num_seqs=16,
            enforce_eager=True,
            hf_overrides={"routing_strategy": options.strategy},
            enable_prefix_caching=False,
        )
        for batch_size in (1, 16):
            samples = {}
            runs = {
                "own decoding": lambda size: own_decoding(
                    loaded, questions, size, options.tokens, options.strategy
                ),
                "vLLM": lambda size: engine_decoding(llm, questions, size, options.tokens, options.strategy),
            }
            for name, run in runs.items():
                started = time.perf_counter()
                samples[name] = run(batch_size)
                seconds = time.perf_counter() - started
                made = sum(map(len, samples[name].values()))
                rows.append({"requests at a time": batch_size, "by": name, "tokens/s": made / seconds})
            for question in questions:
                own, served = (samples[name][question.task_id] for name in runs)
                if own != served:
                    pairs = list(zip(own, served, strict=False))
                    place = next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), len(pairs))
                    distance = gap(loaded.model, question.input_ids, own[:place], options.strategy)
                    print(
                        f"{question.task_id}, {batch_size} at a time: differs at token {place}, gap {distance:.1e}"
                    )
            equal = sum(samples["own decoding"][task] == samples["vLLM"][task] for task in samples["vLLM"])
            print(f"{batch_size} at a time: {equal} of {len(questions)} samples are equal")


if __name__ == "__main__":
    main()
