"""What a report makes of a folder in which files are missing, damaged, or of different runs."""

import json

import pytest
from helpers_report import rendered

from dylora_moe.eval import measure_loss
from dylora_moe.eval.report.content import read_folder
from dylora_moe.eval.report.figures import write_figures
from dylora_moe.eval.report.loss_tables import describe_loss
from dylora_moe.eval.report.page import write_report
from dylora_moe.eval.report.tables import report_tables
from dylora_moe.eval.sampling.run_record import Run, file_sha256, read_runs, write_run
from dylora_moe.hub_export.errors import InputError


pytestmark = pytest.mark.usefixtures("problems")


def test_a_folder_with_scores_alone(folder):
    for path in [*folder.glob("*_analysis.json"), folder / "routing_tasks.jsonl"]:
        path.unlink()
    page = rendered(folder)
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {"scores-section", "runs"} <= ids and not {"experts-section", "routing-section", "tasks"} & ids
    assert page.data == {"routing": None}


def test_a_folder_with_routing_alone(folder):
    for path in [folder / "expert_analysis.json", folder / "run.json"]:
        path.unlink()
    page = rendered(folder)
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {"routing-section", "tasks"} <= ids and not {
        "experts-section",
        "scores-section",
        "filter-verdict",
    } & ids
    assert page.data["routing"]["tests"] is None
    assert "not every expert alone was scored" in page.text


def test_a_folder_with_a_loss(folder, repo, tmp_path):
    assert "loss-section" not in {attributes.get("id") for _, attributes in rendered(folder).elements}
    for group in ("code", "prose"):
        (tmp_path / f"{group}.txt").write_text(f"a text of the group {group}")
    measured = measure_loss(repo, tmp_path.glob("*.txt"), output_dir=folder, dtype="float32").summary
    page = rendered(folder)
    assert {"loss-section", "loss", "loss_groups"} <= {
        attributes.get("id") for _, attributes in page.elements
    }
    assert measured["verdict"]["text"] in page.text and describe_loss(measured) in page.text
    assert f"{measured['all']['strategies'][0]['nats_per_token']:.3f}" in page.text
    strategies = ["base", "uniform", "single:0", "single:1", "single:2"]
    without = measure_loss(repo, tmp_path.glob("*.txt"), strategies=strategies, output_dir=folder).summary
    assert without["verdict"]["router"] is None and without["verdict"]["text"] in rendered(folder).text
    content = read_folder(folder)
    tables = {name: table for name, table in report_tables(content).items() if name.startswith("loss")}
    losses = [row[1] for row in tables["loss"].rows if not row[0].startswith("oracle")]
    assert losses == sorted(losses) and tables["loss"].rows[-1][0].startswith("oracle")
    written = {path.name for path in write_figures(content, tables)}
    assert {"loss.csv", "loss.json", "loss.png", "loss_groups.csv"} <= written


def test_nothing_to_report_on_is_an_error(tmp_path):
    with pytest.raises(InputError, match="nothing to report on"):
        write_report(tmp_path)


def test_what_no_longer_belongs_together_is_said(folder):
    runs = {run.routing_strategy: run for run in read_runs(folder)}
    runs["router"].samples_path.write_text("changed\n")
    runs["base"].results_path.write_text("changed\n")
    started = Run(
        **{**vars(runs["best"]), "samples": "humaneval/begun.jsonl", "samples_sha256": None, "results": None}
    )
    write_run(started)
    page = rendered(folder)
    for sentence in (
        "_router_temp_0.0.jsonl is not part of this report: its samples changed after they were made.",
        "_base_temp_0.0.jsonl is not part of this report: its results changed after they were scored.",
        "humaneval/begun.jsonl is not part of this report: its samples are not complete.",
        "The expert analysis was made from samples that have changed since; run expert-analysis again.",
        "The routing analysis was made from samples that have changed since; run routing-analysis again.",
    ):
        assert sentence in page.text


def test_analyses_of_different_samples_are_told_apart(folder):
    assert read_folder(folder).notes == []
    routing = json.loads((folder / "routing_analysis.json").read_text())
    other = next(run for run in read_runs(folder) if run.routing_strategy == "best")
    routing |= {"samples": other.samples, "samples_sha256": other.samples_sha256}
    (folder / "routing_analysis.json").write_text(json.dumps(routing))
    (note,) = read_folder(folder).notes
    assert note == f"The routing analysis is of {other.samples}, which the expert analysis does not compare."


def test_tokens_of_another_analysis_are_not_shown(folder):
    """As a routing analysis that is killed between its two files leaves them."""
    routing = json.loads((folder / "routing_analysis.json").read_text())
    routing["tasks_sha256"] = file_sha256(folder / "routing_tasks.jsonl")
    (folder / "routing_analysis.json").write_text(json.dumps(routing))
    content = read_folder(folder)
    assert content.notes == [] and list(content.routing_lines())
    with open(folder / "routing_tasks.jsonl", "a") as file:
        file.write("\n")
    content = read_folder(folder)
    assert len(content.notes) == 1 and "run routing-analysis again" in content.notes[0]
    assert not list(content.routing_lines())


@pytest.mark.parametrize("name", ["run.json", "expert_analysis.json", "routing_analysis.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format_version": "new"}', "is damaged"),
        ('{"format_version": 2, "tracks": []}', "newer version of dylora-moe .* update dylora-moe, or"),
    ],
)
def test_a_damaged_or_newer_file_is_an_error_that_names_it(folder, name, content, words):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=words) as error:
        read_folder(folder)
    assert name in str(error.value)
    assert ("is damaged" in str(error.value)) == ("is damaged" in words)


def test_a_damaged_line_is_an_error_that_names_it(folder):
    path = folder / "routing_tasks.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n{\n")
    with pytest.raises(InputError, match=r"routing_tasks\.jsonl, line 2, is damaged"):
        rendered(folder)


def test_a_mixture_without_a_router_is_not_judged(folder):
    summary = json.loads((folder / "expert_analysis.json").read_text())
    for figures in summary["tests"].values():
        figures["comparisons"], figures["verdict"] = [], None
    summary["verdict"] = summary["router_choices"] = None
    (folder / "expert_analysis.json").write_text(json.dumps(summary))
    (folder / "routing_analysis.json").unlink()
    assert "no router, so there is nothing to judge" in rendered(folder).text
