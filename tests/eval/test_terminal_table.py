"""Tables on terminals of any width: no word is cut, no heading appears twice, and every value is there."""

import io
import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dylora_moe.cli_common import PlainConsole
from dylora_moe.eval.report.expert_tables import print_expert_analysis
from dylora_moe.eval.report.report_table import ReportTable
from dylora_moe.eval.report.routing_tables import print_routing_analysis
from dylora_moe.eval.report.tables import scores
from dylora_moe.eval.sampling.run_record import read_runs
from dylora_moe.eval.terminal_table import print_table


WIDTHS = (40, 80, 120)
BORDERS = re.compile("[━┃┏┓┳┡┩╇│└┘┴─]")


def terminal(width: int, kind: type[Console] = PlainConsole) -> Console:
    return kind(file=io.StringIO(), force_terminal=True, color_system=None, width=width)


def shown(console: Console) -> str:
    return console.file.getvalue()


def words(text: str) -> list[str]:
    return BORDERS.sub(" ", text).split()


TEXT = st.text("abcdefg-: ", min_size=1, max_size=30).map(lambda text: " ".join(text.split()) or "x")


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_every_word_is_shown_whole(data):
    columns = data.draw(st.integers(1, 9))
    headings = data.draw(st.lists(TEXT, min_size=columns, max_size=columns))
    rows = data.draw(st.lists(st.lists(TEXT, min_size=columns, max_size=columns), min_size=1, max_size=5))
    numbers = data.draw(st.sets(st.integers(0, columns - 1)))
    width = data.draw(st.integers(10, 130))
    console = terminal(width, Console)
    print_table(console, headings, rows, title="the title", numbers=numbers)
    there = words(shown(console))
    plain = {word.strip("();:,") for word in there}
    for text in [*headings, *(text for row in rows for text in row)]:
        for word in text.split():
            assert word in there or word.strip("();:,") in plain, (word, shown(console))
    for line in shown(console).splitlines():
        assert len(line) <= width or len(line.split()) == 1
    assert len(re.findall(r"the\s+title", shown(console))) == 1


def test_a_table_that_fits_is_a_grid_of_every_column():
    console = terminal(80)
    print_table(console, ("name", "score"), [["a", "1.0"], ["a", "2.0"]], numbers=[1])
    assert [words(line) for line in shown(console).splitlines() if words(line)] == [
        ["name", "score"],
        ["a", "1.0"],
        ["a", "2.0"],
    ]


def test_what_is_the_same_in_every_row_is_said_once_where_the_table_would_not_fit():
    rows = [["a-long-name", f"single:{index}", "tasks 0 to 3", f"{index}.0%"] for index in range(3)]
    console = terminal(44)
    print_table(console, ("model", "strategy", "tasks", "pass@1"), rows, title="scores", numbers=[3])
    assert shown(console).startswith("scores (model a-long-name; tasks 0 to 3)\n")
    assert shown(console).count("a-long-name") == 1
    assert words(shown(console)).count("strategy") == 1


def test_a_table_too_wide_even_for_its_words_is_a_paragraph_a_row():
    headings = ["category", *(f"expert_number_{index}" for index in range(6))]
    rows = [[name, *(f"{index}.{len(name)}%" for index in range(6))] for name in ("lists", "numbers")]
    console = terminal(60)
    print_table(console, headings, rows, numbers=range(1, 7))
    assert shown(console).splitlines() == [
        "category lists: expert_number_0 0.5%, expert_number_1 1.5%,",
        "  expert_number_2 2.5%, expert_number_3 3.5%,",
        "  expert_number_4 4.5%, expert_number_5 5.5%",
        "category numbers: expert_number_0 0.7%,",
        "  expert_number_1 1.7%, expert_number_2 2.7%,",
        "  expert_number_3 3.7%, expert_number_4 4.7%,",
        "  expert_number_5 5.7%",
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_what_commands_print_is_whole_at_every_width(folder, width, monkeypatch):
    printed = []
    as_ever = ReportTable.print

    def keep(table, console):
        printed.append(table)
        as_ever(table, console)

    monkeypatch.setattr(ReportTable, "print", keep)
    console = terminal(width)
    runs = read_runs(folder)
    scores(runs, runs).print(console)
    for name, show in (("expert", print_expert_analysis), ("routing", print_routing_analysis)):
        show(SimpleNamespace(summary=json.loads((folder / f"{name}_analysis.json").read_text())), console)
    there = {word.strip("();:,") for word in words(shown(console))}
    assert len(printed) > 6
    for table in printed:
        columns = table.shown_columns()
        texts = [table.title, table.note, *(column.heading for column in columns)]
        for row in table.rows:
            texts += [
                f"{cell.text} {cell.interval}" for cell in (table.cell(row, column) for column in columns)
            ]
        for word in " ".join(texts).split():
            assert word.strip("();:,") in there, (table.name, word)
    for line in shown(console).splitlines():
        assert len(line) <= width or len(line.split()) == 1
