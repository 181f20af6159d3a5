"""No two runs of a folder look the same: not in tables, pictures, pages, CSV files or W&B."""

import csv
import itertools
import json
import random
from dataclasses import fields, replace
from html.parser import HTMLParser

import pytest
from evalplus.data import humaneval, mbpp
from rich.console import Console

from dylora_moe.eval.evalplus_bridge.data import load_benchmark
from dylora_moe.eval.report.content import read_folder
from dylora_moe.eval.report.figures import _draw_scores, _figure, _new, _style
from dylora_moe.eval.report.page import write_report
from dylora_moe.eval.report.run_labels import one_line_names, run_labels
from dylora_moe.eval.report.tables import report_tables, scores
from dylora_moe.eval.report.wandb_tables import scores_summary
from dylora_moe.eval.sampling.run_record import DECISIVE, Run, file_sha256, write_run


# Of every field that may differ between runs of a folder, another value than `made` has.
OTHERS = {
    "samples": "humaneval/elsewhere.jsonl",
    "model_label": "other",
    "backend": "peft_moe",
    "model_sha256": "b" * 64,
    "model_revision": "c" * 40,
    "routing_strategy": "single:1",
    "benchmark": "mbpp",
    "dataset_hash": "d" * 32,
    "dataset_file": "mine.jsonl",
    "task_ids": ["HumanEval/0"],
    "subset": "tasks 0 to 0, 1 of 2",
    "mini": True,
    "n_samples": 5,
    "temperature": 2.0,
    "top_p": 0.9,
    "seed": 7,
    "max_new_tokens": 512,
    "dtype": "float32",
    "attn_implementation": "sdpa",
    "force_base_prompt": True,
}


def made(folder=None, **others) -> Run:
    values = {
        "folder": folder,
        "samples": "humaneval/demo_hf_router_temp_0.0.jsonl",
        "model": "models/demo",
        "model_label": "demo",
        "model_sha256": "a" * 64,
        "expert_names": ["one", "two"],
        "routing_strategy": "router",
        "benchmark": "humaneval",
        "dataset_hash": "0" * 32,
        "task_ids": ["HumanEval/0", "HumanEval/1"],
        "n_samples": 1,
        "temperature": 0.0,
        "top_p": 0.95,
        "seed": 0,
        "max_new_tokens": 768,
        "dtype": "bfloat16",
        "attn_implementation": "eager",
        "scores": {"pass@1": 0.5},
    }
    return Run(**{**values, **others})


def no_intervals(run) -> dict[str, tuple[float, float]]:
    return dict.fromkeys(run.scores, (0.0, 1.0))


def texts(runs, monkeypatch) -> dict[str, list]:
    """What each place calls the runs."""
    monkeypatch.setattr("dylora_moe.eval.report.tables._intervals", no_intervals)
    table = scores(runs)
    axes = _new(8, 4).add_subplot()
    _draw_scores(axes, table)
    console = Console(width=400)
    with console.capture() as capture:
        table.print(console)
    return {
        "cells": [label.cells() for label in run_labels(runs)],
        "table": [tuple(row[:6]) for row in table.rows],
        "picture": [label.get_text() for label in axes.get_yticklabels()],
        "console": [line for line in capture.get().splitlines() if line.startswith("│")],
        "summary": [name for name in scores_summary(table) if name.endswith("/pass@1")],
        "one line": one_line_names(table.records(), always=("model", "routing strategy", "benchmark")),
    }


def test_every_field_that_decides_what_samples_are_is_tried_here():
    assert set(OTHERS) >= set(DECISIVE) and set(OTHERS) <= {field.name for field in fields(Run)}


@pytest.mark.parametrize("name", OTHERS)
def test_runs_that_differ_in_one_field_look_different_everywhere(name, monkeypatch):
    first = made()
    second = replace(first, **{"samples": "humaneval/second.jsonl", name: OTHERS[name]})
    for place, (mine, theirs) in texts([first, second], monkeypatch).items():
        assert mine != theirs, place


def test_any_runs_look_different_everywhere(monkeypatch):
    """Runs of any fields that differ, many at a time."""
    generator = random.Random(0)
    for _ in range(40):
        drawn = [{name: OTHERS[name] for name in OTHERS if generator.random() < 0.3} for _ in range(6)]
        runs = [
            replace(made(), **{**others, "samples": f"{place}.jsonl"}) for place, others in enumerate(drawn)
        ]
        for place, labels in texts(runs, monkeypatch).items():
            assert len(set(labels)) == len(runs), (place, drawn)


def test_a_commands_table_tells_its_runs_from_those_that_the_folder_held(monkeypatch):
    monkeypatch.setattr("dylora_moe.eval.report.tables._intervals", no_intervals)
    greedy, sampled = made(), made(samples="humaneval/t2.jsonl", temperature=2.0)
    for shown, words in ((greedy, "greedy"), (sampled, "temperature 2")):
        console = Console(width=200)
        with console.capture() as capture:
            scores([shown], [greedy, sampled]).print(console)
        (line,) = [line for line in capture.get().splitlines() if line.startswith("│")]
        assert f" {words} " in line


