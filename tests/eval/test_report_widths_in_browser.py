"""The report of few and of many experts in Chromium: on a screen, on a phone, on paper, and for everyone's eyes."""

import pytest
from evalplus.data import humaneval
from helpers_browser import CHROMIUM, Browser
from helpers_report import EXPERTS, leave_folder

from dylora_moe.eval.report.content import read_folder
from dylora_moe.eval.report.page import render
from dylora_moe.eval.report.tables import report_tables


pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"
)
LOOKS = {"light": (1400, "light"), "dark": (1400, "dark"), "phone": (390, "light")}
PAPER = 1032  # pixels between the margins of A4, landscape


@pytest.fixture(scope="module")
def pages(tmp_path_factory, problems_file):
    """The path of a page by its number of experts."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", str(problems_file))
        for count in (3, 8, 32):
            names = EXPERTS if count == 3 else tuple(f"{EXPERTS[n % 3]}_of_kind_{n}" for n in range(count))
            folder = tmp_path_factory.mktemp(f"experts{count}")
            mode = "dense" if count == 8 else "sparse"
            content = read_folder(leave_folder(folder, experts=names, mode=mode))
            made[count] = folder / "report.html"
            made[count].write_text(render(content, report_tables(content)), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile") / "chromium") as browser:
        yield browser


@pytest.fixture
def page(browser):
    yield browser
    assert browser.complaints() == []
    browser.emulate()
    browser.resize(0)


def shown(page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('#task-rows tr')].map((row) => row.dataset.task)")


def panel(page) -> str:
    return page.evaluate(
        "document.querySelector('#panel h3')?.textContent ?? document.getElementById('panel').textContent"
    )


def set_filter(page, name: str, value: str) -> None:
    page.evaluate(
        f"(() => {{ const control = document.getElementById('filter-{name}'); control.value = '{value}';"
        " control.dispatchEvent(new Event(control.type === 'search' ? 'input' : 'change')); })()"
    )


@pytest.mark.parametrize("experts", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (8, 32))])
def test_axe_finds_nothing_wrong(page, pages, experts, tmp_path):
    """The screenshots that it leaves are for eyes: `--basetemp DIR` says where."""
    for look, (width, scheme) in LOOKS.items():
        page.resize(width)
        page.emulate(prefers_color_scheme=scheme)
        page.open(pages[experts])
        assert page.violations() == [], look
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(tmp_path / f"{experts} experts, {look}.png", whole=True)


# Of a table in a box that scrolls: how far its columns are from the box's edges.
EDGES = """(() => { const table = document.querySelector('%s'), box = table.closest('.scroll, .list');
  box.scrollLeft = %d; const row = table.tBodies[0].rows[1], outer = box.getBoundingClientRect();
  const router = row.cells[[...table.tHead.rows[0].cells].findIndex((cell) => cell.matches('.router'))];
  const inner = router.getBoundingClientRect(), first = row.cells[0].getBoundingClientRect();
  const above = document.elementFromPoint(inner.left + 8, inner.top + 8);
  return { wide: box.scrollWidth > box.clientWidth, hint: [...document.querySelectorAll('.hint')].filter((hint) =>
    hint.compareDocumentPosition(box) & 4).at(-1).offsetParent !== null, left: Math.round(first.left - outer.left),
    right: Math.round(outer.right - inner.right), covered: above !== null && above.closest('td') !== router }; })()"""


@pytest.mark.parametrize(("experts", "width"), [(8, 390), (32, 390), (32, 1400)])
@pytest.mark.parametrize("table", ["#expert_categories", ".list table"])
def test_the_first_column_and_the_verdicts_stay_in_view(page, pages, experts, width, table):
    page.resize(width)
    page.open(pages[experts])
    others = 128 if width == 1400 and table == "#expert_categories" else 0  # `best` and `oracle` stay, too
    for scrolled in (0, 150):
        page.evaluate(f"document.querySelector('{table}').scrollIntoView({{ behavior: 'instant' }})")
        found = page.evaluate(EDGES % (table, scrolled))
        assert found["wide"] and found["hint"] and not found["covered"]
        assert abs(found["left"]) <= 1 and abs(found["right"] - others) <= 2, (scrolled, found)


def test_what_fits_does_not_say_that_it_scrolls(page, pages):
    page.open(pages[3])
    assert page.evaluate("[...document.querySelectorAll('.hint')].every((hint) => hint.hidden)")
    assert page.evaluate("document.querySelectorAll('.scroll[tabindex]').length") == 0


def test_pictures_in_tables_keep_their_width_on_a_phone(page, pages):
    page.resize(390)
    page.open(pages[8])
    widths = page.evaluate(
        "[...document.querySelectorAll('td svg')].map((svg) => svg.getBoundingClientRect().width)"
    )
    assert len(widths) > 30 and min(widths) >= 140


def test_there_is_a_scale_under_every_column_of_intervals(page, pages):
    page.open(pages[3])
    for table in page.evaluate(
        "[...document.querySelectorAll('table')].filter((table) => table.querySelector('tbody .range')).map((table) =>"
        " [...table.tBodies[0].rows[0].querySelectorAll('svg')].filter((svg) => svg.querySelector('.range')).map((svg) =>"
        " { const cell = svg.closest('td'), scale = table.tFoot.rows[0].querySelectorAll('svg')[[...cell.parentElement."
        "querySelectorAll('svg')].indexOf(svg)]; return [scale.textContent.trim().split(/\\s+/).join(' '), svg."
        "getBoundingClientRect().left - scale.getBoundingClientRect().left]; }))"
    ):
        for words, shift in table:
            assert words in ("0% 50% 100%", "-100 0 +100") and abs(shift) < 0.5


def test_the_best_come_first_and_the_routers_strategies_are_marked(page, pages):
    page.open(pages[8])
    rows = page.evaluate(
        "[...document.querySelectorAll('table.scores tbody tr')].map((row) =>"
        " [row.cells[0].textContent, parseFloat(row.cells[3].textContent), row.className])"
    )
    scores = [score for _, score, _ in rows]
    assert len(rows) == 13 and scores == sorted(scores, reverse=True)
    assert [name for name, _, mark in rows if mark == "marked"] == ["router", "best"]


def test_the_chosen_row_keeps_its_shades(page, pages):
    page.open(pages[3])
    shades = (
        "[...document.querySelectorAll('#task-rows tr:nth-child(4) td.shade')].map((cell) =>"
        " getComputedStyle(cell).backgroundColor)"
    )
    before = page.evaluate(shades)
    page.evaluate("document.querySelector('#task-rows tr:nth-child(4) td.shade').click()")
    assert page.evaluate("document.querySelector('#task-rows tr:nth-child(4)').className") == "current"
    assert page.evaluate(shades) == before and len(set(before)) > 1


def test_filters_and_panel_agree(page, pages):
    page.open(pages[3])
    set_filter(page, "search", "HumanEval/1")
    left = shown(page)
    assert left[0] == "HumanEval/1" and panel(page) == "HumanEval/1"
    page.evaluate("document.querySelector('#panel header div button:last-child').click()")
    assert panel(page) == left[1]
    set_filter(page, "order", "switches")
    assert panel(page) == left[1]  # it is still among them
    assert page.evaluate("document.querySelectorAll('#task-rows tr.current').length") == 1
    place = shown(page).index(left[1])
    assert page.evaluate("document.querySelector('#panel header div button').disabled") == (place == 0)
    set_filter(page, "search", "no such task")
    assert shown(page) == [] and panel(page) == "No task fits these filters."
    page.evaluate("document.getElementById('reset').click()")
    assert panel(page) == shown(page)[0]


def test_a_link_leads_to_its_task(page, pages):
    page.open(pages[8], "#HumanEval/17")
    assert panel(page) == "HumanEval/17"
    inside = "(() => { const box = document.getElementById('panel').getBoundingClientRect(); return box.top < innerHeight; })()"
    assert page.evaluate(inside)
    set_filter(page, "search", "HumanEval/17")
    page.evaluate("location.hash = '#HumanEval/2'; new Promise((done) => setTimeout(done, 100))")
    assert panel(page) == "HumanEval/2" and len(shown(page)) == 24
    page.evaluate("document.querySelector('#panel header div button:last-child').click()")
    assert page.evaluate("location.hash") == "#HumanEval/3"
    link = page.evaluate("document.querySelector('#task-rows tr:nth-child(9) a').href")
    assert link == pages[8].as_uri() + "#HumanEval/8"
    page.open(pages[8], "#nothing%20of%that")
    assert panel(page) == "HumanEval/0"


@pytest.mark.parametrize("experts", [3, 32])
def test_on_paper_nothing_is_cut_and_everything_is_open(page, pages, experts):
    page.resize(PAPER)
    page.open(pages[experts])
    page.evaluate("document.getElementById('theme').click()")  # dark
    page.emulate(media="print", prefers_color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER
    cut = page.evaluate(
        "[...document.querySelectorAll('.scroll, .list, .panel, pre')].filter((box) => box.scrollWidth > box.clientWidth + 1"
        " || box.scrollHeight > box.clientHeight + 1).map((box) => box.outerHTML.slice(0, 90))"
    )
    assert cut == []
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    seen = page.evaluate(
        "[...document.querySelectorAll('button, select, input, nav, .hint')].filter((one) => one.offsetParent)"
        ".map((one) => one.className)"
    )
    assert all(name.startswith("chip ") for name in seen)  # which are the legend of the code
    look = "getComputedStyle(document.querySelector('%s')).%s"
    assert page.evaluate(look % ("td.shade", "printColorAdjust")) == "exact"
    assert page.evaluate(look % ("body", "backgroundColor")) == "rgb(255, 255, 255)"
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0
