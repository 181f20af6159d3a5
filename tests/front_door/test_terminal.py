"""Names in files reach the terminal as printable text: none moves the cursor, hides a line or passes for one."""

import io
import json
import logging
import shutil
import sys

import pytest
import torch
from helpers_checkpoints import change_json, save_adapter, save_final_checkpoint, save_foundation
from safetensors.torch import load_file, save_file

from dylora_moe import cli, cli_common, cli_progress
from dylora_moe.cli_common import PlainConsole, plain_logging
from dylora_moe.eval.report.report_table import ReportTable
from dylora_moe.hub_export import export, verify
from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError


ERASE = "\x1b[1A\x1b[2K"  # the line above
HOSTILE = f"a{ERASE}b\rc\x07\x9b2Jd\u202ee\u200bf\u2028g\x7fh"
SHOWN = r"a\x1b[1A\x1b[2Kb\rc\x07\x9b2Jd\u202ee\u200bf\u2028g\x7fh"


@pytest.fixture(scope="module")
def foundation(tmp_path_factory):
    return save_foundation(tmp_path_factory.mktemp("foundation") / "base")


@pytest.fixture(scope="module")
def whole_repo(tmp_path_factory, foundation):
    checkpoint = save_final_checkpoint(tmp_path_factory.mktemp("training") / "final", foundation)
    return export(checkpoint, tmp_path_factory.mktemp("repos") / "mixture", verify=False).output_dir


@pytest.fixture
def repo(whole_repo, tmp_path):
    return shutil.copytree(whole_repo, tmp_path / "mixture")


@pytest.fixture
def run(capsys):
    """Run a command; its exit code, and the lines of what it says, which are all printable."""

    def run_command(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        lines = f"{captured.out}{captured.err}".split("\n")
        assert all(line.isprintable() for line in lines), captured
        return caught.value.code, lines

    return run_command


def test_a_tensors_name_erases_no_finding(run, repo):
    tensors = load_file(repo / "model.safetensors")
    tensors[f"x{ERASE * 3}\nok     safetensors: 24 tensors in 1 files"] = torch.zeros(1)
    save_file(tensors, repo / "model.safetensors", metadata={"format": "pt"})
    code, lines = run("verify", repo)
    assert code == 1 and len([line for line in lines if line.startswith("WRONG")]) == 2
    assert any(line.startswith("WRONG") and r"x\x1b[1A\x1b[2K" in line for line in lines)
    assert not any("24 tensors" in line for line in lines if line.startswith("ok"))


def test_no_line_of_a_diff_or_of_a_files_name_passes_for_a_finding(run, repo):
    with open(repo / "routing_dylora_moe.py", "a", newline="") as file:
        file.write(f"import evil  # {ERASE * 60}ok     code: 17 files are those of this package\r# \u202e\n")
    (repo / "evil\nok     logits: 7 quantities equal.py").write_text("")
    code, lines = run("verify", repo)
    assert code == 1 and any(line.startswith("WRONG  code") for line in lines)
    assert not any(line.startswith(("ok     logits", "ok     code")) for line in lines)
    assert any(line.startswith("       +import evil  # \\x1b[1A") for line in lines)
    # Python writes a finding, too
    assert all("\x1b" not in finding.detail for finding in verify(repo).findings)


def test_names_of_experts_are_no_markup(run, repo):
    entries = json.loads((repo / "config.json").read_text())["expert_configs"]
    names = ["a[/x]", "[link=https://evil.example]:heart:[/link]", HOSTILE]
    change_json(
        repo / "config.json",
        expert_configs=[{**entry, "name": name} for entry, name in zip(entries, names, strict=True)],
    )
    code, lines = run("inspect", repo)
    text = "\n".join(lines)
    assert code == 0 and all(f"│ {name}" in text for name in (*names[:2], SHOWN[:40])), text
    code, lines = run("merge", repo, "--expert", "9", "-o", repo.parent / "out")
    assert code == 2 and f"{names[0]}, {names[1]}, {SHOWN[:16]}" in lines[0]


def test_a_foundations_name_is_one_line_and_json_has_escapes(run, foundation, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", foundation)
    name = f"{HOSTILE}\nnote: nothing is missing"
    change_json(adapter / "adapter_config.json", base_model_name_or_path=name)
    _, lines = run("inspect", adapter)
    assert any(line.startswith(f"base model: {SHOWN}\\nnote: nothing") for line in lines)
    _, lines = run("inspect", adapter, "--json")
    assert json.loads("\n".join(lines))["foundation"]["name"] == name


def test_an_endless_name_leaves_an_error_of_one_line(run, foundation, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", foundation)
    weights = adapter / "adapter_model.safetensors"
    save_file({**load_file(weights), f"\x1b[2J{'x' * 1_000_000}.lora_Z.weight": torch.zeros(1)}, weights)
    code, lines = run("export", adapter, "-o", tmp_path / "repo")
    error = next(line for line in lines if line.startswith("error: "))
    assert code == 2 and len(error) < 4200
    assert r"\x1b[2Jxxx" in error and error.endswith("linear layers can be exported")


def test_what_python_writes_by_itself_is_printable():
    assert str(InputError(f"{HOSTILE}\nx")) == r"a\x1b[1A\x1b[2Kb c\x07\x9b2Jd\u202ee\u200bf g\x7fh x"
    assert str(DyloraMoeWarning(HOSTILE)).isprintable()
    assert str(InputError("Zoë's 数 🙂 [x] C:\\y")) == "Zoë's 数 🙂 [x] C:\\y"


def test_bars_and_tables_are_filtered_on_a_terminal(monkeypatch):
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=True, width=200)
    for module in (cli_common, cli_progress):
        monkeypatch.setattr(module, "err", console)
    with cli_progress.steps() as tell:
        tell(f"[bold]{HOSTILE}", 1, 2)
    with cli_common.progress() as tell:
        tell(HOSTILE)
    ReportTable("t", HOSTILE, ["model", "[red]"], [[HOSTILE, "[/x]"]], note=HOSTILE).print(console)
    text = file.getvalue()
    assert text.count(SHOWN) >= 4 and f"[bold]{SHOWN}" in text and "[red]" in text and "[/x]" in text
    assert f"a{ERASE}b" not in text
    for character in "\x07\x9b\u202e\u200b\u2028\x7f":
        assert character not in text


def test_what_other_libraries_log_is_filtered(caplog):
    logger = logging.getLogger("transformers.some_module")
    with plain_logging(), caplog.at_level("WARNING", logger=logger.name):
        logger.warning("a model of type %s\nand more", HOSTILE)
    assert caplog.messages == [f"a model of type {SHOWN}\nand more"]
    assert logging.getLogRecordFactory() is logging.LogRecord


def test_a_traceback_is_filtered(capsys):
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        cli._show_traceback(*sys.exc_info())
    err = capsys.readouterr().err
    assert "Traceback" in err and f"ValueError: {SHOWN}" in err
    assert all(line.isprintable() for line in err.split("\n"))