def test_what_runs_do_not_differ_in_is_not_shown():
    alone = run_labels([made()])[0]
    assert alone.cells() == ("demo", "router", "HumanEval", "2", 1, "")
    greedy, sampled = run_labels([made(seed=None, top_p=None), made(samples="s", temperature=2.0)])
    assert (greedy.settings, sampled.settings) == ("greedy", "temperature 2")
    ordinary, mixture = run_labels(
        [made(samples="s", model_label="base", model_sha256="c" * 64), made(backend="peft_moe")]
    )
    assert (ordinary.model, mixture.model) == ("base", "demo")
    first, second = run_labels([made(), made(samples="s", backend="peft_moe", model_sha256="c" * 64)])
    assert (first.model, second.model) == ("demo (hf)", "demo (peft_moe)")


@pytest.mark.parametrize(
    ("name", "module", "variable"),
    [
        ("humaneval", humaneval, "HUMANEVAL_OVERRIDE_PATH"),
        ("mbpp", mbpp, "MBPP_OVERRIDE_PATH"),
    ],
)
def test_a_file_of_ones_own_does_not_have_the_benchmarks_name(
    name, module, variable, problems_file, tmp_path, monkeypatch
):
    path = tmp_path / "own tasks.jsonl"
    path.write_bytes(problems_file.read_bytes())
    monkeypatch.setattr(module, variable, str(path))
    data = load_benchmark(name)
    samples = f"{name}/own.jsonl"
    run = leave_run(tmp_path, samples=samples, benchmark=name, dataset_file=data.file, task_ids=data.task_ids)
    page = (write_report(run.folder)).read_text()
    assert "own problems (24), greedy" in page and "demo on own problems (24), one sample a task" in page
    assert "own file own tasks.jsonl, in the format of " in page
    assert page.count("HumanEval") + page.count("MBPP") == page.count("in the format of ") == 1
    with open(run.folder / "figures" / "scores.csv", newline="") as file:
        (row,) = list(csv.DictReader(file))
    assert row["benchmark"] == "own problems (24)"


def test_several_files_of_ones_own_are_told_apart():
    first = made(dataset_file="a.jsonl")
    others = [
        replace(first, samples="2", dataset_file="b.jsonl", dataset_hash="1" * 32),
        replace(first, samples="3", benchmark="mbpp", dataset_hash="2" * 32),
        replace(first, samples="4", task_ids=["HumanEval/1"], subset="tasks 1 to 1, 1 of 2"),
    ]
    assert [label.benchmark for label in run_labels([first, *others])] == [
        "own problems (2) (file a.jsonl, in the format of HumanEval)",
        "own problems (2) (file b.jsonl, in the format of HumanEval)",
        "own problems (2) (file a.jsonl, in the format of MBPP)",
        "own problems (1)",
    ]


class Captions(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.inside, self.found = False, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in ("caption", "summary"):
            self.inside = True
            self.found.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("caption", "summary")

    def handle_data(self, data):
        if self.inside:
            self.found[-1] += data


def leave_run(folder, **others) -> Run:
    run = made(folder / "results", **others)
    run.results = run.samples.removesuffix(".jsonl") + "_eval_results.json"
    run.samples_path.parent.mkdir(parents=True, exist_ok=True)
    run.samples_path.write_text("{}\n")
    verdicts = {task: [{"base_status": "pass", "plus_status": None}] * run.n_samples for task in run.task_ids}
    run.results_path.write_text(json.dumps({"eval": verdicts}))
    run.samples_sha256, run.results_sha256 = file_sha256(run.samples_path), file_sha256(run.results_path)
    write_run(run)
    return run


def test_a_report_of_greedy_and_sampled_whole_and_limited_runs_tells_them_apart(tmp_path):
    leave_run(tmp_path)
    leave_run(tmp_path, samples="humaneval/t2.jsonl", temperature=2.0)
    leave_run(
        tmp_path, samples="humaneval/part.jsonl", subset="tasks 0 to 0, 1 of 2", task_ids=["HumanEval/0"]
    )
    page = write_report(tmp_path / "results").read_text()
    captions = Captions(page).found
    assert len(captions) == 6 and len(set(captions[:3])) == len(set(captions[3:])) == 3
    assert "demo on HumanEval, 2 tasks, one sample a task, temperature 2" in captions
    assert "demo on HumanEval, tasks 0 to 0, 1 of 2, one sample a task, greedy" in captions
    with open(tmp_path / "results" / "figures" / "scores.csv", newline="") as file:
        rows = [tuple(row[:6]) for row in csv.reader(file)]
    assert len(set(rows)) == 4
    assert all(a != b for a, b in itertools.combinations([row[3:] for row in rows], 2))


def test_long_names_leave_the_scores_their_room(tmp_path):
    """What tells runs apart may be longer than a picture is wide."""
    file = "a data set of my own whose name says what is in it, and more than that, at some length.jsonl"
    for index in range(2):
        leave_run(
            tmp_path, samples=f"humaneval/{index}.jsonl", temperature=index, dataset_file=f"{index}{file}"
        )
    write_report(tmp_path / "results")
    content = read_folder(tmp_path / "results")
    with _style():
        figure = _figure(report_tables(content)["scores"])
        figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_window_extent().width >= 2.5 * figure.dpi
    assert all(label.get_window_extent().x0 >= 0 for label in axes.get_yticklabels())


def test_a_run_of_an_older_version_is_said_to_be_one():
    """It did not record the model's files, and hashed a mixture's config with the place of its foundation."""
    older, newer = (
        made(model_sha256="a" * 64),
        made(model_sha256="b" * 64, model_files={"config.json": "c" * 64}),
    )
    assert any("older version" in text for text in older.differences(newer))
    assert not any("older version" in text for text in older.differences(made(model_sha256="b" * 64)))
