"""The report's tables and pictures: each with its data beside it, and room for what is in it."""

import csv
import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from helpers_report import Page, leave_folder
from matplotlib.legend import Legend
from matplotlib.text import Text
from PIL import Image

from dylora_moe.eval.analysis.statistics import interval
from dylora_moe.eval.report import page as report
from dylora_moe.eval.report.content import read_folder
from dylora_moe.eval.report.figures import HEAT_COLUMNS, _figure, _overview, _style, caption, heat_span
from dylora_moe.eval.report.page import render, write_report
from dylora_moe.eval.report.report_table import ReportTable
from dylora_moe.eval.report.routed_code import RoutedCode, RoutedToken
from dylora_moe.eval.report.tables import report_tables, scores
from dylora_moe.eval.sampling.run_record import Run


pytestmark = pytest.mark.usefixtures("problems")


def test_every_picture_has_its_data_beside_it(made):
    figures = made / "figures"
    tables = report_tables(read_folder(made))
    names = {path.stem for path in figures.glob("*.png")}
    assert names == {*tables, "routed_code"}
    assert {path.name for path in figures.iterdir()} == {
        f"{n}.{end}" for n in names for end in ("png", "csv", "json")
    }
    for name, table in tables.items():
        with open(figures / f"{name}.csv", newline="") as file:
            read = list(csv.reader(file))
        assert read[0] == table.columns
        assert read[1:] == [["" if cell is None else str(cell) for cell in row] for row in table.rows]
        rows = json.loads((figures / f"{name}.json").read_text())["rows"]
        assert rows == [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    for path in [*figures.glob("*.png"), made / "overview.png"]:
        picture = np.asarray(Image.open(path).convert("L"))
        assert min(picture.shape) > 150 and 0.005 < (picture < 200).mean() < 0.9, path


def test_every_picture_says_what_it_is_of_and_what_the_router_is_worth(made):
    content = read_folder(made)
    figures = content.experts["tests"][content.experts["headline_tests"]]
    row = next(row for row in figures["comparisons"] if row["second"] == figures["best_single"]["strategy"])
    for path in [*(made / "figures").glob("*.png"), made / "overview.png"]:
        what, verdict = Image.open(path).text["Description"].splitlines()
        assert what.startswith("demo-mixture on HumanEval, ") and re.search(r"\b24 tasks\b", what), path
        assert verdict.startswith(
            f"▲ The router helps: {100 * row['difference']:+.1f} points against the best"
        )


def test_what_a_picture_says_of_itself_stands_below_its_drawing(made):
    content = read_folder(made)
    tables, text = report_tables(content), caption(content, "scores")
    with _style():
        for figure in (_figure(tables["scores"], text), _overview(tables, None, text)):
            figure.draw_without_rendering()
            found = [
                one for one in figure.findobj(Text) if one.get_text() and "router helps" in one.get_text()
            ]
            assert len(found) == 1
            boxes = [one.get_window_extent() for one in figure.findobj(Text) if one.get_text().strip()]
            boxes += [legend.get_window_extent() for legend in figure.findobj(Legend)]
            mine = found[0].get_window_extent()
            assert sum(mine.overlaps(box) for box in boxes) == 1  # itself
            assert mine.x0 >= 0 and mine.y0 >= 0 and mine.x1 <= figure.bbox.width


def test_the_rows_of_the_routers_strategies_are_bold_and_the_best_come_first(made):
    table = report_tables(read_folder(made))["scores"]
    scores = [(record["plus_pass@1"], record["pass@1"]) for record in table.records()]
    assert scores == sorted(scores, reverse=True)
    with _style():
        (axes,) = _figure(table).axes
        bold = {label.get_text() for label in axes.get_yticklabels() if label.get_fontweight() == "bold"}
    assert bold == {"router", "best"}


def test_shares_are_found_by_the_names_of_their_columns(made):
    tables = report_tables(read_folder(made))
    for name in HEAT_COLUMNS:
        start, end = heat_span(tables[name])
        columns = ["more", *tables[name].columns]
        assert heat_span(replace(tables[name], columns=columns)) == (start + 1, end + 1)
        assert all(0 <= share <= 1 for row in tables[name].rows for share in row[start:end])


def test_any_text_comes_back_from_csv(tmp_path):
    cells = ["\r", "a\rb", "\n", '",', "\x00\u2028", "\u202e", ""]
    ReportTable("t", "", ["token", "number"], [[cell, 1] for cell in cells]).write_csv(tmp_path / "t.csv")
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["token", *cells]


@pytest.mark.slow
def test_pictures_are_the_same_for_the_same_data(made, folder):
    write_report(folder)
    for path in sorted((made / "figures").iterdir()):
        assert (folder / "figures" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_picture_shows_the_beginning_of_a_long_text():
    def picture(text):
        pieces = [piece for piece in re.split(r"(\W)", text) if piece]
        return RoutedCode("t", [RoutedToken(piece, 0, 1.0, 1.0, False, 1.0) for piece in pieces], ["e"], "")

    def shown(code):
        return ["".join(token.text for token in line) for line in code.lines()]

    short = picture("a = 1\n\nb = 2\n")
    assert shown(short) == ["a = 1\n", "\n", "b = 2\n"] and not short.is_cut
    wide = picture("x" * 250 + " y\nz")
    assert shown(wide) == ["x" * 110, "x" * 110, "x" * 30 + " y\n", "z"] and not wide.is_cut
    for text in ("x\n" * 3000, "word " * 20000, "x" * 100_000):
        code = picture(text)
        assert code.is_cut and len(code.lines()) == 48
        assert text.startswith("".join(shown(code))) and max(map(len, shown(code))) <= 110


@pytest.mark.slow
def test_pictures_of_a_large_dense_mixture(folder, tmp_path):
    """More experts than colours, more tasks than labels: every picture still has room for what is in it."""
    experts = tuple(f"expert_number_{index}" for index in range(32))
    folder = leave_folder(tmp_path / "large", experts=experts, mode="dense")
    content = read_folder(folder)
    routing = content.routing
    routing["tasks"] = [
        {**task, "task_id": f"{task['task_id']}.{n}"} for n in range(4) for task in routing["tasks"]
    ]
    tables = report_tables(content)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "constrained_layout not applied")
        written = report.write_figures(content, tables)
    assert (folder / "figures" / "routing_tasks.png") in written
    page = Page(render(content, tables))
    assert page.data["routing"]["shows_gate"] is False and len(page.data["routing"]["experts"]) == 32


def test_intervals_of_pass_at_10_are_of_evalplus_estimates(tmp_path):
    counts = [0, 3, 10, 12, 20]
    run = Run(
        folder=tmp_path, samples="humaneval/x.jsonl", model="m", model_label="m", benchmark="humaneval", dataset_hash="",
        task_ids=[f"HumanEval/{n}" for n in range(5)], n_samples=20, temperature=0.8, max_new_tokens=9, dtype="float32",
        results="humaneval/x_eval_results.json", scores={"pass@1": 0.45, "pass@10": 0.75},
    )  # fmt: skip
    statuses = {
        task: [{"base_status": "pass" if n < count else "fail", "plus_status": None} for n in range(20)]
        for task, count in zip(run.task_ids, counts, strict=True)
    }
    run.results_path.parent.mkdir()
    run.results_path.write_text(json.dumps({"eval": statuses}))
    (record,) = scores([run]).records()

    def missing(count):  # the chance that none of 10 drawn from 20 is among the `count` that pass
        chance = 1.0
        for drawn in range(10):
            chance *= max(0, 20 - count - drawn) / (20 - drawn)
        return chance

    expected = interval([1 - missing(count) for count in counts])
    assert (record["pass@10 low"], record["pass@10 high"]) == pytest.approx(expected)
    assert (record["pass@1 low"], record["pass@1 high"]) == pytest.approx(interval([c / 20 for c in counts]))
    assert "plus_pass@1" not in record
