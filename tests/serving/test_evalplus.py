"""Stock EvalPlus with its backend `vllm`, against the samples of our own benchmark."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_benchmark import lines
from helpers_serving import ENVIRONMENT
from helpers_vllm_server import save_served_repo

from dylora_moe.demo.problems import load_problems
from dylora_moe.eval.benchmark import benchmark


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """A file of three problems, for this process and those it starts."""
    from evalplus.data import humaneval

    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in list(load_problems().values())[:3]))
    monkeypatch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", str(path))
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(path))
    return path


def test_evaluate_gives_the_benchmarks_samples(problems, tmp_path):
    repo = save_served_repo(tmp_path)
    command = [str(Path(sys.executable).parent / "evalplus.evaluate"), "--model", str(repo)]
    command += ["--dataset", "humaneval", "--backend", "vllm", "--greedy", "--trust_remote_code"]
    command += ["--dtype", "float32", "--root", str(tmp_path / "stock"), "--parallel", "1"]
    process = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "HOME": str(tmp_path / "home"), "PYTHONSAFEPATH": "1"},
        timeout=500,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (raw,) = (tmp_path / "stock/humaneval").glob("*.raw.jsonl")
    own = benchmark(repo, output_dir=tmp_path / "own", dtype="float32", batch_size=1, score=False).runs[0]
    assert lines(raw) == lines(own.raw_samples_path)
    assert len({line["solution"] for line in lines(raw)}) == 3
    (scores,) = (tmp_path / "stock/humaneval").glob("*eval_results.json")
    assert set(json.loads(scores.read_text())["eval"]) == {line["task_id"] for line in lines(raw)}
