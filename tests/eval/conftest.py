"""A small mixture that generates text, and a folder with a report, each made once; how programs are checked."""

import functools
import shutil
import tempfile

import pytest
from evalplus.data import humaneval
from helpers_checkpoints import change_json
from helpers_checks import change_start, processes, sandbox_fails
from helpers_report import Page, leave_folder
from helpers_text import save_text_checkpoint, save_text_repo

from dylora_moe import hub_export
from dylora_moe.eval.report.page import write_report
from dylora_moe.eval.scoring import checking_process


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


@pytest.fixture(params=[False, True], ids=["plain", "sandbox"])
def sandboxed(request):
    if request.param and sandbox_fails():
        pytest.skip(sandbox_fails())
    return request.param


@pytest.fixture
def nothing_is_left(tmp_path, monkeypatch):
    """Every process of a test can be told by its command line, which forks keep. None may outlive the test.

    Neither may anything in the temporary folder.
    """
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(checking_process, "PAUSES", (0, 0.1))
    monkeypatch.setattr(checking_process, "_START", f"# {tmp_path}\n{checking_process._START}")
    yield
    assert processes(str(tmp_path)) == []
    assert list(temporary.iterdir()) == []


@pytest.fixture
def no_filter(monkeypatch):
    """As on a kernel without seccomp."""
    change_start(monkeypatch, "checking.guarded_check.filter_calls = lambda: False")


@pytest.fixture(scope="module")
def export_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYLORA_MOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("text"), length=10)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty one, filled without the check of each export, which takes a process of its own."""
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        hub_export, "export", functools.partial(hub_export.export, verify=False), raising=False
    )


@pytest.fixture
def bare(checkpoint, tmp_path):
    """A checkpoint that takes its tokenizer from its foundation, beside it."""
    copy = tmp_path / "bare"
    shutil.copytree(checkpoint.parent, copy, ignore=shutil.ignore_patterns("cache"))
    for path in (copy / "checkpoint").glob("tokenizer*"):
        path.unlink()
    change_json(copy / "checkpoint" / "config.json", base_model_name_or_path="../foundation")
    return copy / "checkpoint"
