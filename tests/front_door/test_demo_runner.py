"""The demo's runner: its table, its output folder, and, among the slow tests, the whole of it."""

import json
from io import StringIO

import pytest
from rich.console import Console

from dylora_moe.demo.problems import FAMILIES, family_of, load_problems
from dylora_moe.demo.runner import STRATEGIES, _clear, run_demo
from dylora_moe.demo.scoring import ALL, ALL_PLUS, build_table, folder_name, summarise
from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.repo.results import TaskResult, read_results


def test_the_table_s_figures_are_means_of_the_results():
    results = {
        task_id: TaskResult(base=float(family_of(task_id) == "lists"), plus=0.0)
        for task_id in load_problems()
    }
    rows = summarise({"single:2": results})
    assert rows == {
        "single:2": {"strings": 0.0, "numbers": 0.0, "lists": 1.0, ALL: pytest.approx(1 / 3), ALL_PLUS: 0}
    }
    output = StringIO()
    Console(width=200, file=output).print(build_table(rows, problem_count=24))
    text = " ".join(output.getvalue().split())  # the caption is wrapped
    assert "single:2" in text and "100.0%" in text and "33.3%" in text
    assert "24 problems: the same functions as in training, under unseen wordings" in text


def test_an_output_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_finished_demo_is_shown_and_not_done_again(tmp_path):
    row = {**dict.fromkeys(FAMILIES, 0.5), ALL: 0.5, ALL_PLUS: 0.25}
    results = {"seed": 3, "problems": 24, "caption": "", "pass@1": {"router": row}}
    (tmp_path / ".dylora-moe-demo").touch()
    (tmp_path / "results.json").write_text(json.dumps(results))
    output = StringIO()
    assert run_demo(tmp_path, seed=3, console=Console(width=200, file=output)) == results
    assert "25.0%" in output.getvalue() and "already" in output.getvalue()
    with pytest.raises(InputError, match="seed 3"):
        run_demo(tmp_path, seed=4)


def test_what_an_interrupted_demo_left_is_cleared_and_nothing_else(tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "half").touch()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".dylora-moe-demo").touch()
    _clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".dylora-moe-demo", "notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_whole_demo_is_worth_showing(tmp_path, seed):
    rows = run_demo(tmp_path / "demo", seed=seed)["pass@1"]
    assert list(rows) == list(STRATEGIES)
    assert json.loads((tmp_path / "demo" / "results.json").read_text())["pass@1"] == rows
    for index, family in enumerate(FAMILIES):
        row = rows[f"single:{index}"]
        others = [row[other] for other in FAMILIES if other != family]
        assert row[family] >= 0.8 and sum(others) / len(others) < 0.3
    rivals = [rows["base"][ALL], *(rows[f"single:{index}"][ALL] for index in range(len(FAMILIES)))]
    for strategy in ("router", "best"):
        assert rows[strategy][ALL] >= 0.8 and rows[strategy][ALL] > max(rivals)
    for strategy in STRATEGIES:
        (result_file,) = (tmp_path / "demo" / "evalplus" / folder_name(strategy)).rglob("*_eval_results.json")
        assert summarise({strategy: read_results(result_file)})[strategy] == rows[strategy]
