"""The benchmark against stock EvalPlus 0.3.1 on all of HumanEval+ and MBPP+: samples, raw samples and
verdicts.

Needs the data, HUMANEVAL_OVERRIDE_PATH and MBPP_OVERRIDE_PATH, and a quarter of an hour for each dtype.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers_text import save_text_repo

from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.evalplus_bridge.data import load_benchmark
from dylora_moe.eval.evalplus_bridge.decoder import ask
from dylora_moe.eval.sampling.loading import load_model
from dylora_moe.eval.scoring.scoring import score_samples


VARIABLES = ("HUMANEVAL_OVERRIDE_PATH", "MBPP_OVERRIDE_PATH")
SETS = {"humaneval": 164, "mbpp": 378}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(os.environ.get, VARIABLES)),
        reason=f"{' or '.join(VARIABLES)} does not name EvalPlus's file",
    ),
]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return save_text_repo(tmp_path_factory.mktemp("real"))


def stock(repo, folder, dtype, name):
    """EvalPlus's own samples, in a process of their own for each set."""
    arguments = ["--model", str(repo), "--dataset", name, "--root", str(folder), "--dtype", dtype]
    arguments += ["--backend", "hf", "--greedy", "--trust_remote_code", "--attn_implementation", "sdpa"]
    run(["-m", "evalplus.codegen", *arguments], folder)
    (path,) = [path for path in (folder / name).glob("*.jsonl") if not path.name.endswith(".raw.jsonl")]
    return path


def run(arguments, folder):
    folder.mkdir(exist_ok=True)
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:]


def read(path) -> list[str]:
    return [json.loads(line)["solution"] for line in path.read_text().splitlines()]


def verdicts(path) -> dict:
    content = json.loads(path.read_text())["eval"]
    return {
        task: [(one["base_status"], one["plus_status"]) for one in samples]
        for task, samples in content.items()
    }


@torch.no_grad()
def gap_where_they_part(model, tokenizer, prompt: list[int], one: str, other: str) -> float:
    """Between the two best logits, where two texts part. Random bytes cannot be told from text, so tokens are
    made anew."""
    tokens = list(prompt)
    texts = [one, other]
    for _ in range(400):
        logits = model(torch.tensor([tokens]), routing_strategy="router").logits[0, -1].float()
        best = logits.topk(2)
        tokens.append(int(best.indices[0]))
        text = tokenizer.decode(tokens[len(prompt) :]).replace("\t", "    ")
        if any(text.rstrip("\ufffd") not in candidate for candidate in texts):
            return float(best.values[0] - best.values[1])
    raise AssertionError("they do not part")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_samples_and_verdicts_are_those_of_stock_evalplus(repo, tmp_path, dtype):
    options = {"benchmarks": list(SETS), "dtype": dtype, "attn_implementation": "sdpa", "score": False}
    results = {
        size: benchmark(repo, output_dir=tmp_path / f"batch_{size}", batch_size=size, **options)
        for size in (1, 32)
    }
    for place, (name, count) in enumerate(SETS.items()):
        path = stock(repo, tmp_path / "stock", dtype, name)
        expected = read(path.with_suffix(".raw.jsonl"))
        assert len(expected) == count and len(set(expected)) == count
        for size, result in results.items():
            ours = result.runs[place]
            found = read(ours.raw_samples_path)
            different = [index for index, text in enumerate(expected) if found[index] != text]
            if dtype == "float64":
                assert not different
                assert ours.samples_path.read_bytes() == path.read_bytes()
            if different:
                loaded = load_model(repo, dtype=dtype, attn_implementation="sdpa")
                questions, _ = ask(
                    load_benchmark(name), loaded.tokenizer, temperature=0.0, max_new_tokens=768
                )
                for index in different:
                    question = questions[index]
                    pair = [
                        text[len(loaded.tokenizer.decode(question.input_ids)) :]
                        for text in (expected[index], found[index])
                    ]
                    gap = gap_where_they_part(loaded.model, loaded.tokenizer, question.input_ids, *pair)
                    print(f"{dtype}, batch size {size}, {question.task_id}: gap {gap:.1e}")
                    assert gap < 1e-4
        if dtype == "float64":
            run(["-m", "evalplus.evaluate", "--dataset", name, "--samples", str(path)], tmp_path / "stock")
            stock_results = path.with_name(path.name.replace(".jsonl", "_eval_results.json"))
            assert verdicts(score_samples(ours.samples_path, name)) == verdicts(stock_results)
