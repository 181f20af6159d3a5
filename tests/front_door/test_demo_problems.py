"""The demo's scored problems: valid in EvalPlus's own terms, and absent from every training text."""

import json

import pytest

from dylora_moe.demo.family_wordings import WORDINGS
from dylora_moe.demo.problems import (
    FAMILIES,
    family_of,
    load_problems,
    parameter_of,
    problems_of,
    signature_and_docstring,
    write_dataset,
)
from dylora_moe.demo.texts import possible_training_texts, training_texts


TASK_IDS = list(load_problems())
FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test", "contract")


def test_every_family_has_enough_problems_and_every_problem_a_family():
    assert all(len(problems_of(family)) >= 8 for family in FAMILIES)
    assert sum(len(problems_of(family)) for family in FAMILIES) == len(TASK_IDS)
    assert {family_of(task_id) for task_id in TASK_IDS} == set(FAMILIES)
    assert set(WORDINGS) == set(TASK_IDS)


@pytest.mark.parametrize("task_id", TASK_IDS)
def test_the_format_is_evalplus_s(task_id):
    problem = load_problems()[task_id]
    name, number = task_id.split("/")
    assert name == "HumanEval" and number.isdigit()
    assert all(isinstance(problem[field], str) and problem[field] for field in FIELDS)
    assert problem["prompt"].count(f"def {problem['entry_point']}(") == 1
    assert problem["atol"] == 0
    assert len(problem["base_input"]) >= 4 and len(problem["plus_input"]) >= 8
    inputs = [json.dumps(arguments) for arguments in problem["base_input"] + problem["plus_input"]]
    assert len(set(inputs)) == len(inputs)


@pytest.mark.parametrize("task_id", TASK_IDS)
def test_the_canonical_solution_passes_its_own_test_and_contract(task_id):
    problem = load_problems()[task_id]
    scope = {}
    exec(problem["prompt"] + problem["canonical_solution"] + "\n" + problem["test"], scope)
    scope["check"](scope[problem["entry_point"]])
    contract = f"def contract({parameter_of(problem)}):\n{problem['contract']}"
    exec(contract, scope)
    for arguments in problem["base_input"] + problem["plus_input"]:
        scope["contract"](*arguments)


@pytest.mark.parametrize("task_id", TASK_IDS)
def test_the_inputs_tell_a_right_answer_from_a_constant(task_id):
    evalplus_gen = pytest.importorskip("evalplus.gen.util")
    problem = load_problems()[task_id]
    solution = problem["prompt"] + problem["canonical_solution"]
    for inputs in (problem["base_input"], problem["plus_input"]):
        expected = evalplus_gen.trusted_exec(solution, inputs, problem["entry_point"])
        assert len({json.dumps(value) for value in expected}) > 1


def test_every_canonical_solution_passes_in_evalplus(tmp_path, monkeypatch):
    pytest.importorskip("evalplus")
    from evalplus.data import humaneval
    from evalplus.evaluate import check_correctness
    from evalplus.gen.util import trusted_exec

    monkeypatch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", str(write_dataset(tmp_path / "problems.jsonl")))
    problems = humaneval.get_human_eval_plus()
    assert list(problems) == TASK_IDS
    for problem in problems.values():
        solution = problem["prompt"] + problem["canonical_solution"]
        expected = {}
        for kind in ("base", "plus"):
            run = trusted_exec(solution, problem[f"{kind}_input"], problem["entry_point"], record_time=True)
            expected[kind], expected[f"{kind}_time"] = run
        result = check_correctness("humaneval", 0, problem, solution, expected)
        assert (result["base"][0], result["plus"][0]) == ("pass", "pass"), problem["task_id"]


def test_no_scored_prompt_is_in_a_training_text():
    texts = {text.lower() for text in possible_training_texts()}
    together = "\n".join(texts)
    for problem in load_problems().values():
        assert problem["prompt"].strip().lower() not in together
        assert problem["entry_point"].lower() not in together
        assert signature_and_docstring(problem)[2].lower() not in together


@pytest.mark.parametrize("seed", [0, 1])
def test_training_texts_are_among_those_compared_and_follow_from_the_seed(seed):
    texts = training_texts(seed)
    assert set(texts) <= set(possible_training_texts())
    assert texts == training_texts(seed)
    assert texts != training_texts(seed + 1)
