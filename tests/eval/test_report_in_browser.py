"""The report opened from disk in Chromium: nothing is fetched, nothing complains, filters and panels do what
they say."""

import json
import re

import pytest
from evalplus.data import humaneval
from helpers_browser import CHROMIUM, Browser
from helpers_report import leave_folder
from PIL import Image

from dylora_moe.eval.report.content import read_folder
from dylora_moe.eval.report.page import render
from dylora_moe.eval.report.tables import report_tables


pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"
)

ATTACK = "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">"

TURNED = "x = 1 # \u202e turned around \u2066 and more\n"


def write_page(folder, **arguments):
    leave_folder(folder, **arguments)
    content = read_folder(folder)
    (folder / "report.html").write_text(render(content, report_tables(content)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, problems_file):
    before = humaneval.HUMANEVAL_OVERRIDE_PATH
    humaneval.HUMANEVAL_OVERRIDE_PATH = str(problems_file)
    hostile = {"HumanEval/2": ATTACK, "HumanEval/5": TURNED}
    yield write_page(tmp_path_factory.mktemp("page"), completions=hostile)
    humaneval.HUMANEVAL_OVERRIDE_PATH = before


@pytest.fixture(scope="module")
def tasks(folder):
    """What the page should know of every task."""
    return read_folder(folder).routing["tasks"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory, folder):
    with Browser(tmp_path_factory.mktemp("profile") / "chromium") as browser:
        yield browser


@pytest.fixture
def page(browser, folder):
    browser.emulate(prefers_color_scheme="light")
    browser.open(folder / "report.html")
    yield browser
    assert browser.complaints() == []
    assert browser.requests() == [(folder / "report.html").as_uri()]
    assert browser.evaluate("document.title") == "demo-mixture"


def shown(page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('#task-rows tr')].map((row) => row.dataset.task)")


def choose(page, control: str, value: str) -> None:
    event = "input" if control == "search" else "change"
    page.evaluate(
        f"(() => {{ const control = document.getElementById('filter-{control}'); control.value = {json.dumps(value)};"
        f" control.dispatchEvent(new Event('{event}', {{ bubbles: true }})); }})()"
    )


def click(page, selector: str) -> None:
    page.evaluate(f"document.querySelector({json.dumps(selector)}).click()")


def text(page, selector: str) -> str:
    return page.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


def test_every_task_is_in_the_heatmap_with_its_weights_and_verdicts(page, tasks):
    assert shown(page) == [task["task_id"] for task in tasks]
    cells = page.evaluate(
        "[...document.querySelectorAll('#task-rows tr')].map((row) =>"
        " [...row.querySelectorAll('td[data-tip]')].map((cell) => [cell.textContent, cell.dataset.tip, cell.className]))"
    )
    for row, task in zip(cells, tasks, strict=True):
        for (words, tip, look), share, alone in zip(
            row, task["expert_shares"], task["experts_passed"], strict=True
        ):
            assert words.endswith("%✓" if alone else "%")
            assert abs(float(words.rstrip("%✓")) - 100 * share) < 0.51
            assert (
                abs(float(re.search(r"mean weight ([\d.]+)%", tip)[1]) - 100 * share) < 0.06
            )  # rounded twice
            assert f"alone: {'solves it' if alone else 'fails'}" in tip
            assert f"router: {'solves it' if task['passed'] else 'fails'}" in tip
            assert abs(int(re.search(r"heat-(\d+)", look)[1]) - 20 * share) < 0.51


def test_filters_leave_the_tasks_that_fit(page, tasks):
    def expect(condition):
        expected = [task["task_id"] for task in tasks if condition(task)]
        assert shown(page) == expected
        assert text(page, "#count") == f"{len(expected)} of 24 tasks"
        return expected

    categories = [row["category"] for row in read_categories(page)]
    choose(page, "category", str(categories.index("lists")))
    assert 0 < len(expect(lambda task: "lists" in task["categories"])) < 24
    choose(page, "expert", "2")
    expect(lambda task: "lists" in task["categories"] and task["chosen"] == 2)
    choose(page, "category", "")
    assert expect(lambda task: task["chosen"] == 2)
    choose(page, "expert", "")
    choose(page, "verdict", "failed")
    assert expect(lambda task: not task["passed"])
    choose(page, "verdict", "missed")
    expect(lambda task: not task["passed"] and max(task["experts_passed"]) > 0)
    choose(page, "verdict", "rescued")
    expect(lambda task: task["passed"] and not max(task["experts_passed"]))
    choose(page, "verdict", "misled")
    expect(lambda task: task["experts_passed"][task["chosen"]] < max(task["experts_passed"]))
    choose(page, "verdict", "")
    choose(page, "search", "eval/1")
    expect(lambda task: "Eval/1" in task["task_id"])
    click(page, "#reset")
    expect(lambda task: True)
    choose(page, "order", "unsure")
    assert shown(page) == [
        task["task_id"] for task in sorted(tasks, key=lambda task: round(task["gate_confidence"], 4))
    ]


def read_categories(page) -> list[dict]:
    names = page.evaluate(
        "[...document.querySelectorAll('#filter-category option')].slice(1).map((o) => o.textContent)"
    )
    return [{"category": name} for name in names]


def test_a_category_of_the_heatmap_leads_to_its_tasks(page, tasks):
    click(page, "#routing_categories a[data-category='strings']")
    assert shown(page) == [task["task_id"] for task in tasks if "strings" in task["categories"]]
    click(page, "#expert_categories a[data-category='numbers']")
    assert shown(page) == [task["task_id"] for task in tasks if "numbers" in task["categories"]]


def open_task(page, task_id: str) -> None:
    click(page, f"#task-rows tr[data-task='{task_id}'] a")
    assert text(page, "#panel h3") == task_id


def lines_of(folder) -> dict[str, dict]:
    lines = [json.loads(line) for line in (folder / "routing_tasks.jsonl").read_text().splitlines()]
    return {line["task_id"]: line for line in lines}


def test_the_panel_shows_every_token_with_its_expert(page, folder):
    for task_id in ("HumanEval/0", "HumanEval/2", "HumanEval/13"):
        open_task(page, task_id)
        line = lines_of(folder)[task_id]
        tokens = page.evaluate(
            "[...document.querySelectorAll('#panel .token')].map((token) => [token.textContent.replaceAll('↵', ''),"
            " Number(token.dataset.expert), token.classList.contains('in-prompt'), token.dataset.tip])"
        )
        leading = [max(range(3), key=weights.__getitem__) for weights in line["weights"]]
        assert [token[0] for token in tokens] == line["tokens"]
        assert [token[1] for token in tokens] == leading
        assert [token[2] for token in tokens] == [
            place < line["num_prompt_tokens"] for place in range(len(tokens))
        ]
        for place, (_, expert, _, tip) in enumerate(tokens):
            gate = line["gate_probabilities"][place][expert]
            assert f"expert {expert} " in tip and f"gate's probability {round(100 * gate)}%" in tip
        assert text(page, "#panel .boundary") == "prompt above, completion below"
        followed = page.evaluate("document.querySelector('#panel .boundary').nextElementSibling.dataset.tip")
        assert f"token {line['num_prompt_tokens']} (completion)" in followed


def test_numbers_stand_where_the_expert_changes_and_colours_differ(page, folder):
    open_task(page, "HumanEval/12")
    found = page.evaluate(
        "[...document.querySelectorAll('#panel .token')].map((token) => [Number(token.dataset.expert),"
        " token.dataset.switch ?? null, getComputedStyle(token).getPropertyValue('--expert'),"
        " getComputedStyle(token).textDecorationStyle])"
    )
    boundary = lines_of(folder)["HumanEval/12"]["num_prompt_tokens"]
    for place, (expert, number, _, _) in enumerate(found):
        changes = place in (0, boundary) or found[place - 1][0] != expert
        assert number == (str(expert) if changes else None)
    looks = {(expert, color, line) for expert, _, color, line in found}
    assert len(looks) == len({color for _, color, _ in looks}) == len({line for _, _, line in looks}) == 3


def test_text_that_turns_the_line_around_turns_nothing(page):
    open_task(page, "HumanEval/5")
    found = page.evaluate(
        "[...document.querySelectorAll('#panel .token:not(.in-prompt)')].map((token) => [token.textContent,"
        " token.getBoundingClientRect().left, token.dataset.tip])"
    )
    places = [place for _, place, _ in found[:-1]]
    assert len(places) > 10 and places == sorted(places)
    (tip,) = [tip for words, _, tip in found if words == "\u202e"]
    assert tip.startswith('"\\u202e", token ')


def test_an_expert_of_the_legend_is_brought_out(page):
    open_task(page, "HumanEval/12")
    click(page, "#panel .legend li:nth-child(2) button")
    lit = page.evaluate(
        "[...new Set([...document.querySelectorAll('#panel .token.lit')].map((t) => t.dataset.expert))]"
    )
    assert lit == ["1"] and page.evaluate("document.querySelector('#panel pre').classList.contains('dim')")
    click(page, "#panel .legend li:nth-child(2) button")
    assert page.evaluate("document.querySelectorAll('#panel .lit, #panel .dim').length") == 0


def test_keys_alone_are_enough(page):
    page.evaluate("document.querySelector('#task-rows td[data-tip]').focus()")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft"):
        page.press(key)
    assert page.evaluate("document.activeElement.parentElement.dataset.task") == "HumanEval/2"
    assert page.evaluate("document.querySelectorAll('#task-rows td[tabindex=\"0\"]').length") == 1
    assert page.evaluate("document.getElementById('tip').hidden") is False
    assert text(page, "#tip").startswith("HumanEval/2, expert 0 strings")
    page.press("Enter")
    assert text(page, "#panel h3") == "HumanEval/2"
    page.press("Escape")
    assert page.evaluate("document.getElementById('tip').hidden")
    click(page, "#panel header div button:last-child")
    assert text(page, "#panel h3") == "HumanEval/3"


def test_the_pointer_shows_the_tip(page):
    box = page.evaluate(
        "(() => { const cell = document.querySelector('#task-rows td[data-tip]'); cell.scrollIntoView({block: 'center',"
        " behavior: 'instant'}); const box = cell.getBoundingClientRect(); return [box.x + 5, box.y + 5]; })()"
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert text(page, "#tip").startswith("HumanEval/0, expert 0 strings\nmean weight")
    inside = page.evaluate(
        "(() => { const box = document.getElementById('tip').getBoundingClientRect();"
        " return box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.bottom <= innerHeight; })()"
    )
    assert inside


def brightness(page, tmp_path, name: str) -> float:
    page.screenshot(tmp_path / f"{name}.png")
    picture = Image.open(tmp_path / f"{name}.png").convert("L").resize((1, 1))
    return picture.getpixel((0, 0))


def test_light_and_dark_are_the_systems_until_somebody_chooses(page, tmp_path):
    assert brightness(page, tmp_path, "light") > 200
    page.emulate(prefers_color_scheme="dark")
    assert brightness(page, tmp_path, "dark") < 60
    click(page, "#theme")
    assert brightness(page, tmp_path, "chosen") > 200


def test_a_narrow_window_scrolls_in_one_direction(page):
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=False)
    width = page.evaluate("document.documentElement.scrollWidth")
    page.call("Emulation.clearDeviceMetricsOverride")
    assert width <= 390


def test_many_rows_come_by_and_by(page, browser, folder, tmp_path):
    content = read_folder(folder)
    tasks = content.routing["tasks"]
    content.routing["tasks"] = [
        {**task, "task_id": f"{task['task_id']}.{n}"} for n in range(20) for task in tasks
    ]
    content.routing["num_tasks"] = len(content.routing["tasks"])
    (tmp_path / "many.html").write_text(render(content, report_tables(content)), encoding="utf-8")
    browser.open(tmp_path / "many.html")
    assert text(page, "#count") == "480 of 480 tasks" and len(shown(page)) == 200
    click(page, "#more")
    assert len(shown(page)) == 400
    click(page, "#more")
    assert len(shown(page)) == 480 and page.evaluate("document.getElementById('more').hidden")
    assert "The page holds the tokens of the first 24 of 480 tasks" in text(page, "#panel")
    assert browser.complaints() == []
    browser.open(folder / "report.html")
