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
    """A file of two problems, for this process and those it starts."""
    from evalplus.data import humaneval

    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in list(load_problems().values())[:2]))
    monkeypatch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", str(path))
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(path))
    return path


def test_evaluate_gives_the_benchmarks_samples(problems, tmp_path):
    """EvalPlus has no option for a strategy, so that the repo's own is what it scores."""
    repo = save_served_repo(tmp_path)
    (repo / "generation_config.json").write_text(
        json.dumps({"routing_strategy": "single:1", "eos_token_id": 1})
    )
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
    options = {"strategies": ["single:1", "router"], "dtype": "float32", "batch_size": 1, "score": False}
    own, other = benchmark(repo, output_dir=tmp_path / "own", **options).runs
    assert lines(raw) == lines(own.raw_samples_path)
    assert lines(raw) != lines(other.raw_samples_path)
    assert len({line["solution"] for line in lines(raw)}) == 2
    (scores,) = (tmp_path / "stock/humaneval").glob("*eval_results.json")
    assert set(json.loads(scores.read_text())["eval"]) == {line["task_id"] for line in lines(raw)}
