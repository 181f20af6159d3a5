"""EvalPlus's HumanEval+ stood in by the demo's problems, in its own format, for this process and those it
starts; and Triton's interpreter where there is no GPU, which must be chosen before `triton` is imported."""

import os

import pytest
import torch

from dylora_moe.demo.problems import write_dataset


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def problems_file(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("problems") / "problems.jsonl")


@pytest.fixture
def problems(problems_file, monkeypatch):
    """EvalPlus reads its variable when it is imported, which may be long ago."""
    from evalplus.data import humaneval

    monkeypatch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", str(problems_file))
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(problems_file))
    return problems_file
