"""A small mixture that generates text, and a folder with a report, each made once."""

import shutil

import pytest
from evalplus.data import humaneval
from helpers_report import Page, leave_folder
from helpers_text import save_text_repo

from dylora_moe.eval.report.page import write_report


@pytest.fixture(scope="session")
def repo(tmp_path_factory):
    """A mixture of three experts; the foundation lies beside it."""
    return save_text_repo(tmp_path_factory.mktemp("text"), length=10, verify=False)


@pytest.fixture(scope="session")
def made(tmp_path_factory, problems_file):
    """A folder with everything in it, and its report."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", str(problems_file))
        write_report(leave_folder(folder))
    return folder


@pytest.fixture(scope="session")
def page(made):
    return Page((made / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def folder(made, tmp_path):
    """A copy, without what the report wrote."""
    copy = shutil.copytree(
        made, tmp_path / "copy", ignore=shutil.ignore_patterns("figures", "report.html", "*.png")
    )
    return copy
