"""What a command needs is looked at before it begins, and what it computed is shown whatever becomes of the
report."""

import json
import sys

import pytest
from helpers_cli import run
from helpers_report import leave_folder

from dylora_moe import cli
from dylora_moe.eval.analysis import expert_analysis as analysis
from dylora_moe.eval.report import figures, wandb_tables
from dylora_moe.eval.report import page as report
from dylora_moe.hub_export import mirror
from dylora_moe.hub_export.errors import FailureError, InputError
from dylora_moe.hub_export.extras import check_packages
from dylora_moe.hub_export.repo.repo_files import RepoFiles
from dylora_moe.hub_export.sources import wandb_artifacts as wandb_sdk


COMMANDS = ("benchmark", "expert-analysis", "routing-analysis")


def error_of(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


@pytest.mark.parametrize("missing", ["evalplus", "jinja2", "matplotlib", "scipy"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_package_is_named_before_any_work(command, missing, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    line = error_of([command, "--model", str(tmp_path), "-o", str(tmp_path / "out")], capsys)
    assert f"needs {missing}, which is not installed" in line
    assert "pip install 'dylora-moe[eval]'" in line and "pip install -e '.[eval]'" in line
    assert not (tmp_path / "out").exists()


def test_the_demo_trains_nothing_where_it_could_not_be_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "evalplus", None)
    assert "evalplus" in error_of(["demo", "-o", str(tmp_path / "demo")], capsys)
    assert not (tmp_path / "demo").exists()


def test_all_that_is_missing_is_said_at_once(monkeypatch):
    for name in ("evalplus", "matplotlib", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        InputError, match=r"evalplus, matplotlib, wandb, which are .*'dylora-moe\[eval,wandb\]'"
    ):
        check_packages("evalplus", "jinja2", "matplotlib", "wandb")


def test_a_package_that_lacks_something_itself_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "matplotlib.py").write_text("import a_part_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    with pytest.raises(
        InputError, match="matplotlib cannot be imported: No module named 'a_part_that_is_not_there'"
    ):
        check_packages("matplotlib")


@pytest.mark.parametrize("command", COMMANDS)
def test_wandb_without_a_login_is_said_before_any_work(command, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb.sdk", reason="the SDK is optional")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb_sdk, "_has_credentials", lambda wandb: False)
    line = error_of(
        [command, "--model", str(tmp_path), "-o", str(tmp_path / "out"), "--wandb_project", "p"], capsys
    )
    assert "no W&B API key on this machine" in line and not (tmp_path / "out").exists()


def test_mirror_push_without_a_login_reads_no_weights(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb.sdk", reason="the SDK is optional")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb_sdk, "_has_credentials", lambda wandb: False)
    monkeypatch.setattr(mirror, "repo_files", lambda folder: RepoFiles(["config.json"], [], "full", {}))
    line = error_of(
        ["mirror", "push", str(tmp_path), "guild/moe/mixture"], capsys
    )  # has no file to be hashed
    assert "no W&B API key on this machine" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wandb_project_of_another_form_is_said_before_any_work(command, tmp_path, capsys):
    line = error_of(
        [command, "--model", "m", "-o", str(tmp_path / "out"), "--wandb_project", "a/b/c"], capsys
    )
    assert "PROJECT or ENTITY/PROJECT" in line and not (tmp_path / "out").exists()


@pytest.fixture
def analysed(tmp_path, problems, monkeypatch):
    """A folder with results, and the analysis of them, as if the command had just computed it."""
    folder = leave_folder(tmp_path / "out")
    summary = json.loads((folder / analysis.EXPERTS_FILE).read_text())
    done = analysis.ExpertAnalysis(folder, summary)
    monkeypatch.setattr(analysis, "expert_analysis", lambda *_, **__: done)
    return folder, summary


def test_a_figure_that_cannot_be_drawn_loses_nothing_else(analysed, monkeypatch, capsys):
    folder, summary = analysed

    def no_font(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(figures, "_figure", no_font)
    with pytest.raises(SystemExit) as ended:
        cli.main(["expert-analysis", "-o", str(folder)])
    said = capsys.readouterr()
    assert ended.value.code == 1
    error = said.err.splitlines()[-1]
    assert error.startswith(
        "error: the report cannot be made (RuntimeError: no font); the results are kept in"
    )
    assert summary["verdict"]["text"] in " ".join(said.out.split())
    assert (folder / report.REPORT_FILE).is_file() and (folder / "figures" / "scores.csv").is_file()


def test_all_that_fails_at_the_end_is_said_after_the_table(analysed, monkeypatch, capsys):
    """A key that W&B no longer accepts is bad input at the beginning, and a failure at the end."""

    def fail(kind, text):
        raise kind(text)

    folder, summary = analysed
    monkeypatch.setattr(report, "render", lambda *_: fail(RuntimeError, "no template"))
    monkeypatch.setattr(wandb_tables, "check_wandb", lambda project: (None, project))
    monkeypatch.setattr(wandb_tables, "log_to_wandb", lambda *_: fail(InputError, "W&B does not accept it"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["expert-analysis", "-o", str(folder), "--wandb_project", "routers"])
    said = capsys.readouterr()
    assert ended.value.code == 1 and summary["verdict"]["text"] in " ".join(said.out.split())
    (error,) = [line for line in said.err.splitlines() if line.startswith("error")]
    assert (
        "report cannot be made (RuntimeError: no template); the tables cannot be logged to routers (W&B"
        in error
    )
    assert f"the results are kept in {folder}" in error


@pytest.mark.parametrize("as_json", [False, True])
def test_scores_are_shown_though_the_analysis_fails(as_json, tmp_path, problems, monkeypatch):
    def scored_and_out_of_memory(*_, output_dir, **__):
        leave_folder(output_dir)
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(analysis, "expert_analysis", scored_and_out_of_memory)
    folder = tmp_path / "out"
    command = ("expert-analysis", "--model", tmp_path, "-o", folder)
    code, said = run(*command, *(["--json"] if as_json else []), errors_alone=as_json)
    assert code == 1 and "uniform" in said and "pass@1" in said
    (error,) = [line for line in said.splitlines() if line.startswith("error")]
    assert error.startswith(f"error: RuntimeError: CUDA out of memory; the scores are kept in {folder}")
    code, said = run(*command)  # all of it was there before
    assert code == 1 and "pass@1" not in said and "kept" not in said


def test_json_is_printed_though_wandb_fails_at_the_end(analysed, monkeypatch, capsys):
    def offline(*_):
        raise FailureError("W&B does not answer")

    folder, summary = analysed
    monkeypatch.setattr(wandb_tables, "check_wandb", lambda project: (None, project))
    monkeypatch.setattr(wandb_tables, "log_to_wandb", offline)
    with pytest.raises(SystemExit) as ended:
        cli.main(["expert-analysis", "-o", str(folder), "--json", "--wandb_project", "routers"])
    said = capsys.readouterr()
    assert ended.value.code == 1 and "W&B does not answer" in said.err
    printed = json.loads(said.out)
    assert printed["verdict"] == summary["verdict"] and printed["report"] == str(folder / report.REPORT_FILE)
