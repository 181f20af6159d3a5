"""The help of every command: groups, choices, strategies, an example, whole words; and what it costs to ask."""

import os
import shlex
import subprocess
import sys

import pytest
import typer

from dylora_moe import __version__, cli, cli_eval
from dylora_moe.cli_help import GROUPS, group_of
from dylora_moe.eval.fitting.grow_options import GrowOptions
from dylora_moe.eval.fitting.options import FitRouterOptions
from dylora_moe.eval.options import DTYPES, BenchmarkOptions, LossOptions
from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.repo import options as export_options
from dylora_moe.hub_export.repo.choices import STRATEGIES, check_strategy
from dylora_moe.modeling import configuration_dylora_moe as configuration
from dylora_moe.modeling.routing_strategies_dylora_moe import ROUTING_STRATEGIES


def every_command(group, path=()) -> dict[tuple[str, ...], typer.core.TyperCommand]:
    found = {}
    for name, command in group.commands.items():
        is_group = hasattr(command, "commands")
        found |= every_command(command, (*path, name)) if is_group else {(*path, name): command}
    return found


TOP = typer.main.get_command(cli.app)
COMMANDS = every_command(TOP)
PAGES = [(), ("mirror",), *COMMANDS]
each_command = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: " ".join(path) or "all")


@pytest.fixture
def page_of(capsys, monkeypatch):
    def show(path, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as ended:
            cli.main([*path, "--help"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    return show


def words(text: str) -> str:
    return " ".join(text.split())


@each_command
def test_every_option_is_in_a_group(page_of, path):
    page = page_of(path)
    for param in COMMANDS[path].params:
        if param.param_type_name == "option":
            assert group_of(param) in (*GROUPS, "Output"), param.name
            assert f"\n{group_of(param)}:\n" in page


def test_every_name_of_a_group_is_an_options():
    there = {param.name for command in COMMANDS.values() for param in command.params}
    assert {name for names in GROUPS.values() for name in names.split()} <= there


@each_page
@pytest.mark.parametrize("columns", [50, 80, 120])
def test_no_word_is_cut_and_no_heading_appears_twice(page_of, path, columns):
    page = page_of(path, columns)
    assert page.split() == page_of(path, 200).split()
    if columns >= 80:  # narrower than an example
        assert max(map(len, page.splitlines())) <= columns
    headings = [line for line in page.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert len(set(headings)) == len(headings)


@each_command
def test_every_text_is_shown_whole(page_of, path):
    command = COMMANDS[path]
    page = words(page_of(path))
    for text in [command.help, *(param.help for param in command.params)]:
        assert words(text) in page
    assert words(command.help) in words(page_of(path[:-1]))


@each_command
def test_every_command_has_an_example_that_is_understood(page_of, path):
    example = COMMANDS[path].epilog
    assert page_of(path).endswith(f"\n\nExample:\n  {example}\n") and len(example) <= 76
    program, *arguments = shlex.split(example)
    arguments = cli_eval.spread(arguments)
    assert program == "dylora-moe" and tuple(arguments[: len(path)]) == path
    COMMANDS[path].make_context(path[-1], arguments[len(path) :], **cli.CONTEXT_SETTINGS)


@each_command
def test_every_strategy_is_named_where_one_can_be_chosen(page_of, path):
    page = page_of(path)
    is_chosen = any(param.name == "routing_strategy" for param in COMMANDS[path].params)
    assert ("Routing strategies:" in page) == is_chosen
    if is_chosen:
        assert all(f"\n  {form} " in page and what in words(page) for form, what in STRATEGIES.items())


def test_the_strategies_are_those_of_the_registry():
    assert [form.partition(":")[0] for form in STRATEGIES] == list(ROUTING_STRATEGIES)
    for form in STRATEGIES:
        takes_expert = "<" in ROUTING_STRATEGIES[form.partition(":")[0]].forms()
        assert (":" in form) == takes_expert
        check_strategy(form)


@pytest.mark.parametrize("wrong", ["", "Router", "single", "single:", "router:", "base:0", "single;0"])
def test_a_strategy_of_no_form_is_refused(wrong):
    with pytest.raises(InputError, match="Valid: router, best, single:EXPERT"):
        check_strategy(wrong)


def test_choices_are_listed_and_are_those_there_are(page_of):
    assert export_options.ROUTER_MODES == configuration.ROUTER_MODES
    assert (*configuration.ROUTER_INPUTS, "none") == export_options.ROUTER_INPUTS
    for path, command in COMMANDS.items():
        page = page_of(path)
        for param in command.params:
            if param.name == "dtype":
                assert "float32" in param.metavar and param.metavar in page
            if param.name in ("router_mode", "router_input", "layout", "router", "backend", "benchmarks"):
                assert param.metavar.startswith("<") and param.metavar in page
    assert "--layout <full|adapter>" in page_of(("export",))
    assert f"--dtype <{'|'.join(DTYPES)}>" in page_of(("benchmark",))


@pytest.mark.parametrize("path", [("benchmark",), ("expert-analysis",), ("routing-analysis",)], ids=" ".join)
@pytest.mark.parametrize("option", ["--dataset", "--benchmarks"])
def test_dataset_and_benchmarks_mean_the_same(path, option):
    context = COMMANDS[path].make_context(path[-1], [option, "mbpp"], **cli.CONTEXT_SETTINGS)
    assert context.params["benchmarks"] == ["mbpp"]


@pytest.mark.parametrize("given", ["humaneval,mbpp", "humaneval mbpp"])
def test_several_benchmarks_follow_either_name(given):
    spread = cli_eval.spread(["benchmark", "--dataset", *given.split()])
    context = COMMANDS["benchmark",].make_context("benchmark", spread[1:], **cli.CONTEXT_SETTINGS)
    assert cli_eval.split(context.params["benchmarks"]) == ["humaneval", "mbpp"]


@pytest.mark.parametrize(
    "options", [BenchmarkOptions, LossOptions, FitRouterOptions, GrowOptions, export_options.ExportOptions]
)
def test_short_names_of_dtypes_are_understood(options):
    for short, long in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
        assert options(dtype=short).dtype == options(dtype=long).dtype == long
    with pytest.raises(InputError, match="bf17"):
        options(dtype="bf17")


def test_the_version_has_a_short_option(capsys):
    for option in ("-V", "--version"):
        with pytest.raises(SystemExit):
            cli.main([option])
        assert capsys.readouterr().out == f"dylora-moe {__version__}\n"


@pytest.mark.parametrize("path", [(), ("mirror",)], ids=["all", "mirror"])
def test_a_group_without_a_command_shows_its_help(page_of, path, capsys):
    page = page_of(path)
    with pytest.raises(SystemExit) as ended:
        cli.main(list(path))
    assert ended.value.code == 0 and capsys.readouterr().out == page


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("dylora-moe expo", ["export"]),
        ("dylora-moe benchmark --routing_strategy r", ["router", "round_robin"]),
        ("dylora-moe export --layout ", ["full", "adapter"]),
        ("dylora-moe loss --dtype bf", ["bfloat16"]),
        ("dylora-moe benchmark --data", ["--dataset"]),
    ],
)
def test_a_shell_completes(typed, expected):
    environment = {
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split(" ")) - 1),
        "_DYLORA_MOE_COMPLETE": "complete_bash",
    }
    completed = subprocess.run(
        [sys.executable, "-m", "dylora_moe"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.stdout.split() == expected


REFUSED = [
    "benchmark",
    "benchmark --model no/such/folder",
    "benchmark --model m --routing_strategy routr",
    "benchmark --model m --benchmarks humanevl",
    "benchmark --model m --dtype int8",
    "expert-analysis",
    "expert-analysis --model no/such/folder",
    "routing-analysis",
    "loss m",
    "loss --texts t.jsonl",
    "loss m --texts t.jsonl --routing_strategy routr",
    "inspect no/such/folder",
    "export no/such/folder -o out",
    "export m -o out --routing_strategy routr",
    "export m -o out --layout ful",
    "variant m -o out --routing_strategy single",
    "verify no/such/folder",
    "merge no/such/folder --expert 0 -o out",
    "mirror pull a/b/c:d -o out --routing_strategy routr",
    "explore no/such/folder",
    "explore m --dtype int8",
    "fit-router no/such/folder --texts t.jsonl -o out",
    "fit-router m --texts t.jsonl -o out --objective orcale",
    "grow no/such/folder --texts t.jsonl -o out",
]


def test_help_and_refusals_import_nothing_heavy(tmp_path):
    """All in one process, which would keep what any of them imports."""
    lines = [[*path, "--help"] for path in PAGES] + [shlex.split(typed) for typed in REFUSED] + [["-V"]]
    code = (
        "import sys, dylora_moe.eval\n"
        "from dylora_moe.cli import main\n"
        f"for line in {lines!r}:\n"
        "    try:\n"
        "        main(line)\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == (0 if line[-1] in ('--help', '-V') else 2), line\n"
        "    heavy = {'torch', 'transformers', 'peft', 'evalplus', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, (line, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["benchmark", "expert_analysis", "routing_analysis"])
def test_the_modules_of_commands_import_nothing_heavy_for_their_help(name):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_module('dylora_moe.eval.{name}', run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    sys.exit(str({'torch', 'transformers'} & set(sys.modules) or '') or ended.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: dylora-moe {name.replace('_', '-')}" in done.stdout
