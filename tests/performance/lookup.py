"""How many tokens does a step of prompt lookup give on code?

    python tests/performance/lookup.py REPO --json lookup.json

HumanEval+'s first prompts, greedily, in float32. Counts the steps of `PromptLookup` on the texts that the model
writes: since lookup changes no token, its drafts and what it accepts follow from the text alone, so a CPU will
do. `tokens a step` is the mean over all prompts, `share of steps` that accept a draft beside it.
"""

import argparse
from types import SimpleNamespace

import torch
from workbench import report

from dylora_moe.eval.evalplus_bridge.data import load_benchmark
from dylora_moe.eval.evalplus_bridge.decoder import ask
from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.modeling.fast_decoding_dylora_moe import PromptLookup


def steps_of(prompt: list[int], written: list[int], drafts: int) -> list[int]:
    """How many tokens of a text each step gives; the first token comes with the prompt."""
    config = SimpleNamespace(prompt_lookup_num_tokens=drafts, max_matching_ngram_size=None)
    lookup = PromptLookup(None, torch.tensor([prompt]), config)
    lookup.append_to_text([*prompt, written[0]])
    place, steps = 1, []
    while place < len(written):
        hits = 0
        for draft, token in zip(lookup.drafts(), written[place:], strict=False):
            if draft != token:
                break
            hits += 1
        accepted = written[place : place + hits + 1]
        lookup.append_to_text(accepted)
        steps.append(len(accepted))
        place += len(accepted)
    return steps


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repo")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--drafts", type=int, nargs="+", default=[3, 5, 7, 15])
    parser.add_argument("--strategies", nargs="+", default=["base", "single:0", "best", "router"])
    with report("Prompt lookup", parser) as (options, rows):
        loaded = find_model(options.repo).load(dtype="float32")
        questions, _ = ask(
            load_benchmark("humaneval", limit=options.tasks),
            loaded.tokenizer,
            temperature=0.0,
            max_new_tokens=options.new,
            force_base_prompt=False,
        )
        for strategy in options.strategies:
            texts = []
            for question in questions:
                prompt = torch.tensor([question.input_ids])
                text = loaded.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=options.new,
                    do_sample=False,
                    routing_strategy=strategy,
                )
                texts.append(text[0, prompt.shape[1] :].tolist())
            for drafts in options.drafts:
                steps = []
                for question, text in zip(questions, texts, strict=True):
                    steps += steps_of(list(question.input_ids), text, drafts)
                row = {"strategy": strategy, "drafts": drafts, "tokens a step": sum(steps) / len(steps)}
                row["share of steps"] = sum(count > 1 for count in steps) / len(steps)
                rows.append(row)
                print(row, flush=True)


if __name__ == "__main__":
    main()
