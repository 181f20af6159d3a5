"""Running stock EvalPlus: what is read from its result file, and what happens when it fails."""

import json

import pytest

from dylora_moe.eval.evalplus_bridge import stock as stock_evalplus
from dylora_moe.eval.evalplus_bridge.stock import StockEvalPlusError, run_stock_evalplus
from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.repo.results import TaskResult, pass_at_1, read_results


def sample(task_id, base, plus):
    return {"task_id": task_id, "solution": "", "base_status": base, "plus_status": plus}


def write_result_file(path, tasks):
    path.write_text(json.dumps({"date": "", "hash": "", "eval": tasks}))
    return path


def test_a_sample_passes_plus_only_if_it_passes_both(tmp_path):
    tasks = {
        "HumanEval/0": [sample("HumanEval/0", "pass", "pass")],
        "HumanEval/1": [sample("HumanEval/1", "pass", "fail")],
        "HumanEval/2": [sample("HumanEval/2", "fail", "pass")],
        "HumanEval/3": [sample("HumanEval/3", "timeout", "timeout")],
    }
    results = read_results(write_result_file(tmp_path / "x_eval_results.json", tasks))
    assert [results[task_id] for task_id in tasks] == [(1.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.0, 0.0)]
    assert pass_at_1(results.values()) == 0.5
    assert pass_at_1(results.values(), plus=True) == 0.25


def test_several_samples_of_a_task_are_a_share(tmp_path):
    tasks = {
        "HumanEval/0": [sample("HumanEval/0", status, "pass") for status in ("pass", "fail", "pass", "fail")]
    }
    results = read_results(write_result_file(tmp_path / "x_eval_results.json", tasks))
    assert results == {"HumanEval/0": TaskResult(0.5, 0.5)}


def test_a_run_without_plus_tests_has_no_plus_figure(tmp_path):
    tasks = {"HumanEval/0": [sample("HumanEval/0", "pass", None)]}
    results = read_results(write_result_file(tmp_path / "x_eval_results.json", tasks))
    assert results == {"HumanEval/0": TaskResult(1.0, None)}
    with pytest.raises(ValueError, match="without the plus tests"):
        pass_at_1(results.values(), plus=True)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"eval": {}}', '{"eval": {"HumanEval/0": []}}', '{"eval": 3}']
)
def test_another_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"other\.json"):
        read_results(path)


def test_a_root_that_holds_something_is_refused(tmp_path):
    (tmp_path / "old.jsonl").write_text("{}")
    with pytest.raises(InputError, match="no old result"):
        run_stock_evalplus("model", root=tmp_path)


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="humaneval, mbpp"):
        run_stock_evalplus("model", root=tmp_path / "root", dataset="colours")


def test_a_failure_names_the_log_and_quotes_it(tmp_path):
    pytest.importorskip("evalplus")
    (tmp_path / "model").mkdir()  # no model in it
    with pytest.raises(StockEvalPlusError, match="exit code 1") as caught:
        run_stock_evalplus(tmp_path / "model", root=tmp_path / "root")
    assert caught.value.log == tmp_path / "root" / "evalplus.log"
    assert str(caught.value.log) in str(caught.value)
    assert caught.value.tail and caught.value.tail[-1].strip() in caught.value.log.read_text()


def test_too_long_a_run_is_ended(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(StockEvalPlusError, match="within 0 seconds"):
        run_stock_evalplus(tmp_path / "model", root=tmp_path / "root", timeout=0.0)


def test_the_process_gets_no_local_modules_and_no_terminal(tmp_path, monkeypatch):
    seen = {}

    class Ended:
        returncode = 0

        def poll(self):
            return self.returncode

    def popen(command, **options):
        seen.update(options, command=command)
        folder = tmp_path / "root" / "humaneval"
        folder.mkdir()
        write_result_file(folder / "m_hf_temp_0.0_eval_results.json", {"HumanEval/0": []})
        return Ended()

    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    monkeypatch.setattr(stock_evalplus.subprocess, "Popen", popen)
    path = run_stock_evalplus(
        tmp_path / "model", root=tmp_path / "root", dataset_path=tmp_path / "data.jsonl", threads=1
    )
    assert path.name == "m_hf_temp_0.0_eval_results.json"
    environment = seen["env"]
    assert "PYTHONPATH" not in environment and environment["PYTHONSAFEPATH"] == "1"
    assert environment["HUMANEVAL_OVERRIDE_PATH"] == str(tmp_path / "data.jsonl")
    assert (environment["HF_HUB_OFFLINE"], environment["OMP_NUM_THREADS"]) == ("1", "1")
    assert seen["stdin"] == stock_evalplus.subprocess.DEVNULL
    assert seen["cwd"] == tmp_path / "root"
    assert "--trust_remote_code" in seen["command"] and "--greedy" in seen["command"]
