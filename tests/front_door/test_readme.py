"""The README's four paths, run block by block on a small stand-in for what `make demo` leaves; links of all pages."""

import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers_checkpoints import save_final_checkpoint, save_foundation
from helpers_readme import PROMPTS, ROOT, follow, for_organization, paths
from hub_server import Hub
from huggingface_hub import constants

from dylora_moe.cli import main
from dylora_moe.demo.problems import write_dataset
from dylora_moe.eval import read_runs
from dylora_moe.hub_export.checking import check


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*/*.md")])
ROUTED, SCORED, TRAINED, PUBLISHED = paths()


@pytest.fixture
def demo_output(tmp_path, monkeypatch):
    """What `make demo` leaves in the working directory, with random experts and two problems."""
    folder = tmp_path / "demo_output"
    foundation = save_foundation(folder / "foundation")
    save_final_checkpoint(folder / "checkpoint", foundation)
    problems = write_dataset(folder / "problems.jsonl")
    problems.write_text("".join(problems.read_text().splitlines(keepends=True)[:2]))
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def run(demo_output, monkeypatch):
    """Runs a path's blocks in this process: quick, without the checks after exports and with few new tokens."""
    from evalplus.data import humaneval

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", str(demo_output / "problems.jsonl"))
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(demo_output / "problems.jsonl"))

    # of the export to the cache that `benchmark` makes
    monkeypatch.setattr(check, "check_export", lambda *arguments: SimpleNamespace(passed=True))

    def run_command(line: str) -> None:
        arguments = shlex.split(line.replace("--max_new_tokens 128", "--max_new_tokens 4"))[1:]
        if arguments[0] == "export":
            arguments.append("--no_verify")
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code in (0, None), line

    def run_path(title: str, without: str = " ") -> None:
        for language, text in paths()[title]:
            if language == "yaml":
                Path(PROMPTS).write_text(text, encoding="utf-8")
            if language == "python":
                exec(compile(text, "README.md", "exec"), {})
            for line in text.splitlines() if language == "bash" else []:
                if line.startswith("dylora-moe ") and without not in line.split():
                    run_command(line)

    return run_path


def test_three_peft_folders_become_a_routed_model(run):
    run(ROUTED)
    config = json.loads(Path("routed/config.json").read_text())
    assert [expert["name"] for expert in config["expert_configs"]] == ["strings", "numbers", "lists"]
    assert config["router_input"] == "base"


def test_a_checkpoint_gets_its_score_and_trains(run):
    run(SCORED, without="expert-analysis")
    runs = read_runs("evalplus_results")
    assert sorted(entry.routing_strategy for entry in runs) == ["base", "best", "router"]
    assert all("plus_pass@1" in entry.scores for entry in runs)
    run(TRAINED)
    assert Path("my-tuned-mixture/model.safetensors").is_file()


@pytest.mark.slow
def test_every_path_in_a_shell(demo_output, tmp_path):
    """As a reader runs them, in processes of their own, against a Hub on the loopback address."""
    programs = {"dylora-moe": "dylora_moe", "python": "", "hf": "huggingface_hub.cli.hf"}
    (tmp_path / "bin").mkdir()
    for name, module in programs.items():
        command = f'{shlex.quote(sys.executable)} {"-m " + module if module else ""} "$@"'
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nexec {command}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    with Hub() as hub:
        environment = {
            **os.environ,
            **hub.environment(tmp_path / "home", "hf_write"),
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "HOME": str(tmp_path / "home"),
        }
        taken = follow(for_organization(paths(), "guild"), tmp_path, environment)
        assert list(taken) == list(paths())
        assert hub.repos["guild/my-mixture"].private
        assert "README.md" in hub.repos["guild/my-mixture"].branches["main"].files
    assert Path("evalplus_results/report.html").is_file()


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_files_that_the_pages_name_exist():
    folders = "modeling|hub_export|eval|dylora_moe|tests|examples|docs"
    for page in PAGES:
        for path in re.findall(rf"`((?:{folders})/[\w./]+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_files_of_the_walks_exist():
    """docs/architecture.md names files by their rooms."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = ("modeling", "hub_export", "eval", "dylora_moe")
    there = [f"/{path.relative_to(ROOT)}" for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        assert any(path.endswith(f"/{name}") for path in there), name
