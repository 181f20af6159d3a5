"""Stock EvalPlus 0.3.1 on the real HumanEval+ and an exported small model. Needs the data: see the
Makefile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_text import save_text_repo


DATA = os.environ.get("HUMANEVAL_OVERRIDE_PATH")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA is None, reason="HUMANEVAL_OVERRIDE_PATH does not name the HumanEval+ file"),
]

# What EvalPlus's command line builds, prompt by prompt, with a look at the model in between.
GENERATE = """
import json, sys
from evalplus.data import get_human_eval_plus
from evalplus.provider import make_model
from transformers import GenerationMixin

carried = []
sample = GenerationMixin._sample

def counting_sample(self, input_ids, logits_processor, stopping_criteria, **kwargs):
    carried.append(sum(type(criterion).__name__ == "StopSequenceCriteria" for criterion in stopping_criteria))
    return sample(self, input_ids, logits_processor, stopping_criteria, **kwargs)

GenerationMixin._sample = counting_sample
repo, *tasks = sys.argv[1:]
decoder = make_model(
    model=repo, backend="hf", dataset="humaneval", temperature=0.0, trust_remote_code=True, dtype="float32"
)
problems = get_human_eval_plus()
texts = {}
for task in tasks:
    prompt = problems[task]["prompt"].strip() + "\\n"
    texts[task] = decoder.codegen(prompt, do_sample=False, num_samples=1)[0]
    assert "_get_stopping_criteria" not in vars(decoder.model), task
assert carried == [1] * len(tasks), carried
print("TEXTS" + json.dumps(texts))
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A routed model with random weights whose answers differ from prompt to prompt and end after some 60
    tokens."""
    return save_text_repo(tmp_path_factory.mktemp("real"))


def run(arguments: list[str], cwd: Path) -> str:
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "HUMANEVAL_OVERRIDE_PATH": str(Path(DATA).resolve()), "HOME": str(cwd)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    return process.stdout


def texts(repo: Path, tasks: list[str], cwd: Path) -> dict[str, str]:
    output = run(["-c", GENERATE, str(repo), *tasks], cwd)
    return json.loads(next(line for line in output.splitlines() if line.startswith("TEXTS"))[5:])


def test_prompts_with_helper_functions_get_the_same_text_whatever_ran_before(repo, tmp_path):
    watched = ["HumanEval/32", "HumanEval/38", "HumanEval/50"]
    before = [f"HumanEval/{number}" for number in range(32)]
    after = texts(repo, before + watched, tmp_path)
    assert len(set(after.values())) > 20
    for task in watched:
        assert after[task] == texts(repo, [task], tmp_path)[task]
        assert len(after[task]) > 20


def test_evaluate_runs_through_all_164_tasks(repo, tmp_path):
    arguments = ["--dataset", "humaneval", "--backend", "hf", "--greedy", "--trust_remote_code"]
    output = run(["-m", "evalplus.evaluate", "--model", str(repo), *arguments], tmp_path)
    assert "humaneval (base tests)" in output
    assert output.count("pass@1:") == 2
    results = json.loads(
        next((tmp_path / "evalplus_results/humaneval").glob("*_eval_results.json")).read_text()
    )
    assert len(results["eval"]) == 164
