"""The command line: results on stdout, one line on stderr, exit codes, both spellings of options."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers_checkpoints import save_adapter, save_final_checkpoint, save_foundation, snapshot
from huggingface_hub import constants

from dylora_moe import __version__
from dylora_moe.cli import main
from dylora_moe.hub_export import export


@pytest.fixture(scope="module", autouse=True)
def no_network():
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    yield
    constants.HF_HUB_OFFLINE = before


@pytest.fixture(scope="module")
def foundation(tmp_path_factory):
    return save_foundation(tmp_path_factory.mktemp("foundation") / "base")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, foundation):
    return save_final_checkpoint(tmp_path_factory.mktemp("training") / "final", foundation)


@pytest.fixture(scope="module")
def repo(tmp_path_factory, checkpoint):
    return export(checkpoint, tmp_path_factory.mktemp("repos") / "mixture", verify=False).output_dir


@pytest.fixture
def run(capsys):
    def run_command(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run_command


def error_line(result) -> str:
    """The one line of a command that failed without a traceback."""
    _, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err and out == ""
    return lines[0]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dylora_moe", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_whole_path_in_processes_of_its_own(checkpoint, tmp_path):
    exported = command("export", checkpoint, "-o", tmp_path / "repo", "--router-mode", "sparse", "--json")
    assert exported.returncode == 0, exported.stderr
    result = json.loads(exported.stdout)
    assert result["check"]["passed"] and result["experts"] == ["expert_0", "expert_1", "expert_2"]
    stages = [
        "reading the source",
        "writing the repo",
        "checking the repo against the source",
        "putting the repo in its place",
    ]
    assert [line for line in exported.stderr.splitlines() if line in stages] == stages
    failed = command("export", checkpoint, "-o", tmp_path / "repo")
    assert failed.returncode == 2 and failed.stdout == ""
    assert "Traceback" not in failed.stderr
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "--overwrite" in last


def test_the_package_and_the_command_line_import_nothing_heavy():
    code = (
        "import sys, dylora_moe.cli, dylora_moe.hub_export\n"
        "heavy = {'torch', 'transformers', 'peft', 'evalplus'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_exporting_never_imports_what_lies_above(checkpoint):
    code = (
        "import sys, dylora_moe.hub_export as h\n"
        "h.export, h.inspect, h.make_variant, h.push, h.verify\n"
        "import dylora_moe.hub_export.checking.check_source\n"
        "sys.exit(', '.join(m for m in sys.modules if m.startswith(('dylora_moe.eval', 'dylora_moe.demo', 'evalplus'))) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_version_and_help(run):
    assert run("--version") == (0, f"dylora-moe {__version__}\n", "")
    for arguments in ([], ["--help"], ["export", "-h"]):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "") and "Usage" in out


@pytest.mark.parametrize("spelling", ["--routing_strategy", "--routing-strategy"])
def test_both_spellings_of_an_option(run, repo, tmp_path, spelling):
    code, out, _ = run("variant", repo, spelling, "single:expert_1", "-o", tmp_path / "variant", "--json")
    assert code == 0
    assert json.loads(out)["routing_strategy"] == "single:1"


def test_inspect_prints_text_or_json(run, checkpoint):
    code, out, err = run("inspect", checkpoint)
    assert (code, err) == (0, "")
    for part in ("final checkpoint", "expert_2", "router: num_experts 3", "memory in bfloat16", "6.14 KB"):
        assert part in out
    code, out, _ = run("inspect", checkpoint, "--json")
    assert [expert["name"] for expert in json.loads(out)["experts"]] == ["expert_0", "expert_1", "expert_2"]


@pytest.mark.slow
def test_verify_says_on_stderr_what_it_does_and_on_stdout_what_it_found(run, repo, checkpoint):
    code, out, err = run("verify", repo, "--against", checkpoint, "--json")
    assert code == 0 and json.loads(out)["passed"]
    stages = ["looking at the repo", "reading the source", "checking the repo against the source"]
    assert [line for line in err.splitlines() if line in stages] == stages


def test_export_prints_what_it_made(run, checkpoint, tmp_path):
    code, out, _ = run(
        "export",
        checkpoint,
        "-o",
        tmp_path / "r",
        "--no-verify",
        "--expert-names",
        "a,b",
        "--expert_names",
        "c",
    )
    assert code == 0
    assert "experts: a, b, c, with a router; default strategy: router" in out
    assert "not checked" in out


def test_inspect_says_what_is_missing(run, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "final")
    (folder / "dylo_moe_state" / "router.pt").unlink()
    code, out, _ = run("inspect", folder)
    assert code == 0 and "missing: " in out and "router.pt is missing" in out


WRONG = {
    "no such command": (["exprot", "x"], "exprot"),
    "no such option": (["inspect", "x", "--colour"], "--colour"),
    "no output": (["export", "x"], "--output_dir"),
    "not a number": (["inspect", "x", "--lora_alpha", "high"], "--lora_alpha"),
    "no such folder": (["inspect", "no/such/folder"], "no/such/folder does not exist"),
    "not on this machine": (["inspect", "nobody/nothing"], "nobody/nothing"),
    "a W&B artifact": (["inspect", "wandb:a/b"], "a/b"),
    "unknown folder": (["inspect", "{empty}"], "an empty folder"),
    "unknown strategy": (
        ["export", "{checkpoint}", "-o", "{out}", "--routing_strategy", "x"],
        "Valid: router, best",
    ),
    "expert out of range": (
        ["variant", "{repo}", "-o", "{out}", "--routing_strategy", "single:3"],
        "3 experts",
    ),
    "no foundation": (["export", "{checkpoint}", "-o", "{out}", "--base_model", "/no/where"], "--base_model"),
    "output not empty": (["export", "{checkpoint}", "-o", "{checkpoint}", "--overwrite"], "is not empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(run, checkpoint, repo, tmp_path, name):
    arguments, expected = WRONG[name]
    (tmp_path / "empty").mkdir()
    places = {"checkpoint": checkpoint, "repo": repo, "out": tmp_path / "out", "empty": tmp_path / "empty"}
    before = snapshot(checkpoint)
    result = run(*(argument.format(**places) for argument in arguments))
    assert result[0] == 2
    assert expected in error_line(result)
    assert not (tmp_path / "out").exists() and snapshot(checkpoint) == before


def test_a_failure_is_one_line_and_exit_code_1(run, checkpoint, tmp_path, monkeypatch):
    from dylora_moe.hub_export import exporter

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "_write", full)
    result = run("export", checkpoint, "-o", tmp_path / "out")
    assert result[0] == 1
    assert "no space left" in error_line(result)


def test_an_unforeseen_error_is_one_line_and_debug_shows_where(run, checkpoint, tmp_path, monkeypatch):
    from dylora_moe.hub_export import preparation

    def broken(*arguments):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(preparation, "make_plan", broken)
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "out")]
    result = run(*arguments)
    assert result[0] == 1
    assert "ZeroDivisionError: by zero" in error_line(result)
    with pytest.raises(ZeroDivisionError):
        main([*arguments, "--debug"])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dylora_moe.hub_export.inspect", interrupted)
    with pytest.raises(SystemExit) as ends:
        main(["inspect", "somewhere"])
    assert ends.value.code == 130 and "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--lora_alpha", "0"),
        ("--lora_alpha", "-4"),
        ("--lora_alpha", "nan"),
        ("--lora_alpha", "1e400"),
        ("--router_temperature", "nan"),
        ("--router_temperature", "inf"),
    ],
)
def test_nonsense_options_are_one_line_and_exit_code_2(run, checkpoint, tmp_path, options):
    result = run("export", checkpoint, "-o", tmp_path / "repo", "--no_verify", *options)
    assert result[0] == 2 and error_line(result)
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", {"(": 3}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"q_proj": "x"}),
        ("base_model_name_or_path", 5),
        ("lora_alpha", 0),
        ("lora_dropout", "x"),
    ],
)
def test_malformed_adapter_configs_are_bad_input(run, foundation, tmp_path, field, value):
    adapter = save_adapter(tmp_path / "adapter", foundation)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    result = run("export", adapter, "-o", tmp_path / "repo", "--no_verify")
    assert result[0] == 2 and error_line(result)
    assert not (tmp_path / "repo").exists()
