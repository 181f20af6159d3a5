"""The report: what is on the page is what is in the folder, nothing in the data can act on it, and colours
can be told apart."""

import base64
import csv
import hashlib
import itertools
import json
import re
import shutil
import tomllib
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evalplus.data import humaneval
from helpers_report import EXPERTS, leave_folder
from PIL import Image

from dylora_moe.eval.analysis.statistics import interval
from dylora_moe.eval.report import page as report
from dylora_moe.eval.report import palette
from dylora_moe.eval.report.content import read_folder
from dylora_moe.eval.report.page import render, write_report
from dylora_moe.eval.report.report_table import ReportTable
from dylora_moe.eval.report.routed_code import RoutedCode, RoutedToken
from dylora_moe.eval.report.tables import report_tables, scores
from dylora_moe.eval.sampling.run_record import Run, file_sha256, read_runs, write_run
from dylora_moe.hub_export.errors import InputError


ATTACKS = [
    "</script><script>document.title = 'broken'</script>",
    "<!--<script>",
    "]]></script >",
    "<img src=x onerror=\"document.title='broken'\">",
    "{{ 7 * 7 }} {% raw %}",
    "\u2028\u2029\ud800 \x00 \x1b[31m é 世界 🎉",
    "$\\frac{1}{0$ _^ \\",
]


