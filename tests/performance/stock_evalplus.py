"""Is stock EvalPlus faster on a routed model than on its bare foundation?

    python tests/performance/stock_evalplus.py --json stock_evalplus.json

Milliseconds a new token of EvalPlus's own decoder (its defaults: bfloat16, eager attention, greedy, one
prompt a call) on the first tasks of HumanEval+ (HUMANEVAL_OVERRIDE_PATH, else EvalPlus downloads it), the
median over the tasks. Both models are loaded from a folder, as EvalPlus does. The bare foundation gets the
routed model's defence against the criteria that EvalPlus leaves on a model, so that both have one criterion a
call.
"""

import argparse
import contextlib
import gc
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch
from benchmark_loop import save_tokenizer
from evalplus.provider.hf import HuggingFaceDecoder
from workbench import foundation, report, routed

from dylora_moe.eval.evalplus_bridge.data import load_benchmark


STRATEGIES = ("single:0", "best", "router", "ensemble")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--new", type=int, default=128)
    with report("Stock EvalPlus", parser) as (options, rows), tempfile.TemporaryDirectory() as directory:
        prompts = [task["prompt"].strip() + "\n" for task in load_benchmark("humaneval").tasks.values()][
            : options.tasks
        ]

        def repo(model, name: str) -> Path:
            model.generation_config.eos_token_id = None  # all texts are of one length
            model.save_pretrained(Path(directory) / name)
            save_tokenizer(Path(directory) / name)
            return Path(directory) / name

        def add(folder: Path, name: str, strategy: str | None = None) -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                decoder = HuggingFaceDecoder(
                    str(folder), "humaneval", dtype="bfloat16", temperature=0.0, trust_remote_code=True
                )
            decoder.max_new_tokens = options.new
            if strategy is not None:
                decoder.model.generation_config.routing_strategy = strategy
            times = []
            for prompt in (prompts[0], *prompts):  # the first is a warm-up
                start = time.perf_counter()
                decoder.codegen(prompt, do_sample=False, num_samples=1)
                times.append(time.perf_counter() - start)
                decoder.model.__dict__.pop("_get_stopping_criteria", None)
            rows.append({"model": name, "ms/token": 1000 * statistics.median(times[1:]) / options.new})
            rows[-1]["of bare"] = rows[-1]["ms/token"] / rows[0]["ms/token"]
            print(rows[-1], flush=True)
            del decoder
            gc.collect()
            torch.cuda.empty_cache()

        add(repo(foundation(), "bare"), "bare foundation")
        folder = repo(routed(4), "routed")
        for strategy in STRATEGIES:
            add(folder, strategy, strategy)


if __name__ == "__main__":
    main()
