"""A data set of one's own, whose ids do not end in numbers: everything but `--id_range` takes it, as EvalPlus
does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evalplus.data import humaneval, mbpp
from helpers_text import save_text_repo

from dylora_moe.cli import main
from dylora_moe.demo.problems import load_problems
from dylora_moe.eval import evaluate
from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.evalplus_bridge.data import load_benchmark
from dylora_moe.eval.sampling.run_record import read_runs
from dylora_moe.hub_export.errors import FailureError, InputError


IDS = ["Mine/alpha", "HumanEval/53_v2", "HumanEval/7", "gamma", "Mine/a b/ü"]
SMALL = {"dtype": "float32", "max_new_tokens": 24}


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    problems = zip(IDS, load_problems().values(), strict=False)
    path.write_text("".join(json.dumps({**problem, "task_id": name}) + "\n" for name, problem in problems))
    return path


@pytest.fixture(autouse=True)
def own(own_file, monkeypatch):
    monkeypatch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", str(own_file))
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(own_file))


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return save_text_repo(tmp_path_factory.mktemp("text"), length=10, verify=False)


def command(*arguments) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0


def verdicts(path: Path) -> dict:
    return {
        task_id: [(sample["base_status"], sample["plus_status"]) for sample in samples]
        for task_id, samples in json.loads(path.read_text())["eval"].items()
    }


@pytest.mark.slow
def test_verdicts_are_those_of_stock_evalplus(tmp_path):
    """Of the reference solutions, but for one."""
    problems = list(load_benchmark("humaneval").tasks.values())
    texts = [problem["prompt"] + problem["canonical_solution"] for problem in problems[:-1]] + ["wrong\n"]
    path = tmp_path / "right.jsonl"
    samples = [{"task_id": name, "solution": text} for name, text in zip(IDS, texts, strict=True)]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert evaluate("humaneval", path) == {
        "pass@1": pytest.approx(4 / 5),
        "plus_pass@1": pytest.approx(4 / 5),
    }
    results = tmp_path / "right_eval_results.json"
    ours = verdicts(results)
    assert list(ours) == IDS
    results.unlink()
    ran = subprocess.run(
        [sys.executable, "-m", "evalplus.evaluate", "--dataset", "humaneval", "--samples", str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1", "HOME": str(tmp_path)},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert verdicts(results) == ours


@pytest.mark.slow
def test_the_commands_end_to_end(repo, tmp_path, capsys):
    arguments = ["--model", repo, "--dtype", "float32", "--max_new_tokens", "8", "-o", tmp_path]
    command("benchmark", *arguments, "--routing_strategy", "router", "best")
    command("expert-analysis", *arguments)
    command("routing-analysis", *arguments)
    assert "Traceback" not in capsys.readouterr().err
    assert all(run.task_ids == IDS and run.has_results for run in read_runs(tmp_path))
    lines = (tmp_path / "routing_tasks.jsonl").read_text().splitlines()
    assert [json.loads(line)["task_id"] for line in lines] == IDS
    analysis = json.loads((tmp_path / "expert_analysis.json").read_text())
    assert analysis["num_tasks"] == len(IDS)
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in IDS)


def test_a_limit_takes_the_first_and_a_range_is_refused(repo, tmp_path):
    with pytest.raises(InputError, match="--id_range takes tasks by their number, and Mine/alpha has none"):
        benchmark(repo, output_dir=tmp_path, id_range=(0, 3), **SMALL)
    assert not list(tmp_path.iterdir())
    run = benchmark(repo, output_dir=tmp_path, limit=2, **SMALL).runs[0]
    assert run.task_ids == IDS[:2] and run.subset == "the first 2 of 5"
    assert run.samples == "humaneval/repo_hf_router_temp_0.0_first_2.jsonl"
    assert list(verdicts(run.results_path)) == IDS[:2]
    whole = benchmark(repo, output_dir=tmp_path, limit=5, score=False, **SMALL).runs[0]
    assert whole.task_ids == IDS and whole.subset is None
    lines = whole.raw_samples_path.read_text().splitlines()
    assert lines[:2] == run.raw_samples_path.read_text().splitlines()


def test_of_mbpp_evalplus_reads_no_ids_without_a_number(own_file, monkeypatch, tmp_path):
    monkeypatch.setattr(mbpp, "MBPP_OVERRIDE_PATH", str(own_file))
    with pytest.raises(
        FailureError, match=r"cannot read own.jsonl, which MBPP_OVERRIDE_PATH names .*numbers its tasks"
    ):
        load_benchmark("mbpp")


@pytest.mark.parametrize(("ids", "message"), [([], "holds no task"), ([1, 2], "no text")])
def test_a_file_without_tasks_or_with_other_ids_is_said(tmp_path, monkeypatch, ids, message):
    problem = next(iter(load_problems().values()))
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({**problem, "task_id": name}) + "\n" for name in ids))
    monkeypatch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", str(path))
    with pytest.raises(InputError, match=f"odd.jsonl .*{message}"):
        load_benchmark("humaneval")
