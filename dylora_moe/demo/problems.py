"""The demo's scored problems: three families of small Python functions, in HumanEval+'s dataset format.

`problems.jsonl` beside this file is the data: one JSON object a line, with the fields that EvalPlus reads and
one of ours, `family`.
"""

from __future__ import annotations

import ast
import json
from functools import lru_cache
from importlib.resources import files
from pathlib import Path


FAMILIES = ("strings", "numbers", "lists")
DATASET_FILE = "problems.jsonl"


@lru_cache(maxsize=1)
def load_problems() -> dict[str, dict]:
    """Return all scored problems by task id, in the file's order. They are shared: do not change them."""
    lines = files(__package__).joinpath(DATASET_FILE).read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines if line.strip()]
    return {problem["task_id"]: problem for problem in problems}


def family_of(task_id: str) -> str:
    """Return the family (one of `FAMILIES`) of a task id; `KeyError` for an unknown id."""
    return load_problems()[task_id]["family"]


def problems_of(family: str) -> list[dict]:
    """Return the problems of one family, in the file's order."""
    return [problem for problem in load_problems().values() if problem["family"] == family]


def parameter_of(problem: dict) -> str:
    """Return the name of the one parameter of a problem's function."""
    return signature_and_docstring(problem)[1]


def signature_and_docstring(problem: dict) -> tuple[str, str, str]:
    """Read function name, parameter name and docstring from a problem's prompt."""
    function = ast.parse(problem["prompt"]).body[-1]
    return function.name, function.args.args[0].arg, ast.get_docstring(function)


def write_dataset(path: str | Path) -> Path:
    """Write the problems to `path` for EvalPlus's HUMANEVAL_OVERRIDE_PATH, and return the path."""
    path = Path(path)
    path.write_bytes(files(__package__).joinpath(DATASET_FILE).read_bytes())
    return path
