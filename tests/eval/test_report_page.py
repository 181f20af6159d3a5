"""The report's page: what is on it is what is in the folder, and nothing in the data can act on it."""

import base64
import hashlib
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers_report import EXPERTS, Page, leave_folder, rendered
from PIL import Image

from dylora_moe.eval.analysis.statistics import interval
from dylora_moe.eval.report import page as report
from dylora_moe.eval.report.content import read_folder
from dylora_moe.eval.report.page import render, write_report
from dylora_moe.eval.report.tables import report_tables
from dylora_moe.eval.sampling.run_record import file_sha256, read_runs


pytestmark = pytest.mark.usefixtures("problems")


ATTACKS = [
    "</script><script>document.title = 'broken'</script>",
    "<!--<script>",
    "]]></script >",
    "<img src=x onerror=\"document.title='broken'\">",
    "{{ 7 * 7 }} {% raw %}",
    "\u2028\u2029\ud800 \x00 \x1b[31m é 世界 🎉",
    "$\\frac{1}{0$ _^ \\",
]


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
        if tag == "tfoot":  # the scale
            self.inside = False
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
    """On a scale that ends at the tenth above the largest weight, and whose end is said."""
    page = (made / "report.html").read_text(encoding="utf-8")
    (_, *rows) = Bars(page, "routing_load").rows
    weights = [row[2] for row in report_tables(read_folder(made))["routing_load"].rows]
    end = next(tenth / 10 for tenth in range(1, 11) if tenth / 10 >= max(weights))
    for texts, ((start, length),), (even,) in rows:
        assert start == 0 and f"{end * length / 140:.1%}" == texts[2]
        assert even == pytest.approx(140 / len(rows) / end)
    table = page.split('id="routing_load"')[1].split("</table>")[0]
    assert re.findall(r">(\d+%)<", table.split("<tfoot>")[1]) == ["0%", f"{end:.0%}"]


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


def test_the_record_says_how_it_was_run(made, page):
    assert len(page.all("details")) == len(read_runs(made)) == 8
    assert file_sha256(read_runs(made)[0].samples_path) in page.text
