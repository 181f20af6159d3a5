"""A benchmark's folder that comes from elsewhere: neither its record nor a link in it leads to other files."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers_text import save_text_repo

from dylora_moe.cli import main
from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.report.content import read_folder
from dylora_moe.eval.sampling.run_record import file_sha256, read_runs
from dylora_moe.hub_export.errors import InputError


pytest.importorskip("evalplus")
pytestmark = pytest.mark.usefixtures("problems")


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return save_text_repo(tmp_path_factory.mktemp("text"), length=10, verify=False)


def run_command(repo, folder) -> int:
    given = {"--model": repo, "--dtype": "float32", "--max_new_tokens": 8, "--limit": 1, "--parallel": 1}
    with pytest.raises(SystemExit) as exit_:
        main(["benchmark", *(str(part) for pair in given.items() for part in pair), "-o", str(folder)])
    return exit_.value.code


@pytest.fixture(scope="module")
def honest(repo, tmp_path_factory, problems_file):
    folder = tmp_path_factory.mktemp("honest") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evalplus.data.humaneval.HUMANEVAL_OVERRIDE_PATH", str(problems_file))
        patch.setenv("HUMANEVAL_OVERRIDE_PATH", str(problems_file))
        benchmark(repo, output_dir=folder, dtype="float32", max_new_tokens=8, limit=1, parallel=1)
    return folder


@pytest.fixture
def folder(honest, tmp_path):
    return Path(shutil.copytree(honest, tmp_path / "results"))


@pytest.fixture
def precious(tmp_path):
    path = tmp_path / "precious"
    path.write_text("without a newline")
    yield path
    assert path.read_text() == "without a newline"


def change(folder: Path, **fields) -> None:
    content = json.loads((folder / "run.json").read_text())
    for run in content["runs"].values():
        run.update(fields)
    (folder / "run.json").write_text(json.dumps(content))


def test_a_record_that_names_a_file_does_not_have_it_deleted(repo, folder, precious, capsys):
    change(folder, results=str(precious), results_sha256=None)
    assert run_command(repo, folder) == 0
    run = read_runs(folder)[0]
    assert run.has_results and run.results == run.samples.replace(".jsonl", "_eval_results.json")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "humaneval/../../precious.jsonl", "mbpp/x.jsonl", "x.jsonl", 3]
)
def test_samples_are_a_file_of_the_folder(folder, precious, name):
    change(folder, samples=name, samples_sha256=file_sha256(precious))
    with pytest.raises(InputError, match=r"run\.json is damaged .* choose another -o"):
        read_runs(folder)


def test_an_analysis_names_files_of_the_folder_only(folder, precious):
    analysis = {"format_version": 1, "runs": {"router": {"samples": str(precious), "samples_sha256": "0"}}}
    (folder / "expert_analysis.json").write_text(json.dumps(analysis))
    with pytest.raises(InputError, match="leads out of"):
        read_folder(folder)


def link(path: Path, precious: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(precious)


def journal(folder: Path) -> Path:
    (run,) = read_runs(folder)
    change(folder, samples_sha256=None, raw_samples_sha256=None, results=None, results_sha256=None)
    for path in (run.samples_path, run.raw_samples_path, run.results_path):
        path.unlink()
    return run.samples_path.with_suffix(".partial-0.jsonl")


@pytest.mark.parametrize(
    "name",
    ["run.json", "run.json.lock", ".locks/x.lock", "figures/scores.csv", ".report.html.1.tmp", "journal"],
)
def test_a_link_that_leads_out_is_refused(folder, precious, name):
    link(journal(folder) if name == "journal" else folder / name, precious)
    with pytest.raises(InputError, match="leads out of"):
        read_runs(folder)


def test_a_journal_that_is_a_link_is_neither_cut_nor_added_to(repo, folder, precious, capsys):
    link(journal(folder), precious)
    (folder / "run.json").unlink()
    assert run_command(repo, folder) == 2
    assert "leads out of" in capsys.readouterr().err


def test_a_folder_of_samples_that_lies_elsewhere_is_refused(folder, tmp_path):
    elsewhere = (folder / "humaneval").rename(tmp_path / "elsewhere")
    (folder / "humaneval").symlink_to(elsewhere)
    with pytest.raises(InputError, match="leads out of"):
        read_runs(folder)


def test_a_journal_that_nothing_writes_to_is_not_waited_for(folder):
    os.mkfifo(journal(folder))
    with pytest.raises(InputError, match="no plain file"):
        read_runs(folder)


def test_what_else_lies_in_the_folder_may_be_a_link(folder, precious):
    (folder / "models").symlink_to("/")
    (folder / "data.jsonl").symlink_to(precious)
    assert read_runs(folder)[0].has_results
