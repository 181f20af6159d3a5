"""Records of Every Eval Ever: they hold what its schema 0.3.0 requires and what the runs' own files say.

The schema itself is not of this project; its rules that matter here are written down below.
"""

import hashlib
import json
import re
from dataclasses import replace

import pytest
from evalplus.data import humaneval
from helpers_report import leave_folder

from dylora_moe.eval.sampling.run_record import file_sha256, find_run, read_runs, write_run
from dylora_moe.eval.sharing.every_eval_ever import check_records, write_records
from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError


UUID4 = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
REQUIRED = {
    "schema_version",
    "evaluation_id",
    "retrieved_timestamp",
    "source_metadata",
    "model_info",
    "eval_library",
    "evaluation_results",
}
ALLOWED = REQUIRED | {"evaluation_timestamp", "detailed_evaluation_results"}
ROW_REQUIRED = {
    "schema_version",
    "evaluation_id",
    "model_id",
    "evaluation_name",
    "sample_id",
    "interaction_type",
    "input",
    "output",
    "answer_attribution",
    "evaluation",
}
ROW_ALLOWED = ROW_REQUIRED | {"evaluation_result_id", "sample_hash", "metadata"}
ATTRIBUTION = {"turn_idx", "source", "extracted_value", "extraction_method", "is_terminal"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, problems_file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", str(problems_file))
        folder = leave_folder(tmp_path_factory.mktemp("records"), limit=6)
        _with_two_samples(folder)
        write_records(folder)
    return folder


def _with_two_samples(folder):
    """Give `uniform` two samples a task, of which the first is right, with what the model wrote; `base` a Hub id."""
    run = find_run(read_runs(folder), routing_strategy="uniform")
    lines = [json.loads(line) for line in run.samples_path.read_text().splitlines()][: len(run.task_ids)]
    both = [{**line, "solution": f"{line['solution']}# {index}"} for line in lines for index in range(2)]
    run.samples_path.write_text("".join(json.dumps(line) + "\n" for line in both))
    raw = [{**line, "solution": f"```python\n{line['solution']}\n```"} for line in both]
    run.raw_samples_path.write_text("".join(json.dumps(line) + "\n" for line in raw))
    verdicts = {
        task: [
            {"base_status": "pass", "plus_status": "fail" if number % 2 else "pass"},
            {"base_status": "timeout", "plus_status": "pass"},
        ]
        for number, task in enumerate(run.task_ids)
    }
    run.results_path.write_text(json.dumps({"date": "2026-11-30 23:22", "eval": verdicts}))
    changed = replace(
        run,
        n_samples=2,
        temperature=0.8,
        samples_sha256=file_sha256(run.samples_path),
        raw_samples_sha256=file_sha256(run.raw_samples_path),
        results_sha256=file_sha256(run.results_path),
        scores={"pass@1": 0.5, "plus_pass@1": 0.25},
        dataset_file="own.jsonl",
    )
    write_run(changed)
    base = find_run(read_runs(folder), routing_strategy="base")
    write_run(replace(base, model="guild/mixture", model_revision="0" * 40))


def records_of(folder) -> dict[str, tuple[str, dict, list[dict]]]:
    """By strategy: the record's path, the record and its rows."""
    found = {}
    for path in (folder / "eee").rglob("*.json"):
        record = json.loads(path.read_text())
        samples = folder / "eee" / record["detailed_evaluation_results"]["file_path"]
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        generation = record["evaluation_results"][0]["generation_config"]["additional_details"]
        found[generation["routing_strategy"]] = (path.relative_to(folder / "eee").as_posix(), record, rows)
    return found


def details_in(value):
    """Yield every `additional_details` and `metadata` in a record."""
    if isinstance(value, dict):
        yield from (inner for name, inner in value.items() if name in ("additional_details", "metadata"))
        for inner in value.values():
            yield from details_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from details_in(inner)


def test_every_record_is_what_the_schema_requires(made):
    found = records_of(made)
    assert set(found) == {run.routing_strategy for run in read_runs(made)}
    assert len({path for path, _, _ in found.values()}) == len(found)
    for path, record, rows in found.values():
        assert record.keys() >= REQUIRED and record.keys() <= ALLOWED
        match = re.fullmatch(
            rf"data/(humaneval/local|humaneval/guild|own_problems/local)/[\w-]+/({UUID4})\.json", path
        )
        assert match and record["schema_version"] == "0.3.0"
        pointer = record["detailed_evaluation_results"]
        assert pointer["file_path"] == path.removesuffix(".json") + "_samples.jsonl"
        content = (made / "eee" / pointer["file_path"]).read_bytes()
        assert pointer["checksum"] == hashlib.sha256(content).hexdigest()
        assert pointer["total_rows"] == len(rows) == content.count(b"\n") and pointer["format"] == "jsonl"
        assert {"source_type", "source_organization_name", "evaluator_relationship"} <= record[
            "source_metadata"
        ].keys()
        assert record["source_metadata"]["source_type"] == "evaluation_run"
        assert {"name", "id", "additional_details"} <= record["model_info"].keys()
        assert record["model_info"]["additional_details"]["deployment_type"] == "self_deployed"
        for result in record["evaluation_results"]:
            assert {"evaluation_name", "source_data", "metric_config", "score_details"} <= result.keys()
            metric, score = result["metric_config"], result["score_details"]["score"]
            assert metric["score_type"] == "continuous" and not metric["lower_is_better"]
            assert metric["min_score"] <= score <= metric["max_score"]
        for row in rows:
            assert row.keys() >= ROW_REQUIRED and row.keys() <= ROW_ALLOWED
            assert row["evaluation_id"] == record["evaluation_id"]
            assert row["model_id"] == record["model_info"]["id"] and row["interaction_type"] == "single_turn"
            assert isinstance(row["input"]["raw"], str) and isinstance(row["input"]["reference"], list)
            assert row["answer_attribution"][0].keys() == ATTRIBUTION
        for details in details_in([record, rows]):
            assert all(isinstance(value, str) for value in details.values())


def test_scores_are_those_of_the_rows(made):
    """Each pass@1 is the mean over its rows; a task has as many rows as samples, so that tasks weigh the same."""
    for strategy, (_, record, rows) in records_of(made).items():
        run = find_run(read_runs(made), routing_strategy=strategy)
        scores = {
            result["evaluation_result_id"]: result["score_details"]["score"]
            for result in record["evaluation_results"]
        }
        problems = "own_problems" if run.dataset_file else "humaneval"
        assert scores == {
            f"{problems}.pass@1": run.scores["pass@1"],
            f"{problems}plus.pass@1": run.scores["plus_pass@1"],
        }
        for name, score in scores.items():
            own = [row["evaluation"]["score"] for row in rows if row["evaluation_result_id"] == name]
            assert len(own) == len(run.task_ids) * run.n_samples
            assert sum(own) / len(own) == pytest.approx(score)
            assert all(row["evaluation"]["is_correct"] == bool(row["evaluation"]["score"]) for row in rows)


def test_a_record_says_what_was_asked_written_and_scored(made):
    _, record, rows = records_of(made)["uniform"]
    first, plus, second = rows[0], rows[1], rows[2]
    assert first["sample_id"] == plus["sample_id"] == second["sample_id"]
    assert first["sample_hash"] == second["sample_hash"] and first["evaluation_name"] == "own_problems"
    assert plus["evaluation_name"] == "own_problemsplus" and "humaneval" not in json.dumps(record)
    (attribution,) = second["answer_attribution"]
    assert attribution["extracted_value"].endswith("# 1")
    assert second["output"]["raw"] == [f"```python\n{attribution['extracted_value']}\n```"]
    assert second["metadata"] == {"base_status": "timeout", "plus_status": "pass", "sample": "1"}
    assert record["evaluation_timestamp"] == "2026-11-30 23:22"
    result = record["evaluation_results"][0]
    assert result["generation_config"]["generation_args"]["temperature"] == 0.8
    assert result["source_data"]["source_type"] == "other"  # the user's own problems
    assert result["source_data"]["additional_details"]["file"] == "own.jsonl"
    low, high = (
        result["score_details"]["uncertainty"]["confidence_interval"][end] for end in ("lower", "upper")
    )
    assert low <= 0.5 <= high
    path, shared, _ = records_of(made)["base"]
    assert path.startswith("data/humaneval/guild/mixture/") and shared["model_info"]["id"] == "guild/mixture"
    assert [result["evaluation_name"] for result in shared["evaluation_results"]] == [
        "humaneval",
        "humanevalplus",
    ]
    assert shared["evaluation_results"][1]["source_data"]["hf_repo"] == "evalplus/humanevalplus"


def test_records_are_replaced_and_what_is_no_record_is_kept(made, problems, tmp_path):
    before = {path: record for path, record, _ in records_of(made).values()}
    write_records(made)
    after = {path: record for path, record, _ in records_of(made).values()}
    assert before.keys() == after.keys()
    (made / "eee" / "notes.txt").write_text("mine")
    try:
        for call in (lambda: check_records("eee", made), lambda: write_records(made)):
            with pytest.raises(InputError, match=r"other things than records \(notes\.txt\)"):
                call()
    finally:
        (made / "eee" / "notes.txt").unlink()
    check_records("eee", made)
    check_records("eee", tmp_path / "not there")
    with pytest.raises(InputError, match="--format csv is not known; it can be eee"):
        check_records("csv", made)


def test_a_run_whose_problems_have_changed_is_left_out(made, problems):
    run = find_run(read_runs(made), routing_strategy="router")
    write_run(replace(run, dataset_hash="other"))
    try:
        with pytest.warns(DyloraMoeWarning, match="router.* is left out: its problems are not those"):
            write_records(made)
        assert "router" not in records_of(made) and "base" in records_of(made)
    finally:
        write_run(run)
        write_records(made)