class Page(HTMLParser):
    """A page's elements, with the text of its scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.raw: list[tuple[str, dict, str]] = []
        self.text = ""
        self._inside = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = (tag, dict(attributes)) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.raw.append((*self._inside, data))
        else:
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict:
        (text,) = [text for tag, attributes, text in self.raw if attributes.get("id") == "data"]
        return json.loads(text)


@pytest.fixture(scope="module", autouse=True)
def dataset(problems_file):
    before = humaneval.HUMANEVAL_OVERRIDE_PATH
    humaneval.HUMANEVAL_OVERRIDE_PATH = str(problems_file)
    yield
    humaneval.HUMANEVAL_OVERRIDE_PATH = before


@pytest.fixture(scope="module")
def made(tmp_path_factory, dataset):
    """A folder with everything in it, and its report."""
    folder = leave_folder(tmp_path_factory.mktemp("report"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(made):
    return Page((made / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def folder(made, tmp_path):
    """A copy, without what the report wrote."""
    copy = shutil.copytree(
        made, tmp_path / "copy", ignore=shutil.ignore_patterns("figures", "report.html", "*.png")
    )
    return copy


def rendered(folder, **options) -> Page:
    content = read_folder(folder)
    return Page(render(content, report_tables(content), **options))


def test_the_page_is_one_file_whose_policy_allows_its_own_script_and_style_alone(page):
    (policy,) = [
        meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for tag in ("script", "style"):
        (text,) = [
            text for name, attributes, text in page.raw if name == tag and attributes.get("id") != "data"
        ]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "style", "action", "data", "background"} & set(attributes), (
            tag,
            attributes,
        )
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert len(page.all("script")) == 2
    assert not re.search(
        r"url\(|@import|https?:", "".join(text for tag, _, text in page.raw if tag == "style")
    )


def test_what_the_page_is_made_of_is_part_of_the_package():
    root = Path(__file__).parents[2]
    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    listed = pyproject["tool"]["setuptools"]["package-data"]["dylora_moe.eval.report"]
    folder = root / "eval" / "report"
    others = {path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert set(listed) == others == {report.TEMPLATE, report.STYLE, report.SCRIPT}


def test_tables_have_headings_and_controls_have_labels(page):
    assert page.all("html")[0]["lang"] == "en"
    for cell in page.all("th"):
        assert cell["scope"] in ("col", "row")
    assert all("aria-label" in svg or svg.get("aria-hidden") == "true" for svg in page.all("svg"))
    assert all(label.get("aria-label") or label.get("aria-labelledby") for label in page.all("section"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert link["href"][1:] in ids


class Bars(HTMLParser):
    """The rows of a table: the texts of their cells, and start, length and marks of the bars in them."""

    def __init__(self, text: str, table: str):
        super().__init__()
        self.table, self.inside, self.rows = table, False, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "table":
            self.inside = attributes.get("id") == self.table
        if self.inside and tag == "tr":
            self.rows.append(([], [], []))
        if self.inside and tag == "rect":
            self.rows[-1][1].append((float(attributes["x"]), float(attributes["width"])))
        if self.inside and tag == "line":
            self.rows[-1][2].append(float(attributes["x1"]))

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "table"

    def handle_data(self, data):
        if self.inside and data.strip():
            self.rows[-1][0].append(data.strip())


@pytest.mark.parametrize("share", [0.5, -1.25, 2.0])
def test_the_bar_beside_a_share_of_the_gain_is_as_long_as_the_share(folder, share):
    experts = json.loads((folder / "expert_analysis.json").read_text())
    experts["tests"]["plus"]["possible_gain"]["reached"][0]["share"] = share
    (folder / "expert_analysis.json").write_text(json.dumps(experts))
    content = read_folder(folder)
    tables = report_tables(content)
    (_, *rows) = Bars(render(content, tables), "possible_gain").rows
    shares = [row[2] for row in tables["possible_gain"].rows]
    assert share in shares
    scale = 140 / (max(*shares, 1) - min(*shares, 0))
    for expected, (texts, bars, (zero, one)) in zip(shares, rows, strict=True):
        ((start, length),) = bars
        assert texts[2] == f"{expected:.0%}"
        assert one - zero == pytest.approx(scale) and length == pytest.approx(abs(expected) * scale)
        assert start == pytest.approx(zero if expected >= 0 else zero - length)
        assert start >= -1e-6 and start + length <= 140 + 1e-6


def test_where_no_share_is_defined_there_is_no_bar(folder):
    experts = json.loads((folder / "expert_analysis.json").read_text())
    gain = experts["tests"]["plus"]["possible_gain"]
    gain["note"] = "no share is defined"
    for row in gain["reached"]:
        row["share"] = None
    (folder / "expert_analysis.json").write_text(json.dumps(experts))
    content = read_folder(folder)
    (_, *rows) = Bars(render(content, report_tables(content)), "possible_gain").rows
    assert rows and not any(bars for _, bars, _ in rows)


def test_the_bar_beside_an_experts_weight_is_as_long_as_the_weight(made):
    (_, *rows) = Bars((made / "report.html").read_text(encoding="utf-8"), "routing_load").rows
    for texts, ((start, length),), _ in rows:
        assert start == 0 and f"{length / 140:.1%}" == texts[2]


def test_scores_and_verdict_are_on_the_page(made, page):
    for run in read_runs(made):
        assert f"{run.scores['pass@1']:.1%}" in page.text
    low, high = interval([result["base_status"] == "pass" for result in first_results(made)])
    assert f"{low:.1%} to {high:.1%}" in page.text
    verdict = json.loads((made / "expert_analysis.json").read_text())["verdict"]
    assert verdict["text"] in page.text and verdict["router"] == "helps"
    assert "The router helps" in page.text and "▲" in page.text


def first_results(folder):
    tasks = json.loads(read_runs(folder)[0].results_path.read_text())["eval"]
    return [samples[0] for samples in tasks.values()]


def test_the_pages_data_are_those_of_the_files(made, page):
    data, routing = page.data["routing"], json.loads((made / "routing_analysis.json").read_text())
    assert data["experts"] == list(EXPERTS) and data["cut_note"] == ""
    assert len(data["tasks"]) == len(data["panels"]) == 24
    for shown, task in zip(data["tasks"], routing["tasks"], strict=True):
        assert shown["id"] == task["task_id"] and shown["chosen"] == task["chosen"]
        assert shown["shares"] == pytest.approx(task["expert_shares"], abs=1e-4)
        assert [data["categories"][index] for index in shown["categories"]] == task["categories"]
    for line in map(json.loads, (made / "routing_tasks.jsonl").read_text().splitlines()):
        panel = data["panels"][line["task_id"]]
        assert panel["texts"] == line["tokens"] and panel["num_prompt_tokens"] == line["num_prompt_tokens"]
        leading = [max(range(3), key=weights.__getitem__) for weights in line["weights"]]
        assert panel["experts"] == leading
        gate = [
            round(100 * row[expert]) for row, expert in zip(line["gate_probabilities"], leading, strict=True)
        ]
        assert panel["gate"] == gate and panel["weights"] == [100] * len(leading)


def test_results_that_came_after_the_routing_analysis_are_joined_in(made, page):
    """The routing was traced before anything was scored, and says so itself."""
    written = json.loads((made / "routing_analysis.json").read_text())
    assert written["tests"] is None and written["agreement"] is None
    plus = {
        run.routing_strategy: [
            float(samples[0]["base_status"] == samples[0]["plus_status"] == "pass")
            for samples in json.loads(run.results_path.read_text())["eval"].values()
        ]
        for run in read_runs(made)
    }
    tasks = page.data["routing"]["tasks"]
    assert page.data["routing"]["tests"] == "plus"
    assert [task["passed"] for task in tasks] == plus["router"]
    for index in range(3):
        assert [task["experts_passed"][index] for task in tasks] == plus[f"single:{index}"]
    agreement = read_folder(made).routing["agreement"]
    matters = [task for task in tasks if len(set(task["experts_passed"])) > 1]
    solved = sum(task["experts_passed"][task["chosen"]] for task in matters)
    assert agreement["num_tasks"] == len(matters) and agreement["chosen"] == solved / len(matters)
    assert f"{agreement['chosen']:.1%}" in page.text


def test_nothing_in_the_data_can_break_out(tmp_path):
    names = ("</script>", '"><svg onload=alert(1)>', "{{ 7*7 }}$x")
    tasks = {f"HumanEval/{number}": attack for number, attack in enumerate(ATTACKS)}
    label = '"><script>alert(1)<!--'
    folder = leave_folder(tmp_path, experts=names, completions=tasks, label=label, limit=8)
    write_report(folder)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("script")) == 2 and not page.all("img")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    data = page.data["routing"]
    assert data["experts"] == list(names)
    for task_id, attack in tasks.items():
        tokens = data["panels"][task_id]
        completion = "".join(tokens["texts"][tokens["num_prompt_tokens"] :])
        assert completion == attack.replace("\ud800", "?")
    assert label in page.text and "49" not in page.data["routing"]["experts"]
    assert all(Image.open(path).size for path in (folder / "figures").glob("*.png"))


def test_embedded_json_holds_no_markup():
    text = report.embedded({"<a>": "</script><!-- & \u2028"})
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == {"<a>": "</script><!-- & \u2028"}
    with pytest.raises(ValueError):
        report.embedded(float("nan"))


def test_a_large_set_has_panels_for_its_first_tasks_and_says_so(folder):
    page = rendered(folder, most=9000)
    panels = page.data["routing"]["panels"]
    assert 2 < len(panels) < 24 and list(panels) == [f"HumanEval/{number}" for number in range(len(panels))]
    assert len(page.data["routing"]["tasks"]) == 24
    sentence = f"The page holds the tokens of the first {len(panels)} of 24 tasks"
    assert sentence in page.text and page.data["routing"]["cut_note"].startswith(sentence)
    assert not any(attributes.get("id") == "cut-note" for _, attributes in rendered(folder).elements)


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


# Machado, Oliveira and Fernandes, IEEE Transactions on Visualization and Computer Graphics 15 (2009),
# severity 1.0.
COLOR_VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(channels) -> np.ndarray:
    values = np.asarray(channels) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(channels, vision: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* of an sRGB colour as it is seen."""
    xyz = TO_XYZ @ (vision @ linear(channels)).clip(0, 1) / [0.95047, 1.0, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def over(color: str, theme: str, strength: float = 1.0) -> np.ndarray:
    opacity = palette.STRONGEST[theme] * strength
    page = np.array(palette.channels(palette.PAGE[theme]))
    return opacity * np.array(palette.channels(color)) + (1 - opacity) * page


@pytest.mark.parametrize("vision", COLOR_VISION)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_experts_are_told_apart_by_the_colour_blind(theme, vision):
    """A difference of 2.3 is just noticeable. Lines and labels have the full colour, the ground of text has
    less."""
    colors = palette.expert_colors(theme)
    for first, second in itertools.combinations(colors, 2):
        seen = [lab(palette.channels(color), COLOR_VISION[vision]) for color in (first, second)]
        assert np.linalg.norm(seen[0] - seen[1]) > 15, (first, second)
        ground = [lab(over(color, theme), COLOR_VISION[vision]) for color in (first, second)]
        assert np.linalg.norm(ground[0] - ground[1]) > 6, (first, second)


def test_colour_is_never_alone():
    looks = {(palette.expert_color(index), palette.underline(index)) for index in range(40)}
    assert len(looks) == 40
    assert (
        len({palette.underline(index) for index in range(5)})
        == len({palette.hatch(index) for index in range(5)})
        == 5
    )


def contrast(first, second) -> float:
    """WCAG 2's contrast ratio."""
    bright, dark = sorted((float(TO_XYZ[1] @ linear(color)) for color in (first, second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible_on_every_ground(theme):
    ink = palette.channels(palette.INK[theme])
    for color in [*palette.expert_colors(theme), palette.SCALE[theme]]:
        for strength in np.linspace(0, 1, 11):
            assert contrast(ink, over(color, theme, strength)) > 4.5, (color, strength)
    page = palette.channels(palette.PAGE[theme])
    for name in ("muted", "accent", "good", "bad"):
        assert contrast(palette.channels(report.THEMES[theme][name]), page) > 4.5, name


def test_the_record_says_how_it_was_run(made, page):
    assert len(page.all("details")) == len(read_runs(made)) == 8
    assert file_sha256(read_runs(made)[0].samples_path) in page.text
