"""The examples as a person runs them: help, wrong input, and samples of some tasks alone."""

import importlib.util
import json
from pathlib import Path

import pytest


EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
ON_A_MODEL = ("compare_strategies", "is_the_router_worth_it")


def main_of(name: str):
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def ended(main, *arguments) -> int:
    with pytest.raises(SystemExit) as ends:
        main([str(argument) for argument in arguments])
    return ends.value.code


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_help_is_printed_and_nothing_is_made(path, elsewhere, capsys):
    assert ended(main_of(path.stem), "--help") == 0
    assert "usage:" in capsys.readouterr().out and not list(elsewhere.iterdir())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_without_arguments_one_line_says_what_is_missing(path, elsewhere, capsys):
    assert ended(main_of(path.stem)) == 2
    assert "the following arguments are required" in capsys.readouterr().err and not list(elsewhere.iterdir())


@pytest.mark.parametrize("name", ON_A_MODEL)
def test_a_model_that_is_not_there_is_one_line(name, elsewhere, problems, capsys):
    assert ended(main_of(name), "./no such model") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "no such model" in line


def test_a_file_is_no_folder_to_save_to(elsewhere, capsys):
    (elsewhere / "taken").write_text("mine")
    assert ended(main_of("train_experts"), "taken") == 2
    assert "taken is a file" in capsys.readouterr().err


@pytest.fixture
def samples(elsewhere, problems):
    """A folder with the right solutions of two tasks, as a run with `--limit 2` leaves them, and the wrong
    ones."""
    folder = elsewhere / "samples"
    folder.mkdir()
    tasks = [json.loads(line) for line in problems.read_text().splitlines()][:2]
    for name, solution in (("right", "canonical_solution"), ("wrong", "prompt")):
        lines = [{"task_id": task["task_id"], "solution": task["prompt"] + task[solution]} for task in tasks]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_samples_of_some_tasks_are_scored_on_these(samples, elsewhere, capsys):
    (samples / "again.raw.jsonl").write_text("not looked at")
    scores = main_of("rescore_samples")([str(samples)])
    assert (
        scores["right.jsonl"] == {"pass@1": 1.0, "plus_pass@1": 1.0}
        and scores["wrong.jsonl"]["pass@1"] == 0.0
    )
    assert "right.jsonl: pass@1 100.0 %, plus_pass@1 100.0 % (2 tasks)" in capsys.readouterr().out
    assert sorted(path.name for path in samples.iterdir()) == [
        "again.raw.jsonl",
        "right.jsonl",
        "wrong.jsonl",
    ]


def test_a_file_that_cannot_be_scored_stops_no_other(samples, capsys):
    (samples / "damaged.jsonl").write_text('{"task_id": ')
    (samples / "empty.jsonl").write_text("")
    (samples / "foreign.jsonl").write_text('{"task_id": "Mine/0", "solution": "pass"}\n')
    assert ended(main_of("rescore_samples"), samples) == 2
    said = capsys.readouterr()
    assert "right.jsonl: pass@1 100.0 %" in said.out
    for part in (
        "damaged.jsonl was not",
        "no tasks to score",
        "Mine/0 are not tasks",
        "3 of 5 files were not scored",
    ):
        assert part in said.err


def test_a_folder_without_samples_is_said(elsewhere, capsys):
    assert ended(main_of("rescore_samples"), "nowhere") == 2
    assert "nowhere holds no samples files" in capsys.readouterr().err and not list(elsewhere.iterdir())
    (elsewhere / "a.jsonl").write_text("")
    assert ended(main_of("rescore_samples"), ".", "--output_dir", elsewhere) == 2
    assert "own folder" in capsys.readouterr().err
